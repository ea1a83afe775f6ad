"""Stage 3, SSAM-F: masks selected anew from scores that are there, beside topk over all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import published
from ..cases import GRAD_SIZE, Shape
from ..records import Row, measured, single
from ..timing import Contestant, interleave
from .ceilings import COPY, ceiling
from .lists import CASES, numel
from .ours import beside, named
from .session import Session
from .sets import SECONDS, refused

SPARSITIES = (0.5, 0.9)
TOPK = "topk"

# Each score is read once, and a bit of the mask is written. What else a selection does shows as more bytes.
LEAST_BYTES = 4 + 1 / 8

# Parameters and scores; masks in force and selected; candidates.
_OURS_BYTES = 9
# The vector of all scores, values and 64-bit indices of the highest, those sorted once more, the mask.
_TOPK_BYTES = 48
_TOPK_MOST = 2**31 - 1  # elements


def peer(who: str, sparsity: float) -> str:
    return named(who, f"select {sparsity}")


def bytes_per_weight(milliseconds: float, giga: float, elements: int) -> float:
    """Bytes per weight that plain copies would have moved in that time, at `giga` GB/s."""
    return milliseconds * giga * 1e6 / elements


class Ours:
    """`SAM.update_masks(scores=...)` with one backend."""

    def __init__(self, params: list[Tensor], scores: list[Tensor], sparsity: float, backend: str) -> None:
        from sam_kernels import SAM, recipes

        named_params = [(f"tensor {i}", p) for i, p in enumerate(params)]
        recipe = recipes.ssam_f(sparsity=sparsity)
        self.params, self.scores = params, scores
        self.optimizer: Any = SAM(named_params, torch.optim.SGD, recipe=recipe, backend=backend, lr=0.1)
        self.keep: int = self.optimizer.recipe.mask.live(sum(p.numel() for p in params))

    def run(self) -> None:
        self.optimizer.update_masks(scores=self.scores)

    def masks(self, t: int) -> Tensor:
        return self.optimizer.masks[self.params[t]]


class TopK:
    """What the authors publish: all scores in one vector, topk, a mask of float32."""

    def __init__(self, scores: list[Tensor], sparsity: float) -> None:
        total = sum(s.numel() for s in scores)
        self.scores, self.keep = scores, total - int(total * sparsity)
        self.found: list[Tensor] = []

    def run(self) -> None:
        self.found = []  # or the old masks would stand beside the new ones
        self.found = published.fisher_masks(self.scores, self.keep)

    def masks(self, t: int) -> Tensor:
        return self.found[t] != 0


def problem(selected: Ours | TopK) -> str | None:
    """A sentence unless the masks have the highest scores, and as many as were asked for."""
    last, count, above = torch.inf, 0, 0
    for t, score in enumerate(selected.scores):
        chosen = selected.masks(t)
        count += int(chosen.sum())
        if score.numel():
            last = min(last, torch.where(chosen, score, torch.inf).min().item())
    for t, score in enumerate(selected.scores):
        chosen = selected.masks(t)
        above += int((score > last).sum())
        if bool((chosen & (score < last)).any()) or not bool(chosen[score > last].all()):
            return "the mask does not have the highest scores"
    # Of scores that equal the last one kept, ours keeps all, and topk some.
    exact = isinstance(selected, TopK)
    if not (count == selected.keep if exact else above < selected.keep <= count):
        return f"the masks have {count:,} weights; expected {selected.keep:,}"
    return None


def measure(case: str, session: Session) -> list[Row]:
    """Milliseconds by the device's clock, waits of the host included: it reads counts in between."""
    gpu = session.gpu
    shapes = CASES[case].shapes(session.cap)
    elements = numel(shapes)
    about = {"case": case, "dtype": "float32", "tensors": len(shapes), "numel": elements}
    if gpu.free_bytes() < _OURS_BYTES * elements:
        return [{**about, **refused(case, _OURS_BYTES * elements, session)}]
    scores = _scores(shapes, gpu.device)
    params = [torch.zeros(s, device=gpu.device).requires_grad_() for s in shapes]
    makers: dict[str, Callable[[], Ours | TopK]] = {
        peer(backend, s): partial(Ours, params, scores, s, backend)
        for backend in session.backends
        for s in SPARSITIES
    }
    rows: list[Row] = []
    reason = _refusal_of_topk(elements, gpu.free_bytes())
    if reason is None:
        makers |= {peer(TOPK, s): partial(TopK, scores, s) for s in SPARSITIES}
    else:
        session.log(f"  skipped  {TOPK}: {reason}")
        rows.append(single(TOPK, "skipped", reason))
    contestants: dict[str, Contestant] = {}
    for name, make in makers.items():
        found, contestant = _admit(name, make, session)
        rows += found
        if contestant is not None:
            contestants[name] = contestant
    rows += _timed(contestants, elements, session)
    return [{**about, **row} for row in rows]


def _scores(shapes: list[Shape], device: torch.device) -> list[Tensor]:
    """Sums of two squares. Gradients of one size in all layers crowd them together: the harder case."""

    def square(shape: Shape) -> Tensor:
        return torch.empty(shape, device=device).normal_(0, GRAD_SIZE).square_()

    return [square(shape).add_(square(shape)) for shape in shapes]


def _refusal_of_topk(elements: int, free: int) -> str | None:
    if elements > _TOPK_MOST:
        return f"{elements:,} scores are more than 31 bits count"
    if free < _TOPK_BYTES * elements:
        return f"it takes some {_TOPK_BYTES * elements / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
    return None


def _admit(
    name: str, make: Callable[[], Ours | TopK], session: Session
) -> tuple[list[Row], Contestant | None]:
    """Rows about who selects, and the contestant if it selects what it should."""
    selected = make()
    try:
        with torch.no_grad():
            selected.run()
            wrong = problem(selected)
            extra = session.gpu.peak_extra(selected.run)
    except RuntimeError as error:  # too large for topk, in a way that differs by version
        if not isinstance(selected, TopK) or session.gpu.is_lost():
            raise
        wrong = " ".join(str(error).split())[:300]
    if wrong is None:
        return [single(name, "peak_extra_bytes", extra)], _contestant(selected, session)
    # What torch answers is no fault of ours: it is left out.
    metric = "skipped" if isinstance(selected, TopK) else "wrong"
    session.log(f"  {metric:<8} {name}: {wrong}")
    return [single(name, metric, wrong)], None


def _contestant(selected: Ours | TopK, session: Session) -> Contestant:
    def run() -> dict[str, float]:
        with torch.no_grad():
            lasted = session.gpu.laps([selected.run])[0]
        if isinstance(selected, TopK):
            selected.found = []  # its masks are as large as the scores, and the next one in turn needs room
        return {"eager_ms": lasted}

    return run


def _timed(contestants: dict[str, Contestant], elements: int, session: Session) -> list[Row]:
    rows = []
    giga = ceiling(session.results, COPY)
    for name, parts in interleave(contestants, session.effort(SECONDS)).items():
        samples = [1e3 * s for s in parts["eager_ms"]]
        rows.append(measured(name, "eager_ms", samples, bytes=LEAST_BYTES * elements))
        if giga is not None:
            each = [bytes_per_weight(s, giga, elements) for s in samples]
            rows.append(measured(name, "copy_bytes_per_weight", each))
    first, *others = session.backends
    pairs = {peer(other, s): peer(first, s) for other in (*others, TOPK) for s in SPARSITIES}
    return rows + beside(rows, pairs, first)
