"""How far the loss rises in a ball: one step along the gradient, a projected ascent, and the worst case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .ball import Ball, opmath
from .checks import check_count, check_rho, finite
from .estimate import Estimate
from .moves import Weights
from .objective import Forward, Objective
from .search import Point, search

TINY = 1e-300  # where a length is divided by, and may be 0


def one_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    rho: float = 0.05,
    *,
    p: float = 2,
    adaptive: bool = False,
    eta: float = 0.0,
    m: int | None = None,
    forward: Forward | None = None,
    samples: int | None = None,
    backend: str = "auto",
) -> Estimate:
    """How far the loss rises along the gradient, as SAM's perturbation goes: sharpness kappa_rho.

    ``L(w + e) - L(w)``, ``e = rho g / ||g||`` for p = 2, ``rho sign(g)`` for p = inf, and for others the
    point of the ball ``||T^-1 e||_p <= rho`` that is farthest along g, ``T = |w| + eta`` if adaptive, else 1.
    To first order it is ``rho ||T g||_q`` with 1/p + 1/q = 1. A gradient of zero gives 0.

    One gradient and one loss, and for p = 2 three passes of the package: norm, perturbation, restoration.
    Weights of half types are rounded where they are perturbed, and most may not move at all: measure a
    float32 copy of such a model.

    Args:
        model: the module; it is evaluated in evaluation mode, and left as it was.
        loss_fn: ``loss_fn(model(inputs), targets)``, the mean loss of a batch.
        loader: batches (inputs, targets).
        rho: radius (default 0.05, that of SAM: Foret et al. 2021).
        p: order of the norm, at least 1 (default 2); math.inf for the sign of the gradient.
        adaptive: measure weights against their own size, as ASAM does.
        eta: floor added to ``|w|`` if adaptive (default 0).
        m: perturb for each group of m samples by itself, see `m_sharpness` (default: once for all).
        forward, samples: those of `Objective`.
        backend: "auto" or a backend's name, of the passes.

    Returns:
        the rise; exact for the data given, with m the mean over groups and its standard error.

    Raises:
        ValueError: if an argument is out of its range, or loss or gradient are not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        >>> x, y = torch.eye(2), torch.zeros(2, 1)  # so the loss is ||w||^2 / 2
        >>> print(one_step(model, torch.nn.functional.mse_loss, [(x, y)], rho=1.0))
        5.5

    Source: Foret et al., ICLR 2021, arXiv 2010.01412; the adaptive form: Kwon et al., ICML 2021, arXiv
    2102.11600.
    """
    ball = Ball(rho, p, adaptive, eta)
    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    groups = objective.groups(m)
    rises = []
    with objective.held() as base:
        weights = Weights(objective.params, base, backend, names=objective.names)
        for group in groups:
            loss, grads = group.gradient()
            finite(loss)
            weights.ascend(grads, ball)
            rises.append(finite(group.loss(), f"at the perturbed weights (rho={rho})") - loss)
            weights.restore()
    return over_groups(rises, groups)


def m_sharpness(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    m: int,
    rho: float = 0.05,
    *,
    p: float = 2,
    adaptive: bool = False,
    eta: float = 0.0,
    forward: Forward | None = None,
    samples: int | None = None,
    backend: str = "auto",
) -> Estimate:
    """The mean over groups of m samples of `one_step`, each perturbed for itself.

    ``sum_i m_i (L_i(w + e_i) - L_i(w)) / sum_i m_i``, where e_i is that of the gradient of group i. Groups
    are formed in the order of the loader, across its batches; the last may be smaller and counts for less.

    Args:
        model, loss_fn, loader: as in `one_step`.
        m: samples of a group; 1 is a perturbation for each sample.
        rho, p, adaptive, eta, forward, samples, backend: as in `one_step`.

    Returns:
        the mean, ``.values`` by group, and its standard error over groups.

    Raises:
        ValueError: as `one_step`, and if m is no whole number of at least 1.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> x, y = torch.randn(6, 2), torch.randn(6, 1)
        >>> found = m_sharpness(model, torch.nn.functional.mse_loss, [(x, y)], m=2)
        >>> len(found.values), bool(found > 0)
        (3, True)

    Source: Foret et al., ICLR 2021, section 4.1.
    """
    options: dict[str, Any] = {"forward": forward, "samples": samples, "backend": backend}
    return one_step(model, loss_fn, loader, rho, p=p, adaptive=adaptive, eta=eta, m=m, **options)


def over_groups(values: list[float], groups: list[Objective]) -> Estimate:
    """The mean of what was found for each group; exact where there is but one."""
    return Estimate(values, is_random=len(values) > 1, weights=[group.count for group in groups])


def projected_ascent(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    rho: float = 0.1,
    *,
    steps: int = 20,
    step: float = 0.1,
    restarts: int = 1,
    seed: int = 0,
    m: int | None = 128,
    forward: Forward | None = None,
    samples: int | None = 256,
    backend: str = "auto",
) -> Estimate:
    """How far the loss rises in a ball by several steps along the gradient, each projected back into it.

    ``d <- P(d + step rho g / ||g||)``, ``g = grad L(w + d)``, ``P(d) = d min(1, rho / ||d||)``. The largest
    loss on the way counts, that at w included, so the result is never negative. A gradient of zero ends an
    ascent. Costs `steps` gradients and one loss for each group and restart; each step moves the weights by
    the package's passes from one copy of them.

    Args:
        model, loss_fn, loader: as in `one_step`.
        rho: radius (default 0.1).
        steps: steps of an ascent (default 20).
        step: length of a step as a share of rho (default 0.1).
        restarts: ascents (default 1); the first is from w, others from random points of the sphere.
        seed: of those points.
        m: samples of a group, see `m_sharpness` (default 128; None for all together).
        samples: take so many (default 256; None for all).
        forward, backend: as in `one_step`.

    Returns:
        the mean over groups, and its standard error.

    Raises:
        ValueError: if an argument is out of its range, or a loss or gradient is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> data = [(torch.randn(6, 2), torch.randn(6, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss
        >>> once = one_step(model, loss_fn, data, rho=0.1)
        >>> bool(projected_ascent(model, loss_fn, data, rho=0.1, steps=1, step=1.0) == once)
        True

    Source: the defaults are those of Andriushchenko and Flammarion, ICML 2022, `eval_sharpness.py` of
    tml-epfl/understanding-sam. That code keeps the restart with the highest error, which is none at all as
    long as no sample is classified wrongly; here the highest loss counts.
    """
    check_rho(rho)
    check_count("steps", steps)
    check_count("restarts", restarts)
    if not (isinstance(step, int | float) and 0 < step < math.inf):
        raise ValueError(f"sharpness: step is {step!r}; expected a positive share of rho")
    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    groups = objective.groups(m)
    rises = []
    with objective.held() as base:
        weights = Weights(objective.params, base, backend, names=objective.names)
        for number, group in enumerate(groups):
            loss, first = group.gradient()
            best = finite(loss)
            for restart in range(restarts):
                grads, scale = first, 1.0
                d = [torch.zeros_like(opmath(w)) for w in base]
                if restart > 0:
                    d = weights.noise(check_count("seed", seed, 0), number * restarts + restart)
                    scale = rho / weights.norm(d)
                    weights.move(d, scale)
                    grads = group.gradient()[1]
                for left in range(steps, 0, -1):
                    size = weights.norm(grads)
                    if size == 0:
                        break
                    weights.add(d, scale, [opmath(g) for g in grads], step * rho / size)
                    scale = min(1.0, rho / max(weights.norm(d), TINY))
                    weights.move(d, scale)
                    here, grads = group.gradient() if left > 1 else (group.loss(), grads)
                    best = max(best, finite(here, f"at weights within rho={rho}"))
            weights.restore()
            rises.append(best - loss)
    return over_groups(rises, groups)


def worst_case(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    rho: float,
    *,
    p: float = 2,
    adaptive: bool = False,
    steps: int = 20,
    m: int | None = 128,
    restarts: int = 1,
    seed: int = 0,
    published: bool = False,
    forward: Forward | None = None,
    samples: int | None = 1024,
    backend: str = "auto",
) -> Estimate:
    """The largest rise of the loss in a ball, searched with steps that shrink by themselves (Auto-PGD).

    ``max L(w + e) - L(w)`` over ``||e / T||_p <= rho``, ``T = |w|`` if adaptive, else 1, p = 2 or inf.

    Step k: ``z = P(e + a T^2 g / ||T g||_2)``, for p = inf ``P(e + a T sign(g))``, g taken at w + e; then
    ``e <- 3/4 z + 1/4 e_before``, e_before the e of the step before, so e stays in the ball. P scales e / T
    down to rho, or clips it. a begins at 2 rho. After ceil(c_j n) steps of n, ``c = .22`` and then
    ``c_j + max(c_j - c_j-1 - .03, .06)``, a is halved and the search goes on from the best e, where fewer
    than 3/4 of the steps since the last such look improved on the best loss, or where neither a nor the best
    loss has changed since.

    The largest loss counts, those at w and at `one_step`'s point included: the result is never below either,
    and a lower bound of the maximum. Costs `steps` gradients and two losses for each group (without the
    second for a restart), and memory for six copies of the weights.

    Args:
        model, loss_fn, loader: as in `one_step`.
        rho: radius. The paper's: .25 to 2 for p = 2, .0005 to .004 for p = inf, .001 to .008 if adaptive too.
        p: 2 (default) or math.inf.
        adaptive: measure weights against their own size; weights of 0 stay.
        steps: n, steps of a search (default 20).
        m: samples of a group, each searched for by itself (default 128; None for all together).
        restarts: searches (default 1); the first is from e = 0, others from random points of the ball's edge
            (p = 2) or of the ball (p = inf).
        seed: of those points.
        published: for the adaptive p = 2 step and project as the authors' code does: along ``T g / ||g||``,
            and to the nearest point of the ball, which is found by bisection. The two do not belong to one
            metric, so that search settles below the maximum, sometimes below `one_step`'s point.
        samples: take so many (default 1024; None for all).
        forward, backend: as in `one_step`.

    Returns:
        the mean over groups, and its standard error.

    Raises:
        ValueError: if an argument is out of its range, or a loss or gradient is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> data = [(torch.randn(6, 2), torch.randn(6, 1))]
        >>> loss_fn = torch.nn.functional.mse_loss
        >>> bool(worst_case(model, loss_fn, data, rho=0.5) >= one_step(model, loss_fn, data, rho=0.5))
        True

    Source: Andriushchenko et al., ICML 2023, arXiv 2302.07011, `sharpness.py` of
    tml-epfl/sharpness-vs-generalization, after Croce and Hein, ICML 2020. The momentum is that of the code,
    which its comment gives in another form. Besides `published` we differ from the code in that a random
    start there fails, and would lie outside of the ball for p = 2; that where a is halved there, the weights
    go back to the best ones but e does not; that a weight of 0 makes the adaptive projection there no number;
    and that `one_step`'s point counts.
    """
    ball = Ball(rho, p, adaptive)
    if p not in (2, math.inf):
        raise ValueError(f"sharpness: p is {p!r}; the worst case is searched for p=2 and p=math.inf")
    check_count("steps", steps)
    check_count("restarts", restarts)
    check_count("seed", seed, 0)
    objective = Objective(model, loss_fn, loader, forward=forward, samples=samples)
    groups = objective.groups(m)
    rises = []
    with objective.held() as base:
        weights = Weights(objective.params, base, backend, names=objective.names)
        for number, group in enumerate(groups):
            weights.restore()
            loss, grads = group.gradient()
            finite(loss)
            weights.ascend(grads, ball)
            best = max(loss, finite(group.loss(), f"at the perturbed weights (rho={rho})"))
            point = Point(loss, [torch.zeros_like(opmath(w)) for w in base], grads)
            for restart in range(restarts):
                if restart > 0:
                    e = ball.edge(base, weights.noise(seed, number * restarts + restart))
                    weights.move(e)
                    here, grads = group.gradient()
                    point = Point(finite(here, f"at weights within rho={rho}"), e, grads)
                best = max(best, search(group, weights, ball, point, steps, published=published).loss)
            rises.append(best - loss)
    return over_groups(rises, groups)
