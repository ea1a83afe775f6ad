"""What a sweep came to: the table of a setting, the value that wins, and all winners together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from operator import itemgetter
from statistics import geometric_mean

from rich.console import Console
from rich.table import Table

from ..records import Results, Row
from ..report import number
from .device import rate
from .ours import named
from .predictions import ceiling, kind_of
from .settings import Sweep, Variant

DEFAULT = "default"

# A value wins if it takes so much of the default's time in the mean over all lists, and on none more than
# that.
_GAIN, _LOSS = 0.99, 1.01

Cases = Sequence[tuple[str, str]]  # a list and a dtype


@dataclass(frozen=True)
class Winner:
    """The value of a setting that wins for one pass or for all; None is the default.

    Attributes:
        ratio: geometric mean of the times over the default's.
    """

    sweep: str
    word: str
    variant: Variant | None
    ratio: float

    @property
    def sentence(self) -> str:
        if self.variant is not None:
            return f"{self.sweep}, {self.word}: {self.variant.name} takes {self.ratio:.3f} of the default"
        return f"{self.sweep}, {self.word}: the default stays"


def unit_of(sweep: Sweep, case: str, dtype: str) -> str:
    return f"sweep/{sweep.name}/{case}/{dtype}"


def find(results: Results, sweeps: Iterable[Sweep], cases: Cases) -> list[Winner]:
    """The winner of every setting, for every pass that has a setting of its own."""
    found = []
    for sweep in sweeps:
        for word, passes in sweep.judged.items():
            ratios = {v.name: _ratios(results, sweep, v, passes, cases) for v in sweep.variants}
            wanted = _timed(results, sweep, passes, cases)
            able = [v for v in sweep.variants if wanted and len(ratios[v.name]) == wanted]
            able = [v for v in able if max(ratios[v.name]) <= _LOSS]
            mean, best = min(
                ((geometric_mean(ratios[v.name]), v) for v in able), key=itemgetter(0), default=(1.0, None)
            )
            wins = mean <= _GAIN
            found.append(Winner(sweep.name, word, best if wins else None, mean if wins else 1.0))
    return found


def _ratios(
    results: Results, sweep: Sweep, variant: Variant, passes: Iterable[str], cases: Cases
) -> list[float]:
    """Median ratios to the default, of graphs, in which the device is timed alone."""
    rows = [
        results.find(unit_of(sweep, *case), named(variant.name, what), f"graph_to_{DEFAULT}")
        for case in cases
        for what in passes
    ]
    return [row["p50"] for row in rows if row is not None]


def _timed(results: Results, sweep: Sweep, passes: Iterable[str], cases: Cases) -> int:
    """How often the default was: a value that was left out anywhere, since a kernel spills, cannot win."""
    found = (
        results.find(unit_of(sweep, *case), named(DEFAULT, p), "graph_ms") for case in cases for p in passes
    )
    return sum(row is not None for row in found)


def combined(found: Iterable[Winner]) -> dict[str, int]:
    """The settings of all winners; where two name the same one, that of the larger gain."""
    merged: dict[str, int] = {}
    for winner in sorted(found, key=lambda w: -w.ratio):
        if winner.variant is None:
            continue
        own = winner.variant.own.get(winner.word, {})
        allowed = merged.get("SAMK_BYTES_IN_FLIGHT")
        merged |= {**winner.variant.shared, **own}
        if allowed is not None:  # no winner may be refused what another was allowed
            merged["SAMK_BYTES_IN_FLIGHT"] = min(allowed, merged["SAMK_BYTES_IN_FLIGHT"])
    threads = merged.get("SAMK_THREADS", 256)
    for name, value in merged.items():
        if name.endswith("_BLOCKS"):  # as many threads as where it won
            merged[name] = max(1, value * 256 // threads)
    return merged


def text_of(results: Results, sweep: Sweep, cases: Cases) -> str:
    """A table for every pass: a row for a value, and for every list its time, its ratio and its share."""
    out = StringIO()
    console = Console(file=out, width=40 + 32 * len(cases), color_system=None, highlight=False)
    for what in sweep.passes:
        table = Table(title=f"{sweep.name}: {what}, in a graph", title_justify="left")
        table.add_column("value")
        for case, dtype in cases:
            table.add_column(f"{case}, {dtype}\nms, of the default, of {kind_of(what)}", justify="right")
        for name in (DEFAULT, *(v.name for v in sweep.variants)):
            table.add_row(name, *(_cell(results, unit_of(sweep, *case), named(name, what)) for case in cases))
        console.print(table)
    return out.getvalue().rstrip()


def _cell(results: Results, unit: str, peer: str) -> str:
    row = results.find(unit, peer, "graph_ms")
    if row is None:
        return "left out"
    ratio = results.find(unit, peer, f"graph_to_{DEFAULT}")
    beside = "" if ratio is None else f"{ratio['p50']:.3f}"
    return f"{number(row['p50'])}  {beside}  {_share(results, row)}"


def _share(results: Results, row: Row) -> str:
    most, giga = ceiling(results, kind_of(row["peer"])), rate(row)
    return f"{giga / most:.2f}" if most and giga else ""
