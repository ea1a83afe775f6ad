"""Stage 6 on a CPU: the star of settings, its winners, the libraries they need; without nvcc and a GPU."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import emulated
import interpreted
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Not installed with the package: found from the checkout it is part of.
sys.path.insert(0, str(ROOT))

pytest.importorskip("rich", reason="the benchmark prints with rich")

from test_gpu_check import MACHINE, Stand  # noqa: E402
from test_gpu_check import session as session  # noqa: E402

from bench.gpu import agreement, check, correctness, device, sweeps, variants, winners  # noqa: E402
from bench.gpu.session import Unfinished  # noqa: E402
from bench.gpu.settings import SINGLE, STEPS, SWEEPS, TRITON_SWEEPS, Sweep, Variant  # noqa: E402
from bench.records import measured  # noqa: E402

TUNING = (ROOT / "csrc" / "core" / "tuning.h").read_text()
ALL = [variant for sweep in SWEEPS for variant in sweep.variants]


# ---- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ALL, ids=lambda v: v.name)
def test_a_variant_sets_what_tuning_reads_to_another_value(variant):
    defaults = dict(re.findall(r"^#define (SAMK_\w+) (\d+)$", TUNING, re.M))
    for name, value in variant.settings.items():
        assert f"#ifndef {name}\n#define {name} " in TUNING
        assert defaults.get(name) != str(value)


def test_names_of_variants_are_their_own():
    assert len({variant.name for variant in ALL}) == len(ALL)
    assert len({str(sorted(variant.settings.items())) for variant in ALL}) == len(ALL)


def test_every_setting_has_another_value_in_the_cpp_tests():
    given = re.search(r"SAMK_OTHER_TUNING ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1]
    other = dict(word.split("=") for word in given.split())
    defaults = dict(re.findall(r"#ifndef (SAMK_\w+)\n#define \w+ (.*)", TUNING))
    assert other.keys() == defaults.keys()
    assert not [name for name, value in other.items() if defaults[name] == value]


@pytest.fixture(scope="session")
def tuned():
    """The kernels with other values of all settings, on the CPU; `make test-cpp` has compiled most."""
    from sam_kernels import backends
    from sam_kernels.backends import native

    library = emulated.BUILD / "libsamk_emulated_tuned.so"
    with open(emulated.BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [emulated._tool("cmake"), "--build", str(emulated.BUILD), "--target", "samk_emulated_tuned"]
        subprocess.run(command, check=True, capture_output=True)
    backend = native.Native("tuned", {"cpu": native._native.Library(str(library))})
    backends.register(backend)
    return backend.name


@emulated.needed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", sweeps.DTYPES, ids=str)
def test_no_setting_changes_a_bit_of_an_elementwise_pass(session, monkeypatch, tuned, dtype):
    # Around words, packs, and the chunks of both.
    sizes = [(0,), (3,), (63,), (130,), (64, 65), (2049,), (8193,), (16385,)]
    monkeypatch.setattr(agreement, "AWKWARD", sizes)
    engine = sweeps.Engine("emulated", (), (), sweeps.open_libraries)
    assert agreement.problems(engine, tuned, dtype, session) == []
    monkeypatch.setattr(agreement, "SUM_ERROR", {dtype: -1.0})
    (found, _) = agreement.problems(engine, tuned, dtype, session)
    assert found.startswith("plain: sq_norm is ")


# ---- libraries -------------------------------------------------------------------------------------

SPILLS = """\
ptxas info    : Compiling entry function '_ZN4samk12_GLOBAL__N_114restore_kernelIjLb0EEEvNS_10ParametersILi2ENS0_7ScalarsEEE' for 'sm_90'
ptxas info    : Function properties for _ZN4samk1
    0 bytes stack frame, {spilled} bytes spill stores, 8 bytes spill loads
ptxas info    : Used 46 registers, used 0 barriers
"""  # noqa: E501


def test_registers_and_spills_are_read_off_the_logs(tmp_path):
    (tmp_path / "restore.cu.log").write_text(SPILLS.format(spilled=8))
    kernels = variants.read_logs(tmp_path)
    assert kernels == {variants.KERNELS["restore_", "float32"]: variants.Kernel(46, 8)}


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that takes no time; the commands it was given."""
    asked = []
    by_pass = {f"{kernel.partition('_kernel')[0]}.cu.log" for kernel in variants.KERNELS.values()}

    def run(tree, variant, arch, jobs):
        asked.append((variant.name, arch, jobs))
        (tree / "ptxas").mkdir(parents=True, exist_ok=True)
        for log in by_pass:
            (tree / "ptxas" / log).write_text("")
        (tree / variants.LIBRARY).write_text("")
        return "no such setting" if variant.name == "broken" else None

    kernels = dict.fromkeys(variants.KERNELS.values(), variants.Kernel(46, 0))
    kernels[variants.KERNELS["sq_norm", "float32"]] = variants.Kernel(40, 8)
    monkeypatch.setattr(variants, "FOLDER", tmp_path)
    monkeypatch.setattr(variants, "_run_cmake", run)
    monkeypatch.setattr(variants, "read_logs", lambda folder: kernels)
    monkeypatch.setattr(variants, "tool", lambda name: sys.executable)
    return asked


