"""Runs the trials that are not in the store yet: several at a time, or alone where time is measured.

Whatever ends it, what has finished is in the file, and the next run goes on from there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

import torch

from ..interrupts import deferred
from .experiment import Experiment, Settings, Trial
from .progress import Progress
from .store import Store, commit, key_of

Run = Callable[[Trial, Path | None], dict[str, Any]]
Done = tuple[dict[str, Any], float, int]
"""Numbers of a trial, seconds it took, threads that torch had where it ran."""


@dataclass
class Outcome:
    """What came of it.

    Args:
        finished: trials that ran now and are in the store.
        before: trials that were there.
        failures: a sentence for each trial that raised.
        not_run: trials that are neither, because the workers or the user ended it.
        interrupted: whether that was ctrl-C.
    """

    finished: int = 0
    before: int = 0
    failures: list[str] = field(default_factory=list)
    not_run: int = 0
    interrupted: bool = False


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remaining(experiment: Experiment, settings: Settings, store: Store) -> tuple[list[Trial], int]:
    """The trials that are not in the store, and how many of those asked for are.

    Raises:
        ValueError: if the experiment lists the same trial twice.
    """
    trials = experiment.trials(settings)
    keys = [trial.key for trial in trials]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{experiment.name}: the trial {twice} is listed twice; expected different ones")
    there = {key_of(row) for row in store.rows()}
    return [t for t in trials if t.key not in there], sum(key in there for key in keys)


def run(
    experiment: Experiment,
    settings: Settings,
    store: Store,
    say: Callable[[str], None],
    progress: Progress,
) -> Outcome:
    """Run what is missing and write each row as it finishes.

    Args:
        experiment: what.
        settings: how much, and in how many processes.
        store: where the rows are and go.
        say: takes a sentence for the user.
        progress: is told what runs and what has finished.

    Raises:
        Busy: if another program writes to the store.
    """
    with store.locked():
        mended = store.mend()
        if mended:
            say(mended)
        trials, before = remaining(experiment, settings, store)
        job = _Job(experiment, settings, store, say, progress, Outcome(before=before, not_run=len(trials)))
        commit()  # now, while the files are those that were imported
        beside = [trial for trial in trials if not trial.alone]
        alone = [trial for trial in trials if trial.alone]
        progress.start(experiment.name, len(trials), before)
        try:
            if settings.workers > 1 and len(beside) > 1:
                job.in_processes(beside)
            else:
                job.here(beside)
            job.here(alone)
        except KeyboardInterrupt:
            job.outcome.interrupted = True
        finally:
            progress.stop()
    return job.outcome


@dataclass
class _Job:
    experiment: Experiment
    settings: Settings
    store: Store
    say: Callable[[str], None]
    progress: Progress
    outcome: Outcome

    def here(self, trials: list[Trial]) -> None:
        """One after the other in this process, on one thread as in the others."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for trial in trials:
                self.progress.running([trial])
                try:
                    done = _timed(self.experiment.run, trial, self.settings.data)
                except Exception as error:
                    self._failed(trial, error)
                else:
                    self._finished(trial, *done)
        finally:
            torch.set_num_threads(threads)

    def in_processes(self, trials: list[Trial]) -> None:
        """As many at a time as there are workers; each process takes one after the other."""
        others = set(multiprocessing.active_children())
        waiting, running = list(trials), dict[Future[Done], Trial]()
        # A torch that was imported and used does not survive a fork; a fresh process imports its own.
        pool = ProcessPoolExecutor(
            min(self.settings.workers, len(trials)), multiprocessing.get_context("spawn"), _prepare
        )
        with deferred() as came:
            try:
                while (waiting or running) and not came:
                    while waiting and len(running) < self.settings.workers:
                        with _deaf_children():
                            future = pool.submit(_timed, self.experiment.run, waiting[0], self.settings.data)
                        running[future] = waiting.pop(0)
                    self.progress.running(list(running.values()))
                    for future in wait(running, timeout=0.1, return_when=FIRST_COMPLETED).done:
                        self._collect(future, running)
            except BrokenProcessPool:
                self._ended(list(running.values()))
            finally:
                if running:  # in the middle of a trial, which they would finish first
                    for child in set(multiprocessing.active_children()) - others:
                        child.terminate()
                pool.shutdown(wait=True, cancel_futures=True)

    def _collect(self, future: Future[Done], running: dict[Any, Trial]) -> None:
        try:
            done = future.result()
        except BrokenProcessPool:
            raise
        except Exception as error:
            self._failed(running.pop(future), error)
        else:
            self._finished(running.pop(future), *done)

    def _finished(self, trial: Trial, numbers: dict[str, Any], seconds: float, threads: int) -> None:
        with deferred():
            try:
                self.store.append(trial, numbers, seconds, threads)
            except TypeError as error:  # numbers that are no JSON are a mistake of the trial
                self._failed(trial, error)
                return
            self.outcome.finished += 1
            self.outcome.not_run -= 1
            self.progress.finished(trial, seconds)

    def _failed(self, trial: Trial, error: Exception) -> None:
        sentence = f"{self.experiment.name}: {trial} failed: {type(error).__name__}: {error}"
        self.outcome.failures.append(sentence)
        self.outcome.not_run -= 1
        self.say("".join(traceback.format_exception(error)).rstrip())
        self.progress.finished(trial, None)

    def _ended(self, trials: list[Trial]) -> None:
        names = "; ".join(map(str, trials))
        self.outcome.failures.append(
            f"{self.experiment.name}: a worker process was ended from outside, perhaps for memory, while "
            f"these ran: {names}. Try again with fewer --workers"
        )


def _timed(run: Run, trial: Trial, data: Path | None) -> Done:
    start, threads = time.perf_counter(), torch.get_num_threads()
    numbers = run(trial, data)
    return numbers, time.perf_counter() - start, threads


def _prepare() -> None:
    """First thing in a worker: one thread, deaf to ctrl-C, and gone when its parent is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(parent: int) -> None:
    """A killed parent closes nothing that a worker waits for: see to it that none is left over."""
    wait_for_end([parent])
    os._exit(1)


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started inside never see a ctrl-C, not even before `_prepare` is reached."""
    if sys.platform == "win32":
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
