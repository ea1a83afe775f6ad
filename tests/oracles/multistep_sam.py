"""Several ascent steps: n times d <- d + a g / ||g||, g = grad L(w + d), and back to ||d|| <= rho."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved, total


@dataclass
class MultiStepSam:
    """`step_size` a is the radius unless given; without `project` d may leave the ball."""

    rho: float = 0.05
    n: int = 3
    step_size: float | None = None
    project: bool = True

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return base(grad L(w + d)), taken at w: n + 1 gradients."""
        size = self.rho if self.step_size is None else self.step_size
        d = total((0.0, weights))
        for _ in range(self.n):
            g = gradient(moved(weights, d), number)
            d = moved(d, g, size / (total_norm(g) + 1e-12))
            length = total_norm(d)
            if self.project and length > self.rho:
                d = total((self.rho / length, d))
        return base.step(weights, gradient(moved(weights, d), number))
