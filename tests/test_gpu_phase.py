"""Stages 3 and 4 of `make gpu-check`, a CPU in the place of a GPU: masks, selection, and the peers of jax."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark prints with rich")

from test_gpu_check import MACHINE, Stand, figures, only, outcomes  # noqa: E402

from bench.gpu import (  # noqa: E402
    apart,
    ceilings,
    check,
    device,
    floor,
    gate,
    host_time,
    jax_peers,
    kernels,
    launch_counts,
    lists,
    masked,
    ours,
    phase,
    predictions,
    selection,
)
from bench.gpu.session import Session, Unfinished  # noqa: E402
from bench.peers import Ours, Unavailable  # noqa: E402
from bench.records import measured, single  # noqa: E402

SHAPES = [(3,), (4, 2), (9, 5, 3, 3), (300,)]


@pytest.fixture
def session(tmp_path, monkeypatch):
    for name in ("resnet50", "vit_l"):
        monkeypatch.setitem(lists.CASES, name, lists.Case(name, name, lambda: list(SHAPES)))
    results = device.GpuResults(tmp_path / "gpu.jsonl", MACHINE)
    log = []
    made = Session(Stand(), results, log.append, cap=4096)
    made.text = log
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)


# ---- goals -----------------------------------------------------------------------------------------


def goal(text):
    (found,) = (e for e in predictions.EXPECTATIONS if e.text.startswith(text) and e.target)
    return found


def test_goals_are_those_of_the_work_on_gpus():
    for layout in kernels.LAYOUTS:
        targets = {name: goal(f"{name}, {layout.name},").target for name in kernels.PASSES}
        assert targets.pop("sq_norm") == 0.95 and set(targets.values()) == {0.97}
    assert goal("ResNet-50's list, SGD, in a graph").target == 0.92
    assert goal("ResNet-50's list, SGD: launches").target == 3
    assert goal("ResNet-50's list, SGD: host time").target == 20
    assert goal("masks of SSAM-F anew, lists").target == 5


def test_selection_is_counted_in_the_bytes_of_copies_and_its_worst_list_counts(tmp_path):
    results = figures(tmp_path, 0.98)  # copies make 4,000 GB/s
    for case, milliseconds in (("vit_l", 1.0), ("gpt2_xl", 1.5)):
        rows = [
            measured(selection.peer("native", 0.5), "eager_ms", [milliseconds]),
            measured(selection.peer("topk", 0.5), "eager_ms", [30.0]),
        ]
        results.replace(f"kernels/{case}/selection", [{**row, "numel": 1_000_000} for row in rows])
    outcome = goal("masks of SSAM-F anew, lists").measure(results)
    assert outcome.value == pytest.approx(6000, rel=1e-3) and outcome.against == "gpt2_xl, 0.5"
    assert outcomes(results)["masks of SSAM-F anew against topk over all scores"] == pytest.approx(20)


def test_a_masked_pass_stands_beside_the_dense_one(tmp_path):
    results = figures(tmp_path, 0.98)
    rows = [
        measured("native perturb_, dense", "graph_ms", [2.0]),
        measured("native perturb_, single 0.9", "graph_ms", [2.2]),
    ]
    results.replace("kernels/vit_l/masked", rows)
    text = "perturb_ under single 0.9 over the dense one, lists of 300M and more"
    assert outcomes(results)[text] == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TensorListMetadata has to be < 4KB", "4 KB"),
        (
            "#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000",
            "32 KB where '#if defined(CUDART_VERSION)",
        ),
        (None, "unknown"),
    ],
)
def test_the_variant_of_foreach_is_read_off_torchs_header(tmp_path, text, said):
    header = tmp_path / "MultiTensorApply.cuh"
    if text is not None:
        header.write_text(text)
    assert ceilings.foreach_variant(header).startswith(said)


def test_stage_1_says_which_foreach_this_torch_has(session):
    only_unit = [u for u in ceilings.units(session) if u.name == "ceilings/torch"]
    (row,) = only_unit[0].measure(session)
    assert row["metric"] == "kernel_arguments" and row["value"] in session.text[-1]


# ---- stage 3 ---------------------------------------------------------------------------------------


def test_masked_passes_are_timed_beside_dense_ones_with_the_bytes_they_touch(session, monkeypatch):
    only(monkeypatch, kernels, "kernels/resnet50/masked")
    monkeypatch.setattr(Stand, "backends", ("foreach", "reference"))
    assert check.run_stage(check.STAGES[2], replace(session, backends=()), resume=False) == 0, session.text
    rows = session.results.rows
    timed = {row["peer"]: row for row in rows if row["metric"] == "graph_ms"}
    labels = ["dense", *(f"{kind} {sparsity}" for kind, sparsity in masked.MASKS)]
    names = {f"{b} {name}, {m}" for b in Stand.backends for name in masked.PASSES for m in labels}
    assert set(timed) == names
    elements = rows[0]["numel"]
    assert timed["foreach perturb_, dense"]["bytes"] == 16 * elements
    assert timed["foreach descend_ sgd, single 0.5"]["bytes"] == (20 + 1 / 8) * elements
    touched = {row["peer"]: row["value"] for row in rows if row["metric"] == "words_touched"}
    assert touched["single 0.5"] > 0.9 and 0 < touched["channels 0.9"] <= touched["single 0.9"]
    assert {row["peer"] for row in rows if row["metric"] == "graph_to_foreach"} == {
        name for name in names if name.startswith("reference")
    }


def test_words_of_channels_select_whole_channels():
    from sam_kernels.bitmask import unpack

    shapes = [(64, 128), (32,)]
    torch.manual_seed(0)
    matrix, vector = masked.words_of(shapes, "channels", 0.5, torch.device("cpu"))
    rows = unpack(matrix, torch.empty(64, 128))
    assert torch.equal(rows.all(1), rows.any(1)) and 0 < rows.all(1).sum() < 64
    assert 0 < unpack(vector, torch.empty(32)).sum() < 32


def test_selection_is_checked_and_timed_beside_topk(session, monkeypatch):
    only(monkeypatch, kernels, "kernels/resnet50/selection")
    copy = measured("copy: a", "ms", [1.0], bytes=4e9)
    session.results.replace("ceilings/1GiB", [copy])
    assert check.run_stage(check.STAGES[2], session, resume=False) == 0, session.text
    rows = session.results.rows
    peers = {selection.peer(who, s) for who in ("foreach", "topk") for s in selection.SPARSITIES}
    for metric in ("eager_ms", "copy_bytes_per_weight", "peak_extra_bytes"):
        assert {row["peer"] for row in rows if row["metric"] == metric} == peers
    for row in (row for row in rows if row["metric"] == "eager_ms"):
        name = row["peer"]
        (each,) = (r for r in rows if r["peer"] == name and r["metric"] == "copy_bytes_per_weight")
        assert each["p50"] == pytest.approx(row["p50"] * 4e3 * 1e6 / row["numel"], rel=1e-3)
    assert {row["peer"] for row in rows if row["metric"] == "eager_to_foreach"} == {
        selection.peer("topk", s) for s in selection.SPARSITIES
    }


def test_masks_without_the_highest_scores_are_seen():
    scores = [torch.tensor([4.0, 1.0, 3.0]), torch.empty(0), torch.tensor([2.0, 2.0])]

    class Chosen:
        keep = 2

        def __init__(self, *masks):
            self.scores, self.found = scores, [torch.tensor(m, dtype=torch.bool) for m in masks]

        def masks(self, t):
            return self.found[t]

    assert selection.problem(Chosen([1, 0, 1], [], [0, 0])) is None
    assert "highest" in selection.problem(Chosen([1, 0, 0], [], [1, 0]))
    assert "5 weights; expected 2" in selection.problem(Chosen([1, 1, 1], [], [1, 1]))
    ties = Chosen([1, 0, 1], [], [1, 1])
    ties.keep = 3  # two are equal at the end, and ours keeps both
    assert selection.problem(ties) is None


def test_topk_is_left_out_where_it_cannot_be_and_ours_is_a_fault(session, monkeypatch):
    assert "31 bits" in selection._refusal_of_topk(2**31, 2**40)
    assert "GiB" in selection._refusal_of_topk(2**30, 2**30)

    def fails(self):
        raise RuntimeError("too\nlarge")

    monkeypatch.setattr(selection.TopK, "run", fails)
    rows = selection.measure("resnet50", session)
    assert {row["value"] for row in rows if row["metric"] == "skipped"} == {"too large"}
    monkeypatch.setattr(selection, "problem", lambda selected: "off")
    found = [row for row in selection.measure("resnet50", session) if row["metric"] == "wrong"]
    assert len(found) == 2 and all(check.is_fault("kernels/resnet50/selection", row) for row in found)


def test_the_cost_of_a_step_is_timed_where_there_is_next_to_nothing_to_move(session, monkeypatch):
    assert [sum(n for (n,) in floor.shapes_of(size)) for size in floor.SIZES] == list(floor.SIZES)
    for key in ours.OURS:
        made = replace(ours.SPECS[key], make=partial(Ours, backend="foreach"))
        monkeypatch.setitem(ours.SPECS, key, made)
    assert {f"floor/{size}" for size in floor.SIZES} <= {unit.name for unit in kernels.units(session)}
    rows = floor.measure(1000, session)
    timed = {(row["peer"], row["metric"]): row for row in rows}
    for key in ours.OURS:
        assert timed[key, "eager_ms"]["p50"] > 0 and timed[key, "graph_ms"]["p50"] > 0
    assert ("ours_triton", "graph_to_native") in timed and {row["tensors"] for row in rows} == {161}


# ---- stage 4: what is timed --------------------------------------------------------------------------

QUESTION = phase.QUESTIONS[0]


class Peer:
    """A peer that notes what it does; and the device's clocks, which note what they time."""

    def __init__(self, done):
        self.done, self.params = done, Params(done)

    def step_phase1(self):
        self.done.append("first")

    def step_phase2(self):
        self.done.append("second")


