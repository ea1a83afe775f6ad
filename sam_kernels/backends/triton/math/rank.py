"""What a selection of masks ranks; note: [ranks] in csrc/sam_kernels.h."""

import triton
import triton.language as tl


@triton.jit
def rank_of(score):
    # The bits of |score|, which order like |score| itself; one rank above infinity for every NaN.
    size = score.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(size > 0x7F800000, 0x7F800001, size)


@triton.jit
def rank_of_word(word):
    # Of a random word; see random.py.
    return (word >> 1).to(tl.int32)


@triton.jit
def candidate_of(rank, shift, position):
    # What stands for one element among those at the threshold: the larger first, and of equals the one that
    # comes first. 20 bits of the rank and 43 of the position fit.
    low = rank.to(tl.int64) & ((tl.full((), 1, tl.int64) << shift) - 1)
    return (low << 43) | (((1 << 43) - 1) - position)


@triton.jit
def add_square(score, g):
    # score + g^2
    return tl.fma(g, g, score)
