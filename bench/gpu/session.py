"""What every stage is given, and what a unit of work is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ..records import Row, single
from ..timing import Effort
from .device import Gpu, GpuResults

Log = Callable[[str], None]


@dataclass
class Session:
    """A run of some stages.

    Attributes:
        cap: cut every tensor to this many elements: a first look, whose figures mean nothing.
        ends: when the stage has to be over, in seconds of time.monotonic.
        backends: those of ours that take part; all of the device's if none is named.
        is_child: whether this process is a stage's own, which may be ended when a unit hangs.
    """

    gpu: Gpu
    results: GpuResults
    log: Log
    cap: int | None = None
    ends: float = field(default_factory=lambda: time.monotonic() + 450)
    backends: tuple[str, ...] = ()
    is_child: bool = False

    def __post_init__(self) -> None:
        self.backends = self.backends or self.gpu.backends

    def left(self) -> float:
        """Seconds this stage still has."""
        return self.ends - time.monotonic()

    def effort(self, seconds: float) -> Effort:
        return Effort(3, 9, 100, seconds) if self.cap is None else Effort(1, 3, 3, 0.0)


# Seconds that units take, as far as their rounds, captures, compilations and comparisons on the CPU tell.
_EXPECTED = {
    "ceilings/*": 8,
    "correct/*/recipe/*": 20,
    "correct/*/many": 30,
    "correct/*/long": 30,
    "correct/*/huge": 30,
    "correct/*": 15,
    "kernels/*": 30,
    "floor/*": 20,
    "phase/*": 45,
    "train/*": 45,
    "recipes/*": 40,
    "sweep/verdict *": 5,
    "sweep/*": 20,
}

# Units whose work lasts as long as there is time: processes, builds and compilations, with ends of their own.
_LASTING = ("correct/pytest/*", "correct/*/sanitizer/*", "phase/*/compiled", "phase/*optax*", "sweep/*")


@dataclass(frozen=True)
class Unit:
    """What is measured together and saved together; a former run's unit need not be repeated.

    Attributes:
        least: seconds a stage must still have for the unit to begin; by its name if not given.
    """

    name: str
    measure: Callable[[Session], list[Row]]
    least: float | None = None

    @property
    def needs(self) -> float:
        """Seconds a stage must still have for the unit to begin."""
        if self.least is not None:
            return self.least
        return next((s for pattern, s in _EXPECTED.items() if fnmatchcase(self.name, pattern)), 30)

    @property
    def most(self) -> float:
        """Seconds after which it is taken for hanging."""
        if any(fnmatchcase(self.name, pattern) for pattern in _LASTING):
            return math.inf
        return 60 + 4 * self.needs


class Unfinished(Exception):
    """The stage has no time left for this unit; it belongs to the next run."""


def verdict(session: Session, what: str, problems: list[str]) -> Row:
    """One row: "passed", or "wrong" with the first few sentences."""
    if not problems:
        return single(what, "passed", True)
    session.log(f"  WRONG    {what}: {problems[0]}")
    return single(what, "wrong", "; ".join(problems[:5]))


def skipped(session: Session, what: str, reason: str) -> Row:
    session.log(f"  skipped  {what}: {reason}")
    return single(what, "skipped", reason)


def guarded(run: Callable[[], list[str]]) -> list[str]:
    """The problems a comparison found; raising is one too."""
    try:
        return run()
    except Exception as error:
        return [f"raised {type(error).__name__}: {error}"]
