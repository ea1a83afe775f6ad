"""Peak memory of a piece of code, from torch's own record of every allocation and release."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
