"""Zhao, Zhang, Hu 2022, randomized sharpness-aware training: each step is SAM's with probability p."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from oracles.philox import random_word, uniform
from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved


@dataclass
class Rst:
    """`probability` is a number, or a function of the step."""

    rho: float = 0.05
    probability: float | Callable[[int], float] = 0.5
    seed: int = 0

    def due(self, number: int) -> bool:
        """Return whether this step is SAM's."""
        p = self.probability(number) if callable(self.probability) else self.probability
        return float(uniform(random_word(self.seed, number, 0xFFFFFFFF, np.arange(1)))[0]) < p

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return the weights after one step."""
        g = gradient(weights, number)
        if self.due(number):
            g = gradient(moved(weights, g, self.rho / (total_norm(g) + 1e-12)), number)
        return base.step(weights, g)
