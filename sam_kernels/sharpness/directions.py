"""Directions in which to look at the loss: random ones, the gradient, eigenvectors, or given tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .hessian import Product, shaped
from .objective import Objective
from .spectrum import eigenvalues
from .vectors import dot, gaussian, norm

Direction = Literal["random", "gradient", "eigenvector"] | Sequence[Tensor]
Normalize = Literal["filter", "layer", "none"]

_NAMES = ("random", "gradient", "eigenvector")


def directions_of(
    owner: str,
    objective: Objective,
    wished: Sequence[Direction],
    normalize: Sequence[Normalize | None],
    seed: int,
    hvp: Product,
    orthogonal: bool | None,
) -> list[tuple[str, str, list[Tensor]]]:
    """Name, kind of normalization and tensors of each direction; call it inside ``objective.held()``."""
    found: list[tuple[str, str, list[Tensor]]] = []
    names = [wish if isinstance(wish, str) else "given" for wish in wished]
    for name in names:
        if name not in (*_NAMES, "given"):
            raise ValueError(
                f"{owner}: the direction is {name!r}; expected 'random', 'gradient', 'eigenvector', or a "
                "list of tensors shaped like the parameters"
            )
    defaults = ("filter" if name == "random" else "none" for name in names)
    kinds: list[str] = [kind or default for kind, default in zip(normalize, defaults, strict=True)]
    eigenvectors = _eigenvectors(owner, objective, names.count("eigenvector"), seed, hvp)
    for i, (name, wish, kind) in enumerate(zip(names, wished, kinds, strict=True)):
        if kind not in ("filter", "layer", "none"):
            raise ValueError(f"{owner}: normalize is {kind!r}; expected 'filter', 'layer' or 'none'")
        if isinstance(wish, str):
            if name == "random":
                d = gaussian(objective.params, seed, i)
            else:
                d = objective.gradient()[1] if name == "gradient" else eigenvectors.pop(0)
        else:
            d = shaped(owner, "direction", wish, objective)
        d = _normalized(d, objective.params, kind, keeps_length=name == "given")
        if not 0 < norm(d) < math.inf:
            raise ValueError(f"{owner}: {_why_none(name, kind, norm(d))}")
        found.append((name, kind, d))
    if orthogonal is None:
        orthogonal = all(name != "given" and kind == "none" for name, kind, _ in found)
    if orthogonal and len(found) == 2:
        (_, _, first), (name, kind, second) = found
        found[1] = name, kind, _orthogonal(owner, second, first)
    return found


def _eigenvectors(owner: str, objective: Objective, k: int, seed: int, hvp: Product) -> list[list[Tensor]]:
    if k == 0:
        return []
    spectrum = eigenvalues(
        objective.model,
        objective.loss_fn,
        objective.batches,
        k,
        seed=seed,
        hvp=hvp,
        forward=objective.forward,
    )
    if len(spectrum.vectors) < k:
        raise ValueError(f"{owner}: {len(spectrum.vectors)} of {k} eigenvectors were found; see the warning")
    return list(spectrum.vectors)


def _normalized(d: list[Tensor], params: Sequence[Tensor], kind: str, *, keeps_length: bool) -> list[Tensor]:
    if kind == "none":
        length = norm(d)
        return d if keeps_length or length == 0 else [x / length for x in d]
    out = []
    for x, p in zip(d, params, strict=True):
        if p.dim() < 2:
            out.append(torch.zeros_like(x))  # biases and scales, as Li et al. leave them out
            continue
        over = tuple(range(1, p.dim())) if kind == "filter" else tuple(range(p.dim()))
        weights, own = (t.detach().double().square().sum(over, keepdim=True).sqrt() for t in (p, x))
        out.append((x.double() * torch.where(own > 0, weights / own, 0.0)).to(x.dtype))
    return out


def _orthogonal(owner: str, d: list[Tensor], to: list[Tensor]) -> list[Tensor]:
    length = norm(d)
    for _ in range(2):  # once leaves rounding errors of the size of what it takes out
        share = dot(d, to) / norm(to) ** 2
        d = [x - share * y for x, y in zip(d, to, strict=True)]
    if norm(d) < 1e-5 * length:
        raise ValueError(f"{owner}: the two directions are parallel; expected two that span a plane")
    return [x * (length / norm(d)) for x in d]


def _why_none(name: str, kind: str, length: float) -> str:
    if not math.isfinite(length):
        return f"the {name} direction is not finite; look whether the loss is finite at these weights"
    if kind != "none":
        return (
            f"the {name} direction is zero, as normalize={kind!r} leaves out one-dimensional parameters and "
            "weights that are zero; take normalize='none'"
        )
    return f"the {name} direction is zero at these weights; take another"
