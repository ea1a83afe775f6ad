"""Masks as bits: 64 elements of a tensor to a word of int64, in the order of memory.

Element i of a tensor, counted as its memory is, is bit ``i % 64`` of word ``i // 64``; the bits beyond the
last element are 0. A mask so takes 1/32 of the memory of a float32 tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 64


def count_words(numel: int) -> int:
    """Words that a mask of so many elements takes."""
    return -(-numel // WORD)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def pack(mask: Tensor) -> Tensor:
    """The words of a mask.

    Args:
        mask: bool, in the shape and strides of its parameter.

    Returns:
        int64 [ceil(numel / 64)] on the same device.

    Example:
        >>> pack(torch.tensor([True, False, True]))
        tensor([5])
    """
    flat = flatten(mask)
    padded = torch.zeros(count_words(flat.numel()) * WORD, dtype=torch.uint8, device=mask.device)
    padded[: flat.numel()] = flat
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8).view(torch.int64)


def unpack(words: Tensor, like: Tensor) -> Tensor:
    """The mask of those words as a bool tensor.

    Args:
        words: what `pack` returned.
        like: gives shape and strides.

    Example:
        >>> unpack(torch.tensor([5]), torch.zeros(3))
        tensor([ True, False,  True])
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = (words.view(torch.uint8).unsqueeze(1) >> shifts & 1).flatten()[: like.numel()].bool()
    if not is_dense(like):
        return bits.view(like.shape)
    mask = torch.empty_like(like, dtype=torch.bool, device=words.device, requires_grad=False)
    flatten(mask).copy_(bits)
    return mask


Layout = tuple[torch.Size, tuple[int, ...]]
"""Shape and strides of a parameter."""


def unpack_from(words: Tensor, layout: Layout) -> Tensor:
    """As `unpack`, for a parameter that is no more as it was."""
    return unpack(words, torch.empty_strided(*layout, dtype=torch.bool, device=words.device))


def relay(words: Tensor, old: Layout, new: Layout) -> Tensor:
    """The words of the same mask for a parameter of as many elements in another shape or other strides."""
    if old == new:
        return words
    after = torch.empty_strided(*new, dtype=torch.bool, device=words.device)
    return pack(after.copy_(unpack_from(words, old).reshape(new[0])))


def flatten(tensor: Tensor) -> Tensor:
    """The elements in the order of memory; a view where they fill one block, a copy elsewhere."""
    if not is_dense(tensor):
        return tensor.reshape(-1)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def count_bits(words: Tensor) -> Tensor:
    """Per word, how many of its bits are set; int64.

    Example:
        >>> count_bits(torch.tensor([5, 0, -1]))
        tensor([ 2,  0, 64])
    """
    # Pairs, fours, bytes, then the sum of the bytes. Shifts of int64 copy the sign, so each is masked.
    x = words - (words >> 1 & 0x5555555555555555)
    x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333)
    x = x + (x >> 4) & 0x0F0F0F0F0F0F0F0F
    return x.view(torch.uint8).view(-1, 8).sum(1, dtype=torch.int64)
