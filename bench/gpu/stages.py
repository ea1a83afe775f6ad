"""The six stages, and what a stage does with its units: each is saved as soon as it is measured."""

from __future__ import annotations

import faulthandler
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

from ..records import Row, single
from ..report import number
from . import ceilings, correctness, kernels, ours, phase, suite, sweeps, training
from .device import GpuResults, is_fault, rate
from .predictions import ceiling, kind_of
from .session import Session, Unfinished, Unit

WRONG, NOT_FINISHED = 1, 2

GRACE = 45  # seconds a stage may take longer than it is given, to end the unit it is in
_MOST_ATTEMPTS = 2  # of a unit that ends its process

# Parts of stage 2: what is compared in its process, without which there is no figure, and what it starts.
DIRECT, PROCESSES = "direct", "processes"


@dataclass(frozen=True)
class Stage:
    """A module with `units(session)`.

    Attributes:
        is_figure: whether it yields figures, which need a passed correctness stage.
        part: which of its units; all of them if it is empty.
    """

    number: int
    title: str
    module: ModuleType
    is_figure: bool = True
    part: str = ""

    def units(self, session: Session) -> Iterator[Unit]:
        for unit in self.module.units(session):
            if not self.part or suite.is_process(unit.name) == (self.part == PROCESSES):
                yield unit

    @property
    def name(self) -> str:
        return f"stage {self.number}, {self.title}" + (f", {self.part}" if self.part else "")


STAGES = (
    Stage(1, "ceilings", ceilings, is_figure=False),
    Stage(2, "correctness", correctness, is_figure=False),
    Stage(3, "kernels", kernels),
    Stage(4, "optimizer phase", phase),
    Stage(5, "whole training step", training),
    Stage(6, "sweeps", sweeps),
)


def worse(a: int, b: int) -> int:
    """A wrong result outranks an unfinished stage."""
    return WRONG if WRONG in (a, b) else max(a, b)


def run_stage(stage: Stage, session: Session, resume: bool) -> int:
    """All units of a stage; those that have ended a process before come last.

    Returns early when the CUDA context is lost: the next process goes on.
    """
    session.log(f"\n{stage.name}")
    session.log("  " + "  ".join(f"{key} {value}" for key, value in session.results.machine.items()))
    status = 0
    if stage.is_figure:
        admitted, status = _admitted(session)
        if not admitted:
            return WRONG
        session = replace(session, backends=admitted)
    results = session.results
    for unit in sorted(stage.units(session), key=lambda unit: results.attempts(unit.name, resume) > 0):
        attempts = results.attempts(unit.name, resume)
        if attempts >= _MOST_ATTEMPTS:
            status = worse(status, _give_up(unit, attempts, session))
        elif not attempts and results.is_of_this_call(unit.name):  # a process before this one did it
            status = worse(status, 0 if results.has(unit.name) else WRONG)
        elif not attempts and resume and results.has(unit.name):
            session.log(f"{unit.name}: done by an earlier run")
        else:
            status = worse(status, _run(unit, session, attempts + 1))
            if session.gpu.is_lost():
                session.log("  the CUDA context is lost; another process takes the units after this one")
                return WRONG
    return status


def _admitted(session: Session) -> tuple[tuple[str, ...], int]:
    """The backends that stage 2 has passed; WRONG if there is one that it has not."""
    admitted, status = [], 0
    for backend in session.gpu.backends:
        lacking = correctness.missing(session, session.results, backend, only_direct=True)
        reason = ours.absence(backend, session.gpu.device)
        if lacking:
            status = WRONG
            reason = f"no figure without a passed stage 2, which lacks {', '.join(lacking)}"
        if reason is None:
            admitted.append(backend)
        else:
            session.log(f"  {backend} is not measured: {reason}")
    return tuple(admitted), status


def _give_up(unit: Unit, attempts: int, session: Session) -> int:
    said = f"it hung, crashed or lost the CUDA context {attempts} times"
    session.log(f"{unit.name}\n  WRONG    {said}; without RESUME it is tried again")
    row = single(unit.name, "wrong", said, attempts=attempts, given_up=True)
    session.results.replace(unit.name, [row])
    return WRONG


def _run(unit: Unit, session: Session, attempt: int) -> int:
    if session.left() < unit.needs:
        session.log(f"{unit.name}: left to --resume, the stage's time is over")
        return NOT_FINISHED
    session.log(unit.name)
    began = time.monotonic()
    session.results.begin(unit.name, attempt)
    try:
        with _process_ends_if_it_hangs(unit, session):
            session.gpu.free_bytes()  # what the unit before held goes back
            rows = unit.measure(session)
    except Unfinished as reason:
        session.results.retract()
        session.log(f"  left to --resume: {reason}")
        return NOT_FINISHED
    except Exception as error:  # one unit must not cost the others
        session.log(traceback.format_exc())
        rows = [single(unit.name, "wrong", f"raised {type(error).__name__}: {error}")]
    except BaseException:  # interrupted by hand, which says nothing about the unit
        session.results.retract()
        raise
    if session.gpu.is_lost():
        rows = [*rows, single(unit.name, "wrong", "the CUDA context is lost")]
        rows = [{**row, "attempts": attempt} for row in rows]
    session.results.replace(unit.name, rows)
    for line in lines_of(rows, session.results):
        session.log(f"  {line}")
    session.log(f"  {time.monotonic() - began:.1f} s")
    return WRONG if any(is_fault(unit.name, row) for row in rows) else 0


@contextmanager
def _process_ends_if_it_hangs(unit: Unit, session: Session) -> Iterator[None]:
    """A kernel that does not end cannot be stopped but with its process; where it was is said first."""
    if not session.is_child:
        yield
        return
    # Before the parent does so, who would not know where.
    seconds = max(1.0, min(unit.most, session.left() + GRACE - 5))
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def lines_of(rows: list[Row], results: GpuResults) -> Iterator[str]:
    """Measured rows with their spread, and with their share of a ceiling where they count bytes."""
    for row in rows:
        if "p50" not in row:
            continue
        line = f"{row['peer']:<24} {row['metric']:<22} {number(row['p50']):>9}"
        line += f"  {number(row['p20'])} .. {number(row['p80'])}"
        if "bytes" in row:
            kind = kind_of(row["peer"])
            giga, most = rate(row) or 0.0, ceiling(results, kind)
            line += f"  {giga:,.0f} GB/s" + (f", {giga / most:.2f} of {kind}" if most else "")
        yield line
    passed = sum(row["metric"] == "passed" for row in rows)
    if passed:
        yield f"{passed} of {sum(row['metric'] in ('passed', 'wrong') for row in rows)} comparisons passed"
