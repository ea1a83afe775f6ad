"""Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": Philox4x32 with ten rounds."""

from __future__ import annotations

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Return four words for each row of four counter words; everything is uint64 that holds 32 bits."""
    left0, right0, left1, right1 = np.asarray(counter, dtype=np.uint64).T
    for number in range(10):
        round_key = [np.uint64((k + number * w) & MASK) for k, w in zip(key, WEYL, strict=True)]
        product0 = left0 * np.uint64(MULTIPLIERS[0])
        product1 = left1 * np.uint64(MULTIPLIERS[1])
        left0, right0, left1, right1 = (
            (product1 >> np.uint64(32)) ^ right0 ^ round_key[0],
            product1 & np.uint64(MASK),
            (product0 >> np.uint64(32)) ^ right1 ^ round_key[1],
            product0 & np.uint64(MASK),
        )
    return np.stack([left0, right0, left1, right1], axis=-1)


def random_word(seed: int, step: int, tensor: int, element: np.ndarray) -> np.ndarray:
    """Return word `element % 4` of philox((element / 4: low, high; tensor; step), (seed: low, high))."""
    counters = np.array(
        [[(e // 4) & MASK, (e // 4) >> 32, tensor, step] for e in element.tolist()], dtype=np.uint64
    ).reshape(-1, 4)
    words = philox(counters, (seed & MASK, (seed >> 32) & MASK))
    return words[np.arange(len(element)), element % 4].astype(np.uint32)


def uniform(word: np.ndarray) -> np.ndarray:
    """Return floor(word / 2^8) / 2^24, a float in [0, 1)."""
    return (word // 256 / 2.0**24).astype(np.float32)
