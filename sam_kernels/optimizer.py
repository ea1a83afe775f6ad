"""SAM: one optimizer class around any torch optimizer, driven by a `Recipe`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import (
    anticipated,
    combination,
    distributed,
    graphs,
    imitations,
    lookbehind,
    masters,
    ops,
    perturbation,
    state,
)
from .checkpoints import Checkpoints
from .closures import check_closures, has_hooks_alone, mark_left
from .construction import (
    build_base,
    check_decay,
    check_max_norm,
    check_measures,
    check_model,
    check_momentum,
    choose_recipe,
    member_lookup,
    own_keys,
    warn_if_names_are_missing,
)
from .directions import sign_of
from .mask_updates import MaskUpdates
from .masks import Masks
from .perturbation import Measure, Served
from .policies import (
    Adaptive,
    Anticipated,
    Euclidean,
    Lookbehind,
    MultiStep,
    Remembering,
    Sparse,
)
from .recipe import Recipe, check_adaptive, check_rho
from .record import Record
from .rng import Replay, check_rng
from .rounding import check_options, warn_if_swallowed
from .scaling import Scaling, Verdict
from .schedules import ProportionalToLr
from .selection import Block
from .sharding import flat_shardings, fsdp_modules, local
from .slots import Slots
from .steps import Closure, Steps
from .tensor_groups import FIXED, collect, lives_on_device, number
from .watch import are_same

# Numbers that are another object when they change.
_PLAIN = {float, int, bool, type(None)}

# A step is pending in every phase but the first; in _NOT_DUE and _RESTORED the weights are the user's own.
_IDLE, _PERTURBED, _NOT_DUE, _RESTORED = "idle", "perturbed", "not due", "restored"


class SAM(Steps, Scaling, MaskUpdates, Checkpoints):
    """Sharpness-aware minimization around a base optimizer.

    A step is: gradient at ``w``; ``w + e`` with ``e = rho T^2 g / (||T g|| + eps)``; gradient there;
    weights back to ``w`` bit for bit; the base optimizer's update with the second gradient. The
    restore and the update are one pass when the base is torch's SGD, Adam or AdamW.

    Args:
        params: what `torch.optim` takes: parameters, named parameters, or dicts of param groups (a
            group may set its own "rho" and "adaptive"). None when base_optimizer is an instance.
            Where the base has a default of that name, as Adadelta has its rho, the key is the base's
            and ours is "sam_rho" or "sam_adaptive"; set the base's in ``wrap(Adadelta(..., rho=0.95))``.
        base_optimizer: a `torch.optim.Optimizer` class (or any callable that builds one), or an
            instance, whose parameters, state and param groups are then used as they are.
        rho: radius, at least 0; None means the recipe's.
        adaptive: True means ``T = |w|`` on every parameter and no eta (the elementwise form known
            from ``adaptive=True`` elsewhere); the authors' ASAM is ``recipe="asam"``.
        recipe: a `Recipe`, a name from `recipes.names()`, or None for plain SAM.
        backend: "auto", or the name of a backend that must serve (see `backends()`).
        model: the module the parameters belong to. Gives recipes names and layers, lets
            ``step(closure)`` freeze normalization statistics in every pass but the first, and under
            `fully_shard` has what was gathered of weights that have moved gathered anew.
        allow_plain_step: let ``step()`` with nothing pending be a step of the base optimizer alone.
        max_grad_norm: scale the gradient that the base gets, after all gradients of the step are combined, to
            at most this norm over all parameters, as `torch.nn.utils.clip_grad_norm_` does; a norm that is
            not finite skips the step. Where the base's update is fused, ``.grad`` stays as it is. None for
            not.
        across_ranks: under `DistributedDataParallel`, "synced" for one perturbation of all ranks, that of the
            whole batch, or "per_rank" for one along each rank's own gradient (m-sharpness): ``step(closure)``
            then averages the last pass alone, and in the two-step form forward and backward of the first
            go inside ``with opt.first_pass():``. Needs the wrapped module as `model`.
        replicas: the process group, or mesh of one dimension, over which modules are replicated that
            `fully_shard` has spread over another mesh. Gradients are then averaged over it here, which lets
            each group of shards perturb for itself ("per_rank").
        rng: "replay" gives every pass of a step the random numbers of its first, dropout masks say, and goes
            on after the step as after one pass: of torch's default generators, on the CPU and the devices of
            the parameters. In the two-step form the first pass must then run inside `first_pass`. "advance"
            (default) lets each pass draw its own.
        master_weights: keep an fp32 weight beside each bfloat16 or float16 parameter. That is the truth, and
            the parameter its rounded copy: perturbed from it, restored to it, updated through it, with
            fp32 state, in place of snapshots. Needs a base whose update is fused, or one that keeps masters
            itself (``state[p]["master_param"]``), and one probe. Ours are in checkpoints as ``sam_master``.
            Writes through ``p.data`` need `refresh_masters`. Frozen parameters have one too: leave them out
            of `params` where memory is short.
        stochastic_rounding: round perturbed bfloat16 weights up or down at random, so that their mean is
            exact; the same random bits on every backend. Other dtypes are rounded as always.
        metrics: measure what `SAM.metrics` tells for every recipe, at the cost of two passes that read;
            without it that tells what the step has measured anyway.
        **base_kwargs: for the base optimizer's class, e.g. lr, momentum, weight_decay.

    Attributes:
        copies_gradients: set it to True where the gradients of two passes may lie in the same memory, as
            static buffers do; recipes that need both then copy the first (4 bytes per fp32 parameter).

    Raises:
        ValueError: for a negative rho, an unknown recipe or backend, complex or sparse parameters.
        TypeError: for arguments that contradict each other.
        RuntimeError: if the named backend cannot serve the parameters.

    Example:
        >>> import torch
        >>> from sam_kernels import SAM
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> x, y = torch.ones(8, 4), torch.zeros(8, 1)
        >>> def closure():
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> first = opt.step(closure)
        >>> bool(opt.step(closure) < first)
        True

    Source: Foret et al., ICLR 2021, arXiv 2010.01412; each recipe names its own paper.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any,
        rho: float | None = None,
        adaptive: bool = False,
        *,
        recipe: Recipe | str | None = None,
        backend: str = "auto",
        model: nn.Module | None = None,
        allow_plain_step: bool = False,
        max_grad_norm: float | None = None,
        across_ranks: str = distributed.SYNCED,
        replicas: Any = None,
        rng: Literal["advance", "replay"] = "advance",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        metrics: bool = False,
        **base_kwargs: Any,
    ) -> None:
        chosen = choose_recipe(recipe, rho, adaptive)
        ops.check_wish(backend)
        check_model(model)
        self.base_optimizer = build_base(params, base_optimizer, base_kwargs)
        self._rho_key, self._adaptive_key = own_keys(self.base_optimizer)
        check_decay(chosen, self.base_optimizer)
        check_momentum(chosen, self.base_optimizer)
        check_options(chosen, master_weights, stochastic_rounding, self.base_optimizer.param_groups)
        if master_weights:
            masters.check(chosen, self.base_optimizer)
        self.master_weights, self.stochastic_rounding = master_weights, stochastic_rounding
        self._ascents = 0  # of the present step, beyond the first
        self.recipe = chosen
        self.backend = backend
        self.model = model
        self.allow_plain_step = allow_plain_step
        self.max_grad_norm = check_max_norm(max_grad_norm, chosen)
        self.measures = check_measures(metrics, chosen)
        self.ranks = distributed.ranks_of(across_ranks, chosen, model, replicas)
        self.rng = check_rng(rng, chosen)
        self._phase = _IDLE
        self._forget_transients()
        self._micro_batch, self._parts = 0, 1
        self.copies_gradients = False
        self._keeps_gradients = False  # zero_grad does nothing
        self._runs_closure = False
        self._has_warned = False
        self._rewrites_tables = False  # before every replay of a graph
        self._clears_by_zeros = False
        self._slots = Slots()
        self._masks = Masks()
        self._reserved_words: dict[Tensor, Tensor] = {}
        self._given: set[Tensor] = set()  # parameters whose masks the recipe was asked for
        self._had_gradients = False  # in the first pass of the pending step
        self._clearings = 0  # how often gradients were cleared since then
        self._own_rho: set[int] = set()

        # The base owns param groups and state (see the properties below); this constructor only
        # brings the hooks and the defaults of torch.optim.Optimizer.
        ours = {self._rho_key: chosen.rho_at(0), self._adaptive_key: bool(adaptive)}
        super().__init__(self.base_optimizer.param_groups, {**self.base_optimizer.defaults, **ours})
        self._is_built = True
        for index in range(len(self.param_groups)):
            self._adopt_group(index)
        warn_if_names_are_missing(chosen, self.param_groups, model)
        served = self._groups()  # refuses now what could not be served later
        distributed.warn_if_gathered_weights_may_stay([group for group, _ in served], model)
        if not (master_weights or stochastic_rounding):
            warn_if_swallowed([group for group, _ in served])

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        imitations.hand_on(cls, SAM)

    # What no copy and no pickle takes along.
    _TRANSIENT = (
        "_served",
        "_layout",
        "_written",
        "_gatherers",
        "_graphs_hold",
        "_measure",
        "_held",
        "_held_of",
        "_next_masks",
        "_next_scalars",
        "_gate_is_closed",
        "_swapped",
        "_replay",
        "_seen",
        "_verdict",
        "_record",
    )

    def _forget_transients(self) -> None:
        self._served: Served | None = None
        self._layout: list[tuple[list[Tensor], Any]] = []
        self._written: tuple[Any, ...] | None = None
        self._gatherers: list[Any] = []  # modules that gather what was sharded
        self._graphs_hold: list[Any] = []
        self._measure: Measure | None = None
        self._held: combination.Held = []
        self._held_of: Served = []
        self._next_masks: list[Block] | None = None  # in force from the next step on
        self._next_scalars: dict[str, float] = {}  # likewise
        self._gate_is_closed = False
        self._swapped: tuple[Served, combination.Lists] | None = None
        self._replay = Replay()
        self._seen: Tensor | None = None
        self._verdict: Verdict | None = None
        self._record = Record()

    @classmethod
    def wrap(cls, base_optimizer: Optimizer, recipe: Recipe | str | None = None, **kwargs: Any) -> SAM:
        """SAM around an optimizer instance; parameters, state and param groups stay the instance's.

        Args:
            base_optimizer: an instance, possibly with state already.
            recipe: as in the constructor.
            **kwargs: rho, adaptive, backend, model, allow_plain_step, max_grad_norm, across_ranks,
                replicas, rng, master_weights, stochastic_rounding, metrics.

        Raises:
            TypeError: if base_optimizer is not an instance.

        Example:
            >>> import torch
            >>> from sam_kernels import SAM, recipes
            >>> base = torch.optim.AdamW(torch.nn.Linear(4, 1).parameters(), lr=1e-3)
            >>> SAM.wrap(base, recipes.sam(rho=0.1)).param_groups is base.param_groups
            True
        """
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                f"SAM.wrap: base_optimizer is {base_optimizer!r}; expected an optimizer instance. "
                "For a class, call SAM(params, cls, ...)"
            )
        return cls(None, base_optimizer, recipe=recipe, **kwargs)

    # ---- what is the base optimizer's ----------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's own list, also after loading and adding."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if self.__dict__.get("_is_built", False):  # torch.optim.Optimizer.__init__ assigns an empty list
            self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's own state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        if self.__dict__.get("_is_built", False):  # as above
            self.base_optimizer.state = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the base optimizer; it may bring its own "rho" and "adaptive".

        Args:
            param_group: as in `torch.optim.Optimizer.add_param_group`.

        Raises:
            RuntimeError: while weights are perturbed.
            ValueError: as the base does, or for a rho that is negative.
        """
        if not self.__dict__.get("_is_built", False):
            return  # torch.optim.Optimizer.__init__ adds what the base already holds
        self._require_idle("add_param_group()")
        self._check_ours(param_group, "add_param_group()")
        self.base_optimizer.add_param_group(param_group)
        last = len(self.param_groups) - 1
        try:
            check_momentum(self.recipe, self.base_optimizer)
            check_options(self.recipe, self.master_weights, self.stochastic_rounding, self.param_groups, last)
            if self.master_weights:
                masters.check(self.recipe, self.base_optimizer)
            self._adopt_group(last)
            self._retire_groups()
            self._groups()
        except BaseException:
            self.param_groups.pop()
            self._own_rho.discard(last)
            self._served = None
            raise

    def _adopt_group(self, index: int) -> None:
        group, where = self.param_groups[index], f"param_groups[{index}]"
        if self._rho_key in group:
            self._own_rho.add(index)
        group.setdefault(self._rho_key, self.defaults[self._rho_key])
        group.setdefault(self._adaptive_key, self.defaults[self._adaptive_key])
        # The step count lives with the base's own scalars, so every kind of checkpoint carries it. It
        # counts attempts: a step skipped for a gradient that is not finite counts too, since knowing
        # better would take a read-back from the device in every step.
        group.setdefault("sam_step", self.param_groups[0].get("sam_step", 0))
        if index == 0:
            for key, value in self._scalars().items():
                group.setdefault(key, value)
        self._check_ours(group, where)

    def _check_ours(self, group: Any, where: str) -> None:
        """Raise a sentence unless rho and adaptive, where the group has them, make sense here."""
        if not isinstance(group, dict):
            return  # the base optimizer says what it expects
        if self._rho_key in group:
            check_rho(group[self._rho_key], where)
        adaptive = group.get(self._adaptive_key, False)
        check_adaptive(adaptive, where)
        if adaptive and not isinstance(self.recipe.metric, Euclidean | Adaptive):
            raise TypeError(
                f"{where}: adaptive=True and recipe '{self.recipe.name}' each choose a metric; drop one"
            )

    def _adopt_strays(self) -> None:
        """Give our keys to groups that came in through the base optimizer or the list itself."""
        for index, group in enumerate(self.param_groups):
            if "sam_step" not in group:
                self._adopt_group(index)

    # ---- the step ------------------------------------------------------------------------------

    def step(
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        ahead: Closure | None = None,
        m_sharpness: bool = False,
        scaler: Any = None,
    ) -> Any:
        """Take one step.

        With a closure: run every pass the recipe needs (gradients are zeroed before each, grad mode
        is on), descend, and return the first pass's loss. Without: finish what `first_step` or
        `perturbed` began.

        A list of closures is one batch in parts. Each gradient is then the sum over all parts, exactly that
        of the whole batch if their losses add up to its loss; the parts must not clear gradients, but by this
        optimizer's ``zero_grad``, which does nothing there. With `m_sharpness` every part has a perturbation
        of its own, and the resulting gradients are added up.

        Under a `torch.amp.GradScaler` closures scale their losses, ``step(closure, scaler=scaler)`` takes the
        place of ``scaler.step``, and ``scaler.update()`` follows: every pass is unscaled, an overflow in any
        of them skips the update, and the scaler hears of it. In the two-step form call ``scaler.step(opt)``
        after the second scaled backward, and ``unscale_`` between them or not at all; weights are restored in
        every case. Recipes that take more from the first gradient than its direction must know the scale
        sooner, and say so. ``scaler.step(opt, closure)``, as accelerate has it, works for all, but for a
        scaler that does not hear of an overflow inside the closure.

        Args:
            closure: recomputes the loss, calls backward and returns the loss; or a list of such functions.
            ahead: the closure of the next batch, for recipes that look ahead (`recipes.sampa`).
            m_sharpness: perturb for each closure of a list by itself (Foret et al. 2021, section 4.1).
            scaler: a `torch.amp.GradScaler` whose ``scale`` the closures apply to their losses.

        Returns:
            What the closure returned in the first pass; for a list, the list of it; None without a closure.

        Raises:
            TypeError: for a closure that is no function, or keywords that do not go with the recipe.
            RuntimeError: for a step() with nothing pending that would silently not be SAM, a step(closure)
                in the middle of a two-step, or scaled gradients that could not be unscaled.
        """
        hooks, closure = (closure, None) if has_hooks_alone(closure) else (None, closure)
        check_closures(self.recipe, closure, ahead, m_sharpness)
        if scaler is not None and (closure is None or self._is_scaled):
            raise TypeError(
                "step(): scaler goes with closures, and where scaler.step() makes the call it is not needed; "
                "in the two-step form call scaler.step(opt)"
            )
        was_idle = self._phase == _IDLE
        self._runs_closure = closure is not None
        try:
            if callable(hooks):
                hooks()
            with self._scaled_by(scaler):
                return self._step(closure, ahead=ahead, m_sharpness=m_sharpness)
        except BaseException:
            # Hooks run inside too: whatever raises, no perturbed weights stay behind. Only a closure
            # given in the middle of a two-step leaves that as it is.
            if closure is None or was_idle:
                self._abandon()
            self._forget_scaler()
            raise
        finally:
            self._runs_closure = False

    # Tells torch.optim.Optimizer that the hooks are called already: `_step` below is the hooked one.
    step.hooked = True  # type: ignore[attr-defined]

    @Optimizer.profile_hook_step
    @torch.no_grad()
    def _step(
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        ahead: Closure | None = None,
        m_sharpness: bool = False,
    ) -> Any:
        graphs.check_capture(self, "step()")
        if closure is None:
            if self._phase == _IDLE:
                self._record = Record()
                self._plain_step()
            else:
                self._record.know_scale(self._scale, self._is_scaled)
                self._meet_scaler(is_pending=True, is_decayed=self._phase == _RESTORED)
                if self._phase != _RESTORED:  # there it was added while the weights were perturbed
                    self._decay_inside()
                self._descend()
            return None
        self._require_idle("step(closure)")
        self._require_scale()
        self._record = Record()
        probe, is_due = self.recipe.probe, self.is_due
        if callable(closure) and is_due and isinstance(probe, Anticipated):
            loss = anticipated.evaluate(self, closure, ahead)  # type: ignore[arg-type]
        elif callable(closure) and is_due and isinstance(probe, Lookbehind):
            loss = lookbehind.step(self, closure, probe)
            self._complete()
            return loss
        elif callable(closure):
            if isinstance(probe, Anticipated):
                anticipated.forget(self)  # what was anticipated is behind after this step
            (loss,) = self._run_probes([closure])
        else:
            loss = self._run_micro_batches(closure) if m_sharpness else self._run_probes(closure)
            if m_sharpness and is_due:
                self._begin(_RESTORED)
        self._descend()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Ascent step: perturb the weights along the present gradients.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: if the weights are perturbed already; they stay as they are.
        """
        self._require_idle("first_step()")
        if self.recipe.probe.needs_closure:
            raise RuntimeError(
                f"recipe '{self.recipe.name}' evaluates {self.recipe.gradients} gradients per step, some "
                "where only it can go, and needs opt.step(closure"
                f"{', ahead=...' if isinstance(self.recipe.probe, Anticipated) else ''}); "
                "first_step/second_step serve one-probe recipes"
            )
        graphs.check_capture(self, "first_step()")
        self._record = Record()
        if self.recipe.direction.needs_gradient:
            self._require_first_pass()
            if self.is_due:
                self.ranks.require_first_pass()
            self._decay_inside()
        if self.is_due and self._passes_gate():
            self._ascend(by_copy=not zero_grad)
        else:
            self._measure_gradient()
            self._begin(_NOT_DUE)  # the base steps alone on this one
        if zero_grad:
            self.zero_grad()
        if self._phase == _PERTURBED and not self.recipe.direction.needs_gradient:
            self._had_gradients, self._clearings = True, 0  # the only ones are to come
        self._replay.begin()

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Around the first pass of the two-step form, forward and backward, where the optimizer is to know of
        it.

        With ``rng="replay"`` random numbers are those of this block again, from `first_step` to the end of
        the step, or of the block of `perturbed`. With ``across_ranks="per_rank"`` gradients are not averaged
        inside; a backward pass alone in it would be averaged all the same, for torch decides it in the
        forward pass. ``step(closure)`` needs no such block.

        Raises:
            RuntimeError: in the middle of a step.

        Example:
            >>> import torch
            >>> from sam_kernels import SAM
            >>> w = torch.nn.Parameter(torch.ones(3))
            >>> opt = SAM([w], torch.optim.SGD, lr=0.1, rng="replay")
            >>> with opt.first_pass():
            ...     (torch.dropout(w, 0.5, train=True) ** 2).sum().backward()
            >>> opt.first_step(zero_grad=True)
            >>> (torch.dropout(w, 0.5, train=True) ** 2).sum().backward()
            >>> opt.step()
        """
        self._require_idle("first_pass()")
        if self.rng == "replay":
            self._replay.note(self._devices())
        try:
            with self.ranks.averaging(self._averages(0)):
                yield
            self.ranks.note_first_pass(True)
        except BaseException:
            self._replay.forget()
            raise

    def _require_first_pass(self) -> None:
        if self.rng == "replay" and not self._replay.has_first:
            raise RuntimeError(
                "first_step(): rng='replay' repeats the random numbers of the first pass, and where that "
                "began is not known; run its forward and backward inside `with opt.first_pass():`, or use "
                "step(closure)"
            )

    def second_step(self, zero_grad: bool = False) -> None:
        """Descent step: restore the weights and let the base step with the present gradients.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: if no first_step is pending.
        """
        if self._phase == _IDLE:
            raise RuntimeError("second_step(): no first_step() is pending; call first_step() after backward")
        self.step()
        if zero_grad:
            self.zero_grad()

    ascent_step = first_step
    descent_step = second_step

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Perturb inside the block and restore at its end, whatever happens in it.

        On entry the weights move along the present gradients, which are then cleared. After a block
        that ended well, `step()` descends with the gradients computed inside.

        Raises:
            RuntimeError: if the weights are perturbed already.

        Example:
            >>> import torch
            >>> from sam_kernels import SAM
            >>> w = torch.nn.Parameter(torch.ones(3))
            >>> opt = SAM([w], torch.optim.SGD, lr=0.1)
            >>> (w**2).sum().backward()
            >>> with opt.perturbed():
            ...     (w**2).sum().backward()
            >>> opt.step()
        """
        self.first_step(zero_grad=True)
        try:
            yield
            if self._phase == _PERTURBED:
                self._revalidate()
                self._decay_inside()
                self._restore()
                self._phase = _RESTORED
            self._replay.forget()
        except BaseException:
            self._abandon()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as in `torch.optim`.

        Between `first_step` and `step`, after the second backward, this gives the step up: ``step()``
        then restores the weights and updates nothing. A GradScaler needs no such thing.

        Args:
            set_to_none: drop the gradients in place of writing zeros.
        """
        if self._keeps_gradients:
            return  # a closure's usual first line; see `step` for lists of closures
        if self._phase != _IDLE and self._has_gradients():
            self._clearings += 1
        super().zero_grad(set_to_none and not self._clears_by_zeros)

    @property
    def is_due(self) -> bool:
        """Whether the coming step perturbs, by the recipe's cadence.

        Cadence and schedules go by ``param_groups[0]["sam_step"]``, the number of steps attempted: one
        that was skipped for a gradient that is not finite counts, one that raised does not.
        """
        self._adopt_strays()
        return self.recipe.cadence.is_due(self.param_groups[0]["sam_step"])

    def closure_kwargs(self, probe: int) -> dict[str, Any]:
        """Keywords handed to the closure in pass number `probe` (from 0); override or assign to add some.

        Example:
            >>> import torch
            >>> from sam_kernels import SAM
            >>> opt = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
            >>> opt.closure_kwargs = lambda probe: {"ddp_sync": probe > 0}
        """
        return {}

    def backends(self) -> ops.Report:
        """What runs where, and why the others were passed over; print it.

        Example:
            >>> import torch
            >>> from sam_kernels import SAM
            >>> opt = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.RMSprop, lr=0.1)
            >>> "RMSprop has no fused update" in str(opt.backends())
            True
        """
        lines = [f"recipe '{self.recipe.name}' around {type(self.base_optimizer).__name__}"]
        for group, backend in self._groups():
            lines.append(f"{group!r}: {backend.name}")
            _, refusals = ops.resolve(group, self.backend)
            lines += [f"  passed over {name}: {sentence}" for name, sentence in refusals.items()]
        if self.master_weights:
            lines.append("bfloat16 and float16 weights: rounded from fp32 masters, no snapshots")
        if self.stochastic_rounding:
            lines.append("perturbed bfloat16 weights: rounded at random")
        rule, sentence = state.fused_rule(self.base_optimizer)
        how = "one pass with the restore" if rule else f"restore, then its own step: {sentence}"
        lines.append(f"base update: {how}")
        return ops.Report("\n".join(lines))

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What the last step tells of itself: new 0-d tensors on the device, for which no host waits.

        ``loss``: what the closure returned in the first pass. ``loss_gap``: by how much that rose at
        ``w + e`` (that of the last ascent, where there are several). ``grad_norm``: ``||g||`` of the first
        pass, Euclidean, over all parameters and ranks, without the scale of a scaler. ``perturbation_norm``:
        ``||e||``, Euclidean; 0 where the gradient was not finite.

        What the step did not measure is not there: losses in the two-step form, norms of other metrics than
        the Euclidean, and under masks. With ``SAM(..., metrics=True)`` both norms are, wherever a gradient is
        evaluated at the weights and weights are moved. In the two-step form a scaler tells its scale at the
        end; after `unscale_` it does not, and ``grad_norm`` is left out. Without `metrics` the perturbation
        of half weights is that before rounding. A list of closures gives the sum of its losses, and with
        `m_sharpness` the mean of its norms. Losses are this rank's.

        Example:
            >>> import torch
            >>> from sam_kernels import SAM
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> opt = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
            >>> def closure():
            ...     loss = 0.5 * (w**2).sum()
            ...     loss.backward()
            ...     return loss
            >>> loss = opt.step(closure)
            >>> {name: round(value.item(), 4) for name, value in opt.metrics.items()}
            {'loss': 12.5, 'loss_gap': 2.625, 'grad_norm': 5.0, 'perturbation_norm': 0.5}
        """
        with torch.no_grad():
            return self._record.tensors(self.recipe)

    def refresh_masters(self) -> None:
        """Look at the weights now: where one is no rounded copy of its master, the master is made from it.

        For weights that were written through ``p.data``, which advances no version counter. Any other
        write, as of `torch.nn.Module.load_state_dict`, is noticed in the next step.

        Raises:
            RuntimeError: while weights are perturbed.

        Example:
            >>> import torch
            >>> from sam_kernels import SAM
            >>> w = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
            >>> opt = SAM([w], torch.optim.SGD, lr=0.1, master_weights=True)
            >>> (w**2).sum().backward()
            >>> opt.first_step(zero_grad=True)
            >>> (w**2).sum().backward()
            >>> opt.second_step()
            >>> w.data.fill_(5.0)
            tensor([5., 5., 5.], dtype=torch.bfloat16)
            >>> opt.refresh_masters()
            >>> opt.state_dict()["state"][0]["sam_master"]
            tensor([5., 5., 5.])
        """
        self._require_idle("refresh_masters()")
        if self.master_weights:
            with torch.no_grad():
                masters.prepare(self._groups(), self._slots, self.base_optimizer, anyway=True)

    def capturable(self) -> ops.Report:
        """Whether a CUDA graph can record and replay steps, or what stands against it; print it.

        Example:
            >>> import torch
            >>> from sam_kernels import SAM
            >>> opt = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, recipe="looksam", lr=0.1)
            >>> opt.capturable()
            not capturable: recipe 'looksam': its cadence decides on the host which steps perturb
        """
        sentence = graphs.refusal(self)
        if sentence is None and not all(group.device.type == "cuda" for group, _ in self._groups()):
            sentence = "the parameters are on no CUDA device"
        return ops.Report("capturable" if sentence is None else f"not capturable: {sentence}")

    # ---- the passes, in the order of a step ----------------------------------------------------

    def _begin_perturbed(self) -> None:
        self._begin(_PERTURBED)
        self._weights_have_moved()

    def _begin(self, phase: str) -> None:
        """From here on a step is pending."""
        self._phase = phase
        self._had_gradients = self._has_gradients()
        self._clearings = 0

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for group in self.param_groups for p in group["params"])

    def _restore(self) -> None:
        with torch.no_grad():
            perturbation.restore(self._perturbed_groups())
        self._weights_have_moved()

    @torch.no_grad()
    def _abandon(self) -> None:
        """Weights back, nothing pending, nothing remembered: the end of every step that failed."""
        self._phase = _IDLE
        self._record = Record()
        self._replay.forget()
        self._measure = None
        self._next_masks = None
        self._next_scalars = {}
        self._gate_is_closed = False
        self._give_back()
        self._forget_held()
        self._micro_batch, self._parts = 0, 1
        for group, _ in self._served or []:
            if group.is_perturbed:
                # Not the restore of the backend: that one may be what failed.
                group.copy_back()
                group.count_moved()
            # Of the others too: the buffers of snapshots may hold a direction by now.
            perturbation.forget(group)
            group.drop_gradients()
        mark_left(self.param_groups)
        self.ranks.note_first_pass(False)
        self._weights_have_moved()

    def _revalidate(self) -> None:
        """Before perturbed weights are written again: they must still be what was perturbed.

        Raises:
            RuntimeError: saying what changed; the caller abandons the step.
        """
        served = self._perturbed_groups()
        if not served:
            return
        for group, _ in served:
            t = group.changed() if not group.is_current() else None
            if t is not None:
                all_fit = all(map(group.fits, range(len(group.params))))
                restored = "The weights are restored" if all_fit else "All others are restored, it cannot be,"
                raise RuntimeError(
                    f"{self._place(group.owners[t])} {group.describe_change(t)}: it changed while the "
                    f"weights were perturbed. {restored} and no step was taken; cast, move and reshape "
                    "parameters between steps"
                )
        if self._has_layout():
            return
        present = {id(p) for group in self.param_groups for p in group["params"]}
        for group, _ in served:
            for param in group.owners:
                if id(param) not in present:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(param.shape)} was replaced in param_groups, or "
                        "removed, while the weights were perturbed. The weights are restored and no step was "
                        "taken; replace parameters between steps"
                    )
        # Parameters have joined. The update is theirs too, so it starts from restored weights.
        perturbation.restore(served)

    def _place(self, param: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    return f"param_groups[{index}]['params'][{position}]"
        return "a parameter"

    def _descend(self) -> None:
        """Restore and update; from here on the step either completes or leaves the weights restored."""
        self._adopt_strays()
        is_pending = self._phase != _IDLE
        try:
            shared = self.ranks.share(self._guard)  # before a rank by itself can raise
            self._revalidate()
            is_lost = is_pending and self._had_gradients and not self._has_gradients()
            # Cleared once more than there were passes before means that this one was given up on purpose.
            has_first = self.recipe.direction.needs_gradient
            if is_lost and self._clearings < 1 + has_first:
                which = ", though there were some in the first pass" if has_first else ""
                raise RuntimeError(
                    f"step(): no parameter has a gradient{which}. The weights are restored and nothing was "
                    f"updated; call backward(){' again' if has_first else ''} between first_step() and step()"
                )
            after, clip, guard = None, None, shared
            if not is_lost:
                self._look_at_last()
                guard = shared if self.ranks.are_apart else self._guard
                after = self._swap_gradients()
                self._combine_gradients()
                if not self.is_due or self._gate_is_closed:
                    self._reuse_gradients()
                clip, guard = self._clip(guard)
            if guard is not None and is_pending and not self.recipe.direction.needs_gradient:
                # No gradient has been looked at yet.
                guard = guard + perturbation.squares(self._read_gradients()).to(guard.device)
            self._update(guard, clip)
            if after is not None:
                after()
        except BaseException:
            self._abandon()
            raise
        self._complete(is_lost)

    def _update(self, guard: Tensor | None, clip: Tensor | None = None) -> None:
        """Restore the weights, and let the base step with the present gradients times `clip`."""
        self._see(guard)
        rule, _ = state.fused_rule(self.base_optimizer)
        if self.master_weights:
            masters.check(self.recipe, self.base_optimizer)  # a flag or a hook may have come since
        if rule is not None:
            self._descend_fused(rule, guard, clip)
            self._restore()  # what was skipped
            return
        self._restore()
        if clip is not None:
            combination.scale(self._read_gradients(), clip)
        if guard is not None and not bool(torch.isfinite(guard)):
            return
        with self._without_decay() if self.recipe.decay == "inside" else nullcontext():
            self.base_optimizer.step()

    @contextmanager
    def _without_decay(self) -> Iterator[None]:
        """The base does not decay inside the block: the decay is in the gradients already."""
        groups = [group for group in self.param_groups if group.get("weight_decay") is not None]
        decays = [group["weight_decay"] for group in groups]
        try:
            for group in groups:
                group["weight_decay"] = 0.0
            yield
        finally:
            for group, decay in zip(groups, decays, strict=True):
                group["weight_decay"] = decay

    def _step_base_in_place(self) -> None:
        """A step of the base at the weights as they are, while snapshots are kept."""
        served = self._groups()
        kept = [(group, group.snapshots) for group, _ in served]
        try:
            for group, _ in served:
                group.snapshots, group.is_perturbed = [None] * len(group.params), False
            clip, guard = self._clip(self._guard)
            self._update(guard, clip)
        finally:
            for group, snapshots in kept:
                group.snapshots, group.is_perturbed = snapshots, True

    def _complete(self, is_lost: bool = False) -> None:
        """The step is over: nothing is pending, and it counts."""
        self._phase = _IDLE
        self._replay.forget()
        self._measure = None
        for group, _ in [*(self._served or []), *self._held_of]:
            group.drop_gradients()  # held on to, they would outlive `zero_grad` and the next backward
        self._forget_held()
        self._slots.clear_reserved()
        self._reserved_words = {}
        self._slots.scalars.update(self._next_scalars)
        self._next_scalars = {}
        self._gate_is_closed = False
        if self._next_masks is not None and not is_lost:
            self._masks.take(self._next_masks)
        self._next_masks = None
        for param_group in self.param_groups:
            param_group["sam_step"] += 1
        mark_left(self.param_groups)
        self.ranks.note_first_pass(False)
        self._weights_have_moved()

    def _clip(self, guard: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """``min(1, max_grad_norm / (||d|| + 1e-6)) / scale``, None for 1, and a guard that minds it.

        d is unscaled; without a bound the minimum is 1.
        """
        scale = self._scale_left
        factor = None if scale is None else scale.reciprocal()
        if (self.max_grad_norm is None and not self._checks_base) or not self._groups():
            return factor, guard
        norm = perturbation.squares(self._read_gradients()).sqrt()
        guard = norm if guard is None else guard + norm.to(guard.device)
        if self.max_grad_norm is None:
            return factor, guard
        size = norm if factor is None else norm * factor.to(norm.device)
        clip = (self.max_grad_norm / (size + 1e-6)).clamp(max=1.0)
        return clip if factor is None else clip * factor.to(clip.device), guard

    def _descend_fused(self, rule: str, guard: Tensor | None, clip: Tensor | None = None) -> None:
        served = self._read_gradients()
        if self.master_weights:
            masters.prepare(served, self._slots, self.base_optimizer)
            masters.begin_descent(served)
        if clip is not None:
            # The factor of the fused update is a float32, too short for these.
            combination.scale([(g, b) for g, b in served if g.dtype == torch.float64], clip)
        self._write_tables(served)
        guards = [None if guard is None else guard.to(group.device) for group, _ in served]
        # The state of all groups is there, and fits, before the first of them moves.
        lists = [
            state.slots(
                self.base_optimizer,
                group,
                rule,
                guard=on_device,
                counts_on_device=getattr(backend, "counts_on_device", lambda group: False)(group),
            )
            for (group, backend), on_device in zip(served, guards, strict=True)
        ]
        for (group, backend), slots, on_device in zip(served, lists, guards, strict=True):
            if slots is None:
                continue  # skipped before any state was made; the caller restores
            factor = None
            if clip is not None and group.dtype != torch.float64:
                factor = clip.to(group.device, torch.float32)
            backend.descend_(group, rule, slots, guard=on_device, inv_scale=factor)  # type: ignore[arg-type]
            group.count_moved()
            perturbation.forget(group)
            state.adopt(self.base_optimizer, group, slots)
        for group, _ in served:
            group.drop_gradients()
        # A scheduler on the base looks for this mark, which its wrapper of base.step would have set.
        self.base_optimizer._opt_called = True  # type: ignore[attr-defined]

    def _plain_step(self) -> None:
        lrs = [group.get("lr") for group in self.param_groups]
        # A rate on the device is not waited for: it is a schedule's, and not that zero.
        no_rate = all(lr is not None and not lives_on_device(lr) and float(lr) == 0.0 for lr in lrs)
        if no_rate and not self._is_scaled and (self.is_due or not self._any_slope()):
            # torch's distributed checkpoint asks for a step like this to make the state exist.
            if self.master_weights:
                self._update(None)  # which makes the state in fp32
            else:
                self.base_optimizer.step()
            self._reserve(group for group, _ in self._groups())
            return
        if not (self.allow_plain_step or not self.is_due):
            raise RuntimeError(
                f"step() was called with nothing pending, so it would be a step of "
                f"{type(self.base_optimizer).__name__} without recipe '{self.recipe.name}'. Call "
                "step(closure), or first_step() before the second backward; allow_plain_step=True permits "
                "steps of the base alone"
            )
        if isinstance(self.recipe.probe, Anticipated):
            anticipated.forget(self)  # what was anticipated is behind after this step
        self._meet_scaler(is_pending=False, is_decayed=False)
        self._decay_inside()
        self._descend()

    def _any_slope(self) -> bool:
        """Whether any gradient is not zero; the host waits, and asks only where every lr is 0."""
        grads = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        return any(bool(grad.any()) for grad in grads)

    # ---- tensor groups -------------------------------------------------------------------------

    def _groups(self) -> Served:
        """The tensor groups with their backends, rebuilt when parameters were replaced or moved.

        While weights are perturbed these are the groups that know it, whatever happened since.
        """
        self._adopt_strays()
        if perturbed := self._perturbed_groups():
            return perturbed
        if self._served is not None and self._has_layout():
            if all(group.is_current() for group, _ in self._served):
                return self._served
        layout = self._present_layout()
        for index, param_group in enumerate(self.param_groups):
            self._check_ours(param_group, f"param_groups[{index}]")
        member_of = member_lookup(self.param_groups, self.model)
        shardings = flat_shardings(self.model)
        groups = collect(self.param_groups, self.recipe, member_of, self._adaptive_key, shardings)
        distributed.check_sharded(self.recipe, groups, self.ranks)
        if groups and all(metric == FIXED for group in groups for _, metric, _ in group.keys):
            raise ValueError(
                f"recipe '{self.recipe.name}' selects none of the parameters; nothing would be perturbed"
            )
        served = [(group, ops.resolve(group, self.backend)[0]) for group in groups]
        self._retire_groups()
        if isinstance(self.recipe.mask, Sparse):
            self._masks.attach(groups)
            self._next_masks = None  # it was for the former groups
        self._served = served
        self._layout = layout
        has_dtensors = any(group.has_dtensors for group in groups)
        self._gatherers = fsdp_modules(self.model) if has_dtensors else []
        return served

    def _retire_groups(self) -> None:
        """Collect the groups anew. A CUDA graph that recorded a step goes on using the memory of the old."""
        self._graphs_hold += [group for group, _ in self._served or [] if group.is_captured]
        self._served = None

    def _present_layout(self) -> list[tuple[list[Tensor], Any]]:
        """Which parameters there are, in which param group, under which metric."""
        return [(list(group["params"]), group.get(self._adaptive_key)) for group in self.param_groups]

    def _has_layout(self) -> bool:
        """Whether there are the parameters that the tensor groups were made of."""
        return len(self.param_groups) == len(self._layout) and all(
            group.get(self._adaptive_key) == adaptive and are_same(group["params"], params)
            for group, (params, adaptive) in zip(self.param_groups, self._layout, strict=True)
        )

    def _perturbed_groups(self) -> Served:
        """All groups as they were perturbed; empty when nothing is perturbed."""
        served = self._served or []
        return served if any(group.is_perturbed for group, _ in served) else []

    def _write_tables(self, served: Served) -> None:
        rule, _ = state.fused_rule(self.base_optimizer)
        values = [
            (group[self._rho_key], group.get("maximize"), *state.numbers(rule, group))
            for group in self.param_groups
        ]
        # Schedules have to be asked again in every step, and so have tensors, which may be changed in place.
        is_schedule = callable(self.recipe.rho) or isinstance(self.recipe.rho, ProportionalToLr)
        is_settled = not is_schedule and all(_PLAIN.issuperset(map(type, row)) for row in values)
        if is_settled and self._has_written(served, rule, values):
            return
        eps = self.recipe.eps
        per_group = []
        direction = self.recipe.direction
        factor = self.recipe.mask.scale * sign_of(direction)
        if isinstance(self.recipe.probe, MultiStep):
            factor *= self.recipe.probe.step
        for index, group in enumerate(self.param_groups):
            if callable(self.recipe.rho) and index not in self._own_rho:
                group[self._rho_key] = self.recipe.rho_at(group["sam_step"])
            elif isinstance(self.recipe.rho, ProportionalToLr) and index not in self._own_rho:
                group[self._rho_key] = self.recipe.rho_at(group["sam_step"], number(group["lr"]))
            rho = number(group[self._rho_key])
            if not isinstance(rho, Tensor):  # which the host would have to wait for
                check_rho(rho, f"param_groups[{index}]")
            # Maximizing f is minimizing -f: the worst point of the ball then lies down the gradient.
            # Momentum is of the negated gradients already, and noise has no side.
            sign = -1.0 if group.get("maximize", False) and direction.needs_gradient else 1.0
            if self.recipe.decay == "inside" and "weight_decay" in group:
                group = {**group, "weight_decay": 0.0}  # it is in the gradients already
            per_group.append((sign * factor * rho, eps, *state.scalars(rule, group)))
        for tensor_group, _ in served:
            rows = [(float(metric), eta, *per_group[index]) for index, metric, eta in tensor_group.keys]
            tensor_group.write_table(rows)
        tables = [group.rows for group, _ in served]
        self._written = (self.recipe, rule, values, tables) if is_settled else None

    def _has_written(self, served: Served, rule: str | None, values: list[tuple[Any, ...]]) -> bool:
        """Whether the tables say all this already, so that no number needs to be looked at."""
        if self._written is None:
            return False
        recipe, known_rule, known, tables = self._written
        if recipe is not self.recipe or rule != known_rule or len(tables) != len(served):
            return False
        if any(group.rows is not rows for (group, _), rows in zip(served, tables, strict=True)):
            return False
        if values != known:
            return False
        for group, _ in served:
            group.note_capture()
        return True

    def _require_idle(self, what: str) -> None:
        give_up = "or, to give the step up, zero_grad() and then step()"
        if self._phase == _PERTURBED:
            raise RuntimeError(
                f"{what}: the weights are perturbed by first_step(); call second_step() or step() first, "
                f"{give_up}, which restores them"
            )
        if what == "state_dict()" and not isinstance(self.recipe.direction, Remembering):
            return  # the weights are the user's own, and the state is that of the last completed step
        if self._phase == _NOT_DUE:
            raise RuntimeError(
                f"{what}: first_step() has begun a step that does not perturb, by the cadence of recipe "
                f"'{self.recipe.name}'; call second_step() or step() first, {give_up}"
            )
        if self._phase == _RESTORED:
            raise RuntimeError(
                f"{what}: a perturbed() block has ended and its descent is pending; call step(), {give_up}"
            )

    # ---- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self._require_idle("copying or pickling")
        # As in torch.optim, hooks and what was assigned to methods stay behind: closures do not pickle.
        transient = (*self._TRANSIENT, "step", "closure_kwargs")
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in transient and not (key.startswith("_optimizer_") and key.endswith("_hooks"))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # gives empty places for hooks and names the step to the profiler
        self._forget_transients()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1].rstrip()}\nRecipe: {self.recipe.name}\n)"
