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
from . import host_time, jax_peers, launch_counts
from .gate import QUESTIONS, Parts, Question, admit, base_of, bytes_needed, capture, kept, parts_of, refusal
from .lists import CASES, DeviceWorkspace, base_for, numel
from .ours import NATIVE, OURS, SPECS, beside
from .session import Session, Unfinished, Unit

_COMPILE_SECONDS = 240  # torch.compile of both halves twice; less time left than that and it is not begun

# What `_least` counts: peers times their steps in gate, rounds and host time; their bytes per fp32 parameter.
_STEPS_OF_ALL, _BYTES_OF_A_STEP, _SLOW_RATE, _FIXED_SECONDS = 11 * 60, 100, 2e12, 40

# Peers that are captured in a graph, what is least sure to succeed last: a capture that fails may spoil
# those after it. The others are not tried: eager SAM swaps p.data, so that a replay would start from the
# perturbed weights, and the rest may look at the device from the host.
_GRAPHED = (*OURS, "base_alone", "foreach", "compile_own", "compile_torch")


def units(session: Session) -> Iterator[Unit]:
    for question in QUESTIONS:
        yield Unit(question.name, partial(_measure, question), least=_least(question, session))
    # After the others, and in processes of their own: jax keeps the memory it once had.
    for question in jax_peers.QUESTIONS:
        unit = jax_peers.unit_name(question)
        yield Unit(unit, partial(jax_peers.measure, question), least=jax_peers.LEAST_SECONDS)


def _least(question: Question, session: Session) -> float:
    """Seconds: rounds and host time, which are the same for all, and the bytes of every peer's steps."""
    if question.compiled:
        return _COMPILE_SECONDS
    if session.cap is not None:
        return 15
    elements = numel(CASES[question.case].shapes(None))
    moved = _STEPS_OF_ALL * _BYTES_OF_A_STEP * question.dtype.itemsize / 4 * elements
    return _FIXED_SECONDS + moved / _SLOW_RATE


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
    keys = list(peers)
    about = {"case": question.case, "base": question.base, "dtype": str(question.dtype)[6:]}
    about |= {"tensors": len(shapes), "numel": workspace.numel}
    rows += kept(question.name, _timings(peers, question, workspace, session), session)
    torch._dynamo.reset()
    peers.clear()
    peer = None
    del workspace
    # After all timing, which a profiler would slow down.
    if keys:
        rows += launch_counts.rows_for(question, keys, session)
    return [{**about, **row} for row in rows]


def _timings(
    peers: dict[str, Any], question: Question, workspace: DeviceWorkspace, session: Session
) -> Iterator[list[Row]]:
    yield host_time.rows_of(peers, workspace, session)
    yield (eager := _eager(peers, question, workspace, session))
    peers.clear()
    session.gpu.free_bytes()
    yield _graphed(question, workspace, session, {r["peer"] for r in eager if r["metric"] == "eager_ms"})


def _eager(
    peers: dict[str, Any], question: Question, workspace: DeviceWorkspace, session: Session
) -> list[Row]:
    """Milliseconds of eager steps by the device's clock, interleaved, the host's delays included.

    Of the four parts of a step the halves count, and not the placing of gradients.
    """
    gpu = session.gpu

    def contestant(parts: Parts) -> Contestant:
        place, *rest = parts

        def run() -> dict[str, float]:
            place()
            first, _, second = gpu.laps(rest)
            return {"eager_ms": first + second}

        return run

    contestants = {key: contestant(parts_of(peer, workspace)) for key, peer in peers.items()}
    contestants[COPY] = _copy(question, workspace, session, "eager_ms")
    return _timed(interleave(contestants, session.effort(8)), question, workspace)


def _copy(question: Question, workspace: DeviceWorkspace, session: Session, metric: str) -> Contestant:
    """The bytes of our step as plain copies: what the memory allows."""
    count = _bytes(OURS[0], question, workspace)
    # A copy reads and writes; vectors beyond 2 GiB would only take memory from the peers.
    elements = max(1, min(int(count / 8), 2**29))
    # Random numbers, as in lists: a card draws less power for constants, and may run faster.
    out, x = (torch.empty(elements, device=session.gpu.device).normal_() for _ in range(2))
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
