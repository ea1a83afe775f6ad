"""The groups of experiments by name, in the order of the documents; each is read when it is asked for."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from .experiment import Experiment

_NAMES = (
    "toys",
    "mnist",
    "m_sharpness",
    "out_of_distribution",
    "first_order_magic",
    "samar",
    "cost_benefit",
)


def names() -> list[str]:
    """All groups, also those that this version does not have yet.

    Example:
        >>> names()[:3]
        ['toys', 'mnist', 'm_sharpness']
    """
    return list(_NAMES)


def missing() -> list[str]:
    """The groups that have a name and no file."""
    return [name for name in _NAMES if find_spec(f"{__package__}.groups.{name}") is None]


def get(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: if there is none of that name, or this version does not have it; lists those it has.

    Example:
        >>> get("toys").name
        'toys'
    """
    if name not in _NAMES:
        raise ValueError(f"{name!r} is not an experiment. Known: {', '.join(_NAMES)}, or all")
    absent = missing()
    if name in absent:
        there = ", ".join(other for other in _NAMES if other not in absent)
        raise ValueError(f"the experiment {name!r} is missing from this version. It has: {there}")
    found = import_module(f".groups.{name}", __package__).EXPERIMENT
    if not isinstance(found, Experiment) or found.name != name:
        raise TypeError(f"groups/{name}.py: EXPERIMENT is {found!r}; expected an Experiment named {name!r}")
    return found
