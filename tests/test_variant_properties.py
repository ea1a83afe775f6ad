"""What holds for every recipe: resuming, zero and non-finite gradients, absent gradients, exceptions, copies.

None of it needs to know what a recipe computes, so a row of the table is a recipe and nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fixtures import assert_close, backends, base_state, rounds_to_nearest, same_bits, values
from torch import Tensor
from torch.nn import Parameter
from variants import VARIANTS

from sam_kernels import SAM, recipes
from sam_kernels.policies import (
    AdaptiveRatio,
    Anticipated,
    ByModule,
    Decoupled,
    Dynamic,
    Every,
    Lookbehind,
    Momentum,
    MultiStep,
    RandomStart,
    Ranked,
    Remembering,
    ReuseOrthogonal,
)

THREE = ("reference", "foreach", "native")
three_backends = pytest.mark.parametrize("backend", [b for b in backends() if b.values[0] in THREE])

NAN, INF = float("nan"), float("inf")


# ---- the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A recipe by its arguments."""

    label: str
    recipe: str
    arguments: dict[str, Any] = field(default_factory=dict)
    decay: float = 0.0  # inside of the loss

    def build(self) -> Any:
        """Return the recipe."""
        made = recipes.get(self.recipe, **self.arguments)
        return dataclasses.replace(made, decay="inside") if self.decay else made


# Of several rows that differ in numbers alone, one; those that differ in what they keep or visit, all.
_ALIKE = ("sam-1", "fisher_sam-0.2", "multistep_sam-steps", "gsam-clean", "gnp-raw", "ae_sam", "samar-add")

ROWS = (
    Row("sam", "sam", {"rho": 0.1}),
    Row("sam-inf", "sam", {"rho": 0.02, "p": math.inf}),
    Row("asam", "asam"),
    Row("layerwise_sam", "layerwise_sam"),
    Row("layerwise_sam-radius", "layerwise_sam", {"form": "radius"}),
    Row("nosam", "nosam", {"rho": 0.1}),
    Row("k_sam", "k_sam", {"rho": 0.1}),
    Row("ssam_f", "ssam_f", {"rho": 0.1, "every": 2}),
    Row("ssam_d", "ssam_d", {"rho": 0.1, "every": 2}),
    Row("ssam_d-compact", "ssam_d", {"rho": 0.1, "every": 3, "growth": "gradient", "compact": True}),
    *(
        Row(v.label, v.recipe, v.arguments, v.inside)
        for v in VARIANTS
        if v.label not in _ALIKE and "schedule" not in v.label  # a lambda does not pickle
    ),
    Row("looksam-5", "looksam", {"rho": 0.1, "k": 5}),
    Row("ae_sam-often", "ae_sam", {"rho": 0.1, "steps": 5, "early": -1.0}),
)


def that(*conditions: Callable[[Any], bool]) -> tuple[Row, ...]:
    """Return the rows whose recipe meets every condition."""
    return tuple(row for row in ROWS if all(condition(row.build()) for condition in conditions))


# Conditions on recipes, to choose rows by.


def takes_closures_only(recipe) -> bool:
    return recipe.probe.needs_closure


def takes_two_steps(recipe) -> bool:
    return not recipe.probe.needs_closure


def differentiates_first(recipe) -> bool:
    return recipe.direction.needs_gradient


def takes_lists(recipe) -> bool:
    return not isinstance(recipe.probe, Anticipated | Lookbehind)


def takes_micro_batches(recipe) -> bool:
    lasts = isinstance(recipe.combine, Decoupled | ReuseOrthogonal | AdaptiveRatio)
    lasts = lasts or isinstance(recipe.direction, Remembering) or isinstance(recipe.mask, Dynamic)
    return takes_lists(recipe) and not lasts and not recipe.cadence.needs_norm


def decays_outside(recipe) -> bool:
    return recipe.decay == "outside"


def draws_nothing(recipe) -> bool:
    return recipe.direction.needs_gradient and not isinstance(recipe.probe, RandomStart)


def every(rows: tuple[Row, ...]) -> Any:
    """Return the decorator that repeats a test for these rows."""
    return pytest.mark.parametrize("row", rows, ids=lambda r: r.label)


every_row = every(ROWS)

MOMENTUM = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01})
PLAIN = (torch.optim.SGD, {"lr": 0.1})
ADAMW = (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1})
ADAM = (torch.optim.Adam, {"lr": 0.01})


