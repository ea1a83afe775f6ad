"""What the ranks of a test do; every function runs on each of them and returns what pickles."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problems import BASES, RHO, STEPS, loss_of, net, part
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import SAM, recipes
from sam_kernels.policies import Anticipated


def full(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights, on every rank."""
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def optimizer(
    model: nn.Module, base: str = "SGD", recipe: str | None = None, known: bool = True, **options: Any
) -> SAM:
    """SAM with the radius of the problem; `known` gives it the module."""
    chosen = recipes.get(recipe, rho=RHO) if recipe else recipes.sam(rho=RHO)
    cls = getattr(torch.optim, base)
    module = model if known else None
    return SAM(model.parameters(), cls, recipe=chosen, model=module, **BASES[base], **options)


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def train(model: nn.Module, opt: SAM, two_step: bool = False, steps: int = STEPS, data: Any = part) -> None:
    rank, world = rank_and_world()
    for step in range(steps):
        x, y = data(step, rank, world)
        if not two_step:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = loss_of(model, x, y)
                loss.backward()
                return loss

            if isinstance(opt.recipe.probe, Anticipated):
                opt.step(closure, ahead=closure)
            else:
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


def both(mesh: Any) -> nn.Module:
    """fully_shard over tensor parallelism: `inner.weight` is spread twice along one dimension."""
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
    return fully_shard(model, mesh=mesh["dp"])


def fsdp2_and_tensor_parallel(base: str = "SGD", **options: Any) -> Any:
    model = both(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))
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


