"""Log what SAM's steps tell of themselves, to a CSV file and to TensorBoard, without waiting in any of them.

    python -m examples.log_metrics                      a few seconds; results/metrics.csv
    python -m examples.log_metrics --tensorboard DIR    also events for `tensorboard --logdir DIR`

`opt.metrics` holds tensors on the device. Reading one in every step would make the host wait for the device
each time; so they are kept for a while, and then read all at once.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels import SAM

Writer = Callable[[int, dict[str, float]], None]
NAMES = ("loss", "loss_gap", "grad_norm", "perturbation_norm")


class Log:
    """Keeps the metrics of steps, and hands them to its writers every so many, in one copy to the host."""

    def __init__(self, writers: list[Writer], every: int = 50) -> None:
        self.writers, self.every = writers, every
        self.kept: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, metrics: dict[str, Tensor]) -> None:
        self.kept.append((step, metrics))
        if len(self.kept) == self.every:
            self.flush()

    def flush(self) -> None:
        """Read what was kept; call it at the end, too."""
        if not self.kept:
            return
        numbers = iter(torch.stack([v.double() for _, own in self.kept for v in own.values()]).tolist())
        for step, own in self.kept:
            row = {name: next(numbers) for name in own}
            for write in self.writers:
                write(step, row)
        self.kept.clear()


def to_csv(file: TextIO) -> Writer:
    table = csv.DictWriter(file, ["step", *NAMES])
    table.writeheader()

    def write(step: int, row: dict[str, float]) -> None:
        table.writerow({"step": step, **row})

    return write


def to_tensorboard(board: Any) -> Writer:
    def write(step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            board.add_scalar(f"sam/{name}", value, step)

    return write


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)


def train(log: Log, steps: int) -> None:
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    for step in range(steps):
        rows = torch.randint(len(x), (64,))

        def closure(rows: Tensor = rows) -> Tensor:
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            return loss

        opt.step(closure)
        log.add(step, opt.metrics)
    log.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.log_metrics", description="Log SAM's metrics.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--csv", type=Path, default=Path("results/metrics.csv"))
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="needs `pip install tensorboard`")
    chosen = parser.parse_args(arguments)
    chosen.csv.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        writers = [to_csv(stack.enter_context(chosen.csv.open("w", newline="")))]
        if chosen.tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            writers.append(to_tensorboard(stack.enter_context(SummaryWriter(str(chosen.tensorboard)))))
        train(Log(writers), chosen.steps)
    print(f"{chosen.steps} steps: {chosen.csv.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
