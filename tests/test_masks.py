"""Sparse SAM: which weights are perturbed, when that changes, and that nothing else does."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import THREE_TENSORS, row
from fixtures import (
    assert_close,
    awkward_parameters,
    backward_of,
    base_state,
    bits,
    every_backend,
    give_gradients,
    rounds_to_nearest,
    same_bits,
    small_net,
    squared_error,
    values,
)
from oracles import ssam
from test_state_dict import INPUTS, through_a_file
from test_vectors import agree
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import Parameter

from sam_kernels import SAM, Recipe, recipes
from sam_kernels.bitmask import count_words, pack
from sam_kernels.mask_updates import accumulate
from sam_kernels.policies import (
    Adaptive,
    Dynamic,
    Euclidean,
    Every,
    Given,
    LayerWise,
    Ranked,
    TopScores,
)

SGD, ADAMW, UNFUSED = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
BASES = {
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (ADAMW, {"lr": 0.01, "eps": 1e-3}),
    "unfused": (UNFUSED, {"lr": 0.01, "eps": 1e-3}),
}
every_base = pytest.mark.parametrize("base", BASES)


def make(params, recipe, backend="reference", **more) -> SAM:
    base, options = BASES["momentum"]
    if "base" in more:
        base, options = more.pop("base"), {}
    return SAM(params, base, recipe=recipe, backend=backend, **{**options, **more})


def two_step(opt: SAM, params, seed: int, between=None) -> list[Tensor]:
    """One step with random gradients; returns the perturbation."""
    give_gradients(params, seed)
    before = values(params)
    opt.first_step()
    e = [p.detach() - w for p, w in zip(params, before, strict=True)]
    give_gradients(params, seed + 100)
    opt.second_step()
    return e


def flat_mask(opt: SAM, params) -> np.ndarray:
    """The masks one after another, each in the order of its elements."""
    return np.concatenate([opt.masks[p].reshape(-1).numpy() for p in params])


def flat(tensors) -> np.ndarray:
    return np.concatenate([t.detach().double().reshape(-1).numpy() for t in tensors])


def four_parameters(dtype=torch.float32) -> list[Parameter]:
    """Contiguous, so that memory has the order of the elements; 305 of them."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(10, 20), (0,), (65,), (5, 2, 4)]
    return [Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def random_masks(params, seed=3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(p.shape, generator=generator) < 0.5 for p in params]


# ---- numbers worked out by hand ------------------------------------------------------------------------

PER_SAMPLE = [row(0.3, 0.2, -0.1, 0.05, -0.4, 0.25), row(0.1, -0.45, 0.35, 0.2, 0.15, -0.3)]


@every_backend
def test_ssam_f_on_three_tensors(backend):
    weights = THREE_TENSORS.parameters()
    params = list(weights.values())
    opt = SAM(weights.items(), SGD, recipe=recipes.ssam_f(rho=0.05, sparsity=0.5), backend=backend, lr=0.1)

    def loss_fn(slope: Tensor) -> Tensor:
        return torch.cat(params) @ slope

    scores = accumulate(opt._groups(), PER_SAMPLE, loss_fn, None, None)
    expected = row(0.1, 0.2425, 0.1325, 0.0425, 0.1825, 0.1525).float()
    torch.testing.assert_close(torch.cat([scores[p] for p in params]), expected, rtol=3e-7, atol=0)
    opt.update_masks(PER_SAMPLE, loss_fn)
    assert flat_mask(opt, params).astype(int).tolist() == [0, 1, 0, 0, 1, 1]
    assert opt.masks.counts().tolist() == [1, 1, 1]

    THREE_TENSORS.loss(weights).backward()
    opt.first_step(zero_grad=True)
    e = [w.detach() - start for w, start in zip(params, THREE_TENSORS.start.values(), strict=True)]
    agree(e, (0, 0.0169030822, 0, 0, -0.0253546234, 0.0338061645))
    assert float(torch.cat(e).norm()) == pytest.approx(0.0455129418, rel=2e-8)
    THREE_TENSORS.loss(weights).backward()
    agree([w.grad for w in params], (0.1, 0.233806164, -0.2, 0.1, -0.426773117, 0.602836987))
    opt.second_step(zero_grad=True)
    agree(params, (0.99, -2.02338062, 3.02, 0.49, -0.207322688, 1.4397163))


DROP_SCORES = (0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6, 0.05)
GROWTH_SCORES = (0.11, 0.22, 0.33, 0.44, 0.55, 0.66, 0.77, 0.15, 0.25, 0.35)


@every_backend
@pytest.mark.parametrize(("official_quirks", "live"), [(False, [0, 4, 5, 6, 9]), (True, [0, 4, 5, 6])])
def test_ssam_d_drops_and_grows(official_quirks, live, backend):
    w = Parameter(row(*GROWTH_SCORES))
    recipe = recipes.ssam_d(
        sparsity=0.5, drop_rate=0.5, every=1, growth="weight", official_quirks=official_quirks
    )
    opt = SAM([w], SGD, recipe=recipe, backend=backend, lr=0.1)
    first = torch.arange(10) < 5
    opt.update_masks(masks=[first])
    w.grad = row(*DROP_SCORES)
    before = w.detach().clone()
    opt.first_step()
    assert torch.equal(w != before, first)
    assert torch.equal(opt.masks[w], first)  # the new one is in force from the next step on
    opt.second_step()
    assert opt.masks[w].nonzero().flatten().tolist() == live
    new = ssam.evolve(
        first.numpy(), np.array(DROP_SCORES), np.array(GROWTH_SCORES), 5, 0.5, official=official_quirks
    )
    assert np.flatnonzero(new).tolist() == live


def test_drop_rates():
    policy = Dynamic(drop_rate=0.5, t_end=200)
    expected = {
        0: 0.5, 5: 0.499229333, 50: 0.426776695, 100: 0.25, 150: 0.073223305, 195: 0.000770667, 200: 0.0,
        900: 0.0,
    }  # fmt: skip
    for step, rate in expected.items():
        assert policy.drop_rate_at(step) == pytest.approx(rate, abs=5e-10)
        assert policy.drop_rate_at(step) == pytest.approx(ssam.drop_rate(0.5, step, 200), abs=1e-15)
    assert Dynamic(drop_rate=0.3).drop_rate_at(10**9) == 0.3


def test_counts_and_those_of_the_authors():
    assert [Ranked(s, official_quirks=True).live(n) for n, s in ((10, 0.9), (1000, 0.9), (1000, 0.8))] == [
        0, 99, 199,
    ]  # fmt: skip
    assert [Ranked(s).live(n) for n, s in ((10, 0.9), (1000, 0.9), (1000, 0.8))] == [1, 100, 200]
    assert [Dynamic(s, official_quirks=True).first(1000) for s in (0.9, 0.8)] == [100, 200]
    for sparsity, live in ((0.2, 0.6), (0.1, 0.55)):
        official = Dynamic(sparsity, drop_rate=0.5, official_quirks=True)
        assert official.kept(10**6, 0) + official.grown(10**6, 0) == pytest.approx(live * 10**6, abs=2)
        ours = Dynamic(sparsity, drop_rate=0.5)
        assert ours.kept(10**6, 0) + ours.grown(10**6, 0) == ours.live(10**6) == round((1 - sparsity) * 10**6)


# ---- masks from gradients ------------------------------------------------------------------------------


def per_sample_loss(model):
    return lambda x: (model(x) - 0.1).pow(2).mean(1)


def per_sample_squares(model, x: Tensor) -> dict[str, Tensor]:
    def loss(weights, one):
        return (functional_call(model, weights, (one.unsqueeze(0),)) - 0.1).pow(2).mean()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    return {name: g.square().sum(0) for name, g in gradients.items()}


@every_backend
@pytest.mark.parametrize("how", ["vector of losses", "single samples"])
def test_fisher_scores_are_sums_of_squares_sample_by_sample(how, backend):
    model = small_net()
    opt = make(model.named_parameters(), recipes.ssam_f(sparsity=0.6), backend)
    x = torch.cat(INPUTS[:3])
    batches = INPUTS[:3] if how == "vector of losses" else x.split(1)
    expected = per_sample_squares(model, x)
    loss_fn = per_sample_loss(model)
    if how == "single samples":
        loss_fn = lambda one: (model(one) - 0.1).pow(2).mean()  # noqa: E731
    scores = accumulate(opt._groups(), batches, loss_fn, None, None)
    assert_close([scores[p] for p in model.parameters()], expected.values(), 1e-6)
    opt.update_masks(batches, loss_fn)
    wanted = ssam.top(flat(scores[p] for p in model.parameters()), 32, exact=False)
    assert np.array_equal(flat_mask(opt, list(model.parameters())), wanted)
    assert int(opt.masks.count()) == 32


@every_backend
def test_a_loss_for_each_batch_gives_a_term_for_each_batch(backend):
    model = small_net()
    params = list(model.parameters())
    opt = make(params, recipes.ssam_f(), backend)
    scores = accumulate(opt._groups(), INPUTS[:4], lambda x: squared_error(model(x)), None, None)
    total = [torch.zeros_like(p) for p in params]
    for x in INPUTS[:4]:
        for part, g in zip(total, torch.autograd.grad(squared_error(model(x)), params), strict=True):
            part += g.square()
    assert_close([scores[p] for p in params], total, 1e-6)


@pytest.mark.parametrize("samples", [1, 4, 5, 11, 12, 50])
def test_samples_stop_the_sum_and_the_loader(samples):
    model = small_net()
    opt = make(model.named_parameters(), recipes.ssam_f())
    drawn = []

    def loader():
        for x in INPUTS[:3]:
            drawn.append(x)
            yield x

    scores = accumulate(opt._groups(), loader(), per_sample_loss(model), samples, None)
    taken = min(samples, 12)
    assert len(drawn) == -(-taken // 4)
    expected = per_sample_squares(model, torch.cat(INPUTS[:3])[:taken])
    assert_close([scores[p] for p in model.parameters()], expected.values(), 1e-6)


class WithBatchNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)
        self.other = Parameter(torch.ones(4))  # of another optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)) * self.other


@every_backend
@pytest.mark.parametrize("fails", [False, True])
def test_an_update_leaves_gradients_and_statistics_alone_and_is_not_changed_by_them(fails, backend):
    model = WithBatchNorm().double()
    named = [(name, p) for name, p in model.named_parameters() if name != "other"]
    params = [p for _, p in named]
    model.other.grad = torch.ones(4, dtype=torch.float64)

    def loss_fn(x):
        if fails and x is INPUTS[2]:
            raise OSError("no more data")
        return model(x).tanh().sum()

    opt = make(named, recipes.ssam_f(), backend, model=model)
    masks = []
    for seed in (1, 2, None):
        for p in params:
            p.grad = None
        if seed is not None:
            give_gradients(params, seed, scale=1e4)
        if seed == 2:
            params[0].grad = None
        objects, gradients = (
            [p.grad for p in params],
            [None if p.grad is None else p.grad.clone() for p in params],
        )
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        if fails:
            with pytest.raises(OSError, match="no more data"):
                opt.update_masks(INPUTS[:4], loss_fn)
        else:
            opt.update_masks(INPUTS[:4], loss_fn)
        assert all(p.grad is g for p, g in zip(params, objects, strict=True))
        assert all(g is None or torch.equal(g, o) for g, o in zip(gradients, objects, strict=True))
        assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
        assert model.training
        masks.append(flat_mask(opt, params))
    assert all(np.array_equal(m, masks[0]) for m in masks)
    assert masks[0].all() == fails  # no update that failed has any effect
    assert torch.equal(model.other.grad, torch.ones(4))


def test_parameters_that_a_loss_does_not_reach_score_zero():
    a, b = Parameter(torch.ones(4)), Parameter(torch.ones(3))
    frozen = Parameter(torch.ones(2), requires_grad=False)
    opt = make([a, b, frozen], recipes.ssam_f(sparsity=5 / 9))
    opt.update_masks([torch.arange(1.0, 5)], lambda x: (a * x).sum())
    assert [opt.masks[p].tolist() for p in (a, b, frozen)] == [[True] * 4, [False] * 3, [False] * 2]


# ---- masks from the user -------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("form", ["names", "parameters", "list", "function", "tuple"])
@pytest.mark.parametrize("what", ["scores", "masks"])
def test_every_form_of_scores_and_masks(what, form, backend):
    model = small_net()
    params = dict(model.named_parameters())
    opt = make(params.items(), recipes.ssam_f(sparsity=0.7), backend)
    if what == "scores":
        own = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in params.items()}
        expected = ssam.top(flat(own.values()), 24, exact=False)
    else:
        own = dict(zip(params, random_masks(params.values()), strict=True))
        expected = flat(own.values()).astype(bool)
    given = {
        "names": own,
        "parameters": {params[name]: x for name, x in own.items()},
        "list": list(own.values()),
        "tuple": tuple(own.values()),
        "function": lambda p: next(own[name] for name, q in params.items() if q is p),
    }[form]
    opt.update_masks(**{what: given})
    assert np.array_equal(flat_mask(opt, list(params.values())), expected)
    assert int(opt.masks.count()) == expected.sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_any_floating_point_type_and_layout(dtype):
    params = awkward_parameters()
    opt = make(params, recipes.ssam_f(sparsity=0.5))
    scores = [torch.randn(p.shape).to(dtype) for p in params]
    opt.update_masks(scores=scores)
    total = sum(p.numel() for p in params)
    expected = ssam.top(flat(scores), total - round(total * 0.5), exact=False)
    assert np.array_equal(flat_mask(opt, params), expected)


