"""The lists of a model and the passes over them as calls: what stage 3 times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..cases import EPS, GRAD_SIZE, RHO, WEIGHT_SIZE, Shape
from ..passes import BYTES
from ..records import Row, single
from ..timing import Contestant
from .gate import in_turn
from .ours import beside, named
from .session import Session

PASSES = ("sq_norm", "perturb_", "restore_", "descend_ sgd", "descend_ adamw")

LISTS = 5  # weights, gradients, snapshots; momentum or mean; squares
SECONDS = 6  # of rounds, for each unit
_SPARE_BYTES = 2 * 2**30
_LEAST_LEAD = 200  # microseconds

_SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
_ADAM = {"lr": 1e-4, "weight_decay": 0.01}

# Weights and gradients take two bytes, masters and state four.
_MASTER_BYTES = {"sq_norm": 2, "perturb_": 8, "restore_": 6, "descend_ sgd": 20, "descend_ adamw": 28}


@dataclass(frozen=True)
class Layout:
    """The types of a model's lists.

    Attributes:
        dtype: of weights and gradients, and of everything where there are no masters.
        has_masters: whether fp32 masters stand where snapshots would, with fp32 state.
    """

    dtype: torch.dtype
    has_masters: bool = False

    @property
    def name(self) -> str:
        return str(self.dtype)[6:] + ("+master" if self.has_masters else "")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of an element in each of the lists."""
        kept = 4 if self.has_masters else self.dtype.itemsize
        return (self.dtype.itemsize,) * 2 + (kept,) * (LISTS - 2)

    def bytes_of(self, name: str, elements: int) -> float:
        """Bytes a pass has to move, whoever runs it: one read or write of each list it touches."""
        counted = _MASTER_BYTES[name] if self.has_masters else BYTES[name] * self.dtype.itemsize / 4
        return counted * elements


LAYOUTS = (Layout(torch.float32), Layout(torch.bfloat16), Layout(torch.bfloat16, has_masters=True))


def fitting(layout: Layout, elements: int, free: int, extra: int = 0) -> int:
    """How many of the lists fit the free memory, beside `extra` bytes."""
    room = free - _SPARE_BYTES - extra
    return sum(elements * sum(layout.sizes[: n + 1]) <= room for n in range(LISTS))


class Set:
    """The lists of one model, and the passes over them as calls without arguments."""

    def __init__(self, shapes: list[Shape], layout: Layout, session: Session, lists: int = LISTS) -> None:
        self.shapes, self.layout, self.device = shapes, layout, session.gpu.device
        kept = torch.float32 if layout.has_masters else layout.dtype
        self.snapshots = self._drawn(WEIGHT_SIZE, kept)
        self.weights = [s.to(layout.dtype, copy=True).requires_grad_() for s in self.snapshots]
        self.grads = self._drawn(GRAD_SIZE, layout.dtype)
        self.mean = self._drawn(GRAD_SIZE, kept) if lists >= 4 else []
        # Squares of gradients, and never zero.
        self.square = self._drawn(GRAD_SIZE, kept) if lists >= 5 else []
        for x in self.square:
            x.square_().add_(1e-6)
        # The host counts for backends whose steps are the host's; the native one wants them on the device.
        self.steps = [torch.zeros((), dtype=torch.float32, device=self.device) for _ in shapes]

    def _drawn(self, size: float, dtype: torch.dtype) -> list[Tensor]:
        return [torch.empty(s, dtype=dtype, device=self.device).normal_(0, size) for s in self.shapes]

    def calls(self, name: str, masks: list[Tensor] | None = None) -> dict[str, Callable[[], object]]:
        """The passes of a backend, under masks if there are any; lists that were not made have none."""
        from sam_kernels.backends import get

        backend = get(name)
        sgd, adam = self._group(_SGD, masks), self._group(_ADAM, masks)
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

    def _group(self, options: dict[str, float], masks: list[Tensor] | None):  # type: ignore[no-untyped-def]
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
        if self.layout.has_masters:
            group.set_masters(list(self.snapshots))
        if masks is not None:
            group.set_masks(list(masks))
        return group


def _without_grad(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def ahead_of_device(turn: list[Callable[[], object]], metric: str, session: Session) -> Contestant:
    """Eager calls, the host so far ahead of the device that the device alone is timed."""
    all_of = in_turn(*turn)
    all_of()  # compiles, where that is left to the first call
    host = median(session.gpu.host_seconds(all_of, is_busy=True) for _ in range(3))
    ahead = max(_LEAST_LEAD, 2e6 * host)
    return lambda: {metric: sum(session.gpu.laps(turn, ahead=ahead)) / len(turn)}


def in_graph(turn: list[Callable[[], object]], session: Session) -> Contestant:
    replay = session.gpu.capture(in_turn(*turn))
    return lambda: {"graph_ms": session.gpu.laps([replay], ahead=50)[0] / len(turn)}


def refused(case: str, needed: int, session: Session) -> Row:
    reason = f"{needed / 2**30:.0f} GiB of lists do not fit the memory that is free"
    session.log(f"  skipped  {reason}")
    return single(case, "skipped", reason)


def beside_first(rows: list[Row], names: tuple[str, ...], session: Session) -> list[Row]:
    """Every other backend beside the first one."""
    first, *others = session.backends
    return beside(rows, {named(other, what): named(first, what) for other in others for what in names}, first)
