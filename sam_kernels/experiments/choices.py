"""Values the documents do not give, chosen without a look at the test set.

The rule, the same in every group: train on four fifths of the training samples with the seeds 1000, 1001 and
1002, which no trial uses, and take the candidate with the lowest mean loss on the remaining fifth. What was
chosen stands in the group's file; its `choose` runs it again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from .data import Split
from .training import train

SEEDS = (1000, 1001, 1002)
Key = TypeVar("Key")


def held_out(split: Split, share: float = 0.2) -> Split:
    """The training samples alone: the last `share` of them take the place of the test samples.

    Example:
        >>> import torch
        >>> x, y = torch.rand(10, 2), torch.arange(10) % 2
        >>> part = held_out(Split(x, y, x, y, 2, "tiny"))
        >>> len(part.x), len(part.x_test), torch.equal(part.x_test, x[8:])
        (8, 2, True)
    """
    cut = round(len(split.x) * (1 - share))
    seen, unseen = (split.x[:cut], split.y[:cut]), (split.x[cut:], split.y[cut:])
    return replace(split, x=seen[0], y=seen[1], x_test=unseen[0], y_test=unseen[1])


def compare(
    split: Split, build: Callable[[], nn.Module], candidates: Mapping[Key, Mapping[str, Any]]
) -> dict[Key, float]:
    """The mean held-out loss of each candidate, lowest first; infinite where a run diverged.

    Args:
        split: its test samples are not looked at.
        build: of the network.
        candidates: keywords of `train`, recipe included, under a name for each.
    """
    part = held_out(split)
    found = {}
    for key, keywords in candidates.items():
        runs = [train(build, part, seed=seed, **keywords) for seed in SEEDS]
        is_lost = any(run.diverged for run in runs)
        found[key] = math.inf if is_lost else statistics.fmean(run.test.loss for run in runs)
    return dict(sorted(found.items(), key=lambda item: item[1]))
