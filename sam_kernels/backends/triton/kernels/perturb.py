"""snapshot = w; w += scale * T * h(T * g), where the mask selects it.

note: [a gradient as its own snapshot]
A block reads all that it needs before it writes, but its threads wait for no one: one might write the
snapshot where another has yet to read the gradient. Not where the block is aligned: there loads and stores
lie alike over the threads, and each writes only what it alone has read. Elsewhere they wait.
"""

import triton
import triton.language as tl

from ..codes import (
    ADAPTIVE,
    COLUMN_ETA,
    COLUMN_METRIC,
    COLUMNS,
    EUCLIDEAN,
    FISHER,
    FIXED,
    GRADS,
    PARAMS,
    POWERED,
    SNAPSHOTS,
)
from ..engine import (
    SHORT,
    address,
    bits_of,
    copy_chunk,
    copy_rows,
    find_chunk,
    is_finite,
    long_part,
    mask_address,
    read,
    read_rows,
    read_words,
    write,
    write_rows,
)
from ..math.metric import Adaptive, Fisher
from ..math.perturb import Perturb, Powered, apply_perturb, perturb_scale
from ..rounding import narrow, widen


@triton.jit(do_not_specialize=["chunks", "count"])
def perturb_kernel(
    layout,
    addresses,
    table,
    chunks,
    count,
    norm,
    peak,
    tensor_scale,
    T: tl.constexpr,
    S: tl.constexpr,
    SHAPE: tl.constexpr,
    HAS_ADAPTIVE: tl.constexpr,
    HAS_FISHER: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    length = tl.load(norm)
    is_safe = is_finite(length)
    # What the norm has read last is still in the cache, so this goes from the end to the beginning.
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, chunks - 1 - c)
        row = table + chunk.row * COLUMNS
        metric = tl.load(row + COLUMN_METRIC)
        w = address(addresses, count, PARAMS, chunk, T)
        g = address(addresses, count, GRADS, chunk, T)
        snapshot = address(addresses, count, SNAPSHOTS, chunk, T)
        if (w != 0) & (g != 0) & (snapshot != 0) & (metric != FIXED):
            words = mask_address(addresses, count, chunk, HAS_MASKS)
            n = chunk.size
            if is_safe:
                own = length * 0 + 1
                if tensor_scale is not None:
                    own = tl.load(tensor_scale + chunk.tensor)
                scale = perturb_scale(row, SHAPE, length, own, S)
                eta = tl.load(row + COLUMN_ETA).to(S)
                shape = make_shape(peak, SHAPE, Q, S)
                if HAS_ADAPTIVE:
                    if metric == ADAPTIVE:
                        perturb = Perturb(scale=scale, metric=Adaptive(eta=eta), shape=shape)
                        perturb_chunk(
                            perturb, w, g, snapshot, words, n, T, S, ADAPTIVE, SHAPE, HAS_MASKS, BLOCK
                        )
                    else:
                        other = Perturb(scale=scale, metric=Fisher(eta=eta), shape=shape)
                        perturb_by_gradient(
                            other, metric, w, g, snapshot, words, n, T, S, SHAPE, HAS_FISHER, HAS_MASKS, BLOCK
                        )
                else:
                    other = Perturb(scale=scale, metric=Fisher(eta=eta), shape=shape)
                    perturb_by_gradient(
                        other, metric, w, g, snapshot, words, n, T, S, SHAPE, HAS_FISHER, HAS_MASKS, BLOCK
                    )
            else:
                if HAS_MASKS:
                    copy_rows(snapshot, w, words, n, T, BLOCK)
                else:
                    copy_chunk(snapshot, w, n, T, BLOCK)


@triton.jit
def make_shape(peak, SHAPE: tl.constexpr, Q: tl.constexpr, S: tl.constexpr):
    if SHAPE == POWERED:
        largest = tl.load(peak)
        return Powered(peak=largest.to(S), exponent=(largest * 0 + (Q - 1)).to(S))
    else:
        return ()


