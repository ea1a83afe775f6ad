"""Closures: which of them go with which recipe, and what they drop."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from torch import Tensor

from .policies import (
    AdaptiveRatio,
    Anticipated,
    Decoupled,
    Dynamic,
    Lookbehind,
    Remembering,
    ReuseOrthogonal,
)
from .recipe import Recipe


def check_closures(recipe: Recipe, closure: Any, ahead: Any, m_sharpness: bool) -> None:
    """Raise a sentence unless step()'s arguments go together, and with the recipe."""
    name = recipe.name
    looks_ahead = isinstance(recipe.probe, Anticipated)
    if ahead is not None and not (looks_ahead and callable(ahead)):
        why = f"is {ahead!r}" if looks_ahead else f"was given, and recipe '{name}' does not look ahead"
        raise TypeError(f"step(): ahead {why}; expected the next batch's closure for recipes that do")
    if callable(closure) or closure is None:
        _check_whole(closure)
        if m_sharpness:
            raise TypeError("step(): m_sharpness=True goes with a list of closures, one for each micro-batch")
        if looks_ahead and closure is not None and ahead is None:
            raise TypeError(
                f"step(): recipe '{name}' evaluates the next batch too; expected step(closure, ahead=...)"
            )
        return
    if not isinstance(closure, list | tuple) or not closure or not all(map(callable, closure)):
        raise TypeError(
            f"step(): closure is {closure!r}; expected a function that recomputes the loss, a list of "
            "such functions, or None"
        )
    if isinstance(recipe.probe, Anticipated | Lookbehind):
        raise TypeError(f"step(): recipe '{name}' takes one closure, not a list")
    lasts = isinstance(recipe.combine, Decoupled | ReuseOrthogonal | AdaptiveRatio)
    lasts = lasts or isinstance(recipe.direction, Remembering) or isinstance(recipe.mask, Dynamic)
    if m_sharpness and (lasts or recipe.cadence.needs_norm):
        raise TypeError(
            f"step(): recipe '{name}' keeps something from the gradient of each step, and micro-batches "
            "would each write it; drop m_sharpness=True"
        )


def _check_whole(closure: Any) -> None:
    """Raise a sentence for the closure Lightning makes where it accumulates: the last micro-batch's.

    It is the only one of its kind that clears no gradients before its backward.
    """
    inner = _innermost(closure)
    if not type(inner).__module__.endswith(".loops.optimization.automatic"):
        return
    if getattr(inner, "_backward_fn", None) is not None and getattr(inner, "_zero_grad_fn", inner) is None:
        raise RuntimeError(
            "step(): Lightning accumulates gradients, and its closure evaluates the last micro-batch only; "
            "add sam_kernels.trainers.lightning.SAMCallback to the Trainer's callbacks, or accumulate nothing"
        )


def has_hooks_alone(closure: Any) -> bool:
    """Whether it is what Lightning hands over for a ``step()`` without a closure: hooks, and no gradient."""
    inner = _innermost(closure)
    return getattr(inner, "__name__", "") == "do_nothing_closure" and inner.__module__.endswith(
        ".core.optimizer"
    )


def _innermost(closure: Any) -> Any:
    """What a closure that was made of another and arguments was made of."""
    return closure.args[-1] if isinstance(closure, partial) and closure.args else closure


# note: [gradients that a closure drops]
# `step(closure)` clears the gradients before each pass. Those of earlier micro-batches that lie there by then
# are lost, and training goes on with the last one's alone, which nothing else shows. So a step marks what it
# leaves behind, on the first gradient there is, and one without the mark is of a backward pass since.


def mark_left(param_groups: list[dict[str, Any]]) -> None:
    """What lies there now has been used; see note [gradients that a closure drops]."""
    grad = _first_gradient(param_groups)
    if grad is not None:
        grad._sam_left = True  # type: ignore[attr-defined]


def are_dropped(param_groups: list[dict[str, Any]]) -> bool:
    """Whether there are gradients that no step has used."""
    grad = _first_gradient(param_groups)
    return grad is not None and not hasattr(grad, "_sam_left")


def warn_of_dropped() -> None:
    """Say what becomes of gradients that were there before a closure."""
    warnings.warn(
        "step(closure): gradients that were there before are dropped; the closure is evaluated for every "
        "pass by itself. If they are of earlier micro-batches, the step is not that of the whole batch: give "
        "a list, opt.step([closure, ...]), and each pass adds up all of them",
        UserWarning,
        stacklevel=2,
    )


def _first_gradient(param_groups: list[dict[str, Any]]) -> Tensor | None:
    return next((p.grad for group in param_groups for p in group["params"] if p.grad is not None), None)
