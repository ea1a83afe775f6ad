"""What `SAM.step` accepts: which closures go with which recipe."""

from __future__ import annotations

from functools import partial
from typing import Any

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
    inner = closure.args[-1] if isinstance(closure, partial) and closure.args else closure
    if not type(inner).__module__.endswith(".loops.optimization.automatic"):
        return
    if getattr(inner, "_backward_fn", None) is not None and getattr(inner, "_zero_grad_fn", inner) is None:
        raise RuntimeError(
            "step(): Lightning accumulates gradients, and its closure evaluates the last micro-batch only; "
            "add sam_kernels.trainers.lightning.SAMCallback to the Trainer's callbacks, or accumulate nothing"
        )
