"""Passes of a step on several ranks: which backward passes are averaged, and what cannot be had there."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .policies import Anticipated, Dense, LayerWise, Remembering, ReuseOrthogonal, Sparse
from .recipe import Recipe
from .sharding import fsdp_modules, is_dtensor, ranks_in
from .tensor_groups import TensorGroup

# note: [whose perturbation]
# With one perturbation for all ranks a step is SAM on the batch of all ranks together. With one for each
# rank, along the gradient of its own part of the batch, it is m-sharpness (Foret et al. 2021, section 4.1),
# and costs one all-reduce of gradients less; the last pass averages.
SYNCED, PER_RANK = "synced", "per_rank"


class Ranks:
    """What a step has to do with other ranks, by whatever averages gradients over them.

    Args:
        are_apart: whether each perturbs for itself.
        ddp: the `DistributedDataParallel` that averages, or None.
        replicas: the process group over which hooks of ours average, or None.
    """

    def __init__(self, are_apart: bool = False, ddp: Any = None, replicas: Any = None) -> None:
        self.are_apart = are_apart
        self._ddp = ddp
        self._replicas = replicas
        self._is_pass_averaged = True
        self._had_first_pass = False  # of the two-step form

    @property
    def are_several(self) -> bool:
        """Whether something averages gradients over them."""
        return self._ddp is not None or self._replicas is not None

    @contextmanager
    def averaging(self, is_pass_averaged: bool, is_last: bool = True) -> Iterator[None]:
        """Around forward and backward.

        Args:
            is_pass_averaged: over all ranks.
            is_last: of the parts of a batch. `DistributedDataParallel` averages the sum of all parts in the
                last, hooks each part by itself.
        """
        before, self._is_pass_averaged = self._is_pass_averaged, is_pass_averaged
        try:
            is_quiet = self._ddp is not None and not (is_pass_averaged and is_last)
            # torch fails in no_sync() there; averaging each part of a sum is right too.
            is_quiet = is_quiet and not getattr(self._ddp, "static_graph", False)
            with self._ddp.no_sync() if is_quiet else nullcontext():
                yield
        finally:
            self._is_pass_averaged = before

    def average(self, gradients: Tensor) -> None:
        """The hook of `fully_shard` modules: called with what is reduced over their shards."""
        if self._is_pass_averaged:
            torch.distributed.all_reduce(gradients, group=self._replicas)
            gradients /= self._replicas.size()

    def note_first_pass(self, has_been: bool) -> None:
        """The first pass of the two-step form has run where it could be told apart, or is over."""
        self._had_first_pass = has_been

    def require_first_pass(self) -> None:
        """Raise a sentence unless the gradients that are there can be this rank's own.

        Raises:
            RuntimeError: if the first pass was not run inside `first_pass`.
        """
        if self.are_apart and not self._had_first_pass:
            raise RuntimeError(
                "first_step(): across_ranks='per_rank' perturbs along this rank's own gradient, and outside "
                "of first_pass() it was averaged over all ranks; run forward and backward inside "
                "`with opt.first_pass():`, or use step(closure)"
            )

    def check_replicas(self, groups: list[TensorGroup]) -> None:
        """Raise a sentence where gradients would be averaged twice, or parts of different weights together.

        Raises:
            ValueError: naming the mesh to shard over.
        """
        if self._replicas is None:
            return
        own = ranks_in(self._replicas)
        if any(own in group.sharding.ranks for group in groups):
            raise ValueError(
                "SAM: replicas= is a dimension over which the parameters are sharded, and averaging over it "
                "would mix parts of different weights; give the dimension they are replicated over"
            )
        placed = [p for group in groups if group.has_dtensors for p in group.owners if is_dtensor(p)]
        for p in placed:
            pairs = enumerate(p.placements)  # type: ignore[attr-defined]
            if any(x.is_replicate() and p.device_mesh.size(d) > 1 for d, x in pairs):  # type: ignore[attr-defined]
                raise ValueError(
                    "SAM: replicas= averages over ranks that fully_shard averages over already, as its mesh "
                    "has a dimension that replicates; apply fully_shard to the sharding dimension alone, "
                    "fully_shard(module, mesh=mesh['shard']), or drop replicas="
                )

    def share(self, guard: Tensor | None) -> Tensor | None:
        """A guard that is finite only where it is so on all ranks, which then take the same branch."""
        group = self._replicas if self._ddp is None else self._ddp.process_group
        if guard is None or not self.are_apart:
            return guard
        # Whether, not how much: a sum of finite norms could overflow.
        bad = torch.where(torch.isfinite(guard), 0.0, torch.inf)
        torch.distributed.all_reduce(bad, group=group)
        return guard + bad


def ranks_of(wish: Any, recipe: Recipe, model: nn.Module | None, replicas: Any) -> Ranks:
    """What the constructor's arguments say of other ranks.

    Raises:
        ValueError: naming what stands against it.
    """
    if wish not in (SYNCED, PER_RANK):
        raise ValueError(f"SAM: across_ranks is {wish!r}; expected {SYNCED!r} or {PER_RANK!r}")
    ddp = _ddp_of(model)
    if wish == PER_RANK:
        _check_apart(recipe, model, ddp, replicas)
    ranks = Ranks(wish == PER_RANK, ddp, _group_of(replicas))
    if replicas is not None:
        modules = fsdp_modules(model)
        if not modules:
            raise ValueError(
                "SAM: replicas= averages the gradients of fully_shard modules, and model= has none of them; "
                "pass the module that fully_shard was applied to"
            )
        for module in modules:
            module.set_all_reduce_hook(ranks.average)
    return ranks


def _ddp_of(model: nn.Module | None) -> Any:
    module = sys.modules.get("torch.nn.parallel.distributed")
    is_ddp = module is not None and isinstance(model, module.DistributedDataParallel)
    return model if is_ddp else None


def _group_of(replicas: Any) -> Any:
    """The process group of a mesh of one dimension; a process group is its own."""
    if hasattr(replicas, "get_group"):
        if replicas.ndim != 1:
            raise ValueError(
                f"SAM: replicas is a mesh of {replicas.ndim} dimensions; expected one, mesh['name']"
            )
        return replicas.get_group()
    return replicas


def _check_apart(recipe: Recipe, model: nn.Module | None, ddp: Any, replicas: Any) -> None:
    if ddp is None and replicas is None:
        sharded = fsdp_modules(model)
        how = (
            "a rank of fully_shard has no gradient of its own; shard over one dimension of a mesh and give "
            "the other as replicas= for one perturbation per group of shards"
            if sharded
            else f"pass the DistributedDataParallel module as model= (it is {type(model).__name__})"
        )
        raise ValueError(
            "SAM: across_ranks='per_rank' perturbs along gradients that are not averaged over all ranks; "
            + how
        )
    if getattr(ddp, "static_graph", False):
        raise ValueError(
            "SAM: across_ranks='per_rank' and DistributedDataParallel(static_graph=True) do not go together: "
            "torch fails in no_sync() there, or leaves out all-reduces (pytorch#143580). Build it without "
            "static_graph"
        )
    reason = _why_not_per_rank(recipe)
    if reason is not None:
        raise ValueError(
            f"SAM: across_ranks='per_rank' and recipe '{recipe.name}' do not go together: {reason}; use "
            "across_ranks='synced'"
        )


def _why_not_per_rank(recipe: Recipe) -> str | None:
    if recipe.combine.gradients > 1:
        return "it combines gradients of several passes, and only the last would be averaged"
    if recipe.probe.moves_base:
        return "its base steps with the gradient of every pass, and only the last would be averaged"
    if isinstance(recipe.direction, Remembering):
        return "it remembers gradients, and each rank would remember others, which no checkpoint of one holds"
    if recipe.cadence.needs_norm:
        return "its cadence goes by the gradient, and ranks would take different branches"
    if isinstance(recipe.mask, Sparse) and recipe.mask.is_stored:
        return "its masks go by gradients, and would differ between ranks"
    return None


def check_sharded(recipe: Recipe, groups: list[TensorGroup], ranks: Ranks) -> None:
    """Raise a sentence where a recipe cannot be had with DTensors or parts of tensors.

    Raises:
        ValueError: naming the recipe, or what averages gradients already.
    """
    if not any(group.has_dtensors or group.sharding.groups for group in groups):
        return
    ranks.check_replicas(groups)
    is_flat = any(group.sharding.groups and not group.has_dtensors for group in groups)
    if (
        is_flat
        and isinstance(recipe.combine, ReuseOrthogonal)
        or is_flat
        and isinstance(recipe.probe, Anticipated)
    ):
        raise ValueError(
            f"recipe '{recipe.name}' keeps gradients from step to step, and under FullyShardedDataParallel a "
            "rank may have none where others have some; use fully_shard"
        )
    goes_by_tensor = isinstance(recipe.metric, LayerWise) or recipe.metric.needs_names()
    goes_by_tensor = goes_by_tensor or not isinstance(recipe.mask, Dense | Sparse)
    if goes_by_tensor and any(isinstance(p, _flat_parameters()) for group in groups for p in group.owners):
        raise ValueError(
            f"recipe '{recipe.name}' goes by tensors or their names, and FullyShardedDataParallel has joined "
            "them; build it with use_orig_params=True, or use fully_shard"
        )
    mask = recipe.mask
    if isinstance(mask, Sparse) and mask.is_stored:
        raise ValueError(
            f"recipe '{recipe.name}' selects weights by rank, and this is not done yet where parameters are "
            "DTensors or spread over ranks; use a recipe without a mask, or DistributedDataParallel"
        )


def _flat_parameters() -> tuple[type, ...]:
    module = sys.modules.get("torch.distributed.fsdp._flat_param")
    return () if module is None else (module.FlatParameter,)


def warn_if_gathered_weights_may_stay(groups: list[TensorGroup], model: nn.Module | None) -> None:
    """Say it when parameters may be FSDP2's and nothing here could make its modules gather anew."""
    is_fsdp_there = "torch.distributed.fsdp" in sys.modules
    if model is None and is_fsdp_there and any(g.has_dtensors and g.sharding.groups for g in groups):
        warnings.warn(
            "SAM has sharded parameters and no model=. If they are those of fully_shard, pass the module as "
            "model=: what it has gathered before a perturbation is then freed, and gathered anew. Without "
            "that, set_reshard_after_backward(False) or a forward pass with reshard_after_forward=False "
            "between the passes leave the perturbation without effect, silently",
            UserWarning,
            stacklevel=4,
        )
