"""Stage 5, recipes: whole training steps of each beside the base optimizer alone and beside SAM."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..cases import BASES
from ..peers import Unavailable
from ..records import Row, divided, measured, single
from ..timing import Contestant, interleave
from ..training import PLAIN
from .ours import NATIVE
from .session import Session, Unit
from .training import TASKS, Field, about, final_loss, loss_of, losses_of, size_of

SAM = "sam"

_SECONDS = 8  # of interleaved rounds
_LEAST = 40  # seconds a unit takes, copies included


@dataclass(frozen=True)
class Way:
    """How a recipe is taken here.

    Attributes:
        options: of `recipes.<name>`.
        period: steps until everything that happens has happened; times are means over one.
        closure: a name in `_CLOSURES`.
        note: what tables say of it beside its name.
    """

    options: dict[str, Any] = field(default_factory=dict)
    period: int = 1
    closure: str = "batch"
    note: str = ""


def _every_other(step: int) -> float:
    """A schedule of RST's probability that draws exactly half of the steps."""
    return float(step % 2 == 0)


# Fewer than two gradients of the whole batch a step.
FEWER = {
    "looksam": Way({"k": 5}, period=5, note="k = 5"),
    "rst": Way({"probability": _every_other}, period=2, note="every other step"),
    "ae_sam": Way({"early": 0.0, "late": 0.0}, period=8, note="norms above their mean"),
    "msam": Way(),
    "rand_sam": Way(),
    "k_sam": Way(closure="top_losses", note="a third of the samples"),
    "esam": Way(closure="sharpest", note="half of the samples"),
}
# Two gradients, and another phase or other memory than SAM's.
OTHER_PHASE = {
    "sampa": Way(closure="ahead", note="one device"),
    "ssam_f": Way(note="half of the weights"),
    "ssam_d": Way(note="half of the weights"),
    "nosam": Way(note="normalization layers"),
}
# The rest: what they cost more than SAM.
METRICS = dict.fromkeys(
    ("asam", "layerwise_sam", "fisher_sam", "friendly_sam", "vasso", "r_sam", "samar"), Way()
)
COMBINATIONS = dict.fromkeys(("gsam", "wsam", "gnp", "cr_sam", "multistep_sam", "lookbehind_sam"), Way())

GROUPS = {"fewer": FEWER, "phase": OTHER_PHASE, "metrics": METRICS, "combinations": COMBINATIONS}
_WHERE = {"fewer": None, "phase": None, "metrics": ("resnet50",), "combinations": ("resnet50",)}


def units(session: Session) -> Iterator[Unit]:
    """The efficient recipes on every model at its smaller batch; the others on the first model."""
    for group in GROUPS:
        for name in _WHERE[group] or TASKS:
            if name in TASKS:
                batch = TASKS[name].batches[0]
                run = partial(_measure, group, name, batch)
                yield Unit(f"recipes/{name}/{batch}/{group}", run, _LEAST)


def _measure(group: str, name: str, batch: int, session: Session) -> list[Row]:
    task = TASKS[name]
    batch = size_of(batch, session)
    model, inputs, targets = task.make(batch, session.gpu.device)
    taking_part = Field(session)
    ways = {PLAIN: Way(), SAM: Way(), **GROUPS[group]}
    counted: dict[str, list[float]] = {}
    for key, way in ways.items():
        counts = counted.setdefault(key, [])
        taking_part.admit(key, partial(_enter, key, way, name, model, inputs, targets, session, counts))
    rows, items = taking_part.rows, batch * task.items
    for key, parts in interleave(taking_part.contestants, session.effort(_SECONDS)).items():
        note = {"note": ways[key].note} if ways[key].note else {}
        rows.append(measured(key, "total_ms", [1e3 * s for s in parts["total"]], **note))
        rows.append(measured(key, f"{task.item}_per_second", [items / s for s in parts["total"]]))
        # Of the timed rounds, which the first steps stand before.
        rows.append(single(key, "gradients", sum(counted[key]) / len(counted[key])))
    rows += _ratios(rows)
    return [{**about(name, batch, model), **row} for row in rows]


def _ratios(rows: list[Row]) -> list[Row]:
    """Times over those of the base alone and of SAM, round by round."""
    times = {row["peer"]: row for row in rows if row["metric"] == "total_ms"}
    return [
        {"peer": key, "metric": f"total_to_{against}", **divided(row, times[other])}
        for against, other in (("base", PLAIN), ("sam", SAM))
        if other in times
        for key, row in times.items()
        if key != other
    ]


def _enter(
    key: str,
    way: Way,
    name: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    session: Session,
    counts: list[float],
) -> tuple[Contestant, float]:
    own = copy.deepcopy(model)
    opt = _optimizer(key, way, own, TASKS[name].base, inputs, targets, session)
    closure = _CLOSURES[way.closure]
    evaluations = 0

    def counted(*, of: Callable[..., Tensor], **more: Any) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return of(**more)

    def period() -> None:
        for _ in range(way.period):
            chosen = closure(own, opt, inputs, targets)
            more = {"ahead": partial(counted, of=chosen)} if way.closure == "ahead" else {}
            opt.step(partial(counted, of=chosen), **more)

    def contestant() -> dict[str, float]:
        nonlocal evaluations
        evaluations = 0
        seconds = session.gpu.laps([period])[0] / way.period
        counts.append(evaluations / way.period)
        own.zero_grad(set_to_none=True)  # room for the next one's
        return {"total": seconds}

    for _ in range(2):  # state and buffers are there after the first
        contestant()
    counts.clear()
    return contestant, final_loss(own, inputs, targets)


def _optimizer(
    key: str, way: Way, model: nn.Module, base_name: str, inputs: Tensor, targets: Tensor, session: Session
) -> Any:
    base = BASES[base_name]
    if key == PLAIN:
        return base.kind(model.parameters(), **base.options, fused=True)
    backend = session.backends[0]
    if backend != NATIVE and NATIVE in session.gpu.backends:
        raise Unavailable("stage 2 has not passed the native backend")
    from sam_kernels import SAM as Optimizer
    from sam_kernels import recipes

    opt = Optimizer(
        list(model.named_parameters()),
        base.kind,
        recipe=recipes.get(key, **way.options),
        backend=backend,
        model=model,
        **base.options,
    )
    if opt.masks_are_due:
        # Once in thousands of steps, so it is not in the times; without masks it would be SAM.
        opt.update_masks([(inputs, targets)], lambda batch: loss_of(model, *batch))
    return opt


def _batch(model: nn.Module, opt: Any, inputs: Tensor, targets: Tensor) -> Callable[..., Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        return loss.detach()

    return closure


def _chosen(
    select: str, model: nn.Module, opt: Any, inputs: Tensor, targets: Tensor
) -> Callable[..., Tensor]:
    from sam_kernels import sampling

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        return losses_of(model, *batch)

    batch = (inputs, targets)
    if select == "top_losses":
        return sampling.top_losses(losses, batch, 1 / 3, model)
    return sampling.sharpest(losses, batch, 0.5, model)


_CLOSURES: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "batch": _batch,
    "ahead": _batch,
    "top_losses": partial(_chosen, "top_losses"),
    "sharpest": partial(_chosen, "sharpest"),
}
