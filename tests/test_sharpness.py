"""Sharpness: the numbers of the toy, the searches against numpy, and a model that stays as it was."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
import math
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from fixtures import awkward_parameters, bits, every_backend
from oracles import sharpness as oracle
from oracles.normal import normal
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from sam_kernels import sharpness
from sam_kernels.sharpness import Estimate, Objective
from sam_kernels.sharpness.ball import Ball
from sam_kernels.sharpness.moves import Weights
from sam_kernels.sharpness.search import checkpoints

INF = math.inf
PRINTED = 6e-11  # the toy's numbers carry ten digits after the point


class Toy(nn.Module):
    """f of algorithms-2.md 0.3, for each push that it is given."""

    def __init__(self, second: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -0.5], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([2.0], dtype=second))

    def forward(self, pushes):
        (a1, a2), b1 = self.a, self.b[0].double()
        f = 0.5 * (a1**2 + 4 * a2**2 + 0.5 * b1**2) + 0.3 * a1 * b1 + 0.1 * a2**4
        return f + pushes @ torch.stack([a1, a2, b1])


def mean(outputs, targets):
    return outputs.mean()


def pushes(*numbers: int) -> list:
    return [(torch.from_numpy(oracle.PUSHES[list(numbers)]), torch.zeros(len(numbers)))]


TOY = (Toy(), mean, pushes(0))
SIZES = np.abs(oracle.START)


def f(w):
    return oracle.toy(w, oracle.PUSHES[0])


def slope(w):
    return oracle.toy_gradient(w, oracle.PUSHES[0])


class Bowl(nn.Module):
    """g . e + 0.5 sum h e^2 around the start: TV1 of algorithms-1.md."""

    SLOPE, CURVATURE = (0.1, 0.2, -0.2), (1.0, 2.0, 3.0)

    def __init__(self) -> None:
        super().__init__()
        self.start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        self.w = nn.Parameter(self.start.clone())

    def forward(self, x):
        e = self.w - self.start
        return (torch.tensor(self.SLOPE) * e + 0.5 * torch.tensor(self.CURVATURE) * e * e).sum() * x


BOWL = (Bowl(), mean, [(torch.ones(1, dtype=torch.float64), torch.zeros(1))])


# ---- the numbers of the table -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.3374123306),
        ({"adaptive": True}, 0.3902732864),
        ({"p": INF, "adaptive": True}, 0.6289006250),
        ({"p": INF}, 0.5872100000),
    ],
    ids=str,
)
def test_one_step_gives_the_numbers_of_the_table(options, expected):
    found = sharpness.one_step(*TOY, rho=0.1, **options)
    assert found == pytest.approx(expected, abs=PRINTED)
    assert found.error == 0 and found.values == (float(found),)
    t = SIZES if options.get("adaptive") else 1.0
    assert oracle.one_step(f, slope, oracle.START, 0.1, options.get("p", 2), t) == pytest.approx(
        expected, abs=PRINTED
    )


@pytest.mark.parametrize(("m", "expected"), [(1, 0.3077364580), (3, 0.3074717588)])
def test_m_sharpness_gives_the_numbers_of_the_table(m, expected):
    found = sharpness.m_sharpness(Toy(), mean, pushes(0, 1, 2), m, 0.1)
    assert found == pytest.approx(expected, abs=PRINTED)
    assert len(found.values) == 3 // m


AVERAGES = [
    ({}, 0.0290300000),
    ({"adaptive": True}, 0.0203768750),
    ({"p": INF}, 0.0096686667),
    ({"p": INF, "adaptive": True}, 0.0067917917),
]


@pytest.mark.parametrize(("options", "expected"), AVERAGES, ids=str)
def test_averages_of_noise_are_those_of_the_table(options, expected):
    exact = oracle.toy_average(0.1, options.get("p", 2), options.get("adaptive", False))
    assert exact == pytest.approx(expected, abs=PRINTED)
    found = sharpness.average_case(*TOY, rho=0.1, draws=600, **options)
    assert abs(found - expected) < 5 * found.error
    paired = sharpness.average_case(*TOY, rho=0.1, draws=200, antithetic=True, **options)
    assert abs(paired - expected) < 5 * paired.error
    assert 0 < paired.error < 0.25 * found.error, "the gradient's part was to cancel"


def test_the_error_falls_with_the_root_of_the_draws():
    few = sharpness.average_case(*TOY, rho=0.1, draws=250)
    many = sharpness.average_case(*TOY, rho=0.1, draws=1000)
    assert few.error / many.error == pytest.approx(2, rel=0.15)


# ---- against numpy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 1.5, 2, 4, INF])
@pytest.mark.parametrize("eta", [None, 0.0, 0.3])
def test_one_step_goes_to_the_farthest_point_of_any_ball(p, eta):
    options = {} if eta is None else {"adaptive": True, "eta": eta}
    t = 1.0 if eta is None else SIZES + eta
    found = sharpness.one_step(*TOY, rho=0.2, p=p, **options)
    assert found == pytest.approx(oracle.one_step(f, slope, oracle.START, 0.2, p, t), rel=1e-12)


def test_ties_share_the_radius_of_the_one_norm():
    def tied(outputs, targets):
        return model.w[0] + model.w[1] - model.w[2] + 4 * (model.w - model.start).square().sum()

    model = Bowl()
    # e = rho / 3 (1, 1, -1): slopes add up to rho, squares to rho^2 / 3
    assert sharpness.one_step(model, tied, BOWL[2], 0.3, p=1) == pytest.approx(0.3 + 4 * 0.03, rel=1e-12)


def test_groups_are_perturbed_by_themselves_and_weigh_what_they_hold():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 1).double()
    found = sharpness.m_sharpness(model, mse_loss, [(x[:3], y[:3]), (x[3:], y[3:])], m=2, rho=0.3)
    alone = [
        sharpness.one_step(model, mse_loss, [(x[rows], y[rows])], rho=0.3)
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5))
    ]
    assert found.values == pytest.approx(alone, rel=1e-12)
    assert found == pytest.approx((2 * alone[0] + 2 * alone[1] + alone[2]) / 5, rel=1e-12)
    assert found.error > 0
    whole = sharpness.one_step(model, mse_loss, [(x, y)], rho=0.3)
    batched = sharpness.one_step(model, mse_loss, [(x[:4], y[:4]), (x[4:], y[4:])], rho=0.3)
    assert batched == pytest.approx(whole, rel=1e-12), "batches are no groups"


@pytest.mark.parametrize(("steps", "step"), [(1, 1.0), (3, 1.0), (3, 1 / 3), (20, 0.1), (7, 0.4)])
def test_projected_ascent_takes_the_steps_of_numpy(steps, step):
    expected = oracle.projected_ascent(f, slope, oracle.START, 0.3, steps, step)
    found = sharpness.projected_ascent(*TOY, rho=0.3, steps=steps, step=step)
    assert found == pytest.approx(expected, rel=1e-12)


def test_restarts_begin_on_the_sphere_and_the_best_counts():
    z = np.concatenate([normal(5, 1, 0, 2), normal(5, 1, 1, 1)])
    start = 0.3 * z / np.linalg.norm(z)
    first, second = (oracle.projected_ascent(f, slope, oracle.START, 0.3, 2, 0.1, s) for s in (None, start))
    assert first != pytest.approx(second, rel=1e-3)
    found = sharpness.projected_ascent(*TOY, rho=0.3, steps=2, restarts=2, seed=5)
    assert found == pytest.approx(max(first, second), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [0.1, 1.5])
def test_the_worst_case_is_searched_as_in_numpy(steps, p, adaptive, rho):
    t = SIZES if adaptive else np.ones(3)
    expected = oracle.auto_pgd(f, slope, oracle.START, rho, p, t, steps)
    found = sharpness.worst_case(*TOY, rho=rho, p=p, adaptive=adaptive, steps=steps)
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_published_projection_is_that_of_numpy_and_falls_short():
    rho = 0.5
    expected = oracle.auto_pgd(f, slope, oracle.START, rho, 2, SIZES, 20, published=True)
    found = sharpness.worst_case(*TOY, rho=rho, adaptive=True, published=True)
    assert found == pytest.approx(expected, rel=1e-4), "bisection stops at 1e-5 of the radius"
    assert found < sharpness.worst_case(*TOY, rho=rho, adaptive=True)


def test_the_nearest_point_is_on_the_edge_and_no_other_point_is_nearer():
    generator = torch.Generator().manual_seed(0)
    w = [torch.randn(4, generator=generator).double(), torch.tensor([0.0, 1e-3], dtype=torch.float64)]
    e = [torch.randn(4, generator=generator).double(), torch.tensor([0.7, 0.2], dtype=torch.float64)]
    ball = Ball(0.4, adaptive=True)
    z = torch.cat(ball.nearest(w, e))
    t = torch.cat(w).abs()
    inside = t > 0
    assert float(z[~inside].abs().sum()) == 0
    size = float((z[inside] / t[inside]).norm())
    assert 0.4 * (1 - 2e-5) < size <= 0.4
    other = torch.randn(20000, 5, generator=generator).double()
    other = 0.4 * other / other.norm(dim=1, keepdim=True) * t[inside]
    target = torch.cat(e)[inside]
    assert float((z[inside] - target).norm()) <= float((other - target).norm(dim=1).min()) * (1 + 1e-5)


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_worst_case_finds_the_maximum_of_the_toy(p, adaptive):
    t = SIZES if adaptive else np.ones(3)
    largest = oracle.largest_on_ball(f, oracle.START, 0.3, p, t)
    found = sharpness.worst_case(*TOY, rho=0.3, p=p, adaptive=adaptive, steps=40)
    assert found == pytest.approx(largest, rel=2e-4)  # the net has one point a degree
    assert found >= sharpness.one_step(*TOY, rho=0.3, p=p, adaptive=adaptive)


def test_better_ascents_find_more_and_none_more_than_the_maximum():
    best = oracle.quadratic_maximum(np.array(Bowl.SLOPE), np.array(Bowl.CURVATURE), 0.05)
    np.testing.assert_allclose(best, [0.013447764, 0.0310743306, -0.0367905371], rtol=6e-9)
    largest = np.array(Bowl.SLOPE) @ best + 0.5 * np.array(Bowl.CURVATURE) @ best**2
    assert largest == pytest.approx(0.0180041, abs=6e-8)
    once = sharpness.one_step(*BOWL, rho=0.05)
    thrice = sharpness.projected_ascent(*BOWL, rho=0.05, steps=3, step=1.0)
    often = sharpness.projected_ascent(*BOWL, rho=0.05)
    worst = sharpness.worst_case(*BOWL, rho=0.05)
    assert once == pytest.approx(0.0179167, abs=6e-8)
    assert thrice == pytest.approx(0.0179911, abs=6e-8)
    assert once < thrice < often < largest
    assert thrice < worst <= largest * (1 + 1e-12)
    assert worst == pytest.approx(largest, rel=1e-5)


def test_checkpoints_come_ever_more_often():
    assert sorted(checkpoints(20)) == [5, 9, 12, 14, 16, 18, 19, 20]
    assert sorted(checkpoints(100))[:6] == [22, 41, 57, 70, 80, 87]
    assert sorted(checkpoints(1)) == [1]


def draws(seed: int, number: int) -> np.ndarray:
    return np.concatenate([normal(seed, number, 0, 2), normal(seed, number, 1, 1)])


def test_noise_is_that_of_the_seed_in_every_draw():
    found = sharpness.average_case(*TOY, rho=0.1, draws=4, seed=11)
    adaptive = sharpness.average_case(*TOY, rho=0.1, adaptive=True, draws=4, seed=11)
    uniform = sharpness.average_case(*TOY, rho=0.1, p=INF, draws=4, seed=11)
    paired = sharpness.average_case(*TOY, rho=0.1, draws=4, seed=11, antithetic=True)
    direction = sharpness.random_direction(*TOY, rho=0.1, draws=4, seed=11)
    for i in range(4):
        z, w = draws(11, i), oracle.START
        flat = np.array([math.erf(x / math.sqrt(2)) for x in z])
        rises = {k: f(w + d) - f(w) for k, d in enumerate((0.1 * z, 0.1 * z * SIZES, 0.1 * flat, -0.1 * z))}
        assert found.values[i] == pytest.approx(rises[0], abs=1e-6)  # noise is drawn in float32
        assert adaptive.values[i] == pytest.approx(rises[1], abs=1e-6)
        assert uniform.values[i] == pytest.approx(rises[2], abs=1e-6)
        assert paired.values[i] == pytest.approx((rises[0] + rises[3]) / 2, abs=1e-6)
        sphere = 0.1 * z / np.linalg.norm(z)
        assert direction.values[i] == pytest.approx(f(w + sphere) - f(w), abs=1e-6)


def test_a_random_direction_rises_as_the_document_says():
    e = 0.05 * np.array([0.3, -0.5, 0.2]) / np.linalg.norm([0.3, -0.5, 0.2])
    rise = np.array(Bowl.SLOPE) @ e + 0.5 * np.array(Bowl.CURVATURE) @ e**2
    assert rise == pytest.approx(-0.00659, abs=5e-6)
    found = sharpness.random_direction(*BOWL, rho=0.05, draws=1000)
    # the slope's part cancels on the sphere, and the curvature's is rho^2 / 2 tr(H) / 3
    assert abs(found - 0.05**2 / 2 * 6 / 3) < 5 * found.error
    assert found < sharpness.one_step(*BOWL, rho=0.05)


def test_groups_with_noise_of_their_own_have_the_same_mean_and_a_smaller_error():
    data = pushes(0, 1, 2, 3)
    once = sharpness.average_case(Toy(), mean, data, rho=0.1, draws=300)
    own = sharpness.average_case(Toy(), mean, data, rho=0.1, draws=300, m=1)
    assert len(own.values) == 300
    assert abs(own - oracle.toy_average(0.1, 2, False)) < 5 * own.error
    assert own.error == pytest.approx(once.error / 2, rel=0.2), "four independent draws for one"


# ---- other weights: half types, several dtypes, tied, frozen, awkward; all backends -----------------------


def test_parts_of_several_dtypes_move_together_and_draw_numbers_of_their_own():
    model = Toy(second=torch.float32)
    assert sharpness.one_step(model, mean, pushes(0), 0.1) == pytest.approx(0.3374123306, rel=1e-6)
    with Objective(model, mean, pushes(0)).held() as base:
        (a, b) = Weights([model.a, model.b], base).noise(3, draw=2)
    assert a.dtype == torch.float64 and b.dtype == torch.float32
    np.testing.assert_allclose(a.numpy(), normal(3, 2, 0, 2), atol=1e-6)
    np.testing.assert_allclose(b.numpy(), normal(3, 2, 1, 1), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"p": INF}, {"adaptive": True}], ids=str)
def test_half_types_are_rounded_once_where_they_are_perturbed(options):
    torch.manual_seed(0)
    model = nn.Linear(6, 4).bfloat16()
    x, y = torch.randn(8, 6).bfloat16(), torch.randn(8, 4).bfloat16()
    w = [p.detach().clone() for p in model.parameters()]
    grads = [g.float() for g in torch.autograd.grad(mse_loss(model(x), y), list(model.parameters()))]
    t = [p.float().abs() if options.get("adaptive") else torch.ones(p.shape) for p in w]
    size = torch.cat([(g * s).flatten() for g, s in zip(grads, t, strict=True)]).norm()
    moved = nn.Linear(6, 4).bfloat16()
    with torch.no_grad():
        for p, before, g, s in zip(moved.parameters(), w, grads, t, strict=True):
            step = g.sign() if "p" in options else s * s * g / size
            p.copy_((before.float() + 0.5 * step).bfloat16())
        expected = mse_loss(moved(x), y).item() - mse_loss(model(x), y).item()
    assert expected > 0
    assert sharpness.one_step(model, mse_loss, [(x, y)], 0.5, **options) == pytest.approx(expected, abs=1e-6)


class Awkward(nn.Module):
    """Batch statistics, dropout, a tied and a frozen weight, a parameter without a part in the loss."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 3)
        self.last.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(3))
        self.empty = nn.Parameter(torch.zeros(0))
        self.to(dtype)

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.second(self.drop(self.first(self.norm(x)))))))


