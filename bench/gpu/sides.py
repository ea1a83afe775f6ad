"""A backend with tensors of one kind, and what its passes are given and leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cases import Shape
from . import compare
from .compare import draw, place

# What a pass with powers writes has the bits of no other machine's: their library functions differ.
POWERS = "powers: "

# What comes before the elements of Adam's update: powers of its betas in double, by the libraries of host and
# device, which may differ by an ulp. Rounded to fp32, as for all weights but float64's, such an ulp is lost
# unless the number lies beside a tie, which the counters and betas here do not (a test looks); in float64 it
# reaches the weights.
_BY_POWERS = "descend_ adam"


def shares_bits(name: str, dtype: torch.dtype) -> bool:
    """Whether what was written under that name has the same bits by the same formulas on host and device."""
    return not (name.startswith(POWERS) or (dtype == torch.float64 and _BY_POWERS in name))


NORM, PEAK = 3.7, 4.0  # of gradients, as if somebody had measured them
SEED, STEP = 0x1234_5678_9ABC_DEF0, 0x8000_0003


@dataclass
class Found:
    """What passes left.

    Attributes:
        elements: lists that depend on each element alone, by what wrote them.
        copies: lists that have the same bits whoever wrote them.
        sums: float64 results of the passes that add up; those of signed numbers as shares of their size.
    """

    elements: dict[str, list[Tensor]] = field(default_factory=dict)
    copies: dict[str, list[Tensor]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """A backend with tensors of one kind, from the same seeds on every device."""

    backend: str
    dtype: torch.dtype
    device: torch.device
    memory: str = "plain"
    shapes: Sequence[Shape] | None = None

    @property
    def engine(self) -> Any:
        from sam_kernels.backends import get

        return get(self.backend)

    def fresh(self, seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        shapes = compare.AWKWARD if self.shapes is None else self.shapes
        return [place(x, self.memory, self.device) for x in draw(shapes, dtype or self.dtype, seed)]

    def scalar(self, value: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=self.device)

    def group(self, *metrics: int, masters: bool = False, missing: Sequence[int] = (2,)) -> Any:
        """Weights, gradients and snapshots; the tensors have rows of the table in turn.

        Args:
            metrics: of the rows.
            masters: fp32 weights in the place of snapshots.
            missing: tensors without a gradient.
        """
        from sam_kernels.tensor_groups import FIXED, TensorGroup

        params = self.fresh(0)
        row = [t % len(metrics) for t in range(len(params))]
        numbers = [_row(i, metric) for i, metric in enumerate(metrics)]
        keys = [(0, metric, numbers[i][1]) for i, metric in enumerate(metrics)]
        group = TensorGroup(params, row, keys)
        group.write_table(numbers)
        group.aim([None if t in missing else g for t, g in enumerate(self.fresh(1))])
        if masters:
            group.set_masters(self.fresh(0, torch.float32))
            group.take_snapshots()
        else:
            takes_part = [
                g is not None and metrics[r] != FIXED for g, r in zip(group.grads, row, strict=True)
            ]
            group.snapshots = [
                s if takes else None for s, takes in zip(self.fresh(2), takes_part, strict=True)
            ]
        return group


def _row(number: int, metric: int) -> tuple[float, ...]:
    """A row of the table in which nothing is neutral, and rows differ in everything."""
    is_odd = float(number % 2)
    eta, rho, eps = 0.01 + 0.3 * number, 0.5 - 0.8 * is_odd, 1e-3 * is_odd
    lr, decay, maximize = 0.1 + 0.1 * number, 0.01 * (1 + number), is_odd
    momentum, dampening, nesterov = (0.9, 0.0, 1.0) if number % 2 else (0.8, 0.1, 0.0)
    adam = (0.9 - 0.1 * is_odd, 0.999, 1e-8, 1.0 - is_odd)
    return (float(metric), eta, rho, eps, lr, decay, maximize, momentum, dampening, nesterov, *adam)


def rows_of() -> dict[str, tuple[int, ...]]:
    from sam_kernels.tensor_groups import ADAPTIVE, EUCLIDEAN, FISHER, FIXED

    return {"plain": (EUCLIDEAN,), "mixed": (EUCLIDEAN, ADAPTIVE, FIXED), "Fisher": (FISHER, ADAPTIVE)}


def descended(side: Side, group: Any, rule: str, **more: Any) -> dict[str, list[Tensor]]:
    """The update from what the group has, and what it left."""
    slots = _slots(side, group, rule)
    side.engine.descend_(group, rule, slots, **more)
    masters = {"masters": group.masters} if group.masters is not None else {}
    state = {name: tensors for name, tensors in slots.items() if name != "fresh"}
    left = {"weights": group.params, **masters, **state}
    return {f"descend_ {rule}: {name}": tensors for name, tensors in left.items()}


def _slots(side: Side, group: Any, rule: str) -> dict[str, list[Any]]:
    kept = group.kept_dtype
    if rule == "sgd":
        fresh = [t % 5 == 0 for t in range(len(group.params))]
        return {"momentum_buffer": side.fresh(3, kept), "fresh": fresh}
    squares = [x.square() for x in side.fresh(4, kept)]
    counters = [side.scalar(2.0, torch.float32) for _ in group.params]
    return {"exp_avg": side.fresh(3, kept), "exp_avg_sq": squares, "step": counters}


def patterns(side: Side) -> dict[str, list[Tensor | None]]:
    """Masks by pattern, made on the CPU so that they are the same on both sides."""
    from sam_kernels.bitmask import pack
    from sam_kernels.selection import has_groups, select_channels, select_groups

    scores = [x.cpu().float() for x in side.fresh(7)]
    single = []
    for t, x in enumerate(scores):
        word = torch.arange(x.numel()).div(64, rounding_mode="floor")
        flat = (torch.randn(x.numel(), generator=torch.Generator().manual_seed(t)) > 0) & (word % 3 != 1)
        mask = torch.empty_like(x, dtype=torch.bool)
        mask.as_strided((x.numel(),), (1,)).copy_(flat | (word % 7 == 3))
        single.append(None if t in (3, 6) else pack(mask))  # dense ones among them
    n_of_m = [select_groups(x, 2, 4) if has_groups(x.shape, 4) else None for x in scores]
    with_elements = [t for t, x in enumerate(scores) if x.numel()]
    chosen = select_channels([scores[t] for t in with_elements], sum(x.numel() for x in scores) // 3)
    channels: list[Tensor | None] = [None] * len(scores)
    for t, words in zip(with_elements, chosen, strict=True):
        channels[t] = words
    found = {"single": single, "n:m": n_of_m, "channels": channels}
    return {name: [None if w is None else w.to(side.device) for w in words] for name, words in found.items()}


def present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if x is not None]
