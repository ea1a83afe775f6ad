"""The base optimizer's update, from the snapshot where there is one; restores only if that is not safe.

Where there are masters, which are of type M as the state then is, an update reads and writes those, and w is
their rounded copy.
"""

import triton
import triton.language as tl

from ..codes import COLUMN_MOMENTUM, COLUMNS, FRESH, GRADS, LISTS, PARAMS, RULE_SGD, SNAPSHOTS, STEPS
from ..engine import (
    SHORT,
    address,
    copy_chunk,
    copy_rows,
    find_chunk,
    is_finite,
    is_last_program,
    long_part,
    mask_address,
    read,
    read_either,
    read_if,
    read_words,
    write,
    write_if,
)
from ..math.descent import (
    Adam,
    adam,
    adam_first_moment,
    adam_second_moment,
    adam_weight,
    apply_decayed,
    decayed,
    sgd,
    sgd_buffer,
    sgd_weight,
)
from ..rounding import narrow, widen
from .restore import round_chunk


@triton.jit(do_not_specialize=["chunks", "count"])
def descend_kernel(
    layout,
    addresses,
    table,
    chunks,
    count,
    guard,
    found_inf,
    inv_scale,
    counter,
    T: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    RULE: tl.constexpr,
    HAS_BUFFERS: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    is_safe = may_move(guard, found_inf)
    scale = tl.full((), 1, tl.float64)
    if inv_scale is not None:
        scale = tl.load(inv_scale).to(tl.float64)
    # The scalars of Adam take two powers in fp64, so they are worked out again only for another row or step.
    last_row = tl.full((), -1, tl.int64)
    last_step = tl.full((), 0, tl.float32)
    zero = tl.full((), 0, S)
    adam_rule = Adam(zero, zero, zero, zero, zero, zero, zero)
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, c)
        row = table + chunk.row * COLUMNS
        w = address(addresses, count, PARAMS, chunk, T)
        g = address(addresses, count, GRADS, chunk, T)
        snapshot = address(addresses, count, SNAPSHOTS, chunk, M)
        if w != 0:
            source = snapshot if HAS_MASTERS else tl.where(snapshot == 0, w, snapshot)
            words = mask_address(addresses, count, chunk, HAS_MASKS)
            n = chunk.size
            if (g != 0) & (source != 0) & is_safe:
                decay = decayed(row, RULE, scale, S)
                first = address(addresses, count, LISTS, chunk, M)
                if RULE == RULE_SGD:
                    rule = sgd(row, S)
                    if HAS_BUFFERS:
                        has_buffer = (first != 0) & (tl.load(row + COLUMN_MOMENTUM) != 0)
                        first = tl.where(has_buffer, first, 0)
                        is_fresh = tl.load(addresses + FRESH * count + chunk.tensor) != 0
                        descend_sgd(
                            decay,
                            rule,
                            w,
                            g,
                            source,
                            words,
                            first,
                            is_fresh,
                            n,
                            T,
                            M,
                            S,
                            HAS_MASTERS,
                            True,
                            HAS_MASKS,
                            BLOCK,
                        )
                    else:
                        descend_sgd(
                            decay,
                            rule,
                            w,
                            g,
                            source,
                            words,
                            w,
                            False,
                            n,
                            T,
                            M,
                            S,
                            HAS_MASTERS,
                            False,
                            HAS_MASKS,
                            BLOCK,
                        )
                else:
                    second = address(addresses, count, LISTS + 1, chunk, M)
                    step = tl.load(step_counter(addresses, count, chunk.tensor))
                    if (chunk.row != last_row) | (step != last_step):
                        adam_rule = adam(row, step.to(tl.float64) + 1, S)
                        last_row = chunk.row
                        last_step = step
                    descend_adam(
                        decay,
                        adam_rule,
                        w,
                        g,
                        source,
                        words,
                        first,
                        second,
                        n,
                        T,
                        M,
                        S,
                        HAS_MASTERS,
                        HAS_MASKS,
                        BLOCK,
                    )
            elif snapshot != 0:
                if HAS_MASTERS:
                    round_chunk(w, snapshot, n, T, M, BLOCK)
                elif HAS_MASKS:
                    copy_rows(w, snapshot, words, n, T, BLOCK)
                else:
                    copy_chunk(w, snapshot, n, T, BLOCK)
    if RULE != RULE_SGD:
        # Nobody reads a step counter any more once every program is here.
        if is_last_program(counter):
            if is_safe:
                advance_steps(addresses, count, BLOCK)


