"""How far the loss rises on average: with noise on the weights, and along random directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .ball import Ball, uniform
from .checks import check_count, finite
from .estimate import Estimate
from .moves import Weights
from .objective import Forward, Objective


def average_case(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    rho: float,
    *,
    p: float = 2,
    adaptive: bool = False,
    draws: int = 100,
    seed: int = 0,
    antithetic: bool = False,
    m: int | None = None,
    forward: Forward | None = None,
    samples: int | None = None,
    backend: str = "auto",
) -> Estimate:
    """How far the loss rises on average where the weights are noisy.

    ``E L(w + d) - L(w)``, ``d ~ N(0, rho^2 T^2)`` for p = 2 and ``d ~ T U[-rho, rho]`` for p = inf, with
    ``T = |w|`` if adaptive, else 1. For small rho that is ``rho^2 / 2 tr(T H T)`` for p = 2, a third of it
    for p = inf. Note that the length of d is about ``rho sqrt(n)`` for n weights.

    Args:
        model, loss_fn, loader: as in `one_step`.
        rho: standard deviation (p = 2) or half width (p = inf). The paper's: .05 to .4, .1 to .8.
        p: 2 (default) or math.inf.
        adaptive: noise in proportion to the size of weights; weights of 0 stay.
        draws: how many d (default 100); one loss each.
        seed: of the draws. They are the same on every machine and backend, torch's generators are not asked.
        antithetic: evaluate -d too and count the mean of both as one value, for two losses a draw. What is
            odd in d cancels, the gradient's part above all, and the error is far smaller.
        m: draw anew for each group of m samples, so that a value is a mean over several d (default: one d
            for all samples). The expectation is the same, the error smaller, the cost that of the moves.
        forward, samples, backend: as in `one_step`.

    Returns:
        the mean over draws, and its standard error.

    Raises:
        ValueError: if an argument is out of its range, or a loss is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.eye(2), torch.zeros(2, 1)  # so the loss is ||w||^2 / 2, and the mean rho^2
        >>> loss_fn = torch.nn.functional.mse_loss
        >>> found = average_case(model, loss_fn, [(x, y)], rho=0.1, antithetic=True)
        >>> bool(abs(found - 0.01) < 5 * found.error)
        True

    Source: Andriushchenko et al., ICML 2023, arXiv 2302.07011.
    """
    ball = Ball(rho, p, adaptive)
    if p not in (2, math.inf):
        raise ValueError(f"sharpness: p is {p!r}; the average is taken for p=2 and p=math.inf")

    def noise(weights: Weights, draw: int) -> list[Tensor]:
        z = weights.noise(seed, draw)
        shaped = [uniform(x) for x in z] if math.isinf(p) else z
        return [x * ball.scale(w) for x, w in zip(shaped, weights.base, strict=True)]

    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    groups = objective.groups(m)
    check_count("seed", seed, 0)
    return _mean(objective, groups, noise, rho, check_count("draws", draws), antithetic, backend)


def random_direction(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    rho: float = 0.05,
    *,
    draws: int = 100,
    seed: int = 0,
    antithetic: bool = False,
    forward: Forward | None = None,
    samples: int | None = None,
    backend: str = "auto",
) -> Estimate:
    """How far the loss rises on average on the sphere around the weights, to compare `one_step` with.

    ``E L(w + rho z / ||z||) - L(w)``, ``z ~ N(0, 1)`` over all parameters together.

    Args:
        model, loss_fn, loader: as in `one_step`.
        rho: radius (default 0.05, that of `one_step`).
        draws, seed, antithetic: as in `average_case`.
        forward, samples, backend: as in `one_step`.

    Returns:
        the mean over draws, and its standard error.

    Raises:
        ValueError: if an argument is out of its range, or a loss is not finite.

    Example:
        >>> import torch
        >>> from sam_kernels.sharpness import one_step
        >>> model = torch.nn.Linear(2, 1)
        >>> data = [(torch.randn(6, 2), torch.randn(6, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss
        >>> bool(random_direction(model, loss_fn, data) < one_step(model, loss_fn, data))
        True

    Source: Foret et al., ICLR 2021, appendix C.5, has such perturbations of a fixed length in place of SAM's.
    """
    Ball(rho)

    def direction(weights: Weights, draw: int) -> list[Tensor]:
        z = weights.noise(seed, draw)
        length = weights.norm(z)
        return [x / length for x in z]

    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    check_count("seed", seed, 0)
    return _mean(objective, [objective], direction, rho, check_count("draws", draws), antithetic, backend)


def _mean(
    objective: Objective,
    groups: list[Objective],
    noise: Callable[[Weights, int], list[Tensor]],
    rho: float,
    draws: int,
    antithetic: bool,
    backend: str,
) -> Estimate:
    """The mean rise over draws of ``w + rho noise``; a value of it is a mean over groups."""
    with objective.held() as base:
        weights = Weights(objective.params, base, backend, names=objective.names)
        losses = [finite(group.loss()) for group in groups]

        def rises(draw: int) -> Iterator[float]:
            for number, (group, loss) in enumerate(zip(groups, losses, strict=True)):
                d = noise(weights, draw * len(groups) + number)
                found = []
                for sign in (1, -1) if antithetic else (1,):
                    weights.move(d, sign * rho)
                    found.append(finite(group.loss(), f"at noisy weights (rho={rho})") - loss)
                yield math.fsum(found) / len(found) * group.count / objective.count

        return Estimate([math.fsum(rises(draw)) for draw in range(draws)])
