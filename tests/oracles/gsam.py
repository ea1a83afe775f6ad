"""Zhuang et al. 2022: SAM's gradient, less what of the clean gradient is orthogonal to it.

d = gs - alpha (g - (<g, gs> / ||gs||^2) gs), or, in the form that does not minimize the perturbed loss,
d = g + alpha (gs - (<g, gs> / ||g||^2) g). The radius may follow the learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, dot, moved, total


@dataclass(frozen=True)
class WithLr:
    """A radius that falls from rho_max to rho_min as the learning rate falls from lr_max to lr_min."""

    rho_max: float
    rho_min: float
    lr_max: float
    lr_min: float

    def at(self, lr: float) -> float:
        """Return the radius at a learning rate."""
        if self.lr_max == self.lr_min:
            return self.rho_max
        share = (lr - self.lr_min) / (self.lr_max - self.lr_min)
        return self.rho_min + (self.rho_max - self.rho_min) * share


@dataclass
class Gsam:
    """Adaptive is False, True: rho w^2 g / || |w| g ||, or "first power": rho |w| g / ||g||."""

    rho: float | WithLr = 0.05
    alpha: float = 0.4
    adaptive: bool | str = False
    minimize_fp: bool = True

    def perturbation(self, weights: Tensors, g: Tensors, lr: float) -> Tensors:
        """Return e."""
        rho = self.rho.at(lr) if isinstance(self.rho, WithLr) else self.rho
        power = {False: 0, True: 2, "first power": 1}[self.adaptive]
        measured = {n: t * weights[n].abs() for n, t in g.items()} if self.adaptive is True else g
        size = total_norm(measured) + 1e-12
        return {n: rho * weights[n].abs() ** power * t / size for n, t in g.items()}

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return base(d), taken at w."""
        g = gradient(weights, number)
        gs = gradient(moved(weights, self.perturbation(weights, g, base.lr)), number)
        if self.minimize_fp:
            rest = total((1.0, g), (-dot(g, gs) / dot(gs, gs), gs))
            return base.step(weights, total((1.0, gs), (-self.alpha, rest)))
        rest = total((1.0, gs), (-dot(g, gs) / dot(g, g), g))
        return base.step(weights, total((1.0, g), (self.alpha, rest)))
