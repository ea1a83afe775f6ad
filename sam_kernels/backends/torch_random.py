"""Random numbers by counter in plain torch: the same bits as csrc/math/random.h and the Triton mirror.

A number is a function of seed, step, tensor and element, so devices, chunks and threads cannot change it,
and none has to be stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..bitmask import flatten, is_dense
from ..tensor_groups import TensorGroup

_LOW = 0xFFFFFFFF

_SLICE = 1 << 20  # elements, a multiple of 4: the words are int64 here, for want of unsigned arithmetic


def philox(c0: Tensor, c1: Tensor, c2: int, c3: int, k0: int, k1: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 of counters and keys below 2^32, see csrc/math/random.h; int64 tensors."""
    x0, x1, x2, x3 = c0, c1, torch.full_like(c0, c2), torch.full_like(c0, c3)
    for _ in range(10):
        # The products of 32-bit numbers wrap into negative int64; their bits are right all the same.
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (b >> 32 & _LOW) ^ x1 ^ k0, b & _LOW, (a >> 32 & _LOW) ^ x3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return x0, x1, x2, x3


def random_words(seed: int, step: int, tensor: int, four: Tensor) -> tuple[Tensor, ...]:
    """The four words that elements ``4 four`` to ``4 four + 3`` share."""
    return philox(four & _LOW, four >> 32, tensor, step, seed & _LOW, seed >> 32 & _LOW)


def random_word(seed: int, step: int, tensor: int, element: Tensor) -> Tensor:
    """32 random bits per element, as `random_word` of csrc/math/random.h makes them."""
    words = torch.stack(random_words(seed, step, tensor, element >> 2))
    return words.gather(0, (element & 3).unsqueeze(0)).squeeze(0)


# note: [the same normal numbers everywhere]
# Library logarithms, sines and cosines differ by a bit between a CPU, a GPU and two versions of either. These
# consist of fp32 additions, multiplications, divisions and square roots, each rounded once and none fused,
# which IEEE 754 defines to the bit. Every engine spells them in this order.


def logarithm(k: Tensor) -> Tensor:
    """``ln(k / 2^24)`` of whole numbers k in 1 ... 2^24, in float32."""
    bits = k.to(torch.float32).view(torch.int32)
    exponent = (bits >> 23) - 127
    mantissa = (bits & 0x7FFFFF | 0x3F800000).view(torch.float32)
    is_high = mantissa >= 1.4142135
    mantissa = torch.where(is_high, mantissa * 0.5, mantissa)
    exponent = (exponent + is_high - 24).to(torch.float32)
    t = mantissa - 1.0
    s = t / (t + 2.0)
    square = s * s
    series = square * _f32(2 / 9) + _f32(2 / 7)
    series = series * square + _f32(2 / 5)
    series = series * square + _f32(2 / 3)
    series = series * square + 2.0
    return exponent * _f32(math.log(2)) + s * series


def circle(h: Tensor) -> tuple[Tensor, Tensor]:
    """``cos`` and ``sin`` of ``2 pi h / 2^24``, of whole numbers h in 0 ... 2^24 - 1, in float32."""
    turned = h + (1 << 21)
    quadrant = turned >> 22 & 3
    angle = ((turned & (1 << 22) - 1) - (1 << 21)).to(torch.float32) * _f32(math.pi / 2 / (1 << 22))
    square = angle * angle
    sine = square * _f32(1 / 362880) - _f32(1 / 5040)
    sine = sine * square + _f32(1 / 120)
    sine = sine * square - _f32(1 / 6)
    sine = sine * square * angle + angle
    cosine = square * _f32(1 / 40320) - _f32(1 / 720)
    cosine = cosine * square + _f32(1 / 24)
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    is_odd = (quadrant & 1) == 1
    x, y = torch.where(is_odd, sine, cosine), torch.where(is_odd, cosine, sine)
    x = torch.where((quadrant == 1) | (quadrant == 2), -x, x)
    return x, torch.where(quadrant >= 2, -y, y)


def normal_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normal numbers from two words, by the method of Box and Muller; float32.

    Args:
        a, b: int64 tensors of 32-bit words.
    """
    # In float64: torch's float32 root is off by a unit on some CPUs. Rounded twice, the root of a float32 is
    # exact.
    radius = (logarithm((a >> 8) + 1) * -2.0).double().sqrt().float()
    x, y = circle(b >> 8)
    return radius * x, radius * y


def normal(seed: int, step: int, tensor: int, first: int, size: int, device: torch.device) -> Tensor:
    """Standard normal numbers of the elements from `first`, a multiple of 4, on; float32 [size]."""
    four = torch.arange(first // 4, (first + size + 3) // 4, device=device)
    x0, x1, x2, x3 = random_words(seed, step, tensor, four)
    return torch.stack([*normal_pair(x0, x1), *normal_pair(x2, x3)], dim=1).flatten()[:size]


def noise_(group: TensorGroup, outs: list[Tensor | None], seed: int, step: int, numbers: list[int]) -> None:
    """Standard normal numbers in the order of memory, see `Backend.noise_`."""
    for out, number in zip(outs, numbers, strict=True):
        if out is None:
            continue
        flat = flatten(out) if is_dense(out) else torch.empty(out.numel(), dtype=out.dtype, device=out.device)
        for first in range(0, out.numel(), _SLICE):
            size = min(_SLICE, out.numel() - first)
            flat[first : first + size] = normal(seed, step, number, first, size, group.device)
        if not is_dense(out):
            out.copy_(flat.view(out.shape))


# ---- stochastic rounding ---------------------------------------------------------------------------


def rounding_bits(seed: int, step: int, tensor: int, first: int, size: int, device: torch.device) -> Tensor:
    """16 random bits for each element from `first`, a multiple of 8, on; int32 [size].

    Eight elements share the words of one call, see note [eight neighbours] in csrc/math/random.h.
    """
    eight = torch.arange(first // 8, (first + size + 7) // 8, device=device)
    words = torch.stack(random_words(seed, step, tensor, eight), dim=1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2)
    return halves.flatten()[:size].to(torch.int32)


def to_bf16_at_random(values: Tensor, sixteen: Tensor) -> Tensor:
    """float32 to bfloat16, up or down by 16 random bits; see csrc/core/half.h."""
    rounded = (values.view(torch.int32) + sixteen >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isnan(), torch.full_like(rounded, float("nan")), rounded)


def store_at_random_(w: Tensor, values: Tensor, rounding: Any, t: int) -> None:
    """``w = values``, rounded at random.

    Args:
        w: bfloat16, tensor t of its group.
        values: float32 in the strides of w where that is dense.
        rounding: of `sam_kernels.rounding`.
    """
    is_flat = is_dense(w)
    source = flatten(values) if is_flat else values.reshape(-1)
    out = flatten(w) if is_flat else torch.empty_like(source, dtype=w.dtype)
    for first in range(0, w.numel(), _SLICE):
        size = min(_SLICE, w.numel() - first)
        bits = rounding_bits(rounding.seed, rounding.step, rounding.numbers[t], first, size, w.device)
        out[first : first + size] = to_bf16_at_random(source[first : first + size], bits)
    if not is_flat:
        w.copy_(out.view(w.shape))


def _f32(x: float) -> float:
    """x rounded to float32: torch would calculate with more of its bits on some devices."""
    return torch.tensor(x, dtype=torch.float32).item()
