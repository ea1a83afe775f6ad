"""The catalogue: every published method as a short function that returns a `Recipe`.

To add one, write a function here, decorate it, and give it a row in tests/variants.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from .policies import (
    Adaptive,
    AdaptiveRatio,
    Anticipate,
    Anticipated,
    Bernoulli,
    ByModule,
    Curvature,
    Decoupled,
    Dynamic,
    Ema,
    Euclidean,
    Every,
    Fisher,
    Friendly,
    LayerWise,
    Lookbehind,
    Mirrored,
    Mix,
    Momentum,
    MultiStep,
    Noise,
    NormGate,
    RandomStart,
    ReuseOrthogonal,
    SurrogateGap,
    TopScores,
    WithProbability,
)
from .recipe import Recipe, Schedule

_CATALOGUE: dict[str, Callable[..., Recipe]] = {}

_OWN_CADENCE = ("ae_sam", "looksam", "rst")


def _recipe(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Put a recipe into the catalogue; give it its name and the keyword ``every=k`` they all take.

    Recipes that have an `every` of their own, the period of their masks, keep that, and those that choose
    their steps by themselves have none.
    """
    name = function.__name__
    signature = inspect.signature(function)
    if "every" in signature.parameters or name in _OWN_CADENCE:

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


def table() -> str:
    """What every recipe costs with its defaults around SGD-momentum, counted in a few small steps; print it.

    Gradients per step, launches and bytes moved per fp32 parameter with the base's update (20 bytes by
    itself), and bytes kept per fp32 parameter beyond parameters, gradients and the base's state. Two numbers
    are those of a step that perturbs and of one that does not.

    Example:
        >>> "friendly_sam" in table()
        True
    """
    from .costs import table as costs_table  # which takes steps, and so imports the optimizer

    return costs_table({name: _CATALOGUE[name] for name in names()})


@_recipe
def sam(
    rho: float | Schedule = 0.05, p: float = 2, decay: Literal["outside", "inside"] = "outside"
) -> Recipe:
    """Sharpness-aware minimization: ``e = rho g / ||g||``, then a base step with ``grad L(w + e)``.

    ``e = rho sign(g) |g|^(q-1) / (||g||_q^q)^(1/p)``, ``1/p + 1/q = 1``; for p = inf
    ``e = rho sign(g)``, and for p = 1 the gradients of the largest size share rho. The norm is global over
    all tensors. Weight decay acts at the restored weights and not in the perturbation. Cost: two gradients, 4
    + 16 bytes per fp32 parameter more than the base step, one copy of the weights.

    Args:
        rho: radius (default 0.05, the paper's).
        p: order of the norm, at least 1; `math.inf` for the sign perturbation.
        decay: "outside" (default), or "inside" to perturb the loss with its weight decay, as the authors' own
            code does.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative or p is below 1.

    Example:
        >>> sam(rho=0.1, every=2).cadence
        Every(k=2)

    Source: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", ICLR 2021, arXiv 2010.01412. eps = 1e-12 as in the PyTorch code most people use;
    the authors' own code has none and divides by zero on a zero gradient.
    """
    return Recipe(metric=Euclidean(p=p), rho=rho, eps=1e-12, decay=decay)


