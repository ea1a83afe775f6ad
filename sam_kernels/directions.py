"""Aiming: puts the direction of the perturbation in the place of the gradients that a pass reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends import Backend
from .policies import Direction, Momentum, Noise, Remembering
from .sharding import local
from .slots import Slots
from .tensor_groups import TensorGroup, fitted

_EMA = "ema"

# The base optimizer's slots that an update goes along, first found first.
_MOMENTA = ("momentum_buffer", "exp_avg")

# note: [where a direction lives]
# A direction is read by the norm and by the perturbation that follows it, and by nothing afterwards; the
# snapshots are written by that perturbation. So a direction is made in the buffers of the snapshots, and no
# memory is taken for it: `perturb_` reads an element of it before it writes the snapshot there. Groups with
# fp32 masters have no snapshots, and theirs is made in scratch.


def aim_at_noise(
    group: TensorGroup, backend: Backend, policy: Noise, step: int, numbers: list[int], micro_batch: int = 0
) -> None:
    """``d = z``: the group's gradients are normal numbers from here on."""
    group.aim(group.movable())
    group.grads = _buffers(group, group.grads)
    own = [noise_number(number) for number in numbers]
    backend.noise_(group, group.grads, seed_of(policy.seed, micro_batch), step % (1 << 32), own)


def aim_at_momentum(group: TensorGroup, base: Optimizer) -> None:
    """``d = v``, the base optimizer's momentum; the sign is that of `sign_of`."""
    entries = [base.state.get(p, {}) for p in group.owners]
    found = [
        next((entry[name] for name in _MOMENTA if entry.get(name) is not None), None) for entry in entries
    ]
    found = list(map(local, found))
    if group.masters is not None:  # state is fp32 there, and lists of one pass have one dtype
        found = [None if v is None else group.scratch(t).copy_(v) for t, v in enumerate(found)]
    triples = zip(found, group.params, group.owners, strict=True)
    group.aim([fitted(v, p) if v is not None and o.requires_grad else None for v, p, o in triples])


def aim_past_memory(
    group: TensorGroup, backend: Backend, policy: Remembering, slots: Slots, guard: Tensor
) -> None:
    """``d = a g + b m`` and ``m' = c g + f m``, in one pass over both.

    Args:
        guard: 0-d float64; where it is not finite the step is skipped, and the memory keeps its bits.
    """
    grads, memory = _where(group.grads, group.participates), slots.lists(_EMA, group)
    is_safe = torch.isfinite(guard.to(group.device))
    created = [t for t, (g, m) in enumerate(zip(grads, memory, strict=True)) if g is not None and m is None]
    if created and not bool(is_safe):
        return  # no state is made for a step that is skipped
    fresh = [None] * len(grads)  # type: list[Tensor | None]
    for t in created:
        fresh[t] = torch.empty_like(group.params[t], requires_grad=False)
    is_old = [g is not None and m is not None for g, m in zip(grads, memory, strict=True)]
    # An average is its own direction, and lies in its slot already.
    is_itself = policy.along == policy.memory and policy.first_along == policy.first_memory
    if is_itself:
        directions = [m if old else new for m, new, old in zip(memory, fresh, is_old, strict=True)]
    else:
        directions = _buffers(group, grads)
    if any(is_old):
        rows = [policy.memory] if is_itself else [policy.along, policy.memory]
        present = [m if old else None for m, old in zip(memory, is_old, strict=True)]
        outs = [present] if is_itself else [_where(directions, is_old), present]
        backend.combine_(group, outs, [_where(grads, is_old), present], _guarded(group, rows, is_safe))
    if created:
        is_new = [new is not None for new in fresh]
        firsts = [policy.first_memory] if is_itself else [policy.first_along, policy.first_memory]
        outs = [fresh] if is_itself else [_where(directions, is_new), fresh]
        coefficients = group.constants(*((x,) for x in firsts))
        backend.combine_(group, outs, [_where(grads, is_new)], coefficients)
        slots.put(_EMA, group, fresh)
    group.grads = directions


# Random masks, drawn steps and noise of equal seeds must not be made of the same words: noise has the numbers
# of tensors from here on.
_NOISE = 1 << 31


def noise_number(number: int) -> int:
    """The number of a tensor for its noise, from its place among all parameters."""
    return _NOISE + number


def own_numbers(group: TensorGroup, numbers: dict[Tensor, int]) -> list[int]:
    """By tensor, a number for its random numbers; parts of one on different ranks have different ones."""
    beyond = group.sharding.index() * len(numbers) if group.sharding.groups else 0
    return [numbers[p] + beyond for p in group.owners]


def seed_of(seed: int, micro_batch: int) -> int:
    """The seed of a micro-batch: the policy's own in the first, and numbers far from it in the others."""
    return (seed + micro_batch * 0x9E3779B97F4A7C15) % (1 << 63)


def sign_of(direction: Direction) -> float:
    """-1 where the perturbation goes against the list that was aimed at."""
    return -1.0 if isinstance(direction, Momentum) else 1.0


def _guarded(group: TensorGroup, rows: list[tuple[float, float]], is_safe: Tensor) -> Tensor:
    """The coefficients; where the step is skipped, those of a memory that stays as it is.

    A coefficient of 0 never reads its list, so gradients that are not finite cannot get in.
    """
    return torch.where(is_safe, group.constants(*rows), group.constants(*[(0.0, 1.0)] * len(rows)))


def _buffers(group: TensorGroup, wanted: list[Tensor | None]) -> list[Tensor | None]:
    """Where the direction of each wanted tensor goes; see note [where a direction lives]."""
    # Noise came first, and the snapshots are of before it; or masters stand in their place.
    is_taken = group.is_perturbed or group.masters is not None
    group.grads = wanted
    if not is_taken:
        group.take_snapshots()
    return [
        None if x is None else group.scratch(t) if is_taken or s is None or group.is_compact(t) else s
        for t, (x, s) in enumerate(zip(wanted, group.snapshots, strict=True))
    ]


def _where(tensors: list[Any], flags: list[bool]) -> list[Any]:
    return [x if flag else None for x, flag in zip(tensors, flags, strict=True)]
