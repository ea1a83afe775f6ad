"""The catalogue: every published method as a short function that returns a `Recipe`.

To add one, write a function here, decorate it, and give it a row in tests/cases.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from .policies import Adaptive, ByModule, Euclidean, Every, LayerWise
from .recipe import Recipe, Schedule

_CATALOGUE: dict[str, Callable[..., Recipe]] = {}


def _recipe(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Put a recipe into the catalogue; give it its name and the keyword ``every=k`` they all take."""
    name = function.__name__

    @functools.wraps(function)
    def named(*args: Any, every: int | None = None, **kwargs: Any) -> Recipe:
        recipe = replace(function(*args, **kwargs), name=name)
        return recipe if every is None else replace(recipe, cadence=Every(every))

    signature = inspect.signature(function)
    keyword = inspect.Parameter(
        "every", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | None"
    )
    named.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), keyword]
    )
    _CATALOGUE[name] = named
    return named


def names() -> list[str]:
    """The names that `get` and ``SAM(recipe=...)`` know, sorted.

    Example:
        >>> "sam" in names()
        True
    """
    return sorted(_CATALOGUE)


def get(name: str, **kwargs: Any) -> Recipe:
    """The recipe of that name, its published defaults overridden by keywords.

    Args:
        name: one of `names()`; dashes and upper case are forgiven.
        **kwargs: the recipe's own keywords, e.g. ``rho=0.1``.

    Raises:
        ValueError: if the name is unknown; the message lists the known ones.
        TypeError: if the recipe has no such keyword; the message lists those it has.

    Example:
        >>> get("asam", rho=1.0).rho
        1.0
    """
    function = _CATALOGUE.get(str(name).lower().replace("-", "_"))
    if function is None:
        raise ValueError(f"recipe {name!r} is not known. Known: {', '.join(names())}")
    accepted = inspect.signature(function).parameters
    unknown = [key for key in kwargs if key not in accepted]
    if unknown:
        raise TypeError(f"recipe '{name}' has no keyword {unknown[0]!r}. It takes: {', '.join(accepted)}")
    return function(**kwargs)


@_recipe
def sam(rho: float | Schedule = 0.05, p: float = 2) -> Recipe:
    """Sharpness-aware minimization: ``e = rho g / ||g||``, then a base step with ``grad L(w + e)``.

    ``e = rho sign(g) |g|^(q-1) / (||g||_q^q)^(1/p)``, ``1/p + 1/q = 1``; for p = inf
    ``e = rho sign(g)``. The norm is global over all tensors. Weight decay acts at the restored
    weights and not in the perturbation. Cost: two gradients, 4 + 16 bytes per fp32 parameter more
    than the base step, one copy of the weights.

    Args:
        rho: radius (default 0.05, the paper's).
        p: order of the norm, above 1; `math.inf` for the sign perturbation.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative or p is not above 1.

    Example:
        >>> sam(rho=0.1, every=2).cadence
        Every(k=2)

    Source: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021, arXiv 2010.01412. eps = 1e-12 as in the PyTorch code most people use;
    the authors' own code has none and divides by zero on a zero gradient.
    """
    return Recipe(metric=Euclidean(p=p), rho=rho, eps=1e-12)


@_recipe
def asam(
    rho: float | Schedule = 0.5,
    eta: float = 0.01,
    p: float = 2,
    only: tuple[str, ...] | None = ("*weight*",),
) -> Recipe:
    """Adaptive SAM: ``e = rho T^2 g / ||T g||``, ``T = |w| + eta`` where the name contains "weight".

    Other parameters keep ``T = 1``; they are perturbed and counted in the norm all the same. The
    names come from ``model.named_parameters()`` or ``model=``; without them T is applied to every
    parameter and a warning says so. ``SAM(..., adaptive=True)`` is the other form in use: ``T = |w|``
    everywhere, no eta; its best radius is about four times larger (rho 2 against 0.5 on CIFAR-10).

    Args:
        rho: radius (default 0.5, the authors' for CIFAR-10; 1.0 for CIFAR-100).
        eta: floor added to ``|w|`` (default 0.01, the authors' class default).
        p: order of the norm, above 1; for `math.inf`, ``e = rho T sign(g)``.
        only: shell-style patterns of the names that get T; None means every parameter.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho or eta is negative or p is not above 1.

    Example:
        >>> asam().metric.eta
        0.01

    Source: Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks", ICML 2021, arXiv 2102.11600; eps 1e-16 as in SamsungLabs/ASAM.
    Ours restores by copy, theirs by subtraction, and ours leaves the gradients as they were.
    """
    return Recipe(metric=Adaptive(p=p, eta=eta, only=only), rho=rho, eps=1e-16)