@triton.jit
def may_move(guard, found_inf):
    is_safe = tl.program_id(0) >= 0
    if guard is not None:
        is_safe = is_finite(tl.load(guard))
    if found_inf is not None:
        is_safe = is_safe & (tl.load(found_inf) == 0)
    return is_safe


@triton.jit
def step_counter(addresses, count, tensor):
    return tl.load(addresses + STEPS * count + tensor).to(tl.pointer_type(tl.float32))


@triton.jit
def advance_steps(addresses, count, BLOCK: tl.constexpr):
    for i in range(0, count, BLOCK):
        t = i + tl.arange(0, BLOCK)
        moves = tl.load(addresses + GRADS * count + t, mask=t < count, other=0) != 0
        steps = tl.load(addresses + STEPS * count + t, mask=moves, other=0).to(tl.pointer_type(tl.float32))
        tl.store(steps, tl.load(steps, mask=moves, other=0) + 1, mask=moves)


@triton.jit
def gradient(decay, g, w):
    return tl.where(decay.weight_decay != 0, apply_decayed(decay, g, w), apply_decayed(decay, g))


# Where there are masks, an update starts from the weight in rows whose word is 0: no snapshot was written.


@triton.jit
def descend_sgd(
    decay,
    rule,
    w,
    g,
    source,
    words,
    buffer,
    is_fresh,
    n,
    T: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    BUFFERED: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if HAS_MASKS:
        long = long_part(w | g | source | buffer, n, BLOCK)
        for i in range(0, long, BLOCK):
            live = read_words(words, i, n, BLOCK, False) != 0
            old = read_either(live, source, w, i, n, T, BLOCK, True, False)
            sgd_block(
                decay,
                rule,
                w,
                g,
                old,
                source,
                buffer,
                is_fresh,
                i,
                n,
                T,
                M,
                S,
                HAS_MASTERS,
                BUFFERED,
                BLOCK,
                True,
                False,
            )
        for i in range(long, n, SHORT):
            live = read_words(words, i, n, SHORT, True) != 0
            old = read_either(live, source, w, i, n, T, SHORT, False, True)
            sgd_block(
                decay,
                rule,
                w,
                g,
                old,
                source,
                buffer,
                is_fresh,
                i,
                n,
                T,
                M,
                S,
                HAS_MASTERS,
                BUFFERED,
                SHORT,
                False,
                True,
            )
    else:
        whole = n // BLOCK * BLOCK
        if (w | g | source | buffer) % 16 == 0:
            for i in range(0, whole, BLOCK):
                old = read(source, i, n, M, BLOCK, True, False)
                sgd_block(
                    decay,
                    rule,
                    w,
                    g,
                    old,
                    source,
                    buffer,
                    is_fresh,
                    i,
                    n,
                    T,
                    M,
                    S,
                    HAS_MASTERS,
                    BUFFERED,
                    BLOCK,
                    True,
                    False,
                )
        else:
            for i in range(0, whole, BLOCK):
                old = read(source, i, n, M, BLOCK, False, False)
                sgd_block(
                    decay,
                    rule,
                    w,
                    g,
                    old,
                    source,
                    buffer,
                    is_fresh,
                    i,
                    n,
                    T,
                    M,
                    S,
                    HAS_MASTERS,
                    BUFFERED,
                    BLOCK,
                    False,
                    False,
                )
        if whole < n:
            old = read(source, whole, n, M, BLOCK, False, True)
            sgd_block(
                decay,
                rule,
                w,
                g,
                old,
                source,
                buffer,
                is_fresh,
                whole,
                n,
                T,
                M,
                S,
                HAS_MASTERS,
                BUFFERED,
                BLOCK,
                False,
                True,
            )


@triton.jit
def sgd_block(
    decay,
    rule,
    w,
    g,
    old,
    source,
    buffer,
    is_fresh,
    i,
    n,
    T: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    BUFFERED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    old = widen(old, S)
    d = gradient(decay, widen(read(g, i, n, T, BLOCK, ALIGNED, MASKED), S), old)
    if BUFFERED:
        has_buffer = buffer != 0
        held = widen(read_if(has_buffer & (is_fresh == 0), buffer, i, n, M, BLOCK, ALIGNED, MASKED), S)
        b = tl.where(is_fresh, d, sgd_buffer(rule, held, d))
        moved = tl.where(has_buffer, sgd_weight(rule, old, d, b), sgd_weight(rule, old, d))
        write_if(has_buffer, buffer, i, n, narrow(b, M), BLOCK, ALIGNED, MASKED)
    else:
        moved = sgd_weight(rule, old, d)
    write(w, i, n, narrow(moved, T), BLOCK, ALIGNED, MASKED)
    if HAS_MASTERS:
        write(source, i, n, moved, BLOCK, ALIGNED, MASKED)


@triton.jit
def descend_adam(
    decay,
    rule,
    w,
    g,
    source,
    words,
    first,
    second,
    n,
    T: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if HAS_MASKS:
        long = long_part(w | g | source | first | second, n, BLOCK)
        for i in range(0, long, BLOCK):
            live = read_words(words, i, n, BLOCK, False) != 0
            old = read_either(live, source, w, i, n, T, BLOCK, True, False)
            adam_block(
                decay, rule, w, g, old, source, first, second, i, n, T, M, S, HAS_MASTERS, BLOCK, True, False
            )
        for i in range(long, n, SHORT):
            live = read_words(words, i, n, SHORT, True) != 0
            old = read_either(live, source, w, i, n, T, SHORT, False, True)
            adam_block(
                decay, rule, w, g, old, source, first, second, i, n, T, M, S, HAS_MASTERS, SHORT, False, True
            )
    else:
        whole = n // BLOCK * BLOCK
        if (w | g | source | first | second) % 16 == 0:
            for i in range(0, whole, BLOCK):
                old = read(source, i, n, M, BLOCK, True, False)
                adam_block(
                    decay,
                    rule,
                    w,
                    g,
                    old,
                    source,
                    first,
                    second,
                    i,
                    n,
                    T,
                    M,
                    S,
                    HAS_MASTERS,
                    BLOCK,
                    True,
                    False,
                )
        else:
            for i in range(0, whole, BLOCK):
                old = read(source, i, n, M, BLOCK, False, False)
                adam_block(
                    decay,
                    rule,
                    w,
                    g,
                    old,
                    source,
                    first,
                    second,
                    i,
                    n,
                    T,
                    M,
                    S,
                    HAS_MASTERS,
                    BLOCK,
                    False,
                    False,
                )
        if whole < n:
            old = read(source, whole, n, M, BLOCK, False, True)
            adam_block(
                decay,
                rule,
                w,
                g,
                old,
                source,
                first,
                second,
                whole,
                n,
                T,
                M,
                S,
                HAS_MASTERS,
                BLOCK,
                False,
                True,
            )


@triton.jit
def adam_block(
    decay,
    rule,
    w,
    g,
    old,
    source,
    first,
    second,
    i,
    n,
    T: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    old = widen(old, S)
    d = gradient(decay, widen(read(g, i, n, T, BLOCK, ALIGNED, MASKED), S), old)
    m = adam_first_moment(rule, widen(read(first, i, n, M, BLOCK, ALIGNED, MASKED), S), d)
    v = adam_second_moment(rule, widen(read(second, i, n, M, BLOCK, ALIGNED, MASKED), S), d)
    moved = adam_weight(rule, old, m, v)
    write(w, i, n, narrow(moved, T), BLOCK, ALIGNED, MASKED)
    if HAS_MASTERS:
        write(source, i, n, moved, BLOCK, ALIGNED, MASKED)
    write(first, i, n, narrow(m, M), BLOCK, ALIGNED, MASKED)
    write(second, i, n, narrow(v, M), BLOCK, ALIGNED, MASKED)
