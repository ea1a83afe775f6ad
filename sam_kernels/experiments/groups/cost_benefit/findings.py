"""What recipes cost and what they bring: tables to choose by, with claims and pictures beside."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ... import pictures, tables
from ...experiment import Findings, Row, Table
from ...summaries import scores
from ...verdicts import missing, usable
from .claims import FAMILIES, LONGER, SAM, SGD, Times, claims
from .pictures import draw


def findings(
    rows: list[Row], arms: list[str], balls: list[str], noises: Sequence[float], balls_at: float, timed: str
) -> Findings:
    """Of rows that may be some of all.

    Args:
        rows: trainings, with options "noise", and one of the arm `timed` whose numbers are step times.
        arms, balls: names of the trainings.
        noises: shares of wrong labels.
        balls_at: that of the balls.
        timed: see rows.
    """
    times: Times = next((row["numbers"]["times"] for row in rows if row["arm"] == timed), {})
    trainings = [row for row in rows if row["arm"] != timed]
    good = usable(trainings)
    seen = [noise for noise in noises if any(row["options"]["noise"] == noise for row in good)]
    means = over_noise(good, arms, seen)
    accuracies = {arm: statistics.fmean(found) for arm in arms if (found := tables.values(means, "all", arm))}
    gains = {arm: tables.paired(means, "wrong", arm, SGD) for arm in arms if arm in accuracies and arm != SGD}
    costs = {arm: _cost(arm, times) for arm in arms}
    points = {arm: (costs[arm], accuracies[arm]) for arm in accuracies if costs[arm] is not None}
    chosen = front(points, _spread(times), lambda b, a: tables.paired(means, "all", b, a))
    numbers = {
        "step times": {arm: dict(found) for arm, found in times.items()},
        "accuracy over all noise": accuracies,
        "gain over sgd with wrong labels": {arm: [gain.mean, gain.error] for arm, gain in gains.items()},
        "front": chosen,
    }
    return Findings(
        [
            _to_choose_by(trainings, means, arms, costs, accuracies, chosen, times),
            _by_noise(trainings, arms, accuracies, seen),
            _families(means, times),
            _balls(trainings, [SAM, SGD, *balls], balls_at),
        ],
        claims(good, times, [noise for noise in noises if noise]),
        partial(draw, good, arms, costs, accuracies, chosen, seen),
        numbers,
    )


def over_noise(rows: Sequence[Row], arms: Sequence[str], noises: Sequence[float]) -> list[Row]:
    """A row for each arm and seed that has run at all these shares of wrong labels, with mean accuracies.

    Its numbers: "all", over all shares; "wrong", over those above 0, or of none.
    """
    found: list[Row] = []
    for arm in arms:
        mine = tables.of(rows, arm)
        for seed in sorted({row["seed"] for row in mine}):
            at = {
                r["options"]["noise"]: float(r["numbers"]["test_accuracy"]) for r in mine if r["seed"] == seed
            }
            if noises and all(noise in at for noise in noises):
                wrong = [at[noise] for noise in noises if noise] or [math.nan]
                numbers = {
                    "all": statistics.fmean(at[noise] for noise in noises),
                    "wrong": statistics.fmean(wrong),
                }
                found.append({"arm": arm, "seed": seed, "options": {}, "numbers": numbers})
    return found


def front(
    points: Mapping[str, tuple[float | None, float]],
    spread: float = 0.0,
    gain: Callable[[str, str], tables.Difference] | None = None,
) -> list[str]:
    """The names that nothing beats clearly.

    One beats another if it takes clearly less time and its gain is at least as large, or if its gain is
    clearly larger and it does not take clearly more time.

    Args:
        points: (cost, gain) by name.
        spread: share by which costs must differ to be told apart.
        gain: what one has more than the other, by both names, in pairs; without any, the two are not
            compared. Default: the difference of the points, every one of which is clear.

    Example:
        >>> front({"sgd": (1.0, 90.0), "sam": (2.0, 92.0), "dear": (3.0, 91.0)})
        ['sgd', 'sam']
    """
    at = {name: (cost, found) for name, (cost, found) in points.items() if cost is not None}

    def beats(b: str, a: str) -> bool:
        (cost_b, gain_b), (cost_a, gain_a) = at[b], at[a]
        is_cheaper, is_dearer = cost_b * (1 + spread) < cost_a, cost_a * (1 + spread) < cost_b
        if gain is None:
            more, is_clear = gain_b - gain_a, gain_b != gain_a
        else:
            found = gain(b, a)
            more, is_clear = found.mean, found.is_clear
        return (is_cheaper and more >= 0) or (is_clear and more > 0 and not is_dearer)

    return [a for a in at if not any(beats(b, a) for b in at if b != a)]


def _spread(times: Times) -> float:
    """How far the quartiles of SGD beside itself are apart, as a share of its time; 0 where unknown."""
    if SGD not in times:
        return 0.0
    found = (times[SGD]["high"] - times[SGD]["low"]) / times[SGD]["ratio"]
    return found if math.isfinite(found) else 0.0


def _cost(arm: str, times: Times) -> float | None:
    """Time of a training as a multiple of the base's: of a step, or twice as many of the base."""
    if arm in (SGD, LONGER):
        return {SGD: 1.0, LONGER: 2.0}[arm] if times else None
    return times[arm]["ratio"] if arm in times else None


def _sorted(arms: Sequence[str], accuracies: Mapping[str, float]) -> list[str]:
    return sorted(arms, key=lambda arm: -accuracies.get(arm, -math.inf))