class Params(list):
    """Who gives them gradients goes through them."""

    def __init__(self, done):
        self.done = done

    def __iter__(self):
        self.done.append("placed")
        return iter(())


class Clock(Stand):
    held_up = 0.0

    def __init__(self, done):
        super().__init__()
        self.done = done

    def host_seconds(self, run, is_busy):
        self.done.append("[busy" if is_busy else "[idle")
        run()
        self.done.append("]")
        return self.held_up if is_busy else 1e-5

    def laps(self, runs, ahead=0):
        for run in runs:
            run()
        return [1.0, 10.0, 100.0]


class Empty:
    first, second, numel, dtype = [], [], 100, torch.float32


def test_the_hosts_time_is_that_of_both_halves_and_not_of_placing_gradients(session):
    done = []
    session.gpu = Clock(done)
    row, waiting = host_time._host("p", gate.parts_of(Peer(done), Empty), "", session)
    assert row["p50"] == 0.0 and row["device"] == "busy" and waiting["value"] is False
    step = ["placed", "[busy", "first", "]", "placed", "[busy", "second", "]"]
    assert done[-len(step) :] == step
    session.gpu.held_up = 0.02  # as long as the device spins: the queue was full
    row, _ = host_time._host("p", gate.parts_of(Peer(done), Empty), "", session)
    assert row["device"] == "idle" and row["p50"] == pytest.approx(20)


