"""The pictures of a GPU's results: phase, passes and training steps in one, recipes in another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..peers import COPY
from ..plot import BLUE, GREY, ORANGE, bar
from ..records import Row
from ..training import PLAIN
from .device import GpuResults
from .naming import (
    about,
    base_title,
    case_title,
    label,
    peers_with,
    recipe_label,
    roofline_ms,
    share_of_ceiling,
)
from .ours import NATIVE, OURS
from .predictions import kind_of

# As in the pictures of CPUs: what does less work than a SAM step, ours, the others.
_BOUNDS = (COPY, "base_alone", PLAIN)
_TRITON, _GRAPH = "#3f9e8f", 0.55  # green, and how opaque the bars of graphs are
_COLUMNS = 3
_LINE = 0.24  # inches a bar takes

Panel = Callable[[Any, GpuResults, str], None]


def draw_all(results: GpuResults, target: Path) -> list[Path]:
    """Write the pictures for which there is something to draw."""
    recipes = target.with_name(f"{target.stem}_recipes{target.suffix}")
    drawn = {target: draw(results, target), recipes: draw_recipes(results, recipes)}
    return [path for path, is_there in drawn.items() if is_there]


def draw(results: GpuResults, target: Path) -> bool:
    """Optimizer phase, passes and training steps; False if there is nothing to draw."""
    bands: list[tuple[str, Panel, list[str]]] = [
        (
            "Optimizer phase of one SAM step, milliseconds; dotted: our bytes at the device's copy rate; "
            "shorter is faster",
            _phase_panel,
            [u for u in results.units("phase") if peers_with(results, u, "eager_ms", "graph_ms")],
        ),
        (
            "Each pass by itself in a graph, share of what plain loops reach (reading for norms, copying for "
            "the rest); longer is faster",
            _passes_panel,
            [u for u in results.units("kernels") if peers_with(results, u, "graph_ms") and _is_bare(u)],
        ),
        (
            "Whole training step, thousands of images or tokens a second; longer is faster",
            _train_panel,
            [u for u in results.units("train") if peers_with(results, u, "total_ms", "graph_ms")],
        ),
    ]
    return _draw(
        results,
        [band for band in bands if band[2]],
        "grey bars do less work than a SAM step, green is Triton, pale bars are CUDA graphs",
        target,
    )


def _is_bare(unit: str) -> bool:
    """Passes under masks have a table alone: they are many, and are held against the bare ones there."""
    return not unit.endswith("/masked")


def draw_recipes(results: GpuResults, target: Path) -> bool:
    """Every recipe's training step over that of the base alone; False if there is nothing to draw."""
    units = [u for u in results.units("recipes") if peers_with(results, u, "total_to_base")]
    title = "Whole training step of each recipe over that of the base optimizer alone; shorter is faster"
    return _draw(results, [(title, _recipes_panel, units)] if units else [], "dotted: the base alone", target)