@_recipe
def layerwise_sam(
    rho: float | Schedule = 0.05,
    eta: float = 0.0,
    form: Literal["operator", "radius", "trust_ratio"] = "operator",
    only: tuple[str, ...] | None = ("*weight*",),
) -> Recipe:
    """Layer-wise SAM: one factor per tensor, ``e_l = rho T_l^2 g_l / sqrt(sum_l T_l^2 ||g_l||^2)``.

    ``T_l = ||w_l|| (1 + eta)`` where the name contains "weight", 1 elsewhere (form "operator"). Form
    "radius" gives every tensor the whole radius, ``rho g_l / ||g_l||``; form "trust_ratio" scales
    SAM's perturbation by ``min(||w_l|| / (||g_l|| + 1e-14), 20)``.

    Args:
        rho: radius (default 0.05).
        eta: as in the formula (default 0).
        form: which of the three.
        only: shell-style patterns of the names that get ``T_l``; None means every tensor.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if form is unknown, or rho or eta is negative.

    Example:
        >>> layerwise_sam(form="radius").metric.form
        'radius'

    Source: "operator" is the layer-wise ASAM operator of mueller-mp/SAM-ON, whose code computes
    ``||w_l|| (1 + eta)`` where ``||w_l|| + eta`` seems meant; we follow the code. "trust_ratio" is
    the ascent of community Look-LayerSAM code (Liu et al. 2022, arXiv 2203.02714 for the method).
    """
    return Recipe(metric=LayerWise(form=form, eta=eta, only=only), rho=rho, eps=1e-16)


@_recipe
def nosam(
    rho: float | Schedule = 0.05,
    p: float = 2,
    eta: float | None = None,
    types: tuple[type, ...] | None = None,
    invert: bool = False,
) -> Recipe:
    """Normalization-only SAM: SAM on the parameters of normalization layers, ``e = 0`` elsewhere.

    ``e_t = rho g_t / ||g_selected||``: the norm is taken over the perturbed parameters only. Layers
    are found by type with ``model=``, else by names that contain "norm" or "bn". All parameters take
    the base step with ``grad L(w + e)``.

    Args:
        rho: radius (default 0.05; the authors' tuned radii are larger than SAM's, up to 10).
        p: order of the norm, above 1.
        eta: None for SAM's ball; a number for the adaptive form ``T = |w| + eta``.
        types: module classes to select (default: all normalization layers of torch.nn).
        invert: perturb everything but those (the authors' ablation).
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative; when the optimizer is built, if neither modules nor names are
            known, or if nothing is selected.

    Example:
        >>> nosam(rho=0.5).mask.invert
        False

    Source: Mueller, Vlaar, Rolnick, Hein, "Normalization Layers Are All That Sharpness-Aware
    Minimization Needs", NeurIPS 2023, arXiv 2306.04226; eps 1e-16 as in mueller-mp/SAM-ON.
    """
    metric = Euclidean(p=p) if eta is None else Adaptive(p=p, eta=eta)
    mask = ByModule(invert=invert) if types is None else ByModule(types=types, names=(), invert=invert)
    return Recipe(metric=metric, mask=mask, rho=rho, eps=1e-16)


__all__ = ["asam", "get", "layerwise_sam", "names", "nosam", "sam"]
