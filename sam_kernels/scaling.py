"""Gradient scaling: steps with gradients that `torch.amp.GradScaler` has multiplied by its scale.

note: [what a scaler hands over]
A scaler looks for `_step_supports_amp_scaling`. Where it holds, it calls ``step()`` in every case, with two
attributes of the optimizer set: `grad_scale`, a tensor, or None where the user has called ``unscale_``; and
`found_inf`, not 0 where a gradient of the optimizer was not finite when it looked. So weights are restored in
every case too, and only the update is left out. Both are read on the device.

note: [scale-free recipes]
Most recipes take from a gradient its direction alone until the base gets the last: they run on scaled
gradients, and the update divides. The others get gradients that were divided before anything reads them; in
the two-step form that is too late for what `first_step` has done with the first, so some are refused there.

note: [closures and overflow]
A scaler looks at gradients before it calls ``step(closure)``, and learns nothing of what the closure makes.
With ``step(closure, scaler=scaler)`` it is us who call: the scale is ``scaler.scale`` of a one, and a
`Verdict` tells it of an overflow in any pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import combination, perturbation
from .combination import Held, Lists
from .perturbation import Measure, Served
from .policies import (
    Adaptive,
    Curvature,
    Decoupled,
    Euclidean,
    Gradient,
    Last,
    LayerWise,
    Mix,
    Momentum,
    Noise,
    Remembering,
    SurrogateGap,
)
from .recipe import Recipe


def reason_at_first(recipe: Recipe) -> str | None:
    """What the recipe does with the first gradient that depends on its scale, or None.

    Example:
        >>> from sam_kernels import recipes
        >>> reason_at_first(recipes.vasso())
        'it remembers gradients from step to step'
        >>> reason_at_first(recipes.sam()) is None
        True
    """
    if isinstance(recipe.direction, Remembering):
        return "it remembers gradients from step to step"
    if recipe.cadence.needs_norm:
        return "its cadence goes by the size of the gradient"
    if recipe.decay == "inside" and recipe.direction.needs_gradient:
        return "it adds weight decay to the first gradient"
    metric = recipe.metric
    is_free = isinstance(metric, Euclidean | Adaptive)
    is_free = is_free or (isinstance(metric, LayerWise) and metric.form != "trust_ratio")
    is_free = is_free and isinstance(recipe.direction, Gradient | Momentum | Noise)
    return None if is_free else "its perturbation goes by the size of the gradient"


def is_scale_free(recipe: Recipe) -> bool:
    """Whether scaled gradients lead to the same step, times the scale; see note [scale-free recipes].

    Example:
        >>> from sam_kernels import recipes
        >>> is_scale_free(recipes.gsam()), is_scale_free(recipes.gnp())
        (True, False)
    """
    rule = recipe.combine
    is_linear = isinstance(rule, Last | SurrogateGap | Curvature)
    is_linear = is_linear or (isinstance(rule, Mix) and not rule.normalize)
    if recipe.decay == "inside" or recipe.probe.moves_base or not is_linear:
        return False
    return reason_at_first(recipe) is None


class Verdict:
    """What a scaler takes for an optimizer: its one gradient is infinite where a step's guard is not finite.

    So the scaler learns what became of a step whose gradients it has not seen, and no host waits for that.
    """

    _step_supports_amp_scaling = True

    def __init__(self, guard: Tensor) -> None:
        param = torch.zeros((), device=guard.device)
        param.grad = torch.isfinite(guard).float().reciprocal()
        self.param_groups = [{"params": [param]}]

    def step(self) -> None:
        """There is nothing to update."""


class Scaling:
    """Base of `SAM`: what scaled gradients take; see note [what a scaler hands over]."""

    recipe: Recipe
    _held: Held
    _held_of: Served
    _runs_closure: bool
    _seen: Tensor | None  # the guards of the updates of this step
    _verdict: Verdict | None
    param_groups: list[dict[str, Any]]
    _measure: Measure | None
    _groups: Callable[[], Served]
    _read_gradients: Callable[..., Served]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Lightning asks inside of a closure, before it clips, and takes True for a reason not to.
        return not self._runs_closure

    @contextmanager
    def _scaled_by(self, scaler: Any) -> Iterator[None]:
        """Around step(closure): its gradients have the scale of this scaler, which hears of overflows."""
        self._seen = None
        if scaler is None or not scaler.is_enabled():
            yield
            return
        self.grad_scale = scaler.scale(torch.ones((), device=self.param_groups[0]["params"][0].device))
        try:
            yield
        finally:
            del self.grad_scale
        seen = torch.zeros(()) if self._seen is None else self._seen
        self._verdict = Verdict(seen)  # kept: the scaler knows it by its id until the update
        scaler.step(self._verdict)

    def _forget_scaler(self) -> None:
        """After a step that failed: a scaler takes its attributes back only after those that do not."""
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)

    def _see(self, guard: Tensor | None) -> None:
        """An update goes by this guard."""
        if self._runs_closure and guard is not None and self._is_scaled:
            self._seen = guard if self._seen is None else self._seen + guard.to(self._seen.device)

    @property
    def _is_scaled(self) -> bool:
        """Whether a scaler called this step, or somebody has set a scale."""
        return "found_inf" in self.__dict__ or self.__dict__.get("grad_scale") is not None

    @property
    def _scale(self) -> Tensor | None:
        """What multiplies the gradients of backward in this step, 0-d float64; None for 1, or unknown."""
        scale: Any = self.__dict__.get("grad_scale")
        if scale is None:
            return None
        if not isinstance(scale, Tensor):
            scale = torch.tensor(scale)
        return scale.detach().reshape(()).double()

    @property
    def _scale_left(self) -> Tensor | None:
        """The scale that the gradients still have when the base is to get them; None for 1."""
        scale = self._scale
        return scale if scale is not None and is_scale_free(self.recipe) else None

    def _guarded(self, norm: Tensor | None) -> Tensor | None:
        """A guard that is not finite either where the scaler has found a gradient that is not."""
        found = self.__dict__.get("found_inf")
        if not isinstance(found, Tensor):  # a scaler that saw no gradients says 0
            return norm
        verdict = (found.detach().reshape(()) == 0).double().reciprocal()
        return verdict if norm is None else norm + verdict.to(norm.device)

    def _look_at_last(self) -> None:
        """Guard what moves weights beside the base: the scaler saw what was there before a closure ran."""
        served = self._read_gradients() if self._is_scaled and self._runs_closure else []
        if served and isinstance(self.recipe.combine, Decoupled):
            total = perturbation.squares(served)
            before = self._measure
            self._measure = Measure(
                total if before is None else before.norm + total.to(before.norm.device), []
            )

    @property
    def _checks_base(self) -> bool:
        """Whether to look at the gradient that the base is to get.

        Those of a closure the scaler has not seen, and a sum in half precision may be out of range where what
        it has seen is not.
        """
        if not self._is_scaled or self._runs_closure:
            return self._is_scaled
        is_sum = self.recipe.combine.gradients > 1
        return is_sum and any(group.dtype == torch.float16 for group, _ in self._groups())

    def _meet_scaler(self, is_pending: bool, is_decayed: bool) -> None:
        """Before a step without a closure: refuse what cannot be right, unscale what is to be.

        Args:
            is_pending: `first_step` has seen a gradient.
            is_decayed: the last gradient has its weight decay already.

        Raises:
            RuntimeError: saying what to do; the caller restores the weights.
        """
        if not self._is_scaled:
            return
        self._refuse_flat_shards()
        recipe = self.recipe
        reason = reason_at_first(recipe)
        if reason is None and is_decayed and recipe.decay == "inside":
            reason = "a perturbed() block adds weight decay to its gradient"
        if is_pending and reason is not None:
            raise RuntimeError(
                f"step(): a GradScaler is in use, and recipe '{recipe.name}' must know the scale before the "
                f"second backward, since {reason}. The weights are restored and nothing was updated; give "
                "the optimizer a closure, opt.step(closure, scaler=scaler), or train in bfloat16 without one"
            )
        if self._scale is None:
            if self._held:
                raise RuntimeError(
                    f"step(): recipe '{recipe.name}' needs the gradients of both passes, and unscale_() has "
                    "divided one of them by the scale. The weights are restored and nothing was updated; "
                    "leave out scaler.unscale_(opt), and clip by SAM(..., max_grad_norm=)"
                )
        elif not is_scale_free(recipe):
            self._unscale_if_tied()
            for lists in self._held:
                self._divide(self._held_of, lists)

    def _refuse_flat_shards(self) -> None:
        """Ranks of FullyShardedDataParallel (FSDP1) would not agree whether to skip.

        Raises:
            RuntimeError: saying where they do.
        """
        if self._scale is None:
            return
        if any(group.sharding.groups and not group.has_dtensors for group, _ in self._groups()):
            raise RuntimeError(
                "step(): under FullyShardedDataParallel a scaler asks all ranks for overflows in unscale_() "
                "alone; use ShardedGradScaler, the two-step form, and scaler.unscale_(opt) before "
                "scaler.step(opt). The weights are restored and nothing was updated"
            )

    def _require_scale(self) -> None:
        """Before step(closure).

        Raises:
            RuntimeError: where the closure will scale gradients by a number that the scaler has not told.
        """
        self._refuse_flat_shards()
        if self._is_scaled and self._scale is None:
            raise RuntimeError(
                "step(closure): scaler.unscale_(opt) was called before, so the scaler does not tell its "
                "scale, and the closure's gradients could not be unscaled. No step was taken; leave out "
                "unscale_(), and clip by SAM(..., max_grad_norm=)"
            )

    @torch.no_grad()
    def _unscale_if_tied(self) -> None:
        """``g /= scale`` for the present gradients, where the recipe is not scale-free."""
        if self._scale is None or is_scale_free(self.recipe):
            return
        served = self._read_gradients()
        lists = [group.grads for group, _ in served]
        self._divide(served, lists)
        for (group, _), own in zip(served, lists, strict=True):
            combination.write_back(group, own)
            group.drop_gradients()

    def _divide(self, served: Served, lists: Lists) -> None:
        scale = self._scale
        if scale is None:
            return
        for (group, backend), own in zip(served, lists, strict=True):
            factor = scale.to(group.device).reciprocal().view(1, 1)
            backend.combine_(group, [own], [own], factor)
