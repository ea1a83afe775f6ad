"""What SAM's constructor decides: which recipe, which base optimizer, and what it knows by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import recipes
from .policies import Decoupled, Euclidean, Member, Momentum
from .recipe import Recipe, check_adaptive, check_rho


def choose_recipe(recipe: Recipe | str | None, rho: float | None, adaptive: bool) -> Recipe:
    """The recipe that the constructor's arguments name, with rho in place of its own."""
    if rho is not None:
        check_rho(rho, "SAM")
    check_adaptive(adaptive, "SAM")
    if isinstance(recipe, str):
        chosen = recipes.get(recipe)
    elif recipe is None:
        chosen = recipes.sam()
    elif isinstance(recipe, Recipe):
        chosen = recipe
    else:
        raise TypeError(
            f"SAM: recipe is {recipe!r}; expected a Recipe, a name ({', '.join(recipes.names())}) or None"
        )
    if adaptive and not isinstance(chosen.metric, Euclidean):
        raise TypeError(
            f"SAM: adaptive=True and recipe '{chosen.name}' each choose a metric; drop adaptive=True for the "
            "recipe's, or the recipe for T = |w|"
        )
    return chosen if rho is None else replace(chosen, rho=rho)


def own_keys(base: Optimizer) -> tuple[str, str]:
    """Under which keys of a param group our rho and adaptive live.

    "rho" and "adaptive", but where the base optimizer has a default of that name, as Adadelta has its
    rho, the key is the base's, and ours is "sam_rho" or "sam_adaptive".
    """
    rho, adaptive = (f"sam_{key}" if key in base.defaults else key for key in ("rho", "adaptive"))
    return rho, adaptive


def check_model(model: Any) -> None:
    """Raise a sentence unless model is a module or None."""
    if not (model is None or isinstance(model, nn.Module)):
        raise TypeError(
            f"SAM: model is {model!r}; expected the torch.nn.Module that the parameters belong to, or None"
        )


def check_decay(recipe: Recipe, base: Optimizer) -> None:
    """Raise a sentence where weight decay would have to be part of the loss, and is none of its gradient."""
    is_decoupled = isinstance(base, torch.optim.AdamW) or base.defaults.get("decoupled_weight_decay", False)
    if recipe.decay == "inside" and is_decoupled:
        raise ValueError(
            f"recipe '{recipe.name}': decay='inside' puts weight decay into the gradient, and that of "
            f"{type(base).__name__} is decoupled from it; use Adam, or decay='outside'"
        )


def check_momentum(recipe: Recipe, base: Optimizer) -> None:
    """Raise a sentence where a recipe goes along the base's momentum, and it keeps none."""
    if not isinstance(recipe.direction, Momentum):
        return
    for index, group in enumerate(base.param_groups):
        if not (group.get("momentum") or "betas" in group):
            raise ValueError(
                f"recipe '{recipe.name}' perturbs along the momentum of the base optimizer, and "
                f"{type(base).__name__} keeps none for param_groups[{index}]; expected SGD with momentum, "
                "Adam or AdamW"
            )


def check_measures(metrics: Any, recipe: Recipe) -> bool:
    """Whether `SAM.metrics` is measured for every recipe; a sentence where it cannot be."""
    if not isinstance(metrics, bool):
        raise TypeError(f"SAM: metrics is {metrics!r}; expected True or False")
    if metrics and getattr(recipe.mask, "compact", False):
        raise ValueError(
            f"SAM: metrics=True measures how far weights are from their snapshots, and those of recipe "
            f"'{recipe.name}' hold no more than what its mask selects; leave out compact=True or metrics=True"
        )
    return metrics


def check_max_norm(max_grad_norm: Any, recipe: Recipe) -> float | None:
    """The bound as it is; a sentence unless it is a positive number or None, and the recipe can keep it."""
    if max_grad_norm is not None and isinstance(recipe.combine, Decoupled):
        raise ValueError(
            f"SAM: max_grad_norm clips what the base gets, and recipe '{recipe.name}' moves the weights by a "
            "second gradient besides; drop max_grad_norm, or take wsam(decoupled=False)"
        )
    is_number = isinstance(max_grad_norm, int | float) and not isinstance(max_grad_norm, bool)
    if max_grad_norm is None or (is_number and 0 < max_grad_norm < float("inf")):
        return max_grad_norm
    raise ValueError(
        f"SAM: max_grad_norm is {max_grad_norm!r}; expected a positive number, or None for no clipping"
    )


