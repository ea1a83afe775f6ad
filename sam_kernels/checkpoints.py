"""The half of SAM that has to do with checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import masters
from .bitmask import count_words
from .masks import Masks
from .perturbation import Measure, Served
from .policies import Anticipated, Remembering, ReuseOrthogonal, Sparse
from .recipe import Recipe
from .slots import SCALARS, Slots, key_of
from .tensor_groups import TensorGroup

# Under which key of a parameter's state checkpoints hold its mask.
_MASK = "sam_mask"


class Checkpoints(Optimizer):
    """Base of `SAM`: the base optimizer's state and what policies keep, in torch's own layout."""

    recipe: Recipe
    base_optimizer: Optimizer
    _masks: Masks
    _slots: Slots
    _measure: Measure | None
    _given: set[Tensor]
    _reserved_words: dict[Tensor, Tensor]
    _own_rho: set[int]
    _rho_key: str
    _adaptive_key: str
    _require_idle: Callable[[str], None]
    _check_ours: Callable[[Any, str], None]
    _adopt_group: Callable[[int], None]
    _retire_groups: Callable[[], None]
    _groups: Callable[[], Served]
    master_weights: bool

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and ours, in torch's own layout; never snapshots.

        A `torch.optim` optimizer of the base's class loads it, and the other way round.

        Raises:
            RuntimeError: while weights are perturbed.
        """
        self._require_idle("state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        if self.master_weights:
            with torch.no_grad():
                masters.prepare(self._groups(), self._slots, self.base_optimizer)
        state_dict = self._with_ours(self.base_optimizer.state_dict())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or a checkpoint of the bare base optimizer.

        Args:
            state_dict: groups without "rho" or "adaptive" keep the present ones.

        Raises:
            RuntimeError: while weights are perturbed.
            ValueError: if the parameter groups do not match, or hold a rho that is negative.
        """
        self._require_idle("load_state_dict()")
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        self._measure = None
        for index, group in enumerate(state_dict.get("param_groups", ())):
            self._check_ours(group, f"load_state_dict(): param_groups[{index}]")
        kept = [
            {key: group[key] for key in (self._rho_key, self._adaptive_key)} for group in self.param_groups
        ]
        own_rho = set(self._own_rho)
        state_dict, words, tensors, scalars = self._without_ours(state_dict)
        self._masks.check(words)
        Slots.check(tensors, scalars)
        self._warn_if_lost(state_dict, tensors)
        masters.check_loaded(tensors, self.master_weights)
        self.base_optimizer.load_state_dict(state_dict)
        if self.master_weights and not masters.offers(self.base_optimizer):
            entries = state_dict["state"]
            saved = {p: entries[n] for n, p in self._by_number(state_dict) if n in entries}
            masters.widen_state(self.base_optimizer, saved)
        self._masks.load(words)
        self._slots.load(tensors, scalars)
        self._reserved_words = {}
        self._given = set(words)
        for index, (group, ours) in enumerate(zip(self.param_groups, kept, strict=True)):
            for key, value in ours.items():
                group.setdefault(key, value)
            self._adopt_group(index)
        self._own_rho = own_rho  # a loaded value is no wish of the user's to leave the schedule
        self._retire_groups()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _with_ours(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Packed masks and slots beside the base optimizer's state, scalars in the first param group."""
        mask = self.recipe.mask
        has_masks = not isinstance(mask, Sparse) or mask.is_stored
        entries, groups = dict(state_dict["state"]), list(state_dict["param_groups"])
        for number, param in self._by_number(state_dict):
            own = self._slots.saved(param)
            words = self._masks.saved(param) if has_masks else None
            words = self._reserved_words.get(param) if words is None else words
            if words is not None:
                own = {_MASK: words, **own}
            if own:
                entries[number] = {**entries.get(number, {}), **own}
        groups[0] = {**groups[0], **self._slots.saved_scalars()}  # over the places for them, see `_scalars`
        return {**state_dict, "state": entries, "param_groups": groups}

    def _without_ours(
        self, state_dict: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[Tensor, Tensor], dict[Tensor, dict[str, Tensor]], dict[str, float]]:
        """What the base optimizer may load, then masks, slots and scalars.

        The base would cast masks to the dtype of the weights.
        """
        if not {"state", "param_groups"} <= state_dict.keys() or not state_dict["param_groups"]:
            return state_dict, {}, {}, {}  # the base optimizer says what it misses
        entries, groups = dict(state_dict["state"]), list(state_dict["param_groups"])
        words, tensors = {}, {}
        for number, param in self._by_number(state_dict):
            entry = dict(entries.get(number, {}))
            if _MASK in entry:
                words[param] = entry.pop(_MASK)
            if own := Slots.taken(entry):
                tensors[param] = own
            if entry:
                entries[number] = entry
            elif param in words or own:
                del entries[number]
        groups[0] = dict(groups[0])
        scalars = Slots.taken(groups[0], SCALARS)
        if groups[0].get("sam_step") == 0:
            tensors, scalars = {}, {}  # no step has made them: they were reserved places
        if not any(bool(mask.any()) for mask in words.values() if isinstance(mask, Tensor)):
            words = {}  # reserved likewise: no mask selects nothing at all
        Slots.drop_blank(tensors)
        return {**state_dict, "state": entries, "param_groups": groups}, words, tensors, scalars

    # note: [places in distributed checkpoints]
    # `torch.distributed.checkpoint` loads into the entries that a state dict has, and drops all others.
    # To get those of a new optimizer it has it take a step with lr = 0. What policies keep exists after their
    # first real step only, so that step reserves places, which show in state dicts and nowhere else. For
    # numbers it asks the keys of `param_groups`, so those stand there from the start.

    def _reserve(self, groups: Iterable[TensorGroup]) -> None:
        """Places for what this recipe will keep; see note [places in distributed checkpoints]."""
        mask = self.recipe.mask
        for group in groups:
            self._slots.reserve(self._kept_tensors(), group)
            if isinstance(mask, Sparse) and mask.is_stored:
                for param, takes_part in zip(group.params, group.participates, strict=True):
                    if takes_part and self._masks.words(param) is None:
                        words = torch.zeros(
                            count_words(param.numel()), dtype=torch.int64, device=group.device
                        )
                        self._reserved_words[param] = words

    def _kept_tensors(self) -> list[str]:
        """Names of the slots that this recipe keeps beside each parameter."""
        recipe = self.recipe
        names = ["ema"] * isinstance(recipe.direction, Remembering)
        names += ["orthogonal"] * isinstance(recipe.combine, ReuseOrthogonal)
        return names + ["anticipated"] * isinstance(recipe.probe, Anticipated)

    def _warn_if_lost(self, state_dict: dict[str, Any], tensors: dict[Tensor, Any]) -> None:
        """Say it when a checkpoint of a run that has begun holds nothing of what this recipe keeps."""
        is_under_way = any(group.get("sam_step") for group in state_dict.get("param_groups", ()))
        names = [key_of(name) for name in self._kept_tensors()]
        if names and is_under_way and not tensors:
            warnings.warn(
                f"load_state_dict(): the checkpoint has no {' and no '.join(names)}, which recipe "
                f"'{self.recipe.name}' keeps for each parameter; it begins anew. "
                "StateDictOptions(flatten_optimizer_state_dict=True) loses it: leave it False",
                UserWarning,
                stacklevel=3,
            )

    def _scalars(self) -> dict[str, float]:
        """What stands in the first param group for the numbers that the recipe keeps."""
        names = dict(self.recipe.combine.first_scalars())
        if self.recipe.cadence.needs_norm:
            names |= {"mean": 0.0, "variance": 0.0}
        return {key_of(name): value for name, value in names.items()}

    def _by_number(self, state_dict: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
        """The numbers that a state dict gives to the parameters; the base checks that the groups fit."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            yield from zip(saved["params"], group["params"], strict=False)
