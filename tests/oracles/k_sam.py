"""Ni et al. 2022: both gradients of SAM on the K samples of highest loss at w."""

from __future__ import annotations

import numpy as np
import torch

from oracles.toys import LeastSquares


def worst(losses: torch.Tensor, k: int) -> list[int]:
    """Return the indices of the k highest losses, in ascending order; of equal ones the first."""
    return sorted(np.argsort(-losses.numpy(), kind="stable")[:k].tolist())


def step(problem: LeastSquares, w: torch.Tensor, k: int, rho: float, lr: float) -> torch.Tensor:
    """Return w - lr grad l_S(w + e), e = rho g / ||g||, g = grad l_S(w), S chosen once, at w."""
    chosen = worst(problem.losses(w), k)
    g = problem.gradient(w, chosen)
    return w - lr * problem.gradient(w + rho * g / g.norm(), chosen)
