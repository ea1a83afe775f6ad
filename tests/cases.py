"""The table: problems with known numbers, recipes with their oracles, base optimizers with theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from oracles import asam, bases, layerwise, nosam, sam, ssam
from torch import Tensor
from torch.nn import Parameter

from sam_kernels import recipes


def row(*numbers: float) -> Tensor:
    """Return a float64 vector."""
    return torch.tensor(numbers, dtype=torch.float64)


@dataclass(frozen=True)
class Quadratic:
    """A loss with gradient(w0 + d) = slope + curvature * d, tensor by tensor."""

    start: dict[str, Tensor]
    slope: dict[str, Tensor]
    curvature: dict[str, Tensor]

    def parameters(self) -> dict[str, Parameter]:
        """Return fresh parameters at the start."""
        return {name: Parameter(w.clone()) for name, w in self.start.items()}

    def loss(self, parameters: dict[str, Parameter]) -> Tensor:
        """Return the loss, to be differentiated."""
        total = torch.zeros((), dtype=torch.float64)
        for name, w in parameters.items():
            d = w - self.start[name]
            total = total + (self.slope[name] * d).sum() + 0.5 * (self.curvature[name] * d * d).sum()
        return total

    def only(self, *names: str) -> Quadratic:
        """Return the same problem on some of the tensors."""
        return Quadratic(*({n: t[n] for n in names} for t in (self.start, self.slope, self.curvature)))


THREE_TENSORS = Quadratic(
    start={"fc.weight": row(1, -2, 3), "fc.bias": row(0.5, -0.25), "bn.weight": row(1.5)},
    slope={"fc.weight": row(0.1, 0.2, -0.2), "fc.bias": row(0.1, -0.3), "bn.weight": row(0.4)},
    curvature={"fc.weight": row(1, 2, 3), "fc.bias": row(4, 5), "bn.weight": row(6)},
)
ONE_TENSOR = THREE_TENSORS.only("fc.weight")

TOY_PUSH = (row(0.1, -0.2, 0.3), row(-0.2, 0.1, 0.0), row(0.05, 0.05, -0.1), row(0.0, -0.1, 0.1))


def toy_parameters() -> dict[str, Parameter]:
    """Return the two tensors of the toy problem, both named as weights."""
    return {"A.weight": Parameter(row(1.0, -0.5)), "B.weight": Parameter(row(2.0))}


def toy_loss(parameters: dict[str, Parameter], step: int) -> Tensor:
    """Return f_t: a coupled quartic with a push that changes every step."""
    (a1, a2), (b1,) = parameters["A.weight"], parameters["B.weight"]
    push = TOY_PUSH[step] @ torch.stack([a1, a2, b1])
    return 0.5 * (a1**2 + 4 * a2**2 + 0.5 * b1**2) + 0.3 * a1 * b1 + 0.1 * a2**4 + push


@dataclass(frozen=True)
class RecipeCase:
    """One row: a recipe of the package, how SAM is asked for it, and the oracle's perturbation."""

    label: str
    recipe: str  # the name under which recipes.names() lists it
    perturbation: Callable[[dict, dict], dict]
    arguments: dict[str, Any] = field(default_factory=dict)
    adaptive: bool = False
    every: int = 1

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of SAM."""
        if self.adaptive:
            return {"adaptive": True, **self.arguments}
        more = {} if self.every == 1 else {"every": self.every}
        return {"recipe": recipes.get(self.recipe, **self.arguments, **more)}


RECIPES = (
    RecipeCase("sam", "sam", partial(sam.perturbation, rho=0.05), {"rho": 0.05}),
    RecipeCase(
        "sam-inf", "sam", partial(sam.perturbation, rho=0.01, p=math.inf), {"rho": 0.01, "p": math.inf}
    ),
    RecipeCase("sam-4", "sam", partial(sam.perturbation, rho=0.05, p=4.0), {"rho": 0.05, "p": 4.0}),
    RecipeCase("sam-1.5", "sam", partial(sam.perturbation, rho=0.05, p=1.5), {"rho": 0.05, "p": 1.5}),
    RecipeCase("sam-every-2", "sam", partial(sam.perturbation, rho=0.05), {"rho": 0.05}, every=2),
    RecipeCase("asam", "asam", partial(asam.perturbation, rho=0.5, eta=0.01)),
    RecipeCase(
        "asam-inf",
        "asam",
        partial(asam.perturbation, rho=0.02, eta=0.1, p=math.inf),
        {"rho": 0.02, "eta": 0.1, "p": math.inf},
    ),
    RecipeCase("adaptive", "asam", partial(asam.elementwise, rho=0.5), {"rho": 0.5}, adaptive=True),
    RecipeCase(
        "layerwise-operator", "layerwise_sam", partial(layerwise.operator, rho=0.05, eta=0.01), {"eta": 0.01}
    ),
    RecipeCase(
        "layerwise-radius",
        "layerwise_sam",
        partial(layerwise.radius, rho=0.03),
        {"rho": 0.03, "form": "radius"},
    ),
    RecipeCase(
        "layerwise-trust",
        "layerwise_sam",
        partial(layerwise.trust_ratio, rho=0.01),
        {"rho": 0.01, "form": "trust_ratio"},
    ),
    RecipeCase("nosam", "nosam", partial(nosam.perturbation, rho=0.05), {"rho": 0.05}),
    # Before the first update of its mask every weight is perturbed.
    RecipeCase("ssam-f", "ssam_f", ssam.perturbation),
    # A mask of which nothing is ever dropped is the first one, which is random.
    RecipeCase(
        "ssam-d",
        "ssam_d",
        partial(ssam.perturbation, mask=partial(ssam.first_mask, sparsity=0.4, seed=5)),
        {"sparsity": 0.4, "seed": 5, "drop_rate": 0.0},
    ),
    RecipeCase(
        "ssam-d-masked-norm",
        "ssam_d",
        partial(ssam.perturbation, mask=ssam.first_mask, norm="masked"),
        {"norm": "masked", "drop_rate": 0.0},
    ),
)


@dataclass(frozen=True)
class BaseCase:
    """One row: a torch base optimizer with its arguments, and the oracle's."""

    label: str
    base: type[torch.optim.Optimizer]
    oracle: Callable[..., Any]
    arguments: dict[str, Any]


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
# Adam's eps is raised: it keeps tiny gradients from being amplified, where float32 must stay within 1e-6
SLOW = {"lr": 0.01, "eps": 1e-3}
BASES = (
    BaseCase("sgd", SGD, bases.Sgd, {"lr": 0.1}),
    BaseCase("sgd-momentum", SGD, bases.Sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    BaseCase("sgd-dampening", SGD, bases.Sgd, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
    BaseCase(
        "sgd-nesterov", SGD, bases.Sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02}
    ),
    BaseCase(
        "sgd-maximize", SGD, bases.Sgd, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "maximize": True}
    ),
    BaseCase("adam", ADAM, bases.Adam, SLOW),
    BaseCase("adam-decay", ADAM, bases.Adam, {**SLOW, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    BaseCase("adam-amsgrad", ADAM, bases.Adam, {**SLOW, "amsgrad": True, "weight_decay": 0.01}),
    BaseCase("adam-maximize", ADAM, bases.Adam, {**SLOW, "weight_decay": 0.01, "maximize": True}),
    BaseCase("adamw", ADAMW, bases.adamw, {**SLOW, "weight_decay": 0.1}),
    BaseCase("adamw-amsgrad", ADAMW, bases.adamw, {**SLOW, "weight_decay": 0.1, "amsgrad": True}),
    BaseCase("adamw-maximize", ADAMW, bases.adamw, {**SLOW, "maximize": True}),
)
