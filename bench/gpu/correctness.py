"""Stage 2: is it right? Direct comparisons first, because the other stages wait for them; then the suite."""

from __future__ import annotations

import os
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
from .session import Session, Unfinished, Unit, guarded, skipped, verdict

_SANITIZERS = ("memcheck", "racecheck", "initcheck")
_TEST_DEVICE = "SAM_KERNELS_TEST_DEVICE"

# What a pytest run needs at the least; less than that is left to the next call.
_LEAST_SECONDS = 60


def units(session: Session) -> Iterator[Unit]:
    yield from direct(session)
    yield Unit("correct/pytest", _pytest)
    for tool in _SANITIZERS:
        yield Unit(f"correct/sanitizer/{tool}", partial(_sanitizer, tool))


def direct(session: Session) -> Iterator[Unit]:
    """Comparisons made here, without which nothing else is measured."""
    yield Unit("correct/library", _library)
    for name in compare.methods():
        yield Unit(f"correct/step/{name}", partial(_steps, name))
    for dtype in DTYPES:
        yield Unit(f"correct/bits/{str(dtype)[6:]}", partial(_bits, dtype))
    yield Unit("correct/many", partial(_lists, {"10,000 tensors": MANY}))
    yield Unit("correct/long", partial(_lists, {"70M elements in 5 tensors": LONG}))
    yield Unit("correct/huge", _huge)
    yield Unit("correct/non-finite", _non_finite)
    for name in ("sgd", "adamw"):
        yield Unit(f"correct/graph/{name}", partial(graphs.check, name))
    yield Unit("correct/launches", graphs.check_launches)
    yield Unit("correct/second device", _second_device)


def missing(session: Session, results: GpuResults, *, only_direct: bool) -> list[str]:
    """Units that these sources have not passed on this GPU; skipped ones count as passed."""
    wanted = direct(session) if only_direct else units(session)
    return [unit.name for unit in wanted if not results.has(unit.name)]


def _library(session: Session) -> list[Row]:
    """The backend serves this device; what it says of itself goes into the record."""
    backend, device = session.gpu.backend, session.gpu.device

    def run() -> list[str]:
        params = [torch.nn.Parameter(torch.ones(3, device=device))]
        optimizer = compare.methods()["sgd"].build(params, backend)
        session.log(f"  {cuda_library()}\n  " + str(optimizer.backends()).replace("\n", "\n  "))
        return []

    return [verdict(session, "backend", guarded(run)), single("library", "text", cuda_library())]


def _steps(name: str, session: Session) -> list[Row]:
    """Native here against the reference here and against the CPU engine, at every stop of a step."""
    backend, rows = session.gpu.backend, []
    reason = cpu_refusal(backend)
    for dtype in DTYPES:
        for memory in MEMORIES if session.cap is None else MEMORIES[:2]:
            what = f"{name}, {str(dtype)[6:]}, {memory}"
            against = partial(_against, session, name, dtype, memory)
            rows.append(verdict(session, f"{what}: reference", guarded(partial(against, "reference"))))
            if reason is None:
                cpu = torch.device("cpu")
                rows.append(verdict(session, f"{what}: CPU engine", guarded(partial(against, backend, cpu))))
    if reason is not None:
        rows.append(skipped(session, f"{name}: CPU engine", reason))
    return rows


def _against(
    session: Session,
    name: str,
    dtype: torch.dtype,
    memory: str,
    other: str,
    where: torch.device | None = None,
) -> list[str]:
    """Differences of a trajectory from that of another backend, here or on another device."""
    method, gpu = compare.methods()[name], session.gpu
    got = compare.trajectory(method, gpu.backend, AWKWARD, dtype, gpu.device, memory)
    want = compare.trajectory(method, other, AWKWARD, dtype, where or gpu.device, memory)
    return compare.differences(got, want, dtype, 4 if method.powers else 1)


def cpu_refusal(backend: str) -> str | None:
    """Why that backend cannot serve the CPU, or None."""
    try:
        compare.methods()["sgd"].build([torch.nn.Parameter(torch.ones(1))], backend)
    except RuntimeError as problem:
        return str(problem)
    return None


