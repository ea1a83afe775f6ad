"""Lists of tensors as vectors: norms, products, random ones, and the lists that a pass takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """All elements as one float64 vector, on the device of the first tensor."""
    device = tensors[0].device
    return torch.cat([t.detach().reshape(-1).to(device, torch.float64) for t in tensors])


def split(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """A vector of all elements as tensors shaped like the parameters, of their dtype and device."""
    pieces = vector.split([p.numel() for p in params])
    return [piece.view(p.shape).to(p.device, p.dtype) for piece, p in zip(pieces, params, strict=True)]


def norm(tensors: Sequence[Tensor]) -> float:
    """``||v||_2`` over all tensors, in float64."""
    return math.sqrt(
        math.fsum(float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) ** 2 for t in tensors)
    )


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The sum of products of all elements, in float64."""
    return math.fsum(
        float((x.detach().double() * y.detach().double()).sum()) for x, y in zip(a, b, strict=True)
    )


def gaussian(params: Sequence[Tensor], seed: int, draw: int = 0) -> list[Tensor]:
    """``N(0, 1)`` in the shapes of the parameters, the same for the same seed and draw on any device.

    By `sam_kernels.ops.noise_`: torch's generators are not touched.

    Args:
        params: whose shapes, dtypes and devices the result has.
        seed: from 0 to 2^63 - 1.
        draw: a number of its own for each draw.

    Raises:
        ValueError: if seed or draw are out of range.

    Example:
        >>> (a,), (b,) = gaussian([torch.zeros(2)], seed=3), gaussian([torch.zeros(2)], seed=3)
        >>> torch.equal(a, b)
        True
    """
    # One list of one dtype whatever the parameters are, as the place in the list decides the numbers.
    outs = [torch.empty(p.shape, dtype=torch.float32, device=params[0].device) for p in params]
    ops.noise_(outs, seed, draw)
    return [x.to(p.device, p.dtype) for x, p in zip(outs, params, strict=True)]


def rademacher(params: Sequence[Tensor], seed: int, draw: int = 0) -> list[Tensor]:
    """-1 or 1 with equal chances: the signs of `gaussian`."""
    return [torch.where(x < 0, -1.0, 1.0).to(x.dtype) for x in gaussian(params, seed, draw)]


def by_list(params: Sequence[Tensor]) -> list[list[int]]:
    """Places of the parameters by device and dtype, as a pass takes them."""
    lists: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, p in enumerate(params):
        lists.setdefault((p.device, p.dtype), []).append(i)
    return list(lists.values())


def alike(p: Tensor) -> Tensor:
    return torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)
