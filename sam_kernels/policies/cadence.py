"""Cadence: on which steps the weights are perturbed; on the others the base optimizer steps alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .checks import check_count, check_number, check_seed


@dataclass(frozen=True)
class Cadence:
    """Base of all cadences."""

    needs_norm = False
    """Whether it decides when the gradient is there, see `NormGate`."""

    def is_due(self, step: int) -> bool:
        """Whether step number `step` (from 0) perturbs, or may where `needs_norm`."""
        return True

    def decide(self, q: float, step: int, mean: float, variance: float) -> tuple[bool, float, float]:
        """Where `needs_norm`: whether the step perturbs, and two numbers to go by in the next one.

        Args:
            q: ``||g||^2`` of all gradients.
            step: its number.
            mean, variance: what the step before returned, at first 0.
        """
        return self.is_due(step), mean, variance


@dataclass(frozen=True)
class EveryStep(Cadence):
    """Every step.

    Example:
        >>> EveryStep().is_due(3)
        True
    """


@dataclass(frozen=True)
class Every(Cadence):
    """Steps 0, k, 2k, ...

    Args:
        k: period in steps, at least 1.

    Raises:
        ValueError: if k is not a whole number of at least 1.

    Example:
        >>> [Every(2).is_due(step) for step in range(4)]
        [True, False, True, False]
    """

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ValueError(f"every: k is {self.k!r}; expected a whole number of at least 1")

    def is_due(self, step: int) -> bool:
        return step % self.k == 0


@dataclass(frozen=True)
class WithProbability(Cadence):
    """Steps chosen at random: randomized and scheduled SAM.

    The choice is a function of seed and step alone, so all workers make the same.

    Args:
        probability: from 0 to 1, or a schedule ``step -> probability``.
        seed: of the choices (default 0).

    Raises:
        ValueError: if the probability is not from 0 to 1.

    Example:
        >>> [WithProbability(0.5).is_due(step) for step in range(6)]
        [True, True, True, True, False, True]

    Source: Zhao, Zhang, Hu 2022, arXiv 2203.09962 (RST).
    """

    probability: float | Callable[[int], float] = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self, self.seed)
        if not callable(self.probability):
            check_number(self, "probability", self.probability, least=0, most=1)

    def is_due(self, step: int) -> bool:
        probability = self.probability(step) if callable(self.probability) else self.probability
        return draw(self.seed, step, _LOW) < probability  # the number of no tensor


@dataclass(frozen=True)
class NormGate(Cadence):
    """Steps whose gradient is large beside those before, ``||g||^2 >= mean + c sqrt(variance)``: AE-SAM.

    With q = ||g||^2, ``mean <- decay mean + (1 - decay) q`` and ``variance <- decay variance + (1 - decay)
    (q - mean)^2`` before the comparison, both from 0; ``c = t/steps late + (1 - t/steps) early``. The host
    waits for the norm in each step, which is what deciding takes.

    Args:
        steps: of the whole training.
        decay: 0 to 1 (default 0.9).
        late, early: c at the end and at the beginning (default -1 and 1).

    Raises:
        ValueError: for numbers that are not these.

    Example:
        >>> NormGate(steps=100, decay=0.5).decide(3.0, 0, 1.0, 0.0)
        (True, 2.0, 0.5)

    Source: Jiang et al., ICLR 2023 (AE-SAM). The defaults are recalled by third parties, not by code of the
    authors.
    """

    steps: int = 1
    decay: float = 0.9
    late: float = -1.0
    early: float = 1.0

    needs_norm = True

    def __post_init__(self) -> None:
        check_count(self, "steps", self.steps)
        check_number(self, "decay", self.decay, least=0, most=1)
        check_number(self, "late", self.late)
        check_number(self, "early", self.early)

    def decide(self, q: float, step: int, mean: float, variance: float) -> tuple[bool, float, float]:
        """Whether step number `step` perturbs, and the new mean and variance."""
        progress = min(step / self.steps, 1.0)
        mean = self.decay * mean + (1 - self.decay) * q
        variance = self.decay * variance + (1 - self.decay) * (q - mean) ** 2
        c = progress * self.late + (1 - progress) * self.early
        return q >= mean + c * math.sqrt(variance), mean, variance


def draw(seed: int, step: int, tensor: int = 0) -> float:
    """A number in [0, 1), uniform by counter: that of the tensor's first element, see csrc/math/random.h."""
    x0, x1, x2, x3 = 0, 0, tensor & _LOW, step & _LOW
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (b >> 32) ^ x1 ^ k0, b & _LOW, (a >> 32) ^ x3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return (x0 >> 8) * 2.0**-24


_LOW = 0xFFFFFFFF
