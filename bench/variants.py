"""Every variant of SAM on ResNet-50's list: ours beside the base alone and beside the way it is published.

Gradients are there: an evaluation puts the next ones in place, and the clock stands still meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import published_variants as published
from .cases import BASES, CASES, GRAD_SIZE, Base, Workspace
from .peers import Unavailable
from .records import Row, measured, single
from .timing import Contestant, Effort, interleave

CASE, BASE = "resnet50", "sgd"
OURS, PUBLISHED, ALONE = "ours_native", "published", "base_alone"
LABELS = {OURS: "ours, native", PUBLISHED: "as published", ALONE: "base alone, fused"}

STEPS = 3

# How far ours and the published way may be apart in the gate's steps: the distance of a tensor from its twin,
# relative to the way the tensor has come, and a thousand roundings more for tensors that hardly move. Weights
# of 0.02 come 1e-5 in a step; torch's norm on CPUs errs by up to 2e-3.
TOLERANCE, ROUNDINGS = 5e-3, 1e-4

Log = Callable[[str], None]
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Variant:
    """A recipe with its options, and the published way to take the same step.

    Attributes:
        options: of `recipes.<name>`.
        published: the class in `published_variants`; None where a row above has the same step.
        theirs: its options where they are not those of ours; see `published_options`.
        evaluations: gradients a step asks for at most.
        period: steps until everything that happens has happened; times are means over one.
        draws: what the published step is told of ours, which draws random numbers of its own: "tensors",
            which take part, or "noise".
        named: whether the published step goes by names, as ours does.
    """

    name: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    published: type[published.Published] | None = None
    theirs: dict[str, Any] | None = None
    evaluations: int = 2
    period: int = 1
    draws: str | None = None
    named: bool = False

    @property
    def published_options(self) -> dict[str, Any]:
        """The options of the published step."""
        return self.options if self.theirs is None else self.theirs


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("sam", "SAM", {"rho": 0.05}, published.Sam),
        Variant(
            "asam",
            "ASAM",
            {"rho": 0.5, "eta": 0.01},
            published.Asam,
            named=True,
        ),
        Variant(
            "layerwise_sam",
            "layer-wise SAM",
            {"rho": 0.05, "eta": 0.01},
            published.Layerwise,
            named=True,
        ),
        Variant(
            "fisher_sam",
            "FisherSAM",
            {"rho": 0.1, "eta": 1.0},
            published.FisherSam,
        ),
        Variant(
            "looksam",
            "LookSAM, k = 5",
            {"rho": 0.1, "alpha": 0.7, "k": 5},
            published.LookSam,
            period=5,
        ),
        Variant(
            "esam",
            "ESAM, half of the tensors",
            {"rho": 0.05, "beta": 0.5, "by": "tensor", "norm": "masked"},
            published.Esam,
            {"rho": 0.05, "beta": 0.5},
            draws="tensors",
        ),
        Variant(
            "friendly_sam",
            "F-SAM",
            {"rho": 0.05, "sigma": 1.0, "lmbda": 0.9},
            published.FriendlySam,
        ),
        Variant("vasso", "VaSSO", {"rho": 0.05, "theta": 0.9}, published.Vasso),
        Variant(
            "cr_sam",
            "CR-SAM",
            {"rho": 0.1, "gamma": 0.1, "beta": 0.1},
            published.CrSam,
            evaluations=3,
        ),
        Variant("gsam", "GSAM", {"rho": 0.05, "alpha": 0.4}, published.Gsam),
        Variant("wsam", "WSAM", {"rho": 0.05, "gamma": 0.9}, published.Wsam),
        Variant(
            "gnp",
            "GNP",
            {"rho": 0.1, "alpha": 0.8, "normalize": True},
            published.Gnp,
        ),
        Variant(
            "multistep_sam",
            "3 ascents",
            {"rho": 0.05, "n": 3},
            published.MultiStep,
            evaluations=4,
        ),
        Variant(
            "lookbehind_sam",
            "Lookbehind, k = 2",
            {"rho": 0.05, "k": 2, "alpha": 0.5},
            published.Lookbehind,
            evaluations=3,
        ),
        Variant(
            "samar",
            "SAMAR",
            {"rho": 0.05},
            published.Samar,
            {"rho": 0.05, "lambda_0": 0.5, "chi": 1.0, "up": 1.1, "down": 0.9},
        ),
        Variant(
            "sampa",
            "SAMPa, one device",
            {"rho": 0.1, "lmbda": 0.2},
            published.Sampa,
            {"rho": 0.1, "lmbda": 0.2, "momentum": True},
            evaluations=3,
        ),
        Variant("msam", "Momentum-SAM", {"rho": 0.3}, published.MomentumSam, evaluations=1),
        Variant(
            "rand_sam",
            "Rand-SAM",
            {"rho": 0.05},
            published.RandSam,
            evaluations=1,
            draws="noise",
        ),
        Variant("nosam", "normalization layers only", {"rho": 0.05}),
        Variant("r_sam", "R-SAM", {"rho": 0.05, "noise": 0.1}),
    )
}


class Gradients:
    """Gradients that are there already, put in place evaluation by evaluation; `away` is the time that took.

    They go through a ring of buffers, since published code works in place, and both may keep those of
    earlier evaluations of a step.
    """

    def __init__(self, workspace: Workspace, evaluations: int) -> None:
        # Larger than the others, so that rules which go by the norm of a gradient have something to go by.
        larger = workspace.random(1.5 * GRAD_SIZE, seed=3)
        self.lists = [workspace.first, workspace.second, larger]
        self.ring = [[torch.empty_like(g) for g in workspace.first] for _ in range(evaluations + 2)]
        self.loss = torch.zeros(())
        self.watch: Callable[[list[Tensor]], None] = lambda params: None

    def bind(self, params: list[Tensor]) -> Callable[..., Tensor]:
        """A closure for one contestant; it begins with the first gradients."""
        self.count = 0

        def evaluate(**_: Any) -> Tensor:
            began = time.perf_counter()
            with torch.no_grad():
                self.watch(params)
                grads = self.ring[self.count % len(self.ring)]
                torch._foreach_copy_(grads, self.lists[self.count % len(self.lists)])
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
            self.count += 1
            self.away += time.perf_counter() - began
            return self.loss

        self.away = 0.0
        return evaluate


class Ours:
    """The recipe in sam_kernels."""

    def __init__(
        self, variant: Variant, workspace: Workspace, base: Base, gradients: Gradients, backend: str
    ) -> None:
        try:
            from sam_kernels import SAM, recipes
        except ImportError as error:
            raise Unavailable(f"sam_kernels does not import ({error})") from error
        if variant.name not in recipes.names():
            raise Unavailable(f"recipe '{variant.name}' is not in this version of sam_kernels")
        self.params = workspace.parameters()
        names = [name for name, _ in names_of([p.shape for p in self.params])]
        try:
            recipe = recipes.get(variant.name, **variant.options)
            self.optimizer = SAM(
                list(zip(names, self.params, strict=True)),
                base.kind,
                recipe=recipe,
                backend=backend,
                **base.options,
            )
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
        base.adopt(self.optimizer.base_optimizer, self.params, workspace.slots)
        self.closure = gradients.bind(self.params)
        self.more = {"ahead": self.closure} if variant.name == "sampa" else {}

    def step(self) -> None:
        self.optimizer.step(self.closure, **self.more)

    def weights(self) -> list[Tensor]:
        """The user's weights between two steps."""
        return [p.detach() for p in self.params]