def _to_choose_by(
    rows: list[Row],
    means: list[Row],
    arms: list[str],
    costs: Mapping[str, float | None],
    accuracies: Mapping[str, float],
    chosen: Sequence[str],
    times: Times,
) -> Table:
    good = usable(rows)
    lines = []
    for arm in _sorted(arms, accuracies):

        def mean(name: str, digits: int, noise: float, scale: float = 1.0, arm: str = arm) -> str:
            found = tables.values(good, name, arm, noise=noise)
            return f"{scale * statistics.fmean(found):.{digits}f}" if found else "–"

        gradients = tables.values(good, "gradients_per_step", arm)
        lines.append(
            [
                pictures.label(arm) + (" *" if arm in chosen else ""),
                tables.cell(tables.values(means, "all", arm), 1),
                mean("test_accuracy", 1, 0.0),
                mean("test_accuracy", 1, 0.4),
                mean("accuracy_gap", 1, 0.0),
                mean("sharpness", 2, 0.0, 1e3),
                mean("eigenvalue", 2, 0.0),
                f"{statistics.fmean(gradients):.2f}" if gradients else "–",
                _said(costs[arm]),
            ]
        )
    notes = [
        "Means over seeds. Sorted by the test accuracy over all shares of wrong labels, %, ± standard "
        "deviation; * marks what nothing in the table beats clearly: no other takes clearly less time and "
        "is at least as accurate in the seeds that both have, and no other is clearly more accurate in "
        "these (the 95 % interval of their differences is above zero) without taking clearly more time. "
        "Clearly less or more time: by more than the quartiles of SGD beside itself are apart, "
        f"{_spread(times):.1%}. Without wrong labels: gap in points, sharpness in thousandths, top "
        "eigenvalue. Gradients of a step, and its time as a multiple of SGD's (AE-SAM and RST: all blocks "
        "together, the others: median of the blocks); twice the epochs count double.",
        _control(times) if times else "Step times have not been measured yet.",
        missing([row for row in rows if row["options"]["noise"] == 0], arms),
    ]
    columns = [
        "recipe",
        "accuracy",
        "0 % wrong",
        "40 % wrong",
        "gap",
        "sharpness",
        "top λ",
        "gradients",
        "time",
    ]
    return Table("To choose by", columns, lines, " ".join(note for note in notes if note))


def _control(times: Times) -> str:
    if SGD not in times:
        return ""
    found = times[SGD]
    return (
        f"How well times can be told apart: SGD beside itself took {found['ratio']:.2f} (quartiles "
        f"{found['low']:.2f} and {found['high']:.2f})."
    )


def _said(cost: float | None) -> str:
    return "–" if cost is None else f"{cost:.2f}"


def _by_noise(
    rows: list[Row], arms: list[str], accuracies: Mapping[str, float], seen: Sequence[float]
) -> Table:
    good = usable(rows)
    lines = [
        [
            pictures.label(arm),
            *(tables.cell(tables.values(good, "test_accuracy", arm, noise=noise), 1) for noise in seen),
        ]
        for arm in _sorted(arms, accuracies)
    ]
    lacking = f"{_at_chance(good, arms, seen)} {missing(rows, arms)}"
    return Table(
        "Test accuracy by the share of wrong training labels, %",
        ["recipe", *(f"{noise:.0%}" for noise in seen)],
        lines,
        " ".join(["Mean ± standard deviation of the seeds.", lacking]).strip(),
    )


def _at_chance(rows: list[Row], arms: list[str], seen: Sequence[float]) -> str:
    """A sentence on the arms that learned nothing although their losses stayed finite."""
    said = []
    for arm in arms:
        at = {noise: tables.values(rows, "test_accuracy", arm, noise=noise) for noise in seen}
        lost = [f"{noise:.0%}" for noise, found in at.items() if found and statistics.fmean(found) < 15]
        if lost:
            said.append(f"{pictures.label(arm)} at {', '.join(lost)}")
    return f"Near chance, which is 10 %, in spite of finite losses: {'; '.join(said)}." if said else ""


def _families(means: list[Row], times: Times) -> Table:
    lines = []
    for family, members in FAMILIES.items():
        for arm in members:
            gains = [tables.paired(means, "wrong", arm, against).starred(1) for against in (SGD, SAM)]
            lines.append([family, pictures.label(arm), _said(_cost(arm, times)), *gains])
            family = ""
    return Table(
        "Families of the article",
        ["family", "recipe", "time", "accuracy less SGD's", "less SAM's"],
        lines,
        "Accuracies: points, mean over the shares of wrong labels above 0, ± standard error in pairs; with * "
        "the 95 % interval leaves out zero. SAMPa runs on one device here, where nothing is parallel.",
    )


def _balls(rows: list[Row], arms: list[str], noise: float) -> Table:
    columns = {
        "test accuracy, %": ("test_accuracy", 2),
        "training accuracy, %": ("train_accuracy", 2),
        "test loss": ("test_loss", 3),
        "sharpness": ("sharpness", 4),
    }
    good = usable(rows)
    against = {}
    for arm in arms:
        if arm != SAM:
            against[arm] = tables.paired(good, "test_accuracy", arm, SAM, noise=noise).starred(1)
    return scores(
        f"Balls and the L2 term, {noise:.0%} wrong labels",
        rows,
        arms,
        columns,
        more={"accuracy less SAM's": against},
        note="The last column: mean ± standard error in pairs; with * the 95 % interval leaves out zero.",
        noise=noise,
    )
