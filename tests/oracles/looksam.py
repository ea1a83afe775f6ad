"""Liu et al. 2022: SAM on every k-th step; in between, the remembered part of it orthogonal to the gradient.

refresh: g_v = gs - (<g, gs> / ||g||^2) g,  d = gs
reuse:   d = g + alpha (||g|| / ||g_v||) g_v
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, dot, moved


def orthogonal(g: Tensors, gs: Tensors) -> Tensors:
    """Return the part of gs orthogonal to g: all of it when g is zero, zero when only rounding is left."""
    square = dot(g, g)
    c = dot(g, gs) / square if square else 0.0
    part = {name: gs[name] - c * t for name, t in g.items()}
    if total_norm(part) <= 1e-12 * total_norm(gs):  # far above float64's rounding
        return {name: torch.zeros_like(t) for name, t in part.items()}
    return part


@dataclass
class LookSam:
    """`scope` is "global", or "tensor" for dots and norms of each tensor by itself.

    The perturbation has one global norm in either scope.
    """

    rho: float = 0.1
    alpha: float = 0.7
    k: int = 5
    scope: str = "global"
    eps: float = 1e-12
    tau: float = 0.0  # added to ||g_v|| in some code
    g_v: Tensors = field(default_factory=dict)

    def parts(self, tensors: Tensors) -> list[Tensors]:
        """Return the lists over which dots and norms are taken."""
        return [tensors] if self.scope == "global" else [{name: t} for name, t in tensors.items()]

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return the weights after one step; the first step is a refresh."""
        g = gradient(weights, number)
        if number % self.k == 0:
            gs = gradient(moved(weights, g, self.rho / (total_norm(g) + self.eps)), number)
            self.g_v = {}
            for part in self.parts(g):
                self.g_v |= orthogonal(part, {name: gs[name] for name in part})
            return base.step(weights, gs)
        d = dict(g)
        for part in self.parts(g):
            size = total_norm({name: self.g_v[name] for name in part})
            ratio = total_norm(part) / (size + self.tau) if size else 0.0
            d |= {name: t + self.alpha * ratio * self.g_v[name] for name, t in part.items()}
        return base.step(weights, d)
