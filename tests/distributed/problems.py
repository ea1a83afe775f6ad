"""A small regression problem in float64, its data by rank, and the steps of SAM on it in plain torch.

Independent of the package: gradients by autograd, perturbations and base updates by the oracles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from oracles.bases import Sgd, adamw
from oracles.sam import Tensors, total_norm
from torch import Tensor, nn
from torch.func import functional_call

RHO, EPS, LR, STEPS, ROWS = 0.3, 1e-12, 0.2, 4, 8

# In float64; what is left is the order of sums.
CLOSE = 1e-15
BASES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": LR, "momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
}


class Net(nn.Module):
    """Sizes that no number of ranks divides, and a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 13)
        self.norm = nn.LayerNorm(13)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.outer = nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.norm(self.inner(x)) * self.scale))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The whole batch of a step, for all ranks."""
    made = torch.Generator().manual_seed(100 + step)
    x = torch.randn(ROWS, 6, generator=made, dtype=torch.float64)
    return x.to(dtype), torch.randn(ROWS, 3, generator=made, dtype=torch.float64).to(dtype)


def part(step: int, rank: int, world: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The rows of one rank."""
    x, y = batch(step, dtype)
    rows = ROWS // world
    return x[rank * rows : (rank + 1) * rows], y[rank * rows : (rank + 1) * rows]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((model(x) - y) ** 2).mean()


def gradient(weights: Tensors, x: Tensor, y: Tensor) -> Tensors:
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss = ((functional_call(Net().double(), leaves, (x,)) - y) ** 2).mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def euclidean(weights: Tensors, grads: Tensors) -> Tensors:
    return {name: RHO * g / (total_norm(grads) + EPS) for name, g in grads.items()}


def adaptive(weights: Tensors, grads: Tensors) -> Tensors:
    scaled = {name: weights[name].abs() * g for name, g in grads.items()}
    return {name: RHO * weights[name] ** 2 * g / (total_norm(scaled) + EPS) for name, g in grads.items()}


def trained(
    base: str = "SGD",
    world: int = 1,
    perturbation: Callable[[Tensors, Tensors], Tensors] = euclidean,
    steps: int = STEPS,
) -> Tensors:
    """Weights after some steps; with more than one in the world, each part has a perturbation of its own."""
    weights = {name: w.detach().clone() for name, w in net().named_parameters()}
    made = Sgd(**BASES["SGD"]) if base == "SGD" else adamw(**BASES["AdamW"])
    for step in range(steps):
        grads = []
        for rank in range(world):
            data = part(step, rank, world)
            e = perturbation(weights, gradient(weights, *data))
            grads.append(gradient({name: w + e[name] for name, w in weights.items()}, *data))
        mean = {name: sum(g[name] for g in grads) / world for name in weights}
        weights = made.step(weights, mean)
    return weights


def apart(found: Tensors, expected: Tensors) -> float:
    """The largest difference between two sets of weights."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def assert_equal_to(expected: Tensors, found: Iterable[Tensors], most: float = CLOSE) -> None:
    """Compare the weights of every rank."""
    for weights in found:
        assert apart(weights, expected) <= most
