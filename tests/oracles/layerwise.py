"""Three layer-wise ascents: one radius per tensor, a trust ratio, and the layer-wise adaptive operator."""

from __future__ import annotations

import math

import torch

from oracles.sam import Tensors, total_norm


def norm(tensor: torch.Tensor) -> float:
    """Return the Euclidean norm of one tensor."""
    return math.sqrt(float((tensor.double() ** 2).sum()))


def radius(weights: Tensors, gradients: Tensors, rho: float = 0.05) -> Tensors:
    """Return e_l = rho * g_l / ||g_l||."""
    return {name: rho * g.double() / (norm(g) or math.inf) for name, g in gradients.items()}


def trust_ratio(weights: Tensors, gradients: Tensors, rho: float = 0.05) -> Tensors:
    """Return e_l = rho * min(||w_l|| / (||g_l|| + 1e-14), 20) * g_l / ||g||."""
    total = total_norm(gradients) or math.inf
    ratio = {name: min(norm(weights[name]) / (norm(g) + 1e-14), 20.0) for name, g in gradients.items()}
    return {name: rho * ratio[name] * g.double() / total for name, g in gradients.items()}


def operator(weights: Tensors, gradients: Tensors, rho: float = 0.05, eta: float = 0.0) -> Tensors:
    """Return e_l = rho * T_l^2 * g_l / ||T g||, T_l = ||w_l|| * (1 + eta) for names with "weight", else 1."""
    scale = {name: norm(weights[name]) * (1 + eta) if "weight" in name else 1.0 for name in gradients}
    total = total_norm({name: scale[name] * g.double() for name, g in gradients.items()}) or math.inf
    return {name: rho * scale[name] ** 2 * g.double() / total for name, g in gradients.items()}
