"""w = snapshot, or the rounded master, where there is one."""

import triton
import triton.language as tl

from ..codes import PARAMS, SNAPSHOTS
from ..engine import address, copy_chunk, copy_rows, find_chunk, mask_address, read, write
from ..rounding import narrow


@triton.jit(do_not_specialize=["chunks", "count"])
def restore_kernel(
    layout, addresses, chunks, count, T: tl.constexpr, HAS_MASKS: tl.constexpr, BLOCK: tl.constexpr
):
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, c)
        w = address(addresses, count, PARAMS, chunk, T)
        snapshot = address(addresses, count, SNAPSHOTS, chunk, T)
        if (w != 0) & (snapshot != 0):
            words = mask_address(addresses, count, chunk, HAS_MASKS)
            if HAS_MASKS:
                copy_rows(w, snapshot, words, chunk.size, T, BLOCK)
            else:
                copy_chunk(w, snapshot, chunk.size, T, BLOCK)


@triton.jit(do_not_specialize=["chunks", "count"])
def round_kernel(layout, addresses, chunks, count, T: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    for c in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = find_chunk(layout, c)
        w = address(addresses, count, PARAMS, chunk, T)
        master = address(addresses, count, SNAPSHOTS, chunk, M)
        if (w != 0) & (master != 0):
            round_chunk(w, master, chunk.size, T, M, BLOCK)


@triton.jit
def round_chunk(w, master, n, T: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    whole = n // BLOCK * BLOCK
    if (w | master) % 16 == 0:
        for i in range(0, whole, BLOCK):
            write(w, i, n, narrow(read(master, i, n, M, BLOCK, True, False), T), BLOCK, True, False)
    else:
        for i in range(0, whole, BLOCK):
            write(w, i, n, narrow(read(master, i, n, M, BLOCK, False, False), T), BLOCK, False, False)
    if whole < n:
        write(w, whole, n, narrow(read(master, whole, n, M, BLOCK, False, True), T), BLOCK, False, True)