def with_every_base(rows: Iterable[Row]) -> list:
    """Return each row with SGD and with AdamW, whose decoupled decay is never inside: then with Adam."""
    found = []
    for row in rows:
        found.append(pytest.param(row, MOMENTUM, id=f"{row.label}-sgd"))
        found.append(pytest.param(row, ADAM if row.decay else ADAMW, id=f"{row.label}-adam"))
    return found


every_row_with_every_base = pytest.mark.parametrize(("row", "base"), with_every_base(ROWS))


def test_the_table_has_every_recipe():
    assert {row.recipe for row in ROWS} == set(recipes.names())


# ---- the problem -------------------------------------------------------------------------------------------

NAMES = ("fc.weight", "fc.bias", "norm.weight", "head.weight")
SHAPES = ((5, 4), (5,), (5,), (2, 5))


class Problem:
    """Two layers on batches of their own, whose gradients can be left out, spoilt or refused pass by pass."""

    def __init__(self, row: Row, base=PLAIN, backend="reference", dtypes=None, groups=None, **more) -> None:
        generator = torch.Generator().manual_seed(4)
        dtypes = dtypes or dict.fromkeys(NAMES, torch.float64)
        self.weights = {
            name: Parameter((torch.randn(shape, generator=generator) * 0.6 + 0.2).to(dtypes[name]))
            for name, shape in zip(NAMES, SHAPES, strict=True)
        }
        kind, options = base
        self.options = {**options, **({"weight_decay": row.decay} if row.decay else {}), **more}
        recipe = self.options.pop("recipe", None) or row.build()
        if isinstance(recipe.direction, Momentum) and kind is torch.optim.SGD:
            self.options.setdefault("momentum", 0.9)  # without there is nothing to go along
        params = list(self.weights.items()) if groups is None else groups(self.weights)
        self.row, self.step_number, self.visited, self.passes = row, 0, [], 0
        self.opt = SAM(params, kind, recipe=recipe, backend=backend, **self.options)
        if row.recipe == "ssam_f":
            self.opt.update_masks(scores={name: w.detach().square() for name, w in self.weights.items()})

    def loss(self, batch: int, without: tuple[str, ...] = (), scale: float = 1.0) -> Tensor:
        """Return the loss of a batch, to be differentiated by all weights but some."""
        generator = torch.Generator().manual_seed(100 + batch)
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        target = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        fc, bias, norm, head = (
            (w.detach() if name in without else w).double() for name, w in self.weights.items()
        )
        return scale * ((torch.tanh(x @ fc.T + bias) * norm @ head.T - target) ** 2).mean()

    def closure(self, batch: int, without=None, zero=(), scale=1.0, after=None) -> Callable[[], Tensor]:
        """Return a closure of a batch.

        Args:
            without: by the number of the pass, which weights get no gradient.
            zero: by the number of the pass, which weights get a gradient of zeros.
            after: called with the number of the pass after backward.
        """

        def call() -> Tensor:
            number = self.passes
            self.passes += 1
            self.visited.append(values(self.weights.values()))
            loss = self.loss(batch, (without or {}).get(number, ()), scale)
            loss.backward()
            for name in dict(zero or {}).get(number, ()):
                self.weights[name].grad.zero_()
            if after is not None:
                after(number)
            return loss

        return call

    def step(self, **changes: Any) -> Any:
        """Take the next step; the changes are those of `closure`."""
        number, self.visited, self.passes = self.step_number, [], 0
        looks_ahead = isinstance(self.opt.recipe.probe, Anticipated)
        more = {"ahead": self.closure(number + 1, **changes)} if looks_ahead else {}
        loss = self.opt.step(self.closure(number, **changes), **more)
        self.step_number += 1
        return loss

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def until_due(self) -> None:
        """Take two steps, so that there is something to lose, and those up to one that perturbs."""
        self.steps(2)
        while not self.opt.is_due:
            self.step()

    @property
    def now(self) -> list[Tensor]:
        return values(self.weights.values())

    def spoil(self, value: float, at: int) -> Callable[[int], None]:
        """Return an `after` that writes a number into a gradient of one pass."""
        mask = self.opt.recipe.mask
        # A norm of what is perturbed alone does not see the rest, and says so.
        is_masked = isinstance(mask, ByModule) or getattr(mask, "norm", "full") == "masked"

        def after(number: int) -> None:
            if number != at:
                return
            for name in NAMES if is_masked else ("head.weight",):
                self.weights[name].grad.view(-1)[slice(None) if is_masked else -1] = value

        return after


