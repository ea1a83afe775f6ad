"""Differences into verdicts by one rule, so that no sentence is chosen by its writer.

Runs are compared in pairs of the same seed, by the 95 % interval of their mean difference (Student's t). A
difference that is expected to have a sign agrees if it has that sign and the interval leaves out zero,
disagrees if it has the other and it does, and is undecided otherwise. Where a document says "about" or
"comparable", a margin is stated: it agrees if the whole interval lies inside the margin, disagrees if all of
it lies outside, else undecided. A claim of n parts agrees if all do, and disagrees if one does at a level of
5 % / n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from . import pictures
from .experiment import Claim, Row
from .tables import LEVEL, Difference, Metric, of, p_value, value_of

RULE = (
    "Differences are of runs with the same seed, each with its 95 % interval by Student's t (one degree "
    "of freedom less than there are seeds). An interval that leaves out zero agrees or disagrees with a "
    "claim, by its side; any other leaves it undecided. A claim of several parts agrees if all of them "
    "do. Since one of many is soon off by chance, it disagrees only if a part still does when all share "
    "the 5 % of error (Bonferroni). Where a margin is stated, the whole interval must lie inside it, or "
    "outside."
)
DIRECTION = " The verdict is on the direction, not on the size."
Verdict = Literal["agrees", "disagrees", "undecided", "not measured"]
Expected = Literal["more", "less", "alike", "not more"]


@dataclass(frozen=True)
class Judged(Claim):
    """A claim that was judged by numbers.

    Args:
        doubt: how likely numbers that speak so much against it are by chance; 1 if they do not.
    """

    doubt: float = 1.0


def judge(
    says: str,
    what: str,
    found: Difference,
    expected: Expected,
    *,
    margin: float = 0.0,
    digits: int = 2,
    unit: str = "",
    quotes: bool = False,
) -> Judged:
    """A claim about one difference.

    Args:
        says: the claim, in words.
        what: what the difference is of, in words.
        found: of `tables.paired`.
        expected: by the claim: "more" or "less" than zero, "alike", within `margin` of it, or "not more" than
            `margin`, on that side alone.
        margin: for the last two.
        digits, unit: of the numbers in the sentence.
        quotes: whether the claim quotes a size, which is not judged: the sentence then says so.

    Example:
        >>> found = Difference.of((0, 1, 2), (-0.5, -0.7, -0.6))
        >>> judge("The loss is lower.", "Loss", found, "less", digits=1).verdict
        'agrees'
    """
    verdict, doubt = verdict_of(found, expected, margin), _doubt(found, expected, margin)
    about = {
        "alike": f" (margin ± {margin:.{digits}f}{unit})",
        "not more": f" (margin {margin:.{digits}f}{unit})",
    }
    measured = f"{what}: {found.said(digits, unit)}{about.get(expected, '')}.{DIRECTION if quotes else ''}"
    return Judged(says, measured, verdict, doubt)


def near(says: str, what: str, found: Difference, target: float, margin: float, *, digits: int = 2) -> Judged:
    """A claim that a mean, of `ratios` say, is about `target`: "alike" for the difference.

    Example:
        >>> near("Half.", "Ratio", Difference.of((0,), (0.52,)), 0.5, margin=0.1).measured
        'Ratio: 0.52 (one pair), expected 0.50 ± 0.10.'
    """
    off = replace(found, mean=found.mean - target)
    verdict, doubt = verdict_of(off, "alike", margin), _doubt(off, "alike", margin)
    if not found.values:
        return Judged(says, f"{what}: no pairs yet.", verdict, doubt)
    said = f"{found.mean:.{digits}f} (one pair)"
    if not math.isnan(found.error):
        low, high = found.interval
        said = (
            f"{found.mean:.{digits}f} ± {found.error:.{digits}f} (mean and standard error of "
            f"{len(found.values)} pairs; 95 % interval {low:.{digits}f} to {high:.{digits}f})"
        )
    measured = f"{what}: {said}, expected {target:.{digits}f} ± {margin:.{digits}f}."
    return Judged(says, measured, verdict, doubt)


def ratios(rows: Sequence[Row], metric: Metric, arm: str, against: str, **options: Any) -> Difference:
    """The metric of an arm divided by that of another, seed by seed; mean and standard error.

    Args:
        rows, metric, arm, against, options: as in `tables.paired`.
    """
    above, below = ({r["seed"]: value_of(r, metric) for r in of(rows, a, **options)} for a in (arm, against))
    seeds = tuple(seed for seed in above if seed in below)
    values = tuple(above[seed] / below[seed] if below[seed] else math.nan for seed in seeds)
    return Difference.of(seeds, values)


def verdict_of(found: Difference, expected: Expected, margin: float = 0.0) -> Verdict:
    """By the rule of this module; "not measured" without pairs."""
    if not found.values:
        return "not measured"
    if not (math.isfinite(found.mean) and math.isfinite(found.error)):
        return "undecided"
    low, high = found.interval
    if expected in ("alike", "not more"):
        if high <= margin and (expected == "not more" or low >= -margin):
            return "agrees"
    elif low > 0 if expected == "more" else high < 0:
        return "agrees"
    return "disagrees" if _doubt(found, expected, margin) < LEVEL else "undecided"


def _doubt(found: Difference, expected: Expected, margin: float) -> float:
    """The p-value of a mean so far on the wrong side."""
    beyond = {
        "more": -found.mean,
        "less": found.mean,
        "alike": abs(found.mean) - margin,
        "not more": found.mean - margin,
    }[expected]
    return p_value(beyond, found.error, len(found.values))


def together(says: str, parts: Sequence[Claim]) -> Judged:
    """A claim of several parts: agrees if all do, disagrees if one does at the level that all share.

    Parts that were not judged by numbers count as they are.

    Example:
        >>> together("Both.", [Claim("", "a.", "agrees"), Claim("", "b.", "undecided")]).measured
        'a. b.'
    """
    verdicts = {part.verdict for part in parts}
    against = [
        part.doubt if isinstance(part, Judged) else 0.0 for part in parts if part.verdict == "disagrees"
    ]
    doubt = min([1.0, *(len(parts) * one for one in against)])
    verdict: Verdict = "undecided"
    if verdicts <= {"not measured"}:
        verdict = "not measured"
    elif against and doubt < LEVEL:
        verdict = "disagrees"
    elif verdicts == {"agrees"}:
        verdict = "agrees"
    return Judged(says, " ".join(part.measured for part in parts), verdict, doubt)


def usable(rows: Sequence[Row]) -> list[Row]:
    """The rows whose training ended with finite losses."""
    return [row for row in rows if not row["numbers"].get("diverged")]


def missing(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """A sentence on arms with fewer runs than others and on runs that diverged; empty if there are none."""
    counts = {arm: sum(row["arm"] == arm for row in rows) for arm in arms}
    most = max(counts.values(), default=0)
    parts = []
    if fewer := [f"{pictures.label(arm)} ({n} of {most})" for arm, n in counts.items() if n < most]:
        parts.append(f"Runs are missing: {', '.join(fewer)}.")
    elif not most:
        parts.append("No runs yet.")
    for arm in arms:
        lost = sum(row["arm"] == arm and bool(row["numbers"].get("diverged")) for row in rows)
        if lost:
            parts.append(
                f"Left out: {lost} of {counts[arm]} runs of {pictures.label(arm)}, whose loss was not finite."
            )
    return " ".join(parts)
