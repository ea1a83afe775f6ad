"""Selection of masks over a whole tensor list: exact, without sorting, the same bits from every backend.

Scores are ranked by their bit patterns (`sam_kernels.ranks`). Counting the highest 11 bits of all ranks says
in which of 2048 bins the last selected one lies; whatever is above is selected and whatever is below is not,
and what is in that bin is collected and settled by itself. Where that bin is too full to collect, the next
bits are counted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .backends import Backend
from .bitmask import WORD, count_words, flatten, pack
from .ranks import RANK_BITS, Ranks, rank_scores
from .tensor_groups import TensorGroup

# Shift and number of the bits that are counted at a time; together all of a rank.
_LEVELS = ((20, 11), (9, 11), (0, 9))

# Candidates are settled by themselves where they are at most this share of the elements, or so few. One takes
# torch about a hundred times as long as an element takes to be counted, and three times eight bytes.
_SHARE, _FEW = 512, 4096

_POSITION_BITS = 43


class Block:
    """The words of a tensor list in one piece of memory, and a view of each tensor's.

    Args:
        numels: elements of each tensor.
        device: of the words.
    """

    def __init__(self, numels: Sequence[int], device: torch.device) -> None:
        self.starts = [0, *accumulate(map(count_words, numels))]
        self.words = torch.zeros(self.starts[-1], dtype=torch.int64, device=device)
        self.views = [self.words[a:b] for a, b in zip(self.starts, self.starts[1:], strict=False)]


@dataclass
class Part:
    """A tensor group in a selection.

    Args:
        group, backend: who ranks.
        ranks: what is ranked.
        block: gets the masks.
        takes_part: per tensor, whether its elements compete; the words of the others are left alone.
    """

    group: TensorGroup
    backend: Backend
    ranks: Ranks
    block: Block
    takes_part: list[bool]

    @property
    def masks(self) -> list[Tensor | None]:
        """The words that are written."""
        return [
            view if takes_part else None
            for view, takes_part in zip(self.block.views, self.takes_part, strict=True)
        ]


def select(parts: list[Part], keep: int, *, exact: bool = False, add: bool = False) -> None:
    """Set the bits of the `keep` highest ranks of all parts together, and clear the others.

    Every element that ranks as high as the last one kept is kept too, so ties may make the mask larger.

    Args:
        parts: what competes; their blocks are written.
        keep: how many; all that take part where it is as many or more.
        exact: of equal ranks at the end, keep those that come first in the order of the lists and of memory.
            Where the ties are many, this takes some 24 bytes of memory for each.
        add: clear no bits.

    The host waits for the devices once for every level of bits that is counted.
    """
    if keep <= 0:
        _mark(parts, threshold=(1 << RANK_BITS) - 1, shift=0, add=add)
        return
    total = sum(p.numel() for part in parts for p in part.group.params)
    above = prefix = 0
    for shift, bits in _LEVELS:
        counts = [_count(part, prefix, shift, bits) for part in parts]
        from_top = torch.stack(counts).sum(0).flip(0).cumsum(0)
        if above + int(from_top[-1]) <= keep:  # on the first level only: keep lies inside the prefix after it
            _mark(parts, threshold=(prefix << bits) - 1, shift=shift, add=add)
            return
        place = int(torch.searchsorted(from_top, keep - above))
        number = (1 << bits) - 1 - place
        each = [int(count[number]) for count in counts]
        inside = sum(each)
        above += int(from_top[place]) - inside
        prefix = prefix << bits | number
        if above + inside == keep or (shift == 0 and not exact):
            _mark(parts, threshold=prefix - 1, shift=shift, add=add)
            return
        if shift == 0 or inside <= max(total // _SHARE, _FEW):
            _settle(parts, each, keep - above, prefix, shift, exact=exact, add=add)
            return


def _count(part: Part, prefix: int, shift: int, bits: int) -> Tensor:
    counts = part.backend.count_ranks(
        part.group, part.ranks, part.masks, prefix=prefix, shift=shift, bits=bits
    )
    return counts.cpu()


def _mark(parts: list[Part], *, threshold: int, shift: int, add: bool) -> None:
    for part in parts:
        part.backend.mark_(part.group, part.ranks, part.masks, threshold=threshold, shift=shift, add=add)


def _settle(
    parts: list[Part], each: list[int], keep: int, threshold: int, shift: int, *, exact: bool, add: bool
) -> None:
    """Mark what is above the threshold, and the `keep` highest of those at it."""
    gathered, bases, base = [], [], 0
    for part, room in zip(parts, each, strict=True):
        device = part.group.device
        candidates = torch.empty(room, dtype=torch.int64, device=device)
        part.backend.mark_(
            part.group,
            part.ranks,
            part.masks,
            threshold=threshold,
            shift=shift,
            add=add,
            positions=[base + WORD * start for start in part.block.starts[:-1]],
            candidates=candidates,
            found=torch.zeros(1, dtype=torch.int64, device=device),
        )
        gathered.append(candidates)
        bases.append(base)
        base += WORD * len(part.block.words)
    # The rank stands above the position, which counts down: the highest is the highest rank that comes first.
    first = gathered[0].device
    together = gathered[0] if len(gathered) == 1 else torch.cat([x.to(first) for x in gathered])
    last = int(_smallest_kept(together, keep))
    if not exact:
        last &= -1 << _POSITION_BITS
    for part, candidates, base in zip(parts, gathered, bases, strict=True):
        chosen = candidates[candidates >= last]
        position = (1 << _POSITION_BITS) - 1 - (chosen & (1 << _POSITION_BITS) - 1) - base
        # Each bit is clear so far, and comes once: adding it is setting it.
        bit = torch.ones_like(position) << (position & WORD - 1)
        part.block.words.index_put_((position >> 6,), bit, accumulate=True)


def _smallest_kept(values: Tensor, keep: int) -> Tensor:
    """The least of the `keep` highest; kthvalue of accelerators is refused in deterministic mode."""
    if values.device.type == "cpu":
        return values.kthvalue(len(values) - keep + 1).values
    return values.sort().values[len(values) - keep]


# ---- other patterns, in plain torch ------------------------------------------------------------------------


def select_by_tensor(scores: Tensor, keep: int, *, exact: bool = False) -> Tensor:
    """The words of the mask of the `keep` highest scores of one tensor."""
    ranks = rank_scores(flatten(scores)).long()
    if exact:
        ranks = ranks << 32 | torch.arange(len(ranks) - 1, -1, -1, device=ranks.device)
    if keep <= 0 or len(ranks) == 0:
        return pack(torch.zeros_like(ranks, dtype=torch.bool))
    last = _smallest_kept(ranks, min(keep, len(ranks)))
    return pack(ranks >= last)


def has_groups(shape: torch.Size, m: int) -> bool:
    """Whether the input dimension of a tensor divides into groups of m; vectors have none."""
    return len(shape) >= 2 and shape[1] % m == 0 and shape.numel() > 0


def select_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """The words of the n:m mask: the n highest scores in every m neighbours along the input dimension.

    The input dimension is the second one, as in torch.nn.Linear and Conv; of equal scores the first wins.
    """
    mask = torch.empty_like(scores, dtype=torch.bool)
    rows = max(1, (1 << 20) // max(1, scores[0].numel()))
    for begin in range(0, len(scores), rows):
        piece = rank_scores(scores[begin : begin + rows]).movedim(1, -1)
        ranks = piece.reshape(-1, m)
        better = torch.zeros_like(ranks, dtype=torch.uint8 if m <= 256 else torch.int32)
        for i in range(m):
            other = ranks[:, i : i + 1]
            better += other > ranks
            better[:, i + 1 :] += other == ranks[:, i + 1 :]
        mask[begin : begin + rows] = (better < n).view(piece.shape).movedim(-1, 1)
    return pack(mask)


def select_channels(scores: list[Tensor], keep: int) -> list[Tensor]:
    """The words of masks of whole output channels, the highest by mean score first, until `keep` are reached.

    A channel is a row of the first dimension; every element of a vector is one. The last channel may carry
    the number of elements beyond `keep`. Of equal means the first wins.

    Args:
        scores: tensors with elements.
        keep: how many elements.
    """
    if not scores:
        return []
    rows = [score.reshape(len(score) if score.dim() else 1, -1) for score in scores]
    device = rows[0].device
    means = torch.cat([row.float().abs().mean(1).to(device) for row in rows])
    size = torch.cat([torch.full(row.shape[:1], row.shape[1], device=device) for row in rows])
    order = rank_scores(means).argsort(descending=True, stable=True)
    before = size[order].cumsum(0) - size[order]
    chosen = torch.zeros(len(order), dtype=torch.bool, device=device)
    chosen[order] = before < keep
    words = []
    for score, own in zip(scores, chosen.split(list(map(len, rows))), strict=True):
        mask = torch.empty_like(score, dtype=torch.bool)
        shape = (-1, *[1] * (score.dim() - 1)) if score.dim() else ()
        words.append(pack(mask.copy_(own.to(score.device).view(shape).expand_as(score))))
    return words
