"""Selection of masks in plain torch, tensor by tensor: for the reference and the foreach backend.

Slices keep the scratch memory small: ranks are int64 here, for want of unsigned arithmetic in torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..bitmask import WORD, flatten, pack
from ..ranks import Ranks, rank_scores
from ..tensor_groups import TensorGroup
from .torch_random import random_word

Tensors = list[Tensor | None]

_SLICE = 1 << 20  # elements, a multiple of WORD


def accumulate_squares_(group: TensorGroup, scores: Tensors) -> None:
    """``scores += g^2`` in float32."""
    for g, score in zip(group.grads, scores, strict=True):
        if g is not None and score is not None:
            score.addcmul_(g.float(), g.float())


def count_ranks(
    group: TensorGroup, ranks: Ranks, masks: Tensors, *, prefix: int, shift: int, bits: int
) -> Tensor:
    """How many ranks there are of each value of the `bits` bits above `shift`, below the prefix."""
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=group.device)
    for _, _, rank, part in _slices(group, ranks, masks):
        part = part & (rank >> (shift + bits) == prefix)
        counts += torch.bincount(rank[part] >> shift & (1 << bits) - 1, minlength=1 << bits)
    return counts


def mark_(
    group: TensorGroup,
    ranks: Ranks,
    masks: Tensors,
    *,
    threshold: int,
    shift: int,
    add: bool = False,
    positions: list[int] | None = None,
    candidates: Tensor | None = None,
    found: Tensor | None = None,
) -> None:
    """Set the bits of higher ranks and collect those at the threshold, see `Backend.mark_`."""
    for t, first, rank, part in _slices(group, ranks, masks):
        words = masks[t]
        top = rank >> shift
        new = pack(part & (top > threshold))
        old = words[first // WORD : first // WORD + len(new)]  # type: ignore[index]
        old.copy_(old | new if add else new)
        if candidates is None or found is None or positions is None:
            continue
        chosen = (part & (top == threshold)).nonzero().squeeze(1)
        low = rank[chosen].long() & (1 << shift) - 1
        values = low << 43 | (1 << 43) - 1 - (positions[t] + first + chosen)
        begin = int(found)
        room = max(0, min(len(values), len(candidates) - begin))
        candidates[begin : begin + room] = values[:room]
        found += len(values)


def _slices(group: TensorGroup, ranks: Ranks, masks: Tensors) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Tensor, first element, ranks of the slice and which of it takes part."""
    for t, param in enumerate(group.params):
        if masks[t] is None:
            continue
        n = param.numel()
        scores = None if ranks.scores is None or ranks.scores[t] is None else flatten(ranks.scores[t])  # type: ignore[arg-type]
        for first in range(0, n, _SLICE):
            size = min(_SLICE, n - first)
            if ranks.scores is None:
                element = torch.arange(first, first + size, device=group.device)
                rank = random_word(ranks.seed, ranks.step, ranks.numbers[t], element) >> 1
            elif scores is None:
                rank = torch.zeros(size, dtype=torch.int32, device=group.device)
            else:
                rank = rank_scores(scores[first : first + size])
            yield t, first, rank, _part(ranks, t, first, size, group.device)


def _part(ranks: Ranks, t: int, first: int, size: int, device: torch.device) -> Tensor:
    within = None if ranks.within is None else ranks.within[t]
    if within is None:
        everything = ranks.within is None or not ranks.outside  # a dense tensor has all its bits set
        return torch.full((size,), everything, device=device)
    element = torch.arange(first, first + size, device=device)
    bit = within[element // WORD] >> (element % WORD) & 1
    return (bit == 0) if ranks.outside else (bit == 1)
