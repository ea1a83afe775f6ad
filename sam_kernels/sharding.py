"""Parameters of which this process holds a part: their local tensors, and sums that count each element once.

Everything that touches `torch.distributed` passes through here. The passes see plain local tensors; what
belongs to the user (parameters, their state, their gradients) stays a DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# note: [counting each element once]
# A mesh dimension over which a tensor is not replicated holds different elements on each rank, so a sum over
# elements is added up along it. "Not replicated" and not "sharded": torch's `_StridedShard`, which FSDP2 over
# tensor parallelism makes, answers False to `is_shard()` and to `isinstance(_, Shard)`. Along a replicated
# dimension every rank has the same elements, and adding those up would count them twice.


@dataclass(frozen=True)
class Sharding:
    """The process groups over which the elements of a tensor are spread; none where each rank has all.

    Two parameters that are spread over the same ranks share their collectives, one for each process group;
    equal meshes may come with process groups of their own.
    """

    groups: tuple[Any, ...] = field(default=(), compare=False)
    ranks: tuple[tuple[int, ...], ...] = ()  # of each group

    @classmethod
    def over(cls, groups: Iterable[Any]) -> Sharding:
        """Spread over each of these process groups."""
        groups = tuple(groups)
        return cls(groups, tuple(map(ranks_in, groups)))

    def sum(self, part: Tensor) -> Tensor:
        """The sum over all ranks that hold other elements; `part` itself where there are none."""
        return self._reduce(part, "SUM")

    def max(self, part: Tensor) -> Tensor:
        """The largest over all ranks that hold other elements; infinity where one is not a number."""
        if not self.groups:
            return part
        return self._reduce(torch.where(part.isnan(), torch.inf, part), "MAX")

    def _reduce(self, part: Tensor, how: str) -> Tensor:
        if not self.groups:
            return part
        import torch.distributed as dist

        total = part.clone()
        for group in self.groups:
            dist.all_reduce(total, getattr(dist.ReduceOp, how), group=group)
        return total

    def index(self) -> int:
        """The number of this rank's part among all parts."""
        number = 0
        for group in self.groups:
            number = number * group.size() + group.rank()
        return number


WHOLE = Sharding()


def ranks_in(group: Any) -> tuple[int, ...]:
    """The ranks of a process group."""
    import torch.distributed as dist

    return tuple(dist.get_process_group_ranks(group))


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor; asked without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """The part of a tensor that this process holds, over the same memory; plain tensors are their own.

    The same object every time, as long as the DTensor has it: ``to_local()`` of a parameter makes a new one
    in each call, and inside autograd a view.
    """
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def wrapped(part: Tensor, like: Any) -> Any:
    """A local tensor as part of one that is spread as `like` is."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def local_gradient(grad: Any, owner: Any) -> Tensor | None:
    """The part of a gradient that belongs to the local part of its parameter.

    Raises:
        RuntimeError: if it is still to be summed over ranks.
    """
    if grad is None or not is_dtensor(owner):
        return grad
    if not is_dtensor(grad):
        raise RuntimeError(
            f"the gradient of a DTensor parameter of shape {tuple(owner.shape)} is a plain tensor of shape "
            f"{tuple(grad.shape)}; expected a DTensor"
        )
    if grad.placements != owner.placements:
        if any(placement.is_partial() for placement in grad.placements):
            raise RuntimeError(
                f"the gradient of a parameter p of shape {tuple(owner.shape)} has placements "
                f"{_written(grad.placements)} and is still to be summed over ranks. After backward, in the "
                "closure where there is one, set p.grad = p.grad.redistribute(placements=p.placements)"
            )
        with torch.no_grad():
            grad = grad.redistribute(owner.device_mesh, owner.placements)
    return local(grad)


def sharding_of(param: Any, known: Mapping[int, Sharding]) -> Sharding:
    """How the elements of a parameter are spread over ranks.

    Args:
        known: by id of the parameter, where a module has told; see `flat_shardings`.
    """
    if not is_dtensor(param):
        if getattr(param, "_fsdp_flattened", False) and id(param) not in known:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a part of what FullyShardedDataParallel "
                "spreads over ranks, and norms would be of the parts; pass that module as model="
            )
        return known.get(id(param), WHOLE)
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has placements {_written(param.placements)}; a "
            "parameter that is still to be summed over ranks cannot be perturbed. Redistribute it first"
        )
    mesh = param.device_mesh
    dims = [d for d, placement in enumerate(param.placements) if not placement.is_replicate()]
    return Sharding.over(mesh.get_group(d) for d in dims if mesh.size(d) > 1)


def flat_shardings(model: nn.Module | None) -> dict[int, Sharding]:
    """For parameters of `FullyShardedDataParallel` (FSDP1): plain tensors that are parts of flat ones."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    found: dict[int, Sharding] = {}
    if model is None or fsdp is None:
        return found
    cls = fsdp.FullyShardedDataParallel
    # Outer modules come first, so that what an inner one says of its own parameters stays.
    for module in model.modules():
        if not isinstance(module, cls):
            continue
        is_whole = module.sharding_strategy == fsdp.ShardingStrategy.NO_SHARD
        groups = () if is_whole or module.process_group.size() == 1 else (module.process_group,)
        ignored = set(map(id, getattr(module, "_ignored_params", ())))
        for param in module.parameters():
            found[id(param)] = WHOLE if id(param) in ignored else Sharding.over(groups)
    return found


def fsdp_modules(model: nn.Module | None) -> list[Any]:
    """The modules that `fully_shard` was applied to (FSDP2)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if model is None or fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _written(placements: Any) -> str:
    return f"({', '.join(map(str, placements))})"


__all__ = [
    "WHOLE",
    "Sharding",
    "flat_shardings",
    "fsdp_modules",
    "is_dtensor",
    "local",
    "local_gradient",
    "ranks_in",
    "sharding_of",
    "wrapped",
]
