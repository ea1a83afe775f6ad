"""Stage 6: settings of the engines, one at a time, and then the winners together.

A setting of the CUDA engine is a constant of csrc/core/tuning.h, so each of its values is a library of its
own (`variants.py` builds them); all of them are opened in one process and timed in the same rounds. Triton's
settings are constants of a module, which are others while its passes are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from .. import machine
from ..records import Row, measured, single
from ..timing import Contestant, interleave
from . import agreement, variants, winners
from .gate import in_turn
from .kernels import sets_for
from .lists import CASES, numel
from .ours import NATIVE, TRITON, beside, named
from .session import Session, Unfinished, Unit, guarded, skipped
from .sets import LISTS, Layout, Set, ahead_of_device, in_graph
from .settings import SINGLE, STEPS, SWEEPS, TRITON_SWEEPS, Sweep, Variant

DTYPES = (torch.float32, torch.bfloat16)

# With less time left in the stage no library of a sweep is built, and with less than the other none is begun.
# A build that is cut short is taken up where it was by the next call.
_BUILD_SECONDS, _LAST_BUILD_SECONDS = 60, 40
_SECONDS = 3.0  # of rounds in a unit
_CALLS, _SLOW_RATE = 40, 2e12  # what `_least` counts: calls of a pass, in all ways it is timed


@dataclass(frozen=True)
class Opened:
    """A variant that can be called.

    Attributes:
        backend: by what name.
        spilled: the passes and dtypes that are left out, because a kernel of theirs spills.
    """

    variant: Variant
    backend: str
    spilled: tuple[tuple[str, str], ...] = ()

    def spills(self, what: str, dtype: torch.dtype) -> bool:
        return any((part, _name(dtype)) in self.spilled for part in _parts(what))


@dataclass(frozen=True)
class Engine:
    """A backend with settings.

    Attributes:
        open: the variants that are there, and a row for each that is not.
        is_exact: whether elementwise passes have the default's bits whatever the settings are.
    """

    backend: str
    sweeps: tuple[Sweep, ...]
    cases: tuple[str, ...]
    open: Callable[[tuple[Variant, ...], Session], tuple[list[Opened], list[Row]]]
    is_exact: bool = True


# ---- variants as backends --------------------------------------------------------------------------


_registered: dict[tuple[str, str], str] = {}


def _register(name: str, identity: str, make: Callable[[str], Any]) -> str:
    """A backend of that name, or of the next one that is free: one that is registered stays so."""
    from sam_kernels import backends

    if (name, identity) not in _registered:
        taken = sum(known == name for known, _ in _registered)
        _registered[name, identity] = f"{name} ({taken + 1})" if taken else name
        backends.register(make(_registered[name, identity]))
    return _registered[name, identity]


def open_libraries(chosen: tuple[Variant, ...], session: Session) -> tuple[list[Opened], list[Row]]:
    """The CUDA library of every variant; built first where that is still to be done."""
    from sam_kernels.backends import native

    arch = variants.arch_of_card()
    wanted = chosen
    if missing := [v.name for v in chosen if not variants.is_built(v, arch)]:
        if session.left() < _BUILD_SECONDS:
            raise Unfinished(f"python -m bench.gpu.variants has to build {', '.join(missing)} first")
        # Those of all other sweeps too, at the same time: few builds keep all cores busy to their end.
        every = (v for engine in ENGINES if engine.open is open_libraries for v in _variants(engine))
        wanted = tuple({v.name: v for v in (*chosen, *every)}.values())
    libraries = variants.build(wanted, arch, machine.cores(), session.ends - _LAST_BUILD_SECONDS)
    if late := [v.name for v in chosen if libraries[v.name].problem == variants.LATE]:
        raise Unfinished(f"there was no time to build {', '.join(late)}")
    opened, rows = [], []
    for variant in chosen:
        built = libraries[variant.name]
        if built.problem is not None:
            rows.append(skipped(session, variant.name, built.problem))
            continue
        library = native._native.Library(str(built.library))
        name = _register(
            variant.name,
            f"{variant.settings}",
            lambda name, library=library: native.Native(name, {session.gpu.device.type: library}),  # type: ignore[misc]
        )
        spilled = tuple(key for key, kernel in built.kernels.items() if kernel.spilled)
        rows.append(single(variant.name, "text", library.build_info()))
        opened.append(Opened(variant, name, spilled))
    return opened, rows


class Tuned:
    """Triton's backend with other constants, which hold while one of its methods runs."""

    def __init__(self, name: str, settings: Mapping[str, int], backend: Any) -> None:
        from sam_kernels.backends import triton

        constants = {key: value for key, value in settings.items() if key != "num_warps"}
        if "num_warps" in settings:
            constants["_LAUNCH"] = {**triton._LAUNCH, "num_warps": settings["num_warps"]}  # type: ignore[dict-item]
        self.name = name
        self._backend, self._patch = backend, partial(mock.patch.multiple, triton, **constants)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def run(*arguments: Any, **named_ones: Any) -> Any:
            with self._patch():
                return getattr(self._backend, method)(*arguments, **named_ones)

        return run


