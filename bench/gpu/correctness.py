"""Stage 2: is it right? Direct comparisons first, because the other stages wait for them; then the suite."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import torch

from .. import machine
from ..records import Row, single
from . import compare, graphs
from .compare import AWKWARD, DTYPES, LONG, MANY, MEMORIES
from .device import GpuResults, cuda_library
from .ours import NATIVE, TRITON, absence, absence_of_interpreter, named
from .session import Session, Unfinished, Unit, guarded, skipped, verdict

# What watches which backend's kernels. Races are looked for in memory that a block shares; in Triton's
# kernels the compiler alone writes there.
_SANITIZERS = {NATIVE: ("memcheck", "racecheck", "initcheck"), TRITON: ("memcheck", "initcheck")}
# How a sanitizer's finding names our kernels: by namespace, and by function or source file.
_KERNELS = {
    NATIVE: r"samk",
    TRITON: r"\b(sq_norm|sum_by_tensor|perturb|restore|grad_stats|combine|descend)_kernel\b|backends/triton/",
}
_PASSES = "tests/test_passes.py"
_TEST_DEVICE, _INTERPRET = "SAM_KERNELS_TEST_DEVICE", "TRITON_INTERPRET"

# What a pytest run needs at the least; less than that is left to the next call.
_LEAST_SECONDS = 60

# These add, multiply and round as the CPU engine does, bit for bit; the others are held to a few roundings.
_INEXACT = (TRITON,)
_COPIES = ("restore_", "its snapshot")  # exact whoever makes them


def units(session: Session) -> Iterator[Unit]:
    yield from direct(session)
    # Two runs, or one that Triton's compiler keeps busy would never end within the time of a stage.
    yield Unit("correct/pytest/passes", partial(_compiled, "passes", [_PASSES]))
    yield Unit("correct/pytest/rest", partial(_compiled, "rest", ["tests", f"--ignore={_PASSES}"]))
    yield Unit("correct/pytest/interpreted", _interpreted)
    for backend in (NATIVE, TRITON):
        for tool in _SANITIZERS[backend]:
            yield Unit(f"correct/{backend}/sanitizer/{tool}", partial(_sanitizer, backend, tool))


def direct(session: Session, *chosen: str) -> Iterator[Unit]:
    """Comparisons made here, without which nothing else is measured, of all backends or of those chosen."""
    for backend in chosen or session.gpu.backends:
        yield Unit(f"correct/{backend}/library", partial(_library, backend))
        if absence(backend, session.gpu.device) is None:
            yield from _comparisons(backend)


def _comparisons(backend: str) -> Iterator[Unit]:
    for name in compare.methods():
        yield Unit(f"correct/{backend}/step/{name}", partial(_steps, backend, name))
    for dtype in DTYPES:
        yield Unit(f"correct/{backend}/bits/{str(dtype)[6:]}", partial(_bits, backend, dtype))
    yield Unit(f"correct/{backend}/many", partial(_lists, backend, {"10,000 tensors": MANY}))
    yield Unit(f"correct/{backend}/long", partial(_lists, backend, {"70M elements in 5 tensors": LONG}))
    yield Unit(f"correct/{backend}/huge", partial(_huge, backend))
    yield Unit(f"correct/{backend}/non-finite", partial(_non_finite, backend))
    for name in ("sgd", "adamw"):
        yield Unit(f"correct/{backend}/graph/{name}", partial(graphs.check, backend, name))
    yield Unit(f"correct/{backend}/launches", partial(graphs.check_launches, backend))
    yield Unit(f"correct/{backend}/second device", partial(_second_device, backend))


def missing(session: Session, results: GpuResults, *backends: str, only_direct: bool) -> list[str]:
    """Units that these sources have not passed on this GPU; skipped ones count as passed.

    Args:
        backends: whose direct comparisons; all by default.
    """
    wanted = direct(session, *backends) if only_direct else units(session)
    return [unit.name for unit in wanted if not results.has(unit.name)]


def _library(backend: str, session: Session) -> list[Row]:
    """The backend serves this device; what it says of itself goes into the record."""
    text, reason = library_of(backend), absence(backend, session.gpu.device)
    if reason is not None:
        return [skipped(session, backend, reason), single(backend, "text", text)]

    def run() -> list[str]:
        params = [torch.nn.Parameter(torch.ones(3, device=session.gpu.device))]
        optimizer = compare.methods()["sgd"].build(params, backend)
        session.log(f"  {text}\n  " + str(optimizer.backends()).replace("\n", "\n  "))
        return []

    return [verdict(session, backend, guarded(run)), single(backend, "text", text)]


def library_of(backend: str) -> str:
    """What a backend says of the compiler or library it has."""
    if backend == TRITON:
        from sam_kernels.backends import triton

        return triton.describe()
    return cuda_library()


def _steps(backend: str, name: str, session: Session) -> list[Row]:
    """A backend against the reference here and against the CPU engine, at every stop of a step."""
    rows, engine = [], session.gpu.cpu_engine
    reason = cpu_refusal(engine)
    for dtype in DTYPES:
        for memory in MEMORIES if session.cap is None else MEMORIES[:2]:
            what = named(backend, f"{name}, {str(dtype)[6:]}, {memory}")
            against = partial(_against, session, backend, name, dtype, memory)
            rows.append(verdict(session, f"{what}: reference", guarded(partial(against, "reference"))))
            if reason is None:
                cpu = torch.device("cpu")
                rows.append(verdict(session, f"{what}: CPU engine", guarded(partial(against, engine, cpu))))
    if reason is not None:
        rows.append(skipped(session, named(backend, f"{name}: CPU engine"), reason))
    return rows


def _against(
    session: Session,
    backend: str,
    name: str,
    dtype: torch.dtype,
    memory: str,
    other: str,
    where: torch.device | None = None,
) -> list[str]:
    """Differences of a trajectory from that of another backend, here or on another device."""
    method, gpu = compare.methods()[name], session.gpu
    got = compare.trajectory(method, backend, AWKWARD, dtype, gpu.device, memory)
    want = compare.trajectory(method, other, AWKWARD, dtype, where or gpu.device, memory)
    return compare.differences(got, want, dtype, 4 if method.powers else 1)


def cpu_refusal(backend: str) -> str | None:
    """Why that backend cannot serve the CPU, or None."""
    try:
        compare.methods()["sgd"].build([torch.nn.Parameter(torch.ones(1))], backend)
    except RuntimeError as problem:
        return str(problem)
    return None


def _bits(backend: str, dtype: torch.dtype, session: Session) -> list[Row]:
    """The bits of the CPU engine wherever an element depends on its own inputs alone, or close to them."""
    reason = cpu_refusal(session.gpu.cpu_engine)
    if reason is not None:
        return [skipped(session, named(backend, f"bits, {str(dtype)[6:]}"), reason)]
    rows = []
    for memory in MEMORIES[:2]:
        what = named(backend, f"{str(dtype)[6:]}, {memory}")
        if backend in _INEXACT:
            rows += _close(session, backend, dtype, memory, what)
        else:
            run = partial(_elements, session, backend, dtype, memory)
            rows.append(verdict(session, f"{what}: elementwise bits", guarded(run)))
        run = partial(_sums, session, backend, dtype, memory)
        rows.append(verdict(session, f"{what}: sums", guarded(run)))
    return rows


def _elements(session: Session, backend: str, dtype: torch.dtype, memory: str) -> list[str]:
    """The passes whose results have other bits than on the CPU."""
    got = compare.pass_results(backend, dtype, session.gpu.device, memory)
    want = compare.pass_results(session.gpu.cpu_engine, dtype, torch.device("cpu"), memory)
    return [f"{name} differs in its bits" for name in got if not compare.same_bits(got[name], want[name])]


def _close(session: Session, backend: str, dtype: torch.dtype, memory: str, what: str) -> list[Row]:
    """Elementwise passes within rounding and copies exact; how many lists had the same bits is recorded."""
    same: list[bool] = []

    def run() -> list[str]:
        got = compare.pass_results(backend, dtype, session.gpu.device, memory)
        want = compare.pass_results(session.gpu.cpu_engine, dtype, torch.device("cpu"), memory)
        found = []
        for name, tensors in got.items():
            same.append(compare.same_bits(tensors, want[name]))
            kind = torch.float32 if name.endswith(" steps") else dtype
            sentence = compare.difference(tensors, want[name], kind)
            if name.startswith(_COPIES) and not same[-1]:
                found.append(f"{name} differs in its bits")
            elif sentence is not None:
                found.append(f"{name}: {sentence}")
        return found

    row = verdict(session, f"{what}: elementwise", guarded(run))
    session.log(f"  {what}: {sum(same)} of {len(same)} lists have the bits of the CPU engine")
    return [row, single(what, "lists_of_the_same_bits", sum(same), lists=len(same))]


def _sums(session: Session, backend: str, dtype: torch.dtype, memory: str) -> list[str]:
    """Sums are added in another order, so they are close; twice the same call gives the same bits."""
    got, again = (compare.sums(backend, dtype, session.gpu.device, memory) for _ in range(2))
    want = compare.sums(session.gpu.cpu_engine, dtype, torch.device("cpu"), memory)
    found = [f"{name}: two runs differ" for name in got if got[name] != again[name]]
    found += [
        f"{name} is {got[name]!r}, the CPU's {want[name]!r}"
        for name in got
        if not abs(got[name] - want[name]) <= compare.SUM_ERROR[dtype] * abs(want[name])
    ]
    return found


def _lists(backend: str, lists: dict[str, list[tuple[int, ...]]], session: Session) -> list[Row]:
    """Lists that take many launches, and lists whose chunks have their full length."""
    rows = []
    for what, shapes in lists.items():
        if session.cap is not None:
            shapes = [s if s[0] <= session.cap else (session.cap,) for s in shapes][:500]
        for name in ("sgd", "adamw"):
            run = partial(_against_foreach, session, backend, name, shapes)
            rows.append(verdict(session, named(backend, f"{what}, {name}"), guarded(run)))
    return rows


def _against_foreach(session: Session, backend: str, name: str, shapes: list[tuple[int, ...]]) -> list[str]:
    """The reference would loop over ten thousand tensors; foreach is as independent of our kernels."""
    method, where = compare.methods()[name], (shapes, torch.float32, session.gpu.device)
    got = compare.trajectory(method, backend, *where, steps=1)
    want = compare.trajectory(method, "foreach", *where, steps=1)
    return compare.differences(got, want, torch.float32)


def _huge(backend: str, session: Session) -> list[Row]:
    """One tensor with more elements than 32 bits count, of numbers whose results are known."""
    elements = 2**31 + 3 if session.cap is None else session.cap
    if session.gpu.free_bytes() < 8 * elements + 2**30:
        reason = "three bfloat16 lists of 2^31 elements do not fit the free memory"
        return [skipped(session, named(backend, "huge"), reason)]
    return [verdict(session, named(backend, "huge"), guarded(partial(_exact, session, backend, elements)))]


def _exact(session: Session, backend: str, elements: int) -> list[str]:
    from sam_kernels import ops

    device = session.gpu.device
    w, g, s = (torch.full((elements,), x, dtype=torch.bfloat16, device=device) for x in (1.0, 1.0, 7.0))
    found = []
    with torch.no_grad():
        total = ops.sq_norm([g], backend=backend)
        # Wrong indices would lose whole chunks; a backend that takes a root in between loses some digits.
        if not abs(total.item() - elements) <= 1e-6 * elements:
            found.append(f"sq_norm is {total.item()}, not {elements}")
        ops.perturb_([w], [g], [s], torch.ones_like(total), rho=0.5, eps=0.0, backend=backend)
        for name, tensor, value in (("weights", w, 1.5), ("snapshot", s, 1.0)):
            if not bool((tensor == value).all()):
                found.append(f"perturb_: not all {name} are {value}")
        ops.restore_([w], [s], backend=backend)
        if not bool((w == 1.0).all()):
            found.append("restore_: not all weights are back")
    return found


def _non_finite(backend: str, session: Session) -> list[Row]:
    """A first gradient that is not finite moves nothing: no weight, no state, no counter."""
    rows = []
    for name in ("sgd", "adamw", "asam", "p_inf", "p_3"):
        for value in (float("inf"), float("nan")):
            what = named(backend, f"{name}, {value} in the first gradient")
            rows.append(verdict(session, what, guarded(partial(_poisoned, session, backend, name, value))))
    what = named(backend, "sgd, nan in the second gradient")
    rows.append(verdict(session, what, guarded(partial(_poisoned_second, session, backend))))
    return rows


def _with(values: list[torch.Tensor], value: float) -> list[torch.Tensor]:
    """The values with one of them replaced, in the middle of the longest tensor."""
    longest = max(values, key=torch.Tensor.numel).view(-1)
    longest[longest.numel() // 2] = value
    return values


def _poisoned(session: Session, backend: str, name: str, value: float) -> list[str]:
    gpu = session.gpu
    params = [torch.nn.Parameter(x.to(gpu.device)) for x in compare.draw(AWKWARD, torch.float32, 0)]
    optimizer = compare.methods()[name].build(params, backend)

    def step(first: list[torch.Tensor]) -> None:
        compare.give(params, first, "plain")
        optimizer.first_step()
        compare.give(params, compare.draw(AWKWARD, torch.float32, 2), "plain")
        optimizer.second_step()

    step(compare.draw(AWKWARD, torch.float32, 1))
    before = [p.detach().clone() for p in params]
    state = {k: [x.clone() for x in v] for k, v in compare.state_of(optimizer, params).items()}
    step(_with(compare.draw(AWKWARD, torch.float32, 3), value))
    after = compare.state_of(optimizer, params)
    found = [] if compare.same_bits(params, before) else ["weights moved"]
    found += [f"{k} moved" for k in state if not compare.same_bits(state[k], after[k])]
    return found


def _poisoned_second(session: Session, backend: str) -> list[str]:
    """In the second gradient it spreads as in the base optimizer: to its own elements only."""
    results = []
    for one in (backend, "reference"):
        values = compare.draw(AWKWARD, torch.float32, 0)
        params = [torch.nn.Parameter(x.to(session.gpu.device)) for x in values]
        optimizer = compare.methods()["sgd"].build(params, one)
        compare.give(params, compare.draw(AWKWARD, torch.float32, 1), "plain")
        optimizer.first_step()
        compare.give(params, _with(compare.draw(AWKWARD, torch.float32, 2), float("nan")), "plain")
        optimizer.second_step()
        results.append(params)
    got, want = results
    sentence = compare.difference(got, want, torch.float32)
    return [sentence] if sentence else []


def _second_device(backend: str, session: Session) -> list[Row]:
    """Tensors of another device than the current one."""
    if session.gpu.count() < 2:
        return [skipped(session, named(backend, "second device"), f"this machine has {session.gpu.count()}")]
    method = compare.methods()["sgd"]

    def run() -> list[str]:
        where = (AWKWARD, torch.float32, torch.device("cuda", 1))
        got = compare.trajectory(method, backend, *where)
        return compare.differences(got, compare.trajectory(method, "reference", *where), torch.float32)

    return [verdict(session, named(backend, "second device"), guarded(run))]


def _compiled(part: str, chosen: list[str], session: Session) -> list[Row]:
    """A part of the suite in a process of its own, Triton's kernels compiled."""
    supported = any(_TEST_DEVICE in path.read_text() for path in (machine.ROOT / "tests").rglob("*.py"))
    session.log(f"  the suite {'reads' if supported else 'does not read'} {_TEST_DEVICE}")
    return _suite(session, f"pytest, {part}", chosen, {_TEST_DEVICE: "cuda", _INTERPRET: "0"})


