"""The goals of the package as numbers, and whether a file of results meets them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import sparse
from .cases import BASES
from .passes import BYTES, RIVALS, STREAM_BYTES
from .peers import label
from .records import Results, divided

OURS = "ours_native"
_RESNET, _VIT, _TINY = "step/resnet50/sgd/float32", "step/vit_b/adamw/float32", "step/many_tiny/sgd/float32"
_PASSES = "passes/one_huge/float32"


@dataclass(frozen=True)
class Outcome:
    """A measured value with its spread and what it is against; value None = not measured."""

    value: float | None
    p20: float = 0.0
    p80: float = 0.0
    against: str = ""


@dataclass(frozen=True)
class Goal:
    """`sign` is +1 where more is better, -1 where less is."""

    text: str
    target: float
    measure: Callable[[Results], Outcome]
    unit: str = "x"
    sign: int = 1

    def is_met(self, outcome: Outcome) -> bool | None:
        if outcome.value is None:
            return None
        return self.sign * outcome.value >= self.sign * self.target


def faster_than(unit: str, *rivals: str, metric: str = "total_ms") -> Callable[[Results], Outcome]:
    """How many times faster we are than the fastest of the rivals, round by round."""

    def measure(results: Results) -> Outcome:
        found = {key: results.ratio(unit, key, OURS, metric) for key in rivals}
        present = {key: ratio for key, ratio in found.items() if ratio is not None}
        if not present:
            return Outcome(None)
        key = min(present, key=lambda k: present[k]["p50"])
        ratio = present[key]
        return Outcome(ratio["p50"], ratio["p20"], ratio["p80"], label(key))

    return measure


def best_stream(results: Results, unit: str, name: str) -> str | None:
    """The fastest plain loop a pass is held against."""
    tools = [peer for peer in results.peers(unit) if peer.split(":")[0] in RIVALS[name]]
    seconds_per_byte = {
        tool: results.value(unit, tool, "total_ms") / STREAM_BYTES[tool.split(":")[0]] for tool in tools
    }
    return min(seconds_per_byte, key=seconds_per_byte.__getitem__, default=None)


def fraction_of_roofline(results: Results, unit: str, backend: str, name: str) -> Outcome:
    """Bytes per second of a pass over that of the fastest plain loop, round by round."""
    tool = best_stream(results, unit, name)
    pass_row = results.find(unit, f"{backend} {name}", "total_ms")
    if tool is None or pass_row is None:
        return Outcome(None)
    stream_row = results.find(unit, tool, "total_ms")
    weight = BYTES[name] / STREAM_BYTES[tool.split(":")[0]]
    spread = divided(stream_row, pass_row, weight)
    return Outcome(spread["p50"], spread["p20"], spread["p80"], tool)


def _pass_goal(name: str) -> Goal:
    return Goal(
        f"native {name}, 64M elements: share of the roofline",
        0.85,
        lambda results: fraction_of_roofline(results, _PASSES, "native", name),
        unit="",
    )


def _extra_memory(unit: str) -> Callable[[Results], Outcome]:
    def measure(results: Results) -> Outcome:
        row = results.find(unit, OURS, "extra_bytes")
        return (
            Outcome(None)
            if row is None
            else Outcome(row["value"] / row["numel"], against="counted allocations")
        )

    return measure


def _worst(outcomes: list[Outcome], sign: int) -> Outcome:
    """The one farthest from the goal; nothing was measured unless everything was."""
    if not outcomes or any(outcome.value is None for outcome in outcomes):
        return Outcome(None)
    return min(outcomes, key=lambda outcome: sign * outcome.value)  # type: ignore[operator]


def _faster_update(unit: str) -> Callable[[Results], Outcome]:
    """How many times faster we select masks than published, at the sparsity where it is least."""

    def measure(results: Results) -> Outcome:
        found = []
        for sparsity in sparse.SPARSITIES:
            rival = f"{sparse.PUBLISHED} {sparsity}"
            ratio = results.ratio(unit, rival, f"{OURS} {sparsity}", "total_ms")
            found.append(
                Outcome(None)
                if ratio is None
                else Outcome(ratio["p50"], ratio["p20"], ratio["p80"], sparse.label(rival))
            )
        return _worst(found, 1)

    return measure


def _less_scratch(unit: str) -> Callable[[Results], Outcome]:
    """Scratch memory of the published update over ours, where least, by the count that is worse for us."""

    def measure(results: Results) -> Outcome:
        found = []
        for metric, name in (("extra_bytes", "counted"), ("resident_bytes", "resident")):
            for sparsity in sparse.SPARSITIES:
                ours, theirs = (
                    results.value(unit, f"{key} {sparsity}", metric) for key in (OURS, sparse.PUBLISHED)
                )
                if metric == "resident_bytes" and (ours is None or theirs is None):
                    continue  # not every system tells
                ratio = None if ours is None or theirs is None else theirs / max(ours, 1)
                found.append(Outcome(ratio, against=f"as published, {sparsity}, {name}"))
        return _worst(found, 1)

    return measure


def _against_dense(unit: str, masks: list[tuple[str, float]]) -> Callable[[Results], Outcome]:
    """Time of our step with a mask over that of our dense step, with the slowest of the masks."""

    def measure(results: Results) -> Outcome:
        found = []
        for pattern, sparsity in masks:
            ratio = results.ratio(unit, f"{OURS} {pattern} {sparsity}", sparse.DENSE, "total_ms")
            found.append(
                Outcome(None)
                if ratio is None
                else Outcome(ratio["p50"], ratio["p20"], ratio["p80"], f"dense; {pattern} {sparsity}")
            )
        return _worst(found, -1)

    return measure


def _mask_memory(results: Results) -> Outcome:
    unit = "sparse/update/ssam_f"
    ours, floats = (results.value(unit, f"{key} 0.9", "mask_bytes") for key in (OURS, sparse.PUBLISHED))
    if ours is None or floats is None:
        return Outcome(None)
    return Outcome(floats / ours, against="masks of float32")


# Buffers start on cache lines, which costs up to 60 bytes a tensor; masks end with whole words of 64 bits.
_PADDING = 0.01

GOALS = (
    Goal(
        "SAM + SGD momentum, ResNet-50, against eager SAM, fused base",
        2.0,
        faster_than(_RESNET, "eager_fused"),
    ),
    Goal(
        "SAM + SGD momentum, ResNet-50, against eager SAM, default base",
        3.0,
        faster_than(_RESNET, "eager_default"),
    ),
    Goal("SAM + AdamW, ViT-B/16, against eager SAM, fused base", 2.0, faster_than(_VIT, "eager_fused")),
    Goal("SAM + AdamW, ViT-B/16, against eager SAM, default base", 4.0, faster_than(_VIT, "eager_default")),
    Goal(
        "SAM + SGD momentum, ResNet-50, against pytorch-optimizer at its best",
        1.8,
        faster_than(_RESNET, "po_loop", "po_fused", "po_foreach"),
    ),
    Goal(
        "SAM + AdamW, ViT-B/16, against pytorch-optimizer at its best",
        1.8,
        faster_than(_VIT, "po_loop", "po_fused", "po_foreach"),
    ),
    Goal(
        "SAM + SGD momentum, ResNet-50, against torch.compile at its best",
        1.2,
        faster_than(_RESNET, "compile_own", "compile_torch"),
    ),
    Goal(
        "SAM + AdamW, ViT-B/16, against torch.compile at its best",
        1.2,
        faster_than(_VIT, "compile_own", "compile_torch"),
    ),
    Goal(
        "5,000 tensors of 64, SGD momentum, against eager SAM at its best",
        15.0,
        faster_than(_TINY, "eager_default", "eager_foreach", "eager_fused"),
    ),
    *map(_pass_goal, BYTES),
    Goal(
        "extra memory at the peak, ResNet-50, bytes per parameter",
        4.0 + _PADDING,
        _extra_memory(_RESNET),
        "B",
        -1,
    ),
    Goal(
        "extra memory at the peak, ViT-B/16, bytes per parameter",
        4.0 + _PADDING,
        _extra_memory(_VIT),
        "B",
        -1,
    ),
    *(
        goal
        for kind in sparse.UPDATES
        for goal in (
            Goal(
                f"masks of {kind} anew, ResNet-50, against the published way, all sparsities",
                10.0,
                _faster_update(f"sparse/update/{kind}"),
            ),
            Goal(
                f"masks of {kind} anew: scratch memory of the published way over ours, all sparsities",
                20.0,
                _less_scratch(f"sparse/update/{kind}"),
            ),
        )
    ),
    *(
        goal
        for base in BASES.values()
        for goal in (
            Goal(
                f"step with any mask, ResNet-50, {base.title}: time over that of the dense step",
                1.03,
                _against_dense(f"sparse/step/{base.name}", sparse.step_masks()),
                "x",
                -1,
            ),
            Goal(
                f"step with masks of channels, {base.title}: time over that of the dense step",
                1.0,
                _against_dense(f"sparse/step/{base.name}", [("structured", s) for s in sparse.STRUCTURED]),
                "x",
                -1,
            ),
        )
    ),
    Goal("memory of masks, ResNet-50, of float32 over ours", 32 / (1 + _PADDING), _mask_memory),
)