def open_triton(
    backend: str, chosen: tuple[Variant, ...], session: Session
) -> tuple[list[Opened], list[Row]]:
    from sam_kernels.backends import get

    names = {
        v.name: _register(
            f"{backend} {v.name}",
            f"{v.settings}",
            lambda name, v=v: Tuned(name, v.settings, get(backend)),  # type: ignore[misc]
        )
        for v in chosen
    }
    return [Opened(v, names[v.name]) for v in chosen], []


ENGINES = (
    Engine(NATIVE, SWEEPS, ("resnet50", "vit_l", "gpt2_xl"), open_libraries),
    Engine(TRITON, TRITON_SWEEPS, ("resnet50", "vit_l"), partial(open_triton, TRITON), is_exact=False),
)


def _variants(engine: Engine) -> Iterator[Variant]:
    return (variant for sweep in engine.sweeps for variant in sweep.variants)


# ---- units -----------------------------------------------------------------------------------------


def units(session: Session) -> Iterator[Unit]:
    for engine in ENGINES:
        if engine.backend not in session.backends:
            continue
        star = [
            Unit(
                winners.unit_of(sweep, case, _name(dtype)),
                partial(measure, engine, sweep, case, dtype),
                _least(sweep, case, dtype, session),
            )
            for sweep in engine.sweeps
            for dtype in DTYPES
            for case in engine.cases
        ]
        yield from star
        names = [unit.name for unit in star]
        yield Unit(f"sweep/verdict of {engine.backend}", partial(_judge, engine, names))
        for dtype in DTYPES:
            for case in engine.cases:
                run = partial(_together, engine, names, case, dtype)
                yield Unit(f"sweep/winners of {engine.backend}/{case}/{_name(dtype)}", run)


def _least(sweep: Sweep, case: str, dtype: torch.dtype, session: Session) -> float:
    """Seconds: comparisons and rounds, and on long lists the bytes of the fewest rounds there are."""
    if session.cap is not None:
        return 15
    moved = sum(bytes_of(what, dtype, numel(CASES[case].shapes(None))) for what in sweep.passes)
    return 15 + _CALLS * (1 + len(sweep.variants)) * moved / _SLOW_RATE


def _name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def _judge(engine: Engine, star: list[str], session: Session) -> list[Row]:
    """Tables of all that was measured, and the winner of every setting."""
    _require(star, session)
    results = session.results.current()
    cases = [(case, _name(dtype)) for dtype in DTYPES for case in engine.cases]
    for sweep in engine.sweeps:
        session.log(winners.text_of(results, sweep, cases))
    found = winners.find(results, engine.sweeps, cases)
    for winner in found:
        session.log(f"  {winner.sentence}")
    return [
        single(
            f"{w.sweep}, {w.word}", "winner", w.variant.name if w.variant else winners.DEFAULT, ratio=w.ratio
        )
        for w in found
    ]


def _together(engine: Engine, star: list[str], case: str, dtype: torch.dtype, session: Session) -> list[Row]:
    """All winners in one library, against the default."""
    _require(star, session)
    cases = [(case, _name(dtype)) for dtype in DTYPES for case in engine.cases]
    found = winners.find(session.results.current(), engine.sweeps, cases)
    settings = winners.combined(found)
    if not settings:
        return [single("winners", "text", "no value of a setting beats the default")]
    sweep = Sweep("winners", (Variant("winners", shared=settings),), (*SINGLE, *STEPS))
    return measure(engine, sweep, case, dtype, session)


def _require(star: list[str], session: Session) -> None:
    missing = [name for name in star if not session.results.current().has(name)]
    if missing:
        raise Unfinished(f"{len(missing)} of {len(star)} sweeps are still to be measured")


