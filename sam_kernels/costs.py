"""What a recipe costs: gradients, passes, bytes moved and kept, counted while it takes a few small steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .backends import Backend, Report
from .policies import Anticipated
from .recipe import Recipe
from .tensor_groups import ADAPTIVE, TensorGroup

_SHAPES = ((256, 4), (64,), (128, 8))


@dataclass
class Cost:
    """One step of a recipe.

    Attributes:
        gradients: forward and backward passes.
        passes: calls of each pass of `sam_kernels.backends.Backend`, one launch each.
        bytes: memory traffic of these per parameter, the base optimizer's update included.
        memory: bytes per parameter that are kept beyond parameters, gradients and the base's own state.
    """

    gradients: int = 0
    passes: dict[str, int] = field(default_factory=dict)
    bytes: float = 0.0
    memory: float = 0.0

    @property
    def launches(self) -> int:
        return sum(self.passes.values())


class Counting:
    """A backend that counts what another one is asked for."""

    def __init__(self, backend: Backend, total: int) -> None:
        self.name = backend.name
        self._backend = backend
        self._total = total
        self.cost = Cost()

    def refusal(self, group: TensorGroup) -> str | None:
        return self._backend.refusal(group)

    def __getattr__(self, name: str) -> Any:
        """A pass of the backend, counted."""
        run = getattr(self._backend, name)
        traffic = _TRAFFIC.get(name)
        if traffic is None:
            return run

        def counted(group: TensorGroup, *args: Any, **kwargs: Any) -> Any:
            self.cost.passes[name] = self.cost.passes.get(name, 0) + 1
            self.cost.bytes += traffic(group, *args, **kwargs) / self._total
            return run(group, *args, **kwargs)

        return counted


def cost(
    recipe: Recipe, base: Any = torch.optim.SGD, *, dtype: torch.dtype = torch.float32, **base_kwargs: Any
) -> tuple[Cost, Cost | None]:
    """The cost of a step that perturbs, and of one that does not, None where every step perturbs.

    Args:
        recipe: what to count.
        base: class of the base optimizer (default SGD, with momentum 0.9 unless base_kwargs say otherwise).
        dtype: of the parameters (default float32).
        **base_kwargs: for the base, and for `SAM`, e.g. master_weights.

    Example:
        >>> from sam_kernels import recipes
        >>> cost(recipes.sam())[0].bytes
        40.0
    """
    from .optimizer import SAM  # the optimizer imports recipes, which show costs

    if base is torch.optim.SGD:
        base_kwargs = {"momentum": 0.9, **base_kwargs}
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in _SHAPES]
    named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
    named[1] = ("norm.weight", params[1])
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in _SHAPES]
    opt = SAM(named, base, recipe=recipe, backend="reference", **{"lr": 0.01, **base_kwargs})
    total = sum(p.numel() for p in params)
    taken = {"gradients": 0}

    def closure() -> Tensor:
        taken["gradients"] += 1
        for p, g in zip(params, grads, strict=True):
            p.grad = g + 0.1 * p.detach()
        return torch.zeros(())

    found: dict[bool, Cost] = {}
    looks_ahead = isinstance(recipe.probe, Anticipated)
    for _ in range(12):  # more than one period of any default
        served = [(group, Counting(_plain(backend), total)) for group, backend in opt._groups()]
        opt._served = served  # type: ignore[assignment]
        taken["gradients"] = 0
        opt.step(closure, ahead=closure if looks_ahead else None)
        step = Cost(gradients=taken["gradients"])
        for group, counting in served:
            for name, count in counting.cost.passes.items():
                step.passes[name] = step.passes.get(name, 0) + count
            step.bytes += counting.cost.bytes
            step.memory += group.buffer_bytes() / total
        step.memory += sum(_size(list(own.values())) for own in opt._slots.tensors.values()) / total
        step.memory += opt._masks.nbytes() / total
        perturbs = "perturb_" in step.passes
        if perturbs:  # gradients that are held beyond the ones in `.grad`
            step.memory += dtype.itemsize * (recipe.combine.gradients - 1)
        found[perturbs] = step
    return found.get(True, found.get(False, Cost())), found.get(False) if True in found else None


def table(recipes: dict[str, Callable[[], Recipe]]) -> Report:
    """Lines of costs with SGD-momentum, one for each recipe; see `sam_kernels.recipes.table`."""
    head = ("recipe", "gradients", "launches", "bytes moved", "bytes kept")
    rows: list[tuple[str, ...]] = [head]
    for name, function in recipes.items():
        perturbs, other = cost(function())
        cells = [
            f"{a:g}" if b is None or a == b else f"{a:g} or {b:g}"
            for a, b in zip(_cells(perturbs), _cells(other) if other else [None] * 4, strict=True)
        ]
        rows.append((name, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return Report("\n".join(lines))


def _cells(cost: Cost) -> list[float]:
    return [cost.gradients, cost.launches, round(cost.bytes, 1), round(cost.memory, 1)]


def _plain(backend: Any) -> Backend:
    return backend._backend if isinstance(backend, Counting) else backend


# ---- bytes of each pass ----------------------------------------------------------------------------


def _size(tensors: list[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _sq_norm(group: TensorGroup, *, of: str = "gradient", **_: Any) -> float:
    counted = [g if takes else None for g, takes in zip(group.grads, group.participates, strict=True)]
    measured = [
        w if group.keys[r][1] == ADAPTIVE else None for w, r in zip(group.weights, group.row, strict=True)
    ]
    return _size(counted) + (_size(measured) if of == "gradient" else 0)


def _perturb(group: TensorGroup, norm: Tensor, **_: Any) -> float:
    both = [
        (p, s)
        for p, g, s in zip(group.params, group.grads, group.snapshots, strict=True)
        if g is not None and s is not None
    ]
    weights, kept = _size([p for p, _ in both]), _size([s for _, s in both])
    # Gradient and weight are read, weight and snapshot written; a master is read, and the weight is not.
    return 3 * weights + kept if group.masters is None else 2 * weights + kept


def _restore(group: TensorGroup) -> float:
    return _size(group.snapshots) + _size(group.perturbed())


def _grad_stats(group: TensorGroup, lists: list[list[Any]], **_: Any) -> float:
    return sum(map(_size, lists))


def _combine(
    group: TensorGroup, outs: list[list[Any]], lists: list[list[Any]], coefficients: Tensor
) -> float:
    used = (coefficients != 0).flatten(0, -2).any(0).tolist()
    written = [any(out[t] is not None for out in outs) for t in range(len(group.params))]
    read = sum(
        _size([x if writes else None for x, writes in zip(own, written, strict=True)])
        for own, is_used in zip(lists, used, strict=True)
        if is_used
    )
    return read + sum(map(_size, outs))


def _noise(group: TensorGroup, outs: list[Any], *_: Any) -> float:
    return _size(outs)


def _mark(group: TensorGroup, ranks: Any, masks: list[Any], **_: Any) -> float:
    return sum(words.numel() * 8 for words in masks if words is not None)


def _descend(group: TensorGroup, rule: str, slots: dict[str, list[Any]], **_: Any) -> float:
    moved = [p if g is not None else None for p, g in zip(group.params, group.grads, strict=True)]
    state = ("momentum_buffer",) if rule == "sgd" else ("exp_avg", "exp_avg_sq")
    masters = [] if group.masters is None else group.snapshots
    # Gradient and weight are read, the weight is written; with masters it is only written, and they are both.
    weights = 3 * _size(moved) if group.masters is None else 2 * _size(moved) + 2 * _size(masters)
    return weights + 2 * sum(_size(slots[name]) for name in state)


_TRAFFIC: dict[str, Callable[..., float]] = {
    "sq_norm": _sq_norm,
    "perturb_": _perturb,
    "restore_": _restore,
    "grad_stats": _grad_stats,
    "combine_": _combine,
    "noise_": _noise,
    "mark_": _mark,
    "descend_": _descend,
}
