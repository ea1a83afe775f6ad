"""SAM under Lightning's automatic optimization.

Lightning calls ``optimizer.step(closure)``, and with ``accumulate_grad_batches=1`` in fp32 and bf16-mixed
that is all `SAM` needs; it runs unmodified. With accumulation the closure is of the last micro-batch only,
and under 16-mixed there is none; `SAM` refuses either at the first step. `SAMCallback` makes accumulation
right, and refuses the rest when training starts.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ..optimizer import SAM
from . import window

if TYPE_CHECKING:
    SAMCallback: type


class Hooks:
    """What `SAMCallback` does, without Lightning's base class.

    Lightning is distributed under two names with a base class each. `SAMCallback` has that of ``lightning``,
    or of ``pytorch_lightning`` where only that is installed. Where both are, and you use the latter::

        class MyCallback(sam_kernels.trainers.lightning.Hooks, pytorch_lightning.Callback): ...

    A step takes as many gradients as the recipe evaluates, each of all micro-batches: Lightning computes the
    first as it always does, and the callback evaluates the micro-batches again at the perturbed weights.
    Their batches stay in memory until the step is done; a batch that ``training_step`` changes in place is
    not what it was then. With ``rng="replay"`` the first gradient is evaluated again too. Under DDP all
    gradients are averaged over the ranks, which share one perturbation.

    What ``training_step`` logs is of the first gradient; ``self.log`` does nothing in the others, which run
    at weights that nobody will use. Metrics it updates by itself see every pass.

    Raises:
        RuntimeError: when fitting starts, for a gradient scaler (16-mixed), manual optimization, a strategy
            that steps by itself, and a ``training_step`` that takes its batches from an iterator.
        TypeError: when fitting starts, for an optimizer that is not `SAM`.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Any, int]] = []  # of the present accumulation window
        self._first_loss: Any = None
        self._put_back: Callable[[], None] | None = None

    # ---- what Lightning calls ------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        check(trainer, pl_module)
        self._batches = []
        self._take_over(window.find(trainer.optimizers[0], "SAMCallback"), trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches = []
        self._batches.append((batch, batch_idx))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._first_loss is None:
            return
        if isinstance(outputs, dict) and "loss" in outputs:
            outputs["loss"] = self._first_loss  # Lightning has that of the last pass
        self._first_loss = None
        self._batches = []

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._let_go()

    # ---- the step ------------------------------------------------------------------------------

    def _take_over(self, optimizer: SAM, trainer: Any, pl_module: Any) -> None:
        """Let ``optimizer.step`` go through this callback while the fit lasts."""
        self._let_go()
        was_own, original = "step" in optimizer.__dict__, optimizer.step

        @functools.wraps(original)  # schedulers leave a mark on the method, and look for it
        def step(closure: Any = None, **kwargs: Any) -> Any:
            if closure is None:
                return original(None, **kwargs)
            whole = self._whole(closure, optimizer, trainer, pl_module)
            self._first_loss = original(whole, **kwargs)
            return self._first_loss

        def put_back() -> None:
            if was_own:
                optimizer.step = original  # type: ignore[method-assign]
            else:
                del optimizer.step

        optimizer.step = step  # type: ignore[method-assign, assignment]
        self._put_back = put_back

    def _let_go(self) -> None:
        put_back, self._put_back = self._put_back, None
        self._batches, self._first_loss = [], None
        if put_back is not None:
            put_back()

    def _whole(
        self, closure: Callable[..., Any], optimizer: SAM, trainer: Any, pl_module: Any
    ) -> Callable[..., Any]:
        """The closure of the last micro-batch, made to stand for all of them."""
        others = self._batches[:-1]
        held = window.take_gradients(optimizer) if others else []
        # Random numbers that are to be repeated are those from the first call on.
        can_give = optimizer.rng == "advance"
        calls = 0

        def whole(**kwargs: Any) -> Any:
            nonlocal calls, held
            calls += 1
            if calls == 1 and can_give and not window.is_perturbed(optimizer):
                window.give_gradients(held)  # of the others, at these very weights
                held = []
                return closure(**kwargs)
            held = []
            with silent(pl_module):
                for batch, batch_idx in others:
                    with without_sync(trainer.strategy):
                        backward(trainer, pl_module, optimizer, batch, batch_idx)
            with silent(pl_module) if calls > 1 else nullcontext():
                return closure(**kwargs)

        return whole


def check(trainer: Any, pl_module: Any) -> None:
    """Raise a sentence for settings of the trainer under which a SAM step would not be one.

    Args:
        trainer: Lightning's, with its optimizers set up.
        pl_module: the module it fits.

    Raises:
        RuntimeError: saying which setting, and what to use.
    """
    if not pl_module.automatic_optimization:
        raise RuntimeError(
            "SAMCallback: this module optimizes by hand; call opt.step(closure) in training_step, with a "
            "closure that calls self.manual_backward, and drop the callback"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise RuntimeError(
            f"SAMCallback: precision={trainer.precision!r} scales the loss, and Lightning then calls the "
            "optimizer without a closure, so that a SAM step has no second gradient; use 'bf16-mixed' or "
            "'32-true'"
        )
    if getattr(trainer.strategy, "handles_gradient_accumulation", False):
        raise RuntimeError(
            f"SAMCallback: {type(trainer.strategy).__name__} calls the optimizer by itself, without a "
            "closure; use another strategy, or sam_kernels.trainers.deepspeed outside of Lightning"
        )
    if "dataloader_iter" in parameters(pl_module.training_step):
        raise RuntimeError(
            "SAMCallback: training_step takes its batches from dataloader_iter, and a second gradient of a "
            "batch needs that batch again; let training_step take batch and batch_idx"
        )


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def backward(trainer: Any, pl_module: Any, optimizer: SAM, batch: Any, batch_idx: int) -> None:
    """Add the gradient of one micro-batch, scaled as Lightning scales it."""
    takes_index = len(parameters(pl_module.training_step)) > 1
    output = trainer.strategy.training_step(*((batch, batch_idx) if takes_index else (batch,)))
    loss = output.get("loss") if isinstance(output, dict) else output
    if loss is not None:  # None skips a micro-batch
        trainer.strategy.backward(loss / trainer.accumulate_grad_batches, optimizer)


def without_sync(strategy: Any) -> AbstractContextManager[Any]:
    """Gradients stay on their rank, as of all micro-batches but the last."""
    block = getattr(strategy, "block_backward_sync", None)
    return nullcontext() if block is None else block()


@contextmanager
def silent(pl_module: Any) -> Iterator[None]:
    """``self.log`` does nothing inside the block."""
    before = pl_module.__dict__.get("log")
    pl_module.log = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if before is None:
            del pl_module.log
        else:
            pl_module.log = before


def __getattr__(name: str) -> Any:
    """`SAMCallback` is made when it is first asked for, since its base class is Lightning's."""
    if name != "SAMCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        library = importlib.import_module("lightning.pytorch")
    except ImportError:
        library = importlib.import_module("pytorch_lightning")
    made = type(name, (Hooks, library.Callback), {"__module__": __name__, "__doc__": Hooks.__doc__})
    globals()[name] = made
    return made
