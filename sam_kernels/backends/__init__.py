"""Backends: interchangeable implementations of the passes, and the choice between them.

A backend is asked whether it can serve a tensor group and answers None or a sentence. An explicit
wish must be honoured or raises; the automatic choice steps down and keeps the sentences, which
`SAM.backends()` prints.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, Literal, Protocol

from torch import Tensor

from ..ranks import Ranks
from ..tensor_groups import TensorGroup

# Best first. The automatic choice takes the first that does not refuse.
_ORDER = ("native", "triton", "foreach", "reference")


class Backend(Protocol):
    """The six passes over one `TensorGroup`, noise, and the selection of masks.

    A scalar is a 0-d float64 tensor on the group's device.
    """

    name: str

    def refusal(self, group: TensorGroup) -> str | None:
        """Why this backend cannot serve the group, or None when it can."""
        ...

    def sq_norm(
        self,
        group: TensorGroup,
        *,
        of: Literal["gradient", "weight"] = "gradient",
        moment: Literal["square", "peak", "power"] = "square",
        q: float | None = None,
        peak: Tensor | None = None,
        root: float = 1.0,
        per_tensor: bool = False,
        masked: bool = False,
    ) -> Tensor:
        """Sum of ``(T g)^2`` (or max of ``|T g|``, or sum of ``(|T g| / peak)^q``), then its root.

        Args:
            masked: of the elements under ``group.masks`` only.
            root: 2 turns the sum of squares into the norm; sums by tensor stay sums.
        """
        ...

    def perturb_(
        self,
        group: TensorGroup,
        norm: Tensor,
        *,
        shape: Literal["linear", "sign", "powered"] = "linear",
        q: float | None = None,
        peak: Tensor | None = None,
        tensor_scale: Tensor | None = None,
    ) -> None:
        """``snapshot = w; w += rho / (norm + eps) * tensor_scale * T h(T g)`` where there is a snapshot.

        A gradient may be its own tensor's snapshot: it is read before that is written. Elements that
        ``group.masks`` does not select keep their bits. Of 64 elements whose word is 0 nothing
        need be read or written, the snapshot included; `restore_` and `descend_` do not read it there.

        Where the group has masters they stand in the place of snapshots, in float32, and are only read:
        ``w = round(master + ...)``. ``group.rounding`` says how bf16 weights are rounded, None to nearest.
        """
        ...

    def restore_(self, group: TensorGroup) -> None:
        """``w = snapshot`` where there is one, and the rounded master where that stands there."""
        ...

    def grad_stats(
        self, group: TensorGroup, lists: list[list[Tensor | None]], *, per_tensor: bool = False
    ) -> Tensor:
        """Dots of up to three lists, upper triangle row by row; with `per_tensor` a row for every tensor."""
        ...

    def combine_(
        self,
        group: TensorGroup,
        outs: list[list[Tensor | None]],
        lists: list[list[Tensor | None]],
        coefficients: Tensor,
    ) -> None:
        """``out[i] = sum_j coefficients[i, j] * lists[j]``.

        Args:
            coefficients: float64 [outs, lists], or [count, outs, lists] with those of every tensor.
        """
        ...

    def noise_(
        self, group: TensorGroup, outs: list[Tensor | None], seed: int, step: int, numbers: list[int]
    ) -> None:
        """``out[i]``: standard normal numbers by counter; see note [the same normal numbers everywhere].

        Args:
            outs: written in the order of memory; calculated in float32, then rounded to the list's dtype.
            seed, step: the key and part of the counter.
            numbers: per tensor, its number for random numbers.
        """
        ...

    def descend_(
        self,
        group: TensorGroup,
        rule: Literal["sgd", "adam"],
        slots: dict[str, list[Any]],
        *,
        guard: Tensor | None = None,
        found_inf: Tensor | None = None,
        inv_scale: Tensor | None = None,
    ) -> None:
        """The base optimizer's update, from the snapshot where there is one; restores only if unsafe.

        A master that stands there is updated too, and w rounded from it; the state is float32 then.
        """
        ...

    def accumulate_squares_(self, group: TensorGroup, scores: list[Tensor | None]) -> None:
        """``scores += g^2`` in float32, where there is a gradient."""
        ...

    def count_ranks(
        self,
        group: TensorGroup,
        ranks: Ranks,
        masks: list[Tensor | None],
        *,
        prefix: int,
        shift: int,
        bits: int,
    ) -> Tensor:
        """int64 [2^bits]: how often ``(rank >> shift) % 2^bits`` has each value, where ``rank >> (shift +
        bits) == prefix``, over the elements that take part in tensors with a mask."""
        ...

    def mark_(
        self,
        group: TensorGroup,
        ranks: Ranks,
        masks: list[Tensor | None],
        *,
        threshold: int,
        shift: int,
        add: bool = False,
        positions: list[int] | None = None,
        candidates: Tensor | None = None,
        found: Tensor | None = None,
    ) -> None:
        """Set the bits of elements that take part and have ``rank >> shift > threshold``; clear the others.

        Args:
            masks: words, written; a None is left out.
            add: clear none.
            positions: per tensor, of its first element among all.
            candidates: int64, gets ``low << 43 | 2^43 - 1 - position`` of every element that takes part and
                has ``rank >> shift == threshold``, low being the `shift` lowest bits of its rank.
            found: int64 [1], counts the candidates, also those beyond the end of `candidates`.
        """
        ...


_registered: dict[str, Backend] = {}


def names() -> list[str]:
    """Known backends, best first.

    Example:
        >>> names()[:4]
        ['native', 'triton', 'foreach', 'reference']
    """
    return [*_ORDER, *(name for name in _registered if name not in _ORDER)]


def register(backend: Backend) -> None:
    """Make a backend selectable by its name; it is never chosen automatically.

    Raises:
        ValueError: if the name is taken.
    """
    if backend.name in names():
        raise ValueError(f"backend {backend.name!r} exists already; give yours another name")
    _registered[backend.name] = backend


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: if it is unknown; the message lists the known ones.
    """
    if name not in names():
        raise ValueError(f"backend {name!r} is not known. Known: {', '.join(names())}")
    if name not in _registered:
        _registered[name] = import_module(f".{name}", __name__).BACKEND
    return _registered[name]


