"""The catalogue: every published method as a short function that returns a `Recipe`.

To add one, write a function here, decorate it, and give it a row in tests/cases.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from .policies import Adaptive, ByModule, Dynamic, Euclidean, Every, LayerWise, TopScores
from .recipe import Recipe, Schedule

_CATALOGUE: dict[str, Callable[..., Recipe]] = {}


def _recipe(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Put a recipe into the catalogue; give it its name and the keyword ``every=k`` they all take.

    Recipes that have an `every` of their own, the period of their masks, keep that.
    """
    name = function.__name__
    signature = inspect.signature(function)
    if "every" in signature.parameters:

        @functools.wraps(function)
        def own(*args: Any, **kwargs: Any) -> Recipe:
            return replace(function(*args, **kwargs), name=name)

        _CATALOGUE[name] = own
        return own

    @functools.wraps(function)
    def named(*args: Any, every: int | None = None, **kwargs: Any) -> Recipe:
        recipe = replace(function(*args, **kwargs), name=name)
        return recipe if every is None else replace(recipe, cadence=Every(every))

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


@_recipe
def ssam_f(
    rho: float | Schedule = 0.05,
    sparsity: float = 0.5,
    every: int = 1000,
    *,
    pattern: Literal["unstructured", "nm", "structured"] = "unstructured",
    n: int = 2,
    m: int = 4,
    scope: Literal["global", "tensor"] = "global",
    norm: Literal["full", "masked"] = "full",
    exact: bool = False,
    compact: bool = False,
    official_quirks: bool = False,
) -> Recipe:
    """SSAM-F, sparse SAM by Fisher information: only the weights with the largest ``F`` are perturbed.

    ``e = mask * rho g / ||g||`` with the norm of the whole gradient, so that ``||e|| <= rho``, and ``mask``
    the ``(1 - sparsity) N`` largest of ``F = sum_i (d loss_i / d w)^2`` over all tensors. The optimizer owns
    no data: call ``opt.update_masks(loader, loss_fn)`` when ``opt.masks_are_due``. Before the first update
    every weight is perturbed.

    Args:
        rho: radius (default 0.05).
        sparsity: share of the weights that is not perturbed (default 0.5, of the authors' recipes; their
            command line says 0.2).
        every: steps between two updates (the authors: 1 to 5 epochs). To perturb on every k-th step only,
            replace the recipe's cadence.
        pattern: single weights, `n` of every `m` neighbours along the input dimension ("nm"), or whole output
            channels ("structured").
        n, m: of the pattern "nm" (default 2:4).
        scope: "global", or "tensor" to select the same share of every tensor.
        norm: "full" as published, or "masked" for the norm of the perturbed weights alone.
        exact: of equal scores at the threshold keep those that come first, in place of all.
        compact: keep snapshots of the perturbed weights alone, which saves memory; fused on CPUs only.
        official_quirks: keep ``int(N (1 - sparsity))`` weights, which truncates; ours rounds.

    Raises:
        ValueError: if rho is negative, sparsity not in [0, 1), or a pattern unknown.

    Example:
        >>> ssam_f(rho=0.1, sparsity=0.9).mask.live(1000)
        100

    Source: Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach",
    NeurIPS 2022, arXiv 2210.05177; patterns from arXiv 2306.17504; eps 1e-7 as in
    Mi-Peng/Sparse-Sharpness-Aware-Minimization. There the first step, with an empty mask, is one of the base
    optimizer, and the Fisher sum begins with gradients left over from the step; ours does neither. Their n:m
    mask of convolutions is scrambled by a transposition; "structured" ranks whole tensors there.
    """
    mask = TopScores(
        sparsity,
        every,
        pattern=pattern,
        n=n,
        m=m,
        scope=scope,
        norm=norm,
        exact=exact,
        compact=compact,
        official_quirks=official_quirks,
    )
    return Recipe(mask=mask, rho=rho, eps=1e-7)


@_recipe
def ssam_d(
    rho: float | Schedule = 0.05,
    sparsity: float = 0.5,
    drop_rate: float = 0.5,
    every: int = 1000,
    *,
    growth: Literal["random", "gradient", "weight"] = "random",
    drop: Literal["gradient", "weight", "random"] = "gradient",
    t_end: int | None = None,
    norm: Literal["full", "masked"] = "full",
    seed: int = 0,
    compact: bool = False,
    official_quirks: bool = False,
) -> Recipe:
    """SSAM-D, sparse SAM with a dynamic mask: drops the flattest of its weights and grows as many others.

    ``e = mask * rho g / ||g||`` with the norm of the whole gradient. The mask begins at random. Every so many
    steps the share ``drop_rate / 2 (1 + cos(pi step / t_end))`` of it with the smallest ``|g|`` is dropped
    and as many other weights are taken in; the new mask is in force from the next step on, as published.

    Args:
        rho: radius (default 0.05).
        sparsity: share of the weights that is not perturbed (default 0.5; the authors' command line: 0.2).
        drop_rate: share of the mask that is dropped in the first update (default 0.5).
        every: steps between two updates (the authors: 5 epochs). To perturb on every k-th step only, replace
            the recipe's cadence; updates that fall on other steps are then left out.
        growth: which are taken in: "random" (default), or those of the largest "gradient" or "weight".
        drop: which stay: those of the largest "gradient" (default) or "weight", or a "random" choice.
        t_end: step from which on nothing is dropped (the authors: the end of training); None for a constant
            drop_rate.
        norm: "full" as published, or "masked" for the norm of the perturbed weights alone.
        seed: of the random choices, which depend on seed, step, parameter and element alone.
        compact: keep snapshots of the perturbed weights alone, which saves memory; fused on CPUs only.
        official_quirks: count as the authors' code does, whose mask loses a weight to truncation, and many
            where ``sparsity < drop_rate (1 - sparsity)``; ours keeps its size.

    Raises:
        ValueError: if rho is negative, sparsity not in [0, 1), drop_rate not in [0, 1], or a word unknown.

    Example:
        >>> ssam_d(sparsity=0.8, drop_rate=0.3, t_end=10_000).mask.drop_rate_at(5000)
        0.15

    Source: Mi et al., NeurIPS 2022, arXiv 2210.05177; eps 1e-7 as in
    Mi-Peng/Sparse-Sharpness-Aware-Minimization. There the criterion "weight" sees perturbed weights; ours
    sees the weights themselves.
    """
    mask = Dynamic(
        sparsity,
        every,
        drop_rate=drop_rate,
        drop=drop,
        growth=growth,
        t_end=t_end,
        norm=norm,
        seed=seed,
        compact=compact,
        official_quirks=official_quirks,
    )
    return Recipe(mask=mask, rho=rho, eps=1e-7)


__all__ = ["asam", "get", "layerwise_sam", "names", "nosam", "sam", "ssam_d", "ssam_f"]
