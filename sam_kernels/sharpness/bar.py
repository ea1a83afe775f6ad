"""A progress bar on the terminal, where there is one and rich to draw it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shown(progress: bool | None, before: str, after: str = "") -> Iterator[Any]:
    """rich's Progress with one bar on stderr, or None where none is to be seen.

    Args:
        progress: None for a bar if rich is there and stderr is a terminal; True demands it, False forbids it.
        before, after: texts beside the bar, in rich's format, e.g. "{task.description}".

    Raises:
        ImportError: if it is demanded and there is no rich.

    Example:
        >>> with shown(False, "a text") as bar:
        ...     print(bar)
        None
    """
    has_rich = importlib.util.find_spec("rich") is not None
    if progress and not has_rich:
        raise ImportError(
            "sharpness: progress=True shows a bar of rich, which is not installed; run "
            "pip install 'sam_kernels[sharpness]', or leave progress at None"
        )
    if not (has_rich and sys.stderr.isatty() if progress is None else progress):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = TextColumn(before), BarColumn(), MofNCompleteColumn(), TextColumn(after), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        yield bar
