"""Stage 5: whole training steps, two forward and backward passes included: what the phase is worth there."""

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

PEERS = (*OURS, "eager_default", "eager_fused", PLAIN)


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


def _pictures(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))


def _sentences(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(50257, (batch, 1024)), torch.randint(50257, (batch * 1024,))


TASKS = {
    "resnet50": Task("ResNet-50", models.resnet, _pictures, "sgd", (64, 256), 1, "images"),
    "vit_l": Task("ViT-L/16", models.VisionTransformer, _pictures, "adamw", (16, 64), 1, "images"),
    "gpt2": Task("GPT-2 small", models.Decoder, _sentences, "adamw", (4, 16), 1024, "tokens"),
}


def units(session: Session) -> Iterator[Unit]:
    for name, task in TASKS.items():
        for batch in task.batches:
            yield Unit(f"train/{name}/{batch}", partial(_measure, name, batch))


def _measure(name: str, batch: int, session: Session) -> list[Row]:
    task, gpu = TASKS[name], session.gpu
    torch.manual_seed(0)
    model = task.model().to(gpu.device)
    inputs, targets = (x.to(gpu.device) for x in task.data(batch))
    rows: list[Row] = []
    contestants: dict[str, Contestant] = {}
    for key in PEERS:
        own = copy.deepcopy(model)
        try:
            peer = _peer(key, task, own, session)
            contestants[key] = training_step(own, peer, inputs, targets, 1 if key == PLAIN else 2, session)
            contestants[key]()
        except Unavailable as reason:
            contestants.pop(key, None)
            rows.append(single(key, "skipped", str(reason)))
            session.log(f"  skipped  {key}: {reason}")
            continue
        if not math.isfinite(_loss(own, inputs, targets).item()):
            contestants.pop(key)
            rows.append(single(key, "wrong", "the loss is not finite after a step"))
            session.log(f"  WRONG    {key}: {rows[-1]['value']}")
    for key, parts in interleave(contestants, session.effort(12)).items():
        totals = [sum(values) for values in zip(*parts.values(), strict=True)]
        rows.append(measured(key, "optimizer_ms", [1e3 * s for s in parts["optimizer"]]))
        items = batch * task.items
        rows.append(measured(key, "total_ms", [1e3 * s for s in totals]))
        rows.append(measured(key, f"{task.item}_per_second", [items / s for s in totals]))
        session.log(f"  {key}: {rows[-1]['p50']:,.0f} {task.item}/s")
    first, *others = OURS
    rows += beside(rows, dict.fromkeys(others, first), NATIVE)
    parameters = list(model.parameters())
    about = {"case": name, "base": task.base, "batch": batch, "precision": "bfloat16 autocast"}
    about |= {"tensors": len(parameters), "numel": sum(p.numel() for p in parameters)}
    return [{**about, **row} for row in rows]


def _peer(key: str, task: Task, model: nn.Module, session: Session) -> Any:
    reason = withheld(key, session)
    if reason is not None:
        raise Unavailable(reason)
    spec = SPECS["base_alone" if key == PLAIN else key]
    return spec.make(list(model.parameters()), base_for(task.base, counts_on_device=False))


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16):
        return F.cross_entropy(model(inputs), targets)


def training_step(
    model: nn.Module, peer: Any, inputs: Tensor, targets: Tensor, gradients: int, session: Session
) -> Contestant:
    """A step in four laps: gradient, first half, gradient (of SAM), second half."""

    def gradient() -> None:
        model.zero_grad(set_to_none=True)
        _loss(model, inputs, targets).backward()

    second = gradient if gradients == 2 else lambda: None

    def contestant() -> dict[str, float]:
        laps = session.gpu.laps([gradient, peer.step_phase1, second, peer.step_phase2])
        return {"gradients": laps[0] + laps[2], "optimizer": laps[1] + laps[3]}

    return contestant
