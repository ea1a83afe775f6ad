"""Ranks for tests: processes that join one gloo group on this machine, and run functions by name."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

SECONDS = 90


class Ranks:
    """`world` processes in one gloo group; started at the first call, and again after a failure.

    A call runs a function of a module of this folder on all ranks, and returns what each returned.
    """

    def __init__(self, world: int, module: str) -> None:
        self.world, self.module = world, module
        self.processes: list[Any] = []
        self.ends: list[Any] = []

    def __call__(self, function: str, **arguments: Any) -> list[Any]:
        if not self.processes:
            self._start()
        for end in self.ends:
            end.send((self.module, function, arguments))
        answers: list[Any] = []
        for rank, end in enumerate(self.ends):
            try:
                answers.append(end.recv() if end.poll(SECONDS) else ("no answer", f"in {SECONDS} s"))
            except EOFError:
                answers.append(("died", f"exit code {self.processes[rank].exitcode}"))
        if any(kind != "returned" for kind, _ in answers):
            self.stop()  # the others may wait for ever in a collective
            said = [f"rank {rank} {kind}: {what}" for rank, (kind, what) in enumerate(answers)]
            raise AssertionError("\n".join(line for line in said if "returned" not in line[:20]))
        return [result for _, result in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        meeting = Path(tempfile.mkdtemp()) / "ranks"
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, str(meeting), there), daemon=True
            )
            process.start()
            there.close()
            self.processes.append(process)
            self.ends.append(here)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.ends = [], []


def _serve(rank: int, world: int, meeting: str, end: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    while True:
        try:
            module, function, arguments = end.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(20)
            answer = ("returned", getattr(importlib.import_module(module), function)(**arguments))
        except BaseException:
            answer = ("raised", traceback.format_exc())
        end.send(answer)
