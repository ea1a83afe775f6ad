"""Stage 4, what runs in a process of its own: rows of a unit, written by a program and read here."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .. import machine
from ..records import Row
from .device import Gpu, GpuResults
from .session import Session, Unfinished

_SPARE_SECONDS = 10  # of the stage, for the way back


def run(
    module: str, unit: str, session: Session, more: Sequence[str] = (), most: float = float("inf")
) -> tuple[list[Row] | None, str]:
    """The rows that the other process has written, None if it died before; and how it ended.

    Raises:
        Unfinished: if it did not end in what is left of the stage, or in `most` seconds.
    """
    session.gpu.free_bytes()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", module, unit, "--rows", str(rows)]
        command += ["--seconds", f"{session.left() - _SPARE_SECONDS:.0f}", "--backends", *session.backends]
        command += ["--cap", str(session.cap)] if session.cap is not None else []
        status, said = _wait([*command, *more], session, min(session.left(), most))
        found = json.loads(rows.read_text()) if rows.exists() else None
    return found, f"its process ended with status {status}: {said.strip()[-500:]}"


def _wait(command: list[str], session: Session, seconds: float) -> tuple[int, str]:
    # By default jax takes three quarters of the memory at once.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(
            command,
            cwd=machine.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as late:
        raise Unfinished(f"the process of {command[2]} did not end in time") from late
    for line in done.stdout.splitlines():
        if line.startswith("  "):  # ours; XLA says much else
            session.log(line)
    return done.returncode, done.stdout


def parser(module: str, units: Sequence[str], description: str | None) -> argparse.ArgumentParser:
    """What `run` gives to a program."""
    found = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    found.add_argument("unit", choices=units)
    found.add_argument("--rows", type=Path, required=True, help="file the rows are written to")
    found.add_argument("--backends", nargs="+", required=True)
    found.add_argument("--seconds", type=float, required=True)
    found.add_argument("--cap", type=int)
    return found


def session_of(options: argparse.Namespace, gpu: Callable[[], Gpu]) -> Session:
    """The session of the other process."""
    return Session(
        gpu(),
        GpuResults(options.rows.with_suffix(".none"), {}),
        partial(print, flush=True),
        cap=options.cap,
        ends=time.monotonic() + options.seconds,
        backends=tuple(options.backends),
    )
