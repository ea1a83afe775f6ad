"""w = snapshot, where there is one."""

import triton
import triton.language as tl

from ..codes import PARAMS, SNAPSHOTS
from ..engine import address, copy_chunk, copy_rows, find_chunk, mask_address


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