@every_backend
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_counts_in_force(sparsity, backend):
    params = four_parameters()
    scores = [torch.ones_like(p) for p in params]
    ours = 305 - round(305 * sparsity)
    for options, live in (
        ({"exact": True}, ours),
        ({"exact": False}, 305),  # all of them rank as high as the last one kept
        ({"exact": True, "official_quirks": True}, int(305 * (1 - sparsity))),
    ):
        opt = make(params, recipes.ssam_f(sparsity=sparsity, **options), backend)
        opt.update_masks(scores=scores)
        assert int(opt.masks.count()) == live
        assert flat_mask(opt, params)[:live].all()


def test_a_dict_may_leave_parameters_out_and_they_keep_what_they_have():
    model = small_net()
    params = dict(model.named_parameters())
    opt = make(params.items(), recipes.ssam_f(sparsity=0.5))
    mask = torch.rand(7, 5) < 0.5
    opt.update_masks(masks={"fc1.weight": mask})
    assert torch.equal(opt.masks[params["fc1.weight"]], mask)
    assert opt.masks[params["fc2.weight"]].all()
    opt.update_masks(scores={"fc2.weight": torch.randn(3, 7), "fc1.bias": torch.randn(7)})
    assert torch.equal(opt.masks[params["fc1.weight"]], mask)
    assert int(opt.masks[params["fc2.weight"]].sum() + opt.masks[params["fc1.bias"]].sum()) == 14
    assert opt.masks[params["fc2.bias"]].all()
    opt.update_masks(masks={"fc1.weight": None})
    assert opt.masks[params["fc1.weight"]].all()
    assert opt.masks.words(params["fc1.weight"]) is None
    opt.update_masks(scores={})
    opt.update_masks(masks={})
    assert int(opt.masks[params["fc2.weight"]].sum() + opt.masks[params["fc1.bias"]].sum()) == 14


