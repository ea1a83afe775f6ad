"""SAM around a DeepSpeed engine with ZeRO-1 or ZeRO-2.

The engine gives its optimizer flat fp32 parts of the weights and takes no closure: an optimizer that perturbs
in ``step`` would never move the weights that the model computes with. `Driver` works from outside. The
engine's own copy of the weights is never perturbed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optimizer import SAM
from ..policies import TopScores
from ..recipe import Recipe
from ..running_stats import frozen
from . import window


class NoUpdate(Optimizer):
    """The base optimizer of a SAM whose updates are the engine's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Leave the weights as they are."""


class Driver:
    """The steps of an engine, with the gradient at ``w + e``.

    A step is: backward; the whole gradient, averaged over the ranks; ``w + e``; backward there; weights back,
    bit for bit; ``engine.step()``. All ranks share one perturbation. The whole gradient takes a collective
    and 4 bytes per weight for every tensor, and the snapshot another 4, on every rank: what ZeRO saves on
    states it keeps saving, but this is no way to train what does not fit otherwise.

    Args:
        engine: what ``deepspeed.initialize`` returned, with fp32 weights, ZeRO stage 0, 1 or 2, no
            offloading and ``gradient_accumulation_steps`` 1.
        recipe: one that perturbs along the gradient and hands on the second one as it is, such as "sam",
            "asam", "fisher_sam", "layerwise_sam", "nosam", "esam", "ssam_d" or "rst"; default plain SAM.
        rho, adaptive, backend: as for `SAM`.

    Raises:
        ValueError: for a recipe that keeps, mixes or needs more gradients.
        RuntimeError: for settings of the engine under which this has not been tested.

    Example, runnable with deepspeed in examples/trainers/deepspeed_digits.py::

        engine, *_ = deepspeed.initialize(model=model, optimizer=base, config=config)
        driver = Driver(engine, rho=0.05)
        loss = driver.step(lambda: torch.nn.functional.cross_entropy(engine(x), y))
    """

    def __init__(
        self,
        engine: Any,
        recipe: Recipe | str | None = None,
        *,
        rho: float | None = None,
        adaptive: bool = False,
        backend: str = "auto",
    ) -> None:
        check(engine)
        trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self.engine = engine
        self.sam = SAM(trained, NoUpdate, rho, adaptive, recipe=recipe, backend=backend, model=engine.module)
        check_recipe(self.sam.recipe)

    def step(self, loss_fn: Callable[[], Tensor]) -> Tensor:
        """Take one step.

        Args:
            loss_fn: computes the loss through the engine; no backward. It is called twice, but once where
                the first gradient is not finite: the step is then skipped.

        Returns:
            The loss at the weights the step began with, detached.
        """
        loss = loss_fn()
        self.engine.backward(loss)
        is_finite = True
        if self.sam.is_due:
            is_finite = self._ascend(loss_fn)
        else:
            window.restore(self.sam)  # nothing is perturbed; the step counts
        if is_finite:
            self.engine.step()
        else:
            self.engine.optimizer.zero_grad()
        return loss.detach()

    def _ascend(self, loss_fn: Callable[[], Tensor]) -> bool:
        """Leave the engine with the gradient at ``w + e``, and weights as they were.

        Returns:
            Whether the first gradient was finite; if not, the engine is not to step.
        """
        from deepspeed.utils import safe_get_full_grad

        params = [p for group in self.sam.param_groups for p in group["params"]]
        try:
            for p in params:
                grad = safe_get_full_grad(p)
                p.grad = None if grad is None else grad.to(p.dtype)
            self.sam.first_step(zero_grad=True)
            norm = None if self.sam._measure is None else self.sam._measure.norm
            is_finite = norm is None or bool(torch.isfinite(norm))
            if is_finite and window.is_perturbed(self.sam):
                self.engine.optimizer.zero_grad()
                with frozen(self.engine.module), torch.enable_grad():
                    self.engine.backward(loss_fn())
        except BaseException:
            self.sam._abandon()
            raise
        window.restore(self.sam)
        return is_finite


def check(engine: Any) -> None:
    """Raise a sentence unless the engine is one that `Driver` has been tested with.

    Args:
        engine: what ``deepspeed.initialize`` returned.

    Raises:
        RuntimeError: saying which setting, and what to use.
    """
    stage = engine.zero_optimization_stage()
    if stage > 2:
        raise RuntimeError(
            f"deepspeed.Driver: ZeRO stage {stage} has only parts of the weights on a rank, and writing to "
            "them does not reach the next forward; use stage 1 or 2, or FSDP2 with sam_kernels.SAM"
        )
    dtypes = {p.dtype for p in engine.module.parameters() if p.requires_grad}
    if engine.fp16_enabled() or engine.bfloat16_enabled() or dtypes - {torch.float32}:
        raise RuntimeError(
            "deepspeed.Driver: the engine's weights are fp16 or bf16, where most of a perturbation is "
            "rounded away, and this has not been tested; leave 'fp16' and 'bf16' out of the configuration"
        )
    autocasts = getattr(engine, "torch_autocast_enabled", None)
    if autocasts is not None and autocasts():
        raise RuntimeError(
            "deepspeed.Driver: this has not been tested with DeepSpeed's torch_autocast; leave it out of "
            "the configuration"
        )
    if _offloads(engine.zero_offload_optimizer()) or _offloads(engine.zero_offload_param()):
        raise RuntimeError(
            "deepspeed.Driver: this has not been tested with offloading; leave 'offload_optimizer' and "
            "'offload_param' out of the configuration"
        )
    if engine.gradient_accumulation_steps() != 1:
        raise RuntimeError(
            f"deepspeed.Driver: gradient_accumulation_steps is {engine.gradient_accumulation_steps()}, and "
            "the second gradient would be of the last micro-batch only; use 1 and larger batches"
        )


def _offloads(config: Any) -> bool:
    return config is not None and str(getattr(config, "device", "none")).rpartition(".")[2] != "none"


def check_recipe(recipe: Recipe) -> None:
    """Raise a sentence unless a recipe's second gradient goes to the base optimizer as it is."""
    why = None
    if recipe.probe.needs_closure:
        why = f"evaluates {recipe.gradients} gradients in a step"
    elif not recipe.direction.needs_gradient:
        why = "does not perturb along the gradient"
    elif recipe.combine.gradients > 1:
        why = "gives the base optimizer more than the second gradient"
    elif recipe.decay == "inside":
        why = "adds the weight decay to its gradients"
    elif isinstance(recipe.mask, TopScores):
        why = "selects its masks from gradients of single samples"
    if why is not None:
        raise ValueError(
            f"deepspeed.Driver: recipe '{recipe.name}' {why}, and the gradients are the engine's; use "
            "'sam', 'asam' or another that only moves the point where the gradient is evaluated"
        )
