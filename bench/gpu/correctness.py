"""Stage 2: is it right? Direct comparisons, for which the others wait; then sanitizers and the suite."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cases import Shape
from ..records import Row, single
from . import compare, graphs, passes, recorded, suite
from .compare import AWKWARD, DTYPES, LONG, MANY, MEMORIES
from .device import GpuResults, cuda_library
from .extremes import huge, non_finite
from .ours import TRITON, absence, named
from .session import Session, Unit, guarded, skipped, verdict
from .sides import POWERS, Side, shares_bits
from .trajectories import Method, differences, methods, of_recipes, trajectory

# These add, multiply and round as the CPU engine does, bit for bit; the others are held to a few roundings.
_INEXACT = (TRITON,)


def units(session: Session) -> Iterator[Unit]:
    yield from direct(session)
    yield from suite.units()


def direct(session: Session, *chosen: str) -> Iterator[Unit]:
    """Comparisons made here, without which nothing else is measured, of all backends or of those chosen.

    What is most basic comes first, for every backend: a run that is cut short tells most.
    """
    backends = chosen or session.gpu.backends
    for backend in backends:
        yield Unit(f"correct/{backend}/library", partial(_library, backend))
    there = [backend for backend in backends if absence(backend, session.gpu.device) is None]
    for backend in there:
        yield from _basics(backend)
    for backend in there:
        yield from _comparisons(backend)


# Of single passes these, of one dtype, come before everything else.
_FIRST = [(family, DTYPES[0]) for family in ("sums", "plain")]


def _basics(backend: str) -> Iterator[Unit]:
    for family, dtype in _FIRST:
        yield _of_passes(backend, family, dtype)
    yield Unit(f"correct/{backend}/step/sgd", partial(_steps, backend, "sgd"))
    yield Unit(f"correct/{backend}/graph/sgd", partial(graphs.check, backend, "sgd"))


def _comparisons(backend: str) -> Iterator[Unit]:
    yield Unit(f"correct/{backend}/launches", partial(graphs.check_launches, backend))
    for dtype in DTYPES:
        for family in passes.families(dtype):
            if (family, dtype) not in _FIRST:
                yield _of_passes(backend, family, dtype)
    for name in methods():
        if name != "sgd":
            yield Unit(f"correct/{backend}/step/{name}", partial(_steps, backend, name))
    for name, ways in of_recipes().items():
        yield Unit(f"correct/{backend}/recipe/{name}", partial(_recipe, backend, ways))
    yield Unit(f"correct/{backend}/graph/adamw", partial(graphs.check, backend, "adamw"))
    for name, ways in recorded.recorded().items():
        yield Unit(f"correct/{backend}/graph/{name}", partial(recorded.check, backend, ways))
    yield Unit(f"correct/{backend}/non-finite", partial(non_finite, backend))
    yield Unit(f"correct/{backend}/many", partial(_lists, backend, {"10,000 tensors": MANY}))
    yield Unit(f"correct/{backend}/long", partial(_lists, backend, {"70M elements in 5 tensors": LONG}))
    yield Unit(f"correct/{backend}/huge", partial(huge, backend))
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
        optimizer = methods()["sgd"].build(params, backend)
        session.log(f"  {text}\n  " + str(optimizer.backends()).replace("\n", "\n  "))
        return []

    return [verdict(session, backend, guarded(run)), single(backend, "text", text)]


def library_of(backend: str) -> str:
    """What a backend says of the compiler or library it has."""
    if backend == TRITON:
        from sam_kernels.backends import triton

        return triton.describe()
    return cuda_library()


# ---- single passes -------------------------------------------------------------------------------------


def _of_passes(backend: str, family: str, dtype: torch.dtype) -> Unit:
    title = f"{family}/{str(dtype)[6:]}"
    return Unit(f"correct/{backend}/{title}", partial(_passes, backend, family, dtype))


def _passes(backend: str, family: str, dtype: torch.dtype, session: Session) -> list[Row]:
    """Passes against the CPU engine, or against the reference here where there is no such engine."""
    engine, device = session.gpu.cpu_engine, session.gpu.device
    reason = cpu_refusal(engine)
    if reason is None:
        other, where, is_exact = engine, torch.device("cpu"), backend not in _INEXACT
    else:
        session.log(f"  against the reference, for the CPU engine is not there: {reason}")
        other, where, is_exact = "reference", device, False
    rows = []
    for memory in MEMORIES if session.cap is None else MEMORIES[:2]:
        what = named(backend, f"{family}, {str(dtype)[6:]}, {memory}")
        side = Side(backend, dtype, device, memory)
        against = Side(other, dtype, where, memory)
        same: list[bool] = []
        run = partial(_differences, family, side, against, is_exact, same)
        rows.append(verdict(session, what, guarded(run)))
        if same and not is_exact:
            session.log(f"  {what}: {sum(same)} of {len(same)} lists have the bits of the {other}")
            rows.append(single(what, "lists_of_the_same_bits", sum(same), lists=len(same)))
    return rows


def _differences(family: str, side: Side, against: Side, is_exact: bool, same: list[bool]) -> list[str]:
    """What passes left otherwise than those of another side.

    Args:
        same: gets for each list of elements whether it has the same bits.
    """
    got, want = passes.results(family, side), passes.results(family, against)
    again = passes.results(family, side).sums if got.sums else {}
    found = [
        f"{name} differs in its bits"
        for name, tensors in got.copies.items()
        if not compare.same_bits(tensors, want.copies[name])
    ]
    for name, tensors in got.elements.items():
        same.append(compare.same_bits(tensors, want.elements[name]))
        with_powers = name.startswith(POWERS)
        sentence = compare.difference(tensors, want.elements[name], 4 if with_powers else 1)
        if sentence is not None:
            found.append(f"{name}: {sentence}")
        elif is_exact and shares_bits(name, side.dtype) and not same[-1]:
            found.append(f"{name} differs in its bits")
    for name, values in got.sums.items():
        found += _of_sums(name, values, want.sums[name], again[name], side.dtype)
    return found


def _of_sums(name: str, got: Tensor, want: Tensor, again: Tensor, dtype: torch.dtype) -> list[str]:
    """Sums are added in another order, so they are close; twice the same call gives the same bits."""
    if not compare.same_bits([got], [again]):
        return [f"{name}: two runs differ"]
    got, want = got.cpu().reshape(-1), want.cpu().reshape(-1)
    if got.shape != want.shape:
        return [f"{name}: {got.numel()} sums in place of {want.numel()}"]
    error = compare.SUM_ERROR[dtype] * (4 if name.startswith(POWERS) else 1)
    # Shares are of 1, however small they are.
    size = want.abs().clamp(min=1.0) if name.startswith("grad_stats") else want.abs()
    wrong = (~((got - want).abs() <= error * size)).nonzero().flatten()
    if not len(wrong):
        return []
    at = int(wrong[0])
    return [f"{name}: number {at} is {got[at].item()!r}, the other's {want[at].item()!r}"]


# ---- steps ---------------------------------------------------------------------------------------------


def _steps(backend: str, name: str, session: Session) -> list[Row]:
    """A method for all types of weights, in all kinds of memory."""
    method, memories = methods()[name], MEMORIES if session.cap is None else MEMORIES[:2]
    kinds = [(dtype, memory) for dtype in DTYPES if dtype in method.dtypes for memory in memories]
    return _against_both(session, backend, method, kinds)


def _recipe(backend: str, ways: list[Method], session: Session) -> list[Row]:
    """A recipe in all its ways; what it makes of half gradients is shown by one kind of them."""
    kinds = [(torch.float32, memory) for memory in MEMORIES] + [(torch.bfloat16, "plain")]
    kinds = kinds if session.cap is None else kinds[:1]
    return [row for method in ways for row in _against_both(session, backend, method, kinds)]


def _against_both(
    session: Session, backend: str, method: Method, kinds: list[tuple[torch.dtype, str]]
) -> list[Row]:
    """A backend against the reference here and against the CPU engine, at every stop of a step."""
    engine, cpu = session.gpu.cpu_engine, torch.device("cpu")
    reason = cpu_refusal(engine)
    rows = []
    for dtype, memory in kinds:
        what = named(backend, f"{method.name}, {str(dtype)[6:]}, {memory}")
        others = {"reference": ("reference", session.gpu.device)}
        if reason is None:
            others["CPU engine"] = (engine, cpu)
        for title, (other, where) in others.items():
            run = partial(_against, session, backend, method, dtype, memory, other, where)
            rows.append(verdict(session, f"{what}: {title}", guarded(run)))
    if reason is not None:
        rows.append(skipped(session, named(backend, f"{method.name}: CPU engine"), reason))
    return rows


def _against(
    session: Session,
    backend: str,
    method: Method,
    dtype: torch.dtype,
    memory: str,
    other: str,
    where: torch.device,
) -> list[str]:
    """Differences of a trajectory from that of another backend, here or on another device."""
    got = trajectory(method, backend, AWKWARD, dtype, session.gpu.device, memory)
    want = trajectory(method, other, AWKWARD, dtype, where, memory)
    return differences(got, want, method.slack(dtype))


def cpu_refusal(backend: str) -> str | None:
    """Why that backend cannot serve the CPU, or None."""
    try:
        methods()["sgd"].build([torch.nn.Parameter(torch.ones(1))], backend)
    except RuntimeError as problem:
        return str(problem)
    return None


# ---- other lists, another device -----------------------------------------------------------------------


def _lists(backend: str, lists: dict[str, list[Shape]], session: Session) -> list[Row]:
    """Lists that take many launches, and lists whose chunks have their full length."""
    rows = []
    for what, shapes in lists.items():
        if session.cap is not None:
            shapes = [s if s[0] <= session.cap else (session.cap,) for s in shapes][:500]
        for name in ("sgd", "adamw"):
            run = partial(_against_foreach, session, backend, name, shapes)
            rows.append(verdict(session, named(backend, f"{what}, {name}"), guarded(run)))
    return rows


def _against_foreach(session: Session, backend: str, name: str, shapes: list[Shape]) -> list[str]:
    """The reference would loop over ten thousand tensors; foreach is as independent of our kernels."""
    method, where = methods()[name], (shapes, torch.float32, session.gpu.device)
    got = trajectory(method, backend, *where, steps=1)
    return differences(got, trajectory(method, "foreach", *where, steps=1))


def _second_device(backend: str, session: Session) -> list[Row]:
    """Tensors of another device than the current one."""
    if session.gpu.count() < 2:
        return [skipped(session, named(backend, "second device"), f"this machine has {session.gpu.count()}")]
    method = methods()["sgd"]

    def run() -> list[str]:
        where = (AWKWARD, torch.float32, torch.device("cuda", 1))
        got = trajectory(method, backend, *where)
        return differences(got, trajectory(method, "reference", *where))

    return [verdict(session, named(backend, "second device"), guarded(run))]
