"""SAM as users of the package pytorch_optimizer (PyPI: pytorch-optimizer) know it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..perturbation import Served
from ..recipe import check_rho
from ..recipes import sam
from . import davda54

try:
    from pytorch_optimizer.base.exception import NoClosureError
except ImportError:

    class NoClosureError(RuntimeError):  # type: ignore[no-redef]
        """``step()`` had neither a closure nor a pending `first_step`."""

        def __init__(self, optimizer_name: str, note: str = "") -> None:
            super().__init__(f"{optimizer_name} requires closure.{note}")


class SAM(davda54.SAM):
    """`sam_kernels.SAM` with the arguments, the closure rule and the errors of pytorch_optimizer.SAM.

    Backward first, then ``step(closure)``, which calls the closure once, at the perturbed weights:
    ``e = rho T^2 c / (||T g|| + perturb_eps)``, ``T = |w|`` in param groups with ``adaptive=True``;
    ``c = g``, and with use_gc ``c = g - mean(g)`` over all dimensions but the first of every gradient
    that has two or more. As in that package the norm is of ``g``, so ``||T^-1 e||`` stays below rho.

    Args:
        params: parameters, or dicts of param groups; a group may set "rho" and "adaptive".
        base_optimizer: an optimizer class.
        rho: radius.
        adaptive: the elementwise form.
        use_gc: centralize the first gradients, in place, before they perturb.
        perturb_eps: added to the norm.
        foreach: goes to the base optimizer where that knows it; the perturbation is fused either way.
        backend: as in `sam_kernels.SAM`.
        model, num_data: not used; arguments of the other classes of that package's family.
        **kwargs: for the base optimizer's class.

    Raises:
        ValueError: for a negative rho or perturb_eps.

    Example:
        >>> import torch
        >>> from sam_kernels.compat.pytorch_optimizer import SAM
        >>> layer = torch.nn.Linear(4, 2)
        >>> opt = SAM(layer.parameters(), torch.optim.AdamW, use_gc=True, lr=1e-3)
        >>> def closure():
        ...     loss = layer(torch.ones(3, 4)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = closure()
        >>> opt.step(closure)
        >>> str(opt)
        'SAM'

    Source: pytorch_optimizer 4.1.0, ``optimizer/sam.py``. We differ where `compat.davda54` differs;
    sums are float64 there float32; foreach is no error for a base optimizer without it.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        use_gc: bool = False,
        perturb_eps: float = 1e-12,
        foreach: bool | None = None,
        *,
        backend: str = "auto",
        model: Any = None,
        num_data: int = 1,
        **kwargs: Any,
    ) -> None:
        check_rho(rho, "SAM")
        if foreach is not None and _takes_foreach(base_optimizer):
            kwargs["foreach"] = foreach
        self.use_gc = use_gc
        self.perturb_eps = perturb_eps
        recipe = replace(sam(), eps=perturb_eps)
        super().__init__(params, base_optimizer, rho, adaptive, backend=backend, recipe=recipe, **kwargs)

    def __str__(self) -> str:
        return "SAM"

    def init_group(self, group: dict[str, Any], **kwargs: Any) -> None:
        """Give a param group its step count, as that package's base class asks; nothing here reads it."""
        group.setdefault("step", 0)

    def _no_closure(self) -> Exception:
        return NoClosureError(str(self))

    def _prepare_gradients(self, served: Served) -> None:
        if self.use_gc:
            for group, _ in served:
                _centralize_(group.grads)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of `sam_kernels`, of the base optimizer, or one written by that package.

        Some of its releases keep the base optimizer's part under the key "base_optimizer", others do
        not; either loads.

        Args:
            state_dict: what `state_dict` returned, here or there.
        """
        inner = state_dict.get("base_optimizer")
        if inner is not None:
            outer_groups = state_dict.get("param_groups", inner["param_groups"])
            groups = [
                {**outer, **own} for outer, own in zip(outer_groups, inner["param_groups"], strict=True)
            ]
            state_dict = {"state": inner["state"], "param_groups": groups}
        super().load_state_dict(state_dict)


def _centralize_(grads: list[Tensor | None]) -> None:
    """``g - mean(g)`` over all dimensions but the first, where there are others."""
    for grad in grads:
        if grad is not None and grad.ndim > 1 and grad.numel() > 0:
            grad.sub_(grad.mean(dim=tuple(range(1, grad.ndim)), keepdim=True))


def _takes_foreach(base_optimizer: Callable[..., Optimizer]) -> bool:
    try:
        taken = inspect.signature(base_optimizer).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(item.name == "foreach" or item.kind is item.VAR_KEYWORD for item in taken)
