"""The step of a `Lookbehind` probe: several ascents, a base step with the gradient of each, and half the way
back.

The base steps from its own last point while the gradients are those of the ascent. Both live in the
parameters in turn: they are exchanged before the base's step, and after it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import perturbation, state
from .combination import on_device
from .perturbation import Served
from .policies import Lookbehind
from .running_stats import frozen
from .steps import Closure

if TYPE_CHECKING:
    from .optimizer import SAM

Lists = list[list[Tensor | None]]


def step(opt: SAM, closure: Closure, probe: Lookbehind) -> Any:
    """All of the step but its bookkeeping; the weights end where it leads. The loss of the first pass."""
    (loss,) = opt._evaluate_all([closure], 0)
    opt._ascend()
    served = opt._groups()
    with torch.no_grad():
        base = [
            _copies(group, backend, group.snapshots, group.kept_like(group.snapshots))
            for group, backend in served
        ]
    with nullcontext() if opt.model is None else frozen(opt.model):
        first: Lists = []
        for number in range(probe.k):
            opt._evaluate_all([closure], number + 1)
            if not opt._has_layout():
                raise RuntimeError(
                    "step(): parameters were added or removed during a step. The weights are restored and no "
                    "step was taken; do so between steps"
                )
            opt._revalidate()
            with torch.no_grad():
                _step_base(opt, served, base)
                if number == 0 and probe.alpha is None:
                    first = [
                        _copies(group, backend, own, group.kept_like(group.snapshots, 1))
                        for (group, backend), own in zip(served, base, strict=True)
                    ]
            if number + 1 < probe.k:
                opt._ascend()
    with torch.no_grad():
        for i, (group, backend) in enumerate(served):
            alpha = _share(group, backend, base[i], first[i]) if probe.alpha is None else probe.alpha
            alpha = on_device(alpha, group)
            rows = torch.stack([torch.ones_like(alpha), alpha], dim=-1).unsqueeze(-2)
            # w + alpha (last - w): where the base did not move, the sum is w to the bit.
            backend.combine_(group, [base[i]], [base[i], group.snapshots], group.constants((1.0, -1.0)))
            backend.combine_(group, [group.perturbed()], [group.snapshots, base[i]], rows)
            perturbation.forget(group)
    return loss


def _step_base(opt: SAM, served: Served, base: Lists) -> None:
    """Let the base step from where it stands, by the gradients of where the ascent stands."""
    _exchange(served, base)
    for group, _ in served:
        for p, s in zip(group.owners, group.snapshots, strict=True):
            if s is None:
                p.grad = None  # what was not perturbed takes no part in this step
    kept: Lists = []
    if state.fused_rule(opt.base_optimizer)[0] is None:
        # A base that steps by itself may write into the gradients, and the next ascent reads them.
        opt._read_gradients()
        kept = [
            _copies(group, backend, list(group.grads), group.kept_like(group.grads, 2))
            for group, backend in served
        ]
    try:
        opt._step_base_in_place()
    finally:
        _exchange(served, base)
    for (group, _), own in zip(served, kept, strict=False):
        for g, present in zip(own, group.own_gradients(), strict=True):
            if g is not None and present is not None:
                present.copy_(g)


def _exchange(served: Served, base: Lists) -> None:
    for (group, backend), own in zip(served, base, strict=True):
        params = group.perturbed()
        backend.combine_(group, [params, own], [params, own], group.constants((0.0, 1.0), (1.0, 0.0)))


def _share(group: Any, backend: Any, base: list[Tensor | None], first: list[Tensor | None]) -> Tensor:
    """Per tensor ``(cos(first displacement, whole displacement) + 1) / 2``; 1/2 where there was none."""
    minus = group.constants((1.0, -1.0))
    whole = group.scratch_like(base)
    backend.combine_(group, [first], [first, group.snapshots], minus)
    backend.combine_(group, [whole], [base, group.snapshots], minus)
    dots = group.sharding.sum(backend.grad_stats(group, [first, whole], per_tensor=True))
    lengths = (dots[:, 0] * dots[:, 2]).sqrt()
    cosine = torch.where(lengths == 0, 0.0, dots[:, 1] / lengths)
    return (cosine + 1) / 2


def _copies(group: Any, backend: Any, tensors: list[Tensor | None], outs: list[Tensor | None]) -> list[Any]:
    backend.combine_(group, [outs], [tensors], group.constants((1.0,)))
    return outs
