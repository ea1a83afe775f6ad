"""What the ranks of a test do; every function runs on each of them and returns what pickles."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problems import BASES, RHO, STEPS, loss_of, net, part
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import SAM, recipes


def full(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights, on every rank."""
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def optimizer(model: nn.Module, base: str = "SGD", recipe: str | None = None, **options: Any) -> SAM:
    chosen = recipes.get(recipe, rho=RHO) if recipe else recipes.sam(rho=RHO)
    cls = getattr(torch.optim, base)
    return SAM(model.parameters(), cls, recipe=chosen, model=model, **BASES[base], **options)


def rank_and_world() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def train(model: nn.Module, opt: SAM, two_step: bool = False, steps: int = STEPS, data: Any = part) -> None:
    rank, world = rank_and_world()
    for step in range(steps):
        x, y = data(step, rank, world)
        if not two_step:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = loss_of(model, x, y)
                loss.backward()
                return loss

            opt.step(closure)
            continue
        with opt.first_pass():
            loss_of(model, x, y).backward()
        opt.first_step(zero_grad=True)
        loss_of(model, x, y).backward()
        opt.step()
        opt.zero_grad()


# ---- DistributedDataParallel ---------------------------------------------------------------------


def ddp(
    base: str = "SGD", two_step: bool = False, wraps: dict[str, Any] | None = None, **options: Any
) -> Any:
    model = DistributedDataParallel(net(), **(wraps or {}))
    opt = optimizer(model, base, **options)
    train(model, opt, two_step)
    return full(model)


# ---- fully_shard, tensor parallelism -------------------------------------------------------------


def sharded(mesh: Any = None, **options: Any) -> nn.Module:
    model = net()
    for layer in (model.inner, model.outer):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp2(
    base: str = "SGD",
    two_step: bool = False,
    wraps: dict[str, Any] | None = None,
    keep_gathered: bool = False,
    **options: Any,
) -> Any:
    model = sharded(**(wraps or {}))
    if keep_gathered:
        model.set_reshard_after_backward(False)
    opt = optimizer(model, base, **options)
    train(model, opt, two_step)
    return full(model)


def hsdp(base: str = "SGD", **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(mesh)
    train(model, optimizer(model, base, **options))
    return full(model)


def _same(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    return part(step, 0, 1)


def tensor_parallel(base: str = "SGD", **options: Any) -> Any:
    rank, world = rank_and_world()
    mesh = init_device_mesh("cpu", (world,))
    model = net()
    parallelize_module(
        model,
        mesh,
        {
            "inner": ColwiseParallel(output_layouts=Replicate()),
            "outer": RowwiseParallel(input_layouts=Replicate()),
        },
    )
    train(model, optimizer(model, base, **options), data=_same)
    return full(model)


def fsdp2_and_tensor_parallel(base: str = "SGD", **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = net()
    parallelize_module(
        model,
        mesh["tp"],
        {
            "inner": ColwiseParallel(output_layouts=Replicate()),
            "outer": RowwiseParallel(input_layouts=Replicate()),
        },
    )
    for layer in (model.inner, model.outer):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    opt = optimizer(model, base, **options)
    train(model, opt, data=lambda step, rank, world: part(step, rank // 2, 2))
    return full(model)


# ---- one perturbation per group of shards --------------------------------------------------------


def replicated_by_hooks(base: str = "SGD", two_step: bool = False, across_ranks: str = "per_rank") -> Any:
    """Four ranks: shards over pairs, replicas over the pairs. Ranks 0 and 1 share a perturbation."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(mesh["shard"])
    opt = optimizer(model, base, across_ranks=across_ranks, replicas=mesh["replicate"])
    train(model, opt, two_step)
    return full(model)


# ---- FullyShardedDataParallel (FSDP1) ------------------------------------------------------------


def fsdp1(base: str = "SGD", use_orig_params: bool = True, strategy: str = "FULL_SHARD") -> Any:
    model = FullyShardedDataParallel(
        net(),
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )
    opt = optimizer(model, base)
    train(model, opt)
    with FullyShardedDataParallel.summon_full_params(model):
        return (
            {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in model.named_parameters()
            }
            if use_orig_params
            else {"flat": torch.cat([p.detach().flatten() for p in model.parameters()])}
        )


def zero_redundancy(base: str = "SGD") -> Any:
    model = DistributedDataParallel(net())
    made = ZeroRedundancyOptimizer(model.parameters(), getattr(torch.optim, base), **BASES[base])
    opt = SAM.wrap(made, recipes.sam(rho=RHO), model=model)
    train(model, opt)
    return full(model)


# ---- checkpoints ---------------------------------------------------------------------------------


def _dcp_state(model: nn.Module, opt: SAM, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, moments = get_state_dict(model, opt, options=options)
    return {"model": weights, "optimizer": moments}


def begin_and_save(
    folder: str, recipe: str = "sam", base: str = "AdamW", flat: bool = False, before: int = 2
) -> Any:
    """Some steps, a checkpoint, and the steps after it as well: what a resumed run must equal."""
    model = sharded()
    opt = optimizer(model, base, recipe)
    train(model, opt, steps=before, data=_same)
    dcp.save(_dcp_state(model, opt, flat), checkpoint_id=folder)
    train(model, opt, data=_after(before))
    return full(model)


def load_and_go_on(
    folder: str, recipe: str = "sam", base: str = "AdamW", flat: bool = False, before: int = 2
) -> Any:
    model = sharded()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    opt = optimizer(model, base, recipe)
    state = _dcp_state(model, opt, flat)
    dcp.load(state, checkpoint_id=folder)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_state_dict(
        model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    train(model, opt, data=_after(before))
    return full(model)


def _after(before: int) -> Any:
    return lambda step, rank, world: _same(step + before, rank, world)