def awkward(dtype: torch.dtype = torch.float32) -> tuple[Awkward, list]:
    model = Awkward(dtype)
    x, y = torch.randn(9, 6).to(dtype), torch.randint(3, (9,))
    cross_entropy(model(x), y).backward()
    model.drop.eval()  # and the rest in training mode
    return model, [(x[:5], y[:5]), (x[5:], y[5:])]


def state(model: nn.Module) -> dict:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    grads = {n: p.grad for n, p in model.named_parameters()}
    return {
        "bits": {n: bits(t) for n, t in tensors.items()},
        "places": {n: (id(t), t.data_ptr()) for n, t in tensors.items()},
        "gradients": {n: None if g is None else (id(g), g.data_ptr(), bits(g)) for n, g in grads.items()},
        "requires": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "random": bits(torch.get_rng_state()),
    }


NAMES = {
    "one_step": ("one_step", {"rho": 0.3}),
    "one_step_adaptive": ("one_step", {"rho": 0.3, "adaptive": True}),
    "one_step_p3": ("one_step", {"rho": 0.3, "p": 3}),
    "m_sharpness": ("m_sharpness", {"m": 4, "rho": 0.3}),
    "projected_ascent": ("projected_ascent", {"steps": 3, "m": 4}),
    "projected_ascent_again": ("projected_ascent", {"steps": 3, "restarts": 2, "m": 4}),
    "worst_case": ("worst_case", {"rho": 0.3, "steps": 3, "restarts": 2, "m": 4}),
    "worst_case_adaptive": ("worst_case", {"rho": 0.3, "steps": 3, "adaptive": True}),
    "worst_case_published": ("worst_case", {"rho": 0.3, "steps": 3, "adaptive": True, "published": True}),
    "average_case": ("average_case", {"rho": 0.3, "draws": 3}),
    "average_case_inf": ("average_case", {"rho": 0.3, "p": INF, "draws": 2, "m": 4, "antithetic": True}),
    "random_direction": ("random_direction", {"rho": 0.3, "draws": 3}),
}
MEASURES = {
    name: functools.partial(getattr(sharpness, function), **options)
    for name, (function, options) in NAMES.items()
}
MEASURES["generalization_gap"] = lambda model, loss_fn, data: sharpness.generalization_gap(
    model, loss_fn, data, data[1:]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MEASURES)
