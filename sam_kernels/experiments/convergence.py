"""Convergence on problems whose constants are known: the bound for SAM, and the slope for SAMAR."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import linear_regression
from typing import Any, Literal

import torch
from torch import Tensor

from .. import SAM, recipes

Name = Literal["quadratic", "logistic"]


@dataclass(frozen=True)
class Problem:
    """A smooth function with noisy gradients, all float64.

    Args:
        start: the first w, [d].
        value: f(w).
        gradient: grad f(w), [d].
        draw: the noise of a step, from a generator.
        noisy: the gradient at w with that noise; its mean over the noise is grad f(w).
        variance: ``E ||noisy gradient - grad f||^2`` at w.
        smoothness: L, the smallest with ``||grad f(v) - grad f(w)|| <= L ||v - w||`` or an upper bound.
    """

    start: Tensor
    value: Callable[[Tensor], float]
    gradient: Callable[[Tensor], Tensor]
    draw: Callable[[torch.Generator], Tensor]
    noisy: Callable[[Tensor, Tensor], Tensor]
    variance: Callable[[Tensor], float]
    smoothness: float


@cache
def problem(name: Name) -> Problem:
    """A problem by name; the same numbers each time.

    "quadratic": ``f(w) = 1/2 sum_i a_i w_i^2`` in 10 dimensions, a from 0.05 to 1 (so L = 1), from
    w = (1, ..., 1), with normal noise of variance sigma^2 = 1 in all. "logistic": l2-regularised (0.01)
    logistic regression of 200 normal samples in 10 dimensions, a tenth of the labels wrong, in batches of 10
    drawn with replacement; ``L = lambda_max(X^T X) / (4 n) + 0.01``.

    Raises:
        ValueError: for another name.

    Example:
        >>> problem("quadratic").smoothness
        1.0
    """
    if name == "quadratic":
        return _quadratic()
    if name == "logistic":
        return _logistic()
    raise ValueError(f"convergence: {name!r} is not a problem. Known: quadratic, logistic")


def _quadratic(d: int = 10) -> Problem:
    a = torch.logspace(math.log10(0.05), 0, d, dtype=torch.float64)
    return Problem(
        start=torch.ones(d, dtype=torch.float64),
        value=lambda w: float(0.5 * (a * w * w).sum()),
        gradient=lambda w: a * w,
        draw=lambda generator: torch.randn(d, dtype=torch.float64, generator=generator) / math.sqrt(d),
        noisy=lambda w, noise: a * w + noise,
        variance=lambda w: 1.0,
        smoothness=float(a.max()),
    )


def _logistic(n: int = 200, d: int = 10, batch: int = 10, decay: float = 0.01) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    truth = torch.randn(d, dtype=torch.float64, generator=generator)
    wrong = torch.rand(n, generator=generator) < 0.1
    y = torch.where((x @ truth > 0) ^ wrong, 1.0, -1.0).double()
    z = x * y[:, None]  # the loss of a sample is log(1 + exp(-z.w))

    def each(w: Tensor, rows: Tensor) -> Tensor:
        return -torch.sigmoid(-(rows @ w))[:, None] * rows + decay * w

    def variance(w: Tensor) -> float:
        gradients = each(w, z)
        return float((gradients - gradients.mean(0)).square().sum(1).mean()) / batch

    return Problem(
        start=torch.ones(d, dtype=torch.float64),
        value=lambda w: float(torch.nn.functional.softplus(-(z @ w)).mean() + decay / 2 * (w @ w)),
        gradient=lambda w: each(w, z).mean(0),
        draw=lambda generator: torch.randint(n, (batch,), generator=generator),
        noisy=lambda w, rows: each(w, z[rows]).mean(0),
        variance=variance,
        smoothness=float(torch.linalg.eigvalsh(x.T @ x)[-1]) / (4 * n) + decay,
    )


@dataclass(frozen=True)
class Course:
    """What a run went through.

    Args:
        squared: ``||grad f||^2`` at the w before each step, [steps].
        values: f at the same w.
        last: f after the last step.
        gradient: G, the largest ``||grad f||`` at all points where a gradient was taken.
        variance: sigma^2, the largest there.
    """

    squared: Tensor
    values: Tensor
    last: float
    gradient: float
    variance: float


def course(
    of: Problem,
    *,
    recipe: str | None,
    lr: Callable[[int], float],
    rho: Callable[[int], float],
    steps: int,
    seed: int,
    **settings: Any,
) -> Course:
    """Run `sam_kernels.SAM` around SGD; both gradients of a step have the same noise.

    Args:
        of: the problem.
        recipe: a name from `recipes.names()`, None for SGD alone.
        lr, rho: of the step number, from 0.
        steps, seed: how many, and of the noise.
        settings: of the recipe.
    """
    w = torch.nn.Parameter(of.start.clone())
    generator = torch.Generator().manual_seed(seed)
    opt: torch.optim.Optimizer = torch.optim.SGD([w], lr=lr(0))
    if recipe is not None:
        opt = SAM(None, opt, recipe=recipes.get(recipe, rho=rho, **settings))
    squared, values = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    largest = variance = 0.0
    for step in range(steps):
        noise = of.draw(generator)
        points: list[Tensor] = []

        def closure(noise: Tensor = noise, points: list[Tensor] = points) -> Tensor:
            at = w.detach()
            points.append(at.clone())
            w.grad = of.noisy(at, noise)
            return torch.zeros(())  # the loss decides nothing here

        opt.param_groups[0]["lr"] = lr(step)
        opt.step(closure)  # type: ignore[arg-type]
        gradients = [of.gradient(point) for point in points]
        squared[step], values[step] = gradients[0].square().sum(), of.value(points[0])
        largest = max([largest, *(float(g.norm()) for g in gradients)])
        variance = max([variance, *(of.variance(point) for point in points)])
    return Course(squared, values, of.value(w.detach()), largest, variance)


def bound_trial(
    name: Name = "quadratic",
    *,
    seed: int = 0,
    lr_0: float | None = None,
    rho_0: float = 0.1,
    horizons: Sequence[int] = (30, 100, 300, 1000, 3000),
    recipe: str = "sam",
) -> dict[str, Any]:
    """The mean squared gradient norm of SAM against the review's bound, with lr_0/sqrt(t) and rho_0/sqrt(t).

    ``1/T sum_t ||grad f(x_t)||^2 <= C1 / sqrt(T) + C2 log(T) / sqrt(T)``,
    ``C1 = 2 / lr_0 (f(x_0) - f(x_T))``, ``C2 = 2 (L sigma^2 lr_0 + L G rho_0)``. L is known, sigma^2 and G
    are the largest values at the points that the run went through. The expectation over the noise is left to
    whoever averages over seeds.

    Args:
        name: of the `problem`.
        seed: of the noise.
        lr_0: default 1 / (2 L); such bounds need at most 1 / L.
        rho_0: first radius (0.1; the document gives none).
        horizons: numbers of steps T, increasing; one run serves all.
        recipe: "sam", or another with one radius.

    Returns:
        "L", "sigma2", "G", "lr_0", "rho_0", and for each T in "at": "T", "mean" (the left side), "c1", "c2",
        "bound" and "share", the mean over the bound.

    Raises:
        ValueError: for an unknown problem, or horizons that are not increasing from at least 2.

    Example:
        >>> found = bound_trial("quadratic", horizons=(10, 100))
        >>> [at["T"] for at in found["at"]], all(0 < at["share"] < 1 for at in found["at"])
        ([10, 100], True)
    """
    horizons = list(horizons)
    if not horizons or horizons[0] < 2 or horizons != sorted(set(horizons)):
        raise ValueError(
            f"bound_trial: horizons is {horizons!r}; expected increasing numbers from at least 2"
        )
    of = problem(name)
    first = 0.5 / of.smoothness if lr_0 is None else lr_0
    ran = course(
        of,
        recipe=recipe,
        lr=lambda step: first / math.sqrt(step + 1),
        rho=lambda step: rho_0 / math.sqrt(step + 1),
        steps=horizons[-1],
        seed=seed,
    )
    means = ran.squared.cumsum(0)
    c2 = 2 * (of.smoothness * ran.variance * first + of.smoothness * ran.gradient * rho_0)
    at = []
    for steps in horizons:
        last = ran.last if steps == horizons[-1] else float(ran.values[steps])
        c1 = 2 / first * (float(ran.values[0]) - last)
        bound = (c1 + c2 * math.log(steps)) / math.sqrt(steps)
        mean = float(means[steps - 1]) / steps
        at.append({"T": steps, "mean": mean, "c1": c1, "c2": c2, "bound": bound, "share": mean / bound})
    return {
        "L": of.smoothness,
        "sigma2": ran.variance,
        "G": ran.gradient,
        "lr_0": first,
        "rho_0": rho_0,
        "at": at,
    }


def slope_trial(
    name: Name = "quadratic",
    *,
    seed: int = 0,
    recipe: str | None = "samar",
    lr_0: float | None = None,
    rho: float = 0.05,
    rho_falls: bool = False,
    horizons: Sequence[int] = (30, 100, 300, 1000, 3000),
    **settings: Any,
) -> dict[str, Any]:
    """How the mean squared gradient norm falls with the number of steps K, for lr = lr_0 / sqrt(K).

    ``1/K sum_k ||grad f(x_k)||^2 = O(1 / sqrt(K))`` is what SAMAR claims: a slope of -1/2 or steeper when the
    logarithm of the mean is drawn over that of K. Each K is a run of its own, since lr depends on it.

    Args:
        name: of the `problem`.
        seed: of the noise.
        recipe: a name from `recipes.names()`; None for SGD alone.
        lr_0: default 1 / (2 L).
        rho: radius (default 0.05, the recipe's).
        rho_falls: whether the radius is rho / sqrt(K), as bounds of this kind usually ask.
        horizons: numbers of steps K, at least two.
        settings: of the recipe.

    Returns:
        "slope" of the mean squared norm (least squares), "slope_norm" of the mean norm, and in "at" for each
        K: "K", "mean_squared", "mean".

    Raises:
        ValueError: for an unknown problem, or fewer than two horizons.

    Example:
        >>> found = slope_trial("quadratic", horizons=(30, 100, 300))
        >>> -1 < found["slope"] < -0.2
        True
    """
    if len(set(horizons)) < 2 or min(horizons) < 1:
        raise ValueError(
            f"slope_trial: horizons is {list(horizons)!r}; expected two or more, at least 1 each"
        )
    of = problem(name)
    first = 0.5 / of.smoothness if lr_0 is None else lr_0
    at = []
    for steps in horizons:
        shrink = 1 / math.sqrt(steps)
        lr, radius = first * shrink, rho * (shrink if rho_falls else 1.0)
        ran = course(
            of,
            recipe=recipe,
            lr=lambda _, lr=lr: lr,  # type: ignore[misc]
            rho=lambda _, radius=radius: radius,  # type: ignore[misc]
            steps=steps,
            seed=seed,
            **settings,
        )
        squared, norm = float(ran.squared.mean()), float(ran.squared.sqrt().mean())
        at.append({"K": steps, "mean_squared": squared, "mean": norm})
    return {
        "slope": _slope([(found["K"], found["mean_squared"]) for found in at]),
        "slope_norm": _slope([(found["K"], found["mean"]) for found in at]),
        "lr_0": first,
        "rho": rho,
        "at": at,
    }


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line of least squares through the logarithms."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return linear_regression(xs, ys).slope
