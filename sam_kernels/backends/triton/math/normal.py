"""Standard normal numbers from random words, with the same bits everywhere: fp32 additions, multiplications,
divisions and square roots, each rounded once and none fused, in the order of csrc/math/normal.h.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ..rounding import divide, square_root

_LOG_2 = tl.constexpr(math.log(2))
_RADIANS = tl.constexpr(math.pi / 2 / (1 << 22))  # of one step


class _Point(NamedTuple):
    """Of the plane; in C++ it is part of core, not of math."""

    x: tl.tensor
    y: tl.tensor


@triton.jit
def logarithm(k):
    # ln(k / 2^24) of whole numbers k in 1 ... 2^24.
    bits = k.to(tl.float32).to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    is_high = mantissa >= 1.4142135
    mantissa = tl.where(is_high, mantissa * 0.5, mantissa)
    exponent = ((bits >> 23) - tl.where(is_high, 150, 151)).to(tl.float32)
    t = mantissa - 1.0
    s = divide(t, t + 2.0)
    square = s * s
    series = square * (2 / 9) + (2 / 7)
    series = series * square + (2 / 5)
    series = series * square + (2 / 3)
    series = series * square + 2.0
    return exponent * _LOG_2 + s * series


@triton.jit
def circle(h):
    # Cosine and sine of 2 pi h / 2^24, of whole numbers h in 0 ... 2^24 - 1.
    turned = h.to(tl.int32) + (1 << 21)
    quadrant = (turned >> 22) & 3
    angle = ((turned & ((1 << 22) - 1)) - (1 << 21)).to(tl.float32) * _RADIANS
    square = angle * angle
    sine = square * (1 / 362880) - (1 / 5040)
    sine = sine * square + (1 / 120)
    sine = sine * square - (1 / 6)
    sine = sine * square * angle + angle
    cosine = square * (1 / 40320) - (1 / 720)
    cosine = cosine * square + (1 / 24)
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    is_odd = (quadrant & 1) == 1
    x, y = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    # Times -1: what Triton has made of a minus is 0 - x, which turns no 0 into -0.
    x = tl.where(((quadrant + 1) & 2) != 0, x * -1.0, x)
    return _Point(x=x, y=tl.where(quadrant >= 2, y * -1.0, y))


@triton.jit
def normal_pair(a, b):
    # Two numbers from two words, by the method of Box and Muller.
    radius = square_root(logarithm((a >> 8) + 1) * -2.0)
    point = circle(b >> 8)
    return _Point(x=radius * point.x, y=radius * point.y)
