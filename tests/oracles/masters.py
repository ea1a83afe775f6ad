"""Micikevicius et al. 2018, "Mixed precision training": the weights are the rounded copy of fp32 masters.

Everything is calculated in float64 from the numbers that are stored, and rounded where it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from oracles.sam import Tensors

Rounded = dict[str, torch.Tensor]


def rounded(masters: Tensors, dtype: torch.dtype) -> Rounded:
    """Return the weights that stand for the masters: to nearest, ties to even, once."""
    return {name: m.to(torch.float32).to(dtype) for name, m in masters.items()}


@dataclass
class Masters:
    """SAM over masters, told the gradients: what it cannot know without the network."""

    values: Tensors  # float64 that fp32 can hold
    base: Any
    dtype: torch.dtype = torch.bfloat16
    rho: float = 0.05
    eta: float | None = None  # T = |master| + eta; None for T = 1

    def perturbed(self, gradients: Tensors) -> Rounded:
        """Return round(master + rho T^2 g / ||T g||)."""
        g = {name: x.double() for name, x in gradients.items()}
        scale = {
            name: torch.ones_like(x) if self.eta is None else self.values[name].abs() + self.eta
            for name, x in g.items()
        }
        norm = sum(float(((scale[name] * x) ** 2).sum()) for name, x in g.items()) ** 0.5
        moved = dict(self.values)
        for name, x in g.items():
            moved[name] = self.values[name] + self.rho / norm * scale[name] ** 2 * x
        return rounded(moved, self.dtype)

    def descend(self, gradients: Tensors) -> Rounded:
        """Step with the second gradients; return the weights afterwards."""
        g = {name: x.double() for name, x in gradients.items()}
        self.values = {name: w.float().double() for name, w in self.base.step(self.values, g).items()}
        return rounded(self.values, self.dtype)
