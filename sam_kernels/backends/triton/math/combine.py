"""a x + b y + c z, adding in list order; lists with a zero coefficient are never read."""

from typing import NamedTuple

import triton
import triton.language as tl


class Term(NamedTuple):
    """One list's share of the sum."""

    coefficient: tl.tensor


@triton.jit
def term_first(self, x):
    return self.coefficient * x


@triton.jit
def term_next(self, sum, x):
    return tl.fma(self.coefficient, x, sum)
