"""Stage 6: sweeps that decide a default. Nothing can be swept without recompiling in this version.

Chunk length, blocks per processor, loads in flight and store hints are constants of csrc/engine and of
core/launch_plan.h. Where one becomes a run-time setting, add a Sweep that sets it and name its values: the
passes of stage 3 are then measured for each, and the table that shows the winner is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from ..records import Row
from . import kernels
from .session import Session, Unit


@dataclass(frozen=True)
class Sweep:
    """A setting of the engine and the values to try.

    Attributes:
        setting: makes the value hold inside a with block.
    """

    name: str
    values: tuple[int, ...]
    setting: Callable[[int], AbstractContextManager[None]]
    cases: tuple[str, ...] = ("resnet50", "vit_l")


SWEEPS: tuple[Sweep, ...] = ()


def units(session: Session) -> Iterator[Unit]:
    if not SWEEPS:
        session.log("  nothing can be swept without recompiling in this version, so nothing was")
    for sweep in SWEEPS:
        for value in sweep.values:
            for case in sweep.cases:
                yield Unit(f"sweep/{sweep.name}={value}/{case}", partial(_measure, sweep, value, case))


def _measure(sweep: Sweep, value: int, case: str, session: Session) -> list[Row]:
    with sweep.setting(value):
        return [{**row, sweep.name: value} for row in kernels.measure(case, torch.float32, session)]
