"""Combination: the gradients of the probes become the one that the base optimizer steps with.

Dots of the lists come from one read over all groups; coefficients are computed from them on the device, and
the sum is written where the last gradient lies, so the parameters' ``.grad`` is what the base steps with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .perturbation import Served, total_of
from .policies import AdaptiveRatio, Combine, Decoupled, ReuseOrthogonal
from .sharding import local
from .slots import Slots
from .tensor_groups import TensorGroup

_ORTHOGONAL = "orthogonal"

# What is left of a gradient without its own part along another is at least as long as so many roundings of
# it.
_ROUNDINGS = 4.0

Lists = list[list[Tensor | None]]
Held = list[Lists]
"""By probe, then by group."""


def hold(served: Served, by_copy: bool, number: int = 0) -> Lists:
    """The present gradients, kept while the next ones are computed.

    Args:
        number: how many are held already.
        by_copy: where what computes those may write where these lie.
    """
    held = []
    for group, _ in served:
        own, present = list(group.grads), group.own_gradients()
        for t, g in enumerate(own):
            # The views of a bucket, as DDP makes them, are written again by the next backward pass.
            if g is not None and g is present[t] and (by_copy or g._is_view()):
                buffer = group.scratch_gradient(t, number)
                own[t] = g.clone() if g is buffer else buffer.copy_(g)
        held.append(own)
    return held


def check_apart(served: Served, held: Held) -> None:
    """Raise a sentence where a later gradient was written over one that is held.

    Raises:
        RuntimeError: naming what to do; the held gradient is lost.
    """
    for i, (group, _) in enumerate(served):
        present = [0 if g is None else g.data_ptr() for g in group.grads]
        for probe in held:
            before = [1 if g is None else g.data_ptr() for g in probe[i]]
            if any(a == b for a, b in zip(present, before, strict=True) if a):
                raise RuntimeError(
                    "step(): the closure wrote its gradients of two passes into the same memory, and this "
                    "recipe needs both; let zero_grad() drop gradients (set_to_none=True) in place of "
                    "clearing them, or set opt.copies_gradients = True. The weights are restored and no "
                    "step was taken"
                )


def combine(served: Served, rule: Combine, held: Held, slots: Slots, guard: Tensor | None) -> None:
    """Write the combined gradient over the last one, everywhere; the groups have read those.

    Args:
        held: the gradients of the probes before the last.
        guard: the norm; where it is not finite the step is skipped, and what lasts stays as it was.
    """
    last = [group.grads for group, _ in served]
    lists = [[*(probe[i] for probe in held), own] for i, own in enumerate(last)]
    per_tensor = isinstance(rule, ReuseOrthogonal) and rule.scope == "tensor"
    leading = [own[: rule.dotted] for own in lists]
    dots = _dots(served, leading, per_tensor) if rule.dotted else [None] * len(served)
    safe = _is_safe(served, guard, dots)
    scalars = _scalars(rule, slots, served[0][0].device)
    if isinstance(rule, ReuseOrthogonal):
        for (group, backend), own, each, is_safe in zip(served, lists, dots, safe, strict=True):
            _keep_orthogonal(group, backend, rule, own, each, slots, is_safe)
        _clear_rounding(served, rule, dots, slots, safe)
        return
    for (group, backend), own, each in zip(served, lists, dots, strict=True):
        local = {name: value.to(group.device) for name, value in scalars.items()}
        coefficients = _rows(group, [rule.weights(each, local)])
        backend.combine_(group, [own[-1]], own, coefficients)
        write_back(group, own[-1])
    if isinstance(rule, AdaptiveRatio):
        new = rule.advance(dots[0], scalars)
        for name, value in scalars.items():
            # In place: a CUDA graph reads in every replay where the one before has written.
            value.copy_(torch.where(safe[0], new[name].reshape(()), value))
            slots.scalars[name] = value


def reuse(served: Served, rule: ReuseOrthogonal, slots: Slots) -> None:
    """``d = g + alpha (||g|| / ||v||) v`` on a step that does not perturb."""
    kept = [slots.lists(_ORTHOGONAL, group) for group, _ in served]
    if all(v is None for own in kept for v in own):
        return
    lists = [[group.grads, own] for (group, _), own in zip(served, kept, strict=True)]
    dots = _dots(served, lists, rule.scope == "tensor")
    for (group, backend), own, each in zip(served, lists, dots, strict=True):
        backend.combine_(group, [group.grads], own, _rows(group, [rule.reuse(each)]))
        write_back(group, group.grads)


def swap_first(served: Served, first: Lists) -> Lists:
    """Give the base the first gradient in place of the last; the last ones, for what follows its step."""
    last = []
    for (group, _), own in zip(served, first, strict=True):
        last.append(group.grads)
        # A tensor that has the last alone takes that; without a last one it takes no step, as in torch.
        given = [gs if gs is None or g is None else g for gs, g in zip(group.grads, own, strict=True)]
        for t, (p, g) in enumerate(zip(group.owners, given, strict=True)):
            if p.grad is not None and g is not None:
                group.give_gradient(t, g.to(p.grad.dtype))
        group.grads = given
    return last


def subtract(served: Served, last: Lists, first: Lists) -> None:
    """``gs -= g`` where both are there: a base that steps by itself may write into the g that it is given."""
    for (group, backend), gs, g in zip(served, last, first, strict=True):
        both = [x if y is not None else None for x, y in zip(gs, g, strict=True)]
        backend.combine_(group, [both], [both, g], group.constants((1.0, -1.0)))


def add_decoupled(
    served: Served,
    rule: Decoupled,
    first: Lists,
    last: Lists,
    rates: Sequence[Any],
    guard: Tensor | None,
    is_difference: bool,
) -> None:
    """``w -= lr weight (g(w + e) - g)``, after the base's step.

    Args:
        is_difference: whether `last` holds that difference already.
        rates: by param group, its lr, negative where it maximizes.
        guard: as in `combine`.
    """
    for (group, backend), g, gs in zip(served, first, last, strict=True):
        lr = torch.stack([on_device(rates[key[0]], group) for key in group.keys])
        size = rule.weight * lr[group.row_index()]
        if guard is not None:
            size = torch.where(torch.isfinite(guard.to(group.device)), size, 0.0)
        both = [x is not None and y is not None for x, y in zip(g, gs, strict=True)]
        params = [p if has else None for p, has in zip(group.params, both, strict=True)]
        if is_difference:
            rows = torch.stack([torch.ones_like(size), -size], dim=1).unsqueeze(1)
            backend.combine_(group, [params], [params, gs], rows)  # type: ignore[list-item]
            continue
        rows = torch.stack([torch.ones_like(size), -size, size], dim=1).unsqueeze(1)
        backend.combine_(group, [params], [params, gs, g], rows)  # type: ignore[list-item]


def write_back(group: TensorGroup, grads: list[Tensor | None]) -> None:
    """Give parameters the gradients that were fitted to them before; the others hold theirs already."""
    for t, (g, present) in enumerate(zip(grads, group.own_gradients(), strict=True)):
        if g is None or present is None or g is present:
            continue
        if present.layout == torch.strided and _is_the_gradient(present, group.owners[t]):
            present.copy_(g)
        else:
            group.give_gradient(t, g)


def _is_the_gradient(grad: Tensor, owner: Tensor) -> bool:
    """Whether what is written into a local gradient is written into its parameter's."""
    return local(owner.grad) is grad


