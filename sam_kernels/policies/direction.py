"""Direction: along what the weights are perturbed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Direction:
    """Base of all directions: `d`, a function of the gradient and of the policy's own slots."""


@dataclass(frozen=True)
class Gradient(Direction):
    """The gradient of the present batch, ``d = g`` (Foret et al. 2021, arXiv 2010.01412, eq. 2).

    Example:
        >>> Gradient()
        Gradient()
    """
