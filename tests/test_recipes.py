"""A recipe is a sentence: named, frozen, checked when it is written, true to its paper step after step."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
import warnings

import pytest
import torch
from cases import BASES, RECIPES
from fixtures import (
    assert_close,
    backward_of,
    batches,
    every_backend,
    give_gradients,
    small_net,
    squared_error,
    values,
)
from oracles import asam, layerwise
from oracles import sam as oracle
from oracles.trajectory import follow, gradient_of
from torch.nn import Parameter
from variants import VARIANTS

from sam_kernels import SAM, Recipe, policies, recipes

STEPS = 6
NAMES = ("sam", "asam", "layerwise_sam", "nosam", "ssam_f", "ssam_d")


@functools.cache
def expected_stops(recipe_label: str, base_label: str) -> list:
    recipe = next(case for case in RECIPES if case.label == recipe_label)
    base = next(case for case in BASES if case.label == base_label)
    model = small_net()
    inputs = batches(STEPS, 4, 5)
    gradient = gradient_of(model, squared_error, inputs)
    weights = dict(model.named_parameters())
    return follow(weights, gradient, recipe.perturbation, base.oracle(**base.arguments), STEPS, recipe.every)


# rounding of six float32 steps; float64 leaves only the norm's guard against zero, 1e-12 of the perturbation
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("base", BASES, ids=lambda c: c.label)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda c: c.label)
@every_backend
def test_six_steps_follow_the_oracle_at_every_stop(backend, recipe, base, dtype, relative):
    model = small_net(dtype)
    weights = list(model.parameters())
    opt = SAM(model.named_parameters(), base.base, backend=backend, **recipe.options(), **base.arguments)
    inputs = batches(STEPS, 4, 5, dtype=dtype)
    for step, stops in enumerate(expected_stops(recipe.label, base.label)):
        backward = backward_of(model, inputs[step], step)
        opt.zero_grad()
        backward()
        with opt.perturbed():
            assert_close(weights, stops.perturbed.values(), relative)
            backward()
        assert_close(weights, stops.restored.values(), relative)
        opt.step()
        assert_close(weights, stops.updated.values(), relative)


def test_names_are_the_recipes_of_this_version():
    assert set(NAMES) <= set(recipes.names())


def test_every_recipe_has_a_row_in_the_table():
    assert {case.recipe for case in (*RECIPES, *VARIANTS)} | {"k_sam"} == set(recipes.names())


@pytest.mark.parametrize("name", NAMES)
def test_get_by_name_is_the_recipe_function(name):
    assert recipes.get(name) == getattr(recipes, name)()
    assert isinstance(recipes.get(name), Recipe)
    assert recipes.get(name).name == name


def test_get_passes_arguments_on():
    assert recipes.get("asam", rho=0.2, eta=0.3) == recipes.asam(rho=0.2, eta=0.3)
    assert recipes.get("asam", rho=0.2) != recipes.get("asam", rho=0.3)


def test_published_defaults():
    assert recipes.sam().rho == 0.05
    assert recipes.asam().rho == 0.5
    assert recipes.layerwise_sam().rho == 0.05
    assert recipes.nosam().rho == 0.05
    assert recipes.ssam_f().rho == recipes.ssam_d().rho == 0.05


def test_unknown_name_lists_the_known_ones():
    with pytest.raises((ValueError, KeyError), match="sma.*") as caught:
        recipes.get("sma")
    for name in NAMES:
        assert name in str(caught.value)


def test_unknown_name_in_the_constructor_lists_the_known_ones():
    with pytest.raises((ValueError, KeyError), match="layerwise_sam"):
        SAM([Parameter(torch.ones(2))], torch.optim.SGD, recipe="gsma", lr=0.1)


def test_unknown_argument_of_a_recipe_is_an_error():
    with pytest.raises(TypeError, match="temperature"):
        recipes.get("sam", temperature=3)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_frozen(name):
    recipe = recipes.get(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.rho = 1.0


@pytest.mark.parametrize("name", NAMES)
def test_recipe_survives_pickle_and_deepcopy(name):
    recipe = recipes.get(name, every=3)
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert copy.deepcopy(recipe) == recipe


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rho", [-0.05, math.nan, math.inf])
def test_impossible_rho_is_a_sentence(name, rho):
    with pytest.raises(ValueError, match="rho"):
        recipes.get(name, rho=rho)


@pytest.mark.parametrize("p", [0.99, 0.5, -2.0, math.nan])
def test_p_must_be_at_least_one(p):
    with pytest.raises(ValueError, match="p"):
        recipes.sam(p=p)


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_cadence_must_be_a_whole_number_of_steps(every):
    with pytest.raises((ValueError, TypeError), match="every"):
        recipes.sam(every=every)


@pytest.mark.parametrize("eta", [-0.1, math.nan])
def test_eta_must_not_be_negative(eta):
    with pytest.raises(ValueError, match="eta"):
        recipes.asam(eta=eta)


def test_unknown_layerwise_form_lists_the_forms():
    with pytest.raises(ValueError, match="trust_ratio"):
        recipes.layerwise_sam(form="cosine")


@pytest.mark.parametrize("rho", [-0.1, math.nan])
def test_impossible_rho_of_the_constructor_is_a_sentence(rho):
    with pytest.raises(ValueError, match="rho"):
        SAM([Parameter(torch.ones(2))], torch.optim.SGD, rho=rho, lr=0.1)


def test_rho_of_the_constructor_wins_over_the_recipe():
    w = Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    opt = SAM([w], torch.optim.SGD, rho=0.5, recipe=recipes.sam(rho=0.05), lr=0.1)
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    opt.first_step()
    assert_close([w], [torch.tensor([1.3, 2.4], dtype=torch.float64)], 1e-11)


def test_rho_of_the_recipe_is_the_default_of_each_group():
    opt = SAM([Parameter(torch.ones(2))], torch.optim.SGD, recipe="asam", lr=0.1)
    assert opt.param_groups[0]["rho"] == 0.5


def test_recipe_by_name_instance_and_default_agree():
    moved = []
    for options in ({}, {"recipe": "sam"}, {"recipe": recipes.sam()}, {"recipe": Recipe()}, {"rho": 0.05}):
        w = Parameter(torch.tensor([1.0, 2.0]))
        opt = SAM([w], torch.optim.SGD, lr=0.1, **options)
        w.grad = torch.tensor([0.3, -0.4])
        opt.first_step()
        moved.append(w.detach())
    assert all(torch.equal(moved[0], other) for other in moved)
    assert not torch.equal(moved[0], torch.tensor([1.0, 2.0]))


def test_adaptive_flag_against_a_recipe_with_its_own_metric_is_contradictory():
    with pytest.raises((ValueError, TypeError), match="adaptive"):
        SAM(
            [Parameter(torch.ones(2))], torch.optim.SGD, adaptive=True, recipe=recipes.layerwise_sam(), lr=0.1
        )


def test_asam_without_names_warns_once_and_adapts_every_parameter():
    weights = [
        Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64)),
        Parameter(torch.tensor([0.5], dtype=torch.float64)),
    ]
    with pytest.warns(UserWarning, match="name") as caught:
        opt = SAM(weights, torch.optim.SGD, recipe=recipes.asam(rho=0.5, eta=0.01), lr=0.1)
        for _ in range(2):
            gradients = values(give_gradients(weights, seed=1))
            start = values(weights)
            opt.first_step()
            after = values(weights)
            opt.second_step()
    assert len([w for w in caught if "name" in str(w.message)]) == 1
    named = dict(zip(("a.weight", "b.weight"), start, strict=True))
    e = asam.perturbation(named, dict(zip(named, gradients, strict=True)), rho=0.5, eta=0.01)
    assert_close(after, [w + d for w, d in zip(start, e.values(), strict=True)], 1e-11)


def test_named_asam_does_not_warn():
    model = small_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = SAM(model.named_parameters(), torch.optim.SGD, recipe="asam", lr=0.1)
        opt.step(backward_of(model, torch.ones(2, 5, dtype=torch.float64)))


def test_asam_finds_names_through_the_model():
    moved = []
    for given in ("names", "model"):
        model = small_net()
        params = model.named_parameters() if given == "names" else model.parameters()
        extra = {} if given == "names" else {"model": model}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt = SAM(params, torch.optim.SGD, recipe="asam", lr=0.1, **extra)
            give_gradients(list(model.parameters()), seed=5)
            opt.first_step()
        moved.append(values(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))


def test_asam_only_patterns_choose_the_adaptive_parameters():
    model = small_net()
    weights = dict(model.named_parameters())
    start = {name: w.detach().clone() for name, w in weights.items()}
    opt = SAM(weights.items(), torch.optim.SGD, recipe=recipes.asam(rho=0.3, eta=0.2, only=("fc2*",)), lr=0.1)
    gradients = dict(zip(weights, values(give_gradients(list(weights.values()), seed=2)), strict=True))
    opt.first_step()
    e = asam.perturbation(start, gradients, rho=0.3, eta=0.2, only="fc2")
    assert_close(weights.values(), [start[n] + e[n] for n in weights], 1e-11)


def test_layerwise_operator_without_names_warns_and_scales_every_tensor():
    weights = [
        Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64)),
        Parameter(torch.tensor([0.5], dtype=torch.float64)),
    ]
    start = dict(zip(("a.weight", "b.weight"), values(weights), strict=True))
    with pytest.warns(UserWarning, match="name"):
        opt = SAM(weights, torch.optim.SGD, recipe=recipes.layerwise_sam(rho=0.1), lr=0.1)
        gradients = dict(zip(start, values(give_gradients(weights, seed=1)), strict=True))
        opt.first_step()
    e = layerwise.operator(start, gradients, rho=0.1)
    assert_close(weights, [start[n] + e[n] for n in start], 1e-11)


@pytest.mark.parametrize("form", ["radius", "trust_ratio"])
def test_layerwise_forms_that_need_no_names_do_not_warn(form):
    w = Parameter(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = SAM([w], torch.optim.SGD, recipe=recipes.layerwise_sam(form=form), lr=0.1)
        w.grad = torch.ones(3)
        opt.first_step()


@every_backend
@pytest.mark.parametrize("form", ["operator", "radius", "trust_ratio"])
def test_layerwise_with_one_zero_gradient_leaves_that_tensor(form, backend):
    weights = {
        n: Parameter(torch.full((3,), 0.5, dtype=torch.float64)) for n in ("a.weight", "b.weight", "c.bias")
    }
    opt = SAM(
        weights.items(), torch.optim.SGD, recipe=recipes.layerwise_sam(form=form), backend=backend, lr=0.1
    )
    for name, w in weights.items():
        w.grad = torch.zeros_like(w) if name == "a.weight" else torch.ones_like(w)
    opt.first_step()
    assert torch.equal(weights["a.weight"], torch.full((3,), 0.5, dtype=torch.float64))
    assert all(bool((weights[n] > 0.5).all()) for n in ("b.weight", "c.bias"))


def test_trust_ratio_is_capped_at_twenty():
    w = Parameter(torch.tensor([100.0, 0.0], dtype=torch.float64))
    opt = SAM([w], torch.optim.SGD, recipe=recipes.layerwise_sam(rho=0.1, form="trust_ratio"), lr=0.1)
    w.grad = torch.tensor([0.0, 0.01], dtype=torch.float64)  # ||w|| / ||g|| = 10000
    opt.first_step()
    assert_close([w], [torch.tensor([100.0, 2.0], dtype=torch.float64)], 1e-12)


class OddlyNamed(torch.nn.Module):
    """Normalization layers whose parameters' names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.Sequential(
            torch.nn.Conv1d(2, 4, 1),
            torch.nn.BatchNorm1d(4),
            torch.nn.GroupNorm(2, 4),
            torch.nn.InstanceNorm1d(4, affine=True),
            torch.nn.LayerNorm(3),
            torch.nn.RMSNorm(3),
            torch.nn.Flatten(),
            torch.nn.Linear(12, 2),
        )

    def forward(self, x):
        return self.steps(x)


