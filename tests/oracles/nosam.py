"""SAM on normalization parameters only: e_t = rho * g_t / ||g||, the norm over the chosen tensors; else 0."""

from __future__ import annotations

from collections.abc import Callable

import torch

from oracles import sam
from oracles.sam import Tensors


def is_normalization(name: str) -> bool:
    """Return whether a parameter belongs to a normalization layer, judged by its name."""
    return "norm" in name or "bn" in name


def perturbation(
    weights: Tensors, gradients: Tensors, rho: float = 0.05, chosen: Callable[[str], bool] = is_normalization
) -> Tensors:
    """Return e, zero outside the chosen tensors."""
    part = sam.perturbation(weights, {n: g for n, g in gradients.items() if chosen(n)}, rho)
    return {name: part.get(name, torch.zeros_like(g, dtype=torch.float64)) for name, g in gradients.items()}
