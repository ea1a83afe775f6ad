"""Two functions with a sharp and a flat minimum, and gradient descent and SAM on many starts at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-12  # of recipes.sam
C = 1e-4


@dataclass(frozen=True)
class Toy:
    """A function of points, float64 [n, d], with its derivatives written out.

    Args:
        value: f, [n].
        gradient: [n, d].
        hessian: [n, d, d].
        sharp, flat: a minimum that is sharp and one that is flat.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    hessian: Callable[[Tensor], Tensor]
    sharp: tuple[float, ...]
    flat: tuple[float, ...]

    def top(self, points: Tensor) -> Tensor:
        """The largest eigenvalue of the Hessian, [n]; nan where the points are not finite."""
        finite = points.isfinite().all(1)
        found = torch.full((len(points),), math.nan, dtype=points.dtype)
        found[finite] = torch.linalg.eigvalsh(self.hessian(points[finite]))[:, -1]
        return found


def _line_value(p: Tensor) -> Tensor:
    x = p[:, 0]
    return x**2 * (x - 1) ** 2 / (x**2 + C)


def _line_gradient(p: Tensor) -> Tensor:
    return 2 * p * (p - 1) * (p**3 + 2 * C * p - C) / (p**2 + C) ** 2


def _line_hessian(p: Tensor) -> Tensor:
    # With n and s = x^2 + C: f' = n / s^2, f'' = (n' s - 4 x n) / s^3.
    n = 2 * (p**5 - p**4 + 2 * C * p**3 - 3 * C * p**2 + C * p)
    dn = 2 * (5 * p**4 - 4 * p**3 + 6 * C * p**2 - 6 * C * p + C)
    s = p**2 + C
    return ((dn * s - 4 * p * n) / s**3)[:, :, None]


LINE = Toy(_line_value, _line_gradient, _line_hessian, sharp=(0.0,), flat=(1.0,))
"""``f(x) = x^2 (x - 1)^2 / (x^2 + 0.0001)``: f''(0) = 20000, f''(1) = 2 / 1.0001, a barrier at x = 0.045.

``f'(x) = 2 x (x - 1) (x^3 + 2 C x - C) / (x^2 + C)^2``: the barrier is the real root of the third factor.
"""
BARRIER = 0.04498007


def _plane_value(p: Tensor) -> Tensor:
    u, y = p[:, 0] - 1, p[:, 1]
    return u**2 * y**2


def _plane_gradient(p: Tensor) -> Tensor:
    u, y = p[:, 0] - 1, p[:, 1]
    return torch.stack([2 * u * y**2, 2 * u**2 * y], 1)


def _plane_hessian(p: Tensor) -> Tensor:
    u, y = p[:, 0] - 1, p[:, 1]
    mixed = 4 * u * y
    return torch.stack([torch.stack([2 * y**2, mixed], 1), torch.stack([mixed, 2 * u**2], 1)], 1)


PLANE = Toy(_plane_value, _plane_gradient, _plane_hessian, sharp=(1.0, math.sqrt(1.225 / 2)), flat=(1.0, 0.0))
"""``f(x, y) = (x - 1)^2 y^2``: minima on x = 1 (largest eigenvalue 2 y^2) and y = 0 (2 (x - 1)^2)."""


def descend(
    toy: Toy, starts: Tensor, *, lr: float, rho: float, steps: int, keep: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Gradient descent (rho = 0) or SAM with it as base optimizer, from each start by itself.

    ``x <- x - lr grad f(x + rho g / (||g|| + eps))``, ``g = grad f(x)``: what `sam_kernels.SAM` does with
    one parameter, for many at a time. (One optimizer for all would take the norm over all of them.)

    Args:
        toy: the function.
        starts: float64 [n, d].
        lr, rho: of the descent step, and the radius.
        steps: how many.
        keep: after how many steps to keep the points, in increasing order.

    Returns:
        the points at the end, [n, d], and those that were kept, [len(keep), n, d].
    """
    points, kept, wanted = starts.clone(), [], set(keep)
    for step in range(steps + 1):
        if step in wanted:
            kept.append(points.clone())
        if step == steps:
            break
        g = toy.gradient(points)
        if rho:
            g = toy.gradient(points + rho * g / (g.norm(dim=1, keepdim=True) + EPS))
        points = points - lr * g
    return points, torch.stack(kept) if kept else torch.empty(0, *starts.shape, dtype=starts.dtype)


def kappa(toy: Toy, point: Sequence[float], rho: float) -> float:
    """``max over ||e|| <= rho of f(x + e) - f(x)``, from a fine grid over the ball (d = 1 or 2).

    Why the document's rho^2 lambda_1 at a minimum is twice too much: with g = grad f(x) and H the Hessian,
    ``f(x + e) - f(x) = g.e + 1/2 e.H.e + O(||e||^3)``. Where g is not zero the first term decides, and is
    largest for e = rho g / ||g||: rho ||g||. At a minimum g = 0, and the largest of e.H.e over ||e|| = rho is
    rho^2 lambda_1, by its eigenvector; the 1/2 of the expansion stays: **rho^2 lambda_1 / 2**.
    """
    at = torch.tensor([point], dtype=torch.float64)
    if at.shape[1] == 1:
        e = torch.linspace(-rho, rho, 200_001, dtype=torch.float64)[:, None]
    else:
        # Finely on the circle, where functions of positive Laplacian have their maximum; coarsely inside.
        rim, inside = (torch.arange(n, dtype=torch.float64) * (2 * math.pi / n) for n in (200_000, 720))
        shares = torch.linspace(0, 1, 51, dtype=torch.float64).repeat_interleave(720)
        angles = torch.cat([rim, inside.repeat(51)])
        lengths = rho * torch.cat([torch.ones_like(rim), shares])
        e = torch.stack([lengths * angles.cos(), lengths * angles.sin()], 1)
    return float(toy.value(at + e).max() - toy.value(at))


class AtPoint(nn.Module):
    """The function as a model: its only parameter is the point, and its output the value.

    Example:
        >>> from sam_kernels import sharpness
        >>> model = AtPoint(PLANE, (1.0, 0.5))
        >>> round(sharpness.eigenvalues(model, *model.data).values[0], 6)
        0.5
    """

    def __init__(self, toy: Toy, point: Sequence[float]) -> None:
        super().__init__()
        self.toy = toy
        self.point = nn.Parameter(torch.tensor(list(point), dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        return self.toy.value(self.point[None])[0]

    @property
    def data(self) -> tuple[Callable[..., Tensor], list[Any]]:
        """A loss function and a loader for `sam_kernels.sharpness`: the value is the loss."""
        return (lambda value, _: value), [(torch.zeros(1), torch.zeros(1))]
