"""Foreach backend: the six passes by torch._foreach operators, a few launches per pass whatever the list.

Serves any device without a compiler. Device scalars (norms, coefficients, found_inf) stay tensors on
an accelerator, so nothing waits for it; there a condition becomes a choice of bits. See note
[choice of bits]. Formulas are those of the reference, grouped by row of the table because one
operator takes one set of scalars.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..tensor_groups import ADAPTIVE, FISHER, FIXED, Column, TensorGroup
from . import reference, torch_random, torch_selection

Tensors = list[Tensor]
Row = list[float]

# The stubs of torch know the _foreach operators in one overload only.
many: Any = torch

# torch's CPU norm adds a whole tensor in one fp32 accumulator, off by 6e-4 at 16 million elements.
# Pieces of this size stay below 2e-5, and float64 adds the pieces up.
_PIECE = 16384

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Foreach:
    """See `sam_kernels.backends.Backend` for the contract of each method."""

    name = "foreach"

    def refusal(self, group: TensorGroup) -> str | None:
        if not group.dtype.is_floating_point:
            return f"{group.dtype} has no perturbation; give it floating-point parameters"
        if group.dtype.itemsize not in _BITS:
            return f"torch._foreach operators do not calculate in {group.dtype}; use float16 or wider"
        return None

    def sq_norm(
        self,
        group: TensorGroup,
        *,
        of: str = "gradient",
        moment: str = "square",
        q: float | None = None,
        peak: Tensor | None = None,
        root: float = 1.0,
        per_tensor: bool = False,
        masked: bool = False,
    ) -> Tensor:
        order = {"square": 2.0, "peak": math.inf, "power": 1.0}[moment]
        indices: list[int] = []
        pieces: Tensors = []
        counts: list[int] = []
        for row, members in _members(group, lambda t: group.grads[t] is not None):
            members = [t for t in members if group.params[t].numel()]
            if row[Column.METRIC] == FIXED or not members:
                continue
            w = _pick(group.weights, members)
            g = _pick(group.grads, members)
            u = w if of == "weight" else _times(_metric_weights(w, g, row), g)
            if moment == "power":
                u = _ratios(u, peak, q)
            if masked:
                u = [
                    reference.chosen(x, reference.mask_of(group, t)) for x, t in zip(u, members, strict=True)
                ]
            for tensor in u:
                split = _pieces(tensor, group)
                pieces.extend(split)
                counts.append(len(split))
            indices.extend(members)
        if not pieces:
            return torch.zeros(
                len(group.params) if per_tensor else (), dtype=torch.float64, device=group.device
            )
        sums = torch.stack(many._foreach_norm(pieces, order, dtype=_wide_dtype(group.dtype))).double()
        if moment == "square":
            sums = sums.square()
        if not per_tensor:
            return reference.take_root(sums.max() if moment == "peak" else sums.sum(), root)
        if len(pieces) > len(indices):
            sums = torch.stack([s.max() if moment == "peak" else s.sum() for s in sums.split(counts)])
        # Stacked rather than scattered: an index list would have to be copied to the device.
        parts = [torch.zeros((), dtype=torch.float64, device=group.device)] * len(group.params)
        for t, part in zip(indices, sums.unbind(), strict=True):
            parts[t] = part
        return torch.stack(parts)

    def perturb_(
        self,
        group: TensorGroup,
        norm: Tensor,
        *,
        shape: str = "linear",
        q: float | None = None,
        peak: Tensor | None = None,
        tensor_scale: Tensor | None = None,
    ) -> None:
        if group.offsets is not None:
            # Without a whole snapshot there is nothing to take unselected elements back from.
            arguments: dict[str, Any] = {"shape": shape, "q": q, "peak": peak, "tensor_scale": tensor_scale}
            return reference.BACKEND.perturb_(group, norm, **arguments)
        finite = _known(torch.isfinite(norm))
        for row, members in _members(
            group, lambda t: group.snapshots[t] is not None and group.grads[t] is not None
        ):
            w, snapshots = _pick(group.params, members), _pick(group.snapshots, members)
            g = _pick(group.grads, members)
            if any(map(is_, g, snapshots)):
                g = _copies(g)
            if group.masters is None:
                many._foreach_copy_(snapshots, w)
            if finite is False:
                continue
            if group.masters is None:
                values = _wide(w)
            else:
                values = _copies(snapshots)
                snapshots = [x.to(group.dtype) for x in snapshots]  # the weights as they are
            dtype = _wide_dtype(group.dtype)
            if tensor_scale is None:
                scale = _known(reference.ascent_scale(norm, row, shape, dtype))
            else:
                scale = _factors(reference.ascent_scale(norm, row, shape, dtype, tensor_scale), members)
            _perturb_(values, g, row, scale, shape, q, peak)
            if group.rounding is None:
                _store_(w, values)
            else:
                for x, value, t in zip(w, values, members, strict=True):
                    torch_random.store_at_random_(x, value, group.rounding, t)
            if finite is not True:
                _keep_(w, snapshots, finite)
            for x, old, t in zip(w, snapshots, members, strict=True) if group.masks is not None else ():
                mask = reference.mask_of(group, t)
                if mask is not None:
                    x.copy_(torch.where(mask, x, old))

    def restore_(self, group: TensorGroup) -> None:
        if group.offsets is not None:
            return reference.BACKEND.restore_(group)
        members = [t for t, snapshot in enumerate(group.snapshots) if snapshot is not None]
        if members:
            many._foreach_copy_(_pick(group.params, members), _pick(group.snapshots, members))

    accumulate_squares_ = staticmethod(torch_selection.accumulate_squares_)
    count_ranks = staticmethod(torch_selection.count_ranks)
    mark_ = staticmethod(torch_selection.mark_)
    noise_ = staticmethod(torch_random.noise_)

    def grad_stats(
        self, group: TensorGroup, lists: list[list[Tensor | None]], *, per_tensor: bool = False
    ) -> Tensor:
        if per_tensor:
            return reference.BACKEND.grad_stats(group, lists, per_tensor=True)
        dots = []
        for i, xs in enumerate(lists):
            for ys in lists[i:]:
                both = [
                    t for t, (x, y) in enumerate(zip(xs, ys, strict=True)) if x is not None and y is not None
                ]
                if not both:
                    dots.append(torch.zeros((), dtype=torch.float64, device=group.device))
                    continue
                products = many._foreach_mul(_wide(_pick(xs, both)), _wide(_pick(ys, both)))
                # There is no _foreach_sum, and _foreach_norm would lose the sign.
                dots.append(torch.stack([p.sum(dtype=torch.float64) for p in products]).sum())
        return torch.stack(dots)

    def combine_(
        self,
        group: TensorGroup,
        outs: list[list[Tensor | None]],
        lists: list[list[Tensor | None]],
        coefficients: Tensor,
    ) -> None:
        if coefficients.dim() == 3:
            return _combine_each_(outs, lists, coefficients)
        weights = [_factors(row) for row in coefficients.unbind()]
        # Tensors missing from the same lists share their operators.
        patterns: dict[tuple[bool, ...], list[int]] = {}
        for t in range(len(group.params)):
            patterns.setdefault(tuple(column[t] is not None for column in (*outs, *lists)), []).append(t)
        for pattern, members in patterns.items():
            writes, reads = pattern[: len(outs)], pattern[len(outs) :]
            if not any(writes):
                continue
            xs = [
                _wide(_pick(column, members)) if read else None
                for column, read in zip(lists, reads, strict=True)
            ]
            # All sums before the first store: an output may be one of the lists.
            sums = [
                _weighted_sum(row, xs, _pick(out, members)) if write else []
                for row, out, write in zip(weights, outs, writes, strict=True)
            ]
            for out, total, write in zip(outs, sums, writes, strict=True):
                if write:
                    many._foreach_copy_(_pick(out, members), total)

    def descend_(
        self,
        group: TensorGroup,
        rule: str,
        slots: dict[str, list[Any]],
        *,
        guard: Tensor | None = None,
        found_inf: Tensor | None = None,
        inv_scale: Tensor | None = None,
    ) -> None:
        safe = _is_safe(guard, found_inf)
        if rule == "adam" and any(step is not None and step.device.type == "cpu" for step in slots["step"]):
            # Counters on the host, torch's default, can only follow a guard that the host has read.
            safe = bool(safe)
        self.restore_(group)
        by_row = _members(group, lambda t: group.grads[t] is not None)
        if safe is False or not by_row:
            return
        targets = group.params if group.masters is None else group.snapshots
        changing = [] if safe is True else _changing(group, targets, rule, slots)
        before = _copies(changing) if changing else []
        for row, members in by_row:
            g = _wide(_pick(group.grads, members))
            if inv_scale is not None:
                g = list(many._foreach_mul(g, _like(_known(inv_scale.reshape(())), g)))
            if row[Column.MAXIMIZE]:
                g = list(many._foreach_neg(g))
            update_ = _sgd_ if rule == "sgd" else _adam_
            update_(_pick(targets, members), g, row, slots, members)
        if changing:
            _keep_(changing, before, safe)
        if group.masters is not None:
            self.restore_(group)  # to the new masters, rounded


# ---- formulas, on the tensors of one row -----------------------------------------------------------


def _metric_weights(w: Tensors, g: Tensors, row: Row) -> Tensors | None:
    """``T``: ``|w| + eta`` under the adaptive metric, ``(1 + eta g^2)^(-1/2)`` under Fisher's, None for 1."""
    if row[Column.METRIC] == FISHER:
        g = _wide(g)
        weights = list(many._foreach_mul(g, g))
        many._foreach_mul_(weights, row[Column.ETA])
        many._foreach_add_(weights, 1)
        many._foreach_rsqrt_(weights)
        return weights
    if row[Column.METRIC] != ADAPTIVE:
        return None
    weights = list(many._foreach_abs(_wide(w)))
    if row[Column.ETA]:
        many._foreach_add_(weights, row[Column.ETA])
    return weights


