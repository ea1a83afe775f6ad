"""SAM as users of MosaicML's Composer know it: ``Trainer(algorithms=[SAM(rho=0.05)])``.

Written against Composer's source (``algorithms/sam/sam.py``, ``trainer/_scaler.py``, ``trainer/trainer.py``)
and tested with a stand-in that calls as it does. It was not run against the library, which does not install
beside the torch that this package needs (it asks for one below 2.7.1).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.optim import Optimizer

from .. import optimizer
from ..construction import choose_recipe
from ..policies import Cadence, Dynamic, EveryStep, Remembering
from ..policies.checks import check_count
from ..recipe import Recipe

try:
    from composer.core import Algorithm
except ImportError:

    class Algorithm:  # type: ignore[no-redef]
        """What the algorithm is without Composer."""


class _Overflow(Exception):
    """A closure returned None: Composer's scaler has found gradients that are not finite on some rank."""


@dataclass(frozen=True)
class Interval(Cadence):
    """The last of every k steps, as Composer counts; `policies.Every` takes the first.

    Args:
        k: period in steps, at least 1.

    Raises:
        ValueError: if k is not a whole number of at least 1.

    Example:
        >>> [Interval(2).is_due(step) for step in range(4)]
        [False, True, False, True]
    """

    k: int

    def __post_init__(self) -> None:
        check_count(self, "interval", self.k)

    def is_due(self, step: int) -> bool:
        return (step + 1) % self.k == 0


class SAMOptimizer(optimizer.SAM):
    """`sam_kernels.SAM` as Composer's Trainer calls it: ``step(closure)``, in fp16 through Composer's scaler.

    The closure of Composer evaluates all micro-batches of a step, so accumulation is exact. It takes
    ``ddp_sync=``, which is False in the first pass of recipes that only move the point of the second
    gradient: each rank perturbs by its own gradient. Recipes that use the first one further average both. It
    takes ``loss_dict=``, an empty one in all passes but the first, so that logs have the loss at ``w``.

    Args:
        base_optimizer: an optimizer instance.
        rho, epsilon: radius and the number added to the norm; None means the recipe's.
        interval: perturb on the last of every interval steps.
        recipe, adaptive, backend: as for `sam_kernels.SAM`.

    Raises:
        ValueError: for a rho below 0 and an interval below 1.

    Example:
        >>> import torch
        >>> from sam_kernels.compat.composer import SAMOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = SAMOptimizer(torch.optim.SGD([w], lr=0.1), rho=0.5)
        >>> def closure(ddp_sync=True, loss_dict=None):
        ...     opt.zero_grad()
        ...     loss = (w**2).sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> loss = opt.step(closure=closure)
        >>> w.data
        tensor([2.6700, 3.5600])

    Source: Composer, ``composer/algorithms/sam/sam.py``. We differ on purpose: weights are restored by copy,
    whatever has a gradient then; checkpoints hold the base optimizer's state and no perturbation; a loss that
    is exactly 0 is no overflow; a step that overflows does not count.
    """

    _step_supports_amp_closure = True  # Composer hands closures to no other optimizer under fp16

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float | None = None,
        epsilon: float | None = None,
        interval: int = 1,
        *,
        recipe: Recipe | str | None = None,
        adaptive: bool = False,
        backend: str = "auto",
    ) -> None:
        chosen = choose_recipe(recipe, rho, adaptive)
        if epsilon is not None:
            chosen = replace(chosen, eps=epsilon)
        if interval != 1 and not isinstance(chosen.cadence, EveryStep):
            raise ValueError(
                f"SAM: interval is {interval!r}, and recipe '{chosen.name}' chooses its steps itself; leave "
                "interval at 1"
            )
        if interval != 1:
            chosen = replace(chosen, cadence=Interval(interval))
        super().__init__(None, base_optimizer, adaptive=adaptive, recipe=chosen, backend=backend)

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        """As in `sam_kernels.SAM`; None, with weights as they were, if a closure returns None."""
        try:
            return super().step(closure, **kwargs)
        except _Overflow:
            return None  # the weights are restored; the scaler backs off in its update()

    step.hooked = True  # type: ignore[attr-defined]  # as in `sam_kernels.SAM`

    def closure_kwargs(self, probe: int) -> dict[str, Any]:
        """What Composer's closure is told in pass number `probe`."""
        if not self.is_due:
            return {}
        keywords: dict[str, Any] = {"loss_dict": {}} if probe > 0 else {}
        if probe < self.recipe.gradients - 1 and self._perturbs_by_rank:
            keywords["ddp_sync"] = False
        return keywords

    @property
    def _perturbs_by_rank(self) -> bool:
        """Whether nothing but the perturbation depends on gradients that are not averaged."""
        recipe = self.recipe
        keeps = isinstance(recipe.direction, Remembering) or isinstance(recipe.mask, Dynamic)
        return not keeps and recipe.combine.gradients == 1 and not recipe.cadence.needs_norm

    def _evaluate(self, closure: Callable[..., Any], probe: int) -> Any:
        loss = super()._evaluate(closure, probe)
        if loss is None:
            raise _Overflow
        return loss


class SAM(Algorithm):  # type: ignore[misc]
    """Composer's algorithm: after loading, puts `SAMOptimizer` around the optimizers of the state.

    Args:
        rho: radius; None means the recipe's.
        epsilon: number added to the norm; None means the recipe's.
        interval: perturb on the last of every interval steps.
        recipe, adaptive, backend: as for `sam_kernels.SAM`.

    Example:
        >>> from sam_kernels.compat.composer import SAM
        >>> SAM(rho=0.1).match("after_load", None)
        True

    Source: as of `SAMOptimizer`.
    """

    def __init__(
        self,
        rho: float | None = None,
        epsilon: float | None = None,
        interval: int = 1,
        *,
        recipe: Recipe | str | None = None,
        adaptive: bool = False,
        backend: str = "auto",
    ) -> None:
        choose_recipe(recipe, rho, adaptive)  # these two refuse now what would be refused after loading
        Interval(interval)
        self.options: dict[str, Any] = {
            "rho": rho,
            "epsilon": epsilon,
            "interval": interval,
            "recipe": recipe,
            "adaptive": adaptive,
            "backend": backend,
        }

    def match(self, event: Any, state: Any) -> bool:
        """Whether to run now: after loading, since loading exchanges the param groups."""
        return bool(getattr(event, "value", event) == "after_load")

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Wrap the optimizers, and scale losses by a scaler that takes closures.

        Raises:
            RuntimeError: under DeepSpeed, whose engine steps by itself.
        """
        if getattr(state, "deepspeed_enabled", False):
            raise RuntimeError(
                "compat.composer.SAM: DeepSpeed's engine steps by itself and takes no closure; use another "
                "strategy of Composer's, or sam_kernels.trainers.deepspeed outside of it"
            )
        given = state.optimizers
        given = given if isinstance(given, list | tuple) else (given,)
        state.optimizers = tuple(SAMOptimizer(base, **self.options) for base in given)
        state.scaler = importlib.import_module("composer.trainer._scaler").ClosureGradScaler()
