"""What policies ask of their numbers and words; each raises a sentence with the policy's name."""

from __future__ import annotations

import math
from typing import Any


def check_number(
    policy: Any, name: str, value: Any, *, least: float = -math.inf, most: float = math.inf
) -> None:
    """Raise a sentence unless value is a finite number from least to most."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and least <= value <= most:
        return
    bounds = "" if math.isinf(least) else f" of at least {least:g}"
    bounds = bounds if math.isinf(most) else f" from {least:g} to {most:g}"
    raise ValueError(f"{type(policy).__name__}: {name} is {value!r}; expected a finite number{bounds}")


def check_count(policy: Any, name: str, value: Any, least: int = 1) -> None:
    """Raise a sentence unless value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{type(policy).__name__}: {name} is {value!r}; expected a whole number of at least {least}"
        )


def check_seed(policy: Any, value: Any) -> None:
    """Raise a sentence unless value is a seed."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(
            f"{type(policy).__name__}: seed is {value!r}; expected a whole number from 0 to 2^63 - 1"
        )


def check_choice(policy: Any, name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise a sentence unless value is one of the known words."""
    if value not in known:
        raise ValueError(f"{type(policy).__name__}: {name} is {value!r}; expected one of {', '.join(known)}")


def check_types(policy: Any, value: Any) -> None:
    """Raise a sentence unless value is a tuple of classes."""
    if not (isinstance(value, tuple) and all(isinstance(kind, type) for kind in value)):
        raise ValueError(
            f"{type(policy).__name__}: types is {value!r}; expected a tuple of module classes, "
            "e.g. (torch.nn.LayerNorm,)"
        )


def check_flag(policy: Any, name: str, value: Any) -> None:
    """Raise a sentence unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{type(policy).__name__}: {name} is {value!r}; expected True or False")
