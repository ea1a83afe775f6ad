"""Stored types to calculating types and back, rounded as the compiled engines round."""

import triton
import triton.language as tl

# The interpreter cuts fp32 to bf16 where every GPU rounds to nearest even.
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def widen(x, S: tl.constexpr):
    return x.to(S)


@triton.jit
def narrow(x, T: tl.constexpr):
    if _IS_INTERPRETED:
        if T == tl.bfloat16:
            return _to_bf16(x)
        else:
            return x.to(T)
    else:
        return x.to(T)


@triton.jit
def _to_bf16(x):
    bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bf16_at_random(x, sixteen):
    """Up or down by 16 random bits; see csrc/core/half.h."""
    bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
    rounded = tl.add(bits, sixteen, sanitize_overflow=False) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


# Plain / and sqrt of fp32 are approximations in Triton; those of fp64 are not.


@triton.jit
def divide(x, y):
    if y.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def square_root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)