def test_masks_are_copies():
    w = Parameter(torch.ones(3))
    opt = make([w], recipes.ssam_f())
    mask = torch.tensor([True, False, True])
    opt.update_masks(masks=[mask])
    mask.zero_()
    read = opt.masks[w]
    read.zero_()
    assert opt.masks[w].tolist() == [True, False, True]


@every_backend
def test_given_masks_by_name(backend):
    model = small_net()
    params = dict(model.named_parameters())
    mask = torch.rand(7, 5) < 0.5
    recipe = Recipe(mask=Given({"fc1.weight": mask, "fc2.bias": torch.zeros(3, dtype=torch.bool)}))
    opt = make(params.items(), recipe, backend)
    for seed in (1, 2):
        e = dict(zip(params, two_step(opt, list(params.values()), seed), strict=True))
        assert torch.equal(e["fc1.weight"] != 0, mask)
        assert (e["fc2.bias"] == 0).all()
        assert (e["fc2.weight"] != 0).all()


@every_backend
@pytest.mark.parametrize("every", [None, 1, 3])
def test_given_functions_are_asked_when_due(every, backend):
    model = small_net()
    params = dict(model.named_parameters())
    asked = []

    def choose(member, param):
        asked.append(member.name)
        assert params[member.name] is param
        if "norm" in member.name:
            return None
        return torch.full(param.shape, len(asked) > 6)

    opt = make(params.items(), Recipe(mask=Given(choose, every=every)), backend)
    for step in range(7):
        asked.clear()
        two_step(opt, list(params.values()), seed=step)
        due = step == 0 or (every is not None and step % every == 0)
        assert asked == (list(params) if due else []), step
    assert opt.masks[params["norm1.weight"]].all()
    assert not opt.masks[params["fc1.bias"]].any()


# ---- misuse --------------------------------------------------------------------------------------------


def two_vectors(recipe, **more) -> tuple[list[tuple[str, Parameter]], SAM]:
    named = [("a", Parameter(torch.ones(3))), ("b", Parameter(torch.ones(2, 2)))]
    return named, make(named, recipe, **more)


def constant(x):
    return x.sum() * 0