def check_wish(wish: str) -> str:
    """The wish, or what SAM_KERNELS_BACKEND says in place of "auto".

    Raises:
        ValueError: if either names no backend.
    """
    if wish != "auto":
        get(wish)
        return wish
    forced = os.environ.get("SAM_KERNELS_BACKEND", "auto")
    if forced != "auto" and forced not in names():
        raise ValueError(
            f"SAM_KERNELS_BACKEND={forced!r} is not a backend. Known: {', '.join(['auto', *names()])}"
        )
    return forced


def resolve(group: TensorGroup, wish: str = "auto") -> tuple[Backend, dict[str, str]]:
    """The backend that serves a group, and for each one passed over the sentence why.

    Args:
        group: the tensors to serve.
        wish: "auto" or a backend's name.

    Raises:
        ValueError: if the wish names no backend.
        RuntimeError: if the wished backend refuses the group.
    """
    wish = check_wish(wish)
    if wish != "auto":
        backend = get(wish)
        sentence = backend.refusal(group)
        if sentence is not None:
            raise RuntimeError(f"backend {wish!r} was requested for {group!r}, but {sentence}")
        return backend, {}
    refusals: dict[str, str] = {}
    for name in _ORDER:
        backend = get(name)
        sentence = backend.refusal(group)
        if sentence is None:
            return backend, refusals
        refusals[name] = sentence
    reasons = "; ".join(f"{name}: {sentence}" for name, sentence in refusals.items())
    raise RuntimeError(f"no backend can serve {group!r}. {reasons}")


class Report(str):
    """A string that shows its lines when printed and when echoed."""

    def __repr__(self) -> str:
        return str(self)
