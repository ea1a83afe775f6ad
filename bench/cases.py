"""What is measured: parameter lists of known models, as shapes, and the base optimizers.

The lists are generated from architecture constants, so no model library is needed; COUNTS says what
they must add up to, and a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]

# One radius for gate and timing. Weights, gradients and steps have the sizes of a network in training,
# so that the gate sees the perturbation above the rounding of the weights and nothing turns denormal.
RHO, EPS = 0.05, 1e-12
WEIGHT_SIZE, GRAD_SIZE = 0.02, 0.01

_BLOCKS_OF_STAGE = (3, 4, 6, 3)


def _norm_layer(width: int) -> Iterator[Shape]:
    yield from ((width,), (width,))


def _linear(inputs: int, outputs: int) -> Iterator[Shape]:
    yield from ((outputs, inputs), (outputs,))


def resnet50() -> Iterator[Shape]:
    """ResNet-50 for 1000 classes: bottlenecks of 3 convolutions, each followed by a batch norm."""
    yield (64, 3, 7, 7)
    yield from _norm_layer(64)
    inputs = 64
    for stage, blocks in enumerate(_BLOCKS_OF_STAGE):
        width = 64 << stage
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            for shape in convolutions:
                yield shape
                yield from _norm_layer(shape[0])
            inputs = 4 * width
    yield from _linear(2048, 1000)


def vit_b() -> Iterator[Shape]:
    """ViT-B/16 at 224 pixels for 1000 classes, attention input projections in one matrix."""
    yield from ((1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768))
    for _ in range(12):
        yield from _norm_layer(768)
        yield from _linear(768, 3 * 768)
        yield from _linear(768, 768)
        yield from _norm_layer(768)
        yield from _linear(768, 3072)
        yield from _linear(3072, 768)
    yield from _norm_layer(768)
    yield from _linear(768, 1000)


def bert_base() -> Iterator[Shape]:
    """BERT-base: separate query, key and value; a pooler and no head."""
    yield from ((30522, 768), (512, 768), (2, 768))
    yield from _norm_layer(768)
    for _ in range(12):
        for _ in range(4):
            yield from _linear(768, 768)
        yield from _norm_layer(768)
        yield from _linear(768, 3072)
        yield from _linear(3072, 768)
        yield from _norm_layer(768)
    yield from _linear(768, 768)


def gpt2() -> Iterator[Shape]:
    """GPT-2 small; the output matrix is the embedding's."""
    yield from ((50257, 768), (1024, 768))
    for _ in range(12):
        yield from _norm_layer(768)
        yield from _linear(768, 3 * 768)
        yield from _linear(768, 768)
        yield from _norm_layer(768)
        yield from _linear(768, 3072)
        yield from _linear(3072, 768)
    yield from _norm_layer(768)


def lora() -> Iterator[Shape]:
    """Rank-16 adapters of the query and value matrices of a 7B model: 32 layers of width 4096."""
    for _ in range(2 * 32):
        yield from ((16, 4096), (4096, 16))


def many_tiny() -> Iterator[Shape]:
    """Nothing but launches and Python."""
    yield from ((64,) for _ in range(5000))


def one_huge() -> Iterator[Shape]:
    """Nothing but bandwidth; the list of the per-pass table."""
    yield (2**26,)


@dataclass(frozen=True)
class Case:
    """A parameter list to time.

    Attributes:
        bases: names of the base optimizers it is timed with unless asked otherwise.
        compiled: which of them torch.compile is tried with; it takes about half a minute per half step.
        default: whether a run without --cases has it; together those take less than ten minutes.
    """

    name: str
    title: str
    generate: Any
    bases: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    default: bool = True

    def shapes(self, cap: int | None = None) -> list[Shape]:
        """The shapes; with `cap`, tensors of more elements become vectors of that many."""
        shapes = list(self.generate())
        return shapes if cap is None else [s if _numel(s) <= cap else (cap,) for s in shapes]


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