def test_nosam_selects_normalization_by_module_type_with_a_model():
    model = OddlyNamed()
    opt = SAM(model.parameters(), torch.optim.SGD, recipe=recipes.nosam(rho=0.05), model=model, lr=0.1)
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    give_gradients(list(model.parameters()), seed=3)
    opt.first_step()
    moved = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
    assert moved == {n for n, _ in model.named_parameters() if n.split(".")[1] in {"1", "2", "3", "4", "5"}}
    e = {name: w.detach() - before[name] for name, w in model.named_parameters()}
    assert oracle.total_norm(e) == pytest.approx(0.05, rel=1e-5)


def test_nosam_without_names_or_model_is_a_sentence():
    with pytest.raises((ValueError, RuntimeError), match="(?s)nosam.*model"):
        opt = SAM([Parameter(torch.ones(2))], torch.optim.SGD, recipe="nosam", lr=0.1)
        opt.param_groups[0]["params"][0].grad = torch.ones(2)
        opt.first_step()


def test_nosam_that_selects_nothing_is_a_sentence():
    w = Parameter(torch.ones(2))
    with pytest.raises((ValueError, RuntimeError), match="nosam.*none"):
        opt = SAM([("mlp.weight", w)], torch.optim.SGD, recipe="nosam", lr=0.1)
        w.grad = torch.ones(2)
        opt.first_step()
    assert torch.equal(w, torch.ones(2))


