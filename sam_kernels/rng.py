"""Random numbers in the passes of a step: fresh ones in each, or those of the first pass again.

With fresh dropout masks the second pass differs from the first by its masks too, and not by the perturbation
alone: the loss may well fall where the weights ascend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .policies import Anticipated
from .recipe import Recipe
from .tensor_groups import is_capturing

CHOICES = ("advance", "replay")

State = list[tuple[torch.device, Tensor]]
"""The states of torch's default generators, by device."""


def check_rng(rng: Any, recipe: Recipe) -> str:
    """The choice as it is; a sentence where it is none, or the recipe's passes are of different batches."""
    if rng not in CHOICES:
        raise ValueError(f"SAM: rng is {rng!r}; expected 'advance' or 'replay'")
    if rng == "replay" and isinstance(recipe.probe, Anticipated):
        raise ValueError(
            f"SAM: rng='replay' repeats the random numbers of the first pass, and the passes of recipe "
            f"'{recipe.name}' are of different batches; expected rng='advance'"
        )
    return str(rng)


def get_state(devices: Iterable[torch.device]) -> State:
    """The state of the CPU's generator and of those of the devices that have one.

    Raises:
        RuntimeError: while a CUDA graph is captured, which would not record it.

    Example:
        >>> state = get_state([])
        >>> a = torch.rand(2)
        >>> set_state(state)
        >>> torch.equal(a, torch.rand(2))
        True
    """
    found = [(torch.device("cpu"), torch.get_rng_state())]
    for device in dict.fromkeys(devices):
        if device.type in ("cpu", "meta"):
            continue
        if is_capturing(device):
            raise RuntimeError(
                "rng='replay' sets the state of random number generators from the host, which a CUDA graph "
                "does not record; use rng='advance' in a step that is captured"
            )
        module = torch.get_device_module(device)
        if hasattr(module, "get_rng_state"):
            found.append((device, module.get_rng_state(device)))
    return found


def set_state(state: State) -> None:
    """What `get_state` has returned is in force again."""
    for device, own in state:
        if device.type == "cpu":
            torch.set_rng_state(own)
        else:
            torch.get_device_module(device).set_rng_state(own, device)


class Replay:
    """The random numbers of a step whose passes have the same: those of the first, then the first's again.

    Nothing is drawn between passes but by them, so each leaves the generators as the first pass did.
    """

    def __init__(self) -> None:
        self._start: State | None = None  # before the first pass of this step
        self._after: State | None = None  # where to go on from when the pass that repeats it is over

    @property
    def has_first(self) -> bool:
        """Whether the state before the first pass of this step is known."""
        return self._start is not None

    def note(self, devices: Iterable[torch.device]) -> None:
        """The first pass is about to begin."""
        self._start = get_state(devices)

    def begin(self) -> None:
        """From here on the random numbers are those of the first pass."""
        if self._start is not None and self._after is None:
            self._after = get_state(device for device, _ in self._start)
            set_state(self._start)

    def end(self) -> None:
        """From here on they are those after the first pass."""
        if self._after is not None:
            after, self._after = self._after, None
            set_state(after)

    def forget(self) -> None:
        """The step is over."""
        self.end()
        self._start = None

    @contextmanager
    def around(self, probe: int, devices: Iterable[torch.device]) -> Iterator[None]:
        """Around pass number `probe` of a step, counted from 0."""
        if probe == 0:
            self.note(devices)
            yield
            return
        self.begin()
        try:
            yield
        finally:
            self.end()
