"""The program that compute-sanitizer watches: every kernel over awkward lists, as briefly as possible.

python -m bench.gpu.sanitized [native|triton]
"""

from __future__ import annotations

import sys

import torch

from . import compare


def main(backend: str = "native") -> None:
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for memory in ("plain", "misaligned"):
            compare.pass_results(backend, dtype, device, memory)
            compare.sums(backend, dtype, device, memory)
    for method in compare.methods().values():
        compare.trajectory(method, backend, compare.AWKWARD, torch.float32, device)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
