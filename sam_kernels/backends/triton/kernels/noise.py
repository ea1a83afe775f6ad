"""out = standard normal numbers, each a function of seed, step, tensor and element."""

import triton
import triton.language as tl

from ..codes import NUMBERS, OUTS
from ..engine import SHORT, address, find_chunk, long_part, write
from ..math.normal import normal_pair
from ..math.random import random_words
from ..rounding import narrow


@triton.jit(do_not_specialize=["chunks", "count", "seed", "step"])
def noise_kernel(
    layout,
    addresses,
    chunks,
    count,
    seed: tl.int64,
    step: tl.int64,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, c)
        n = chunk.size
        out = address(addresses, count, OUTS, chunk, T)
        if out != 0:
            number = tl.load(addresses + NUMBERS * count + chunk.tensor)
            long = long_part(out, n, BLOCK)
            for i in range(0, long, BLOCK):
                x = normal_numbers(seed, step, number, chunk.begin + i, BLOCK)
                write(out, i, n, narrow(x, T), BLOCK, True, False)
            for i in range(long, n, SHORT):
                x = normal_numbers(seed, step, number, chunk.begin + i, SHORT)
                write(out, i, n, narrow(x, T), SHORT, False, True)


@triton.jit
def normal_numbers(seed, step, number, first, BLOCK: tl.constexpr):
    """Those of elements first to first + BLOCK, both multiples of 4."""
    # See note: [four neighbours] in csrc/math/random.h. Joined last, the pairs' halves alternate.
    words = random_words(seed, step, number, first + 4 * tl.arange(0, BLOCK // 4))
    left, right = normal_pair(words.x0, words.x1), normal_pair(words.x2, words.x3)
    return tl.reshape(tl.join(tl.join(left.x, right.x), tl.join(left.y, right.y)), [BLOCK])
