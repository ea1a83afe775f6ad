"""One command for a GPU: python -m bench.gpu (make gpu-check)

Six stages, each in a process of its own; a unit that destroys the context, crashes or hangs costs that
process, and another one goes on with the units after it.
Every unit is printed and saved when it is done. Ends with 1 if a result is wrong, with 2 if a stage had
no time for all of its units (--resume takes it up), else with 0.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from .. import machine
from ..records import single
from . import correctness, report, suite
from .device import Gpu, GpuResults, absence, describe, is_fault, slug
from .report import goals_table
from .session import Session
from .stages import DIRECT, NOT_FINISHED, PROCESSES, STAGES, WRONG, Stage, run_stage, worse
from .turns import LEAST_SECONDS, STAGE_SECONDS, end_of, in_processes, in_turn, planned, share

__all__ = ["NOT_FINISHED", "STAGES", "WRONG", "is_fault", "main", "run_stage"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    asked = {
        name: os.environ.get(name, "") for name in ("STAGE", "RESUME", "LIST", "LIMIT", "RESULTS", "BEGAN")
    }
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
        help="seconds for the whole call; the rest is left to --resume (default: $LIMIT, or none)",
    )
    parser.add_argument(
        "--began",
        type=float,
        default=float(asked["BEGAN"]) if asked["BEGAN"] else None,
        help="when the call began, in seconds since the epoch (default: $BEGAN, or now)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(asked["RESULTS"]) if asked["RESULTS"] else None,
        help="folder of the results (default: $RESULTS, or bench/results/<gpu>)",
    )
    # What a process that serves one stage is told: when to end, what the call is named, and which units.
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=[DIRECT, PROCESSES], default="", help=argparse.SUPPRESS)
    now = datetime.now().isoformat(timespec="milliseconds")
    parser.add_argument("--call", default=now, help=argparse.SUPPRESS)
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
    if options.child:
        session.ends = time.monotonic() + options.ends - time.time()
        return run_stage(replace(stages[0], part=options.part), session, options.resume)
    status = _take_turns(in_turn(stages, options.resume), options, session, console)
    _report(_session(options, console), console)
    return status


def _take_turns(turns: list[Stage], options: argparse.Namespace, session: Session, console: Console) -> int:
    """What is not done yet, one process after another; time that a stage does not need goes to the next."""
    to_do = [stage for stage in turns if not (options.resume and _is_done(stage, session))]
    for stage in turns:
        if stage not in to_do and any(True for _ in stage.units(_quiet(session))):
            session.log(f"\n{stage.name}: done by an earlier run")
    limited = math.isfinite(options.limit)
    ends = end_of(options.limit, options.began) if limited else time.monotonic() + planned(to_do)

    def broken() -> dict[str, int]:
        return GpuResults(session.results.path, session.results.machine).broken()

    status = 0
    for index, stage in enumerate(to_do):
        seconds = share(stage, to_do[index + 1 :], options, ends)
        if seconds < LEAST_SECONDS:
            session.log(f"\n{stage.name}: left to --resume, the time is over")
            status = worse(status, NOT_FINISHED)
        else:
            status = worse(status, in_processes(stage, options, seconds, broken, session.log))
    return status


def _session(options: argparse.Namespace, console: Console) -> Session:
    gpu = Gpu()
    folder = options.out or machine.RESULTS / slug(gpu.name)
    about = describe(gpu) | {"effort": "quick" if options.quick else "full", "began": options.call}
    results = GpuResults(folder / ("gpu-quick.jsonl" if options.quick else "gpu.jsonl"), about)
    cap = 4096 if options.quick else None
    return Session(gpu, results, lambda text: console.print(text, markup=False), cap, is_child=options.child)


def _quiet(session: Session) -> Session:
    """For looking through units without being told of each again."""
    return replace(session, log=lambda text: None)


def _is_done(stage: Stage, session: Session) -> bool:
    return all(session.results.has(unit.name) for unit in stage.units(_quiet(session)))


def _list_units(stages: Iterable[Stage], session: Session) -> None:
    """Every unit, in the order it would be measured, and what became of it."""
    counts: dict[str, int] = {}
    for stage in stages:
        session.log(f"stage {stage.number}, {stage.title}, {STAGE_SECONDS[stage.number]} s")
        for unit in stage.units(_quiet(session)):
            state = session.results.state(unit.name)
            counts[state] = counts.get(state, 0) + 1
            session.log(f"  {unit.name:<44} {state}")
    session.log(", ".join(f"{count} {state}" for state, count in counts.items()) or "no units")


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
    for sentence in suite.not_run(results.current()):
        console.print(sentence, markup=False)
    if not results.rows:
        return
    # Whoever draws from the file alone, without the card, has to know this too.
    results.replace(report.VERDICT, [single("report", "withheld", withheld)])
    for path in report.write(results.path):
        console.print(str(path), markup=False)
