"""Passes of a step on several ranks: which backward passes are averaged, and what cannot be had there."""

from __future__ import annotations

import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .policies import Bernoulli, Remembering, Sparse
from .recipe import Recipe
from .sharding import resharders
from .tensor_groups import TensorGroup

# note: [whose perturbation]
# With one perturbation for all ranks a step is SAM on the batch of all ranks together. With one for each
# rank, along the gradient of its own part of the batch, it is m-sharpness (Foret et al. 2021, section 4.1),
# and costs one all-reduce of gradients less; the last pass averages.
SYNCED, PER_RANK = "synced", "per_rank"


def ddp_of(model: nn.Module | None) -> Any:
    """The `DistributedDataParallel` that a model is, or None."""
    module = sys.modules.get("torch.nn.parallel.distributed")
    is_ddp = module is not None and isinstance(model, module.DistributedDataParallel)
    return model if is_ddp else None


def check_ranks(wish: Any, recipe: Recipe, model: nn.Module | None) -> str:
    """The wish; a sentence where it is none, or cannot be had with this recipe and model.

    Raises:
        ValueError: naming what stands against it.
    """
    if wish not in (SYNCED, PER_RANK):
        raise ValueError(f"SAM: across_ranks is {wish!r}; expected {SYNCED!r} or {PER_RANK!r}")
    if wish == SYNCED:
        return wish
    ddp = ddp_of(model)
    if ddp is None:
        sharded = "; a rank of fully_shard has no gradient of its own" if resharders(model) else ""
        raise ValueError(
            "SAM: across_ranks='per_rank' perturbs along gradients that are not averaged, and asks the "
            f"DistributedDataParallel module for them; pass it as model= (it is {type(model).__name__})"
            f"{sharded}"
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
    return wish


def _why_not_per_rank(recipe: Recipe) -> str | None:
    if recipe.combine.gradients > 1 or recipe.probe.needs_closure and recipe.combine.gradients != 1:
        return "it combines gradients of several passes, and only the last would be averaged"
    if isinstance(recipe.direction, Remembering):
        return "it remembers gradients, and each rank would remember others, which no checkpoint of one holds"
    if recipe.cadence.needs_norm:
        return "its cadence goes by the gradient, and ranks would take different branches"
    if isinstance(recipe.mask, Sparse) and recipe.mask.is_stored:
        return "its masks go by gradients, and would differ between ranks"
    return None


def check_sharded(recipe: Recipe, groups: list[TensorGroup]) -> None:
    """Raise a sentence where a recipe cannot be had with DTensors or parts of tensors.

    Raises:
        ValueError: naming the recipe.
    """
    if not any(group.has_dtensors or group.sharding.groups for group in groups):
        return
    mask = recipe.mask
    if isinstance(mask, Sparse) and not (isinstance(mask, Bernoulli) and mask.by == "tensor"):
        raise ValueError(
            f"recipe '{recipe.name}' selects single weights, and this is not done yet where parameters are "
            "DTensors or spread over ranks; use a recipe without a mask, or DistributedDataParallel"
        )


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


def quiet(model: nn.Module | None, is_averaged: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of a pass whose gradients DistributedDataParallel shall not average."""
    ddp = ddp_of(model)
    return nullcontext() if ddp is None or is_averaged else ddp.no_sync()


def shared(guard: Tensor | None, model: nn.Module | None) -> Tensor | None:
    """A guard that is finite only where it is so on all ranks, which then take the same branch."""
    ddp = ddp_of(model)
    if guard is None or ddp is None:
        return guard
    # Whether, not how much: sums of finite numbers could overflow.
    bad = torch.where(torch.isfinite(guard), 0.0, torch.inf)
    torch.distributed.all_reduce(bad, group=ddp.process_group)
    return guard + bad
