"""Stage 4: the host's own time of a step, and the memory that a step takes."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..records import Row, measured, single
from .device import median_of
from .gate import Parts, one_step, parts_of
from .lists import DeviceWorkspace
from .ours import OURS
from .session import Session

# A host that takes so many seconds while the device spins was held up: by a full queue of launches, or since
# it read the device. Its own time is then what it takes beside an idle device.
_HELD_UP = 0.01


def rows_of(peers: dict[str, Any], workspace: DeviceWorkspace, session: Session) -> list[Row]:
    """Host time and extra memory of a step; of ours the time also with gradients in place."""
    rows = []
    for key, peer in peers.items():
        rows += _host(key, parts_of(peer, workspace), "", session)
        if key in OURS:
            rows += _host(key, parts_of(peer, workspace, is_in_place=True), "_in_place", session)[:1]
        # What it keeps between steps was made before; what comes on top is measured.
        extra = session.gpu.peak_extra(one_step(peer, workspace)) + _held(peer)
        rows.append(single(key, "peak_extra_bytes", extra))
    return rows


def _host(key: str, parts: Parts, suffix: str, session: Session) -> list[Row]:
    """Host time of both halves of a step, and whether a half waits for the device."""
    place, first, place_again, second = parts

    def seconds(is_busy: bool) -> list[float]:
        place()
        found = [session.gpu.host_seconds(first, is_busy)]
        place_again()
        return [*found, session.gpu.host_seconds(second, is_busy)]

    seconds(False)  # compiles and allocates
    is_waiting = waits(parts, session.gpu.device)
    is_busy = not is_waiting and max(seconds(True)) < _HELD_UP
    host = [1e6 * s for s in median_of(lambda: sum(seconds(is_busy)), 20)]
    device = "waits" if is_waiting else "busy" if is_busy else "idle"
    return [measured(key, f"host_us{suffix}", host, device=device), single(key, "waits", is_waiting)]


def waits(parts: Parts, device: torch.device) -> bool:
    """Whether the host reads the device in a step; torch warns of every such read, and the step goes on."""
    if device.type != "cuda":
        return False
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for part in parts:
                part()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return any("synchronizing CUDA operation" in str(warning.message) for warning in said)


def _held(peer: Any) -> int:
    """Bytes of buffers that a peer keeps between steps, as far as it shows them."""
    buffers = getattr(peer, "snapshots", None)
    if buffers is None and hasattr(peer, "optimizer") and hasattr(peer.optimizer, "_groups"):
        buffers = [x for group, _ in peer.optimizer._groups() for x in group.standing_snapshots or []]
    return sum(x.numel() * x.element_size() for x in buffers or [])