def test_what_is_built_is_not_built_again_unless_settings_or_card_are_others(compiler):
    one, two = Variant("a=1", shared={"SAMK_THREADS": 128}), Variant("b", shared={"SAMK_THREADS": 512})
    assert not variants.is_built(one, "90")
    built = variants.build([one, two], "90", jobs=16)
    assert [name for name, _, _ in compiler] == ["a=1", "b"] and {jobs for *_, jobs in compiler} == {4}
    assert variants.is_built(one, "90") and not variants.is_built(one, "80")
    assert built["a=1"].problem is None and built["a=1"].kernels["sq_norm", "float32"].spilled == 8
    variants.build([one, replace(two, shared={"SAMK_THREADS": 64})], "90", jobs=1)
    assert [name for name, *_ in compiler] == ["a=1", "b", "b"]


def test_a_library_that_cannot_be_built_costs_no_other_and_has_a_sentence(compiler):
    built = variants.build([Variant("broken"), Variant("b")], "90", jobs=2)
    assert built["broken"].problem == "no such setting" and built["b"].problem is None
    late = variants.build([Variant("late")], "90", jobs=2, ends=0.0)
    assert late["late"].problem == "not built: the time is over"


def test_the_command_prints_registers_and_spills(compiler, capsys):
    assert variants.main(["--arch", "90", "blocks=5", "threads=512"]) == 0
    out = capsys.readouterr().out
    assert "blocks=5" in out and "threads=512" in out and "blocks=6" not in out
    assert "40 +8 B" in out and "sm_90" in out


def test_cmake_refuses_a_setting_that_nobody_reads(tmp_path):
    if variants.tool("cmake") is None:
        pytest.skip("cmake is not here")
    function = re.search(
        r"^file\(READ csrc/core/tuning.h.*?^endfunction\(\)",
        (ROOT / "CMakeLists.txt").read_text(),
        re.M | re.S,
    )[0]
    text = function.replace("csrc/core/tuning.h", str(ROOT / "csrc/core/tuning.h"))
    text = text.replace("target_compile_definitions", "message(STATUS ok) #")
    for setting, is_known in (
        ("SAMK_THREADS=512", True),
        ("SAMK_THREAD=512", False),
        ("SAMK_THREADS=x", False),
    ):
        script = tmp_path / "tune.cmake"
        script.write_text(f"{text}\nsamk_tune(library {setting})\n")
        done = subprocess.run([variants.tool("cmake"), "-P", str(script)], capture_output=True, text=True)
        assert (done.returncode == 0) is is_known, done.stderr
        assert is_known or f"'{setting}' is no setting" in done.stderr


# ---- the stage -------------------------------------------------------------------------------------

TINY = (
    Sweep("blocks", tuple(v for v in ALL if v.name in ("blocks=5", "blocks=6")), SINGLE),
    Sweep("stores", tuple(v for v in ALL if v.name == "stream=both"), ("perturb_", *STEPS)),
)


@pytest.fixture
def engine(session, monkeypatch):
    """The kernels compiled for the CPU in the place of a card's, and of the libraries of two variants."""
    monkeypatch.setattr(Stand, "backends", ("emulated",))
    session.backends = ("emulated",)
    monkeypatch.setattr(correctness, "missing", lambda *a, **k: [])
    monkeypatch.setattr(agreement, "AWKWARD", [(0,), (3,), (130,), (2049,)])
    kernels = {key: variants.Kernel(46, 0) for key in variants.KERNELS}
    kernels["sq_norm", "bfloat16"] = variants.Kernel(40, 8)
    asked = []

    def build(chosen, arch, jobs, ends):
        asked.append([v.name for v in chosen])
        return {v.name: variants.Built(emulated.LIBRARY, None, kernels) for v in chosen}

    monkeypatch.setattr(variants, "arch_of_card", lambda: "90")
    monkeypatch.setattr(variants, "is_built", lambda variant, arch: True)
    monkeypatch.setattr(variants, "build", build)
    made = sweeps.Engine("emulated", TINY, ("resnet50",), sweeps.open_libraries)
    monkeypatch.setattr(sweeps, "ENGINES", (made,))
    monkeypatch.setattr(sweeps, "CASES", {"resnet50": sweeps.CASES["resnet50"]})
    session.cap = 3
    return asked


STAGE = next(stage for stage in check.STAGES if stage.module is sweeps)


