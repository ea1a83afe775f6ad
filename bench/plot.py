"""The pictures of a result file: python -m bench.plot FILE"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import sparse, variants
from .cases import BASES, CASES
from .goals import OURS
from .peers import COPY, label
from .records import Results, Row
from .report import number

_PEERS = (
    COPY,
    "base_alone",
    OURS,
    "ours_foreach",
    "compile",
    "foreach_item",
    "foreach",
    "po",
    "eager_fused",
    "eager_foreach",
    "eager_default",
)
# Peers that come in forms of which the fastest speaks for all.
_FORMS = {"compile": ("compile_own", "compile_torch"), "po": ("po_loop", "po_fused", "po_foreach")}
_LABELS = {"compile": "torch.compile, best form", "po": "pytorch-optimizer, best form"}
BLUE, GREY, ORANGE = "#1b6ca8", "#b5b5b5", "#e0894a"  # ours, bounds, others
_COLUMNS = 4


def _ratio(results: Results, unit: str, key: str) -> dict[str, float] | None:
    ratios = [results.ratio(unit, form, OURS, "total_ms") for form in _FORMS.get(key, (key,))]
    return min((r for r in ratios if r is not None), key=lambda r: r["p50"], default=None)


def _color(key: str) -> str:
    if key in (COPY, "base_alone"):
        return GREY
    return BLUE if key.startswith("ours") else ORANGE


def draw_all(results: Results, target: Path) -> list[Path]:
    """Write the pictures for which there is something to draw; those of sections beside that of the steps."""

    def beside(section: str) -> Path:
        return target.with_name(f"{target.stem}_{section}{target.suffix}")

    pictures = {target: draw, beside("sparse"): draw_sparse, beside("variants"): draw_variants}
    return [path for path, drawn in pictures.items() if drawn(results, path)]


def draw(results: Results, target: Path) -> bool:
    """Write the picture; False if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    units = [unit for unit in results.units("step") if results.find(unit, OURS, "total_ms") is not None]
    if not units:
        return False
    columns = min(_COLUMNS, len(units))
    rows = -(-len(units) // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(3.3 * columns + 2.2, 3.5 * rows + 0.9),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(units) :]:
        axis.set_visible(False)
    for axis, unit in zip(axes.flat, units, strict=False):
        _panel(axis, results, unit)
    _finish(
        figure,
        "Time of one SAM step, optimizer phase only (norm, perturb, restore, update), relative to ours; "
        "shorter is faster",
        "grey bars do less work than a SAM step",
        results.find(units[0], OURS, "total_ms"),
        target,
    )
    return True


def _finish(figure, title: str, note: str, row: Row, target: Path) -> None:  # type: ignore[no-untyped-def]
    """Say what it is and who measured, and write it."""
    from matplotlib import pyplot

    machine = row["machine"]
    figure.suptitle(
        f"{title}\n{machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}; "
        f"medians of interleaved rounds, whiskers p20 to p80; {note}",
        fontsize=11,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _panel(axis, results: Results, unit: str) -> None:  # type: ignore[no-untyped-def]
    places = range(len(_PEERS))
    ours = results.find(unit, OURS, "total_ms")
    for place, key in zip(places, _PEERS, strict=True):
        ratio = _ratio(results, unit, key)
        if ratio is None:
            axis.text(
                0.03,
                place,
                "not run",
                va="center",
                fontsize=8,
                color="0.5",
                transform=axis.get_yaxis_transform(),
            )
            continue
        bar(axis, place, ratio, _color(key))
    axis.axvline(1, color=BLUE, lw=1, ls=":")
    axis.set_yticks(list(places), [_LABELS.get(key) or label(key) for key in _PEERS], fontsize=9)
    axis.invert_yaxis() if not axis.yaxis_inverted() else None
    axis.margins(x=0.16)
    axis.set_xlim(left=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    dtype = "" if ours["dtype"] == "float32" else f", {ours['dtype']}"
    axis.set_title(
        f"{CASES[ours['case']].title}, {BASES[ours['base']].title}{dtype}\n1 = {ours['p50']:.3g} ms",
        fontsize=9.5,
    )


def bar(  # type: ignore[no-untyped-def]
    axis,
    place: float,
    spread: dict[str, float] | Row,
    color: str,
    unit: str = "",
    height: float = 0.72,
) -> None:
    """A median with its whiskers and its number."""
    middle = spread["p50"]
    # Equal ratios differ in their last bit once they are interpolated.
    whiskers = [[max(0.0, middle - spread["p20"])], [max(0.0, spread["p80"] - middle)]]
    axis.barh(place, middle, color=color, height=height, xerr=whiskers, error_kw={"lw": 1, "ecolor": "0.25"})
    axis.annotate(
        number(middle) + unit,
        (spread["p80"], place),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )


def draw_sparse(results: Results, target: Path) -> bool:
    """Write the picture of sparse SAM: masks anew above, steps below; False if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    updates = [u for u in results.units("sparse") if u.startswith("sparse/update/")]
    updates = [u for u in updates if any(p.startswith(OURS) for p in _timed(results, u))]
    steps = [u for u in results.units("sparse") if results.find(u, sparse.DENSE, "total_ms") is not None]
    if not updates and not steps:
        return False
    rows = [units for units in (updates, steps) if units]
    heights = [1.5 if units is updates else 1.2 for units in rows]
    figure, axes = pyplot.subplots(
        len(rows),
        2,
        figsize=(13.5, 3.2 * sum(heights) + 0.9),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    for line, units in zip(axes, rows, strict=True):
        for axis in line[len(units) :]:
            axis.set_visible(False)
        for axis, unit in zip(line, units, strict=False):
            (_updates_panel if units is updates else _masked_panel)(axis, results, unit)
            axis.invert_yaxis()
            axis.tick_params(axis="x", labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    unit = (updates or steps)[0]
    note = "shorter is faster"
    _finish(
        figure,
        "Sparse SAM on ResNet-50's list",
        note,
        results.find(unit, _timed(results, unit)[0], "total_ms"),
        target,
    )
    return True


def _timed(results: Results, unit: str) -> list[str]:
    return [peer for peer in results.peers(unit) if results.find(unit, peer, "total_ms") is not None]


def _updates_panel(axis, results: Results, unit: str) -> None:  # type: ignore[no-untyped-def]
    """Milliseconds of a new selection, grouped by sparsity."""
    peers = _timed(results, unit)
    names, places, place = [], [], 0.0
    for sparsity in sparse.SPARSITIES:
        for peer in (p for p in peers if p.endswith(f" {sparsity}")):
            bar(axis, place, results.find(unit, peer, "total_ms"), _color(peer), " ms")
            names.append(sparse.label(peer))
            places.append(place)
            place += 1
        place += 0.5
    axis.set_yticks(places, names, fontsize=9)
    axis.margins(x=0.16)
    axis.set_xlim(left=0)
    axis.set_title(f"masks anew: {sparse.UPDATES[unit.split('/')[-1]]}", fontsize=9.5)


def _masked_panel(axis, results: Results, unit: str) -> None:  # type: ignore[no-untyped-def]
    """Steps relative to our dense one."""
    peers = _timed(results, unit)
    for place, peer in enumerate(peers):
        bar(axis, place, results.ratio(unit, peer, sparse.DENSE, "total_ms"), _color(peer))
    axis.axvline(1, color=BLUE, lw=1, ls=":")
    axis.set_yticks(range(len(peers)), [sparse.label(peer) for peer in peers], fontsize=9)
    axis.margins(x=0.16)
    axis.set_xlim(left=0)
    dense = results.find(unit, sparse.DENSE, "total_ms")
    axis.set_title(
        f"one step with masks, {BASES[dense['base']].title}; 1 = {dense['p50']:.3g} ms, dense", fontsize=9.5
    )


def draw_variants(results: Results, target: Path) -> bool:
    """Write the picture of all recipes, relative to the base alone; False if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {unit: set(_timed(results, unit)) for unit in results.units("variants")}
    bars = {unit: peers for unit, peers in bars.items() if variants.ALONE in peers and len(peers) > 1}
    if not bars:
        return False
    figure, axis = pyplot.subplots(figsize=(13, 0.45 * len(bars) + 2), layout="constrained")
    names, places = [], []
    for place, (unit, peers) in enumerate(bars.items()):
        for offset, peer in zip((-0.2, 0.2), (variants.OURS, variants.PUBLISHED), strict=True):
            if peer in peers:
                ratio = results.ratio(unit, peer, variants.ALONE, "total_ms")
                bar(axis, place + offset, ratio, _color(peer), height=0.38)
        names.append(variants.VARIANTS[unit.split("/")[-1]].title)
        places.append(place)
    axis.axvline(1, color=GREY, lw=1.5, ls=":")
    axis.set_yticks(places, names, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.1, y=0.02)
    axis.set_xlim(left=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=_color(p)) for p in (variants.OURS, variants.PUBLISHED)]
    labels = [variants.label(p) for p in (variants.OURS, variants.PUBLISHED)]
    figure.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=2, frameon=False)
    alone = results.find(next(iter(bars)), variants.ALONE, "total_ms")
    _finish(
        figure,
        f"One step of every recipe on {CASES[alone['case']].title}'s list, {BASES[alone['base']].title}, "
        "optimizer phase only; shorter is faster",
        f"1 = {number(alone['p50'])} ms, the base alone, fused",
        alone,
        target,
    )
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("file", type=Path, help="a .jsonl file written by python -m bench.run")
    parser.add_argument("--out", type=Path, help="the picture (default: beside the file)")
    arguments = parser.parse_args()
    if not arguments.file.exists():
        parser.error(
            f"{arguments.file} does not exist; expected a .jsonl file written by python -m bench.run"
        )
    target = arguments.out or arguments.file.with_suffix(".png")
    pictures = draw_all(Results(arguments.file), target)
    if not pictures:
        print(f"{arguments.file} has no timed step of '{OURS}', to which the pictures are relative")
        return 1
    print(*pictures, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