@_recipe
def asam(
    rho: float | Schedule = 0.5,
    eta: float = 0.01,
    p: float = 2,
    only: tuple[str, ...] | None = ("*weight*",),
    types: tuple[type, ...] | None = None,
) -> Recipe:
    """Adaptive SAM: ``e = rho T^2 g / ||T g||``, ``T = |w| + eta`` where the name contains "weight".

    Other parameters keep ``T = 1``; they are perturbed and counted in the norm all the same. The
    names come from ``model.named_parameters()`` or ``model=``; without them T is applied to every
    parameter and a warning says so. ``SAM(..., adaptive=True)`` is the other form in use: ``T = |w|``
    everywhere, no eta; its best radius is about four times larger (rho 2 against 0.5 on CIFAR-10).

    Args:
        rho: radius (default 0.5, the authors' for CIFAR-10; 1.0 for CIFAR-100).
        eta: floor added to ``|w|`` (default 0.01, the authors' class default).
        p: order of the norm, at least 1; for `math.inf`, ``e = rho T sign(g)``.
        only: shell-style patterns of the names that get T; None means every parameter.
        types: module classes whose parameters get T, in place of names; needs ``model=``.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho or eta is negative or p is below 1.

    Example:
        >>> asam().metric.eta
        0.01

    Source: Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks", ICML 2021, arXiv 2102.11600; eps 1e-16 as in SamsungLabs/ASAM.
    Ours restores by copy, theirs by subtraction, and ours leaves the gradients as they were.
    """
    names = only if types is None else None
    return Recipe(metric=Adaptive(p=p, eta=eta, only=names, types=types), rho=rho, eps=1e-16)


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
        p: order of the norm, at least 1.
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
        compact: keep snapshots of the perturbed weights alone, which saves memory, 0.4 bytes per weight at
            sparsity 0.9 in place of 4; fused on CPUs only, where a step took 1.25 times the dense one at
            sparsity 0.5 and broke even near 0.99 (bench/NOTES.md).
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
        compact: keep snapshots of the perturbed weights alone, which saves memory, 0.4 bytes per weight at
            sparsity 0.9 in place of 4; fused on CPUs only, where a step took 1.25 times the dense one at
            sparsity 0.5 and broke even near 0.99 (bench/NOTES.md).
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


@_recipe
def fisher_sam(rho: float | Schedule = 0.1, eta: float = 1.0) -> Recipe:
    """Fisher SAM: ``e = rho h / sqrt(sum g h)``, ``h = g / (1 + eta g^2)``, a ball of the Fisher information.

    The information is diagonal and that of the mean gradient. Its size matters: gradients must be unscaled
    and averaged, and eta fits one batch size. eta = 0 is SAM.

    Args:
        rho: radius in the metric's units (default 0.1, as in torch-unified-SAM-optimization).
        eta: weight of the information (default 1, likewise).
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho or eta is negative.

    Example:
        >>> fisher_sam(eta=0.2).metric
        Fisher(p=2.0, eta=0.2)

    Source: Kim et al., "Fisher SAM: Information Geometry and Sharpness Aware Minimisation", ICML 2022, arXiv
    2206.04920. No code of the authors is public; two third-party implementations agree on this form. One of
    them normalizes every tensor by itself; ours is global.
    """
    return Recipe(metric=Fisher(eta=eta), rho=rho, eps=1e-12)


@_recipe
def k_sam(rho: float | Schedule = 0.05) -> Recipe:
    """K-SAM: SAM on the K samples of the largest loss, which `sampling.top_losses` chooses.

    ``e = rho g / ||g||`` and the descent, both with gradients of the mean loss of these samples. The
    optimizer owns no data, so its half is that of `sam`: ``opt.step(sampling.top_losses(loss_fn, batch,
    keep=32))``.

    Args:
        rho: radius (default 0.05).
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative.

    Example:
        >>> k_sam().name
        'k_sam'

    Source: Ni et al., "K-SAM: Sharpness-Aware Minimization at the Speed of SGD", 2022, arXiv 2210.12864, from
    its abstract; no code is public.
    """
    return Recipe(rho=rho, eps=1e-12)


@_recipe
def looksam(
    rho: float | Schedule = 0.1,
    alpha: float = 0.7,
    k: int = 5,
    scope: Literal["global", "tensor"] = "global",
) -> Recipe:
    """LookSAM: SAM on every k-th step, and on the others the gradient with what SAM added to it last.

    ``e = rho g / ||g||``, ``gs = grad L(w + e)``; ``v = gs - (<g, gs> / ||g||^2) g`` is kept from the steps
    that perturb, and the others take ``d = g + alpha (||g|| / ||v||) v``.

    Args:
        rho: radius (default 0.1, Leminhbinh0209/LookSAM).
        alpha: share of v (default 0.7, likewise).
        k: period (default 5, likewise).
        scope: norms and dots "global" (default), or of each "tensor" as in rollovd/LookSAM.

    Raises:
        ValueError: if rho is negative, k below 1 or scope unknown.

    Example:
        >>> looksam(k=10).cadence
        Every(k=10)

    Source: Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, arXiv
    2203.02714. The authors' repository holds no code. That of Leminhbinh0209 makes its first v orthogonal to
    the weights by mistake; ours does not.
    """
    return Recipe(combine=ReuseOrthogonal(alpha=alpha, scope=scope), cadence=Every(k), rho=rho, eps=1e-12)


