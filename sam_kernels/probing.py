"""What lies between two gradients of one step: further ascents, the other side, noise before the first.

All of it is for groups that are perturbed already, or are so from here on; their snapshots stay those of the
weights before the step, and restoring them ends it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .directions import noise_number, own_numbers, seed_of
from .perturbation import Measure, Served, total_of
from .policies import RandomStart
from .tensor_groups import Column


def ascend_further(served: Served, found: Measure) -> None:
    """``w += e`` for weights that are perturbed; their snapshots stay.

    What the pass saves goes to a buffer that nobody reads.
    """
    for (group, backend), arguments in zip(served, found.arguments, strict=True):
        standing = group.snapshots
        try:
            group.snapshots = [
                None if s is None else group.scratch_snapshot(t, s) for t, s in enumerate(standing)
            ]
            backend.perturb_(group, found.norm.to(group.device), **arguments)
        finally:
            group.snapshots = standing
        group.drop_gradients()


def project(served: Served, step: float) -> None:
    """``w = w_0 + c (w - w_0)`` with the largest ``c <= 1`` that brings w back into the ball of radius rho.

    Where param groups have radii of their own, displacements are measured in units of them.

    Args:
        step: length of an ascent step as a share of the radius, which is what the table holds.
    """
    displacements, parts = [], []
    for group, backend in served:
        snapshots, params = group.snapshots, group.perturbed()
        away = group.scratch_like(snapshots)
        backend.combine_(group, [away], [params, snapshots], group.constants((1.0, -1.0)))
        squares = backend.grad_stats(group, [away], per_tensor=True)[:, 0]
        radii = (group.table[group.row_index(), Column.RHO] / step).square()
        parts.append(torch.where(squares == 0, 0.0, squares / radii).sum())
        displacements.append(away)
    shrink = total_of(served, parts).clamp(min=1.0).rsqrt()
    for (group, backend), away in zip(served, displacements, strict=True):
        c = shrink.to(group.device)
        coefficients = torch.stack([torch.ones_like(c), c]).unsqueeze(0)
        backend.combine_(group, [group.perturbed()], [group.snapshots, away], coefficients)


def mirror(served: Served) -> None:
    """``w = w_0 - (w - w_0)``: to the other side."""
    for group, backend in served:
        params = group.perturbed()
        backend.combine_(group, [params], [group.snapshots, params], group.constants((2.0, -1.0)))


def start_at_random(
    served: Served, policy: RandomStart, step: int, numbers: dict[Tensor, int], micro_batch: int = 0
) -> None:
    """``snapshot = w; w += noise ||w_l|| n_l / ||n_l||`` in every tensor that takes part."""
    for group, backend in served:
        group.aim(group.movable())
        group.take_snapshots()
        group.drop_gradients()
        noise = group.scratch_like(group.snapshots)
        own = [noise_number(n) for n in own_numbers(group, numbers)]
        backend.noise_(group, noise, seed_of(policy.seed, micro_batch), step % (1 << 32), own)
        params = group.perturbed()
        dots = group.sharding.sum(backend.grad_stats(group, [params, noise], per_tensor=True))
        lengths = policy.noise * (dots[:, 0] / dots[:, 2]).sqrt()
        lengths = torch.where(torch.isfinite(lengths), lengths, 0.0)
        coefficients = torch.stack([torch.ones_like(lengths), lengths], dim=1).unsqueeze(1)
        backend.combine_(group, [group.snapshots], [params], group.constants((1.0,)))
        group.is_perturbed = True  # before the weights move, so that whatever fails moves them back
        backend.combine_(group, [params], [params, noise], coefficients)
