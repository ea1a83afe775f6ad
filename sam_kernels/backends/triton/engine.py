"""What every kernel does: chunks over programs, blocks over chunks, sums in one order. Knows no optimizer.

note: [aligned and whole]
128-bit loads and stores need an address known to be a multiple of 16 and a block without a mask. So every
kernel has its loop three times: blocks of aligned chunks, blocks of others, and the masked rest of a chunk.

note: [blocks under words]
Under a mask of bits a block is a matrix: a row is the 64 elements of one word, the words are a column. Loads
and stores under a condition by row are 128 bits wide still, since it is one condition for 64 neighbours. All
that is not aligned and whole is walked in short blocks there: a thread that takes one element of many rows
would hold as many words.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .codes import CHUNK_COLUMNS, MASKS, WORD

# Elements of a short block. To the interpreter a block costs the same whatever its size.
SHORT = tl.constexpr(4096 if triton.knobs.runtime.interpret else 512)


class Chunk(NamedTuple):
    """One chunk: `size` elements of tensor `tensor` from `begin` on."""

    tensor: tl.tensor
    begin: tl.tensor
    size: tl.tensor
    number: tl.tensor
    row: tl.tensor


@triton.jit
def find_chunk(layout, index):
    record = layout + index * CHUNK_COLUMNS
    return Chunk(
        tensor=tl.load(record),
        begin=tl.load(record + 1),
        size=tl.load(record + 2).to(tl.int32),
        number=tl.load(record + 3),
        row=tl.load(record + 4),
    )


@triton.jit
def address(addresses, count, list: tl.constexpr, chunk, T: tl.constexpr):
    """Where the chunk begins in one of the lists, or 0 where its tensor has no part."""
    start = tl.load(addresses + list * count + chunk.tensor)
    return tl.where(start == 0, 0, start + chunk.begin * (T.primitive_bitwidth // 8))


@triton.jit
def words_address(addresses, count, list: tl.constexpr, chunk, IS_THERE: tl.constexpr):
    """Where the words of the chunk begin in a list of masks; 0 where its tensor is dense, or all are."""
    if IS_THERE:
        start = tl.load(addresses + list * count + chunk.tensor)
        return tl.where(start == 0, 0, start + chunk.begin // WORD * 8)
    else:
        return tl.zeros_like(chunk.begin)


@triton.jit
def mask_address(addresses, count, chunk, HAS_MASKS: tl.constexpr):
    return words_address(addresses, count, MASKS, chunk, HAS_MASKS)


@triton.jit
def read(start, i, n, T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Elements i to i + BLOCK from an address, or those of them below n."""
    offset = i + tl.arange(0, BLOCK)
    pointer = start.to(tl.pointer_type(T))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if MASKED:
        return tl.load(pointer + offset, mask=offset < n, other=0)
    else:
        return tl.load(pointer + offset)


@triton.jit
def everywhere(condition, BLOCK: tl.constexpr):
    """One condition as a mask, known to be the same for all: loads under it can still be 128 bits wide."""
    # By way of integers, since the interpreter gives a comparison the type of what was compared.
    return (tl.zeros([BLOCK], tl.int32) + tl.where(condition, 1, 0)) != 0