def _times(weights: Tensors | None, tensors: Tensors) -> Tensors:
    return tensors if weights is None else list(many._foreach_mul(weights, _wide(tensors)))


def _ratios(u: Tensors, peak: Any, power: Any) -> Tensors:
    """``(|u| / peak)^power``; where the peak is 0, every u is."""
    ratios = many._foreach_abs(_wide(u))
    many._foreach_div_(ratios, _like(_known(torch.where(peak == 0, torch.ones_like(peak), peak)), ratios))
    return list(many._foreach_pow(ratios, power))


def _perturb_(
    values: Tensors,
    g: Tensors,
    row: Row,
    scale: float | Tensor | Sequence[float | Tensor],
    shape: str,
    q: Any,
    peak: Any,
) -> None:
    """``w += scale * T h(T g)``, with one scale for all or one for each."""
    weights = _metric_weights(values, g, row)
    u = _times(weights, _wide(g))
    if shape == "linear":
        e = u
    else:
        signs = list(many._foreach_sign(u))
        e = signs if shape == "sign" else list(many._foreach_mul(signs, _ratios(u, peak, q - 1)))
    e = _times(weights, e)
    if isinstance(scale, float | Tensor):
        _add_(values, e, scale)
    else:
        many._foreach_add_(values, many._foreach_mul(e, scale))


