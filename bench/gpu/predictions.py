"""What was predicted and what is wanted, and how either is read off a file of results.

Predictions were written before the first measurement (bench/NOTES.md has their reasons). They are for an
H200; on another card only the ratios and fractions mean something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..goals import OURS, Goal, Outcome, faster_than
from ..records import Results, Row
from .ceilings import COPY, READ, TRIAD
from .device import rate
from .kernels import PASSES
from .lists import LARGE
from .ours import NATIVE, TRITON, key, named

_RESNET, _XL = "phase/resnet50/sgd/float32", "phase/gpt2_xl/adamw/float32"
_COMPILED = ("phase/resnet50/sgd/float32/compiled", "phase/vit_l/adamw/float32/compiled")
_COMPILERS = ("compile_own", "compile_torch")
_EAGER = ("eager_default", "eager_foreach", "eager_fused")
_GRAPH_RATIO, _EAGER_RATIO = f"graph_to_{NATIVE}", f"eager_to_{NATIVE}"


@dataclass(frozen=True)
class Expectation(Goal):
    """A goal with the prediction that stood before; a target of 0 is no goal, only a prediction."""

    prediction: str = ""


def ceiling(results: Results, kind: str) -> float | None:
    """GB/s of the fastest loop of that kind, of any size and tool."""
    rows = [row for row in results.rows if row["peer"].split(":")[0] == kind and row["metric"] == "ms"]
    return max((found for row in rows if (found := rate(row)) is not None), default=None)


def fraction(row: Row | None, of: float | None) -> Outcome:
    """Bytes per second of a row over a ceiling in GB/s, with the spread of the row."""
    if row is None or not of:
        return Outcome(None)
    low, middle, high = (row["bytes"] / row[name] / 1e6 / of for name in ("p80", "p50", "p20"))
    return Outcome(middle, low, high, f"{of:,.0f} GB/s")


def kind_of(name: str) -> str:
    """The ceiling a pass, whoever runs it, is held against: one that only reads, against reading."""
    return READ if name.endswith("sq_norm") else COPY


def pass_fraction(results: Results, unit: str, name: str, metric: str = "graph_ms") -> Outcome:
    return fraction(results.find(unit, name, metric), ceiling(results, kind_of(name)))


Measure = Callable[[Results], Outcome]


def _worst_pass(backend: str, name: str, dtype: str) -> Measure:
    """The smallest fraction over the large lists: a goal is met by all or not at all."""

    def measure(results: Results) -> Outcome:
        units = [f"kernels/{case}/{dtype}" for case in LARGE]
        found = {unit: pass_fraction(results, unit, named(backend, name)) for unit in units}
        known = {unit: outcome for unit, outcome in found.items() if outcome.value is not None}
        if not known:
            return Outcome(None)
        unit = min(known, key=lambda unit: known[unit].value or 0.0)
        worst = known[unit]
        return Outcome(worst.value, worst.p20, worst.p80, f"{unit.split('/')[1]}, {worst.against}")

    return measure


def _rate(kind: str) -> Measure:
    return lambda results: Outcome(_tera(ceiling(results, kind)))


def _tera(giga: float | None) -> float | None:
    return None if giga is None else giga / 1e3


def _value(unit: str, peer: str, metric: str) -> Measure:
    def measure(results: Results) -> Outcome:
        row = results.find(unit, peer, metric)
        if row is None:
            return Outcome(None)
        return Outcome(row.get("value", row.get("p50")), row.get("p20", 0.0), row.get("p80", 0.0))

    return measure


def _roofline_in_graph(unit: str) -> Measure:
    return lambda results: fraction(results.find(unit, OURS, "graph_ms"), ceiling(results, COPY))


def _against_compiled(metric: str) -> Measure:
    """The worst of the lists torch.compile was tried with."""

    def measure(results: Results) -> Outcome:
        found = [faster_than(unit, *_COMPILERS, metric=metric)(results) for unit in _COMPILED]
        known = [outcome for outcome in found if outcome.value is not None]
        return min(known, key=lambda outcome: outcome.value or 0.0) if known else Outcome(None)

    return measure


_DTYPES = ("float32", "bfloat16")


def _passes() -> list[Expectation]:
    predicted = {"sq_norm": "0.97 of read", "perturb_": "0.98", "restore_": "1.0"}
    return [
        Expectation(
            f"{name}, {dtype}, lists of 300M and more: share of the {kind_of(name)} rate",
            0.92,
            _worst_pass(NATIVE, name, dtype),
            unit="",
            prediction=predicted.get(name, "0.98"),
        )
        for dtype in _DTYPES
        for name in PASSES
    ]


def _slowest_of_triton(dtype: str) -> Measure:
    """The largest of the passes' ratios to native over the large lists."""

    def measure(results: Results) -> Outcome:
        found = [
            (row["p50"], row["p20"], row["p80"], f"{name}, {case}")
            for case in LARGE
            for name in PASSES
            if (row := results.find(f"kernels/{case}/{dtype}", named(TRITON, name), _GRAPH_RATIO)) is not None
        ]
        return Outcome(*max(found)) if found else Outcome(None)

    return measure


