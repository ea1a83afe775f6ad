"""Jiang et al. 2023: SAM where the gradient is large for what it usually is, else a plain step.

q = ||g||^2;  mu <- decay mu + (1 - decay) q;  var <- decay var + (1 - decay) (q - mu)^2, both from zero
SAM where q >= mu + c sqrt(var), c = t/T late + (1 - t/T) early
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from oracles.sam import Tensors
from oracles.steps import Gradient, dot, moved


@dataclass
class AeSam:
    """`steps` is T."""

    steps: int
    rho: float = 0.05
    decay: float = 0.9
    late: float = -1.0
    early: float = 1.0
    mu: float = 0.0
    var: float = 0.0

    def due(self, q: float, number: int) -> bool:
        """Return whether this step is SAM's, and take q into the running statistics."""
        self.mu = self.decay * self.mu + (1 - self.decay) * q
        self.var = self.decay * self.var + (1 - self.decay) * (q - self.mu) ** 2
        c = number / self.steps * self.late + (1 - number / self.steps) * self.early
        return q >= self.mu + c * math.sqrt(self.var)

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return the weights after one step."""
        g = gradient(weights, number)
        q = dot(g, g)
        if self.due(q, number):
            g = gradient(moved(weights, g, self.rho / (math.sqrt(q) + 1e-12)), number)
        return base.step(weights, g)
