"""Finished trials in a file, one line of JSON each: safe against ctrl-C, kills and a second program."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .experiment import Row, Trial


class Busy(RuntimeError):
    """Another program writes the same file."""


class Store:
    """The rows of one experiment in ``folder/runs.jsonl``.

    Each row has, in this order: experiment, arm, seed, options, numbers, seconds (wall time), versions,
    machine, date (UTC) and commit (None outside a git clone). Numbers that are not finite are written as
    NaN and Infinity, as Python's json reads them. A row is written with one call and flushed to the disk,
    so a killed program leaves at most its last line torn.

    Args:
        folder: of this experiment; made when something is written.
        experiment: its name.

    Example:
        >>> import tempfile
        >>> store = Store(Path(tempfile.mkdtemp()), "demo")
        >>> with store.locked():
        ...     row = store.append(Trial("sam", 3), {"loss": 0.5}, seconds=0.1)
        >>> [(row["arm"], row["seed"], row["numbers"]) for row in store.rows()]
        [('sam', 3, {'loss': 0.5})]
    """

    def __init__(self, folder: Path, experiment: str) -> None:
        self.folder, self.experiment = folder, experiment
        self.path = folder / "runs.jsonl"

    def rows(self) -> list[Row]:
        """The finished trials, in the order of the file, without a torn last line.

        Raises:
            ValueError: if another line than the last is not a row, with its number.
        """
        return self._read()[0]

    def mend(self) -> str | None:
        """Drop a torn last line from the file; what was done, in a sentence, or None. Call it `locked`."""
        rows, whole, torn = self._read()
        if not torn and (not whole or whole.endswith(b"\n")):
            return None
        if whole and not whole.endswith(b"\n"):
            whole += b"\n"  # only the end of the line was lost
        beside = self.path.with_suffix(".mended")
        with beside.open("wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
        if not torn:
            return None
        return (
            f"{self.experiment}: the last line of {self.path} was torn (the program was ended while writing "
            f"it) and has been dropped; {len(rows)} finished trials are there."
        )

    def append(
        self, trial: Trial, numbers: dict[str, Any], seconds: float, threads: int | None = None
    ) -> Row:
        """Write a finished trial to the disk and return its row. Call it `locked`.

        Args:
            trial, numbers: what ran, and what it returned.
            seconds: that it took.
            threads: that torch had where it ran; None for those it has here.

        Raises:
            TypeError: if the numbers are not JSON.
        """
        row = {
            "experiment": self.experiment,
            "arm": trial.arm,
            "seed": trial.seed,
            "options": trial.options,
            "numbers": numbers,
            "seconds": round(seconds, 3),
            "versions": versions(),
            "machine": machine(threads),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
        }
        try:
            line = json.dumps(row) + "\n"
        except TypeError as error:
            raise TypeError(f"{trial.arm}, seed {trial.seed}: its numbers are not JSON: {error}") from error
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())
        return dict(json.loads(line))

    def set_aside(self) -> Path | None:
        """Move the rows out of the way, to start over; returns where they are now, None without any.

        They become runs.before.1.jsonl, or the next number, so that no rows are lost. Call it `locked`.
        """
        if not self.path.exists():
            return None
        names = (self.path.with_name(f"runs.before.{number}.jsonl") for number in itertools.count(1))
        return self.path.replace(next(path for path in names if not path.exists()))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes inside. The lock ends with the process that holds it, however that ends.

        Raises:
            Busy: if another process holds it, with its id.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a+") as file:
            if not _lock(file.fileno()):
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise Busy(
                    f"{self.experiment}: another program, process {holder}, is writing to {self.folder}; "
                    "wait for it, end it, or give another --out"
                )
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)
                _unlock(file.fileno())

    def _read(self) -> tuple[list[Row], bytes, bytes]:
        """The rows, the bytes they are, and those of a torn last line."""
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.splitlines(keepends=True)
        rows: list[Row] = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                missing = {"arm", "seed", "options", "numbers"} - row.keys()
            except (ValueError, AttributeError) as error:  # ValueError: also bytes that are no UTF-8
                if number == len(lines) and not line.endswith(b"\n"):
                    return rows, content[: len(content) - len(line)], line
                raise ValueError(
                    f"{self.path}, line {number} is not a row ({error}); mend or remove it, or start over "
                    "with --fresh"
                ) from error
            if missing:
                raise ValueError(
                    f"{self.path}, line {number} has no {', '.join(sorted(missing))}; expected a row that "
                    "this program wrote"
                )
            rows.append(row)
        return rows, content, b""


def key_of(row: Row) -> str:
    """The key of the trial that a row is of."""
    return Trial(row["arm"], row["seed"], row["options"]).key


def _lock(file: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(file, 1 << 20, os.SEEK_SET)  # locked bytes cannot be read, and the id is to be
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file: int) -> None:
    try:
        import fcntl
    except ImportError:
        return  # closing the file gives it back
    fcntl.flock(file, fcntl.LOCK_UN)


@cache
def versions() -> dict[str, str]:
    """Of what computes."""
    found = {"sam_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("numpy", "scipy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, architecture, cores of the machine, and threads that torch used; None for those it has."""
    return {
        "cpu": _cpu(),
        "arch": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if threads is None else threads,
    }


@cache
def _cpu() -> str:
    from ..doctor import cpu

    return cpu()


@cache
def commit() -> str | None:
    """The commit of the clone this package lies in, "-dirty" with changes; None if it lies in none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git, or a clone that does not answer: a row without a commit is still a row
    return asked.stdout.strip() or None if asked.returncode == 0 else None
