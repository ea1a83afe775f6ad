"""Stage 5: whole training steps, forward and backward passes included: what the phase is worth there.

Every contestant has a copy of the model, and takes the same few steps before it is timed: eager, and in one
CUDA graph where a graph can hold its steps. What each of the recipes costs is in `recipe_steps`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..peers import Unavailable
from ..records import Row, measured, single
from ..timing import Contestant, interleave
from ..training import PLAIN
from . import models
from .lists import base_for
from .ours import NATIVE, OURS, SPECS, beside, withheld
from .session import Session, Unit

# What the others' losses are held against comes first.
_REFERENCE = "eager_default"
PEERS = (_REFERENCE, "eager_fused", "po_fused", "po_foreach", *OURS, PLAIN)
# The other peers swap p.data or read the device from the host.
GRAPHED = (*OURS, PLAIN)

_STEPS = 3  # before timing; state and buffers are there, and a graph has been replayed
# A wrong update would show in the loss of these steps; another order of bfloat16 sums moves it far less.
_LOSS_ERROR = 0.1

# Microseconds a graph's host is ahead when its step begins, as in a loop, where it has nothing to wait for.
_LEAD = 2000

_SECONDS = 10  # of interleaved rounds
_LEAST = 45  # seconds a unit takes, copies and compilation included
_QUICK_BATCH = 4


@dataclass(frozen=True)
class Task:
    """A model, its data and the base optimizer it is usually trained with."""

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    base: str
    batches: tuple[int, int]
    items: int  # of an example
    item: str
    layout: torch.memory_format = torch.contiguous_format

    def make(self, batch: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        """The model and a batch, made where they are used."""
        torch.manual_seed(0)
        with device:
            inputs, targets = self.data(batch)
            model = self.model()
        return model.to(memory_format=self.layout), inputs.contiguous(memory_format=self.layout), targets  # type: ignore[call-overload]


def _pictures(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))


def _sentences(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(50257, (batch, 1024)), torch.randint(50257, (batch, 1024))


TASKS = {
    # Convolutions on tensor cores want their channels last; in the other layout they would hide the phase.
    "resnet50": Task(
        "ResNet-50", models.resnet, _pictures, "sgd", (64, 256), 1, "images", torch.channels_last
    ),
    "vit_l": Task("ViT-L/16", models.VisionTransformer, _pictures, "adamw", (16, 64), 1, "images"),
    "gpt2": Task("GPT-2 small", models.Decoder, _sentences, "adamw", (4, 16), 1024, "tokens"),
}


def units(session: Session) -> Iterator[Unit]:
    from . import recipe_steps

    for which in (0, 1):
        for name, task in TASKS.items():
            batch = task.batches[which]
            yield Unit(f"train/{name}/{batch}", partial(_measure, name, batch), _LEAST)
    yield from recipe_steps.units(session)


def size_of(batch: int, session: Session) -> int:
    """The batch, or a small one in a quick run."""
    return batch if session.cap is None else min(batch, _QUICK_BATCH)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16):
        return F.cross_entropy(model(inputs), targets.flatten())


def losses_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """One loss per example."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        losses = F.cross_entropy(model(inputs), targets.flatten(), reduction="none")
    return losses.view(len(inputs), -1).mean(1)


def about(name: str, batch: int, model: nn.Module) -> Row:
    """What every row of a unit says of its task."""
    task, sizes = TASKS[name], [p.numel() for p in model.parameters()]
    row = {"case": name, "base": task.base, "batch": batch, "precision": "bfloat16 autocast"}
    row |= {"items": batch * task.items, "item": task.item}
    return {**row, "tensors": len(sizes), "numel": sum(sizes)}


