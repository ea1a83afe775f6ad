"""Two result files side by side: python -m bench.compare BEFORE AFTER

A change counts when the ranges from p20 to p80 do not overlap and the medians differ by more than
--least. The plain copies are compared too: if they moved, the machine did.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .peers import COPY, SPECS, label
from .records import Results, Row
from .report import number

Key = tuple[str, str, str]


def verdict(before: Row, after: Row, least: float) -> str:
    """ "slower", "faster", or nothing when the change is within the noise."""
    change = after["p50"] / before["p50"] - 1
    if change > least and after["p20"] > before["p80"]:
        return "slower"
    if change < -least and after["p80"] < before["p20"]:
        return "faster"
    return ""


def _timed(results: Results, phases: bool) -> dict[Key, Row]:
    return {
        (row["unit"], row["peer"], row["metric"]): row
        for row in results.rows
        if "p50" in row and (phases or row["metric"] == "total_ms")
    }


def table(before: Results, after: Results, least: float, phases: bool, everything: bool) -> tuple[Table, int]:
    """The table, and how many of our own rows got slower."""
    old, new = _timed(before, phases), _timed(after, phases)
    found = Table("unit", "peer", "metric", "before", "after", "change", "", title="milliseconds, medians")
    slower = 0
    for key in (key for key in new if key in old):
        word = verdict(old[key], new[key], least)
        unit, peer, metric = key
        is_ours = peer.startswith(("ours", "native"))
        slower += is_ours and word == "slower"
        if not (everything or word or peer == COPY):
            continue
        change = new[key]["p50"] / old[key]["p50"] - 1
        name = label(peer) if peer in SPECS or peer == COPY else peer
        found.add_row(
            unit, name, metric, number(old[key]["p50"]), number(new[key]["p50"]), f"{change:+.0%}", word
        )
    return found, slower


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--least", type=float, default=0.05, help="smallest change worth a word (default 0.05)"
    )
    parser.add_argument("--phases", action="store_true", help="compare the phases too, not only whole steps")
    parser.add_argument("--all", action="store_true", help="show rows within the noise as well")
    arguments = parser.parse_args()
    for path in (arguments.before, arguments.after):
        if not path.exists():
            parser.error(f"{path} does not exist; expected a .jsonl file written by python -m bench.run")
    before, after = Results(arguments.before), Results(arguments.after)
    console = Console(width=160)
    for name, results in (("before", before), ("after", after)):
        machine = results.rows[0]["machine"]
        about = "{cpu}, {threads} threads, torch {torch}, commit {commit}".format(**machine)
        console.print(f"{name:>6}: {about}")
    found, slower = table(before, after, arguments.least, arguments.phases, arguments.all)
    console.print(found)
    console.print(f"{slower} of our rows are slower beyond the noise")
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