@emulated.needed
def test_stage_6_times_every_value_beside_the_default_and_names_winners(session, engine):
    assert check.run_stage(STAGE, session, resume=False) == 0, "\n".join(session.text)
    rows = session.results.rows
    first = [row for row in rows if row["unit"] == "sweep/blocks/resnet50/float32"]
    timed = {(row["peer"], row["metric"]) for row in first if "p50" in row}
    for name in ("default", "blocks=5", "blocks=6"):
        assert {(f"{name} {what}", metric) for what in SINGLE for metric in ("eager_ms", "graph_ms")} <= timed
    ratios = {peer for peer, metric in timed if metric == "graph_to_default"}
    assert ratios == {f"{name} {what}" for name in ("blocks=5", "blocks=6") for what in SINGLE}
    assert {row["peer"] for row in first if row["metric"] == "passed"} == {"blocks=5", "blocks=6"}
    (step,) = (
        r
        for r in rows
        if (r["unit"], r["peer"], r["metric"])
        == ("sweep/stores/resnet50/float32", "stream=both step sgd", "graph_ms")
    )
    assert step["bytes"] == 40 * step["numel"]
    text = "\n".join(session.text)
    assert "blocks: sq_norm, in a graph" in text and "left out" in text
    verdicts = {r["peer"] for r in rows if r["metric"] == "winner"}
    assert verdicts == {
        "blocks, sq_norm",
        "blocks, perturb_",
        "blocks, restore_",
        "blocks, descend_",
        "stores, all passes",
    }
    assert session.results.has("sweep/winners of emulated/resnet50/bfloat16")


@emulated.needed
def test_a_pass_whose_kernel_spills_is_left_out_and_said_so(session, engine):
    unit = next(u for u in sweeps.units(session) if u.name == "sweep/blocks/resnet50/bfloat16")
    rows = unit.measure(session)
    said = {row["peer"]: row["value"] for row in rows if row["metric"] == "skipped"}
    assert said == dict.fromkeys(("blocks=5 sq_norm", "blocks=6 sq_norm"), "a kernel of it spills registers")
    peers = {row["peer"] for row in rows if row["metric"] == "graph_ms"}
    assert "blocks=5 sq_norm" not in peers and {"default sq_norm", "blocks=5 perturb_"} <= peers


@emulated.needed
def test_a_variant_that_is_wrong_is_left_out_and_blocks_nothing(session, engine, monkeypatch):
    from sam_kernels import ops

    perturb = ops.perturb_

    def off(w, *lists, backend, **more):
        perturb(w, *lists, backend=backend, **more)
        if backend.startswith("blocks=6"):
            w[1].add_(1)

    monkeypatch.setattr(ops, "perturb_", off)
    unit = next(iter(sweeps.units(session)))
    rows = unit.measure(session)
    (found,) = (row for row in rows if row["metric"] == "skipped")
    assert found["peer"] == "blocks=6" and "perturbed weights, adaptive=False differ" in found["value"]
    assert not [row for row in rows if row["peer"].startswith("blocks=6 ") and "p50" in row]
    session.results.replace(unit.name, rows)
    assert session.results.has(unit.name)


@emulated.needed
def test_a_variant_that_raises_costs_itself_and_the_default_the_unit(session, engine, monkeypatch):
    contestants = sweeps._contestants
    broken = "blocks=6"

    def raises(one, *rest):
        if one.variant.name == broken:
            raise RuntimeError("too many resources requested for launch")
        return contestants(one, *rest)

    monkeypatch.setattr(sweeps, "_contestants", raises)
    unit = next(iter(sweeps.units(session)))
    rows = unit.measure(session)
    assert ["too many resources" in row["value"] for row in rows if row["metric"] == "skipped"] == [True]
    timed = {row["peer"].split()[0] for row in rows if row["metric"] == "graph_ms"}
    assert timed == {"default", "blocks=5"}
    broken = winners.DEFAULT
    with pytest.raises(RuntimeError, match="too many resources"):
        unit.measure(session)


@emulated.needed
def test_libraries_that_are_not_built_are_built_if_there_is_time(session, engine, monkeypatch):
    monkeypatch.setattr(variants, "is_built", lambda variant, arch: False)
    unit = next(iter(sweeps.units(session)))
    session.ends = 0.0
    with pytest.raises(Unfinished, match="bench.gpu.variants has to build blocks=5, blocks=6 first"):
        unit.measure(session)
    assert engine == []
    session.ends = float("inf")
    assert [row["metric"] for row in unit.measure(session)].count("passed") == 2
    assert engine == [["blocks=5", "blocks=6", "stream=both"]]  # those of all sweeps at once
    late = variants.Built(emulated.LIBRARY, variants.LATE)
    monkeypatch.setattr(variants, "build", lambda chosen, *more: {v.name: late for v in chosen})
    with pytest.raises(Unfinished, match="no time to build"):
        unit.measure(session)


