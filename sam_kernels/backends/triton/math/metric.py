"""How weights are measured (T), and what one element adds to the norm."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rounding import divide
from .power import power


class Adaptive(NamedTuple):
    """T = |w| + eta"""

    eta: tl.tensor


class Power(NamedTuple):
    """(|u| / peak)^q; a peak of zero means that every u is zero."""

    peak: tl.tensor
    q: tl.tensor


@triton.jit
def euclidean_weigh(d, w):
    return d


@triton.jit
def adaptive_weigh(self, d, w):
    return (tl.abs(w) + self.eta) * d


@triton.jit
def apply_square(u):
    return u * u


@triton.jit
def apply_power(self, u):
    is_zero = self.peak == 0
    ratio = divide(tl.abs(u), tl.where(is_zero, self.peak + 1.0, self.peak))
    return tl.where(is_zero, u, power(ratio, self.q))  # under a peak of zero: zero, or NaN as the gradient