def _sgd_(w: Tensors, g: Tensors, row: Row, slots: dict[str, list[Any]], members: list[int]) -> None:
    values = _wide(w)
    if row[Column.WEIGHT_DECAY]:
        g = list(many._foreach_add(g, values, alpha=row[Column.WEIGHT_DECAY]))
    momentum = row[Column.MOMENTUM]
    if momentum:
        stored = _pick(slots["momentum_buffer"], members)
        buffers = _wide(stored)
        flags = slots["fresh"] or [False] * len(slots["momentum_buffer"])
        new = [i for i, t in enumerate(members) if flags[t]]
        old = [i for i, t in enumerate(members) if not flags[t]]
        if old:
            many._foreach_mul_(_pick(buffers, old), momentum)
            many._foreach_add_(_pick(buffers, old), _pick(g, old), alpha=1 - row[Column.DAMPENING])
        if new:
            many._foreach_copy_(_pick(buffers, new), _pick(g, new))
        g = list(many._foreach_add(g, buffers, alpha=momentum)) if row[Column.NESTEROV] else buffers
        _store_(stored, buffers)
    many._foreach_add_(values, g, alpha=-row[Column.LR])
    _store_(w, values)


def _adam_(w: Tensors, g: Tensors, row: Row, slots: dict[str, list[Any]], members: list[int]) -> None:
    values, steps = _wide(w), _pick(slots["step"], members)
    stored_means, stored_squares = _pick(slots["exp_avg"], members), _pick(slots["exp_avg_sq"], members)
    means, squares = _wide(stored_means), _wide(stored_squares)
    lr, beta1, beta2, decay = (row[c] for c in (Column.LR, Column.BETA1, Column.BETA2, Column.WEIGHT_DECAY))
    # On the host a Python 1 would be wrapped into a tensor again for every counter.
    many._foreach_add_(steps, torch.tensor(1.0) if steps[0].device.type == "cpu" else 1)
    if decay and row[Column.DECOUPLED]:
        many._foreach_mul_(values, 1 - lr * decay)
    elif decay:
        g = list(many._foreach_add(g, values, alpha=decay))
    many._foreach_lerp_(means, g, 1 - beta1)
    many._foreach_mul_(squares, beta2)
    many._foreach_addcmul_(squares, g, g, 1 - beta2)
    sizes, roots = _bias_corrections(steps, lr, beta1, beta2)
    denominators = list(many._foreach_sqrt(squares))
    many._foreach_div_(denominators, roots)
    many._foreach_add_(denominators, row[Column.ADAM_EPS])
    if isinstance(sizes[0], float):
        many._foreach_addcdiv_(values, means, denominators, sizes)
    else:
        updates = many._foreach_div(means, denominators)
        many._foreach_add_(values, many._foreach_mul(updates, sizes))
    _store_(stored_means, means)
    _store_(stored_squares, squares)
    _store_(w, values)


