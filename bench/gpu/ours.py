"""Our backends on a GPU: what they are called as peers, why one takes no part, each beside the native one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..peers import SPECS as PEERS
from ..peers import Ours
from ..records import Row, divided
from .session import Session

# The others are held against the native one, in the same rounds.
NATIVE, TRITON = "native", "triton"

# What an installation may do without: left out with its own sentence. Without another one the check fails.
_OPTIONAL = (TRITON,)

# Milliseconds of one contestant of a round; others, as the host's time, are taken one peer after another.
_ROUNDS = (
    "eager_ms",
    "graph_ms",
    "same_list_ms",
    "optimizer_ms",
    "total_ms",
    "wall_ms",
    "wall_graph_ms",
)


def key(backend: str) -> str:
    """A backend as a peer of phases and training steps."""
    return f"ours_{backend}"


def named(backend: str, what: str) -> str:
    """A backend's pass, as the rows call it."""
    return f"{backend} {what}"


OURS = tuple(map(key, (NATIVE, TRITON)))

_native = PEERS[key(NATIVE)]
SPECS = {
    _native.key: _native,
    # The same passes over the same lists, so the same bytes.
    key(TRITON): replace(_native, key=key(TRITON), label="ours, Triton", make=partial(Ours, backend=TRITON)),
    **{name: spec for name, spec in PEERS.items() if name != _native.key},
}


def absence(backend: str, device: torch.device) -> str | None:
    """Why a backend that may be missing cannot serve the device; None if it does, or has to."""
    if backend not in _OPTIONAL:
        return None
    from sam_kernels.backends import get

    return get(backend).refusal(_small_group(device))


def _small_group(device: torch.device) -> Any:
    from sam_kernels.tensor_groups import EUCLIDEAN, TensorGroup

    return TensorGroup([torch.ones(1, device=device)], [0], [(0, EUCLIDEAN, 0.0)])


def withheld(peer: str, session: Session) -> str | None:
    """Why one of our backends is not measured in this stage, or None; other peers are none of it."""
    for backend in session.gpu.backends:
        if peer == key(backend) and backend not in session.backends:
            return absence(backend, session.gpu.device) or "stage 2 has not passed it"
    return None


def beside(rows: list[Row], peers: dict[str, str], against: str) -> list[Row]:
    """Times of peers over those of the ones they stand beside, round by round: 1.1 is a tenth slower.

    Args:
        rows: measured together.
        peers: which peer stands beside which.
        against: how the metric calls the latter.
    """
    found = {(row["peer"], row["metric"]): row for row in rows if row["metric"] in _ROUNDS}
    return [
        {
            "peer": peer,
            "metric": f"{metric.removesuffix('_ms')}_to_{against}",
            **divided(found[peer, metric], found[other, metric]),
        }
        for peer, other in peers.items()
        for metric in _ROUNDS
        if (peer, metric) in found and (other, metric) in found
    ]
