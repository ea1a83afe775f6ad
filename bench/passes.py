"""The passes by themselves on one long vector, against the fastest plain loop over the same memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from . import oracle, stream
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

_SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
_ADAMW = {"lr": 1e-4, "weight_decay": 0.01, "decoupled": True}

# Six lists beyond most caches, where the native backend streams; in float64 still quickly checked.
_CHECKED = 3_000_001

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
    return {
        "sq_norm": lambda: ops.sq_norm(g, backend=backend),
        "perturb_": lambda: ops.perturb_(w, g, s, norm, rho=RHO, eps=EPS, backend=backend),
        "restore_": lambda: ops.restore_(w, s, backend=backend),
        "grad_stats": lambda: ops.grad_stats([g, s, m], backend=backend),
        "combine_": lambda: ops.combine_([out], [g, s, m], thirds, backend=backend),
        "descend_ sgd": lambda: ops.descend_sgd_(w, g, s, m, **_SGD, backend=backend),
        "descend_ adamw": lambda: ops.descend_adam_(w, g, s, m, square, [v.step], **_ADAMW, backend=backend),
    }


def wrong(backend: str, dtype: torch.dtype, numel: int = _CHECKED) -> dict[str, float]:
    """Passes whose result is not that of float64, with their error relative to the largest value."""
    found = {}
    for name in BYTES:
        v = Vectors(numel, dtype)
        expected, changed = _expected(name, v)
        result = calls(v, backend)[name]()
        results = [getattr(v, field) for field in changed] or [result]
        error = 0.0
        for got, want in zip(results, expected, strict=True):
            deviation = ((got.double() - want).abs().max() / want.abs().max()).item()
            error = max(error, deviation if math.isfinite(deviation) else math.inf)
        if error > 4 * torch.finfo(dtype).eps:
            found[name] = error
    return found


def _expected(name: str, v: Vectors) -> tuple[list[torch.Tensor], tuple[str, ...]]:
    """What a pass must arrive at, and the fields of `v` it changes; float64 copies are made first."""
    lists = (v.weight, v.grad, v.snapshot, v.mean, v.square)
    w, g, s, m, square = (x.to(torch.float64, copy=True) for x in lists)
    if name == "sq_norm":
        return [g.square().sum()], ()
    if name == "perturb_":
        return [w, w + g * (RHO / (g.norm() + EPS))], ("snapshot", "weight")
    if name == "restore_":
        v.weight.add_(1)
        return [s], ("weight",)
    if name == "grad_stats":
        return [torch.stack([a @ b for a, b in ((g, g), (g, s), (g, m), (s, s), (s, m), (m, m))])], ()
    if name == "combine_":
        return [(g + s + m) / 3], ("out",)
    slots = {"momentum_buffer": m, "exp_avg": m, "exp_avg_sq": square}
    if name == "descend_ sgd":
        oracle.sgd(s, g, slots, 1, **_SGD)
        return [s, m], ("weight", "mean")
    oracle.adamw(s, g, slots, 1, lr=_ADAMW["lr"], weight_decay=_ADAMW["weight_decay"])
    return [s, m, square], ("weight", "mean", "square")


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
            errors = wrong(backend, dtype, min(numel, _CHECKED))
            found = calls(v, backend)
        except (ImportError, RuntimeError) as reason:
            rows.append(single(backend, "skipped", str(reason)))
            log(f"  skipped  {backend}: {reason}")
            continue
        chosen = contestants if backend == "native" else slow
        chosen |= {f"{backend} {name}": clocked(run) for name, run in found.items() if name not in errors}
        for name, error in errors.items():
            verdict = f"off by {error:.2g} of the largest value; it will not be timed"
            rows.append(single(f"{backend} {name}", "wrong", verdict))
            log(f"  WRONG    {backend} {name}: {verdict}")
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
