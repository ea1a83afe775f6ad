"""Stage 3: every pass by itself over the lists of known models, held against the measured ceilings.

All backends take part in the same rounds; a row names its own, as "triton perturb_".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..cases import EPS, GRAD_SIZE, RHO, WEIGHT_SIZE, Shape
from ..passes import BYTES
from ..records import Row, measured, single
from ..timing import Contestant, interleave
from .lists import CASES, numel
from .ours import beside, named
from .session import Session, Unit

DTYPES = (torch.float32, torch.bfloat16)
PASSES = ("sq_norm", "perturb_", "restore_", "descend_ sgd", "descend_ adamw")

# Lists a pass needs beside the weights.
_NEEDS = {"descend_ adamw": 5, "descend_ sgd": 4}
_LISTS = 5  # weights, gradients, snapshots and two of state
_SPARE_BYTES = 2 * 2**30

# A list that half fits the L2 is measured twice: the same one again and again, and several in turn.
_MOST_SETS = 4

_LEAST_LEAD = 200  # microseconds

_SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
_ADAM = {"lr": 1e-4, "weight_decay": 0.01}


def units(session: Session) -> Iterator[Unit]:
    for case in CASES:
        for dtype in DTYPES:
            yield Unit(f"kernels/{case}/{str(dtype)[6:]}", partial(measure, case, dtype))


def bytes_of(name: str, dtype: torch.dtype, elements: int) -> float:
    """Bytes a pass has to move, whoever runs it: one read or write of each list it touches."""
    return BYTES[name] * dtype.itemsize / 4 * elements


def sets_for(list_bytes: int, l2_bytes: int) -> int:
    """How many sets of lists in turn keep the L2 out of the result."""
    return max(1, min(_MOST_SETS, -(-4 * l2_bytes // max(1, list_bytes))))


class Set:
    """The lists of one model, and the passes over them as calls without arguments."""

    def __init__(self, shapes: list[Shape], dtype: torch.dtype, session: Session, lists: int) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, session.gpu.device
        self.weights = [w.requires_grad_() for w in self._drawn(WEIGHT_SIZE)]
        self.grads, self.snapshots = self._drawn(GRAD_SIZE), self._drawn(WEIGHT_SIZE)
        self.mean = self._drawn(GRAD_SIZE) if lists >= 4 else []
        # Squares of gradients, and never zero.
        self.square = self._drawn(GRAD_SIZE) if lists >= 5 else []
        for x in self.square:
            x.square_().add_(1e-6)
        # The host counts for backends whose steps are the host's; the native one wants them on the device.
        self.steps = [torch.zeros((), dtype=torch.float32, device=self.device) for _ in shapes]

    def _drawn(self, size: float) -> list[Tensor]:
        return [torch.empty(s, dtype=self.dtype, device=self.device).normal_(0, size) for s in self.shapes]

    def calls(self, name: str) -> dict[str, Callable[[], object]]:
        """The passes of a backend; lists that were not made have none."""
        from sam_kernels.backends import get

        backend = get(name)
        sgd, adam = self._group(_SGD), self._group(_ADAM)
        norm = backend.sq_norm(sgd).sqrt()
        found: dict[str, Callable[[], object]] = {
            "sq_norm": lambda: backend.sq_norm(sgd),
            "perturb_": lambda: backend.perturb_(sgd, norm),
            "restore_": lambda: backend.restore_(sgd),
        }
        if self.mean:
            momentum: dict[str, list[Any]] = {"momentum_buffer": self.mean, "fresh": []}
            found["descend_ sgd"] = lambda: backend.descend_(sgd, "sgd", momentum)
        if self.square:
            moments: dict[str, list[Any]] = {
                "exp_avg": self.mean,
                "exp_avg_sq": self.square,
                "step": self.steps,
            }
            found["descend_ adamw"] = lambda: backend.descend_(adam, "adam", moments)
        return {named(name, what): _without_grad(call) for what, call in found.items()}

    def _group(self, options: dict[str, float]):  # type: ignore[no-untyped-def]
        from sam_kernels.tensor_groups import COLUMNS, EUCLIDEAN, Column, TensorGroup

        group = TensorGroup(list(self.weights), [0] * len(self.weights), [(0, EUCLIDEAN, 0.0)])
        row = [0.0] * COLUMNS
        row[Column.METRIC], row[Column.RHO], row[Column.EPS] = EUCLIDEAN, RHO, EPS
        row[Column.LR], row[Column.WEIGHT_DECAY] = options["lr"], options["weight_decay"]
        row[Column.MOMENTUM] = options.get("momentum", 0.0)
        row[Column.BETA1], row[Column.BETA2], row[Column.ADAM_EPS] = 0.9, 0.999, 1e-8
        row[Column.DECOUPLED] = 1.0
        group.write_table([tuple(row)])
        group.grads, group.snapshots = list(self.grads), list(self.snapshots)
        return group


def _without_grad(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def measure(case: str, dtype: torch.dtype, session: Session) -> list[Row]:
    gpu = session.gpu
    shapes = CASES[case].shapes(session.cap)
    elements = numel(shapes)
    list_bytes = elements * dtype.itemsize
    fitting = int((gpu.free_bytes() - _SPARE_BYTES) // list_bytes)
    about = {"case": case, "dtype": str(dtype)[6:], "tensors": len(shapes), "numel": elements}
    if fitting < 3:
        reason = f"{3 * list_bytes / 2**30:.0f} GiB of lists do not fit the memory that is free"
        session.log(f"  skipped  {reason}")
        return [{**about, **single(case, "skipped", reason)}]
    lists = min(_LISTS, fitting)
    sets = [Set(shapes, dtype, session, lists)]
    wanted = sets_for(list_bytes, gpu.l2_bytes)
    while len(sets) < wanted and (len(sets) + 1) * _LISTS <= fitting:
        sets.append(Set(shapes, dtype, session, lists))
    rows = [
        single(named(backend, name), "skipped", f"{need} lists do not fit the memory that is free")
        for backend in session.backends
        for name, need in _NEEDS.items()
        if need > lists
    ]
    rows += _timed(sets, dtype, elements, session)
    return [{**about, "sets": len(sets), **row} for row in rows]


def _timed(sets: list[Set], dtype: torch.dtype, elements: int, session: Session) -> list[Row]:
    """Milliseconds of one pass over sets in turn, eager and in a graph; where there are more, over one."""
    contestants: dict[str, Contestant] = {}
    for backend in session.backends:
        calls = [one.calls(backend) for one in sets]
        for name in calls[0]:
            turn = [found[name] for found in calls]
            contestants[f"{name}/eager"] = _eager(turn, "eager_ms", session)
            contestants[f"{name}/graph"] = _graph(turn, session)
            if len(turn) > 1:
                contestants[f"{name}/again"] = _eager([turn[0]] * len(turn), "same_list_ms", session)
    rows = []
    for label, parts in interleave(contestants, session.effort(8)).items():
        name = label.split("/")[0]
        for metric, samples in parts.items():
            count = bytes_of(name.split(" ", 1)[1], dtype, elements)
            rows.append(measured(name, metric, [1e3 * s for s in samples], bytes=count))
    first, *others = session.backends
    pairs = {named(other, what): named(first, what) for other in others for what in PASSES}
    return rows + beside(rows, pairs, first)


def _eager(turn: list[Callable[[], object]], metric: str, session: Session) -> Contestant:
    ahead = _lead(turn, session)
    return lambda: {metric: sum(session.gpu.laps(turn, ahead=ahead)) / len(turn)}


def _lead(turn: list[Callable[[], object]], session: Session) -> float:
    """Microseconds by which the host has to be ahead of the device, so that only the device is timed."""

    def all_of() -> None:
        for call in turn:
            call()

    all_of()  # compiles, where that is left to the first call
    host = median(session.gpu.host_seconds(all_of, is_busy=True) for _ in range(3))
    return max(_LEAST_LEAD, 2e6 * host)


def _graph(turn: list[Callable[[], object]], session: Session) -> Contestant:
    def all_of() -> None:
        for call in turn:
            call()

    replay = session.gpu.capture(all_of)
    return lambda: {"graph_ms": session.gpu.laps([replay], ahead=50)[0] / len(turn)}
