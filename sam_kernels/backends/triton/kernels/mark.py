"""The bits of a mask from ranks above a threshold, and the elements at the threshold."""

import triton
import triton.language as tl

from ..codes import MASKS, POSITIONS, WITHIN, WORD
from ..engine import SHORT, find_chunk, long_part, read_words, words_address
from ..math.rank import candidate_of
from ..selection import find_source, ranks_of, takes_part


@triton.jit(do_not_specialize=["chunks", "count", "seed", "step", "threshold", "shift", "capacity"])
def mark_kernel(
    layout,
    addresses,
    chunks,
    count,
    seed: tl.int64,
    step: tl.int64,
    threshold: tl.int32,
    shift: tl.int32,
    candidates,
    capacity: tl.int64,
    found,
    T: tl.constexpr,
    IS_RANDOM: tl.constexpr,
    HAS_WITHIN: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, c)
        n = chunk.size
        words = words_address(addresses, count, MASKS, chunk, True)
        if words != 0:
            source = find_source(addresses, count, chunk, seed, step, T, IS_RANDOM)
            within = words_address(addresses, count, WITHIN, chunk, HAS_WITHIN)
            position = chunk.begin
            if candidates is not None:
                position += tl.load(addresses + POSITIONS * count + chunk.tensor)
            long = long_part(source.scores, n, BLOCK)
            for i in range(0, long, BLOCK):
                rank = ranks_of(source, i, n, T, IS_RANDOM, BLOCK, True, False)
                part = takes_part(within, i, n, HAS_WITHIN, OUTSIDE, BLOCK, False)
                write_bits(words, i, n, part & (rank >> shift > threshold), ADD, BLOCK, False)
                if candidates is not None:
                    at = part & (rank >> shift == threshold)
                    append(candidates, capacity, found, rank, shift, position + i, at, BLOCK)
            for i in range(long, n, SHORT):
                rank = ranks_of(source, i, n, T, IS_RANDOM, SHORT, False, True)
                part = takes_part(within, i, n, HAS_WITHIN, OUTSIDE, SHORT, True)
                write_bits(words, i, n, part & (rank >> shift > threshold), ADD, SHORT, True)
                if candidates is not None:
                    at = part & (rank >> shift == threshold)
                    append(candidates, capacity, found, rank, shift, position + i, at, SHORT)


@triton.jit
def write_bits(words, i, n, bits, ADD: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    rows = tl.reshape(bits.to(tl.int64), [BLOCK // WORD, WORD])
    word = tl.sum(rows << tl.arange(0, WORD)[None, :], axis=1)  # of distinct bits: their union
    if ADD:
        word = word | tl.reshape(read_words(words, i, n, BLOCK, MASKED), [BLOCK // WORD])
    number = i // WORD + tl.arange(0, BLOCK // WORD)
    tl.store(words.to(tl.pointer_type(tl.int64)) + number, word, mask=number * WORD < n)


@triton.jit
def append(candidates, capacity, found, rank, shift, position, at, BLOCK: tl.constexpr):
    # One reservation for a block. What finds no room is counted all the same.
    taken = tl.where(at, 1, 0)
    total = tl.sum(taken)
    if total > 0:
        begin = tl.atomic_add(found, total.to(tl.int64), sem="relaxed")
        slot = begin + tl.cumsum(taken, 0) - 1
        value = candidate_of(rank, shift, position + tl.arange(0, BLOCK))
        tl.store(candidates + slot, value, mask=at & (slot < capacity))
