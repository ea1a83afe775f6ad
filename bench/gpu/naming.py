"""How tables and pictures of a GPU's results call things, and the figures that both of them show."""

from __future__ import annotations

from ..cases import BASES
from ..peers import is_copy
from ..peers import label as peer_label
from ..records import Results, Row
from ..training import PLAIN, PLAIN_LABEL
from .ceilings import COPY
from .device import GpuResults
from .lists import CASES
from .ours import SPECS
from .predictions import ceiling

_MORE_CASES = {"gpt2": "GPT-2 small"}  # a model of stage 5 that has no list of its own


def label(peer: str) -> str:
    """A peer of a phase or of a training step."""
    if peer == PLAIN:
        return PLAIN_LABEL
    return peer_label(peer) if is_copy(peer) else SPECS[peer].label if peer in SPECS else peer


def about(results: Results, unit: str) -> Row | None:
    """A row that says what a unit is about; None where everybody was left out."""
    return next((row for row in rows_of(results, unit) if "tensors" in row), None)


def case_title(row: Row) -> str:
    """A list or a model, with its size."""
    case = row["case"]
    title = CASES[case].title if case in CASES else _MORE_CASES.get(case, case)
    return f"{title} ({row['tensors']} tensors, {row['numel'] / 1e6:,.0f}M)"


def base_title(row: Row) -> str:
    return BASES[row["base"]].title


def recipe_label(results: Results, unit: str, peer: str) -> str:
    """A recipe, and what is special about the way it is taken."""
    note = (results.find(unit, peer, "total_ms") or {}).get("note")
    return label(peer) if peer == PLAIN or not note else f"{peer}, {note}"


def rows_of(results: Results, unit: str) -> list[Row]:
    return [row for row in results.rows if row["unit"] == unit]


def peers_with(results: Results, unit: str, *metrics: str) -> list[str]:
    """Peers of a unit that have a row of one of the metrics."""
    return [p for p in results.peers(unit) if any(results.find(unit, p, m) for m in metrics)]


def share_of_ceiling(results: GpuResults, row: Row | None, kind: str) -> dict[str, float] | None:
    """Bytes a second of a row over the fastest plain loop of that kind, with the spread of the row."""
    most = ceiling(results, kind)
    if row is None or "bytes" not in row or not most:
        return None
    # A short time is a large share.
    return {
        name: row["bytes"] / row[other] / 1e6 / most
        for name, other in (("p20", "p80"), ("p50", "p50"), ("p80", "p20"))
    }


def roofline_ms(results: GpuResults, row: Row | None) -> float | None:
    """Milliseconds that the row's bytes take at the rate of the fastest copy."""
    most = ceiling(results, COPY)
    return row["bytes"] / most / 1e6 if row is not None and "bytes" in row and most else None
