"""How curved the loss is: the largest eigenvalues and the trace of its Hessian, curvature along the gradient.

spectrum has the eigenvalues, hessian the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from .estimate import Estimate
from .hessian import Hessian, Product, hessian_vector_product
from .objective import Forward, Objective
from .spectrum import Spectrum, eigenvalues
from .vectors import dot, norm, rademacher

__all__ = ["Spectrum", "along_gradient", "eigenvalues", "hessian_vector_product", "trace"]

# A few values may lie close together by chance, so that many draws would only seem to be enough.
_FEWEST_DRAWS = 8


def trace(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    draws: int = 32,
    seed: int = 0,
    tol: float | None = None,
    hvp: Product = "exact",
    h: float | None = None,
    forward: Forward | None = None,
    samples: int | None = None,
) -> Estimate:
    """``Tr(H)``, the mean of ``v^T H v`` over random vectors v of -1 and 1 (Hutchinson).

    The result says how uncertain it is: its `error` is the standard error, its `values` are the draws. With
    `tol` it stops as soon as the error is small enough. PyHessian stops when the running mean changes
    little, which happens by chance however large the error still is.

    Args:
        model, loss_fn, loader, forward, samples: see `Objective`.
        draws: random vectors, with tol at most; 32 leaves an error of a few percent in networks of some
            10^4 weights and costs as many products.
        seed: of the vectors, from 0 to 2^63 - 1; torch's generators are not used.
        tol: stop when the standard error is below this share of the mean, after 8 draws at the earliest.
        hvp, h: the method of `hessian_vector_product`, and its step.

    Raises:
        ValueError: if a number makes no sense.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> found = trace(model, nn.functional.mse_loss, [batch], draws=200)  # H = [[2, 4], [4, 8]]
        >>> abs(found - 10) < 4 * found.error, 0 < found.error < 1
        (True, True)

    Source: Hutchinson, Communications in Statistics 1989; Yao et al., PyHessian, 2020.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"trace: draws is {draws!r}; expected a whole number, at least 1")
    if tol is not None and not tol > 0:
        raise ValueError(f"trace: tol is {tol!r}; expected a positive share of the mean, or None")
    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    hessian = Hessian(objective, hvp, h)
    values: list[float] = []
    with objective.held():
        for draw in range(draws):
            v = rademacher(objective.params, seed, draw)
            values.append(dot(v, hessian(v)))
            if tol is not None and len(values) >= _FEWEST_DRAWS:
                found = Estimate(values)
                if found.error <= tol * abs(found):
                    break
    return Estimate(values)


def along_gradient(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    rho: float | None = None,
    hvp: Product = "exact",
    h: float | None = None,
    forward: Forward | None = None,
    samples: int | None = None,
) -> Estimate:
    """``g^T H g / ||g||^2``, or with rho ``(L(w + e) + L(w - e) - 2 L(w)) / rho^2``, ``e = rho g / ||g||``.

    The first is the curvature at the weights, along the direction in which SAM looks; the second is what
    CR-SAM regularises, the mean curvature over the stretch that SAM looks at. They agree as rho goes to 0,
    up to the digits of the loss: those of a float32 loss L leave an error of about 1e-7 L / rho^2.

    Args:
        model, loss_fn, loader, forward, samples: see `Objective`.
        rho: None for the curvature at the weights, else the length of e; CR-SAM has that of SAM, e.g. 0.1.
        hvp, h: the method of `hessian_vector_product`, and its step.

    Returns:
        the curvature, exact; nan where the gradient is 0 and there is no direction.

    Raises:
        ValueError: if rho is not positive.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> round(along_gradient(model, nn.functional.mse_loss, [batch]), 3)  # g is along (1, 2)
        10.0

    Source: Wu, Luo and Wunsch, CR-SAM, AAAI 2024.
    """
    if rho is not None and not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"along_gradient: rho is {rho!r}; expected a positive number, or None")
    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    hessian = Hessian(objective, hvp, h)
    with objective.held():
        here, gradient = objective.gradient()
        length = norm(gradient)
        if length == 0:
            return Estimate([math.nan], is_random=False)
        if rho is None:
            return Estimate([dot(gradient, hessian(gradient)) / length**2], is_random=False)
        ahead, behind = (hessian.loss_at(gradient, s * rho / length) for s in (1, -1))
        return Estimate([(ahead + behind - 2 * here) / rho**2], is_random=False)
