"""Du et al. 2022, stochastic weight perturbation: e = m (rho / beta) g / (||g|| + 1e-7), m drawn each step.

The paper draws m for every element and takes the norm of all of g. The authors' code draws it for whole
tensors and takes the norm of those drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from oracles.philox import random_word, uniform
from oracles.sam import Tensors, total_norm
from oracles.steps import Ascent


@dataclass
class Esam(Ascent):
    """`by` is "element" or "tensor", `norm` "full" or "masked". Given `bits` are used in place of draws."""

    rho: float = 0.05
    beta: float = 0.6
    by: str = "element"
    norm: str = "full"
    seed: int = 0
    eps: float = 1e-7
    bits: Sequence[Sequence[int]] | None = None  # for each step, one bit for each tensor

    def mask(self, shape: torch.Size, number: int, tensor: int) -> torch.Tensor:
        """Return the mask of one tensor: each element, or each tensor, is in with probability beta."""
        if self.bits is not None:
            return torch.full(shape, bool(self.bits[number][tensor]))
        if self.by == "tensor":
            draw = uniform(random_word(self.seed, number, tensor, np.arange(1)))[0]
            return torch.full(shape, bool(float(draw) < self.beta))
        words = random_word(self.seed, number, tensor, np.arange(shape.numel())).astype(np.int64)
        return torch.from_numpy(words >> 1 >= round((1 - self.beta) * 2**31)).reshape(shape)

    def perturbation(self, weights: Tensors, gradients: Tensors, number: int) -> Tensors:
        """Return e; zero when nothing is drawn."""
        order = list(weights)
        of = {n: g * self.mask(g.shape, number, order.index(n)) for n, g in gradients.items()}
        size = total_norm(of if self.norm == "masked" else gradients) + self.eps
        return {name: self.rho / self.beta * g / size for name, g in of.items()}
