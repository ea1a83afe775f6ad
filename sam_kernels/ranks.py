"""Ranks: what a selection orders the elements of a list by, and which elements take part in it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

RANK_BITS = 31
"""Ranks are whole numbers of so many bits."""

INFINITE, NAN = 0x7F800000, 0x7F800001


@dataclass
class Ranks:
    """The elements of a tensor list in an order that every backend agrees on.

    The rank of a score is the bit pattern of ``|score|`` as float32, which orders like ``|score|``; every NaN
    is `NAN`, above infinity. The rank of a random number is the upper 31 bits of its word, which depends on
    seed, step, number of the tensor and element alone.

    Args:
        scores: per tensor, numbers of any size in the layout of the parameter; None stands for zeros. None
            in place of the list ranks random numbers.
        within: per tensor, the words of a mask: only elements whose bit is set take part.
        outside: those whose bit is clear take part instead.
        seed, step: of the random numbers.
        numbers: per tensor, its number for the random numbers.
    """

    scores: list[Tensor | None] | None = None
    within: list[Tensor | None] | None = None
    outside: bool = False
    seed: int = 0
    step: int = 0
    numbers: list[int] = field(default_factory=list)


def rank_scores(scores: Tensor) -> Tensor:
    """The ranks of scores: the bits of their sizes as float32."""
    bits = scores.float().abs().view(torch.int32)
    return torch.where(bits > INFINITE, NAN, bits)
