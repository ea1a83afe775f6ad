"""A point drawn from the sphere: e = rho z / ||z||, z ~ N(0, I) over all tensors; one gradient, at w + e."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oracles.normal import noise
from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved


@dataclass
class RandSam:
    """Given `draws`, one z for each step, are used in place of random numbers."""

    rho: float = 0.05
    seed: int = 0
    draws: Sequence[Tensors] | None = None

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return base(grad L(w + e)), taken at w."""
        z = noise(weights, self.seed, number) if self.draws is None else self.draws[number]
        return base.step(weights, gradient(moved(weights, z, self.rho / total_norm(z)), number))
