"""SAM as users of the class in the repository davda54/sam know it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from .. import optimizer
from ..recipe import check_rho

_WEIGHT_COPIES = ("old_p", "e_w")


class NegativeRho(ValueError, AssertionError):
    """The radius is negative or no number.

    That class asserts, so code around it catches AssertionError; the rest of `sam_kernels` raises
    ValueError. This is both.
    """


class NoClosure(RuntimeError, AssertionError):
    """``step()`` had neither a closure nor a pending `first_step`; an AssertionError over there."""


class NoGradient(RuntimeError):
    """``step(closure)`` was called without a backward pass before it."""


class SAM(optimizer.SAM):
    """`sam_kernels.SAM` with the closure rule of davda54/sam: backward first, then ``step(closure)``.

    ``e = rho T^2 g / (||T g|| + 1e-12)`` with the gradients the caller has computed, ``T = |w|`` in
    param groups with ``adaptive=True``; gradients cleared; closure called once, under grad mode; base
    step from the restored weights. ``first_step`` and ``second_step`` are the same in two calls.

    Args:
        params: parameters, or dicts of param groups; a group may set "rho" and "adaptive".
        base_optimizer: an optimizer class, torch's or your own.
        rho: radius.
        adaptive: the elementwise form.
        backend: as in `sam_kernels.SAM`.
        **kwargs: for the base optimizer's class.

    Raises:
        NegativeRho: for a negative rho; a ValueError and an AssertionError.
        NoGradient: by ``step(closure)`` without a backward before it.

    Example:
        >>> import torch
        >>> from sam_kernels.compat.davda54 import SAM
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
        >>> def closure():
        ...     loss = (w**2).sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> loss = closure()
        >>> opt.step(closure)
        >>> w.data
        tensor([2.6700, 3.5600])

    Source: davda54/sam, ``sam.py``. We differ on purpose: weights return in place and stay where they
    are in memory; the set that was perturbed is the set that is restored, whatever has a gradient in
    the second pass; an exception in the closure restores the weights; a gradient that is not finite
    skips the step; ``state_dict`` holds the base optimizer's state and no copy of the weights.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        try:
            check_rho(rho, "SAM")
        except ValueError as error:
            raise NegativeRho(*error.args) from None
        super().__init__(params, base_optimizer, rho=rho, adaptive=adaptive, backend=backend, **kwargs)

    def _evaluate(self, closure: Callable[..., Any], probe: int) -> Any:
        if probe > 0:
            return super()._evaluate(closure, probe)
        if not self._has_gradients():
            raise NoGradient(
                "SAM.step(closure): no parameter has a gradient. The closure is called once, at the "
                "perturbed weights and after your own backward: call loss.backward() before step(closure), "
                "and zero_grad() after it"
            )
        return None  # the gradients of the first pass are the caller's, and so is their loss

    def _run_probes(self, closures: Sequence[Callable[..., Any]]) -> list[Any]:
        if len(closures) != 1:
            raise TypeError("SAM.step(): expected one closure; lists of closures go with sam_kernels.SAM")
        return super()._run_probes(closures)

    def _plain_step(self) -> None:
        if not self.allow_plain_step and any(group.get("lr") != 0 for group in self.param_groups):
            raise self._no_closure()
        super()._plain_step()  # at lr 0, torch's distributed checkpoint is asking for the state to exist

    def _no_closure(self) -> Exception:
        return NoClosure(
            "SAM.step() needs a closure that recomputes the loss and calls backward; call loss.backward() "
            "before step(closure), or use first_step() and second_step()"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of `sam_kernels`, of the base optimizer, or one written by the original class.

        The original saves a copy of the weights (``old_p``) and nothing of the base optimizer. The copy
        is dropped, with a warning when that leaves no state at all.

        Args:
            state_dict: what `state_dict` returned, here or there.
        """
        state, dropped = _without_copies(state_dict["state"])
        if dropped and not state:
            warnings.warn(
                "this checkpoint holds copies of the weights (old_p) and no state of the base optimizer, "
                "which its writer did not save; momentum and moments start afresh",
                UserWarning,
                stacklevel=2,
            )
        super().load_state_dict({**state_dict, "state": state} if dropped else state_dict)


def _without_copies(state: dict[Any, Any]) -> tuple[dict[Any, Any], bool]:
    """The state without entries that are weights, and whether there were any."""
    kept, dropped = {}, False
    for key, entry in state.items():
        slots = {name: slot for name, slot in entry.items() if name not in _WEIGHT_COPIES}
        dropped = dropped or len(slots) < len(entry)
        if slots:
            kept[key] = slots
    return (kept, True) if dropped else (state, False)
