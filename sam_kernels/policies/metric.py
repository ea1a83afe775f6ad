"""Metric: how the length of a perturbation is measured, and so how it is spread over the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .checks import check_types
from .member import Member, check_patterns


def _check_norm(owner: str, p: float) -> None:
    if not isinstance(p, int | float) or isinstance(p, bool) or not p >= 1:
        raise ValueError(
            f"{owner}: p is {p!r}; expected a number of at least 1 (2 is SAM's ball, math.inf the sign "
            "perturbation, 1 moves the largest alone)"
        )


def _check_eta(owner: str, eta: float) -> None:
    if not (isinstance(eta, int | float) and 0 <= eta < math.inf):
        raise ValueError(f"{owner}: eta is {eta!r}; expected a finite number of at least 0")


@dataclass(frozen=True)
class Metric:
    """Base of all metrics: the ball ``||T^-1 e||_p <= rho`` around the weights.

    Args:
        p: order of the norm, at least 1; `math.inf` for the sign perturbation.
    """

    p: float = 2.0

    def applies_to(self, member: Member) -> bool:
        """Whether ``T`` differs from 1 for this parameter."""
        return False

    def needs_names(self) -> bool:
        """Whether `applies_to` can only be answered with parameter names."""
        return False

    def refusal(self, member: Member) -> str | None:
        """A sentence when the metric cannot decide about this parameter; None when it can."""
        return None

    @property
    def dual(self) -> float:
        """The dual exponent ``q``, with ``1/p + 1/q = 1``."""
        if math.isinf(self.p):
            return 1.0
        return math.inf if self.p == 1 else self.p / (self.p - 1.0)


@dataclass(frozen=True)
class Euclidean(Metric):
    """``T = 1``: SAM's own ball, ``e = rho sign(d) |d|^(q-1) / (||d||_q^q)^(1/p)``.

    Args:
        p: order of the norm, at least 1 (default 2, Foret et al. 2021, appendix C.5 tries inf). For p = 1
            the perturbation is shared by the gradients of the largest size, ``rho sign(d) / count``.

    Raises:
        ValueError: if p is below 1.

    Example:
        >>> Euclidean(p=4).dual
        1.3333333333333333
    """

    def __post_init__(self) -> None:
        _check_norm("Euclidean", self.p)


@dataclass(frozen=True)
class Adaptive(Metric):
    """``T = |w| + eta`` per element: ASAM, ``e = rho T^2 d / ||T d||_2`` (Kwon et al. 2021).

    Args:
        p: order of the norm, at least 1 (default 2).
        eta: floor added to ``|w|`` (default 0, the form behind ``adaptive=True``; ASAM's class
            default is 0.01).
        only: shell-style patterns of parameter names that get T; the others keep ``T = 1`` and are
            still perturbed and counted. None means every parameter.
        types: module classes whose parameters get T, in place of names; needs the model.

    Raises:
        ValueError: if p is below 1, eta is negative, only is one string, types are no classes, or both are
            given.

    Example:
        >>> Adaptive(eta=0.01, only=("*weight*",)).applies_to(Member("fc.bias"))
        False
    """

    eta: float = 0.0
    only: tuple[str, ...] | None = None
    types: tuple[type, ...] | None = None

    def __post_init__(self) -> None:
        _check_norm("Adaptive", self.p)
        _check_eta("Adaptive", self.eta)
        if self.only is not None:
            check_patterns("Adaptive", "only", self.only)
        if self.types is None:
            return
        check_types(self, self.types)
        if self.only is not None:
            raise ValueError(
                "Adaptive: only and types each choose parameters; give one, and None for the other"
            )

    def refusal(self, member: Member) -> str | None:
        if self.types is None or member.module is not None:
            return None
        return "its metric treats parameters by their module, which is unknown: pass model="

    def applies_to(self, member: Member) -> bool:
        if self.types is not None:
            return isinstance(member.module, self.types)
        # Without names the filter cannot be answered; the optimizer has warned that T goes everywhere.
        return self.only is None or member.name is None or member.matches(self.only)

    def needs_names(self) -> bool:
        return self.only is not None


@dataclass(frozen=True)
class Fisher(Metric):
    """``T = (1 + eta d^2)^(-1/2)``, the inverse root of a diagonal Fisher information: FisherSAM (p = 2).

    ``e = rho h / sqrt(sum d h)`` with ``h = d / (1 + eta d^2)``. The information is that of the mean
    gradient, and its size matters: unscale gradients first, and mind the batch size.

    Args:
        eta: weight of the information, at least 0 (default 1; 0 is SAM).

    Raises:
        ValueError: if eta is negative or p is not 2.

    Example:
        >>> Fisher(eta=0.2).eta
        0.2

    Source: Kim et al., ICML 2022, arXiv 2206.04920; the form is that of two third-party implementations.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if self.p != 2:
            raise ValueError(f"Fisher: p is {self.p!r}; the Fisher ball is defined for p = 2")
        _check_eta("Fisher", self.eta)


