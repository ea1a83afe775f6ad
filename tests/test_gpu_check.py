"""`make gpu-check` without a GPU: it says so; its pure parts; every stage on a CPU in a GPU's place."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import interpreted
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
    extremes,
    graphs,
    kernels,
    launch_counts,
    lists,
    models,
    ours,
    phase,
    predictions,
    recorded,
    report,
    suite,
    sweeps,
    training,
    turns,
)
from bench.gpu import session as sessions  # noqa: E402
from bench.gpu.session import Session, Unfinished, Unit  # noqa: E402
from bench.peers import Ours  # noqa: E402
from bench.records import measured, single  # noqa: E402
from sam_kernels.backends import triton  # noqa: E402

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
    plain, half, master = kernels.LAYOUTS
    assert plain.bytes_of("perturb_", 10) == 160
    assert half.bytes_of("perturb_", 10) == 80
    assert plain.bytes_of("sq_norm", 10) == 40
    assert plain.bytes_of("descend_ adamw", 10) == 280
    # A step beside masters: 30 bytes with SGD-momentum, 38 with AdamW.
    for base, total in (("sgd", 30), ("adamw", 38)):
        assert sum(master.bytes_of(name, 1) for name in ("sq_norm", "perturb_", f"descend_ {base}")) == total


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


MACHINE = {"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "tree": "t", "commit": "c"}


def test_tree_hash_is_about_how_libraries_were_built_and_not_about_their_bytes(tmp_path):
    (tmp_path / "sam_kernels").mkdir()
    library = tmp_path / "sam_kernels" / "libsam_kernels_cuda.so"
    library.write_bytes(b"a")
    before = device.tree_hash(tmp_path, "CUDA 13.0, sm_90")
    library.write_bytes(b"b")
    assert device.tree_hash(tmp_path, "CUDA 13.0, sm_90") == before
    assert device.tree_hash(tmp_path, "CUDA 13.0, sm_90, tuned SAMK_THREADS=512") != before


def test_libraries_say_how_they_were_built(monkeypatch, tmp_path):
    from sam_kernels.backends import native

    class Library:
        def build_info(self):
            return "CUDA 13.0, sm_90"

    monkeypatch.setattr(device.machine, "ROOT", tmp_path)
    monkeypatch.setitem(native._libraries, "cuda", "not built")
    assert device.build_of_libraries().strip() == "no CUDA library"
    (tmp_path / "sam_kernels").mkdir()
    (tmp_path / "sam_kernels" / "_build.json").write_text("nvcc 13.0")
    monkeypatch.setitem(native._libraries, "cuda", Library())
    assert device.build_of_libraries() == "nvcc 13.0 CUDA 13.0, sm_90"


def test_a_unit_is_done_for_its_own_sources_and_if_nothing_was_wrong(tmp_path):
    path = tmp_path / "gpu.jsonl"
    results = device.GpuResults(path, MACHINE)
    results.replace("good", [single("x", "passed", True), single("y", "skipped", "no tool")])
    results.replace("bad", [single("x", "passed", True), single("y", "wrong", "off")])
    read = device.GpuResults(path, MACHINE)
    assert read.has("good") and not read.has("bad") and not read.has("never")
    assert device.GpuResults(path, {**MACHINE, "commit": "d"}).has("good")
    for changed in ("tree", "triton"):
        other = device.GpuResults(path, {**MACHINE, changed: "u"})
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
            f"kernels/{case}/float32",
            [
                measured("native perturb_", "graph_ms", [milliseconds] * 3, bytes=giga),
                measured("triton perturb_", "graph_ms", [1.05 * milliseconds] * 3, bytes=giga),
                {"peer": "triton perturb_", "metric": "graph_to_native"}
                | {f"p{n}": 1.05 + 0.01 * number for n in (20, 50, 80)},
            ],
        )
    return results


@pytest.mark.parametrize(("share", "is_met"), [(0.975, True), (0.96, False)])
def test_a_pass_goal_is_about_the_worst_list_and_the_fastest_ceiling(tmp_path, share, is_met):
    results = figures(tmp_path, share)
    assert predictions.ceiling(results, "copy") == pytest.approx(4e3, rel=1e-3)
    assert predictions.ceiling(results, "read") is None
    goal = next(e for e in predictions.EXPECTATIONS if e.text.startswith("perturb_, float32"))
    outcome = goal.measure(results)
    assert outcome.value == pytest.approx(share, rel=1e-3) and goal.is_met(outcome) is is_met
    assert outcome.against.startswith("vit_l")


def outcomes(results):
    return {e.text: e.measure(results).value for e in predictions.EXPECTATIONS}


def test_tritons_predictions_are_about_its_own_rows_and_its_goals_stand_beside_native(tmp_path):
    results = figures(tmp_path, 0.93)
    rows = [single("ours_triton", "launches", 5), single("ours_triton", "launches_in_place", 3)]
    rows += [measured("ours_triton", "host_us_in_place", [90.0]), single("ours_native", "launches", 3)]
    results.replace("phase/resnet50/sgd/float32", rows)
    found = outcomes(results)
    share = "perturb_, float32, lists of 300M and more: share of the copy rate"
    assert found[share] == pytest.approx(0.93, rel=1e-3)
    assert found[f"Triton: {share}"] == pytest.approx(0.93 / 1.05, rel=1e-3)
    # The slowest is the list with the largest ratio.
    slowest = found["Triton: the slowest pass over native's, float32, lists of 300M and more"]
    assert slowest == pytest.approx(1.05 + 0.01 * (len(lists.LARGE) - 1))
    assert found["Triton: ResNet-50's list: launches, gradients in place"] == 3
    assert found["Triton: ResNet-50's list: launches, gradients elsewhere"] == 5
    assert found["Triton: ResNet-50's list: host time, gradients in place"] == 90
    goals = [e for e in predictions.EXPECTATIONS if e.text.startswith("Triton") and e.target]
    assert len(goals) == 5 and all("over native's" in e.text and e.target == 1.1 for e in goals)
    assert [e.is_met(e.measure(results)) for e in goals if "float32" in e.text] == [True]


def test_times_stand_beside_native_round_by_round():
    rows = [
        measured("native x", "graph_ms", [1.0, 2.0, 4.0]),
        measured("triton x", "graph_ms", [1.1, 2.0, 5.0]),
    ]
    rows += [measured("native x", "host_us", [1.0]), measured("triton x", "host_us", [2.0])]
    rows += [measured("triton y", "graph_ms", [1.0])]
    (row,) = ours.beside(rows, {"triton x": "native x", "triton y": "native y"}, "native")
    assert (row["peer"], row["metric"]) == ("triton x", "graph_to_native")
    assert row["p50"] == pytest.approx(1.1) and row["p20"] < row["p50"] < row["p80"] < 1.25


def test_tritons_peer_is_counted_as_the_native_one_and_says_its_name():
    assert list(ours.SPECS)[:2] == ["ours_native", "ours_triton"] == list(ours.OURS)
    spec, native = ours.SPECS["ours_triton"], ours.SPECS["ours_native"]
    assert spec.make.keywords == {"backend": "triton"} and "Triton" in spec.label
    assert replace(spec, key="", label="", make=print) == replace(native, key="", label="", make=print)
    assert set(ours.OURS) <= set(phase._GRAPHED) and set(ours.OURS) <= set(training.PEERS)


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
    assert suite.sanitizer_problems(0, "========= ERROR SUMMARY: 0 errors") == []
    assert suite.sanitizer_problems(9, INVALID.format("at::native::fill") + SUMMARY) == []
    (problem,) = suite.sanitizer_problems(9, INVALID.format("void samk::perturb") + SUMMARY)
    assert "Invalid" in problem and "samk::perturb" in problem
    assert suite.sanitizer_problems(1, "Traceback: no module") != []
    for place in ("perturb_kernel", "load in /x/sam_kernels/backends/triton/engine.py:40"):
        said = INVALID.format(place) + SUMMARY
        assert len(suite.sanitizer_problems(9, said, "triton")) == 1
        assert suite.sanitizer_problems(9, said) == []
    assert suite.sanitizer_problems(9, INVALID.format("void at::reduce_kernel") + SUMMARY, "triton") == []
    assert suite.sanitizer_problems(1, "Traceback\n========= ERROR SUMMARY: 0 errors") != []


def test_differences_are_found():
    x = [torch.tensor([1.0, 2.0]), torch.empty(0)]
    assert compare.difference(x, [x[0].clone(), x[1]]) is None
    assert "off by" in compare.difference([torch.tensor([1.0, 2.1]), x[1]], x)
    nan = [torch.tensor([1.0, float("nan")]), x[1]]
    assert "finite" in compare.difference(nan, x)
    assert compare.difference(nan, nan) is None
    words = [torch.tensor([5, 1 << 62])]
    assert compare.difference(words, words) is None
    assert "whole numbers" in compare.difference(words, [torch.tensor([5, (1 << 62) + 1])])
    assert "torch.float32 (2,) in place of" in compare.difference(x, [x[0].double(), x[1]])
    assert compare.same_bits(nan, nan) and not compare.same_bits([torch.tensor(0.0)], [torch.tensor(-0.0)])


# ---- every stage, on a CPU in the place of a GPU ---------------------------------------------------


class Stand(device.Gpu):
    """A CPU with a GPU's methods: what it measures means nothing, but every line of the stages runs."""

    backends = ("foreach",)  # on a device of our own kernels they are "native" and "triton"
    cpu_engine = "foreach"
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
    for module in (correctness, extremes, graphs, recorded):
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


