"""The benchmark runs end to end at sizes that take seconds, and its lists are those of the models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

# Not installed with the package: found from the checkout it is part of.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("rich", reason="the benchmark prints with rich")

from bench import compare, machine, oracle, passes, plot, published, run, sparse, steps, training  # noqa: E402
from bench.cases import BASES, CASES, COUNTS, Workspace  # noqa: E402
from bench.peers import SPECS, Eager  # noqa: E402
from bench.records import Results, measured  # noqa: E402
from bench.timing import Effort, interleave  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_lists_have_the_models_tensors_and_elements(name):
    shapes = CASES[name].shapes()
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes)) == COUNTS[name]


def test_bench_runs_and_writes_rows_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    tiny = ("tiny model", lambda: nn.Linear(4, 3), _pictures_of_four, "sgd", (2, 5), 1, "rows")
    monkeypatch.setattr(training, "MODELS", {"cnn": tiny})
    monkeypatch.setattr(run.report, "MODELS", training.MODELS)
    command = "bench --quick --seconds 0.01 --cap 3 --cases lora --bases sgd adamw --threads 1 --out".split()
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path)])
    assert run.main() == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "quick.jsonl").read_text().splitlines()]
    assert {row["section"] for row in rows} == {
        "step",
        "host",
        "passes",
        "sparse",
        "variants",
        "train",
        "whole",
    }
    assert all(
        {"cpu", "cores", "threads", "torch", "sam_kernels", "commit", "os"} <= row["machine"].keys()
        for row in rows
    )
    timed = {row["peer"] for row in rows if row["metric"] == "total_ms"}
    assert {"ours_foreach 0.9", "published 0.9", "ours_foreach random 0.9", "published any mask"} <= timed
    assert {"eager_default", "eager_fused", "foreach", "ours_foreach", "base_alone"} <= timed
    assert not [row for row in rows if row["metric"] == "wrong"]
    assert "Goals" in printed and "Goals" in (tmp_path / "quick.txt").read_text()
    results = Results(tmp_path / "quick.jsonl")
    if "ours_native" in timed:
        assert (tmp_path / "quick_sparse.png").stat().st_size > 0
        assert (tmp_path / "quick.png").stat().st_size > 0
    else:
        assert not plot.draw(results, tmp_path / "none.png")
    _, slower = compare.table(results, results, 0.05, phases=True, everything=True)
    assert slower == 0


def _pictures_of_four(batch):
    return torch.randn(batch, 4), torch.randint(3, (batch,))


def test_gate_refuses_a_peer_that_does_not_perturb(monkeypatch):
    monkeypatch.setattr(
        Eager, "step_phase1", lambda self: self.saved.update((p, p.data) for p in self.params)
    )
    wrong = _gate("eager_fused")
    assert "perturbed weights are off" in wrong


def test_gate_refuses_a_peer_that_updates_from_the_perturbed_weights(monkeypatch):
    monkeypatch.setattr(Eager, "step_phase2", lambda self: self.base.step())
    assert "off by" in _gate("eager_fused")


def test_gate_refuses_a_peer_that_raises(monkeypatch):
    monkeypatch.delattr(Eager, "step_phase2")
    assert "AttributeError" in _gate("eager_fused")


def _gate(key: str) -> str:
    unit = steps.Unit("step", "lora", "sgd", torch.float32, cap=50, compiled="not here")
    rows = steps.measure(unit, Effort(1, 1, 1, 0.0), lambda text: None, lambda done, of: None)
    assert key not in {row["peer"] for row in rows if row["metric"] == "total_ms"}
    return next(row["value"] for row in rows if row["peer"] == key and row["metric"] == "wrong")


@pytest.mark.parametrize("kind", sparse.UPDATES)
def test_sparse_gate_refuses_masks_of_other_weights(monkeypatch, kind):
    monkeypatch.setattr(
        published, "_highest", lambda ranking, count: (torch.arange(len(ranking)) < count).float()
    )
    rows = _sparse(sparse.Update(kind, (0.5,), cap=3))
    assert f"{sparse.PUBLISHED} 0.5" in {row["peer"] for row in rows if row["metric"] == "wrong"}


def test_sparse_gate_refuses_steps_that_ignore_the_mask(monkeypatch):
    monkeypatch.setattr(
        published.SparseSam,
        "masks",
        property(lambda self: [1.0 for _ in self.params], lambda self, _: None),
        raising=False,
    )
    rows = _sparse(sparse.Step("sgd", cap=3))
    wrong = [row["value"] for row in rows if row["metric"] == "wrong"]
    assert wrong == 2 * ["weights outside the mask were perturbed"]


def _sparse(unit: sparse.Update | sparse.Step) -> list:
    return sparse.measure(unit, Effort(1, 1, 1, 0.0), lambda text: None, lambda done, of: None)


@pytest.mark.parametrize("name", BASES)
def test_oracle_agrees_with_torchs_own_optimizer(name):
    base = BASES[name]
    workspace = Workspace([(5, 3), (4,)], torch.float64, base)
    truth = oracle.trajectory(workspace, base)
    params = workspace.parameters()
    optimizer = base.build(params, None)
    for step in range(oracle.STEPS):
        for param, grad in zip(params, oracle.gradients_of_step(workspace, step)[1], strict=True):
            param.grad = grad
        optimizer.step()
    assert truth.descended.error(params) < 1e-14
    assert truth.perturbed.error(params) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_passes_are_checked_before_they_are_timed(monkeypatch, dtype):
    assert passes.wrong("foreach", dtype, 1001) == {}
    calls = passes.calls
    monkeypatch.setattr(passes, "calls", lambda v, backend: calls(v, backend) | {"restore_": lambda: None})
    assert list(passes.wrong("foreach", dtype, 1001)) == ["restore_"]


def test_streams_read_and_write_every_element():
    x, ones = torch.arange(640.0), torch.ones(640)
    for tool in passes.stream.copies(torch.empty(640), x):
        out = torch.full((640,), torch.nan)
        passes.stream.copies(out, x)[tool]()
        assert torch.equal(out, x), tool
    for tool in passes.stream.triads(torch.empty(640), x, ones):
        out = torch.full((640,), torch.nan)
        passes.stream.triads(out, x, ones)[tool]()
        assert torch.equal(out, x + 0.5), tool
    assert passes.stream.reads(x)["read: torch.sum"]() == x.sum()
    for tool in passes.stream.mixes(*(ones for _ in range(6))):
        w, g, saved, m, v, out = (k * x for k in range(1, 7))
        passes.stream.mixes(w, g, saved, m, v, out)[tool]()
        expected = {
            "like combine_: C": (out, 9 * x),
            "like perturb_: C": (w, 3 * x),
            "like descend_ sgd: C": (w, 7 * x),
            "like descend_ adamw: C": (w, (3 + 4 + 4.5) * x),
        }
        changed, value = expected[tool]
        assert torch.equal(changed, value), tool
        assert torch.equal(saved, x if "perturb" in tool else 3 * x), tool


def test_rounds_are_interleaved_and_every_contestant_runs_in_each():
    seen = []
    contestants = {name: lambda name=name: seen.append(name) or {"total": 1.0} for name in "abc"}
    samples = interleave(contestants, Effort(warmup=2, fewest=4, most=4, seconds=0.0))
    assert all(len(samples[name]["total"]) == 4 for name in "abc")
    assert all(sorted(seen[i : i + 3]) == ["a", "b", "c"] for i in range(0, 18, 3))


def test_compare_flags_only_changes_beyond_the_noise():
    before = measured("ours_native", "total_ms", [10, 11, 12, 11, 10])
    assert compare.verdict(before, measured("ours_native", "total_ms", [11, 12, 11, 12, 11]), 0.05) == ""
    assert (
        compare.verdict(before, measured("ours_native", "total_ms", [15, 16, 15, 16, 15]), 0.05) == "slower"
    )
    assert compare.verdict(before, measured("ours_native", "total_ms", [5, 6, 5, 6, 5]), 0.05) == "faster"


def test_slug_names_cpu_and_cores(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)
    for model, expected in {
        "AMD EPYC": "amd-epyc-2c",
        "AMD EPYC 9654 96-Core Processor": "amd-epyc-9654-2c",
        "Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz": "intel-xeon-platinum-8480-2c",
    }.items():
        monkeypatch.setattr(machine, "cpu_model", lambda model=model: model)
        assert machine.slug() == expected


def test_every_peer_counts_its_bytes():
    for spec in SPECS.values():
        for base in BASES.values():
            assert all(count >= 0 for count in spec.phase_bytes(base))
    assert sum(SPECS["ours_native"].phase_bytes(BASES["sgd"])) == 40
    assert sum(SPECS["ours_native"].phase_bytes(BASES["adamw"])) == 48
    assert sum(SPECS["eager_default"].phase_bytes(BASES["sgd"])) == 92
    assert sum(SPECS["eager_fused"].phase_bytes(BASES["adamw"])) == 76