def lasting(opt: SAM) -> dict[tuple, Any]:
    """Return everything that a checkpoint holds but the count of the steps, by place."""
    saved = copy.deepcopy(opt.state_dict())
    found: dict[tuple, Any] = {}
    for number, entry in saved["state"].items():
        found.update({("state", number, name): value for name, value in entry.items()})
    for index, group in enumerate(saved["param_groups"]):
        found.update({("group", index, name): v for name, v in group.items() if name != "sam_step"})
    return found


def assert_same_lasting(left: dict[tuple, Any], right: dict[tuple, Any]) -> None:
    """Compare what lasts bit for bit."""
    assert left.keys() == right.keys()
    for place, value in left.items():
        other = right[place]
        if isinstance(value, Tensor):
            assert same_bits([value], [other]), place
        else:
            assert value == other, place


def ours(opt: SAM) -> dict[tuple, Any]:
    """Return what the policies of the recipe keep."""
    return {k: v for k, v in lasting(opt).items() if str(k[-1]).startswith("sam_")}


def is_finite(found: Iterable[Any]) -> bool:
    """Return whether all tensors and numbers are finite."""
    return all(bool(torch.isfinite(torch.as_tensor(x)).all()) for x in found)


def assert_all_finite(problem: Problem) -> None:
    """Nothing that lasts is NaN or infinite."""
    assert is_finite(problem.now)
    assert is_finite(base_state(problem.opt))
    kept = ours(problem.opt).values()
    assert is_finite(v for v in kept if isinstance(v, Tensor) and v.is_floating_point())
    assert is_finite(v for v in kept if isinstance(v, float))


# ---- checkpoints and copies --------------------------------------------------------------------------------


