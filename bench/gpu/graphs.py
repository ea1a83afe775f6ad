"""Stage 2, CUDA graphs and launches: a replayed SAM step is the eager one, and takes three kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cases import Shape, give_gradients, resnet50
from ..records import Row, single
from . import compare
from .compare import AWKWARD
from .lists import CASES
from .session import Session, guarded, skipped, verdict

_WARMUP, _REPLAYS = 3, 4

# A step of SAM around a fused base is norm, perturbation, and restore with update.
LAUNCHES = 3


class Static:
    """A SAM optimizer with gradients in fixed places, as a captured step needs them."""

    def __init__(self, session: Session, name: str, shapes: list[Shape]) -> None:
        from sam_kernels import SAM

        device = session.gpu.device
        self.shapes = shapes
        self.params: list[Tensor] = [
            torch.nn.Parameter(x.to(device)) for x in compare.draw(shapes, torch.float32, 0)
        ]
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params]
        options: dict[str, Any] = {
            "rho": 0.5,
            "lr": 0.01,
            "weight_decay": 0.01,
            "backend": session.gpu.backend,
        }
        if name == "sgd":
            self.optimizer = SAM(self.params, torch.optim.SGD, momentum=0.9, **options)
        else:
            self.optimizer = SAM(self.params, torch.optim.AdamW, capturable=device.type == "cuda", **options)

    def fill(self, number: int) -> None:
        """New gradients in the old places."""
        for places, seed in ((self.first, 2 * number + 1), (self.second, 2 * number + 2)):
            for place, values in zip(places, compare.draw(self.shapes, torch.float32, seed), strict=True):
                place.copy_(values)

    def step(self) -> None:
        give_gradients(self.params, self.first)
        self.optimizer.first_step()
        give_gradients(self.params, self.second)
        self.optimizer.second_step()

    def results(self) -> dict[str, list[torch.Tensor]]:
        return {"weights": list(self.params), **compare.state_of(self.optimizer, self.params)}


def check(name: str, session: Session) -> list[Row]:
    """Steps replayed with new gradients against the same steps taken eagerly, bit for bit."""

    def run() -> list[str]:
        eager = Static(session, name, AWKWARD)
        eager.fill(0)
        for _ in range(_WARMUP):
            eager.step()
        graphed = Static(session, name, AWKWARD)
        graphed.fill(0)
        replay = session.gpu.capture(graphed.step, warmup=_WARMUP)
        for number in range(1, _REPLAYS + 1):
            eager.fill(number)
            eager.step()
            graphed.fill(number)
            replay()
        session.gpu.synchronize()
        want = eager.results()
        return [
            f"{what} of the replayed steps differ"
            for what, tensors in graphed.results().items()
            if not compare.same_bits(tensors, want[what])
        ]

    return [verdict(session, f"graph, {name}", guarded(run))]


def check_launches(session: Session) -> list[Row]:
    """Three launches a step on ResNet-50's list; what longer lists take is recorded."""
    count = session.gpu.launches(_steady(session, "sgd", list(resnet50())))
    if count is None:
        return [skipped(session, "launches", "the profiler sees no kernels (CUPTI missing or not permitted)")]
    problems = [] if count == LAUNCHES else [f"{count} launches a step on ResNet-50's list, not {LAUNCHES}"]
    rows = [verdict(session, "launches", problems), single("launches", "resnet50", count)]
    for case in ("vit_l", "gpt2_xl"):
        # The number depends on how many tensors there are and not on how long they are.
        count = session.gpu.launches(_steady(session, "adamw", CASES[case].shapes(64)))
        session.log(f"  {CASES[case].title}, AdamW(capturable): {count} launches")
        rows.append(single("launches", case, count))
    return rows


def _steady(session: Session, name: str, shapes: list[Shape]) -> Callable[[], None]:
    """A step that allocates nothing any more."""
    static = Static(session, name, shapes)
    for number in range(3):
        static.fill(number)
        static.step()
    return static.step
