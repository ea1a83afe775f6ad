"""Peak memory of a piece of code: exactly what torch allocates, and what the process came to hold in all."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Before the profiler is loaded: it announces every start and stop on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch  # noqa: E402  (after the variable above)


class Meter:
    """Bytes allocated in the block: `peak` at the worst moment, `left` at the end."""

    peak = 0
    left = 0


@contextmanager
def metered() -> Iterator[Meter]:
    """Count allocations of tensors on the CPU inside the block; exact, unlike the resident set."""
    meter = Meter()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield meter
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        meter.left += event.nbytes()
        meter.peak = max(meter.peak, meter.left)


_PROCESS = Path("/proc/self")


def resident_peak(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident set grew at the worst moment of a call; None where nobody tells.

    Sees what torch does not record, such as the copies an operator makes for itself. Exact to some hundred
    kilobytes: in pages, and with whatever of the libraries the call touches first.
    """
    gc.collect()
    try:
        # What was released is given back first, or the call could use it unseen.
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    if found is None:
        raise OSError(f"no {name}")
    return 1024 * int(found[1])
