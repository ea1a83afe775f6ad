"""The half of SAM that has to do with gradients: where they are evaluated, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import combination, directions, masters, perturbation, probing, state
from .closures import are_dropped, warn_of_dropped
from .combination import Held
from .distributed import Ranks
from .perturbation import Measure, Served
from .policies import (
    Bernoulli,
    Decoupled,
    Dynamic,
    Mirrored,
    Momentum,
    MultiStep,
    Noise,
    RandomStart,
    Remembering,
    ReuseOrthogonal,
)
from .recipe import Recipe
from .record import Record
from .rng import Replay
from .rounding import Rounding, rounding_number
from .running_stats import frozen
from .slots import Slots

Closure = Callable[..., Any]

# Numbers of the buffers for gradients that are added up, beyond those of the probes.
_OF_MICRO_BATCHES = 2


class Steps:
    """Base of `SAM`: the passes of a step up to the descent."""

    recipe: Recipe
    model: nn.Module | None
    ranks: Ranks
    _served: Served | None
    _gatherers: list[Any]
    base_optimizer: Optimizer
    param_groups: list[dict[str, Any]]
    _slots: Slots
    _measure: Measure | None
    _held: Held
    _held_of: Served  # the groups whose gradients are held
    _micro_batch: int
    _has_warned: bool  # of gradients that a closure drops
    _is_scaled: bool
    _clears_by_zeros: bool
    _parts: int
    _swapped: tuple[Served, combination.Lists] | None
    _had_gradients: bool
    _clearings: int
    _next_scalars: dict[str, float]
    _gate_is_closed: bool
    copies_gradients: bool
    rng: str
    _replay: Replay
    master_weights: bool
    stochastic_rounding: bool
    _ascents: int
    _record: Record
    measures: bool
    _scale: Tensor | None
    _scale_left: Tensor | None
    _groups: Callable[[], Served]
    _write_tables: Callable[[Served], None]
    _begin_masks: Callable[[Served], None]
    _evolve_masks: Callable[[Served], None]
    _begin_perturbed: Callable[[], None]
    _numbers: Callable[[], dict[Tensor, int]]
    _drawn_tensors: Callable[[Any], set[Tensor]]
    _restore: Callable[[], None]
    _revalidate: Callable[[], None]
    _abandon: Callable[[], None]
    _guarded: Callable[[Tensor | None], Tensor | None]
    _unscale_if_tied: Callable[[], None]
    zero_grad: Callable[..., None]
    closure_kwargs: Callable[[int], dict[str, Any]]

    @property
    def is_due(self) -> bool:
        raise NotImplementedError

    # ---- all gradients of a step ---------------------------------------------------------------

    def _run_probes(self, closures: Sequence[Closure]) -> list[Any]:
        """Evaluate every gradient of the recipe but do not descend; the losses of the first pass."""
        recipe, probe = self.recipe, self.recipe.probe
        if not self.is_due:
            losses = self._evaluate_all(closures, 0)
            self._measure_gradient()
            return losses
        if not recipe.direction.needs_gradient:
            self._ascend()
            self._had_gradients = False  # those that may be there are of another step
            return self._evaluate_all(closures, 0)
        if isinstance(probe, RandomStart):
            self._start_at_random(probe)
        losses = self._evaluate_all(closures, 0)
        if not self._passes_gate():
            self._measure_gradient()
            self._restore()
            return losses
        if isinstance(probe, RandomStart) and not probe.keep_noise:
            self._restore()
        self._ascend()
        with nullcontext() if self.model is None else frozen(self.model):
            self._evaluate_all(closures, 1)
            for index in range(2, probe.gradients):
                if isinstance(probe, Mirrored):
                    self._hold(self._read_gradients())
                    with torch.no_grad():
                        probing.mirror(self._groups())
                else:
                    self._ascend()
                self._evaluate_all(closures, index)
        return losses

    def _run_micro_batches(self, closures: Sequence[Closure]) -> list[Any]:
        """Each closure with a perturbation of its own; their gradients are added up, weights restored."""
        losses, total, guard = [], None, None
        self._parts = len(closures)
        served: Served = []
        for number, closure in enumerate(closures):
            self._micro_batch = number
            losses += self._run_probes([closure])
            self._revalidate()
            self._combine_gradients()
            self._restore()
            if self._measure is not None:
                norm = self._measure.norm
                guard = norm if guard is None else guard + norm
            if served and self._groups() is not served:
                raise RuntimeError(
                    "step(): parameters were added, removed or moved between the micro-batches of a step. "
                    "The weights are restored and no step was taken; do so between steps"
                )
            served = self._read_gradients()
            if total is not None:
                combination.check_apart(served, [total])
            place = _OF_MICRO_BATCHES + (total is not None)
            grads = combination.hold(served, self.copies_gradients, place)
            self.zero_grad()
            total = grads if total is None else combination.add(served, total, grads, _OF_MICRO_BATCHES)
            for group, _ in served:
                group.drop_gradients()
        self._micro_batch, self._parts = 0, 1
        combination.give(served, total or [])
        if guard is not None:
            self._measure = Measure(guard, [])
        return losses

    def _evaluate_all(self, closures: Sequence[Closure], probe: int) -> list[Any]:
        """The gradient at one point: the sum over all closures, as autograd adds it up."""
        with nullcontext() if self.rng == "advance" else self._replay.around(probe, self._devices()):
            losses = self._evaluate_sum(closures, probe)
        self._record.note_losses(probe, losses)
        self._unscale_if_tied()
        self._decay_inside()
        return losses

    def _devices(self) -> set[torch.device]:
        return {p.device for group in self.param_groups for p in group["params"]}

    def _evaluate_sum(self, closures: Sequence[Closure], probe: int) -> list[Any]:
        losses: list[Any] = []
        self._weights_have_moved()
        for number, closure in enumerate(closures):
            of_ranks = self.ranks.averaging(self._averages(probe), is_last=number + 1 == len(closures))
            if not losses:
                with of_ranks:
                    losses.append(self._evaluate(closure, probe))
                continue
            before = [(p, p.grad) for group in self.param_groups for p in group["params"]]
            self._keeps_gradients = True  # closures clear them as they are used to; not now
            try:
                with torch.enable_grad(), of_ranks:
                    losses.append(closure(**self.closure_kwargs(probe)))
            finally:
                self._keeps_gradients = False
            if any(grad is not None and p.grad is not grad for p, grad in before):
                raise RuntimeError(
                    "step(): a closure of the list dropped or replaced the gradients of those before it; "
                    "leave clearing them to the optimizer. The weights are restored and no step was taken"
                )
        return losses

    def _evaluate(self, closure: Closure, probe: int) -> Any:
        """The gradient of one closure in place of those that are there."""
        if probe == 0 and self._micro_batch == 0:
            self._warn_of_dropped()
        self.zero_grad()
        self._clearings = 0  # none that the user has asked for
        # Under autocast around a whole step, the casts of weights that have moved since would be used again.
        torch.clear_autocast_cache()
        with torch.enable_grad():
            return closure(**self.closure_kwargs(probe))

    def _warn_of_dropped(self) -> None:
        """Once, and not where a scaler asks for a backward beforehand or gradients have fixed places."""
        if self._has_warned or self._is_scaled or self._clears_by_zeros:
            return
        self._has_warned = are_dropped(self.param_groups)
        if self._has_warned:
            warn_of_dropped()

    def _averages(self, probe: int) -> bool:
        """Whether the gradients of a pass are those of all ranks; see note [whose perturbation]."""
        if not self.ranks.are_apart or not self.is_due:
            return True
        return probe + 1 >= self.recipe.gradients

    def _weights_have_moved(self) -> None:
        """What FSDP2 gathered of the weights before is of no use."""
        for module in self._gatherers:
            module.reshard()

    # ---- ascent --------------------------------------------------------------------------------

    def _ascend(self, by_copy: bool = False) -> None:
        """Perturb the weights along the present gradients, or further where they are perturbed.

        Args:
            by_copy: gradients that are needed later may be overwritten by then.
        """
        served = self._groups()
        if served:
            try:
                self._ascend_groups(served, by_copy)
            except BaseException:
                self._abandon()
                raise
        self._begin_perturbed()

    def _ascend_groups(self, served: Served, by_copy: bool) -> None:
        is_further = any(group.is_perturbed for group, _ in served)
        is_first = not is_further or isinstance(self.recipe.probe, RandomStart)
        if not is_further:
            self._forget_held()
            if self.master_weights:
                masters.prepare(served, self._slots, self.base_optimizer)
        if self.stochastic_rounding:
            self._draw_roundings(served, is_further)
        if self.recipe.direction.needs_gradient:
            self._read_gradients(served)
            if is_first and self.measures:
                self._record.note_gradient(served, self._scale_left)
        if is_first and self._keeps_first:
            self._hold(served, by_copy)
        for group, _ in served if is_further else ():
            # What was not perturbed in the first ascent takes no part in the others.
            group.aim([None if s is None else g for s, g in zip(group.snapshots, group.grads, strict=True)])
        self._write_tables(served)
        if not is_further:
            self._begin_masks(served)
        gradients = [group.grads for group, _ in served]
        guard = self._aim(served)
        mask = self.recipe.mask
        by_tensor = isinstance(mask, Bernoulli) and mask.by == "tensor"
        if by_tensor and mask.norm == "masked":  # type: ignore[attr-defined]
            self._draw_tensors(served)
        found = perturbation.measure(served, self.recipe, guard)
        if by_tensor and mask.norm == "full":  # type: ignore[attr-defined]
            self._draw_tensors(served)
        before, self._measure = self._measure, found
        if not is_further:
            self._evolve_masks_by(served, gradients)
            self._prepare_gradients(served)
            perturbation.perturb(served, found)
            if not self.measures:
                self._record.note_ascent(self, served, found, self._scale_left)  # type: ignore[arg-type]
        else:
            probing.ascend_further(served, found)
            if before is not None:
                self._measure = Measure(before.norm + found.norm, [])  # a guard from here on
        probe = self.recipe.probe
        if isinstance(probe, MultiStep) and probe.project and (is_further or probe.step > 1):
            probing.project(served, probe.step)
        if self.measures:
            self._record.note_move(served, is_first)

    def _measure_gradient(self) -> None:
        """In a step that does not perturb, where all metrics are asked for."""
        if self.measures and self._groups():
            with torch.no_grad():
                self._record.note_gradient(self._read_gradients(), self._scale_left)

    def _prepare_gradients(self, served: Served) -> None:
        """Called between the norm and the perturbation; a subclass may change ``group.grads`` here."""

    def _evolve_masks_by(self, served: Served, gradients: list[Any]) -> None:
        """Masks go by the gradients, whatever the direction is."""
        if not isinstance(self.recipe.mask, Dynamic):
            return
        aimed = [group.grads for group, _ in served]
        for (group, _), own in zip(served, gradients, strict=True):
            group.grads = own
        self._evolve_masks(served)
        for (group, _), own in zip(served, aimed, strict=True):
            group.grads = own

    def _aim(self, served: Served) -> Tensor | None:
        """Put the recipe's direction in the place of the gradients; a guard where those are then unseen."""
        direction, step = self.recipe.direction, self.param_groups[0]["sam_step"]
        if isinstance(direction, Noise):
            numbers = self._numbers()
            for group, backend in served:
                own = directions.own_numbers(group, numbers)
                directions.aim_at_noise(group, backend, direction, step, own, self._micro_batch)
        elif isinstance(direction, Momentum):
            for group, _ in served:
                directions.aim_at_momentum(group, self.base_optimizer)
        elif isinstance(direction, Remembering):
            guard = perturbation.squares(served)
            for group, backend in served:
                directions.aim_past_memory(group, backend, direction, self._slots, guard)
            return guard
        return None

    def _draw_roundings(self, served: Served, is_further: bool) -> None:
        """Let the perturbation that follows round bf16 weights at random, by bits of its own."""
        self._ascents = self._ascents + 1 if is_further else 0
        seed = directions.seed_of(0, self._micro_batch + (self._ascents << 20))
        step = self.param_groups[0]["sam_step"] % (1 << 32)
        for group, _ in served:
            if group.dtype != torch.bfloat16:
                continue
            numbers = group.cache.get("rounding numbers")
            if numbers is None:
                places = self._numbers()
                numbers = [rounding_number(n) for n in directions.own_numbers(group, places)]
                group.cache["rounding numbers"] = numbers
            group.rounding = Rounding(seed, step, numbers)

    def _draw_tensors(self, served: Served) -> None:
        """Whole tensors are left out by taking their gradients away."""
        chosen = self._drawn_tensors(self.recipe.mask)
        for group, _ in served:
            group.aim([g if p in chosen else None for p, g in zip(group.owners, group.grads, strict=True)])

    def _start_at_random(self, probe: RandomStart) -> None:
        served = self._groups()
        try:
            self._write_tables(served)
            step, numbers = self.param_groups[0]["sam_step"], self._numbers()
            probing.start_at_random(served, probe, step, numbers, self._micro_batch)
        except BaseException:
            self._abandon()
            raise
        self._forget_held()
        self._begin_perturbed()

    def _passes_gate(self) -> bool:
        """Whether this step perturbs, where the cadence decides by the gradient; the host waits for that."""
        cadence = self.recipe.cadence
        if not cadence.needs_norm:
            return True
        served = self._read_gradients()
        q = float(perturbation.squares(served)) if served else 0.0
        if not q < float("inf"):
            return True  # the ascent finds it too, and the step is skipped
        scalars, step = self._slots.scalars, self.param_groups[0]["sam_step"]
        is_due, mean, variance = cadence.decide(
            q, step, float(scalars.get("mean", 0.0)), float(scalars.get("variance", 0.0))
        )
        self._next_scalars = {"mean": mean, "variance": variance}
        self._gate_is_closed = not is_due
        return is_due

    # ---- from gradients to the one that the base takes -----------------------------------------

    @property
    def _keeps_first(self) -> bool:
        return self.recipe.combine.gradients > 1

    @property
    def _guard(self) -> Tensor | None:
        """Not finite where the step is to be skipped, as far as the ascent has seen."""
        return self._guarded(None if self._measure is None else self._measure.norm)

    def _read_gradients(self, served: Served | None = None) -> Served:
        """Let these groups take the present gradients; by default the present groups."""
        served = self._groups() if served is None else served
        for group, _ in served:
            group.read_gradients()
        return served

    def _hold(self, served: Served, by_copy: bool = False) -> None:
        """Keep the gradients that were read for the combination; the next ones have memory of their own."""
        by_copy = by_copy or self.copies_gradients
        self._held.append(combination.hold(served, by_copy, len(self._held)))
        self._held_of = served

    def _combine_gradients(self) -> None:
        """Write the combination of all gradients of the step over the last."""
        if self._held:
            served, held = self._take_held()
            combination.combine(served, self.recipe.combine, held, self._slots, self._guard)

    def _take_held(self) -> tuple[Served, Held]:
        """The groups whose gradients are held, which have read the last ones, and those that were held."""
        served, held = self._read_gradients(self._held_of), self._held
        combination.check_apart(served, held)
        self._forget_held()
        return served, held

    def _reuse_gradients(self) -> None:
        """What a step that does not perturb takes over from those that did."""
        if isinstance(self.recipe.combine, ReuseOrthogonal):
            combination.reuse(self._read_gradients(), self.recipe.combine, self._slots)

    def _swap_gradients(self) -> Callable[[], None] | None:
        """For a decoupled rule: the base gets the first gradient; what to do after it has stepped."""
        rule = self.recipe.combine
        if not self._held or not isinstance(rule, Decoupled):
            return None
        (served, (first,)), guard = self._take_held(), self._guard
        last = combination.swap_first(served, first)
        self._swapped = (served, last)
        is_difference = state.fused_rule(self.base_optimizer)[0] is None
        if is_difference:
            combination.subtract(served, last, first)
        signs = [-1.0 if group.get("maximize", False) else 1.0 for group in self.param_groups]
        rates = [sign * group["lr"] for sign, group in zip(signs, self.param_groups, strict=True)]

        def after() -> None:
            combination.add_decoupled(served, rule, first, last, rates, guard, is_difference)
            self._give_back()

        return after

    def _give_back(self) -> None:
        """Parameters get their own gradient tensors again, where others were swapped in."""
        if self._swapped is not None:
            combination.give_back(*self._swapped)
            self._swapped = None

    def _forget_held(self) -> None:
        self._held, self._held_of = [], []

    def _decay_inside(self) -> None:
        """``g += lam w`` at the present weights, for recipes whose weight decay is part of the loss."""
        if self.recipe.decay != "inside" or not any(g.get("weight_decay") for g in self.param_groups):
            return
        with torch.no_grad():
            combination.add_decay(self._read_gradients(), self.param_groups, 1.0 / self._parts)


__all__ = ["Closure", "Steps"]
