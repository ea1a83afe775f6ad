"""Single passes from seeded inputs: every pass a backend has, in every form, with what it wrote.

A test counts them: a pass, an argument or an enumerated value that none of these uses fails it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import compare
from .further_passes import masks, masters, randoms, selection
from .sides import NORM, PEAK, POWERS, Found, Side, descended, present, rows_of


def sums(side: Side) -> Found:
    """Norms of every kind and dots, of all tensors together and by tensor."""
    found, metrics = Found(), rows_of()
    for name, rows in metrics.items():
        group = side.group(*rows)
        found.sums[f"sq_norm, {name}"] = side.engine.sq_norm(group)
        found.sums[f"sq_norm by tensor, {name}"] = side.engine.sq_norm(group, per_tensor=True)
    group, peak = side.group(*metrics["mixed"]), side.scalar(PEAK)
    found.sums["its root"] = side.engine.sq_norm(group, root=2.0)
    found.sums["of weights"] = side.engine.sq_norm(group, of="weight", per_tensor=True)
    found.sums["peak"] = side.engine.sq_norm(group, moment="peak")
    found.sums["peaks"] = side.engine.sq_norm(group, moment="peak", per_tensor=True)
    power = {"moment": "power", "peak": peak, "q": 1.5}
    found.sums[f"{POWERS}sq_norm"] = side.engine.sq_norm(group, root=3.0, **power)
    largest = side.engine.sq_norm(group, moment="peak")
    at_peak = {"moment": "power", "peak": largest, "q": math.inf}
    found.sums["how many are the largest"] = side.engine.sq_norm(group, **at_peak)
    # Dots of independent lists nearly cancel and have few digits; these have most of a list in common.
    first = side.fresh(1)
    lists = [first, *([a + b for a, b in zip(first, side.fresh(s), strict=True)] for s in (3, 4))]
    for count in (1, 2, 3):
        dots = side.engine.grad_stats(group, lists[:count])
        each = side.engine.grad_stats(group, lists[:count], per_tensor=True)
        found.sums[f"grad_stats, {count}"] = _shares(dots, count)
        found.sums[f"grad_stats by tensor, {count}"] = _shares(each, count)
    return found


def _shares(dots: Tensor, count: int) -> Tensor:
    """Dots of two lists as shares of their lengths: where they cancel few digits are left."""
    i, j = torch.triu_indices(count, count)
    own = [n for n in range(len(i)) if i[n] == j[n]]
    lengths = dots[..., own].sqrt()
    shares = dots / (lengths[..., i] * lengths[..., j]).clamp(min=1e-300)
    shares[..., own] = dots[..., own]
    return shares


def plain(side: Side) -> Found:
    """Perturbation, restore, combination and both updates."""
    found = Found()
    engine, norm = side.engine, side.scalar(NORM)
    for name in ("plain", "mixed"):
        group = side.group(*rows_of()[name])
        engine.perturb_(group, norm)
        found.elements[f"perturb_, {name}"] = group.params
        found.copies[f"its snapshots, {name}"] = present(group.snapshots)
    engine.restore_(group)
    found.copies["restore_"] = group.params
    for rule in ("sgd", "adam"):
        group = side.group(*rows_of()["mixed"])
        found.elements |= descended(side, group, rule)
    found.elements |= _guarded(side)
    outs = [side.fresh(5), side.fresh(6)]
    lists = [side.fresh(0), side.fresh(1), side.fresh(2)]
    weights = torch.tensor([[0.5, -0.25, 0.1], [0.3, 0.0, 2.0]], dtype=torch.float64, device=side.device)
    engine.combine_(group, outs, lists, weights)
    found.elements |= {"combine_, first": outs[0], "combine_, second": outs[1]}
    each = weights * torch.arange(1, len(lists[0]) + 1, device=side.device).view(-1, 1, 1)
    into = [lists[0]]
    engine.combine_(group, into, lists[:2], each[:, :1, :2].contiguous())
    found.elements["combine_ by tensor, into a list of its own"] = into[0]
    return found


def _guarded(side: Side) -> dict[str, list[Tensor]]:
    """Updates of a scaled gradient, and three that must leave everything as it was."""
    found = {}
    one, none = side.scalar(1.0), side.scalar(0.0, torch.float32)
    inf, is_inf = side.scalar(math.inf), side.scalar(1.0, torch.float32)
    scale = side.scalar(0.25, torch.float32)
    cases = {
        "scaled": {"guard": one, "found_inf": none, "inv_scale": scale},
        "with an infinite guard": {"guard": inf},
        "with an overflow": {"guard": one, "found_inf": is_inf},
    }
    for what, more in cases.items():
        for rule in ("sgd", "adam"):
            group = side.group(*rows_of()["mixed"])
            left = descended(side, group, rule, **more)
            found |= {f"{what}, {name}": tensors for name, tensors in left.items()}
    return found


def metrics(side: Side) -> Found:
    """Every shape of a perturbation and every metric, with factors by tensor, in place of a gradient."""
    found = Found()
    engine, norm = side.engine, side.scalar(NORM)
    mixed, fisher = rows_of()["mixed"], rows_of()["Fisher"]
    peak = {"peak": side.scalar(PEAK)}
    shapes: dict[str, dict[str, Any]] = {
        "sign": {"shape": "sign"},
        f"{POWERS}powered": {"shape": "powered", "q": 1.5, **peak},
        # Those of the size of the peak share the radius; this one gives many tensors such an element.
        "largest alone": {"shape": "powered", "q": math.inf, "peak": side.scalar(1.0)},
    }
    for name, more in shapes.items():
        group = side.group(*mixed)
        if name == "largest alone":
            for g in group.grads:
                if g is not None:
                    g.clamp_(-1.0, 1.0)
        engine.perturb_(group, norm, **more)
        found.elements[name] = group.params
    factors = torch.linspace(0.5, 2.0, len(group.params), dtype=torch.float64, device=side.device)
    for name, rows in {"mixed": mixed, "Fisher": fisher}.items():
        group = side.group(*rows)
        engine.perturb_(group, norm, tensor_scale=factors)
        found.elements[f"{name}, factors by tensor"] = group.params
    # A direction that is kept lies where its snapshot goes.
    group = side.group(*mixed)
    pairs = zip(group.grads, group.snapshots, strict=True)
    group.aim([s if g is None or s is None else s.copy_(g) for g, s in pairs])
    engine.perturb_(group, norm)
    found.elements["along its own snapshots"] = group.params
    found.copies["the snapshots that were gradients"] = present(group.snapshots)
    group = side.group(*mixed)
    engine.perturb_(group, side.scalar(math.nan))
    found.copies["by a norm that is not finite"] = group.params
    return found


# In the order of what is most basic.
FAMILIES: dict[str, Callable[[Side], Found]] = {
    "sums": sums,
    "plain": plain,
    "masks": masks,
    "masters": masters,
    "metrics": metrics,
    "random": randoms,
    "selection": selection,
}
_ONLY = {"masters": compare.HALF}


def families(dtype: torch.dtype) -> list[str]:
    """The names of those that have something for weights of that dtype."""
    return [name for name in FAMILIES if dtype in _ONLY.get(name, compare.DTYPES)]


def results(family: str, side: Side) -> Found:
    """What the passes of a family leave."""
    with torch.no_grad():
        return FAMILIES[family](side)
