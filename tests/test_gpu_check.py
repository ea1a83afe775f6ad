"""`make gpu-check` without a GPU: it says so; its pure parts; every stage on a CPU in a GPU's place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Not installed with the package: found from the checkout it is part of.
sys.path.insert(0, str(ROOT))

pytest.importorskip("rich", reason="the benchmark prints with rich")

from bench.gpu import (  # noqa: E402
    ceilings,
    check,
    compare,
    correctness,
    device,
    graphs,
    kernels,
    lists,
    models,
    phase,
    predictions,
    sweeps,
    training,
)
from bench.gpu.session import Session, Unfinished, Unit  # noqa: E402
from bench.records import measured, single  # noqa: E402

RESULTS = ROOT / "bench" / "results"


# ---- without a GPU ---------------------------------------------------------------------------------


def files_below(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("chosen", [{}, {"STAGE": "2"}], ids=["all stages", "one stage"])
def test_every_stage_starts_and_says_why_it_is_skipped(chosen):
    before = files_below(RESULTS)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **chosen}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == (1 if chosen else len(check.STAGES))
    for line, stage in zip(lines, [check.STAGES[1]] if chosen else check.STAGES, strict=True):
        assert line.startswith(f"stage {stage.number}, {stage.title}: no CUDA device: ")
        assert line.endswith(", nothing was measured")
    assert files_below(RESULTS) == before


def test_stages_are_the_six_of_the_work_list():
    assert [stage.number for stage in check.STAGES] == [1, 2, 3, 4, 5, 6]
    assert check.parse(["--stage", "2", "4"]).stage == [2, 4]


# ---- pure parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lists.CASES)
def test_lists_have_the_models_tensors_and_elements(name):
    shapes = lists.CASES[name].shapes()
    assert (len(shapes), lists.numel(shapes)) == lists.COUNTS[name]


def test_models_have_the_lists_tensors():
    with torch.device("meta"):
        made = {"resnet50": models.resnet(), "vit_l": models.VisionTransformer()}
        decoder = models.Decoder()
    for name, model in made.items():
        shapes = sorted(tuple(p.shape) for p in model.parameters())
        assert shapes == sorted(map(tuple, lists.CASES[name].shapes())), name
    assert sum(p.numel() for p in decoder.parameters()) == 124_439_808


def test_bytes_follow_the_dtype():
    assert kernels.bytes_of("perturb_", torch.float32, 10) == 160
    assert kernels.bytes_of("perturb_", torch.bfloat16, 10) == 80
    assert kernels.bytes_of("sq_norm", torch.float32, 10) == 40
    assert kernels.bytes_of("descend_ adamw", torch.float32, 10) == 280


def test_lists_in_turn_cover_the_l2_four_times():
    mega = 2**20
    assert kernels.sets_for(102 * mega, 50 * mega) == 2
    assert kernels.sets_for(51 * mega, 50 * mega) == 4
    assert kernels.sets_for(1200 * mega, 50 * mega) == 1
    assert kernels.sets_for(1, 50 * mega) == 4


def test_only_what_occupies_the_device_is_a_launch():
    names = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "cuda_runtime", "cpu_op", "Kernel")
    assert device.count_launches({"traceEvents": [{"cat": name} for name in names] + [{"ph": "M"}]}) == 4


def test_slug_is_a_folder_name():
    assert device.slug("NVIDIA H200") == "nvidia-h200"


def test_tree_hash_changes_with_a_source(tmp_path):
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.cu"
    source.write_text("a")
    before = device.tree_hash(tmp_path)
    source.write_text("b")
    assert device.tree_hash(tmp_path) != before


MACHINE = {"gpu": "G", "driver": "1", "torch": "2", "tree": "t", "commit": "c"}


def test_a_unit_is_done_for_its_own_sources_and_if_nothing_was_wrong(tmp_path):
    path = tmp_path / "gpu.jsonl"
    results = device.GpuResults(path, MACHINE)
    results.replace("good", [single("x", "passed", True), single("y", "skipped", "no tool")])
    results.replace("bad", [single("x", "passed", True), single("y", "wrong", "off")])
    read = device.GpuResults(path, MACHINE)
    assert read.has("good") and not read.has("bad") and not read.has("never")
    assert device.GpuResults(path, {**MACHINE, "commit": "d"}).has("good")
    other = device.GpuResults(path, {**MACHINE, "tree": "u"})
    assert not other.has("good") and other.current().rows == []
    assert len(read.current().rows) == 4


def figures(tmp_path, share):
    """Results of a device whose copy makes 4,000 GB/s and whose passes make a share of it."""
    results = device.GpuResults(tmp_path / "gpu.jsonl", MACHINE)
    giga = 2**30
    slow, fast = (
        measured(f"copy: {n}", "ms", [giga / r / 1e6], bytes=giga) for n, r in (("a", 3e3), ("b", 4e3))
    )
    results.replace("ceilings/1GiB", [slow, fast])
    for number, case in enumerate(lists.LARGE):
        milliseconds = giga / (4e3 * (share + 0.01 * number)) / 1e6
        results.replace(
            f"kernels/{case}/float32", [measured("perturb_", "graph_ms", [milliseconds] * 3, bytes=giga)]
        )
    return results


@pytest.mark.parametrize(("share", "is_met"), [(0.93, True), (0.90, False)])
def test_a_pass_goal_is_about_the_worst_list_and_the_fastest_ceiling(tmp_path, share, is_met):
    results = figures(tmp_path, share)
    assert predictions.ceiling(results, "copy") == pytest.approx(4e3, rel=1e-3)
    assert predictions.ceiling(results, "read") is None
    goal = next(e for e in predictions.EXPECTATIONS if e.text.startswith("perturb_, float32"))
    outcome = goal.measure(results)
    assert outcome.value == pytest.approx(share, rel=1e-3) and goal.is_met(outcome) is is_met
    assert outcome.against.startswith("vit_l")


def test_goals_of_launches_and_host_time_are_upper_bounds(tmp_path):
    results = device.GpuResults(tmp_path / "gpu.jsonl", MACHINE)
    rows = [single("ours_native", "launches", 3), measured("ours_native", "host_us", [31.0])]
    rows += [
        measured("ours_native", "eager_ms", [1.0, 1.1]),
        measured("eager_default", "eager_ms", [12.0, 11.0]),
    ]
    results.replace("phase/resnet50/sgd/float32", rows)
    met = {e.text: e.is_met(e.measure(results)) for e in predictions.EXPECTATIONS if e.target}
    assert met["ResNet-50's list, SGD: launches a step"] is True
    assert met["ResNet-50's list, SGD: host time a step"] is False
    assert met["ResNet-50's list, SGD, against eager SAM"] is True
    assert met["1.5B list, AdamW, against eager SAM"] is None


def test_never_slower_than_compiled_takes_the_worst_list(tmp_path):
    results = device.GpuResults(tmp_path / "gpu.jsonl", MACHINE)
    for unit, theirs in zip(predictions._COMPILED, (2.0, 0.9), strict=True):
        rows = [measured("ours_native", "eager_ms", [1.0]), measured("compile_own", "eager_ms", [theirs])]
        results.replace(unit, rows)
    goal = next(e for e in predictions.EXPECTATIONS if e.text.startswith("against torch.compile, eager"))
    assert goal.measure(results).value == pytest.approx(0.9) and not goal.is_met(goal.measure(results))


def printed(table):
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_table_shows_figures_only_after_correctness(tmp_path):
    results = figures(tmp_path, 0.93)
    open_table, closed = (
        printed(check.goals_table(results)),
        printed(check.goals_table(results, "No figure.")),
    )
    assert "0.93" in open_table and "yes" in open_table and "not measured" in open_table
    assert "0.93" not in closed and "withheld" in closed and "No figure." in closed
    assert check.withheld_because([], False) is None
    assert "correct/pytest" in check.withheld_because(["correct/pytest"], False)
    assert check.withheld_because([], True)


SUMMARY = "========= ERROR SUMMARY: 1 error\n"
INVALID = "========= Invalid __global__ read of size 4 bytes\n=========     at {}(float*)+0x70\n"


def test_a_sanitizers_output_is_judged_by_our_kernels():
    assert correctness.sanitizer_problems(0, "========= ERROR SUMMARY: 0 errors") == []
    assert correctness.sanitizer_problems(9, INVALID.format("at::native::fill") + SUMMARY) == []
    (problem,) = correctness.sanitizer_problems(9, INVALID.format("void samk::perturb") + SUMMARY)
    assert "Invalid" in problem and "samk::perturb" in problem
    assert correctness.sanitizer_problems(1, "Traceback: no module") != []
    assert correctness.sanitizer_problems(1, "Traceback\n========= ERROR SUMMARY: 0 errors") != []


def test_differences_are_found():
    x = [torch.tensor([1.0, 2.0]), torch.empty(0)]
    assert compare.difference(x, [x[0].clone(), x[1]], torch.float32) is None
    assert "off by" in compare.difference([torch.tensor([1.0, 2.1]), x[1]], x, torch.float32)
    nan = [torch.tensor([1.0, float("nan")]), x[1]]
    assert "finite" in compare.difference(nan, x, torch.float32)
    assert compare.difference(nan, nan, torch.float32) is None
    assert compare.same_bits(nan, nan) and not compare.same_bits([torch.tensor(0.0)], [torch.tensor(-0.0)])


# ---- every stage, on a CPU in the place of a GPU ---------------------------------------------------


class Stand(device.Gpu):
    """A CPU with a GPU's methods: what it measures means nothing, but every line of the stages runs."""

    backend = "foreach"  # on a device of our own kernels it is "native"
    name, l2_bytes = "Stand", 64

    def __init__(self):
        self.device = torch.device("cpu")

    def count(self):
        return 1

    def free_bytes(self):
        return 3 * 2**30

    def synchronize(self):
        pass

    def spin(self, microseconds=0):
        pass

    def laps(self, runs, ahead=0):
        lasted = []
        for run in runs:
            start = time.perf_counter()
            run()
            lasted.append(time.perf_counter() - start)
        return lasted

    def capture(self, run, warmup=3):
        for _ in range(warmup):
            run()
        return run

    def launches(self, run):
        run()
        return graphs.LAUNCHES

    def peak_extra(self, run):
        run()
        return 0


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "AWKWARD", [(0,), (1,), (3,), (2, 0, 3), (5, 4, 3, 3), (2049,)])
    for module in (correctness, graphs):
        monkeypatch.setattr(module, "AWKWARD", compare.AWKWARD)
    results = device.GpuResults(tmp_path / "gpu.jsonl", MACHINE)
    log = []
    made = Session(Stand(), results, log.append, cap=3)
    made.text = log
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors gain nothing from more
    yield made
    torch.set_num_threads(threads)


