"""Sum of moment(T g), or the largest |T g|, over all tensors and by tensor, under masks or without."""

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
    PEAK,
    POWER,
    SQUARE,
)
from ..engine import (
    SHORT,
    address,
    bits_of,
    find_chunk,
    is_last_program,
    larger,
    largest,
    long_part,
    mask_address,
    read,
    read_rows,
    read_words,
)
from ..math.metric import (
    Adaptive,
    Fisher,
    Power,
    adaptive_weigh,
    apply_power,
    apply_square,
    euclidean_weigh,
    fisher_weigh,
)
from ..math.power import power
from ..rounding import widen

# Within these bounds a sum of fp32 squares has neither overflowed nor lost terms that count.
LARGE_SUM, SMALL_SUM = tl.constexpr(1e38), tl.constexpr(1e-30)


@triton.jit(do_not_specialize=["chunks", "count"])
def sq_norm_kernel(
    layout,
    addresses,
    table,
    chunks,
    count,
    peak,
    partials,
    counter,
    out,
    T: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    WEIGHTS: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS_ADAPTIVE: tl.constexpr,
    HAS_FISHER: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    Q: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, c)
        row = table + chunk.row * COLUMNS
        metric = tl.load(row + COLUMN_METRIC)
        g = address(addresses, count, GRADS, chunk, T)
        total = tl.full((), 0, tl.float64)
        if (g != 0) & (metric != FIXED) & (chunk.size > 0):
            eta = tl.load(row + COLUMN_ETA)
            words = mask_address(addresses, count, chunk, HAS_MASKS)
            n = chunk.size
            if HAS_ADAPTIVE:
                w = address(addresses, count, WEIGHTS, chunk, W)
                if metric == ADAPTIVE:
                    total = chunk_sum(
                        g, w, words, n, eta, peak, T, W, S, ADAPTIVE, MOMENT, HAS_MASKS, Q, BLOCK
                    )
            if HAS_FISHER:
                if metric == FISHER:
                    total = chunk_sum(g, g, words, n, eta, peak, T, T, S, FISHER, MOMENT, HAS_MASKS, Q, BLOCK)
            if metric == EUCLIDEAN:
                total = chunk_sum(g, g, words, n, eta, peak, T, T, S, EUCLIDEAN, MOMENT, HAS_MASKS, Q, BLOCK)
        tl.store(partials + chunk.number, total)
    if is_last_program(counter):
        total = join_partials(partials, 0, chunks, MOMENT, BLOCK)
        if ROOT == 2:
            total = tl.sqrt(total)
        elif ROOT > 1:
            total = power(total, 1 / ROOT)
        tl.store(out, total)


@triton.jit
def sum_by_tensor_kernel(partials, first, out, MOMENT: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0)
    begin = tl.load(first + t)
    tl.store(out + t, join_partials(partials, begin, tl.load(first + t + 1), MOMENT, BLOCK))


@triton.jit
def join_partials(partials, begin, end, MOMENT: tl.constexpr, BLOCK: tl.constexpr):
    joined = tl.zeros([BLOCK], tl.float64)
    for i in range(begin, end, BLOCK):
        offset = i + tl.arange(0, BLOCK)
        # From the cache that all processors share: others wrote these.
        x = tl.load(partials + offset, mask=offset < end, other=0, cache_modifier=".cg")
        joined = larger(joined, x) if MOMENT == PEAK else joined + x
    return largest(joined) if MOMENT == PEAK else tl.sum(joined)


