"""Stage 2, whole steps in a graph: forward and backward passes and all a recipe does, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..records import Row
from . import compare
from .compare import AWKWARD
from .ours import named
from .session import Session, guarded, verdict
from .trajectories import Method, methods, of_recipes, state_of

_WARMUP, _REPLAYS = 3, 4


def recorded() -> dict[str, list[Method]]:
    """What a graph can hold, around both base optimizers: recipes in all their ways, masters, clipping."""
    from sam_kernels.graphs import recipe_refusal

    found = {}
    for name, ways in of_recipes().items():
        own = [method for method in ways if recipe_refusal(method.recipe()) is None]  # type: ignore[misc]
        if own:
            found[f"recipe/{name}"] = [_around(method, base) for method in own for base in _BASES]
    with_masters = [methods()[f"{base}_masters"] for base in _BASES]
    clipped = _around(methods()["clipped"], "sgd")
    return {**found, "masters": with_masters, "clipped": [clipped, methods()["clipped"]]}


_BASES = ("sgd", "adamw")


def _around(method: Method, base: str) -> Method:
    """The method around another base optimizer."""
    model = methods()[base]
    ours = {key: value for key, value in method.options.items() if key in ("rho", "max_grad_norm")}
    plain = {key: value for key, value in model.options.items() if key != "rho"}
    return replace(method, name=f"{method.name}, {base}", base=model.base, options={**plain, **ours})


class Trained:
    """A method on a model whose gradients depend on its weights and on the batch."""

    def __init__(self, session: Session, backend: str, method: Method) -> None:
        self.device, self.dtype = session.gpu.device, method.dtypes[0]
        weights = [torch.nn.Parameter(x.to(self.device)) for x in compare.draw(AWKWARD, self.dtype, 0)]
        self.model = nn.ParameterList(weights)
        # Counters beside the weights, as backends of a GPU have them anyway.
        more = {"fused": True} if self.device.type == "cpu" and method.base is not torch.optim.SGD else {}
        self.optimizer = method.build(weights, backend, **more)

    def batch(self, number: int) -> list[Tensor]:
        sizes = [torch.Size(shape).numel() for shape in AWKWARD]
        slope, curvature = compare.draw([(sum(sizes),), (sum(sizes),)], self.dtype, number)
        return [slope.to(self.device), curvature.to(self.device)]

    @staticmethod
    def loss(model: Any, slope: Tensor, curvature: Tensor) -> Tensor:
        """``sum s w + c w^2 / 2``."""
        sizes = [p.numel() for p in model]
        parts = zip(model, slope.split(sizes), curvature.split(sizes), strict=True)
        terms = [(s.view_as(p) * p + 0.5 * c.view_as(p) * p * p).float().sum() for p, s, c in parts]
        return torch.stack(terms).sum()

    def closure(self, batch: Sequence[Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = self.loss(self.model, *batch)
            loss.backward()
            return loss.detach()

        return run

    def step(self, batch: Sequence[Tensor], ahead: Sequence[Tensor] | None = None) -> Tensor:
        more = {} if ahead is None else {"ahead": self.closure(ahead)}
        found: Tensor = self.optimizer.step(self.closure(batch), **more)
        return found

    def results(self) -> dict[str, list[Tensor]]:
        return {"weights": list(self.model), **state_of(self.optimizer)}


def check(backend: str, ways: list[Method], session: Session) -> list[Row]:
    """Whole steps replayed on new batches against the same steps taken eagerly, bit for bit."""
    rows = []
    for method in ways:
        what = named(backend, f"graph, {method.name}")
        rows.append(verdict(session, what, guarded(partial(_replayed, session, backend, method))))
    return rows


def _replayed(session: Session, backend: str, method: Method) -> list[str]:
    from sam_kernels.graphs import refusal
    from sam_kernels.policies import Anticipated

    eager, graphed = (Trained(session, backend, method) for _ in range(2))
    sentence = refusal(graphed.optimizer)
    if sentence is not None:
        return [f"no graph can replay it: {sentence}"]
    looks_ahead = isinstance(graphed.optimizer.recipe.probe, Anticipated)
    take = _by_hand if looks_ahead else _by_make_graphed_step
    found = take(session, eager, graphed)
    session.gpu.synchronize()
    want = eager.results()
    return found + [
        f"{what} of the replayed steps differ"
        for what, tensors in graphed.results().items()
        if not compare.same_bits(tensors, want[what])
    ]


def _by_make_graphed_step(session: Session, eager: Trained, graphed: Trained) -> list[str]:
    from sam_kernels.graphs import make_graphed_step

    sample = eager.batch(1)
    step = make_graphed_step(graphed.model, Trained.loss, graphed.optimizer, sample, warmup=_WARMUP)
    for _ in range(_WARMUP):
        eager.step(sample)
    found = []
    for number in range(2, 2 + _REPLAYS):
        batch = eager.batch(number)
        if not compare.same_bits([step(*batch)], [eager.step(batch)]):
            found.append(f"the loss of replay {number - 1} differs")
    return found


def _by_hand(session: Session, eager: Trained, graphed: Trained) -> list[str]:
    """A step that takes the next batch too."""
    here, ahead = graphed.batch(1), graphed.batch(2)
    _keep_gradients(graphed, here, ahead)
    replay = session.gpu.capture(partial(graphed.step, here, ahead), warmup=_WARMUP - 1)
    _keep_gradients(eager, eager.batch(1), eager.batch(2))
    for _ in range(_WARMUP - 1):
        eager.step(eager.batch(1), eager.batch(2))
    for number in range(2, 2 + _REPLAYS):
        for places, seed in ((here, number), (ahead, number + 1)):
            for place, values in zip(places, graphed.batch(seed), strict=True):
                place.copy_(values)
        replay()
        eager.step(eager.batch(number), eager.batch(number + 1))
    return []


def _keep_gradients(one: Trained, here: Sequence[Tensor], ahead: Sequence[Tensor]) -> None:
    """A first step, after which gradients stay where they are.

    As `make_graphed_step` does it: a step that drops its gradients would get others in a capture, out of the
    graph's own memory, and Triton's passes would have to upload their addresses.
    """
    from sam_kernels.graphs import _fix_gradients

    opt = one.optimizer
    opt.copies_gradients = opt._clears_by_zeros = True
    one.step(here, ahead)
    _fix_gradients(opt)