def _keep_orthogonal(
    group: TensorGroup,
    backend: Any,
    rule: ReuseOrthogonal,
    lists: Lists,
    dots: Any,
    slots: Slots,
    is_safe: Tensor,
) -> None:
    """The part of the last gradient that is orthogonal to the first, into its slot."""
    before = slots.lists(_ORTHOGONAL, group)
    both = [g is not None and gs is not None for g, gs in zip(*lists, strict=True)]
    changes = [has != (v is not None) for has, v in zip(both, before, strict=True)]
    if any(changes) and not bool(is_safe):
        return  # no state is made or dropped for a step that is skipped; the host waits only here
    slots.drop(_ORTHOGONAL, [p for p, has in zip(group.owners, both, strict=True) if not has])
    outs = [
        None if not has else (torch.empty_like(p, requires_grad=False) if v is None else v)
        for p, v, has in zip(group.params, before, both, strict=True)
    ]
    made = _rows(group, [(*rule.orthogonal(dots), 0.0)])
    kept = group.constants((0.0, 0.0, 1.0))
    backend.combine_(group, [outs], [*lists, before], torch.where(is_safe, made, kept))
    slots.put(_ORTHOGONAL, group, outs)


def _clear_rounding(
    served: Served, rule: ReuseOrthogonal, dots: list[Any], slots: Slots, safe: list[Tensor]
) -> None:
    """``v = 0`` where all of it is rounding, as with parallel gradients: it would be blown up."""
    kept = [[slots.lists(_ORTHOGONAL, group)] for group, _ in served]
    own = _dots(served, kept, rule.scope == "tensor")
    for (group, backend), (v,), mine, of_gradients, is_safe in zip(
        served, kept, own, dots, safe, strict=True
    ):
        floor = (_ROUNDINGS * torch.finfo(group.dtype).eps) ** 2 * of_gradients[1][1]
        is_more = (mine[0][0] > floor) | ~is_safe
        backend.combine_(group, [v], [v], _rows(group, [(is_more.double(),)]))


