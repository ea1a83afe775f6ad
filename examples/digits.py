"""Train one small network three ways on handwritten digits, and look at where each arrives.

    python -m examples.digits            about a minute: table, picture, step throughput
    python -m examples.digits --quick    a few seconds, to see that everything runs
    python -m examples.digits --noise 0.2    a fifth of the training labels is wrong

The base optimizer (SGD with momentum), SAM and ASAM get the same number of gradients: a SAM step
takes two, so the base optimizer trains for twice as many epochs. Radii are the recipes' published
defaults; nothing here was chosen by its test accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import sam_kernels
from sam_kernels import SAM, recipes

BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
BATCH = 50
TRAIN = 1000
CLASSES = 10
RADIUS = recipes.sam().rho  # of the sharpness all three are measured with


# ---- what is compared ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    name: str
    optimizer: Callable[[nn.Module], Optimizer]
    gradients: int  # per step
    color: str
    says: str


METHODS = (
    Method("SGD", lambda model: SGD(model.parameters(), **BASE), 1, "#7f7f7f", "momentum 0.9"),
    Method(
        "SAM",
        lambda model: SAM(model.parameters(), SGD, model=model, **BASE),
        2,
        "#1f77b4",
        f"rho {recipes.sam().rho}",
    ),
    Method(
        "ASAM",
        lambda model: SAM(model.named_parameters(), SGD, recipe="asam", model=model, **BASE),
        2,
        "#d95f02",
        f"rho {recipes.asam().rho}, eta {recipes.asam().metric.eta}",
    ),
)


def network() -> nn.Module:
    """Three convolutions with batch norm for 8 x 8 pixels; 26 thousand weights."""

    def block(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *block(1, 16, 1),
        *block(16, 32, 2),
        *block(32, 64, 2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, CLASSES),
    )


@dataclass(frozen=True)
class Digits:
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load(noise: float = 0.0) -> Digits:
    """scikit-learn's 1,797 digits, 1,000 to train; the split and the wrong labels are always the same."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32) / 16
    y = torch.tensor(bunch.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:TRAIN], order[TRAIN:]
    labels = y[train]
    wrong = torch.rand(TRAIN, generator=generator) < noise
    shifted = (labels + torch.randint(1, CLASSES, (TRAIN,), generator=generator)) % CLASSES
    return Digits(x[train], torch.where(wrong, shifted, labels), x[test], y[test])


# ---- training and measuring ------------------------------------------------------------------------


@dataclass
class Run:
    """One method, one seed; accuracies in percent."""

    method: str
    seed: int
    gradients: list[int] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    train_accuracy: float = 0.0
    train_loss: float = 0.0
    sharpness: float = 0.0
    step_ms: float = 0.0

    @property
    def gap(self) -> float:
        return self.test_loss[-1] - self.train_loss

    @property
    def accuracy_gap(self) -> float:
        return self.train_accuracy - self.test_accuracy[-1]


