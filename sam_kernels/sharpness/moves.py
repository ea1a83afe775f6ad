"""Moves of the weights by the package's own passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .ball import Ball, opmath
from .vectors import gaussian


class Weights:
    """Parameters that move and come back, in parts of one device and dtype as the passes take them.

    Parameters with gaps in memory, which the passes refuse, are a part that plain torch moves.

    Args:
        params: what moves; now, they are where they come back to.
        base: copies of them, which `Objective.held` gives.
        backend: "auto" or a backend's name.
        names: what sentences call them.

    Example:
        >>> w = [torch.tensor([1.0, 2.0])]
        >>> weights = Weights(w, [w[0].clone()])
        >>> weights.ascend([torch.tensor([3.0, 4.0])], Ball(rho=0.5))
        >>> w[0]
        tensor([1.3000, 2.4000])
        >>> weights.restore()
        >>> w[0]
        tensor([1., 2.])
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        base: Sequence[Tensor],
        backend: str = "auto",
        *,
        names: Sequence[str] = (),
    ) -> None:
        self.params, self.base, self.backend = list(params), list(base), backend
        self.names = list(names) or [f"number {t}" for t in range(len(self.params))]
        parts: dict[tuple[Any, ...], list[int]] = {}
        for t, (p, w) in enumerate(zip(self.params, self.base, strict=True)):
            parts.setdefault((p.device, p.dtype, p.stride() == w.stride()), []).append(t)
        self.parts = list(parts.values())

    def ascend(self, grads: Sequence[Tensor], ball: Ball) -> None:
        """``w += argmax <g, e>`` in the ball, from the base; nothing moves for a gradient of zero.

        Raises:
            ValueError: if the gradient is not finite.
        """
        norm = self.norm(grads, ball if ball.p == 2 else None)
        if norm == 0:
            return
        if ball.p != 2:
            self.move(ball.farthest(self.base, grads))
            return
        metric: dict[str, Any] = {"adaptive": ball.adaptive, "eta": ball.eta}
        for params, base, g in self._by_part(self.params, self.base, grads):
            if not _fit(params, base, g):
                e = [ball.rho / norm * ball.scale(w) ** 2 * opmath(x) for w, x in zip(base, g, strict=True)]
                _move(params, base, e, 1.0)
                continue
            size = torch.tensor(norm, dtype=torch.float64, device=params[0].device)
            # The snapshot that the pass writes is the base itself, where the weights are.
            ops.perturb_(params, g, base, size, rho=ball.rho, eps=0.0, backend=self.backend, **metric)

    def norm(self, grads: Sequence[Tensor], ball: Ball | None = None) -> float:
        """``||T g||_2`` over all tensors, T that of the ball if it is adaptive.

        Raises:
            ValueError: if it is not finite.
        """
        adaptive, eta = (ball.adaptive, ball.eta) if ball else (False, 0.0)
        squares = [
            ops.sq_norm(g, base if adaptive else (), adaptive=adaptive, eta=eta, backend=self.backend)
            for base, g in self._by_part(self.base, grads)
        ]
        norm = math.sqrt(math.fsum(map(float, squares))) if all(map(_is_finite, squares)) else math.nan
        if math.isnan(norm):
            wrong = [n for n, g in zip(self.names, grads, strict=True) if not bool(g.isfinite().all())]
            where = f"that of {wrong[0]} is not" if wrong else "its norm is not"
            raise ValueError(
                f"sharpness: the loss is finite and its gradient is not ({where}); expected finite numbers. "
                "Look for square roots and logarithms at 0, and for half types that overflow"
            )
        return norm

    def move(self, e: Sequence[Tensor], scale: float = 1.0) -> None:
        """``w = base + scale e``, e in the type of `opmath`, so a half type is rounded once."""
        for params, base, d in self._by_part(self.params, self.base, e):
            if _fit(params, base, d):
                self._combine(params, base, d, 1.0, scale)
            else:
                _move(params, base, d, scale)

    def add(self, out: Sequence[Tensor], a: float, other: Sequence[Tensor], b: float) -> None:
        """``out = a out + b other``, both in the type of `opmath`."""
        for mine, others in self._by_part(out, other):
            self._combine(mine, mine, others, a, b)

    def _combine(
        self, out: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor], a: float, b: float
    ) -> None:
        """``out = a x + b y``, lists of one part."""
        factors = torch.tensor([[a, b]], dtype=torch.float64)
        ops.combine_([out], [x, y], factors, backend=self.backend)

    def restore(self) -> None:
        """``w = base``, bit for bit."""
        for params, base in self._by_part(self.params, self.base):
            if _fit(params, base):
                ops.restore_(params, base, backend=self.backend)
            else:
                for p, w in zip(params, base, strict=True):
                    p.copy_(w)

    def noise(self, seed: int, draw: int) -> list[Tensor]:
        """Standard normal numbers for each parameter in the type of `opmath`, the same on any machine."""
        like = [opmath(w) for w in self.base]
        # In the layout of the weights, as the passes want it; the numbers go by the place in the shape.
        return [torch.empty_like(w).copy_(z) for w, z in zip(like, gaussian(like, seed, draw), strict=True)]

    def _by_part(self, *lists: Sequence[Tensor]) -> list[tuple[list[Tensor], ...]]:
        return [tuple([each[t].detach() for t in part] for each in lists) for part in self.parts]


def _is_finite(x: Tensor) -> bool:
    return math.isfinite(float(x))


def _fit(first: Sequence[Tensor], *others: Sequence[Tensor]) -> bool:
    """Whether lists have one dtype and layout, as the passes want them."""
    return all(
        x.dtype == p.dtype and x.stride() == p.stride()
        for other in others
        for p, x in zip(first, other, strict=True)
    )


def _move(params: Sequence[Tensor], base: Sequence[Tensor], e: Sequence[Tensor], scale: float) -> None:
    for p, w, x in zip(params, base, e, strict=True):
        p.copy_(opmath(w) + scale * x)
