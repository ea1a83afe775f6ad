"""Results on disk: JSON lines, one measurement each, replaced unit by unit.

A unit is what is measured together, e.g. "step/resnet50/sgd/float32". Finishing one rewrites its own
rows and leaves the others, so a run can stop anywhere and be resumed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# A unit measured under another one of these has to be measured again.
_FINGERPRINT = ("cpu", "cores", "threads", "torch", "sam_kernels", "commit", "effort")


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    if len(samples) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(samples), "p80": fifths[3]}


def measured(peer: str, metric: str, samples: Sequence[float], **more: Any) -> Row:
    """A row of repeated measurements; milliseconds unless the metric's name says otherwise."""
    rounded = [float(f"{x:.5g}") for x in samples]
    return {"peer": peer, "metric": metric, **quantiles(rounded), "samples": rounded, **more}


def divided(above: Row, below: Row, weight: float = 1.0) -> dict[str, float]:
    """Quantiles of weight * above / below, round by round; of the medians if they had no rounds in common."""
    if len(above["samples"]) != len(below["samples"]):
        return {name: weight * above[name] / below["p50"] for name in ("p20", "p50", "p80")}
    return quantiles([weight * a / b for a, b in zip(above["samples"], below["samples"], strict=True)])


def single(peer: str, metric: str, value: Any, **more: Any) -> Row:
    """A row of one value."""
    return {"peer": peer, "metric": metric, "value": value, **more}


class Results:
    """A file of rows."""

    def __init__(self, path: Path, machine: dict[str, Any] | None = None) -> None:
        self.path = path
        self.machine = machine or {}
        self.rows: list[Row] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def has(self, unit: str) -> bool:
        """Whether the unit is there, measured by this machine, commit and effort."""
        found = [row for row in self.rows if row["unit"] == unit]
        return bool(found) and all(self._is_ours(row) for row in found)

    def _is_ours(self, row: Row) -> bool:
        return all(row["machine"].get(key) == self.machine.get(key) for key in _FINGERPRINT)

    def replace(self, unit: str, rows: list[Row]) -> None:
        """Put the rows in place of what the unit had, and write the file."""
        self.rows = [row for row in self.rows if row["unit"] != unit]
        self.rows += [{"unit": unit, **row, "machine": self.machine} for row in rows]
        self.save()

    def save(self) -> None:
        """Write all rows; whoever reads meanwhile finds the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        temporary.replace(self.path)

    def units(self, section: str) -> list[str]:
        """Units of a section, in the order they were written."""
        return list(dict.fromkeys(row["unit"] for row in self.rows if row["unit"].split("/")[0] == section))

    def find(self, unit: str, peer: str, metric: str) -> Row | None:
        for row in self.rows:
            if (row["unit"], row["peer"], row["metric"]) == (unit, peer, metric):
                return row
        return None

    def value(self, unit: str, peer: str, metric: str) -> Any:
        """The median or the value; None if it was not measured."""
        row = self.find(unit, peer, metric)
        return None if row is None else row.get("value", row.get("p50"))

    def ratio(self, unit: str, peer: str, ours: str, metric: str) -> dict[str, float] | None:
        """Quantiles of peer / ours, round by round; None if either is missing."""
        above, below = self.find(unit, peer, metric), self.find(unit, ours, metric)
        if above is None or below is None:
            return None
        return divided(above, below)

    def peers(self, unit: str) -> list[str]:
        return list(dict.fromkeys(row["peer"] for row in self.rows if row["unit"] == unit))