@_recipe
def esam(
    rho: float | Schedule = 0.05,
    beta: float = 0.6,
    by: Literal["element", "tensor"] = "element",
    norm: Literal["full", "masked"] = "full",
    seed: int = 0,
) -> Recipe:
    """Efficient SAM: a random share of the weights is perturbed, ``e = (rho / beta) m g / ||g||``.

    ``m_i ~ Bernoulli(beta)``, drawn by counter and never kept. ``by="tensor", norm="masked"`` is the authors'
    code, where whole tensors are drawn and ``||e|| = rho / beta``. The other half of the method, training on
    the samples whose loss grew most, is `sampling.sharpest`.

    Args:
        rho: radius (default 0.05, dydjw9/Efficient_SAM).
        beta: probability that a weight is perturbed (default 0.6, its scripts; 1 in its class, which is SAM).
        by: "element" as in the paper, or "tensor".
        norm: "full" as in the paper, or "masked" for that of what is perturbed.
        seed: of the draws, which depend on seed, step, parameter and element alone.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative, beta not above 0 to 1, or a word unknown.

    Example:
        >>> esam(beta=0.5).mask.scale
        2.0

    Source: Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR
    2022, arXiv 2110.03141; eps 1e-7 as in dydjw9/Efficient_SAM. There a tensor that is not drawn gets no
    gradient in the first pass; ours computes it.
    """
    return Recipe(mask=Bernoulli(keep=beta, by=by, norm=norm, seed=seed), rho=rho, eps=1e-7)


@_recipe
def friendly_sam(
    rho: float | Schedule = 0.05,
    sigma: float = 1.0,
    lmbda: float = 0.9,
    order: Literal["code", "paper"] = "code",
) -> Recipe:
    """Friendly SAM: perturb along the gradient without its average, ``d = g - sigma m``.

    ``e = rho d / ||d||``, ``m <- lmbda m + (1 - lmbda) g``. The base steps with the whole gradient at ``w +
    e``. Where d is as small as rounding, late in training with large batches, the perturbation is noise of
    full radius.

    Args:
        rho: radius (default 0.05, nblt/F-SAM; its script takes 0.2).
        sigma: share of the average that is removed (default 1, likewise).
        lmbda: weight of the old average (default 0.9, likewise).
        order: "code" subtracts the average before this gradient (default), "paper" the one after it.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative, lmbda not from 0 to 1 or order unknown.

    Example:
        >>> friendly_sam(lmbda=0.6).direction.memory
        (0.4, 0.6)

    Source: Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024, arXiv 2403.12350. Ours leaves the
    parameters' gradients as they are.
    """
    return Recipe(direction=Friendly(sigma=sigma, lmbda=lmbda, order=order), rho=rho, eps=1e-12)


@_recipe
def rand_sam(rho: float | Schedule = 0.05, seed: int = 0) -> Recipe:
    """Random SAM: ``e = rho z / ||z||`` with ``z ~ N(0, 1)`` over all weights, and one gradient per step.

    Args:
        rho: radius (default 0.05).
        seed: of z, which depends on seed, step, parameter and element alone.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative or seed no whole number.

    Example:
        >>> rand_sam().gradients
        1

    Source: Foret et al. 2021, arXiv 2010.01412, appendix C.5; Tiwary and Aananth 2024, arXiv 2411.01714,
    whose distribution is not known to us. R-SAM, which ascends after the noise, is `r_sam`.
    """
    return Recipe(direction=Noise(seed=seed), rho=rho, eps=1e-12)