def _bias_corrections(
    steps: Tensors, lr: float, beta1: float, beta2: float
) -> tuple[Sequence[float | Tensor], Sequence[float | Tensor]]:
    """Per tensor ``-lr / (1 - beta1^step)`` and ``sqrt(1 - beta2^step)``, computed in float64."""
    step = torch.stack(steps).double()
    sizes = -lr / (1 - beta1**step)
    roots = (1 - beta2**step).sqrt()
    return _factors(sizes), _factors(roots)


def _weighted_sum(weights: Sequence[float | Tensor], xs: list[Tensors | None], like: Tensors) -> Tensors:
    """``sum_j weights[j] xs[j]``; a missing list or a zero weight adds nothing, not even a NaN."""
    total: Tensors | None = None
    for a, x in zip(weights, xs, strict=True):
        if x is None or (isinstance(a, float) and a == 0):
            continue
        if isinstance(a, Tensor):
            x = _or_zero(x, a != 0)
        if total is None:
            total = list(many._foreach_mul(x, _like(a, x)))
        else:
            _add_(total, x, a)
    return [torch.zeros_like(out) for out in like] if total is None else total


def _combine_each_(
    outs: list[list[Tensor | None]], lists: list[list[Tensor | None]], coefficients: Tensor
) -> None:
    """The same with coefficients of every tensor's own; nothing waits for them."""
    for t, rows in enumerate(coefficients.unbind()):
        xs = [None if column[t] is None else reference.opmath(column[t]) for column in lists]  # type: ignore[arg-type]
        sums: list[Tensor | None] = []
        for out, row in zip(outs, rows, strict=True):
            if out[t] is None:
                sums.append(None)
                continue
            terms = [
                torch.where(a != 0, a.to(x.dtype) * x, 0)
                for a, x in zip(row, xs, strict=True)
                if x is not None
            ]
            sums.append(sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(out[t]))  # type: ignore[arg-type]
        for out, total in zip(outs, sums, strict=True):
            if total is not None:
                out[t].copy_(total)  # type: ignore[union-attr]


# ---- lists -----------------------------------------------------------------------------------------


def _members(group: TensorGroup, takes_part: Any) -> list[tuple[Row, list[int]]]:
    """Per row of the table that any tensor uses, the row on the host and its tensors that take part."""
    members: dict[int, list[int]] = {}
    for t, r in enumerate(group.row):
        if takes_part(t):
            members.setdefault(r, []).append(t)
    if not members:
        return []
    table = _host_table(group)
    return [(table[r], tensors) for r, tensors in members.items()]


def _host_table(group: TensorGroup) -> list[Row]:
    """The table of scalars as numbers; a group on an accelerator remembers what it wrote there."""
    if group.device.type == "cpu" or group.follows_tensors or not group.rows:
        return group.table.tolist()
    width = group.table.shape[1]
    return [[*values, *[0.0] * (width - len(values))] for values in group.rows]


def _pick(tensors: Sequence[Any], indices: list[int]) -> list[Any]:
    return [tensors[t] for t in indices]


