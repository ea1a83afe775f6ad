"""What SAM did to a model: every measure of sharpness after SGD and after SAM, on scikit-learn's digits.

    python -m examples.sharpness_report

Both take the same number of steps from the same weights. About a minute on one core.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from examples.digits import load, network
from sam_kernels import SAM
from sam_kernels.sharpness import Estimate, Report, report

BASE = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def train(uses_sam: bool, epochs: int, noise: float) -> Report:
    """Train from the same start, and measure the result."""
    torch.manual_seed(0)
    digits, model = load(noise), network()
    loader = DataLoader(TensorDataset(digits.x, digits.y), batch_size=50, shuffle=True)
    opt = SAM(model.parameters(), SGD, model=model, **BASE) if uses_sam else SGD(model.parameters(), **BASE)
    for _ in range(epochs):
        for x, y in loader:

            def closure(x=x, y=y):
                opt.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                return loss

            opt.step(closure)
    return report(model, cross_entropy, loader, test=[(digits.x_test, digits.y_test)])


def cell(value: Estimate) -> str:
    return f"{float(value):.3g}" + (f" ± {value.error:.1g}" if value.error > 0 else "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--noise", type=float, default=0.0, help="share of training labels that are wrong")
    options = parser.parse_args(arguments)
    plain, sam = (train(uses_sam, options.epochs, options.noise) for uses_sam in (False, True))
    table = Table("measure", "SGD", "SAM", "radius", "meaning")
    for name, row in sam.rows.items():
        radius = "" if row.rho is None else f"{row.rho:g}"
        table.add_row(name.replace("_", " "), cell(plain[name]), cell(row.value), radius, row.meaning)
    Console().print(table)


if __name__ == "__main__":
    main()