def test_a_peer_that_reads_the_device_is_timed_beside_an_idle_one(session, monkeypatch):
    done = []
    session.gpu = Clock(done)
    monkeypatch.setattr(host_time, "waits", lambda parts, device: True)
    row, waiting = host_time._host("p", gate.parts_of(Peer(done), Empty), "", session)
    assert row["device"] == "waits" and waiting["value"] is True and "[busy" not in done


def test_reads_of_the_device_are_those_that_torch_warns_of(monkeypatch):
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def reads():
        assert modes[-1] == "warn"
        warnings.warn("called a synchronizing CUDA operation (of item)", stacklevel=1)

    def grumbles():
        warnings.warn("deprecated", stacklevel=1)

    cuda = torch.device("cuda")
    assert host_time.waits((grumbles, reads), cuda) is True
    assert host_time.waits((grumbles,), cuda) is False and modes[-1] == 0


def test_eager_steps_are_timed_without_placing_gradients(session, monkeypatch):
    session.gpu = Clock([])
    monkeypatch.setattr(phase, "_copy", lambda *rest: lambda: {"eager_ms": 1.0})
    rows = phase._eager({"foreach": Peer([])}, QUESTION, Empty, session)
    assert {row["peer"]: row["p50"] for row in rows}["foreach"] == 101_000


