"""Kim et al. 2022: e = rho F^-1 g / sqrt(g . F^-1 g), with F^-1 = 1 / (1 + eta g^2) element by element."""

from __future__ import annotations

import math
from dataclasses import dataclass

from oracles.sam import Tensors
from oracles.steps import Ascent, dot


@dataclass
class FisherSam(Ascent):
    """The Fisher information is the square of the batch gradient; one norm over all tensors."""

    rho: float = 0.1
    eta: float = 1.0
    eps: float = 1e-12

    def perturbation(self, weights: Tensors, gradients: Tensors, number: int) -> Tensors:
        """Return rho h / (sqrt(g . h) + eps) with h = g / (1 + eta g^2)."""
        h = {name: g / (1 + self.eta * g * g) for name, g in gradients.items()}
        size = math.sqrt(dot(gradients, h)) + self.eps
        return {name: self.rho * t / size for name, t in h.items()}
