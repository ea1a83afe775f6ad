"""Section 7: every recipe with wrong labels, what it costs and what it brings; p-norm balls; families."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import nn

from .... import recipes
from ....sharpness import eigenvalues, one_step
from ... import data as sets
from ...data import Split, shifted
from ...experiment import Experiment, Findings, Row, Settings, Trial
from ...models import count, seeded
from ...training import steps, train
from ...verdicts import RULE
from . import step_times
from .findings import findings as findings_of

NOISES = (0.0, 0.2, 0.4, 0.6, 0.8)
BALLS_AT = 0.4
EPOCHS = 40
BATCH = 50
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
RHO = 0.05
HIDDEN, TIMED_HIDDEN = (128, 64), (512, 512)
TIMED_BATCH = 128


@dataclass(frozen=True)
class Arm:
    """A recipe as it is run here, None for the base alone.

    Args:
        kwargs: other than its defaults.
        keep: share of the samples it steps on, where it chooses.
        times: how many times the epochs.
        decays: False for a base without weight decay.
    """

    recipe: str | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    keep: float | None = None
    times: int = 1
    decays: bool = True


def _published(name: str) -> Arm:
    kwargs: dict[str, Any] = {"ae_sam": {"steps": EPOCHS * 1000 // BATCH}}.get(name, {})
    return Arm(name, kwargs, {"k_sam": 0.5, "esam": 0.5}.get(name))


ARMS: dict[str, Arm] = {
    "sgd": Arm(None),
    "sgd, twice the epochs": Arm(None, times=2),
    **{name: _published(name) for name in recipes.names()},
    "sam, every=5": Arm("sam", {"every": 5}),
}
BALLS: dict[str, Arm] = {
    "sam, p=1": Arm("sam", {"p": 1}),
    "sam, p=inf": Arm("sam", {"p": math.inf}),
    "sam, L2 inside": Arm("sam", {"decay": "inside"}),
    "sam, no L2": Arm("sam", decays=False),
    "sgd, no L2": Arm(None, decays=False),
}
TIMES = "step times"
VARYING = ("ae_sam", "rst")  # which steps perturb is up to the gradients, or to chance


def protocol() -> str:
    """What is run, in plain words."""
    size, timed = (count(seeded(partial(network, 64, hidden), 0)) for hidden in (HIDDEN, TIMED_HIDDEN))
    return f"""
Every recipe, with its published defaults around SGD with momentum 0.9, learning rate {SGD["lr"]} with a
cosine to 0, weight decay {SGD["weight_decay"]} and batches of {BATCH}, for {EPOCHS} epochs; SGD alone as
long, and once more twice as long, with as many gradients as SAM. Digits of scikit-learn, 1000 to train and
797 to test; 0, 20, 40, 60 or 80 % of the training labels are flipped to another class. A seed decides
which, the first weights and the batches, and all recipes share it. The network has {size:,} parameters:
64-{HIDDEN[0]}-{HIDDEN[1]}-10 with layer norm and ReLU, since NoSAM needs normalization layers and layer
norm has no statistics of a batch.

What is no default: AE-SAM is told how many steps there are; K-SAM keeps the half of the batch with the
largest losses and ESAM the half whose loss rises most. No recipe was tuned; network, epochs and learning
rate were set once, by a look at SGD and SAM. A radius that was published for
ResNets on CIFAR may suit this network better in one recipe than in another, so the order of the recipes is
of these defaults on these data, no more. LookSAM falls to chance in some of these
runs: its published share of 0.7 goes badly with this learning rate and momentum. At 20 % wrong labels, the
one place where that was looked into afterwards, it learned with a share of 0.2, and without momentum.

Test accuracy is that after the last epoch. The gap is training accuracy, by the labels trained on, less
test accuracy. Sharpness is one step of length {RHO} along the gradient over all training samples, and the
top eigenvalue is that of the Hessian of their mean loss; both are compared without wrong labels only, where
nearly all recipes fit the data.

Step times are measured with nothing beside them, on one thread, on a larger network (64-{TIMED_HIDDEN[0]}-
{TIMED_HIDDEN[1]}-10, {timed:,} parameters, batches of {TIMED_BATCH}) where gradients cost more than the
calls around them: {step_times.ROUNDS} blocks of {step_times.BLOCK} steps beside blocks of torch's SGD in
turn, median of the ratios. AE-SAM and RST perturb in more steps of one block than of another, so a median
would not be their mean cost: theirs is the time of all blocks divided by that of SGD's beside them. In the
first block, which is not counted, SSAM-F makes its mask. Other networks and machines have other ratios.

Balls: with {BALLS_AT:.0%} wrong labels SAM also runs with p = 1 and p = inf, with the radius that gives
their perturbation the same Euclidean length of {RHO} ({RHO} and {RHO} / sqrt(number of weights), of which
those without a gradient stay); with the L2 term in the loss that is perturbed, in place of outside the
maximum where the article has it; and without an L2 term.

