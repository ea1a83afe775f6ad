"""snapshot = w; w += scale * T * h(T * g), where the mask selects it.

With masters: w = round(master + ...), and no snapshot.

note: [a gradient as its own snapshot]
A block reads all that it needs before it writes, but its threads wait for no one: one might write the
snapshot where another has yet to read the gradient. Not where the block is aligned: there loads and stores
lie alike over the threads, and each writes only what it alone has read. Elsewhere they wait.
"""

from typing import NamedTuple

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
    NUMBERS,
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
from ..math.random import Words, random_words_of_eight, sixteen_of
from ..rounding import narrow, to_bf16_at_random, widen


@triton.jit(do_not_specialize=["chunks", "count", "seed", "step"])
def perturb_kernel(
    layout,
    addresses,
    table,
    chunks,
    count,
    norm,
    peak,
    tensor_scale,
    seed: tl.int64,
    step: tl.int64,
    T: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    SHAPE: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    AT_RANDOM: tl.constexpr,
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
        snapshot = address(addresses, count, SNAPSHOTS, chunk, M)
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
                draw = make_draw(addresses, count, chunk, seed, step, AT_RANDOM)
                if HAS_ADAPTIVE:
                    if metric == ADAPTIVE:
                        perturb = Perturb(scale=scale, metric=Adaptive(eta=eta), shape=shape)
                        perturb_chunk(
                            perturb,
                            draw,
                            w,
                            g,
                            snapshot,
                            words,
                            n,
                            T,
                            M,
                            S,
                            ADAPTIVE,
                            SHAPE,
                            HAS_MASTERS,
                            AT_RANDOM,
                            HAS_MASKS,
                            BLOCK,
                        )
                    else:
                        other = Perturb(scale=scale, metric=Fisher(eta=eta), shape=shape)
                        perturb_by_gradient(
                            other,
                            draw,
                            metric,
                            w,
                            g,
                            snapshot,
                            words,
                            n,
                            T,
                            M,
                            S,
                            SHAPE,
                            HAS_MASTERS,
                            AT_RANDOM,
                            HAS_FISHER,
                            HAS_MASKS,
                            BLOCK,
                        )
                else:
                    other = Perturb(scale=scale, metric=Fisher(eta=eta), shape=shape)
                    perturb_by_gradient(
                        other,
                        draw,
                        metric,
                        w,
                        g,
                        snapshot,
                        words,
                        n,
                        T,
                        M,
                        S,
                        SHAPE,
                        HAS_MASTERS,
                        AT_RANDOM,
                        HAS_FISHER,
                        HAS_MASKS,
                        BLOCK,
                    )
            elif not HAS_MASTERS:
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


class Draw(NamedTuple):
    """Where the random bits of a chunk come from; note: [stochastic rounding] in csrc/sam_kernels.h."""

    seed: tl.tensor
    step: tl.tensor
    number: tl.tensor
    begin: tl.tensor


@triton.jit
def make_draw(addresses, count, chunk, seed, step, AT_RANDOM: tl.constexpr):
    if AT_RANDOM:
        number = tl.load(addresses + NUMBERS * count + chunk.tensor)
        return Draw(seed=seed, step=step, number=number, begin=chunk.begin)
    else:
        return ()


@triton.jit
def rounded(draw, i, x, T: tl.constexpr, AT_RANDOM: tl.constexpr, BLOCK: tl.constexpr):
    """Elements i to i + BLOCK of the chunk as they are stored; i is a multiple of 8."""
    if AT_RANDOM:
        eights = draw.begin + i + 8 * tl.arange(0, BLOCK // 8)
        words = random_words_of_eight(draw.seed, draw.step, draw.number, eights)
        column = Words(words.x0[:, None], words.x1[:, None], words.x2[:, None], words.x3[:, None])
        return to_bf16_at_random(x, tl.reshape(sixteen_of(column, tl.arange(0, 8)[None, :]), [BLOCK]))
    else:
        return narrow(x, T)


@triton.jit
def perturb_by_gradient(
    perturb,
    draw,
    metric,
    w,
    g,
    snapshot,
    words,
    n,
    T: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    SHAPE: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    HAS_FISHER: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Under a metric that measures no weights."""
    if HAS_FISHER:
        if metric == FISHER:
            perturb_chunk(
                perturb,
                draw,
                w,
                g,
                snapshot,
                words,
                n,
                T,
                M,
                S,
                FISHER,
                SHAPE,
                HAS_MASTERS,
                AT_RANDOM,
                HAS_MASKS,
                BLOCK,
            )
        else:
            perturb_chunk(
                perturb,
                draw,
                w,
                g,
                snapshot,
                words,
                n,
                T,
                M,
                S,
                EUCLIDEAN,
                SHAPE,
                HAS_MASTERS,
                AT_RANDOM,
                HAS_MASKS,
                BLOCK,
            )
    else:
        perturb_chunk(
            perturb,
            draw,
            w,
            g,
            snapshot,
            words,
            n,
            T,
            M,
            S,
            EUCLIDEAN,
            SHAPE,
            HAS_MASTERS,
            AT_RANDOM,
            HAS_MASKS,
            BLOCK,
        )


@triton.jit
def perturb_chunk(
    perturb,
    draw,
    w,
    g,
    snapshot,
    words,
    n,
    T: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    METRIC: tl.constexpr,
    SHAPE: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if HAS_MASKS:
        long = long_part(w | g | snapshot, n, BLOCK)
        for i in range(0, long, BLOCK):
            perturb_rows(
                perturb,
                draw,
                w,
                g,
                snapshot,
                words,
                i,
                n,
                T,
                M,
                S,
                METRIC,
                SHAPE,
                HAS_MASTERS,
                AT_RANDOM,
                BLOCK,
                True,
                False,
            )
        for i in range(long, n, SHORT):
            perturb_rows(
                perturb,
                draw,
                w,
                g,
                snapshot,
                words,
                i,
                n,
                T,
                M,
                S,
                METRIC,
                SHAPE,
                HAS_MASTERS,
                AT_RANDOM,
                SHORT,
                False,
                True,
            )
    else:
        whole = n // BLOCK * BLOCK
        if (w | g | snapshot) % 16 == 0:
            for i in range(0, whole, BLOCK):
                perturb_block(
                    perturb,
                    draw,
                    w,
                    g,
                    snapshot,
                    i,
                    n,
                    T,
                    M,
                    S,
                    METRIC,
                    SHAPE,
                    HAS_MASTERS,
                    AT_RANDOM,
                    BLOCK,
                    True,
                    False,
                )
        else:
            for i in range(0, whole, BLOCK):
                perturb_block(
                    perturb,
                    draw,
                    w,
                    g,
                    snapshot,
                    i,
                    n,
                    T,
                    M,
                    S,
                    METRIC,
                    SHAPE,
                    HAS_MASTERS,
                    AT_RANDOM,
                    BLOCK,
                    False,
                    False,
                )
        if whole < n:
            perturb_block(
                perturb,
                draw,
                w,
                g,
                snapshot,
                whole,
                n,
                T,
                M,
                S,
                METRIC,
                SHAPE,
                HAS_MASTERS,
                AT_RANDOM,
                BLOCK,
                False,
                True,
            )


@triton.jit
def perturb_block(
    perturb,
    draw,
    w,
    g,
    snapshot,
    i,
    n,
    T: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    METRIC: tl.constexpr,
    SHAPE: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    if HAS_MASTERS:
        x = read(snapshot, i, n, M, BLOCK, ALIGNED, MASKED)
    else:
        x = read(w, i, n, T, BLOCK, ALIGNED, MASKED)
    d = widen(read(g, i, n, T, BLOCK, ALIGNED, MASKED), S)
    moved = apply_perturb(perturb, widen(x, S), d, METRIC, SHAPE)
    if not ALIGNED:
        tl.debug_barrier()  # see note: [a gradient as its own snapshot]
    if not HAS_MASTERS:
        write(snapshot, i, n, x, BLOCK, ALIGNED, MASKED)
    write(w, i, n, rounded(draw, i, moved, T, AT_RANDOM, BLOCK), BLOCK, ALIGNED, MASKED)


@triton.jit
def perturb_rows(
    perturb,
    draw,
    w,
    g,
    snapshot,
    words,
    i,
    n,
    T: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    METRIC: tl.constexpr,
    SHAPE: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    word = read_words(words, i, n, BLOCK, MASKED)
    live = word != 0
    old = read_rows(live, w, i, n, T, BLOCK, ALIGNED, MASKED)
    x = old
    if HAS_MASTERS:
        x = read_rows(live, snapshot, i, n, M, BLOCK, ALIGNED, MASKED)
    d = widen(read_rows(live, g, i, n, T, BLOCK, ALIGNED, MASKED), S)
    moved = apply_perturb(perturb, widen(x, S), d, METRIC, SHAPE)
    if not ALIGNED:
        tl.debug_barrier()  # see note: [a gradient as its own snapshot]
    if not HAS_MASTERS:
        write_rows(live, snapshot, i, n, old, BLOCK, ALIGNED, MASKED)
    # A choice, not a product: what is not selected keeps its bits, and 0 times inf is none.
    kept = tl.where(bits_of(word, BLOCK), rounded(draw, i, moved, T, AT_RANDOM, BLOCK), old)
    write_rows(live, w, i, n, kept, BLOCK, ALIGNED, MASKED)
