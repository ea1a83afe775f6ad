"""What the trainers share: the optimizer inside its wrappers, and gradients that wait for others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..compat import davda54
from ..optimizer import SAM

Held = list[tuple[Tensor, Tensor | None]]


def find(optimizer: Any, who: str) -> SAM:
    """The SAM inside what a trainer calls its optimizer.

    Args:
        optimizer: a `SAM`, or a wrapper that has one as its attribute ``optimizer``.
        who: what begins the sentences.

    Raises:
        TypeError: if there is none, or one that calls its closure for the second pass only.

    Example:
        >>> import torch
        >>> from sam_kernels import SAM
        >>> opt = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
        >>> find(opt, "example") is opt
        True
    """
    inner = optimizer
    while not isinstance(inner, SAM):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"{who}: the optimizer is {type(optimizer).__name__}; expected sam_kernels.SAM, or "
                "SAM.wrap() around the optimizer there is"
            )
    if isinstance(inner, davda54.SAM):
        raise TypeError(
            f"{who}: {type(inner).__module__}.SAM calls its closure once and expects the first gradient from "
            "the caller, and trainers do not; use sam_kernels.SAM"
        )
    return inner


def is_perturbed(optimizer: SAM) -> bool:
    """Whether the weights are at ``w + e`` now.

    Example:
        >>> import torch
        >>> from sam_kernels import SAM
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = SAM([w], torch.optim.SGD, lr=0.1)
        >>> w.sum().backward()
        >>> with opt.perturbed():
        ...     is_perturbed(opt)
        True
    """
    return bool(optimizer._perturbed_groups())


def take_gradients(optimizer: SAM) -> Held:
    """The present gradients, which are the parameters' no longer.

    Example:
        >>> import torch
        >>> from sam_kernels import SAM
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = SAM([w], torch.optim.SGD, lr=0.1)
        >>> w.sum().backward()
        >>> held = take_gradients(opt)
        >>> w.grad is None
        True
        >>> give_gradients(held)
        >>> w.grad
        tensor([1., 1.])
    """
    held = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            held.append((param, param.grad))
            param.grad = None
    return held


def give_gradients(held: Held) -> None:
    """Put back what `take_gradients` took; the next backward adds to it."""
    for param, grad in held:
        param.grad = grad


def restore(optimizer: SAM) -> None:
    """Weights back to ``w`` where the update is somebody else's; the step is over, and counts.

    Example:
        >>> import torch
        >>> from sam_kernels import SAM
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = SAM([w], torch.optim.SGD, lr=0.1)
        >>> w.sum().backward()
        >>> opt.first_step()
        >>> restore(opt)
        >>> w.data
        tensor([1., 1.])
    """
    try:
        optimizer._revalidate()
        optimizer._restore()
    except BaseException:
        optimizer._abandon()
        raise
    optimizer._complete()
