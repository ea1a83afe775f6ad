"""Recipe: one sharpness-aware method as a record of six policies, a radius and an eps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .policies import (
    Anticipate,
    Anticipated,
    Cadence,
    Combine,
    Dense,
    Direction,
    Dynamic,
    Euclidean,
    EveryStep,
    Gradient,
    Last,
    Lookbehind,
    Mask,
    Metric,
    Mirrored,
    MultiStep,
    OneStep,
    Probe,
    RandomStart,
    ReuseOrthogonal,
    Sparse,
)
from .schedules import ProportionalToLr

Schedule = Callable[[int], float] | ProportionalToLr
"""A radius as a function of the number of steps taken so far, or of the learning rate."""

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
    if callable(rho) or isinstance(rho, ProportionalToLr):
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
        decay: whether weight decay is "outside" of the loss that is perturbed (default: the base decays the
            restored weights), or "inside": ``lam w`` joins the gradient at every probe, at the weights there,
            and the base does not decay (google-research/sam, tml-epfl/understanding-sam).
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
    decay: Literal["outside", "inside"] = "outside"
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
        if self.decay not in ("outside", "inside"):
            raise ValueError(f"recipe '{self.name}': decay is {self.decay!r}; expected 'outside' or 'inside'")
        contradiction = self._contradiction()
        if contradiction is not None:
            raise ValueError(f"recipe '{self.name}': {contradiction}")

    def _contradiction(self) -> str | None:
        """The sentence why these policies do not go together, or None."""
        probe, combine = type(self.probe).__name__, type(self.combine).__name__
        if not self.direction.needs_gradient:
            direction = type(self.direction).__name__
            if not isinstance(self.probe, OneStep):
                return f"direction {direction} takes no gradient at w, and probe {probe} goes along those"
            if self.combine.gradients > 1 or isinstance(self.combine, ReuseOrthogonal):
                return f"combine {combine} reads the gradient at w, and direction {direction} evaluates none"
            if self.cadence.needs_norm:
                return f"the cadence goes by the gradient at w, and direction {direction} evaluates none"
        if isinstance(self.mask, Dynamic) and not self.direction.needs_gradient:
            direction = type(self.direction).__name__
            return f"the mask Dynamic changes by the gradient at w, and direction {direction} evaluates none"
        if isinstance(self.probe, Mirrored) != (self.combine.gradients == 3):
            return f"probe {probe} and combine {combine} do not fit: Mirrored() and Curvature() go together"
        if isinstance(self.probe, Anticipated) != isinstance(self.combine, Anticipate):
            return (
                f"probe {probe} and combine {combine} do not fit: Anticipated() and Anticipate() go together"
            )
        if isinstance(self.probe, Lookbehind) and not isinstance(self.combine, Last):
            return "a Lookbehind probe lets the base step with every gradient; it goes with combine Last()"
        if isinstance(self.probe, Anticipated | Lookbehind):
            if not isinstance(self.direction, Gradient):
                return f"probe {probe} goes with direction Gradient()"
            if self.cadence.needs_norm:
                return f"probe {probe} does not go with a cadence that decides by the gradient"
            if self.decay == "inside":
                return f"probe {probe} goes with decay='outside'"
        if (
            isinstance(self.probe, MultiStep)
            and self.probe.n > 1
            and not isinstance(self.direction, Gradient)
        ):
            return "MultiStep ascends along the gradient of every point; it goes with direction Gradient()"
        if isinstance(self.probe, Anticipated | Lookbehind) and not isinstance(self.mask, Dense):
            return f"probe {probe} moves every weight; it goes with mask Dense()"
        if isinstance(self.mask, Sparse):
            if isinstance(self.probe, Mirrored | RandomStart):
                return f"probe {probe} moves whole parameters; expected mask Dense(), ByName() or ByModule()"
            if isinstance(self.probe, MultiStep) and self.probe.projects:
                return "MultiStep(project=True) projects whole parameters; with masks use project=False"
        is_ball = isinstance(self.metric, Euclidean) and self.metric.p == 2
        if isinstance(self.probe, MultiStep) and self.probe.projects and not is_ball:
            return (
                "MultiStep(project=True) projects onto SAM's own ball; with other metrics use project=False"
            )
        return None

    @property
    def gradients(self) -> int:
        """Gradients evaluated in a step that perturbs."""
        return self.probe.gradients - (not self.direction.needs_gradient)

    def rho_at(self, step: int, lr: Any = None) -> Any:
        """The radius at step number `step`, or at that learning rate."""
        if isinstance(self.rho, ProportionalToLr):
            return self.rho.rho_max if lr is None else self.rho.at(lr)
        return float(self.rho(step)) if callable(self.rho) else float(self.rho)