def test_measures_leave_the_model_as_it_was(name, dtype):
    model, data = awkward(dtype)
    before = state(model)
    calls = []

    def watched(outputs, targets):
        calls.append(bits(model.first.weight))
        assert not any(m.training for m in model.modules())
        return cross_entropy(outputs, targets)

    MEASURES[name](model, watched, data)
    assert len(calls) > 1
    assert name == "generalization_gap" or len(set(calls)) > 1, "the weights did not move"
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MEASURES)
def test_interrupted_measures_leave_the_model_as_it_was(name, dtype):
    model, data = awkward(dtype)
    before = state(model)
    for fatal in (1, 3):
        calls = []

        def interrupted(outputs, targets, fatal=fatal, calls=calls):
            calls.append(len(targets))
            if len(calls) == fatal:
                torch.rand(3)  # a loss of its own randomness
                raise KeyboardInterrupt
            return cross_entropy(outputs, targets)

        with pytest.raises(KeyboardInterrupt):
            MEASURES[name](model, interrupted, data)
        assert len(calls) == fatal
        assert state(model) == before


class Layouts(nn.Module):
    """Parameters of every layout, dense or not, and a loss that tells their elements apart."""

    def __init__(self) -> None:
        super().__init__()
        extra = [
            torch.randn(4, 1, 3, 3).contiguous(memory_format=torch.channels_last),
            torch.randn(6, 4)[:, ::2],
        ]
        self.all = nn.ParameterList([*awkward_parameters(longest=40), *map(nn.Parameter, extra)])

    def forward(self, x):
        return sum(torch.tanh(p * x).square().mul(1 + i).sum() for i, p in enumerate(self.all) if p.numel())


