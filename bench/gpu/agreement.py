"""Whether a variant of an engine is right: what its passes leave, beside what the default leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .compare import AWKWARD, MEMORIES, SUM_ERROR, place
from .session import Session

if TYPE_CHECKING:
    from .sweeps import Engine

# So long that chunks have their full length, whatever their number is; every variant cuts it otherwise.
_LONG = 70_000_001


def problems(engine: Engine, backend: str, dtype: torch.dtype, session: Session) -> list[str]:
    """Bits of elementwise passes that differ from the default's, and sums that are not close to its.

    Where the engine promises no bits, elements that are not close.
    """
    found = []
    for memory in MEMORIES[:2]:
        lists, total = _results(backend, dtype, memory, session)
        wanted_lists, wanted = _results(engine.backend, dtype, memory, session)
        if not abs(total - wanted) <= SUM_ERROR[dtype] * wanted:
            found.append(f"{memory}: sq_norm is {total!r}, the default's {wanted!r}")
        for name, tensors in lists.items():
            same = _same_bits if engine.is_exact else _close
            if not all(same(x, y) for x, y in zip(tensors, wanted_lists[name], strict=True)):
                found.append(f"{memory}: {name} differ")
    return found


def _results(
    backend: str, dtype: torch.dtype, memory: str, session: Session
) -> tuple[dict[str, list[Tensor]], float]:
    from sam_kernels import ops

    device = session.gpu.device
    shapes = [*AWKWARD, (_LONG,)] if session.cap is None else AWKWARD

    def drawn(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        empty = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
        return [place(x.normal_(generator=generator), memory, device) for x in empty]

    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        w, g, s, m = (drawn(seed) for seed in range(4))
        v, steps = [x.square() for x in drawn(4)], [torch.ones((), device=device) for _ in shapes]
        total = ops.sq_norm(g, backend=backend).item()
        norm = torch.tensor(3.7, dtype=torch.float64, device=device)
        for adaptive in (False, True):
            ops.perturb_(w, g, s, norm, rho=0.5, adaptive=adaptive, eta=0.01, backend=backend)
            found[f"perturbed weights, adaptive={adaptive}"] = [x.clone() for x in w]
            found[f"snapshots, adaptive={adaptive}"] = [x.clone() for x in s]
            ops.descend_sgd_(w, g, s, m, lr=0.1, momentum=0.9, weight_decay=0.01, backend=backend)  # type: ignore[arg-type]
            found[f"weights of SGD, adaptive={adaptive}"] = [x.clone() for x in w]
        ops.perturb_(w, g, s, norm, rho=0.5, backend=backend)
        ops.descend_adam_(w, g, s, m, v, steps, lr=0.01, weight_decay=0.01, decoupled=True, backend=backend)
        found["weights of AdamW"] = [x.clone() for x in w]
        ops.restore_(w, g, backend=backend)
    return found | {"restored weights": w, "means": m, "squares": v, "steps": steps}, total


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Where they are: lists are long, and their way to the host is longer."""
    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return torch.equal(x.view(kind), y.view(kind))


def _close(x: Tensor, y: Tensor) -> bool:
    rounding = 64 * torch.finfo(x.dtype).eps if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps
    return torch.allclose(x.float(), y.float(), rtol=rounding, atol=rounding)