@three_backends
@every_row_with_every_base
def test_resumed_in_the_middle_of_a_period_the_run_goes_on_bit_for_bit(base, row, backend):
    straight = Problem(row, base, backend)
    straight.steps(3)
    file = io.BytesIO()
    torch.save({"weights": straight.now, "opt": straight.opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Problem(row, base, backend)
    with torch.no_grad():
        for w, v in zip(resumed.weights.values(), saved["weights"], strict=True):
            w.copy_(v)
    resumed.opt.load_state_dict(saved["opt"])
    resumed.step_number = 3
    for problem in (straight, resumed):
        problem.steps(4)
    assert same_bits(straight.now, resumed.now)
    assert_same_lasting(lasting(straight.opt), lasting(resumed.opt))
    assert straight.opt.param_groups[0]["sam_step"] == resumed.opt.param_groups[0]["sam_step"] == 7


@three_backends
@every_row
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_between_two_steps_goes_on_as_the_original_and_apart_from_it(way, row, backend):
    problem = Problem(row, MOMENTUM, backend)
    problem.steps(3)
    both = (problem.weights, problem.opt)
    other = copy.copy(problem)
    other.weights, other.opt = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    before, kept = problem.now, lasting(problem.opt)
    other.steps(3)
    assert same_bits(problem.now, before)
    assert_same_lasting(lasting(problem.opt), kept)
    problem.steps(3)
    assert not same_bits(problem.now, before)
    assert same_bits(problem.now, other.now)
    assert_same_lasting(lasting(problem.opt), lasting(other.opt))


# ---- zero and non-finite gradients -------------------------------------------------------------------------


@three_backends
@every_row
def test_zero_gradients_move_nothing_and_leave_what_lasts_finite(row, backend):
    problem = Problem(row, backend=backend)
    if row.decay:
        problem.opt.param_groups[0]["weight_decay"] = 0.0
    start = problem.now
    for _ in range(3):
        problem.step(scale=0.0)
        if draws_nothing(problem.opt.recipe):  # noise needs no gradient
            assert all(same_bits(point, start) for point in problem.visited)
    assert same_bits(problem.now, start)
    assert_all_finite(problem)
    problem.steps(3)
    assert not same_bits(problem.now, start)
    assert_all_finite(problem)


@three_backends
@every(that(differentiates_first))
def test_a_first_gradient_that_is_not_finite_skips_the_step_and_touches_nothing_that_lasts(row, backend):
    bad_run, good_run = Problem(row, MOMENTUM, backend), Problem(row, MOMENTUM, backend)
    for problem in (bad_run, good_run):
        problem.until_due()
    before, kept = bad_run.now, lasting(bad_run.opt)
    # In the pass whose gradient the perturbation goes along; that of SAMPa is the one for its next step.
    at = 1 if isinstance(bad_run.opt.recipe.probe, Anticipated) else 0
    bad_run.step(after=bad_run.spoil(NAN, at))
    assert same_bits(bad_run.now, before)
    assert_same_lasting(lasting(bad_run.opt), kept)
    # The count is one of attempts, and that is all the other run has to be told.
    for group in good_run.opt.param_groups:
        group["sam_step"] += 1
    good_run.step_number += 1
    for problem in (bad_run, good_run):
        problem.step()
    assert not same_bits(bad_run.now, before)
    assert same_bits(bad_run.now, good_run.now)
    assert_same_lasting(lasting(bad_run.opt), lasting(good_run.opt))


@three_backends
@every(that(differentiates_first, lambda r: r.cadence.is_due(0)))
def test_a_run_whose_very_first_gradient_is_not_finite_begins_with_the_second_step(row, backend):
    problem = Problem(row, MOMENTUM, backend)
    before = problem.now
    problem.step(after=problem.spoil(-INF, at=0))
    assert problem.opt.param_groups[0]["sam_step"] == 1
    assert same_bits(problem.now, before)
    assert not base_state(problem.opt)
    problem.steps(3)
    assert not same_bits(problem.now, before)
    assert_all_finite(problem)


def later_passes(row: Row) -> range:
    """Return the numbers of the passes of a step that perturbs, after the first."""
    return range(1, max(row.build().gradients, 2))


@three_backends
@pytest.mark.parametrize(
    ("row", "at"),
    [
        pytest.param(row, at, id=f"{row.label}-pass-{at}")
        for row in that(differentiates_first)
        for at in later_passes(row)
    ],
)
def test_a_gradient_that_is_not_finite_at_a_later_pass_does_not_get_into_what_lasts(row, at, backend):
    problem = Problem(row, PLAIN, backend)
    problem.until_due()
    kept = ours(problem.opt)
    problem.step(after=problem.spoil(NAN, at))
    after = ours(problem.opt)
    assert after.keys() == kept.keys()
    for place, value in after.items():
        assert not isinstance(value, Tensor) or not value.is_floating_point() or is_finite([value]), place
        if place[-1] in ("sam_orthogonal", "sam_lambda", "sam_previous_norm", "sam_anticipated"):
            same = same_bits([value], [kept[place]]) if isinstance(value, Tensor) else value == kept[place]
            assert same, place


@three_backends
@every_row
def test_weights_that_are_zero_train_as_others_do(row, backend):
    problem = Problem(row, MOMENTUM, backend)
    with torch.no_grad():
        problem.weights["fc.bias"].zero_()  # as biases begin, and of no length that noise could be a share of
    start = problem.now
    problem.steps(3)
    assert not any(same_bits([a], [b]) for a, b in zip(problem.now, start, strict=True))
    assert_all_finite(problem)


@three_backends
@every_row
def test_an_empty_tensor_changes_nothing(row, backend):
    empty = Parameter(torch.empty(0, 3, dtype=torch.float64))
    problem, plain = (
        Problem(row, MOMENTUM, backend, groups=lambda weights, more=more: [*weights.items(), *more])
        for more in ([("last.weight", empty)], [])
    )

    def give(number):
        empty.grad = torch.empty_like(empty)

    for _ in range(4):
        problem.step(after=give)
        plain.step()
    assert_close(problem.now, plain.now, 1e-12)
    assert_all_finite(problem)


# ---- gradients that come and go ----------------------------------------------------------------------------

STILL = (torch.optim.SGD, {"lr": 0.0})


@three_backends
@every_row
@pytest.mark.parametrize("passes", ["first", "later"])
def test_a_gradient_that_is_missing_counts_as_zero_for_the_others(passes, row, backend):
    numbers = (0,) if passes == "first" else range(1, 9)
    name = "head.weight" if passes == "first" else "fc.bias"
    absent = {number: (name,) for number in numbers}
    missing, zero = Problem(row, PLAIN, backend), Problem(row, PLAIN, backend)
    for problem in (missing, zero):
        problem.opt.param_groups[0]["weight_decay"] = 0.0  # a missing gradient has none, a zero has
    start = missing.now
    missing.step(without=absent)
    zero.step(zero=absent)
    others = [n for n in NAMES if n != name]
    # What is perturbed is decided in the first pass: further ascents leave out what was missing then.
    if passes == "later" or not isinstance(missing.opt.recipe.probe, MultiStep | Lookbehind):
        assert_close((missing.weights[n] for n in others), (zero.weights[n] for n in others), 1e-12)
    if missing.passes - 1 in absent:  # the base steps with the last gradient, and there is none
        assert same_bits([missing.weights[name]], [start[NAMES.index(name)]])
    if passes == "first" and isinstance(missing.opt.recipe.probe, Lookbehind):
        # its base steps are between points of the ascent, and there is none of what was not perturbed
        assert same_bits([missing.weights[name]], [start[NAMES.index(name)]])
    missing.steps(4)
    assert_all_finite(missing)
    assert not any(same_bits([a], [b]) for a, b in zip(missing.now, start, strict=True))


@three_backends
@every_row
def test_whatever_gradients_come_and_go_the_weights_return_to_their_bits(row, backend):
    still = Problem(row, STILL, backend)
    still.opt.param_groups[0]["weight_decay"] = 0.0
    before = still.now
    for pattern in (
        {0: ("fc.weight",)},
        {1: ("fc.weight", "head.weight"), 2: ("fc.bias",)},
        {},
        {0: ("fc.bias",), 1: ("norm.weight",), 2: ("head.weight",), 3: ("fc.weight",)},
        {0: NAMES[:3], 1: NAMES[1:]},
    ):
        still.step(without=pattern)
        assert same_bits(still.now, before)


@three_backends
@every_row
def test_a_gradient_that_first_comes_in_the_fourth_step_is_taken_in(row, backend):
    problem = Problem(row, MOMENTUM, backend)
    start = problem.now
    absent = dict.fromkeys(range(9), ("head.weight",))
    for _ in range(3):
        problem.step(without=absent)
    assert same_bits([problem.weights["head.weight"]], [start[3]])
    assert problem.weights["head.weight"] not in problem.opt.base_optimizer.state
    problem.steps(4)
    assert not same_bits([problem.weights["head.weight"]], [start[3]])
    assert_all_finite(problem)


# ---- dtypes, addresses, param groups -----------------------------------------------------------------------

MIXED = dict(zip(NAMES, (torch.float32, torch.bfloat16, torch.float32, torch.float64), strict=True))


@three_backends
@every_row_with_every_base
@rounds_to_nearest
def test_weights_of_three_dtypes_train_where_they_lie(base, row, backend):
    problem = Problem(row, base, backend, MIXED)
    start, addresses = problem.now, [w.data_ptr() for w in problem.weights.values()]
    problem.steps(4)
    assert [w.data_ptr() for w in problem.weights.values()] == addresses
    assert [w.dtype for w in problem.weights.values()] == list(MIXED.values())
    assert not any(same_bits([a], [b]) for a, b in zip(problem.now, start, strict=True))
    assert_all_finite(problem)


@three_backends
@every_row
@rounds_to_nearest
def test_weights_of_three_dtypes_return_to_their_bits(row, backend):
    problem = Problem(row, STILL, backend, MIXED)
    problem.opt.param_groups[0]["weight_decay"] = 0.0
    before = problem.now
    problem.steps(3)
    assert same_bits(problem.now, before)


def in_two(first: dict[str, Any], second: dict[str, Any]) -> Callable[[dict], list]:
    """Return the weights as two param groups with options of their own."""

    def groups(weights: dict[str, Parameter]) -> list[dict[str, Any]]:
        named = list(weights.items())
        return [{"params": named[:2], **first}, {"params": named[2:], **second}]

    return groups


@three_backends
@every_row
def test_two_param_groups_of_the_same_numbers_are_one(row, backend):
    one = Problem(row, MOMENTUM, backend)
    two = Problem(row, MOMENTUM, backend, groups=in_two({}, {}))
    for problem in (one, two):
        problem.steps(4)
    assert_close(two.now, one.now, 1e-12)


@three_backends
@every(that(lambda r: not isinstance(r.probe, RandomStart)))
def test_a_param_group_of_radius_zero_is_not_perturbed_and_one_of_rate_zero_does_not_move(row, backend):
    one = Problem(row, PLAIN, backend)
    two = Problem(row, MOMENTUM, backend, groups=in_two({"rho": 0.0, "lr": 0.05}, {"rho": 0.3, "lr": 0.0}))
    two.opt.param_groups[1]["weight_decay"] = 0.0
    clean, start = two.now, two.now
    for _ in range(3):
        two.step()
        if not isinstance(two.opt.recipe.probe, Anticipated | Lookbehind):
            for point in two.visited:
                assert same_bits(point[:2], clean[:2])
        clean = two.now
        assert same_bits(clean[2:], start[2:])
        assert not any(same_bits([a], [b]) for a, b in zip(clean[:2], start[:2], strict=True))
    one.steps(3)
    assert not same_bits(one.now[2:], start[2:])


@three_backends
@every(that(draws_nothing, lambda r: not isinstance(r.mask, Ranked)))  # masks go by all weights there are
def test_a_param_group_added_in_the_middle_is_as_if_it_had_had_no_gradient(row, backend):
    late = Problem(row, MOMENTUM, backend, groups=lambda weights: list(weights.items())[:3])
    known = Problem(row, MOMENTUM, backend)
    absent = dict.fromkeys(range(9), ("head.weight",))
    for problem in (late, known):
        for _ in range(3):
            problem.step(without=absent)
    late.opt.add_param_group({"params": [("head.weight", late.weights["head.weight"])]})
    for problem in (late, known):
        problem.steps(3)
    assert_close(late.now, known.now, 1e-12)


# ---- exceptions --------------------------------------------------------------------------------------------


class Refused(Exception):
    """What a closure raises."""


@three_backends
@every_row
def test_a_closure_that_raises_at_any_pass_leaves_clean_weights_and_a_step_that_can_be_taken(row, backend):
    probe = Problem(row, MOMENTUM, backend)
    probe.until_due()
    probe.step()
    for at in range(probe.passes):
        problem = Problem(row, MOMENTUM, backend)
        problem.until_due()
        before, count = problem.now, problem.opt.param_groups[0]["sam_step"]

        def refuse(number, at=at):
            if number == at:
                raise Refused

        with pytest.raises(Refused):
            problem.step(after=refuse)
        assert same_bits(problem.now, before), at
        assert problem.opt.param_groups[0]["sam_step"] == count
        problem.opt.state_dict()  # refuses while weights are perturbed
        with pytest.raises(RuntimeError, match="pending"):
            problem.opt.second_step()
        problem.step()
        assert len(problem.visited) == probe.passes
        assert not same_bits(problem.now, before)
        assert_all_finite(problem)


@every_row
def test_a_closure_that_raises_in_the_first_pass_leaves_what_lasts(row):
    problem = Problem(row, MOMENTUM)
    problem.until_due()
    kept = lasting(problem.opt)

    def refuse(number):
        raise Refused

    with pytest.raises(Refused):
        problem.step(after=refuse)
    assert_same_lasting(lasting(problem.opt), kept)


# ---- the two-step form -------------------------------------------------------------------------------------


@three_backends
@every(that(takes_two_steps))
@pytest.mark.parametrize("zero_grad", [True, False])
def test_the_two_step_form_is_the_closure_form_bit_for_bit(zero_grad, row, backend):
    by_closure, by_steps = Problem(row, MOMENTUM, backend), Problem(row, MOMENTUM, backend)
    by_closure.steps(4)
    opt = by_steps.opt
    for number in range(4):
        backward = by_steps.closure(number)
        opt.zero_grad()
        if differentiates_first(opt.recipe):
            backward()
        opt.first_step(zero_grad=zero_grad)
        opt.zero_grad()
        backward()
        opt.second_step(zero_grad=True)
    assert same_bits(by_steps.now, by_closure.now)
    assert_same_lasting(lasting(opt), lasting(by_closure.opt))


@three_backends
@every(that(takes_closures_only))
def test_a_recipe_of_more_points_refuses_the_two_step_form_in_a_sentence(row, backend):
    problem = Problem(row, MOMENTUM, backend)
    before = problem.now
    problem.loss(0).backward()
    for form in (problem.opt.first_step, problem.opt.ascent_step, problem.opt.perturbed().__enter__):
        with pytest.raises(RuntimeError, match=rf"recipe '{row.recipe}' .*step\(closure"):
            form()
    assert same_bits(problem.now, before)
    problem.step()


@three_backends
# Where the decay is part of the loss, it is part of the gradient too.
@every(that(takes_two_steps, differentiates_first, decays_outside))
def test_first_step_leaves_the_gradients_as_they_were(row, backend):
    problem = Problem(row, MOMENTUM, backend)
    for number in range(3):
        problem.opt.zero_grad()
        problem.loss(number).backward()
        given = [w.grad for w in problem.weights.values()]
        before = values(given)
        problem.opt.first_step(zero_grad=False)
        assert all(w.grad is g for w, g in zip(problem.weights.values(), given, strict=True))
        assert same_bits(given, before)
        problem.opt.zero_grad()
        problem.loss(number).backward()
        problem.opt.second_step()


# ---- cadence -----------------------------------------------------------------------------------------------


def has_every(row: Row) -> bool:
    """Whether the recipe's function takes every=k, and means steps by it."""
    function = getattr(recipes, row.recipe)
    # in the recipes of masks it is the period of those
    return "every" in inspect.signature(function).parameters and not row.recipe.startswith("ssam")


@three_backends
@pytest.mark.parametrize(("row", "base"), with_every_base(row for row in ROWS if has_every(row)))
def test_between_every_kth_step_the_base_steps_alone_bit_for_bit(base, row, backend):
    gapped = recipes.get(row.recipe, **row.arguments, every=3)
    assert gapped.cadence == Every(3)
    if row.decay:
        gapped = dataclasses.replace(gapped, decay="inside")
    problem = Problem(row, base, backend, recipe=gapped)
    alone = Problem(Row("sam", "sam"), base, backend, allow_plain_step=True)
    alone.opt.param_groups[0]["weight_decay"] = problem.opt.param_groups[0]["weight_decay"]
    for number in range(5):
        if problem.opt.is_due:
            problem.step()
            with torch.no_grad():
                for w, v in zip(alone.weights.values(), problem.now, strict=True):
                    w.copy_(v)
            # copied, since torch's loading shares the tensors
            alone.opt.load_state_dict(copy.deepcopy(problem.opt.base_optimizer.state_dict()))
            continue
        kept = ours(problem.opt)
        problem.step()
        assert problem.passes == 1
        alone.opt.zero_grad()
        alone.loss(number).backward()
        alone.opt.step()
        if row.decay:  # the same sum in another order
            assert_close(problem.now, alone.now, 1e-12)
        else:
            assert same_bits(problem.now, alone.now)
            assert same_bits(base_state(problem.opt), base_state(alone.opt))
        if row.recipe == "sampa":  # what was anticipated is of a batch that is gone by then
            assert not any(place[-1] == "sam_anticipated" for place in ours(problem.opt))
        else:
            assert_same_lasting(ours(problem.opt), kept)
    assert problem.opt.param_groups[0]["sam_step"] == 5


# ---- lists of closures -------------------------------------------------------------------------------------


@three_backends
@every(that(takes_lists))
def test_a_list_of_closures_is_the_closure_of_their_sum(row, backend):
    parts, whole = Problem(row, MOMENTUM, backend), Problem(row, MOMENTUM, backend)
    for number in range(4):

        def second(number=number):
            parts.opt.zero_grad()  # many closures begin so; here it must not drop the first one's
            return parts.closure(number + 10, scale=0.5)()

        losses = parts.opt.step([parts.closure(number), second])

        def summed(number=number):
            loss = whole.loss(number) + whole.loss(number + 10, scale=0.5)
            loss.backward()
            return loss

        loss = whole.opt.step(summed)
        assert len(losses) == 2
        torch.testing.assert_close(sum(losses), loss, rtol=1e-12, atol=0)
    assert_close(parts.now, whole.now, 1e-11)


@three_backends
@every(that(takes_micro_batches))
def test_a_list_of_one_micro_batch_is_the_plain_step(row, backend):
    listed, plain = Problem(row, MOMENTUM, backend), Problem(row, MOMENTUM, backend)
    for number in range(4):
        (first,) = listed.opt.step([listed.closure(number)], m_sharpness=True)
        assert torch.equal(first, plain.step())
    assert_close(listed.now, plain.now, 1e-13)
    assert listed.opt.param_groups[0]["sam_step"] == 4


@three_backends
def test_m_sharpness_gives_every_micro_batch_its_own_ascent(backend):
    rho, lr = 0.1, 0.1
    problem = Problem(Row("sam", "sam", {"rho": rho}), PLAIN, backend)
    by_hand = Problem(Row("sam", "sam"))
    start, total = by_hand.now, [torch.zeros_like(w) for w in by_hand.weights.values()]

    def gradients(batch):
        return torch.autograd.grad(by_hand.loss(batch), list(by_hand.weights.values()))

    def put(new):
        with torch.no_grad():
            for w, v in zip(by_hand.weights.values(), new, strict=True):
                w.copy_(v)

    for batch in range(3):
        put(start)
        g = gradients(batch)
        size = torch.cat([x.flatten() for x in g]).norm()
        put([w + rho * x / (size + 1e-12) for w, x in zip(start, g, strict=True)])
        total = [t + x for t, x in zip(total, gradients(batch), strict=True)]
    put([w - lr * t for w, t in zip(start, total, strict=True)])
    losses = problem.opt.step([problem.closure(batch) for batch in range(3)], m_sharpness=True)
    assert len(losses) == 3
    assert_close(problem.now, by_hand.now, 1e-13)
    together = Problem(Row("sam", "sam", {"rho": rho}), PLAIN, backend)
    together.opt.step([together.closure(batch) for batch in range(3)])
    assert float((together.now[0] - problem.now[0]).norm()) > 1e-6  # one ascent for all is another step


def step_with_a_bad_micro_batch(problem: Problem) -> None:
    """Take a step of three micro-batches, of which the second has a first gradient that is not finite."""
    passes, spoil = itertools.count(), problem.spoil(NAN, at=0)

    def spoilt():
        loss = problem.loss(3)
        loss.backward()
        spoil(next(passes))
        return loss

    problem.opt.step([problem.closure(2), spoilt, problem.closure(4)], m_sharpness=True)


@three_backends
@every(that(takes_micro_batches, differentiates_first))
def test_one_bad_micro_batch_skips_the_whole_step(row, backend):
    problem = Problem(row, MOMENTUM, backend)
    problem.until_due()
    before, state = problem.now, base_state(problem.opt)
    step_with_a_bad_micro_batch(problem)
    assert same_bits(problem.now, before)
    assert same_bits(base_state(problem.opt), state)
    assert_all_finite(problem)
    problem.step()
    assert not same_bits(problem.now, before)


@every(that(takes_micro_batches, differentiates_first))
def test_one_bad_micro_batch_touches_nothing_that_lasts(row):
    problem = Problem(row, MOMENTUM)
    problem.until_due()
    kept = lasting(problem.opt)
    step_with_a_bad_micro_batch(problem)
    assert_same_lasting(lasting(problem.opt), kept)


@three_backends
@every(that(takes_micro_batches))
def test_micro_batches_leave_clean_weights_when_one_of_them_raises(row, backend):
    problem = Problem(row, MOMENTUM, backend)
    problem.until_due()
    before = problem.now

    def refuse():
        raise Refused

    with pytest.raises(Refused):
        problem.opt.step([problem.closure(2), refuse], m_sharpness=True)
    assert same_bits(problem.now, before)
    problem.step()
    assert not same_bits(problem.now, before)
    assert_all_finite(problem)


REFUSALS = (
    *(
        pytest.param(row, {}, id=f"{row.label}-list")
        for row in ROWS
        if not takes_lists(row.build()) and "adaptive" not in row.label
    ),
    *(
        pytest.param(row, {"m_sharpness": True}, id=f"{row.label}-m-sharpness")
        for row in ROWS
        if not takes_micro_batches(row.build())
    ),
)


@three_backends
@pytest.mark.parametrize(("row", "more"), REFUSALS)
def test_a_recipe_that_cannot_take_a_list_says_so(row, more, backend):
    problem = Problem(row, MOMENTUM, backend)
    before = problem.now
    what = "one closure" if not takes_lists(row.build()) else "m_sharpness"
    with pytest.raises(TypeError, match=rf"step\(\): recipe '{row.recipe}' .*{what}"):
        problem.opt.step([problem.closure(0), problem.closure(1)], **more)
    assert problem.passes == 0
    assert same_bits(problem.now, before)
    problem.step()
    assert not same_bits(problem.now, before)
