"""What the rows of an experiment say, printed, written to files, and put into docs/experiments.md."""

from __future__ import annotations

import json
import math
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import tables
from .experiment import Claim, Experiment, Findings, Row

_VERDICTS = {
    "agrees": "Our numbers agree.",
    "disagrees": "Our numbers disagree.",
    "undecided": "Our numbers do not decide it.",
    "not measured": "We have not measured it.",
}


def text(experiment: Experiment, rows: Sequence[Row], width: int = 110) -> str:
    """The report as it is printed: tables, three lines for each claim, what it was measured with."""
    found = experiment.findings(list(rows))
    parts = [f"{experiment.name}: {experiment.title}", f"Source: {experiment.source}"]
    parts += [tables.render(table, width) for table in found.tables]
    parts += ["\n".join(_folded(line, width) for line in _lines(claim)) for claim in found.claims]
    return "\n\n".join([*parts, _folded(measured_with(rows), width)])


def _lines(claim: Claim) -> list[str]:
    return [
        f"The document says: {claim.says}",
        f"Measured:          {claim.measured}",
        f"Verdict:           {claim.verdict}",
    ]


def _folded(line: str, width: int) -> str:
    return textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False)


def block(experiment: Experiment, rows: Sequence[Row], picture: str, link: str | None = None) -> str:
    """The report as markdown: protocol, tables, claims, picture, what it was measured with.

    Args:
        experiment: what the rows are of.
        rows: finished trials.
        picture: where the picture is, as the page has to link it.
        link: where the rows are; None for nowhere.
    """
    return _markdown(experiment, experiment.findings(list(rows)), rows, picture, link)


def _markdown(
    experiment: Experiment, found: Findings, rows: Sequence[Row], picture: str, link: str | None
) -> str:
    parts = [f"*{experiment.title.rstrip('.')}* (source: {experiment.source})"]
    parts += [_reflowed(experiment.protocol)]
    parts += [tables.markdown(table) for table in found.tables]
    for claim in found.claims:
        parts.append(
            f"- The document says: {claim.says}\n"
            f"- Measured: {claim.measured}\n"
            f"- **{_VERDICTS[claim.verdict]}**"
        )
        parts.append("<!-- -->")  # else two lists in a row would be one
    if found.claims:
        parts.pop()
    parts.append(f"![{experiment.title}]({picture})")
    numbers = f" All numbers: [{Path(link).name}]({link})." if link else ""
    parts.append(measured_with(rows) + numbers)
    return "\n\n".join(parts) + "\n"


def _reflowed(prose: str) -> str:
    """Paragraphs without the indentation and line ends of the source."""
    paragraphs = re.split(r"\n\s*\n", textwrap.dedent(prose).strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def measured_with(rows: Sequence[Row]) -> str:
    """What the rows were measured with, in a sentence or two."""
    if not rows:
        return "Nothing has been measured yet."

    def all_of(values: Iterable[Any]) -> str:
        return " and ".join(dict.fromkeys(str(v) for v in values))

    versions = all_of(
        "sam_kernels {sam_kernels}, torch {torch}, Python {python}".format(**row["versions"]) for row in rows
    )
    machines = all_of(
        f"{row['machine']['cpu']} ({row['machine']['arch']}, {row['machine']['cores']} cores)" for row in rows
    )
    days = sorted({row["date"][:10] for row in rows})
    commits = all_of(row["commit"] for row in rows if row["commit"])
    seconds = sum(row["seconds"] for row in rows)
    spent = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return (
        f"{len(rows)} runs, {spent} of computing in all, on {machines}, one thread each; {versions}; "
        f"{days[0]}{f' to {days[-1]}' if len(days) > 1 else ''} (UTC)"
        f"{f'; commit {commits}' if commits else ''}."
    )


def write(experiment: Experiment, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write table.json, report.md and NAME.png into a folder; where they are.

    JSON has no infinity and no NaN: such numbers are null in table.json.
    """
    found = experiment.findings(list(rows))
    picture = folder / f"{experiment.name}.png"
    content = {
        "experiment": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "tables": [tables.as_json(table) for table in found.tables],
        "claims": [
            {"says": claim.says, "measured": claim.measured, "verdict": claim.verdict}
            for claim in found.claims
        ],
        "numbers": found.numbers,
        "measured_with": measured_with(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_as_json(content), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "table.json").write_text(text + "\n", "utf-8")
    page = f"# {experiment.name}\n\n" + _markdown(experiment, found, rows, picture.name, "runs.jsonl")
    (folder / "report.md").write_text(page, "utf-8")
    found.draw(picture)
    return [folder / "table.json", folder / "report.md", picture]


def _as_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    return [_as_json(part) for part in value] if isinstance(value, (list, tuple)) else value


def beside(page: Path, name: str) -> tuple[Path, Path]:
    """Where a page keeps the rows and the picture of an experiment: in the folder of its own name."""
    folder = page.with_suffix("")
    return folder / f"{name}.jsonl", folder / f"{name}.png"


def put(experiment: Experiment, rows: Sequence[Row], folder: Path, page: Path) -> None:
    """Replace the block of an experiment in a page, and copy its rows and its picture beside the page.

    Args:
        experiment: what the rows are of.
        rows: those that are reported; they are what the page can be made of again.
        folder: where `write` has left the picture.
        page: markdown with the lines ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; what is outside
            of them stays.

    Raises:
        ValueError: if the page does not have these lines once each, in this order.
    """
    kept, picture = beside(page, experiment.name)
    new = replaced(page.read_text("utf-8"), experiment.name, of_page(experiment, rows, page), page)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    shutil.copyfile(folder / f"{experiment.name}.png", picture)
    page.write_text(new, "utf-8")


def check(page: Path, names: Iterable[str]) -> None:
    """See to it that `put` will find its place in a page.

    Args:
        page: markdown, as of `put`.
        names: of the experiments.

    Raises:
        ValueError: if the page is no file, no text, or does not have the two lines of each name once.
    """
    try:
        content = page.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{page} cannot be read as a page ({error}); expected markdown") from error
    for name in names:
        _parts(content, name, page)


def of_page(experiment: Experiment, rows: Sequence[Row], page: Path) -> str:
    """The block as it stands in a page."""
    kept, picture = (path.relative_to(page.parent).as_posix() for path in beside(page, experiment.name))
    return block(experiment, rows, picture, kept)


def replaced(content: str, name: str, new: str, page: Path) -> str:
    """The content of a page with another block of that name.

    Raises:
        ValueError: if there is no place for it, or more than one.
    """
    before, _, after = _parts(content, name, page)
    return f"{before}\n{new}{after}"


def block_in(content: str, name: str, page: Path) -> str:
    """The block of that name in the content of a page; empty if nothing has been put there."""
    return _parts(content, name, page)[1].removeprefix("\n")


def _parts(content: str, name: str, page: Path) -> tuple[str, str, str]:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(
            f"{page}: expected the lines {begin} and {end} once each, in this order; write them where the "
            "report is to go"
        )
    start, stop = content.index(begin) + len(begin), content.index(end)
    return content[:start], content[start:stop], content[stop:]
