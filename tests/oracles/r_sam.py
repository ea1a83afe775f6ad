"""Liu et al. 2022, random smoothing: the ascent starts from w + delta, delta_l = noise ||w_l|| n_l / ||n_l||.

g = grad L(w + delta), e = rho g / ||g||; the second gradient is at w + delta + e, or at w + e.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oracles import normal
from oracles.sam import Tensors, total_norm
from oracles.steps import Gradient, moved


@dataclass
class RSam:
    """The base step is at w. Given `deltas`, one for each step, are used in place of random numbers."""

    rho: float = 0.05
    noise: float = 0.1
    keep_noise: bool = True
    seed: int = 0
    deltas: Sequence[Tensors] | None = None

    def delta(self, weights: Tensors, number: int) -> Tensors:
        """Return the noise of one step."""
        if self.deltas is not None:
            return self.deltas[number]
        drawn = normal.noise(weights, self.seed, number)
        return {name: self.noise * w.norm() / drawn[name].norm() * drawn[name] for name, w in weights.items()}

    def step(self, weights: Tensors, gradient: Gradient, base: Any, number: int) -> Tensors:
        """Return the weights after one step."""
        shifted = moved(weights, self.delta(weights, number))
        g = gradient(shifted, number)
        start = shifted if self.keep_noise else weights
        return base.step(weights, gradient(moved(start, g, self.rho / (total_norm(g) + 1e-12)), number))