MISUSE = {
    "no source": ({}, TypeError, "expected one of"),
    "two sources": ({"scores": [1], "masks": [1]}, TypeError, "expected one of"),
    "batches and scores": (
        {"batches": [1], "loss_fn": constant, "scores": [1]}, TypeError, "expected one of",
    ),
    "no loss_fn": ({"batches": [1]}, TypeError, "loss_fn belong together"),
    "no batches": ({"loss_fn": constant}, TypeError, "loss_fn belong together"),
    "shape of scores": (
        {"scores": {"a": torch.ones(4)}}, ValueError, r"scores of a are torch.float32 \(4,\).*\(3,\)",
    ),
    "transposed": ({"scores": {"b": torch.ones(2, 2, 1)}}, ValueError, r"scores of b.*\(2, 2\)"),
    "integer scores": ({"scores": {"a": torch.ones(3).int()}}, ValueError, "scores of a are torch.int32"),
    "scores that are no tensors": ({"scores": {"a": [1.0, 2.0, 3.0]}}, ValueError, r"scores of a are \[1.0"),
    "function of scores": ({"scores": lambda p: torch.ones(3)}, ValueError, r"scores of b.*\(2, 2\)"),
    "shape of masks": (
        {"masks": {"a": torch.ones(4).bool()}}, ValueError, r"mask of a is torch.bool \(4,\).*\(3,\)",
    ),
    "float masks": ({"masks": {"a": torch.ones(3)}}, ValueError, "mask of a is torch.float32.*torch.bool"),
    "masks that are no tensors": ({"masks": {"a": True}}, ValueError, "mask of a is True"),
    "unknown name": ({"scores": {"c.weight": torch.ones(3)}}, ValueError, "'c.weight'.*no parameter"),
    "unknown parameter": (
        {"masks": {Parameter(torch.ones(3)): torch.ones(3).bool()}}, ValueError, "a Parameter.*no parameter",
    ),
    "a number for a parameter": ({"scores": {0: torch.ones(3)}}, ValueError, "no parameter"),
    "list too short": ({"masks": [torch.ones(3).bool()]}, ValueError, "1 entries; expected 2"),
    "list too long": ({"scores": [torch.ones(3)] * 3}, ValueError, "3 entries; expected 2"),
    "no batch": ({"batches": [], "loss_fn": constant}, ValueError, "no batches"),
    "matrix of losses": (
        {"batches": [torch.ones(2, 2)], "loss_fn": lambda x: x}, ValueError, r"returned \(2, 2\).*one loss",
    ),
    "no samples": (
        {"batches": [torch.ones(3)], "loss_fn": constant, "samples": 0}, ValueError, "samples is 0",
    ),
    "less than no samples": (
        {"batches": [torch.ones(3)], "loss_fn": lambda x: x, "samples": -1}, ValueError, "samples is -1",
    ),
    "half a sample": (
        {"batches": [torch.ones(3)], "loss_fn": lambda x: x, "samples": 1.5}, ValueError, "samples is 1.5",
    ),
    "loss that is a number": (
        {"batches": [torch.ones(2)], "loss_fn": lambda x: 0.5}, ValueError, "returned 0.5.*one loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_a_sentence_and_changes_nothing(case):
    arguments, error, message = MISUSE[case]
    named, opt = two_vectors(recipes.ssam_f())
    params = [p for _, p in named]
    opt.update_masks(masks=random_masks(params))
    before, gradients = flat_mask(opt, params), give_gradients(params, 4)
    with pytest.raises(error, match=rf"(?s){message}"):
        opt.update_masks(**arguments)
    assert np.array_equal(flat_mask(opt, params), before)
    assert all(p.grad is g for p, g in zip(params, gradients, strict=True))


def test_dense_recipes_have_no_masks():
    _, opt = two_vectors(recipes.sam())
    with pytest.raises(TypeError, match="recipe 'sam' perturbs parameters as a whole.*ssam_f"):
        _ = opt.masks
    with pytest.raises(TypeError, match=r"update_masks\(\): recipe 'sam'"):
        opt.update_masks(scores=[torch.ones(3), torch.ones(2, 2)])
    assert not opt.masks_are_due


@pytest.mark.parametrize("recipe", [recipes.ssam_d(), Recipe(mask=Given({}))], ids=["dynamic", "given"])
def test_recipes_that_do_not_rank_scores_say_so(recipe):
    _, opt = two_vectors(recipe)
    for source in ({"scores": [torch.ones(3), torch.ones(2, 2)]}, {"batches": [1], "loss_fn": constant}):
        with pytest.raises(TypeError, match="does not rank scores.*masks="):
            opt.update_masks(**source)
    opt.update_masks(masks=[torch.ones(3).bool(), None])
    assert not opt.masks_are_due


def test_between_the_halves_of_a_step_masks_stay():
    named, opt = two_vectors(recipes.ssam_f())
    params = [p for _, p in named]
    give_gradients(params, 1)
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"update_masks\(\).*perturbed"):
        opt.update_masks(masks=random_masks(params))
    assert flat_mask(opt, params).all()  # reading is allowed
    opt.second_step()
    give_gradients(params, 1)
    with opt.perturbed():
        give_gradients(params, 2)
    with pytest.raises(RuntimeError, match=r"update_masks\(\).*pending"):
        opt.update_masks(masks=random_masks(params))
    opt.step()
    opt.update_masks(masks=random_masks(params))


def test_given_masks_that_do_not_fit():
    named, opt = two_vectors(Recipe(mask=Given({"a": torch.ones(4).bool()})))
    params = [p for _, p in named]
    give_gradients(params, 1)
    before = values(params)
    with pytest.raises(ValueError, match=r"mask of a is torch.bool \(4,\); expected torch.bool \(3,\)"):
        opt.first_step()
    assert same_bits(params, before)
    with pytest.raises(ValueError, match="names are unknown"):
        make(params, Recipe(mask=Given({"a": torch.ones(3).bool()})))


WRONG = [
    (lambda: recipes.ssam_f(sparsity=1.0), "sparsity is 1.0"),
    (lambda: recipes.ssam_f(sparsity=-0.1), "sparsity is -0.1"),
    (lambda: recipes.ssam_f(sparsity=math.nan), "sparsity is nan"),
    (lambda: recipes.ssam_f(sparsity="half"), "sparsity is 'half'"),
    (lambda: recipes.ssam_f(every=0), "every is 0"),
    (lambda: recipes.ssam_d(every=2.5), "every is 2.5"),
    (lambda: recipes.ssam_f(pattern="2:4"), "pattern is '2:4'.*unstructured, nm, structured"),
    (lambda: recipes.ssam_f(pattern="nm", n=4, m=4), "n is 4 and m is 4"),
    (lambda: recipes.ssam_f(pattern="nm", n=0), "n is 0"),
    (lambda: recipes.ssam_f(scope="layer"), "scope is 'layer'"),
    (lambda: recipes.ssam_f(scope="tensor", pattern="nm"), "scope='tensor' goes with"),
    (lambda: recipes.ssam_f(norm="sparse"), "norm is 'sparse'"),
    (lambda: recipes.ssam_d(drop_rate=1.1), "drop_rate is 1.1"),
    (lambda: recipes.ssam_d(drop="weights"), "drop is 'weights'"),
    (lambda: recipes.ssam_d(growth="fisher"), "growth is 'fisher'"),
    (lambda: recipes.ssam_d(t_end=0), "t_end is 0"),
    (lambda: recipes.ssam_d(seed=-1), "seed is -1"),
    (lambda: recipes.ssam_d(seed=1 << 63), "seed is"),
    (lambda: recipes.ssam_d(rho=-1.0), "rho"),
    (lambda: Given([True]), r"masks is \[True\]"),
    (lambda: Given({}, every=0), "every is 0"),
]


@pytest.mark.parametrize(("make_wrong", "message"), WRONG, ids=[m[:24] for _, m in WRONG])
def test_impossible_arguments_are_a_sentence(make_wrong, message):
    with pytest.raises(ValueError, match=message):
        make_wrong()


# ---- steps ---------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("recipe", [recipes.ssam_f(rho=0.3), Recipe(mask=TopScores(), rho=0.3)])
def test_before_the_first_update_every_weight_is_perturbed(recipe, backend):
    params, plain = four_parameters(), four_parameters()
    opt, other = make(params, recipe, backend), make(plain, recipes.sam(rho=0.3), backend)
    e, expected = two_step(opt, params, 1), two_step(other, plain, 1)
    assert all((x != 0).all() for x in e)
    assert_close(e, expected, 1e-6)
    assert int(opt.masks.count()) == 305


@every_backend
@pytest.mark.parametrize("norm", ["full", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_norm_is_that_of_the_whole_gradient_unless_asked(dtype, norm, backend):
    params = four_parameters(dtype)
    opt = make(params, recipes.ssam_f(rho=0.3, norm=norm), backend)
    masks = random_masks(params)
    opt.update_masks(masks=masks)
    names = [str(i) for i in range(4)]
    gradients = dict(zip(names, values(give_gradients(params, 1)), strict=True))
    expected = ssam.perturbation({}, gradients, rho=0.3, mask=dict(zip(names, masks, strict=True)), norm=norm)
    e = two_step(opt, params, 1)
    # float32 weights of order 1 round the perturbation, of order 0.02
    assert_close(e, expected.values(), 1e-12 if dtype == torch.float64 else 2e-5)
    size = np.linalg.norm(flat(e))
    if norm == "masked":
        assert size == pytest.approx(0.3, rel=1e-5)
    else:
        whole = np.linalg.norm(flat(gradients.values()))
        part = np.linalg.norm(flat(gradients.values()) * flat_mask(opt, params))
        assert size == pytest.approx(0.3 * part / whole, rel=1e-5)
        assert size < 0.25


@every_backend
def test_every_is_the_period_of_the_masks(backend):
    params = four_parameters()
    opt = make(params, recipes.ssam_f(every=3), backend)
    due = []
    for seed in range(7):
        due.append(opt.masks_are_due)
        assert opt.is_due
        e = two_step(opt, params, seed)
        assert any((x != 0).any() for x in e)
    assert due == [True, False, False, True, False, False, True]


# ---- dynamic masks -------------------------------------------------------------------------------------


def follow_dynamic(recipe, backend, steps: int, dtype=torch.float32):
    """Train on random gradients; yield step, gradient, weights, the mask before and the one after."""
    params = four_parameters(dtype)
    opt = make(params, recipe, backend)
    for step in range(steps):
        give_gradients(params, step)
        g, w = flat([p.grad for p in params]), flat(params)
        opt.first_step()
        moved = flat(params) != w
        before = flat_mask(opt, params)
        assert np.array_equal(moved, before)
        give_gradients(params, step + 100)
        opt.second_step()
        yield step, g, w, before, flat_mask(opt, params)


@every_backend
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("t_end", [None, 6])
def test_the_number_of_live_weights_never_changes(sparsity, t_end, backend):
    recipe = recipes.ssam_d(sparsity=sparsity, drop_rate=0.5, every=1, t_end=t_end)
    seen = set()
    for step, _, _, before, after in follow_dynamic(recipe, backend, 8):
        assert before.sum() == after.sum() == 305 - round(305 * sparsity)
        changed = (before != after).any()
        assert changed == (0 < sparsity and not (t_end and step >= t_end))
        seen.add(after.tobytes())
    assert len(seen) > 5 or sparsity == 0 or t_end


CRITERIA = ["random", "gradient", "weight"]


@every_backend
@pytest.mark.parametrize("drop", CRITERIA)
@pytest.mark.parametrize("growth", CRITERIA)
def test_masks_follow_the_oracle(growth, drop, backend):
    recipe = recipes.ssam_d(
        sparsity=0.6, drop_rate=0.5, every=2, t_end=10, growth=growth, drop=drop, seed=(7 << 40) + 5
    )
    sizes = [p.numel() for p in four_parameters()]
    names = {str(i): p for i, p in enumerate(four_parameters())}
    first = flat(ssam.first_mask(names, 0.6, (7 << 40) + 5).values()).astype(bool)
    for step, g, w, before, after in follow_dynamic(recipe, backend, 7):
        if step == 0:
            assert np.array_equal(before, first)
        if step % 2:
            assert np.array_equal(before, after)
            continue
        scores = [
            {
                "gradient": g,
                "weight": w,
                "random": ssam.random_scores(sizes, (7 << 40) + 5, 2 * step + outside),
            }[criterion]
            for outside, criterion in enumerate((drop, growth))
        ]
        expected = ssam.evolve(before, *scores, live=122, rate=ssam.drop_rate(0.5, step, 10))
        assert np.array_equal(after, expected), step


@every_backend
@rounds_to_nearest
def test_masks_of_several_dtypes_follow_the_oracle(backend):
    params = four_parameters()
    for i, dtype in ((0, torch.float64), (3, torch.bfloat16)):
        params[i] = Parameter(params[i].detach().to(dtype))
    sizes = [p.numel() for p in params]
    opt = make(params, recipes.ssam_d(sparsity=0.6, every=1, seed=9), backend)
    for step in range(4):
        give_gradients(params, step)
        # Far enough apart to differ in a half type: the order of equal ones is not what is tested here.
        params[3].grad.copy_(torch.logspace(-3, 1, 40, base=2).view(5, 2, 4))
        g = flat([p.grad.float() for p in params])
        opt.first_step()
        before = flat_mask(opt, params)
        opt.second_step()
        random = ssam.random_scores(sizes, 9, 2 * step + 1)
        assert np.array_equal(flat_mask(opt, params), ssam.evolve(before, g, random, live=122, rate=0.5))


@every_backend
def test_dropped_are_the_flattest(backend):
    recipe = recipes.ssam_d(sparsity=0.5, drop_rate=0.3, every=1)
    for _, g, _, before, after in follow_dynamic(recipe, backend, 3):
        dropped, stayed = before & ~after, before & after
        assert dropped.sum() == 153 - int(153 * 0.7)
        assert np.abs(g[dropped]).max() < np.abs(g[stayed]).min()


def test_ties_are_settled_so_that_the_count_is_exact():
    params = four_parameters()
    opt = make(params, recipes.ssam_d(every=1, growth="gradient"))
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.first_step()
        opt.second_step()
        assert int(opt.masks.count()) == 153


@every_backend
def test_random_masks_are_the_same_for_every_number_of_threads(backend):
    before = torch.get_num_threads()
    masks = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(number)  # torch's own generator has no part in it
            w = Parameter(torch.ones(33_001))
            opt = SAM([w], SGD, recipe=recipes.ssam_d(every=1, seed=4), backend=backend, lr=0.1)
            w.grad = torch.linspace(1, 2, 33_001)
            opt.first_step()
            opt.second_step()
            masks.append(opt.masks.words(w).clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*masks)


@every_backend
def test_random_masks_depend_on_the_seed(backend):
    masks = []
    for seed in (0, 1, 0, 1 << 40):
        params = four_parameters()
        opt = make(params, recipes.ssam_d(every=1, seed=seed), backend)
        two_step(opt, params, 1)
        masks.append(flat_mask(opt, params).tobytes())
    assert masks[0] == masks[2]
    assert len(set(masks)) == 3


@every_backend
@every_base
def test_steps_that_are_skipped_change_no_mask(base, backend):
    params = four_parameters()
    kind, options = BASES[base]
    opt = make(params, recipes.ssam_d(every=1), backend, base=kind, **options)
    two_step(opt, params, 1)
    mask, before, state = flat_mask(opt, params), values(params), base_state(opt)
    for value in (math.nan, math.inf):
        give_gradients(params, 2)
        params[2].grad[3] = value
        opt.first_step()
        assert same_bits(params, before)
        opt.second_step()
        assert same_bits(params, before)
        assert same_bits(base_state(opt), state)
        assert np.array_equal(flat_mask(opt, params), mask)
    two_step(opt, params, 3)
    assert not np.array_equal(flat_mask(opt, params), mask)


def test_steps_without_gradients_change_no_mask():
    params = four_parameters()
    opt = make(params, recipes.ssam_d(every=1))
    two_step(opt, params, 1)
    mask = flat_mask(opt, params)
    opt.zero_grad()
    opt.first_step()
    opt.second_step()
    assert np.array_equal(flat_mask(opt, params), mask)


def test_steps_that_are_given_up_change_no_mask():
    params = four_parameters()
    opt = make(params, recipes.ssam_d(every=1))
    two_step(opt, params, 1)
    mask, before = flat_mask(opt, params), values(params)
    give_gradients(params, 2)
    opt.first_step(zero_grad=True)
    give_gradients(params, 3)
    opt.zero_grad()  # as where a GradScaler has found infinities
    opt.step()
    assert same_bits(params, before)
    assert np.array_equal(flat_mask(opt, params), mask)


@every_backend
@every_base
@pytest.mark.parametrize("form", ["closure", "perturbed", "update"])
def test_a_step_that_raises_leaves_masks_and_weights(form, base, backend, monkeypatch):
    model = small_net()
    params = list(model.parameters())
    kind, options = BASES[base]
    opt = SAM(params, kind, recipe=recipes.ssam_d(every=1), backend=backend, **options)
    opt.step(backward_of(model, INPUTS[0]))
    mask, before = flat_mask(opt, params), values(params)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2 and form != "update":
            raise OSError("lost")
        return backward_of(model, INPUTS[1])()

    with monkeypatch.context() as patch, pytest.raises(OSError, match="lost"):
        if form == "perturbed":
            opt.zero_grad()
            closure()
            with opt.perturbed():
                closure()
        else:
            if form == "update":

                def fail(*_, **__):
                    raise OSError("lost")

                patch.setattr(type(opt._served[0][1]), "descend_", fail)
                patch.setattr(opt.base_optimizer, "step", fail)
            opt.step(closure)
    assert same_bits(params, before)
    assert np.array_equal(flat_mask(opt, params), mask)
    calls[:] = [1, 1]
    other = small_net()
    twin = SAM(other.parameters(), kind, recipe=recipes.ssam_d(every=1), backend=backend, **options)
    twin.step(backward_of(other, INPUTS[0]))
    opt.step(closure)
    twin.step(backward_of(other, INPUTS[1]))
    assert same_bits(params, other.parameters())
    assert np.array_equal(flat_mask(opt, params), flat_mask(twin, list(other.parameters())))


def test_a_step_that_raised_leaves_no_mask_for_the_next():
    params = four_parameters()
    opt = make(params, recipes.ssam_d(every=1))
    two_step(opt, params, 1)
    mask = flat_mask(opt, params)
    give_gradients(params, 2)
    with pytest.raises(OSError, match="lost"), opt.perturbed():
        raise OSError("lost")
    give_gradients(params, 3)
    params[0].grad[0, 0] = math.nan  # a step that makes no mask of its own
    opt.first_step()
    opt.second_step()
    assert np.array_equal(flat_mask(opt, params), mask)


@every_backend
def test_closures_and_two_step_form_have_the_same_masks(backend):
    model, other = small_net(), small_net()
    opt, twin = (make(m.parameters(), recipes.ssam_d(every=2), backend) for m in (model, other))
    for step in range(5):
        opt.step(backward_of(model, INPUTS[step], step))
        twin.zero_grad()
        backward_of(other, INPUTS[step], step)()
        twin.first_step(zero_grad=True)
        backward_of(other, INPUTS[step], step)()
        twin.second_step()
        assert same_bits(model.parameters(), other.parameters())
        assert np.array_equal(
            flat_mask(opt, list(model.parameters())), flat_mask(twin, list(other.parameters()))
        )


@every_backend
def test_a_gradient_that_is_missing_counts_as_zero(backend):
    a, b = Parameter(torch.ones(50)), Parameter(torch.ones(50))
    opt = make([a, b], recipes.ssam_d(sparsity=0.5, drop_rate=0.4, every=1), backend)
    opt.update_masks(masks=[torch.arange(50) < 25, torch.arange(50) < 25])
    a.grad = torch.linspace(1, 2, 50)
    opt.first_step()
    a.grad = torch.ones(50)
    opt.second_step()
    assert int(opt.masks.count()) == 50
    assert opt.masks[a][:25].all()  # 30 stay: the 25 with a gradient, and of the others the first
    assert opt.masks[b][:5].all()


# ---- checkpoints and copies ----------------------------------------------------------------------------

RECIPES = {
    "ssam_f": lambda: recipes.ssam_f(sparsity=0.7, every=4),
    "ssam_d": lambda: recipes.ssam_d(sparsity=0.3, every=4, t_end=9),
    "given": lambda: Recipe(mask=Given(half_of, every=4), name="given"),
}


def half_of(member, param):
    return torch.arange(param.numel()).view(param.shape) % 2 == 0


def train(opt: SAM, model, steps) -> None:
    for step in steps:
        if opt.masks_are_due:
            opt.update_masks(INPUTS[step : step + 1], per_sample_loss(model))
        opt.step(backward_of(model, INPUTS[step], step))


@every_backend
@every_base
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stop", [1, 2, 4, 5])
def test_a_run_resumed_within_a_mask_s_period_is_the_uninterrupted_one(stop, recipe, base, backend):
    kind, options = BASES[base]

    def fresh():
        model = small_net()
        named = model.named_parameters()
        return model, SAM(named, kind, recipe=RECIPES[recipe](), backend=backend, **options)

    model, opt = fresh()
    train(opt, model, range(stop))
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    train(opt, model, range(stop, 8))
    other, resumed = fresh()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    resumed.load_state_dict(saved["opt"])  # twice is once
    train(resumed, other, range(stop, 8))
    assert same_bits(model.parameters(), other.parameters())
    assert same_bits(base_state(opt), base_state(resumed))
    masks = [flat_mask(o, list(m.parameters())) for o, m in ((opt, model), (resumed, other))]
    assert np.array_equal(*masks)


@pytest.mark.parametrize("recipe", ["ssam_f", "ssam_d"])
def test_checkpoints_hold_packed_masks(recipe):
    params = awkward_parameters()
    opt = make(params, RECIPES[recipe]())
    opt.update_masks(masks=random_masks(params))
    state = through_a_file(opt.state_dict())["state"]
    for number, p in enumerate(params):
        words = state[number]["sam_mask"]
        assert words.dtype == torch.int64
        assert words.shape == (count_words(p.numel()),)
        assert torch.equal(words, pack(opt.masks[p].contiguous()))
    assert not any("sam_mask" in slots for slots in opt.base_optimizer.state.values())
    other = awkward_parameters()
    twin = make(other, RECIPES[recipe]())
    twin.load_state_dict(through_a_file(opt.state_dict()))
    assert np.array_equal(flat_mask(opt, params), flat_mask(twin, other))
    assert same_bits(two_step(opt, params, 1), two_step(twin, other, 1))


def test_loading_does_not_alias_and_saving_is_a_snapshot_for_copies():
    model = small_net()
    opt = make(model.parameters(), recipes.ssam_d(every=1))
    train(opt, model, range(2))
    saved = copy.deepcopy(opt.state_dict())
    other = small_net()
    twin = make(other.parameters(), recipes.ssam_d(every=1))
    twin.load_state_dict(saved)
    mask = flat_mask(twin, list(other.parameters()))
    train(opt, model, range(2, 4))
    assert np.array_equal(flat_mask(twin, list(other.parameters())), mask)
    train(twin, other, range(2, 4))
    again = small_net()
    third = make(again.parameters(), recipes.ssam_d(every=1))
    third.load_state_dict(saved)
    assert np.array_equal(flat_mask(third, list(again.parameters())), mask)


@every_base
@pytest.mark.parametrize("recipe", ["ssam_f", "ssam_d"])
def test_checkpoints_of_and_for_the_bare_base(recipe, base):
    kind, options = BASES[base]
    model = small_net()
    opt = SAM(model.parameters(), kind, rho=0.0, recipe=RECIPES[recipe](), backend="reference", **options)
    train(opt, model, range(2))
    assert 0 < int(opt.masks.count()) < 80
    other = small_net()
    other.load_state_dict(model.state_dict())
    plain = kind(other.parameters(), **options)
    plain.load_state_dict(through_a_file(opt.state_dict()))
    for step in range(2, 4):
        opt.step(backward_of(model, INPUTS[step], step))
        plain.zero_grad()
        backward_of(other, INPUTS[step], step)()
        plain.step()
    assert_close(model.parameters(), other.parameters(), 1e-13)

    bare = kind(small_net().parameters(), **options)
    third = small_net()
    back = SAM(third.parameters(), kind, recipe=RECIPES[recipe](), backend="reference", **options)
    train(back, third, range(2))
    back.load_state_dict(through_a_file(bare.state_dict()))
    # A checkpoint without masks: as at the beginning of training.
    assert all(back.masks.words(p) is None for p in third.parameters())
    fourth = small_net()
    fourth.load_state_dict(third.state_dict())
    begun = SAM(fourth.parameters(), kind, recipe=RECIPES[recipe](), backend="reference", **options)
    give_gradients(list(third.parameters()), 1)
    give_gradients(list(fourth.parameters()), 1)
    back.first_step()
    begun.first_step()
    assert same_bits(third.parameters(), fourth.parameters())


def test_a_checkpoint_that_went_through_the_bare_base_still_loads():
    kind, options = BASES["adamw"]
    model = small_net(torch.float32)
    opt = SAM(model.parameters(), kind, recipe=recipes.ssam_d(), backend="reference", **options)
    train_float(opt, model, 2)
    plain = kind(small_net(torch.float32).parameters(), **options)
    plain.load_state_dict(through_a_file(opt.state_dict()))
    again = through_a_file(plain.state_dict())
    with pytest.raises(ValueError, match="sam_mask|mask"):
        opt.load_state_dict(again)  # torch has cast the bits to the weights' dtype: they are lost


def train_float(opt, model, steps):
    for step in range(steps):
        opt.step(backward_of(model, INPUTS[step].float(), step))


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, dtype=torch.int64), torch.zeros(1), [1, 2], torch.zeros(1, 1, dtype=torch.int64)]
)
def test_a_mask_that_does_not_fit_is_refused_and_nothing_is_loaded(bad):
    model = small_net()
    opt = make(model.parameters(), recipes.ssam_d(every=1))
    train(opt, model, range(2))
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1]["sam_mask"] = bad
    saved["state"][0]["momentum_buffer"].fill_(9.0)
    saved["param_groups"][0]["lr"] = 7.0
    train(opt, model, range(2, 3))
    mask, state = flat_mask(opt, list(model.parameters())), base_state(opt)
    with pytest.raises(ValueError, match=r"mask of a parameter of shape \(7,\).*expected torch.int64"):
        opt.load_state_dict(saved)
    assert np.array_equal(flat_mask(opt, list(model.parameters())), mask)
    assert same_bits(base_state(opt), state)
    assert opt.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_as_the_original(how, recipe):
    model = small_net()
    opt = make(model.named_parameters(), RECIPES[recipe]())
    train(opt, model, range(3))
    if how == "deepcopy":
        other, twin = copy.deepcopy((model, opt))
    elif how == "pickle":
        other, twin = pickle.loads(pickle.dumps((model, opt)))
    else:
        other, twin = copy.deepcopy((model, opt))
        twin.load_state_dict(through_a_file(opt.state_dict()))
    mask = flat_mask(opt, list(model.parameters()))
    assert np.array_equal(flat_mask(twin, list(other.parameters())), mask)
    train(twin, other, range(3, 7))
    assert np.array_equal(flat_mask(opt, list(model.parameters())), mask)  # they share nothing
    train(opt, model, range(3, 7))
    assert same_bits(model.parameters(), other.parameters())
    assert np.array_equal(flat_mask(twin, list(other.parameters())), flat_mask(opt, list(model.parameters())))


