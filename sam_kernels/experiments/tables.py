"""Rows into tables: means, spreads, differences in pairs; as text, as markdown, as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .experiment import Row, Table

LEVEL = 0.05  # of error, in all intervals and verdicts

Metric = str | Callable[[Row], float]
"""A name in ``row["numbers"]``, or a function of the row."""


def value_of(row: Row, metric: Metric) -> float:
    """The metric of a row as a float; nan where it was not finite.

    Raises:
        KeyError: if its numbers have no such name; the message lists those it has.
    """
    if callable(metric):
        return float(metric(row))
    if metric not in row["numbers"]:
        known = ", ".join(sorted(row["numbers"]))
        raise KeyError(f"{row['arm']}, seed {row['seed']} has no number {metric!r}; it has {known}")
    found = row["numbers"][metric]
    return math.nan if found is None else float(found)  # JSON has null for what was not finite


def arms(rows: Iterable[Row]) -> list[str]:
    """The arms of the rows, each once, in order of appearance."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def of(rows: Iterable[Row], arm: str | None = None, **options: Any) -> list[Row]:
    """The rows of an arm (None for all), by seed, whose options have these values.

    Example:
        >>> row = {"arm": "sam", "seed": 0, "options": {"m": 8}, "numbers": {"loss": 0.5}}
        >>> len(of([row], "sam", m=8)), len(of([row], "sam", m=4)), len(of([row], m=8))
        (1, 0, 1)
    """
    chosen = [
        row
        for row in rows
        if arm in (None, row["arm"])
        and all(key in row["options"] and row["options"][key] == value for key, value in options.items())
    ]
    return sorted(chosen, key=lambda row: row["seed"])


def values(rows: Iterable[Row], metric: Metric, arm: str | None = None, **options: Any) -> list[float]:
    """The metric of the rows that `of` chooses."""
    return [value_of(row, metric) for row in of(rows, arm, **options)]


