"""w + scale * T * h(T * d), with h the shape of the norm's dual ball."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..codes import ADAPTIVE, COLUMN_EPS, COLUMN_RHO, FISHER, LINEAR, SIGN
from ..rounding import divide
from .metric import adaptive_weigh, euclidean_weigh, fisher_weigh
from .power import power


class Powered(NamedTuple):
    """h(u) = sign(u) (|u| / peak)^(q - 1): any other p"""

    peak: tl.tensor
    exponent: tl.tensor


class Perturb(NamedTuple):
    """The displacement of one tensor; `metric` and `shape` are what its METRIC and SHAPE need."""

    scale: tl.tensor
    metric: NamedTuple
    shape: NamedTuple


@triton.jit
def apply_linear(u):
    return u


@triton.jit
def apply_sign(u):
    return tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, u)).to(u.dtype)


@triton.jit
def apply_powered(self, u):
    is_zero = self.peak == 0
    ratio = divide(tl.abs(u), tl.where(is_zero, self.peak + 1.0, self.peak))
    size = power(ratio, self.exponent)
    signed = tl.where(u < 0, -size, size)
    return tl.where(is_zero, u, tl.where(u == 0, u, signed))


@triton.jit
def apply_perturb(self, w, d, METRIC: tl.constexpr, SHAPE: tl.constexpr):
    # T enters twice: u = T d is measured, T h(u) is the displacement.
    u = _weigh(self.metric, d, d, w, METRIC)
    if SHAPE == LINEAR:
        h = apply_linear(u)
    elif SHAPE == SIGN:
        h = apply_sign(u)
    else:
        h = apply_powered(self.shape, u)
    return tl.fma(self.scale, _weigh(self.metric, h, d, w, METRIC), w)


@triton.jit
def _weigh(metric, u, d, w, METRIC: tl.constexpr):
    if METRIC == ADAPTIVE:
        return adaptive_weigh(metric, u, d, w)
    elif METRIC == FISHER:
        return fisher_weigh(metric, u, d, w)
    else:
        return euclidean_weigh(u, d, w)


@triton.jit
def perturb_scale(row, shape: tl.constexpr, norm, tensor_scale, S: tl.constexpr):
    # rho / (norm + eps) * tensor_scale, and rho * tensor_scale for the sign. With eps 0 and a zero gradient
    # the quotient is not finite, and 0 * inf would move weights; nor may a large one overflow in the narrower
    # type.
    scale = tl.load(row + COLUMN_RHO)
    if shape != SIGN:
        size = norm + tl.load(row + COLUMN_EPS)
        scale = tl.where(size == 0, float("inf"), scale / tl.where(size == 0, 1.0, size))
    rounded = (scale * tensor_scale).to(S)
    return tl.where(tl.abs(rounded) < float("inf"), rounded, 0.0)
