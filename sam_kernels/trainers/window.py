"""What the trainers share: the optimizer inside its wrappers, and gradients that wait for others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..compat import davda54
from ..optimizer import SAM
from ..running_stats import frozen

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


def ascend(optimizer: SAM, again: Callable[[], None]) -> None:
    """After the first gradient: go to ``w + e`` and leave the gradient there, for a ``step()`` to come.

    Args:
        optimizer: the parameters have the first gradient of the whole batch.
        again: evaluates it once more; not called where this step does not perturb. If it raises, the weights
            are restored.

    Raises:
        RuntimeError: for recipes that `SAM.first_step` refuses.

    Example:
        >>> import torch
        >>> from sam_kernels import SAM
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
        >>> ((w**2).sum() / 2).backward()
        >>> ascend(opt, lambda: ((w**2).sum() / 2).backward())
        >>> w.grad
        tensor([3.3000, 4.4000])
        >>> opt.step()
        >>> w.data
        tensor([2.6700, 3.5600])
    """
    # Where the ascent may be left out, the gradients there are have to stay.
    may_stay = not optimizer.is_due or optimizer.recipe.cadence.needs_norm
    optimizer.first_step(zero_grad=not may_stay)
    if not is_perturbed(optimizer):
        return
    try:
        if may_stay:
            optimizer.zero_grad()
        with nullcontext() if optimizer.model is None else frozen(optimizer.model), torch.enable_grad():
            again()
    except BaseException:
        optimizer._abandon()
        raise


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
