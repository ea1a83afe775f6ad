"""The masks of an optimizer: the bits of every parameter, what is known of them, how they are selected."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .bitmask import WORD, Layout, count_bits, count_words, pack, relay, unpack_from
from .directions import own_numbers
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
from .sharding import local
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
        self.are_complete = False  # whether every parameter that takes part has a mask

    def __getstate__(self) -> dict[str, Any]:
        # The blocks are made anew with the tensor groups, which no copy takes along.
        return {"_words": self._words, "_layouts": self._layouts, "_places": [], "are_complete": False}

    # ---- reading -------------------------------------------------------------------------------

    def __getitem__(self, param: Tensor) -> Tensor:
        """The mask of a parameter as a bool tensor of its shape; all True where it is dense.

        Of a parameter that is spread over ranks it is that of the local part.

        Raises:
            KeyError: if the optimizer has no such parameter.
        """
        param = local(param)
        for group, _ in self._places:
            for candidate, takes_part in _participants(group):
                if candidate is not param:
                    continue
                words = self._words.get(param)
                if words is not None:
                    return unpack_from(words, self._layouts[param]).reshape(param.shape)
                return torch.full_like(param, takes_part, dtype=torch.bool, requires_grad=False)
        raise KeyError("masks: this is no parameter of the optimizer")

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
            whole = [p.numel() * takes for p, takes in _participants(group)]
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
                raise ValueError(
                    f"the mask of a parameter of shape {tuple(param.shape)} is {describe(mask)}; expected "
                    f"torch.int64 {expected}. The state that was loaded belongs to another model, or has "
                    "been through an optimizer that casts what it does not know"
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
        self.are_complete = all(
            param in self._words
            for group, _ in self._places
            for param, takes_part in _participants(group)
            if takes_part
        )

    def _adopt(self, words: dict[Tensor, Tensor]) -> None:
        """Copy these masks into the blocks; they are in force from now on."""
        for group, block in self._places:
            for param, view in zip(group.params, block.views, strict=True):
                if param in words:
                    self._words[param] = view.copy_(words[param])
                    self._layouts[param] = _layout(param)
        self._tell()

    # ---- updates -------------------------------------------------------------------------------

    def give(self, masks: dict[Tensor, Tensor | None]) -> None:
        """Bool tensors by parameter; None makes one dense."""
        packed = {param: pack(mask) for param, mask in masks.items() if mask is not None}
        for param in masks.keys() - packed.keys():
            self._words.pop(param, None)
        self._adopt(packed)

    def draw(self, served: Served, threshold: int, seed: int, step: int, numbers: dict[Tensor, int]) -> None:
        """Masks of this step: the weights whose random rank is at least the threshold."""
        for (group, block), (_, backend) in zip(self._places, served, strict=True):
            views = [
                view if takes else None for view, takes in zip(block.views, group.participates, strict=True)
            ]
            own = Ranks(seed=seed, step=step % _STEPS, numbers=own_numbers(group, numbers))
            backend.mark_(group, own, views, threshold=threshold - 1, shift=0)
            for param, words in zip(group.params, views, strict=True):
                if words is not None and param not in self._words:
                    self._words[param], self._layouts[param] = words, _layout(param)
        self._tell()

    def select(self, served: Served, policy: TopScores, scores: dict[Tensor, Tensor]) -> None:
        """Masks of the highest scores; parameters without scores keep the masks they have."""
        dense = {p for p in scores if policy.pattern == "nm" and not has_groups(p.shape, policy.m)}
        chosen = _chosen(served, lambda p: p in scores and p not in dense)
        if policy.pattern == "nm":
            words = {p: select_groups(scores[p], policy.n, policy.m) for p in chosen}
        elif policy.pattern == "structured":
            filled = [p for p in chosen if p.numel()]
            keep = policy.live(sum(p.numel() for p in filled))
            words = {p: torch.zeros(0, dtype=torch.int64) for p in chosen if not p.numel()}
            words |= zip(filled, select_channels([scores[p] for p in filled], keep), strict=True)
        elif policy.scope == "tensor":
            words = {
                p: select_by_tensor(scores[p], policy.live(p.numel()), exact=policy.exact) for p in chosen
            }
        else:
            keep = policy.live(sum(p.numel() for p in chosen))
            words = _selected(
                served, chosen, lambda group: Ranks([scores.get(p) for p in group.params]), keep, policy.exact
            )
        for param in dense:
            self._words.pop(param, None)
        self._adopt(words)

    def begin(self, served: Served, policy: Dynamic, numbers: dict[Tensor, int]) -> None:
        """Masks of weights chosen at random, where there are none yet."""
        chosen = _chosen(served, lambda p: p not in self._words)
        keep = policy.first(sum(p.numel() for p in chosen))
        ranks = partial(_random, policy, _STEPS, numbers=numbers)
        self._adopt(_selected(served, chosen, ranks, keep, policy.exact))

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


def _chosen(served: Served, wants: Callable[[Tensor], bool]) -> list[Tensor]:
    """The parameters that take part and are wanted."""
    return [p for group, _ in served for p, takes in _participants(group) if takes and wants(p)]


def _selected(
    served: Served, chosen: list[Tensor], ranks: Callable[[TensorGroup], Ranks], keep: int, exact: bool
) -> dict[Tensor, Tensor]:
    """The words of the highest ranks, in blocks of their own: a selection that fails changes no mask."""
    wanted = set(chosen)
    flags = [[p in wanted for p in group.params] for group, _ in served]
    parts = [
        Part(group, backend, ranks(group), _block(group), takes)
        for (group, backend), takes in zip(served, flags, strict=True)
        if any(takes)
    ]
    select(parts, keep, exact=exact)
    return {
        param: words
        for part in parts
        for param, words in zip(part.group.params, part.masks, strict=True)
        if words is not None
    }


def describe(value: Any) -> str:
    """What was found in place of a tensor, for messages."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _random(policy: Dynamic, step: int, group: TensorGroup, numbers: dict[Tensor, int]) -> Ranks:
    return Ranks(seed=policy.seed, step=step, numbers=[numbers[p] for p in group.params])
