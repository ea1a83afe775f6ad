"""SAM in a plain loop, written from the paper: what every trainer must arrive at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FEATURES, CLASSES = 5, 3


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a small network, always the same."""
    torch.manual_seed(7)
    layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))
    return layers.to(dtype)


def data(samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return inputs and labels, always the same."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def gradient(model: nn.Module, parts: Iterable[Callable[[], Tensor]]) -> Tensor:
    """Leave the sum of the gradients of these losses, and return the first loss."""
    model.zero_grad()
    losses = []
    for part in parts:
        loss = part()
        loss.backward()
        losses.append(loss.detach())
    return losses[0]


def train(
    model: nn.Module,
    base: torch.optim.Optimizer,
    steps: Iterable[Sequence[Callable[[], Tensor]]],
    *,
    rho: float,
    clip: float | None = None,
    metric: Callable[[str, Tensor], Tensor | None] | None = None,
) -> list[Tensor]:
    """Take SAM steps, each on the sum of the losses of its parts; return the first loss of every step.

    ``e = rho T^2 g / (||T g|| + 1e-12)``, with T what `metric` says of a name and its weight, 1 for None.
    """
    first = []
    for parts in steps:
        first.append(gradient(model, parts))
        named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        moved = [p for _, p in named]
        kept = [p.detach().clone() for p in moved]
        with torch.no_grad():
            scales = [metric(name, p) if metric else None for name, p in named]
            scales = [torch.ones_like(p) if t is None else t for t, p in zip(scales, moved, strict=True)]
            scaled = [t * p.grad for t, p in zip(scales, moved, strict=True)]
            norm = torch.stack([g.square().sum() for g in scaled]).sum().sqrt()
            for p, t, g in zip(moved, scales, scaled, strict=True):
                p.add_(t * g, alpha=float(rho / (norm + 1e-12)))
        gradient(model, parts)
        with torch.no_grad():
            for p, w in zip(moved, kept, strict=True):
                p.copy_(w)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        base.step()
    return first


def windows(batches: Sequence[Any], k: int, epochs: int = 1) -> list[list[Any]]:
    """Return the batches of every step: k at a time, the last of an epoch with what is left."""
    return [list(batches[i : i + k]) for _ in range(epochs) for i in range(0, len(batches), k)]


def largest_difference(left: nn.Module, right: nn.Module) -> float:
    """Return the largest absolute difference of two models' weights."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)
