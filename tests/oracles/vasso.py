"""Li, Giannakis 2023: e = rho m / (||m|| + 1e-7), m = (1 - theta) m + theta g, from the first gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

from oracles.sam import Tensors, total_norm
from oracles.steps import Ascent, total


@dataclass
class Vasso(Ascent):
    """theta weighs the new gradient: 1 is SAM, 0 keeps the first gradient for ever."""

    rho: float = 0.05
    theta: float = 0.9
    eps: float = 1e-7
    mean: Tensors = field(default_factory=dict)

    def perturbation(self, weights: Tensors, gradients: Tensors, number: int) -> Tensors:
        """Return e along the running mean that includes this gradient."""
        old = self.mean or gradients
        self.mean = total((1 - self.theta, old), (self.theta, gradients))
        return total((self.rho / (total_norm(self.mean) + self.eps), self.mean))
