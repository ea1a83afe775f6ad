"""The picture of a result file: python -m bench.plot FILE"""

from __future__ import annotations

import argparse
from pathlib import Path

from .cases import BASES, CASES
from .goals import OURS
from .peers import COPY, label
from .records import Results
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
_OURS, _BOUND, _OTHER = "#1b6ca8", "#b5b5b5", "#e0894a"
_COLUMNS = 4


def _ratio(results: Results, unit: str, key: str) -> dict[str, float] | None:
    ratios = [results.ratio(unit, form, OURS, "total_ms") for form in _FORMS.get(key, (key,))]
    return min((r for r in ratios if r is not None), key=lambda r: r["p50"], default=None)


def _color(key: str) -> str:
    if key in (COPY, "base_alone"):
        return _BOUND
    return _OURS if key.startswith("ours") else _OTHER


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
    machine = results.rows[0]["machine"]
    figure.suptitle(
        "Time of one SAM step, optimizer phase only (norm, perturb, restore, update), relative to ours; "
        "shorter is faster\n"
        f"{machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}; "
        "medians of interleaved rounds, whiskers p20 to p80; grey bars do less work than a SAM step",
        fontsize=11,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)
    return True


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
        middle = ratio["p50"]
        spread = [[middle - ratio["p20"]], [ratio["p80"] - middle]]
        axis.barh(
            place, middle, color=_color(key), height=0.72, xerr=spread, error_kw={"lw": 1, "ecolor": "0.25"}
        )
        axis.annotate(
            number(middle), (ratio["p80"], place), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.axvline(1, color=_OURS, lw=1, ls=":")
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
    if not draw(Results(arguments.file), target):
        print(f"{arguments.file} has no timed step of '{OURS}', to which the picture is relative")
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
