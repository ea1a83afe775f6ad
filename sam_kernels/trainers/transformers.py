"""SAM under the Trainer of Hugging Face transformers.

That Trainer calls ``optimizer.step()`` without a closure, after all backwards of the step. `SAMTrainerMixin`
takes the gradient at the perturbed weights where the last of them has run.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ..optimizer import SAM
from ..running_stats import frozen
from . import window


class SAMTrainerMixin:
    """For a subclass of ``transformers.Trainer``; name it before that class.

    The last micro-batch of a step is followed by the ascent and by all micro-batches of the step again, at
    the perturbed weights and with the Trainer's own normalization of losses; the Trainer then clips the
    second gradient and calls ``optimizer.step()``. The batches stay in memory until the step is done. Losses
    that the Trainer logs are of the first gradient, the norm it logs is of the second. Under DDP both
    gradients are averaged over the ranks, which share one perturbation.

    Args:
        *args: for the Trainer.
        sam: keywords for `SAM.wrap`, such as rho, recipe and adaptive, around the optimizer that the Trainer
            makes or that is in ``optimizers=``; it gets ``model=`` too. Default: plain SAM. An optimizer in
            ``optimizers=`` that is a `SAM` already is used as it is.
        **kwargs: for the Trainer.

    Raises:
        RuntimeError: when training starts, for fp16, DeepSpeed, and recipes of more than two gradients.
        TypeError: when training starts, for a SAM of `sam_kernels.compat`.

    Example, runnable with transformers and accelerate in examples/trainers/transformers_text.py::

        class SAMTrainer(SAMTrainerMixin, transformers.Trainer):
            pass

        SAMTrainer(model, args, train_dataset=data, sam={"recipe": "asam", "rho": 0.5}).train()
    """

    def __init__(self, *args: Any, sam: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._sam_options = dict(sam or {})
        self._batches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []  # of the present step
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimizer, with SAM around it."""
        made = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(made, SAM):
            model = self.model if not args or args[0] is None else args[0]  # type: ignore[attr-defined]
            made = SAM.wrap(made, **{"model": model, **self._sam_options})
        self.optimizer = made
        return made

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer."""
        self._batches = []  # of a training that was interrupted
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The first gradient of a micro-batch; after the last of a step, the ascent and the second gradient.

        Args:
            model: the model as the Trainer has wrapped it.
            inputs: one micro-batch.
            *args: what else the Trainer hands over; likewise keywords.

        Returns:
            The loss at the weights the step began with.
        """
        if not self._batches:
            self._begin()
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._batches.append((inputs, args, kwargs))
        accelerator = self.accelerator  # type: ignore[attr-defined]
        if accelerator.sync_gradients:
            batches, self._batches = self._batches, []
            self._ascend(model, batches)
        return loss

    def _ascend(self, model: Any, batches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        """Leave perturbed weights and the gradient there, for the Trainer's ``optimizer.step()``."""
        opt = window.find(self.optimizer, "SAMTrainerMixin")
        # Where the ascent may be left out, the gradients there are have to stay.
        may_stay = not opt.is_due or opt.recipe.cadence.needs_norm
        opt.first_step(zero_grad=not may_stay)
        if not window.is_perturbed(opt):
            return
        try:
            if may_stay:
                opt.zero_grad()
            with nullcontext() if opt.model is None else frozen(opt.model):
                for number, (inputs, args, kwargs) in enumerate(batches):
                    is_last = number == len(batches) - 1
                    accelerator = self.accelerator  # type: ignore[attr-defined]
                    with nullcontext() if is_last else accelerator.no_sync(model=model):
                        super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        except BaseException:
            opt._abandon()  # no perturbed weights stay behind
            raise

    def _begin(self) -> None:
        """Before the first micro-batch of a step: raise a sentence where it would not be one of SAM."""
        accelerator = self.accelerator  # type: ignore[attr-defined]
        if accelerator.scaler is not None:
            raise RuntimeError(
                "SAMTrainerMixin: fp16=True scales the loss, and this version has not been tested with a "
                "gradient scaler there; use bf16=True, or neither"
            )
        if getattr(self, "is_deepspeed_enabled", False):
            raise RuntimeError(
                "SAMTrainerMixin: DeepSpeed's engine steps by itself, with weights of its own; see "
                "sam_kernels.trainers.deepspeed, which goes with a loop of yours"
            )
        opt = window.find(self.optimizer, "SAMTrainerMixin")
        if opt.rng == "replay":
            with opt.first_pass():
                pass  # the random numbers to repeat are those from here on
