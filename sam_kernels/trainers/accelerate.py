"""SAM in loops written with Hugging Face accelerate.

A `SAM` goes through ``accelerator.prepare`` as any optimizer does, before or after the model is prepared, and
``optimizer.step(closure)`` on what comes out is a step of SAM (it returns None). Under
``accelerator.accumulate`` it is not: the closure is of the last micro-batch only. `step` takes all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from . import window


def step(
    accelerator: Any,
    optimizer: Any,
    model: Any,
    loss_fn: Callable[[Any], Tensor],
    batches: Sequence[Any],
    *,
    mean: bool = True,
) -> list[Tensor]:
    """Take one SAM step on all micro-batches together, outside of ``accelerator.accumulate``.

    Every gradient of the recipe is of ``sum_i loss_fn(batches[i]) / len(batches)``. Under DDP each is
    averaged over the ranks, which share one perturbation, and only the last micro-batch communicates. fp16
    has been tested with a scaler on the CPU, and not on a GPU.

    Args:
        accelerator: an ``accelerate.Accelerator``; its ``gradient_accumulation_steps`` make no difference.
        optimizer: a `SAM`, as ``accelerator.prepare`` returned it.
        model: the model, likewise.
        loss_fn: computes the loss of a micro-batch with that model; no backward.
        batches: the micro-batches, at least one.
        mean: False leaves out the division, for losses that are normalized over the step already.

    Returns:
        The losses of the first pass, detached and as loss_fn returned them.

    Raises:
        TypeError: if the optimizer is not a `SAM`.
        ValueError: without micro-batches.
        RuntimeError: where ``accelerator.accumulate`` holds the step back; under fp16 for recipes of more
            than two gradients, and those that need more of the first than its direction.

    Example, runnable with accelerate in examples/trainers/accelerate_digits.py::

        model, optimizer = accelerator.prepare(model, SAM(model.parameters(), torch.optim.SGD, lr=0.1))
        losses = step(accelerator, optimizer, model, lambda batch: model(batch).square().mean(), batches)
    """
    inner = window.find(optimizer, "accelerate.step()")
    if not batches:
        raise ValueError("accelerate.step(): there are no batches; expected at least one micro-batch")
    if not accelerator.sync_gradients:
        raise RuntimeError(
            "accelerate.step(): accelerator.accumulate() holds this step back; leave accumulate() out and "
            "give all micro-batches of the step at once"
        )
    # accelerator.backward divides by the first of these.
    factor = accelerator.gradient_accumulation_steps / (len(batches) if mean else 1)
    losses: dict[int, Tensor] = {}

    def closure_of(number: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                loss = loss_fn(batches[number])
                losses.setdefault(number, loss.detach())
                accelerator.backward(loss * factor)
            return loss

        return closure

    parts = [closure_of(number) for number in range(len(batches))]
    if accelerator.scaler is None:
        optimizer.step(parts)
    else:  # which looks at gradients before it calls, and takes no list
        inner.zero_grad()
        with inner.first_pass():
            _call(parts)
        window.ascend(inner, lambda: _call(parts))
        optimizer.step()
    return [losses[number] for number in range(len(batches))]


def _call(parts: Sequence[Callable[[], Any]]) -> None:
    for part in parts:
        part()
