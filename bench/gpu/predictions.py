"""What was predicted and what is wanted, and how either is read off a file of results.

Predictions were written before the first measurement (bench/NOTES.md has their reasons). They are for an
H200; on another card only the ratios and fractions mean something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..goals import OURS, Goal, Outcome, faster_than
from ..records import Results, Row
from .ceilings import COPY, READ, TRIAD, ceiling
from .jax_peers import OPAQUE, TRANSPARENT
from .lists import LARGE
from .ours import NATIVE, TRITON, key, named
from .selection import SPARSITIES, TOPK, bytes_per_weight, peer
from .sets import LAYOUTS, PASSES

_RESNET, _XL = "phase/resnet50/sgd/float32", "phase/gpt2_xl/adamw/float32"
_COMPILED = ("phase/resnet50/sgd/float32/compiled", "phase/vit_l/adamw/float32/compiled")
_COMPILERS = ("compile_own", "compile_torch")
_EAGER = ("eager_default", "eager_foreach", "eager_fused")
_OPTAX = ("phase/resnet50/sgd/float32/optax", "phase/vit_l/adamw/float32/optax")
_GRAPH_RATIO, _EAGER_RATIO = f"graph_to_{NATIVE}", f"eager_to_{NATIVE}"


@dataclass(frozen=True)
class Expectation(Goal):
    """A goal with the prediction that stood before; a target of 0 is no goal, only a prediction."""

    prediction: str = ""


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


_TYPES = tuple(layout.name for layout in LAYOUTS)
_AS_CUDA = 1.1  # Triton's time over native's, at most


def _passes() -> list[Expectation]:
    predicted = {"sq_norm": "0.97 of read", "perturb_": "0.98", "restore_": "1.0"}
    return [
        Expectation(
            f"{name}, {dtype}, lists of 300M and more: share of the {kind_of(name)} rate",
            0.95 if kind_of(name) == READ else 0.97,
            _worst_pass(NATIVE, name, dtype),
            unit="",
            prediction=predicted.get(name, "0.98"),
        )
        for dtype in _TYPES
        for name in PASSES
    ]


def _masked(name: str, label: str, prediction: str) -> Expectation:
    """A pass under a mask beside the same one under none."""

    def measure(results: Results) -> Outcome:
        found = {
            case: results.ratio(
                f"kernels/{case}/masked",
                f"{named(NATIVE, name)}, {label}",
                f"{named(NATIVE, name)}, dense",
                "graph_ms",
            )
            for case in LARGE
        }
        known = [(x["p50"], x["p20"], x["p80"], case) for case, x in found.items() if x is not None]
        return Outcome(*max(known)) if known else Outcome(None)

    text = f"{name} under {label} over the dense one, lists of 300M and more"
    return Expectation(text, 0.0, measure, sign=-1, prediction=prediction)


def _selection(backend: str) -> Measure:
    """Bytes that copies would have moved in the time of a weight, in the worst of lists and sparsities."""

    def measure(results: Results) -> Outcome:
        giga = ceiling(results, COPY)
        found = []
        for case in LARGE:
            for sparsity in SPARSITIES:
                row = results.find(f"kernels/{case}/selection", peer(backend, sparsity), "eager_ms")
                if row is not None and giga is not None:
                    each = (bytes_per_weight(row[q], giga, row["numel"]) for q in ("p50", "p20", "p80"))
                    found.append((*each, f"{case}, {sparsity}"))
        return Outcome(*max(found)) if found else Outcome(None)

    return measure


def _against_topk(results: Results) -> Outcome:
    """The worst of the lists topk can take."""
    found = [
        (ratio["p50"], ratio["p20"], ratio["p80"], f"{case}, {sparsity}")
        for case in LARGE
        for sparsity in SPARSITIES
        if (
            ratio := results.ratio(
                f"kernels/{case}/selection", peer(TOPK, sparsity), peer(NATIVE, sparsity), "eager_ms"
            )
        )
    ]
    return Outcome(*min(found)) if found else Outcome(None)


_SPARSE = (
    _masked("perturb_", "single 0.5", "1.01"),
    _masked("perturb_", "single 0.9", "1.01"),
    _masked("perturb_", "channels 0.9", "0.11 to 0.25"),
    *(_masked(f"descend_ {rule}", f"single {s}", "1.01") for rule in ("sgd", "adamw") for s in (0.5, 0.9)),
    *(_masked(f"descend_ {rule}", "channels 0.9", "1.01") for rule in ("sgd", "adamw")),
    Expectation(
        "masks of SSAM-F anew, lists of 300M and more: bytes per parameter at the copy rate",
        5,
        _selection(NATIVE),
        " B",
        -1,
        "7.8 to 8.5",
    ),
    Expectation(
        "Triton: masks of SSAM-F anew, bytes per parameter", 0.0, _selection(TRITON), " B", -1, "9 to 12"
    ),
    Expectation("masks of SSAM-F anew against topk over all scores", 0.0, _against_topk, prediction="10"),
)


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
        for dtype in _TYPES
        for name in PASSES
    ]


def _of_triton(
    text: str, unit: str, metric: str, prediction: str = "", counted: str = "x", goal: float = 0.0
) -> Expectation:
    measure = _value(unit, key(TRITON), metric)
    return Expectation(f"Triton: {text}", goal, measure, counted, -1, prediction)


# Within a tenth of the CUDA engine is about the device, so about graphs: eager, three launches from Python
# may take longer than a small list, which is predicted and shown, and no goal.
_TRITON = (
    *_shares_of_triton(),
    *(
        Expectation(
            f"Triton: the slowest pass over native's, {dtype}, lists of 300M and more",
            _AS_CUDA,
            _slowest_of_triton(dtype),
            sign=-1,
            prediction="up to 1.1",
        )
        for dtype in _TYPES
    ),
    _of_triton(
        "1.5B list, AdamW, step over native's, in a graph", _XL, _GRAPH_RATIO, "up to 1.1", goal=_AS_CUDA
    ),
    _of_triton("1.5B list, AdamW, step over native's, eager", _XL, _EAGER_RATIO, "up to 1.1"),
    _of_triton("ResNet-50's list, SGD, step over native's, in a graph", _RESNET, _GRAPH_RATIO, goal=_AS_CUDA),
    _of_triton("ResNet-50's list, SGD, step over native's, eager", _RESNET, _EAGER_RATIO),
    _of_triton("ResNet-50's list: launches, gradients in place", _RESNET, "launches_in_place", "3", ""),
    _of_triton("ResNet-50's list: launches, gradients elsewhere", _RESNET, "launches", "3", ""),
    _of_triton(
        "ResNet-50's list: host time, gradients in place", _RESNET, "host_us_in_place", "45 to 150", " us"
    ),
)


def _against_optax(unit: str, theirs: str, metric: str, prediction: str) -> Expectation:
    """In the rounds of the unit, with one clock: the host's, over several steps and a wait."""

    def measure(results: Results) -> Outcome:
        ratio = results.ratio(unit, theirs, OURS, metric)
        return Outcome(None) if ratio is None else Outcome(ratio["p50"], ratio["p20"], ratio["p80"])

    where = "ResNet-50's list, SGD" if "resnet50" in unit else "ViT-L's list, AdamW"
    how = "steps inside one program" if "graph" in metric else "step by step"
    mode = "opaque" if theirs == OPAQUE else "transparent"
    return Expectation(f"{where}, against optax, {mode}, {how}", 0.0, measure, prediction=prediction)


