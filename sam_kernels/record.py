"""What a step says about itself: losses and norms, as tensors on the device, for whoever logs them.

note: [free metrics]

A step measures a norm anyway. Where that is the norm of the whole first gradient, ``grad_norm`` is it; and
where all perturbed weights share one rho and one Euclidean ball, ``perturbation_norm`` follows from it. Both
cost nothing then, and small operations on two numbers when somebody looks. ``SAM(..., metrics=True)`` has
them measured for every recipe: one more pass reads the gradients, and one the weights and snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import perturbation
from .backends.reference import mask_of
from .perturbation import Measure, Served
from .policies import (
    Anticipated,
    ByModule,
    ByName,
    Dense,
    Euclidean,
    Gradient,
    Lookbehind,
    MultiStep,
    RandomStart,
    Sparse,
)
from .recipe import Recipe
from .tensor_groups import EUCLIDEAN, FIXED, number

if TYPE_CHECKING:
    from .optimizer import SAM


@dataclass
class Record:
    """The step so far; scalars are 0-d tensors, and several where micro-batches perturb by themselves.

    Attributes:
        losses: by probe, the numbers that closures returned.
        grads: norms of first gradients.
        ascents: the norm that an ascent divided by, and its rho, where they tell how far it went.
        moves: how far weights were moved, where that was measured.
        scale: of the gradients that were measured; None for 1.
    """

    losses: dict[int, list[Tensor | float | None]] = field(default_factory=dict)
    grads: list[Tensor] = field(default_factory=list)
    ascents: list[tuple[Tensor, Any, float]] = field(default_factory=list)
    moves: list[Tensor] = field(default_factory=list)
    scale: Tensor | None = None
    index: int = 0  # of a param group that has this rho

    def note_losses(self, probe: int, losses: Sequence[Any]) -> None:
        """What the closures of a pass returned: no graphs, and None in place of what is not one number."""
        self.losses.setdefault(probe, []).extend(map(_number_of, losses))

    def note_gradient(self, served: Served, scale: Tensor | None) -> None:
        """Measure the gradients that the groups have read: those of the first pass."""
        self.grads.append(perturbation.squares(served).sqrt())
        self.scale = scale

    def note_ascent(self, opt: SAM, served: Served, found: Measure, scale: Tensor | None) -> None:
        """Take from the first ascent what it tells for free; see note [free metrics]."""
        recipe = opt.recipe
        metrics = {metric for group, _ in served for _, metric, _ in group.keys}
        if not isinstance(recipe.metric, Euclidean) or recipe.metric.p != 2 or metrics - {EUCLIDEAN, FIXED}:
            return
        if isinstance(recipe.direction, Gradient) and _sees_all(recipe, metrics):
            self.grads.append(found.norm)
            self.scale = scale
        rhos = {index: number(opt.param_groups[index][opt._rho_key]) for index in _indices(served)}
        first = next(iter(rhos.values()))
        is_one = all(rho is first or (not isinstance(rho, Tensor) and rho == first) for rho in rhos.values())
        is_one_ascent = not isinstance(recipe.probe, MultiStep | RandomStart | Lookbehind)
        is_whole = isinstance(recipe.mask, Dense | ByName | ByModule)
        if is_one and is_one_ascent and is_whole:
            self.ascents.append((found.norm, first, recipe.eps))
            self.index = next(iter(rhos))

    def know_scale(self, scale: Tensor | None, is_scaled: bool) -> None:
        """In the two-step form, after the second backward: the scale of the gradients that were measured.

        Where `unscale_` was called in between, nobody can tell any more, and the norm is dropped.
        """
        self.scale = scale
        if is_scaled and scale is None:
            self.grads.clear()

    def refresh(self, opt: SAM) -> None:
        """After the replay of a graph: its tensors are new by themselves, and rho is that of the replay."""
        rho = number(opt.param_groups[self.index][opt._rho_key])
        self.ascents = [(norm, rho, eps) for norm, _, eps in self.ascents]

    def note_move(self, served: Served, is_first: bool) -> None:
        """Measure how far the weights are from their snapshots."""
        sums = [_moved(group) for group, _ in served]
        if not is_first:
            self.moves.pop()
        self.moves.append(perturbation.total_of(served, sums).sqrt())

    def tensors(self, recipe: Recipe) -> dict[str, Tensor]:
        """What `SAM.metrics` returns."""
        found: dict[str, Tensor] = {}
        # Of a batch that was anticipated, the first pass has number 1.
        first = _total(self.losses[min(self.losses)]) if self.losses else None
        if first is not None:
            found["loss"] = first.clone()  # else it would be that of the next replay of a graph, too
        last = _total(self.losses.get(_compared(recipe, self.losses), []))
        if first is not None and last is not None:
            found["loss_gap"] = last.to(first.device) - first
        if self.grads:
            norm = _mean(self.grads)
            found["grad_norm"] = norm if self.scale is None else norm / self.scale.to(norm.device)
        if self.moves:
            found["perturbation_norm"] = _mean(self.moves)
        elif self.ascents:
            found["perturbation_norm"] = _mean([_length(*ascent) for ascent in self.ascents])
        return found


def _sees_all(recipe: Recipe, metrics: set[int]) -> bool:
    """Whether the norm of the recipe is that of the whole gradient."""
    mask = recipe.mask
    is_full = isinstance(mask, Sparse) and mask.norm == "full"
    return FIXED not in metrics and (isinstance(mask, Dense | ByName | ByModule) or is_full)


def _compared(recipe: Recipe, losses: dict[int, list[Tensor | float | None]]) -> int:
    """The probe whose loss is compared with the first: that at ``w + e`` of the same batch; -1 for none."""
    if isinstance(recipe.probe, Anticipated | RandomStart):
        return -1
    return max(losses, default=-1) if isinstance(recipe.probe, MultiStep | Lookbehind) else 1


def _indices(served: Served) -> list[int]:
    return sorted({key[0] for group, _ in served for key in group.keys if key[1] != FIXED})


def _length(norm: Tensor, rho: Any, eps: float) -> Tensor:
    """``rho ||d|| / (||d|| + eps)``; 0 where the gradient is not finite, for then nothing moves."""
    rho = abs(rho.to(norm.device) if isinstance(rho, Tensor) else rho)
    return torch.where(torch.isfinite(norm), rho * norm / (norm + eps), 0.0)


def _moved(group: Any) -> Tensor:
    """``||w - snapshot||^2`` of a group; 0-d float64. Takes memory for its largest tensor."""
    total = torch.zeros((), dtype=torch.float64, device=group.device)
    for t, (p, s) in enumerate(zip(group.params, group.snapshots, strict=True)):
        if s is None or group.is_compact(t):
            continue
        move = p.detach().to(s.dtype) - s
        mask = mask_of(group, t)
        if mask is not None:
            move = torch.where(mask, move, 0.0)
        total += (
            torch.linalg.vector_norm(move, dtype=torch.promote_types(s.dtype, torch.float32)).double() ** 2
        )
    return total


def _number_of(loss: Any) -> Tensor | float | None:
    if isinstance(loss, Tensor):
        # A copy: the closure may write its loss into one place, and users divide it by something.
        return loss.detach().clone().reshape(()) if loss.numel() == 1 and not loss.is_complex() else None
    return float(loss) if isinstance(loss, int | float) else None


def _total(losses: list[Tensor | float | None]) -> Tensor | None:
    """The sum of what closures returned, where it is one number each."""
    total: Tensor | None = None
    for loss in losses:
        if loss is None:
            return None
        one = loss if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
        total = one if total is None else total + one.to(total.device)
    return total


def _mean(values: list[Tensor]) -> Tensor:
    """A new tensor: those of the step are written again by the next."""
    return torch.stack([value.to(values[0].device) for value in values]).mean()
