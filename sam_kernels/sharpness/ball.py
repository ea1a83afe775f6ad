"""The balls that perturbations stay in, and what of them is farthest, nearest or random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_rho
from .vectors import norm


@dataclass(frozen=True)
class Ball:
    """``||T^-1 e||_p <= rho`` around w, with ``T = |w| + eta`` if adaptive, else 1.

    Raises:
        ValueError: if rho or eta is negative or not finite, p below 1, or eta given without adaptive.

    Example:
        >>> Ball(0.05, p=4).dual
        1.3333333333333333
    """

    rho: float
    p: float = 2.0
    adaptive: bool = False
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_rho(self.rho)
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not self.p >= 1:
            raise ValueError(f"sharpness: p is {self.p!r}; expected a number of at least 1, or math.inf")
        if not (isinstance(self.eta, int | float) and 0 <= self.eta < math.inf):
            raise ValueError(f"sharpness: eta is {self.eta!r}; expected a finite number of at least 0")
        if self.eta and not self.adaptive:
            raise ValueError(f"sharpness: eta is {self.eta!r} without adaptive=True, whose |w| it adds to")

    @property
    def dual(self) -> float:
        """The exponent q with ``1/p + 1/q = 1``."""
        if math.isinf(self.p):
            return 1.0
        return math.inf if self.p == 1 else self.p / (self.p - 1.0)

    def scale(self, w: Tensor) -> Tensor:
        """T of a tensor of weights, in the type of `opmath`."""
        w = opmath(w)
        return w.abs() + self.eta if self.adaptive else torch.ones((), dtype=w.dtype, device=w.device)

    def farthest(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """``argmax <g, e>`` in the ball: ``rho T sign(u) |u|^(q-1) / (||u||_q^q)^(1/p)``, ``u = T g``.

        Powers are of ``|u| / max |u|``, so none of them overflows. For p = 1 the u of the largest size share
        rho. Half types are worked on in float32.
        """
        scales = [self.scale(w) for w in weights]
        us = [opmath(g) * t for g, t in zip(grads, scales, strict=True)]
        if math.isinf(self.p):
            return [self.rho * t * u.sign() for u, t in zip(us, scales, strict=True)]
        peak = max(float(u.abs().max()) for u in us if u.numel())
        if peak == 0:
            return [torch.zeros_like(u) for u in us]
        shares = [u.abs() / peak for u in us]
        if self.p == 1:
            shares = [(s == 1).to(s.dtype) for s in shares]
            size = math.fsum(float(s.double().sum()) for s in shares)
        else:
            size = math.fsum(float(s.double().pow(self.dual).sum()) for s in shares) ** (1 / self.p)
            shares = [s.pow(self.dual - 1) for s in shares]
        return [self.rho / size * t * u.sign() * s for u, s, t in zip(us, shares, scales, strict=True)]

    def project(self, weights: Sequence[Tensor], e: Sequence[Tensor]) -> list[Tensor]:
        """A point of the ball for e, for p = 2 and inf: ``e / T`` is scaled down to rho, or clipped."""
        scales = [self.scale(w) for w in weights]
        if math.isinf(self.p):
            return [x.clamp(-self.rho * t, self.rho * t) for x, t in zip(e, scales, strict=True)]
        size = norm([torch.where(t > 0, x / t, 0.0) for x, t in zip(e, scales, strict=True)])
        return [x * (self.rho / size) for x in e] if size > self.rho else list(e)

    def nearest(self, weights: Sequence[Tensor], e: Sequence[Tensor]) -> list[Tensor]:
        """The point z of the ball with the least ``||z - e||_2``, for p = 2: ``z = e T^2 / (T^2 + k)``.

        ``||z / T||`` falls with k, and is at most rho for ``k = ||T e|| / rho``; k is found by bisection,
        until it is rho to 1e-5 of it, from inside.
        """
        scales = [self.scale(w) for w in weights]
        squares = [t.square() for t in scales]
        ratios = [torch.where(t > 0, x / t, 0.0) for x, t in zip(e, scales, strict=True)]

        def shrunk(k: float) -> list[Tensor]:
            return [torch.where(s > 0, r * s / (s + k), 0.0) for r, s in zip(ratios, squares, strict=True)]

        if self.rho == 0:
            return [torch.zeros_like(x) for x in e]
        low, high = 0.0, norm([x * t for x, t in zip(e, scales, strict=True)]) / self.rho
        found = ratios
        if norm(ratios) > self.rho:
            found = shrunk(high)
            while norm(found) < self.rho * (1 - 1e-5) and low < (middle := (low + high) / 2) < high:
                trial = shrunk(middle)
                if norm(trial) > self.rho:
                    low = middle
                else:
                    high, found = middle, trial
        return [r * t for r, t in zip(found, scales, strict=True)]

    def edge(self, weights: Sequence[Tensor], noise: Sequence[Tensor]) -> list[Tensor]:
        """A random point from standard normal numbers: of the edge (p = 2), of the whole box (inf)."""
        scales = [self.scale(w) for w in weights]
        if math.isinf(self.p):
            return [self.rho * t * uniform(z) for z, t in zip(noise, scales, strict=True)]
        factor = self.rho / norm(noise)
        return [factor * t * z for z, t in zip(noise, scales, strict=True)]


def opmath(x: Tensor) -> Tensor:
    """x in the type arithmetic happens in: float32 for half types."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def uniform(z: Tensor) -> Tensor:
    """``2 Phi(z) - 1``: standard normal numbers become uniform ones from -1 to 1."""
    return torch.erf(z * math.sqrt(0.5))
