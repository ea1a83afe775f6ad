"""Stage 3, what a step costs where there is next to nothing to move: short lists of many tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..cases import Shape
from ..peers import Unavailable
from ..records import Row, measured, single
from ..timing import Contestant, interleave
from .gate import Parts, Question, capture, make, parts_of
from .lists import DeviceWorkspace, base_for
from .ours import NATIVE, OURS, SPECS, beside, withheld
from .session import Session, Unit

SIZES = (1_000, 10_000, 100_000, 1_000_000)
_TENSORS = 161  # as ResNet-50 has
_SECONDS = 2  # of rounds, eager and again in graphs

_QUESTION = Question("floor", "sgd")


def units() -> Iterator[Unit]:
    for elements in SIZES:
        yield Unit(f"floor/{elements}", partial(measure, elements))


def shapes_of(elements: int) -> list[Shape]:
    """As many tensors as ever, all about as long."""
    each, more = divmod(elements, _TENSORS)
    return [(each + (t < more),) for t in range(_TENSORS)]


def measure(elements: int, session: Session) -> list[Row]:
    """Whole steps of our backends, eager with the host's delays and in a graph."""
    base = base_for(_QUESTION.base, counts_on_device=False)
    workspace = DeviceWorkspace(shapes_of(elements), _QUESTION.dtype, base, session.gpu.device)
    rows: list[Row] = []
    eager: dict[str, Contestant] = {}
    graphs: dict[str, Contestant] = {}
    for key in OURS:
        reason = withheld(key, session)
        if reason is not None:
            rows.append(single(key, "skipped", reason))
            continue
        try:
            graphs[key] = _graph(key, workspace, session)
        except Unavailable as said:
            rows.append(single(key, "graph_skipped", str(said)))
        workspace.reset()
        eager[key] = _eager(parts_of(make(_QUESTION, SPECS[key], workspace), workspace, True), session)
    for contestants in (eager, graphs):
        for key, parts in interleave(contestants, session.effort(_SECONDS)).items():
            rows += [measured(key, metric, [1e3 * s for s in seconds]) for metric, seconds in parts.items()]
    first, *others = OURS
    rows += beside(rows, dict.fromkeys(others, first), NATIVE)
    return [{"tensors": _TENSORS, "numel": elements, **row} for row in rows]


def _eager(parts: Parts, session: Session) -> Contestant:
    place, first, _, second = parts

    def run() -> dict[str, float]:
        place()
        return {"eager_ms": sum(session.gpu.laps([first, second]))}

    return run


def _graph(key: str, workspace: DeviceWorkspace, session: Session) -> Contestant:
    replay = capture(_QUESTION, SPECS[key], workspace, session)
    return lambda: {"graph_ms": session.gpu.laps([replay], ahead=50)[0]}
