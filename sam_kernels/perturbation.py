"""Ascent: measure the norm over all tensor groups, then perturb them. Nothing here reads the host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops import Backend, take_root
from .policies import LayerWise, Sparse
from .recipe import Recipe
from .sharding import Sharding
from .tensor_groups import TensorGroup

Served = list[tuple[TensorGroup, Backend]]


@dataclass
class Measure:
    """What `perturb` needs to know of the gradients; scalars are 0-d float64 tensors.

    Attributes:
        norm: the denominator of the perturbation; not finite when any gradient is not.
        arguments: per group, the keywords of `Backend.perturb_`.
    """

    norm: Tensor
    arguments: list[dict[str, Any]]


def measure(served: Served, recipe: Recipe, guard: Tensor | None = None) -> Measure:
    """The norm of the recipe over all groups together; reads, never writes.

    Args:
        served: tensor groups with their backends, gradients read and aimed.
        recipe: its metric says which norm.
        guard: makes the norm what it is where it is not finite.
    """
    found = _measure(served, recipe)
    if guard is not None:
        found.norm = torch.where(torch.isfinite(guard), found.norm, guard.to(found.norm.device))
    return found


def squares(served: Served, grads: list[list[Tensor | None]] | None = None) -> Tensor:
    """``||g||^2`` over all groups, whatever the metric and the mask; not finite if any gradient is not.

    Args:
        grads: by group, in place of the gradients that the groups have read.
    """
    lists = [group.grads for group, _ in served] if grads is None else grads
    pairs = zip(served, lists, strict=True)
    return total_of(served, [backend.grad_stats(group, [own])[0] for (group, backend), own in pairs])


def _measure(served: Served, recipe: Recipe) -> Measure:
    metric = recipe.metric
    is_masked = isinstance(recipe.mask, Sparse) and recipe.mask.norm == "masked"
    of: dict[str, Any] = {"masked": True} if is_masked else {}
    if isinstance(metric, LayerWise):
        return _measure_layers(served, metric, recipe.eps, of)
    if metric.p == 2:
        return Measure(_norm(served, [of for _ in served], root=2.0), [{} for _ in served])
    if math.isinf(metric.p):
        # The sign needs no norm; the pass is made for its finite check, see promise 3 in the tests.
        norm = _largest(served, [backend.sq_norm(group, moment="peak", **of) for group, backend in served])
        return Measure(norm, [{"shape": "sign"} for _ in served])
    q = metric.dual
    peak = _largest(served, [backend.sq_norm(group, moment="peak", **of) for group, backend in served])
    peaks = [peak.to(group.device) for group, _ in served]
    # Dividing by the peak keeps the powers in range; eq. 2 of Foret et al. does not change under scaling.
    powers = [{"moment": "power", "q": q, "peak": on_device, **of} for on_device in peaks]
    norm = _norm(served, powers, root=metric.p)
    return Measure(norm, [{"shape": "powered", "q": q, "peak": on_device} for on_device in peaks])


def perturb(served: Served, found: Measure) -> None:
    """Snapshot and perturb every group; if one fails, those already perturbed are restored.

    Args:
        served: the groups `found` was measured on.
        found: the result of `measure`.
    """
    try:
        for (group, backend), arguments in zip(served, found.arguments, strict=True):
            group.take_snapshots()
            before = _written(group, backend)
            group.is_perturbed = True
            try:
                backend.perturb_(group, found.norm.to(group.device), **arguments)
            except BaseException:
                _disown(group, backend, before)
                raise
            group.count_moved()
            group.drop_gradients()
    except BaseException:
        restore(served)
        raise


def _written(group: TensorGroup, backend: Backend) -> list[Any]:
    """Per tensor, what changes when its snapshot is written."""
    count = getattr(backend, "perturbations", None)
    if count is not None:  # one call writes all or nothing
        return [count(group)] * len(group.params)
    return [None if s is None else s._version for s in group.snapshots]


def _disown(group: TensorGroup, backend: Backend, before: list[Any]) -> None:
    """After a perturbation that failed: a snapshot that was not written is none, and its weights are whole.

    Torch's operators write the snapshot of a tensor before the tensor, and count it.
    """
    if group.masters is not None:
        return  # nothing is saved, and the rounded masters are the weights whatever was written
    group.snapshots = [
        s if then != now else None
        for s, then, now in zip(group.snapshots, before, _written(group, backend), strict=True)
    ]


def restore(served: Served) -> None:
    """Copy the snapshots back, bit for bit, and forget them."""
    for group, backend in served:
        if group.is_perturbed:
            backend.restore_(group)
            group.count_moved()
            forget(group)


def forget(group: TensorGroup) -> None:
    """The weights of the group are no longer perturbed."""
    if group.is_perturbed:
        group.settle()
    group.is_perturbed = False
    group.drop_snapshots()


def _measure_layers(served: Served, metric: LayerWise, eps: float, of: dict[str, Any]) -> Measure:
    grad_sqs = [
        group.sharding.sum(backend.sq_norm(group, per_tensor=True, **of)) for group, backend in served
    ]
    weight_sqs = [
        group.sharding.sum(backend.sq_norm(group, of="weight", per_tensor=True)) for group, backend in served
    ]
    parts = [
        (metric.norm_weights(weight_sq, group.applies()) * grad_sq).sum()
        for (group, _), weight_sq, grad_sq in zip(served, weight_sqs, grad_sqs, strict=True)
    ]
    norm = _added(parts).sqrt()  # over all ranks already, tensor by tensor
    return Measure(
        norm,
        [
            {
                "tensor_scale": metric.tensor_scale(
                    weight_sq, grad_sq, group.applies(), norm.to(group.device), eps
                )
            }
            for (group, _), weight_sq, grad_sq in zip(served, weight_sqs, grad_sqs, strict=True)
        ],
    )


def _norm(served: Served, arguments: list[dict[str, Any]], root: float) -> Tensor:
    """The root of the sums over all groups; where there is one whole group, its pass takes the root too."""
    if len(served) == 1 and not served[0][0].sharding.groups:
        group, backend = served[0]
        return backend.sq_norm(group, root=root, **arguments[0])
    sums = [backend.sq_norm(group, **own) for (group, backend), own in zip(served, arguments, strict=True)]
    return take_root(total_of(served, sums), root)


def total_of(served: Served, sums: list[Tensor]) -> Tensor:
    """The sum of what the groups found, each element of a parameter counted once however it is spread.

    On the device of the first group. One collective for each set of process groups, whatever the number of
    tensors and groups; every rank takes part in each, also where it holds no element.
    """
    return _added([sharding.sum(_added(parts)) for sharding, parts in _by_sharding(served, sums)])


def _largest(served: Served, peaks: list[Tensor]) -> Tensor:
    return _most([sharding.max(_most(parts)) for sharding, parts in _by_sharding(served, peaks)])


def _by_sharding(served: Served, parts: list[Tensor]) -> list[tuple[Sharding, list[Tensor]]]:
    """In the order in which the groups bring them, which is the same on all ranks."""
    found: dict[Sharding, list[Tensor]] = {}
    for (group, _), part in zip(served, parts, strict=True):
        found.setdefault(group.sharding, []).append(part)
    return list(found.items())


def _added(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _most(peaks: list[Tensor]) -> Tensor:
    largest = peaks[0]
    for peak in peaks[1:]:
        largest = torch.maximum(largest, peak.to(largest.device))
    return largest
