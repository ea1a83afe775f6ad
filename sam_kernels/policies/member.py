"""What a policy may know about one parameter: its name and the module that owns it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Member:
    """One parameter as policies see it; `None` where the caller gave no names or no model.

    Args:
        name: dotted parameter name, e.g. ``"layer1.0.bn1.weight"``, or None when unknown.
        module: the `torch.nn.Module` that holds the parameter, or None when unknown.

    Example:
        >>> Member("fc.weight").matches(("*weight*",))
        True
    """

    name: str | None = None
    module: Any = None

    def matches(self, patterns: tuple[str, ...]) -> bool:
        """True when the name is known and fits one of the shell-style patterns (case matters)."""
        name = self.name
        return name is not None and any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(owner: str, field: str, patterns: Any) -> None:
    """Raise a sentence unless patterns is a tuple or list of strings.

    One string is refused: its characters would pass for patterns.
    """
    if isinstance(patterns, str):
        raise ValueError(
            f"{owner}: {field} is the string {patterns!r}; expected a tuple of patterns, ({patterns!r},)"
        )
    if not (isinstance(patterns, tuple | list) and all(isinstance(item, str) for item in patterns)):
        raise ValueError(f"{owner}: {field} is {patterns!r}; expected a tuple of shell-style patterns")
