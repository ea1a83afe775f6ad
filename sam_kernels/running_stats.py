"""Running statistics of normalization layers: keep what the first pass of a step made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_MARKS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"

Slot = tuple[nn.Module, str, Tensor]
"""A buffer and the place it is registered: module, name, tensor."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of `model` as they are; forward passes inside behave as ever.

    ``running_* , num_batches_tracked`` at the end of the block = at its beginning, bit for bit, also
    when the block raises. Layers in training mode still normalize with the statistics of their batch.
    The buffers are saved and copied back, so the tensors keep their identity and address, momentum of
    any kind (also None) is served, and a batch that is not finite leaves nothing behind. Blocks nest,
    also over models that share layers. The copies cost two numbers per channel.

    A layer is any module with a buffer called "running_mean" or "running_var", whatever its class:
    BatchNorm, SyncBatchNorm, InstanceNorm with tracking, your own. A lazy layer that has no shape yet
    is passed over: the block may be its first forward pass, and it keeps what that brings.

    Args:
        model: the module whose layers are kept.

    Raises:
        TypeError: if model is not a module.

    Example:
        >>> import torch
        >>> from sam_kernels import running_stats
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> with running_stats.frozen(model):
        ...     out = model(torch.randn(8, 2))
        >>> model[1].running_mean.tolist(), model[1].num_batches_tracked.item()
        ([0.0, 0.0, 0.0], 0)

    Source: the code of Foret et al., ICLR 2021, keeps the statistics of the first pass, those at the
    weights themselves. Setting momentum to 0 in the second pass, as is often done, lets
    ``num_batches_tracked`` run on and turns statistics into NaN where a batch is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"frozen: model is {type(model).__name__}; expected the torch.nn.Module being trained"
        )
    slots = list(_statistics(model))
    saved = [torch.empty_like(buffer) for _, _, buffer in slots]
    _copy(saved, [buffer for _, _, buffer in slots])
    try:
        yield
    finally:
        for module, name, buffer in slots:
            module._buffers[name] = buffer  # a class of your own may have bound a new tensor
        _copy([buffer for _, _, buffer in slots], saved)


def _statistics(model: nn.Module) -> Iterator[Slot]:
    for module in model.modules():
        buffers = module._buffers
        if not any(buffers.get(mark) is not None for mark in _MARKS):
            continue
        if any(buffer is not None and is_lazy(buffer) for buffer in buffers.values()):
            continue
        for name, buffer in buffers.items():
            if buffer is not None and (name.startswith("running_") or name == _COUNTER):
                yield module, name, buffer


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy list to list, one call per device and dtype, leaving version counters alone.

    Autograd keeps running statistics for a batch norm's backward, and in training mode never reads
    them; torch's own update therefore does not count as a change. Were ours to count, a backward pass
    after the block would be refused.
    """
    lists: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        ours = lists.setdefault((target.device, target.dtype), ([], []))
        ours[0].append(target.data)
        ours[1].append(source)
    for into, of in lists.values():
        torch._foreach_copy_(into, of)
