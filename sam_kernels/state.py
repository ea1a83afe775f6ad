"""Which base optimizers are fused with the restore, and their state in torch's own layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .sharding import local, wrapped
from .tensor_groups import TensorGroup, has_none, number
from .watch import are_same, has_items, have

# State of the shape of its parameter, and spread over ranks like it; Adam's step is neither.
_LIKE_WEIGHTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")

# Flags under which torch's own step differs from what `descend_` computes.
_UNFUSED_FLAGS = ("amsgrad", "capturable", "differentiable")


def fused_rule(base: Optimizer) -> tuple[str | None, str]:
    """The rule of `descend_` that equals the base optimizer's step, and a sentence about the choice.

    Returns:
        ``("sgd" | "adam", "")``, or ``(None, why the base steps by itself)``.
    """
    kind = type(base)
    name = kind.__name__
    if kind is SGD:
        rule = "sgd"
    elif kind in (Adam, AdamW):
        rule = "adam"
    else:
        return None, f"{name} has no fused update"
    for flag in _UNFUSED_FLAGS:
        flagged = [group for group in base.param_groups if group.get(flag, False)]
        if flag == "capturable":  # on a GPU every fused update can be captured
            flagged = [group for group in flagged if not all(p.is_cuda for p in group["params"])]
        if flagged:
            return None, f"{name}({flag}=True) has no fused update"
    step = base.__dict__.get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        return None, f"the step of this {name} was replaced on the instance"
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return None, f"step hooks are registered on the {name} itself"
    return rule, ""


def scalars(rule: str | None, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
    """The base optimizer's columns of the table (LR ... DECOUPLED) from one param group.

    Tensors on an accelerator, as schedules under CUDA graphs have them, stay tensors.
    """
    if rule is None:
        return ()
    lr, decay, maximize, *own = numbers(rule, group)
    shared = (number(lr), number(decay), float(bool(maximize)))
    if rule == "sgd":
        momentum, dampening, nesterov = own
        return (*shared, number(momentum), number(dampening), float(bool(nesterov)))
    beta1, beta2, eps, decoupled = own
    none_of_sgd = (0.0, 0.0, 0.0)
    return (*shared, *none_of_sgd, number(beta1), number(beta2), number(eps), float(bool(decoupled)))


def numbers(rule: str | None, group: dict[str, Any]) -> tuple[Any, ...]:
    """The options of a param group that its rule reads, as they are there."""
    if rule is None:
        return ()
    shared = (group["lr"], group["weight_decay"], group["maximize"])
    if rule == "sgd":
        return (*shared, group["momentum"], group["dampening"], group["nesterov"])
    return (*shared, *group["betas"], group["eps"], group.get("decoupled_weight_decay"))


def slots(
    base: Optimizer,
    group: TensorGroup,
    rule: str,
    guard: Tensor | None = None,
    counts_on_device: bool = False,
) -> dict[str, list[Any]] | None:
    """The base optimizer's state tensors parallel to ``group.params``, created as torch would.

    Only tensors with a gradient get state, as in `torch.optim`. "fresh" marks momentum buffers that
    were just allocated and still have to take the gradient. What is created here belongs to nobody
    before `adopt`: an update that fails leaves no state behind.

    Args:
        guard: the norm; where it is not finite the step is skipped and must create no state.
        counts_on_device: Adam's step counters must live beside the weights. Otherwise they do where torch
            would put them there (fused or capturable), and on the host where it would not.

    Returns:
        The lists by name, or None when state would have to be created for a step that is skipped.

    Raises:
        ValueError: if state that is there has another shape than its parameter.
    """
    group.cache["created"] = []
    if rule == "sgd":
        return _momentum(base, group, guard)
    return _moments(base, group, guard, counts_on_device)


def adopt(base: Optimizer, group: TensorGroup, slots: dict[str, list[Any]]) -> None:
    """Give the base optimizer the state that `slots` has created; the update it was made for is done."""
    for t in group.cache.pop("created", ()):
        owner = group.owners[t]
        entry = {
            name: wrapped(slots[name][t], owner) if name in _LIKE_WEIGHTS else slots[name][t]
            for name in slots
            if name != "fresh"
        }
        base.state.setdefault(owner, {}).update(entry)


def _is_skipped(guard: Tensor | None) -> bool:
    """Reads the host, so it is asked only when state is about to be created."""
    return guard is not None and not bool(torch.isfinite(guard))


def _momentum(base: Optimizer, group: TensorGroup, guard: Tensor | None) -> dict[str, list[Any]] | None:
    with_momentum = [base.param_groups[key[0]]["momentum"] != 0 for key in group.keys]
    if not any(with_momentum):
        return {"momentum_buffer": [None] * len(group.params), "fresh": []}
    found = _entries(base, group)
    has_all = group.has_all_grads and all(with_momentum)
    held: dict[str, list[Any]] | None = group.cache.get("momentum")
    if held is not None and has_all and _hold(found, held, group.has_dtensors):
        return {**held, "fresh": []}
    buffers = [entry.get("momentum_buffer") for entry in found]
    if group.has_dtensors:
        buffers = list(map(local, buffers))
    fresh: list[bool] = []
    if has_all and not has_none(buffers):
        _fit(base, group, "momentum_buffer", buffers)
        group.cache["momentum"] = {"momentum_buffer": buffers}
        return {"momentum_buffer": buffers, "fresh": fresh}
    wanted = [grad is not None and with_momentum[r] for grad, r in zip(group.grads, group.row, strict=True)]
    buffers = [buffer if want else None for buffer, want in zip(buffers, wanted, strict=True)]
    _fit(base, group, "momentum_buffer", buffers)
    created = [t for t, want in enumerate(wanted) if want and buffers[t] is None]
    if created:
        if _is_skipped(guard):
            return None
        fresh = [False] * len(buffers)
        for t in created:
            fresh[t] = True
            buffers[t] = _empty_like(group.params[t], group.kept_dtype)
    group.cache["created"] = created
    return {"momentum_buffer": buffers, "fresh": fresh}


def _moments(
    base: Optimizer, group: TensorGroup, guard: Tensor | None, counts_on_device: bool
) -> dict[str, list[Any]] | None:
    found = _entries(base, group)
    held: dict[str, list[Any]] | None = group.cache.get("moments")
    if held is not None and group.has_all_grads and _hold(found, held, group.has_dtensors):
        return held
    entries = [
        entry if grad is not None and "step" in entry else _NOTHING
        for entry, grad in zip(found, group.grads, strict=True)
    ]
    for entry in entries:
        if not entry:
            continue
        step = entry["step"]
        if getattr(step, "dtype", None) != torch.float32:
            # A number in old checkpoints, float64 under that default dtype; float32 counts to 16 million.
            step = entry["step"] = torch.tensor(float(step), dtype=torch.float32)
        # Counters of torch's own stay on the host, unless the pass must find them beside the weights.
        if step.device != group.device and (counts_on_device or step.device.type != "cpu"):
            entry["step"] = step.to(group.device)
    moments = {
        name: [local(entry.get(name)) for entry in entries] for name in ("exp_avg", "exp_avg_sq", "step")
    }
    _fit(base, group, "exp_avg", moments["exp_avg"])
    _fit(base, group, "exp_avg_sq", moments["exp_avg_sq"])
    created = [t for t, grad in enumerate(group.grads) if grad is not None and not entries[t]]
    if created and _is_skipped(guard):
        return None
    for t in created:
        flags = base.param_groups[group.keys[group.row[t]][0]]
        beside = counts_on_device or flags.get("fused") or flags.get("capturable")
        device = group.device if beside else torch.device("cpu")
        moments["step"][t] = torch.zeros((), dtype=torch.float32, device=device)
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name][t] = _empty_like(group.params[t], group.kept_dtype).zero_()
    group.cache["created"] = created
    group.cache["moments"] = moments if group.has_all_grads else None
    return moments


def _hold(entries: list[dict[str, Any]], tensors: dict[str, list[Any]], has_dtensors: bool) -> bool:
    """Whether the entries hold these very tensors."""
    if not has_dtensors:
        return all(have(entries, name, tensors[name]) for name in tensors)
    return all(are_same([local(entry.get(name)) for entry in entries], tensors[name]) for name in tensors)


def _entries(base: Optimizer, group: TensorGroup) -> list[dict[str, Any]]:
    """The state dict of each parameter, or an empty one; looked up again only when any was replaced."""
    state = base.state
    known = group.cache.get("state items")
    if known is None or group.cache["state"] is not state or not has_items(state, *known):
        # state.get, not state[...]: a defaultdict would grow entries for parameters without gradients.
        group.cache["state entries"] = [state.get(param, _NOTHING) for param in group.owners]
        group.cache["state items"] = list(state.keys()), list(state.values())
        group.cache["state"] = state
    return group.cache["state entries"]


def _fit(base: Optimizer, group: TensorGroup, name: str, tensors: list[Any]) -> None:
    """Fit state that a checkpoint or a moved model left in other strides, dtype or device, once per set."""
    fitted = group.cache.get(f"fitted {name}")
    if fitted is not None and are_same(fitted, tensors):
        return
    for t, tensor in enumerate(tensors):
        param = group.params[t]
        if tensor is None:
            continue
        if tensor.shape != param.shape:
            raise ValueError(
                f"{name} of parameter {t} has shape {tuple(tensor.shape)}; expected {tuple(param.shape)}. "
                "The state that was loaded belongs to another model"
            )
        if (tensor.stride(), tensor.dtype, tensor.device) == (
            param.stride(),
            group.kept_dtype,
            param.device,
        ):
            continue
        tensors[t] = _empty_like(param, group.kept_dtype).copy_(tensor)
        owner = group.owners[t]
        base.state[owner][name] = wrapped(tensors[t], owner)
    group.cache[f"fitted {name}"] = list(tensors)


def _empty_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(param, dtype=dtype, requires_grad=False)


_NOTHING: dict[str, Any] = {}
