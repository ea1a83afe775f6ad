"""Stage 5 of `make gpu-check` on a CPU in a GPU's place; what a call measures and leaves; the report."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_gpu_check import MACHINE, ROOT, Stand

pytest.importorskip("rich", reason="the benchmark prints with rich")

from bench.gpu import (  # noqa: E402
    check,
    correctness,
    device,
    kernels,
    models,
    ours,
    recipe_steps,
    report,
    training,
    turns,
)
from bench.gpu.session import Session, Unit  # noqa: E402
from bench.passes import BYTES  # noqa: E402
from bench.peers import Eager, Ours  # noqa: E402
from bench.records import measured, single  # noqa: E402
from bench.training import PLAIN  # noqa: E402
from sam_kernels import graphs, recipes  # noqa: E402

STAGE = check.STAGES[4]


def pictures_of(batch):
    return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def sentences_of(batch):
    return torch.randint(11, (batch, 5)), torch.randint(11, (batch, 5))


Task = training.Task
TINY = {
    "cnn": Task(
        "cnn",
        partial(models.resnet, (1, 1), 4, 10),
        pictures_of,
        "sgd",
        (2, 4),
        1,
        "images",
        torch.channels_last,
    ),
    "vit": Task(
        "vit", partial(models.VisionTransformer, 8, 1, 2, 32), pictures_of, "adamw", (2, 4), 1, "images"
    ),
    "lm": Task("lm", partial(models.Decoder, 11, 8, 1, 2, 5), sentences_of, "adamw", (2, 3), 5, "tokens"),
}


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Tiny models, our backends stood for by foreach, and a graph that calls what it should have recorded."""
    monkeypatch.setattr(training, "TASKS", TINY)
    monkeypatch.setattr(recipe_steps, "TASKS", TINY)
    monkeypatch.setattr(recipe_steps, "_WHERE", dict.fromkeys(recipe_steps.GROUPS, ("cnn",)))
    monkeypatch.setattr(correctness, "missing", lambda *a, **k: [])
    for key in ours.OURS:
        monkeypatch.setitem(ours.SPECS, key, replace(ours.SPECS[key], make=partial(Ours, backend="foreach")))
    # torch's capturable AdamW refuses CPUs.
    base_for = training.base_for
    monkeypatch.setattr(training, "base_for", lambda name, capturable, **more: base_for(name, **more))
    monkeypatch.setattr(graphs, "_device_of", lambda opt: torch.device("cpu"))
    monkeypatch.setattr(graphs, "_on_side_stream", lambda run, where: run())
    monkeypatch.setattr(graphs, "_record", lambda run, where: (run, torch.zeros(())))
    text = []
    made = Session(Stand(), device.GpuResults(tmp_path / "gpu.jsonl", MACHINE), text.append, cap=3)
    made.text = text
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)


def only(monkeypatch, *names):
    units = training.units
    monkeypatch.setattr(training, "units", lambda s: (u for u in units(s) if u.name in names))


# ---- training steps ----------------------------------------------------------------------------------------


def test_every_model_is_measured_at_two_batches_and_small_ones_come_first(session):
    names = [unit.name for unit in training.units(session) if unit.name.startswith("train/")]
    assert names == ["train/cnn/2", "train/vit/2", "train/lm/2", "train/cnn/4", "train/vit/4", "train/lm/3"]


@pytest.mark.parametrize("unit", ["train/cnn/4", "train/lm/2"])
def test_steps_are_timed_eager_and_in_a_graph_with_their_memory(session, monkeypatch, unit):
    only(monkeypatch, unit)
    monkeypatch.setattr(Stand, "peak_extra", lambda self, run: run() or 77)
    assert check.run_stage(STAGE, session, resume=False) == 0, session.text
    rows, item = session.results.rows, TINY[unit.split("/")[1]].item
    eager = {row["peer"] for row in rows if row["metric"] == f"{item}_per_second"}
    assert {*ours.OURS, "eager_default", "eager_fused", PLAIN} <= eager
    graphed = {row["peer"] for row in rows if row["metric"] == f"graph_{item}_per_second"}
    assert graphed == {*ours.OURS, PLAIN} if "cnn" in unit else {PLAIN}
    if "lm" in unit:  # foreach's AdamW counts on the host: a reason in place of a figure
        reason = session.results.value(unit, "ours_native", "graph_skipped")
        assert "give it capturable=True" in reason
    ratios = {row["metric"] for row in rows if row["peer"] == "ours_triton" and "_to_native" in row["metric"]}
    assert {"optimizer_to_native", "total_to_native"} <= ratios
    assert session.results.value(unit, PLAIN, "peak_bytes") == 77
    assert session.results.value(unit, PLAIN, "graph_peak_bytes") == 77
    total = session.results.find(unit, "ours_native", "total_ms")
    rate = session.results.value(unit, "ours_native", f"{item}_per_second")
    assert rate == pytest.approx(1e3 * total["items"] / total["p50"], rel=1e-3)