class Theirs:
    """The recipe as it is published."""

    def __init__(
        self,
        variant: Variant,
        workspace: Workspace,
        base: Base,
        gradients: Gradients,
        draws: list[Any] | None = None,
    ) -> None:
        self.params = workspace.parameters()
        options = dict(variant.published_options)
        if variant.named:
            options["weights"] = [is_weight for _, is_weight in names_of([p.shape for p in self.params])]
        if draws is not None:
            options["draws"] = draws
        self.peer = variant.published(self.params, base, workspace.slots, **options)
        self.closure = gradients.bind(self.params)

    def step(self) -> None:
        self.peer.step(self.closure)

    def weights(self) -> list[Tensor]:
        """The weights, also where they are stored perturbed."""
        unperturbed = getattr(self.peer, "unperturbed", None)
        return [p.detach() for p in self.params] if unperturbed is None else unperturbed()


class Alone:
    """The base optimizer with its fused update and one gradient."""

    def __init__(self, workspace: Workspace, base: Base, gradients: Gradients) -> None:
        self.params = workspace.parameters()
        self.base = base.build(self.params, workspace.slots, fused=True)
        self.closure = gradients.bind(self.params)

    def step(self) -> None:
        self.base.zero_grad()
        self.closure()
        self.base.step()


def names_of(shapes: list[torch.Size]) -> list[tuple[str, bool]]:
    """A name for each tensor, and whether it is a weight, as in networks of convolutions and batch norms.

    A vector is a bias after the weight of its batch norm, or after a matrix.
    """
    found: list[tuple[str, bool]] = []
    for t, shape in enumerate(shapes):
        before = len(shapes[t - 1]) if t else 0
        is_bias = len(shape) == 1 and (before == 2 or (before == 1 and found[-1][1]))
        layer = "norm" if len(shape) == 1 and before != 2 else "layer"
        found.append((f"{layer}{t}.{'bias' if is_bias else 'weight'}", not is_bias))
    return found


@dataclass
class Course:
    """Where the gate's steps led: the weights at each evaluation and at the end, and what was drawn."""

    stops: list[list[Tensor]]
    draws: list[Any]


