"""Two processes with gloo between them."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

RANKS = 2


def _work(rank: int, function: Callable[..., Any], port: int, folder: str, args: tuple[Any, ...]) -> None:
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    os.environ.update(names, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    try:
        result = function(rank, *args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")
    if torch.distributed.is_initialized() and not isinstance(result, str):
        torch.distributed.destroy_process_group()


def on_two(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Return what a function of a module returns on rank 0 and on rank 1; a traceback fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(rank, function, port, str(folder), args)) for rank in range(RANKS)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(120)
            assert worker.exitcode == 0, f"a rank ended with {worker.exitcode}"
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    for rank, result in enumerate(results):
        assert not isinstance(result, str), f"rank {rank}:\n{result}"
    return results
