"""The masks of an optimizer: the bits of every parameter, what is known of them, how they are selected."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .bitmask import WORD, Layout, count_bits, count_words, pack, relay, unpack_from
from .perturbation import Served
from .policies import Dynamic, TopScores
from .ranks import Ranks
from .selection import (
    Block,
    Part,
    has_groups,
    select,
    select_by_tensor,
    select_channels,
    select_groups,
)
from .tensor_groups import TensorGroup

# Steps of the random numbers: two for every step of the optimizer, and one that no step reaches.
_STEPS = (1 << 32) - 1


class Masks:
    """Which weights are perturbed: one bit each, in blocks beside the tensor groups.

    Made by `SAM`, which hands it out as ``opt.masks``. Parameters without a mask are dense: all their weights
    are perturbed. Parameters that the recipe leaves out as a whole have no mask and count as unperturbed.

    Example:
        >>> import torch
        >>> from sam_kernels import SAM
        >>> w = torch.nn.Parameter(torch.ones(4))
        >>> opt = SAM([w], torch.optim.SGD, recipe="ssam_f", lr=0.1)
        >>> opt.update_masks(scores=[torch.tensor([0.1, 0.4, 0.3, 0.2])])
        >>> opt.masks[w], opt.masks.density()
        (tensor([False,  True,  True, False]), tensor(0.5000, dtype=torch.float64))
    """

    def __init__(self) -> None:
        self._words: dict[Tensor, Tensor] = {}
        self._layouts: dict[Tensor, Layout] = {}  # of the parameters, for which the words are
        self._places: list[tuple[TensorGroup, Block]] = []

    def __getstate__(self) -> dict[str, Any]:
        # The blocks are made anew with the tensor groups, which no copy takes along.
        return {"_words": self._words, "_layouts": self._layouts, "_places": []}

    # ---- reading -------------------------------------------------------------------------------

    def __getitem__(self, param: Tensor) -> Tensor:
        """The mask of a parameter as a bool tensor of its shape; all True where it is dense.

        Raises:
            KeyError: if the optimizer has no such parameter.
        """
        if all(p is not param for group, _ in self._places for p in group.params):
            raise KeyError("masks: this is no parameter of the optimizer")
        words = self._words.get(param)
        if words is not None:
            return unpack_from(words, self._layouts[param]).reshape(param.shape)
        return torch.full_like(param, self._takes_part(param), dtype=torch.bool, requires_grad=False)

    def words(self, param: Tensor) -> Tensor | None:
        """The packed mask, int64 [ceil(numel / 64)], see `sam_kernels.bitmask`; None where it is dense."""
        return self._words.get(param)

    def counts(self) -> Tensor:
        """int64 [tensors]: how many weights of each are perturbed, in the order of the tensor groups."""
        found = []
        for group, block in self._places:
            starts = torch.tensor(block.starts, device=group.device)
            sums = torch.zeros(len(block.words) + 1, dtype=torch.int64, device=group.device)
            torch.cumsum(count_bits(block.words), 0, out=sums[1:])
            counts = sums[starts[1:]] - sums[starts[:-1]]
            whole = [p.numel() * takes for p, takes in zip(group.params, group.participates, strict=True)]
            dense = torch.tensor([p not in self._words for p in group.params], device=group.device)
            counts = torch.where(dense, torch.tensor(whole, device=group.device), counts)
            found.append(counts.to(self._places[0][0].device))
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)

    def densities(self) -> Tensor:
        """float64 [tensors]: the share of each that is perturbed; NaN for tensors without elements."""
        counts = self.counts()
        return counts.double() / torch.tensor(self._sizes(), device=counts.device, dtype=torch.float64)

    def count(self) -> Tensor:
        """int64: how many weights are perturbed."""
        return self.counts().sum()

    def density(self) -> Tensor:
        """float64: the share of all weights that is perturbed."""
        return self.count().double() / max(sum(self._sizes()), 1)

    def nbytes(self) -> int:
        """Memory of the masks in bytes."""
        return sum(words.numel() * 8 for words in self._words.values())

    def _sizes(self) -> list[int]:
        return [p.numel() for group, _ in self._places for p in group.params]

    def _takes_part(self, param: Tensor) -> bool:
        return all(
            takes
            for group, _ in self._places
            for p, takes in zip(group.params, group.participates, strict=True)
            if p is param
        )

    # ---- their place beside the tensor groups --------------------------------------------------

    def attach(self, groups: Sequence[TensorGroup]) -> None:
        """Move the words into blocks beside these groups, on their devices, and tell the groups.

        A parameter that has changed its size since its mask was made loses it, with a warning.
        """
        self._places = []
        kept = {}
        for group in groups:
            block = _block(group)
            for param, view in zip(group.params, block.views, strict=True):
                words = self._words.get(param)
                if words is None:
                    continue
                layout = self._layouts[param]
                if layout[0].numel() != param.numel():
                    warnings.warn(
                        f"a parameter of shape {tuple(param.shape)} had the mask of one of shape "
                        f"{tuple(layout[0])} and is dense now; update the masks",
                        UserWarning,
                        stacklevel=2,
                    )
                    continue
                kept[param] = view.copy_(relay(words, layout, _layout(param)))
            self._places.append((group, block))
        self._words = kept
        self._layouts = {param: _layout(param) for param in kept}
        self._tell()

    def saved(self, param: Tensor) -> Tensor | None:
        """The words as checkpoints hold them: for a contiguous parameter; None where it is dense."""
        words = self._words.get(param)
        if words is None:
            return None
        return relay(words, self._layouts[param], _contiguous(param))

    @staticmethod
    def check(words: dict[Tensor, Tensor]) -> None:
        """Raise a sentence unless the masks of a checkpoint fit their parameters.

        Raises:
            ValueError: if one does not.
        """
        for param, mask in words.items():
            expected = (count_words(param.numel()),)
            is_fit = isinstance(mask, Tensor) and mask.dtype == torch.int64 and tuple(mask.shape) == expected
            rest = param.numel() % WORD
            if is_fit and rest and (int(mask[-1]) & (1 << WORD) - 1) >> rest:
                is_fit = False  # bits for elements that the parameter does not have
            if not is_fit:
                found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
                raise ValueError(
                    f"the mask of a parameter of shape {tuple(param.shape)} is {found}; expected torch.int64 "
                    f"{expected}. The state that was loaded belongs to another model, or has been through an "
                    "optimizer that casts what it does not know"
                )

    def load(self, words: dict[Tensor, Tensor]) -> None:
        """Take masks from a checkpoint, which fit, in place of those there are; `attach` comes next."""
        self._words = dict(words)
        self._layouts = {param: _contiguous(param) for param in words}

    def _tell(self) -> None:
        for group, block in self._places:
            masks = [
                view if param in self._words else None
                for param, view in zip(group.params, block.views, strict=True)
            ]
            group.set_masks(masks)

    def _adopt(self, params: Iterable[Tensor]) -> None:
        """The blocks now hold masks of these parameters."""
        chosen = set(params)
        for group, block in self._places:
            pairs = zip(group.params, block.views, strict=True)
            self._words |= {param: view for param, view in pairs if param in chosen}
        self._layouts |= {param: _layout(param) for param in chosen}
        self._tell()

    # ---- updates -------------------------------------------------------------------------------

    def give(self, masks: dict[Tensor, Tensor | None]) -> None:
        """Bool tensors by parameter; None makes one dense."""
        packed = {param: pack(mask) for param, mask in masks.items() if mask is not None}
        for group, block in self._places:
            for param, view in zip(group.params, block.views, strict=True):
                if param in packed:
                    view.copy_(packed[param])
        for param in masks.keys() - packed.keys():
            self._words.pop(param, None)
        self._adopt(packed)

    def select(self, served: Served, policy: TopScores, scores: dict[Tensor, Tensor]) -> None:
        """Masks of the highest scores; parameters without scores keep the masks they have."""
        dense = {p for p in scores if policy.pattern == "nm" and not has_groups(p.shape, policy.m)}
        compete = [
            [takes and p in scores and p not in dense for p, takes in _participants(group)]
            for group, _ in self._places
        ]
        chosen = [
            param
            for (group, _), flags in zip(self._places, compete, strict=True)
            for param, flag in zip(group.params, flags, strict=True)
            if flag
        ]
        if policy.pattern == "nm":
            self._write({p: select_groups(scores[p], policy.n, policy.m) for p in chosen})
        elif policy.pattern == "structured":
            filled = [p for p in chosen if p.numel()]
            keep = policy.live(sum(p.numel() for p in filled))
            self._write(dict(zip(filled, select_channels([scores[p] for p in filled], keep), strict=True)))
        elif policy.scope == "tensor":
            self._write(
                {p: select_by_tensor(scores[p], policy.live(p.numel()), exact=policy.exact) for p in chosen}
            )
        else:
            parts = [
                Part(group, backend, Ranks([scores.get(p) for p in group.params]), _block(group), flags)
                for (group, _), (_, backend), flags in zip(self._places, served, compete, strict=True)
                if any(flags)
            ]
            select(parts, policy.live(sum(p.numel() for p in chosen)), exact=policy.exact)
            self._write_parts(parts)
        for param in dense:
            self._words.pop(param, None)
        self._adopt(chosen)

    def _write_parts(self, parts: list[Part]) -> None:
        """What was selected, all of it, and only now: a selection that fails changes no mask."""
        self._write(
            {
                param: view
                for part in parts
                for param, view, takes in zip(
                    part.group.params, part.block.views, part.takes_part, strict=True
                )
                if takes
            }
        )

    def _write(self, words: dict[Tensor, Tensor]) -> None:
        for group, block in self._places:
            for param, view in zip(group.params, block.views, strict=True):
                if param in words:
                    view.copy_(words[param])

    def begin(self, served: Served, policy: Dynamic, numbers: dict[Tensor, int]) -> None:
        """Masks of weights chosen at random, where there are none yet."""
        new = [
            [takes and p not in self._words for p, takes in _participants(group)] for group, _ in self._places
        ]
        parts = [
            Part(group, backend, _random(policy, _STEPS, group, numbers), _block(group), flags)
            for (group, _), (_, backend), flags in zip(self._places, served, new, strict=True)
            if any(flags)
        ]
        if not parts:
            return
        chosen = [
            p for part in parts for p, flag in zip(part.group.params, part.takes_part, strict=True) if flag
        ]
        select(parts, policy.first(sum(p.numel() for p in chosen)), exact=policy.exact)
        self._write_parts(parts)
        self._adopt(chosen)

    def evolve(self, served: Served, policy: Dynamic, numbers: dict[Tensor, int], step: int) -> list[Block]:
        """The masks after dropping and growing, by the gradients that the groups hold; not yet in force."""
        blocks = [_block(group) for group, _ in self._places]

        def parts(criterion: str, outside: bool) -> list[Part]:
            made = []
            for (group, _), (_, backend), block in zip(self._places, served, blocks, strict=True):
                if criterion == "random":
                    ranks = _random(policy, (2 * step + outside) % _STEPS, group, numbers)
                else:
                    ranks = Ranks(list(group.grads if criterion == "gradient" else group.params))
                ranks.within, ranks.outside = group.masks, outside
                made.append(Part(group, backend, ranks, block, list(group.participates)))
            return made

        count = sum(p.numel() for group, _ in self._places for p, takes in _participants(group) if takes)
        select(parts(policy.drop, outside=False), policy.kept(count, step), exact=policy.exact)
        select(parts(policy.growth, outside=True), policy.grown(count, step), exact=policy.exact, add=True)
        return blocks

    def take(self, blocks: list[Block]) -> None:
        """Put what `evolve` has made in force; the words keep their addresses."""
        for (_, block), new in zip(self._places, blocks, strict=True):
            block.words.copy_(new.words)
        self._tell()


def _layout(param: Tensor) -> Layout:
    return param.shape, param.stride()


def _contiguous(param: Tensor) -> Layout:
    return _layout(torch.empty(param.shape, device="meta"))


def _block(group: TensorGroup) -> Block:
    return Block([p.numel() for p in group.params], group.device)


def _participants(group: TensorGroup) -> Iterable[tuple[Tensor, bool]]:
    return zip(group.params, group.participates, strict=True)


def _random(policy: Dynamic, step: int, group: TensorGroup, numbers: dict[Tensor, int]) -> Ranks:
    return Ranks(seed=policy.seed, step=step, numbers=[numbers[p] for p in group.params])
