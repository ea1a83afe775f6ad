"""x^e for x >= 0."""

import triton
import triton.language as tl


@triton.jit
def power(x, e):
    # There is no pow that both the interpreter and the compilers have. Relative error in fp32: about 6e-8 for
    # every unit of |e log2(x)|, and numbers below 1.2e-38 may count as 0. In fp64 both are the library's.
    positive = x > 0
    # To an infinite power: 0, 1 or infinity by what x is, and not by the last bit of its logarithm.
    is_infinite = e == float("inf")
    limit = tl.where(x < 1, 0.0, tl.where(x == 1, 1.0, float("inf")))
    found = tl.exp2(e * tl.log2(tl.where(is_infinite, 2.0, tl.where(positive, x, 1.0))))
    found = tl.where(is_infinite, limit, found)
    at_zero = tl.where(e > 0, x * 0.0, tl.where(e == 0, 1.0 + x * 0.0, float("inf")))
    return tl.where(positive, found, tl.where(x == 0, at_zero, x * float("nan")))