@dataclass(frozen=True)
class LayerWise(Metric):
    """One factor per parameter tensor `l` in place of one per element (p = 2).

    ====================  =====================================================================
    form                  perturbation of tensor l
    ====================  =====================================================================
    ``"operator"``        ``rho T_l^2 g_l / sqrt(sum_l T_l^2 ||g_l||^2)``, ``T_l = ||w_l|| (1 + eta)``
    ``"radius"``          ``rho g_l / ||g_l||`` (every tensor gets the whole radius)
    ``"trust_ratio"``     ``rho min(||w_l|| / (||g_l|| + 1e-14), 20) g_l / ||g||``
    ====================  =====================================================================

    Args:
        form: one of the table (default "operator", mueller-mp/SAM-ON `sam_on.py`).
        eta: as in the table (default 0).
        only: names that get ``T_l`` under "operator"; others keep 1. None means every tensor.

    Raises:
        ValueError: if form is unknown, eta is negative, p is not 2 or only is one string.

    Example:
        >>> LayerWise(form="radius").form
        'radius'
    """

    form: Literal["operator", "radius", "trust_ratio"] = "operator"
    eta: float = 0.0
    only: tuple[str, ...] | None = None

    FORMS = ("operator", "radius", "trust_ratio")
    # Both constants are those of the community Look-LayerSAM code.
    _FLOOR = 1e-14
    _LARGEST_RATIO = 20.0

    def __post_init__(self) -> None:
        if self.form not in self.FORMS:
            raise ValueError(f"LayerWise: form is {self.form!r}; expected one of {', '.join(self.FORMS)}")
        if self.p != 2:
            raise ValueError(f"LayerWise: p is {self.p!r}; layer-wise perturbations are defined for p = 2")
        _check_eta("LayerWise", self.eta)
        if self.only is not None:
            check_patterns("LayerWise", "only", self.only)

    def applies_to(self, member: Member) -> bool:
        return self.only is None or member.name is None or member.matches(self.only)

    def needs_names(self) -> bool:
        return self.only is not None and self.form == "operator"

    def norm_weights(self, weight_sq: Any, applies: Any) -> Any:
        """Per tensor, the factor ``T_l^2`` of its squared gradient norm in the global norm.

        Args:
            weight_sq: [count] float64, ``||w_l||^2``.
            applies: [count] float64, 1 where `applies_to` holds and 0 elsewhere.
        """
        if self.form != "operator":
            return 1.0
        return applies * weight_sq * (1.0 + self.eta) ** 2 + (1.0 - applies)

    def tensor_scale(self, weight_sq: Any, grad_sq: Any, applies: Any, norm: Any, eps: float) -> Any:
        """Per tensor, the factor c_l in ``e_l = rho / (norm + eps) * c_l * g_l``.

        Args:
            weight_sq, grad_sq, applies: [count] float64, see `norm_weights`.
            norm: scalar float64, the global norm.
            eps: the recipe's eps.
        """
        if self.form == "operator":
            return self.norm_weights(weight_sq, applies)
        grad_norm = grad_sq**0.5
        if self.form == "radius":
            # Cancels the global norm, whose finiteness still decides whether anything moves.
            return (norm + eps) / (grad_norm + eps)
        return (weight_sq**0.5 / (grad_norm + self._FLOOR)).clamp(max=self._LARGEST_RATIO)
