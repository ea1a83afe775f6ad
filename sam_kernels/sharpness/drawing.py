"""Pictures of landscapes. Figures are made without pyplot, so no setting or backend of the user's changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .landscape import Landscape

COLORS = ("#7f7f7f", "#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b")
DARK, FAINT = "#444444", "#e5e5e5"

# Above these ratios of the largest loss to the least, equal steps would show the largest alone. An axis has
# more room than colors have.
_WIDE, _WIDE_AXIS = 20.0, 100.0

# Bounds of colors within a factor of ten; the finest that leave no more than 20 colors.
_STEPS: tuple[tuple[float, ...], ...] = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7))
_STEPS += ((1, 2, 5), (1, 3), (1,))

_WHICH = {"random": "a random direction", "gradient": "the gradient", "eigenvector": "the top eigenvector"}
_BOTH = {  # the same name twice
    "random": ("a random direction", "another random direction"),
    "gradient": ("the gradient", "the gradient"),
    "eigenvector": ("the first eigenvector", "the second eigenvector"),
}


def draw(landscapes: Sequence[Landscape], path: Path) -> None:
    """One landscape, or several beside each other, as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            f"pictures need matplotlib, which is not installed: pip install 'sam_kernels[sharpness]'. The "
            f"values are in {path.with_suffix('.json')}"
        ) from missing
    count = len(landscapes)
    if landscapes[0].losses.ndim == 1:
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        _curves(figure.add_subplot(), landscapes)
    else:
        figure = Figure(figsize=(4.6 * count + 1.2, 5.0), layout="constrained")
        _planes(figure, landscapes)
    figure.savefig(
        path, format="png", dpi=150, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None}
    )


def _curves(axes: Any, landscapes: Sequence[Landscape]) -> None:
    alone = len(landscapes) == 1
    finite = [v for one in landscapes for v in one.losses[np.isfinite(one.losses)]]
    for one, color in zip(landscapes, _colors(len(landscapes)), strict=True):
        (a,) = one.coordinates
        shown = np.where(np.isfinite(one.losses), one.losses, np.nan)
        name = None if alone else f"{one.label} ({one.base:.4g} at the weights)"
        axes.plot(a, shown, color=color, linewidth=1.8, label=name)
        if math.isfinite(one.base):
            name = f"the weights: {one.base:.4g}" if alone else None
            axes.plot(0, one.base, "o", color=color, markeredgecolor="white", markersize=8, label=name)
        (place,), least = one.lowest
        if alone and least < one.base:
            axes.plot(
                place, least, "*", color="#d62728", markeredgecolor="white", markersize=13, label=_lowest(one)
            )
    if finite and min(finite) > 0 and max(finite) / min(finite) > _WIDE_AXIS:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes.set_yscale("log")
        few = max(finite) / min(finite) < 1e3
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        axes.yaxis.set_minor_formatter(FuncFormatter(_one_two_five) if few else NullFormatter())
    axes.set_title(
        landscapes[0].label or "Loss around the weights" if alone else "Loss around the weights",
        loc="left",
        fontsize=11,
        fontweight="bold",
    )
    axes.set_xlabel(_axis_name(landscapes, 0), color=DARK)
    axes.set_ylabel("loss" + _lost(landscapes), color=DARK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def _planes(figure: Any, landscapes: Sequence[Landscape]) -> None:
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    levels, is_clipped = _levels(np.concatenate([one.losses.ravel() for one in landscapes]))
    all_axes = figure.subplots(1, len(landscapes), sharex=True, sharey=True, squeeze=False)[0]
    colors = BoundaryNorm(levels, 256, extend="max" if is_clipped else "neither")
    filled = None
    for axes, one in zip(all_axes, landscapes, strict=True):
        a, b = one.coordinates
        heights = np.ma.masked_invalid(np.where(np.isposinf(one.losses), np.nan, one.losses).T)
        axes.set_facecolor("#bbbbbb")  # where the loss is not finite
        extend = "max" if is_clipped else "neither"
        filled = axes.contourf(a, b, heights, levels, norm=colors, cmap="viridis", extend=extend)
        axes.contour(a, b, heights, levels, colors="white", linewidths=0.4, alpha=0.5)
        axes.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=7, label=_at(one))
        place, least = one.lowest
        if least < one.base:
            axes.plot(
                *place, "*", color="#ff5a4d", markeredgecolor="white", markersize=13, label=_lowest(one)
            )
        axes.set_title(one.label or "Loss around the weights", loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(_axis_name(landscapes, 0), color=DARK)
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.14), frameon=False, fontsize=9, borderaxespad=0
        )
        if np.ptp(a) == np.ptp(b) and one.normalize[0] == one.normalize[1]:
            axes.set_aspect("equal")
    all_axes[0].set_ylabel(_axis_name(landscapes, 1), color=DARK)
    bar = figure.colorbar(filled, ax=list(all_axes), shrink=0.9, pad=0.02, format=FuncFormatter(_number))
    bar.set_label("loss" + _lost(landscapes), color=DARK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)


