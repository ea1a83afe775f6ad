"""An experiment of eight trials that take no time, or as long as the environment says; also as a program."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from sam_kernels.experiments import command, pictures, registry, tables
from sam_kernels.experiments.experiment import Claim, Experiment, Findings, Row, Settings, Table, Trial


def trials(settings: Settings) -> list[Trial]:
    found = [
        Trial(arm, seed, {"scale": 2.0})
        for seed in range(1 if settings.quick else settings.seeds or 3)
        for arm in ("sgd", "sam")
    ]
    return found + [Trial("timed", seed, alone=True) for seed in range(2)]


def run(trial: Trial, data: Path | None) -> dict[str, Any]:
    if trial.seed and trial.arm != "timed":  # those of seed 0 are quick in any case
        time.sleep(float(os.environ.get("TINY_SLEEP", "0")))
    if f"{trial.arm} {trial.seed}" == os.environ.get("TINY_FAILS"):
        raise ArithmeticError("no such luck")
    gain = {"sgd": 0.0, "sam": 0.5, "timed": 0.0}[trial.arm]
    return {"accuracy": 90.0 + trial.seed + gain, "process": os.getpid(), "clock": time.time_ns()}


def findings(rows: list[Row]) -> Findings:
    cells = [[arm, tables.cell(tables.values(rows, "accuracy", arm))] for arm in tables.arms(rows)]
    found = tables.paired(rows, "accuracy", "sam", "sgd")

    def draw(path: Path) -> None:
        figure, axes = pictures.figure("tiny")
        pictures.bars_with_dots(
            axes[0, 0], {a: tables.values(rows, "accuracy", a) for a in tables.arms(rows)}
        )
        pictures.save(figure, path)

    claim = Claim("SAM is better.", f"{found}.", "agrees" if found.mean > 0 else "undecided")
    return Findings([Table("Accuracy | percent", ["arm", "accuracy"], cells, "A note.")], [claim], draw)


EXPERIMENT = Experiment(
    name="toys",
    title="Tiny",
    protocol="Nothing\nis done.\n\nTwice.",
    source="a test",
    trials=trials,
    run=run,
    findings=findings,
    minutes=0.1,
)

if __name__ == "__main__":
    registry.get = lambda name: EXPERIMENT
    sys.exit(command.main(sys.argv[1:]))
