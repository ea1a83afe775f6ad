"""Stage 3, sparse SAM: perturbation and update under masks, beside the same passes under none."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import Shape
from ..passes import BYTES
from ..records import Row, measured, single
from ..timing import Contestant, interleave
from .lists import CASES, numel
from .ours import named
from .session import Session
from .sets import LAYOUTS, SECONDS, Set, beside_first, fitting, in_graph, refused

# Single weights chosen at random, and whole output channels, of which whole words of 64 weights are zero.
MASKS = (("single", 0.5), ("single", 0.9), ("channels", 0.9))
_DENSE = "dense"
PASSES = ("perturb_", "descend_ sgd", "descend_ adamw")
_MASK_BYTES = 1 / 8


def words_of(shapes: list[Shape], pattern: str, sparsity: float, device: torch.device) -> list[Tensor]:
    """Words of masks chosen at random. Every element of a vector is a channel."""
    from sam_kernels.bitmask import pack

    words = []
    for shape in shapes:
        if pattern == "single":
            mask = torch.rand(shape, device=device) >= sparsity
        else:
            chosen = torch.rand(shape[0], device=device) >= sparsity
            mask = chosen.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
        words.append(pack(mask))
    return words


def masked_bytes(name: str, elements: int, touched: float) -> float:
    """Bytes of a pass under masks: a perturbation leaves words of zeros alone, an update takes them all."""
    share = touched if name == "perturb_" else 1.0
    return (BYTES[name] * share + _MASK_BYTES) * elements


def measure(case: str, session: Session) -> list[Row]:
    """Perturbation and update under every mask and under none, in fp32, in a graph."""
    gpu, layout = session.gpu, LAYOUTS[0]
    shapes = CASES[case].shapes(session.cap)
    elements = numel(shapes)
    about = {"case": case, "dtype": layout.name, "tensors": len(shapes), "numel": elements}
    extra = int(len(MASKS) * _MASK_BYTES * elements)
    lists = fitting(layout, elements, gpu.free_bytes(), extra)
    if lists < 3:
        return [{**about, **refused(case, sum(layout.sizes[:3]) * elements + extra, session)}]
    one = Set(shapes, layout, session, lists)
    rows: list[Row] = []
    contestants: dict[str, Contestant] = {}
    counts: dict[str, float] = {}
    masks = {f"{kind} {s}": words_of(shapes, kind, s, gpu.device) for kind, s in MASKS}
    for label, words in {_DENSE: None, **masks}.items():
        touched = 1.0
        if words is not None:
            touched = sum(int((w != 0).sum()) for w in words) / max(1, sum(map(len, words)))
            rows.append(single(label, "words_touched", touched))
        for backend in session.backends:
            calls = one.calls(backend, words)
            for name in PASSES:
                if (found := calls.get(named(backend, name))) is None:
                    continue
                key = f"{named(backend, name)}, {label}"
                contestants[key] = in_graph([found], session)
                bare = words is None
                counts[key] = BYTES[name] * elements if bare else masked_bytes(name, elements, touched)
    for key, parts in interleave(contestants, session.effort(SECONDS)).items():
        rows.append(measured(key, "graph_ms", [1e3 * s for s in parts["graph_ms"]], bytes=counts[key]))
    names = tuple(f"{name}, {label}" for name in PASSES for label in (_DENSE, *masks))
    rows += beside_first(rows, names, session)
    return [{**about, **row} for row in rows]