def wrong(results):
    return [row for row in results.rows if row["metric"] == "wrong"]


def test_stage_1_runs(session):
    assert check.run_stage(check.STAGES[0], session, resume=False) == 0
    assert predictions.ceiling(session.results, "copy") > 0
    assert session.results.value("ceilings/launch", "launch", "graph_us") >= 0


def test_stage_2_passes_for_a_backend_that_is_right_and_opens_the_way_to_figures(session, monkeypatch):
    monkeypatch.setattr(compare, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(correctness, "DTYPES", compare.DTYPES)
    assert "correct/library" in correctness.missing(session, session.results, only_direct=True)
    monkeypatch.setattr(correctness, "units", correctness.direct)
    assert check.run_stage(check.STAGES[1], session, resume=False) == 0, wrong(session.results)
    assert correctness.missing(session, session.results, only_direct=True) == []
    session.text.clear()
    assert check.run_stage(check.STAGES[1], session, resume=True) == 0
    assert sum("done by an earlier run" in line for line in session.text) == len(
        list(correctness.direct(session))
    )


def test_stage_2_finds_a_backend_that_is_wrong(session, monkeypatch):
    from sam_kernels.backends import foreach

    perturb = foreach.BACKEND.perturb_

    def off(group, norm, **more):
        perturb(group, norm * 1.01, **more)

    monkeypatch.setattr(foreach.BACKEND, "perturb_", off, raising=False)
    units = [u for u in correctness.direct(session) if u.name in ("correct/step/sgd", "correct/graph/sgd")]
    monkeypatch.setattr(correctness, "units", lambda session: iter(units))
    assert check.run_stage(check.STAGES[1], session, resume=False) == check.WRONG
    assert any("perturbed weights" in row["value"] for row in wrong(session.results))
    assert "correct/step/sgd" in correctness.missing(session, session.results, only_direct=True)


def test_no_figure_is_measured_before_correctness(session):
    assert check.run_stage(check.STAGES[2], session, resume=False) == check.WRONG
    assert session.results.rows == [] and "no figure without a passed stage 2" in session.text[-1]


def only(monkeypatch, module, *names):
    """Leave some units of a stage, and open the way to it."""
    units = module.units
    monkeypatch.setattr(module, "units", lambda s: (u for u in units(s) if u.name in names))
    monkeypatch.setattr(correctness, "missing", lambda *a, **k: [])


@pytest.mark.parametrize("case", ["kernels/resnet50/float32", "kernels/resnet50/bfloat16"])
def test_stage_3_runs(session, monkeypatch, case):
    only(monkeypatch, kernels, case)
    assert check.run_stage(check.STAGES[2], session, resume=False) == 0, session.text
    timed = {(row["peer"], row["metric"]) for row in session.results.rows}
    expected = {(name, metric) for name in kernels.PASSES for metric in ("eager_ms", "graph_ms")}
    assert expected <= timed


def test_stage_3_skips_a_list_that_does_not_fit(session, monkeypatch):
    only(monkeypatch, kernels, "kernels/llama_7b/float32")
    monkeypatch.setattr(Stand, "free_bytes", lambda self: 2**31 + 2 * 4 * 291 * 3)
    assert check.run_stage(check.STAGES[2], session, resume=False) == 0
    assert [row["metric"] for row in session.results.rows] == ["skipped"]


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_stage_4_runs(session, monkeypatch, base):
    only(monkeypatch, phase, f"phase/resnet50/{base}/float32")
    check.run_stage(check.STAGES[3], session, resume=False)
    rows = session.results.rows
    # The native library may be missing or out of step where this test runs; then it is skipped as a peer.
    assert not [row for row in wrong(session.results) if row["peer"] != "ours_native"], wrong(session.results)
    timed = {row["peer"] for row in rows if row["metric"] == "eager_ms"}
    assert {"eager_default", "eager_fused", "foreach", "ours_foreach", "base_alone", "copy"} <= timed
    graphed = {row["peer"] for row in rows if row["metric"] == "graph_ms"}
    assert "foreach" in graphed and not graphed & {"eager_default", "eager_fused", "foreach_item"}
    assert {"launches", "host_us", "peak_extra_bytes", "first_call_ms", "error"} <= {
        r["metric"] for r in rows
    }


def test_stage_4_leaves_compiling_to_the_next_run_when_time_is_short(session, monkeypatch):
    only(monkeypatch, phase, "phase/resnet50/sgd/float32/compiled")
    session.ends = time.monotonic() + 60
    assert check.run_stage(check.STAGES[3], session, resume=False) == check.NOT_FINISHED
    assert session.results.rows == []


def test_stage_5_runs(session, monkeypatch):
    def pictures(batch):
        return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    tiny = {
        "cnn": training.Task(
            "cnn", lambda: models.resnet((1, 1), 4, 10), pictures, "sgd", (2, 4), 1, "images"
        ),
        "vit": training.Task(
            "vit", lambda: models.VisionTransformer(8, 1, 2, 32), pictures, "adamw", (2, 4), 1, "images"
        ),
        "lm": training.Task(
            "lm",
            lambda: models.Decoder(11, 8, 1, 2, 5),
            lambda batch: (torch.randint(11, (batch, 5)), torch.randint(11, (batch * 5,))),
            "adamw",
            (1, 2),
            5,
            "tokens",
        ),
    }
    monkeypatch.setattr(training, "TASKS", tiny)
    monkeypatch.setattr(correctness, "missing", lambda *a, **k: [])
    monkeypatch.setattr(
        training, "PEERS", tuple("ours_foreach" if p == "ours_native" else p for p in training.PEERS)
    )
    assert check.run_stage(check.STAGES[4], session, resume=False) == 0, session.text
    peers = {row["peer"] for row in session.results.rows if row["metric"].endswith("_per_second")}
    assert peers == {"ours_foreach", "eager_default", "eager_fused", "one_gradient"}


def test_stage_6_says_that_there_is_nothing_to_sweep(session, monkeypatch):
    monkeypatch.setattr(correctness, "missing", lambda *a, **k: [])
    assert sweeps.SWEEPS == () and check.run_stage(check.STAGES[5], session, resume=False) == 0
    assert "nothing can be swept" in session.text[-1]


def test_a_unit_that_raises_is_wrong_and_costs_no_other(session, monkeypatch):
    def raises(session):
        raise ValueError("broken")

    units = [Unit("ceilings/a", raises), Unit("ceilings/b", lambda s: [single("x", "passed", True)])]
    monkeypatch.setattr(ceilings, "units", lambda session: iter(units))
    assert check.run_stage(check.STAGES[0], session, resume=False) == check.WRONG
    assert session.results.has("ceilings/b") and not session.results.has("ceilings/a")


def test_a_unit_without_time_is_left_and_not_wrong(session, monkeypatch):
    def late(session):
        raise Unfinished("too late")

    monkeypatch.setattr(ceilings, "units", lambda session: iter([Unit("ceilings/a", late)]))
    assert check.run_stage(check.STAGES[0], session, resume=False) == check.NOT_FINISHED
    session.ends = time.monotonic()
    assert check.run_stage(check.STAGES[0], session, resume=False) == check.NOT_FINISHED
    assert "time is over" in session.text[-1]


def test_a_wrong_peer_is_left_out_and_a_wrong_result_of_ours_is_a_fault():
    row = single("foreach", "wrong", "off")
    assert not check.is_fault("phase/resnet50/sgd/float32", row)
    assert check.is_fault("phase/resnet50/sgd/float32", {**row, "peer": "ours_native"})
    assert check.is_fault("correct/launches", row) and check.is_fault("train/gpt2/4", row)
    assert not check.is_fault("correct/launches", single("x", "skipped", "no tool"))


def test_the_command_prints_the_table_and_writes_both_files(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "absence", lambda: None)
    monkeypatch.setattr(check, "Gpu", Stand)
    monkeypatch.setattr(check, "describe", lambda gpu: dict(MACHINE))
    assert check.main(["--stage", "1", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "ceilings/launch" in out and "Predictions and goals" in out
    assert "A quick run checks and does not measure." in (tmp_path / "gpu-quick.txt").read_text()
    assert device.GpuResults(tmp_path / "gpu-quick.jsonl", MACHINE).has("ceilings/1GiB")


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        ([0, 0], 0),
        ([0, check.NOT_FINISHED], check.NOT_FINISHED),
        ([-11, 2], check.WRONG),
        ([1, 2], check.WRONG),
    ],
)
def test_stages_run_in_processes_of_their_own(monkeypatch, tmp_path, codes, status):
    asked = []

    def run(command, **more):
        asked.append(command)
        return subprocess.CompletedProcess(command, codes[len(asked) - 1])

    monkeypatch.setattr(check, "absence", lambda: None)
    monkeypatch.setattr(check, "Gpu", Stand)
    monkeypatch.setattr(check, "describe", lambda gpu: dict(MACHINE))
    monkeypatch.setattr(check.subprocess, "run", run)
    assert check.main(["--stage", "1", "2", "--resume", "--out", str(tmp_path)]) == status
    assert [command[command.index("--stage") + 1] for command in asked] == ["1", "2"]
    assert all("--child" in command and "--resume" in command for command in asked)
