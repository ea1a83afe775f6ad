"""The loss as a function of the weights, over data that stays the same, and a model that stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..interrupts import deferred
from .checks import check_count

Forward = Callable[[nn.Module, Any], Sequence[Any]]


def pairs(model: nn.Module, batch: Any) -> tuple[Any, ...]:
    """``(model(inputs), targets)`` of a batch ``(inputs, targets)``: what loss_fn takes."""
    return model(batch[0]), batch[1]


def _check_pair(batch: Any) -> None:
    if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
        raise TypeError(
            f"sharpness: a batch is {type(batch).__name__}{size}; expected a pair (inputs, targets). For "
            "others give forward=, a function of (model, batch) that returns the arguments of loss_fn, e.g. "
            "lambda model, batch: (model(**batch).logits, batch['labels'])"
        )


class Objective:
    """``L(w) = sum_b n_b loss_b(w) / sum_b n_b``, the mean loss over batches of n_b samples.

    Every measure of this package is of such a function. The batches are taken once, so a loader that
    shuffles or augments is the same data at all weights; losses are added up in float64, in their order.
    Evaluate it inside `held`, which gives the model back as it was.

    Args:
        model: the module; those of its parameters that require gradients are w.
        loss_fn: ``loss_fn(model(inputs), targets)`` returns the mean loss of a batch, a scalar tensor, as
            torch's loss functions do.
        batches: pairs (inputs, targets), of any device; each is moved to that of the parameters when used.
        forward: for other batches, a function of (model, batch) that returns the arguments of loss_fn.
        samples: take batches until there are so many samples, cutting the last (default: all).

    Attributes:
        params: the parameters that are w, in the order of ``model.parameters()``.
        names: what the model calls them.
        sizes: samples of each batch.

    Raises:
        TypeError: if model is no module, loss_fn no function, or a batch no pair and there is no forward.
        ValueError: without batches, without parameters, or if loss_fn returns no scalar.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.ones(3, 2), torch.zeros(3, 1)
        >>> objective = Objective(model, nn.functional.mse_loss, [(x, y)])
        >>> with objective.held():
        ...     loss, (gradient,) = objective.gradient()
        >>> gradient.shape, model.weight.grad is None
        (torch.Size([1, 2]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batches: Iterable[Any],
        *,
        forward: Forward | None = None,
        samples: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"sharpness: model is {type(model).__name__}; expected a torch.nn.Module")
        if not callable(loss_fn):
            raise TypeError(
                f"sharpness: loss_fn is {loss_fn!r}; expected a function of (model(inputs), targets)"
            )
        if isinstance(batches, Tensor):
            raise TypeError("sharpness: batches is a tensor; expected a loader, or a list of batches")
        if samples is not None:
            check_count("samples", samples)
        self.model, self.loss_fn, self.forward = model, loss_fn, forward or pairs
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.params = [name for name, _ in named], [p for _, p in named]
        if not self.params:
            raise ValueError("sharpness: no parameter of the model requires a gradient, so there is no w")
        with _undrawn(batches, {p.device for p in self.params}):
            self.batches, self.sizes = _taken(batches, samples)
        if not self.batches:
            raise ValueError("sharpness: the loader has no batches; expected at least one")
        if forward is None:
            for batch in self.batches:
                _check_pair(batch)

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(self.sizes)

    def groups(self, m: int | None) -> list[Objective]:
        """The same samples in groups of m, the last may be smaller; one group of all for None."""
        if m is None:
            return [self]
        if isinstance(m, bool) or not isinstance(m, Integral) or m < 1:
            raise ValueError(f"sharpness: m is {m!r}; expected a whole number of samples, or None for all")
        pieces: list[list[Any]] = [[]]
        filled = 0
        for batch, size in zip(self.batches, self.sizes, strict=True):
            start = 0
            while start < size:
                if filled == m:
                    pieces.append([])
                    filled = 0
                stop = min(size, start + m - filled)
                pieces[-1].append(batch if (start, stop) == (0, size) else cut(batch, start, stop, size))
                filled += stop - start
                start = stop
        return [self.on(batches) for batches in pieces]

    def on(self, batches: Iterable[Any]) -> Objective:
        """The same loss over other batches."""
        return Objective(self.model, self.loss_fn, batches, forward=self.forward)

    @contextmanager
    def held(self) -> Iterator[list[Tensor]]:
        """Evaluation mode inside; at the end the model is what it was, bit for bit, also after a ctrl-C.

        That is: parameters, buffers, gradients, the training flag of every module, and the states of
        torch's random generators. Casts that autocast has kept of weights are dropped. Weights may be moved
        inside. Costs a copy of parameters and buffers; the copies of `params` are given, to move from and
        come back to, and never to be changed.

        Raises:
            RuntimeError: inside ``torch.inference_mode()``.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "sharpness: inside torch.inference_mode() there are no gradients, and weights that moved "
                "could not be put back; leave it for the measurement"
            )
        params = {id(p): p for p in self.model.parameters()}
        kept = {key: p.detach().clone() for key, p in params.items()}
        buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
        ]
        grads = [(p, p.grad) for p in params.values()]
        flags = [(module, module.training) for module in self.model.modules()]
        state = rng.get_state({p.device for p in params.values()})
        try:
            counts = [p._version for p in self.params]
            self.model.eval()
            yield [
                kept[id(p)] if p._version == count else p.detach().clone()  # adapters are merged there, say
                for p, count in zip(self.params, counts, strict=True)
            ]
        finally:
            # A second ctrl-C waits, and what cannot be put back keeps nothing else from it.
            with deferred(), torch.no_grad(), ExitStack() as last:
                last.callback(rng.set_state, state)
                last.callback(torch.clear_autocast_cache)  # casts of weights that were elsewhere
                for p, grad in grads:
                    last.callback(setattr, p, "grad", grad)
                for key, p in params.items():
                    last.callback(p.copy_, kept[key])
                for place in buffers:
                    last.callback(_put_back, *place)
                last.callback(_set_flags, flags)  # first: a module may move its weights when its mode changes

    def loss(self) -> float:
        """L at the present weights; call it inside `held`."""
        with torch.no_grad():
            found = [self._evaluate(batch).double() * n for batch, n in self._sized()]
        return float(torch.stack(found).sum() / self.count)

    def gradient(self) -> tuple[float, list[Tensor]]:
        """L and its gradient, a tensor for each of `params` and zeros where w does not matter."""
        total = 0.0
        sums = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        for batch, n in self._sized():
            with torch.enable_grad():
                loss = self._evaluate(batch)
                grads = torch.autograd.grad(loss, self.params, allow_unused=True)
            total += float(loss.detach().double()) * n
            for s, g in zip(sums, grads, strict=True):
                if g is not None:
                    s.add_(g, alpha=n / self.count)
        return total / self.count, sums

    def _sized(self) -> Iterator[tuple[Any, int]]:
        return zip(self.batches, self.sizes, strict=True)

    def _evaluate(self, batch: Any) -> Tensor:
        """The mean loss of a batch, with a graph where grad mode is on."""
        torch.clear_autocast_cache()  # casts of weights that have moved since would be used again
        loss = self.loss_fn(*self.forward(self.model, to(batch, self.params[0].device)))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"sharpness: loss_fn returned {found}; expected a scalar tensor, the mean loss of the batch"
            )
        return loss.reshape(())


def _put_back(module: nn.Module, name: str, buffer: Tensor | None, before: Tensor | None) -> None:
    module._buffers[name] = buffer  # a module of your own may have bound a new tensor
    # One that did not change may be of a kind that cannot be written, such as an expanded one.
    if buffer is not None and before is not None and not torch.equal(buffer, before):
        buffer.copy_(before)


def _set_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    """The training flags as they were, by `train` where one changes, for modules that do more then."""
    for module, flag in flags:
        if module.training != flag:
            module.train(flag)
    for module, flag in flags:
        module.training = flag


@contextmanager
def _undrawn(batches: Any, devices: set[torch.device]) -> Iterator[None]:
    """Whatever a loader draws inside, torch's generators and its own are afterwards as they were."""
    owners = (batches, getattr(batches, "sampler", None))
    own = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners)}
    generators = [(g, g.get_state()) for g in own.values() if isinstance(g, torch.Generator)]
    state = rng.get_state(devices)
    try:
        yield
    finally:
        rng.set_state(state)
        for generator, before in generators:
            generator.set_state(before)


def _taken(batches: Iterable[Any], samples: int | None) -> tuple[list[Any], list[int]]:
    taken, sizes = [], []
    left = samples
    for batch in batches:
        size = samples_of(batch)
        if left is not None and size > left:
            batch, size = cut(batch, 0, left, size), left
        if size:
            taken.append(batch)
            sizes.append(size)
        if left is not None:
            left -= size
            if left == 0:
                break
    return taken, sizes


def samples_of(batch: Any) -> int:
    """The first dimension of the first tensor of a batch that has one."""
    for x in tensors_of(batch):
        if x.dim():
            return x.shape[0]
    return 1


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch: itself, or those in its lists, tuples and dicts."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for item in batch.values():
            yield from tensors_of(item)
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from tensors_of(item)


def cut(batch: Any, start: int, stop: int, size: int) -> Any:
    """Samples start to stop of a batch of that size; tensors of another first dimension stay whole."""

    def piece(x: Tensor) -> Tensor:
        return x[start:stop] if x.dim() and x.shape[0] == size else x

    return _mapped(batch, piece)


def to(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    return _mapped(batch, lambda x: x.to(device, non_blocking=True))


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: _mapped(item, change) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_mapped(item, change) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_mapped(item, change) for item in batch)
    return batch
