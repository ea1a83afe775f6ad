"""Xie, Pethick, Cevher 2024: the gradient that perturbs was taken ahead, so neither waits for the other.

xt = x + rho gy / ||gy||;  y = where the step along gy would lead;  gy' = grad of the next batch at y
x <- base((1 - lmbda) grad of this batch at xt + lmbda gy')
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved, total


@dataclass
class Sampa:
    """y = x - lr (gy + weight_decay x + momentum v), with what the base has of these.

    `start` is "clean": before the first step gy is the first batch's gradient at x, or "code": the first
    step is a plain one on the first batch, which is used again.
    """

    rho: float = 0.1
    lmbda: float = 0.2
    start: str = "clean"
    ahead: Tensors = field(default_factory=dict)

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return the weights after one step."""
        if not self.ahead:
            self.ahead = gradient(weights, 0)
            if self.start == "code":
                return base.step(weights, self.ahead)
        batch = number - (self.start == "code")
        probe = moved(weights, self.ahead, self.rho / (total_norm(self.ahead) + 1e-12))
        there = {}
        for name, w in weights.items():
            expected = self.ahead[name] + base.weight_decay * w
            if getattr(base, "momentum", 0) and name in base.buffers:
                expected = expected + base.momentum * base.buffers[name]
            there[name] = w - base.lr * expected
        here, self.ahead = gradient(probe, batch), gradient(there, batch + 1)
        return base.step(weights, total((1 - self.lmbda, here), (self.lmbda, self.ahead)))
