"""The program that compute-sanitizer watches: every kernel over a few awkward lists, as briefly as possible.

python -m bench.gpu.sanitized [native|triton]
"""

from __future__ import annotations

import sys

import torch

from ..cases import Shape
from . import passes
from .sides import Side
from .trajectories import methods, trajectory

# A part of a word of a mask, rows of channels, a chunk and one more element, and nothing.
SHAPES: list[Shape] = [(0,), (1,), (17, 31), (5, 4, 3, 3), (16385,), (65537,), (0,)]

KINDS = {
    torch.float32: "misaligned",
    torch.bfloat16: "plain",
    torch.float16: "misaligned",
    torch.float64: "plain",
}


def run(backend: str, device: torch.device, shapes: list[Shape] = SHAPES) -> None:
    """Every pass in every form once for each type of weights, and a step as the optimizer takes it."""
    for dtype, memory in KINDS.items():
        for family in passes.families(dtype):
            passes.results(family, Side(backend, dtype, device, memory, shapes))
    for name in ("sgd", "adamw"):
        trajectory(methods()[name], backend, shapes, torch.float32, device, steps=1)


if __name__ == "__main__":
    run(*(sys.argv[1:] or ["native"]), torch.device("cuda", 0))
    torch.cuda.synchronize()
