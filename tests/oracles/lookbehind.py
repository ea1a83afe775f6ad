"""Mordido et al. 2024: k ascent steps, a base step of the fast weights from each, then slow meets fast.

k times: p <- p + rho g(p) / ||g(p)||, fast <- base step at fast with the gradient at the new p
slow <- slow + alpha (fast - slow); alpha None is (cos(first displacement, whole displacement) + 1) / 2 of
each tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved, total


@dataclass
class Lookbehind:
    """p and fast start from slow at each step; the base optimizer's state runs through the inner steps."""

    rho: float = 0.05
    k: int = 2
    alpha: float | None = 0.5

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return the slow weights after one step, which are what the model is evaluated on."""
        probe, fast, first = weights, weights, None
        for _ in range(self.k):
            g = gradient(probe, number)
            probe = moved(probe, g, self.rho / (total_norm(g) + 1e-16))
            fast = base.step(fast, gradient(probe, number))
            first = first or total((1.0, fast), (-1.0, weights))
        whole = total((1.0, fast), (-1.0, weights))
        if self.alpha is not None:
            return moved(weights, whole, self.alpha)
        new = dict(weights)
        for name, d in whole.items():
            cosine = (first[name] * d).sum() / (first[name].norm() * d.norm())
            new[name] = weights[name] + (cosine + 1) / 2 * d
        return new
