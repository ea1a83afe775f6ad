"""What every measure asks of its arguments, and of the losses it finds."""

from __future__ import annotations

import math
from numbers import Integral, Real


def check_rho(rho: float) -> float:
    """A radius as it is; a sentence where it is none."""
    if isinstance(rho, bool) or not isinstance(rho, Real) or not 0 <= rho < math.inf:
        raise ValueError(f"sharpness: rho is {rho!r}; expected a finite number of at least 0")
    return float(rho)


def check_count(name: str, value: int, least: int = 1) -> int:
    """A whole number as it is; a sentence where it is none, or too small."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"sharpness: {name} is {value!r}; expected a whole number of at least {least}")
    return int(value)


def finite(loss: float, where: str = "at the weights as they are") -> float:
    """A loss as it is; a sentence where it is infinite or no number."""
    if not math.isfinite(loss):
        raise ValueError(
            f"sharpness: the loss {where} is {loss}; expected a finite number. Look for samples or weights "
            "that are not finite, and for a radius that is too large"
        )
    return loss
