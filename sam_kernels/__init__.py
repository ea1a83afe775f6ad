"""sam_kernels: sharpness-aware minimization with fused kernels.

    recipes -> recipe -> policies          descriptions; no torch operator
    optimizer -> steps, mask_updates -> perturbation, state, tensor_groups
    perturbation, state, ops -> backends   reference | foreach | native
    native -> csrc                         C++, no torch at build time
    sharpness -> ops                       measures of any model
    experiments -> all of it               ``python -m sam_kernels experiments list``

Importing this package compiles nothing and initialises no device.
"""

from . import (
    backends,
    graphs,
    ops,
    policies,
    recipes,
    running_stats,
    sampling,
    schedules,
    sharpness,
    trajectory,
)
from ._version import __version__
from .optimizer import SAM
from .recipe import Recipe

__all__ = [
    "SAM",
    "Recipe",
    "__version__",
    "backends",
    "graphs",
    "ops",
    "policies",
    "recipes",
    "running_stats",
    "sampling",
    "schedules",
    "sharpness",
    "trajectory",
]
