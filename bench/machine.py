"""Who measured: a description that goes into every row, and the name of the folder."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def slug() -> str:
    """CPU model and cores as a folder name, like amd-epyc-9654-2c."""
    name = re.sub(r"\(.*?\)|@.*|\b(cpu|processor|\d+-core)\b", " ", cpu_model().lower())
    return "-".join(re.findall(r"[a-z0-9]+", name)) + f"-{cores()}c"


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """Short hash, with a plus if the working tree differs from it."""
    short = _git("rev-parse", "--short", "HEAD")
    if not short:
        return "none"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return short + ("+" if changed else "")


def package_version() -> str:
    try:
        from sam_kernels import __version__
    except ImportError:
        return "none"
    return __version__


def peer_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pytorch-optimizer")
    except PackageNotFoundError:
        return "none"


@cache
def describe() -> dict[str, Any]:
    """CPU, cores, threads and versions."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_optimizer": peer_version(),
        "sam_kernels": package_version(),
        "commit": commit(),
    }


class Neighbours:
    """How many cores other processes (and other guests of the host) kept busy since construction.

    The load average would not do: it counts our own threads and forgets slowly.
    """

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Cores on average; None where the system does not say."""
        if self._busy is None:
            return None
        others = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return max(0.0, others / (time.perf_counter() - self._began))


def _busy_seconds() -> float | None:
    """Seconds all cores together have computed since boot."""
    try:
        fields = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