The article names no data, networks or numbers for its claims. With --data, where that folder has MNIST, its
images take the place of the digits: 1000 to train, 10,000 to test.
"""


def network(inputs: int, hidden: tuple[int, int] = HIDDEN) -> nn.Sequential:
    """Two hidden layers, each with layer norm and ReLU; ten classes."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.LayerNorm(size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def trials(settings: Settings) -> list[Trial]:
    """Seed by seed, so that what is there compares like with like; step times last."""
    more: dict[str, Any] = {"quick": True} if settings.quick else {}
    if settings.data is not None and shifted.is_there("rotated", settings.data):
        more["original"] = True
    seeds = settings.seeds or (1 if settings.quick else 3)
    noises = (0.0, BALLS_AT) if settings.quick else NOISES
    found = [
        Trial(arm, seed, {"noise": noise, **more})
        for seed in range(seeds)
        for noise in noises
        for arm in (*ARMS, *(BALLS if noise == BALLS_AT else ()))
    ]
    return [*found, Trial(TIMES, 0, more, alone=True)]


def _split(trial: Trial, data: Path | None, noise: float) -> Split:
    if trial.options.get("original"):
        if data is None:
            raise ValueError(f"{trial.arm}: this trial is of MNIST; give --data, the folder where it is")
        return sets.mnist(data, 1000, noise, trial.seed)
    return sets.digits(1000, noise, trial.seed)


def run(trial: Trial, data: Path | None) -> dict[str, Any]:
    """Train one arm and measure it; or time all of them."""
    is_quick = bool(trial.options.get("quick"))
    if trial.arm == TIMES:
        return time_all(
            _split(trial, data, 0.0), *((1, 1) if is_quick else (step_times.ROUNDS, step_times.BLOCK))
        )
    noise = trial.options["noise"]
    split = _split(trial, data, noise)
    arm = {**ARMS, **BALLS}[trial.arm]
    build = partial(network, split.x.shape[1])
    trained = train(
        build,
        split,
        arm.recipe,
        recipe_kwargs=_kwargs(arm, count(seeded(build, 0))),
        keep=arm.keep,
        base_kwargs=SGD if arm.decays else {**SGD, "weight_decay": 0.0},
        epochs=(2 if is_quick else EPOCHS) * arm.times,
        batch=BATCH,
        seed=trial.seed,
        curves=False,
    )
    row = {key: value for key, value in trained.row().items() if key != "curves"}
    row["gradients_per_step"] = trained.gradients / trained.steps
    if trained.diverged:
        return row
    batches = [(split.x, split.y)]
    row["sharpness"] = float(one_step(trained.model, F.cross_entropy, batches, RHO))
    if not noise:
        samples = 100 if is_quick else None
        found = eigenvalues(trained.model, F.cross_entropy, batches, tol=0.01, samples=samples)
        row["eigenvalue"] = found.values[0]
    return row


def _kwargs(arm: Arm, weights: int) -> dict[str, Any]:
    """The recipe's arguments, with the radius that gives any ball's perturbation the same length."""
    if arm.kwargs.get("p") == math.inf:
        return {**arm.kwargs, "rho": RHO / math.sqrt(weights)}
    return dict(arm.kwargs)


def time_all(split: Split, rounds: int, block: int) -> dict[str, Any]:
    """Step times of all recipes beside the base's, see `step_times.beside`."""

    taken = {"steps": (rounds + 1) * block}  # AE-SAM's part of all steps, in short

    def stepping(arm: Arm) -> Callable[[], Iterator[float]]:
        model = seeded(lambda: network(split.x.shape[1], TIMED_HIDDEN), 0)
        kwargs = taken if "steps" in arm.kwargs else arm.kwargs
        keywords: dict[str, Any] = {"recipe_kwargs": kwargs, "base_kwargs": SGD, "keep": arm.keep}
        return lambda: steps(model, split, arm.recipe, batch=TIMED_BATCH, **keywords)

    others = {name: stepping(arm) for name, arm in ARMS.items() if arm.times == 1}
    return {"times": step_times.beside(stepping(ARMS["sgd"]), others, rounds, block=block, varying=VARYING)}


def findings(rows: list[Row]) -> Findings:
    """The table to choose by, accuracies by noise, families, balls, and claims."""
    return findings_of(rows, list(ARMS), list(BALLS), NOISES, BALLS_AT, TIMES)


EXPERIMENT = Experiment(
    name="cost_benefit",
    title="All recipes with wrong labels: what they cost and what they bring",
    protocol=protocol().strip() + "\n\n" + RULE,
    source="the encyclopedia article on sharpness-aware minimization, and the recipes' papers",
    trials=trials,
    run=run,
    findings=findings,
    minutes=12,
)