@pytest.mark.parametrize("name", [n for n in MEASURES if n != "generalization_gap"])
def test_layouts_in_memory_do_not_matter(name):
    torch.manual_seed(2)
    model, plain = Layouts(), Layouts()
    plain.all = nn.ParameterList([nn.Parameter(p.detach().contiguous()) for p in model.all])
    x = torch.linspace(0.5, 1, 5)
    data = [(x[:3], x[:3]), (x[3:], x[3:])]

    def loss(outputs, targets):
        return outputs

    def each(model):
        def forward(model, batch):
            return torch.stack([model(x) for x in batch[0]]).mean(), None

        return MEASURES[name](model, loss, data, forward=forward)

    def each_loss(model):
        return torch.stack([model(x) for x in torch.cat([batch[0] for batch in data])]).mean()

    found = each(model)
    assert float(found) != 0
    # A rise is a difference of float32 losses, here of some hundred terms each.
    size = float(each_loss(plain))
    assert found == pytest.approx(each(plain), rel=1e-4, abs=4 * torch.finfo(torch.float32).eps * size)


def test_a_tied_weight_moves_once_and_a_frozen_one_stays():
    model, data = awkward()
    objective = Objective(model, cross_entropy, data)
    assert len(objective.params) == sum(p.requires_grad for p in model.parameters())
    with objective.held():
        _, grads = objective.gradient()
        norm = torch.cat([g.flatten() for g in grads]).double().norm()
        before = objective.loss()
        with torch.no_grad():
            for p, g in zip(objective.params, grads, strict=True):
                p.add_(g * (0.3 / norm).float())
        expected = objective.loss() - before
    assert sharpness.one_step(model, cross_entropy, data, 0.3) == pytest.approx(expected, rel=1e-4)


