"""Stage 2, CUDA graphs and launches: a replayed SAM step is the eager one, and takes three kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import Shape, give_gradients, resnet50
from ..records import Row, single
from . import compare
from .compare import AWKWARD
from .lists import CASES
from .ours import named
from .session import Session, guarded, skipped, verdict
from .trajectories import state_of

_WARMUP, _REPLAYS = 3, 4

# A step of SAM around a fused base is norm, perturbation, and restore with update.
LAUNCHES = 3


class Static:
    """A SAM optimizer whose gradients are in fixed places, as a captured step needs them."""

    def __init__(self, session: Session, backend: str, name: str, shapes: list[Shape]) -> None:
        from sam_kernels import SAM

        device = session.gpu.device
        self.shapes = shapes
        self.params: list[Tensor] = [
            torch.nn.Parameter(x.to(device)) for x in compare.draw(shapes, torch.float32, 0)
        ]
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params]
        self.grads = [torch.zeros_like(p) for p in self.params]
        options: dict[str, Any] = {"rho": 0.5, "lr": 0.01, "weight_decay": 0.01, "backend": backend}
        if name == "sgd":
            self.optimizer = SAM(self.params, torch.optim.SGD, momentum=0.9, **options)
        else:
            self.optimizer = SAM(self.params, torch.optim.AdamW, capturable=device.type == "cuda", **options)

    def fill(self, number: int) -> None:
        """New gradients in the old places."""
        for places, seed in ((self.first, 2 * number + 1), (self.second, 2 * number + 2)):
            for place, values in zip(places, compare.draw(self.shapes, torch.float32, seed), strict=True):
                place.copy_(values)

    def step_in_place(self) -> None:
        """Both gradients in one place, as backward leaves them with zero_grad(set_to_none=False)."""
        give_gradients(self.params, self.grads)
        torch._foreach_copy_(self.grads, self.first)
        self.optimizer.first_step()
        torch._foreach_copy_(self.grads, self.second)
        self.optimizer.second_step()

    def step_elsewhere(self) -> None:
        """The second gradient in another place than the first."""
        self.bare_step(self.first, self.second)

    def bare_step(self, first: list[Tensor], second: list[Tensor]) -> None:
        """Nothing but the optimizer's own work."""
        give_gradients(self.params, first)
        self.optimizer.first_step()
        give_gradients(self.params, second)
        self.optimizer.second_step()

    def results(self) -> dict[str, list[torch.Tensor]]:
        return {"weights": list(self.params), **state_of(self.optimizer)}


def check(backend: str, name: str, session: Session) -> list[Row]:
    """Steps replayed with new gradients against the same steps taken eagerly, bit for bit."""

    def run(kind: Callable[[Static], None]) -> list[str]:
        eager = Static(session, backend, name, AWKWARD)
        eager.fill(0)
        for _ in range(_WARMUP):
            kind(eager)
        graphed = Static(session, backend, name, AWKWARD)
        graphed.fill(0)
        replay = session.gpu.capture(partial(kind, graphed), warmup=_WARMUP)
        for number in range(1, _REPLAYS + 1):
            eager.fill(number)
            kind(eager)
            graphed.fill(number)
            replay()
        session.gpu.synchronize()
        want = eager.results()
        return [
            f"{what} of the replayed steps differ"
            for what, tensors in graphed.results().items()
            if not compare.same_bits(tensors, want[what])
        ]

    kinds = {"gradients in place": Static.step_in_place, "gradients elsewhere": Static.step_elsewhere}
    return [
        verdict(session, named(backend, f"graph, {name}, {where}"), guarded(partial(run, kind)))
        for where, kind in kinds.items()
    ]


def check_launches(backend: str, session: Session) -> list[Row]:
    """Three launches a step on ResNet-50's list, tables of addresses apart; longer lists are recorded."""
    shapes = list(resnet50())
    static, what = _steady(session, backend, "sgd", shapes), named(backend, "launches")
    there = session.gpu.launches(lambda: static.bare_step(static.first, static.first))
    static.step_elsewhere()
    moved = session.gpu.launches(static.step_elsewhere)
    if there is None or moved is None:
        return [skipped(session, what, "the profiler sees no kernels (CUPTI missing or not permitted)")]
    problems = [] if there == LAUNCHES else [f"{there} a step on ResNet-50's list, not {LAUNCHES}"]
    # Triton's passes too: first and second gradients have tables of their own, uploaded when places change.
    if moved != LAUNCHES:
        problems.append(f"{moved} with the second gradients elsewhere, not {LAUNCHES}")
    rows = [verdict(session, what, problems)]
    rows += [single(what, "resnet50", there), single(what, "resnet50_moved", moved)]
    for case in ("vit_l", "gpt2_xl"):
        # The number depends on how many tensors there are and not on how long they are.
        static = _steady(session, backend, "adamw", CASES[case].shapes(64))
        count = session.gpu.launches(lambda one=static: one.bare_step(one.first, one.first))  # type: ignore[misc]
        session.log(f"  {backend}: {CASES[case].title}, AdamW(capturable): {count} launches")
        rows.append(single(what, case, count))
    return rows


def _steady(session: Session, backend: str, name: str, shapes: list[Shape]) -> Static:
    """A step that allocates nothing any more, its last gradients in the first places."""
    static = Static(session, backend, name, shapes)
    for number in range(3):
        static.fill(number)
        static.step_elsewhere()
    static.bare_step(static.first, static.first)
    return static
