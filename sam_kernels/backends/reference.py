"""Reference backend: the six passes in plain torch, one expression per formula; the oracle of the tests.

Arithmetic happens in opmath (fp32 for half types, otherwise the tensor's own type) and is rounded
once, where a result is stored. Sums are float64. Any floating dtype, any device; it reads scalars on
the host and loops over tensors, so it is for reading and comparing rather than for speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bitmask import flatten, unpack
from ..tensor_groups import ADAPTIVE, FISHER, FIXED, Column, TensorGroup, put_back
from . import torch_random, torch_selection

Row = list[float]  # one row of the table of scalars, indexed by Column

# q and peak below are numbers for norms of order other than 2 and inf, and None for those two.

# ---- formulas, on one tensor; csrc/math has the same names -----------------------------------------


def opmath(x: Tensor) -> Tensor:
    """x in the type arithmetic happens in: fp32 for half types."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def weigh(u: Tensor, d: Tensor, w: Tensor, row: Row) -> Tensor:
    """``T u``, with ``T = |w| + eta`` (adaptive), ``(1 + eta d^2)^(-1/2)`` (Fisher) or 1."""
    if row[Column.METRIC] == ADAPTIVE:
        return (w.abs() + row[Column.ETA]) * u
    if row[Column.METRIC] == FISHER:
        return u / (1 + row[Column.ETA] * d * d).sqrt()
    return u


def ratio(u: Tensor, peak: Tensor) -> Tensor:
    """``|u| / peak``; a peak of zero means that every u is zero."""
    return torch.where(peak == 0, u.abs(), u.abs() / peak)


def square(u: Tensor, q: Any, peak: Any) -> Tensor:
    """``u^2``."""
    return u.square()


def magnitude(u: Tensor, q: Any, peak: Any) -> Tensor:
    """``|u|``, of which the largest is the peak."""
    return u.abs()


def power(u: Tensor, q: Any, peak: Any) -> Tensor:
    """``(|u| / peak)^q``."""
    return ratio(u, peak).pow(q)


def linear(u: Tensor, q: Any, peak: Any) -> Tensor:
    """``h(u) = u``: p = 2."""
    return u


def sign(u: Tensor, q: Any, peak: Any) -> Tensor:
    """``h(u) = sign(u)``: p = inf."""
    return u.sign()


def powered(u: Tensor, q: Any, peak: Any) -> Tensor:
    """``h(u) = sign(u) (|u| / peak)^(q - 1)``: any other p."""
    return u.sign() * ratio(u, peak).pow(q - 1)


MOMENTS = {"square": square, "peak": magnitude, "power": power}
SHAPES = {"linear": linear, "sign": sign, "powered": powered}


def ascent_scale(
    norm: Tensor, row: Row, shape: str, dtype: torch.dtype, factor: Tensor | float = 1.0
) -> Tensor:
    """``rho / (norm + eps) * factor`` in opmath; the sign has its length already: ``rho * factor``.

    A quotient that overflows, as with a zero norm and no eps, counts as 0: zero gradients move nothing.
    """
    length = torch.ones_like(norm) if shape == "sign" else norm + row[Column.EPS]
    scale = (row[Column.RHO] / length * factor).to(dtype)
    return torch.where(torch.isfinite(scale), scale, torch.zeros_like(scale))


def perturb(
    w: Tensor, d: Tensor, scale: Tensor, row: Row, shape: str, q: float | None, peak: Tensor | None
) -> Tensor:
    """``w + scale * T h(T d)``."""
    return w + scale * weigh(SHAPES[shape](weigh(d, d, w, row), q, peak), d, w, row)


def decayed(g: Tensor, w: Tensor, row: Row, weight_decay: float) -> Tensor:
    """``+-g + weight_decay w``."""
    g = -g if row[Column.MAXIMIZE] else g
    return g.add(w, alpha=weight_decay) if weight_decay else g


def sgd(w: Tensor, g: Tensor, buffer: Tensor | None, row: Row, fresh: bool) -> tuple[Tensor, Tensor | None]:
    """``b = momentum b + (1 - dampening) g;  w - lr b``, in the order of torch.optim.SGD."""
    g = decayed(g, w, row, row[Column.WEIGHT_DECAY])
    momentum = row[Column.MOMENTUM]
    if momentum == 0:
        return w.add(g, alpha=-row[Column.LR]), buffer
    if fresh or buffer is None:
        buffer = g
    else:
        buffer = (buffer * momentum).add(g, alpha=1 - row[Column.DAMPENING])
    direction = g.add(buffer, alpha=momentum) if row[Column.NESTEROV] else buffer
    return w.add(direction, alpha=-row[Column.LR]), buffer


