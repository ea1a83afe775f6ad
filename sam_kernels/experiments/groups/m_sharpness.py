"""Section 3 of the review: perturbations for m samples at a time, and a bound on the gradients on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import linear_regression
from typing import Any

from .. import pictures, tables
from ..convergence import bound_trial
from ..data import Split, digits, mnist
from ..experiment import Claim, Experiment, Findings, Row, Settings, Table, Trial
from ..models import mlp
from ..summaries import differences, scores
from ..tables import Difference, mean_and_spread
from ..training import train
from ..verdicts import RULE, judge, together, usable

SEEDS = 5
BATCH = 64
EPOCHS = 40
SIZES = (64, 16, 4, 1)  # m
RHO = 0.05
NOISE = 0.2
BASE = {"lr": 0.1, "momentum": 0.9}
HORIZONS = (100, 300, 1000, 3000, 10000)
PROBLEMS = ("quadratic", "logistic")
COLUMNS = {
    "test accuracy, %": ("test_accuracy", 2),
    "test loss": ("test_loss", 4),
    "training loss": ("train_loss", 4),
    "gap of the losses": ("gap", 4),
}


def arm_of(m: int) -> str:
    return f"sam, m={m}"


ARMS = ("sgd", *map(arm_of, SIZES))


def trials(settings: Settings) -> list[Trial]:
    name = "digits" if settings.data is None else "mnist"
    seeds = 1 if settings.quick else settings.seeds or SEEDS
    sizes = SIZES[:2] if settings.quick else SIZES
    training = {"what": "train", "data": name, "epochs": 2 if settings.quick else EPOCHS, "noise": NOISE}
    horizons = HORIZONS[:2] if settings.quick else HORIZONS
    out = [
        Trial(arm_of(m), seed, {**training, "m": m, "rho": RHO})
        for seed in range(seeds)
        for m in sorted(sizes)  # the longest first
    ]
    out += [Trial("sgd", seed, training) for seed in range(seeds)]
    return out + [
        Trial("sam", seed, {"what": "bound", "problem": problem, "horizons": list(horizons)})
        for seed in range(seeds)
        for problem in PROBLEMS
    ]


def run(trial: Trial, data: Path | None) -> dict[str, Any]:
    options = trial.options
    if options["what"] == "bound":
        return bound_trial(options["problem"], seed=trial.seed, horizons=options["horizons"])
    split = _split(data, options["noise"], trial.seed)
    m = options.get("m")
    return train(
        partial(mlp, [split.x.shape[1], 128, split.classes]),
        split,
        None if m is None else "sam",
        recipe_kwargs=None if m is None else {"rho": options["rho"]},
        m=None if m in (None, BATCH) else m,
        base_kwargs=BASE,
        epochs=options["epochs"],
        batch=BATCH,
        seed=trial.seed,
        curves=False,
    ).row()


def _split(data: Path | None, noise: float, seed: int) -> Split:
    if data is None:
        return digits(noise=noise, seed=seed)
    return mnist(data, train=1000, noise=noise, seed=seed)


def findings(rows: Sequence[Row]) -> Findings:
    trained, bounds = tables.of(rows, what="train"), tables.of(rows, what="bound")
    good = usable(trained)
    pairs = [(arm_of(m), arm_of(BATCH)) for m in SIZES[1:]] + [(arm_of(BATCH), "sgd")]
    return Findings(
        tables=[
            scores("Groups of m samples in batches of 64", trained, ARMS, COLUMNS),
            differences("Differences of runs with the same seed", trained, pairs, COLUMNS),
            _bounds(bounds),
        ],
        claims=[_smaller_is_better(good), _is_bounded(bounds)],
        draw=partial(_draw, good, bounds),
        numbers={
            "training": {
                arm: {name: tables.values(good, name, arm) for name, _ in COLUMNS.values()} for arm in ARMS
            },
            "shares of the bound": {
                problem: [[at["share"] for at in row["numbers"]["at"]] for row in _of(bounds, problem)]
                for problem in PROBLEMS
            },
        },
    )


def slopes(rows: Sequence[Row], name: str) -> Difference:
    """How much a number grows when m is halved, by least squares over all m, seed by seed."""
    found: dict[int, list[tuple[float, float]]] = {}
    for m in SIZES:
        for row in tables.of(rows, arm_of(m)):
            points = found.setdefault(row["seed"], [])
            points.append((math.log2(BATCH / m), tables.value_of(row, name)))
    whole = {seed: points for seed, points in found.items() if len(points) == len(SIZES)}
    return Difference.of(
        tuple(whole), [linear_regression(*zip(*points, strict=True)).slope for points in whole.values()]
    )


def _smaller_is_better(good: list[Row]) -> Claim:
    return together(
        "Smaller m generalizes better.",
        [
            judge(
                "", "Test accuracy for each halving of m", slopes(good, "test_accuracy"), "more", unit=" %"
            ),
            judge("", "Test loss for each halving of m", slopes(good, "test_loss"), "less", digits=4),
        ],
    )


def _of(bounds: Sequence[Row], problem: str) -> list[Row]:
    return tables.of(bounds, problem=problem)


def _above(rows: Sequence[Row], index: int) -> Difference:
    """Mean squared gradient norm less bound, at one of the horizons."""
    found = [row["numbers"]["at"][index] for row in rows]
    return Difference.of([row["seed"] for row in rows], [at["mean"] - at["bound"] for at in found])


def _is_bounded(bounds: Sequence[Row]) -> Claim:
    parts = []
    for problem in PROBLEMS:
        rows = _of(bounds, problem)
        judged = [
            judge("", "", _above(rows, i), "not more")
            for i in range(len(rows[0]["numbers"]["at"]) if rows else 1)
        ]
        whole = together("", judged)
        largest = max((at["share"] for row in rows for at in row["numbers"]["at"]), default=math.nan)
        said = f"at most {largest:.2f} of the bound in any run, of {len(rows)}" if rows else "no runs yet"
        parts.append(replace(whole, measured=f"{problem.capitalize()}: {said}."))
    return together(
        "With a learning rate and a radius that fall as 1/sqrt(t), the mean squared gradient norm is at most "
        "C1/sqrt(T) + C2 log(T)/sqrt(T).",
        parts,
    )


def _bounds(bounds: Sequence[Row]) -> Table:
    lines = []
    for problem in PROBLEMS:
        rows = _of(bounds, problem)
        for index, first in enumerate(rows[0]["numbers"]["at"] if rows else []):
            at = [row["numbers"]["at"][index] for row in rows]
            cells = [tables.cell([one[name] for one in at], 4) for name in ("mean", "bound", "share")]
            lines.append([f"{problem}, T = {first['T']}", *cells])
    return Table(
        "The mean squared gradient norm and its bound",
        ["", "mean squared gradient norm", "bound", "share of the bound"],
        lines,
        "Mean ± standard deviation of the seeds." if lines else "No runs yet.",
    )


def _draw(good: list[Row], bounds: Sequence[Row], path: Path) -> None:
    figure, axes = pictures.figure("m-sharpness, and SAM's bound", columns=3, size=(15, 4.4))
    for place, name, title in (
        (axes[0, 0], "test_accuracy", "test accuracy, %"),
        (axes[0, 1], "test_loss", "test loss"),
    ):
        values = {arm: tables.values(good, name, arm) for arm in ARMS}
        pictures.bars_with_dots(place, values, title, from_zero=False, digits=4)
        names = [arm.removeprefix("sam, ") for arm in ARMS if values[arm]]
        place.set_xticks(range(len(names)), ["SGD" if name == "sgd" else name for name in names])
    place = axes[0, 2]
    for problem, tint in zip(PROBLEMS, pictures.OTHERS, strict=False):
        rows = _of(bounds, problem)
        if rows:
            at = [one["T"] for one in rows[0]["numbers"]["at"]]
            for name, style in (("bound", "--"), ("mean", "-")):
                columns = zip(*([one[name] for one in row["numbers"]["at"]] for row in rows), strict=True)
                means = [mean_and_spread(column)[0] for column in columns]
                what = "bound" if name == "bound" else "measured"
                place.plot(at, means, style, marker="o", markersize=3, color=tint, label=f"{problem}, {what}")
    place.set_xscale("log")
    place.set_yscale("log")
    pictures.titled(place, "mean squared gradient norm", x="steps T")
    if place.has_data():
        place.legend(frameon=False, fontsize=9)
    pictures.save(
        figure, path, "Dots are seeds, lines their means. m = 64 is one perturbation for the batch."
    )


EXPERIMENT = Experiment(
    name="m_sharpness",
    title="m-sharpness: perturbations for m samples at a time; and the bound for SAM",
    protocol=f"""
    SAM in batches of {BATCH} perturbs for every m samples by themselves and takes the mean of the
    gradients, m in {", ".join(map(str, SIZES))}; m = {BATCH} is SAM itself. The document gives neither
    network nor data. Here: 64-128-10 with ReLU, without batch norm, whose statistics would depend on m;
    1000 digits of scikit-learn (with --data 1000 of MNIST); SGD with learning rate {BASE["lr"]:g},
    momentum {BASE["momentum"]:g} and a cosine to zero; {EPOCHS} epochs; rho {RHO:g} for every m, SAM's
    usual default. {100 * NOISE:g} % of the training labels are wrong, other ones for each seed, since on
    clean digits all m do almost alike; the labels of the test set are right, so its loss lies below that
    of the training set.

    The bound is checked where its constants are known: on a quadratic with noise and on a logistic
    regression, both with lr_t = lr_0/sqrt(t) and rho_t = rho_0/sqrt(t), lr_0 = 1/(2 L), rho_0 = 0.1, up
    to {HORIZONS[-1]:,} steps. L is exact or an upper bound; for the variance of the noise and for the
    largest gradient G the largest values of the run stand in, which makes the bound tighter than constants
    that are known beforehand would.

    That smaller m is better agrees if both the test accuracy rises and the test loss falls with every
    halving of m, by least squares over all m. The bound agrees if the 95 % interval of
    the mean of the seeds lies below it at every T. {RULE}
    """,
    source="the review of SAM by Liu, Chen and Shi, sections on m-sharpness and convergence",
    trials=trials,
    run=run,
    findings=findings,
    minutes=4,
)
