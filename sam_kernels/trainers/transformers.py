"""SAM under the Trainer of Hugging Face transformers.

That Trainer calls ``optimizer.step()`` without a closure, after all backwards of the step. `SAMTrainerMixin`
takes the gradient at the perturbed weights where the last of them has run.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ..optimizer import SAM
from . import window


class SAMTrainerMixin:
    """For a subclass of ``transformers.Trainer``; name it before that class.

    The last micro-batch of a step is followed by the ascent and by all micro-batches of the step again, at
    the perturbed weights and with the Trainer's own normalization of losses; the Trainer then clips the
    second gradient and calls ``optimizer.step()``. The batches stay in memory until the step is done. Losses
    that the Trainer logs are of the first gradient, the norm it logs is of the second. Under DDP both
    gradients are averaged over the ranks, which share one perturbation. A batch that the model changes in
    place is not what it was when it is evaluated again. Under fp16 a step with a gradient
    that is not finite is skipped, but the learning rate schedule takes it for one. fp16 has been tested with
    a scaler on the CPU, and not on a GPU.

    Args:
        *args: for the Trainer.
        sam: keywords for `SAM.wrap`, such as rho, recipe and adaptive, around the optimizer that the Trainer
            makes or that is in ``optimizers=``; it gets ``model=`` too. Default: plain SAM. An optimizer in
            ``optimizers=`` that is a `SAM` already is used as it is.
        **kwargs: for the Trainer.

    Raises:
        RuntimeError: when training starts, for DeepSpeed and recipes of more than two gradients; under fp16
            for recipes that need more of the first gradient than its direction.
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
        accelerator = self.accelerator  # type: ignore[attr-defined]
        gradient = super().training_step  # type: ignore[misc]

        def again() -> None:
            for number, (inputs, args, kwargs) in enumerate(batches):
                is_last = number == len(batches) - 1
                with nullcontext() if is_last else accelerator.no_sync(model=model):
                    gradient(model, inputs, *args, **kwargs)

        window.ascend(window.find(self.optimizer, "SAMTrainerMixin"), again)

    def _begin(self) -> None:
        """Before the first micro-batch of a step: raise a sentence where it would not be one of SAM."""
        if getattr(self, "is_deepspeed_enabled", False):
            raise RuntimeError(
                "SAMTrainerMixin: DeepSpeed's engine steps by itself, with weights of its own; see "
                "sam_kernels.trainers.deepspeed, which goes with a loop of yours"
            )
        opt = window.find(self.optimizer, "SAMTrainerMixin")
        if opt.rng == "replay":
            with opt.first_pass():
                pass  # the random numbers to repeat are those from here on
