"""The passes by themselves on one long vector, against the fastest plain loop over the same memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import stream
from .cases import CASES, EPS, GRAD_SIZE, RHO, WEIGHT_SIZE
from .records import Row, measured, single
from .timing import Contestant, Effort, clocked, interleave

# Bytes per fp32 element.
BYTES = {
    "sq_norm": 4,
    "perturb_": 16,
    "restore_": 8,
    "grad_stats": 12,
    "combine_": 16,
    "descend_ sgd": 20,
    "descend_ adamw": 28,
}
# Plain loops: their bytes, and which of them a pass is held against; the fastest of those counts.
STREAM_BYTES = {"read": 4, "copy": 8, "triad": 12} | {f"like {name}": count for name, count in BYTES.items()}
RIVALS = {name: ("copy", "triad", f"like {name}") for name in BYTES} | dict.fromkeys(
    ("sq_norm", "grad_stats"), ("read",)
)

BACKENDS = ("native", "foreach")

_BRIEF = Effort(warmup=1, fewest=5, most=5)


class Vectors:
    """Six vectors of one length, as lists of one tensor: what the passes need."""

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        def drawn(size: float) -> torch.Tensor:
            return torch.empty(numel).normal_(0, size).to(dtype)

        self.weight, self.grad = drawn(WEIGHT_SIZE), drawn(GRAD_SIZE)
        self.snapshot = self.weight.clone()
        self.mean, self.square = self.grad.clone(), self.grad.square()
        self.out = torch.zeros_like(self.weight)
        self.step = torch.tensor(0.0)


def calls(v: Vectors, backend: str) -> dict[str, Callable[[], object]]:
    """Every pass of a backend as a call without arguments.

    Raises:
        RuntimeError: if the backend cannot serve these tensors.
    """
    from sam_kernels import ops

    w, g, s, m, square, out = ([x] for x in (v.weight, v.grad, v.snapshot, v.mean, v.square, v.out))
    norm = ops.sq_norm(g, backend=backend).sqrt()
    thirds = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    sgd = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 5e-4}
    adamw = {"lr": 1e-6, "weight_decay": 0.01, "decoupled": True}
    return {
        "sq_norm": lambda: ops.sq_norm(g, backend=backend),
        "perturb_": lambda: ops.perturb_(w, g, s, norm, rho=RHO, eps=EPS, backend=backend),
        "restore_": lambda: ops.restore_(w, s, backend=backend),
        "grad_stats": lambda: ops.grad_stats([g, s, m], backend=backend),
        "combine_": lambda: ops.combine_([out], [g, s, m], thirds, backend=backend),
        "descend_ sgd": lambda: ops.descend_sgd_(w, g, s, m, **sgd, backend=backend),
        "descend_ adamw": lambda: ops.descend_adam_(w, g, s, m, square, [v.step], **adamw, backend=backend),
    }


def measure(
    dtype: torch.dtype, numel: int | None, effort: Effort, log: Callable[[str], None], tick: Callable
) -> list[Row]:
    """All passes of all backends and the rooflines, interleaved, on vectors of `numel` elements."""
    if numel is None:
        numel = CASES["one_huge"].shapes()[0][0]
    v = Vectors(numel, dtype)
    about = {
        "section": "passes",
        "case": "one_huge",
        "base": "",
        "dtype": str(dtype)[6:],
        "numel": numel,
        "tensors": 1,
    }
    rows: list[Row] = []
    # Their own vectors: what they leave in them would not stay in the range of weights for long.
    streams = _streams(Vectors(numel, dtype), numel * dtype.itemsize // 4)
    contestants = {name: clocked(run) for name, run in streams.items()}
    slow: dict[str, Contestant] = {}
    for backend in BACKENDS:
        try:
            found = calls(v, backend)
        except (ImportError, RuntimeError) as reason:
            rows.append(single(backend, "skipped", str(reason)))
            log(f"  skipped  {backend}: {reason}")
            continue
        chosen = contestants if backend == "native" else slow
        chosen |= {f"{backend} {name}": clocked(run) for name, run in found.items()}
    # The foreach backend writes every intermediate; in the same rounds it would leave few of them.
    samples = interleave(contestants, effort, tick) | interleave(slow, _BRIEF, tick)
    for name, parts in samples.items():
        count = STREAM_BYTES.get(name.split(":")[0]) or BYTES[name.split(" ", 1)[1]]
        total = [1e3 * s for s in parts["total"]]
        rows.append(measured(name, "total_ms", total, bytes=count * numel * dtype.itemsize / 4))
    return [{**about, **row} for row in rows]


def _streams(v: Vectors, elements: int) -> dict[str, Callable[[], object]]:
    """Rooflines over vectors of the same bytes, which are float32 whatever the passes work on."""
    names = ("weight", "grad", "snapshot", "mean", "square", "out")
    if v.weight.dtype == torch.float32:
        w, g, saved, m, square, out = (getattr(v, name) for name in names)
    else:
        w, g, saved, m, square, out = (torch.full((elements,), GRAD_SIZE) for _ in names)
    found = {**stream.reads(g), **stream.copies(out, g), **stream.triads(out, g, saved)}
    return found | stream.mixes(w, g, saved, m, square, out)
