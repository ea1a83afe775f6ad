"""How many ranks there are of each value of some of their bits."""

import triton
import triton.language as tl

from ..codes import MASKS, WITHIN
from ..engine import SHORT, find_chunk, long_part, words_address
from ..selection import find_source, ranks_of, takes_part


@triton.jit(do_not_specialize=["chunks", "count", "seed", "step", "prefix", "shift"])
def count_kernel(
    layout,
    addresses,
    chunks,
    count,
    seed: tl.int64,
    step: tl.int64,
    prefix: tl.int32,
    shift: tl.int32,
    counts,
    T: tl.constexpr,
    IS_RANDOM: tl.constexpr,
    HAS_WITHIN: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Every program counts for itself: few values are common, and all would wait for the same few counters.
    own = counts + tl.program_id(0) * (1 << BITS)
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, c)
        n = chunk.size
        if words_address(addresses, count, MASKS, chunk, True) != 0:
            source = find_source(addresses, count, chunk, seed, step, T, IS_RANDOM)
            within = words_address(addresses, count, WITHIN, chunk, HAS_WITHIN)
            long = long_part(source.scores, n, BLOCK)
            for i in range(0, long, BLOCK):
                rank = ranks_of(source, i, n, T, IS_RANDOM, BLOCK, True, False)
                part = takes_part(within, i, n, HAS_WITHIN, OUTSIDE, BLOCK, False)
                count_block(own, rank, part, prefix, shift, BITS)
            for i in range(long, n, SHORT):
                rank = ranks_of(source, i, n, T, IS_RANDOM, SHORT, False, True)
                part = takes_part(within, i, n, HAS_WITHIN, OUTSIDE, SHORT, True)
                count_block(own, rank, part, prefix, shift, BITS)


@triton.jit
def count_block(counts, rank, part, prefix, shift, BITS: tl.constexpr):
    part = part & ((rank >> (shift + BITS)) == prefix)
    tl.atomic_add(counts + ((rank >> shift) & ((1 << BITS) - 1)), 1, mask=part, sem="relaxed")