@_recipe
def multistep_sam(
    rho: float | Schedule = 0.05, n: int = 3, step: float = 1.0, project: bool = True
) -> Recipe:
    """n-step SAM: n ascent steps of length ``step rho`` within the ball, and the descent from the last.

    ``w_k = P(w_(k-1) + e_k)``, ``e_k = step rho g / ||g||``, P the projection onto the ball of radius rho
    around w. n + 1 gradients.

    Args:
        rho: radius (default 0.05).
        n: ascent steps (default 3; 1 is SAM).
        step: length of each as a share of rho (default 1, tml-epfl/understanding-sam).
        project: whether to project (default). ``project=False`` is optax's.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative, n below 1 or step not positive.

    Example:
        >>> multistep_sam(n=5).gradients
        6

    Source: Foret et al. 2021, arXiv 2010.01412, appendix C.6; Andriushchenko and Flammarion, ICML 2022, arXiv
    2206.06232; eps 1e-12 as in tml-epfl/understanding-sam.
    """
    return Recipe(probe=MultiStep(n=n, step=step, project=project), rho=rho, eps=1e-12)


@_recipe
def samar(
    rho: float | Schedule = 0.05,
    lambda_0: float = 0.5,
    chi_up: float = 1.0,
    chi_down: float = 1.0,
    up: float = 1.1,
    down: float = 0.9,
    smallest: float = 0.0,
    largest: float = 1.0,
    weighting: Literal["blend", "add"] = "blend",
) -> Recipe:
    """SAM with adaptive regularization: ``d = (1 - l) g + l gs``, l following the gradient norm.

    ``gs = grad L(w + e)``, ``e = rho g / ||g||``; ``r = ||g|| / ||g_before||``; after the step l grows by
    `up` where ``r > chi_up`` and shrinks by `down` where ``r < chi_down``, within its bounds.
    ``lambda_0=1, up=down=1`` is SAM, and ``lambda_0=0`` the base alone. The ratio depends on the scale of the
    loss: unscale gradients first.

    Args:
        rho: radius (default 0.05).
        lambda_0: the first weight.
        chi_up, chi_down, up, down, smallest, largest, weighting: see `policies.AdaptiveRatio`.
        every: perturb on every k-th step only.

    Raises:
        ValueError: for numbers that are negative or not finite.

    Example:
        >>> samar(lambda_0=0.25).combine.first_scalars()["lambda"]
        0.25

    Source: Zou, Deng, Sun, "Sharpness-Aware Minimization with Adaptive Regularization", 2024, arXiv
    2412.16854. A reconstruction from the abstract: the paper's rule and its values are not known to us, and
    every default is our choice.
    """
    rule = AdaptiveRatio(
        lambda_0=lambda_0,
        chi_up=chi_up,
        chi_down=chi_down,
        up=up,
        down=down,
        smallest=smallest,
        largest=largest,
        weighting=weighting,
    )
    return Recipe(combine=rule, rho=rho, eps=1e-12)


@_recipe
def vasso(rho: float | Schedule = 0.05, theta: float = 0.9) -> Recipe:
    """Variance-suppressed SAM: ``e = rho m / ||m||`` along the average ``m <- (1 - theta) m + theta g``.

    The average depends on the scale of the loss: unscale gradients first.

    Args:
        rho: radius (default 0.05, BingcongLi/VaSSO; its script takes 0.2).
        theta: weight of the present gradient (default 0.9, likewise); 1 is SAM.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative or theta not from 0 to 1.

    Example:
        >>> vasso(theta=0.4).direction
        Ema(theta=0.4)

    Source: Li and Giannakis, "Enhancing Sharpness-Aware Optimization Through Variance Suppression", NeurIPS
    2023, arXiv 2309.15639; eps 1e-7 as in BingcongLi/VaSSO.
    """
    return Recipe(direction=Ema(theta=theta), rho=rho, eps=1e-7)


