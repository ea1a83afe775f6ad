"""Section 7's claims on wrong labels, sharpness and cost, and the families of recipes it names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ... import pictures, tables
from ...experiment import Claim, Row
from ...verdicts import Judged, Verdict, judge, together
from .step_times import ROUNDS

# As the encyclopedia article groups them.
FAMILIES = {
    "two gradients in parallel": ("sampa",),
    "a subset is perturbed": ("ssam_f", "ssam_d", "nosam", "esam"),
    "fewer computations": ("looksam", "sam, every=5", "rst", "ae_sam"),
    "historical gradients": ("msam", "vasso", "friendly_sam"),
    "curvature": ("cr_sam",),
    "gradient components": ("friendly_sam", "gsam"),
    "random smoothing": ("r_sam",),
    "adaptive neighbourhoods": ("asam",),
}
SGD, LONGER, SAM = "sgd", "sgd, twice the epochs", "sam"
Times = Mapping[str, Mapping[str, float]]


def claims(rows: list[Row], times: Times, noises: Sequence[float]) -> list[Claim]:
    """What the rows and times say of the article's claims, at these shares of wrong labels."""

    def more(against: str, noise: float) -> Claim:
        found = tables.paired(rows, "test_accuracy", SAM, against, noise=noise)
        return judge("", f"{noise:.0%} wrong", found, "more", unit=" points")

    def less(what: str, metric: str, digits: int) -> Claim:
        found = tables.paired([r for r in rows if metric in r["numbers"]], metric, SAM, SGD, noise=0.0)
        return judge("", f"{what} less SGD's", found, "less", digits=digits)

    return [
        together(
            "SAM is robust to label noise: trained with 20, 40, 60 and 80 % wrong labels it is better than "
            "SGD. Here with as many epochs: test accuracy less SGD's.",
            [more(SGD, noise) for noise in noises],
        ),
        together(
            "The same, here with as many gradients: SGD trains twice the epochs (the article does not say "
            "which is meant).",
            [more(LONGER, noise) for noise in noises],
        ),
        together(
            "SAM finds flatter minima than SGD (measured without wrong labels).",
            [less("One-step sharpness", "sharpness", 5), less("Top eigenvalue", "eigenvalue", 3)],
        ),
        _doubled(times),
        _cheaper(times),
        Claim(
            "Computing the two gradients in parallel (SAMPa) hides the second.",
            "That takes two devices. On one, SAMPa's step is in the table with those of all others.",
            "not measured",
        ),
    ]


def _doubled(times: Times) -> Claim:
    says = "Two gradients a step double the cost."
    if SAM not in times:
        return Claim(says, "Step times have not been measured yet.", "not measured")
    found = times[SAM]
    width = tables.t_quantile(_rounds(found)) * found["error"]
    low, high = found["ratio"] - width, found["ratio"] + width
    measured = (
        f"A step of SAM takes {_time(found)} times one of SGD (median and standard error); 1.8 to 2.2 counts "
        f"as doubled, with the whole 95 % interval, {low:.2f} to {high:.2f}, inside."
    )
    is_inside, is_outside = 1.8 <= low and high <= 2.2, high < 1.8 or low > 2.2
    return Claim(says, measured, "agrees" if is_inside else "disagrees" if is_outside else "undecided")


def _rounds(found: Mapping[str, float]) -> int:
    return int(found.get("rounds", ROUNDS))


def _time(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.2f}" + ("" if math.isnan(found["error"]) else f" ± {found['error']:.2f}")


def _cheaper(times: Times) -> Claim:
    family = "fewer computations"
    members = [arm for arm in FAMILIES[family] if arm in times]
    says = "The family with fewer computations (LookSAM, every k-th step, RST, AE-SAM) costs less than SAM."
    if SAM not in times or not members:
        return Claim(says, "Step times have not been measured yet.", "not measured")
    parts = []
    for arm in members:
        less = times[SAM]["ratio"] - times[arm]["ratio"]
        error = math.hypot(times[SAM]["error"], times[arm]["error"])
        doubt = tables.p_value(abs(less), error, _rounds(times[arm]))
        verdict: Verdict = "undecided" if doubt >= tables.LEVEL else "agrees" if less > 0 else "disagrees"
        said = f"{pictures.label(arm)}: {_time(times[arm])} times SGD's step."
        parts.append(Judged("", said, verdict, doubt if less < 0 else 1.0))
    found = together(says, parts)
    return Claim(says, f"{found.measured} SAM: {_time(times[SAM])}.", found.verdict)
