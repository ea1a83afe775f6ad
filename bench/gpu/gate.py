"""Stage 4, the gate: what is asked, who may take part, and whether a peer ends where float64 does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import oracle
from ..cases import give_gradients
from ..peers import Spec, Unavailable
from ..records import Row, single
from .lists import DeviceBase, DeviceWorkspace, base_for
from .ours import OURS, withheld
from .session import Session, Unfinished

_WARMUP, _REPLAYS = 3, 3

_MOST_REFERENCED = 30_000_000  # elements; the reference backend is for reading and checking


@dataclass(frozen=True)
class Question:
    """What is measured together: a list, a base, and either torch.compile or everybody else."""

    case: str
    base: str
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def name(self) -> str:
        last = "/compiled" if self.compiled else ""
        return f"phase/{self.case}/{self.base}/{str(self.dtype)[6:]}{last}"


QUESTIONS = (
    Question("resnet50", "sgd"),
    Question("vit_l", "adamw"),
    Question("gpt2_xl", "adamw"),
    Question("resnet50", "adamw"),
    Question("vit_l", "adamw", torch.bfloat16),
    Question("resnet50", "sgd", compiled=True),
    Question("vit_l", "adamw", compiled=True),
)


def refusal(question: Question, spec: Spec, elements: int, session: Session) -> str | None:
    """Why a peer takes no part here, or None."""
    if spec.key == "ours_reference" and elements > _MOST_REFERENCED:
        return "it is for reading and checking, and is checked on smaller lists"
    if (spec.kind == "compiled") != question.compiled and spec.key not in OURS:
        return "it has a unit of its own" if spec.kind == "compiled" else "only torch.compile stands here"
    return withheld(spec.key, session)


def bytes_needed(question: Question, elements: int) -> int:
    """The float64 trajectory of the gate beside the workspace, and lists that peers make for themselves."""
    slots = len(base_for(question.base, counts_on_device=False).slots)
    trajectory, workspace, spare = 8 * (3 + slots), 4 + slots, 5
    return elements * (trajectory + question.dtype.itemsize * (workspace + spare))


def base_of(question: Question, spec: Spec, graph: bool = False) -> DeviceBase:
    """The base as this peer wants it: fused, native and compiled updates count their steps on the device."""
    on_device = spec.form in ("fused", "whole")
    return base_for(question.base, counts_on_device=on_device, capturable=graph and spec.kind != "compiled")


def make(question: Question, spec: Spec, workspace: DeviceWorkspace, graph: bool = False) -> Any:
    """The peer on the workspace's tensors."""
    # A compiled half makes its step counter on the default device; on the host it would be a copy each step.
    with workspace.device if spec.kind == "compiled" else nullcontext():
        return spec.make(workspace.parameters(), base_of(question, spec, graph), workspace.slots)


def admit(
    question: Question, spec: Spec, workspace: DeviceWorkspace, truth: oracle.Trajectory, session: Session
) -> tuple[list[Row], Any]:
    """Rows about a peer, and the peer itself if the gate let it pass."""
    rows: list[Row] = []
    workspace.reset()
    try:
        peer, errors, seconds = _walk(question, spec, workspace, truth, session)
    except Unavailable as reason:
        session.log(f"  skipped  {spec.label}: {reason}")
        return [single(spec.key, "skipped", str(reason))], None
    except Exception as error:  # a broken peer must not cost the others their numbers
        if session.gpu.is_lost():
            raise
        problem = f"raised {type(error).__name__}: {error}"
        session.log(f"  WRONG    {spec.label}: {problem}")
        return [single(spec.key, "wrong", problem)], None
    rows += [single(spec.key, "first_call_ms", 1e3 * seconds), single(spec.key, "error", max(errors))]
    allowed = oracle.tolerance(workspace.dtype, spec.norm_error)
    if max(errors) <= allowed:
        return rows, peer
    problem = f"weights are off by {max(errors):.2g} of their size; allowed is {allowed:.2g}"
    session.log(f"  WRONG    {spec.label}: {problem}")
    return [*rows, single(spec.key, "wrong", problem)], None


