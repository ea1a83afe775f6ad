"""What the user sees while trials run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from .experiment import Trial


class Progress:
    """A rich bar on a terminal's stderr with what runs and the time that remains; else a line for each trial.

    Example:
        >>> progress = Progress(bar=False, file=sys.stdout)
        >>> progress.start("toys", 2, before=1)
        toys: 1 trials are there already, 2 to run
        >>> progress.finished(Trial("sam", 0), 1.5)
        toys 1/2: sam, seed 0: 1.5 s; about 2 s left
        >>> progress.stop()
    """

    def __init__(self, bar: bool | None = None, file: Any = None) -> None:
        self.file = sys.stderr if file is None else file
        self.bar = _rich_bar() if (self.file.isatty() if bar is None else bar) else None
        self.name, self.total, self.done, self.begin = "", 0, 0, 0.0
        self.task: Any = None

    def start(self, name: str, total: int, before: int = 0) -> None:
        """So many trials are to run."""
        self.name, self.total, self.done, self.begin = name, total, 0, time.perf_counter()
        if before:
            self.say(f"{name}: {before} trials are there already, {total} to run")
        elif total:
            self.say(f"{name}: {total} trials to run")
        if self.bar is not None and total:
            self.task = self.bar.add_task(name, total=total)
            self.bar.start()

    def running(self, trials: list[Trial]) -> None:
        """These run now."""
        if self.bar is not None and self.task is not None:
            names = " | ".join(f"{trial.arm}, seed {trial.seed}" for trial in trials)
            self.bar.update(self.task, description=f"{self.name}: {names}")

    def finished(self, trial: Trial, seconds: float | None) -> None:
        """One has ended, after so many seconds, or failed (None)."""
        self.done += 1
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task)
            return
        left = (time.perf_counter() - self.begin) / self.done * (self.total - self.done)
        if seconds is not None:
            left = max(left, 0.0) if self.done > 1 else seconds * (self.total - self.done)
        took = "failed" if seconds is None else f"{seconds:.1f} s"
        rest = f"; about {_time(left)} left" if self.done < self.total else ""
        self.say(f"{self.name} {self.done}/{self.total}: {trial}: {took}{rest}")

    def say(self, text: str) -> None:
        """A line, above the bar where there is one."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self.file, flush=True)

    def stop(self) -> None:
        """The bar leaves."""
        if self.bar is not None:
            self.bar.stop()
            if self.task is not None:
                self.bar.remove_task(self.task)
        self.task = None


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rich_bar() -> Any:
    try:
        from rich import progress as rich_progress
        from rich.console import Console
    except ImportError:
        return None  # plain lines say the same
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=24 * 3600.0,  # of one trial to the next, which may take many minutes
    )
