"""The picture of the toys: curve and ways in one dimension, ways and eigenvalues in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ... import pictures, tables
from ...experiment import Row
from .functions import BARRIER, LINE, PLANE

LR, RHO = 5e-5, 0.1  # in one dimension, by the rule that the protocol states
DOCUMENTED = (1.225, 0.016)


def draw(path: Path, line: list[Row], plane: list[Row], start: list[Row]) -> None:
    """Draw what there is of the rows of these three problems."""
    figure, axes = pictures.figure(
        "Toy separations: gradient descent and SAM", rows=2, columns=2, size=(11, 8), height_ratios=[1, 1.1]
    )
    _draw_curve(axes[0, 0])
    _draw_line(axes[1, 0], line)
    _draw_plane(axes[0, 1], start)
    _draw_pairs(axes[1, 1], plane)
    axes[1, 0].sharex(axes[0, 0])
    pictures.save(
        figure,
        path,
        f"Left: step size {LR:g}; the ways go down, one line for each start. Right: step size 0.1, 1,000 "
        "steps; below, 200 random starts with |x-1|, |y| < 2.",
    )


def _draw_curve(axes: Any) -> None:
    x = torch.linspace(-1, 2, 3001, dtype=torch.float64)[:, None]
    axes.plot(x[:, 0], LINE.value(x), color=pictures.DARK, linewidth=1.2)
    for name, place, side in (("sharp", 0.0, "right"), ("flat", 1.0, "center")):
        axes.plot(place, 0, "o", color=pictures.DARK, markersize=5)
        shift = (-6, 2) if side == "right" else (0, 8)
        axes.annotate(
            name, (place, 0), xytext=shift, textcoords="offset points", ha=side, fontsize=9, va="bottom"
        )
    axes.set_ylim(-0.1, 2)
    pictures.titled(axes, "f(x) = x² (x−1)² / (x² + 0.0001)", "", "f")


def _draw_line(axes: Any, rows: list[Row]) -> None:
    arms = (("GD", 0.0, "gd", 2.6), (f"SAM, rho {RHO:g}", RHO, "sam", 1.3))
    for name, rho, arm, width in arms:
        for row in tables.of(rows, lr=LR, rho=rho, paths=True):
            n = row["numbers"]
            steps = [max(s, 0.5) for s in n["path_steps"]]
            for number, way in enumerate(n["paths"]):
                axes.plot(
                    way,
                    steps,
                    color=pictures.color(arm),
                    linewidth=width,
                    label=None if number else name,
                    alpha=0.9,
                )
                axes.plot(way[-1], steps[-1], "o", color=pictures.color(arm), markersize=4)
    axes.axvline(BARRIER, color=pictures.GREY, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.invert_yaxis()
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.67, 1))
    pictures.titled(axes, "Where the same starts go", "x (dotted: the barrier)", "steps")


def _draw_plane(axes: Any, rows: list[Row]) -> None:
    x, y = torch.linspace(0.5, 2.2, 171), torch.linspace(-0.25, 1.5, 176)
    grid = torch.cartesian_prod(x, y).double()
    values = PLANE.value(grid).reshape(len(x), len(y)).T
    levels = [10.0**k for k in range(-6, 2)]
    axes.contour(x, y, values, levels=levels, colors=pictures.GREY, linewidths=0.5, alpha=0.7)
    axes.plot([1, 1], [y[0], y[-1]], color=pictures.GREY, linewidth=1)
    axes.plot([x[0], x[-1]], [0, 0], color=pictures.GREY, linewidth=1)
    wanted = {0.0: ("gd", 5.0), 1e-5: ("sam", 2.0), 1e-1: ("sam", 1.6)}
    tints = {0.0: pictures.color("gd"), 1e-5: "#8ec1e8", 1e-1: pictures.color("sam")}
    for row in sorted(rows, key=lambda row: row["options"]["rho"]):
        rho, n = row["options"]["rho"], row["numbers"]
        if rho not in wanted:
            continue
        arm, width = wanted[rho]
        name = f"SAM, rho {rho:g}" if rho else "GD"
        label = f"{name}: {n['top']:.3f}"
        xs, ys = zip(*n["path"], strict=True)
        axes.plot(xs, ys, color=tints[rho], linewidth=width, alpha=0.8, label=label, solid_capstyle="round")
        axes.plot(*n["end"], "o", color=tints[rho], markersize=6 if rho else 9)
    if rows:
        first = rows[0]["numbers"]["start"]
        axes.plot(*first, "s", color=pictures.DARK, markersize=5)
        axes.legend(frameon=False, fontsize=9, title="largest eigenvalue at the end", title_fontsize=9)
    axes.set_xlim(x[0].item(), x[-1].item())
    axes.set_ylim(y[0].item(), y[-1].item())
    pictures.titled(axes, "f(x, y) = (x−1)² y², from (2, 1.3)", "x", "y")


def _draw_pairs(axes: Any, rows: list[Row]) -> None:
    for rho, tint in ((1e-5, "#8ec1e8"), (1e-2, "#4a97d0"), (1e-1, pictures.color("sam"))):
        pairs = [pair for row in tables.of(rows, half=2.0, rho=rho) for pair in row["numbers"]["pairs"]]
        if pairs:
            gd, sam = zip(*pairs, strict=True)
            axes.plot(gd, sam, ".", color=tint, markersize=5, label=f"rho {rho:g}", alpha=0.8)
    axes.plot(*DOCUMENTED, "*", color="#d62728", markersize=12, label="the review, rho 1e-5", zorder=5)
    axes.axline((1, 1), slope=1, color=pictures.GREY, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)
    pictures.titled(axes, "Largest eigenvalue at the end", "gradient descent", "SAM")