CASES = {
    case.name: case
    for case in (
        Case("resnet50", "ResNet-50", resnet50, ("sgd", "adamw"), ("sgd",)),
        Case("vit_b", "ViT-B/16", vit_b, ("adamw",), ("adamw",)),
        Case("bert_base", "BERT-base", bert_base, ("adamw",), default=False),
        Case("gpt2", "GPT-2 small", gpt2, ("adamw",)),
        Case("lora", "LoRA r=16 of a 7B", lora, ("adamw",)),
        Case("many_tiny", "5,000 tensors of 64", many_tiny, ("sgd", "adamw")),
        Case("one_huge", "one tensor of 64M", one_huge, default=False),
    )
}

# (tensors, elements) each list must have.
COUNTS = {
    "resnet50": (161, 25_557_032),
    "vit_b": (152, 86_567_656),
    "bert_base": (199, 109_482_240),
    "gpt2": (148, 124_439_808),
    "lora": (128, 8_388_608),
    "many_tiny": (5000, 320_000),
    "one_huge": (1, 67_108_864),
}


@dataclass(frozen=True)
class Base:
    """A base optimizer with the options used throughout."""

    name: str
    title: str
    kind: type[torch.optim.Optimizer]
    slots: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def build(
        self, params: list[Tensor], slots: dict[str, list[Tensor]] | None, **form: Any
    ) -> torch.optim.Optimizer:
        """The optimizer in the given form (foreach=, fused=), its state in `slots` if there are any."""
        optimizer = self.kind(params, **self.options, **form)
        self.adopt(optimizer, params, slots)
        return optimizer

    def adopt(
        self, optimizer: torch.optim.Optimizer, params: list[Tensor], slots: dict[str, list[Tensor]] | None
    ) -> None:
        """Make `slots`, all zero, the state of the optimizer, as if it had just created them."""
        if slots is None:
            return
        for t, param in enumerate(params):
            state = {name: slots[name][t] for name in self.slots}
            if "exp_avg" in state:
                state["step"] = torch.tensor(0.0)
            optimizer.state[param] = state


BASES = {
    base.name: base
    for base in (
        Base(
            "sgd",
            "SGD momentum",
            torch.optim.SGD,
            ("momentum_buffer",),
            {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4},
        ),
        Base(
            "adamw", "AdamW", torch.optim.AdamW, ("exp_avg", "exp_avg_sq"), {"lr": 1e-4, "weight_decay": 0.01}
        ),
    )
}


class Workspace:
    """The tensors of one case. All peers work on them in turn.

    A list is larger than the caches, so sharing changes no time; it lets a dozen peers of a 100M
    model fit in memory. Gradients are the ones a backward would have left: random, never zero, and
    different in the two halves of a step.
    """

    def __init__(self, shapes: list[Shape], dtype: torch.dtype, base: Base, seed: int = 0) -> None:
        self.dtype = dtype
        self.numel = sum(map(_numel, shapes))
        self._weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
        self.initial = self.random(WEIGHT_SIZE, seed)
        self.slots = {name: [torch.zeros_like(w) for w in self._weights] for name in base.slots}
        self.first = self.random(GRAD_SIZE, seed + 1)
        self.second = self.random(GRAD_SIZE, seed + 2)
        self.reset()

    def random(self, size: float, seed: int) -> list[Tensor]:
        """A list like the weights, normal with that standard deviation."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.empty(w.shape).normal_(0, size, generator=generator) for w in self._weights]
        return [x.to(self.dtype) for x in drawn]

    def reset(self) -> None:
        """Initial weights, zero state."""
        torch._foreach_copy_(self._weights, self.initial)
        for tensors in self.slots.values():
            torch._foreach_zero_(tensors)

    def parameters(self) -> list[Tensor]:
        """Parameter objects of one peer on the common storage, carrying the first gradients."""
        params = [torch.nn.Parameter(w) for w in self._weights]
        give_gradients(params, self.first)
        return params

    def weights64(self) -> list[Tensor]:
        """The initial weights in float64."""
        return [w.to(torch.float64, copy=True) for w in self.initial]


def give_gradients(params: list[Tensor], grads: list[Tensor]) -> None:
    """What a backward leaves."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
