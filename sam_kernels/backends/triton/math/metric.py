"""How weights are measured (T), and what one element adds to the norm."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rounding import divide, square_root
from .power import power


class Adaptive(NamedTuple):
    """T = |w| + eta"""

    eta: tl.tensor


class Fisher(NamedTuple):
    """T = (1 + eta d^2)^(-1/2)"""

    eta: tl.tensor


class Power(NamedTuple):
    """(|u| / peak)^q; a peak of zero means that every u is zero."""

    peak: tl.tensor
    q: tl.tensor


# T u for the direction d, which is u itself where it is measured.


@triton.jit
def euclidean_weigh(u, d, w):
    return u


@triton.jit
def adaptive_weigh(self, u, d, w):
    return (tl.abs(w) + self.eta) * u


@triton.jit
def fisher_weigh(self, u, d, w):
    return divide(u, square_root(tl.fma(self.eta * d, d, 1.0)))


@triton.jit
def apply_square(u):
    return u * u


@triton.jit
def apply_power(self, u):
    is_zero = self.peak == 0
    ratio = divide(tl.abs(u), tl.where(is_zero, self.peak + 1.0, self.peak))
    return tl.where(is_zero, u, power(ratio, self.q))  # under a peak of zero: zero, or NaN as the gradient