def _walk(
    question: Question, spec: Spec, workspace: DeviceWorkspace, truth: oracle.Trajectory, session: Session
) -> tuple[Any, list[float], float]:
    """The gate's steps: the peer, its errors at both stops, the seconds of construction and first step."""
    began = time.perf_counter()
    peer = make(question, spec, workspace)
    params = peer.params
    errors: list[float] = []
    lasted = 0.0
    for step in range(oracle.STEPS):
        first, second = oracle.gradients_of_step(workspace, step)
        give_gradients(params, first)
        peer.step_phase1()
        if step == oracle.STEPS - 1 and spec.kind != "bound":
            errors.append(truth.perturbed.error(params))
        give_gradients(params, second)
        peer.step_phase2()
        if step == 0:
            session.gpu.synchronize()
            lasted = time.perf_counter() - began
    errors.append(truth.descended.error(params))
    return peer, errors, lasted


Parts = tuple[Callable[[], object], ...]


def parts_of(peer: Any, workspace: DeviceWorkspace, is_in_place: bool = False) -> Parts:
    """A whole step in four parts: gradients are placed, the first half, gradients again, the second half.

    A backward pass leaves its gradients in ``.grad``; that we put them there is no part of a step.
    """
    second = workspace.first if is_in_place else workspace.second
    return (
        partial(give_gradients, peer.params, workspace.first),
        peer.step_phase1,
        partial(give_gradients, peer.params, second),
        peer.step_phase2,
    )


def one_step(peer: Any, workspace: DeviceWorkspace, is_in_place: bool = False) -> Callable[[], None]:
    """A whole step as one call, with the workspace's gradients, or with the first ones twice: in one place.

    Where gradients are depends on the program: zero_grad(set_to_none=False) and graphs keep them in place.
    """
    return in_turn(*parts_of(peer, workspace, is_in_place))


def in_turn(*parts: Callable[[], object]) -> Callable[[], None]:
    """One after another."""

    def run() -> None:
        for part in parts:
            part()

    return run


def capture(
    question: Question, spec: Spec, workspace: DeviceWorkspace, session: Session
) -> Callable[[], object]:
    """The replay of a captured step.

    Raises:
        Unavailable: if it cannot be captured, or does something else than the eager steps.
    """
    try:
        return _replay(question, spec, workspace, session)
    except Exception as error:  # torch's own errors differ by version
        if session.gpu.is_lost():
            raise
        said = " ".join(str(error).split())[:300]
        session.log(f"  no graph {spec.label}: {said}")
        raise Unavailable(said) from error


def _replay(
    question: Question, spec: Spec, workspace: DeviceWorkspace, session: Session
) -> Callable[[], object]:
    """The replay of a captured step, after it was seen to do what eager steps do."""
    workspace.reset()
    eager = make(question, spec, workspace, graph=True)
    step = one_step(eager, workspace, is_in_place=True)
    for _ in range(_WARMUP + _REPLAYS):
        step()
    want = [p.detach().clone() for p in eager.params]
    del eager, step
    workspace.reset()
    peer = make(question, spec, workspace, graph=True)
    replay = session.gpu.capture(one_step(peer, workspace, is_in_place=True), warmup=_WARMUP)
    for _ in range(_REPLAYS):
        replay()
    session.gpu.synchronize()
    allowed = 8 * torch.finfo(workspace.dtype).eps
    for p, w in zip(peer.params, want, strict=True):
        if p.numel() and not (p.detach() - w).abs().max() <= allowed * w.abs().max():
            raise Unavailable("its replays end elsewhere than its eager steps")
    return _holding(replay, peer)


def _holding(replay: Callable[[], object], peer: Any) -> Callable[[], object]:
    """The replay, with what its addresses belong to kept alive."""

    def run() -> object:
        return replay() if peer is not None else None

    return run


def kept(unit: str, parts: Iterable[list[Row]], session: Session) -> list[Row]:
    """The rows of all parts, or of those before one that raises, which is a row too."""
    rows: list[Row] = []
    try:
        for found in parts:
            rows += found
    except Exception as error:
        if session.gpu.is_lost() or isinstance(error, Unfinished):
            raise
        session.log(f"  WRONG    {unit}: {error}")
        rows.append(single(unit, "wrong", f"raised {type(error).__name__}: {error}"))
    return rows