@pytest.mark.usefixtures("stand_ins")
def test_launches_are_counted_after_everything_was_timed(session, monkeypatch):
    order = []
    for name in ("laps", "launches"):
        function = getattr(Stand, name)

        def noted(self, *args, name=name, function=function, **more):
            order.append(name)
            return function(self, *args, **more)

        monkeypatch.setattr(Stand, name, noted)
    rows = phase._measure(QUESTION, session)
    first = order.index("launches")
    assert set(order[:first]) == {"laps"} and set(order[first:]) == {"launches"}
    of_ours = {row["metric"] for row in rows if row["peer"] == "ours_native"}
    assert {"launches", "launches_in_place"} <= of_ours


def test_on_a_gpu_another_process_counts_launches_and_costs_no_figure(session, monkeypatch):
    session.gpu.device = torch.device("cuda")
    asked = []

    def run(module, unit, session, more, most):
        asked.append((module, unit, more))
        return [single("foreach", "launches", 9)], ""

    monkeypatch.setattr(apart, "run", run)
    assert launch_counts.rows_for(QUESTION, ["foreach"], session)[0]["value"] == 9
    assert asked == [("bench.gpu.launch_counts", QUESTION.name, ["--peers", "foreach"])]
    monkeypatch.setattr(apart, "run", lambda *rest: (None, "its process ended with status -9"))
    (row,) = launch_counts.rows_for(QUESTION, ["foreach"], session)
    assert row["metric"] == "launches_skipped" and "-9" in row["value"]

    def late(*rest):
        raise Unfinished("it did not end")

    monkeypatch.setattr(apart, "run", late)
    (row,) = launch_counts.rows_for(QUESTION, ["foreach"], session)
    assert row["value"] == "it did not end"


def test_the_process_that_counts_launches_writes_rows(tmp_path):
    rows = tmp_path / "rows.json"
    arguments = [QUESTION.name, "--rows", str(rows), "--seconds", "60", "--cap", "3", "--backends", "foreach"]
    assert launch_counts.main([*arguments, "--peers", "foreach", "base_alone"], Stand) == 0
    found = json.loads(rows.read_text())
    assert [(row["peer"], row["metric"]) for row in found] == [
        ("foreach", "launches"),
        ("base_alone", "launches"),
    ]


@pytest.mark.usefixtures("stand_ins")
def test_rows_of_finished_parts_outlive_one_that_raises(session, monkeypatch):
    def fails(*rest):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(phase, "_graphed", fails)
    rows = phase._measure(QUESTION, session)
    assert {"host_us", "eager_ms", "launches"} <= {row["metric"] for row in rows}
    (found,) = (row for row in rows if row["metric"] == "wrong")
    assert "no memory is left" in found["value"] and check.is_fault(QUESTION.name, found)


def test_units_ask_for_the_seconds_that_their_bytes_take(session):
    session.cap = None
    least = {unit.name: unit.needs for unit in phase.units(session)}
    assert 40 < least["phase/gpt2_xl/adamw/float32"] < 200
    assert least["phase/gpt2_xl/adamw/float32"] > least["phase/vit_l/adamw/bfloat16"]
    assert all(least[name] >= 120 for name in least if name.endswith(("compiled", "optax")))
    of_passes = {unit.name: unit.needs for unit in kernels.units(session)}
    assert of_passes["kernels/llama_7b/float32"] > of_passes["kernels/resnet50/float32"] + 10
    assert max(of_passes.values()) < 100


