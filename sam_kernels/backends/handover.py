"""What backends that write through addresses share: scalars as kernels read them, and counting of writes.

A write through an address leaves a tensor's version counter behind; autograd would not see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..tensor_groups import EUCLIDEAN, Column, TensorGroup

Tensors = list[Tensor | None]


def scalars(values: Tensor | None, group: TensorGroup, dtype: torch.dtype) -> Tensor | None:
    """Device scalars as the passes read them; the caller keeps the result alive while they do."""
    return None if values is None else values.to(group.device, dtype).contiguous()


def measured(group: TensorGroup, of: str) -> tuple[Tensor, Tensors, bool]:
    """The table, the list a norm is taken of, and whether the metric reads weights beside it."""
    if of == "gradient":
        return group.table, group.grads, group.reads_weights
    # The weights stand in for the gradients, and no metric multiplies them.
    table = group.table.clone()
    table[:, Column.METRIC].clamp_(max=EUCLIDEAN)
    weights = [None if g is None else w for w, g in zip(group.weights, group.grads, strict=True)]
    return table, weights, False


def has_momentum(group: TensorGroup) -> list[bool]:
    """Per row of the table, whether SGD keeps a buffer for its tensors."""
    return [len(row) > Column.MOMENTUM and row[Column.MOMENTUM] != 0 for row in group.rows]


def count_write(tensors: list[Any], marks: list[Any], present: int) -> None:
    """Advance the version counters of the tensors whose mark is not None.

    Args:
        present: how many marks are known not to be None; all of them spares the search.
    """
    if present < len(tensors):
        tensors = [x for x, mark in zip(tensors, marks, strict=True) if mark is not None]
    increment_version(tensors)


def count_perturbation(group: TensorGroup, present: int) -> None:
    """What `perturb_` has written: weights and snapshots, `present` of them."""
    count_write(group.params, group.snapshots, present)
    if group.masters is not None:
        return  # those are only read
    if group.snapshots is not group.standing_snapshots:  # those are the group's own: no graph holds them
        count_write(group.snapshots, group.snapshots, present)


def count_descent(
    group: TensorGroup, slots: dict[str, list[Any]], state: dict[str, int], moving: int
) -> None:
    """What `descend_` has written.

    Args:
        state: the written slots, and how many tensors each has.
        moving: how many parameters have a gradient.
    """
    if group.masters is not None:
        count_write(group.masters, group.grads, moving)
    if moving == len(group.params):
        increment_version(group.params)
        for name, present in state.items():
            count_write(slots[name], slots[name], present)
        return
    moved = [g is not None for g in group.grads]
    for tensors in (slots[name] for name in state):
        increment_version([x for x, m in zip(tensors, moved, strict=True) if m and x is not None])
    touched = [m or s is not None for m, s in zip(moved, group.snapshots, strict=True)]
    increment_version([p for p, t in zip(group.params, touched, strict=True) if t])
