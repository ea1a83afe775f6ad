"""Wu, Luo, Wunsch 2024, the authors' code: gradients on both sides of w and at it.

d = g+ + gamma (g+ + g- - 2 g0) + beta (g+ - g-), at w + e, w - e and w, with e = rho g0 / (||g0|| + 1e-12).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved, total


@dataclass
class CrSam:
    """gamma weighs the curvature along e, beta the slope."""

    rho: float = 0.1
    gamma: float = 0.1
    beta: float = 0.1

    def direction(self, weights: Tensors, gradient: Gradient, number: int) -> Tensors:
        """Return d, of three gradients."""
        centre = gradient(weights, number)
        scale = self.rho / (total_norm(centre) + 1e-12)
        above = gradient(moved(weights, centre, scale), number)
        below = gradient(moved(weights, centre, -scale), number)
        bend = total((1.0, above), (1.0, below), (-2.0, centre))
        slope = total((1.0, above), (-1.0, below))
        return total((1.0, above), (self.gamma, bend), (self.beta, slope))

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return base(d), taken at w."""
        return base.step(weights, self.direction(weights, gradient, number))
