"""Results as text tables."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import sparse, variants
from .cases import BASES, CASES
from .goals import GOALS, OURS, Outcome, fraction_of_roofline
from .passes import BACKENDS, BYTES
from .peers import COPY, SPECS, label
from .records import Results, Row
from .training import MODELS, PLAIN, PLAIN_LABEL

# Cores that neighbours may use before numbers are suspect, and why they are.
QUIET = 0.1
NOISE = (
    "peers with hundreds of small parallel regions wait for their threads far more than we do then, "
    "so even ratios flatter us; not to be quoted"
)

SECTIONS = ("step", "host", "passes", "sparse", "variants", "train", "whole")


def number(x: float | None) -> str:
    """Three figures, without exponents."""
    if x is None:
        return ""
    return (
        f"{x:,.0f}"
        if abs(x) >= 100
        else f"{x:.1f}"
        if abs(x) >= 10
        else f"{x:.2f}"
        if abs(x) >= 0.1
        else f"{x:.3f}"
    )


def _spread(row: Row | None) -> str:
    return "" if row is None else f"{number(row['p20'])} .. {number(row['p80'])}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _heading(row: Row) -> str:
    size = f"{row['tensors']} tensors, {row['numel'] / 1e6:.2f}M"
    return f"{CASES[row['case']].title} ({size}), {BASES[row['base']].title}"


def unit_table(results: Results, unit: str) -> Table:
    """The table of one unit, whatever its section."""
    section = unit.split("/")[0]
    tables = {
        "step": _step_table,
        "host": _host_table,
        "passes": _passes_table,
        "sparse": _update_table if unit.startswith("sparse/update/") else _masked_table,
        "variants": lambda results, unit: variants_table(results, [unit]),
        "train": _train_table,
        "whole": _whole_table,
    }
    return tables[section](results, unit)


def _reasons(results: Results, unit: str, table: Table) -> Table:
    return _with_notes(table, _notes(results, unit))


def _with_notes(table: Table, notes: list[str]) -> Table:
    table.caption, table.caption_justify, table.caption_style = "\n".join(notes) or None, "left", ""
    return table


def _notes(results: Results, unit: str) -> list[str]:
    """Who was left out, and why."""
    notes = []
    for row in results.rows:
        if row["unit"] == unit and row["metric"] in ("skipped", "wrong"):
            name = label(row["peer"]) if row["peer"] in SPECS else row["peer"]
            if unit.startswith("sparse/"):
                name = sparse.label(row["peer"])
            if unit.startswith("variants/"):
                name = variants.label(row["peer"])
            word = "WRONG, not timed" if row["metric"] == "wrong" else "not run"
            notes.append(f"{name}: {word}: {row['value']}")
    return notes


def _step_table(results: Results, unit: str) -> Table:
    rows = [row for row in results.rows if row["unit"] == unit]
    table = _table(
        f"One SAM step, optimizer phase only: {_heading(rows[0])}, {rows[0]['dtype']}; milliseconds",
        "peer",
        "norm +\nperturb",
        "restore +\nupdate",
        "step",
        "p20 .. p80",
        "x ours",
        "B/\nparam",
        "GB/s",
        "of\ncopy",
        "extra\nB/param",
        "first\ncall ms",
        "compile\ns",
        "error",
    )
    copy = results.find(unit, COPY, "total_ms")
    for key in (*SPECS, COPY):
        total = results.find(unit, key, "total_ms")
        if total is None:
            continue

        def value(metric: str, key: str = key) -> float | None:
            return results.value(unit, key, metric)

        ratio = results.ratio(unit, key, OURS, "total_ms")
        extra, error = value("extra_bytes"), value("error")
        table.add_row(
            label(key),
            number(value("phase1_ms")) if SPECS.get(key, SPECS[OURS]).ascent else "",
            number(value("phase2_ms")),
            number(total["p50"]),
            _spread(total),
            number(ratio and ratio["p50"]),
            number(total["bytes"] / total["numel"]),
            number(total["bytes"] / total["p50"] / 1e6),
            _percent(copy and total["bytes"] / copy["bytes"] * copy["p50"] / total["p50"]),
            "" if extra is None else f"{extra / total['numel']:.2f}",
            number(value("first_call_ms")),
            number(_compile_seconds(results, unit, key)),
            "" if error is None else f"{error:.0e}",
        )
    return _reasons(results, unit, table)


def _percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.0f}%"


def _compile_seconds(results: Results, unit: str, key: str) -> float | None:
    """Both halves; the first is one function for all compiled peers, so one of them finds it compiled."""
    second = results.value(unit, key, "compile2_s")
    if second is None:
        return None
    firsts = [
        results.value(unit, other, "compile1_s") for other, spec in SPECS.items() if spec.kind == "compiled"
    ]
    return second + max(x for x in firsts if x is not None)


def _host_table(results: Results, unit: str) -> Table:
    rows = [row for row in results.rows if row["unit"] == unit]
    title = f"{CASES[rows[0]['case']].title}, {BASES[rows[0]['base']].title}"
    table = _table(
        f"Host time of one SAM step: {rows[0]['tensors']} tensors of one element ({title}); microseconds",
        "peer",
        "norm +\nperturb",
        "restore +\nupdate",
        "step",
        "p20 .. p80",
        "x ours",
        "per tensor",
    )
    for key in SPECS:
        total = results.find(unit, key, "total_ms")
        if total is None:
            continue
        phases = [results.value(unit, key, f"phase{i}_ms") for i in (1, 2)]
        ratio = results.ratio(unit, key, OURS, "total_ms")
        table.add_row(
            label(key),
            number(1e3 * phases[0]) if SPECS[key].ascent else "",
            number(1e3 * phases[1]),
            number(1e3 * total["p50"]),
            f"{number(1e3 * total['p20'])} .. {number(1e3 * total['p80'])}",
            number(ratio and ratio["p50"]),
            number(1e3 * total["p50"] / total["tensors"]),
        )
    return _reasons(results, unit, table)


def _passes_table(results: Results, unit: str) -> Table:
    rows = [row for row in results.rows if row["unit"] == unit]
    table = _table(
        f"Every pass by itself on {rows[0]['numel'] / 2**20:.1f}M elements, {rows[0]['dtype']}",
        "pass",
        "ms",
        "p20 .. p80",
        "GB/s",
        "of\nroofline",
        "p20 .. p80\nof that",
        "roofline",
    )

    def add(peer: str, outcome: Outcome) -> None:
        row = results.find(unit, peer, "total_ms")
        if row is None:
            return
        spread = "" if outcome.value is None else f"{_percent(outcome.p20)} .. {_percent(outcome.p80)}"
        table.add_row(
            peer,
            number(row["p50"]),
            _spread(row),
            number(row["bytes"] / row["p50"] / 1e6),
            _percent(outcome.value),
            spread,
            outcome.against,
        )

    for peer in results.peers(unit):
        if ":" in peer:
            add(peer, Outcome(None))
    for backend in BACKENDS:
        table.add_section()
        for name in BYTES:
            add(f"{backend} {name}", fraction_of_roofline(results, unit, backend, name))
    return _reasons(results, unit, table)


def _update_table(results: Results, unit: str) -> Table:
    rows = [row for row in results.rows if row["unit"] == unit]
    size = f"{rows[0]['tensors']} tensors, {rows[0]['numel'] / 1e6:.2f}M"
    kind = sparse.UPDATES[unit.split("/")[-1]]
    table = _table(
        f"Masks anew: {CASES[rows[0]['case']].title} ({size}), {kind}; milliseconds",
        "peer, sparsity",
        "ms",
        "p20 .. p80",
        "x ours",
        "scratch B/param\n(counted)",
        "scratch B/param\n(resident)",
        "masks\nB/param",
    )
    for sparsity in sparse.SPARSITIES:
        for peer in (p for p in results.peers(unit) if p.endswith(f" {sparsity}")):
            total = results.find(unit, peer, "total_ms")
            if total is None:
                continue
            ratio = results.ratio(unit, peer, f"{OURS} {sparsity}", "total_ms")
            memory = [results.value(unit, peer, f"{what}_bytes") for what in ("extra", "resident", "mask")]
            table.add_row(
                sparse.label(peer),
                number(total["p50"]),
                _spread(total),
                number(ratio and ratio["p50"]),
                *("" if count is None else f"{count / total['numel']:.3f}" for count in memory),
            )
        table.add_section()
    return _reasons(results, unit, table)


def _masked_table(results: Results, unit: str) -> Table:
    rows = [row for row in results.rows if row["unit"] == unit]
    table = _table(
        f"One step with masks, optimizer phase only: {_heading(rows[0])}; milliseconds",
        "peer, mask",
        "norm +\nperturb",
        "restore +\nupdate",
        "step",
        "p20 .. p80",
        "x ours,\ndense",
        "p20 .. p80\nof that",
        "weights\nperturbed",
        "snapshots,\nB/param",
    )
    count = rows[0]["numel"]
    for peer in results.peers(unit):
        total = results.find(unit, peer, "total_ms")
        if total is None:
            continue
        ratio = results.ratio(unit, peer, sparse.DENSE, "total_ms")
        snapshots = results.value(unit, peer, "snapshot_bytes")
        table.add_row(
            sparse.label(peer),
            number(results.value(unit, peer, "phase1_ms")),
            number(results.value(unit, peer, "phase2_ms")),
            number(total["p50"]),
            _spread(total),
            number(ratio and ratio["p50"]),
            "" if ratio is None else f"{number(ratio['p20'])} .. {number(ratio['p80'])}",
            _percent(results.value(unit, peer, "density")),
            number(None if snapshots is None else snapshots / count),
        )
    return _reasons(results, unit, table)


def variants_table(results: Results, units: list[str]) -> Table:
    """All recipes in one table, each measured with its own base alone."""
    rows = [row for row in results.rows if row["unit"] == units[0]]
    table = _table(
        f"One step of every recipe, optimizer phase only: {_heading(rows[0])}; milliseconds",
        "recipe",
        "base alone,\nfused",
        "ours",
        "p20 .. p80",
        "x base",
        "as\npublished",
        "p20 .. p80",
        "x base",
        "x ours",
        "p20 .. p80\nof that",
        "B/param as\npublished",
        "apart",
    )
    notes = []
    for unit in units:
        title = variants.VARIANTS[unit.split("/")[-1]].title
        alone, ours, theirs = (
            results.find(unit, peer, "total_ms")
            for peer in (variants.ALONE, variants.OURS, variants.PUBLISHED)
        )
        cells = [number(alone and alone["p50"])]
        for row in (ours, theirs):
            ratio = row and results.ratio(unit, row["peer"], variants.ALONE, "total_ms")
            cells += [number(row and row["p50"]), _spread(row), number(ratio and ratio["p50"])]
        ratio = results.ratio(unit, variants.PUBLISHED, variants.OURS, "total_ms")
        count, error = (
            results.value(unit, variants.PUBLISHED, metric) for metric in ("bytes_per_parameter", "error")
        )
        table.add_row(
            title,
            *cells,
            number(ratio and ratio["p50"]),
            "" if ratio is None else f"{number(ratio['p20'])} .. {number(ratio['p80'])}",
            number(count),
            "" if error is None else f"{error:.0e}",
        )
        notes += [f"{title}: {note}" for note in _notes(results, unit)]
    return _with_notes(table, notes)


def _train_table(results: Results, unit: str) -> Table:
    rows = [row for row in results.rows if row["unit"] == unit]
    first = rows[0]
    table = _table(
        f"Whole training step: {MODELS[first['case']][0]} ({first['numel'] / 1e6:.1f}M), "
        f"{BASES[first['base']].title}, batch {first['batch']}; "
        "two forward and backward passes and the optimizer phase; milliseconds",
        "peer",
        "step",
        "p20 .. p80",
        "of which\noptimizer",
        "share",
        f"{first['unit_of_items']}/s",
        "x ours",
    )
    for key in results.peers(unit):
        total, phase = (results.find(unit, key, metric) for metric in ("total_ms", "optimizer_ms"))
        if total is None or phase is None:
            continue
        ratio = results.ratio(unit, key, OURS, "total_ms")
        table.add_row(
            PLAIN_LABEL if key == PLAIN else label(key),
            number(total["p50"]),
            _spread(total),
            number(phase["p50"]),
            _percent(phase["p50"] / total["p50"]),
            number(1e3 * first["items"] / total["p50"]),
            number(ratio and ratio["p50"]),
        )
    return _reasons(results, unit, table)


def _whole_table(results: Results, unit: str) -> Table:
    rows = [row for row in results.rows if row["unit"] == unit]
    first = rows[0]
    table = _table(
        f"Whole training step of every recipe: {MODELS[first['case']][0]} ({first['numel'] / 1e6:.1f}M), "
        f"{BASES[first['base']].title}, batch {first['batch']}; milliseconds",
        "recipe",
        "step",
        "p20 .. p80",
        "x base\nalone",
        "p20 .. p80\nof that",
    )
    for key in results.peers(unit):
        total = results.find(unit, key, "total_ms")
        if total is None:
            continue
        ratio = results.ratio(unit, key, PLAIN, "total_ms")
        table.add_row(
            PLAIN_LABEL if key == PLAIN else key,
            number(total["p50"]),
            _spread(total),
            number(ratio and ratio["p50"]),
            "" if ratio is None else f"{number(ratio['p20'])} .. {number(ratio['p80'])}",
        )
    return _reasons(results, unit, table)


def goals_table(results: Results) -> Table:
    """Goal, measured, met or not."""
    table = _table("Goals", "goal", "wanted", "measured", "p20 .. p80", "met", "against")
    for goal in GOALS:
        outcome = goal.measure(results)
        met = goal.is_met(outcome)
        at_least = ">=" if goal.sign > 0 else "<="
        spread = f"{outcome.p20:.2f} .. {outcome.p80:.2f}" if outcome.p80 else ""
        table.add_row(
            goal.text,
            f"{at_least} {goal.target:.4g}{goal.unit}",
            "not measured" if outcome.value is None else f"{outcome.value:.2f}{goal.unit}",
            spread,
            "" if met is None else "yes" if met else "NO",
            outcome.against,
        )
    heard = {row["unit"]: row.get("neighbours") or 0.0 for row in results.rows}
    noisy = [unit for unit, cores in heard.items() if cores > QUIET]
    if noisy:
        where = "this" if len(noisy) == len(heard) else ", ".join(noisy)
        table.caption = (
            f"Neighbours used up to {max(heard.values()):.2f} cores while {where} was measured: {NOISE}."
        )
        table.caption_justify, table.caption_style = "left", "yellow"
    return table


def write_text(results: Results, target: Path) -> None:
    """Every table, and the machine, as plain text."""
    with target.open("w") as file:
        console = Console(file=file, width=200, color_system=None)
        for key, value in (results.rows[0]["machine"] if results.rows else {}).items():
            console.print(f"{key:>18}  {value}", highlight=False)
        for section in SECTIONS:
            units = results.units(section)
            if section == "variants" and units:
                console.print()
                console.print(variants_table(results, units))
                continue
            for unit in units:
                console.print()
                console.print(unit_table(results, unit))
        console.print()
        console.print(goals_table(results))
