"""One command for a GPU: python -m bench.gpu (make gpu-check)

Six stages, each in a process of its own, so that a kernel that destroys its context costs one stage.
Every unit is printed and saved when it is done. Ends with 1 if a result is wrong, with 2 if a stage had
no time for all of its units (--resume takes it up), else with 0.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console

from .. import machine
from ..records import Row, single
from ..report import number
from . import ceilings, correctness, kernels, ours, phase, report, sweeps, training
from .device import Gpu, GpuResults, absence, describe, is_fault, rate, slug
from .predictions import ceiling, kind_of
from .report import goals_table
from .session import Session, Unfinished, Unit

# Seconds of each stage. All together they leave, of half an hour, over five minutes for the build and the
# starts of machines; 1 and 2, 3 and 4, and the rest fit a call of ten minutes each.
_STAGE_SECONDS = {1: 40, 2: 420, 3: 210, 4: 320, 5: 310, 6: 160}
_GRACE = 45  # seconds a stage may take longer than that, to end the unit it is in
_LEAST_SECONDS = 25  # a stage is not begun with less: torch alone takes some to start

WRONG, NOT_FINISHED = 1, 2


@dataclass(frozen=True)
class Stage:
    """A module with `units(session)`.

    Attributes:
        is_figure: whether it yields figures, which need a passed correctness stage.
    """

    number: int
    title: str
    module: ModuleType
    is_figure: bool = True

    def units(self, session: Session) -> Iterator[Unit]:
        found: Iterator[Unit] = self.module.units(session)
        return found


STAGES = (
    Stage(1, "ceilings", ceilings, is_figure=False),
    Stage(2, "correctness", correctness, is_figure=False),
    Stage(3, "kernels", kernels),
    Stage(4, "optimizer phase", phase),
    Stage(5, "whole training step", training),
    Stage(6, "sweeps", sweeps),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    asked = {name: os.environ.get(name, "") for name in ("STAGE", "RESUME", "LIST", "LIMIT", "RESULTS")}
    chosen = asked["STAGE"].replace(",", " ").split()
    parser.add_argument(
        "--stage",
        nargs="+",
        type=int,
        choices=[stage.number for stage in STAGES],
        default=[int(word) for word in chosen] or [stage.number for stage in STAGES],
        help="default: $STAGE, or all",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        default=bool(asked["RESUME"]),
        help="skip units these sources have passed here (also RESUME=1)",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        default=bool(asked["LIST"]),
        help="only name the units and what became of each (also LIST=1)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a first look at small shapes; saved apart, and no figures"
    )
    parser.add_argument("--seconds", type=float, help="for each stage, in place of what it is given here")
    parser.add_argument(
        "--limit",
        type=float,
        default=float(asked["LIMIT"] or "inf"),
        help="seconds for all stages together; the rest is left to --resume (default: $LIMIT, or none)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(asked["RESULTS"]) if asked["RESULTS"] else None,
        help="folder of the results (default: $RESULTS, or bench/results/<gpu>)",
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(width=None if Console().is_terminal else 180, highlight=False, soft_wrap=True)
    stages = [stage for stage in STAGES if stage.number in options.stage]
    reason = absence()
    if reason is not None:
        for stage in stages:
            console.print(
                f"stage {stage.number}, {stage.title}: {reason}, nothing was measured", markup=False
            )
        return 0
    torch._logging.set_logs(all=logging.ERROR)  # type: ignore[attr-defined]
    session = _session(options, console)
    if options.list:
        _list_units(stages, session)
        return 0
    ends = time.monotonic() + options.limit
    one_by_one = len(stages) > 1 and not options.child
    status = 0
    for stage in stages:
        seconds = min(options.seconds or _STAGE_SECONDS[stage.number], ends - time.monotonic())
        if options.resume and one_by_one and _is_done(stage, session):
            session.log(f"\nstage {stage.number}, {stage.title}: done by an earlier run")
        elif seconds < _LEAST_SECONDS:
            session.log(f"\nstage {stage.number}, {stage.title}: left to --resume, the time is over")
            status = _worse(status, NOT_FINISHED)
        elif one_by_one:
            status = _worse(status, _in_a_process(stage, options, seconds, console))
        else:
            session.ends = time.monotonic() + seconds
            status = _worse(status, run_stage(stage, session, options.resume))
    if not options.child:
        _report(_session(options, console), console)
    return status


def _session(options: argparse.Namespace, console: Console) -> Session:
    gpu = Gpu()
    folder = options.out or machine.RESULTS / slug(gpu.name)
    about = describe(gpu) | {"effort": "quick" if options.quick else "full"}
    results = GpuResults(folder / ("gpu-quick.jsonl" if options.quick else "gpu.jsonl"), about)
    return Session(
        gpu, results, lambda text: console.print(text, markup=False), cap=4096 if options.quick else None
    )


def _quiet(session: Session) -> Session:
    """For looking through units without being told of each again."""
    return replace(session, log=lambda text: None)


def _is_done(stage: Stage, session: Session) -> bool:
    return all(session.results.has(unit.name) for unit in stage.units(_quiet(session)))


def _list_units(stages: Iterable[Stage], session: Session) -> None:
    """Every unit, in the order it would be measured, and what became of it."""
    counts: dict[str, int] = {}
    for stage in stages:
        session.log(f"stage {stage.number}, {stage.title}, {_STAGE_SECONDS[stage.number]} s")
        for unit in stage.units(_quiet(session)):
            state = session.results.state(unit.name)
            counts[state] = counts.get(state, 0) + 1
            session.log(f"  {unit.name:<44} {state}")
    session.log(", ".join(f"{count} {state}" for state, count in counts.items()) or "no units")


def _in_a_process(stage: Stage, options: argparse.Namespace, seconds: float, console: Console) -> int:
    """A stage by itself; its own clock ends it, and a hang is ended a little later."""
    command = [sys.executable, "-m", "bench.gpu", "--child", "--stage", str(stage.number)]
    command += ["--seconds", f"{seconds:.0f}"]
    command += [flag for flag in ("--resume", "--quick") if getattr(options, flag[2:])]
    command += ["--out", str(options.out)] if options.out else []
    # What bounds the call here would be read there again.
    environment = {name: value for name, value in os.environ.items() if name not in ("LIMIT", "LIST")}
    run = partial(subprocess.run, command, cwd=machine.ROOT, env=environment)
    try:
        status = run(timeout=seconds + _GRACE).returncode
    except subprocess.TimeoutExpired:
        console.print(f"stage {stage.number} hangs and was ended; --resume takes up what it had not saved")
        return NOT_FINISHED
    # A process that died of a signal has a negative status.
    return status if status in (0, WRONG, NOT_FINISHED) else WRONG


def run_stage(stage: Stage, session: Session, resume: bool) -> int:
    """All units of a stage, each saved as soon as it is measured."""
    session.log(f"\nstage {stage.number}, {stage.title}")
    session.log("  " + "  ".join(f"{key} {value}" for key, value in session.results.machine.items()))
    status = 0
    if stage.is_figure:
        admitted, status = _admitted(session)
        if not admitted:
            return WRONG
        session = replace(session, backends=admitted)
    for unit in stage.units(session):
        if resume and session.results.has(unit.name):
            session.log(f"{unit.name}: done by an earlier run")
            continue
        found = _run(unit, session)
        status = _worse(status, found)
        if found == WRONG and session.gpu.is_lost():
            session.log("  the CUDA context is lost; the units after this one are left to --resume")
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


def _worse(a: int, b: int) -> int:
    """A wrong result outranks an unfinished stage."""
    return WRONG if WRONG in (a, b) else max(a, b)


def _run(unit: Unit, session: Session) -> int:
    if session.left() < unit.least:
        session.log(f"{unit.name}: left to --resume, the stage's time is over")
        return NOT_FINISHED
    session.log(unit.name)
    began = time.monotonic()
    try:
        session.gpu.free_bytes()  # what the unit before held goes back
        rows = unit.measure(session)
    except Unfinished as reason:
        session.log(f"  left to --resume: {reason}")
        return NOT_FINISHED
    except Exception as error:  # one unit must not cost the others
        session.log(traceback.format_exc())
        rows = [{"peer": unit.name, "metric": "wrong", "value": f"raised {type(error).__name__}: {error}"}]
    session.results.replace(unit.name, rows)
    for line in lines_of(rows, session.results):
        session.log(f"  {line}")
    session.log(f"  {time.monotonic() - began:.1f} s")
    return WRONG if any(is_fault(unit.name, row) for row in rows) else 0


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


def withheld_because(missing: list[str], is_quick: bool) -> str | None:
    """Why no figure may be shown, or None."""
    if is_quick:
        return "A quick run checks and does not measure."
    if missing:
        return f"No figure without a passed correctness stage; it lacks {', '.join(missing)}."
    return None


def _report(session: Session, console: Console) -> None:
    """Tables and pictures of what the file holds now, beside it."""
    results = session.results
    missing = correctness.missing(_quiet(session), results, only_direct=False)
    withheld = withheld_because(missing, session.cap is not None)
    console.print(goals_table(results.current(), withheld))
    if not results.rows:
        return
    # Whoever draws from the file alone, without the card, has to know this too.
    results.replace(report.VERDICT, [single("report", "withheld", withheld)])
    for path in report.write(results.path):
        console.print(str(path), markup=False)