def test_yardsticks_move_random_numbers(session, monkeypatch):
    moved = []
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda out, x: (moved.append(x), copy_(out, x))[1])
    phase._copy(QUESTION, Empty, session, "eager_ms")()
    (unit,) = (u for u in ceilings.units(session) if u.name == "ceilings/1GiB")
    unit.measure(session)
    assert len(moved) > 2 and all(x.unique().numel() > 10 for x in moved)


# ---- stage 4: jax ----------------------------------------------------------------------------------

UNIT = jax_peers.unit_name(jax_peers.QUESTIONS[0])


@pytest.fixture
def stand_ins(monkeypatch):
    """Our backends on a CPU."""
    for key in ours.OURS:
        made = replace(ours.SPECS[key], make=partial(Ours, backend="foreach"), norm_error=2e-5)
        monkeypatch.setitem(ours.SPECS, key, made)


class Imitation:
    """A peer with the methods of `OptaxSam`, in torch."""

    def __init__(self, workspace, base, device, *, opaque, factor=1.0):
        from bench.peers import Foreach

        workspace.reset()
        self.params = [torch.nn.Parameter(w.clone()) for w in workspace.initial]
        self.peer, self.factor = Foreach(self.params, base), factor

    def step(self, first, second, look=None):
        for half, grads in ((self.peer.step_phase1, first), (self.peer.step_phase2, second)):
            for p, g in zip(self.params, grads, strict=True):
                p.grad = self.factor * g
            half()
            if look is not None and grads is first:
                look([p.detach() for p in self.params])

    def several(self, first, second, times):
        for _ in range(times):
            self.step(first, second)

    def tensors(self):
        return [p.detach() for p in self.params]

    def wait(self):
        pass


@pytest.mark.usefixtures("stand_ins")
def test_the_peers_of_jax_pass_the_gate_and_are_timed_by_one_clock(session, monkeypatch):
    monkeypatch.setattr(jax_peers, "OptaxSam", Imitation)
    rows = jax_peers.rows_of(jax_peers.QUESTIONS[0], session)
    assert not [row for row in rows if row["metric"] == "wrong"]
    timed = {(row["peer"], row["metric"]): row for row in rows}
    for peer in (*jax_peers.MODES, *ours.OURS):
        for metric in ("wall_ms", "wall_graph_ms"):
            assert timed[peer, metric]["p50"] > 0
    elements = rows[0]["numel"]
    assert timed[jax_peers.OPAQUE, "wall_ms"]["bytes"] == 36 * elements
    assert timed[jax_peers.TRANSPARENT, "wall_ms"]["bytes"] == 64 * elements
    assert timed["ours_native", "wall_ms"]["bytes"] == 40 * elements
    assert {m.bytes_of("adamw") for m in jax_peers.MODES.values()} == {44, 80}
    assert (jax_peers.OPAQUE, "wall_to_native") in timed
    session.results.replace(UNIT, rows)
    found = outcomes(session.results)
    assert found["ResNet-50's list, SGD, against optax, opaque, step by step"] > 0
    assert found["ResNet-50's list, SGD, against optax, transparent, steps inside one program"] > 0