@every_backend
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("ssam")])  # see test_masks.py
def test_every_k_perturbs_on_steps_zero_k_and_two_k_only(name, backend):
    model = small_net()
    weights = list(model.parameters())
    opt = SAM(
        model.named_parameters(), torch.optim.SGD, recipe=recipes.get(name, every=3), backend=backend, lr=0.01
    )
    inputs = torch.ones(2, 5, dtype=torch.float64)
    calls = []
    for step in range(7):
        before = values(weights)
        probes = []

        def closure(step=step, probes=probes):
            probes.append(values(weights))
            return backward_of(model, inputs, step)()

        opt.step(closure)
        calls.append(len(probes))
        if step % 3:
            plain = values(weights)
            with torch.no_grad():
                for w, b in zip(weights, before, strict=True):
                    w.copy_(b)
            model.zero_grad()
            backward_of(model, inputs, step)()
            expected = [b - 0.01 * w.grad for b, w in zip(before, weights, strict=True)]
            with torch.no_grad():
                for w, p in zip(weights, plain, strict=True):
                    w.copy_(p)
            assert_close(plain, expected, 1e-13)
    assert calls == [2, 1, 1, 2, 1, 1, 2]


@every_backend
def test_every_k_in_the_two_step_form_does_not_move_weights_on_the_other_steps(backend):
    w = Parameter(torch.ones(3))
    opt = SAM([w], torch.optim.SGD, recipe=recipes.sam(every=2), backend=backend, lr=0.1)
    moved = []
    for _ in range(4):
        before = w.detach().clone()
        w.grad = torch.full((3,), 0.7)
        opt.first_step()
        moved.append(not torch.equal(w, before))
        w.grad = torch.full((3,), 0.5)
        opt.step()
        torch.testing.assert_close(w.detach(), before - 0.05)
    assert moved == [True, False, True, False]


STRINGS = {
    "Adaptive": lambda: policies.Adaptive(only="*weight*"),
    "LayerWise": lambda: policies.LayerWise(only="*weight*"),
    "ByModule": lambda: policies.ByModule(names="*weight*"),
    "ByName": lambda: policies.ByName("*weight*"),
    "asam": lambda: recipes.asam(only="*weight*"),
    "layerwise_sam": lambda: recipes.layerwise_sam(only="*weight*"),
}


@pytest.mark.parametrize("where", STRINGS)
def test_one_string_in_place_of_patterns_is_the_same_sentence_everywhere(where):
    with pytest.raises(ValueError, match=r"is the string '\*weight\*'; expected a tuple of patterns, \('"):
        STRINGS[where]()


@pytest.mark.parametrize("patterns", [3, (3,), {"*weight*"}], ids=str)
def test_patterns_that_are_no_strings_are_a_sentence(patterns):
    with pytest.raises(ValueError, match="expected a tuple of shell-style patterns"):
        policies.Adaptive(only=patterns)