def train(method: Method, seed: int, epochs: int, data: Digits, tick: Callable[[int], None]) -> Run:
    """Train and measure; `tick` is told of gradients spent."""
    torch.manual_seed(seed)
    model = network()
    opt = method.optimizer(model)
    shuffle = torch.Generator().manual_seed(seed)
    epochs = epochs * 2 // method.gradients
    scheduler = CosineAnnealingLR(opt, epochs * TRAIN // BATCH)
    run = Run(method.name, seed)
    seconds = []
    for _ in range(epochs):
        model.train()
        start = time.perf_counter()
        batches = torch.randperm(TRAIN, generator=shuffle).split(BATCH)
        for batch in batches:

            def closure(x: Tensor = data.x[batch], y: Tensor = data.y[batch]) -> Tensor:
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            opt.step(closure)
            scheduler.step()
        seconds.append((time.perf_counter() - start) / len(batches))
        spent = len(batches) * method.gradients
        run.gradients.append(spent + (run.gradients[-1] if run.gradients else 0))
        accuracy, loss = score(model, data.x_test, data.y_test)
        run.test_accuracy.append(accuracy)
        run.test_loss.append(loss)
        tick(spent)
    run.train_accuracy, run.train_loss = score(model, data.x, data.y)
    run.sharpness = sharpness(model, data.x, data.y, RADIUS)
    run.step_ms = statistics.median(seconds) * 1e3
    return run


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent and mean loss, in eval mode."""
    model.eval()
    logits = model(x)
    return 100 * (logits.argmax(1) == y).float().mean().item(), F.cross_entropy(logits, y).item()


def sharpness(model: nn.Module, x: Tensor, y: Tensor, rho: float) -> float:
    """``L(w + rho g / ||g||) - L(w)`` on all of x, in eval mode; the weights return bit for bit.

    It grows with the loss: compare models that fit their data equally well.
    """
    model.eval()
    opt = SAM(model.parameters(), SGD, rho=rho, lr=0.0)
    opt.zero_grad()
    here = F.cross_entropy(model(x), y)
    here.backward()
    with opt.perturbed(), torch.no_grad():
        there = F.cross_entropy(model(x), y)
    return (there - here).item()


def train_all(seeds: int, epochs: int, data: Digits, console: Console) -> Iterator[Run]:
    """All runs, seed by seed, so that an interrupted demo has compared like with like."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("gradients"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        total = seeds * len(METHODS) * 2 * epochs * (TRAIN // BATCH)
        task = progress.add_task("", total=total)
        for seed in range(seeds):
            for method in METHODS:
                progress.update(task, description=f"{method.name}, seed {seed}")
                yield train(method, seed, epochs, data, lambda n: progress.advance(task, n))


# ---- what is shown ---------------------------------------------------------------------------------


def of(runs: list[Run], method: Method) -> list[Run]:
    return [run for run in runs if run.method == method.name]


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def table(runs: list[Run]) -> Table:
    """One column per method: mean and standard deviation over the seeds."""
    shown = [method for method in METHODS if of(runs, method)]

    def row(name: str, value: Callable[[Run], float], digits: int) -> None:
        cells = [mean_and_spread([value(run) for run in of(runs, method)]) for method in shown]
        out.add_row(name, *(f"{mean:.{digits}f}{_plus_minus(spread, digits)}" for mean, spread in cells))

    out = Table(title="Handwritten digits, 1,000 to train and 797 to test", title_justify="left")
    out.add_column("")
    for method in shown:
        out.add_column(method.name, justify="right")
    out.add_row("epochs", *(str(len(of(runs, method)[0].gradients)) for method in shown))
    row("training accuracy, %", lambda run: run.train_accuracy, 2)
    row("test accuracy, %", lambda run: run.test_accuracy[-1], 2)
    row("accuracy gap, points", lambda run: run.accuracy_gap, 2)
    row("training loss", lambda run: run.train_loss, 4)
    row("loss gap", lambda run: run.gap, 4)
    row("sharpness, 1e-3", lambda run: 1e3 * run.sharpness, 3)
    row("step, ms", lambda run: run.step_ms, 2)
    ratios = [[run.step_ms / base.step_ms for run, base in pairs(runs, method)] for method in shown]
    out.add_row(
        f"step / {METHODS[0].name} step", *(f"{statistics.median(r):.2f}" if r else "" for r in ratios)
    )
    return out


def _plus_minus(spread: float, digits: int) -> str:
    return "" if math.isnan(spread) else f" ± {spread:.{digits}f}"


def pairs(runs: list[Run], method: Method) -> list[tuple[Run, Run]]:
    """Runs of a method, each with the base optimizer's of the same seed."""
    base = {run.seed: run for run in of(runs, METHODS[0])}
    return [(run, base[run.seed]) for run in of(runs, method) if run.seed in base]


def sentences(runs: list[Run]) -> list[str]:
    """What the numbers say, computed: paired by seed against the base optimizer."""
    out = []
    for method in METHODS[1:]:
        paired = pairs(runs, method)
        if not paired:
            continue
        ratio = sum(run.sharpness for run, _ in paired) / sum(base.sharpness for _, base in paired)
        gains = [run.test_accuracy[-1] - base.test_accuracy[-1] for run, base in paired]
        mean, spread = mean_and_spread(gains)
        sentence = (
            f"{method.name}: {ratio:.2f} times the sharpness of {METHODS[0].name}; test accuracy {mean:+.2f}"
        )
        if len(gains) > 1:
            error = spread / len(gains) ** 0.5
            size = "more" if abs(mean) > 2 * error else "not more"
            sentence += f", {size} than two standard errors ({error:.2f} each, {len(gains)} seeds in pairs)"
        out.append(f"{sentence}.")
    return out


def picture(runs: list[Run], path: Path, title: str) -> None:
    """Learning curves above; gap, sharpness and step time as bars with one dot per seed below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "xtick.color": "#444444",
        "ytick.color": "#444444",
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(11, 7.4), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13)
        grid = figure.add_gridspec(2, 6, height_ratios=(1.15, 1))
        _curves(figure.add_subplot(grid[0, :3]), runs, "test_accuracy", "Test accuracy, percent")
        _curves(figure.add_subplot(grid[0, 3:]), runs, "test_loss", "Test loss")
        figure.axes[0].legend(frameon=False, loc="lower right")
        _bars(figure.add_subplot(grid[1, :2]), runs, lambda run: run.gap, "Test loss − training loss")
        _bars(
            figure.add_subplot(grid[1, 2:4]),
            runs,
            lambda run: 1e3 * run.sharpness,
            f"Sharpness at ρ = {RADIUS}, thousandths",
        )
        _bars(figure.add_subplot(grid[1, 4:]), runs, lambda run: run.step_ms, "Step time, ms")
        figure.text(
            0.01,
            -0.005,
            "Lines and bars: mean; bands: lowest to highest seed; dots: seeds. "
            "Sharpness: L(w + ρ g/‖g‖) − L(w) on the training set, in eval mode.",
            color="#666666",
            va="top",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.15)
        plt.close(figure)


def _curves(axes: Any, runs: list[Run], name: str, title: str) -> None:
    settled = []
    for method in METHODS:
        mine = of(runs, method)
        if not mine:
            continue
        curves = torch.tensor([getattr(run, name) for run in mine])
        middle, low, high = curves.mean(0), curves.amin(0), curves.amax(0)
        axes.plot(mine[0].gradients, middle, color=method.color, label=f"{method.name}  ({method.says})")
        axes.fill_between(mine[0].gradients, low, high, color=method.color, alpha=0.15, linewidth=0)
        settled += [low[len(low) // 4 :], high[len(high) // 4 :]]
    # The first quarter of training would flatten everything that matters into one line.
    seen = torch.cat(settled)
    margin = 0.15 * (seen.max() - seen.min()).item()
    axes.set_ylim(seen.min().item() - margin, seen.max().item() + margin)
    axes.set_title(title)
    axes.set_xlabel("gradients computed")
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)


def _bars(axes: Any, runs: list[Run], value: Callable[[Run], float], title: str) -> None:
    shown = [method for method in METHODS if of(runs, method)]
    for position, method in enumerate(shown):
        values = [value(run) for run in of(runs, method)]
        mean = statistics.mean(values)
        axes.bar(position, mean, 0.6, color=method.color, alpha=0.55)
        offsets = [position + 0.3 * ((i + 0.5) / len(values) - 0.5) for i in range(len(values))]
        axes.plot(offsets, values, "o", color=method.color, markersize=4, markeredgecolor="white")
        axes.annotate(
            f"{mean:.3g}",
            (position, max(values)),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            color=method.color,
            fontweight="bold",
        )
    axes.set_xticks(range(len(shown)), [method.name for method in shown])
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.15)
    axes.set_title(title)


def record(runs: list[Run], path: Path, arguments: argparse.Namespace, seconds: float) -> None:
    """Everything measured, with what it was measured on."""
    made_with = {
        "sam_kernels": sam_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
    }
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    content = {"asked": asked, "made_with": made_with, "base": BASE, "runs": [asdict(run) for run in runs]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


# ---- step throughput -------------------------------------------------------------------------------

CONTENDERS = ("base_alone", "eager_default", "po_foreach", "foreach", "ours_foreach", "ours_native")
REFERENCE = "eager_default"


def throughput(console: Console, quick: bool) -> Table:
    """Steps per second on the weights of a ResNet-50, gradients already there: `bench` in small.

    Raises:
        ImportError: if `bench`, which lies beside this folder in the repository, is not there.
    """
    from bench.cases import BASES, CASES, Workspace
    from bench.peers import SPECS, Unavailable
    from bench.timing import Effort, interleave

    base, effort = BASES["sgd"], Effort(warmup=1, fewest=5, most=40, seconds=1 if quick else 8)
    # Cut to this many elements a tensor, a quick look shows the cost of the calls and none of the memory.
    workspace = Workspace(CASES["resnet50"].shapes(1000 if quick else None), torch.float32, base)
    contestants = {}
    for key in CONTENDERS:
        try:
            peer = SPECS[key].make(workspace.parameters(), base, workspace.slots)
        except Unavailable as reason:
            console.print(f"{SPECS[key].label}: {reason}", style="dim", highlight=False)
        else:
            contestants[key] = _timed_step(peer)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("steps", total=None)
        samples = interleave(
            contestants, effort, lambda done, total: progress.update(task, completed=done, total=total)
        )
    seconds = {key: parts["step"] for key, parts in samples.items()}

    size = "each cut to 1,000 elements" if quick else f"{workspace.numel / 1e6:.1f} million weights"
    out = Table(
        title=f"SAM around SGD momentum, ResNet-50's {len(workspace.first)} tensors, {size}",
        title_justify="left",
        caption=f"{len(seconds[REFERENCE])} interleaved rounds; x eager: median of their ratios",
        caption_justify="left",
    )
    out.add_column("")
    for name in ("ms", "20 to 80 %", "steps/s", "x eager"):
        out.add_column(name, justify="right")
    for key, times in seconds.items():
        low, middle, high = (1e3 * quantile for quantile in _quantiles(times))
        # Rounds are slow together on a busy machine, so each is compared with itself.
        faster = statistics.median(a / b for a, b in zip(seconds[REFERENCE], times, strict=True))
        digits = 0 if middle >= 100 else 2
        spread = f"{low:.{digits}f} to {high:.{digits}f}"
        out.add_row(SPECS[key].label, f"{middle:.{digits}f}", spread, f"{1e3 / middle:.1f}", f"{faster:.2f}")
    return out


def warn_of_neighbours(console: Console) -> None:
    """Say so when other programs keep the cores busy: times then say little."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores + 1:
        console.print(
            f"The machine is busy (load {load:.1f} on {cores} cores): take all times here with caution.",
            style="yellow",
            highlight=False,
        )


def _timed_step(peer: Any) -> Callable[[], dict[str, float]]:
    def step() -> dict[str, float]:
        start = time.perf_counter()
        peer.step_phase1()
        peer.step_phase2()
        return {"step": time.perf_counter() - start}

    return step


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return low.item(), middle.item(), high.item()


# ---- the program -----------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits", description="SGD, SAM and ASAM on handwritten digits."
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method (default %(default)s)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=20,
        help="of SAM; the base optimizer gets twice as many (default %(default)s)",
    )
    parser.add_argument("--noise", type=float, default=0.0, help="share of wrong training labels (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for digits.png and digits.json"
    )
    parser.add_argument("--quick", action="store_true", help="1 seed, 2 epochs, a short throughput table")
    parser.add_argument("--no-bench", action="store_true", help="leave out the step throughput")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.seeds, chosen.epochs = 1, 2
    if chosen.seeds < 1 or chosen.epochs < 1:
        parser.error("--seeds and --epochs are at least 1")
    if not 0 <= chosen.noise < 1:
        parser.error("--noise is a share, from 0 to below 1")
    return chosen


