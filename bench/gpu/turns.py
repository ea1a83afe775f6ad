"""Which stages have their turn when, for how long, and in a process each."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from .. import machine
from .stages import DIRECT, GRACE, NOT_FINISHED, PROCESSES, WRONG, Stage, worse

# Seconds of each stage. All together they leave, of half an hour, over five minutes for the build and the
# starts of machines; 1 and 2, 3 and 4, and the rest fit a call of ten minutes each.
STAGE_SECONDS = {1: 45, 2: 420, 3: 210, 4: 320, 5: 310, 6: 160}
LEAST_SECONDS = 25  # a stage is not begun with less: torch alone takes some to start
REPORT_SECONDS = 15  # tables and pictures at the end of a call


def in_turn(stages: Sequence[Stage], resume: bool) -> list[Stage]:
    """The stages in their order; of a resumed call, what no figure waits for comes after the figures."""
    if not resume:
        return list(stages)
    turns: list[Stage] = []
    for stage in stages:
        turns.append(replace(stage, part=DIRECT) if stage.number == 2 else stage)
    for stage in stages:
        if stage.number == 2:
            at = sum(turn.number <= 5 for turn in turns)
            turns.insert(at, replace(stage, part=PROCESSES))
    return turns


def end_of(limit: float, began: float | None) -> float:
    """When the last stage has to be over, in seconds of time.monotonic.

    Args:
        limit: seconds of the whole call, the build before and the report after it included.
        began: when the call began, in seconds since the epoch; now if not given.
    """
    gone = 0.0 if began is None else max(0.0, time.time() - began)
    return time.monotonic() + limit - gone - GRACE - REPORT_SECONDS


def seconds_for(stage: Stage, later: Sequence[Stage], left: float) -> float:
    """What a stage is given, and what those after it leave of the time; at most all that is left."""
    return min(left, max(STAGE_SECONDS[stage.number], left - planned(later)))


def planned(stages: Sequence[Stage]) -> float:
    return sum(STAGE_SECONDS[stage.number] for stage in stages)


def in_processes(
    stage: Stage,
    options: argparse.Namespace,
    seconds: float,
    broken: Callable[[], dict[str, int]],
    log: Callable[[str], None],
) -> int:
    """A stage in a process of its own, and in another one after each that a unit has ended.

    Args:
        broken: units that have ended a process of this call, by the results, and how often.
    """
    ends, status = time.monotonic() + seconds, 0
    while True:
        before = broken()
        status = worse(status, _in_a_process(stage, options, ends - time.monotonic(), log))
        new = [unit for unit, attempts in broken().items() if attempts > before.get(unit, 0)]
        if not new:
            return status
        log(f"{stage.name}: its process ended in {', '.join(new)}, which comes last from now on")
        if ends - time.monotonic() < LEAST_SECONDS:
            return worse(status, NOT_FINISHED)


def _in_a_process(
    stage: Stage, options: argparse.Namespace, seconds: float, log: Callable[[str], None]
) -> int:
    """Its own clock ends it, also when a unit hangs; if that fails, we do."""
    command = [sys.executable, "-m", "bench.gpu", "--child", "--stage", str(stage.number)]
    # By the clock on the wall: the start of the process counts.
    command += ["--ends", f"{time.time() + seconds:.0f}", "--call", options.call]
    command += ["--part", stage.part] if stage.part else []
    command += [flag for flag in ("--resume", "--quick") if getattr(options, flag[2:])]
    command += ["--out", str(options.out)] if options.out else []
    # What bounds the call here would be read there again.
    bounds = ("LIMIT", "LIST", "BEGAN", "STAGE")
    environment = {name: value for name, value in os.environ.items() if name not in bounds}
    run = partial(subprocess.run, command, cwd=machine.ROOT, env=environment)
    try:
        status = run(timeout=seconds + GRACE).returncode
    except subprocess.TimeoutExpired:
        log(f"{stage.name}: it hangs and was ended; --resume takes up what it had not saved")
        return NOT_FINISHED
    # A process that died of a signal has a negative status.
    return status if status in (0, WRONG, NOT_FINISHED) else WRONG


def share(stage: Stage, later: Sequence[Stage], options: argparse.Namespace, ends: float) -> float:
    """Seconds for a stage, as --seconds, --limit and the stages after it have it."""
    left = ends - time.monotonic()
    if options.seconds is not None:
        return min(float(options.seconds), left if math.isfinite(options.limit) else math.inf)
    if math.isinf(options.limit):  # what those before took too long is not lost to this one
        left = max(left, STAGE_SECONDS[stage.number])
    return seconds_for(stage, later, left)
