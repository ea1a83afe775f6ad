"""The demo runs, says what it measured, and measures what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures import same_bits, values

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
pytest.importorskip("rich", reason="rich, which prints the tables, is not installed")


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return pytest.importorskip("examples.digits")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split("[│|]", line) if cell.strip()]


def test_the_quick_demo_prints_a_table_and_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "examples.digits", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "120", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {cells(line)[0]: cells(line)[1:] for line in run.stdout.splitlines() if len(cells(line)) > 3}
    expected = ("training accuracy, %", "test accuracy, %", "loss gap", "sharpness, 1e-3", "step, ms")
    for name in expected:
        assert len([float(cell) for cell in rows[name]]) == 3, name
    assert all(float(cell) > 50 for cell in rows["test accuracy, %"]), "two epochs teach more than chance"
    assert all(float(cell) > 0 for cell in rows["sharpness, 1e-3"] + rows["step, ms"])
    assert float(rows["step / SGD step"][0]) == 1
    assert float(rows["eager SAM, default base"][-1]) == 1
    assert any(name.startswith("ours") for name in rows), "no step throughput of ours"

    image = pytest.importorskip("matplotlib.image").imread(tmp_path / "digits.png")
    assert image.shape[0] > 800 and image.shape[1] > 1200
    assert image[..., :3].std() > 0.05, "the picture is nearly one colour"

    record = json.loads((tmp_path / "digits.json").read_text())
    assert [r["method"] for r in record["runs"]] == ["SGD", "SAM", "ASAM"]
    budgets = [r["gradients"][-1] for r in record["runs"]]
    assert len(set(budgets)) == 1, "the methods were given different numbers of gradients"


def test_sharpness_is_the_formula_and_leaves_the_model(digits):
    data = digits.load()
    model = digits.network()
    model.train()
    digits.score(model, data.x, data.y)
    before, buffers = values(model.parameters()), values(model.buffers())
    found = digits.sharpness(model, data.x, data.y, 0.3)
    assert same_bits(values(model.parameters()), before)
    assert same_bits(values(model.buffers()), buffers)

    loss = torch.nn.functional.cross_entropy
    params = list(model.parameters())
    here = loss(model(data.x), data.y)
    grads = torch.autograd.grad(here, params)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p.add_(0.3 * g / norm)
        there = loss(model(data.x), data.y)
    assert found == pytest.approx((there - here).item(), rel=1e-3)
    assert found > 0


def test_data_are_split_and_labels_are_wrong_as_asked(digits):
    clean, noisy = digits.load(), digits.load(0.2)
    assert len(clean.x) == 1000 and len(clean.x_test) == 797
    assert clean.x.min() == 0 and clean.x.max() == 1
    assert torch.equal(clean.y_test, noisy.y_test)
    share = (clean.y != noisy.y).float().mean().item()
    assert 0.15 < share < 0.25
    train, test = ({tuple(row) for row in x.tolist()} for x in (clean.x, clean.x_test))
    assert len(train & test) == 0


def test_an_interrupted_demo_shows_what_was_done(digits, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    train, calls = digits.train, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(digits, "train", interrupted)
    threads = torch.get_num_threads()
    code = digits.main(["--quick", "--no-bench", "--out", str(tmp_path)])
    assert code == 130
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr().out
    assert "Interrupted after 2 of 3 runs" in shown
    assert "test accuracy" in shown
    assert len(json.loads((tmp_path / "digits.json").read_text())["runs"]) == 2


def test_arguments_that_make_no_sense_are_refused(digits, capsys):
    with pytest.raises(SystemExit):
        digits.parse(["--noise", "1.5"])
    assert "--noise is a share" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        digits.parse(["--seeds", "0"])


def test_the_sharpness_example_puts_two_reports_side_by_side(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("COLUMNS", "120")
    example = pytest.importorskip("examples.sharpness_report")
    report, reports = example.report, []

    def few(*arguments, **options):
        reports.append(report(*arguments, **options, samples=40, draws=2, eigenvalues=0, progress=False))
        return reports[-1]

    monkeypatch.setattr(example, "report", few)
    monkeypatch.setattr(example, "network", lambda: torch.nn.Linear(64, 10))  # the example's takes its time
    example.main(["--epochs", "1"])
    rows = {cells(line)[0]: cells(line)[1:3] for line in capsys.readouterr().out.splitlines() if "│" in line}
    for name in ("loss", "one step", "worst case", "accuracy gap"):
        shown = [float(cell.split()[0]) for cell in rows[name]]
        assert shown == pytest.approx([found[name.replace(" ", "_")] for found in reports], rel=0.006)
    assert reports[0]["loss"] != reports[1]["loss"], "both were trained alike"