@every_backend
@pytest.mark.parametrize("recipe", ["ssam_f", "ssam_d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parameters_that_join_later(dtype, recipe, backend):
    first = four_parameters()
    opt = make(first, {"ssam_f": recipes.ssam_f(), "ssam_d": recipes.ssam_d()}[recipe], backend)
    opt.update_masks(masks=random_masks(first))
    two_step(opt, first, 1)
    mask = flat_mask(opt, first)
    late = [Parameter(torch.ones(90, dtype=dtype)), Parameter(torch.ones(3, 10, dtype=dtype))]
    opt.add_param_group({"params": late, "rho": 0.2})
    assert np.array_equal(flat_mask(opt, first), mask)
    assert flat_mask(opt, late).all()
    e = two_step(opt, [*first, *late], 2)
    assert np.array_equal(flat(e[:4]) != 0, mask)
    moved = flat(e[4:]) != 0
    assert np.array_equal(flat_mask(opt, late), moved)
    assert moved.sum() == (120 if recipe == "ssam_f" else 60)


@every_backend
@pytest.mark.parametrize("recipe", ["ssam_f", "ssam_d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_bits_survive_a_change_of_dtype(dtype, recipe, backend):
    model = small_net(torch.float32)
    params = list(model.parameters())
    opt = make(params, {"ssam_f": recipes.ssam_f(), "ssam_d": recipes.ssam_d()}[recipe], backend, momentum=0)
    opt.update_masks(masks=random_masks(params))
    two_step(opt, params, 1)
    words = [opt.masks.words(p).clone() for p in params]
    model.to(dtype)
    assert same_bits([opt.masks.words(p) for p in params], words)
    give_gradients(params, 2, scale=50.0)
    before = values(params)
    opt.first_step()
    moved = [p != b for p, b in zip(params, before, strict=True)]
    assert all(not (m & ~opt.masks[p]).any() for m, p in zip(moved, params, strict=True))
    assert sum(int(m.sum()) for m in moved) > 20
    opt.step()
    assert same_bits([opt.masks.words(p) for p in params], words)


def test_a_parameter_of_another_size_needs_another_mask():
    w = Parameter(torch.ones(100))
    opt = make([w], recipes.ssam_f())
    opt.update_masks(masks=[torch.ones(100).bool()])
    w.data = torch.ones(300)
    w.grad = torch.ones(300)
    with pytest.warns(UserWarning, match=r"shape \(300,\) had the mask of one of shape \(100,\)"):
        opt.first_step()
    assert (w != 1).all()  # dense, as before any update
    opt.step()
    opt.update_masks(masks=[torch.arange(300) < 10])
    assert opt.masks.count() == 10


# ---- reading -------------------------------------------------------------------------------------------


@every_backend
def test_what_masks_say(backend):
    params = awkward_parameters()
    params.insert(3, Parameter(torch.ones(130, dtype=torch.float64)))
    opt = make(params, recipes.ssam_f(), backend)
    assert opt.masks.nbytes() == 0  # dense ones take no memory
    assert int(opt.masks.count()) == sum(p.numel() for p in params)
    assert float(opt.masks.density()) == 1.0
    masks = random_masks(params)
    masks[-2] = None
    opt.update_masks(masks=masks)
    counts = {p: p.numel() if m is None else int(m.sum()) for p, m in zip(params, masks, strict=True)}
    assert opt.masks.count().dtype == opt.masks.counts().dtype == torch.int64
    assert int(opt.masks.count()) == sum(counts.values())
    assert float(opt.masks.density()) == pytest.approx(
        sum(counts.values()) / sum(p.numel() for p in params), rel=1e-15
    )
    order = [p for group, _ in opt._groups() for p in group.params]
    assert opt.masks.counts().tolist() == [counts[p] for p in order]
    expected = [counts[p] / p.numel() if p.numel() else math.nan for p in order]
    np.testing.assert_array_equal(opt.masks.densities().numpy(), expected)
    assert opt.masks.densities().dtype == opt.masks.density().dtype == torch.float64
    for p, m in zip(params, masks, strict=True):
        assert opt.masks[p].dtype == torch.bool
        assert opt.masks[p].shape == p.shape
        assert torch.equal(opt.masks[p], torch.ones_like(p, dtype=torch.bool) if m is None else m)
        assert not opt.masks[p].requires_grad
    assert opt.masks.nbytes() == sum(
        8 * -(-p.numel() // 64) for p, m in zip(params, masks, strict=True) if m is not None
    )


def test_a_mask_takes_a_bit_for_each_weight():
    w = Parameter(torch.ones(64 * 1000))
    opt = make([w], recipes.ssam_f())
    opt.update_masks(scores=[torch.rand(64 * 1000)])
    assert opt.masks.nbytes() * 32 == w.numel() * w.element_size()


# ---- restore, whatever is combined ---------------------------------------------------------------------

COMBINED = {
    "euclidean": Recipe(mask=TopScores(), rho=0.5),
    "adaptive": Recipe(mask=TopScores(), metric=Adaptive(eta=0.1), rho=0.5),
    "infinity": Recipe(mask=TopScores(), metric=Euclidean(p=math.inf), rho=0.1),
    "adaptive infinity": Recipe(mask=TopScores(), metric=Adaptive(p=math.inf, eta=0.1), rho=0.1),
    "p=4": Recipe(mask=TopScores(), metric=Euclidean(p=4), rho=0.5),
    "layerwise": Recipe(mask=TopScores(), metric=LayerWise(form="operator", eta=0.1), rho=0.5),
    "radius": Recipe(mask=TopScores(), metric=LayerWise(form="radius"), rho=0.5),
    "masked norm": Recipe(mask=TopScores(norm="masked"), rho=0.5),
    "masked radius": Recipe(mask=TopScores(norm="masked"), metric=LayerWise(form="radius"), rho=0.5),
    "every other step": Recipe(mask=TopScores(), cadence=Every(2), rho=0.5),
    "dynamic": Recipe(mask=Dynamic(every=1), rho=0.5),
}


@every_backend
@every_base
@pytest.mark.parametrize("combined", COMBINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@rounds_to_nearest
def test_restore_is_bit_exact(dtype, combined, base, backend):
    params = awkward_parameters(dtype, longest=129)
    kind, options = BASES[base]
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "rho": 0.9, "maximize": True}]
    opt = SAM(groups, kind, recipe=COMBINED[combined], backend=backend, **{**options, "lr": 0.0})
    if combined != "dynamic":
        opt.update_masks(masks=random_masks(params))
    before, addresses = values(params), [p.data_ptr() for p in params]
    for step in range(4):
        give_gradients(params, step)
        absent = {1: (3, 9), 3: (8,)}.get(step, ())
        for i in absent:
            params[i].grad = None
        opt.first_step(zero_grad=True)
        moved = [bits(p) != bits(b) for p, b in zip(params, before, strict=True)]
        assert any(moved) == (combined != "every other step" or step % 2 == 0)
        assert not any(moved[i] for i in absent)
        for p, b in zip(params, before, strict=True):
            assert not ((p != b) & ~opt.masks[p]).any()
        give_gradients(params, step + 50)
        for i in (9, 4) if step == 2 else ():
            params[i].grad = None
        opt.second_step(zero_grad=True)
        assert same_bits(params, before)
        assert [p.data_ptr() for p in params] == addresses


@every_backend
def test_groups_have_their_own_rho_and_direction(backend):
    params = four_parameters(torch.float64)
    groups = [
        {"params": params[:2]},
        {"params": params[2:3], "rho": 0.9},
        {"params": params[3:], "maximize": True},
    ]
    opt = SAM(groups, SGD, recipe=recipes.ssam_f(rho=0.3), backend=backend, lr=0.1)
    masks = random_masks(params)
    opt.update_masks(masks=masks)
    g = values(give_gradients(params, 1))
    e = two_step(opt, params, 1)
    size = np.linalg.norm(flat(g)) + 1e-7
    factors = (0.3, 0.3, 0.9, -0.3)
    assert_close(e, [f * x * m / size for f, m, x in zip(factors, masks, g, strict=True)], 1e-12)


@every_backend
def test_adaptive_metric_under_a_mask(backend):
    params = four_parameters(torch.float64)
    recipe = replace(recipes.ssam_f(rho=0.3), metric=Adaptive(eta=0.1))
    opt = make(params, recipe, backend)
    masks = random_masks(params)
    opt.update_masks(masks=masks)
    w, g = values(params), values(give_gradients(params, 1))
    scale = [x.abs() + 0.1 for x in w]
    size = np.linalg.norm(flat([t * x for t, x in zip(scale, g, strict=True)])) + 1e-7
    e = two_step(opt, params, 1)
    assert_close(e, [0.3 * t * t * x * m / size for m, t, x in zip(masks, scale, g, strict=True)], 1e-12)


@every_backend
def test_sign_perturbation_under_a_mask(backend):
    params = four_parameters(torch.float64)
    opt = make(params, replace(recipes.ssam_f(rho=0.3), metric=Euclidean(p=math.inf)), backend)
    masks = random_masks(params)
    opt.update_masks(masks=masks)
    g = values(give_gradients(params, 1))
    e = two_step(opt, params, 1)
    assert_close(e, [0.3 * x.sign() * m for m, x in zip(masks, g, strict=True)], 1e-12)


@every_backend
@pytest.mark.parametrize(
    "recipe",
    [recipes.ssam_f(sparsity=0.7, every=2), recipes.ssam_d(sparsity=0.7, every=2, seed=3)],
    ids=["ssam_f", "ssam_d"],
)
def test_a_run_follows_the_oracle_weights_and_masks(recipe, backend):
    model, other = small_net(), small_net()
    params, sizes = list(model.parameters()), [p.numel() for p in model.parameters()]
    opt = SAM(model.named_parameters(), SGD, recipe=recipe, backend=backend, lr=0.1)
    weights = {name: p.detach().clone() for name, p in other.named_parameters()}
    mask = flat(ssam.first_mask(weights, 0.7, 3).values()).astype(bool)

    def gradient(at, step):
        leaves = {name: w.clone().requires_grad_() for name, w in at.items()}
        loss = squared_error(functional_call(other, leaves, (INPUTS[step],)), step)
        return dict(zip(at, torch.autograd.grad(loss, leaves.values()), strict=True))

    for step in range(6):
        assert opt.masks_are_due == (recipe.name == "ssam_f" and step % 2 == 0)
        if opt.masks_are_due:
            opt.update_masks([INPUTS[step]], per_sample_loss(model))
            other.load_state_dict(weights)
            mask = ssam.top(flat(per_sample_squares(other, INPUTS[step]).values()), 24, exact=False)
        g = gradient(weights, step)
        parts = np.split(mask, np.cumsum(sizes)[:-1])
        chosen = {
            name: torch.from_numpy(part).view(w.shape)
            for (name, w), part in zip(weights.items(), parts, strict=True)
        }
        e = ssam.perturbation(weights, g, mask=chosen)
        ga = gradient({name: w + e[name] for name, w in weights.items()}, step)
        weights = {name: w - 0.1 * ga[name] for name, w in weights.items()}
        if recipe.name == "ssam_d" and step % 2 == 0:
            random = ssam.random_scores(sizes, 3, 2 * step + 1)
            mask = ssam.evolve(mask, flat(g.values()), random, live=24, rate=0.5)
        opt.step(backward_of(model, INPUTS[step], step))
        assert_close(params, weights.values(), 1e-11)
        assert np.array_equal(flat_mask(opt, params), mask)


def test_masks_follow_their_weights_into_another_memory_format(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 4, 3)
    opt = SAM(model.parameters(), torch.optim.SGD, recipe="ssam_f", lr=0.1, backend="reference")
    opt.update_masks(scores=[torch.rand_like(p) for p in model.parameters()])
    before = opt.masks[model.weight].clone()
    saved = opt.state_dict()
    model.to(memory_format=torch.channels_last)
    assert torch.equal(opt.masks[model.weight], before)
    torch.save(saved, tmp_path / "plain")
    torch.save(opt.state_dict(), tmp_path / "channels_last")
    for layout in ("plain", "channels_last"):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            twin = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
            other = SAM(twin.parameters(), torch.optim.SGD, recipe="ssam_f", lr=0.1, backend="reference")
            other.load_state_dict(torch.load(tmp_path / layout))
            assert torch.equal(other.masks[twin.weight], before)


def test_names_and_parameters_that_do_not_exist_are_refused():
    model = torch.nn.Linear(3, 2)
    recipe = Recipe(mask=Given({"wieght": torch.ones(2, 3, dtype=torch.bool)}))
    opt = SAM(model.named_parameters(), torch.optim.SGD, recipe=recipe, lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match="'wieght', which is the name of no parameter"):
        opt.first_step()
    with pytest.raises(KeyError, match="no parameter of the optimizer"):
        opt.masks[torch.nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize("compact", [False, True])
def test_weights_that_change_their_memory_format_while_perturbed_are_restored(compact):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, 5, 5))
    before = weight.detach().clone()
    opt = SAM([weight], torch.optim.SGD, recipe=recipes.ssam_f(compact=compact), lr=0.1)
    opt.update_masks(scores=[torch.rand_like(weight)])
    weight.grad = torch.randn_like(weight)
    opt.first_step()
    assert not torch.equal(weight, before)
    weight.data = weight.data.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="The weights are restored"):
        opt.step()
    assert torch.equal(weight, before)


def test_a_selection_that_fails_halfway_changes_no_mask(monkeypatch):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(20_000))
    opt = SAM([weight], torch.optim.SGD, recipe=recipes.ssam_f(compact=True), lr=0.1)
    opt.update_masks(scores=[torch.rand_like(weight)])
    before = opt.masks[weight].clone()

    def fails(values, keep):
        raise MemoryError

    monkeypatch.setattr("sam_kernels.selection._smallest_kept", fails)
    with pytest.raises(MemoryError):
        opt.update_masks(scores=[torch.rand_like(weight)])
    assert torch.equal(opt.masks[weight], before)


def test_given_masks_are_asked_for_again_where_a_checkpoint_has_none():
    weight = torch.nn.Parameter(torch.ones(4))
    mask = torch.tensor([True, False, False, False])
    opt = SAM([("a", weight)], torch.optim.SGD, recipe=Recipe(mask=Given({"a": mask})), lr=0.1)
    saved = opt.state_dict()
    for _ in range(2):
        weight.grad = torch.ones(4)
        opt.first_step()
        opt.step()
        assert torch.equal(opt.masks[weight], mask)
        opt.load_state_dict(saved)


@pytest.mark.parametrize("compact", [False, True])
def test_masks_with_bits_beyond_the_last_element_are_refused(compact):
    recipe = recipes.ssam_f(sparsity=0.0, compact=compact)
    large, small = torch.nn.Parameter(torch.ones(64)), torch.nn.Parameter(torch.ones(3))
    source = SAM([large], torch.optim.SGD, recipe=recipe, lr=0.1)
    source.update_masks(scores=[torch.rand(64)])
    target = SAM([small], torch.optim.SGD, recipe=recipe, lr=0.1)
    with pytest.raises(ValueError, match="belongs to another model"):
        target.load_state_dict(source.state_dict())
    memory = torch.full((64,), 7.0)
    large.data = memory[:3]
    large.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="is dense now"):
        source.first_step()
    source.step()
    assert (memory[3:] == 7).all() and source.masks.count() == 3


def test_parameters_that_join_in_the_middle_of_an_update_of_masks():
    first, second = (torch.nn.Parameter(torch.randn(100)) for _ in range(2))
    opt = SAM([first], torch.optim.SGD, recipe=recipes.ssam_d(every=1), lr=0.1)
    first.grad = torch.randn(100)
    opt.first_step()
    opt.base_optimizer.add_param_group({"params": [second]})
    first.grad, second.grad = torch.randn(100), torch.randn(100)
    opt.step()
    assert opt.masks[first].sum() == 50 and opt.param_groups[0]["sam_step"] == 1


def test_masks_of_reshaped_parameters_are_saved():
    weight = torch.nn.Parameter(torch.randn(4, 8))
    opt = SAM([weight], torch.optim.SGD, recipe="ssam_f", lr=0.1)
    opt.update_masks(scores=[torch.rand(4, 8)])
    before = opt.masks[weight].flatten()
    weight.data = weight.data.view(32)
    opt.load_state_dict(opt.state_dict())
    assert torch.equal(opt.masks[weight], before)
