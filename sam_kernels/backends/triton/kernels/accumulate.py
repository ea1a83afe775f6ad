"""scores += g^2 in fp32, where both are there."""

import triton
import triton.language as tl

from ..codes import GRADS, LISTS
from ..engine import address, find_chunk, read, write
from ..math.rank import add_square
from ..rounding import widen


@triton.jit(do_not_specialize=["chunks", "count"])
def accumulate_kernel(layout, addresses, chunks, count, T: tl.constexpr, BLOCK: tl.constexpr):
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, c)
        n = chunk.size
        scores = address(addresses, count, LISTS, chunk, tl.float32)
        g = address(addresses, count, GRADS, chunk, T)
        if (scores != 0) & (g != 0):
            whole = n // BLOCK * BLOCK
            if (scores | g) % 16 == 0:
                for i in range(0, whole, BLOCK):
                    accumulate_block(scores, g, i, n, T, BLOCK, True, False)
            else:
                for i in range(0, whole, BLOCK):
                    accumulate_block(scores, g, i, n, T, BLOCK, False, False)
            if whole < n:
                accumulate_block(scores, g, whole, n, T, BLOCK, False, True)


@triton.jit
def accumulate_block(
    scores,
    g,
    i,
    n,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    score = read(scores, i, n, tl.float32, BLOCK, ALIGNED, MASKED)
    d = widen(read(g, i, n, T, BLOCK, ALIGNED, MASKED), tl.float32)
    write(scores, i, n, add_square(score, d), BLOCK, ALIGNED, MASKED)
