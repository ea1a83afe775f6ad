"""DeepSpeed with ZeRO-2: SAM around the engine, on two CPU processes with gloo between them.

pip install deepspeed scikit-learn
python -m examples.trainers.deepspeed_digits
"""

from __future__ import annotations

import os
import socket

import torch
import torch.multiprocessing
from torch.nn.functional import cross_entropy

from examples.trainers.data import accuracy, digits, network
from sam_kernels.trainers.deepspeed import Driver

RANKS = 2


def work(rank: int, port: int, epochs: int) -> None:
    """Train on every second sample; the engine averages gradients."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS))
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    # On CPUs DeepSpeed would compile collectives of its own first, for a minute or two.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)

    (x, y), test = digits()
    x, y = x[rank::RANKS], y[rank::RANKS]
    model = network()
    config = {
        "train_micro_batch_size_per_gpu": 25,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    base = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=base, config=config)
    driver = Driver(engine, rho=0.05)
    generator = torch.Generator().manual_seed(rank)
    for epoch in range(epochs):
        losses = []
        for batch in torch.randperm(len(y), generator=generator).split(25):
            losses.append(driver.step(lambda batch=batch: cross_entropy(engine(x[batch]), y[batch])))
        if rank == 0:
            print(f"epoch {epoch}: training loss {torch.stack(losses).mean():.4f}", flush=True)
    if rank == 0:
        print(f"test accuracy {accuracy(engine.module, *test):.1f} %", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(epochs: int = 8) -> None:
    """Start the ranks, and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, epochs), nprocs=RANKS)


if __name__ == "__main__":
    main()
