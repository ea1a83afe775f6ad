"""What stage 2 of `make gpu-check` compares: every pass, every recipe, every test that reads a GPU."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import time
import typing
from pathlib import Path

import interpreted
import pytest
import torch
from tape import capturing, in_place_of_a_graph, like_an_accelerator, record

ROOT = Path(__file__).resolve().parent.parent
# Not installed with the package: found from the checkout it is part of.
sys.path.insert(0, str(ROOT))

pytest.importorskip("rich", reason="the benchmark prints with rich")

from bench.gpu import (  # noqa: E402
    compare,
    correctness,
    device,
    passes,
    recorded,
    sanitized,
    suite,
    trajectories,
)
from bench.gpu.session import Session, Unfinished  # noqa: E402
from bench.gpu.sides import Side  # noqa: E402
from sam_kernels import backends as registered  # noqa: E402
from sam_kernels import graphs, recipes  # noqa: E402
from sam_kernels.backends import Backend, foreach  # noqa: E402
from sam_kernels.tensor_groups import ADAPTIVE, EUCLIDEAN, FISHER, FIXED  # noqa: E402

CPU = torch.device("cpu")
SHAPES = [(0,), (1,), (3,), (5, 4, 3, 3), (70,)]


# ---- every pass in every form ------------------------------------------------------------------------------


class Spied:
    """A backend that remembers which passes were called with which arguments, of which groups."""

    name = "spied"

    def __init__(self, inner):
        self.inner = inner
        self.called = set()
        self.given = (
            set()
        )  # (pass, argument, value): the value where it is a word or a truth, else "something"
        self.groups = set()  # (pass, what the group had)

    def __getattr__(self, name):
        value = getattr(self.inner, name)
        if name not in PASSES:
            return value

        def call(group, *args, **more):
            self.called.add(name)
            for key, x in inspect.signature(value).bind(group, *args, **more).arguments.items():
                self.given.add((name, key, x if isinstance(x, str | bool) else "something"))
            for what in ("masks", "masters", "rounding"):
                if getattr(group, what) is not None:
                    self.groups.add((name, what))
            self.groups |= {(name, metric) for _, metric, _ in group.keys}
            return value(group, *args, **more)

        return call


PASSES = [
    name
    for name, function in vars(Backend).items()
    if inspect.isfunction(function) and not name.startswith("_") and name != "refusal"
]


def wanted():
    """Of every pass each argument that may be left out, and every word that it may be."""
    for name in PASSES:
        hints = typing.get_type_hints(getattr(Backend, name))
        for key, parameter in inspect.signature(getattr(Backend, name)).parameters.items():
            if typing.get_origin(hints.get(key)) is typing.Literal:
                default = parameter.default
                yield from ((name, key, word) for word in typing.get_args(hints[key]) if word != default)
            elif isinstance(parameter.default, bool):
                yield name, key, not parameter.default
            elif parameter.default is not inspect.Parameter.empty:
                yield name, key, "something"


NORMS = ("sq_norm", "perturb_")
GROUPS = {
    *((name, metric) for name in NORMS for metric in (FIXED, EUCLIDEAN, ADAPTIVE, FISHER)),
    *((name, what) for name in (*NORMS, "restore_", "descend_") for what in ("masks", "masters")),
    ("perturb_", "rounding"),
}


def by_direct_comparisons():
    for dtype in compare.DTYPES:
        for family in passes.families(dtype):
            passes.results(family, Side("spied", dtype, CPU, "plain", SHAPES))


PROGRAMS = {
    "direct comparisons": by_direct_comparisons,
    "the sanitized program": lambda: sanitized.run("spied", CPU, SHAPES),
}


@pytest.fixture
def spied(monkeypatch):
    backend = Spied(foreach.BACKEND)
    monkeypatch.setitem(registered._registered, "spied", backend)
    return backend


@pytest.mark.filterwarnings("ignore:SAM. ")
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_pass_and_no_form_of_one_is_forgotten(program, spied):
    PROGRAMS[program]()
    assert spied.called == set(PASSES)
    assert set(wanted()) - spied.given == set()
    assert spied.groups >= GROUPS


def test_every_pass_of_the_c_interface_is_a_pass_of_backends():
    header = (ROOT / "csrc" / "sam_kernels.h").read_text()
    in_c = re.findall(r"\bsamk_(\w+)\(const samk_plan\*, const samk_\1_args\*\)", header)
    assert len(in_c) == header.count("_args*)") > 9
    own = {"accumulate": "accumulate_squares_", "count": "count_ranks"}
    assert {own.get(name, name if name in PASSES else f"{name}_") for name in in_c} == set(PASSES)


@interpreted.needed
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_kernel_of_triton_is_launched(program, monkeypatch):
    launched = set()
    kernels = registered.triton.load()[0]

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **more: launched.add(self.name)

    class Kernels:
        def __getattr__(self, name):
            getattr(kernels, name)  # there has to be one
            return Kernel(name)

    monkeypatch.setattr(registered.triton, "load", lambda: (Kernels(), None))
    monkeypatch.setitem(registered._registered, "spied", interpreted.BACKEND)
    PROGRAMS[program]()
    folder = ROOT / "sam_kernels" / "backends" / "triton" / "kernels"
    names = re.findall(r"^def (\w+)_kernel\(", "".join(p.read_text() for p in folder.glob("*.py")), re.M)
    assert launched == set(names) and len(names) > 9


def test_a_sanitizers_finding_in_any_kernel_of_triton_is_ours():
    for name in ("noise", "mark", "count", "accumulate", "round", "dots_by_tensor", "sum_by_tensor"):
        assert re.search(suite.kernels_of("triton"), f"at {name}_kernel+0x70 in mark.py")
    assert not re.search(suite.kernels_of("triton"), "at void at::reduce_kernel(float*)+0x70")


def test_the_sanitized_lists_are_short_and_cross_a_chunk_and_a_word():
    sizes = [torch.Size(shape).numel() for shape in sanitized.SHAPES]
    assert 65536 < max(sizes) and sum(sizes) < 100_000 and min(sizes) == 0
    assert any(1 < size % 64 for size in sizes) and set(sanitized.KINDS) == set(compare.DTYPES)


# ---- every recipe ------------------------------------------------------------------------------------------


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session on a CPU in a GPU's place, with a backend that serves it."""
    for module in (compare, correctness, recorded):
        monkeypatch.setattr(module, "AWKWARD", SHAPES)
    machine = {"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "tree": "t"}
    log = []
    made = Session(Stand(), device.GpuResults(tmp_path / "gpu.jsonl", machine), log.append, cap=3)
    made.text = log
    return made


class Stand(device.Gpu):
    backends, cpu_engine = ("foreach",), "foreach"

    def __init__(self):
        self.device = CPU

    def synchronize(self):
        pass


def problems(rows):
    assert {row["metric"] for row in rows} <= {"passed", "wrong"} and rows
    return [row["value"] for row in rows if row["metric"] == "wrong"]


def test_every_recipe_is_stepped_and_does_what_it_is_for():
    found = trajectories.of_recipes()
    assert set(found) == set(recipes.names())
    perturbs = {name: [] for name in found}
    for name, ways in found.items():
        assert len({way.name for way in ways}) == len(ways)
        for way in ways:
            stops = trajectories.trajectory(way, "foreach", SHAPES, torch.float32, CPU)
            assert stops.problems == []
            perturbs[name].append(sum("gradient" in stop for stop in stops.lists))
    # Four steps: two gradients each where nothing else is said, and both kinds of step where there are two.
    assert {name: counts for name, counts in perturbs.items() if set(counts) != {8}} == {
        "ae_sam": [6],
        "cr_sam": [12],
        "looksam": [6, 6],
        "lookbehind_sam": [12],
        "msam": [4],
        "multistep_sam": [16, 16],
        "rand_sam": [4],
        "rst": [6],
        "sampa": [9],
    }


def test_every_recipe_that_a_graph_can_hold_is_recorded_around_both_bases():
    found = recorded.recorded()
    held = {f"recipe/{name}" for name in recipes.names() if not graphs.recipe_refusal(recipes.get(name))}
    assert {name for name in found if name.startswith("recipe/")} == held and len(held) > 15
    for name in held:
        assert {method.base for method in found[name]} == {torch.optim.SGD, torch.optim.AdamW}
    assert all(method.options["master_weights"] for method in found["masters"])


class TapedStand(Stand):
    """A CPU whose graphs are tapes."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.patch = monkeypatch

    def capture(self, run, warmup=3):
        for _ in range(warmup):
            run()
        trained = run.func.__self__
        state = [x for own in trained.optimizer.state.values() for x in own.values() if x is not None]
        slots = [x for own in trained.optimizer._slots.tensors.values() for x in own.values()]
        return record(self.patch, run, [*trained.model, *state, *slots])[0]


class PrivatePool(Stand):
    """A CPU that captures by running once more: as in a graph's own memory, no address comes again."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.patch = monkeypatch

    def capture(self, run, warmup=3):
        for _ in range(warmup):
            run()
        kept = [p.grad for p in run.func.__self__.model]

        def replay():
            with capturing(self.patch):
                run()
            return kept

        own = run.func.__self__
        state = [x for slots in own.optimizer.state.values() for x in slots.values()]
        slots = [x for held in own.optimizer._slots.tensors.values() for x in held.values()]
        persistent = [x for x in (*own.model, *state, *slots) if isinstance(x, torch.Tensor)]
        before = [x.detach().clone() for x in persistent]
        replay()
        with torch.no_grad():
            for x, old in zip(persistent, before, strict=True):
                x.copy_(old)
        return replay


@interpreted.needed
def test_steps_captured_by_hand_keep_the_addresses_of_their_gradients(session, monkeypatch):
    """Triton's passes read addresses that were uploaded before the capture."""
    session.gpu = PrivatePool(monkeypatch)
    ways = recorded.recorded()["recipe/sampa"]
    assert problems(recorded.check(interpreted.BACKEND.name, ways[1:], session)) == []
    monkeypatch.setattr(graphs, "_fix_gradients", lambda opt: setattr(opt, "_clears_by_zeros", False))
    found = problems(recorded.check(interpreted.BACKEND.name, ways[:1], session))
    assert len(found) == 1 and "the address of a tensor changed during the capture" in found[0]


@pytest.fixture
def taped(session, monkeypatch):
    make = graphs.make_graphed_step

    def on_tape(model, loss, opt, sample, warmup):
        with in_place_of_a_graph(monkeypatch, model, opt):
            return make(model, loss, opt, sample, warmup)

    monkeypatch.setattr(graphs, "make_graphed_step", on_tape)
    session.gpu = TapedStand(monkeypatch)
    with like_an_accelerator(monkeypatch):
        yield session


@pytest.mark.parametrize("name", ["recipe/gsam", "recipe/sampa", "recipe/vasso", "masters", "clipped"])
def test_recorded_steps_are_the_eager_ones(name, taped):
    rows = recorded.check("foreach", recorded.recorded()[name], taped)
    assert problems(rows) == [] and len(rows) > 1


def test_a_recorded_step_that_differs_is_found(taped, monkeypatch):
    step = recorded.Trained.step
    monkeypatch.setattr(recorded.Trained, "step", lambda self, batch: 0 * step(self, batch))
    found = problems(recorded.check("foreach", recorded.recorded()["recipe/sam"][:1], taped))
    assert len(found) == 1 and "the loss of replay 1 differs" in found[0]


def test_a_step_that_no_graph_holds_is_a_fault_and_no_skip(session):
    (way,) = trajectories.of_recipes()["rst"]
    (found,) = problems(recorded.check("foreach", [way], session))
    assert found.startswith("no graph can replay it: recipe 'rst': its cadence decides on the host")


# ---- what is found -----------------------------------------------------------------------------------------


WRONG = {
    "sq_norm": ("sums", lambda result, args: result.mul_(1.01)),
    "grad_stats": ("sums", lambda result, args: result.mul_(1.01)),
    "restore_": ("plain", lambda result, args: args[0].params[3].mul_(1.01)),
    "noise_": ("random", lambda result, args: args[1][3].view(-1)[7:8].add_(1e-6)),
    "mark_": ("selection", lambda result, args: args[2][4].bitwise_xor_(1)),
    "count_ranks": ("selection", lambda result, args: result.add_(1)),
    "accumulate_squares_": ("selection", lambda result, args: args[1][4].add_(1e-3)),
    "descend_": ("masks", lambda result, args: args[0].params[4].view(-1)[3:4].add_(1e-3)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_pass_that_is_wrong_in_one_place_is_found(name, session, monkeypatch):
    family, spoil = WRONG[name]

    class Wrong(Spied):
        def __getattr__(self, attribute):
            value = getattr(foreach.BACKEND, attribute)
            if attribute != name:
                return value

            def call(*args, **more):
                result = value(*args, **more)
                spoil(result, args)
                return result

            return call

    monkeypatch.setitem(registered._registered, "wrong", Wrong(foreach.BACKEND))
    assert problems(correctness._passes("wrong", family, torch.float32, session))
    assert problems(correctness._passes("foreach", family, torch.float32, session)) == []


def test_bits_of_adam_are_not_asked_in_float64_where_libraries_of_powers_differ(session, monkeypatch):
    """By an ulp of a bias correction, which fp32 rounds away and float64 keeps."""

    class OtherLibrary(Spied):
        def __getattr__(self, attribute):
            value = getattr(foreach.BACKEND, attribute)
            if attribute != "descend_":
                return value

            def call(group, rule, *rest, **more):
                result = value(group, rule, *rest, **more)
                if group.dtype == torch.float64:
                    for p in group.params:
                        p.mul_(1 + 2**-52)
                return result

            return call

    monkeypatch.setitem(registered._registered, "other", OtherLibrary(foreach.BACKEND))
    found = problems_of(correctness._passes("other", "plain", torch.float64, session))
    assert "descend_ sgd: weights differs in its bits" in found and "descend_ adam" not in found
    assert problems_of(correctness._passes("other", "plain", torch.float32, session)) == ""


def problems_of(rows):
    return "; ".join(row["value"] for row in rows if row["metric"] == "wrong")


def test_bias_corrections_in_fp32_survive_an_ulp_of_their_powers():
    import numpy as np

    for step in (1, 2, 3, 4):
        for beta in (0.8, 0.9, 0.999):
            power = np.float64(beta) ** step
            for other in (np.nextafter(power, 0), np.nextafter(power, 1)):
                for lr in (0.1, 0.2, 0.01):
                    assert np.float32(lr / (1 - power)) == np.float32(lr / (1 - other))
                assert np.float32(np.sqrt(1 - power)) == np.float32(np.sqrt(1 - other))


def test_without_a_cpu_engine_passes_are_held_against_the_reference(session, monkeypatch):
    monkeypatch.setattr(correctness, "cpu_refusal", lambda backend: "it was not built")
    rows = correctness._passes("foreach", "plain", torch.float32, session)
    assert "against the reference, for the CPU engine is not there: it was not built" in session.text[0]
    assert not [row for row in rows if row["metric"] == "wrong"]
    (counted, *_) = [row for row in rows if row["metric"] == "lists_of_the_same_bits"]
    assert 0 < counted["value"] <= counted["lists"]


# ---- the order of units ------------------------------------------------------------------------------------


def test_what_is_most_basic_comes_first_for_every_backend(session, monkeypatch):
    session.gpu.backends = device.Gpu.backends
    monkeypatch.setattr(correctness, "absence", lambda backend, device: None)
    names = [unit.name.removeprefix("correct/") for unit in correctness.units(session)]
    basic = ["sums/float32", "plain/float32", "step/sgd", "graph/sgd"]
    assert names[:10] == [
        *(f"{backend}/library" for backend in ("native", "triton")),
        *(f"{backend}/{what}" for backend in ("native", "triton") for what in basic),
    ]
    assert len(names) == len(set(names))
    first_process = next(i for i, name in enumerate(names) if "pytest" in name or "sanitizer" in name)
    assert all("pytest" in name or "sanitizer" in name for name in names[first_process:])


# ---- the suite on a GPU ------------------------------------------------------------------------------------


def reads_the_device(path):
    """Whether a test file asks for a GPU, or takes the backends of one from a file that does."""
    text = path.read_text()
    imported = {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module == "test_passes"
        for alias in node.names
    }
    on_cuda = {name for name in imported if name in ("ALL", "OTHERS", "KERNELS") or name.endswith("_CUDA")}
    asks = re.search(r"^[^#\n]*(if|not) torch\.cuda\.is_available\(\)|mark\.cuda\b", text, re.M)
    return bool(on_cuda or asks)


def test_every_file_that_reads_the_device_is_in_a_unit():
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__) and reads_the_device(path)
    }
    assert found == {file for part in suite.PARTS.values() for file in part.files}


COLLECTED = """
import json, sys, pytest, torch
torch.cuda.is_available = lambda: True
from sam_kernels.backends import native, triton
for backend in (native.BACKEND, triton.BACKEND):
    backend.refusal = lambda group: None

class Names:
    def pytest_collection_finish(self, session):
        self.found = [item.name for item in session.items]

counts = {}
for name, chosen, file in json.loads(sys.argv[1]):
    names = Names()
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-k", chosen, file], plugins=[names])
    counts[name] = names.found
print("\\n" + json.dumps(counts))
"""


def test_parts_of_the_suite_choose_the_tests_of_a_gpu():
    """On a machine that only seems to have one, of the shortest file of each part."""
    shortest = {"native": "tests/test_noise.py", "foreach": "tests/test_noise.py"}
    asked = [
        (name, part.chosen, shortest.get(name, part.files[-1]))
        for name, part in suite.PARTS.items()
        if name not in ("triton passes", "graphs")
    ]
    environment = {**os.environ, "SAM_KERNELS_TEST_DEVICE": "cuda"}
    done = subprocess.run(
        [sys.executable, "-c", COLLECTED, json.dumps(asked)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for name, backend in {"native": "native", "triton variants": "triton", "foreach": "foreach"}.items():
        assert found[name] and all(f"{backend}-cuda" in test for test in found[name])
    (file,) = suite.PARTS["graphs"].files
    assert f"def test_{suite.PARTS['graphs'].chosen}" in (ROOT / file).read_text()


def test_the_suite_runs_compiled_in_short_words_and_in_several_processes(session, monkeypatch):
    asked = []

    def run(session, what, command, environment):
        asked.append((what, command, environment))
        return 0, "4 passed in 1.0s", Path("x.log")

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(suite, "absence", lambda backend, device: None)
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    for name, part in suite.PARTS.items():
        assert problems([suite._tests(name, part, session)[0]]) == []
    for _, command, environment in asked:
        assert environment["TRITON_INTERPRET"] == "0" and environment["SAM_KERNELS_TEST_DEVICE"] == "cuda"
        assert "--tb=short" in command and "-n" not in command and "not slow and not thorough" in command
    monkeypatch.setattr(suite, "find_spec", lambda name: object())
    monkeypatch.setattr(suite.machine, "cores", lambda: 16)
    command = suite.pytest_command(suite.PARTS["native"])
    assert command[command.index("-n") + 1] == "8"
    monkeypatch.setattr(suite, "run", lambda *rest: (0, "9 skipped in 1.0s", Path("x.log")))
    assert "no test ran" in suite._tests("native", suite.PARTS["native"], session)[0]["value"]
    monkeypatch.setattr(suite, "absence", lambda backend, device: "no Triton")
    (row,) = suite._tests("triton passes", suite.PARTS["triton passes"], session)
    assert (row["metric"], row["value"]) == ("skipped", "no Triton")


FAILED = """
..F
=================================== FAILURES ===================================
_______________________________ test_a[native-cuda] ____________________________
tests/test_passes.py:7: in test_a
    assert 1 == 2
=========================== short test summary info ============================
FAILED tests/test_passes.py::test_a[native-cuda] - assert 1 == 2
1 failed, 2 passed in 1.0s
"""


def test_a_failure_is_in_the_log_with_its_message(session, monkeypatch):
    monkeypatch.setattr(suite, "run", lambda *rest: (1, FAILED, Path("x.log")))
    row, _ = suite._tests("native", suite.PARTS["native"], session)
    assert "1 failed, 2 passed" in row["value"] and "FAILED tests/test_passes.py" in row["value"]
    text = "\n".join(session.text)
    assert "  |     assert 1 == 2" in text and "all of it: x.log" in text and "..F" not in text


# ---- processes ---------------------------------------------------------------------------------------------


def test_what_a_process_says_is_kept_beside_the_results(session):
    command = [sys.executable, "-c", "import os; print('a' * 300_000 + os.environ['X']); raise SystemExit(3)"]
    status, said, log = suite.run(session, "native memcheck", command, {"X": "end"})
    assert status == 3 and said.endswith("end\n") and len(said) == 200_000
    assert log == session.results.path.with_suffix(".log")
    assert suite.section_of(log, "native memcheck") == said


def test_logs_are_not_under_version_control():
    log = ROOT / "bench" / "results" / "nvidia-h200" / "gpu.log"
    asked = ["git", "check-ignore", "-q", str(log)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    if "not a git repository" in done.stderr:
        pytest.skip("this is a copy of the sources without their history")
    assert done.returncode == 0


ENDLESS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_process_that_does_not_end_is_ended_with_all_it_started_and_its_words_are_kept(
    session, monkeypatch
):
    monkeypatch.setattr(suite, "_LEAST_SECONDS", 0)
    session.ends = time.monotonic() + 11.5
    with pytest.raises(Unfinished, match="racecheck did not end in 1 s"):
        suite.run(session, "racecheck", [sys.executable, "-c", ENDLESS], {})
    child = int(suite.section_of(suite.log_of(session), "racecheck"))
    status = Path(f"/proc/{child}/status")
    if Path("/proc/self/status").exists():
        until = time.monotonic() + 5
        while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        assert not status.exists() or "State:\tZ" in status.read_text()
    assert any(str(child) in line for line in session.text)


def test_without_time_a_process_is_left_to_the_next_run(session):
    session.ends = time.monotonic() + 30
    with pytest.raises(Unfinished, match="s are left for memcheck"):
        suite.run(session, "memcheck", [sys.executable, "-c", "print(1)"], {})
    assert not suite.log_of(session).exists()
