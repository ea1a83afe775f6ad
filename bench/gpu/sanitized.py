"""The program that compute-sanitizer watches: every kernel over awkward lists, as briefly as possible."""

from __future__ import annotations

import torch

from . import compare


def main() -> None:
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for memory in ("plain", "misaligned"):
            compare.pass_results("native", dtype, device, memory)
            compare.sums("native", dtype, device, memory)
    for method in compare.methods().values():
        compare.trajectory(method, "native", compare.AWKWARD, torch.float32, device)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
