"""Problems small enough to follow by hand, with their gradients written out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.sam import Tensors


def row(*numbers: float) -> Tensor:
    """Return a float64 vector."""
    return torch.tensor(numbers, dtype=torch.float64)


def flat(tensors: Tensors) -> Tensor:
    """Return all elements, in the order of the tensors."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors.values()])


# ---- two tensors, a coupled quartic with a push that changes every step -----------------------------------

PUSH = (row(0.1, -0.2, 0.3), row(-0.2, 0.1, 0.0), row(0.05, 0.05, -0.1), row(0.0, -0.1, 0.1))


def toy_start() -> Tensors:
    """Return (a1, a2) and (b1)."""
    return {"A.weight": row(1.0, -0.5), "B.weight": row(2.0)}


def toy_gradient(weights: Tensors, step: int) -> Tensors:
    """Return (a1 + 0.3 b1, 4 a2 + 0.4 a2^3, 0.5 b1 + 0.3 a1) + push."""
    (a1, a2), (b1,) = weights["A.weight"], weights["B.weight"]
    c1, c2, c3 = PUSH[step % len(PUSH)]
    a = torch.stack([a1 + 0.3 * b1 + c1, 4 * a2 + 0.4 * a2**3 + c2])
    return {"A.weight": a, "B.weight": torch.stack([0.5 * b1 + 0.3 * a1 + c3])}


# ---- quadratics -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """gradient(start + d) = slope + curvature * d, tensor by tensor."""

    start: Tensors
    slope: Tensors
    curvature: Tensors

    def gradient(self, weights: Tensors, step: int = 0) -> Tensors:
        """Return the gradient; every batch is the same."""
        return {n: self.slope[n] + self.curvature[n] * (w - self.start[n]) for n, w in weights.items()}

    def rise(self, e: Tensors) -> float:
        """Return L(start + e) - L(start)."""
        return float(sum((self.slope[n] * d + 0.5 * self.curvature[n] * d * d).sum() for n, d in e.items()))


THREE_TENSORS = Quadratic(
    start={"fc.weight": row(1, -2, 3), "fc.bias": row(0.5, -0.25), "bn.weight": row(1.5)},
    slope={"fc.weight": row(0.1, 0.2, -0.2), "fc.bias": row(0.1, -0.3), "bn.weight": row(0.4)},
    curvature={"fc.weight": row(1, 2, 3), "fc.bias": row(4, 5), "bn.weight": row(6)},
)
ONE_TENSOR = Quadratic(
    *(
        {"fc.weight": t["fc.weight"]}
        for t in (THREE_TENSORS.start, THREE_TENSORS.slope, THREE_TENSORS.curvature)
    )
)


@dataclass(frozen=True)
class LeastSquares:
    """One loss for each sample: l_i = 0.5 (x_i . w - y_i)^2."""

    x: Tensor
    y: Tensor

    def losses(self, w: Tensor) -> Tensor:
        """Return l_i for each sample."""
        return 0.5 * (self.x @ w - self.y) ** 2

    def gradient(self, w: Tensor, chosen: list[int]) -> Tensor:
        """Return the gradient of the mean loss of the chosen samples."""
        x, y = self.x[chosen], self.y[chosen]
        return x.T @ (x @ w - y) / len(chosen)


FOUR_SAMPLES = LeastSquares(
    torch.stack([row(1, 0, 2), row(0, 1, -1), row(2, 1, 0), row(1, -1, 1)]), row(6.2, -3.95, 1.0, 7.02)
)
