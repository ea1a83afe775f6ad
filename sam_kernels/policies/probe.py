"""Probe: at which points gradients are evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_count, check_flag, check_number, check_seed


@dataclass(frozen=True)
class Probe:
    """Base of all probes.

    Attributes:
        gradients: gradients evaluated in a perturbed step, the one at `w` included.
        moves_base: whether weights move along a gradient, or the base steps, before the last one is there.
    """

    moves_base = False

    @property
    def gradients(self) -> int:
        raise NotImplementedError

    @property
    def needs_closure(self) -> bool:
        """Whether only ``step(closure)`` can take such a step."""
        return self.gradients != 2


@dataclass(frozen=True)
class OneStep(Probe):
    """One ascent step: gradients at ``w`` and at ``w + e``.

    Example:
        >>> OneStep().gradients
        2
    """

    @property
    def gradients(self) -> int:
        return 2


@dataclass(frozen=True)
class MultiStep(Probe):
    """`n` ascent steps, each along the gradient where the former one ended.

    ``w_0 = w``; ``w_k = P(w_(k-1) + step g(w_(k-1)) / ||g(w_(k-1))||)``, with P the projection onto the ball
    of radius rho around w; the gradient at ``w_n`` is the last.

    Args:
        n: ascent steps, at least 1 (1 is SAM).
        step: length of each as a share of rho (default 1, tml-epfl/understanding-sam; 1/n cannot leave the
            ball).
        project: onto the ball (default). Without, the perturbation may be n times as long, as in
            ``optax.contrib.sam(sync_period=n + 1)``.

    Raises:
        ValueError: if n is not a whole number of at least 1 or step not positive.

    Example:
        >>> MultiStep(n=3).gradients
        4

    Source: Foret et al. 2021, arXiv 2010.01412, appendix C.6; Andriushchenko and Flammarion, ICML 2022, arXiv
    2206.06232.
    """

    n: int = 3
    step: float = 1.0
    project: bool = True

    def __post_init__(self) -> None:
        check_count(self, "n", self.n)
        check_number(self, "step", self.step, least=0)
        if self.step == 0:
            raise ValueError("MultiStep: step is 0, which goes nowhere; expected a positive share of rho")
        check_flag(self, "project", self.project)

    @property
    def gradients(self) -> int:
        return self.n + 1

    @property
    def needs_closure(self) -> bool:
        return self.n > 1

    @property
    def projects(self) -> bool:
        """Whether an ascent may leave the ball and is brought back."""
        return self.project and (self.n > 1 or self.step > 1)


@dataclass(frozen=True)
class Mirrored(Probe):
    """Both sides: gradients at ``w``, ``w + e`` and ``w - e``.

    Example:
        >>> Mirrored().gradients
        3

    Source: Wu, Luo, Wunsch, AAAI 2024, arXiv 2312.13555 (CR-SAM).
    """

    @property
    def gradients(self) -> int:
        return 3


@dataclass(frozen=True)
class RandomStart(Probe):
    """Noise first, then one ascent step: gradients at ``w + delta`` and ``w + delta + e``.

    ``delta_l = noise ||w_l|| n_l / ||n_l||`` in every tensor l, ``n_l ~ N(0, 1)``.

    Args:
        noise: length of delta as a share of the tensor's own norm (default 0.1).
        keep_noise: evaluate the second gradient at ``w + delta + e`` (default), or at ``w + e``.
        seed: of the noise, which depends on seed, step, parameter and element alone.

    Raises:
        ValueError: for numbers that are not these.

    Example:
        >>> RandomStart().needs_closure
        True

    Source: Liu et al., NeurIPS 2022 (R-SAM). No code by the authors is public; length and second point are
    those of a community trainer.
    """

    noise: float = 0.1
    keep_noise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self, "noise", self.noise, least=0)
        check_flag(self, "keep_noise", self.keep_noise)
        check_seed(self, self.seed)

    @property
    def gradients(self) -> int:
        return 2

    @property
    def needs_closure(self) -> bool:
        return True


@dataclass(frozen=True)
class Anticipated(Probe):
    """Two points that need not wait for each other: ``w + e`` and the next iterate as it is expected.

    ``e = rho y / ||y||`` with y the gradient at the expected iterate of the step before; the second gradient
    is that of the next batch at ``w - lr y`` (with the base's momentum and weight decay), and the next y. The
    first step evaluates one gradient more.

    Example:
        >>> Anticipated().gradients
        2

    Source: Xie, Pethick, Cevher, NeurIPS 2024, arXiv 2410.10683 (SAMPa).
    """

    moves_base = True

    @property
    def gradients(self) -> int:
        return 2

    @property
    def needs_closure(self) -> bool:
        return True


@dataclass(frozen=True)
class Lookbehind(Probe):
    """`k` times on one batch: ascend further, and let the base step with every gradient met on the way.

    ``p_i = p_(i-1) + rho g(p_(i-1)) / ||g(p_(i-1))||`` from ``p_0 = w``; the base steps from its own last
    point with ``g(p_i)``; then ``w + alpha (last - w)``.

    Args:
        k: ascent steps, at least 1.
        alpha: share of the way to the base's last point, 0 to 1; None for
            ``(cos(first displacement, whole displacement) + 1) / 2`` of each tensor.

    Raises:
        ValueError: for numbers that are not these.

    Example:
        >>> Lookbehind(k=5).gradients
        6

    Source: Mordido et al., ICML 2024, arXiv 2307.16704.
    """

    moves_base = True

    k: int = 2
    alpha: float | None = 0.5

    def __post_init__(self) -> None:
        check_count(self, "k", self.k)
        if self.alpha is not None:
            check_number(self, "alpha", self.alpha, least=0, most=1)

    @property
    def gradients(self) -> int:
        return self.k + 1

    @property
    def needs_closure(self) -> bool:
        return True