def _levels(losses: Any) -> tuple[Any, bool]:
    """Bounds of colors, and whether losses above the last one are cut off.

    Equal steps, or steps by a factor where losses differ much, see `_WIDE`. A quarter of all points may lie
    above the last bound if they are far above it: else an explosion at the rim would be all there is.
    """
    from matplotlib.ticker import MaxNLocator

    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return np.array([0.0, 1.0]), False
    low, high = float(finite.min()), float(finite.max())
    usual = float(np.quantile(finite, 0.75))
    top = min(high, usual * 1e3) if usual > 0 else high
    if low > 0 and top / low > _WIDE:
        for steps in _STEPS:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(top)) + 1)
            marks = np.array([s * 10.0**d for d in decades for s in steps])
            first, last = (marks <= low).nonzero()[0][-1], (marks >= top).nonzero()[0][0]
            if last - first <= 20:
                break
        levels = marks[first : last + 1]
    elif top > low:
        levels = np.asarray(MaxNLocator(16).tick_values(low, top))
    else:
        levels = np.array([low - 0.5 * (abs(low) or 1), low + 0.5 * (abs(low) or 1)])
    return levels, high > levels[-1]


def _colors(count: int) -> list[str]:
    return [COLORS[1]] if count == 1 else [COLORS[i % len(COLORS)] for i in range(count)]


def _axis_name(landscapes: Sequence[Landscape], i: int) -> str:
    """What a coordinate is, if it is the same in all."""
    names = {(one.directions[i], one.normalize[i]) for one in landscapes}
    if len(names) > 1:
        return "coordinate"
    ((name, kind),) = names
    if name == "given":
        return "multiples of a given direction" + ("" if kind == "none" else f", {kind}-normalized")
    which = _WHICH[name]
    if landscapes[0].directions == (name, name):
        which = _BOTH[name][i]
    return f"distance along {which}" if kind == "none" else f"{which}, {kind}-normalized"


def _at(one: Landscape) -> str:
    return f"the weights: {one.base:.4g}"


def _lowest(one: Landscape) -> str:
    place, least = one.lowest
    return f"least on the grid: {least:.4g} at {', '.join(f'{x:.3g}' for x in place)}"


def _lost(landscapes: Sequence[Landscape]) -> str:
    lost = sum(int((~np.isfinite(one.losses)).sum()) for one in landscapes)
    total = sum(one.losses.size for one in landscapes)
    return f" (not finite at {lost} of {total} points)" if lost else ""


def _number(x: float, _: Any = None) -> str:
    if x == 0 or 1e-3 <= abs(x) < 1e5:
        return f"{float(f'{x:.3g}'):g}"  # 1000, where .3g alone has 1e+03
    digits, exponent = f"{x:.0e}".split("e")
    return f"{digits}e{int(exponent)}"


def _one_two_five(x: float, _: Any = None) -> str:
    return _number(x) if f"{x:.0e}"[0] in "25" else ""
