"""One look for all pictures: colors by arm, bars with a dot for each seed, curves with bands.

Figures are made without pyplot, so no backend is chosen and no setting of the user's is changed.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .tables import mean_and_spread

# How an arm is spelled, and its color, the same in every picture. Those of a family are of related colors.
LOOKS: dict[str, tuple[str, str]] = {
    "sgd": ("SGD", "#7f7f7f"),
    "gd": ("GD", "#7f7f7f"),
    "adam": ("Adam", "#3d3d3d"),
    "adamw": ("AdamW", "#5a4a42"),
    "sam": ("SAM", "#1f77b4"),
    "asam": ("ASAM", "#d95f02"),
    "fisher_sam": ("FisherSAM", "#b8860b"),
    "layerwise_sam": ("layer-wise SAM", "#e6a000"),
    "multistep_sam": ("n-step SAM", "#0b3c6f"),
    "lookbehind_sam": ("Lookbehind-SAM", "#3f5fa8"),
    "sampa": ("SAMPa", "#5b8ff9"),
    "rand_sam": ("Rand-SAM", "#17becf"),
    "r_sam": ("R-SAM", "#0f8a8a"),
    "k_sam": ("K-SAM", "#2ca02c"),
    "esam": ("ESAM", "#74b816"),
    "ssam_f": ("SSAM-F", "#12703b"),
    "ssam_d": ("SSAM-D", "#5aae7a"),
    "nosam": ("NoSAM", "#8c9a3b"),
    "looksam": ("LookSAM", "#d62728"),
    "rst": ("RST", "#8b1a1a"),
    "ae_sam": ("AE-SAM", "#f06a6a"),
    "gsam": ("GSAM", "#9467bd"),
    "gnp": ("GNP", "#5e3c99"),
    "wsam": ("WSAM", "#c39be0"),
    "friendly_sam": ("FriendlySAM", "#e377c2"),
    "vasso": ("VaSSO", "#b5177a"),
    "msam": ("MSAM", "#ff8fb1"),
    "cr_sam": ("CR-SAM", "#8c564b"),
    "samar": ("SAMAR", "#a8663d"),
}
OTHERS = ("#4477aa", "#cc6677", "#228833", "#aa3377", "#66a5ad", "#997700", "#332288", "#882255")
GREY, FAINT, DARK = "#999999", "#e5e5e5", "#444444"


def _name(arm: str) -> str:
    """The recipe an arm is named after: its first word."""
    found = re.match(r"[a-z][a-z0-9_]*", arm.lower())
    return found.group() if found else ""


def label(arm: str) -> str:
    """An arm as it is spelled for readers; what follows the recipe's name stays.

    Example:
        >>> label("friendly_sam"), label("sam, m=8"), label("source only")
        ('FriendlySAM', 'SAM, m=8', 'source only')
    """
    name = _name(arm)
    return LOOKS[name][0] + arm[len(name) :] if name in LOOKS else arm


def color(arm: str) -> str:
    """The color of an arm: that of the recipe it is named after, else one that its name decides.

    Example:
        >>> color("sam") == color("sam, m=8"), color("sam") == color("asam")
        (True, False)
    """
    name = _name(arm)
    return LOOKS[name][1] if name in LOOKS else OTHERS[zlib.crc32(arm.encode()) % len(OTHERS)]


def colors(arms: Iterable[str]) -> dict[str, str]:
    """A color for each arm; arms of the same recipe get lighter ones, in their order."""
    arms = list(arms)
    out: dict[str, str] = {}
    for arm in arms:
        family = [other for other in arms if color(other) == color(arm)]
        share = 0.6 * family.index(arm) / max(1, len(family) - 1)
        out[arm] = _lighter(color(arm), share)
    return out


def _lighter(code: str, share: float) -> str:
    parts = [int(code[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def figure(
    title: str = "", *, rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None, **grid: Any
) -> tuple[Any, Any]:
    """A figure and its axes, an array [rows, columns]; finish it with `save`.

    Args:
        title: above all, at the left.
        rows, columns: of axes.
        size: in inches (default: 5 by 3.6 for each axes).
        grid: whatever else ``Figure.subplots`` takes, e.g. ``width_ratios=[2, 1]`` or ``sharey=True``.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "pictures need matplotlib, which is not installed: pip install 'sam_kernels[experiments]'"
        ) from None
    out = Figure(figsize=size or (5 * columns, 3.6 * rows), layout="constrained")
    engine: Any = out.get_layout_engine()
    engine.set(h_pad=0.12, w_pad=0.08)
    if title:
        out.suptitle(title, x=0.01, ha="left", fontsize=13)
    axes = out.subplots(rows, columns, squeeze=False, **grid)
    for one in axes.flat:
        _dress(one)
    return out, axes


