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
