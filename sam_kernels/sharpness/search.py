"""Auto-PGD in the weights: the search behind `worst_case`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .ball import Ball, opmath
from .checks import finite
from .moves import Weights
from .objective import Objective

MOMENTUM = 0.75
ENOUGH = 0.75  # the share of steps that have to improve, or the steps become smaller


class Point(NamedTuple):
    """A perturbation, and loss and gradient there."""

    loss: float
    e: list[Tensor]
    grads: list[Tensor]


def checkpoints(steps: int) -> set[int]:
    """After how many steps the size of steps is thought over: .22 of them, then ever more often.

    Example:
        >>> sorted(checkpoints(20))
        [5, 9, 12, 14, 16, 18, 19, 20]
    """
    shares = [0.0, 0.22]
    found = {math.ceil(0.22 * steps)}
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
        found.add(math.ceil(round(shares[-1] * steps, 9)))
    return {k for k in found if k <= steps}


def search(
    group: Objective, weights: Weights, ball: Ball, start: Point, steps: int, *, published: bool = False
) -> Point:
    """The best point on the way; see `worst_case` for the rules. Leaves the weights where it ended."""
    at = best = start
    before = start.e
    size = size_then = 2 * ball.rho
    best_then, since, improved = best.loss, 0, 0
    halts = checkpoints(steps)
    for k in range(1, steps + 1):
        e = _moved(weights, ball, at, before, size, published)
        weights.move(e)
        # Nothing reads the gradient at the last point.
        loss, grads = group.gradient() if k < steps else (group.loss(), at.grads)
        finite(loss, f"at weights within rho={ball.rho}")
        before, at = at.e, Point(loss, e, grads)
        if loss > best.loss:
            best = at
            improved += 1
        if k not in halts:
            continue
        is_stuck = size == size_then and best.loss == best_then
        is_slow = improved < ENOUGH * (k - since)
        size_then, best_then, since, improved = size, best.loss, k, 0
        if is_slow or is_stuck:
            size /= 2
            at, before = best, best.e
    return best


def _moved(
    weights: Weights, ball: Ball, at: Point, before: list[Tensor], size: float, published: bool
) -> list[Tensor]:
    """``3/4 P(e + size T slope) + 1/4 e_before``, where slope is a unit vector or signs."""
    norm = weights.norm(at.grads, None if published else ball)
    slopes = [opmath(g) for g in at.grads]
    scales = [ball.scale(w) for w in weights.base]
    if math.isinf(ball.p):
        slopes = [g.sign() for g in slopes]
    elif norm > 0:
        slopes = [g / norm if published else t * g / norm for g, t in zip(slopes, scales, strict=True)]
    there = [x + size * t * g for x, t, g in zip(at.e, scales, slopes, strict=True)]
    project = ball.nearest if published and ball.p == 2 else ball.project
    z = project(weights.base, there)
    return [torch.lerp(x, y, MOMENTUM) for x, y in zip(before, z, strict=True)]
