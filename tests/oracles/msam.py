"""Becker et al. 2024: perturb to where momentum leads, e = -rho v / ||v||, and take one gradient there.

v is the momentum buffer of SGD, or the first moment of Adam, as the last step left it. Decay is the base
optimizer's, at w; given here it is added at the perturbed weights, as in the authors' code for SGD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oracles.bases import Sgd
from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved


@dataclass
class Msam:
    """Nothing is perturbed before there is momentum."""

    rho: float = 0.3
    decay: float = 0.0

    def perturbed(self, weights: Tensors, base: Any) -> Tensors:
        """Return w - rho v / ||v||, which is also what the authors store between steps."""
        v = base.buffers if isinstance(base, Sgd) else {name: m for name, (m, *_) in base.moments.items()}
        return moved(weights, v, -self.rho / (total_norm(v) + 1e-12))

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return base(grad L(w + e)), taken at w."""
        probe = self.perturbed(weights, base)
        g = gradient(probe, number)
        return base.step(weights, moved(g, {name: probe[name] for name in g}, self.decay))