def test_a_stage_without_our_engines_has_no_units(session):
    assert list(sweeps.units(session)) == []


@interpreted.needed
def test_tritons_constants_are_others_while_its_passes_run(session, monkeypatch):
    from sam_kernels.backends import triton

    seen = []
    launch = triton.Triton._launch

    def launched(self, *arguments, **more):
        seen.append((triton._BLOCK_BYTES, triton._LAUNCH["num_warps"], more.get("BLOCK")))
        return launch(self, *arguments, **more)

    monkeypatch.setattr(triton.Triton, "_launch", launched)
    name = interpreted.BACKEND.name
    monkeypatch.setattr(agreement, "AWKWARD", [(3,), (130,)])
    values = tuple(s.variants[0] for s in TRITON_SWEEPS)
    sweep = Sweep("triton", values, ("sq_norm", "restore_"))
    engine = sweeps.Engine(name, (sweep,), ("resnet50",), partial(sweeps.open_triton, name), is_exact=False)
    opened, rows = engine.open(values, session)
    assert rows == [] and len(opened) == len(values)
    for one in opened:
        assert agreement.problems(engine, one.backend, torch.float32, session) == []
    assert {(block, warps) for block, warps, _ in seen} == {(8192, 8), (4096, 8), (8192, 4)}


# ---- winners ---------------------------------------------------------------------------------------

CASES = [("resnet50", "float32"), ("vit_l", "float32")]


def results_of(tmp_path, sweep, ratios):
    """Ratios by variant and pass, one for each list."""
    results = device.GpuResults(tmp_path / "gpu.jsonl", MACHINE)
    for i, case in enumerate(CASES):
        rows = [measured(f"default {what}", "graph_ms", [1.0], bytes=1e9) for what in sweep.passes]
        for (name, what), values in ratios.items():
            ratio = values[i]
            if ratio:
                rows += [measured(f"{name} {what}", "graph_ms", [ratio], bytes=1e9)]
                rows += [measured(f"{name} {what}", "graph_to_default", [ratio])]
        results.replace(winners.unit_of(sweep, *case), rows)
    return results


def blocks_of(tmp_path, **ratios):
    sweep = replace(SWEEPS[0], passes=("sq_norm",))
    given = {(name.replace("_", "="), "sq_norm"): values for name, values in ratios.items()}
    results = results_of(tmp_path, sweep, given)
    return next(w for w in winners.find(results, [sweep], CASES) if w.word == "sq_norm")


def test_the_value_of_least_time_in_the_mean_wins(tmp_path):
    winner = blocks_of(tmp_path, blocks_2=(1.1, 1.2), blocks_5=(0.97, 0.95), blocks_6=(0.96, 0.98))
    assert winner.variant.name == "blocks=5" and winner.ratio == pytest.approx((0.97 * 0.95) ** 0.5)


@pytest.mark.parametrize("ratios", [(0.995, 0.996), (0.9, 1.02), (1.0, 1.1)])
def test_the_default_stays_without_a_gain_or_with_a_loss_anywhere(tmp_path, ratios):
    winner = blocks_of(tmp_path, blocks_5=ratios)
    assert winner.variant is None and "the default stays" in winner.sentence


def test_a_value_that_was_left_out_somewhere_does_not_win(tmp_path):
    winner = blocks_of(tmp_path, blocks_5=(0.9, None), blocks_6=(0.97, 0.97))
    assert winner.variant.name == "blocks=6"
    assert blocks_of(tmp_path, blocks_5=(0.9, None)).variant is None


def test_a_setting_of_all_passes_is_judged_by_whole_steps():
    chunks = next(s for s in SWEEPS if s.name == "chunks")
    assert chunks.judged == {"all passes": STEPS}
    assert SWEEPS[0].judged["descend_"] == ("descend_ sgd", "descend_ adamw")


def test_winners_are_joined_and_blocks_keep_their_threads():
    by_name = {v.name: v for v in ALL}
    found = [
        winners.Winner("blocks", "sq_norm", by_name["blocks=6"], 0.95),
        winners.Winner("loads", "restore_", by_name["loads=double"], 0.98),
        winners.Winner("loads", "perturb_", None, 1.0),
    ]
    assert winners.combined(found) == {"SAMK_NORM_BLOCKS": 6, "SAMK_COPY_LOADS": 8}
    threads = winners.Winner("threads", "all passes", by_name["threads=512"], 0.97)
    joined = winners.combined([*found, threads])
    assert joined["SAMK_NORM_BLOCKS"] == 3 and joined["SAMK_THREADS"] == 512
    fewer = winners.Winner("blocks", "descend_", by_name["blocks=2"], 0.9)
    assert winners.combined([threads, fewer])["SAMK_BYTES_IN_FLIGHT"] == 24576
    assert winners.combined([]) == {}
