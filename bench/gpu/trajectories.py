"""Steps of every method from seeded weights and gradients, with a stop wherever something is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import Shape
from . import compare
from .compare import difference, draw, place, same_bits

_SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
_ADAM: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.01}


@dataclass(frozen=True)
class Method:
    """A SAM optimizer to step.

    Attributes:
        base: of torch.optim.
        options: of SAM and the base, the recipe apart.
        recipe: makes the recipe, if it is not plain SAM.
        dtypes: of the weights it is for.
        powers: whether it takes powers, whose error the exponent multiplies.
        is_whole: whether one call takes the whole step, with a closure, in place of two half steps.
    """

    name: str
    base: Any
    options: dict[str, Any]
    recipe: Callable[[], Any] | None = None
    dtypes: tuple[torch.dtype, ...] = compare.DTYPES
    powers: bool = False
    is_whole: bool = False

    def slack(self, dtype: torch.dtype) -> int:
        """How much further off results may be: powers, or gradients that are combined and rounded again."""
        return 4 if self.powers or (self.is_whole and dtype in compare.HALF) else 1

    def build(self, params: Sequence[Tensor], backend: str, **more: Any) -> Any:
        """The optimizer. Parameters have the names of weights, of norms and of biases in turn."""
        from sam_kernels import SAM

        endings = ("fc.weight", "norm.weight", "fc.bias")
        named = [(f"layer{t}.{endings[t % 3]}", p) for t, p in enumerate(params)]
        options = {**self.options, **more}
        if self.recipe is not None:
            options["recipe"] = self.recipe()
        return SAM(named, self.base, backend=backend, **options)


def methods() -> dict[str, Method]:
    """What is stepped in two halves: both update rules, every norm, what keeps half weights exact."""
    from sam_kernels import Recipe, recipes
    from sam_kernels.policies import Euclidean

    sgd, adam, adamw = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
    ball = {p: partial(Recipe, metric=Euclidean(p=p), rho=rho) for p, rho in _BALLS.items()}
    with_masters = {"rho": 0.5, "master_weights": True}
    found = (
        Method("sgd", sgd, {"rho": 0.5, **_SGD}),
        Method("adam", adam, {"rho": 0.5, **_ADAM}),
        Method("adamw", adamw, {"rho": 0.5, **_ADAM}),
        Method("asam", sgd, _SGD, partial(recipes.asam, only=None)),
        Method("p_inf", sgd, _SGD, ball[math.inf]),
        Method("p_3", sgd, _SGD, ball[3.0], powers=True),
        Method("p_1", sgd, _SGD, ball[1.0]),
        Method("clipped", adamw, {"rho": 0.5, "max_grad_norm": 1.0, **_ADAM}),
        Method("sgd_masters", sgd, {**with_masters, **_SGD}, dtypes=compare.HALF),
        Method("adamw_masters", adamw, {**with_masters, **_ADAM}, dtypes=compare.HALF),
        Method(
            "rounded_at_random",
            sgd,
            {"rho": 5.0, "stochastic_rounding": True, **_SGD},
            dtypes=(torch.bfloat16,),
        ),
    )
    return {method.name: method for method in found}


# Radii large enough for a wrong perturbation to show.
_BALLS = {math.inf: 0.01, 3.0: 0.5, 1.0: 0.5}

# A step of each is a call with a closure, and within four of them everything it does happens. Where a recipe
# goes several ways, each way is named.
_ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "ae_sam": {"": {"steps": 4, "decay": 0.5}},
    "esam": {"": {"beta": 0.6}, "tensor": {"by": "tensor", "norm": "masked"}},
    "gsam": {"": {}, "adaptive": {"adaptive": True}},
    "layerwise_sam": {"": {}, "radius": {"form": "radius"}, "trust": {"form": "trust_ratio"}},
    "looksam": {"": {"k": 2}, "tensor": {"k": 2, "scope": "tensor"}},
    "multistep_sam": {"": {}, "free": {"project": False}},
    "rst": {"": {"seed": 4}},
    "ssam_d": {"": {"every": 1, "sparsity": 0.4}, "masked": {"every": 1, "norm": "masked"}},
    "ssam_f": {
        "": {"sparsity": 0.5},
        "2:4": {"pattern": "nm"},
        "structured": {"pattern": "structured", "norm": "masked"},
    },
    "wsam": {"": {}, "coupled": {"decoupled": False}},
}


def of_recipes() -> dict[str, list[Method]]:
    """Every recipe of the catalogue around SGD, in all its ways, with what it needs to show all it does."""
    from sam_kernels import recipes

    found: dict[str, list[Method]] = {}
    for name in recipes.names():
        for way, arguments in _ARGUMENTS.get(name, {"": {}}).items():
            title = f"{name}, {way}" if way else name
            make = partial(recipes.get, name, rho=0.5, **arguments)
            method = Method(title, torch.optim.SGD, _SGD, make, is_whole=True)
            found.setdefault(name, []).append(method)
    return found


@dataclass
class Stops:
    """What a trajectory left at each of its stops, and what it broke on the way."""

    lists: dict[str, list[Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def mark(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.lists[name] = [x.detach().to("cpu", copy=True) for x in tensors]


def trajectory(
    method: Method,
    backend: str,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    memory: str = "plain",
    steps: int | None = None,
) -> Stops:
    """A few steps of a method."""
    params = [torch.nn.Parameter(place(w, memory, device)) for w in draw(shapes, dtype, 0)]
    optimizer = method.build(params, backend)
    stops = Stops()
    run = _whole_steps if method.is_whole else _half_steps
    run(optimizer, params, shapes, memory, stops, steps)
    return stops


def _half_steps(
    optimizer: Any,
    params: list[Any],
    shapes: Sequence[Shape],
    memory: str,
    stops: Stops,
    steps: int | None,
) -> None:
    dtype = params[0].dtype
    for step in range(1, (steps or 2) + 1):
        give(params, draw(shapes, dtype, 2 * step), memory)
        optimizer.first_step()
        stops.mark(f"step {step}, perturbed weights", params)
        give(params, draw(shapes, dtype, 2 * step + 1), memory)
        optimizer.second_step()
        stops.mark(f"step {step}, updated weights", params)
        for name, tensors in state_of(optimizer).items():
            stops.mark(f"step {step}, {name}", tensors)
    give(params, draw(shapes, dtype, 99), memory)
    before = [p.detach().clone() for p in params]
    with optimizer.perturbed():
        if not any(not torch.equal(p, b) for p, b in zip(params, before, strict=True)):
            stops.problems.append("nothing was perturbed")
    if not same_bits(params, before):
        stops.problems.append("restored weights differ in their bits")


def _whole_steps(
    optimizer: Any,
    params: list[Any],
    shapes: Sequence[Shape],
    memory: str,
    stops: Stops,
    steps: int | None,
) -> None:
    from sam_kernels.policies import Anticipated, TopScores

    seed, has_moved = 0, False

    def closure() -> Tensor:
        nonlocal seed, has_moved
        seed += 1
        stops.mark(f"weights of gradient {seed}", params)
        has_moved = has_moved or not same_bits(params, start)
        # Of different lengths, for recipes that look at them.
        grads = [x * 2.0 ** (seed % 3 - 1) for x in draw(shapes, params[0].dtype, seed)]
        give(params, grads, memory)
        return torch.zeros((), device=params[0].device)

    if isinstance(optimizer.recipe.mask, TopScores):
        optimizer.update_masks([99], partial(_loss_with_gradients, params, shapes))
        stops.mark("masks", [optimizer.masks[p] for p in params])
    looks_ahead = isinstance(optimizer.recipe.probe, Anticipated)
    for step in range(1, (steps or 4) + 1):
        start = [p.detach().clone() for p in params]
        optimizer.step(closure, **({"ahead": closure} if looks_ahead else {}))
        stops.mark(f"step {step}, updated weights", params)
    for name, tensors in state_of(optimizer).items():
        stops.mark(f"at the end, {name}", tensors)
    if not has_moved:
        stops.problems.append("nothing was perturbed")


def _loss_with_gradients(params: Sequence[Tensor], shapes: Sequence[Shape], seed: int) -> Tensor:
    """A loss whose gradients are those of the seed, to the bit."""
    grads = draw(shapes, params[0].dtype, seed)
    terms = [(p * g.to(p.device)).sum().float() for p, g in zip(params, grads, strict=True)]
    return torch.stack(terms).sum()


def give(params: Sequence[Tensor], values: Sequence[Tensor], memory: str) -> None:
    """Gradients placed like the weights."""
    for param, value in zip(params, values, strict=True):
        param.grad = place(value, memory, param.device)


def state_of(optimizer: Any) -> dict[str, list[Tensor]]:
    """What a checkpoint holds of each tensor, by name: the base optimizer's state, and ours."""
    found: dict[str, list[Tensor]] = {}
    for _, entry in sorted(optimizer.state_dict()["state"].items()):
        for name, value in sorted(entry.items()):
            if isinstance(value, Tensor):
                found.setdefault(name, []).append(value)
    return found


def differences(got: Stops, want: Stops, slack: int = 1) -> list[str]:
    """Every stop at which two trajectories differ, and what the first of them broke."""
    found = list(got.problems)
    if got.lists.keys() != want.lists.keys():
        return [*found, f"stops {sorted(got.lists)} in place of {sorted(want.lists)}"]
    for name, tensors in got.lists.items():
        sentence = difference(tensors, want.lists[name], slack)
        if sentence is not None:
            found.append(f"{name}: {sentence}")
    return found
