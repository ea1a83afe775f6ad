"""The SAM step itself: gradient at w, perturbation, gradient at w + e, base step at w."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.func import functional_call

from oracles.sam import Tensors

Gradient = Callable[[Tensors, int], Tensors]


@dataclass(frozen=True)
class Stops:
    """What the weights are at the three stops of one step."""

    perturbed: Tensors
    restored: Tensors
    updated: Tensors


def gradient_of(
    model: torch.nn.Module, loss: Callable[[torch.Tensor, int], torch.Tensor], inputs: list
) -> Gradient:
    """Return gradient(weights, step) of `loss(model(inputs[step]), step)` in float64."""

    def gradient(weights: Tensors, step: int) -> Tensors:
        leaves = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
        value = loss(functional_call(model, leaves, (inputs[step],)), step)
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    return gradient


def follow(
    weights: Tensors,
    gradient: Gradient,
    perturbation: Callable[[Tensors, Tensors], Tensors],
    base,
    steps: int,
    every: int = 1,
) -> list[Stops]:
    """Return the stops of each step. A base that maximizes is attacked downhill: e is taken along -g."""
    stops = []
    weights = {name: w.detach().double().clone() for name, w in weights.items()}
    for step in range(steps):
        g = gradient(weights, step)
        probe = weights
        if step % every == 0:
            uphill = {name: -t for name, t in g.items()} if base.maximize else g
            e = perturbation(weights, uphill)
            probe = {name: w + e[name] if name in e else w for name, w in weights.items()}
            g = gradient(probe, step)
        updated = base.step(weights, g)
        stops.append(Stops(probe, weights, updated))
        weights = updated
    return stops
