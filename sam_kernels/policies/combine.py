"""Combine: how the gradients of the probes become the one given to the base optimizer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Combine:
    """Base of all combine rules."""


@dataclass(frozen=True)
class Last(Combine):
    """The gradient at the last probe, ``g(w + e)``: SAM.

    Example:
        >>> Last()
        Last()
    """