def _draw(results: GpuResults, bands: list[tuple[str, Panel, list[str]]], note: str, target: Path) -> bool:
    """Bands of panels, one above another."""
    if not bands:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [_lines(results, units) for _, _, units in bands]
    heights = [sum(_LINE * most + 0.75 for most in band) + 0.45 for band in lines]
    figure = pyplot.figure(figsize=(17, sum(heights) + 1.0), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    parts = figure.subfigures(len(bands), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, panel, units), band in zip(parts, bands, lines, strict=True):
        part.suptitle(title, fontsize=11, x=0.01, ha="left", weight="bold")
        columns = min(_COLUMNS, len(units))
        axes = part.subplots(len(band), columns, squeeze=False, height_ratios=[most + 2 for most in band])
        for axis in axes.flat[len(units) :]:
            axis.set_visible(False)
        for number, (axis, unit) in enumerate(zip(axes.flat, units, strict=False)):
            panel(axis, results, unit)
            axis.margins(x=0.16)
            axis.set_xlim(left=0)
            axis.set_ylim(band[number // columns] - 0.4, -0.6)  # bars of one height, the first on top
            axis.tick_params(axis="x", labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, results, note, target)
    return True


def _lines(results: GpuResults, units: list[str]) -> list[int]:
    """The most bars a panel has, row by row of panels."""
    counts = [len(_bars(results, unit)) for unit in units]
    columns = min(_COLUMNS, len(units))
    return [max(counts[i : i + columns]) for i in range(0, len(counts), columns)]


def _bars(results: GpuResults, unit: str) -> list[tuple[str, str]]:
    """Peers and metrics of a unit's panel, from top to bottom: a peer's graph below its eager steps."""
    section = unit.split("/")[0]
    if section == "recipes":
        return [(p, "total_to_base") for p in peers_with(results, unit, "total_to_base")]
    if section == "kernels":
        return [(p, "graph_ms") for p in peers_with(results, unit, "graph_ms")]
    eager = "eager_ms"
    if section == "train":
        item = (about(results, unit) or {})["item"]
        metrics: tuple[str, ...] = (f"{item}_per_second", f"graph_{item}_per_second")
    else:
        metrics = (eager, "graph_ms")
    peers = peers_with(results, unit, *metrics)
    ordered = sorted(peers, key=lambda p: (p not in _BOUNDS, p not in OURS))
    return [(p, m) for p in ordered for m in metrics if results.find(unit, p, m) is not None]


def _color(peer: str) -> str:
    if peer in _BOUNDS:
        return GREY
    return ORANGE if peer not in OURS else BLUE if NATIVE in peer else _TRITON


def _panel(axis: Any, results: GpuResults, unit: str, scale: float = 1.0) -> None:
    """Bars of measured rows with their names; those of graphs are paler."""
    names = []
    for place, (peer, metric) in enumerate(_bars(results, unit)):
        row = results.find(unit, peer, metric)
        is_graph = metric.startswith("graph_")
        bar(axis, place, _scaled(row, scale), _color(peer))
        if is_graph:
            axis.patches[-1].set_alpha(_GRAPH)
        names.append(f"{label(peer)}, graph" if is_graph else label(peer))
    axis.set_yticks(range(len(names)), names, fontsize=8.5)


def _scaled(row: Row | None, scale: float) -> dict[str, float]:
    return {name: scale * row[name] for name in ("p20", "p50", "p80")} if row else {}


def _phase_panel(axis: Any, results: GpuResults, unit: str) -> None:
    first = about(results, unit) or {}
    _panel(axis, results, unit)
    ours = next(
        (row for o in OURS for m in ("eager_ms", "graph_ms") if (row := results.find(unit, o, m))), None
    )
    bound = roofline_ms(results, ours)
    if bound is not None:
        axis.axvline(bound, color=BLUE, lw=1, ls=":")
    what = ", ".join(unit.split("/")[3:])
    axis.set_title(f"{case_title(first)}\n{base_title(first)}, {what}", fontsize=9.5)


def _passes_panel(axis: Any, results: GpuResults, unit: str) -> None:
    bars = _bars(results, unit)
    for place, (peer, metric) in enumerate(bars):
        share = share_of_ceiling(results, results.find(unit, peer, metric), kind_of(peer))
        if share is not None:
            bar(axis, place, share, BLUE if peer.startswith(NATIVE) else _TRITON)
    axis.axvline(1, color="0.4", lw=1, ls=":")
    axis.set_yticks(range(len(bars)), [peer for peer, _ in bars], fontsize=8.5)
    row = about(results, unit) or {}
    axis.set_title(f"{case_title(row)}, {unit.split('/')[-1]}", fontsize=9.5)


def _train_panel(axis: Any, results: GpuResults, unit: str) -> None:
    first = about(results, unit) or {}
    _panel(axis, results, unit, scale=1e-3)
    how = f"batch {first['batch']}, {first['precision']}, 1,000 {first['item']}/s"
    axis.set_title(f"{case_title(first)}, {base_title(first)}\n{how}", fontsize=9.5)


def _recipes_panel(axis: Any, results: GpuResults, unit: str) -> None:
    bars = _bars(results, unit)
    for place, (peer, metric) in enumerate(bars):
        bar(axis, place, results.find(unit, peer, metric), BLUE)
    axis.axvline(1, color=GREY, lw=1.5, ls=":")
    axis.set_yticks(range(len(bars)), [recipe_label(results, unit, p) for p, _ in bars], fontsize=8.5)
    row, alone = about(results, unit) or {}, results.find(unit, PLAIN, "total_ms")
    one = f"; 1 = {alone['p50']:.3g} ms" if alone else ""
    axis.set_title(f"{case_title(row)}, {base_title(row)}\nbatch {row['batch']}{one}", fontsize=9.5)


def _finish(figure: Any, results: GpuResults, note: str, target: Path) -> None:
    """Say who measured, and write it."""
    from matplotlib import pyplot

    of = results.machine
    versions = ", ".join(f"{name} {of.get(name)}" for name in ("driver", "torch", "triton", "commit"))
    how = "medians of interleaved rounds, whiskers p20 to p80"
    figure.suptitle(f"{of['gpu']}, {versions}\n{how}; {note}", fontsize=11)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)
    pyplot.close(figure)
