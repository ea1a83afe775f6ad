"""Stage 4, the peers of jax: in a process of its own beside our backends, everybody by the host's clock.

jax has arrays, streams and an allocator of its own, and torch's events do not see its work. So everybody
here takes several steps and waits for the last, in the same rounds: step by step, and several steps inside
one program (a loop under jit; replays of our graph).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import oracle
from ..peers import UPDATE_BYTES, Unavailable
from ..records import Row, measured, single
from ..timing import Contestant, interleave
from . import apart
from .device import Gpu
from .gate import Question, admit, base_of, capture, in_turn, kept, parts_of
from .lists import CASES, DeviceWorkspace, base_for
from .optax_sam import OptaxSam
from .ours import NATIVE, OURS, SPECS, beside, key, withheld
from .session import Session, Unfinished

OPAQUE, TRANSPARENT = "optax_opaque", "optax_transparent"
LABELS = {OPAQUE: "optax SAM under jit, opaque", TRANSPARENT: "optax SAM under jit, transparent"}

QUESTIONS = (Question("resnet50", "sgd"), Question("vit_l", "adamw"))

_STEPS = 10  # between two waits
_SECONDS = 5  # of rounds
LEAST_SECONDS = 120  # of the stage: XLA compiles two programs for each mode


@dataclass(frozen=True)
class Mode:
    """How optax is asked, and the least bytes of a step per fp32 parameter if XLA fused every leaf.

    An opaque step writes the perturbed weights to another place, so that nothing is saved or restored. A
    transparent call computes both halves whatever the step, and reads and writes the cached weights.
    """

    opaque: bool
    ascent: int
    more: int = 0  # of the second call, beside the update

    def bytes_of(self, base: str) -> int:
        update = UPDATE_BYTES[base, "whole"]
        return self.ascent + self.more + update if self.opaque else 2 * (self.ascent + update + self.more)


MODES = {OPAQUE: Mode(True, ascent=16), TRANSPARENT: Mode(False, ascent=4, more=8)}


def unit_name(question: Question) -> str:
    return f"{question.name}/optax"


def absence() -> str | None:
    """Why there is nothing to measure, or None; jax itself is imported by the other process."""
    missing = [name for name in ("jax", "optax") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def measure(question: Question, session: Session) -> list[Row]:
    """The rows that the other process has written."""
    reason = absence()
    if reason is not None:
        session.log(f"  skipped  optax: {reason}")
        return [single(name, "skipped", reason) for name in MODES]
    if session.left() < LEAST_SECONDS:
        raise Unfinished(f"{session.left():.0f} s are left, and XLA compiles for up to {LEAST_SECONDS}")
    rows, said = apart.run("bench.gpu.jax_peers", unit_name(question), session)
    return [single("optax", "wrong", said)] if rows is None else rows


# ---- in the process of its own ---------------------------------------------------------------------


def main(arguments: list[str] | None = None, gpu: Callable[[], Gpu] = Gpu) -> int:
    questions = {unit_name(question): question for question in QUESTIONS}
    options = apart.parser("bench.gpu.jax_peers", list(questions), __doc__).parse_args(arguments)
    session, question = apart.session_of(options, gpu), questions[options.unit]
    options.rows.write_text(json.dumps(rows_of(question, session)))
    return 0


def rows_of(question: Question, session: Session) -> list[Row]:
    """Whoever passes the gate, in the same rounds."""
    gpu = session.gpu
    base = base_for(question.base, counts_on_device=False)
    workspace = DeviceWorkspace(CASES[question.case].shapes(session.cap), question.dtype, base, gpu.device)
    truth = oracle.trajectory(workspace, base)
    gpu.free_bytes()
    gpu.synchronize()  # jax reads the lists next
    rows: list[Row] = []
    contestants: dict[str, Contestant] = {}
    graphs: dict[str, Contestant] = {}
    for name in MODES:
        try:
            peer = OptaxSam(workspace, base, gpu.device, opaque=MODES[name].opaque)
            found, passed = _gate(name, peer, workspace, truth, session)
        except Unavailable as reason:
            session.log(f"  skipped  {LABELS[name]}: {reason}")
            rows.append(single(name, "skipped", str(reason)))
            continue
        except Exception as error:  # a broken peer must not cost the others their numbers
            if gpu.is_lost():
                raise
            rows.append(single(name, "wrong", f"raised {type(error).__name__}: {error}"))
            session.log(f"  WRONG    {LABELS[name]}: {rows[-1]['value']}")
            continue
        rows += found
        if passed:
            lists = workspace.first, workspace.second
            contestants[name] = _wall(partial(peer.step, *lists), peer.wait, "wall_ms")
            graphs[name] = _several(partial(peer.several, *lists, _STEPS), peer.wait)
    if not contestants:
        return [{**_about(question, workspace), **row} for row in rows]
    rows += _ours(question, workspace, truth, session, contestants, graphs)
    del truth
    rows += kept(
        "optax", (_timed(some, question, workspace, session) for some in (contestants, graphs)), session
    )
    rows += beside(rows, dict.fromkeys((*OURS[1:], *MODES), key(NATIVE)), NATIVE)
    return [{**_about(question, workspace), **row} for row in rows]


def _timed(
    contestants: dict[str, Contestant], question: Question, workspace: DeviceWorkspace, session: Session
) -> list[Row]:
    return [
        measured(name, metric, [1e3 * s for s in seconds], bytes=_bytes(name, question, workspace))
        for name, parts in interleave(contestants, session.effort(_SECONDS)).items()
        for metric, seconds in parts.items()
    ]


def _about(question: Question, workspace: DeviceWorkspace) -> Row:
    about = {"case": question.case, "base": question.base, "dtype": str(question.dtype)[6:]}
    return {**about, "tensors": len(workspace.first), "numel": workspace.numel}


def _gate(
    name: str, peer: Any, workspace: DeviceWorkspace, truth: oracle.Trajectory, session: Session
) -> tuple[list[Row], bool]:
    """The steps of the common gate: perturbed weights of the last step, and the weights after it."""
    errors: list[float] = []
    began = time.perf_counter()
    lasted = 0.0
    for step in range(oracle.STEPS):
        is_last = step == oracle.STEPS - 1
        first, second = oracle.gradients_of_step(workspace, step)
        peer.step(first, second, (lambda w: errors.append(truth.perturbed.error(w))) if is_last else None)
        if step == 0:
            peer.wait()
            lasted = time.perf_counter() - began
    errors.append(truth.descended.error(peer.tensors()))
    rows = [single(name, "first_call_ms", 1e3 * lasted), single(name, "error", max(errors))]
    allowed = oracle.tolerance(workspace.dtype, 2e-3)
    if max(errors) <= allowed:
        return rows, True
    problem = f"weights are off by {max(errors):.2g} of their size; allowed is {allowed:.2g}"
    session.log(f"  WRONG    {LABELS[name]}: {problem}")
    return [*rows, single(name, "wrong", problem)], False


def _ours(
    question: Question,
    workspace: DeviceWorkspace,
    truth: oracle.Trajectory,
    session: Session,
    contestants: dict[str, Contestant],
    graphs: dict[str, Contestant],
) -> list[Row]:
    """Rows of our backends' gate; those that pass it become contestants."""
    gpu, rows = session.gpu, []
    for name in OURS:
        reason = withheld(name, session)
        if reason is not None:
            rows.append(single(name, "skipped", reason))
            continue
        found, peer = admit(question, SPECS[name], workspace, truth, session)
        rows += found
        if peer is None:
            continue
        # Gradients lie where they lie, as the arrays that optax is given.
        place, first, _, second = parts_of(peer, workspace, is_in_place=True)
        contestants[name] = _wall(in_turn(first, second), gpu.synchronize, "wall_ms", place)
        try:
            replay = capture(question, SPECS[name], workspace, session)
        except Unavailable as reason:
            rows.append(single(name, "graph_skipped", str(reason)))
            continue
        graphs[name] = _wall(replay, gpu.synchronize, "wall_graph_ms")
    return rows


def _wall(
    step: Callable[[], object],
    wait: Callable[[], object],
    metric: str,
    before: Callable[[], object] = lambda: None,
) -> Contestant:
    def several() -> None:
        for _ in range(_STEPS):
            step()

    return _several(several, wait, metric, before)


def _several(
    run: Callable[[], object],
    wait: Callable[[], object],
    metric: str = "wall_graph_ms",
    before: Callable[[], object] = lambda: None,
) -> Contestant:
    """Seconds of a step, of several and a wait, after what is no part of them."""

    def contestant() -> dict[str, float]:
        before()
        wait()
        start = time.perf_counter()
        run()
        wait()
        return {metric: (time.perf_counter() - start) / _STEPS}

    return contestant


def _bytes(name: str, question: Question, workspace: DeviceWorkspace) -> float:
    if name in MODES:
        return MODES[name].bytes_of(question.base) * workspace.numel
    return sum(SPECS[name].phase_bytes(base_of(question, SPECS[name]))) * workspace.numel


if __name__ == "__main__":
    sys.exit(main())