@every_backend
def test_every_backend_finds_the_same(backend):
    model, data = awkward()
    for measure, options in [
        (sharpness.one_step, {"rho": 0.3}),
        (sharpness.one_step, {"rho": 0.3, "adaptive": True, "eta": 0.1}),
        (sharpness.projected_ascent, {"rho": 0.3, "steps": 3}),
        (sharpness.average_case, {"rho": 0.3, "draws": 2}),
        (sharpness.random_direction, {"rho": 0.3, "draws": 2}),
    ]:
        expected = measure(model, cross_entropy, data, backend="reference", **options)
        found = measure(model, cross_entropy, data, backend=backend, **options)
        assert found.values == pytest.approx(expected.values, abs=1e-6), measure.__name__


def test_a_backend_that_does_not_exist_is_refused_and_nothing_has_moved():
    model, data = awkward()
    before = state(model)
    with pytest.raises(ValueError, match="'abacus'"):
        sharpness.one_step(model, cross_entropy, data, backend="abacus")
    assert state(model) == before


# ---- edges ------------------------------------------------------------------------------------------------


FLAT = (Bowl(), lambda outputs, targets: (FLAT[0].w - FLAT[0].start).square().sum(), BOWL[2])


@pytest.mark.parametrize("p", [1, 2, 3, INF])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_gradient_of_zero_is_no_sharpness(p, adaptive):
    assert sharpness.one_step(*FLAT, rho=0.5, p=p, adaptive=adaptive) == 0
    if p in (2, INF):
        assert sharpness.worst_case(*FLAT, rho=0.5, p=p, adaptive=adaptive) == 0
    assert sharpness.projected_ascent(*FLAT, rho=0.5) == 0
    assert sharpness.projected_ascent(*FLAT, rho=0.5, restarts=2) == pytest.approx(0.25), "from the sphere"


@pytest.mark.parametrize("name", [n for n in MEASURES if n != "generalization_gap"])
def test_weights_of_zero_are_nothing_special(name):
    model, data = awkward()
    with torch.no_grad():
        model.first.weight[0] = 0
        model.first.bias.zero_()
    assert math.isfinite(MEASURES[name](model, cross_entropy, data))


@pytest.mark.parametrize("p", [2, INF])
def test_weights_of_zero_stay_where_the_ball_is_measured_by_them(p):
    model, data = awkward()
    with torch.no_grad():
        model.first.bias.zero_()
    seen = []

    def watched(outputs, targets):
        seen.append(float(model.first.bias.detach().abs().max()))
        return cross_entropy(outputs, targets)

    sharpness.worst_case(model, watched, data, rho=0.5, p=p, adaptive=True, restarts=2)
    sharpness.worst_case(model, watched, data, rho=0.5, p=p, adaptive=True, published=True)
    sharpness.average_case(model, watched, data, rho=0.5, p=p, adaptive=True, draws=3)
    assert len(seen) > 20 and max(seen) == 0


def test_a_radius_of_zero_is_no_sharpness():
    for measure in (sharpness.one_step, sharpness.projected_ascent, sharpness.worst_case):
        assert measure(*TOY, rho=0.0) == 0
    assert sharpness.worst_case(*TOY, rho=0.0, adaptive=True, published=True, restarts=2) == 0
    assert sharpness.average_case(*TOY, rho=0.0, draws=3) == 0


def test_a_descent_is_never_reported_as_a_worst_case():
    model = Bowl()

    def hill(outputs, targets):  # the loss falls whichever way a step of this length goes
        e = model.w - model.start
        return 1e-6 * e.sum() - 5 * e.square().sum()

    assert sharpness.one_step(model, hill, BOWL[2], 1.0) < -1
    assert 0 <= sharpness.projected_ascent(model, hill, BOWL[2], 1.0) < 1e-6
    assert 0 <= sharpness.worst_case(model, hill, BOWL[2], 1.0) < 1e-6


def test_measures_cost_the_evaluations_they_say():
    calls = []

    def counted(outputs, targets):
        calls.append(outputs.requires_grad)
        return outputs.mean()

    def cost(measure, **options):
        calls.clear()
        measure(Toy(), counted, pushes(0), **options)
        return calls.count(True), calls.count(False)

    assert cost(sharpness.one_step) == (1, 1)
    assert cost(sharpness.projected_ascent, steps=5) == (5, 1)
    assert cost(sharpness.projected_ascent, steps=5, restarts=2) == (10, 2)
    assert cost(sharpness.worst_case, rho=0.1, steps=5) == (5, 2)
    assert cost(sharpness.worst_case, rho=0.1, steps=5, restarts=3) == (15, 4)
    assert cost(sharpness.average_case, rho=0.1, draws=4) == (0, 5)
    assert cost(sharpness.random_direction, draws=4, antithetic=True) == (0, 9)


@pytest.mark.parametrize("name", [n for n in MEASURES if n != "generalization_gap"])
def test_losses_and_gradients_that_are_not_finite_are_named(name):
    model, data = awkward()
    before = state(model)
    with pytest.raises(ValueError, match="the loss at the weights as they are is nan"):
        MEASURES[name](model, lambda o, t: cross_entropy(o, t) * math.nan, data)
    if name not in ("average_case", "average_case_inf", "random_direction"):
        with pytest.raises(ValueError, match=r"its gradient is not \(that of first.weight is not"):
            # The root has no slope at 0.
            MEASURES[name](
                model, lambda o, t: cross_entropy(o, t) + (0 * model.first.weight).sum().sqrt(), data
            )
    base = bits(model.first.bias)
    with pytest.raises(ValueError, match=r"the loss at .*weights .*rho=.* is inf"):
        MEASURES[name](
            model, lambda o, t: cross_entropy(o, t) * (1 if bits(model.first.bias) == base else INF), data
        )
    assert state(model) == before


