"""Zou, Deng, Sun 2024, reconstructed: the weight of the perturbed loss follows the ratio of gradient norms.

r_k = ||g_k|| / ||g_k-1|| (r_0 = 1). After the step lambda grows by `up` where r_k > chi_up and shrinks by
`down` where r_k < chi_down, within [smallest, largest].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved, total


@dataclass
class Samar:
    """Weighting "blend": d = (1 - lambda) g + lambda gs; "add": d = g + lambda gs."""

    rho: float = 0.05
    lambda_0: float = 0.5
    chi_up: float = 1.0
    chi_down: float = 1.0
    up: float = 1.1
    down: float = 0.9
    smallest: float = 0.0
    largest: float = 1.0
    weighting: str = "blend"
    previous: float = 0.0  # the last gradient's norm

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return the weights after one step."""
        if number == 0:
            self.weight = self.lambda_0
        g = gradient(weights, number)
        size = total_norm(g)
        gs = gradient(moved(weights, g, self.rho / (size + 1e-12)), number)
        clean = 1 - self.weight if self.weighting == "blend" else 1.0
        d = total((clean, g), (self.weight, gs))
        ratio = size / self.previous if self.previous else 1.0
        if ratio > self.chi_up:
            self.weight = min(self.up * self.weight, self.largest)
        elif ratio < self.chi_down:
            self.weight = max(self.down * self.weight, self.smallest)
        self.previous = size
        return base.step(weights, d)
