"""Train a small GPT on the text of Python's language reference, spread over ranks by fully_shard (FSDP2).

    torchrun --nproc-per-node 2 -m examples.train_fsdp2
    torchrun --nproc-per-node 2 -m examples.train_fsdp2 --recipe none     AdamW alone, to compare
    torchrun --nproc-per-node 2 -m examples.train_fsdp2 --checkpoint run  again: goes on where it stopped

Nothing is downloaded: the text is that of the module `pydoc_data.topics`, byte by byte. Runs on CPUs (gloo)
and on GPUs (nccl). What differs from training with AdamW is marked [SAM]: two places.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sam_kernels import SAM, recipes

BYTES = 256


class Block(nn.Module):
    """Attention over the bytes so far, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.before_perceptron = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        mixed = self.mix(self.before_attention(x)).view(rows, length, 3, self.heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(found.transpose(1, 2).reshape(rows, length, width))
        return x + self.perceptron(self.before_perceptron(x))


class GPT(nn.Module):
    """A decoder over bytes."""

    def __init__(self, width: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bytes(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def text() -> Tensor:
    """The language reference as bytes."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(whole.encode()), dtype=torch.uint8).long()


def batch(corpus: Tensor, options: argparse.Namespace, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Windows of the text and the bytes that follow; those of a step and rank are always the same."""
    made = torch.Generator().manual_seed(1_000_003 * step + rank)
    starts = torch.randint(len(corpus) - options.length - 1, (options.rows,), generator=made)
    windows = torch.stack([corpus[i : i + options.length + 1] for i in starts.tolist()])
    return windows[:, :-1], windows[:, 1:]


def shard(model: GPT, device: torch.device, bf16: bool) -> GPT:
    """Every block by itself, then the rest; with bf16, computed so while shards and their sums are fp32."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


class Clock:
    """Seconds of all steps, and how many of them lie in gradients; the rest is the optimizer's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps = self.gradients = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # two waits a gradient: for the sake of the share that is printed
        return time.perf_counter()


def train(options: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = shard(
        GPT(options.width, options.depth, options.heads, options.length).to(device), device, options.bf16
    )
    base = {"lr": options.lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if options.recipe == "none":
        opt: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), **base)
    else:  # [SAM] the optimizer; `model` lets it have moved weights gathered anew
        recipe = recipes.get(options.recipe, **({} if options.rho is None else {"rho": options.rho}))
        opt = SAM(
            model.parameters(), torch.optim.AdamW, recipe=recipe, model=model, max_grad_norm=1.0, **base
        )
        if rank == 0:
            print(opt.backends())
    begun = load(options.checkpoint, model, opt)
    corpus, clock = text(), Clock(device)
    for step in range(begun, options.steps):
        x, y = (part.to(device) for part in batch(corpus, options, step, rank))

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            start = clock.now()
            loss = F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
            loss.backward()
            clock.gradients += clock.now() - start
            return loss

        start = clock.now()
        if options.recipe == "none":
            opt.zero_grad()
            loss = closure()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        else:
            loss = opt.step(closure)  # [SAM] every gradient the recipe needs, and the update
        if step > begun:  # the first step allocates
            clock.steps += clock.now() - start
        else:
            clock.gradients = 0.0
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            report(loss.detach(), step, begun, options, clock, world)
            save(options.checkpoint, model, opt, step + 1)


def report(
    loss: Tensor, step: int, begun: int, options: argparse.Namespace, clock: Clock, world: int
) -> None:
    dist.all_reduce(loss)
    if dist.get_rank() > 0 or clock.steps == 0:
        return
    tokens = (step - begun) * options.rows * options.length * world
    share = 100 * (1 - clock.gradients / clock.steps)
    print(
        f"step {step + 1:4d}  loss {float(loss) / world:.4f}  {tokens / clock.steps:9.0f} tokens/s  "
        f"optimizer {share:4.1f} % of the time",
        flush=True,
    )


def load(folder: Path | None, model: nn.Module, opt: torch.optim.Optimizer) -> int:
    """The number of steps in the checkpoint, 0 where there is none."""
    if folder is None or not (folder / "steps").exists():
        return 0
    steps = int((folder / "steps").read_text())
    weights, moments = get_state_dict(model, opt)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder / str(steps))
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if dist.get_rank() == 0:
        print(f"goes on after step {steps}", flush=True)
    return steps


def save(folder: Path | None, model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    if folder is None:
        return
    weights, moments = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / str(steps))
    if dist.get_rank() == 0:
        (folder / "steps").write_text(str(steps))  # last, so that it names a whole checkpoint
    dist.barrier()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="sam", choices=["none", *recipes.names()], metavar="NAME")
    parser.add_argument("--rho", type=float, help="radius; the recipe's default")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps from report to report")
    parser.add_argument("--rows", type=int, default=8, help="windows of text per rank")
    parser.add_argument("--length", type=int, default=128, help="bytes in a window")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="compute in bf16")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder; saved at every report, and loaded at the start"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun: torchrun --nproc-per-node 2 -m examples.train_fsdp2")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        train(options, device)
        dist.barrier()  # a rank that leaves first takes the others' connections along
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