@triton.jit
def read_if(
    wanted,
    start,
    i,
    n,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """As `read`; zeros, and no memory touched, unless wanted."""
    offset = i + tl.arange(0, BLOCK)
    pointer = start.to(tl.pointer_type(T))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    mask = everywhere(wanted, BLOCK)
    if MASKED:
        mask = mask & (offset < n)
    return tl.load(pointer + offset, mask=mask, other=0)


@triton.jit
def write(start, i, n, x, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """The counterpart of `read`."""
    offset = i + tl.arange(0, BLOCK)
    pointer = start.to(tl.pointer_type(x.dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if MASKED:
        tl.store(pointer + offset, x, mask=offset < n)
    else:
        tl.store(pointer + offset, x)


@triton.jit
def write_if(wanted, start, i, n, x, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """The counterpart of `read_if`."""
    offset = i + tl.arange(0, BLOCK)
    pointer = start.to(tl.pointer_type(x.dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    mask = everywhere(wanted, BLOCK)
    if MASKED:
        mask = mask & (offset < n)
    tl.store(pointer + offset, x, mask=mask)


@triton.jit
def long_part(start, n, BLOCK: tl.constexpr):
    """How many of n elements are in aligned whole blocks; note: [blocks under words]."""
    return tl.where(start % 16 == 0, n // BLOCK * BLOCK, 0)


@triton.jit
def read_words(words, i, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """The words of elements i to i + BLOCK as a column; all ones for a dense tensor, which has none."""
    number = i // WORD + tl.arange(0, BLOCK // WORD)
    wanted = everywhere(words != 0, BLOCK // WORD)
    if MASKED:
        wanted = wanted & (number * WORD < n)
    pointer = words.to(tl.pointer_type(tl.int64))
    return tl.load(pointer + number, mask=wanted, other=-1)[:, None]


@triton.jit
def in_rows(i, BLOCK: tl.constexpr):
    """The numbers i to i + BLOCK, a row for each word."""
    return i + tl.arange(0, BLOCK // WORD)[:, None] * WORD + tl.arange(0, WORD)[None, :]


@triton.jit
def bits_of(words, BLOCK: tl.constexpr):
    """Whether the bit of each element is set, for a column of words."""
    # A byte at first, which the elements of a thread share: 64 bits of each would take many registers.
    lane = tl.arange(0, WORD)[None, :]
    byte = (words >> (lane & 56)).to(tl.int32)
    return tl.reshape((byte >> (lane & 7)) & 1, [BLOCK]) != 0


@triton.jit
def read_rows(
    wanted,
    start,
    i,
    n,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """As `read`; zeros, and no memory touched, in rows that are not wanted, which is a column."""
    pointer = start.to(tl.pointer_type(T))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    mask = tl.broadcast_to(wanted, [BLOCK // WORD, WORD])
    if MASKED:
        mask = mask & (in_rows(i, BLOCK) < n)
    return tl.reshape(tl.load(pointer + in_rows(i, BLOCK), mask=mask, other=0), [BLOCK])


@triton.jit
def read_either(
    wanted,
    start,
    instead,
    i,
    n,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """As `read`, from one address in rows that are wanted and from the other elsewhere."""
    pointer = tl.where(wanted, start, instead).to(tl.pointer_type(T))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, [16, 16])
    pointer = pointer + in_rows(i, BLOCK)
    if MASKED:
        return tl.reshape(tl.load(pointer, mask=in_rows(i, BLOCK) < n, other=0), [BLOCK])
    else:
        return tl.reshape(tl.load(pointer), [BLOCK])


@triton.jit
def write_rows(wanted, start, i, n, x, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """The counterpart of `read_rows`."""
    pointer = start.to(tl.pointer_type(x.dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    mask = tl.broadcast_to(wanted, [BLOCK // WORD, WORD])
    if MASKED:
        mask = mask & (in_rows(i, BLOCK) < n)
    tl.store(pointer + in_rows(i, BLOCK), tl.reshape(x, [BLOCK // WORD, WORD]), mask=mask)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def is_last_program(counter):
    """Whether this program is the last of its launch to arrive here; it then sees what all others wrote.

    The counter is ready for the next launch.
    """
    tl.debug_barrier()  # the stores of all warps come before the one atomic operation
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def larger(a, b):
    """The larger of two blocks; a NaN on either side stays."""
    return tl.where(((b > a) | (b != b)) & (a == a), b, a)


@triton.jit
def largest(x):
    """The largest of a block of numbers that are not negative; NaN where there is one."""
    is_nan = x != x
    found = tl.max(tl.where(is_nan, 0.0, x))
    return tl.where(tl.max(is_nan.to(tl.int32)) > 0, float("nan"), found)


@triton.jit
def copy_chunk(to, source, n, T: tl.constexpr, BLOCK: tl.constexpr):
    """Bits, not numbers: T is any type of that size."""
    whole = n // BLOCK * BLOCK
    if (to | source) % 16 == 0:
        for i in range(0, whole, BLOCK):
            write(to, i, n, read(source, i, n, T, BLOCK, True, False), BLOCK, True, False)
    else:
        for i in range(0, whole, BLOCK):
            write(to, i, n, read(source, i, n, T, BLOCK, False, False), BLOCK, False, False)
    if whole < n:
        write(to, whole, n, read(source, whole, n, T, BLOCK, False, True), BLOCK, False, True)


@triton.jit
def copy_rows(to, source, words, n, T: tl.constexpr, BLOCK: tl.constexpr):
    """As `copy_chunk`, but nothing where a word is 0."""
    long = long_part(to | source, n, BLOCK)
    for i in range(0, long, BLOCK):
        live = read_words(words, i, n, BLOCK, False) != 0
        x = read_rows(live, source, i, n, T, BLOCK, True, False)
        write_rows(live, to, i, n, x, BLOCK, True, False)
    for i in range(long, n, SHORT):
        live = read_words(words, i, n, SHORT, True) != 0
        x = read_rows(live, source, i, n, T, SHORT, False, True)
        write_rows(live, to, i, n, x, SHORT, False, True)