class Field:
    """Who takes part in the rounds of a unit, and what was found out about each on the way in."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rows: list[Row] = []
        self.contestants: dict[str, Contestant] = {}

    def admit(
        self, label: str, make: Callable[[], tuple[Contestant, float]], reference: float | None = None
    ) -> float:
        """Make a contestant, take its first steps and measure their peak memory; its loss after them.

        Args:
            make: builds it, takes the steps and returns it with its loss.
            reference: what the loss should be, where another one has taken the same steps.
        """
        gpu, made = self.session.gpu, []
        peer, _, kind = label.partition("/")
        prefix = f"{kind}_" if kind else ""
        gpu.free_bytes()  # what earlier ones held in reserve
        try:
            # Its own weights and all it makes count, and nothing that others hold.
            peak = gpu.peak_extra(lambda: made.append(make()))
        except (Unavailable, torch.OutOfMemoryError) as reason:
            said = " ".join(str(reason).split())[:300]
            self.rows.append(single(peer, f"{prefix}skipped", said))
            self.session.log(f"  skipped  {label}: {said}")
            return math.nan
        except Exception as error:  # a broken peer must not cost the others their numbers
            if gpu.is_lost():
                raise
            self._wrong(peer, f"raised {type(error).__name__}: {error}")
            return math.nan
        contestant, loss = made.pop()
        self.rows += [single(peer, f"{prefix}peak_bytes", peak), single(peer, f"{prefix}loss", loss)]
        if not math.isfinite(loss):
            self._wrong(peer, f"the loss is {loss} after {_STEPS} steps")
        elif reference is not None and not abs(loss - reference) <= _LOSS_ERROR * abs(reference):
            self._wrong(peer, f"the loss is {loss:.3g} after {_STEPS} steps, eager SAM's {reference:.3g}")
        else:
            self.contestants[label] = contestant
        return loss

    def _wrong(self, peer: str, problem: str) -> None:
        self.rows.append(single(peer, "wrong", problem))
        self.session.log(f"  WRONG    {peer}: {problem}")


def _measure(name: str, batch: int, session: Session) -> list[Row]:
    task, gpu = TASKS[name], session.gpu
    batch = size_of(batch, session)
    model, inputs, targets = task.make(batch, gpu.device)
    field = Field(session)
    reference = math.nan
    for key in PEERS:
        known = reference if key != PLAIN and math.isfinite(reference) else None
        loss = field.admit(key, partial(_eager, key, task, model, inputs, targets, session), known)
        reference = loss if key == _REFERENCE else reference
    for key in GRAPHED:
        known = reference if key != PLAIN and math.isfinite(reference) else None
        field.admit(f"{key}/graph", partial(_graph, key, task, model, inputs, targets, session), known)
    rows, items = field.rows, batch * task.items
    for label, parts in interleave(field.contestants, session.effort(_SECONDS)).items():
        key, _, kind = label.partition("/")
        totals = [sum(values) for values in zip(*parts.values(), strict=True)]
        if not kind:
            rows.append(measured(key, "optimizer_ms", [1e3 * s for s in parts["optimizer"]]))
        rows.append(measured(key, "graph_ms" if kind else "total_ms", [1e3 * s for s in totals]))
        prefix = "graph_" if kind else ""
        rows.append(measured(key, f"{prefix}{task.item}_per_second", [items / s for s in totals]))
    first, *others = OURS
    rows += beside(rows, dict.fromkeys(others, first), NATIVE)
    return [{**about(name, batch, model), **row} for row in rows]


def _peer(key: str, task: Task, model: nn.Module, session: Session, capturable: bool = False) -> Any:
    reason = withheld(key, session)
    if reason is not None:
        raise Unavailable(reason)
    spec = SPECS["base_alone" if key == PLAIN else key]
    base = base_for(task.base, counts_on_device=False, capturable=capturable)
    return spec.make(list(model.parameters()), base)


def _eager(
    key: str, task: Task, model: nn.Module, inputs: Tensor, targets: Tensor, session: Session
) -> tuple[Contestant, float]:
    own = copy.deepcopy(model)
    contestant = training_step(
        own, _peer(key, task, own, session), inputs, targets, 1 if key == PLAIN else 2, session
    )
    for _ in range(_STEPS):
        contestant()
    return contestant, final_loss(own, inputs, targets)


def training_step(
    model: nn.Module, peer: Any, inputs: Tensor, targets: Tensor, gradients: int, session: Session
) -> Contestant:
    """A step in four laps: gradient, first half, gradient (of SAM), second half."""

    def gradient() -> None:
        model.zero_grad(set_to_none=True)
        loss_of(model, inputs, targets).backward()

    second = gradient if gradients == 2 else lambda: None

    def contestant() -> dict[str, float]:
        laps = session.gpu.laps([gradient, peer.step_phase1, second, peer.step_phase2])
        model.zero_grad(set_to_none=True)  # room for the next one's
        return {"gradients": laps[0] + laps[2], "optimizer": laps[1] + laps[3]}

    return contestant


def _graph(
    key: str, task: Task, model: nn.Module, inputs: Tensor, targets: Tensor, session: Session
) -> tuple[Contestant, float]:
    own = copy.deepcopy(model)
    peer = _peer(key, task, own, session, capturable=True)
    record = _record_base if key == PLAIN else _record_ours
    run = record(own, peer, inputs, targets, session)
    run()  # the last of the steps

    def contestant() -> dict[str, float]:
        return {"graph": session.gpu.laps([run], ahead=_LEAD)[0]}

    return contestant, final_loss(own, inputs, targets)


def _record_ours(
    model: nn.Module, peer: Any, inputs: Tensor, targets: Tensor, session: Session
) -> Callable[[], object]:
    from sam_kernels import graphs

    sentence = graphs.refusal(peer.optimizer)
    if sentence is not None:
        raise Unavailable(sentence)
    step = graphs.make_graphed_step(model, loss_of, peer.optimizer, (inputs, targets), warmup=_STEPS - 1)
    return lambda: step(inputs, targets)


def _record_base(
    model: nn.Module, peer: Any, inputs: Tensor, targets: Tensor, session: Session
) -> Callable[[], object]:
    def step() -> None:
        # Without gradients the recorded backward writes them anew in every replay.
        model.zero_grad(set_to_none=True)
        loss_of(model, inputs, targets).backward()
        peer.step_phase2()

    replay = session.gpu.capture(step, warmup=_STEPS - 1)
    kept = model, peer  # the replay knows addresses alone
    return lambda: replay() if kept else None


@torch.no_grad()
def final_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    return loss_of(model, inputs, targets).item()
