"""Li et al. 2024: perturb along the noise of the batch, d = g - sigma m, m a running mean of gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

from oracles.sam import Tensors, total_norm
from oracles.steps import Ascent, total


@dataclass
class FriendlySam(Ascent):
    """Order "code": d from the mean before this gradient, which starts as the first gradient, with d = g.

    Order "paper": d from the mean with this gradient, which starts from zero.
    """

    rho: float = 0.05
    sigma: float = 1.0
    lmbda: float = 0.9
    order: str = "code"
    eps: float = 1e-12
    mean: Tensors = field(default_factory=dict)

    def direction(self, g: Tensors) -> Tensors:
        """Return d, and take g into the running mean."""
        if not self.mean and self.order == "code":
            self.mean = g
            return g
        old = self.mean or total((0.0, g))
        self.mean = total((self.lmbda, old), (1 - self.lmbda, g))
        return total((1.0, g), (-self.sigma, self.mean if self.order == "paper" else old))

    def perturbation(self, weights: Tensors, gradients: Tensors, number: int) -> Tensors:
        """Return rho d / (||d|| + eps)."""
        d = self.direction(gradients)
        return total((self.rho / (total_norm(d) + self.eps), d))
