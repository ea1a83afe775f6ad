"""The half of SAM that has to do with masks: asking for scores, updating, and keeping them in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .construction import member_lookup
from .directions import seed_of
from .masks import Masks, describe
from .perturbation import Measure, Served
from .policies import Bernoulli, Dynamic, Given, Member, Sparse, TopScores
from .policies.cadence import draw
from .recipe import Recipe
from .running_stats import frozen
from .selection import Block

ByParameter = Mapping[Any, Any] | Sequence[Any] | Callable[..., Any]


class MaskUpdates:
    """Base of `SAM`: what it does for recipes whose masks select single weights."""

    recipe: Recipe
    model: nn.Module | None
    param_groups: list[dict[str, Any]]
    _masks: Masks
    _next_masks: list[Block] | None  # in force from the next step on
    _given: set[Tensor]  # parameters whose masks the recipe was asked for
    _measure: Measure | None
    _micro_batch: int
    _groups: Callable[[], Served]
    _adopt_strays: Callable[[], None]
    _require_idle: Callable[[str], None]

    # ---- what users call -----------------------------------------------------------------------

    @property
    def masks(self) -> Masks:
        """Which weights are perturbed, for recipes with a sparse mask; see `Masks`.

        Raises:
            TypeError: if the recipe's mask selects no single weights.
        """
        self._sparse_policy("masks")
        self._groups()
        return self._masks

    @property
    def masks_are_due(self) -> bool:
        """Whether the coming step is one in which the recipe wants `update_masks` to be called.

        Recipes that update their masks by themselves want it never.
        """
        policy = self.recipe.mask
        self._adopt_strays()
        return isinstance(policy, TopScores) and policy.is_due(self.param_groups[0]["sam_step"])

    @torch.no_grad()
    def update_masks(
        self,
        batches: Iterable[Any] | None = None,
        loss_fn: Callable[[Any], Tensor] | None = None,
        *,
        samples: int | None = None,
        scores: ByParameter | None = None,
        masks: ByParameter | None = None,
    ) -> None:
        """Select anew which weights are perturbed, from one of three sources.

        ``update_masks(loader, loss_fn)`` scores each weight by the sum of its squared gradients, the
        empirical Fisher information: ``F = sum_i (d loss_i / d w)^2``, one term for each backward pass. A
        loss per batch gives a term per batch; a loader of single samples, or a loss_fn that returns the
        vector of its samples' losses, gives a term per sample, as published. ``update_masks(scores=...)``
        ranks your own scores and ``update_masks(masks=...)`` takes masks as they are. Call it between steps.
        The parameters' gradients stay as they were, and, if the optimizer knows the model, so do those of its
        other parameters and its normalization statistics.

        Args:
            batches: what loss_fn is called with, one at a time.
            loss_fn: returns the loss of a batch, or a vector with the loss of every sample.
            samples: backward passes after which to stop (default: when the batches end; the authors take 1024
                single samples).
            scores: tensors of the parameters' shapes, larger for weights to be perturbed, compared by size: a
                dict by name or parameter, a list in the order of the parameters, or a function of the
                parameter.
            masks: bool tensors, likewise; None makes a parameter dense, though ``ssam_d`` draws a new
                mask for it in the next step.

        Raises:
            TypeError: if the recipe has no such masks, or not exactly one source is given.
            ValueError: if scores or masks do not fit the parameters, or there was no batch or sample.
            RuntimeError: between the two halves of a step.

        Example:
            >>> import torch
            >>> from sam_kernels import SAM
            >>> model = torch.nn.Linear(4, 1)
            >>> opt = SAM(model.parameters(), torch.optim.SGD, recipe="ssam_f", lr=0.1)
            >>> loader = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8)
            >>> if opt.masks_are_due:
            ...     opt.update_masks(loader, lambda x: model(x).square().mean(1))
            >>> opt.masks.count()
            tensor(3)

        Source: Mi et al., NeurIPS 2022, arXiv 2210.05177.
        """
        self._require_idle("update_masks()")
        policy = self._sparse_policy("update_masks()")
        if (batches is None) != (loss_fn is None):
            raise TypeError("update_masks(): batches and loss_fn belong together; give both")
        if sum(source is not None for source in (batches, scores, masks)) != 1:
            raise TypeError("update_masks(): expected one of batches with loss_fn, scores, or masks")
        if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
            raise ValueError(
                f"update_masks(): samples is {samples!r}; expected a whole number of at least 1, or None"
            )
        served = self._groups()
        if masks is not None:
            given = self._by_parameter(masks, "masks", check_mask)
            self._masks.give(given)
            return
        if not isinstance(policy, TopScores):
            raise TypeError(
                f"update_masks(): recipe '{self.recipe.name}' does not rank scores; expected masks="
            )
        if scores is not None:
            ranked = {
                p: x for p, x in self._by_parameter(scores, "scores", check_score).items() if x is not None
            }
        else:
            ranked = accumulate(served, batches, loss_fn, samples, self.model)  # type: ignore[arg-type]
        self._masks.select(served, policy, ranked)

    def _sparse_policy(self, what: str) -> Sparse:
        policy = self.recipe.mask
        if not isinstance(policy, Sparse):
            raise TypeError(
                f"{what}: recipe '{self.recipe.name}' perturbs parameters as a whole; recipes with masks are "
                "'ssam_f', 'ssam_d', and any Recipe(mask=...) with TopScores, Dynamic or Given"
            )
        return policy

    def _by_parameter(self, source: ByParameter, what: str, check: Callable[..., Any]) -> dict[Tensor, Any]:
        """The entry of each parameter, checked; a dict may leave some out."""
        params = [p for group in self.param_groups for p in group["params"]]
        member_of = member_lookup(self.param_groups, self.model)
        names = {p: member_of(p).name for p in params}
        shown = {p: names[p] or f"parameter {number}" for number, p in enumerate(params)}
        if callable(source):
            found = {p: source(p) for p in params}
        elif isinstance(source, Mapping):
            known = set(params) | {name for name in names.values() if name is not None}
            for key in source:
                if key not in known:
                    stray = repr(key) if isinstance(key, str) else f"a {type(key).__name__}"
                    raise ValueError(
                        f"update_masks(): {what} has an entry for {stray}, which is no parameter of this "
                        "optimizer. Names need model= or model.named_parameters()"
                    )
            found = {p: source[p] if p in source else source[names[p]]
                     for p in params if p in source or names[p] in source}  # fmt: skip
        else:
            entries = list(source)
            if len(entries) != len(params):
                raise ValueError(
                    f"update_masks(): {what} has {len(entries)} entries; expected {len(params)}, one for "
                    "every parameter"
                )
            found = dict(zip(params, entries, strict=True))
        return {p: None if x is None else check(x, p, shown[p]) for p, x in found.items()}

    # ---- in a step -----------------------------------------------------------------------------

    def _begin_masks(self, served: Served) -> None:
        """Before the norm: masks that the recipe makes by itself, where there are none or they are due."""
        policy = self.recipe.mask
        if isinstance(policy, Dynamic) and not self._masks.are_complete:
            self._masks.begin(served, policy, self._numbers())
        elif isinstance(policy, Bernoulli):
            step, seed = self.param_groups[0]["sam_step"], seed_of(policy.seed, self._micro_batch)
            if policy.by == "element":
                self._masks.draw(served, policy.threshold(), seed, step, self._numbers())
        elif isinstance(policy, Given):
            params = [p for group, _ in served for p in group.params]
            if not policy.is_due(self.param_groups[0]["sam_step"]):
                params = [p for p in params if p not in self._given and self._masks.words(p) is None]
            if not params and self._given:
                return  # the usual step asks for nothing
            member_of = member_lookup(self.param_groups, self.model)
            self._check_names(policy, member_of)
            if params:
                self._masks.give({p: ask(policy, p, member_of(p)) for p in params})
                self._given |= set(params)

    def _drawn_tensors(self, policy: Bernoulli) -> set[Tensor]:
        """The parameters that a mask by tensor selects in this step; the host draws them."""
        step, seed = self.param_groups[0]["sam_step"], seed_of(policy.seed, self._micro_batch)
        return {p for p, number in self._numbers().items() if draw(seed, step, number) < policy.keep}

    def _check_names(self, policy: Given, member_of: Callable[[Tensor], Member]) -> None:
        if self._given or not isinstance(policy.masks, Mapping):
            return
        known = {member_of(p).name for group in self.param_groups for p in group["params"]}
        unknown = [name for name in policy.masks if name not in known]
        if unknown:
            raise ValueError(
                f"Given: masks has an entry for {unknown[0]!r}, which is the name of no parameter of this "
                "optimizer"
            )

    def _evolve_masks(self, served: Served) -> None:
        """Before the perturbation, while the gradients are there.

        The new masks are in force from the next step on, as published.
        """
        policy, step = self.recipe.mask, self.param_groups[0]["sam_step"]
        if not (isinstance(policy, Dynamic) and policy.is_due(step)):
            return
        if all(g is None for group, _ in served for g in group.grads):
            return
        # The host waits here for the device, as a selection does anyway.
        if self._measure is not None and bool(torch.isfinite(self._measure.norm)):
            self._next_masks = self._masks.evolve(served, policy, self._numbers(), step)

    def _numbers(self) -> dict[Tensor, int]:
        """The place of each parameter among all: random numbers go by it, not by groups or devices."""
        return {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}


def ask(policy: Given, param: Tensor, member: Member) -> Tensor | None:
    """The mask that a policy gives a parameter."""
    mask = policy.of(member, param)
    return None if mask is None else check_mask(mask, param, member.name or "a parameter")


def check_mask(mask: Any, param: Tensor, name: str) -> Tensor:
    """The mask in the strides and on the device of its parameter.

    Raises:
        ValueError: if it is not a bool tensor of its shape.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != param.shape:
        raise ValueError(f"the mask of {name} is {describe(mask)}; expected torch.bool {tuple(param.shape)}")
    return torch.empty_like(param, dtype=torch.bool, requires_grad=False).copy_(mask)


