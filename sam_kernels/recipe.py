"""Recipe: one sharpness-aware method as a record of six policies, a radius and an eps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from .policies import (
    Cadence,
    Combine,
    Dense,
    Direction,
    Euclidean,
    EveryStep,
    Gradient,
    Last,
    Mask,
    Metric,
    OneStep,
    Probe,
)

Schedule = Callable[[int], float]
"""A radius as a function of the number of steps taken so far."""

_KINDS = {
    "direction": Direction,
    "metric": Metric,
    "mask": Mask,
    "probe": Probe,
    "combine": Combine,
    "cadence": Cadence,
}


def check_rho(rho: float | Schedule, owner: str) -> None:
    """Raise a sentence unless rho is a schedule or a finite number of at least 0."""
    if callable(rho):
        return
    try:
        good = not isinstance(rho, bool) and 0 <= float(rho) < float("inf")
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{owner}: rho is {rho!r}; expected a finite number of at least 0, or a schedule")


def check_adaptive(adaptive: bool, owner: str) -> None:
    """Raise a sentence unless adaptive is True or False; 0 and 1 will do."""
    if not (isinstance(adaptive, int) and adaptive in (0, 1)):
        raise TypeError(
            f"{owner}: adaptive is {adaptive!r}; expected True (T = |w|) or False. The authors' ASAM is "
            'recipe="asam"'
        )


@dataclass(frozen=True)
class Recipe:
    """A sharpness-aware method: perturb by ``e``, differentiate there, restore, let the base step.

    ``e = rho / (||T d|| + eps) * mask * T^2 d`` with ``d`` from `direction` and ``T`` from `metric`
    (p = 2; the metrics give the form for other norms).

    Args:
        direction: along what (default the gradient).
        metric: measured how (default Euclidean, p = 2).
        mask: which weights (default all).
        probe: where gradients are evaluated (default one ascent step).
        combine: gradients into one (default the last).
        cadence: on which steps (default every step).
        rho: radius of the ball, in the metric's own units, or a schedule ``step -> rho``.
        eps: added to the norm before dividing.
        name: for messages and reports; named recipes fill it in.

    Raises:
        ValueError: if a policy stands in the wrong place, rho is negative or the policies contradict.

    Example:
        >>> from sam_kernels import Recipe
        >>> from sam_kernels.policies import Adaptive, Every
        >>> Recipe(metric=Adaptive(eta=0.01), cadence=Every(2), rho=0.5).rho
        0.5
    """

    direction: Direction = field(default_factory=Gradient)
    metric: Metric = field(default_factory=Euclidean)
    mask: Mask = field(default_factory=Dense)
    probe: Probe = field(default_factory=OneStep)
    combine: Combine = field(default_factory=Last)
    cadence: Cadence = field(default_factory=EveryStep)
    rho: float | Schedule = 0.05
    eps: float = 1e-12
    name: str = "custom"

    def __post_init__(self) -> None:
        for item in fields(self):
            kind = _KINDS.get(item.name)
            value = getattr(self, item.name)
            if kind is not None and not isinstance(value, kind):
                raise ValueError(
                    f"Recipe: {item.name} is {value!r}; expected a {kind.__name__} from sam_kernels.policies"
                )
        check_rho(self.rho, f"recipe '{self.name}'")
        if not (isinstance(self.eps, int | float) and 0 <= self.eps < float("inf")):
            raise ValueError(
                f"recipe '{self.name}': eps is {self.eps!r}; expected a finite number of at least 0"
            )

    def rho_at(self, step: int) -> float:
        """The radius at step number `step`: rho itself, or what the schedule says."""
        return float(self.rho(step)) if callable(self.rho) else float(self.rho)