def _bits(dtype: torch.dtype, session: Session) -> list[Row]:
    """The same bits from both engines wherever an element depends on its own inputs alone."""
    reason = cpu_refusal(session.gpu.backend)
    if reason is not None:
        return [skipped(session, f"bits, {str(dtype)[6:]}", reason)]
    rows = []
    for memory in MEMORIES[:2]:
        what = f"{str(dtype)[6:]}, {memory}"
        rows.append(
            verdict(session, f"{what}: elementwise bits", guarded(partial(_elements, session, dtype, memory)))
        )
        rows.append(verdict(session, f"{what}: sums", guarded(partial(_sums, session, dtype, memory))))
    return rows


def _elements(session: Session, dtype: torch.dtype, memory: str) -> list[str]:
    backend = session.gpu.backend
    got = compare.pass_results(backend, dtype, session.gpu.device, memory)
    want = compare.pass_results(backend, dtype, torch.device("cpu"), memory)
    return [f"{name} differs in its bits" for name in got if not compare.same_bits(got[name], want[name])]


def _sums(session: Session, dtype: torch.dtype, memory: str) -> list[str]:
    """Sums are added in another order, so they are close; twice the same call gives the same bits."""
    backend = session.gpu.backend
    got, again = (compare.sums(backend, dtype, session.gpu.device, memory) for _ in range(2))
    want = compare.sums(backend, dtype, torch.device("cpu"), memory)
    found = [f"{name}: two runs differ" for name in got if got[name] != again[name]]
    found += [
        f"{name} is {got[name]!r}, the CPU's {want[name]!r}"
        for name in got
        if not abs(got[name] - want[name]) <= compare.SUM_ERROR[dtype] * abs(want[name])
    ]
    return found


def _lists(lists: dict[str, list[tuple[int, ...]]], session: Session) -> list[Row]:
    """Lists that take many launches, and lists whose chunks have their full length."""
    rows = []
    for what, shapes in lists.items():
        if session.cap is not None:
            shapes = [s if s[0] <= session.cap else (session.cap,) for s in shapes][:500]
        for name in ("sgd", "adamw"):
            run = partial(_against_foreach, session, name, shapes)
            rows.append(verdict(session, f"{what}, {name}", guarded(run)))
    return rows


def _against_foreach(session: Session, name: str, shapes: list[tuple[int, ...]]) -> list[str]:
    """The reference would loop over ten thousand tensors; foreach is as independent of our kernels."""
    method, where = compare.methods()[name], (shapes, torch.float32, session.gpu.device)
    got = compare.trajectory(method, session.gpu.backend, *where, steps=1)
    want = compare.trajectory(method, "foreach", *where, steps=1)
    return compare.differences(got, want, torch.float32)


def _huge(session: Session) -> list[Row]:
    """One tensor with more elements than 32 bits count, of numbers whose results are known."""
    elements = 2**31 + 3 if session.cap is None else session.cap
    if session.gpu.free_bytes() < 8 * elements + 2**30:
        return [skipped(session, "huge", "three bfloat16 lists of 2^31 elements do not fit the free memory")]
    return [verdict(session, "huge", guarded(partial(_exact, session, elements)))]


def _exact(session: Session, elements: int) -> list[str]:
    from sam_kernels import ops

    device, backend = session.gpu.device, session.gpu.backend
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


def _non_finite(session: Session) -> list[Row]:
    """A first gradient that is not finite moves nothing: no weight, no state, no counter."""
    rows = []
    for name in ("sgd", "adamw", "asam", "p_inf", "p_3"):
        for value in (float("inf"), float("nan")):
            what = f"{name}, {value} in the first gradient"
            rows.append(verdict(session, what, guarded(partial(_poisoned, session, name, value))))
    rows.append(
        verdict(session, "sgd, nan in the second gradient", guarded(partial(_poisoned_second, session)))
    )
    return rows