_RESNET_OPTAX, _VIT_OPTAX = _OPTAX
_JAX = (
    _against_optax(_RESNET_OPTAX, OPAQUE, "wall_ms", "3 to 8"),
    _against_optax(_RESNET_OPTAX, OPAQUE, "wall_graph_ms", "1.5 to 4"),
    _against_optax(_RESNET_OPTAX, TRANSPARENT, "wall_ms", "5 to 15"),
    _against_optax(_RESNET_OPTAX, TRANSPARENT, "wall_graph_ms", "2.5 to 6"),
    _against_optax(_VIT_OPTAX, OPAQUE, "wall_ms", "0.95 to 1.2"),
    _against_optax(_VIT_OPTAX, OPAQUE, "wall_graph_ms", "0.95 to 1.2"),
    _against_optax(_VIT_OPTAX, TRANSPARENT, "wall_ms", "1.7 to 2.5"),
    _against_optax(_VIT_OPTAX, TRANSPARENT, "wall_graph_ms", "1.7 to 2.5"),
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
    *_SPARSE,
    Expectation(
        "ResNet-50's list, SGD, in a graph: share of its roofline",
        0.92,
        _roofline_in_graph(_RESNET),
        "",
        prediction="0.92 to 0.96",
    ),
    Expectation("ResNet-50's list, SGD: launches a step", 3, _value(_RESNET, OURS, "launches"), "", -1, "3"),
    Expectation(
        "ResNet-50's list, SGD: host time a step",
        20,
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
    *_JAX,
    _model("resnet50", 64, "1.10 to 1.2"),
    _model("resnet50", 256, "1.03 to 1.05"),
    _model("vit_l", 16, "1.05 to 1.1"),
    _model("vit_l", 64, "1.02"),
    _model("gpt2", 4, "1.05 to 1.1"),
    _model("gpt2", 16, "1.02"),
    *_TRITON,
)