def adam(
    w: Tensor, g: Tensor, mean: Tensor, square: Tensor, step: float, row: Row
) -> tuple[Tensor, Tensor, Tensor]:
    """``w - lr m^ / (sqrt(v^) + eps)`` in the order of torch.optim.Adam; decoupled decay makes it AdamW.

    Args:
        step: number of this update, from 1.
    """
    lr, beta1, beta2, decay = (row[c] for c in (Column.LR, Column.BETA1, Column.BETA2, Column.WEIGHT_DECAY))
    g = decayed(g, w, row, 0.0 if row[Column.DECOUPLED] else decay)
    if row[Column.DECOUPLED]:
        w = w * (1 - lr * decay)
    mean = mean.lerp(g, 1 - beta1)
    square = (square * beta2).addcmul(g, g, value=1 - beta2)
    # Bias corrections are Python floats: in fp32, 1 - 0.999^step loses half its digits at step 1.
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = square.sqrt() / correction2**0.5 + row[Column.ADAM_EPS]
    return w.addcdiv(mean, denominator, value=-lr / correction1), mean, square


# ---- passes, over the lists of a group -------------------------------------------------------------


def rows_of(group: TensorGroup) -> list[Row]:
    """Per tensor, its row of the table, on the host."""
    table = group.table.tolist()
    return [table[r] for r in group.row]


def is_unsafe(guard: Tensor | None, found_inf: Tensor | None) -> bool:
    """Whether a step must be skipped: the first gradients or the present ones are not finite."""
    if guard is not None and not bool(torch.isfinite(guard)):
        return True
    return found_inf is not None and bool(found_inf != 0)


def take_root(total: Tensor, root: float) -> Tensor:
    """``total ^ (1 / root)``."""
    if root == 1:
        return total
    return total.sqrt() if root == 2 else total ** (1.0 / root)


def mask_of(group: TensorGroup, t: int) -> Tensor | None:
    """The mask of tensor t as a bool tensor; None where it is dense."""
    words = None if group.masks is None else group.masks[t]
    return None if words is None else unpack(words, group.params[t])


def whole_snapshot(group: TensorGroup, t: int) -> Tensor | None:
    """The weights of tensor t as they were before the perturbation; None where it was not perturbed."""
    snapshot, mask = group.snapshots[t], mask_of(group, t)
    if snapshot is None or mask is None or not group.is_compact(t):
        return snapshot
    whole = torch.empty_like(group.params[t]).copy_(group.params[t])
    put_back(whole, mask, snapshot)
    return whole


def rounded(x: Tensor, group: TensorGroup, t: int) -> Tensor:
    """Perturbed weights of tensor t as they are stored."""
    if group.rounding is None:
        return x.to(group.dtype)
    moved = torch.empty_like(group.params[t])
    torch_random.store_at_random_(moved, x, group.rounding, t)
    return moved


def chosen(u: Tensor, mask: Tensor | None) -> Tensor:
    """The elements under the mask, 0 elsewhere."""
    return u if mask is None else torch.where(mask, u, torch.zeros_like(u))


