"""The half of SAM that has to do with checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .masks import Masks
from .perturbation import Measure
from .slots import SCALARS, Slots


class Checkpoints(Optimizer):
    """Base of `SAM`: the base optimizer's state and what policies keep, in torch's own layout."""

    base_optimizer: Optimizer
    _masks: Masks
    _slots: Slots
    _measure: Measure | None
    _given: set[Tensor]
    _own_rho: set[int]
    _rho_key: str
    _adaptive_key: str
    _require_idle: Callable[[str], None]
    _check_ours: Callable[[Any, str], None]
    _adopt_group: Callable[[int], None]
    _retire_groups: Callable[[], None]
    _with_masks: Callable[[dict[str, Any]], dict[str, Any]]
    _without_masks: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[Tensor, Tensor]]]
    _by_number: Callable[[dict[str, Any]], Iterator[tuple[int, Tensor]]]

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and ours, in torch's own layout; never snapshots.

        A `torch.optim` optimizer of the base's class loads it, and the other way round.

        Raises:
            RuntimeError: while weights are perturbed.
        """
        self._require_idle("state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self._with_slots(self._with_masks(self.base_optimizer.state_dict()))
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
        state_dict, words = self._without_masks(state_dict)
        state_dict, tensors, scalars = self._without_slots(state_dict)
        self._masks.check(words)
        Slots.check(tensors, scalars)
        self.base_optimizer.load_state_dict(state_dict)
        self._masks.load(words)
        self._slots.load(tensors, scalars)
        self._given = set(words)
        for index, (group, ours) in enumerate(zip(self.param_groups, kept, strict=True)):
            for key, value in ours.items():
                group.setdefault(key, value)
            self._adopt_group(index)
        self._own_rho = own_rho  # a loaded value is no wish of the user's to leave the schedule
        self._retire_groups()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _with_slots(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What policies keep, beside the base optimizer's state and in the first param group."""
        entries, groups = dict(state_dict["state"]), list(state_dict["param_groups"])
        for number, param in self._by_number(state_dict):
            own = self._slots.saved(param)
            if own:
                entries[number] = {**entries.get(number, {}), **own}
        groups[0] = {**groups[0], **self._slots.saved_scalars()}
        return {**state_dict, "state": entries, "param_groups": groups}

    def _without_slots(
        self, state_dict: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[Tensor, dict[str, Tensor]], dict[str, float]]:
        """What the base optimizer may load, and what is ours."""
        if not {"state", "param_groups"} <= state_dict.keys() or not state_dict["param_groups"]:
            return state_dict, {}, {}
        entries, groups, tensors = dict(state_dict["state"]), list(state_dict["param_groups"]), {}
        for number, param in self._by_number(state_dict):
            entry = dict(entries.get(number, {}))
            own = Slots.taken(entry)
            if own:
                tensors[param] = own
                entries[number] = entry
                if not entry:
                    del entries[number]
        first = dict(groups[0])
        scalars = Slots.taken(first, SCALARS)
        groups[0] = first
        return {**state_dict, "state": entries, "param_groups": groups}, tensors, scalars