def warnings_on_loading(**given: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_and_go_on(**given)
    return [str(w.message) for w in caught]


def _after(before: int) -> Any:
    return lambda step, rank, world: _same(step + before, rank, world)


# ---- what can go wrong ---------------------------------------------------------------------------


def whole_weights(recipe: str, base: str = "SGD") -> Any:
    """The same steps without ranks, on the whole batch."""
    model = net()
    train(model, optimizer(model, base, recipe), data=_same)
    return full(model)


def recipe_under_fsdp2(recipe: str, base: str = "SGD") -> Any:
    model = sharded()
    opt = optimizer(model, base, recipe)
    train(model, opt)
    return full(model), str(opt.backends())


def in_parts(kind: str, across_ranks: str = "synced") -> Any:
    """Each rank's batch in two parts, one closure each."""
    model = sharded() if kind == "fsdp2" else DistributedDataParallel(net(), static_graph=kind == "static")
    opt = optimizer(model, across_ranks=across_ranks)
    rank, world = rank_and_world()
    for step in range(STEPS):
        x, y = part(step, rank, world)
        half = len(x) // 2

        def closure(rows: slice, x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = loss_of(model, x[rows], y[rows]) / 2
            loss.backward()
            return loss

        opt.step([partial(closure, slice(half)), partial(closure, slice(half, None))])
    return full(model)


def bf16_replicas(steps: int = 200) -> Any:
    """Two replicas of bf16 weights, each perturbed along its own gradient; the weights of this one."""
    model = DistributedDataParallel(net(torch.bfloat16))
    opt = optimizer(model, across_ranks="per_rank")
    for group in opt.param_groups:
        group["lr"] = 0.01
    train(model, opt, steps=steps, data=lambda *place: part(*place, dtype=torch.bfloat16))
    return full(model)


class Branches(nn.Module):
    """Two layers, of which a rank uses one or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 3, dtype=torch.float64)
        self.right = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if rank_and_world()[0] == 0 else self.right(x) + 0 * self.left(x)


def a_branch_of_one_rank(two_step: bool) -> Any:
    """In the first pass of rank 0 `right` has no gradient; in the averaged second pass it has one."""
    torch.manual_seed(4)
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    opt = optimizer(model, across_ranks="per_rank")
    train(model, opt, two_step)
    return full(model)


def overflow_on_one_rank() -> Any:
    """The first gradient of rank 1 is not finite, its second one and those of rank 0 are."""
    rank, world = rank_and_world()
    model = DistributedDataParallel(net())
    opt = optimizer(model, across_ranks="per_rank")
    train(model, opt, steps=1)
    before = full(model)
    x, y = part(1, rank, world)
    passes = []

    def closure() -> Tensor:
        passes.append(1)
        loss = loss_of(model, x, y) * (float("inf") if rank == 1 and len(passes) == 1 else 1.0)
        loss.backward()
        return loss

    opt.step(closure)
    return before, full(model)


def an_exception_in_the_second_pass(kind: str) -> Any:
    model = DistributedDataParallel(net()) if kind == "ddp" else sharded()
    opt = optimizer(model)
    train(model, opt, steps=1)
    before, passes = full(model), []

    def closure() -> Tensor:
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt
        loss = loss_of(model, *part(1, *rank_and_world()))
        loss.backward()
        return loss

    try:
        opt.step(closure)
    except KeyboardInterrupt:
        pass
    return before, full(model), len(passes)


def collectives_of_a_step(kind: str) -> Any:
    """How many all-reduces a whole step asks for, by itself: those of backward passes are not counted."""
    if kind == "both":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = both(mesh)
    elif kind == "hsdp":
        model = sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    else:
        model = sharded()
    opt = optimizer(model)
    calls: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    x, y = part(0, 0, 1)
    loss_of(model, x, y).backward()
    dist.all_reduce = counted
    try:
        opt.first_step()
        opt.step()
    finally:
        dist.all_reduce = real
    return calls, len(opt._groups())


def state_of_parameters(base: str) -> Any:
    """Per entry of the base's state: whether it is spread as its parameter is."""
    model = sharded()
    opt = optimizer(model, base)
    train(model, opt, steps=1)
    found = []
    for p, entry in opt.state.items():
        for name, value in entry.items():
            if name != "step":
                alike = (value.placements, value.device_mesh, value.shape, value.stride()) == (
                    p.placements,
                    p.device_mesh,
                    p.shape,
                    p.stride(),
                )
                found.append((name, isinstance(value, DTensor) and alike))
    return found


def a_partial_gradient() -> str:
    """The sentence about a gradient that is still to be summed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w = nn.Parameter(distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, [Replicate()]))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    x = distribute_tensor(torch.randn(8, 4, dtype=torch.float64), mesh, [Shard(0)])
    (x * w).sum().backward()
    w.grad = DTensor.from_local(w.grad.to_local(), mesh, [Partial()], run_check=False)
    try:
        opt.first_step()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def a_retained_graph() -> str:
    """What autograd says of a graph that saved a DTensor weight, after a step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w = nn.Parameter(distribute_tensor(torch.randn(4, 4, dtype=torch.float64), mesh, [Shard(0)]))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    opt.first_step()
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def bf16_policy() -> Any:
    """fully_shard that computes in bf16: the optimizer sees fp32 shards."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = net(torch.float32)
    fully_shard(model, mp_policy=policy)
    opt = optimizer(model)
    moved = []

    def prepare(served: Any) -> None:
        moved.append({str(g.dtype) for group, _ in served for g in group.grads if g is not None})

    opt._prepare_gradients = prepare
    train(model, opt, data=lambda *place: part(*place, dtype=torch.float32))
    return full(model), moved


def refusal(kind: str, **options: Any) -> str:
    """The sentence with which the constructor refuses."""
    if kind == "ddp":
        model: nn.Module = DistributedDataParallel(net())
    elif kind == "static":
        model = DistributedDataParallel(net(), static_graph=True)
    elif kind == "fsdp2":
        model = sharded()
    else:
        model = net()
    try:
        optimizer(model, **options)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def warnings_of(known: bool) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer(sharded(), known=known)
    return [str(w.message) for w in caught if "gathered" in str(w.message)]


def noise_of_ranks() -> Any:
    """The perturbation that random directions make of equal weights, one part per rank."""
    model = nn.Linear(64, 8, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
    fully_shard(model)
    opt = optimizer(model, recipe="rand_sam")
    model(torch.ones(2, 64, dtype=torch.float64)).sum().backward()
    opt.first_step()
    made = model.weight.full_tensor().detach().clone()
    opt.zero_grad()
    opt.step()
    return made


def a_rank_that_dies(folder: str, dies_at: int | None) -> Any:
    """A checkpoint after every step; rank 1 is gone in the second pass of one. Goes on where there is one."""
    model = sharded()
    opt = optimizer(model, "AdamW")
    Path(folder).mkdir(exist_ok=True)
    done = 0
    if (Path(folder) / "done").exists():
        done = int((Path(folder) / "done").read_text())
        state = _dcp_state(model, opt, False)
        dcp.load(state, checkpoint_id=f"{folder}/{done}")
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    rank, world = rank_and_world()
    for step in range(done, 2 * STEPS):
        passes = []

        def closure(step: int = step, passes: list[int] = passes) -> Tensor:
            passes.append(step)
            if len(passes) == 2 and step == dies_at and rank == 1:
                os._exit(17)
            loss = loss_of(model, *part(step, rank, world))
            loss.backward()
            return loss

        opt.step(closure)
        dcp.save(_dcp_state(model, opt, False), checkpoint_id=f"{folder}/{step + 1}")
        if rank == 0:
            (Path(folder) / "done").write_text(str(step + 1))
        dist.barrier()
    return full(model)


def scaled(kind: str, overflow: bool = False, across_ranks: str = "synced") -> Any:
    """Under a GradScaler; with overflow, the last gradient of rank 1 is not finite in the second step."""
    model = DistributedDataParallel(net()) if kind == "ddp" else sharded()
    opt = optimizer(model, across_ranks=across_ranks)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rank, world = rank_and_world()
    taken = [full(model)]
    for step in range(STEPS):
        x, y = part(step, rank, world)
        with opt.first_pass():
            scaler.scale(loss_of(model, x, y)).backward()
        opt.first_step(zero_grad=True)
        is_bad = overflow and step == 1 and rank == 1
        scaler.scale(loss_of(model, x, y) * (float("inf") if is_bad else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        taken.append(full(model))
    return taken, scaler.get_scale()


def bf16_checkpoint(folder: str, resume: bool, before: int = 2) -> Any:
    """As `begin_and_save` and `load_and_go_on`, of bf16 weights with masters."""
    model = net(torch.bfloat16)
    fully_shard(model)
    opt = optimizer(model, "AdamW", master_weights=True)
    if not resume:
        train(model, opt, steps=before, data=_halves(0))
        dcp.save(_dcp_state(model, opt, False), checkpoint_id=folder)
    else:
        state = _dcp_state(model, opt, False)
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, opt, data=_halves(before))
    masters = {
        name: opt.state_dict()["state"][i]["sam_master"].full_tensor()
        for i, (name, _) in enumerate(model.named_parameters())
    }
    return full(model), masters


def masters_follow_what_is_loaded_in_place(folder: str) -> bool:
    """A checkpoint of weights, loaded into what state_dict shows, is there after a step at rate 0."""
    model = net(torch.bfloat16)
    fully_shard(model)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    saved = full(model)
    opt = optimizer(model, master_weights=True)
    train(model, opt, steps=2, data=_halves(0))
    moved = full(model)
    dcp.load({"model": model.state_dict()}, checkpoint_id=folder)
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(model, opt, steps=1, data=_halves(2))
    now = full(model)
    return not torch.equal(moved["inner.weight"], saved["inner.weight"]) and all(
        torch.equal(now[name], saved[name]) for name in saved
    )


def _halves(before: int) -> Any:
    return lambda step, rank, world: part(step + before, rank, world, torch.bfloat16)


def a_step_of(recipe: str) -> Any:
    """Replicas that perturb for themselves, or the sentence with which the constructor refuses."""
    model = DistributedDataParallel(net())
    try:
        opt = optimizer(model, "AdamW", recipe, across_ranks="per_rank")
    except ValueError as error:
        return str(error)
    train(model, opt)
    return full(model)


def hooks_on_the_wrong_mesh(kind: str) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(mesh if kind == "hybrid" else mesh["shard"])
    replicas = mesh["replicate" if kind == "hybrid" else "shard"]
    try:
        optimizer(model, across_ranks="per_rank", replicas=replicas)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def a_first_pass_that_was_averaged() -> str:
    model = DistributedDataParallel(net())
    opt = optimizer(model, across_ranks="per_rank")
    loss_of(model, *part(0, *rank_and_world())).backward()
    try:
        opt.first_step()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def flat_refusals() -> list[str]:
    """What FullyShardedDataParallel cannot have: no module, recipes by name, memory, scaled gradients."""
    said = []
    for options, flat in (
        ({"known": False}, False),
        ({"recipe": "layerwise_sam"}, True),
        ({"recipe": "looksam"}, False),
        ({"recipe": "sampa"}, False),
    ):
        model = FullyShardedDataParallel(net(), use_orig_params=not flat, device_id=torch.device("cpu"))
        try:
            optimizer(model, **options)
        except ValueError as error:
            said.append(str(error))
    model = FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu"))
    opt, scaler = optimizer(model), ShardedGradScaler(device="cpu", init_scale=1024.0)
    x, y = part(0, *rank_and_world())
    for unscales in (True, False):
        scaler.scale(loss_of(model, x, y)).backward()
        opt.first_step(zero_grad=True)
        scaler.scale(loss_of(model, x, y)).backward()
        if unscales:
            scaler.unscale_(opt)
        try:
            scaler.step(opt)
        except RuntimeError as error:
            said.append(str(error))
        opt.zero_grad()
        scaler.update() if unscales else None
    return said


def looks_at_state(recipe: str, base: str) -> list[int]:
    """The count of steps after each look of a distributed checkpoint, from a step that is not due."""
    model = sharded()
    opt = SAM(
        model.parameters(),
        getattr(torch.optim, base),
        recipe=recipes.get(recipe, rho=RHO),
        model=model,
        lr=0.1,
    )
    train(model, opt, steps=1)
    opt.zero_grad()
    found = []
    for _ in range(3):
        _dcp_state(model, opt, False)
        found.append(opt.param_groups[0]["sam_step"])
    return found
