"""The formulas in float64, written for this benchmark alone: what every peer must arrive at.

Nothing of the package and no optimizer of torch is used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import EPS, RHO, Base, Workspace

STEPS = 3

# Roundings that may add up in an element: three steps of a dozen operations, errors of random sign.
_ROUNDINGS = 8


@dataclass
class Stop:
    """Weights at one moment of a trajectory, and the largest move that led there."""

    weights: list[Tensor]
    reach: float

    def error(self, params: list[Tensor]) -> float:
        """Largest deviation, relative to the size of a weight or, near zero, of the largest move."""
        worst = 0.0
        for weight, param in zip(self.weights, params, strict=True):
            if weight.numel() == 0:
                continue
            deviation = (_copy64(param.detach()) - weight).abs_().div_(weight.abs() + self.reach)
            worst = max(worst, _not_finite_is_wrong(deviation.max().item()))
        return worst


def _copy64(x: Tensor) -> Tensor:
    """A float64 copy, also of float64: the formulas below work in place."""
    return x.to(torch.float64, copy=True)


def _not_finite_is_wrong(x: float) -> float:
    return x if math.isfinite(x) else math.inf


@dataclass
class Trajectory:
    """Two stops of the last step: perturbed weights, and weights after the update."""

    perturbed: Stop
    descended: Stop


def gradients_of_step(workspace: Workspace, step: int) -> tuple[list[Tensor], list[Tensor]]:
    """The two gradients of a gate step; they change places so that no step repeats the one before."""
    pair = (workspace.first, workspace.second)
    return pair if step % 2 == 0 else pair[::-1]


@torch.no_grad()
def trajectory(workspace: Workspace, base: Base, rho: float = RHO) -> Trajectory:
    """STEPS steps of SAM (of the base alone for rho=0) from the workspace's initial weights."""
    weights = workspace.weights64()
    start = [w.clone() for w in weights]
    slots = {name: [torch.zeros_like(w) for w in weights] for name in base.slots}
    update: Callable[..., None] = sgd if base.name == "sgd" else adamw
    perturbed = Stop([], 0.0)
    for step in range(STEPS):
        first, second = gradients_of_step(workspace, step)
        norm = math.sqrt(sum(_copy64(g).square_().sum().item() for g in first))
        scale = rho / (norm + EPS)
        if step == STEPS - 1:
            perturbed.weights = [w + _copy64(g).mul_(scale) for w, g in zip(weights, first, strict=True)]
            # A weight near zero carries the roundings of every move that brought it there.
            perturbed.reach = scale * max(g.abs().max().item() for g in first) + _largest_move(weights, start)
        for t, (weight, grad) in enumerate(zip(weights, second, strict=True)):
            update(weight, _copy64(grad), {name: slots[name][t] for name in slots}, step + 1, **base.options)
    return Trajectory(perturbed, Stop(weights, _largest_move(weights, start)))


def _largest_move(weights: list[Tensor], start: list[Tensor]) -> float:
    moves = ((w - s).abs_() for w, s in zip(weights, start, strict=True))
    return max((move.max().item() for move in moves if move.numel()), default=0.0)


def sgd(w: Tensor, g: Tensor, slots: dict[str, Tensor], step: int, *, lr, momentum, weight_decay) -> None:
    """SGD with momentum, in place."""
    buffer = slots["momentum_buffer"]
    buffer.mul_(momentum).add_(g.add_(w, alpha=weight_decay))
    w.sub_(buffer, alpha=lr)


def adamw(w: Tensor, g: Tensor, slots: dict[str, Tensor], step: int, *, lr, weight_decay) -> None:
    """AdamW with its default betas, in place."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    mean, square = slots["exp_avg"], slots["exp_avg_sq"]
    w.mul_(1 - lr * weight_decay)
    mean.mul_(beta1).add_(g, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (square / (1 - beta2**step)).sqrt_().add_(eps)
    w.addcdiv_(mean, root, value=-lr / (1 - beta1**step))


def tolerance(dtype: torch.dtype, norm_error: float) -> float:
    """What `Stop.error` may be: rounding of the weights' dtype, plus the peer's known error in the norm."""
    return _ROUNDINGS * torch.finfo(dtype).eps + norm_error
