"""Combine: how the gradients of the probes become the one given to the base optimizer.

Every rule is a linear combination of at most three gradient lists. Its coefficients are arithmetic on dots,
which are float64 tensors and stay on the device; see `sam_kernels.combination` for who computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .checks import check_choice, check_flag, check_number

Scalars = Mapping[str, Any]


def over(numerator: Any, denominator: Any) -> Any:
    """``numerator / denominator`` of tensors, 0 where the denominator is 0."""
    is_zero = denominator == 0
    return (numerator / (denominator + is_zero)) * ~is_zero


@dataclass(frozen=True)
class Combine:
    """Base of all combine rules.

    Attributes:
        gradients: the probes' gradients that it reads: 1 for the last, 2 for the first and the last, 3 for
            all of a `Mirrored` probe.
        dotted: of how many of these, from the first, it reads the dots.
    """

    gradients = 1
    dotted = 0

    def first_scalars(self) -> dict[str, float]:
        """Numbers that last from step to step, as they are before the first."""
        return {}

    def weights(self, dots: Any, scalars: Scalars) -> tuple[Any, ...]:
        """The coefficient of each gradient, in the order of the probes.

        Args:
            dots: ``dots[i][j]``, float64, the dot of gradients i and j; i, j < `dotted`.
            scalars: see `first_scalars`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Last(Combine):
    """The gradient at the last probe, ``g(w + e)``: SAM.

    Example:
        >>> Last()
        Last()
    """


@dataclass(frozen=True)
class Mix(Combine):
    """``d = first u + last g(w + e)`` with ``u = g``, or ``u = g / ||g||`` if `normalize`: GNP, coupled WSAM.

    Args:
        first, last: finite numbers.
        normalize: divide the first gradient by its norm.

    Raises:
        ValueError: if a number is not finite.

    Example:
        >>> Mix(0.25, 0.75).weights(None, {})
        (0.25, 0.75)

    Source: Zhao, Zhang, Hu, ICML 2022, arXiv 2202.03599 (GNP); Yue et al., KDD 2023, arXiv 2305.15817 (WSAM).
    """

    first: float
    last: float
    normalize: bool = False

    gradients = 2

    def __post_init__(self) -> None:
        check_number(self, "first", self.first)
        check_number(self, "last", self.last)
        check_flag(self, "normalize", self.normalize)

    @property
    def dotted(self) -> int:  # type: ignore[override]
        return 1 if self.normalize else 0

    def weights(self, dots: Any, scalars: Scalars) -> tuple[Any, ...]:
        if not self.normalize:
            return self.first, self.last
        return over(self.first, dots[0][0] ** 0.5), self.last


@dataclass(frozen=True)
class Decoupled(Combine):
    """The base steps with ``g``; then ``w <- w - lr weight (g(w + e) - g)``, past momentum and moments: WSAM.

    Args:
        weight: finite, ``gamma / (1 - gamma)`` of WSAM.

    Raises:
        ValueError: if weight is not finite.

    Example:
        >>> Decoupled(9.0).weights(None, {})
        (1.0, 0.0)

    Source: Yue et al., KDD 2023, arXiv 2305.15817.
    """

    weight: float

    gradients = 2

    def __post_init__(self) -> None:
        check_number(self, "weight", self.weight)

    def weights(self, dots: Any, scalars: Scalars) -> tuple[Any, ...]:
        return 1.0, 0.0


