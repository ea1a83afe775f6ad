"""What recipes cost and what they bring, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import pictures, tables
from ...experiment import Row
from .claims import LONGER, SAM, SGD

CURVES = (SGD, LONGER, SAM, "asam", "fisher_sam", "gnp", "k_sam", "msam")  # of the right picture


def draw(
    rows: list[Row],
    arms: list[str],
    costs: Mapping[str, float | None],
    accuracies: Mapping[str, float],
    chosen: Sequence[str],
    seen: Sequence[float],
    path: Path,
) -> None:
    drawn, axes = pictures.figure(
        "What recipes cost and what they bring", columns=2, size=(14, 7), width_ratios=[1.25, 1]
    )
    points = {arm: (cost, accuracies[arm]) for arm in accuracies if (cost := costs[arm]) is not None}
    _scatter(axes[0][0], points, chosen)
    lines = {
        arm: [
            [at[noise] for noise in seen]
            for seed in sorted({row["seed"] for row in rows})
            if (at := _accuracies(rows, arm, seed)).keys() >= set(seen)
        ]
        for arm in CURVES
    }
    pictures.curves(
        axes[0][1],
        lines,
        "Test accuracy with wrong training labels, %",
        at=[100 * noise for noise in seen],
        x="wrong labels, %",
    )
    pictures.save(
        drawn,
        path,
        "Left: means over seeds and shares of wrong labels; large dots: nothing beats these clearly. "
        "Right: means, and bands from the lowest to the highest seed.",
    )


def _accuracies(rows: list[Row], arm: str, seed: int) -> dict[float, float]:
    mine = [row for row in tables.of(rows, arm) if row["seed"] == seed]
    return {row["options"]["noise"]: float(row["numbers"]["test_accuracy"]) for row in mine}


def _scatter(axes: Any, points: Mapping[str, tuple[float, float]], chosen: Sequence[str]) -> None:
    """Points with their names in a column at the right, as they would lie on each other beside the points."""
    pictures.titled(
        axes,
        "Accuracy and the time of a step",
        "step time, as a multiple of SGD's",
        "test accuracy, mean over all shares of wrong labels, %",
    )
    if not points:
        axes.text(0.5, 0.5, "step times have not been measured", ha="center", transform=axes.transAxes)
        return
    right = max(cost for cost, _ in points.values())
    gains = [gain for _, gain in points.values()]
    low, high = min(gains), max(gains)
    room = (high - low or 1.0) * 0.06
    by_gain = sorted(points, key=lambda arm: points[arm][1])
    for place, arm in enumerate(by_gain):
        cost, gain = points[arm]
        tint, is_best = pictures.color(arm), arm in chosen
        axes.plot(cost, gain, "o", color=tint, markersize=8 if is_best else 5, zorder=3)
        height = low - room + (high - low + 2 * room) * (place + 0.5) / len(by_gain)
        axes.annotate(
            pictures.label(arm),
            (cost, gain),
            xytext=(right * 1.06, height),
            fontsize=8.5,
            va="center",
            color=tint,
            fontweight="bold" if is_best else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": tint,
                "linewidth": 0.4,
                "alpha": 0.5,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )
    axes.set_xlim(right=right * 1.36)
    axes.set_ylim(low - 2 * room, high + 2 * room)
    axes.grid(color=pictures.FAINT)