def _with(values: list[torch.Tensor], value: float) -> list[torch.Tensor]:
    """The values with one of them replaced, in the middle of the longest tensor."""
    longest = max(values, key=torch.Tensor.numel).view(-1)
    longest[longest.numel() // 2] = value
    return values


def _poisoned(session: Session, name: str, value: float) -> list[str]:
    gpu = session.gpu
    params = [torch.nn.Parameter(x.to(gpu.device)) for x in compare.draw(AWKWARD, torch.float32, 0)]
    optimizer = compare.methods()[name].build(params, gpu.backend)

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


def _poisoned_second(session: Session) -> list[str]:
    """In the second gradient it spreads as in the base optimizer: to its own elements only."""
    results = []
    for backend in (session.gpu.backend, "reference"):
        values = compare.draw(AWKWARD, torch.float32, 0)
        params = [torch.nn.Parameter(x.to(session.gpu.device)) for x in values]
        optimizer = compare.methods()["sgd"].build(params, backend)
        compare.give(params, compare.draw(AWKWARD, torch.float32, 1), "plain")
        optimizer.first_step()
        compare.give(params, _with(compare.draw(AWKWARD, torch.float32, 2), float("nan")), "plain")
        optimizer.second_step()
        results.append(params)
    got, want = results
    sentence = compare.difference(got, want, torch.float32)
    return [sentence] if sentence else []


def _second_device(session: Session) -> list[Row]:
    """Tensors of another device than the current one."""
    if session.gpu.count() < 2:
        return [skipped(session, "second device", f"this machine has {session.gpu.count()}")]
    method = compare.methods()["sgd"]

    def run() -> list[str]:
        where = (AWKWARD, torch.float32, torch.device("cuda", 1))
        got = compare.trajectory(method, session.gpu.backend, *where)
        return compare.differences(got, compare.trajectory(method, "reference", *where), torch.float32)

    return [verdict(session, "second device", guarded(run))]


def _pytest(session: Session) -> list[Row]:
    """The whole suite, in a process of its own."""
    supported = any(_TEST_DEVICE in path.read_text() for path in (machine.ROOT / "tests").rglob("*.py"))
    session.log(f"  the suite {'reads' if supported else 'does not read'} {_TEST_DEVICE}")
    command = [sys.executable, "-m", "pytest", "-q", "tests", "-m", "not slow", "-p", "no:cacheprovider"]
    status, said = _run(session, "pytest", command, {_TEST_DEVICE: "cuda"})
    last = said.strip().splitlines()[-1] if said.strip() else "no output"
    failures = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    problems = [] if status == 0 else [last, *failures]
    return [verdict(session, "pytest", problems), single("pytest", "summary", last)]


def _sanitizer(tool: str, session: Session) -> list[Row]:
    """compute-sanitizer over a program that calls every kernel."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return [skipped(session, tool, "compute-sanitizer is not on the PATH")]
    command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    if tool == "racecheck":
        # Watching torch's kernels too would take minutes. initcheck has to see them: they write our inputs.
        command += ["--kernel-name", "kns=samk"]
    command += [sys.executable, "-m", "bench.gpu.sanitized"]
    # Each tensor in an allocation of its own, or an overrun would end in a neighbour and go unseen.
    status, said = _run(session, tool, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return [verdict(session, tool, sanitizer_problems(status, said))]


def sanitizer_problems(status: int, said: str) -> list[str]:
    """What a sanitizer's output says about our kernels; findings in torch's are not ours to judge."""
    lines = [line.removeprefix("=========").strip() for line in said.splitlines() if line.startswith("=====")]
    if not any(line.startswith(("ERROR SUMMARY", "RACECHECK SUMMARY")) for line in lines):
        return [f"it ended with status {status} before its summary: {said.strip()[-300:]}"]
    ours = [
        f"{lines[i - 1]} {line}" for i, line in enumerate(lines) if line.startswith("at ") and "samk" in line
    ]
    # Races name the kernel in the line itself, and not always after "at".
    ours += [line for line in lines if line.startswith("Error: Race") and "samk" in line]
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
