"""On which samples of a batch a step is taken: closures that choose them by their losses.

The optimizer owns no data. It calls its closure once for every gradient of a step, so a closure that is made
anew for each batch knows from its own calls which pass it is in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from .running_stats import frozen

LossFn = Callable[..., Tensor]


class _Closure:
    """The passes of one step over one batch; what differs is in `_choose` and `_seen`."""

    def __init__(self, name: str, loss_fn: LossFn, batch: Any, model: nn.Module | None) -> None:
        if not callable(loss_fn):
            raise TypeError(
                f"{name}: loss_fn is {loss_fn!r}; expected a function of the batch that returns one loss per "
                "sample"
            )
        size = next((x.shape[0] for x in _tensors(batch) if x.dim()), 0)
        if size == 0:
            raise ValueError(
                f"{name}: batch is {type(batch).__name__} without samples; expected a tensor, or a tuple, "
                "list or dict with tensors, whose first dimension counts the samples"
            )
        self.name, self.loss_fn, self.batch, self.model, self.size = name, loss_fn, batch, model, size
        self.passes = 0
        self.kept: Tensor | None = None  # ascending, on the device of the losses; None means all samples

    def __call__(self, **kwargs: Any) -> Tensor:
        """Run a pass: forward and backward of the mean loss over the kept samples; returns that loss."""
        self._choose(kwargs)
        with torch.enable_grad():
            losses = self._losses(self.kept, kwargs)
            loss = losses.mean()
            loss.backward()  # type: ignore[no-untyped-call]
        self._seen(losses.detach())
        self.passes += 1
        return loss.detach()

    def _choose(self, kwargs: dict[str, Any]) -> None:
        """Called before each pass; sets `kept`."""

    def _seen(self, losses: Tensor) -> None:
        """Called after each pass with its losses, one per kept sample."""

    def _losses(self, kept: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        # Where autocast is around the whole step it keeps casts of weights that have moved since.
        torch.clear_autocast_cache()
        count = self.size if kept is None else len(kept)
        losses = self.loss_fn(self.batch if kept is None else _select(self.batch, kept, self.size), **kwargs)
        if not isinstance(losses, Tensor):
            raise TypeError(
                f"{self.name}: loss_fn returned {type(losses).__name__}; expected a tensor of one loss per "
                "sample"
            )
        if losses.dim() == 0:
            raise ValueError(
                f"{self.name}: loss_fn returned a scalar; expected one loss per sample, which torch's loss "
                "functions return with reduction='none'"
            )
        if losses.shape != (count,):
            raise ValueError(
                f"{self.name}: loss_fn returned losses of shape {tuple(losses.shape)}; expected ({count},), "
                "one per sample of the batch it was given. Average what a sample has several of"
            )
        return losses

    @torch.no_grad()
    def _score(self, kwargs: dict[str, Any]) -> Tensor:
        """Losses of all samples at the present weights. Leaves no graph, statistics or random numbers."""
        with ExitStack() as stack:
            if self.model is not None:
                stack.enter_context(frozen(self.model))
            devices = {x.device for x in (*_tensors(self.batch), *_parameters(self.model))}
            stack.enter_context(torch.random.fork_rng([], device_type="cpu"))
            for device in devices - {torch.device("cpu")}:
                stack.enter_context(torch.random.fork_rng([device.index], device_type=device.type))
            return self._losses(None, kwargs)


class _TopLosses(_Closure):
    def __init__(self, count: int | None, reselect: bool, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.count = count
        self.reselect = reselect

    def _choose(self, kwargs: dict[str, Any]) -> None:
        if self.count is not None and (self.passes == 0 or self.reselect):
            self.kept = _largest(self._score(kwargs), self.count)


class _Sharpest(_Closure):
    def __init__(self, keep: float, official_quirks: bool, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.keep = keep
        self.official_quirks = official_quirks
        self.before = torch.empty(0)  # losses of the first pass

    def _choose(self, kwargs: dict[str, Any]) -> None:
        if self.passes != 1 or self.keep >= (0.99 if self.official_quirks else 1):
            return
        rise = self._score(kwargs) - self.before
        if not self.official_quirks:
            self.kept = _largest(rise, max(1, round(self.size * self.keep)))
            return
        count = int(self.size * self.keep)
        if count:
            last = rise.sort(descending=True).values[count - 1]
            self.kept = (rise > last).nonzero().flatten()
        if self.kept is None or not len(self.kept):
            raise ValueError(
                f"sharpest: with official_quirks, keep={self.keep} of a batch of {self.size} leaves none: "
                f"none rises by more than number {count} of those that rise most. Use a larger keep or "
                "batch, or official_quirks=False"
            )

    def _seen(self, losses: Tensor) -> None:
        if self.passes == 0:
            self.before = losses


def top_losses(
    loss_fn: LossFn,
    batch: Any,
    keep: float,
    model: nn.Module | None = None,
    *,
    reselect: bool = False,
) -> _TopLosses:
    """K-SAM: a closure for one step on the K samples of the batch with the largest losses.

    ``l_i = loss_i(w)`` by one forward pass without gradient; ``S`` = the K largest ``l_i``;
    ``g = mean_{i in S} grad l_i(w)`` and ``gs = mean_{i in S} grad l_i(w + e)``. One S serves all passes of
    the step, and the means are over K. Ties go to the lower index, NaN counts as largest, and with K >= B
    nothing is scored: that is plain SAM. A step costs B + 6K forward passes of a sample in place of 6B, where
    a backward costs two.

    The scoring pass runs in the mode the model is in and leaves the random state as it was, so the pass after
    it draws the same numbers; it draws them for K samples, not B, so dropout does not mask a sample alike.

    Args:
        loss_fn: function of a batch, returns the losses of its samples, a tensor [B]. Keywords from
            ``opt.closure_kwargs`` are handed on to it.
        batch: a tensor, or a tuple, list or dict, also nested. B is the first dimension of its first tensor
            that has one; tensors with first dimension B are indexed, all else goes through as it is.
        keep: K, a whole number of at least 1, or a fraction in (0, 1] of the batch, rounded up; 1 is one
            sample and 1.0 all of them. The paper's values are not known to us; the cost it reports fits a
            third to a half of the batch.
        model: its normalization statistics are frozen while scoring; the optimizer, given it too, does so
            in the second pass.
        reselect: choose again at w + e (default False, which is what the paper's cost fits).

    Returns:
        A closure for ``opt.step``, good for one step: make one for each batch. It returns the mean loss over
        S, without a graph; ``closure.kept`` holds the indices, None for all.

    Raises:
        ValueError: if keep is out of range or the batch has no samples; when called, if loss_fn does not
            return one loss per sample.
        TypeError: if loss_fn is no function, or returns no tensor.

    Example:
        >>> import torch
        >>> from sam_kernels import SAM, sampling
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> def losses(batch):
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1], reduction="none").flatten()
        >>> batch = torch.ones(4, 1), torch.tensor([[10.0], [30.0], [20.0], [40.0]])
        >>> closure = sampling.top_losses(losses, batch, keep=0.5)
        >>> loss = opt.step(closure)
        >>> closure.kept
        tensor([1, 3])

    Source: Ni et al., "K-SAM: Sharpness-Aware Minimization at the Speed of SGD", 2022, arXiv 2210.12864, by
    its abstract; there is no published code.
    """
    is_count = _is_whole(keep)
    if not (keep >= 1 if is_count else _is_fraction(keep)):
        raise ValueError(
            f"top_losses: keep is {keep!r}; expected a whole number of samples of at least 1, or a fraction "
            "of the batch in (0, 1]"
        )
    closure = _TopLosses(None, reselect, "top_losses", loss_fn, batch, model)
    # In floating point 0.07 * 100 is a little more than 7, and must not become 8.
    count = int(keep) if is_count else max(1, math.ceil(round(float(keep) * closure.size, 6)))
    closure.count = count if count < closure.size else None
    return closure


def sharpest(
    loss_fn: LossFn,
    batch: Any,
    keep: float = 0.5,
    model: nn.Module | None = None,
    *,
    official_quirks: bool = False,
) -> _Sharpest:
    """ESAM's data selection: a closure whose second gradient is that of the samples whose loss rises most.

    First pass: ``g = mean_i grad l_i(w)`` over all samples. Second pass: ``q_i = l_i(w + e) - l_i(w)`` by a
    forward pass without gradient, then ``gs = mean_{i in S} grad l_i(w + e)``; S are the
    ``max(1, round(B keep))`` samples with the largest ``q_i``. Ties go to the lower index and NaN counts as
    largest. Later passes of a step keep S; a step of one pass takes all samples.

    The second pass costs B + 3 B keep forward passes of a sample, where a backward costs two. Keeping the
    graph of the forward pass over all samples, and going back from some of its losses, would cost 3B: less
    only where more than 2/3 are kept, and normalized with statistics of the whole batch, unlike the authors'.
    Dropout draws anew in each forward pass, as theirs does, and ``q_i`` has that noise.

    Args:
        loss_fn, batch, model: as in `top_losses`.
        keep: share of the samples in (0, 1] (default 0.5, of the authors' scripts; 1 keeps all).
        official_quirks: as the authors' code does, keep those with ``q_i`` strictly above the
            ``floor(B keep)``-th largest, which leaves that one and its equals out; all from 0.99 on.

    Returns:
        A closure for ``opt.step``, good for one step: make one for each batch. It returns the mean loss over
        the samples of the pass, without a graph; ``closure.kept`` holds the indices, None for all.

    Raises:
        ValueError: if keep is out of range or the batch has no samples; when called, if loss_fn does not
            return one loss per sample, or official_quirks leave no sample.
        TypeError: if loss_fn is no function, or returns no tensor.

    Example:
        >>> import torch
        >>> from sam_kernels import SAM, sampling
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> batch = torch.tensor([[1.0], [3.0], [2.0], [4.0]])
        >>> closure = sampling.sharpest(lambda x: model(x).flatten(), batch)
        >>> loss = opt.step(closure)
        >>> closure.kept
        tensor([1, 3])

    Source: Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR
    2022, arXiv 2110.03141; dydjw9/Efficient_SAM. There the statistics of batch norm move in all three forward
    passes; here, given the model, only in the first.
    """
    if not (_is_fraction(keep) or (_is_whole(keep) and keep == 1)):
        raise ValueError(f"sharpest: keep is {keep!r}; expected the share of samples to keep, in (0, 1]")
    return _Sharpest(float(keep), official_quirks, "sharpest", loss_fn, batch, model)


def _is_whole(keep: Any) -> bool:
    return isinstance(keep, Integral) and not isinstance(keep, bool)


def _is_fraction(keep: Any) -> bool:
    return isinstance(keep, Real) and not isinstance(keep, Integral) and 0 < float(keep) <= 1


def _largest(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the largest scores; NaN is largest, ties go to the lower index."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _parameters(model: nn.Module | None) -> Iterator[Tensor]:
    return iter(()) if model is None else model.parameters()


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, MutableMapping | list | tuple):
        for item in batch.values() if isinstance(batch, MutableMapping) else batch:
            yield from _tensors(item)


def _select(batch: Any, kept: Tensor, size: int) -> Any:
    """The batch with only the kept samples."""
    if isinstance(batch, Tensor):
        has_samples = batch.dim() > 0 and batch.shape[0] == size
        return batch.index_select(0, kept.to(batch.device)) if has_samples else batch
    if isinstance(batch, MutableMapping):
        chosen = copy.copy(batch)  # keeps a class that is more than a dict
        chosen.update({key: _select(item, kept, size) for key, item in batch.items()})
        return chosen
    if isinstance(batch, list | tuple):
        items = [_select(item, kept, size) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch
