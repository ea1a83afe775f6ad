"""Two rare forms of SAM: the ball of the 1-norm, and weight decay that is part of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from oracles.sam import Tensors, total_norm
from oracles.steps import Ascent, Gradient, moved


@dataclass
class OneNorm(Ascent):
    """max <e, g> over ||e||_1 <= rho: all of rho at the largest |g|, shared evenly where several tie."""

    rho: float = 0.05

    def perturbation(self, weights: Tensors, gradients: Tensors, number: int) -> Tensors:
        """Return e, zero but at the largest |g| of all tensors."""
        largest = max(float(g.abs().max()) for g in gradients.values())
        count = sum(int((g.abs() == largest).sum()) for g in gradients.values())
        return {
            name: torch.where(g.abs() == largest, self.rho / count * g.sign(), torch.zeros_like(g))
            for name, g in gradients.items()
        }


@dataclass
class DecayInside:
    """SAM of L(w) + decay / 2 ||w||^2, as in the authors' code; the base optimizer has no decay."""

    rho: float = 0.05
    decay: float = 0.0

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return base(grad L(w + e) + decay (w + e)), taken at w."""
        g = moved(gradient(weights, number), weights, self.decay)
        probe = moved(weights, g, self.rho / (total_norm(g) + 1e-12))
        return base.step(weights, moved(gradient(probe, number), probe, self.decay))
