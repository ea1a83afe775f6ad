"""Cadence: on which steps the weights are perturbed; on the others the base optimizer steps alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """Base of all cadences."""

    def is_due(self, step: int) -> bool:
        """Whether step number `step` (from 0) perturbs."""
        return True


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
