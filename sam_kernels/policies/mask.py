"""Mask: which weights are perturbed. The others still take every base step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .checks import check_choice, check_count, check_number, check_seed, check_types
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

    @property
    def scale(self) -> float:
        """What the perturbation is multiplied by."""
        return 1.0


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
        check_types(self, self.types)
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


@dataclass(frozen=True)
class Sparse(Mask):
    """Base of masks that select single weights; kept as bits, see `SAM.masks`.

    Args:
        norm: "full" for the norm of the whole gradient, as published, so that ``||e|| <= rho``; "masked" for
            that of the selected weights, so that ``||e|| = rho``; gradients outside the mask that are not
            finite do not skip the step then.
        compact: keep snapshots of the selected weights alone, for the sake of memory. The native passes do
            so on CPUs; elsewhere it is done tensor by tensor in plain torch, which waits for the device.

    Raises:
        ValueError: if norm is neither, or compact no bool.
    """

    norm: Literal["full", "masked"] = field(default="full", kw_only=True)
    compact: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_choice(self, "norm", self.norm, ("full", "masked"))
        if not isinstance(self.compact, bool):
            raise ValueError(f"{type(self).__name__}: compact is {self.compact!r}; expected True or False")

    @property
    def is_stored(self) -> bool:
        """Whether the mask outlives its step, and is part of checkpoints."""
        return True

    def is_due(self, step: int) -> bool:
        """Whether the mask is to be updated in step number `step`."""
        return False


@dataclass(frozen=True)
class Ranked(Sparse):
    """Base of masks of the weights that rank highest.

    Args:
        sparsity: share of the weights that is not perturbed, 0 to below 1.
        every: steps between two updates of the mask.
        exact: of equal scores at the threshold keep those that come first, so that the number of weights is
            exact; otherwise all of them are kept.
        official_quirks: count as the authors' code does.

    Raises:
        ValueError: for numbers out of these ranges.
    """

    sparsity: float = 0.5
    every: int = 1
    exact: bool = field(default=False, kw_only=True)
    official_quirks: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self, "sparsity", self.sparsity, below=1.0)
        check_count(self, "every", self.every)

    def live(self, count: int) -> int:
        """How many of so many weights are perturbed.

        Rounded to the nearest; the authors' ``int(N (1 - s))`` keeps 0 of 10 at s = 0.9.

        Example:
            >>> Ranked(0.9).live(10), Ranked(0.9, official_quirks=True).live(10)
            (1, 0)
        """
        if self.official_quirks:
            return int(count * (1 - self.sparsity))
        return count - round(count * self.sparsity)

    def is_due(self, step: int) -> bool:
        return step % self.every == 0


@dataclass(frozen=True)
class TopScores(Ranked):
    """The weights of the highest scores, the Fisher information as a rule, which `SAM.update_masks` is given.

    Before the first update every weight is perturbed.

    Args:
        pattern: "unstructured": single weights, ranked over all tensors. "nm": `n` of every `m` neighbours
            along the input dimension, whatever the sparsity; vectors, and tensors whose input dimension is no
            multiple of m, stay dense. "structured": whole output channels, ranked by their mean score.
        n, m: of the pattern "nm".
        scope: "global", or "tensor" to select the same share of every tensor (unstructured only).

    Raises:
        ValueError: if n is not below m, or scope and pattern do not fit.

    Example:
        >>> TopScores(sparsity=0.9, every=100).is_due(200)
        True
    """

    pattern: Literal["unstructured", "nm", "structured"] = "unstructured"
    n: int = 2
    m: int = 4
    scope: Literal["global", "tensor"] = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "pattern", self.pattern, ("unstructured", "nm", "structured"))
        check_choice(self, "scope", self.scope, ("global", "tensor"))
        check_count(self, "n", self.n)
        check_count(self, "m", self.m)
        if self.n >= self.m:
            raise ValueError(f"TopScores: n is {self.n} and m is {self.m}; expected n below m, e.g. 2 of 4")
        if self.scope == "tensor" and self.pattern != "unstructured":
            raise ValueError(
                f"TopScores: scope='tensor' goes with pattern='unstructured', not with {self.pattern!r}, "
                "which decides by groups or over all channels"
            )


@dataclass(frozen=True)
class Dynamic(Ranked):
    """A mask that drops some of its weights and grows as many others, from the gradients of the step.

    It begins with weights chosen at random. In an update the fraction
    ``drop_rate / 2 (1 + cos(pi step / t_end))`` of them is dropped.

    Args:
        drop_rate: fraction that is dropped in the first update, 0 to 1.
        drop: which are kept: those of the largest "gradient", "weight", or a "random" choice.
        growth: which are added, of those that are not in the mask: by the same criteria.
        t_end: step from which on nothing is dropped; None for never less than `drop_rate`.
        seed: of the random choices.

    Raises:
        ValueError: for numbers or criteria that are not these.

    Example:
        >>> Dynamic(drop_rate=0.5, t_end=200).drop_rate_at(100)
        0.25
    """

    exact: bool = field(default=True, kw_only=True)
    drop_rate: float = 0.5
    drop: Literal["gradient", "weight", "random"] = "gradient"
    growth: Literal["random", "gradient", "weight"] = "random"
    t_end: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self, "drop_rate", self.drop_rate)
        for name in ("drop", "growth"):
            check_choice(self, name, getattr(self, name), ("gradient", "weight", "random"))
        if self.t_end is not None:
            check_count(self, "t_end", self.t_end)
        check_seed(self, self.seed)

    def drop_rate_at(self, step: int) -> float:
        """The fraction of the mask that is dropped at step number `step`."""
        if self.t_end is None:
            return self.drop_rate
        progress = min(step / self.t_end, 1.0)
        return 0.5 * self.drop_rate * (1 + math.cos(math.pi * progress))

    def first(self, count: int) -> int:
        """How many of so many weights the first mask has."""
        return count - math.ceil(count * self.sparsity) if self.official_quirks else self.live(count)

    def kept(self, count: int, step: int) -> int:
        """How many weights of the mask an update keeps; it drops no more than there are others to grow.

        Example:
            >>> Dynamic(0.5, drop_rate=0.5).kept(10, step=0)
            2
        """
        rest = 1 - self.drop_rate_at(step)
        if self.official_quirks:
            return int((count - count * self.sparsity) * rest)
        live = self.live(count)
        return max(int(live * rest + 1e-9), 2 * live - count)  # 0.1 of 10 is 1, though 1 - 0.9 is less

    def grown(self, count: int, step: int) -> int:
        """How many weights an update adds; with the kept ones as many as there were.

        The authors' code rounds down here too, and adds no more than ``N s``: below a sparsity of 1/3 or so
        their mask shrinks.

        Example:
            >>> Dynamic(0.5, drop_rate=0.5).grown(10, step=0)
            3
            >>> Dynamic(0.5, drop_rate=0.5, official_quirks=True).grown(10, step=0)
            2
        """
        if self.official_quirks:
            dead = count * self.sparsity
            return int(min((count - dead) * self.drop_rate_at(step), dead))
        return self.live(count) - self.kept(count, step)


@dataclass(frozen=True)
class Given(Sparse):
    """Masks by other people's criteria.

    Args:
        masks: bool tensors by the name of their parameter, or a function that is called with a `Member` and
            the parameter and returns one; without a mask, or with None, a parameter is dense.
        every: steps after which the function is called again; None for only once.

    Raises:
        ValueError: if masks is neither.

    Example:
        >>> import torch
        >>> Given({"weight": torch.tensor([True, False])}).every is None
        True
    """

    masks: Mapping[str, Any] | Callable[[Member, Any], Any] = field(default_factory=dict)
    every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.masks, Mapping) or callable(self.masks)):
            raise ValueError(
                f"Given: masks is {self.masks!r}; expected a dict of bool tensors by name, or a function"
            )
        if self.every is not None:
            check_count(self, "every", self.every)

    def is_due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    def refusal(self, member: Member) -> str | None:
        if member.name is not None or not isinstance(self.masks, Mapping):
            return None
        return "it has masks by name, and names are unknown: pass model.named_parameters() or model="

    def of(self, member: Member, param: Any) -> Any:
        """The mask of a parameter, or None."""
        if isinstance(self.masks, Mapping):
            return self.masks.get(member.name or "")
        return self.masks(member, param)


@dataclass(frozen=True)
class Bernoulli(Sparse):
    """A random mask, drawn anew in every step, with the perturbation divided by `keep`: ESAM's.

    ``e = (rho / keep) m g / ||g||``, ``m_i ~ Bernoulli(keep)``. The draw is a function of seed, step,
    parameter and element, so nothing is kept from step to step.

    Args:
        keep: probability that a weight is perturbed, above 0 to 1.
        by: "element" for a draw per weight (default, the paper's), "tensor" for one per parameter (the
            authors' code).
        seed: of the draws (default 0).
        norm: "full" (default, the paper's), or "masked" for that of the selected weights (the authors' code).

    Raises:
        ValueError: for numbers or words that are not these.

    Example:
        >>> Bernoulli(keep=0.5).scale
        2.0

    Source: Du et al., ICLR 2022, arXiv 2110.03141.
    """

    keep: float = 0.6
    by: Literal["element", "tensor"] = "element"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "keep", self.keep, least=0, most=1)
        if self.keep == 0:
            raise ValueError("Bernoulli: keep is 0, which perturbs nothing; expected a number above 0 to 1")
        check_choice(self, "by", self.by, ("element", "tensor"))
        check_seed(self, self.seed)
        if self.compact:
            raise ValueError("Bernoulli: compact snapshots need masks that last; expected compact=False")

    @property
    def scale(self) -> float:
        return 1 / self.keep

    @property
    def is_stored(self) -> bool:
        return False

    def threshold(self) -> int:
        """The smallest rank (of 31 bits, see `sam_kernels.ranks`) that is selected."""
        return round((1 - self.keep) * (1 << 31))


def _check_share(mask: Mask, name: str, value: Any, below: float | None = None) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value <= 1 and (below is None or value < below):
        return
    expected = "from 0 to 1" if below is None else "from 0 to below 1"
    raise ValueError(f"{type(mask).__name__}: {name} is {value!r}; expected a number {expected}")
