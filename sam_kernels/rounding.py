"""How perturbed bf16 weights are rounded, and what is lost where nothing was asked for.

A bf16 number has 8 bits. The perturbation of one weight is often less than half the distance to its next
neighbour, and rounding to nearest then gives the old weight back: at the size of a ResNet-50 with rho = 0.05
what is left of the perturbation is 0.28 of it. Two ways keep all of it on average: fp32 masters (see
`sam_kernels.masters`), and rounding up or down at random.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .policies import MultiStep, RandomStart
from .recipe import Recipe
from .tensor_groups import FIXED, TensorGroup

# Masks, noise and rounding of equal seeds must not be made of the same words: rounding has the numbers of
# tensors from here on, and noise those from 2^31 on.
_ROUNDING = 1 << 30


@dataclass(frozen=True)
class Rounding:
    """The random bits of one perturbation: a function of these and an element's place in memory.

    Attributes:
        seed: the key, from 0 to 2^63 - 1.
        step: part of the counter, from 0 to 2^32 - 1.
        numbers: by tensor, its number for random numbers.
    """

    seed: int
    step: int
    numbers: list[int]


def rounding_number(number: int) -> int:
    """The number of a tensor for its rounding, from its place among all parameters."""
    return _ROUNDING + number


def check_options(
    recipe: Recipe,
    master_weights: Any,
    stochastic_rounding: Any,
    param_groups: list[dict[str, Any]],
    first: int = 0,
) -> None:
    """Raise a sentence where the two do not make sense, together or for the groups from the first on.

    Raises:
        TypeError: if one is no bool, or both are True.
        ValueError: if a parameter is float16 and is to be rounded stochastically.
    """
    named = {"master_weights": master_weights, "stochastic_rounding": stochastic_rounding}
    for name, value in named.items():
        if not isinstance(value, bool):
            raise TypeError(f"SAM: {name} is {value!r}; expected True or False")
    if master_weights and stochastic_rounding:
        raise TypeError(
            "SAM: master_weights=True and stochastic_rounding=True are two answers to one question: rounded "
            "masters keep the perturbation without random bits. Drop one"
        )
    if not stochastic_rounding:
        return
    probe = recipe.probe
    if isinstance(probe, RandomStart) or (isinstance(probe, MultiStep) and probe.project):
        raise ValueError(
            f"recipe '{recipe.name}' does not go with stochastic_rounding=True: it moves weights by a sum "
            "that is rounded to nearest, and projects random bits away with the rest. Use fp32 parameters "
            "under autocast, or another recipe"
        )
    for index, group in list(enumerate(param_groups))[first:]:
        for position, param in enumerate(group["params"]):
            if param.dtype == torch.float16:
                raise ValueError(
                    f"SAM: stochastic_rounding=True and param_groups[{index}]['params'][{position}] is "
                    "torch.float16; stochastic rounding serves torch.bfloat16, where most is lost otherwise. "
                    "Drop it (float16 keeps 0.97 of a perturbation), or use master_weights=True"
                )


def warn_if_swallowed(groups: Sequence[TensorGroup]) -> None:
    """Say it when bf16 weights are perturbed and rounded to nearest."""
    count = sum(
        group.keys[r][1] != FIXED for group in groups if group.dtype == torch.bfloat16 for r in group.row
    )
    if count:
        warnings.warn(
            f"SAM: {count} bfloat16 parameter{'s are' if count > 1 else ' is'} perturbed by rounding to "
            "nearest, which swallows every displacement below half the distance to the next bfloat16: of "
            "rho = 0.05 at the size of a ResNet-50, 0.28 is left. master_weights=True keeps all of it with "
            "fp32 weights in place of snapshots, stochastic_rounding=True keeps it on average without memory",
            UserWarning,
            stacklevel=3,
        )