@dataclass(frozen=True)
class SurrogateGap(Combine):
    """``d = gs - alpha (g - c gs)``, ``c = <g, gs> / ||gs||^2``, with ``gs = g(w + e)``: GSAM.

    What is subtracted is the part of the clean gradient that is orthogonal to the perturbed one. With
    ``minimize_fp=False`` it is the other way round: ``d = g + alpha (gs - c' g)``, ``c' = <g, gs> /
    ||g||^2``.

    Args:
        alpha: finite (default 0.4, juntang-zhuang/GSAM; 0.6 in google-research/big_vision).
        minimize_fp: descend along the perturbed gradient (default), or along the clean one.

    Raises:
        ValueError: if alpha is not finite.

    Example:
        >>> SurrogateGap(alpha=0.6).dotted
        2

    Source: Zhuang et al., ICLR 2022, arXiv 2203.08065.
    """

    alpha: float = 0.4
    minimize_fp: bool = True

    gradients = 2
    dotted = 2

    def __post_init__(self) -> None:
        check_number(self, "alpha", self.alpha)
        check_flag(self, "minimize_fp", self.minimize_fp)

    def weights(self, dots: Any, scalars: Scalars) -> tuple[Any, ...]:
        if self.minimize_fp:
            return -self.alpha, 1 + self.alpha * over(dots[0][1], dots[1][1])
        return 1 - self.alpha * over(dots[0][1], dots[0][0]), self.alpha


@dataclass(frozen=True)
class Curvature(Combine):
    """``d = g+ + gamma (g+ + g- - 2 g) + beta (g+ - g-)`` with the gradients of both sides: CR-SAM.

    The middle term is the curvature along the ascent, of the order of rho^2, and most of it is rounding noise
    unless the gradients are fp32.

    Args:
        gamma, beta: finite (default 0.1 and 0.1, TrustAIoT/CR-SAM; its script takes 0.1 and 0.01).

    Raises:
        ValueError: if a number is not finite.

    Example:
        >>> Curvature(gamma=0.5, beta=0.25).weights(None, {})
        (-1.0, 1.75, 0.25)

    Source: Wu, Luo, Wunsch, AAAI 2024, arXiv 2312.13555.
    """

    gamma: float = 0.1
    beta: float = 0.1

    gradients = 3

    def __post_init__(self) -> None:
        check_number(self, "gamma", self.gamma)
        check_number(self, "beta", self.beta)

    def weights(self, dots: Any, scalars: Scalars) -> tuple[Any, ...]:
        return -2 * self.gamma, 1 + self.gamma + self.beta, self.gamma - self.beta


@dataclass(frozen=True)
class ReuseOrthogonal(Combine):
    """Keep what the perturbation adds to the gradient, and use it on the steps that do not perturb: LookSAM.

    On a step that perturbs, ``d = gs`` and ``v = gs - (<g, gs> / ||g||^2) g`` is kept, in the slot
    "orthogonal". On the others ``d = g + alpha (||g|| / ||v||) v``.

    Args:
        alpha: finite (default 0.7, Leminhbinh0209/LookSAM).
        scope: norms and dots over all tensors, "global" (default), or of each "tensor".

    Raises:
        ValueError: if alpha is not finite or scope unknown.

    Example:
        >>> ReuseOrthogonal().scope
        'global'

    Source: Liu et al., CVPR 2022, arXiv 2203.02714.
    """

    alpha: float = 0.7
    scope: Literal["global", "tensor"] = "global"

    gradients = 2
    dotted = 2

    # Added to ||v||, which is 0 where the gradient is an eigenvector of the curvature.
    _FLOOR = 1e-12

    def __post_init__(self) -> None:
        check_number(self, "alpha", self.alpha)
        check_choice(self, "scope", self.scope, ("global", "tensor"))

    def weights(self, dots: Any, scalars: Scalars) -> tuple[Any, ...]:
        return 0.0, 1.0

    def orthogonal(self, dots: Any) -> tuple[Any, ...]:
        """The coefficients of v."""
        return -over(dots[0][1], dots[0][0]), 1.0

    def reuse(self, dots: Any) -> tuple[Any, ...]:
        """The coefficients of g and v on a step that does not perturb, from their dots."""
        return 1.0, self.alpha * dots[0][0] ** 0.5 / (dots[1][1] ** 0.5 + self._FLOOR)