def _pieces(tensor: Tensor, group: TensorGroup) -> Sequence[Tensor]:
    if tensor.numel() <= _PIECE or tensor.device.type != "cpu":
        return (tensor,)  # accelerators reduce blockwise by themselves
    flat = tensor.as_strided((tensor.numel(),), (1,)) if group.dense else tensor.reshape(-1)
    return flat.split(_PIECE)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in memory of their own; torch 2.11 has no _foreach_clone."""
    made = [torch.empty_like(x) for x in tensors]
    many._foreach_copy_(made, tensors)
    return made


def _wide(tensors: Tensors) -> Tensors:
    """The tensors in opmath; half types would otherwise be rounded between any two operators."""
    return list(map(reference.opmath, tensors))


def _store_(stored: Tensors, values: Tensors) -> None:
    """Round the results to where they live, unless that is where they were computed."""
    if stored[0] is not values[0]:
        many._foreach_copy_(stored, values)


# ---- device scalars --------------------------------------------------------------------------------


def _known(x: Tensor) -> Any:
    """A device scalar as a Python number where reading it waits for nothing, otherwise as it is."""
    return x.item() if x.device.type == "cpu" else x


def _factors(x: Tensor, members: list[int] | None = None) -> Sequence[float | Tensor]:
    """One factor per tensor, as numbers where reading them waits for nothing."""
    factors = x.tolist() if x.device.type == "cpu" else list(x.unbind())
    return factors if members is None else _pick(factors, members)


def _like(a: float | Tensor, tensors: Tensors) -> float | Tensor:
    """A scalar in the dtype of the tensors it is about to meet; the fast operators ask for it."""
    return a.to(tensors[0].dtype) if isinstance(a, Tensor) else a


def _add_(xs: Tensors, ys: Tensors, a: float | Tensor) -> None:
    """``xs += a * ys``."""
    if isinstance(a, Tensor):
        many._foreach_add_(xs, many._foreach_mul(ys, _like(a, ys)))
    else:
        many._foreach_add_(xs, ys, alpha=a)


def _is_safe(guard: Tensor | None, found_inf: Tensor | None) -> bool | Tensor:
    """Whether the update may happen: True, False, or a device scalar nobody has looked at."""
    conditions = [] if guard is None else [torch.isfinite(guard)]
    if found_inf is not None:
        conditions.append(found_inf.reshape(()) == 0)
    return _known(torch.stack(conditions).all()) if conditions else True


# note: [choice of bits]
# Where only the device knows whether a step is safe, ``w = safe ? new : old`` has to be arithmetic, and
# floating-point arithmetic cannot do it: 0 * NaN is NaN, and -0.0 + 0.0 changes a bit. On the integers
# that the same bytes spell, multiplying by 0 or 1 and adding is exact for every value.


def _bits(tensors: Tensors) -> Tensors:
    return [x.view(_BITS[x.element_size()]) for x in tensors]


def _or_zero(tensors: Tensors, keep: Tensor) -> Tensors:
    """The tensors where `keep` holds, otherwise zeros, whatever stood there."""
    dtype = tensors[0].dtype
    bits = _bits(tensors)
    return [x.view(dtype) for x in many._foreach_mul(bits, keep.to(bits[0].dtype))]


def _keep_(tensors: Tensors, before: Tensors, keep: Any) -> None:
    """``x = keep ? x : before``, bit for bit."""
    for kind in {x.dtype for x in tensors}:
        members = [i for i, x in enumerate(tensors) if x.dtype == kind]
        bits, old = _bits(_pick(tensors, members)), _bits(_pick(before, members))
        flag = keep.to(bits[0].dtype)
        many._foreach_mul_(bits, flag)
        many._foreach_add_(bits, many._foreach_mul(old, 1 - flag))


def _changing(group: TensorGroup, targets: Sequence[Any], rule: str, slots: dict[str, list[Any]]) -> Tensors:
    """Everything an update writes; what a skipped one must leave, weights already restored."""
    names = ["momentum_buffer"] if rule == "sgd" else ["exp_avg", "exp_avg_sq", "step"]
    moving = [t for t, g in enumerate(group.grads) if g is not None]
    columns = [targets, *(slots[name] for name in names)]
    return [column[t] for column in columns for t in moving if column[t] is not None]


BACKEND = Foreach()