def _shares_of_triton() -> list[Expectation]:
    return [
        Expectation(
            f"Triton: {name}, {dtype}, lists of 300M and more: share of the {kind_of(name)} rate",
            0.0,
            _worst_pass(TRITON, name, dtype),
            unit="",
            prediction="0.88",
        )
        for dtype in _DTYPES
        for name in PASSES
    ]


def _of_triton(text: str, unit: str, metric: str, prediction: str = "", counted: str = "x") -> Expectation:
    measure = _value(unit, key(TRITON), metric)
    return Expectation(f"Triton: {text}", 0.0, measure, counted, -1, prediction)


# No goals: Triton serves where nothing was compiled at installation, and the native engine is the fast one.
_TRITON = (
    *_shares_of_triton(),
    *(
        Expectation(
            f"Triton: the slowest pass over native's, {dtype}, lists of 300M and more",
            0.0,
            _slowest_of_triton(dtype),
            sign=-1,
            prediction="up to 1.1",
        )
        for dtype in _DTYPES
    ),
    _of_triton("1.5B list, AdamW, step over native's, in a graph", _XL, _GRAPH_RATIO, "up to 1.1"),
    _of_triton("1.5B list, AdamW, step over native's, eager", _XL, _EAGER_RATIO, "up to 1.1"),
    _of_triton("ResNet-50's list, SGD, step over native's, in a graph", _RESNET, _GRAPH_RATIO),
    _of_triton("ResNet-50's list, SGD, step over native's, eager", _RESNET, _EAGER_RATIO),
    _of_triton("ResNet-50's list: launches, gradients in place", _RESNET, "launches_in_place", "3", ""),
    _of_triton("ResNet-50's list: launches, gradients elsewhere", _RESNET, "launches", "3", ""),
    _of_triton(
        "ResNet-50's list: host time, gradients in place", _RESNET, "host_us_in_place", "45 to 150", " us"
    ),
)


def _model(name: str, batch: int, prediction: str) -> Expectation:
    unit = f"train/{name}/{batch}"
    return Expectation(
        f"whole step of {name}, batch {batch}, against eager SAM",
        0.0,
        faster_than(unit, "eager_default"),
        prediction=prediction,
    )


EXPECTATIONS = (
    Expectation("device copy", 0.0, _rate(COPY), " TB/s", prediction="4.3"),
    Expectation("device read", 0.0, _rate(READ), " TB/s", prediction="4.55"),
    Expectation("device triad", 0.0, _rate(TRIAD), " TB/s", prediction="4.39"),
    Expectation(
        "empty kernel in a graph", 0.0, _value("ceilings/launch", "launch", "graph_us"), " us", -1, "1 to 2"
    ),
    Expectation(
        "empty kernel, eager", 0.0, _value("ceilings/launch", "launch", "eager_us"), " us", -1, "2 to 5"
    ),
    *_passes(),
    Expectation(
        "ResNet-50's list, SGD, in a graph: share of its roofline",
        0.85,
        _roofline_in_graph(_RESNET),
        "",
        prediction="0.92 to 0.96",
    ),
    Expectation("ResNet-50's list, SGD: launches a step", 3, _value(_RESNET, OURS, "launches"), "", -1, "3"),
    Expectation(
        "ResNet-50's list, SGD: host time a step",
        30,
        _value(_RESNET, OURS, "host_us"),
        " us",
        -1,
        "25 to 60",
    ),
    Expectation(
        "ResNet-50's list, SGD, against eager SAM",
        10,
        faster_than(_RESNET, "eager_default", metric="eager_ms"),
        prediction="15 to 25",
    ),
    Expectation(
        "ResNet-50's list, SGD, against eager SAM at its best",
        0.0,
        faster_than(_RESNET, *_EAGER, metric="eager_ms"),
        prediction="15 to 20",
    ),
    Expectation(
        "1.5B list, AdamW, against eager SAM",
        2,
        faster_than(_XL, "eager_default", metric="eager_ms"),
        prediction="2.7",
    ),
    Expectation(
        "1.5B list, AdamW, against eager SAM with a fused base",
        0.0,
        faster_than(_XL, "eager_fused", metric="eager_ms"),
        prediction="1.6",
    ),
    Expectation(
        "against torch.compile, eager, the worst list",
        1,
        _against_compiled("eager_ms"),
        prediction="1.0 (ViT-L) to 3 (ResNet-50)",
    ),
    Expectation(
        "against torch.compile, in a graph, the worst list",
        1,
        _against_compiled("graph_ms"),
        prediction="1.0 to 1.3",
    ),
    _model("resnet50", 64, "1.10 to 1.2"),
    _model("resnet50", 256, "1.03 to 1.05"),
    _model("vit_l", 16, "1.05 to 1.1"),
    _model("vit_l", 64, "1.02"),
    _model("gpt2", 4, "1.05 to 1.1"),
    _model("gpt2", 16, "1.02"),
    *_TRITON,
)