@triton.jit
def chunk_sum(
    g,
    w,
    words,
    n,
    eta,
    peak,
    T: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    METRIC: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = chunk_sum_in(g, w, words, n, eta, peak, T, W, S, METRIC, MOMENT, HAS_MASKS, Q, BLOCK)
    if (MOMENT == SQUARE) & (S == tl.float32):
        if ((total <= LARGE_SUM) == 0) | ((total != 0) & (total < SMALL_SUM)):
            # Gradients beyond 1.8e19, or all below 1e-15: once more in double. A sum of exactly 0 is taken as
            # it is; note: [range of squares] in csrc says what that can lose.
            total = chunk_sum_in(
                g, w, words, n, eta, peak, T, W, tl.float64, METRIC, MOMENT, HAS_MASKS, Q, BLOCK
            )
    return total


@triton.jit
def chunk_sum_in(
    g,
    w,
    words,
    n,
    eta,
    peak,
    T: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    METRIC: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Sums are fp32 inside a chunk on purpose: a lane adds at most a few dozen numbers, and beyond they are
    # fp64.
    metric = make_metric(eta, METRIC, S)
    term = make_term(peak, MOMENT, Q, S)
    sums = tl.zeros([BLOCK], S)
    if HAS_MASKS:
        long = long_part(g | w, n, BLOCK)
        for i in range(0, long, BLOCK):
            u = weigh_rows(metric, g, w, words, i, n, T, W, S, METRIC, BLOCK, True, False)
            sums = add(sums, u, term, MOMENT)
        rest = tl.zeros([SHORT], S)
        for i in range(long, n, SHORT):
            u = weigh_rows(metric, g, w, words, i, n, T, W, S, METRIC, SHORT, False, True)
            rest = add(rest, u, term, MOMENT)
        joined = join(sums, MOMENT)
        others = join(rest, MOMENT)
        return larger(joined, others) if MOMENT == PEAK else joined + others
    else:
        whole = n // BLOCK * BLOCK
        if (g | w) % 16 == 0:
            for i in range(0, whole, BLOCK):
                u = weigh_block(metric, g, w, i, n, T, W, S, METRIC, BLOCK, True, False)
                sums = add(sums, u, term, MOMENT)
        else:
            for i in range(0, whole, BLOCK):
                u = weigh_block(metric, g, w, i, n, T, W, S, METRIC, BLOCK, False, False)
                sums = add(sums, u, term, MOMENT)
        if whole < n:
            u = weigh_block(metric, g, w, whole, n, T, W, S, METRIC, BLOCK, False, True)
            sums = add(sums, u, term, MOMENT)
        return join(sums, MOMENT)


@triton.jit
def join(sums, MOMENT: tl.constexpr):
    return largest(sums.to(tl.float64)) if MOMENT == PEAK else tl.sum(sums.to(tl.float64))


@triton.jit
def make_metric(eta, METRIC: tl.constexpr, S: tl.constexpr):
    if METRIC == FISHER:
        return Fisher(eta=eta.to(S))
    else:
        return Adaptive(eta=eta.to(S))


@triton.jit
def make_term(peak, MOMENT: tl.constexpr, Q: tl.constexpr, S: tl.constexpr):
    if MOMENT == POWER:
        largest_one = tl.load(peak)
        return Power(peak=largest_one.to(S), q=(largest_one * 0 + Q).to(S))
    else:
        return ()


@triton.jit
def add(sums, u, term, MOMENT: tl.constexpr):
    if MOMENT == PEAK:
        return larger(sums, tl.abs(u))
    elif MOMENT == POWER:
        return sums + apply_power(term, u)
    else:
        return sums + apply_square(u)


@triton.jit
def weigh_block(
    metric,
    g,
    w,
    i,
    n,
    T: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    d = widen(read(g, i, n, T, BLOCK, ALIGNED, MASKED), S)
    if METRIC == ADAPTIVE:
        return adaptive_weigh(metric, d, d, widen(read(w, i, n, W, BLOCK, ALIGNED, MASKED), S))
    elif METRIC == FISHER:
        return fisher_weigh(metric, d, d, d)
    else:
        return euclidean_weigh(d, d, d)


@triton.jit
def weigh_rows(
    metric,
    g,
    w,
    words,
    i,
    n,
    T: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    word = read_words(words, i, n, BLOCK, MASKED)
    live = word != 0
    d = widen(read_rows(live, g, i, n, T, BLOCK, ALIGNED, MASKED), S)
    if METRIC == ADAPTIVE:
        u = adaptive_weigh(metric, d, d, widen(read_rows(live, w, i, n, W, BLOCK, ALIGNED, MASKED), S))
    elif METRIC == FISHER:
        u = fisher_weigh(metric, d, d, d)
    else:
        u = euclidean_weigh(d, d, d)
    # A choice, not a product: what is not selected may be infinite.
    return tl.where(bits_of(word, BLOCK), u, 0.0)
