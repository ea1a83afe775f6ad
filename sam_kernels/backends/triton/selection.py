"""What counting and marking share: ranks, and which elements take part. Knows no optimizer."""

from typing import NamedTuple

import triton
import triton.language as tl

from .codes import LISTS, NUMBERS
from .engine import address, bits_of, read_if, read_words
from .math.random import random_word
from .math.rank import rank_of, rank_of_word


class Source(NamedTuple):
    """Where the ranks of a chunk come from: its scores, or numbers drawn for its tensor."""

    scores: tl.tensor
    seed: tl.tensor
    step: tl.tensor
    number: tl.tensor
    begin: tl.tensor


@triton.jit
def find_source(addresses, count, chunk, seed, step, T: tl.constexpr, IS_RANDOM: tl.constexpr):
    scores = tl.zeros_like(chunk.begin)
    number = tl.zeros_like(chunk.begin)
    if IS_RANDOM:
        number = tl.load(addresses + NUMBERS * count + chunk.tensor)
    else:
        scores = address(addresses, count, LISTS, chunk, T)
    return Source(scores=scores, seed=seed, step=step, number=number, begin=chunk.begin)


@triton.jit
def ranks_of(
    source,
    i,
    n,
    T: tl.constexpr,
    IS_RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Ranks of elements i to i + BLOCK; of those beyond n, some rank."""
    if IS_RANDOM:
        element = source.begin + i + tl.arange(0, BLOCK)
        return rank_of_word(random_word(source.seed, source.step, source.number, element))
    else:
        scores = source.scores
        return rank_of(read_if(scores != 0, scores, i, n, T, BLOCK, ALIGNED, MASKED))


@triton.jit
def takes_part(
    within,
    i,
    n,
    HAS_WITHIN: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Which of elements i to i + BLOCK take part: none of those beyond n."""
    is_there = i + tl.arange(0, BLOCK) < n
    if HAS_WITHIN:
        bits = bits_of(read_words(within, i, n, BLOCK, MASKED), BLOCK)
        if OUTSIDE:
            return is_there & (bits == 0)
        else:
            return is_there & bits
    else:
        return is_there
