"""The step of an `Anticipated` probe (SAMPa): its second gradient is that of the next batch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from . import combination, perturbation
from .combination import on_device
from .perturbation import Measure, Served
from .running_stats import frozen
from .sharding import local
from .steps import Closure
from .tensor_groups import fitted

if TYPE_CHECKING:
    from .optimizer import SAM

_SLOT = "anticipated"


def forget(opt: SAM) -> None:
    """Before a step that does not perturb: what was anticipated is of another batch by the next."""
    for group, _ in opt._groups():
        opt._slots.drop(_SLOT, group.owners)


def evaluate(opt: SAM, closure: Closure, ahead: Closure) -> Any:
    """Both gradients, combined in ``.grad``; the weights stay perturbed. The loss of `closure`.

    Args:
        closure: the batch whose gradient at the anticipated iterate the step before has evaluated.
        ahead: the next batch.
    """
    served = opt._groups()
    loss = None
    if all(y is None for group, _ in served for y in opt._slots.lists(_SLOT, group)):
        (loss,) = opt._evaluate_all([closure], 0)
        opt._read_gradients()
        total = perturbation.squares(served)
        if not bool(torch.isfinite(total)):  # the host waits here in the first step alone
            opt._measure = Measure(total, [])  # the step is skipped, and nothing is kept of it
            opt._begin_perturbed()
            return loss
        for group, _ in served:
            # Clones: the gradients belong to the parameters.
            opt._slots.put(_SLOT, group, [None if g is None else g.clone() for g in group.grads])
            group.drop_gradients()
    opt._write_tables(served)
    try:
        for group, _ in served:
            group.aim(opt._slots.lists(_SLOT, group))
        if opt.stochastic_rounding:
            opt._draw_roundings(served, is_further=False)
        if opt.measures:
            opt._record.note_gradient(served, opt._scale_left)
        opt._measure = perturbation.measure(served, opt.recipe)
        perturbation.perturb(served, opt._measure)
        if opt.measures:
            opt._record.note_move(served, is_first=True)
        else:
            opt._record.note_ascent(opt, served, opt._measure, opt._scale_left)
    except BaseException:
        opt._abandon()
        raise
    opt._begin_perturbed()
    with nullcontext() if opt.model is None else frozen(opt.model):
        (second,) = opt._evaluate_all([closure], 1)
    opt._hold(opt._read_gradients())
    with torch.no_grad():
        _move_ahead(opt, served)
    opt._evaluate_all([ahead], 2)
    _combine(opt)
    return second if loss is None else loss


def _move_ahead(opt: SAM, served: Served) -> None:
    """``w = w_0 - lr (y + weight_decay w_0 + momentum v)``: where the base's next step is expected to lead.

    The moments of other bases than SGD are not asked: there it is ``w_0 - lr (y + weight_decay w_0)``.
    """
    for group, backend in served:
        rows = []
        for key in group.keys:
            own = opt.param_groups[key[0]]
            names = ("lr", "weight_decay", "momentum")
            lr, decay, momentum = (on_device(own.get(name, 0.0), group) for name in names)
            sign = -1.0 if own.get("maximize", False) else 1.0
            rows.append(torch.stack([1.0 - lr * decay, -sign * lr, -lr * momentum]).unsqueeze(0))
        state = opt.base_optimizer.state
        found = [local(state.get(p, {}).get("momentum_buffer")) for p in group.owners]
        momenta = [None if v is None else fitted(v, p) for v, p in zip(found, group.params, strict=True)]
        params = group.perturbed()
        lists = [group.snapshots, opt._slots.lists(_SLOT, group), momenta]
        coefficients = torch.stack(rows)[group.row_index()]
        backend.combine_(group, [params], lists, coefficients)


def _combine(opt: SAM) -> None:
    """``d = (1 - lmbda) g_1 + lmbda g_2`` into the gradients, and ``y = g_2`` unless it is not finite."""
    served, (first,) = opt._take_held()
    total = perturbation.squares(served)
    total = total + perturbation.squares(served, first).to(total.device)
    weights = opt.recipe.combine.weights(None, {})
    for (group, backend), one in zip(served, first, strict=True):
        two, kept = list(group.grads), opt._slots.lists(_SLOT, group)
        made, same = group.constants((1.0, 0.0)), group.constants((0.0, 1.0))
        is_safe = torch.isfinite(total.to(group.device))
        outs = [None if g is None else y for g, y in zip(two, kept, strict=True)]
        backend.combine_(group, [outs], [two, kept], torch.where(is_safe, made, same))
        if any((g is None) != (y is None) for g, y in zip(two, kept, strict=True)) and bool(is_safe):
            # Only then the host waits: no state is made or dropped for a step that is skipped.
            new = [None if g is None or y is not None else g.clone() for g, y in zip(two, kept, strict=True)]
            opt._slots.put(_SLOT, group, new)
            opt._slots.drop(_SLOT, [p for p, g in zip(group.owners, two, strict=True) if g is None])
        backend.combine_(group, [two], [one, two], group.constants(weights))
        combination.write_back(group, two)
        group.drop_gradients()
    if opt._measure is not None:
        norm = opt._measure.norm
        opt._measure = Measure(norm + total.to(norm.device), [])