def test_all_contestants_have_taken_the_same_steps_when_their_losses_are_compared(session, monkeypatch):
    only(monkeypatch, "train/cnn/2")
    assert check.run_stage(STAGE, session, resume=False) == 0, session.text
    losses = {
        (row["peer"], row["metric"]): row["value"]
        for row in session.results.rows
        if row["metric"].endswith("loss")
    }
    same = [losses[key, kind] for key in ours.OURS for kind in ("loss", "graph_loss")]
    assert same == pytest.approx([losses["eager_default", "loss"]] * 4, rel=0.02)
    assert losses[PLAIN, "loss"] == pytest.approx(losses[PLAIN, "graph_loss"], rel=0.02)


class Lost(Eager):
    """An update that goes astray."""

    def step_phase2(self):
        super().step_phase2()
        with torch.no_grad():
            for p in self.params:
                p.mul_(3)


@pytest.mark.parametrize(("key", "status"), [("ours_triton", check.WRONG), ("eager_fused", 0)])
def test_a_peer_whose_loss_is_elsewhere_is_not_timed(session, monkeypatch, key, status):
    only(monkeypatch, "train/cnn/2")
    monkeypatch.setitem(ours.SPECS, key, replace(ours.SPECS[key], make=Lost))
    assert check.run_stage(STAGE, session, resume=False) == status
    assert "eager SAM's" in session.results.value("train/cnn/2", key, "wrong")
    assert session.results.find("train/cnn/2", key, "total_ms") is None
    assert session.results.find("train/cnn/2", "ours_native", "total_ms")


def test_a_contestant_that_does_not_fit_or_raises_costs_no_other(session):
    field = training.Field(session)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    assert math.isnan(field.admit("po_fused", full))
    assert math.isnan(field.admit("ours_native/graph", full))
    assert math.isnan(field.admit("eager_fused", lambda: 1 / 0))
    assert field.admit("eager_default", lambda: (dict, 2.0)) == 2.0
    assert field.admit("ours_native", lambda: (dict, 2.1), reference=2.0) == 2.1
    field.admit("ours_triton", lambda: (dict, math.nan), reference=2.0)
    assert list(field.contestants) == ["eager_default", "ours_native"]
    said = {(row["peer"], row["metric"]): row["value"] for row in field.rows}
    assert "out of memory" in said["po_fused", "skipped"]
    assert "out of memory" in said["ours_native", "graph_skipped"]
    assert "ZeroDivisionError" in said["eager_fused", "wrong"] and "nan" in said["ours_triton", "wrong"]


def test_a_context_that_is_lost_ends_the_unit(session, monkeypatch):
    monkeypatch.setattr(Stand, "is_lost", lambda self: True)
    with pytest.raises(ZeroDivisionError):
        training.Field(session).admit("ours_native", lambda: 1 / 0)


def test_pictures_of_the_convolutional_network_have_their_channels_last():
    model, inputs, _ = training.TASKS["resnet50"].make(1, torch.device("cpu"))
    assert inputs.is_contiguous(memory_format=torch.channels_last) and not inputs.is_contiguous()
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


# ---- recipes -----------------------------------------------------------------------------------------------


def test_every_recipe_is_measured_once_beside_the_base_and_sam():
    named = [name for group in recipe_steps.GROUPS.values() for name in group]
    assert sorted([*named, "sam"]) == recipes.names()


def test_the_efficient_recipes_are_measured_on_every_model():
    assert {unit.name for unit in recipe_steps.units(None)} >= {
        f"recipes/{name}/{task.batches[0]}/{group}"
        for name, task in training.TASKS.items()
        for group in ("fewer", "phase")
    }