@pytest.mark.filterwarnings("ignore:SAM. ")
def test_stage_2_passes_for_a_backend_that_is_right_and_opens_the_way_to_figures(session, monkeypatch):
    monkeypatch.setattr(compare, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(correctness, "DTYPES", compare.DTYPES)
    monkeypatch.setattr(correctness, "MEMORIES", ("misaligned",))
    # Whole steps in a graph need one, or a tape: tests/test_gpu_correctness.py.
    monkeypatch.setattr(recorded, "check", lambda *rest: [single("x", "passed", True)])
    assert "correct/foreach/library" in correctness.missing(session, session.results, only_direct=True)
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
    units = [u for u in correctness.direct(session) if u.name.endswith(("step/sgd", "graph/sgd"))]
    assert len(units) == 2
    monkeypatch.setattr(correctness, "units", lambda session: iter(units))
    assert check.run_stage(check.STAGES[1], session, resume=False) == check.WRONG
    assert any("perturbed weights" in row["value"] for row in wrong(session.results))
    assert "correct/foreach/step/sgd" in correctness.missing(session, session.results, only_direct=True)


@pytest.fixture
def counting_stand(monkeypatch):
    """A stand-in that counts Triton's launches and uploads, and refuses uploads in a replay."""
    events, replaying = [], []
    upload, launch = triton.plan.Table._upload, triton.Triton._launch

    def counted_upload(self):
        if replaying:
            raise RuntimeError("the address of a tensor changed during the capture")
        events.append("upload")
        return upload(self)

    def counted_launch(self, *args, **more):
        launch(self, *args, **more)
        events.append("launch")

    def launches(self, run):
        events.clear()
        run()
        return len(events)

    def capture(self, run, warmup=3):
        for _ in range(warmup):
            run()

        def replay():
            replaying.append(True)
            try:
                run()
            finally:
                replaying.clear()

        return replay

    monkeypatch.setattr(triton.plan.Table, "_upload", counted_upload)
    monkeypatch.setattr(triton.Triton, "_launch", counted_launch)
    monkeypatch.setattr(Stand, "launches", launches)
    monkeypatch.setattr(Stand, "capture", capture)


@interpreted.needed
@pytest.mark.usefixtures("counting_stand")
def test_stage_2_passes_for_tritons_kernels_in_the_interpreter(session, monkeypatch):
    name = interpreted.BACKEND.name
    monkeypatch.setattr(Stand, "backends", (name,))
    monkeypatch.setattr(correctness, "_INEXACT", (name,))
    monkeypatch.setattr(
        graphs, "CASES", {case: lists.Case(case, case, lambda: [(3,), (4, 2)]) for case in lists.LARGE}
    )
    for module in (compare, correctness, graphs):
        monkeypatch.setattr(module, "AWKWARD", [(0,), (3,), (5, 4, 3, 3), (2, 0, 3)])
    for module in (compare, correctness):
        monkeypatch.setattr(module, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(graphs, "resnet50", lambda: [(3,), (4, 2)])
    monkeypatch.setattr(correctness, "MEMORIES", ("misaligned",))
    chosen = ("library", "step/adamw", "plain/bfloat16", "huge", "graph/sgd", "graph/adamw", "launches")
    units = [u for u in correctness.direct(session) if u.name.endswith(chosen)]
    assert len(units) == len(chosen)
    monkeypatch.setattr(correctness, "units", lambda session: iter(units))
    assert check.run_stage(check.STAGES[1], session, resume=False) == 0, wrong(session.results)
    counted = [row for row in session.results.rows if row["metric"] == "lists_of_the_same_bits"]
    assert len(counted) == 1 and all(0 < row["value"] <= row["lists"] for row in counted)
    launches = {
        row["metric"]: row["value"] for row in session.results.rows if row["peer"].endswith("launches")
    }
    assert launches == {"passed": True, "resnet50": 3, "resnet50_moved": 3, "vit_l": 3, "gpt2_xl": 3}


@pytest.mark.thorough  # stage 4 runs above with another backend, and stage 2 with this one
@interpreted.needed
@pytest.mark.usefixtures("counting_stand")
def test_stage_4_times_tritons_steps_beside_native_ones_eager_and_in_a_graph(session, monkeypatch):
    only(monkeypatch, phase, "phase/resnet50/sgd/float32")
    monkeypatch.setitem(phase.CASES, "resnet50", lists.Case("resnet50", "", lambda: [(3,), (4, 2)]))
    names = {"ours_native": "foreach", "ours_triton": interpreted.BACKEND.name}
    specs = {
        key: replace(ours.SPECS[key], make=partial(Ours, backend=name), norm_error=2e-5)
        for key, name in names.items()
    }
    for module in (phase, launch_counts):
        monkeypatch.setattr(module, "SPECS", specs)
    assert check.run_stage(check.STAGES[3], session, resume=False) == 0, wrong(session.results)
    found = {row["metric"]: row for row in session.results.rows if row["peer"] == "ours_triton"}
    assert found["launches_in_place"]["value"] == 3 and found["launches"]["value"] == 3
    assert found["graph_to_native"]["p50"] > 0 and found["eager_to_native"]["p50"] > 0
    assert "graph_skipped" not in found


def test_stage_2_holds_both_backends_to_the_same(session, monkeypatch):
    assert device.Gpu.backends == ("native", "triton") and device.Gpu.cpu_engine == "native"
    monkeypatch.setattr(Stand, "backends", device.Gpu.backends)
    monkeypatch.setattr(correctness, "absence", lambda backend, device: None)
    of = {b: [u.name.split("/", 2)[2] for u in correctness.direct(session, b)] for b in Stand.backends}
    assert of["native"] == of["triton"]
    assert {"library", "step/adamw", "plain/float16", "huge", "graph/sgd", "launches"} <= set(of["triton"])
    named = [unit.name for unit in correctness.units(session)]
    assert len(named) == len(set(named))


def test_no_figure_is_measured_before_correctness(session):
    assert check.run_stage(check.STAGES[2], session, resume=False) == check.WRONG
    assert session.results.rows == [] and "no figure without a passed stage 2" in session.text[-1]


def test_a_wrong_backend_costs_the_other_no_figure_and_one_that_may_be_missing_is_skipped(
    session, monkeypatch
):
    monkeypatch.setattr(Stand, "backends", ("foreach", "triton"))
    lacking = {"foreach": [], "triton": ["correct/triton/step/sgd"]}
    monkeypatch.setattr(correctness, "missing", lambda s, r, *backends, only_direct: lacking[backends[0]])
    seen = []
    monkeypatch.setattr(sweeps, "units", lambda s: seen.append(s.backends) or iter(()))
    monkeypatch.setattr(ours, "absence", lambda backend, device: None)
    assert check.run_stage(check.STAGES[5], session, resume=False) == check.WRONG
    assert "triton is not measured: no figure without a passed stage 2" in session.text[-1]
    lacking["triton"] = []
    assert check.run_stage(check.STAGES[5], session, resume=False) == 0
    monkeypatch.setattr(ours, "absence", lambda b, device: "no compiler" if b == "triton" else None)
    assert check.run_stage(check.STAGES[5], session, resume=False) == 0
    assert "triton is not measured: no compiler" in session.text[-1]
    assert seen == [("foreach",), ("foreach", "triton"), ("foreach",)]
    assert ours.withheld("ours_triton", replace(session, backends=("foreach",))) == "no compiler"
    both = replace(session, backends=Stand.backends)
    assert ours.withheld("ours_triton", both) is None and ours.withheld("foreach", both) is None


def test_triton_that_cannot_serve_the_device_is_skipped_with_its_sentence(session):
    session.gpu.backends = ("triton",)
    assert [unit.name for unit in correctness.direct(session)] == ["correct/triton/library"]
    skip, text = correctness._library("triton", session)
    assert skip["metric"] == "skipped" and "the Triton passes serve cuda tensors" in skip["value"]
    assert text["value"].startswith("triton ")
    assert ours.absence("native", torch.device("cpu")) is None  # without it the check fails


def only(monkeypatch, module, *names):
    """Leave some units of a stage, and open the way to it."""
    units = module.units
    monkeypatch.setattr(module, "units", lambda s: (u for u in units(s) if u.name in names))
    monkeypatch.setattr(correctness, "missing", lambda *a, **k: [])


@pytest.mark.parametrize("case", [f"kernels/resnet50/{layout.name}" for layout in kernels.LAYOUTS])
def test_stage_3_runs(session, monkeypatch, case):
    only(monkeypatch, kernels, case)
    monkeypatch.setattr(Stand, "backends", ("foreach", "reference"))
    assert check.run_stage(check.STAGES[2], session, resume=False) == 0, session.text
    timed = {(row["peer"], row["metric"]) for row in session.results.rows}
    for backend in Stand.backends:
        assert {
            (f"{backend} {name}", metric) for name in kernels.PASSES for metric in ("eager_ms", "graph_ms")
        } <= timed
    ratios = {(peer, metric) for peer, metric in timed if "_to_" in metric}
    assert ratios >= {
        (f"reference {name}", f"{kind}_to_foreach") for name in kernels.PASSES for kind in ("eager", "graph")
    }
    assert not [peer for peer, _ in ratios if peer.startswith("foreach")]


def test_stage_3_skips_a_list_that_does_not_fit(session, monkeypatch):
    only(monkeypatch, kernels, "kernels/llama_7b/float32")
    monkeypatch.setattr(Stand, "free_bytes", lambda self: 2**31 + 2 * 4 * 291 * 3)
    assert check.run_stage(check.STAGES[2], session, resume=False) == 0
    assert [row["metric"] for row in session.results.rows] == ["skipped"]


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_stage_4_runs(session, monkeypatch, base):
    only(monkeypatch, phase, f"phase/resnet50/{base}/float32")
    # In the place of libraries that may be missing where this test runs, and of Triton's, which serve GPUs.
    for key in ours.OURS:
        stand_in = replace(ours.SPECS[key], make=partial(Ours, backend="foreach"), norm_error=2e-5)
        monkeypatch.setitem(ours.SPECS, key, stand_in)
    assert check.run_stage(check.STAGES[3], session, resume=False) == 0, wrong(session.results)
    rows = session.results.rows
    assert not wrong(session.results)
    timed = {row["peer"] for row in rows if row["metric"] == "eager_ms"}
    assert {"eager_default", "eager_fused", "foreach", "ours_foreach", "base_alone", "copy"} <= timed
    assert set(ours.OURS) <= timed
    of_triton = {row["metric"] for row in rows if row["peer"] == "ours_triton"}
    assert {"eager_to_native", "launches_in_place", "host_us", "host_us_in_place"} <= of_triton
    graphed = {row["peer"] for row in rows if row["metric"] == "graph_ms"}
    if base == "sgd":  # torch's capturable AdamW refuses CPUs
        assert {*ours.OURS} <= graphed and "graph_to_native" in of_triton
    assert "foreach" in graphed and not graphed & {
        "eager_default",
        "eager_fused",
        "foreach_item",
    }
    assert {"launches", "host_us", "peak_extra_bytes", "first_call_ms", "error"} <= {
        r["metric"] for r in rows
    }


def test_stage_4_leaves_compiling_to_the_next_run_when_time_is_short(session, monkeypatch):
    only(monkeypatch, phase, "phase/resnet50/sgd/float32/compiled")
    session.ends = time.monotonic() + 60
    assert check.run_stage(check.STAGES[3], session, resume=False) == check.NOT_FINISHED
    assert session.results.rows == []


def test_stage_6_has_a_sweep_for_every_setting_of_both_engines_and_nothing_for_others(session):
    names = [unit.name for unit in sweeps.units(replace(session, backends=device.Gpu.backends))]
    assert len(names) == len(set(names))
    assert {"sweep/blocks/resnet50/float32", "sweep/triton block/vit_l/bfloat16"} <= set(names)
    assert {"sweep/verdict of native", "sweep/winners of native/gpt2_xl/float32"} <= set(names)
    assert list(sweeps.units(session)) == []  # its backend is foreach


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
    assert not device.is_fault("phase/resnet50/sgd/float32", row)
    assert device.is_fault("phase/resnet50/sgd/float32", {**row, "peer": "ours_native"})
    assert device.is_fault("phase/resnet50/sgd/float32", {**row, "peer": "ours_triton"})
    assert not device.is_fault("train/gpt2/4", row)
    assert device.is_fault("train/gpt2/4", {**row, "peer": "ours_native"})
    assert device.is_fault("correct/launches", row) and device.is_fault("recipes/gpt2/4/fewer", row)
    assert not device.is_fault("correct/launches", single("x", "skipped", "no tool"))


@pytest.fixture
def commanded(monkeypatch, tmp_path):
    """`main` on the stand; processes are functions that stand for them."""
    monkeypatch.setattr(check, "absence", lambda: None)
    monkeypatch.setattr(check, "Gpu", Stand)
    monkeypatch.setattr(check, "describe", lambda gpu: dict(MACHINE))

    def command(run, *line):
        monkeypatch.setattr(turns.subprocess, "run", run)
        return check.main([*line, "--out", str(tmp_path)])

    return command


def test_the_command_prints_the_table_and_writes_both_files(commanded, tmp_path, capsys):
    def run(line, **more):
        return subprocess.CompletedProcess(line, check.main(line[3:]))

    assert commanded(run, "--stage", "1", "--quick") == 0
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
def test_stages_run_in_processes_of_their_own(commanded, codes, status):
    asked = []

    def run(command, **more):
        asked.append(command)
        return subprocess.CompletedProcess(command, codes[len(asked) - 1])

    assert commanded(run, "--stage", "1", "3") == status
    assert [command[command.index("--stage") + 1] for command in asked] == ["1", "3"]
    assert all("--child" in command for command in asked)


def test_a_single_stage_that_crashes_leaves_the_report(commanded, tmp_path, capsys):
    def crash(command, **more):
        return subprocess.CompletedProcess(command, -11)

    assert commanded(crash, "--stage", "5") == check.WRONG
    assert "Predictions and goals" in capsys.readouterr().out


# ---- units that end their process --------------------------------------------------------------------


class Died(BaseException):
    """A process that a test lets die: nothing after it happens, as nothing is caught."""


def dying(monkeypatch, results, name, *, dies):
    """Stage 1 of three units, the second of which ends its process as often as it is told."""
    log = []

    def measure(unit, session):
        log.append(unit)
        if unit == name and len([x for x in log if x == name]) <= dies:
            monkeypatch.setattr(device.GpuResults, "retract", lambda self: None)  # a dead one writes nothing
            raise Died
        return [single("x", "passed", True)]

    units = [Unit(f"ceilings/{x}", partial(measure, f"ceilings/{x}")) for x in "abc"]
    monkeypatch.setattr(ceilings, "units", lambda session: iter(units))

    def run(line, **more):
        try:
            return subprocess.CompletedProcess(line, check.main(line[3:]))
        except Died:
            return subprocess.CompletedProcess(line, -11)

    return log, run


@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["anew", "resumed"])
@pytest.mark.parametrize("dies", [1, 2])
def test_a_unit_that_ends_its_process_comes_last_and_is_given_up_after_two(
    commanded, monkeypatch, tmp_path, dies, resume
):
    log, run = dying(monkeypatch, None, "ceilings/b", dies=dies)
    assert commanded(run, "--stage", "1", *resume) == check.WRONG
    assert log == [f"ceilings/{x}" for x in "abcb"]  # nothing is measured twice but the culprit
    results = device.GpuResults(tmp_path / "gpu.jsonl", MACHINE)
    assert results.has("ceilings/a") and results.has("ceilings/c")
    assert results.has("ceilings/b") is (dies == 1)
    log.clear()
    assert commanded(run, "--stage", "1", "--resume") == (0 if dies == 1 else check.WRONG)
    assert log == [] and len(results.broken()) == 0
    if dies == 2:
        (row,) = [r for r in results.rows if r["unit"] == "ceilings/b"]
        assert row["metric"] == "wrong" and "2 times" in row["value"]
        commanded(run, "--stage", "1")  # anew, it has its chance again
        assert log.count("ceilings/b") >= 1


def test_a_lost_context_costs_the_units_after_it_a_process_and_not_their_turn(session, monkeypatch):
    lost = []
    monkeypatch.setattr(Stand, "is_lost", lambda self: bool(lost), raising=False)

    def breaks(s):
        lost.append(1)
        raise RuntimeError("an illegal memory access")

    session.results.machine = {**MACHINE, "began": "now"}
    passes = [single("x", "passed", True)]
    units = [Unit("ceilings/a", breaks), Unit("ceilings/b", lambda s: passes)]
    monkeypatch.setattr(ceilings, "units", lambda session: iter(units))
    assert check.run_stage(check.STAGES[0], session, resume=True) == check.WRONG
    assert not session.results.has("ceilings/b") and session.results.broken() == {"ceilings/a": 1}
    lost.clear()
    assert check.run_stage(check.STAGES[0], session, resume=True) == check.WRONG
    assert session.results.has("ceilings/b") and session.results.broken() == {"ceilings/a": 2}
    lost.clear()
    assert check.run_stage(check.STAGES[0], session, resume=True) == check.WRONG
    assert not lost and session.results.broken() == {}


def test_a_unit_cut_short_is_to_do_and_one_interrupted_or_out_of_time_is_as_before(session, monkeypatch):
    results = session.results
    results.replace("ceilings/a", [single("x", "passed", True)])
    results.begin("ceilings/a", 1)
    read = device.GpuResults(results.path, MACHINE)
    assert not read.has("ceilings/a") and read.state("ceilings/a").startswith("to do: it was begun")
    assert [row["metric"] for row in read.current().rows] == ["passed"] and read.attempts("ceilings/a") == 1
    results.retract()
    assert device.GpuResults(results.path, MACHINE).has("ceilings/a")
    for problem in (Unfinished("late"), KeyboardInterrupt()):

        def measure(s, problem=problem):
            raise problem

        units = [Unit("ceilings/a", measure)]
        monkeypatch.setattr(ceilings, "units", lambda session, units=units: iter(units))
        if isinstance(problem, Unfinished):
            assert check.run_stage(check.STAGES[0], session, resume=False) == check.NOT_FINISHED
        else:
            with pytest.raises(KeyboardInterrupt):
                check.run_stage(check.STAGES[0], session, resume=False)
        assert results.has("ceilings/a") and results.attempts("ceilings/a") == 0


HANGING = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_gpu_check import MACHINE, Stand
from bench.gpu import ceilings, check, device
from bench.gpu.session import Session, Unit
results = device.GpuResults(Path({path!r}), MACHINE)
session = Session(Stand(), results, print, is_child=True)
ceilings.units = lambda session: iter([Unit("train/a", lambda s: time.sleep(60), least=-14.75)])
check.run_stage(check.STAGES[0], session, resume=False)
"""


def test_a_unit_that_hangs_ends_its_process_and_says_where(tmp_path):
    path = str(tmp_path / "gpu.jsonl")
    program = HANGING.format(root=str(ROOT), tests=str(ROOT / "tests"), path=path)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1 and "Timeout (" in done.stderr and "in measure" not in done.stdout
    assert device.GpuResults(Path(path), MACHINE).attempts("train/a") == 1


def test_every_unit_knows_how_long_it_takes_and_only_lasting_ones_have_no_end(session):
    both = replace(session, backends=device.Gpu.backends)
    units = [unit for stage in check.STAGES for unit in stage.units(both)]
    for unit in units:
        assert any(fnmatchcase(unit.name, pattern) for pattern in sessions._EXPECTED) or unit.least, unit.name
        assert 5 <= unit.needs <= 240 and unit.most > 2 * unit.needs
    lasting = {unit.name for unit in units if math.isinf(unit.most)}
    assert "phase/resnet50/sgd/float32/compiled" in lasting and "phase/resnet50/sgd/float32" not in lasting
    assert {unit.name for unit in suite.units()} <= lasting
    assert any(name.endswith("/optax") for name in lasting)


# ---- time --------------------------------------------------------------------------------------------


def test_the_last_stage_has_what_is_left_and_time_saved_goes_to_those_after():
    one, two, three, four, five, six = check.STAGES
    assert turns.seconds_for(six, [], 530) == 530
    assert turns.seconds_for(two, [three], 300) == 300
    assert turns.seconds_for(one, [two], 600) == 600 - turns.STAGE_SECONDS[2]
    # As planned, and no more, while those after it still need theirs.
    assert turns.seconds_for(three, [four, five], 700) == turns.STAGE_SECONDS[3]


def test_a_limit_counts_from_the_start_of_make_and_holds_the_last_unit_and_the_report():
    now = time.monotonic()
    kept = turns.GRACE + turns.REPORT_SECONDS
    assert turns.end_of(560, None) - now == pytest.approx(560 - kept, abs=1)
    assert turns.end_of(560, time.time() - 100) - now == pytest.approx(460 - kept, abs=1)


def test_a_resumed_call_takes_processes_of_stage_2_after_the_figures_of_stages_3_to_5(session):
    order = [(turn.number, turn.part) for turn in turns.in_turn(check.STAGES, resume=True)]
    assert order == [(1, ""), (2, "direct"), (3, ""), (4, ""), (5, ""), (2, "processes"), (6, "")]
    assert turns.in_turn(check.STAGES, resume=False) == list(check.STAGES)
    of = {
        part: {unit.name for unit in replace(check.STAGES[1], part=part).units(session)}
        for part in ("", "direct", "processes")
    }
    assert of["direct"] == {unit.name for unit in correctness.direct(session)}
    assert of["processes"] == {unit.name for unit in suite.units()}
    assert of[""] == of["direct"] | of["processes"] and not of["direct"] & of["processes"]


# ---- what processes say ------------------------------------------------------------------------------


def test_all_processes_have_one_log_with_a_section_each_which_a_later_run_replaces(session):
    for what, word in (("a, b", "one"), ("c", "two"), ("a, b", "three")):
        status, said, log = suite.run(session, what, [sys.executable, "-c", f"print('{word}')"], {})
        assert (status, said) == (0, f"{word}\n")
    assert suite.section_of(log, "c") == "two\n" and suite.section_of(log, "a, b") == "three\n"
    assert "one" not in log.read_text() and [x.name for x in log.parent.iterdir()] == ["gpu.log"]


@pytest.mark.parametrize(
    "summary", ["4 passed, 2 skipped in 1.0s", "= 4 passed, 1 warning in 61.02s (0:01:01) ="]
)
def test_a_message_after_pytests_summary_does_not_hide_it(session, monkeypatch, summary):
    said = f"....\n{summary}\n[W] destroying a process group\n"
    monkeypatch.setattr(suite, "run", lambda *rest: (0, said, Path("x.log")))
    monkeypatch.setattr(suite, "absence", lambda backend, device: None)
    row, last = suite._tests("native", suite.PARTS["native"], session)
    assert row["metric"] == "passed" and last["value"] == summary
    assert suite.summary_of("5 deselected in 0.1s\nbye") == "5 deselected in 0.1s"
    assert suite.summary_of("a\nINTERNALERROR") == "INTERNALERROR"


def test_a_sanitizer_is_found_in_the_toolkit_and_its_absence_is_in_the_report(session, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "absence", lambda backend, device: None)
    monkeypatch.setattr(suite, "tool_named", lambda name: None)
    for tool in ("memcheck", "racecheck"):
        session.results.replace(f"correct/native/sanitizer/{tool}", suite._sanitizer("native", tool, session))
    (sentence,) = suite.not_run(session.results)
    assert sentence.startswith("compute-sanitizer: not run (") and "memcheck" in sentence
    report.write(session.results.path)
    assert "compute-sanitizer: not run" in session.results.path.with_suffix(".txt").read_text()
    monkeypatch.undo()
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert suite.tool_named("compute-sanitizer") == str(program)
