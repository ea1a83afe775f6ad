"""Policies in any combination: refused by a sentence, or the same numbers on every backend."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from fixtures import assert_close, base_state, batches, same_bits, small_net, squared_error, values, why_not
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st

from sam_kernels import SAM, Recipe
from sam_kernels.policies import (
    Adaptive,
    AdaptiveRatio,
    Anticipate,
    Anticipated,
    Bernoulli,
    ByModule,
    ByName,
    Curvature,
    Decoupled,
    Dense,
    Dynamic,
    Ema,
    Euclidean,
    Every,
    EveryStep,
    Fisher,
    Friendly,
    Given,
    Gradient,
    Last,
    LayerWise,
    Lookbehind,
    Mirrored,
    Mix,
    Momentum,
    MultiStep,
    Noise,
    NormGate,
    OneStep,
    RandomStart,
    ReuseOrthogonal,
    SurrogateGap,
    TopScores,
    WithProbability,
)

STEPS = 3
INPUTS = batches(STEPS + 3, 4, 5)


def checkerboard(member, param):
    """Return a mask of every other weight."""
    return torch.arange(param.numel()).view(param.shape) % 2 == 0


# No number here puts a decision on an edge, such as an average that equals the gradient it is subtracted
# from: on an edge two backends may rightly decide differently.
POLICIES = {
    "direction": (
        Gradient(),
        Ema(0.4),
        Ema(1.0),
        Friendly(0.7, 0.6),
        Friendly(1.0, 0.9, "paper"),
        Noise(3),
        Momentum(),
    ),
    "metric": (
        Euclidean(),
        Euclidean(p=1),
        Euclidean(p=1.5),
        Euclidean(p=4),
        Euclidean(p=math.inf),
        Adaptive(),
        Adaptive(eta=0.1, only=("*weight*",)),
        Adaptive(p=4, eta=0.01),
        Adaptive(p=math.inf, eta=0.01),
        Fisher(eta=0.5),
        LayerWise(),
        LayerWise(form="radius"),
        LayerWise(form="trust_ratio"),
    ),
    "mask": (
        Dense(),
        ByName(("*weight*",)),
        ByModule(),
        Bernoulli(0.6, seed=2),
        Bernoulli(0.5, norm="masked"),
        Bernoulli(0.7, by="tensor", seed=5),
        Bernoulli(0.5, by="tensor", norm="masked", seed=4),
        TopScores(0.5),
        TopScores(0.5, norm="masked"),
        Dynamic(0.4, every=2),
        Dynamic(0.5, every=1, growth="gradient", norm="masked", compact=True),
        Given(checkerboard),
        Given(checkerboard, compact=True),
    ),
    "probe": (
        OneStep(),
        MultiStep(1),
        MultiStep(2),
        MultiStep(3, step=0.8, project=False),
        Mirrored(),
        RandomStart(seed=1),
        RandomStart(0.05, keep_noise=False),
        Anticipated(),
        Lookbehind(2, 0.5),
        Lookbehind(3, None),
    ),
    "combine": (
        Last(),
        Mix(0.3, 0.7),
        Mix(0.2, 0.8, normalize=True),
        Decoupled(2.0),
        SurrogateGap(0.4),
        SurrogateGap(0.4, minimize_fp=False),
        Curvature(0.1, 0.2),
        ReuseOrthogonal(0.7),
        ReuseOrthogonal(0.5, "tensor"),
        AdaptiveRatio(),
        AdaptiveRatio(0.6, weighting="add"),
        Anticipate(0.2),
    ),
    "cadence": (
        EveryStep(),
        Every(2),
        WithProbability(0.6, seed=1),
        NormGate(steps=STEPS, decay=0.5),
        NormGate(steps=STEPS, decay=0.5, early=-1.0),
    ),
}
KINDS = {kind: tuple(dict.fromkeys(type(p) for p in policies)) for kind, policies in POLICIES.items()}


def drawn(kind: str):
    """Return a strategy that draws a type first, so that a type with many rows is no likelier."""
    of_type = {t: [p for p in POLICIES[kind] if type(p) is t] for t in KINDS[kind]}
    return st.sampled_from(KINDS[kind]).flatmap(lambda t: st.sampled_from(of_type[t]))


def contradiction(refusal: ValueError, policies: dict) -> str | None:
    """Return what is wrong with the sentence that refuses these policies, or None."""
    sentence = str(refusal)
    if not sentence.startswith("recipe 'custom': "):
        return "it does not say which recipe"
    named = [kind for kind, policy in policies.items() if type(policy).__name__ in sentence]
    places = [kind for kind in (*policies, "decay") if kind in sentence and kind not in named]
    # Two things contradict: both are named, or one is and the other by its place in the recipe.
    return None if named and len(named) + len(places) >= 2 else "it does not name what contradicts"


def build(policies: dict, **numbers):
    """Return the recipe, or None where the constructor refuses it."""
    try:
        return Recipe(**policies, **numbers)
    except ValueError as refusal:
        wrong = contradiction(refusal, policies)
        assert wrong is None, f"{refusal} [{wrong}: {policies}]"
        return None


def test_every_policy_is_in_the_table_and_every_kind_of_it_is_legal_somewhere():
    import sam_kernels.policies as module

    bases = {"Cadence", "Combine", "Direction", "Mask", "Metric", "Probe", "Member"}
    abstract = {"Ranked", "Remembering", "Sparse"}
    known = {t.__name__ for kinds in KINDS.values() for t in kinds}
    assert known == set(module.__all__) - bases - abstract
    legal = set()
    for choice in itertools.product(*([p[0] for p in _by_type(kind)] for kind in POLICIES)):
        recipe = build(dict(zip(POLICIES, choice, strict=True)))
        if recipe is not None:
            legal |= {type(p).__name__ for p in choice}
    assert legal == known


def _by_type(kind: str) -> list:
    return [[p for p in POLICIES[kind] if type(p) is t] for t in KINDS[kind]]


class Refused(Exception):
    """What a closure raises."""


class Run:
    """A net under one recipe and one backend."""

    def __init__(self, recipe: Recipe, backend: str) -> None:
        self.model = small_net()
        self.weights = list(self.model.parameters())
        self.visited: list[list[torch.Tensor]] = []
        self.opt = SAM(
            self.model.named_parameters(),
            torch.optim.SGD,
            recipe=recipe,
            backend=backend,
            lr=0.1,
            momentum=0.9,
            weight_decay=0.01,
        )
        if isinstance(recipe.mask, TopScores):
            self.opt.update_masks(scores=lambda w: w.detach().square())

    def step(self, number: int, refuse_at: int | None = None) -> None:
        """Take a step; the closure raises in pass number `refuse_at`."""
        self.visited = []

        def closure_of(batch):
            def closure():
                self.visited.append(values(self.weights))
                if len(self.visited) - 1 == refuse_at:
                    raise Refused
                loss = squared_error(self.model(INPUTS[batch]), batch)
                loss.backward()
                return loss

            return closure

        looks_ahead = isinstance(self.opt.recipe.probe, Anticipated)
        more = {"ahead": closure_of(number + 1)} if looks_ahead else {}
        self.opt.step(closure_of(number), **more)

    def kept(self) -> list[torch.Tensor]:
        """Return the state of the base and of the policies."""
        saved = self.opt.state_dict()
        tensors = [
            entry[name].clone()
            for _, entry in sorted(saved["state"].items())
            for name in sorted(entry)
            if name.startswith("sam_") and entry[name].is_floating_point()
        ]
        first = saved["param_groups"][0]
        numbers = [torch.tensor(first[n]) for n in sorted(first) if n.startswith("sam_") and n != "sam_step"]
        return base_state(self.opt) + tensors + numbers


@functools.cache
def others() -> tuple[str, ...]:
    """Return the backends that run here beside the reference."""
    return tuple(b for b in ("foreach", "native") if why_not(b) is None)


def check(recipe: Recipe, refuse_at: int) -> None:
    """Take three steps on every backend, one that raises, and one that must not move the weights."""
    runs = {backend: Run(recipe, backend) for backend in ("reference", *others())}
    reference = runs["reference"]
    start = values(reference.weights)
    for number in range(STEPS):
        for run in runs.values():
            run.step(number)
        for backend in others():
            run = runs[backend]
            assert len(run.visited) == len(reference.visited), backend
            for point, expected in zip(run.visited, reference.visited, strict=True):
                assert_close(point, expected, 1e-9)
            assert_close(run.weights, reference.weights, 1e-9)
            assert_close(run.kept(), reference.kept(), 1e-9)
    assert not same_bits(start, reference.weights)
    for run in runs.values():
        assert all(bool(torch.isfinite(t).all()) for t in [*run.weights, *run.kept()])
        clean = values(run.weights)
        passes = len(run.visited)
        try:
            run.step(STEPS, refuse_at=refuse_at % passes)
        except Refused:
            assert same_bits(run.weights, clean)
        run.opt.state_dict()  # refuses while weights are perturbed
        still = values(run.weights)
        run.opt.param_groups[0].update(lr=0.0, weight_decay=0.0)
        run.step(STEPS + 1)
        assert same_bits(run.weights, still)


@pytest.mark.parametrize("probe", KINDS["probe"], ids=lambda t: t.__name__)
@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a failure is bounded in time too
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(data=st.data())
def test_whatever_the_constructor_accepts_is_the_same_on_every_backend(probe, data):
    policies = {kind: data.draw(drawn(kind), label=kind) for kind in POLICIES if kind != "probe"}
    policies["probe"] = data.draw(st.sampled_from([p for p in POLICIES["probe"] if type(p) is probe]))
    # Three of the probes go with one rule or with few, and freely drawn they would hardly ever meet it.
    if data.draw(st.booleans(), label="matched"):
        rule = {Mirrored: Curvature(0.1, 0.2), Anticipated: Anticipate(0.3), Lookbehind: Last()}.get(probe)
        policies["combine"] = rule or policies["combine"]
        if probe in (Anticipated, Lookbehind):
            policies |= {"direction": Gradient(), "mask": Dense()}
    numbers = {
        "rho": data.draw(st.sampled_from((0.02, 0.1)), label="rho"),
        "eps": data.draw(st.sampled_from((1e-12, 1e-3)), label="eps"),
        "decay": data.draw(st.sampled_from(("outside", "inside")), label="decay"),
    }
    recipe = build(policies, **numbers)
    assume(recipe is not None)
    note(repr(recipe))
    check(recipe, data.draw(st.integers(0, 3), label="refuse at"))