def check_score(score: Any, param: Tensor, name: str) -> Tensor:
    """The score in the strides and on the device of its parameter, as float32.

    Raises:
        ValueError: if it is not a floating-point tensor of its shape.
    """
    is_fit = isinstance(score, Tensor) and score.is_floating_point() and score.shape == param.shape
    if not is_fit:
        raise ValueError(
            f"the scores of {name} are {describe(score)}; expected a floating-point tensor "
            f"{tuple(param.shape)}"
        )
    if (score.dtype, score.device, score.stride()) == (torch.float32, param.device, param.stride()):
        return score.detach()
    return torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(score)


def accumulate(
    served: Served,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor],
    samples: int | None,
    model: nn.Module | None,
) -> dict[Tensor, Tensor]:
    """Sums of squared gradients, by parameter; the gradients that were there stay as they were.

    Raises:
        ValueError: if there was nothing to add up, or a loss is neither a number nor a vector.
    """
    scores = [
        [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in g.params] for g, _ in served
    ]
    served_params = [p for group, _ in served for p in group.params]
    reached = served_params if model is None else dict.fromkeys([*served_params, *model.parameters()])
    held = [(p, p.grad) for p in reached]
    taken = 0
    try:
        with nullcontext() if model is None else frozen(model):
            for batch in batches:
                for _ in _backward(loss_fn, batch, [p for p, _ in held], samples, taken):
                    taken += 1
                    for (group, backend), own in zip(served, scores, strict=True):
                        group.read_gradients()
                        backend.accumulate_squares_(group, own)  # type: ignore[arg-type]
                if samples is not None and taken >= samples:
                    break
    finally:
        for param, grad in held:
            param.grad = grad
        for group, _ in served:
            group.drop_gradients()
    if taken == 0:
        raise ValueError("update_masks(): there were no batches; expected at least one")
    return {
        p: score
        for (group, _), own in zip(served, scores, strict=True)
        for p, score in zip(group.params, own, strict=True)
    }


def _backward(
    loss_fn: Callable[[Any], Tensor], batch: Any, params: list[Tensor], samples: int | None, taken: int
) -> Iterable[None]:
    """One turn for every gradient of the batch: one, or one for each loss of a vector."""
    with torch.enable_grad():
        loss = loss_fn(batch)
        if not isinstance(loss, Tensor) or loss.dim() > 1:
            found = tuple(loss.shape) if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(
                f"update_masks(): loss_fn returned {found}; expected one loss, or a vector with the loss of "
                "every sample"
            )
        losses = loss.unbind() if loss.dim() else (loss,)
    if samples is not None:
        losses = losses[: samples - taken]
    for i, one in enumerate(losses):
        for param in params:
            param.grad = None
        with torch.enable_grad():
            one.backward(retain_graph=i + 1 < len(losses))
        yield
