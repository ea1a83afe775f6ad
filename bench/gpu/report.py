"""The tables and pictures of a result file: python -m bench.gpu.report FILE.jsonl

They show the rows of the sources that measured last, and nothing unless these have passed stage 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..records import Results, Row
from ..report import number
from . import pictures, suite
from .ceilings import COPY
from .device import GpuResults, rate
from .naming import (
    about,
    base_title,
    case_title,
    label,
    peers_with,
    recipe_label,
    rows_of,
    share_of_ceiling,
)
from .ours import NATIVE, key
from .predictions import EXPECTATIONS, kind_of

# The unit that says whether figures may be shown; whoever looks at a file alone cannot ask the card.
VERDICT = "report/verdict"

_NATIVE = key(NATIVE)
_OMITTED = {
    "skipped": "not run",
    "graph_skipped": "no graph",
    "wrong": "WRONG, not timed",
}


def withheld(results: Results) -> str | None:
    """Why the figures of a file may not be shown, or None."""
    row = results.find(VERDICT, "report", "withheld")
    if row is None:
        return "No figure without a passed correctness stage, of which this file says nothing."
    return None if row["value"] is None else str(row["value"])


def latest(path: Path) -> GpuResults:
    """The rows of the sources, card and versions that measured last."""
    results = GpuResults(path)
    results.machine = results.rows[-1]["machine"] if results.rows else {}
    return results.current()


def write(path: Path) -> list[Path]:
    """Write the tables beside the rows, and pictures where matplotlib is installed; what was written."""
    results = latest(path)
    reason = withheld(results)
    text = path.with_suffix(".txt")
    with text.open("w") as file:
        plain = Console(file=file, width=200, color_system=None, highlight=False)
        for name, value in results.machine.items():
            plain.print(f"{name:>18}  {value}", markup=False)
        for sentence in suite.not_run(results):
            plain.print(f"\n{sentence}", markup=False)
        for table in (goals_table(results, reason), *([] if reason else tables(results))):
            plain.print()
            plain.print(table)
    if reason is not None or find_spec("matplotlib") is None:
        return [text]
    return [text, *pictures.draw_all(results, path.with_suffix(".png"))]


def goals_table(results: GpuResults, withheld: str | None = None) -> Table:
    """Prediction, goal and measurement; without any measurement if it may not be quoted."""
    columns = ("what", "predicted", "goal", "measured", "p20 .. p80", "met", "against")
    table = _table("Predictions and goals", *columns, left=(0, 6))
    for item in EXPECTATIONS:
        outcome = item.measure(results)
        met = item.is_met(outcome) if item.target and withheld is None else None
        at_least = ">=" if item.sign > 0 else "<="
        shown = "" if outcome.value is None else f"{outcome.value:.3g}{item.unit}"
        table.add_row(
            item.text,
            item.prediction,
            f"{at_least} {item.target:g}{item.unit}" if item.target else "",
            "not measured" if not shown else "withheld" if withheld else shown,
            f"{outcome.p20:.3g} .. {outcome.p80:.3g}" if outcome.p80 and withheld is None else "",
            "" if met is None else "yes" if met else "NO",
            outcome.against,
        )
    table.caption, table.caption_justify, table.caption_style = withheld, "left", "yellow"
    return table


def tables(results: GpuResults) -> Iterator[Table]:
    """Every table there are rows for."""
    absent: list[Row] = []
    if results.units("ceilings"):
        yield _ceilings_table(results)
    for section, table in (
        ("kernels", _passes_table),
        ("phase", _phase_table),
        ("train", _train_table),
        ("recipes", _recipes_table),
        ("sweep", _winners_table),
    ):
        for unit in results.units(section):
            if section != "sweep" and about(results, unit) is None:
                absent += rows_of(results, unit)
            elif (found := table(results, unit)) is not None:
                yield _with_notes(found, results, unit)
    if absent:
        yield _absent_table(absent)


def spread(row: Row | dict[str, Any] | None) -> str:
    return "" if row is None else f"{number(row['p20'])} .. {number(row['p80'])}"


def _table(title: str, *columns: str, left: tuple[int, ...] = (0,)) -> Table:
    table = Table(title=title, title_justify="left", header_style="", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in left else "right", no_wrap=True)
    return table


def _absent_table(rows: list[Row]) -> Table:
    """Units in which nobody was measured."""
    table = _table("Not measured", "unit", "who", "why", left=(0, 1, 2))
    for row in rows:
        if row["metric"] in _OMITTED:
            table.add_row(row["unit"], label(row["peer"]), str(row["value"]))
    return table


def _with_notes(table: Table, results: Results, unit: str) -> Table:
    """Who was left out, and why."""
    notes = [
        f"{label(row['peer'])}: {_OMITTED[row['metric']]}: {row['value']}"
        for row in rows_of(results, unit)
        if row["metric"] in _OMITTED
    ]
    table.caption, table.caption_justify, table.caption_style = "\n".join(notes) or None, "left", ""
    return table


def _middle(row: Row | dict[str, Any] | None) -> str:
    return number(row and row["p50"])


def _percent(share: dict[str, float] | None) -> str:
    return "" if share is None else f"{100 * share['p50']:.0f}%"


def _ceilings_table(results: GpuResults) -> Table:
    table = _table(
        "Ceilings: what plain loops reach, and what a launch costs", "loop", "", "p20 .. p80", "GB/s"
    )
    for unit in results.units("ceilings"):
        table.add_section()
        for row in rows_of(results, unit):
            if "p50" not in row:
                continue
            name, metric_unit = row["metric"].rsplit("_", 1) if "_" in row["metric"] else ("", row["metric"])
            where = f"{row['peer']}, {name or unit.split('/')[1]}"
            giga = f"{rate(row):,.0f}" if "bytes" in row else ""
            table.add_row(where, f"{_middle(row)} {metric_unit}", spread(row), giga)
    return table


def _passes_table(results: GpuResults, unit: str) -> Table:
    first = about(results, unit) or {}
    columns = [
        "pass",
        "ms in\na graph",
        "p20 .. p80",
        "ms\neager",
        "p20 .. p80",
        "GB/s",
        "of\nceiling",
        "x\nnative",
    ]
    # Where lists fit the cache, and where masks are selected.
    more = {
        "same_list_ms": "the same\nlist again",
        "copy_bytes_per_weight": "B/weight at\nthe copy rate",
        "peak_extra_bytes": "extra\nB/weight",
    }
    present = [metric for metric in more if peers_with(results, unit, metric)]
    title = f"Each pass by itself: {case_title(first)}, {unit.split('/')[-1]}"
    table = _table(title, *columns, *(more[metric] for metric in present))
    for peer in peers_with(results, unit, "graph_ms", "eager_ms"):
        graph, eager = (results.find(unit, peer, m) for m in ("graph_ms", "eager_ms"))
        row = graph or eager
        ratio = results.find(unit, peer, f"graph_to_{NATIVE}") or results.find(
            unit, peer, f"eager_to_{NATIVE}"
        )
        giga = rate(row) if row and "bytes" in row else None
        cells = []
        for metric in present:
            value = results.value(unit, peer, metric)
            per_weight = metric == "peak_extra_bytes" and value is not None
            cells.append(number(value / first["numel"] if per_weight else value))
        table.add_row(
            peer,
            _middle(graph),
            spread(graph),
            _middle(eager),
            spread(eager),
            "" if giga is None else f"{giga:,.0f}",
            _percent(share_of_ceiling(results, row, kind_of(peer))),
            _middle(ratio),
            *cells,
        )
    return table


def _winners_table(results: GpuResults, unit: str) -> Table | None:
    """Which value of a setting won; the passes it was judged by are in the rows."""
    winners = [row for row in rows_of(results, unit) if row["metric"] == "winner"]
    if not winners:
        return None
    table = _table(f"Sweeps: {unit.split('/', 1)[1]}", "setting", "winner", "x the default")
    for row in winners:
        table.add_row(row["peer"], str(row["value"]), number(row.get("ratio")))
    return table


def _phase_table(results: GpuResults, unit: str) -> Table:
    first = about(results, unit) or {}
    title = (
        f"One SAM step, optimizer phase only: {case_title(first)}, {base_title(first)}, {unit.split('/')[3]}"
    )
    table = _table(
        f"{title}; milliseconds",
        "peer",
        "eager",
        "p20 .. p80",
        "x ours",
        "in a\ngraph",
        "p20 .. p80",
        "x ours",
        "of\nceiling",
        "host\nus",
        "in place\nus",
        "launches",
        "in\nplace",
        "extra\nB/param",
        "first\ncall ms",
        "error",
    )
    for peer in peers_with(results, unit, "eager_ms", "graph_ms"):
        eager, graph = (results.find(unit, peer, m) for m in ("eager_ms", "graph_ms"))
        row = graph or eager
        value = {
            metric: results.value(unit, peer, metric)
            for metric in ("launches", "launches_in_place", "peak_extra_bytes", "first_call_ms", "error")
        }
        extra, error = value["peak_extra_bytes"], value["error"]
        table.add_row(
            label(peer),
            _middle(eager),
            spread(eager),
            _middle(results.ratio(unit, peer, _NATIVE, "eager_ms")),
            _middle(graph),
            spread(graph),
            _middle(results.ratio(unit, peer, _NATIVE, "graph_ms")),
            _percent(share_of_ceiling(results, row, COPY)),
            _middle(results.find(unit, peer, "host_us")),
            _middle(results.find(unit, peer, "host_us_in_place")),
            str(value["launches"] or ""),
            str(value["launches_in_place"] or ""),
            "" if extra is None else f"{extra / first['numel']:.2f}",
            number(value["first_call_ms"]),
            "" if error is None else f"{error:.0e}",
        )
    return table


def training_title(row: Row) -> str:
    return f"{case_title(row)}, {base_title(row)}, batch {row['batch']}, {row['precision']}"


def _train_table(results: GpuResults, unit: str) -> Table:
    first = about(results, unit) or {}
    item = first["item"]
    table = _table(
        f"Whole training step: {training_title(first)}; milliseconds",
        "peer",
        "eager",
        "p20 .. p80",
        "of which\noptimizer",
        f"{item}/s",
        "x ours",
        "peak\nGB",
        "in a\ngraph",
        "p20 .. p80",
        f"{item}/s",
        "x ours",
        "peak\nGB",
    )
    for peer in peers_with(results, unit, "total_ms", "graph_ms"):
        eager, graph = (results.find(unit, peer, m) for m in ("total_ms", "graph_ms"))
        table.add_row(
            label(peer),
            _middle(eager),
            spread(eager),
            _middle(results.find(unit, peer, "optimizer_ms")),
            _middle(results.find(unit, peer, f"{item}_per_second")),
            _middle(results.ratio(unit, peer, _NATIVE, "total_ms")),
            gigabytes(results.value(unit, peer, "peak_bytes")),
            _middle(graph),
            spread(graph),
            _middle(results.find(unit, peer, f"graph_{item}_per_second")),
            _middle(results.ratio(unit, peer, _NATIVE, "graph_ms")),
            gigabytes(results.value(unit, peer, "graph_peak_bytes")),
        )
    return table


def gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def _recipes_table(results: GpuResults, unit: str) -> Table:
    first = about(results, unit) or {}
    item = first["item"]
    table = _table(
        f"Whole training step of recipes: {training_title(first)}; milliseconds",
        "recipe",
        "gradients",
        "step",
        "p20 .. p80",
        "x base\nalone",
        "p20 .. p80\nof that",
        "x SAM",
        f"{item}/s",
        "peak\nGB",
    )
    for peer in peers_with(results, unit, "total_ms"):
        row = results.find(unit, peer, "total_ms")
        base = results.find(unit, peer, "total_to_base")
        table.add_row(
            recipe_label(results, unit, peer),
            number(results.value(unit, peer, "gradients")),
            _middle(row),
            spread(row),
            _middle(base),
            spread(base),
            _middle(results.find(unit, peer, "total_to_sam")),
            _middle(results.find(unit, peer, f"{item}_per_second")),
            gigabytes(results.value(unit, peer, "peak_bytes")),
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.report", description=__doc__)
    parser.add_argument("file", type=Path, help="a .jsonl file written by python -m bench.gpu")
    path = parser.parse_args(arguments).file
    if not path.exists():
        parser.error(f"{path} does not exist; expected a .jsonl file written by python -m bench.gpu")
    print(*write(path), sep="\n")
    reason = withheld(latest(path))
    if reason is not None:
        print(reason)
    return 0 if reason is None else 1


if __name__ == "__main__":
    raise SystemExit(main())