def measure(engine: Engine, sweep: Sweep, case: str, dtype: torch.dtype, session: Session) -> list[Row]:
    """Milliseconds of every pass with every value, in the same rounds, and their ratios to the default."""
    opened, rows = engine.open(sweep.variants, session)
    right = []
    for one in opened:
        found = guarded(partial(agreement.problems, engine, one.backend, dtype, session))
        if session.gpu.is_lost():
            raise RuntimeError(f"{one.variant.name}: the device is lost: {'; '.join(found)}")
        # What is not the default is nobody's fault: it is left out, and cannot win.
        if found:
            rows.append(skipped(session, one.variant.name, f"it differs: {'; '.join(found[:5])}"))
        else:
            rows.append(single(one.variant.name, "passed", True))
            right.append(one)
    shapes = CASES[case].shapes(session.cap)
    elements = numel(shapes)
    list_bytes = elements * dtype.itemsize
    about = {"case": case, "dtype": _name(dtype), "tensors": len(shapes), "numel": elements}
    wanted = sets_for(list_bytes, session.gpu.l2_bytes)
    if wanted * LISTS * list_bytes > session.gpu.free_bytes():
        reason = f"{wanted * LISTS * list_bytes / 2**30:.0f} GiB of lists do not fit the memory that is free"
        return [{**about, **row} for row in [*rows, skipped(session, case, reason)]]
    sets = [Set(shapes, Layout(dtype), session) for _ in range(wanted)]
    rows += _timed(engine.backend, right, sweep.passes, sets, dtype, elements, session)
    return [{**about, "sets": wanted, **row} for row in rows]


# ---- timing ----------------------------------------------------------------------------------------


def _timed(
    default: str,
    opened: list[Opened],
    passes: tuple[str, ...],
    sets: list[Set],
    dtype: torch.dtype,
    elements: int,
    session: Session,
) -> list[Row]:
    everybody = [Opened(Variant(winners.DEFAULT), default), *opened]
    rows = [
        skipped(session, named(one.variant.name, what), "a kernel of it spills registers")
        for one in opened
        for what in passes
        if one.spills(what, dtype)
    ]
    contestants: dict[str, Contestant] = {}
    for one in everybody:
        try:
            contestants |= _contestants(one, passes, sets, dtype, session)
        except Exception as error:
            if one.backend == default or session.gpu.is_lost():
                raise
            rows.append(skipped(session, one.variant.name, f"raised {type(error).__name__}: {error}"))
    for label, parts in interleave(contestants, session.effort(_SECONDS)).items():
        peer = label.rpartition("/")[0]
        moved = bytes_of(next(p for p in passes if peer.endswith(p)), dtype, elements)
        for metric, samples in parts.items():
            rows.append(measured(peer, metric, [1e3 * s for s in samples], bytes=moved))
    pairs = {named(one.variant.name, what): named(winners.DEFAULT, what) for one in opened for what in passes}
    return rows + beside(rows, pairs, winners.DEFAULT)


def _contestants(
    one: Opened, passes: tuple[str, ...], sets: list[Set], dtype: torch.dtype, session: Session
) -> dict[str, Contestant]:
    """Every pass of a variant, called once already, eager and in a graph."""
    calls = [_with_steps(one.backend, s.calls(one.backend)) for s in sets]
    found: dict[str, Contestant] = {}
    for what in passes:
        if not one.spills(what, dtype):
            turn = [of_set[what] for of_set in calls]
            found[f"{named(one.variant.name, what)}/eager"] = ahead_of_device(turn, "eager_ms", session)
            found[f"{named(one.variant.name, what)}/graph"] = in_graph(turn, session)
    return found


def bytes_of(what: str, dtype: torch.dtype, elements: int) -> float:
    """Bytes that a pass, or the three passes of a step, have to move."""
    return sum(Layout(dtype).bytes_of(part, elements) for part in _parts(what))


def _parts(what: str) -> tuple[str, ...]:
    """The passes of a step; a pass alone is its own."""
    return ("sq_norm", "perturb_", f"descend_ {what.split()[1]}") if what in STEPS else (what,)


def _with_steps(backend: str, calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Passes by their own names, and steps of three of them."""
    found = {name.removeprefix(f"{backend} "): call for name, call in calls.items()}
    return found | {step: in_turn(*(found[part] for part in _parts(step))) for step in STEPS}