class Reference:
    """See `sam_kernels.backends.Backend` for the contract of each method."""

    name = "reference"

    def refusal(self, group: TensorGroup) -> str | None:
        if not group.dtype.is_floating_point:
            return f"{group.dtype} has no perturbation; give it floating-point parameters"
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
        parts = torch.zeros(len(group.params), dtype=torch.float64, device=group.device)
        for t, (w, g, row) in enumerate(zip(group.weights, group.grads, rows_of(group), strict=True)):
            if g is None or row[Column.METRIC] == FIXED or w.numel() == 0:
                continue
            w, g = opmath(w), opmath(g)
            u = w if of == "weight" else weigh(g, g, w, row)
            if masked:
                u = chosen(u, mask_of(group, t))
            each = MOMENTS[moment](u.double(), q, peak)
            parts[t] = each.max() if moment == "peak" else each.sum()
        if per_tensor:
            return parts
        return take_root(parts.max() if moment == "peak" else parts.sum(), root)

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
        for t, row in enumerate(rows_of(group)):
            w, g, snapshot = group.params[t], group.grads[t], group.snapshots[t]
            if snapshot is None or g is None:
                continue
            mask, g = mask_of(group, t), g.clone() if g is snapshot else g
            if group.masters is None:
                snapshot.copy_(flatten(w)[flatten(mask)] if group.is_compact(t) else w)  # type: ignore[arg-type]
            if not torch.isfinite(norm):
                continue
            wide = opmath(w) if group.masters is None else snapshot
            scale = ascent_scale(
                norm, row, shape, wide.dtype, 1.0 if tensor_scale is None else tensor_scale[t]
            )
            largest = None if peak is None else peak.to(wide.dtype)
            moved = rounded(perturb(wide, opmath(g), scale, row, shape, q, largest), group, t)
            # A choice, not a product: what is not selected keeps its bits, and 0 times inf is none.
            w.copy_(moved if mask is None else torch.where(mask, moved, w))

    def restore_(self, group: TensorGroup) -> None:
        for t, w in enumerate(group.params):
            snapshot = whole_snapshot(group, t)
            if snapshot is not None:
                w.copy_(snapshot)

    accumulate_squares_ = staticmethod(torch_selection.accumulate_squares_)
    count_ranks = staticmethod(torch_selection.count_ranks)
    mark_ = staticmethod(torch_selection.mark_)
    noise_ = staticmethod(torch_random.noise_)

    def grad_stats(
        self, group: TensorGroup, lists: list[list[Tensor | None]], *, per_tensor: bool = False
    ) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=group.device)
        dots = [
            torch.stack([zero if x is None or y is None else (x.double() * y.double()).sum()
                         for x, y in zip(xs, ys, strict=True)])
            for i, xs in enumerate(lists) for ys in lists[i:]
        ]  # fmt: skip
        each = torch.stack(dots, dim=1)
        return each if per_tensor else each.sum(0)

    def combine_(
        self,
        group: TensorGroup,
        outs: list[list[Tensor | None]],
        lists: list[list[Tensor | None]],
        coefficients: Tensor,
    ) -> None:
        for t in range(len(group.params)):
            xs = [column[t] for column in lists]
            own = coefficients[t] if coefficients.dim() == 3 else coefficients
            # All sums before the first store: an output may be one of the lists.
            sums = [_weighted_sum(weights, xs) for weights in own.tolist()]
            for out, total in zip((column[t] for column in outs), sums, strict=True):
                if out is not None:
                    out.copy_(total)

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
        unsafe = is_unsafe(guard, found_inf)
        for t, row in enumerate(rows_of(group)):
            w, g, snapshot = group.params[t], group.grads[t], whole_snapshot(group, t)
            if g is None or unsafe:
                if snapshot is not None:
                    w.copy_(snapshot)
                continue
            new = descend_one_(w, g, snapshot, row, rule, slots, t, inv_scale)
            if group.masters is not None:
                snapshot.copy_(new)  # type: ignore[union-attr]
            w.copy_(new)


def descend_one_(
    w: Tensor,
    g: Tensor,
    snapshot: Tensor | None,
    row: Row,
    rule: str,
    slots: dict[str, list[Any]],
    t: int,
    inv_scale: Tensor | None,
) -> Tensor:
    """The new weights of tensor t, from its snapshot where there is one; the state is written."""
    start, g = opmath(w if snapshot is None else snapshot), opmath(g)
    if inv_scale is not None:
        g = g * inv_scale.to(g.dtype)
    if rule == "sgd":
        buffer = slots["momentum_buffer"][t]
        fresh = bool(slots["fresh"]) and slots["fresh"][t]
        new, new_buffer = sgd(start, g, None if buffer is None else opmath(buffer), row, fresh)
        if row[Column.MOMENTUM]:
            buffer.copy_(new_buffer)
    else:
        mean, square, step = slots["exp_avg"][t], slots["exp_avg_sq"][t], slots["step"][t]
        step += 1
        new, new_mean, new_square = adam(start, g, opmath(mean), opmath(square), step.item(), row)
        mean.copy_(new_mean)
        square.copy_(new_square)
    return new


def _weighted_sum(weights: list[float], xs: list[Tensor | None]) -> Tensor:
    """``sum_j weights[j] xs[j]``; a missing tensor or a zero weight adds nothing, not even a NaN."""
    terms = [a * opmath(x) for a, x in zip(weights, xs, strict=True) if x is not None and a != 0]
    return sum(terms[1:], start=terms[0]) if terms else torch.zeros(())


BACKEND = Reference()
