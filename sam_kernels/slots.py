"""Slots: what policies keep from step to step, a tensor beside each parameter or a number for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .sharding import local, wrapped
from .tensor_groups import TensorGroup

_PREFIX = "sam_"

MASTER = "master"
"""The one that is float32 whatever the parameter is; see `sam_kernels.masters`."""

NAMES = ("ema", "orthogonal", "anticipated", MASTER)
"""The tensors there may be, under ``sam_<name>`` in the state of a parameter."""

SCALARS = ("lambda", "previous_norm", "mean", "variance")
"""The numbers there may be, under ``sam_<name>`` in the first param group of a checkpoint."""


def key_of(name: str) -> str:
    """The key of a slot in a checkpoint."""
    return _PREFIX + name


class Slots:
    """Tensors by name and parameter, and numbers by name; in checkpoints, never in `Optimizer.state`.

    Of a parameter that is spread over ranks they are local tensors here, and DTensors in checkpoints.

    Base optimizers take state of any kind for their own, and would not create what they miss in it.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, dict[Tensor, Tensor]] = {}
        self.scalars: dict[str, Any] = {}
        self._reserved: dict[str, dict[Tensor, Tensor]] = {}  # see `reserve`

    # ---- tensors -------------------------------------------------------------------------------

    def lists(self, name: str, group: TensorGroup) -> list[Tensor | None]:
        """Parallel to ``group.params``; None where there is none yet. Re-laid where a parameter was cast."""
        own = self.tensors.get(name)
        if not own:
            return [None] * len(group.params)
        found = [own.get(owner) for owner in group.owners]
        for t, (slot, p) in enumerate(zip(found, group.params, strict=True)):
            if slot is not None and slot.shape != p.shape:
                raise ValueError(
                    f"{_PREFIX}{name} has shape {tuple(slot.shape)} and its parameter {tuple(p.shape)}: the "
                    "parameter has changed its size since; build the optimizer anew"
                )
            if slot is not None and not _fits(name, slot, p):
                found[t] = own[group.owners[t]] = _empty_like(name, p).copy_(slot)
        return found

    def put(self, name: str, group: TensorGroup, tensors: Iterable[Tensor | None]) -> None:
        """Keep the tensors that are there; where there is a None, what was kept before stays."""
        own = self.tensors.setdefault(name, {})
        own.update((p, x) for p, x in zip(group.owners, tensors, strict=True) if x is not None)

    def drop(self, name: str, params: Iterable[Tensor]) -> None:
        """Forget the slot of these parameters."""
        for param in params:
            self.tensors.get(name, {}).pop(param, None)

    # ---- checkpoints ---------------------------------------------------------------------------

    def saved(self, param: Tensor) -> dict[str, Tensor]:
        """The entries of a parameter in a checkpoint."""
        return {
            _PREFIX + name: wrapped(own[param], param)
            for own_of in (self._reserved, self.tensors)
            for name, own in own_of.items()
            if param in own
        }

    def saved_scalars(self) -> dict[str, float]:
        """The entries of the first param group in a checkpoint; the host waits for the device here."""
        return {_PREFIX + name: float(value) for name, value in self.scalars.items()}

    def reserve(self, names: Iterable[str], group: TensorGroup) -> None:
        """Places that only checkpoints show, for `torch.distributed.checkpoint` to load into."""
        for name in names:
            if self.tensors.get(name):
                continue  # a step has made them; what has none is to have none
            own = self._reserved.setdefault(name, {})
            for owner, p in zip(group.owners, group.params, strict=True):
                if owner.requires_grad:
                    own[owner] = torch.zeros_like(p, requires_grad=False)

    def clear_reserved(self) -> None:
        """A step has made what is to be kept, or a checkpoint has brought it."""
        self._reserved = {}

    @staticmethod
    def taken(entry: dict[str, Any], names: tuple[str, ...] = NAMES) -> dict[str, Any]:
        """Remove what is ours from an entry of a checkpoint, and return it by name."""
        return {name: entry.pop(_PREFIX + name) for name in names if _PREFIX + name in entry}

    @staticmethod
    def drop_blank(tensors: dict[Tensor, dict[str, Tensor]]) -> None:
        """Remove slots that are 0 in all parameters: places that were reserved, and never loaded into."""
        for name in set(NAMES) - {MASTER}:
            own = [local(entry[name]) for entry in tensors.values() if name in entry]
            if not any(bool(x.any()) for x in own if isinstance(x, Tensor)):
                for entry in tensors.values():
                    entry.pop(name, None)
        for param in [p for p, entry in tensors.items() if not entry]:
            del tensors[param]

    def load(self, tensors: Mapping[Tensor, Mapping[str, Tensor]], scalars: Mapping[str, float]) -> None:
        """Take the place of everything that is kept."""
        self.tensors = {}
        self.clear_reserved()
        for param, own in tensors.items():
            for name, tensor in own.items():
                kept = _empty_like(name, param).copy_(tensor)
                self.tensors.setdefault(name, {})[param] = local(kept)
        self.scalars = dict(scalars)

    @staticmethod
    def check(tensors: Mapping[Tensor, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> None:
        """Raise a sentence unless each tensor has the shape of its parameter, and each scalar is a number.

        Raises:
            ValueError: if one has not, or is none.
        """
        for name, value in scalars.items():
            if not isinstance(value, int | float):
                raise ValueError(f"{_PREFIX}{name} is {value!r}; expected a number")
        for param, own in tensors.items():
            for name, tensor in own.items():
                if not isinstance(tensor, Tensor) or tensor.shape != param.shape:
                    found = tuple(tensor.shape) if isinstance(tensor, Tensor) else repr(tensor)
                    raise ValueError(
                        f"{_PREFIX}{name} of a parameter is {found}; expected a tensor {tuple(param.shape)}. "
                        "The state that was loaded belongs to another model"
                    )


def _dtype(name: str, param: Tensor) -> torch.dtype:
    return torch.float32 if name == MASTER else param.dtype


def _fits(name: str, slot: Tensor, param: Tensor) -> bool:
    return (slot.dtype, slot.device, slot.stride()) == (_dtype(name, param), param.device, param.stride())


def _empty_like(name: str, param: Tensor) -> Tensor:
    return torch.empty_like(param, dtype=_dtype(name, param), requires_grad=False)