@_recipe
def cr_sam(rho: float | Schedule = 0.1, gamma: float = 0.1, beta: float = 0.1) -> Recipe:
    """Curvature-regularized SAM: ``d = g+ + gamma (g+ + g- - 2 g) + beta (g+ - g-)``.

    The gradients are those at ``w``, ``w + e`` and ``w - e``, ``e = rho g / ||g||``. The curvature term is of
    the order of rho^2, so under half-precision autocast it is mostly rounding noise.

    Args:
        rho: radius (default 0.1, TrustAIoT/CR-SAM).
        gamma, beta: weights (default 0.1 and 0.1, its class; its script takes beta 0.01).
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative or a weight not finite.

    Example:
        >>> cr_sam().gradients
        3

    Source: Wu, Luo, Wunsch, "CR-SAM: Curvature Regularized Sharpness-Aware Minimization", AAAI 2024, arXiv
    2312.13555, as its code has it: plain constants, where the paper divides by losses.
    """
    return Recipe(probe=Mirrored(), combine=Curvature(gamma=gamma, beta=beta), rho=rho, eps=1e-12)


@_recipe
def gsam(
    rho: float | Schedule = 0.05, alpha: float = 0.4, adaptive: bool = False, minimize_fp: bool = True
) -> Recipe:
    """Surrogate-gap SAM: ``d = gs - alpha (g - c gs)``, ``c = <g, gs> / ||gs||^2``.

    What is subtracted is the clean gradient's part orthogonal to the perturbed one. alpha = 0 is SAM. The
    radius of the paper follows the learning rate: ``rho=ProportionalToLr(0.6, 0.1, lr_max, lr_min)`` of
    `sam_kernels.schedules`.

    Args:
        rho: radius, or a schedule of it (default 0.05).
        alpha: share of that part (default 0.4, juntang-zhuang/GSAM's example; 0.6 in
            google-research/big_vision).
        adaptive: ``e = rho w^2 g / || |w| g ||``, as in the authors' torch code.
        minimize_fp: False for ``d = g + alpha (gs - c' g)``, the option of the authors' JAX code.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative or alpha not finite.

    Example:
        >>> gsam(adaptive=True).metric.eta
        0.0

    Source: Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022, arXiv
    2203.08065. In the authors' torch code a tensor without a gradient has an earlier perturbation subtracted
    again; ours restores by copy.
    """
    metric = Adaptive() if adaptive else Euclidean()
    return Recipe(
        metric=metric, combine=SurrogateGap(alpha=alpha, minimize_fp=minimize_fp), rho=rho, eps=1e-12
    )


@_recipe
def wsam(rho: float | Schedule = 0.05, gamma: float = 0.9, decoupled: bool = True) -> Recipe:
    """Weighted SAM: sharpness as a regularizer of weight ``a = gamma / (1 - gamma)``.

    ``gs = grad L(w + e)``, ``e = rho g / ||g||``. Decoupled (default): the base steps with g, then ``w <- w -
    lr a (gs - g)``. Coupled: the base steps with ``(1 - a) g + a gs``. gamma = 1/2 is SAM if coupled, or with
    SGD without momentum.

    Args:
        rho: radius (default 0.05, intelligent-machine-learning/atorch).
        gamma: from 0 to below 1 (default 0.9, likewise).
        decoupled: see above.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative or gamma not from 0 to below 1.

    Example:
        >>> wsam(gamma=0.5, decoupled=False).combine
        Mix(first=0.0, last=1.0, normalize=False)

    Source: Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term",
    KDD 2023, arXiv 2305.15817. atorch perturbs by the local gradient under DDP; ours by the one the caller
    has.
    """
    if not (isinstance(gamma, int | float) and 0 <= gamma < 1):
        raise ValueError(f"wsam: gamma is {gamma!r}; expected a number from 0 to below 1")
    a = gamma / (1 - gamma)
    return Recipe(combine=Decoupled(a) if decoupled else Mix(1 - a, a), rho=rho, eps=1e-12)