def _dress(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=DARK, labelsize=9)
    axes.set_axisbelow(True)


def titled(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Title at the left in bold, and what the axes show."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x, color=DARK)
    axes.set_ylabel(y, color=DARK)


def bars_with_dots(
    axes: Any,
    values: Mapping[str, Sequence[float]],
    title: str = "",
    *,
    digits: int = 3,
    from_zero: bool = True,
    across: bool | None = None,
) -> None:
    """A bar for the mean of each arm, one dot for each seed.

    Args:
        axes: of `figure`.
        values: for each arm those of its seeds; arms without any are left out.
        title: what is shown, with its unit.
        digits: significant ones of the means that are written beside.
        from_zero: bars from 0. False draws a line at the mean and lets the axis fit the dots: for
            accuracies, which differ by less than a bar would show.
        across: bars from left to right (default: when there are more than six).
    """
    shown = {arm: [float(v) for v in found] for arm, found in values.items() if len(found)}
    across = len(shown) > 6 if across is None else across
    tints = colors(shown)
    for position, (arm, found) in enumerate(shown.items()):
        mean, _ = mean_and_spread(found)
        places = [position + 0.3 * ((i + 0.5) / len(found) - 0.5) for i in range(len(found))]
        _mean(axes, position, mean, tints[arm], across=across, from_zero=from_zero)
        dots = (found, places) if across else (places, found)
        axes.plot(*dots, "o", color=tints[arm], markersize=4, markeredgecolor="white", markeredgewidth=0.6)
        finite = [v for v in found if math.isfinite(v)]
        if finite:
            top = max(finite)
            axes.annotate(
                f"{mean:.{digits}g}",
                (top, position) if across else (position, top),
                xytext=(5, 0) if across else (0, 5),
                textcoords="offset points",
                ha="left" if across else "center",
                va="center" if across else "bottom",
                fontsize=9,
                color=color(arm),
                fontweight="bold",
            )
    names = [label(arm) for arm in shown]
    if across:
        axes.set_yticks(range(len(shown)), names)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.15)
    else:
        axes.set_xticks(range(len(shown)), [name.replace(", ", ",\n", 1) for name in names])
        axes.set_xlim(-0.6, max(1, len(shown)) - 0.4)
        axes.tick_params(axis="x", length=0)
        axes.margins(y=0.15)
    axes.grid(axis="x" if across else "y", color=FAINT)
    titled(axes, title)


def _mean(axes: Any, position: float, mean: float, tint: str, *, across: bool, from_zero: bool) -> None:
    if not math.isfinite(mean):
        return
    if from_zero:
        (axes.barh if across else axes.bar)(position, mean, 0.6, color=tint, alpha=0.5)
    else:
        line = axes.vlines if across else axes.hlines
        line(mean, position - 0.3, position + 0.3, color=tint, linewidth=3, alpha=0.5)


def curves(
    axes: Any,
    lines: Mapping[str, Sequence[Sequence[float]]],
    title: str = "",
    *,
    at: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    x: str = "",
    y: str = "",
    log: bool = False,
    legend: bool = True,
) -> None:
    """For each arm the mean of its curves, with a band from the lowest to the highest.

    Args:
        axes: of `figure`.
        lines: for each arm its curves, one for each seed, all as long as the shortest is taken.
        title: what is shown.
        at: where the points are, for all or for each arm (default: 1, 2, ...).
        x, y: what the axes show.
        log: whether y grows by factors.
        legend: whether to name the arms in this one.
    """
    tints = colors(arm for arm in lines if len(lines[arm]))
    for arm, tint in tints.items():
        length = min(len(curve) for curve in lines[arm])
        columns = list(zip(*(curve[:length] for curve in lines[arm]), strict=True))
        places = at[arm] if isinstance(at, Mapping) else at
        where = list(places)[:length] if places is not None else list(range(1, length + 1))
        axes.plot(where, [mean_and_spread(c)[0] for c in columns], color=tint, label=label(arm))
        if len(lines[arm]) > 1:
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(where, low, high, color=tint, alpha=0.15, linewidth=0)
    if log:
        axes.set_yscale("log")
    axes.grid(axis="y", color=FAINT)
    titled(axes, title, x, y)
    if legend and tints:
        axes.legend(frameon=False, fontsize=9)


def save(drawn: Any, path: Path, note: str = "") -> None:
    """Write the figure as PNG, a note in small grey letters below; the same figure gives the same file."""
    if note:
        drawn.text(0.01, -0.005, note, color="#666666", va="top", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A format that is asked for by name is drawn by its own canvas, whatever backend there is.
    drawn.savefig(
        path, format="png", dpi=150, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None}
    )
