"""out[i] = sum_j coefficients[i, j] * list[j], with coefficients of all tensors or of each."""

import triton
import triton.language as tl

from ..codes import LISTS, OUTS
from ..engine import address, find_chunk, read_if, write_if
from ..math.combine import Term, term_first, term_next
from ..rounding import narrow, widen


@triton.jit(do_not_specialize=["chunks", "count", "stride"])
def combine_kernel(
    layout,
    addresses,
    chunks,
    count,
    coefficients,
    stride: tl.int32,
    T: tl.constexpr,
    S: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # stride: from the coefficients of a tensor to those of the next; 0 where they are shared.
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, c)
        first = address(addresses, count, OUTS, chunk, T)
        second = tl.zeros_like(first)
        if OUT > 1:
            second = address(addresses, count, OUTS + 1, chunk, T)
        if (first | second) != 0:
            n = chunk.size
            own = coefficients + chunk.tensor * stride
            x = address(addresses, count, LISTS, chunk, T)
            y = tl.zeros_like(x)
            z = tl.zeros_like(x)
            if IN > 1:
                y = address(addresses, count, LISTS + 1, chunk, T)
            if IN > 2:
                z = address(addresses, count, LISTS + 2, chunk, T)
            whole = n // BLOCK * BLOCK
            if (x | y | z | first | second) % 16 == 0:
                for i in range(0, whole, BLOCK):
                    combine_block(x, y, z, first, second, own, i, n, T, S, IN, OUT, BLOCK, True, False)
            else:
                for i in range(0, whole, BLOCK):
                    combine_block(x, y, z, first, second, own, i, n, T, S, IN, OUT, BLOCK, False, False)
            if whole < n:
                combine_block(x, y, z, first, second, own, whole, n, T, S, IN, OUT, BLOCK, False, True)


@triton.jit
def combine_block(
    x,
    y,
    z,
    first,
    second,
    coefficients,
    i,
    n,
    T: tl.constexpr,
    S: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    a = read_term(x, 0, coefficients, i, n, T, S, IN, OUT, BLOCK, ALIGNED, MASKED)
    b = a
    c = a
    if IN > 1:
        b = read_term(y, 1, coefficients, i, n, T, S, IN, OUT, BLOCK, ALIGNED, MASKED)
    if IN > 2:
        c = read_term(z, 2, coefficients, i, n, T, S, IN, OUT, BLOCK, ALIGNED, MASKED)
    # Both sums before the first store: an output may be one of the lists.
    sum = weighted(a, b, c, x, y, z, coefficients, S, IN)
    if OUT > 1:
        other = weighted(a, b, c, x, y, z, coefficients + IN, S, IN)
        write_if(second != 0, second, i, n, narrow(other, T), BLOCK, ALIGNED, MASKED)
    write_if(first != 0, first, i, n, narrow(sum, T), BLOCK, ALIGNED, MASKED)


@triton.jit
def read_term(
    x,
    list: tl.constexpr,
    coefficients,
    i,
    n,
    T: tl.constexpr,
    S: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    # A list with no part in any output may hold anything, or nothing.
    wanted = tl.load(coefficients + list) != 0
    if OUT > 1:
        wanted = wanted | (tl.load(coefficients + IN + list) != 0)
    return widen(read_if(wanted & (x != 0), x, i, n, T, BLOCK, ALIGNED, MASKED), S)


@triton.jit
def weighted(a, b, c, x, y, z, coefficients, S: tl.constexpr, IN: tl.constexpr):
    started = x != x
    sum = tl.zeros_like(a)
    sum, started = add_term(sum, started, a, x, tl.load(coefficients).to(S))
    if IN > 1:
        sum, started = add_term(sum, started, b, y, tl.load(coefficients + 1).to(S))
    if IN > 2:
        sum, started = add_term(sum, started, c, z, tl.load(coefficients + 2).to(S))
    return sum


@triton.jit
def add_term(sum, started, x, start, coefficient):
    # A choice, not a product with zero. The first term is a product alone: 0 + -0 would lose its sign.
    term = Term(coefficient=coefficient)
    takes_part = (start != 0) & (coefficient != 0)
    added = tl.where(started, term_next(term, sum, x), term_first(term, x))
    return tl.where(takes_part, added, sum), started | takes_part