GRADIENTS = {
    PLAIN: 1,
    "sam": 2,
    "looksam": 1.2,
    "rst": 1.5,
    "msam": 1,
    "rand_sam": 1,
    "k_sam": 2,
    "esam": 2,
    "ssam_f": 2,
    "ssam_d": 2,
    "nosam": 2,
    "sampa": 2,
}


@pytest.mark.parametrize("group", ["fewer", "phase"])
def test_recipes_are_timed_over_whole_periods(session, monkeypatch, group):
    unit = f"recipes/cnn/2/{group}"
    only(monkeypatch, unit)
    assert check.run_stage(STAGE, session, resume=False) == 0, session.text
    results = session.results
    for name in (PLAIN, "sam", *recipe_steps.GROUPS[group]):
        found = results.value(unit, name, "gradients")
        assert found == pytest.approx(GRADIENTS[name]) if name != "ae_sam" else 1 <= found <= 2
        assert results.value(unit, name, "total_ms") > 0
        assert results.value(unit, name, "images_per_second") > 0
        assert (results.value(unit, name, "total_to_base") is None) is (name == PLAIN)
        assert (results.value(unit, name, "total_to_sam") is None) is (name == "sam")


@pytest.mark.parametrize("group", ["metrics", "combinations"])
def test_the_other_recipes_run(session, monkeypatch, group):
    only(monkeypatch, f"recipes/cnn/2/{group}")
    assert check.run_stage(STAGE, session, resume=False) == 0, session.text


# ---- time and what is left -------------------------------------------------------------------------------


def test_the_readme_says_what_each_stage_is_given():
    rows = re.findall(r"^\| (\d) \| (\d+) \|", (ROOT / "bench" / "README.md").read_text(), re.M)
    assert {int(stage): int(seconds) for stage, seconds in rows} == turns.STAGE_SECONDS