@pytest.mark.usefixtures("stand_ins")
def test_a_peer_of_jax_that_is_wrong_or_raises_or_is_missing_is_not_timed(session, monkeypatch):
    def make(workspace, base, device, *, opaque):
        if opaque:
            return Imitation(workspace, base, device, opaque=True, factor=1.01)
        raise ValueError("broken")

    monkeypatch.setattr(jax_peers, "OptaxSam", make)
    rows = jax_peers.rows_of(jax_peers.QUESTIONS[0], session)
    said = {row["peer"]: row["value"] for row in rows if row["metric"] == "wrong"}
    assert "off by" in said[jax_peers.OPAQUE] and said[jax_peers.TRANSPARENT] == "raised ValueError: broken"
    assert not [row for row in rows if row["metric"].startswith("wall")]
    assert not any(check.is_fault(UNIT, row) for row in rows)

    def missing(*args, **more):
        raise Unavailable("jax serves no gpu here")

    monkeypatch.setattr(jax_peers, "OptaxSam", missing)
    rows = jax_peers.rows_of(jax_peers.QUESTIONS[0], session)
    assert [row["metric"] for row in rows] == ["skipped", "skipped"]


def test_without_jax_its_peers_are_skipped_with_their_reason(session, monkeypatch):
    only(monkeypatch, phase, UNIT)
    monkeypatch.setattr(jax_peers.importlib.util, "find_spec", lambda name: None if name == "optax" else 1)
    assert check.run_stage(check.STAGES[3], session, resume=False) == 0
    assert [(row["peer"], row["value"]) for row in session.results.rows] == [
        (name, "optax not installed") for name in jax_peers.MODES
    ]


def child(monkeypatch, rows, said="", status=0):
    """Have the other process write rows in place of running; returns what it was called with."""
    asked = []

    def run(command, **more):
        asked.append((command, more))
        if rows is not None:
            Path(command[command.index("--rows") + 1]).write_text(json.dumps(rows))
        return subprocess.CompletedProcess(command, status, stdout=said)

    monkeypatch.setattr(jax_peers, "absence", lambda: None)
    monkeypatch.setattr(apart.subprocess, "run", run)
    return asked


def test_jax_runs_in_a_process_of_its_own_that_takes_no_memory_ahead(session, monkeypatch):
    rows = [single(jax_peers.OPAQUE, "error", 0.0)]
    asked = child(monkeypatch, rows, "XLA says this\n  WRONG    ours")
    assert jax_peers.measure(jax_peers.QUESTIONS[0], session) == rows
    ((command, more),) = asked
    assert command[1:4] == ["-m", "bench.gpu.jax_peers", UNIT]
    assert command[command.index("--backends") + 1 :] == ["foreach", "--cap", "4096"]
    assert more["env"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert session.text == ["  WRONG    ours"]


def test_a_process_of_jax_that_dies_is_wrong_and_one_without_time_is_left(session, monkeypatch):
    child(monkeypatch, None, "Killed", -9)
    (row,) = jax_peers.measure(jax_peers.QUESTIONS[0], session)
    assert row["metric"] == "wrong" and "-9: Killed" in row["value"] and not check.is_fault(UNIT, row)
    session.ends = time.monotonic() + 60
    with pytest.raises(Unfinished, match="XLA compiles"):
        jax_peers.measure(jax_peers.QUESTIONS[0], session)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("question", jax_peers.QUESTIONS, ids=jax_peers.unit_name)
def test_optax_itself_walks_the_common_trajectory_in_both_modes(session, monkeypatch, question, tmp_path):
    # Where there is a GPU, jax would take most of its memory from the tests after this one.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    pytest.importorskip("optax", reason="optax is a peer, and may be missing")
    rows = tmp_path / "rows.json"
    arguments = [jax_peers.unit_name(question), "--rows", str(rows), "--seconds", "60", "--cap", "4096"]
    assert jax_peers.main([*arguments, "--backends", "foreach"], Stand) == 0
    found = json.loads(rows.read_text())
    assert not [row for row in found if row["metric"] in ("wrong", "skipped")]
    errors = {row["peer"]: row["value"] for row in found if row["metric"] == "error"}
    # The gate would let a bad norm pass. What is left is rounding: transparent, the weights come back as
    # w' + (w - w' + update), and 1 - 0.999^t of the first steps has few digits in fp32.
    assert all(errors[name] <= 1e-5 for name in jax_peers.MODES)
    assert {row["peer"] for row in found if row["metric"] == "wall_graph_ms"} >= {*jax_peers.MODES}
    assert "jax" in sys.modules
