"""Kwon et al. 2021: e = rho * T^2 g / ||T g||, or rho * T * sign(g) for the infinity norm."""

from __future__ import annotations

import math

import torch

from oracles.sam import Tensors, total_norm


def perturbation(
    weights: Tensors,
    gradients: Tensors,
    rho: float = 0.5,
    eta: float = 0.01,
    p: float = 2.0,
    only: str | None = "weight",
) -> Tensors:
    """Return e with T = |w| + eta where the name contains `only` (everywhere when None), else T = 1."""
    scale = {
        name: weights[name].double().abs() + eta
        if only is None or only in name
        else torch.ones_like(g, dtype=torch.float64)
        for name, g in gradients.items()
    }
    if math.isinf(p):
        return {name: rho * scale[name] * torch.sign(g.double()) for name, g in gradients.items()}
    norm = total_norm({name: scale[name] * g.double() for name, g in gradients.items()})
    if norm == 0.0:
        return {name: torch.zeros_like(g, dtype=torch.float64) for name, g in gradients.items()}
    return {name: rho * scale[name] ** 2 * g.double() / norm for name, g in gradients.items()}


def elementwise(weights: Tensors, gradients: Tensors, rho: float = 0.05) -> Tensors:
    """Return e of the widespread form: T = |w| on every parameter, no eta."""
    return perturbation(weights, gradients, rho, eta=0.0, only=None)