@triton.jit
def perturb_by_gradient(
    perturb,
    metric,
    w,
    g,
    snapshot,
    words,
    n,
    T: tl.constexpr,
    S: tl.constexpr,
    SHAPE: tl.constexpr,
    HAS_FISHER: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Under a metric that measures no weights."""
    if HAS_FISHER:
        if metric == FISHER:
            perturb_chunk(perturb, w, g, snapshot, words, n, T, S, FISHER, SHAPE, HAS_MASKS, BLOCK)
        else:
            perturb_chunk(perturb, w, g, snapshot, words, n, T, S, EUCLIDEAN, SHAPE, HAS_MASKS, BLOCK)
    else:
        perturb_chunk(perturb, w, g, snapshot, words, n, T, S, EUCLIDEAN, SHAPE, HAS_MASKS, BLOCK)


@triton.jit
def perturb_chunk(
    perturb,
    w,
    g,
    snapshot,
    words,
    n,
    T: tl.constexpr,
    S: tl.constexpr,
    METRIC: tl.constexpr,
    SHAPE: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if HAS_MASKS:
        long = long_part(w | g | snapshot, n, BLOCK)
        for i in range(0, long, BLOCK):
            perturb_rows(perturb, w, g, snapshot, words, i, n, T, S, METRIC, SHAPE, BLOCK, True, False)
        for i in range(long, n, SHORT):
            perturb_rows(perturb, w, g, snapshot, words, i, n, T, S, METRIC, SHAPE, SHORT, False, True)
    else:
        whole = n // BLOCK * BLOCK
        if (w | g | snapshot) % 16 == 0:
            for i in range(0, whole, BLOCK):
                perturb_block(perturb, w, g, snapshot, i, n, T, S, METRIC, SHAPE, BLOCK, True, False)
        else:
            for i in range(0, whole, BLOCK):
                perturb_block(perturb, w, g, snapshot, i, n, T, S, METRIC, SHAPE, BLOCK, False, False)
        if whole < n:
            perturb_block(perturb, w, g, snapshot, whole, n, T, S, METRIC, SHAPE, BLOCK, False, True)


@triton.jit
def perturb_block(
    perturb,
    w,
    g,
    snapshot,
    i,
    n,
    T: tl.constexpr,
    S: tl.constexpr,
    METRIC: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    x = read(w, i, n, T, BLOCK, ALIGNED, MASKED)
    d = widen(read(g, i, n, T, BLOCK, ALIGNED, MASKED), S)
    moved = apply_perturb(perturb, widen(x, S), d, METRIC, SHAPE)
    if not ALIGNED:
        tl.debug_barrier()  # see note: [a gradient as its own snapshot]
    write(snapshot, i, n, x, BLOCK, ALIGNED, MASKED)
    write(w, i, n, narrow(moved, T), BLOCK, ALIGNED, MASKED)


@triton.jit
def perturb_rows(
    perturb,
    w,
    g,
    snapshot,
    words,
    i,
    n,
    T: tl.constexpr,
    S: tl.constexpr,
    METRIC: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    word = read_words(words, i, n, BLOCK, MASKED)
    live = word != 0
    x = read_rows(live, w, i, n, T, BLOCK, ALIGNED, MASKED)
    d = widen(read_rows(live, g, i, n, T, BLOCK, ALIGNED, MASKED), S)
    moved = apply_perturb(perturb, widen(x, S), d, METRIC, SHAPE)
    if not ALIGNED:
        tl.debug_barrier()  # see note: [a gradient as its own snapshot]
    write_rows(live, snapshot, i, n, x, BLOCK, ALIGNED, MASKED)
    # A choice, not a product: what is not selected keeps its bits, and 0 times inf is none.
    kept = tl.where(bits_of(word, BLOCK), narrow(moved, T), x)
    write_rows(live, w, i, n, kept, BLOCK, ALIGNED, MASKED)
