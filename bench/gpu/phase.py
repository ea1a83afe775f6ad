"""Stage 4: the optimizer phase of a SAM step against the peers of the CPU benchmark, on the device.

Every peer passes the same gate as there (float64 trajectory, seeded gradients). A graph is timed only
if its replays end where the peer's own eager steps end. Each of our backends is a peer, in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from .. import oracle
from ..peers import COPY, Unavailable
from ..records import Row, measured, single
from ..timing import Contestant, interleave
from . import jax_peers
from .device import QUEUE, median_of
from .gate import Question, admit, base_of, bytes_needed, capture, one_step, refusal
from .lists import CASES, DeviceWorkspace, base_for, numel
from .ours import NATIVE, OURS, SPECS, beside
from .session import Session, Unfinished, Unit

_COMPILE_SECONDS = 240  # torch.compile of both halves twice; less time left than that and it is not begun

# Peers that are captured in a graph, what is least sure to succeed last: a capture that fails may spoil
# those after it. The others are not tried: eager SAM swaps p.data, so that a replay would start from the
# perturbed weights, and the rest may look at the device from the host.
_GRAPHED = (*OURS, "base_alone", "foreach", "compile_own", "compile_torch")


QUESTIONS = (
    Question("resnet50", "sgd"),
    Question("vit_l", "adamw"),
    Question("gpt2_xl", "adamw"),
    Question("resnet50", "adamw"),
    Question("vit_l", "adamw", torch.bfloat16),
    Question("resnet50", "sgd", compiled=True),
    Question("vit_l", "adamw", compiled=True),
)


def units(session: Session) -> Iterator[Unit]:
    for question in QUESTIONS:
        yield Unit(question.name, partial(_measure, question))
    # After the others, and in processes of their own: jax keeps the memory it once had.
    for question in jax_peers.QUESTIONS:
        yield Unit(jax_peers.unit_name(question), partial(jax_peers.measure, question))


def _measure(question: Question, session: Session) -> list[Row]:
    if question.compiled and session.left() < _COMPILE_SECONDS:
        raise Unfinished(f"{session.left():.0f} s are left, and compiling takes up to {_COMPILE_SECONDS}")
    shapes = CASES[question.case].shapes(session.cap)
    needed, free = bytes_needed(question, numel(shapes)), session.gpu.free_bytes()
    if needed > free:
        said = f"gate and peers take {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
        session.log(f"  skipped  {said}")
        return [single("everybody", "skipped", said)]
    workspace = DeviceWorkspace(
        shapes, question.dtype, base_for(question.base, counts_on_device=False), session.gpu.device
    )
    truth = oracle.trajectory(workspace, base_for(question.base, counts_on_device=False))
    session.gpu.free_bytes()
    rows: list[Row] = []
    peers: dict[str, Any] = {}
    for key, spec in SPECS.items():
        reason = refusal(question, spec, workspace.numel, session)
        if reason is None:
            found, peer = admit(question, spec, workspace, truth, session)
            rows += found
            if peer is not None and key != "ours_reference":  # it is for reading and checking
                peers[key] = peer
        elif (spec.kind == "compiled") == question.compiled or key in OURS:
            rows.append(single(key, "skipped", reason))
    del truth
    rows += _counted(peers, workspace, session)
    rows += _eager(peers, question, workspace, session)
    peers.clear()
    session.gpu.free_bytes()
    rows += _graphed(
        question, workspace, session, {row["peer"] for row in rows if row["metric"] == "eager_ms"}
    )
    torch._dynamo.reset()
    about = {"case": question.case, "base": question.base, "dtype": str(question.dtype)[6:]}
    return [{**about, "tensors": len(shapes), "numel": workspace.numel, **row} for row in rows]


def _counted(peers: dict[str, Any], workspace: DeviceWorkspace, session: Session) -> list[Row]:
    """Launches, host time and extra memory of a step; of ours the first two also with gradients in place."""
    rows = []
    for key, peer in peers.items():
        step = one_step(peer, workspace)
        rows += _host(key, step, "", session)
        if key in OURS:
            rows += _host(key, one_step(peer, workspace, is_in_place=True), "_in_place", session)
        # What it keeps between steps was made before; what comes on top is measured.
        rows.append(single(key, "peak_extra_bytes", session.gpu.peak_extra(step) + _held(peer)))
    return rows


def _host(key: str, step: Callable[[], None], suffix: str, session: Session) -> list[Row]:
    """Launches and host time of a step."""
    gpu = session.gpu
    step()
    launches = gpu.launches(step)
    # More launches than a busy device takes would make the host wait for it.
    is_busy = launches is not None and launches <= QUEUE
    host = [1e6 * s for s in median_of(lambda: gpu.host_seconds(step, is_busy), 20)]
    return [
        single(key, f"launches{suffix}", launches),
        measured(key, f"host_us{suffix}", host, device="busy" if is_busy else "idle"),
    ]


def _held(peer: Any) -> int:
    """Bytes of buffers that a peer keeps between steps, as far as it shows them."""
    buffers = getattr(peer, "snapshots", None)
    if buffers is None and hasattr(peer, "optimizer") and hasattr(peer.optimizer, "_groups"):
        buffers = [x for group, _ in peer.optimizer._groups() for x in group.standing_snapshots or []]
    return sum(x.numel() * x.element_size() for x in buffers or [])


def _eager(
    peers: dict[str, Any], question: Question, workspace: DeviceWorkspace, session: Session
) -> list[Row]:
    """Milliseconds of eager steps by the device's clock, interleaved, the host's delays included."""
    gpu = session.gpu

    def contestant(step: Callable[[], None]) -> Contestant:
        return lambda: {"eager_ms": gpu.laps([step])[0]}

    contestants = {key: contestant(one_step(peer, workspace)) for key, peer in peers.items()}
    contestants[COPY] = _copy(question, workspace, session, "eager_ms")
    return _timed(interleave(contestants, session.effort(8)), question, workspace)


def _copy(question: Question, workspace: DeviceWorkspace, session: Session, metric: str) -> Contestant:
    """The bytes of our step as plain copies: what the memory allows."""
    count = _bytes(OURS[0], question, workspace)
    # A copy reads and writes; vectors beyond 2 GiB would only take memory from the peers.
    elements = max(1, min(int(count / 8), 2**29))
    out, x = (torch.zeros(elements, device=session.gpu.device) for _ in range(2))
    times = max(1, round(count / (8 * elements)))
    scale = count / (8 * elements * times)

    def run() -> None:
        for _ in range(times):
            out.copy_(x)

    return lambda: {metric: session.gpu.laps([run], ahead=50)[0] * scale}


def _bytes(key: str, question: Question, workspace: DeviceWorkspace) -> float:
    spec = SPECS[OURS[0] if key == COPY else key]
    first, second = spec.phase_bytes(base_of(question, spec), workspace.dtype.itemsize)
    return (first + second) * workspace.numel


def _timed(
    samples: dict[str, dict[str, list[float]]], question: Question, workspace: DeviceWorkspace
) -> list[Row]:
    """Rows of samples, and ours beside the native one."""
    rows = [
        measured(key, metric, [1e3 * s for s in seconds], bytes=_bytes(key, question, workspace))
        for key, parts in samples.items()
        for metric, seconds in parts.items()
    ]
    first, *others = OURS
    return rows + beside(rows, dict.fromkeys(others, first), NATIVE)


def _graphed(question: Question, workspace: DeviceWorkspace, session: Session, passed: set[str]) -> list[Row]:
    """Milliseconds of replayed steps; gradients are in one place, as those of a captured backward are."""
    gpu, rows = session.gpu, []
    replays: dict[str, Callable[[], object]] = {}
    for key in (key for key in _GRAPHED if key in passed):
        try:
            replays[key] = capture(question, SPECS[key], workspace, session)
        except Unavailable as reason:
            rows.append(single(key, "graph_skipped", str(reason)))

    def contestant(replay: Callable[[], object]) -> Contestant:
        return lambda: {"graph_ms": gpu.laps([replay], ahead=50)[0]}

    if replays:
        contestants = {key: contestant(replay) for key, replay in replays.items()}
        contestants[COPY] = _copy(question, workspace, session, "graph_ms")
        rows += _timed(interleave(contestants, session.effort(6)), question, workspace)
    return rows
