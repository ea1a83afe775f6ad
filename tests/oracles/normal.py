"""Box, Muller 1958, from Philox words: u = ((x0 >> 8) + 1) / 2^24, a = 2 pi (x1 >> 8) / 2^24.

z_even = sqrt(-2 ln u) cos a, z_odd = sqrt(-2 ln u) sin a. Elements 4i to 4i + 3 share the four words of one
call: (x0, x1) give the first two and (x2, x3) the others.
"""

from __future__ import annotations

import numpy as np
import torch

from oracles.philox import random_word
from oracles.sam import Tensors


def normal(seed: int, step: int, tensor: int, count: int) -> np.ndarray:
    """Return `count` standard normal numbers in float64."""
    words = random_word(seed, step, tensor, np.arange(-(-count // 4) * 4)).astype(np.float64).reshape(-1, 2)
    high = np.floor(words / 256)
    radius = np.sqrt(-2 * np.log((high[:, 0] + 1) / 2**24))
    angle = 2 * np.pi * high[:, 1] / 2**24
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]


# Tensors are numbered from here on for their noise; random masks have the numbers below.
FIRST = 1 << 31


def noise(weights: Tensors, seed: int, step: int) -> Tensors:
    """Return standard normal numbers for each tensor, which are numbered in their order."""
    return {
        name: torch.from_numpy(normal(seed, step, FIRST + number, w.numel())).reshape(w.shape)
        for number, (name, w) in enumerate(weights.items())
    }