def show(runs: list[Run], asked: argparse.Namespace, seconds: float, console: Console) -> None:
    seeds = max(run.seed for run in runs) + 1
    console.print(table(runs))
    noise = f", {asked.noise:.0%} of the training labels wrong" if asked.noise else ""
    console.print(
        (f"Mean ± standard deviation over {seeds} seeds{noise}. " if seeds > 1 else f"One seed{noise}. ")
        + "; ".join(f"{method.name} {method.says}" for method in METHODS)
        + f"; batch {BATCH}, lr {BASE['lr']} falling to 0, weight decay {BASE['weight_decay']}. Gaps: "
        "training minus test accuracy, test minus training loss. Sharpness: by how much the training loss "
        f"rises at w + rho g/||g||, rho {RADIUS} for all. {seconds:.0f} s.",
        style="dim",
        highlight=False,
    )
    for sentence in sentences(runs):
        console.print(sentence, highlight=False)
    warn_of_neighbours(console)
    png, numbers = asked.out / "digits.png", asked.out / "digits.json"
    plural = f"{seeds} seeds" if seeds > 1 else "one seed"
    picture(runs, png, f"Handwritten digits, the same number of gradients for each method, {plural}{noise}")
    record(runs, numbers, asked, seconds)
    console.print(f"Picture: {png.resolve()}\nNumbers: {numbers.resolve()}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    asked = parse(arguments)
    console = Console()
    data = load(asked.noise)
    start = time.perf_counter()
    runs: list[Run] = []
    threads = torch.get_num_threads()
    # The network is so small that waiting for a second thread on a busy machine costs more than it does.
    torch.set_num_threads(1)
    try:
        for run in train_all(asked.seeds, asked.epochs, data, console):
            runs.append(run)
    except KeyboardInterrupt:
        console.print(f"Interrupted after {len(runs)} of {asked.seeds * len(METHODS)} runs.")
        if runs:
            show(runs, asked, time.perf_counter() - start, console)
        return 130
    finally:
        torch.set_num_threads(threads)
    show(runs, asked, time.perf_counter() - start, console)
    if asked.no_bench:
        return 0
    console.print()
    try:
        console.print(throughput(console, asked.quick))
        warn_of_neighbours(console)
        console.print("More lists, base optimizers and passes: python -m bench", highlight=False)
    except ImportError as error:
        console.print(f"No step throughput: {error}. Run this from the root of the repository.")
    except KeyboardInterrupt:
        console.print("Interrupted while timing.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
