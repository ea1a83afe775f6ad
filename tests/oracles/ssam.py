"""Mi et al. 2022, sparse SAM: e = m * rho g / (||g|| + 1e-7), m from Fisher information or dropped and grown.

Masks and scores are numpy arrays, in the order of the elements; ranking is by |score|, NaN above infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from oracles.philox import random_word
from oracles.sam import Tensors, total_norm

# Random masks are numbered by the step that makes them; this is the number of the first mask.
BEGINNING = 2**32 - 1


def perturbation(
    weights: Tensors,
    gradients: Tensors,
    rho: float = 0.05,
    eps: float = 1e-7,
    mask: Callable[[Tensors], Tensors] | Tensors | None = None,
    norm: str = "full",
) -> Tensors:
    """Return e = m * rho g / (||g|| + eps); the norm is that of all g, or of m * g where "masked"."""
    chosen = mask(weights) if callable(mask) else mask
    if chosen is None:
        chosen = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    of = {name: g.double() * chosen[name] for name, g in gradients.items()}
    size = total_norm(of if norm == "masked" else gradients) + eps
    return {name: rho * g / size for name, g in of.items()}


# ---- which elements rank highest ------------------------------------------------------------------------


def sizes(scores: np.ndarray) -> np.ndarray:
    """Return |score|, as float64, in which NaN is larger than infinity: the order of the ranking.

    Random ranks are whole numbers below 2^31, and stay what they are.
    """
    if np.issubdtype(scores.dtype, np.integer):
        return scores.astype(np.float64)
    with np.errstate(over="ignore"):
        x = np.abs(np.asarray(scores, dtype=np.float32)).astype(np.float64)
    return np.where(np.isnan(x), np.finfo(np.float64).max, np.where(np.isinf(x), 1e300, x))


def top(scores: np.ndarray, keep: int, exact: bool) -> np.ndarray:
    """Return the mask of the `keep` highest: of equal ones the first, or, unless exact, all of them."""
    x = sizes(scores)
    mask = np.zeros(len(x), dtype=bool)
    if keep <= 0 or len(x) == 0:
        return mask
    order = np.argsort(-x, kind="stable")[:keep]
    mask[order] = True
    return mask if exact else x >= x[order[-1]]


def groups(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """Return the mask of the n highest of every m neighbours along axis 1, of equal ones the first."""
    x = np.moveaxis(sizes(scores), 1, -1)
    rows = x.reshape(-1, m)
    mask = np.zeros(rows.shape, dtype=bool)
    for row, scored in zip(mask, rows, strict=True):
        row[np.argsort(-scored, kind="stable")[:n]] = True
    return np.moveaxis(mask.reshape(x.shape), -1, 1)


def channels(scores: list[np.ndarray], keep: int) -> list[np.ndarray]:
    """Return masks of whole rows of axis 0, by mean score, taken until they have `keep` elements."""
    means = np.concatenate([np.abs(s).reshape(len(s), -1).mean(1, dtype=np.float64) for s in scores])
    size = np.concatenate([np.full(len(s), s[0].size) for s in scores])
    chosen, taken = np.zeros(len(means), dtype=bool), 0
    for row in np.argsort(-means, kind="stable"):
        if taken >= keep:
            break
        chosen[row], taken = True, taken + size[row]
    parts = np.split(chosen, np.cumsum([len(s) for s in scores])[:-1])
    return [
        np.broadcast_to(c.reshape(-1, *[1] * (s.ndim - 1)), s.shape)
        for s, c in zip(scores, parts, strict=True)
    ]


# ---- the dynamic mask -----------------------------------------------------------------------------------


def drop_rate(first: float, step: int, end: int | None) -> float:
    """Return the share that is dropped: a cosine from `first` to 0."""
    return first if end is None else 0.5 * first * (1 + math.cos(math.pi * min(step, end) / end))


def evolve(
    mask: np.ndarray,
    drop_scores: np.ndarray,
    growth_scores: np.ndarray,
    live: float,
    rate: float,
    official: bool = False,
) -> np.ndarray:
    """Return the next mask: the highest of those in it stay, the highest of those that are not come in.

    The authors let it shrink where there are too few to come in; otherwise fewer are dropped then.
    """
    total = len(mask)
    keep = int(live * (1 - rate))
    if official:
        grow = int(min(live * rate, total - live))
    else:
        keep = max(keep, int(live) - (total - int(live)))
        grow = int(live) - keep
    inside, outside = np.flatnonzero(mask), np.flatnonzero(~mask)
    new = np.zeros(total, dtype=bool)
    new[inside[top(drop_scores[inside], keep, exact=True)]] = True
    new[outside[top(growth_scores[outside], grow, exact=True)]] = True
    return new


def random_scores(sizes_of: list[int], seed: int, step: int) -> np.ndarray:
    """Return random ranks of 31 bits for tensors of so many elements."""
    words = [random_word(seed, step, t, np.arange(n)) for t, n in enumerate(sizes_of)]
    return (np.concatenate(words) >> 1).astype(np.int64)


def first_mask(weights: Tensors, sparsity: float = 0.5, seed: int = 0) -> Tensors:
    """Return the random mask that a dynamic one begins with."""
    count = [w.numel() for w in weights.values()]
    keep = sum(count) - round(sum(count) * sparsity)
    flat = top(random_scores(count, seed, BEGINNING), keep, exact=True)
    parts = np.split(flat, np.cumsum(count)[:-1])
    return {
        name: torch.from_numpy(part).reshape(w.shape)
        for (name, w), part in zip(weights.items(), parts, strict=True)
    }