def build_base(params: Any, base_optimizer: Any, base_kwargs: dict[str, Any]) -> Optimizer:
    """The base optimizer: the instance given, or one built from the class."""
    if isinstance(base_optimizer, Optimizer):
        return _check_instance(params, base_optimizer, base_kwargs)
    is_other_class = isinstance(base_optimizer, type) and not issubclass(base_optimizer, Optimizer)
    if not callable(base_optimizer) or is_other_class or isinstance(base_optimizer, nn.Module):
        raise TypeError(
            f"SAM: base_optimizer is {base_optimizer!r}; expected an optimizer class such as "
            "torch.optim.SGD, or an instance"
        )
    if isinstance(base_optimizer, type) and hasattr(base_optimizer, "first_step"):
        raise TypeError(
            f"SAM: {base_optimizer.__name__} is a sharpness-aware optimizer itself; expected a base such as "
            "torch.optim.SGD"
        )
    if params is None:
        raise TypeError("SAM: params is None; only a base_optimizer instance brings its own parameters")
    base = base_optimizer(params, **base_kwargs)
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"SAM: {base_optimizer!r} built {type(base).__name__}; expected a torch.optim.Optimizer"
        )
    return _check_base(base)


def _check_instance(params: Any, base: Optimizer, base_kwargs: dict[str, Any]) -> Optimizer:
    if base_kwargs:
        raise TypeError(
            f"SAM: {', '.join(base_kwargs)} cannot be set on an optimizer instance; set them where "
            f"{type(base).__name__} is built, or pass the class"
        )
    if params is not None:
        given = {id(p) for p in _flatten(params)}
        held = {id(p) for group in base.param_groups for p in group["params"]}
        if given != held:
            raise TypeError(
                f"SAM: params are not the parameters that this {type(base).__name__} instance holds; "
                "pass None or use SAM.wrap(instance, recipe)"
            )
    return _check_base(base)


def _check_base(base: Optimizer) -> Optimizer:
    if hasattr(base, "first_step"):
        raise TypeError(
            f"SAM: {type(base).__name__} is a sharpness-aware optimizer already; "
            "wrap its base_optimizer instead"
        )
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError(
            "SAM: LBFGS evaluates its own closure many times a step and cannot be a base optimizer; use one "
            "whose step() needs only gradients"
        )
    return base


def _flatten(params: Any) -> Iterator[Tensor]:
    for item in [params] if isinstance(params, Tensor) else params:
        if isinstance(item, dict):
            yield from _flatten(item["params"])
        else:
            yield item[1] if isinstance(item, tuple) else item


def member_lookup(param_groups: list[dict[str, Any]], model: nn.Module | None) -> Callable[[Tensor], Member]:
    """What is known about each parameter, from the model and from names given with the parameters."""
    names: dict[int, str] = {}
    modules: dict[int, nn.Module] = {}
    if model is not None:
        for prefix, module in model.named_modules():
            for name, param in module.named_parameters(recurse=False):
                names[id(param)] = f"{prefix}.{name}" if prefix else name
                modules[id(param)] = module
    for group in param_groups:
        for name, param in zip(group.get("param_names", ()), group["params"], strict=False):
            names[id(param)] = name
    return lambda param: Member(names.get(id(param)), modules.get(id(param)))


def warn_if_names_are_missing(
    recipe: Recipe, param_groups: list[dict[str, Any]], model: nn.Module | None
) -> None:
    """Say it when a recipe treats parameters by name and names are unknown."""
    if not recipe.metric.needs_names():
        return
    member_of = member_lookup(param_groups, model)
    if any(member_of(p).name is None for group in param_groups for p in group["params"]):
        warnings.warn(
            f"recipe '{recipe.name}' treats parameters by name, and names are unknown, so its operator is "
            "applied to every one of them. Pass model.named_parameters() or model= for the published form, "
            "or only=None to say that this is what you want",
            UserWarning,
            stacklevel=4,
        )
