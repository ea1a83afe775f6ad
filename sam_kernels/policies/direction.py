"""Direction: along what the weights are perturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check_choice, check_number, check_seed

Pair = tuple[float, float]
"""Coefficients of the gradient and of what is remembered of the earlier ones."""


@dataclass(frozen=True)
class Direction:
    """Base of all directions: `d`, a function of the gradient and of the policy's own slots."""

    needs_gradient = True
    """Whether `d` takes a gradient at ``w``; without, a step evaluates one gradient less."""


@dataclass(frozen=True)
class Gradient(Direction):
    """The gradient of the present batch, ``d = g`` (Foret et al. 2021, arXiv 2010.01412, eq. 2).

    Example:
        >>> Gradient()
        Gradient()
    """


@dataclass(frozen=True)
class Remembering(Direction):
    """Base of directions along ``d = a g + b m``, with the memory ``m' = c g + f m`` of each parameter.

    Four numbers make such a direction; it is kept in the slot "ema", and the step in which the first gradient
    of a tensor arrives has pairs of its own.
    """

    @property
    def along(self) -> Pair:
        """``(a, b)``; the memory is that before this gradient."""
        raise NotImplementedError

    @property
    def memory(self) -> Pair:
        """``(c, f)``."""
        raise NotImplementedError

    @property
    def first_along(self) -> float:
        """``d = first_along g`` where there is no memory yet."""
        return 1.0

    @property
    def first_memory(self) -> float:
        """``m' = first_memory g`` where there is none yet."""
        return 1.0


@dataclass(frozen=True)
class Ema(Remembering):
    """The exponential average of the gradients, ``d = m' = (1 - theta) m + theta g``: VaSSO.

    Args:
        theta: weight of the present gradient, 0 to 1 (default 0.9, BingcongLi/VaSSO); 1 is SAM, 0 keeps the
            first gradient for good. The average begins with the first gradient.

    Raises:
        ValueError: if theta is not from 0 to 1.

    Example:
        >>> Ema(theta=0.25).along
        (0.25, 0.75)

    Source: Li and Giannakis, NeurIPS 2023, arXiv 2309.15639.
    """

    theta: float = 0.9

    def __post_init__(self) -> None:
        check_number(self, "theta", self.theta, least=0, most=1)

    @property
    def along(self) -> Pair:
        return self.theta, 1 - self.theta

    @property
    def memory(self) -> Pair:
        return self.along


@dataclass(frozen=True)
class Friendly(Remembering):
    """What is left of the gradient without its average, ``d = g - sigma m``: F-SAM.

    ``m' = lmbda m + (1 - lmbda) g`` takes the gradient itself. With `order` "code" the memory that is
    subtracted is the one before this gradient, and it begins with the first gradient; with "paper" it is the
    one after it, and begins with zeros.

    Args:
        sigma: how much of the average is subtracted (default 1, nblt/F-SAM).
        lmbda: weight of the old average, 0 to 1 (default 0.9, nblt/F-SAM).
        order: "code" (default) or "paper".

    Raises:
        ValueError: if lmbda is not from 0 to 1, sigma not finite or order unknown.

    Example:
        >>> Friendly(sigma=1.0, lmbda=0.5).along
        (1.0, -1.0)

    Source: Li et al., CVPR 2024, arXiv 2403.12350.
    """

    sigma: float = 1.0
    lmbda: float = 0.9
    order: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        check_number(self, "sigma", self.sigma)
        check_number(self, "lmbda", self.lmbda, least=0, most=1)
        check_choice(self, "order", self.order, ("code", "paper"))

    @property
    def along(self) -> Pair:
        if self.order == "code":
            return 1.0, -self.sigma
        return 1 - self.sigma * (1 - self.lmbda), -self.sigma * self.lmbda

    @property
    def memory(self) -> Pair:
        return 1 - self.lmbda, self.lmbda

    @property
    def first_along(self) -> float:
        return 1.0 if self.order == "code" else self.along[0]

    @property
    def first_memory(self) -> float:
        return 1.0 if self.order == "code" else 1 - self.lmbda


@dataclass(frozen=True)
class Noise(Direction):
    """A random direction, ``d = z`` with ``z ~ N(0, 1)`` for every weight, drawn anew in each step.

    The numbers are a function of seed, step, parameter and element, so none are kept and every backend,
    thread count and device draws the same.

    Args:
        seed: from 0 to 2^63 - 1 (default 0).

    Raises:
        ValueError: if seed is no such number.

    Example:
        >>> Noise(seed=3).needs_gradient
        False

    Source: Foret et al. 2021, arXiv 2010.01412, appendix C.5.
    """

    seed: int = 0

    needs_gradient = False

    def __post_init__(self) -> None:
        check_seed(self, self.seed)


@dataclass(frozen=True)
class Momentum(Direction):
    """Along the coming update, ``d = -v`` with v the base optimizer's momentum: MSAM.

    v is "momentum_buffer" of SGD with momentum or "exp_avg" of Adam and AdamW; a tensor that has none yet is
    not perturbed.

    Example:
        >>> Momentum().needs_gradient
        False

    Source: Becker, Altrock, Risse 2024, arXiv 2401.12033.
    """

    needs_gradient = False
