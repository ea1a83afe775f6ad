"""Gradual self-training: a model follows moving data by its own labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .data.shifts import Shift
from .data.split import Split
from .training import Trained

DROPPED = 0.1  # the share that labels itself least surely, as in the out-of-distribution study


def adapt(
    model: nn.Module, shift: Shift, count: int, learn: Callable[[nn.Module, Split], Trained]
) -> Trained:
    """Train on domain after domain of the way, on labels that the model itself gave just before.

    Args:
        model: trained on the source; goes on from where it is.
        shift: its way is followed and its target measured.
        count: of domains.
        learn: trains a model on a split.

    Returns:
        The last training, which ends early if one diverges.

    Source: Kumar, Ma, Liang, "Understanding Self-Training for Gradual Domain Adaptation", ICML 2020, arXiv
    2002.11361.
    """
    for x in shift.domains(count):
        kept, labels = self_labelled(model, x)
        found = learn(model, replace(shift.split(), x=x[kept], y=labels))
        if found.diverged:
            break
    return found


def self_labelled(model: nn.Module, x: Tensor, dropped: float = DROPPED) -> tuple[Tensor, Tensor]:
    """The samples a model is surest of, in their order, and what it takes them for.

    Args:
        model: used in evaluation mode, and left in the mode it was in.
        x: samples [n, ...].
        dropped: the share left out, those with the smallest of the largest softmax values.

    Returns:
        Indices into x and labels, ``n - floor(dropped n)`` of each.

    Example:
        >>> x = torch.tensor([[0.0, 4.0], [0.1, 0.0], [3.0, 0.0]])
        >>> self_labelled(nn.Identity(), x, dropped=0.4)
        (tensor([0, 2]), tensor([1, 0]))
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            sure, labels = torch.cat([model(part) for part in x.split(1000)]).softmax(1).max(1)
    finally:
        model.train(was_training)
    kept = sure.argsort(descending=True, stable=True)[: len(x) - int(dropped * len(x))].sort().values
    return kept, labels[kept]
