"""x^e for x >= 0."""

import triton
import triton.language as tl


@triton.jit
def power(x, e):
    # There is no pow that both the interpreter and the compilers have. Relative error in fp32: about 6e-8 for
    # every unit of |e log2(x)|, and numbers below 1.2e-38 may count as 0. In fp64 both are the library's.
    positive = x > 0
    found = tl.exp2(e * tl.log2(tl.where(positive, x, 1.0)))
    at_zero = tl.where(e > 0, x * 0.0, tl.where(e == 0, 1.0 + x * 0.0, float("inf")))
    return tl.where(positive, found, tl.where(x == 0, at_zero, x * float("nan")))
