"""Probe: at which points gradients are evaluated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """Base of all probes.

    Attributes:
        gradients: gradients evaluated in a perturbed step, the one at `w` included.
    """

    @property
    def gradients(self) -> int:
        raise NotImplementedError


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