def _dots(served: Served, lists: list[Lists], per_tensor: bool) -> list[Any]:
    """Per group, the matrix of dots: over all groups together, or of every tensor."""
    found = [
        backend.grad_stats(group, own, per_tensor=per_tensor)
        for (group, backend), own in zip(served, lists, strict=True)
    ]
    if not per_tensor:
        total = total_of(served, found)
        found = [total.to(group.device) for group, _ in served]
    else:
        found = [group.sharding.sum(each) for (group, _), each in zip(served, found, strict=True)]
    count = len(lists[0])
    matrices = []
    for triangle in found:
        matrix: list[list[Any]] = [[None] * count for _ in range(count)]
        k = 0
        for i in range(count):
            for j in range(i, count):
                matrix[i][j] = matrix[j][i] = triangle[..., k]
                k += 1
        matrices.append(matrix)
    return matrices


def _is_safe(served: Served, guard: Tensor | None, dots: list[Any]) -> list[Tensor]:
    """Per group, a bool on its device: the gradients of all probes are finite, as far as anybody looked."""
    safe = []
    for (group, _), matrix in zip(served, dots, strict=True):
        one = torch.ones((), dtype=torch.float64, device=group.device)
        checks = [one if guard is None else guard.to(group.device)]
        checks += [] if matrix is None else [matrix[i][i].sum() for i in range(len(matrix))]
        safe.append(torch.isfinite(torch.stack(checks)).all())
    return safe


def _scalars(rule: Combine, slots: Slots, device: torch.device) -> dict[str, Tensor]:
    """The numbers of the rule, on the device of the first group."""
    held = {name: slots.scalars.get(name, first) for name, first in rule.first_scalars().items()}
    return {
        name: value.to(device)
        if isinstance(value, Tensor)
        else torch.full((), float(value), dtype=torch.float64, device=device)
        for name, value in held.items()
    }


def _rows(group: TensorGroup, rows: list[tuple[Any, ...]]) -> Tensor:
    """Coefficients as `combine_` takes them, from numbers and tensors, which may be by tensor."""
    tensors = [[on_device(x, group) for x in row] for row in rows]
    stacked = [torch.stack(torch.broadcast_tensors(*row), dim=-1) for row in tensors]
    return torch.stack(stacked, dim=-2)


def on_device(value: Any, group: TensorGroup) -> Tensor:
    """A number or a tensor as float64 on the group's device; a number waits for nothing there."""
    if isinstance(value, Tensor):
        return value.detach().to(group.device, torch.float64)
    return torch.full((), float(value or 0.0), dtype=torch.float64, device=group.device)


def add(served: Served, total: Lists, grads: Lists, number: int) -> Lists:
    """``total += grads``; a tensor that was missing so far is taken over.

    Args:
        number: of the buffers of the total, for what lies where the next gradients go.
    """
    for (group, backend), own, more in zip(served, total, grads, strict=True):
        both = [a if b is not None else None for a, b in zip(own, more, strict=True)]
        backend.combine_(group, [both], [both, more], group.constants((1.0, 1.0)))
        for t, (a, b) in enumerate(zip(own, more, strict=True)):
            if a is None and b is not None:
                own[t] = group.scratch_gradient(t, number).copy_(b)
    return total


def give_back(served: Served, grads: Lists) -> None:
    """Give parameters the gradients that were theirs before others were swapped in."""
    for (group, _), own in zip(served, grads, strict=True):
        for t, (p, g) in enumerate(zip(group.owners, own, strict=True)):
            if g is not None and p.grad is not None and g.dtype == p.grad.dtype:
                group.give_gradient(t, g)
        group.drop_gradients()


def give(served: Served, grads: Lists) -> None:
    """Make these the parameters' gradients."""
    for (group, _), own in zip(served, grads, strict=True):
        for t, g in enumerate(own):
            group.give_gradient(t, g)


def add_decay(served: Served, param_groups: list[dict[str, Any]], share: float = 1.0) -> None:
    """``g += weight_decay w``, ``g -= weight_decay w`` where the group maximizes; the groups have read g.

    Args:
        share: of the decay, where a gradient is one of several that are added up.
    """
    for group, backend in served:
        sizes = []
        for key in group.keys:
            own = param_groups[key[0]]
            size = on_device(own.get("weight_decay", 0.0), group) * share
            sizes.append(-size if own.get("maximize", False) else size)
        each = torch.stack(sizes)[group.row_index()]
        rows = torch.stack([torch.ones_like(each), each], dim=1).unsqueeze(1)
        backend.combine_(group, [group.grads], [group.grads, list(group.params)], rows)
        write_back(group, group.grads)
        group.drop_gradients()


def scale(served: Served, factor: Tensor) -> None:
    """``g *= factor``; the groups have read g."""
    for group, backend in served:
        backend.combine_(group, [group.grads], [group.grads], factor.to(group.device).view(1, 1))
        write_back(group, group.grads)