def test_stages_fit_three_calls_of_ten_minutes_and_half_an_hour():
    seconds = turns.STAGE_SECONDS
    assert sorted(seconds) == [stage.number for stage in check.STAGES]
    build, start = 60, 90  # all cores at work; a machine that is started for the call
    for call in ((1, 2), (3, 4), (5, 6)):
        kept = turns.GRACE + turns.REPORT_SECONDS + build * (1 in call)
        assert sum(seconds[number] for number in call) + kept <= 590
    assert sum(seconds.values()) + build + 3 * start < 1800


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`main` on the stand, each stage of one unit that passes, in this process."""
    monkeypatch.setattr(check, "absence", lambda: None)
    monkeypatch.setattr(check, "Gpu", Stand)
    monkeypatch.setattr(check, "describe", lambda gpu: dict(MACHINE))
    monkeypatch.setattr(correctness, "missing", lambda *a, **k: [])
    for stage in check.STAGES:
        done = Unit(f"{stage.title}/one", lambda s: [single("x", "passed", True)], least=15)
        monkeypatch.setattr(stage.module, "units", lambda s, done=done: iter([done]))
    started = []

    def run(line, **more):
        started.append((line, more))
        return subprocess.CompletedProcess(line, check.main(line[3:]))

    monkeypatch.setattr(turns.subprocess, "run", run)
    run.started = started
    return lambda *line: (check.main([*line, "--out", str(tmp_path)]), started)


def test_the_list_says_what_became_of_every_unit_and_measures_nothing(command, tmp_path, capsys):
    command("--stage", "1")
    results = device.GpuResults(tmp_path / "gpu.jsonl", {**MACHINE, "tree": "old"})
    results.replace("kernels/one", [single("x", "passed", True)])
    results = device.GpuResults(tmp_path / "gpu.jsonl", MACHINE)
    results.replace("correctness/one", [single("x", "wrong", "off")])
    before = (tmp_path / "gpu.jsonl").read_text()
    capsys.readouterr()
    assert command("--list")[0] == 0
    said = capsys.readouterr().out
    for line in ("ceilings/one", "done"), ("correctness/one", "wrong"), ("optimizer phase/one", "to do"):
        assert f"{line[0]:<44} {line[1]}\n" in said
    assert "to do: other sources, card or versions measured it" in said
    assert (tmp_path / "gpu.jsonl").read_text() == before


def given(line):
    """Seconds a process may take, by the clock on the wall."""
    return float(line[line.index("--ends") + 1]) - time.time()


def test_a_call_ends_within_its_limit_and_the_next_takes_up_what_is_left(command, monkeypatch, tmp_path):
    status, started = command("--limit", "90")
    # Each of them had what was left of the limit, and not what a stage is given at most.
    assert status == 0 and len(started) == 6 and all(20 <= given(line) <= 31 for line, _ in started)
    assert all(more["timeout"] <= 90 - turns.REPORT_SECONDS for _, more in started)
    started.clear()
    assert command("--limit", "80") == (check.NOT_FINISHED, [])
    began = f"{time.time() - 200:.0f}"  # the build took all of it
    assert command("--limit", "210", "--began", began) == (check.NOT_FINISHED, [])
    assert command("--resume") == (0, [])
    (tmp_path / "gpu.jsonl").unlink()
    command("--resume", "--stage", "1", "2")
    assert [line[5] for line, _ in started] == ["1", "2"]
    assert all(more["timeout"] > turns.STAGE_SECONDS[int(line[5])] for line, more in started)
    started.clear()
    command("--stage", "6", "--limit", "590")
    assert 520 < given(started[0][0]) <= 531


def test_a_unit_is_not_begun_with_less_time_than_it_takes(session, monkeypatch):
    long = Unit("train/long", lambda s: [single("x", "passed", True)], least=60)
    monkeypatch.setattr(training, "units", lambda s: iter([long]))
    session.ends = time.monotonic() + 50
    assert check.run_stage(STAGE, session, resume=False) == check.NOT_FINISHED
    assert "time is over" in session.text[-1] and not session.results.rows


def test_a_wrong_peer_leaves_its_unit_done_and_our_own_fault_does_not(tmp_path):
    results = device.GpuResults(tmp_path / "gpu.jsonl", MACHINE)
    results.replace("train/a/1", [single("po_fused", "wrong", "off"), single("ours_native", "loss", 1.0)])
    results.replace("train/b/1", [single("po_fused", "loss", 1.0), single("ours_native", "wrong", "off")])
    results.replace("recipes/a/1/fewer", [single("looksam", "wrong", "off")])
    units = ("train/a/1", "train/b/1", "recipes/a/1/fewer")
    assert [results.has(unit) for unit in units] == [True, False, False]
    assert [results.state(unit) for unit in units] == ["done", "wrong", "wrong"]


# ---- the report --------------------------------------------------------------------------------------------

SOURCE = {**MACHINE, "gpu": "Card", "cuda": "13.0"}


def spread(middle):
    return [0.97 * middle, middle, 1.05 * middle]


def synthetic(path, **machine):
    """A file as the stages leave it; every number is made up."""
    results = device.GpuResults(path, {**SOURCE, **machine})
    giga = 2**30
    results.replace(
        "ceilings/1GiB",
        [
            measured(f"{k}: x", "ms", spread(giga / r / 1e6), bytes=giga)
            for k, r in (("copy", 4e3), ("read", 4.5e3))
        ],
    )
    results.replace("ceilings/launch", [measured("launch", "graph_us", spread(1.3))])
    about = {"case": "resnet50", "tensors": 161, "numel": 25_557_032, "dtype": "float32"}
    rows = []
    for backend, slower in (("native", 1.0), ("triton", 1.1)):
        for name in kernels.PASSES:
            count = BYTES[name] * about["numel"]
            for metric, more in (("graph_ms", 1.0), ("eager_ms", 1.4)):
                rows.append(
                    measured(f"{backend} {name}", metric, spread(slower * more * count / 3.6e9), bytes=count)
                )
    results.replace("kernels/resnet50/float32", [{**about, **row} for row in rows])
    rows = [single("po_loop", "skipped", "pytorch-optimizer is not installed")]
    for peer, eager, graph in (
        ("copy", 0.24, None),
        ("base_alone", 0.2, 0.14),
        ("ours_native", 0.29, 0.26),
        ("ours_triton", 0.4, 0.27),
        ("eager_default", 6.1, None),
        ("foreach", 1.2, 0.5),
    ):
        rows.append(measured(peer, "eager_ms", spread(eager), bytes=40 * about["numel"]))
        if graph:
            rows.append(measured(peer, "graph_ms", spread(graph), bytes=40 * about["numel"]))
        rows += [single(peer, "launches", 3), measured(peer, "host_us", spread(31.0))]
        rows.append(single(peer, "peak_extra_bytes", 4 * about["numel"]))
    results.replace("phase/resnet50/sgd/float32", [{**about, "base": "sgd", **row} for row in rows])
    results.replace("phase/vit_l/adamw/float32", [single("everybody", "skipped", "90 GiB are free")])
    rows = [measured("native select 0.5", "eager_ms", spread(0.2), bytes=4 * about["numel"])]
    rows.append(single("native select 0.5", "peak_extra_bytes", about["numel"] // 2))
    results.replace("kernels/resnet50/selection", [{**about, **row} for row in rows])
    results.replace("sweep/verdict of native", [single("chunk, all passes", "winner", "8192", ratio=0.98)])
    results.replace("sweep/chunk/resnet50/float32", [measured("8192 perturb_", "graph_ms", spread(0.1))])
    about |= {"base": "sgd", "batch": 64, "items": 64, "item": "images", "precision": "bfloat16 autocast"}
    rows = []
    for peer, eager, graph in (
        (PLAIN, 27.0, 24.0),
        ("ours_native", 55.0, 48.0),
        ("ours_triton", 55.4, 48.1),
        ("eager_default", 61.0, None),
    ):
        rows += [measured(peer, "total_ms", spread(eager)), measured(peer, "optimizer_ms", spread(0.4))]
        rows += [measured(peer, "images_per_second", spread(64e3 / eager)), single(peer, "peak_bytes", 7.5e9)]
        if graph:
            rows.append(measured(peer, "graph_ms", spread(graph)))
            rows.append(measured(peer, "graph_images_per_second", spread(64e3 / graph)))
    results.replace("train/resnet50/64", [{**about, **row} for row in rows])
    rows = [measured(PLAIN, "total_ms", spread(27.0)), measured("sam", "total_ms", spread(55.0))]
    rows.append(measured("looksam", "total_ms", spread(33.0), note="k = 5"))
    rows += [single(name, "gradients", n) for name, n in ((PLAIN, 1), ("sam", 2), ("looksam", 1.2))]
    rows += recipe_steps._ratios(rows)
    results.replace("recipes/resnet50/64/fewer", [{**about, **row} for row in rows])
    results.replace(report.VERDICT, [single("report", "withheld", None)])
    return results


def test_tables_and_pictures_are_redrawn_from_rows_alone(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")
    path = tmp_path / "gpu.jsonl"
    synthetic(path)
    assert report.main([str(path)]) == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "gpu.jsonl",
        "gpu.png",
        "gpu.txt",
        "gpu_recipes.png",
    ]
    assert len(list(tmp_path.iterdir())) <= 8 and max(f.stat().st_size for f in tmp_path.iterdir()) < 2**24
    text = (tmp_path / "gpu.txt").read_text()
    for piece in (
        "Predictions and goals",
        "Ceilings",
        "Each pass by itself: ResNet-50 (161 tensors, 26M), float32",
        "One SAM step, optimizer phase only: ResNet-50 (161 tensors, 26M), SGD momentum, float32",
        "pytorch-optimizer, foreach off: not run: pytorch-optimizer is not installed",
        "Whole training step: ResNet-50 (161 tensors, 26M), SGD momentum, batch 64, bfloat16 autocast",
        "looksam, k = 5",
        "phase/vit_l/adamw/float32 │ everybody │ 90 GiB are free",
        "Sweeps: verdict of native",
    ):
        assert piece in text, piece
    assert "Sweeps: chunk" not in text
    (selected,) = (line for line in text.splitlines() if "native select 0.5" in line)
    assert selected.strip("│ ").split("│")[-1].strip() == "0.50"
    line = next(line for line in text.splitlines() if "ours, native" in line and "0.26" in line)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells[1] == "0.29" and cells[4] == "0.26" and cells[3] == cells[6] == "1.00"
    assert cells[7] == f"{100 * 40 * 25_557_032 / 0.26e9 / 4e3 * 1e3:.0f}%"
    assert cells[8] == "31.0" and cells[10] == "3" and cells[12] == "4.00"


def test_only_rows_of_the_sources_that_measured_last_are_shown(tmp_path):
    path = tmp_path / "gpu.jsonl"
    synthetic(path, tree="old")
    results = device.GpuResults(path, SOURCE)
    results.replace("ceilings/launch", [measured("launch", "graph_us", spread(1.3))])
    results.replace(report.VERDICT, [single("report", "withheld", None)])
    report.write(path)
    text = (tmp_path / "gpu.txt").read_text()
    assert "launch, graph" in text and "Each pass by itself" not in text and "ours, native" not in text
    assert not (tmp_path / "gpu.png").exists()


@pytest.mark.parametrize("verdict", ["No figure without a passed correctness stage; it lacks x.", None])
def test_nothing_is_shown_before_correctness_has_passed(tmp_path, verdict, capsys):
    path = tmp_path / "gpu.jsonl"
    results = synthetic(path)
    results.rows = [row for row in results.rows if row["unit"] != report.VERDICT]
    path.write_text("".join(json.dumps(row) + "\n" for row in results.rows))
    if verdict:
        results.replace(report.VERDICT, [single("report", "withheld", verdict)])
    assert report.main([str(path)]) == 1
    assert "passed correctness stage" in capsys.readouterr().out
    text = (tmp_path / "gpu.txt").read_text()
    assert "withheld" in text and "ours, native" not in text and "0.26" not in text
    assert [f.name for f in tmp_path.glob("*.png")] == []


def test_a_run_leaves_the_report_and_few_files(command, tmp_path, monkeypatch, capsys):
    assert command()[0] == 0
    said = capsys.readouterr().out
    assert "Predictions and goals" in said and f"{tmp_path / 'gpu.txt'}\n" in said
    assert report.withheld(report.latest(tmp_path / "gpu.jsonl")) is None
    lacking = ["correct/pytest/rest"]
    monkeypatch.setattr(correctness, "missing", lambda *a, **k: lacking)
    command("--stage", "1")
    assert "it lacks correct/pytest/rest" in (tmp_path / "gpu.txt").read_text()
    assert "it lacks correct/pytest/rest" in report.withheld(report.latest(tmp_path / "gpu.jsonl"))
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_better_picture_costs_no_figures(tmp_path):
    (tmp_path / "bench/gpu").mkdir(parents=True)
    for name in device._SHOWING:
        assert (ROOT / name).exists()
        (tmp_path / name).write_text("a")
    before = device.tree_hash(tmp_path)
    (tmp_path / "bench/gpu/pictures.py").write_text("b")
    assert device.tree_hash(tmp_path) == before
    (tmp_path / "bench/gpu/training.py").write_text("b")
    assert device.tree_hash(tmp_path) != before


# ---- make ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_without_an_environment_of_its_own_make_builds_in_place_and_installs_nothing():
    line = ["make", "-n", "gpu-check", "PYTHON=python3", "VENV=", "STAGE=5"]
    said = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.index("setup.py -q build_ext --inplace") < said.index("-m bench.gpu") and "pip" not in said


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_when_it_began():
    line = ["make", "-n", "gpu-check", "PYTHON=python3", "VENV="]
    said = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert abs(int(re.search(r"BEGAN=(\d+) ", said)[1]) - time.time()) < 60


def test_the_line_for_copies_of_the_checkout_takes_former_results_along(tmp_path):
    readme = (ROOT / "bench" / "README.md").read_text()
    (line,) = re.findall(r"^    (mkdir -p former .*)$", readme, re.M)
    tools, checkout, out = tmp_path / "tools", tmp_path / "checkout", tmp_path / "out"
    for folder in (tools, checkout, out):
        folder.mkdir()
    (tools / "make").write_text('#!/bin/sh\necho "$@"\n')
    (tools / "make").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(out)}
    for rows in (None, "rows"):
        if rows:
            (checkout / "former" / "gpu.jsonl").write_text(rows)
        done = subprocess.run(
            ["bash", "-c", line], cwd=checkout, env=environment, check=True, capture_output=True, text=True
        )
        assert (out / "gpu.jsonl").exists() is bool(rows)
        assert f"RESULTS={out}" in done.stdout and re.search(r"COMMIT=[0-9a-f]{7}\b", done.stdout)
    assert (out / "gpu.jsonl").read_text() == "rows"
