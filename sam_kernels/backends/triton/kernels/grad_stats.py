"""All dots of up to three lists in one read, over all tensors and by tensor."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..codes import LISTS
from ..engine import address, find_chunk, is_last_program, read_if
from ..rounding import widen


class Dots(NamedTuple):
    """Sums by lane, the upper triangle row by row."""

    xx: tl.tensor
    xy: tl.tensor
    xz: tl.tensor
    yy: tl.tensor
    yz: tl.tensor
    zz: tl.tensor


@triton.jit(do_not_specialize=["chunks", "count"])
def grad_stats_kernel(
    layout,
    addresses,
    chunks,
    count,
    partials,
    counter,
    out,
    T: tl.constexpr,
    S: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, c)
        x = address(addresses, count, LISTS, chunk, T)
        y = x
        z = x
        if COUNT > 1:
            y = address(addresses, count, LISTS + 1, chunk, T)
        if COUNT > 2:
            z = address(addresses, count, LISTS + 2, chunk, T)
        zero = tl.zeros([BLOCK], S)
        dots = Dots(xx=zero, xy=zero, xz=zero, yy=zero, yz=zero, zz=zero)
        n = chunk.size
        whole = n // BLOCK * BLOCK
        if (x | y | z) % 16 == 0:
            for i in range(0, whole, BLOCK):
                dots = add_block(dots, x, y, z, i, n, T, S, COUNT, BLOCK, True, False)
        else:
            for i in range(0, whole, BLOCK):
                dots = add_block(dots, x, y, z, i, n, T, S, COUNT, BLOCK, False, False)
        if whole < n:
            dots = add_block(dots, x, y, z, whole, n, T, S, COUNT, BLOCK, False, True)
        own = partials + chunk.number * 6
        tl.store(own, tl.sum(dots.xx.to(tl.float64)))
        if COUNT > 1:
            tl.store(own + 1, tl.sum(dots.xy.to(tl.float64)))
            tl.store(own + 3, tl.sum(dots.yy.to(tl.float64)))
        if COUNT > 2:
            tl.store(own + 2, tl.sum(dots.xz.to(tl.float64)))
            tl.store(own + 4, tl.sum(dots.yz.to(tl.float64)))
            tl.store(own + 5, tl.sum(dots.zz.to(tl.float64)))
    if is_last_program(counter):
        join_dots(partials, 0, chunks, out, COUNT, BLOCK)


@triton.jit
def dots_by_tensor_kernel(partials, first, out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0)
    own = out + t * (COUNT * (COUNT + 1) // 2)
    join_dots(partials, tl.load(first + t), tl.load(first + t + 1), own, COUNT, BLOCK)


@triton.jit
def join_dots(partials, begin, end, out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    join_partials(partials, 0, begin, end, out, 0, BLOCK)
    if COUNT == 2:
        join_partials(partials, 1, begin, end, out, 1, BLOCK)
        join_partials(partials, 3, begin, end, out, 2, BLOCK)
    elif COUNT == 3:
        for dot in tl.static_range(1, 6):
            join_partials(partials, dot, begin, end, out, dot, BLOCK)


@triton.jit
def join_partials(partials, dot: tl.constexpr, begin, end, out, place: tl.constexpr, BLOCK: tl.constexpr):
    joined = tl.zeros([BLOCK], tl.float64)
    for i in range(begin, end, BLOCK):
        offset = i + tl.arange(0, BLOCK)
        # From the cache that all processors share: others wrote these.
        joined += tl.load(partials + offset * 6 + dot, mask=offset < end, other=0, cache_modifier=".cg")
    tl.store(out + place, tl.sum(joined))


@triton.jit
def add_block(
    dots,
    x,
    y,
    z,
    i,
    n,
    T: tl.constexpr,
    S: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    # A missing partner must not turn a NaN or an infinity into a NaN: that dot has no such tensor.
    a = widen(read_if(x != 0, x, i, n, T, BLOCK, ALIGNED, MASKED), S)
    xx = dots.xx + a * a
    xy = dots.xy
    xz = dots.xz
    yy = dots.yy
    yz = dots.yz
    zz = dots.zz
    if COUNT > 1:
        b = widen(read_if(y != 0, y, i, n, T, BLOCK, ALIGNED, MASKED), S)
        xy += tl.where((x != 0) & (y != 0), a * b, 0.0)
        yy += b * b
    if COUNT > 2:
        c = widen(read_if(z != 0, z, i, n, T, BLOCK, ALIGNED, MASKED), S)
        xz += tl.where((x != 0) & (z != 0), a * c, 0.0)
        yz += tl.where((y != 0) & (z != 0), b * c, 0.0)
        zz += c * c
    return Dots(xx=xx, xy=xy, xz=xz, yy=yy, yz=yz, zz=zz)
