"""Section 7's claims on wrong labels, sharpness and cost, and the families of recipes it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import pictures, tables
from .experiment import Claim, Row
from .verdicts import judge, together

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
    measured = (
        f"A step of SAM takes {found['ratio']:.2f} times one of SGD (quartiles {found['low']:.2f} and "
        f"{found['high']:.2f}); 1.8 to 2.2 counts as doubled."
    )
    is_inside = 1.8 <= found["low"] and found["high"] <= 2.2
    is_outside = found["high"] < 1.8 or found["low"] > 2.2
    return Claim(says, measured, "agrees" if is_inside else "disagrees" if is_outside else "undecided")


def _cheaper(times: Times) -> Claim:
    family = "fewer computations"
    members = [arm for arm in FAMILIES[family] if arm in times]
    says = "The family with fewer computations (LookSAM, every k-th step, RST, AE-SAM) costs less than SAM."
    if SAM not in times or not members:
        return Claim(says, "Step times have not been measured yet.", "not measured")
    parts = []
    for arm in members:
        ours, sams = times[arm], times[SAM]
        is_less, is_more = ours["high"] < sams["low"], ours["low"] > sams["high"]
        verdict = "agrees" if is_less else "disagrees" if is_more else "undecided"
        said = f"{pictures.label(arm)}: {ours['ratio']:.2f} times SGD's step."
        parts.append(Claim("", said, verdict))  # type: ignore[arg-type]
    found = together(says, parts)
    rule = f"SAM: {times[SAM]['ratio']:.2f}. Less or more where the quartiles do not overlap."
    return Claim(says, f"{found.measured} {rule}", found.verdict)