@_recipe
def gnp(rho: float | Schedule = 0.1, alpha: float = 0.8, normalize: bool = True) -> Recipe:
    """Gradient-norm penalty: ``d = (1 - alpha) u + alpha gs``, ``u = g / ||g||``, or g if not `normalize`.

    ``gs = grad L(w + e)``, ``e = rho g / ||g||``. A unit vector is mixed with a gradient, so the scale of the
    loss
    matters: unscale gradients first.

    Args:
        rho: radius (default 0.1, zhaoyang-0204/gnp).
        alpha: ``lambda / rho`` of the paper (default 0.8, likewise).
        normalize: the authors' default mixes a unit vector with a gradient; False mixes gradients.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative or alpha not finite.

    Example:
        >>> gnp(alpha=0.75, normalize=False).combine.weights(None, {})
        (0.25, 0.75)

    Source: Zhao, Zhang, Hu, "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
    Learning", ICML 2022, arXiv 2202.03599.
    """
    return Recipe(combine=Mix(1 - alpha, alpha, normalize=normalize), rho=rho, eps=1e-12)


@_recipe
def sampa(rho: float | Schedule = 0.1, lmbda: float = 0.2) -> Recipe:
    """SAM parallelized: two gradients that need not wait for each other, the second of the next batch.

    ``e = rho y / ||y||`` with y the gradient that the step before evaluated at ``w - lr y``, its expected
    next iterate; ``d = (1 - lmbda) g(w + e) + lmbda y_next``. Call ``opt.step(closure,
    ahead=closure_of_next_batch)``, and hand the same batch in as `closure` of the next step.

    Args:
        rho: radius (default 0.1, LIONS-EPFL/SAMPa).
        lmbda: weight of the second gradient (default 0.2, likewise; 0 is the plain method).
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative or lmbda not from 0 to 1.

    Example:
        >>> sampa(lmbda=0.0).combine
        Anticipate(lmbda=0.0)

    Source: Xie, Pethick, Cevher, "SAMPa: Sharpness-aware Minimization Parallelized", NeurIPS 2024, arXiv
    2410.10683. The first step evaluates one gradient more where theirs is a plain one, and theirs loses its
    perturbation for lmbda = 0; ours runs on one device.
    """
    return Recipe(probe=Anticipated(), combine=Anticipate(lmbda=lmbda), rho=rho, eps=1e-12)


@_recipe
def msam(rho: float | Schedule = 0.3, decay: Literal["outside", "inside"] = "outside") -> Recipe:
    """Momentum SAM: ``e = -rho v / ||v||`` along the base's momentum v, and one gradient per step.

    v is "momentum_buffer" of SGD or "exp_avg" of Adam and AdamW; before the base has one, nothing is
    perturbed.

    Args:
        rho: radius (default 0.3, MarlonBecker/MSAM; 3 for its CIFAR runs with SGD).
        decay: "outside" (default): weight decay of the clean weights; "inside": of the perturbed ones, as in
            the authors' SGD.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho is negative.

    Example:
        >>> msam().gradients
        1

    Source: Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational
    Overhead", 2024, arXiv 2401.12033. There weights stay perturbed between steps, so that evaluation and
    checkpoints must move them back, and a change of rho moves them for good; ours are perturbed inside of a
    step only.
    """
    return Recipe(direction=Momentum(), rho=rho, eps=1e-12, decay=decay)


@_recipe
def r_sam(rho: float | Schedule = 0.05, noise: float = 0.1, keep_noise: bool = True, seed: int = 0) -> Recipe:
    """Randomly smoothed SAM: noise first, then ``e = rho g / ||g||`` with the gradient there.

    ``delta_l = noise ||w_l|| n_l / ||n_l||`` per tensor, ``n_l ~ N(0, 1)``; gradients at ``w + delta`` and
    ``w + delta + e``.

    Args:
        rho: radius (default 0.05).
        noise: length of the noise as a share of the tensor's norm (default 0.1).
        keep_noise: False evaluates the second gradient at ``w + e``.
        seed: of the noise, which depends on seed, step, parameter and element alone.
        every: perturb on every k-th step only.

    Raises:
        ValueError: if rho or noise is negative or seed no whole number.

    Example:
        >>> r_sam(noise=0.05).probe.noise
        0.05

    Source: Liu et al., "Random Sharpness-Aware Minimization", NeurIPS 2022. No code of the authors is public;
    the noise and the second point are those of a community trainer, and the paper's may differ.
    """
    return Recipe(probe=RandomStart(noise=noise, keep_noise=keep_noise, seed=seed), rho=rho, eps=1e-12)