def mean_and_spread(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1); the deviation of a single number is nan, as is the mean of none.

    Example:
        >>> mean_and_spread([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    if not numbers:
        return math.nan, math.nan
    if not all(map(math.isfinite, numbers)):  # statistics would raise, or say inf - inf
        return sum(numbers) / len(numbers), math.nan
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else math.nan


def cell(numbers: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation as they stand in a table; a dash where there is nothing.

    Example:
        >>> cell([97.0, 98.0]), cell([97.0]), cell([])
        ('97.50 ± 0.71', '97.00', '–')
    """
    if not numbers:
        return "–"
    mean, spread = mean_and_spread(numbers)
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


@dataclass(frozen=True)
class Difference:
    """What an arm has more than another, in pairs of the same seed.

    Args:
        seeds: the pairs there are.
        values: the differences, one a pair.
        mean: of the values; nan without any.
        error: standard error of the mean, ``s / sqrt(n)``; nan for fewer than two pairs.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    error: float

    @classmethod
    def of(cls, seeds: Sequence[int], values: Sequence[float]) -> Difference:
        """With mean and error of the values.

        Example:
            >>> found = Difference.of((0, 1), (2.0, 3.0))
            >>> found.mean, found.error
            (2.5, 0.5)
        """
        mean, spread = mean_and_spread(values)
        error = spread / math.sqrt(len(values)) if values else math.nan
        return cls(tuple(seeds), tuple(values), mean, error)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean by Student's t; nan for fewer than two pairs."""
        width = t_quantile(len(self.values)) * self.error
        return self.mean - width, self.mean + width

    @property
    def is_clear(self) -> bool:
        """Whether the 95 % interval leaves out zero; never for fewer than two pairs."""
        low, high = self.interval
        return low > 0 or high < 0

    def __str__(self) -> str:
        return self.said()

    def said(self, digits: int = 2, unit: str = "") -> str:
        """In words: mean, standard error, how many pairs, and the 95 % interval."""
        if not self.values:
            return "no pairs yet"
        mean = f"{self.mean:+.{digits}f}{unit}"
        if math.isnan(self.error):
            return f"{mean} (one pair)"
        low, high = self.interval
        return (
            f"{mean} ± {self.error:.{digits}f} (mean and standard error of {len(self.values)} pairs; 95 % "
            f"interval {low:+.{digits}f} to {high:+.{digits}f})"
        )

    def starred(self, digits: int = 2) -> str:
        """For a cell: mean and standard error, with * where the 95 % interval leaves out zero."""
        if not self.values:
            return "–"
        mean = f"{self.mean:+.{digits}f}"
        if math.isnan(self.error):
            return mean
        return f"{mean} ± {self.error:.{digits}f}{' *' if self.is_clear else ''}"


def t_quantile(n: int, level: float = LEVEL) -> float:
    """How many standard errors from a mean of n values the interval of 1 - level reaches; nan for n < 2.

    By Student's t with n - 1 degrees of freedom: two errors would leave out the truth in 18 % of all cases
    for n = 3, and in 30 % for n = 2.

    Raises:
        ImportError: without scipy.

    Example:
        >>> round(t_quantile(3), 2), round(t_quantile(10), 2)
        (4.3, 2.26)
    """
    return float(_student().ppf(1 - level / 2, n - 1)) if n > 1 else math.nan


def p_value(distance: float, error: float, n: int) -> float:
    """How likely a mean of n values is at least so far off, on either side, by chance; 1 for n < 2.

    Example:
        >>> round(p_value(4.303, 1.0, 3), 3)
        0.05
    """
    if n < 2 or not (math.isfinite(distance) and math.isfinite(error)) or distance <= 0:
        return 1.0
    return 2 * float(_student().sf(distance / error, n - 1)) if error else 0.0


def _student() -> Any:
    try:
        from scipy.stats import t
    except ImportError:
        raise ImportError(
            "verdicts need scipy, which is not installed: pip install 'sam_kernels[experiments]'"
        ) from None
    return t


def paired(rows: Iterable[Row], metric: Metric, arm: str, against: str, **options: Any) -> Difference:
    """The metric of an arm minus that of another, seed by seed.

    Pairs share a seed, and with it the split, the first weights and the order of the batches, so what
    the seed does to both drops out.

    Args:
        rows: of an experiment.
        metric: a name in the rows' numbers or a function of a row.
        arm, against: the arms.
        options: which rows, where an arm has several for a seed.

    Raises:
        ValueError: if an arm has several rows for a seed; say which by options.

    Example:
        >>> def row(arm, seed, x):
        ...     return {"arm": arm, "seed": seed, "options": {}, "numbers": {"x": x}}
        >>> rows = [row("sam", 0, 3.0), row("sgd", 0, 1.0), row("sam", 1, 5.0), row("sgd", 1, 2.0)]
        >>> found = paired(rows, "x", "sam", "sgd")
        >>> found.mean, found.error, found.is_clear
        (2.5, 0.5, False)
    """
    rows = list(rows)
    left, right = (_by_seed(of(rows, name, **options), metric, name) for name in (arm, against))
    seeds = tuple(seed for seed in left if seed in right)
    return Difference.of(seeds, [left[seed] - right[seed] for seed in seeds])


def _by_seed(rows: list[Row], metric: Metric, arm: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for row in rows:
        if row["seed"] in found:
            raise ValueError(
                f"paired: {arm!r} has several rows for seed {row['seed']}; expected one, so say which by "
                f"options, e.g. one of {row['options']}"
            )
        found[row["seed"]] = value_of(row, metric)
    return found


def render(table: Table, width: int = 110) -> str:
    """The table as text, at most `width` characters wide where rich is installed to fold the cells."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        return _plain(table)
    import io

    out = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(table.columns):
        out.add_column(
            Text(column), justify="right" if number else "left", no_wrap=not number, overflow="fold"
        )
    for row in table.rows:
        out.add_row(*(Text(text) for text in row))
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, force_terminal=False)
    console.print(out)
    if table.note:
        console.print(Text(table.note))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _plain(table: Table) -> str:
    lines = [list(table.columns), *(list(row) for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    texts = [
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([table.title, "", texts[0], rule, *texts[1:], *([table.note] if table.note else [])])


def markdown(table: Table) -> str:
    """The table as GitHub's markdown, its title above in bold and its note below."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in cells) + " |"

    rule = "|" + "|".join(" --- " if not i else " ---: " for i in range(len(table.columns))) + "|"
    parts = [f"**{table.title}**", "\n".join([line(table.columns), rule, *map(line, table.rows)])]
    return "\n\n".join([*parts, *([table.note] if table.note else [])])


def as_json(table: Table) -> dict[str, Any]:
    """The table as JSON: title, columns, rows, note."""
    return {
        "title": table.title,
        "columns": list(table.columns),
        "rows": [list(row) for row in table.rows],
        "note": table.note,
    }
