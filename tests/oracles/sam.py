"""Foret et al. 2021, equation 2: e = rho * sign(g) * |g|^(q-1) / (||g||_q^q)^(1/p), with 1/p + 1/q = 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def total_norm(tensors: Tensors) -> float:
    """Return the Euclidean norm over every element of every tensor."""
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors.values()))


def perturbation(weights: Tensors, gradients: Tensors, rho: float = 0.05, p: float = 2.0) -> Tensors:
    """Return e for each gradient; all zero when the gradient is zero."""
    g = {name: t.double() for name, t in gradients.items()}
    if math.isinf(p):
        return {name: rho * torch.sign(t) for name, t in g.items()}
    q = p / (p - 1.0)
    total = sum(float((t.abs() ** q).sum()) for t in g.values()) ** (1.0 / p)
    if total == 0.0:
        return {name: torch.zeros_like(t) for name, t in g.items()}
    return {name: rho * torch.sign(t) * t.abs() ** (q - 1.0) / total for name, t in g.items()}