def run(peer: Ours | Theirs, gradients: Gradients, draws: str | None = None) -> Course:
    """Take the gate's steps and watch."""
    stops: list[list[Tensor]] = []
    seen: list[Any] = []
    gradients.watch = lambda params: stops.append(copies(params))
    try:
        for _ in range(STEPS):
            start = copies(peer.weights()) if draws else []
            peer.step()
            if draws:
                moves = [there - here for here, there in zip(start, stops[-1], strict=True)]
                seen.append(moves if draws == "noise" else [bool(e.any()) for e in moves])
    finally:
        gradients.watch = lambda params: None
    stops.append(copies(peer.weights()))
    return Course(stops, seen)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


def difference(ours: Course, theirs: Course, start: list[Tensor]) -> tuple[float, str]:
    """The largest distance of a tensor from its twin relative to the way it has come, and where that is.

    Where they part is said, not where they end.
    """
    worst, where = 0.0, "nowhere"
    for number, (left, right) in enumerate(zip(ours.stops, theirs.stops, strict=True)):
        stop = "updated weights" if number == len(ours.stops) - 1 else f"weights at gradient {number + 1}"
        for t, (a, b, s) in enumerate(zip(left, right, start, strict=True)):
            way, gap = ((x - y).double().norm().item() for x, y in ((b, s), (a, b)))
            ratio = gap / (way + ROUNDINGS * s.norm().item()) if gap else 0.0
            if not ratio <= worst:
                worst, where = ratio if math.isfinite(ratio) else math.inf, f"{stop}, tensor {t}"
        if worst > TOLERANCE:
            break
    return worst, where


@dataclass(frozen=True)
class Unit:
    """A recipe, ours, as published and the base alone measured together."""

    variant: str
    cap: int | None = None

    @property
    def name(self) -> str:
        return f"variants/{self.variant}"


def measure(unit: Unit, effort: Effort, log: Log, tick: Tick, backend: str = "native") -> list[Row]:
    """Compare ours with the published way, then time whoever is there, interleaved."""
    variant, base = VARIANTS[unit.variant], BASES[BASE]
    workspace = Workspace(CASES[CASE].shapes(unit.cap), torch.float32, base)
    gradients = Gradients(workspace, variant.evaluations)
    about = {"section": "variants", "case": CASE, "base": base.name, "dtype": "float32"}
    about |= {"tensors": len(workspace.first), "numel": workspace.numel, "recipe": variant.name}
    rows: list[Row] = []
    peers: dict[str, Any] = {}
    try:
        ours = Ours(variant, workspace, base, gradients, backend)
    except Unavailable as reason:
        rows.append(single(OURS, "skipped", str(reason)))
        log(f"  skipped  {LABELS[OURS]}: {reason}")
    else:
        verdict, error = _gate(variant, workspace, base, gradients, ours)
        if error is not None:
            rows.append(single(PUBLISHED, "error", error))
        if verdict is None:
            peers[OURS] = ours
        else:
            rows.append(single(OURS, "wrong", verdict))
            log(f"  WRONG    {LABELS[OURS]}: {verdict}; it will not be timed")
    workspace.reset()
    if variant.published is not None:
        peers[PUBLISHED] = Theirs(variant, workspace, base, gradients)
        rows.append(single(PUBLISHED, "bytes_per_parameter", published.BYTES[variant.published]))
    peers[ALONE] = Alone(workspace, base, gradients)
    contestants = {key: _steps_of(peer, gradients, variant.period) for key, peer in peers.items()}
    workspace.initial = []
    for key, parts in interleave(contestants, effort, tick).items():
        rows.append(measured(key, "total_ms", [1e3 * s for s in parts["total"]]))
    return [{**about, **row} for row in rows]


def _gate(
    variant: Variant, workspace: Workspace, base: Base, gradients: Gradients, ours: Ours
) -> tuple[str | None, float | None]:
    """What is wrong with ours, if anything, and how far it is from the published way."""
    workspace.reset()
    try:
        course = run(ours, gradients, variant.draws)
    except Exception as error:  # a broken recipe must not cost the others their numbers
        return f"raised {type(error).__name__}: {error}", None
    if variant.published is None:
        return None, None
    workspace.reset()
    theirs = Theirs(variant, workspace, base, gradients, course.draws or None)
    expected = run(theirs, gradients)
    if len(course.stops) != len(expected.stops):
        counts = [len(stops) - 1 for stops in (course.stops, expected.stops)]
        return f"asks for {counts[0]} gradients in {STEPS} steps, the published one for {counts[1]}", None
    error, where = difference(course, expected, workspace.initial)
    if not error <= TOLERANCE:
        return f"{where}: {error:.2g} from where the published way leads; allowed is {TOLERANCE:.2g}", error
    return None, error


def _steps_of(peer: Any, gradients: Gradients, period: int) -> Contestant:
    """Mean seconds of a step without its evaluations."""

    def contestant() -> dict[str, float]:
        gradients.away = 0.0
        start = time.perf_counter()
        for _ in range(period):
            peer.step()
        return {"total": (time.perf_counter() - start - gradients.away) / period}

    return contestant


def label(peer: str) -> str:
    """How tables and pictures call a peer."""
    return LABELS[peer]
