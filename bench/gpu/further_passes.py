"""Single passes with masks, masters and random numbers, and the selection of masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sides import NORM, SEED, STEP, Found, Side, descended, patterns, present, rows_of


def masks(side: Side) -> Found:
    """Masks of single weights, n:m and whole channels: norm, perturbation, restore, both updates."""
    found = Found()
    engine, norm = side.engine, side.scalar(NORM)
    for pattern, words in patterns(side).items():
        group = side.group(*rows_of()["mixed"])
        group.set_masks(words)
        found.sums[f"{pattern}: masked sq_norm"] = engine.sq_norm(group, masked=True)
        found.sums[f"{pattern}: masked by tensor"] = engine.sq_norm(group, masked=True, per_tensor=True)
        engine.perturb_(group, norm)
        found.elements[f"{pattern}: perturb_"] = [p.clone() for p in group.params]
        found.copies[f"{pattern}: snapshots"] = _seen(group)
        for rule in ("sgd", "adam"):
            again = side.group(*rows_of()["mixed"])
            again.set_masks(words)
            engine.perturb_(again, norm)
            left = descended(side, again, rule)
            found.elements |= {f"{pattern}: {name}": tensors for name, tensors in left.items()}
        engine.restore_(group)
        found.copies[f"{pattern}: restore_"] = group.params
    return found


def _seen(group: Any) -> list[Tensor]:
    """Snapshots where every backend writes them: not where a whole word of the mask is zero."""
    from sam_kernels.bitmask import unpack

    found = []
    for snapshot, words in zip(group.snapshots, group.masks, strict=True):
        if snapshot is not None and words is not None:
            written = unpack(torch.where(words == 0, 0, -1), snapshot)
            snapshot = torch.where(written, snapshot, torch.zeros_like(snapshot))
        if snapshot is not None:
            found.append(snapshot)
    return found


def masters(side: Side) -> Found:
    """fp32 masters of half weights: norms, perturbation with and without a mask, restore, both updates."""
    from sam_kernels.masters import begin_descent

    found = Found()
    engine, norm, words = side.engine, side.scalar(NORM), patterns(side)["single"]
    for name in ("mixed", "Fisher"):
        group = side.group(*rows_of()[name], masters=True)
        found.sums[f"sq_norm, {name}"] = engine.sq_norm(group)
        engine.perturb_(group, norm)
        found.elements[f"perturb_, {name}"] = [p.clone() for p in group.params]
        engine.restore_(group)
        found.copies[f"restore_, {name}"] = group.params
    found.sums["of masters"] = engine.sq_norm(group, of="weight", per_tensor=True)
    for rule in ("sgd", "adam"):
        for is_masked in (False, True):
            group = side.group(*rows_of()["mixed"], masters=True)
            group.set_masks(words if is_masked else None)
            engine.perturb_(group, norm)
            what = "masked, " if is_masked else ""
            found.elements[f"{what}perturb_ before {rule}"] = [p.clone() for p in group.params]
            begin_descent([(group, engine)])
            left = descended(side, group, rule)
            found.elements |= {f"{what}{name}": tensors for name, tensors in left.items()}
    return found


def randoms(side: Side) -> Found:
    """Normal numbers, and perturbed bf16 weights that are rounded at random; the bits of both by counter."""
    from sam_kernels.rounding import Rounding

    found = Found()
    engine, norm = side.engine, side.scalar(NORM)
    group = side.group(*rows_of()["mixed"])
    numbers = [t * 0x3000_0001 % (1 << 32) for t in range(len(group.params))]
    outs: list[Tensor | None] = [None if t == 1 else x for t, x in enumerate(side.fresh(5))]
    engine.noise_(group, outs, SEED, STEP, numbers)
    found.copies["noise_"] = present(outs)
    if side.dtype != torch.bfloat16:
        return found
    for name, words in (("", None), ("masked, ", patterns(side)["single"])):
        group = side.group(*rows_of()["mixed"])
        group.set_masks(words)
        group.rounding = Rounding(SEED, STEP, numbers)
        engine.perturb_(group, norm)
        found.elements[f"{name}rounded at random"] = group.params
    return found


def selection(side: Side) -> Found:
    """Masks chosen from scores and from random numbers; the bits are the same whoever chooses."""
    from sam_kernels.ranks import Ranks
    from sam_kernels.selection import Block, Part, select

    found = Found()
    engine, group = side.engine, side.group(*rows_of()["mixed"])
    scores = [x.abs() for x in side.fresh(5, torch.float32)]
    engine.accumulate_squares_(group, scores)
    found.elements["accumulate_squares_"] = scores
    exact = side.fresh(6, torch.float32)
    tied = [(4 * x).round() for x in exact]  # more of a kind than are settled one by one
    within, numbers = patterns(side)["single"], [7 * t for t in range(len(exact))]
    ranks = {
        "scores": Ranks(list(exact)),
        "scores with ties": Ranks(list(tied)),
        "scores of weights": Ranks(list(side.fresh(6))),
        "within": Ranks(list(exact), within=within),
        "outside": Ranks(list(exact), within=within, outside=True),
        "random": Ranks(seed=SEED, step=STEP, numbers=numbers),
    }
    total = sum(x.numel() for x in exact)
    for name, ranked in ranks.items():
        takes_part = [t != 2 for t in range(len(exact))]
        for is_exact in (False, True):
            block = Block([x.numel() for x in exact], side.device)
            block.words.fill_(-1)
            part = Part(group, engine, ranked, block, takes_part)
            select([part], total // 3, exact=is_exact)
            select([part], total // 5, exact=is_exact, add=True)
            found.copies[f"{name}, exact={is_exact}"] = present(part.masks)
        for shift, bits in ((20, 11), (0, 9)):
            counts = engine.count_ranks(group, ranked, part.masks, prefix=0, shift=shift, bits=bits)
            found.copies[f"{name}, counted from bit {shift}"] = [counts]
    found.copies |= _candidates(side, group, Ranks(list(tied)))
    return found


def _candidates(side: Side, group: Any, ranks: Any) -> dict[str, list[Tensor]]:
    """All elements of one rank, in any order, and how many there are where not all fit."""
    from sam_kernels.ranks import rank_scores
    from sam_kernels.selection import Block

    block = Block([p.numel() for p in group.params], side.device)
    threshold = int(rank_scores(torch.tensor(4.0)))
    found = {}
    for room in (block.words.numel() * 64, 3):
        candidates = torch.full((room,), -1, dtype=torch.int64, device=side.device)
        count = torch.zeros(1, dtype=torch.int64, device=side.device)
        positions = [64 * start for start in block.starts[:-1]]
        side.engine.mark_(
            group,
            ranks,
            list(block.views),
            threshold=threshold,
            shift=0,
            positions=positions,
            candidates=candidates,
            found=count,
        )
        found[f"marked, room for {room}"] = list(block.views)
        found[f"found, room for {room}"] = [count] if room == 3 else [count, candidates.sort().values]
    return found
