"""Stochastic rounding to bfloat16 (Croci et al. 2022): up with the probability of the part that is dropped.

The random bits are those of Philox4x32-10: elements 8i to 8i + 7 share the four words of one call, 16 bits
each, low halves first, with the counter (i: low, high; tensor; step) and the key (seed: low, high).
"""

from __future__ import annotations

import numpy as np

from oracles.philox import MASK, philox

# Tensors are numbered from here on for their rounding; masks have the numbers below, noise those from 2^31.
FIRST = 1 << 30


def sixteen(seed: int, step: int, tensor: int, count: int) -> np.ndarray:
    """Return 16 random bits for each of `count` elements."""
    rows = [[i & MASK, i >> 32, tensor, step] for i in range(-(-count // 8))]
    counters = np.array(rows, dtype=np.uint64).reshape(-1, 4)
    words = philox(counters, (seed & MASK, seed >> 32 & MASK))
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
    return halves.reshape(-1)[:count]


def to_bfloat16(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Return the neighbour away from 0 where the dropped 16 bits are more than 65535 - bits, else the other.

    Args:
        values: finite, float32.
    """
    pattern = values.astype(np.float32).view(np.uint32)
    kept, dropped = pattern >> 16, pattern & 0xFFFF
    up = dropped.astype(np.int64) > 65535 - bits.astype(np.int64)
    return ((kept + up).astype(np.uint32) << 16).view(np.float32)
