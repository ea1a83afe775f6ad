"""The passes by themselves, as functions over tensor lists and as operators of torch.

``sam_kernels.ops.perturb_(...)`` chooses a backend and runs; ``torch.ops.sam_kernels.perturb_`` is
the same behind a schema, for `torch.compile` and `torch.library.opcheck`. The optimizer keeps its
lists between steps; it takes from here only the choice of a backend.

Lists are parallel: element t of each belongs to parameter t and shares its shape, dtype and device;
all tensors of a call share one device and dtype. Scalars that passes hand to each other (sums, norms)
are 0-d float64 tensors on that device, so that nothing is read back to the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import Backend, Report, check_wish, resolve
from .backends.reference import take_root as take_root
from .bitmask import count_words, is_dense
from .ranks import Ranks
from .selection import Block, Part, select
from .tensor_groups import ADAPTIVE, EUCLIDEAN, TensorGroup, is_capturing

Masks = Sequence[Tensor | None] | None


def sq_norm(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] = (),
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    masks: Masks = None,
    backend: str = "auto",
) -> Tensor:
    """Sum of squares ``sum (T g)^2`` over a list, deterministic; ``T = |w| + eta`` if adaptive, else 1.

    Args:
        grads: gradients of one device and dtype.
        params: the weights, needed only if adaptive.
        adaptive, eta: the metric.
        masks: words of `sam_kernels.bitmask.pack`, None where a tensor is dense; only selected elements
            count.
        backend: "auto" or a backend's name.

    Returns:
        0-d float64; not finite if any gradient is not.

    Raises:
        ValueError: if the lists do not fit each other.

    Example:
        >>> sq_norm([torch.tensor([3.0, 4.0])]).item()
        25.0
    """
    weights = list(params) if params else list(grads)
    if adaptive and not params:
        raise ValueError("sq_norm: adaptive=True needs params, whose sizes T = |w| + eta takes")
    group = _group("sq_norm", weights, {"grads": grads}, adaptive=adaptive, eta=eta)
    group.grads = list(grads)
    group.masks = _masks("sq_norm", masks, group)
    return resolve(group, backend)[0].sq_norm(group, masked=masks is not None)


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    snapshots: Sequence[Tensor],
    norm: Tensor,
    *,
    rho: float = 0.05,
    eps: float = 1e-12,
    adaptive: bool = False,
    eta: float = 0.0,
    masks: Masks = None,
    backend: str = "auto",
) -> None:
    """``snapshot = w; w += rho / (norm + eps) * T^2 g``, one read and one write of each list.

    Args:
        params: weights, written.
        grads: gradients.
        snapshots: buffers, written with the weights as they were.
        norm: 0-d float64, e.g. ``sq_norm(...).sqrt()``; if it is not finite the weights keep their bits.
        rho, eps: radius and the number added to the norm.
        adaptive, eta: the metric.
        masks: words of `sam_kernels.bitmask.pack`, None where a tensor is dense: elements that are not
            selected keep their bits. Where 64 of them share a word that is 0, their snapshot is not written.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: if the lists do not fit each other.

    Example:
        >>> w, g = [torch.zeros(2)], [torch.tensor([3.0, 4.0])]
        >>> perturb_(w, g, [torch.empty(2)], sq_norm(g).sqrt(), rho=0.5)
        >>> w[0]
        tensor([0.3000, 0.4000])
    """
    group = _group(
        "perturb_",
        params,
        {"grads": grads, "snapshots": snapshots},
        adaptive=adaptive,
        eta=eta,
        rho=rho,
        eps=eps,
    )
    group.grads, group.snapshots = list(grads), list(snapshots)
    group.masks = _masks("perturb_", masks, group)
    resolve(group, backend)[0].perturb_(group, _scalar("perturb_", "norm", norm, group))


def restore_(
    params: Sequence[Tensor], snapshots: Sequence[Tensor], *, masks: Masks = None, backend: str = "auto"
) -> None:
    """``w = snapshot``, bit for bit.

    Args:
        params: weights, written.
        snapshots: what `perturb_` wrote.
        masks: those of `perturb_`.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: if the lists do not fit each other.

    Example:
        >>> w = [torch.ones(2)]
        >>> restore_(w, [torch.zeros(2)])
        >>> w[0]
        tensor([0., 0.])
    """
    group = _group("restore_", params, {"snapshots": snapshots}, reads_table=False)
    group.snapshots = list(snapshots)
    group.masks = _masks("restore_", masks, group)
    resolve(group, backend)[0].restore_(group)


def grad_stats(
    lists: Sequence[Sequence[Tensor]], *, per_tensor: bool = False, backend: str = "auto"
) -> Tensor:
    """All dots of up to three lists in one read.

    Args:
        lists: one to three parallel lists.
        per_tensor: dots of every tensor by itself.
        backend: "auto" or a backend's name.

    Returns:
        float64 [k (k + 1) / 2]: the upper triangle row by row (00 01 02 11 12 22); with `per_tensor` a row
        for every tensor.

    Raises:
        ValueError: if there are no or more than three lists, or they do not fit each other.

    Example:
        >>> grad_stats([[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])]])
        tensor([5., 3., 9.], dtype=torch.float64)
    """
    _check_count("grad_stats", "lists", lists, 3)
    named = {f"lists[{i}]": item for i, item in enumerate(lists)}
    group = _group("grad_stats", lists[0], named, reads_table=False)
    chosen = resolve(group, backend)[0]
    return chosen.grad_stats(group, [list(item) for item in lists], per_tensor=per_tensor)


def combine_(
    outs: Sequence[Sequence[Tensor]],
    lists: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """``outs[i] = sum_j coefficients[i, j] * lists[j]``.

    Args:
        outs: one or two lists, written; each may be one of the inputs.
        lists: one to three parallel lists.
        coefficients: float64 [len(outs), len(lists)] on the same device, or [tensors, len(outs), len(lists)]
            for every tensor by itself; a 0 never reads its list.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: if the lists or the coefficients do not fit.

    Example:
        >>> a, b = [torch.tensor([1.0])], [torch.tensor([10.0])]
        >>> combine_([a], [a, b], torch.tensor([[2.0, 0.5]], dtype=torch.float64))
        >>> a[0]
        tensor([7.])
    """
    _check_count("combine_", "lists", lists, 3)
    _check_count("combine_", "outs", outs, 2)
    named = {f"lists[{i}]": item for i, item in enumerate(lists)}
    named |= {f"outs[{i}]": item for i, item in enumerate(outs)}
    group = _group("combine_", lists[0], named, reads_table=False)
    expected = (len(outs), len(lists))
    shapes = (expected, (len(group.params), *expected))
    if tuple(coefficients.shape) not in shapes or coefficients.dtype != torch.float64:
        raise ValueError(
            f"combine_: coefficients is {coefficients.dtype} {tuple(coefficients.shape)}; "
            f"expected torch.float64 {expected}, one row per output, or a block of them for every tensor"
        )
    resolve(group, backend)[0].combine_(
        group, [list(item) for item in outs], [list(item) for item in lists], coefficients.to(group.device)
    )


def noise_(outs: Sequence[Tensor], seed: int, step: int = 0, *, backend: str = "auto") -> None:
    """``out ~ N(0, 1)``: the same bits for the same seed, step, place in the list and element, on any device.

    Args:
        outs: floating-point tensors of one device and dtype, written; drawn in float32, then rounded.
        seed: from 0 to 2^63 - 1.
        step: from 0 to 2^32 - 1; a number of its own for each draw.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: if the list is empty, or a number is out of its range.

    Example:
        >>> a, b = torch.empty(3), torch.empty(3)
        >>> noise_([a], seed=1)
        >>> noise_([b], seed=1)
        >>> torch.equal(a, b)
        True

    Source: Salmon et al., SC 2011 (Philox4x32-10); Box and Muller 1958.
    """
    if not (0 <= seed < 1 << 63 and 0 <= step < 1 << 32):
        raise ValueError(
            f"noise_: seed is {seed!r} and step {step!r}; expected seed from 0 to 2^63 - 1 and step from 0 "
            "to 2^32 - 1"
        )
    group = _group("noise_", outs, {}, reads_table=False)
    resolve(group, backend)[0].noise_(group, list(outs), seed, step, list(range(len(group.params))))


def descend_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    snapshots: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    masks: Masks = None,
    backend: str = "auto",
) -> None:
    """`torch.optim.SGD`'s update that reads the snapshot in place of the weight and writes it once.

    Args:
        params: weights, written.
        grads: gradients at the perturbed weights.
        snapshots: what `perturb_` wrote, or an empty list to read the weights themselves.
        momentum_buffers: written; an empty list if momentum is 0.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.
        masks: those of `perturb_`.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: if the lists do not fit each other.

    Example:
        >>> w = [torch.tensor([5.0])]
        >>> descend_sgd_(w, [torch.tensor([1.0])], [torch.tensor([2.0])], [], lr=0.5)
        >>> w[0]
        tensor([1.5000])
    """
    scalars = (lr, weight_decay, float(maximize), momentum, dampening, float(nesterov))
    named = {"grads": grads, "snapshots": snapshots, "momentum_buffers": momentum_buffers}
    if momentum != 0 and not momentum_buffers:
        raise ValueError(
            f"descend_sgd_: momentum is {momentum}; expected momentum_buffers for every parameter"
        )
    group = _group("descend_sgd_", params, named, base=scalars)
    count = len(group.params)
    group.grads = list(grads)
    group.snapshots = list(snapshots) or _missing(count)
    group.masks = _masks("descend_sgd_", masks, group)
    slots = {"momentum_buffer": list(momentum_buffers) or _missing(count), "fresh": []}
    resolve(group, backend)[0].descend_(group, "sgd", slots)


def descend_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    snapshots: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    masks: Masks = None,
    backend: str = "auto",
) -> None:
    """`torch.optim.Adam`'s (decoupled: AdamW's) update from the snapshot, moments and steps included.

    Args:
        params: weights, written.
        grads: gradients at the perturbed weights.
        snapshots: what `perturb_` wrote, or an empty list to read the weights themselves.
        exp_avgs, exp_avg_sqs: moments, written.
        steps: 0-d float32 counters, advanced by one.
        lr, beta1, beta2, eps, weight_decay, maximize: as in `torch.optim.Adam`.
        decoupled: True for AdamW's weight decay.
        masks: those of `perturb_`.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: if the lists do not fit each other.

    Example:
        >>> w, zero = [torch.tensor([5.0])], torch.zeros(1)
        >>> step = torch.tensor(0.0)
        >>> descend_adam_(w, [torch.ones(1)], [], [zero.clone()], [zero.clone()], [step], lr=0.1)
        >>> w[0], step
        (tensor([4.9000]), tensor(1.))
    """
    scalars = (lr, weight_decay, float(maximize), 0.0, 0.0, 0.0, beta1, beta2, eps, float(decoupled))
    named = {"grads": grads, "snapshots": snapshots, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    group = _group("descend_adam_", params, named, base=scalars)
    for t, step in enumerate(steps):
        if step.dtype != torch.float32 or step.dim() != 0:
            raise ValueError(
                f"descend_adam_: steps[{t}] is {step.dtype} {tuple(step.shape)}; expected 0-d float32"
            )
    lengths = {"exp_avgs": len(exp_avgs), "exp_avg_sqs": len(exp_avg_sqs), "steps": len(steps)}
    for name, length in lengths.items():
        if length != len(group.params):
            raise ValueError(f"descend_adam_: {name} has {length} tensors; expected {len(group.params)}")
    group.grads = list(grads)
    group.snapshots = list(snapshots) or _missing(len(group.params))
    group.masks = _masks("descend_adam_", masks, group)
    slots = {"exp_avg": list(exp_avgs), "exp_avg_sq": list(exp_avg_sqs), "step": list(steps)}
    chosen = resolve(group, backend)[0]
    counts_on_device = getattr(chosen, "counts_on_device", lambda group: False)(group)
    for t, step in enumerate(steps):
        if step.device != group.device and (counts_on_device or step.device.type != "cpu"):
            raise ValueError(
                f"descend_adam_: steps[{t}] is on {step.device}; backend {chosen.name!r} expects it on "
                f"{group.device}, beside the weights"
            )
    chosen.descend_(group, "adam", slots)


def _group(
    owner: str,
    params: Sequence[Tensor],
    lists: dict[str, Sequence[Tensor]],
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    rho: float = 0.0,
    eps: float = 0.0,
    base: tuple[float, ...] = (),
    reads_table: bool = True,
) -> TensorGroup:
    """A tensor group for one call, after checking that the lists fit each other."""
    params = list(params)
    if not params:
        raise ValueError(f"{owner}: the list of tensors is empty; expected at least one tensor")
    if not all(math.isfinite(value) for value in (eta, rho, eps, *base)):
        raise ValueError(f"{owner}: a scalar is not finite: {(eta, rho, eps, *base)}")
    first = params[0]
    for name, tensors in {"params": params, **lists}.items():
        if not tensors and name in ("snapshots", "momentum_buffers"):
            continue
        if len(tensors) != len(params):
            raise ValueError(f"{owner}: {name} has {len(tensors)} tensors; expected {len(params)}")
        for t, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            for what, got, expected in (
                ("dtype", tensor.dtype, first.dtype),
                ("device", tensor.device, first.device),
                ("shape", tuple(tensor.shape), tuple(param.shape)),
                ("strides", tensor.stride(), param.stride()),
            ):
                if got != expected:
                    raise ValueError(f"{owner}: {name}[{t}] has {what} {got}; expected {expected}")
    metric = ADAPTIVE if adaptive else EUCLIDEAN
    dense = all(map(is_dense, params))
    group = TensorGroup(params, [0] * len(params), [(0, metric, eta)], dense=dense)
    row = (float(metric), eta, rho, eps, *base)
    if not reads_table:
        return group
    if is_capturing(group.device):
        group.fill_table(row)  # the numbers of this call belong to what is recorded
    else:
        group.write_table([row])
    return group


def top_masks(
    scores: Sequence[Tensor], keep: int, *, exact: bool = False, backend: str = "auto"
) -> list[Tensor]:
    """The masks of the `keep` largest of all scores of a list together, by size; exact, without sorting.

    Every score as large as the smallest one kept is kept too, so ties may make the masks larger. Scores are
    compared as float32, and NaN is larger than infinity.

    Args:
        scores: floating-point tensors of one device and dtype.
        keep: how many.
        exact: keep no more; of equal scores those that come first in the list and in memory.
        backend: "auto" or a backend's name.

    Returns:
        int64 words by tensor, see `sam_kernels.bitmask`.

    Raises:
        ValueError: if the list is empty or its tensors differ in device or dtype.

    Example:
        >>> from sam_kernels.bitmask import unpack
        >>> scores = [torch.tensor([0.1, 0.4]), torch.tensor([0.3])]
        >>> [unpack(words, score) for words, score in zip(top_masks(scores, 2), scores)]
        [tensor([False,  True]), tensor([True])]
    """
    group = _group("top_masks", scores, {}, reads_table=False)
    block = Block([x.numel() for x in scores], group.device)
    chosen = resolve(group, backend)[0]
    select([Part(group, chosen, Ranks(list(scores)), block, [True] * len(block.views))], keep, exact=exact)
    return block.views


def _masks(owner: str, masks: Masks, group: TensorGroup) -> list[Tensor | None] | None:
    if masks is None:
        return None
    if len(masks) != len(group.params):
        raise ValueError(f"{owner}: masks has {len(masks)} entries; expected {len(group.params)}")
    for t, (words, param) in enumerate(zip(masks, group.params, strict=True)):
        expected = (torch.int64, (count_words(param.numel()),), param.device)
        if words is not None and (words.dtype, tuple(words.shape), words.device) != expected:
            raise ValueError(
                f"{owner}: masks[{t}] is {words.dtype} {tuple(words.shape)} on {words.device}; expected "
                f"{expected[0]} {expected[1]} on {expected[2]}, as sam_kernels.bitmask.pack makes it"
            )
    return list(masks)


def _missing(count: int) -> list[Tensor | None]:
    return [None] * count


def _check_count(owner: str, name: str, lists: Sequence[Sequence[Tensor]], most: int) -> None:
    if not 1 <= len(lists) <= most:
        raise ValueError(f"{owner}: {len(lists)} {name} were given; expected 1 to {most}")


def _scalar(owner: str, name: str, value: Tensor, group: TensorGroup) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"{owner}: {name} has shape {tuple(value.shape)}; expected a single number")
    return value.detach().reshape(()).to(device=group.device, dtype=torch.float64)


# ---- operators of torch ------------------------------------------------------------------------
# note: [schemas in Python]
# They need no compiled module, so a build without a compiler is complete, and every backend is
# reachable through them. The functions above choose the backend.

__all__ = [
    "Backend",
    "Report",
    "check_wish",
    "combine_",
    "descend_adam_",
    "descend_sgd_",
    "grad_stats",
    "noise_",
    "perturb_",
    "resolve",
    "restore_",
    "sq_norm",
    "top_masks",
]

_library = torch.library.Library("sam_kernels", "DEF")

_SCHEMAS = {
    "sq_norm": "(Tensor[] grads, Tensor[] params, bool adaptive=False, float eta=0.0) -> Tensor",
    "perturb_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] snapshots, Tensor norm, float rho, "
        "float eps=1e-12, bool adaptive=False, float eta=0.0) -> ()"
    ),
    "restore_": "(Tensor(a!)[] params, Tensor[] snapshots) -> ()",
    "grad_stats": "(Tensor[] a, Tensor[] b, Tensor[] c) -> Tensor",
    "combine_": "(Tensor(a!)[] out, Tensor[] a, Tensor[] b, Tensor[] c, Tensor coefficients) -> ()",
    "noise_": "(Tensor(a!)[] outs, int seed, int step=0) -> ()",
    "descend_sgd_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor[] snapshots, Tensor(b!)[] momentum_buffers, float lr, "
        "float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool nesterov=False, "
        "bool maximize=False) -> ()"
    ),
    "descend_adam_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor[] snapshots, Tensor(b!)[] exp_avgs, "
        "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, float lr, float beta1=0.9, float beta2=0.999, "
        "float eps=1e-8, float weight_decay=0.0, bool decoupled=False, bool maximize=False) -> ()"
    ),
}


def _run_sq_norm(grads, params, adaptive=False, eta=0.0):  # type: ignore[no-untyped-def]
    return sq_norm(grads, params, adaptive=adaptive, eta=eta)


def _run_perturb_(params, grads, snapshots, norm, rho, eps=1e-12, adaptive=False, eta=0.0):  # type: ignore[no-untyped-def]
    perturb_(params, grads, snapshots, norm, rho=rho, eps=eps, adaptive=adaptive, eta=eta)


def _run_restore_(params, snapshots):  # type: ignore[no-untyped-def]
    restore_(params, snapshots)


def _run_grad_stats(a, b, c):  # type: ignore[no-untyped-def]
    return grad_stats([item for item in (a, b, c) if item])


def _run_combine_(out, a, b, c, coefficients):  # type: ignore[no-untyped-def]
    combine_([out], [item for item in (a, b, c) if item], coefficients)


def _run_noise_(outs, seed, step=0):  # type: ignore[no-untyped-def]
    noise_(outs, seed, step)


def _run_descend_sgd_(params, grads, snapshots, momentum_buffers, lr, *rest):  # type: ignore[no-untyped-def]
    names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    descend_sgd_(params, grads, snapshots, momentum_buffers, lr=lr, **dict(zip(names, rest, strict=False)))


def _run_descend_adam_(params, grads, snapshots, exp_avgs, exp_avg_sqs, steps, lr, *rest):  # type: ignore[no-untyped-def]
    names = ("beta1", "beta2", "eps", "weight_decay", "decoupled", "maximize")
    options = dict(zip(names, rest, strict=False))
    descend_adam_(params, grads, snapshots, exp_avgs, exp_avg_sqs, steps, lr=lr, **options)


for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, globals()[f"_run_{_name}"], "CompositeExplicitAutograd")


@torch.library.register_fake("sam_kernels::sq_norm", lib=_library)
def _fake_sq_norm(grads, params, adaptive=False, eta=0.0):  # type: ignore[no-untyped-def]
    return grads[0].new_empty((), dtype=torch.float64)


@torch.library.register_fake("sam_kernels::grad_stats", lib=_library)
def _fake_grad_stats(a, b, c):  # type: ignore[no-untyped-def]
    lists = sum(1 for item in (a, b, c) if item)
    return a[0].new_empty(lists * (lists + 1) // 2, dtype=torch.float64)


def _fake_mutation(*args, **kwargs):  # type: ignore[no-untyped-def]
    """Passes that write in place return nothing, so there is nothing to shape."""


for _name in _SCHEMAS:
    if _name.endswith("_"):
        torch.library.register_fake(f"sam_kernels::{_name}", _fake_mutation, lib=_library)
