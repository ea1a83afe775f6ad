"""Sparse SAM as its authors publish it, written afresh: masks of float32, rankings by topk.

Mi et al., NeurIPS 2022, arXiv 2210.05177; what allocates and what passes over memory is as in
Mi-Peng/Sparse-Sharpness-Aware-Minimization. Left out are what does nothing on a CPU and the checks of each
mask's extremes, two more passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import RHO, Base
from .peers import Slots

EPS = 1e-7


class SparseSam:
    """The step: each perturbation is multiplied by its mask, kept, and subtracted again."""

    def __init__(
        self, params: list[Tensor], base: Base, slots: Slots = None, *, masks: list[Tensor], **form: Any
    ) -> None:
        self.params = params
        self.masks = masks
        self.base = base.build(params, slots, **form)
        self.perturbations: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step_phase1(self) -> None:
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in self.params]), p=2)
        scale = RHO / (norm + EPS)
        for p, mask in zip(self.params, self.masks, strict=True):
            e = p.grad * scale
            e = e * mask
            p.add_(e)
            self.perturbations[p] = e

    @torch.no_grad()
    def step_phase2(self) -> None:
        for p in self.params:
            p.sub_(self.perturbations[p])
        self.base.step()


def fisher_masks(scores: list[Tensor], keep: int) -> list[Tensor]:
    """The masks of SSAM-F: views of one vector with a one at each of the `keep` highest scores."""
    return _cut(_highest(torch.cat([torch.flatten(x) for x in scores]), keep), scores)


def dynamic_masks(grads: list[Tensor], masks: list[Tensor], kept: int, grown: int) -> None:
    """Put those of SSAM-D in place of `masks`: the `kept` of the largest |g| there, `grown` from outside."""
    inside_of, outside_of = [], []
    for g, mask in zip(grads, masks, strict=True):
        inside_of.append((g.clone().abs() + 1e-7) * mask)
        outside_of.append((torch.rand(g.shape) + 1e-7) * (1 - mask))
    inside = torch.cat([torch.flatten(x) for x in inside_of])
    del inside_of  # as published, where the vector takes the name of the list
    keeps = _cut(_highest(inside, kept), masks)
    outside = torch.cat([torch.flatten(x) for x in outside_of])
    del outside_of
    grows = _cut(_highest(outside, grown), masks)
    for t, (keep, grow) in enumerate(zip(keeps, grows, strict=True)):
        masks[t] = keep + grow


def _highest(ranking: Tensor, count: int) -> Tensor:
    values, indices = torch.topk(ranking, count)
    chosen = torch.zeros_like(ranking)
    return chosen.scatter_(0, indices, torch.ones_like(values))


def _cut(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    sizes = [x.numel() for x in like]
    return [piece.view(x.shape) for piece, x in zip(vector.split(sizes), like, strict=True)]
