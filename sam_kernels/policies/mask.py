"""Mask: which weights are perturbed. The others still take every base step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .member import Member, check_patterns

# _NormBase is the common ancestor of BatchNorm, SyncBatchNorm and InstanceNorm.
NORMALIZATION: tuple[type, ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NORMALIZATION_NAMES = ("*norm*", "*bn*")


@dataclass(frozen=True)
class Mask:
    """Base of all masks."""

    def selects(self, member: Member) -> bool:
        """Whether the parameter as a whole takes part in norm and perturbation."""
        return True

    def refusal(self, member: Member) -> str | None:
        """A sentence when the mask cannot decide about this parameter; None when it can."""
        return None


@dataclass(frozen=True)
class Dense(Mask):
    """Every weight.

    Example:
        >>> Dense().selects(Member("fc.bias"))
        True
    """


@dataclass(frozen=True)
class ByName(Mask):
    """Whole parameters whose dotted name fits one of the shell-style patterns.

    Args:
        patterns: e.g. ``("*norm*", "*bn*")``.
        invert: perturb the others instead.

    Raises:
        ValueError: if patterns is one string.

    Example:
        >>> ByName(("*bn*",)).selects(Member("layer1.bn1.weight"))
        True
    """

    patterns: tuple[str, ...]
    invert: bool = False

    def __post_init__(self) -> None:
        check_patterns("ByName", "patterns", self.patterns)

    def selects(self, member: Member) -> bool:
        return member.matches(self.patterns) != self.invert

    def refusal(self, member: Member) -> str | None:
        if member.name is not None:
            return None
        return "it selects parameters by name, and names are unknown: pass model.named_parameters() or model="


@dataclass(frozen=True)
class ByModule(Mask):
    """Whole parameters owned directly by a module of one of the types.

    Args:
        types: module classes (default: every normalization layer of torch.nn).
        names: patterns to fall back to for parameters whose module is unknown.
        invert: perturb the others instead.

    Raises:
        ValueError: if types is not a tuple of classes, or names is one string.

    Example:
        >>> from torch import nn
        >>> ByModule().selects(Member(module=nn.LayerNorm(4)))
        True
    """

    types: tuple[type, ...] = NORMALIZATION
    names: tuple[str, ...] = NORMALIZATION_NAMES
    invert: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.types, tuple) and all(isinstance(kind, type) for kind in self.types)):
            raise ValueError(
                f"ByModule: types is {self.types!r}; expected a tuple of module classes, "
                "e.g. (torch.nn.LayerNorm,)"
            )
        check_patterns("ByModule", "names", self.names)

    def selects(self, member: Member) -> bool:
        if member.module is not None:
            return isinstance(member.module, self.types) != self.invert
        return member.matches(self.names) != self.invert

    def refusal(self, member: Member) -> str | None:
        if member.module is not None or member.name is not None:
            return None
        return (
            "it selects parameters by their module, which is unknown: pass model= or model.named_parameters()"
        )
