"""What an experiment is: trials that can be run one by one, and what is found in their rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]
"""A finished trial: its "arm", "seed", "options", and as "numbers" the dict it returned; all JSON."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Args:
        seeds: runs of each arm; None for the experiment's own number.
        quick: one seed and a few steps, to see that everything runs; such rows are kept apart.
        data: folder with original data sets; None for those embedded in the packages.
        workers: processes at a time.
    """

    seeds: int | None = None
    quick: bool = False
    data: Path | None = None
    workers: int = 1


@dataclass(frozen=True)
class Trial:
    """One run: everything that decides its numbers.

    Args:
        arm: what is compared, e.g. "sam"; the rows of the tables.
        seed: of all random numbers.
        options: whatever else the experiment needs to know; JSON.
        alone: it measures time, so nothing runs beside it.
    """

    arm: str
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    alone: bool = False

    @property
    def key(self) -> str:
        """The same for the same trial, in every run of the program."""
        return json.dumps([self.arm, self.seed, self.options], sort_keys=True)

    def __str__(self) -> str:
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.arm}, seed {self.seed}" + (f" ({options})" if options else "")


@dataclass(frozen=True)
class Table:
    """Columns and rows of finished cells; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """What a document says, what was measured, and whether that agrees; in plain words."""

    says: str
    measured: str
    verdict: Literal["agrees", "disagrees", "undecided", "not measured"]


@dataclass(frozen=True)
class Findings:
    """What the rows of an experiment say.

    Args:
        tables, claims: as they are to be printed.
        draw: draws the picture into a file (PNG).
        numbers: what the tables were made of, JSON.
    """

    tables: Sequence[Table]
    claims: Sequence[Claim]
    draw: Callable[[Path], None]
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A group of experiments.

    Args:
        name: how it is called on the command line.
        title: one line.
        protocol: what is run, in plain words, with where it deviates from the document and why.
        source: the document.
        trials: what is to be run; the same list for the same settings.
        run: runs one trial and returns its numbers, JSON; interruptible at any time. Gets the folder of
            original data, or None.
        findings: of the rows that are there, which may be some of all.
        minutes: about how long it takes on two cores; an estimate for the list.
    """

    name: str
    title: str
    protocol: str
    source: str
    trials: Callable[[Settings], list[Trial]]
    run: Callable[[Trial, Path | None], dict[str, Any]]
    findings: Callable[[list[Row]], Findings]
    minutes: float
