"""Whole training steps of two small models: what the optimizer phase is worth beside two backwards."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import BASES, Base
from .peers import SPECS, Unavailable
from .records import Row, measured, single
from .timing import Contestant, Effort, interleave

PEERS = (
    "ours_native",
    "ours_foreach",
    "eager_default",
    "eager_fused",
    "po_loop",
    "po_fused",
    "po_foreach",
    "foreach_item",
    "compile_own",
)
PLAIN = "one_gradient"
PLAIN_LABEL = "no SAM: one gradient, fused base"


class Block(nn.Module):
    """Two 3x3 convolutions with batch norms and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def cnn() -> nn.Module:
    """A residual network for 32x32 pictures: 2.5M parameters, 32 tensors."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        Block(32, 64, 1),
        Block(64, 128, 2),
        Block(128, 256, 2),
        Block(256, 256, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 100),
    )


class LanguageModel(nn.Module):
    """A causal transformer: 4 layers of width 256, 8,192 tokens; 5.3M parameters."""

    def __init__(self, vocabulary: int = 8192, width: int = 256, length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layers(self.tokens(tokens) + self.positions, mask=self.mask, is_causal=True)
        return F.linear(x, self.tokens.weight).flatten(0, 1)


def _pictures(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))


def _sentences(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(8192, (batch, 64)), torch.randint(8192, (batch * 64,))


# name: (title, model, data, base, (small batch, large batch), items per example, unit of items)
MODELS = {
    "cnn": ("small CNN", cnn, _pictures, "sgd", (4, 32), 1, "images"),
    "lm": ("small transformer LM", LanguageModel, _sentences, "adamw", (1, 8), 64, "tokens"),
}


def _setting(section: str, name: str, batch: int) -> tuple[Base, nn.Module, Tensor, Tensor, Row]:
    """Base optimizer, model, a batch of inputs and targets, and what rows say of them."""
    torch.manual_seed(0)
    _, make, data, base_name, _, items, unit = MODELS[name]
    model = make()
    inputs, targets = data(batch)
    sizes = [p.numel() for p in model.parameters()]
    about = {"section": section, "case": name, "base": base_name, "dtype": "float32", "batch": batch}
    about |= {"items": batch * items, "unit_of_items": unit, "tensors": len(sizes), "numel": sum(sizes)}
    return BASES[base_name], model, inputs, targets, about


def measure(name: str, batch: int, effort: Effort, log: Callable[[str], None], tick: Callable) -> list[Row]:
    """Training steps of one model at one batch size, all peers interleaved, each with its own copy."""
    base, model, inputs, targets, about = _setting("train", name, batch)
    rows: list[Row] = []
    contestants: dict[str, Contestant] = {}
    for key in (*PEERS, PLAIN):
        own = copy.deepcopy(model)
        spec = SPECS["base_alone" if key == PLAIN else key]
        try:
            peer = spec.make(list(own.parameters()), base)
            contestant = _training_step(own, peer, inputs, targets, gradients=1 if key == PLAIN else 2)
            contestant()
        except Unavailable as reason:
            rows.append(single(key, "skipped", str(reason)))
            log(f"  skipped  {spec.label}: {reason}")
            continue
        except Exception as error:  # a broken peer must not cost the others their numbers
            rows.append(single(key, "wrong", f"raised {type(error).__name__}: {error}"))
            log(f"  WRONG    {spec.label}: {rows[-1]['value']}")
            continue
        contestants[key] = contestant
    for key, parts in interleave(contestants, effort, tick).items():
        totals = [sum(values) for values in zip(*parts.values(), strict=True)]
        rows.append(measured(key, "optimizer_ms", [1e3 * s for s in parts["optimizer"]]))
        rows.append(measured(key, "total_ms", [1e3 * s for s in totals]))
    return [{**about, **row} for row in rows]


def measure_recipes(
    name: str,
    batch: int,
    effort: Effort,
    log: Callable[[str], None],
    tick: Callable,
    chosen: tuple[str, ...] | None = None,
) -> list[Row]:
    """Training steps with every recipe and with the base alone, all interleaved, each with its own copy."""
    try:
        from sam_kernels import SAM, recipes
    except ImportError as error:
        return [single("sam", "skipped", f"sam_kernels does not import ({error})")]
    base, model, inputs, targets, about = _setting("whole", name, batch)
    rows: list[Row] = []
    contestants: dict[str, Contestant] = {}
    # K-SAM's step is SAM's, on fewer samples.
    for key in (PLAIN, *(chosen or (recipe for recipe in recipes.names() if recipe != "k_sam"))):
        own = copy.deepcopy(model)
        try:
            if key == PLAIN:
                opt = base.kind(own.parameters(), **base.options, fused=True)
            else:
                opt = SAM(
                    own.named_parameters(), base.kind, recipe=key, backend="native", model=own, **base.options
                )
            contestant = _whole_step(own, opt, inputs, targets, looks_ahead=key == "sampa")
            contestant()
        except RuntimeError as reason:
            rows.append(single(key, "skipped", str(reason)))
            log(f"  skipped  {key}: {reason}")
            continue
        contestants[key] = contestant
    for key, parts in interleave(contestants, effort, tick).items():
        rows.append(measured(key, "total_ms", [1e3 * s for s in parts["total"]]))
    return [{**about, **row} for row in rows]


def _whole_step(
    model: nn.Module, opt: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, looks_ahead: bool
) -> Contestant:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    def contestant() -> dict[str, float]:
        began = time.perf_counter()
        opt.step(closure, ahead=closure) if looks_ahead else opt.step(closure)  # type: ignore[call-arg]
        return {"total": time.perf_counter() - began}

    return contestant


def _training_step(model: nn.Module, peer, inputs: Tensor, targets: Tensor, gradients: int) -> Contestant:  # type: ignore[no-untyped-def]
    def gradient() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(inputs), targets).backward()

    def contestant() -> dict[str, float]:
        stamps = [time.perf_counter()]

        def stamp(run: Callable[[], object]) -> None:
            run()
            stamps.append(time.perf_counter())

        stamp(gradient)
        stamp(peer.step_phase1)
        stamp(gradient if gradients == 2 else lambda: None)
        stamp(peer.step_phase2)
        lasted = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
        return {"gradients": lasted[0] + lasted[2], "optimizer": lasted[1] + lasted[3]}

    return contestant
