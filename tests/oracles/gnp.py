"""Zhao, Zhang, Hu 2022, the norm of the gradient as a penalty: d = (1 - alpha) u + alpha gs.

u is the clean gradient, scaled to unit length in the authors' default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved, total


@dataclass
class Gnp:
    """gs is the gradient at w + rho g / ||g||."""

    rho: float = 0.1
    alpha: float = 0.8
    normalize: bool = True

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return base(d), taken at w."""
        g = gradient(weights, number)
        size = total_norm(g) + 1e-12
        gs = gradient(moved(weights, g, self.rho / size), number)
        clean = (1 - self.alpha) / (size if self.normalize else 1.0)
        return base.step(weights, total((clean, g), (self.alpha, gs)))