@_recipe
def ae_sam(
    rho: float | Schedule = 0.05,
    *,
    steps: int = 10_000,
    decay: float = 0.9,
    late: float = -1.0,
    early: float = 1.0,
) -> Recipe:
    """Adaptive policy to employ SAM: SAM on steps of large gradients, the base alone on the others.

    ``e = rho g / ||g||`` where ``||g||^2 >= mean + c sqrt(variance)``, see `policies.NormGate`; the host
    waits for the norm.

    Args:
        rho: radius (default 0.05).
        steps: of the whole training, over which c goes from `early` to `late`; set it (default 10,000).
        decay: of mean and variance (default 0.9).
        late, early: c at the end and at the beginning (default -1 and 1).

    Raises:
        ValueError: if rho is negative, steps below 1 or decay not from 0 to 1.

    Example:
        >>> ae_sam(steps=1000).cadence.decay
        0.9

    Source: Jiang et al., "An Adaptive Policy to Employ Sharpness-Aware Minimization", ICLR 2023; formulas by
    a third-party transcription, defaults unconfirmed.
    """
    return Recipe(cadence=NormGate(steps=steps, decay=decay, late=late, early=early), rho=rho, eps=1e-12)


@_recipe
def rst(
    rho: float | Schedule = 0.05, probability: float | Callable[[int], float] = 0.5, seed: int = 0
) -> Recipe:
    """Randomized sharpness-aware training: SAM with a probability, the base alone otherwise.

    ``e = rho g / ||g||`` on the steps that are drawn.

    Args:
        rho: radius (default 0.05).
        probability: that a step perturbs, or a schedule ``step -> probability`` (default 0.5).
        seed: of the choices, which depend on seed and step alone: all workers make the same.

    Raises:
        ValueError: if rho is negative or the probability not from 0 to 1.

    Example:
        >>> rst(probability=1.0).cadence.is_due(7)
        True

    Source: Zhao, Zhang, Hu, "Randomized Sharpness-Aware Training for Boosting Computational Efficiency in
    Deep Learning", 2022, arXiv 2203.09962.
    """
    return Recipe(cadence=WithProbability(probability, seed=seed), rho=rho, eps=1e-12)


@_recipe
def lookbehind_sam(rho: float | Schedule = 0.05, k: int = 2, alpha: float | None = 0.5) -> Recipe:
    """Lookbehind SAM: k ascents on one batch, a base step with the gradient of each, and part of the way
    back.

    ``p_i = p_(i-1) + e_i``, ``e_i = rho g(p_(i-1)) / ||g(p_(i-1))||``, from ``p_0 = w``; the base steps on
    from its own last point with ``g(p_i)``, k times; ``w <- w + alpha (last - w)``.

    Args:
        rho: length of each ascent (default 0.05).
        k: ascents (default 2).
        alpha: share of the way (default 0.5); None for ``(cos(first displacement, whole displacement) + 1) /
            2`` of each tensor.
        every: look behind on every k-th step only.

    Raises:
        ValueError: if rho is negative, k below 1 or alpha not from 0 to 1.

    Example:
        >>> lookbehind_sam(k=5).gradients
        6

    Source: Mordido et al., "Lookbehind-SAM: k steps back, 1 step forward", ICML 2024, arXiv 2307.16704; eps
    1e-16 as in chandar-lab/Lookbehind-SAM. There each ascent evaluates its gradient again; ours takes the one
    it has.
    """
    return Recipe(probe=Lookbehind(k=k, alpha=alpha), rho=rho, eps=1e-16)


__all__ = [*sorted(_CATALOGUE), "get", "names", "table"]  # noqa: PLE0604
