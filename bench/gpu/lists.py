"""Parameter lists too large for the CPU benchmark, and its workspace and base optimizers on a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cases import BASES, Base, Case, Shape, Workspace, resnet50


def _norm_layer(width: int) -> Iterator[Shape]:
    yield from ((width,), (width,))


def _linear(inputs: int, outputs: int) -> Iterator[Shape]:
    yield from ((outputs, inputs), (outputs,))


def _block(width: int) -> Iterator[Shape]:
    """A transformer block with the attention input projections in one matrix."""
    yield from _norm_layer(width)
    yield from _linear(width, 3 * width)
    yield from _linear(width, width)
    yield from _norm_layer(width)
    yield from _linear(width, 4 * width)
    yield from _linear(4 * width, width)


def vit_l() -> Iterator[Shape]:
    """ViT-L/16 at 224 pixels for 1000 classes."""
    yield from ((1, 1, 1024), (1024, 3, 16, 16), (1024,), (1, 197, 1024))
    for _ in range(24):
        yield from _block(1024)
    yield from _norm_layer(1024)
    yield from _linear(1024, 1000)


def gpt2_xl() -> Iterator[Shape]:
    """GPT-2 XL; the output matrix is the embedding's."""
    yield from ((50257, 1600), (1024, 1600))
    for _ in range(48):
        yield from _block(1600)
    yield from _norm_layer(1600)


def llama_7b() -> Iterator[Shape]:
    """A decoder of 7B parameters: gated feed-forward, no biases, an output matrix of its own."""
    yield (32000, 4096)
    for _ in range(32):
        yield from ((4096, 4096),) * 4
        yield from ((11008, 4096), (11008, 4096), (4096, 11008))
        yield from ((4096,), (4096,))
    yield from ((4096,), (32000, 4096))


CASES = {
    case.name: case
    for case in (
        Case("resnet50", "ResNet-50", resnet50),
        Case("vit_l", "ViT-L/16", vit_l),
        Case("gpt2_xl", "GPT-2 XL", gpt2_xl),
        Case("llama_7b", "7B decoder", llama_7b),
    )
}

# (tensors, elements) each list must have.
COUNTS = {
    "resnet50": (161, 25_557_032),
    "vit_l": (296, 304_326_632),
    "gpt2_xl": (580, 1_557_611_200),
    "llama_7b": (291, 6_738_415_616),
}

# Lists on which launches and tails no longer matter: the goals for single passes are about these.
LARGE = ("vit_l", "gpt2_xl", "llama_7b")


def numel(shapes: list[Shape]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


class DeviceWorkspace(Workspace):
    """The workspace of the CPU benchmark, its tensors made on a device."""

    def __init__(
        self, shapes: list[Shape], dtype: torch.dtype, base: Base, device: torch.device, seed: int = 0
    ) -> None:
        self.device = device
        with device:
            super().__init__(shapes, dtype, base, seed)

    def _random(self, size: float, seed: int) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.empty(w.shape, dtype=self.dtype, device=self.device).normal_(0, size, generator=generator)
            for w in self._weights
        ]


@dataclass(frozen=True)
class DeviceBase(Base):
    """A base optimizer whose step counters can live on the device, as the fused and capturable forms want."""

    counts_on_device: bool = False

    def adopt(
        self, optimizer: torch.optim.Optimizer, params: list[Tensor], slots: dict[str, list[Tensor]] | None
    ) -> None:
        super().adopt(optimizer, params, slots)
        if slots is None or not self.counts_on_device:
            return
        for param in params:
            if "step" in optimizer.state[param]:
                optimizer.state[param]["step"] = torch.zeros((), dtype=torch.float32, device=param.device)


def base_for(name: str, *, counts_on_device: bool, capturable: bool = False) -> DeviceBase:
    """A base optimizer of the CPU benchmark, with the same options."""
    base = BASES[name]
    found = DeviceBase(base.name, base.title, base.kind, base.slots, base.options, counts_on_device)
    if capturable and name == "adamw":
        return replace(found, options={**base.options, "capturable": True}, counts_on_device=True)
    return found
