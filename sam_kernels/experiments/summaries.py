"""Tables that several groups share: scores of the arms, and differences in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import pictures, tables
from .experiment import Row, Table
from .verdicts import missing, usable

Columns = Mapping[str, tuple[tables.Metric, int]]
"""Heading of a column: the number's name or a function of the row, and the digits behind its point."""


def scores(
    title: str,
    rows: Sequence[Row],
    arms: Sequence[str],
    columns: Columns,
    *,
    more: Mapping[str, Mapping[str, str]] | None = None,
    note: str = "",
    **options: Any,
) -> Table:
    """Mean and standard deviation of the seeds, a line for each arm.

    Args:
        title: of the table.
        rows: some of them may be missing, or have diverged: the note says so.
        arms: the lines.
        columns: of numbers.
        more: columns of finished cells, for each arm.
        note: what else there is to say.
        options: which rows.
    """
    chosen = tables.of(rows, **options)
    good = usable(chosen)
    more = more or {}
    lines = [
        [
            pictures.label(arm),
            *(tables.cell(tables.values(good, name, arm), digits) for name, digits in columns.values()),
            *(cells.get(arm, "–") for cells in more.values()),
        ]
        for arm in arms
    ]
    notes = ["Mean ± standard deviation of the seeds.", note, missing(chosen, arms)]
    return Table(title, ["", *columns, *more], lines, " ".join(part for part in notes if part))


def differences(
    title: str,
    rows: Sequence[Row],
    pairs: Sequence[tuple[str, str]],
    columns: Columns,
    **options: Any,
) -> Table:
    """What each arm has more than another, in pairs of the same seed.

    Args:
        title, rows, columns, options: as in `scores`.
        pairs: (arm, against).
    """
    good = usable(rows)
    lines = []
    for arm, against in pairs:
        found = [
            (tables.paired(good, name, arm, against, **options), digits) for name, digits in columns.values()
        ]
        name = f"{pictures.label(arm)} less {pictures.label(against)}"
        lines.append([name, *(difference.starred(digits) for difference, digits in found)])
    note = "Mean ± standard error; with * the 95 % interval (Student's t) leaves out zero."
    return Table(title, ["", *columns], lines, note)


def curves(
    rows: Sequence[Row], name: str, arms: Sequence[str], **options: Any
) -> dict[str, list[list[float]]]:
    """The curves of a name for `pictures.curves`, for arms that have any; nan for what was not finite."""
    found = {}
    for arm in arms:
        chosen = tables.of(rows, arm, **options)
        if chosen:
            lists = [row["numbers"]["curves"][name] for row in chosen]
            found[arm] = [[math.nan if v is None else float(v) for v in curve] for curve in lists]
    return found