@dataclass(frozen=True)
class AdaptiveRatio(Combine):
    """``d = (1 - l) g + l gs`` with a weight l that follows the gradient norm: SAMAR.

    After each step ``r = ||g|| / ||g_before||``; ``l <- min(up l, largest)`` where ``r > chi_up`` and
    ``l <- max(down l, smallest)`` where ``r < chi_down``. The weight stays on the device.

    Args:
        lambda_0: the first weight (1 is SAM, 0 the base optimizer).
        chi_up, chi_down: thresholds of r.
        up, down: factors.
        smallest, largest: bounds of the weight.
        weighting: "blend" as above (default), or "add" for ``d = g + l gs``.

    Raises:
        ValueError: for numbers that are not finite, negative, or bounds that cross.

    Example:
        >>> AdaptiveRatio(lambda_0=1.0, up=1.0, down=1.0).first_scalars()
        {'lambda': 1.0, 'previous_norm': 0.0}

    Source: Zou, Deng, Sun 2024, arXiv 2412.16854. The rule is a reconstruction from the abstract: it names a
    ratio of gradient norms and a weight that grows with it; thresholds, factors and bounds are our choice.
    """

    lambda_0: float = 0.5
    chi_up: float = 1.0
    chi_down: float = 1.0
    up: float = 1.1
    down: float = 0.9
    smallest: float = 0.0
    largest: float = 1.0
    weighting: Literal["blend", "add"] = "blend"

    gradients = 2
    dotted = 2

    def __post_init__(self) -> None:
        for name in ("lambda_0", "chi_up", "chi_down", "up", "down", "smallest", "largest"):
            check_number(self, name, getattr(self, name), least=0)
        check_choice(self, "weighting", self.weighting, ("blend", "add"))
        if not self.smallest <= self.lambda_0 <= self.largest:
            raise ValueError(
                f"AdaptiveRatio: lambda_0 is {self.lambda_0!r}; expected a number from smallest, "
                f"{self.smallest!r}, to largest, {self.largest!r}"
            )

    def first_scalars(self) -> dict[str, float]:
        return {"lambda": float(self.lambda_0), "previous_norm": 0.0}

    def weights(self, dots: Any, scalars: Scalars) -> tuple[Any, ...]:
        weight = scalars["lambda"]
        return (1 - weight if self.weighting == "blend" else 1.0), weight

    def advance(self, dots: Any, scalars: Scalars) -> dict[str, Any]:
        """The scalars after a step."""
        norm, before, weight = dots[0][0] ** 0.5, scalars["previous_norm"], scalars["lambda"]
        has_before = before > 0  # without a norm before this one the ratio counts as 1
        ratio = over(norm, before) * has_before + ~has_before
        grown, shrunk = (
            (weight * self.up).clamp(max=self.largest),
            (weight * self.down).clamp(min=self.smallest),
        )
        rises, falls = ratio > self.chi_up, ratio < self.chi_down
        chosen = grown * rises + shrunk * (falls & ~rises) + weight * ~(rises | falls)
        return {"lambda": chosen, "previous_norm": norm}


@dataclass(frozen=True)
class Anticipate(Combine):
    """``d = (1 - lmbda) g(w + e) + lmbda g_next(w')``, with the gradients of an `Anticipated` probe: SAMPa.

    Args:
        lmbda: from 0 to 1 (default 0.2, LIONS-EPFL/SAMPa).

    Raises:
        ValueError: if lmbda is not from 0 to 1.

    Example:
        >>> Anticipate(0.25).weights(None, {})
        (0.75, 0.25)

    Source: Xie, Pethick, Cevher, NeurIPS 2024, arXiv 2410.10683.
    """

    lmbda: float = 0.2

    gradients = 2

    def __post_init__(self) -> None:
        check_number(self, "lmbda", self.lmbda, least=0, most=1)

    def weights(self, dots: Any, scalars: Scalars) -> tuple[Any, ...]:
        return 1 - self.lmbda, self.lmbda
