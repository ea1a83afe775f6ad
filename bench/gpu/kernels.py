"""Stage 3: every pass by itself over the lists of known models, held against the measured ceilings.

All backends take part in the same rounds; a row names its own, as "triton perturb_".
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..records import Row, measured, single
from ..timing import Contestant, interleave
from . import floor, masked, selection
from .lists import CASES, numel
from .ours import named
from .session import Session, Unit
from .sets import (
    LAYOUTS,
    LISTS,
    PASSES,
    SECONDS,
    Layout,
    Set,
    ahead_of_device,
    beside_first,
    fitting,
    in_graph,
    refused,
)

# Lists a pass needs that may be too many.
_NEEDS = {"descend_ adamw": 5, "descend_ sgd": 4}

# A list that half fits the L2 is measured twice: the same one again and again, and several in turn.
_MOST_SETS = 4

# What `_least` counts: calls of a pass in all ways it is timed, and bytes of an fp32 parameter.
_CALLS, _BYTES_OF_A_PASS, _SLOW_RATE = 40, 16, 2e12


def units(session: Session) -> Iterator[Unit]:
    for case in CASES:
        least = _least(case, session)
        for layout in LAYOUTS:
            yield Unit(f"kernels/{case}/{layout.name}", partial(measure, case, layout), least)
        yield Unit(f"kernels/{case}/masked", partial(masked.measure, case), least)
        yield Unit(f"kernels/{case}/selection", partial(selection.measure, case), least)
    yield from floor.units()


def _least(case: str, session: Session) -> float:
    """Seconds: the rounds, and on long lists the bytes of the fewest rounds there are."""
    if session.cap is not None:
        return 15
    calls = _CALLS * len(PASSES) * len(session.backends)
    return 15 + calls * _BYTES_OF_A_PASS * numel(CASES[case].shapes(None)) / _SLOW_RATE


def sets_for(list_bytes: int, l2_bytes: int) -> int:
    """How many sets of lists in turn keep the L2 out of the result."""
    return max(1, min(_MOST_SETS, -(-4 * l2_bytes // max(1, list_bytes))))


def measure(case: str, layout: Layout, session: Session) -> list[Row]:
    gpu = session.gpu
    shapes = CASES[case].shapes(session.cap)
    elements = numel(shapes)
    free = gpu.free_bytes()
    lists = fitting(layout, elements, free)
    about = {"case": case, "dtype": layout.name, "tensors": len(shapes), "numel": elements}
    if lists < 3:
        return [{**about, **refused(case, sum(layout.sizes[:3]) * elements, session)}]
    sets = [Set(shapes, layout, session, lists)]
    wanted = sets_for(elements * layout.dtype.itemsize, gpu.l2_bytes)
    while len(sets) < wanted and fitting(layout, (len(sets) + 1) * elements, free) == LISTS:
        sets.append(Set(shapes, layout, session, lists))
    rows = [
        single(named(backend, name), "skipped", f"{need} lists do not fit the memory that is free")
        for backend in session.backends
        for name, need in _NEEDS.items()
        if need > lists
    ]
    rows += _timed(sets, layout, elements, session)
    return [{**about, "sets": len(sets), **row} for row in rows]


def _timed(sets: list[Set], layout: Layout, elements: int, session: Session) -> list[Row]:
    """Milliseconds of one pass over sets in turn, eager and in a graph; where there are more, over one."""
    contestants: dict[str, Contestant] = {}
    for backend in session.backends:
        calls = [one.calls(backend) for one in sets]
        for name in calls[0]:
            turn = [found[name] for found in calls]
            contestants[f"{name}/eager"] = ahead_of_device(turn, "eager_ms", session)
            contestants[f"{name}/graph"] = in_graph(turn, session)
            if len(turn) > 1:
                contestants[f"{name}/again"] = ahead_of_device([turn[0]] * len(turn), "same_list_ms", session)
    rows = []
    for label, parts in interleave(contestants, session.effort(SECONDS)).items():
        name = label.split("/")[0]
        for metric, samples in parts.items():
            count = layout.bytes_of(name.split(" ", 1)[1], elements)
            rows.append(measured(name, metric, [1e3 * s for s in samples], bytes=count))
    return rows + beside_first(rows, PASSES, session)