def _interpreted(session: Session) -> list[Row]:
    """The passes in Triton's interpreter, in a process of its own: Triton either compiles or interprets.

    Whole steps of the interpreter take many minutes and are tested wherever there is no GPU.
    """
    reason = absence_of_interpreter()
    if reason is not None:
        return [skipped(session, "pytest, interpreted", reason)]
    return _suite(session, "pytest, interpreted", [_PASSES, "-k", "interpreted"], {_INTERPRET: "1"})


def _suite(session: Session, what: str, chosen: list[str], environment: dict[str, str]) -> list[Row]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    status, said = _run(session, what, command + chosen, environment)
    last = said.strip().splitlines()[-1] if said.strip() else "no output"
    failures = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    problems = [] if status == 0 else [last, *failures]
    if not problems and " passed" not in last:  # a suite that skips all its tests ends with 0
        problems = [f"no test ran: {last}"]
    return [verdict(session, what, problems), single(what, "summary", last)]


def _sanitizer(backend: str, tool: str, session: Session) -> list[Row]:
    """compute-sanitizer over a program that calls every kernel of a backend."""
    program, what = shutil.which("compute-sanitizer"), named(backend, tool)
    reason = absence(backend, session.gpu.device)
    if program is None or reason is not None:
        return [skipped(session, what, reason or "compute-sanitizer is not on the PATH")]
    command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    if tool == "racecheck":
        # Watching torch's kernels too would take minutes. initcheck has to see them: they write our inputs.
        command += ["--kernel-name", "kns=samk"]
    command += [sys.executable, "-m", "bench.gpu.sanitized", backend]
    # Each tensor in an allocation of its own, or an overrun would end in a neighbour and go unseen.
    status, said = _run(session, what, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return [verdict(session, what, sanitizer_problems(status, said, backend))]


def sanitizer_problems(status: int, said: str, backend: str = NATIVE) -> list[str]:
    """What a sanitizer's output says about our kernels; findings in torch's are not ours to judge."""
    lines = [line.removeprefix("=========").strip() for line in said.splitlines() if line.startswith("=====")]
    if not any(line.startswith(("ERROR SUMMARY", "RACECHECK SUMMARY")) for line in lines):
        return [f"it ended with status {status} before its summary: {said.strip()[-300:]}"]

    def is_ours(line: str) -> bool:
        return re.search(_KERNELS[backend], line) is not None

    ours = [
        f"{lines[i - 1]} {line}" for i, line in enumerate(lines) if line.startswith("at ") and is_ours(line)
    ]
    # Races name the kernel in the line itself, and not always after "at".
    ours += [line for line in lines if line.startswith("Error: Race") and is_ours(line)]
    if not ours and status not in (0, 9):
        return [f"the program under it failed with status {status}: {said.strip()[-300:]}"]
    return ours


def _run(session: Session, what: str, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Status and output of a command that gets what is left of the stage's time."""
    seconds = session.left() - 10
    if seconds < _LEAST_SECONDS:
        raise Unfinished(f"{max(0, seconds):.0f} s are left for {what}")
    try:
        done = subprocess.run(
            command,
            cwd=machine.ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as late:
        raise Unfinished(f"{what} did not end in {seconds:.0f} s") from late
    for line in done.stdout.strip().splitlines()[-15:]:
        session.log(f"  | {line}")
    return done.returncode, done.stdout
