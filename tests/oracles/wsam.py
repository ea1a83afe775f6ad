"""Yue et al. 2023: sharpness weighed by a = gamma / (1 - gamma), inside the base step or beside it.

coupled: base((1 - a) g + a gs);  decoupled: base(g), then w <- w - lr a (gs - g)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved, total


@dataclass
class Wsam:
    """The decoupled term meets no momentum, no scaling and no decay."""

    rho: float = 0.05
    gamma: float = 0.9
    decoupled: bool = True

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return the weights after one step."""
        a = self.gamma / (1 - self.gamma)
        g = gradient(weights, number)
        gs = gradient(moved(weights, g, self.rho / (total_norm(g) + 1e-12)), number)
        if not self.decoupled:
            return base.step(weights, total((1 - a, g), (a, gs)))
        return moved(base.step(weights, g), total((1.0, gs), (-1.0, g)), -base.lr * a)
