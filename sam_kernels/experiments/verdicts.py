"""Differences into verdicts by one rule, so that no sentence is chosen by its writer.

Runs are compared in pairs of the same seed. A difference that is expected to have a sign agrees if it has
that sign and is more than two standard errors from zero, disagrees if it has the other and is, and is
undecided otherwise. Where a document says "about" or "comparable", a margin is stated: it agrees if all that
is within two standard errors lies inside the margin, disagrees if all of it lies outside, else undecided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from . import pictures
from .experiment import Claim, Row
from .tables import Difference, Metric, mean_and_spread, of, value_of

RULE = (
    "Differences are of runs with the same seed. One that is more than two standard errors from zero agrees "
    "or disagrees with a claim, by its sign; any other leaves it undecided."
)
Verdict = Literal["agrees", "disagrees", "undecided", "not measured"]
Expected = Literal["more", "less", "alike", "not more"]


def judge(
    says: str,
    what: str,
    found: Difference,
    expected: Expected,
    *,
    margin: float = 0.0,
    digits: int = 2,
    unit: str = "",
) -> Claim:
    """A claim about one difference.

    Args:
        says: the claim, in words.
        what: what the difference is of, in words.
        found: of `tables.paired`.
        expected: by the claim: "more" or "less" than zero, "alike", within `margin` of it, or "not more" than
            `margin`, on that side alone.
        margin: for the last two.
        digits, unit: of the numbers in the sentence.

    Example:
        >>> found = Difference((0, 1), (-0.5, -0.7), -0.6, 0.1)
        >>> judge("The loss is lower.", "Loss", found, "less", digits=1).verdict
        'agrees'
    """
    verdict = verdict_of(found, expected, margin)
    about = {
        "alike": f" (margin ± {margin:.{digits}f}{unit})",
        "not more": f" (margin {margin:.{digits}f}{unit})",
    }
    return Claim(says, f"{what}: {found.said(digits, unit)}{about.get(expected, '')}.", verdict)


def near(says: str, what: str, found: Difference, target: float, margin: float, *, digits: int = 2) -> Claim:
    """A claim that a mean, of `ratios` say, is about `target`: "alike" for the difference.

    Example:
        >>> near("Half.", "Ratio", Difference((0, 1), (0.5, 0.54), 0.52, 0.02), 0.5, margin=0.1).measured
        'Ratio: 0.52 ± 0.02 (mean and standard error of 2 pairs), expected 0.50 ± 0.10.'
    """
    verdict = verdict_of(replace(found, mean=found.mean - target), "alike", margin)
    if not found.values:
        return Claim(says, f"{what}: no pairs yet.", verdict)
    error = "one pair" if math.isnan(found.error) else f"mean and standard error of {len(found.values)} pairs"
    spread = "" if math.isnan(found.error) else f" ± {found.error:.{digits}f}"
    measured = f"{what}: {found.mean:.{digits}f}{spread} ({error})"
    return Claim(says, f"{measured}, expected {target:.{digits}f} ± {margin:.{digits}f}.", verdict)


def ratios(rows: Sequence[Row], metric: Metric, arm: str, against: str, **options: Any) -> Difference:
    """The metric of an arm divided by that of another, seed by seed; mean and standard error.

    Args:
        rows, metric, arm, against, options: as in `tables.paired`.
    """
    above, below = ({r["seed"]: value_of(r, metric) for r in of(rows, a, **options)} for a in (arm, against))
    seeds = tuple(seed for seed in above if seed in below)
    values = tuple(above[seed] / below[seed] if below[seed] else math.nan for seed in seeds)
    mean, spread = mean_and_spread(values)
    return Difference(seeds, values, mean, spread / math.sqrt(len(seeds)) if seeds else math.nan)


def verdict_of(found: Difference, expected: Expected, margin: float = 0.0) -> Verdict:
    """By the rule of this module; "not measured" without pairs."""
    if not found.values:
        return "not measured"
    if not (math.isfinite(found.mean) and math.isfinite(found.error)):
        return "undecided"
    if expected == "alike":
        if abs(found.mean) + 2 * found.error <= margin:
            return "agrees"
        return "disagrees" if abs(found.mean) - 2 * found.error > margin else "undecided"
    if expected == "not more":
        if found.mean + 2 * found.error <= margin:
            return "agrees"
        return "disagrees" if found.mean - 2 * found.error > margin else "undecided"
    if not found.is_clear:
        return "undecided"
    return "agrees" if (found.mean > 0) == (expected == "more") else "disagrees"


def together(says: str, parts: Sequence[Claim]) -> Claim:
    """A claim of several parts: agrees if all do, disagrees if one does, else as undecided as its parts.

    Example:
        >>> together("Both.", [Claim("", "a.", "agrees"), Claim("", "b.", "undecided")]).measured
        'a. b.'
    """
    verdicts = {part.verdict for part in parts}
    verdict: Verdict = "undecided"
    if verdicts <= {"not measured"}:
        verdict = "not measured"
    elif "disagrees" in verdicts:
        verdict = "disagrees"
    elif verdicts == {"agrees"}:
        verdict = "agrees"
    return Claim(says, " ".join(part.measured for part in parts), verdict)


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
