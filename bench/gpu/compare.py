"""Lists of awkward tensors, and what it means that two of them agree; nothing here needs a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cases import Shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)
MEMORIES = ("plain", "misaligned", "channels_last")

# Empty, tiny, odd, and around every chunk an engine may cut.
AWKWARD: list[Shape] = [
    (0,),
    (1,),
    (3,),
    (2, 0, 3),
    (17, 31),
    (5, 4, 3, 3),
    *((chunk + extra,) for chunk in (2048, 4096, 16384, 65536) for extra in (-1, 0, 1)),
    (0,),
]
MANY: list[Shape] = [(t % 7,) for t in range(10_000)]
# Beyond 67M elements chunks have their full length.
LONG: list[Shape] = [(65535,), (65536,), (70_000_001,), (1,), (65537,)]

# Roundings an element may be off by, relative to the larger of it and 1, the size of what was added:
# formulas are ordered alike but not always fused alike. A half type may round to the neighbour where
# opmath lands near a tie, which is rare.
_ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 2, torch.float16: 2}
_NEIGHBOURS = 0.05
# Sums of squares: fp32 within a chunk, float64 beyond.
SUM_ERROR = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-5, torch.float16: 3e-5}


def draw(shapes: Sequence[Shape], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Standard normal values on the CPU: the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty(shape).normal_(generator=generator).to(dtype) for shape in shapes]


def place(values: Tensor, memory: str, device: torch.device) -> Tensor:
    """The values on a device: contiguous, one element off every alignment, or channels last."""
    if memory == "misaligned":
        block = torch.zeros(values.numel() + 1, dtype=values.dtype, device=device)
        return block[1:].view(values.shape).copy_(values)
    if memory == "channels_last" and values.dim() == 4:
        return values.to(device).contiguous(memory_format=torch.channels_last)
    return values.to(device, copy=True)


def same_bits(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    """Whether two lists have the same bits, NaN and signed zeros included, wherever they are."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def bits(x: Tensor) -> Tensor:
        return x.detach().cpu().contiguous().view(kinds[x.element_size()])

    return len(xs) == len(ys) and all(torch.equal(bits(x), bits(y)) for x, y in zip(xs, ys, strict=True))


def difference(got: Sequence[Tensor], want: Sequence[Tensor], slack: int = 1) -> str | None:
    """A sentence if two lists differ by more than the rounding of their dtypes, else None."""
    if len(got) != len(want):
        return f"{len(got)} tensors in place of {len(want)}"
    different = total = 0
    for t, (x, y) in enumerate(zip(got, want, strict=True)):
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return f"tensor {t} is {x.dtype} {tuple(x.shape)} in place of {y.dtype} {tuple(y.shape)}"
        if x.numel() == 0:
            continue
        if not x.is_floating_point():
            if not same_bits([x], [y]):
                return f"tensor {t} differs, and is of whole numbers"
            continue
        x64, y64 = x.detach().cpu().double(), y.detach().cpu().double()
        if not torch.equal(torch.isfinite(x64), torch.isfinite(y64)):
            return f"tensor {t} is not finite in other places"
        excess = ((x64 - y64).abs() / y64.abs().clamp(min=1.0)).nan_to_num(0.0, 0.0, 0.0).max().item()
        allowed = _ROUNDINGS[x.dtype] * torch.finfo(x.dtype).eps * slack
        if excess > allowed:
            return f"tensor {t} is off by {excess:.3g}, allowed {allowed:.3g}"
        if x.dtype in HALF:
            different += int((x64 != y64).sum())
            total += x.numel()
    if total > 1000 and different > _NEIGHBOURS * slack * total:
        return f"{different} of {total} elements round to the neighbour"
    return None