def test_the_gap_names_the_data_whose_loss_is_not_finite():
    model, data = awkward()
    broken = [(data[0][0] * math.nan, data[0][1])]
    with pytest.raises(ValueError, match="the loss on test data is nan"):
        sharpness.generalization_gap(model, cross_entropy, data, broken)


@pytest.mark.parametrize(
    ("measure", "options", "sentence"),
    [
        (sharpness.one_step, {"rho": -0.1}, "rho is -0.1; expected a finite number of at least 0"),
        (sharpness.one_step, {"rho": math.nan}, "rho is nan"),
        (sharpness.one_step, {"rho": True}, "rho is True"),
        (sharpness.one_step, {"p": 0.5}, "p is 0.5; expected a number of at least 1"),
        (sharpness.one_step, {"p": math.nan}, "p is nan"),
        (sharpness.one_step, {"eta": 0.1}, "without adaptive=True"),
        (sharpness.one_step, {"eta": -1.0, "adaptive": True}, "eta is -1.0"),
        (sharpness.m_sharpness, {"m": 0}, "m is 0; expected a whole number of samples"),
        (sharpness.projected_ascent, {"rho": INF}, "rho is inf"),
        (sharpness.projected_ascent, {"steps": 0}, "steps is 0"),
        (sharpness.projected_ascent, {"step": 0.0}, "step is 0.0; expected a positive share"),
        (sharpness.projected_ascent, {"restarts": 1.5}, "restarts is 1.5"),
        (sharpness.projected_ascent, {"restarts": 2, "seed": -1}, "seed is -1"),
        (sharpness.worst_case, {"rho": 0.1, "p": 3}, "p is 3; the worst case is searched for"),
        (sharpness.worst_case, {"rho": -1}, "rho is -1"),
        (sharpness.worst_case, {"rho": 0.1, "seed": None}, "seed is None"),
        (sharpness.average_case, {"rho": 0.1, "p": 1}, "p is 1; the average is taken for"),
        (sharpness.average_case, {"rho": 0.1, "draws": 0}, "draws is 0"),
        (sharpness.random_direction, {"rho": -2}, "rho is -2"),
        (sharpness.random_direction, {"seed": -2}, "seed is -2"),
        (sharpness.random_direction, {"samples": 0}, "samples is 0"),
    ],
)
def test_arguments_out_of_range_are_refused(measure, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure(*TOY, **options)


def test_samples_and_forward_are_those_of_the_objective():
    model = nn.Linear(3, 2)
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    dicts = [{"x": x[:4], "y": y[:4]}, {"x": x[4:], "y": y[4:]}]

    def forward(model, batch):
        return model(batch["x"]), batch["y"]

    options = {"forward": forward, "samples": 3}
    for measure in (sharpness.one_step, sharpness.projected_ascent, sharpness.random_direction):
        found = measure(model, cross_entropy, dicts, **options)
        assert found == pytest.approx(measure(model, cross_entropy, [(x[:3], y[:3])]), rel=1e-6)
    for measure in (sharpness.worst_case, sharpness.average_case):
        found = measure(model, cross_entropy, dicts, rho=0.1, **options)
        assert found == pytest.approx(measure(model, cross_entropy, [(x[:3], y[:3])], rho=0.1), rel=1e-6)
    found = sharpness.m_sharpness(model, cross_entropy, dicts, m=2, **options)
    assert len(found.values) == 2


def test_an_estimate_knows_its_error_and_survives_copies():
    found = Estimate([1.0, 2.0, 4.0], weights=[1, 1, 2])
    assert found == 2.75 and isinstance(found + 1, float)
    spread = (1.75**2 + 0.75**2 + 2 * 1.25**2) / 4
    assert found.error == pytest.approx(math.sqrt(spread / 2))
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert (other, other.error, other.values) == (found, found.error, found.values)
    assert math.isnan(Estimate([3.0]).error) and Estimate([3.0], is_random=False).error == 0
    assert str(Estimate([3.0, 4.0])) == "3.5 ± 0.5" and str(Estimate([3.5])) == "3.5"
    with pytest.raises(ValueError, match="0 values and 0 weights"):
        Estimate([])


# ---- the gap ----------------------------------------------------------------------------------------------


def test_the_gap_is_the_difference_of_mean_losses_and_accuracies():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    train, test = [(x[:5], y[:5]), (x[5:7], y[5:7])], [(x[7:], y[7:])]
    found = sharpness.generalization_gap(model, cross_entropy, train, test)
    with torch.no_grad():
        scores = model[0](x)
        losses = cross_entropy(scores, y, reduction="none").double()
        right = (scores.argmax(1) == y).double()
    assert found.train_loss == pytest.approx(losses[:7].mean().item(), rel=1e-6)
    assert found.test_loss == pytest.approx(losses[7:].mean().item(), rel=1e-6)
    assert found.loss == pytest.approx((losses[7:].mean() - losses[:7].mean()).item(), rel=1e-5)
    assert found.train_accuracy == pytest.approx(right[:7].mean().item())
    assert found.accuracy == pytest.approx((right[:7].mean() - right[7:].mean()).item())
    assert found.train_accuracy not in (0, 1)
    few = sharpness.generalization_gap(model, cross_entropy, train, test, samples=3)
    assert few.test_accuracy == pytest.approx(right[7:10].mean().item())


def test_there_is_no_accuracy_without_labels():
    model = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    for loss_fn, y in ((mse_loss, torch.randn(5, 3)), (cross_entropy, torch.rand(5, 3).softmax(1))):
        found = sharpness.generalization_gap(model, loss_fn, [(x, y)], [(x[:2], y[:2])])
        assert (found.train_accuracy, found.test_accuracy, found.accuracy) == (None, None, None)
        assert found.loss != 0


# ---- the report -------------------------------------------------------------------------------------------


def measured(**options):
    options = {"draws": 4, "m": 4, "progress": False, **options}
    model, data = awkward()
    return model, data, sharpness.report(model, cross_entropy, iter(data), **options)


def test_the_report_has_every_measure_and_each_is_that_of_its_function():
    test = [(torch.randn(4, 6), torch.randint(3, (4,)))]
    model, data, found = measured(test=test, rho=0.1, eigenvalues=2, seed=3)
    args = (model, cross_entropy, data)
    random = {"draws": 4, "seed": 3, "antithetic": True}
    gap = sharpness.generalization_gap(model, cross_entropy, data, test)
    expected = {
        "one_step": sharpness.one_step(*args, rho=0.1),
        "one_step_adaptive": sharpness.one_step(*args, rho=1.0, adaptive=True),
        "one_step_inf": sharpness.one_step(*args, rho=0.002, p=INF),
        "m_sharpness": sharpness.m_sharpness(*args, m=4, rho=0.1),
        "projected_ascent": sharpness.projected_ascent(*args, rho=0.2),
        "worst_case": sharpness.worst_case(*args, rho=0.5),
        "average_case": sharpness.average_case(*args, rho=0.1, **random),
        "random_direction": sharpness.random_direction(*args, rho=0.1, **random),
        "eigenvalue": sharpness.eigenvalues(*args, 2, seed=3).values[0],
        "eigenvalue_2": sharpness.eigenvalues(*args, 2, seed=3).values[1],
        "trace": sharpness.trace(*args, draws=4, seed=3),
        "loss": gap.train_loss,
        "loss_gap": gap.loss,
        "accuracy_gap": gap.accuracy,
    }
    assert set(found) == {*expected, "gradient_norm"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert found["m_sharpness"].values == expected["m_sharpness"].values
    assert found["trace"].error == expected["trace"].error > 0
    assert found.samples == 9 and found.seed == 3 and found.rho == 0.1
    assert found.rows["worst_case"].rho == 0.5 and found.rows["loss"].rho is None
    assert all(row.seconds > 0 for row in found.rows.values())


def test_the_report_knows_the_toy():
    found = sharpness.report(*TOY, rho=0.1, draws=100, progress=False)
    assert found["loss"] == pytest.approx(3.40625)
    assert found["gradient_norm"] == pytest.approx(3.2422985674, abs=PRINTED)
    assert found["one_step"] == pytest.approx(0.3374123306, abs=PRINTED)
    assert found["eigenvalue"] == pytest.approx(4.3, rel=1e-6)
    assert abs(found["trace"] - 5.8) < 5 * found["trace"].error
    assert abs(found["average_case"] - 0.02903) < 5 * found["average_case"].error
    assert "loss_gap" not in found


def test_the_report_prints_a_table_and_turns_into_json():
    _, _, found = measured()
    lines = str(found).splitlines()
    assert lines[0] == "9 samples, rho 0.05, seed 0"
    assert lines[1].split() == ["measure", "value", "±", "error", "radius", "meaning"]
    assert len(lines) == 2 + len(found)
    row = next(line for line in lines if line.startswith("m sharpness"))
    assert f"{float(found['m_sharpness']):.4g}" in row and "±" in row and "0.05" in row
    kept = json.loads(json.dumps(found.json(), allow_nan=False))
    assert kept["measures"]["worst_case"]["rho"] == 0.25
    assert kept["measures"]["one_step"]["value"] == float(found["one_step"])
    assert (kept["rho"], kept["samples"], kept["seed"]) == (0.05, 9, 0)
    console = pytest.importorskip("rich.console", reason="rich, which draws the table, is not installed")
    shown = io.StringIO()
    console.Console(file=shown, width=110).print(found)
    assert "worst case" in shown.getvalue() and "largest rise found in a ball" in shown.getvalue()


def test_the_report_takes_other_radii_and_refuses_unknown_ones():
    _, _, found = measured(radii={"worst_case": 0.7}, eigenvalues=0)
    assert found.rows["worst_case"].rho == 0.7 and found.rows["one_step"].rho == 0.05
    assert "trace" not in found
    with pytest.raises(ValueError, match="no measure 'worst'; expected names of one_step, "):
        measured(radii={"worst": 0.7})
    for options, sentence in [
        ({"rho": -1}, "rho is -1"),
        ({"radii": {"worst_case": -1}}, "rho is -1"),
        ({"eigenvalues": -1}, "eigenvalues is -1"),
        ({"draws": 1}, "draws is 1; expected a whole number of at least 2"),
        ({"m": 0}, "m is 0"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            measured(**options)


def test_the_report_leaves_the_model_as_it_was_also_when_interrupted():
    model, data = awkward()
    before = state(model)
    calls = []

    def counted(outputs, targets):
        calls.append(len(targets))
        if len(calls) == fatal:
            raise KeyboardInterrupt
        return cross_entropy(outputs, targets)

    fatal, options = 0, {"test": data, "draws": 2, "m": 4, "progress": False}
    sharpness.report(model, counted, data, **options)
    assert state(model) == before
    total = len(calls)
    for fatal in range(1, total, total // 8):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            sharpness.report(model, counted, data, **options)
        assert state(model) == before, fatal


def test_a_bar_is_shown_where_it_is_wanted(capsys, monkeypatch):
    pytest.importorskip("rich", reason="rich, which draws the bar, is not installed")
    measured(progress=None)
    assert capsys.readouterr() == ("", ""), "the standard error is no terminal here"
    monkeypatch.setenv("FORCE_COLOR", "1")
    measured(progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "batches" in shown.err and "11/11" in shown.err


def test_a_bar_without_rich_is_refused_and_the_report_does_without(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "rich" else find(name, *a)
    )
    with pytest.raises(ImportError, match=r"pip install 'sam_kernels\[sharpness\]'"):
        measured(progress=True)
    assert "one_step" in measured(progress=None)[2]


# ---- what surrounds a measurement ------------------------------------------------------------------


def test_a_loader_that_draws_leaves_the_random_state_as_it_was():
    x, y = torch.randn(24, 3), torch.randint(3, (24,))
    own = torch.Generator().manual_seed(7)
    for shuffle, generator in ((False, None), (True, None), (True, own)):
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=shuffle, generator=generator
        )
        before, of_own = torch.get_rng_state(), own.get_state()
        sharpness.one_step(nn.Linear(3, 3), cross_entropy, loader)
        torch.manual_seed(1)
        model = nn.Linear(3, 3)
        before = torch.get_rng_state()
        sharpness.one_step(model, cross_entropy, loader)
        assert torch.equal(torch.get_rng_state(), before), (shuffle, generator)
        assert torch.equal(own.get_state(), of_own)


def test_casts_of_moved_weights_do_not_outlive_the_measurement():
    model, x, y = nn.Linear(16, 16), torch.randn(8, 16), torch.randint(16, (8,))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        sharpness.one_step(model, cross_entropy, [(x, y)], rho=3.0)
        assert torch.equal(model(x), before)


def test_a_buffer_that_cannot_be_written_keeps_nothing_else_from_being_put_back():
    model = nn.Linear(6, 4)
    model.register_buffer("mask", torch.ones(1, 1).expand(4, 6))
    data = [(torch.randn(5, 6), torch.randint(4, (5,)))]
    before = state(model)
    assert sharpness.one_step(model, cross_entropy, data) > 0
    assert state(model) == before and model.training


def test_a_second_interrupt_waits_until_the_weights_are_back(monkeypatch):
    model, data = nn.Linear(6, 4), [(torch.randn(5, 6), torch.randint(4, (5,)))]
    before = state(model)
    objective = sharpness.Objective(model, cross_entropy, data)
    heard = []

    class Nervous(nn.Module):
        def train(self, mode=True):
            if mode:
                os.kill(os.getpid(), signal.SIGINT)  # in the middle of the restoration
                heard.append(mode)
            return super().train(mode)

    model.add_module("nervous", Nervous())
    with pytest.raises(KeyboardInterrupt), objective.held():
        with torch.no_grad():
            model.weight.add_(1.0)
        raise KeyboardInterrupt
    assert heard
    del model.nervous
    assert state(model) == before


def test_modules_that_merge_weights_in_evaluation_are_left_as_they_were():
    class Merging(nn.Linear):
        """As adapters do: in evaluation mode their product is added to the weight."""

        merged = False

        def train(self, mode=True):
            super().train(mode)
            if mode == self.merged:
                with torch.no_grad():
                    self.weight.add_(0.37, alpha=-1 if mode else 1)
                self.merged = not mode
            return self

    model, data = nn.Sequential(Merging(6, 4)), [(torch.randn(5, 6), torch.randint(4, (5,)))]
    merged = nn.Linear(6, 4)
    with torch.no_grad():
        merged.weight.copy_(model[0].weight + 0.37)
        merged.bias.copy_(model[0].bias)
    before = state(model)
    found = sharpness.one_step(model, cross_entropy, data)
    assert state(model) == before and not model[0].merged
    assert found == sharpness.one_step(merged, cross_entropy, data)


def test_inference_mode_is_refused_in_words():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        sharpness.one_step(nn.Linear(2, 2), cross_entropy, [(torch.randn(3, 2), torch.tensor([0, 1, 1]))])


def test_the_report_says_what_is_wrong_before_it_measures():
    model, x, y = nn.Linear(3, 3), torch.randn(9, 3), torch.randint(3, (9,))
    calls = []

    def counted(outputs, targets):
        calls.append(1)
        return cross_entropy(outputs, targets)

    for options, sentence in (
        ({"test": [(x,)]}, "a batch is tuple of 1; expected a pair"),
        ({"eigenvalues": 13}, "eigenvalues is 13; expected at most 12"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            sharpness.report(model, counted, [(x, y)], progress=False, **options)
    assert calls == []


def test_every_row_of_the_report_is_of_the_same_samples():
    torch.manual_seed(3)
    model, x, y = nn.Linear(3, 3), torch.randn(600, 3), torch.randint(3, (600,))
    found = sharpness.report(
        model, cross_entropy, [(x, y)], samples=500, eigenvalues=0, draws=2, progress=False
    )
    alone = sharpness.projected_ascent(model, cross_entropy, [(x[:500], y[:500])], 0.1, samples=None)
    of_fewer = sharpness.projected_ascent(model, cross_entropy, [(x, y)], 0.1)
    assert found["projected_ascent"] == alone != of_fewer


def test_numbers_of_numpy_are_numbers_and_halves_of_samples_are_none():
    model, data = nn.Linear(3, 3), [(torch.randn(4, 3), torch.randint(3, (4,)))]
    assert sharpness.one_step(model, cross_entropy, data, rho=np.float32(0.05), m=np.int64(2)) > 0
    for samples in (2.5, "3", True):
        with pytest.raises(ValueError, match="samples is .*; expected a whole number of at least 1"):
            sharpness.one_step(model, cross_entropy, data, samples=samples)
