"""The oracles give the numbers that the authors' code gave, so that they may judge the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import k_sam, toys
from oracles.ae_sam import AeSam
from oracles.bases import Adam, Sgd
from oracles.cr_sam import CrSam
from oracles.friendly_sam import FriendlySam
from oracles.gsam import Gsam, WithLr
from oracles.looksam import LookSam, orthogonal
from oracles.msam import Msam
from oracles.multistep_sam import MultiStepSam
from oracles.normal import normal
from oracles.rand_sam import RandSam
from oracles.sam import perturbation, total_norm
from oracles.samar import Samar
from oracles.steps import dot, moved, run, total
from oracles.toys import FOUR_SAMPLES, ONE_TENSOR, THREE_TENSORS, Quadratic, flat, toy_gradient, toy_start
from variants import FIXED, VECTORS

# The toy's numbers carry ten digits after the point, those on quadratics nine significant ones.
TOY_DIGITS = 6e-11
DIGITS = {"rtol": 6e-9, "atol": 0.0}


def toy_equal(actual, expected) -> None:
    torch.testing.assert_close(flat(actual), toys.row(*expected), rtol=0, atol=TOY_DIGITS)


def equal(actual, expected) -> None:
    torch.testing.assert_close(flat(actual), toys.row(*expected), **DIGITS)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v.label)
def test_oracle_gives_the_known_numbers(vector):
    visited = []

    def gradient(weights, step):
        visited.append(weights)
        if vector.problem is None:
            return toy_gradient(weights, step % vector.period)
        return vector.problem.gradient(weights, step)

    start = toy_start() if vector.problem is None else vector.problem.start
    after = run(vector.method(), start, gradient, vector.oracle_base(), max(vector.after))
    for step, expected in vector.after.items():
        (toy_equal if vector.problem is None else equal)(after[step - 1], expected)
    if vector.e is not None:
        torch.testing.assert_close(
            flat(visited[-1]) - flat(start), toys.row(*vector.e), rtol=6e-9, atol=1e-15
        )


@pytest.mark.parametrize("label", FIXED)
def test_oracle_with_given_draws_gives_the_known_numbers(label):
    method, expected = FIXED[label]
    after = run(method(), toy_start(), toy_gradient, Sgd(lr=0.1), max(expected))
    for step, numbers in expected.items():
        toy_equal(after[step - 1], numbers)


def test_toy_quantities_of_the_first_step():
    g = toy_gradient(toy_start(), 0)
    e = total((0.1 / total_norm(g), g))
    gs = toy_gradient(moved(toy_start(), e), 0)
    toy_equal(g, (1.7, -2.25, 1.6))
    toy_equal(e, (0.0524319388, -0.0693952131, 0.0493477071))
    toy_equal(gs, (1.7672362509, -2.5514225082, 1.6404034352))
    toy_equal(toy_gradient(moved(toy_start(), e, -1.0), 0), (1.6327637491, -1.9543563266, 1.5595965648))
    assert total_norm(g) == pytest.approx(3.2422985674, abs=TOY_DIGITS)
    assert total_norm(gs) == pytest.approx(3.5105276258, abs=TOY_DIGITS)
    assert dot(g, gs) == pytest.approx(11.3696477662, abs=TOY_DIGITS)


def test_looksam_remembers_the_orthogonal_part():
    for scope, expected in (
        ("global", (-0.0713750406, -0.1179663870, -0.0900542510)),
        ("tensor", (-0.1021763689, -0.0771999231, 0.0)),
    ):
        look = LookSam(rho=0.1, scope=scope)
        run(look, toy_start(), toy_gradient, Sgd(lr=0.1), 1)
        toy_equal(look.g_v, expected)
        g = toy_gradient(toy_start(), 0)
        assert abs(dot(look.g_v, g)) < 1e-14 * total_norm(g) * total_norm(look.g_v) * 10
    look = LookSam(rho=0.1)
    run(look, toy_start(), toy_gradient, Sgd(lr=0.1), 1)
    assert total_norm(look.g_v) == pytest.approx(0.1646822182, abs=TOY_DIGITS)


def test_looksam_of_a_zero_gradient_remembers_all():
    gs = toy_gradient(toy_start(), 0)
    assert torch.equal(flat(orthogonal(total((0.0, gs)), gs)), flat(gs))


def test_friendly_mean_after_four_steps():
    friendly = FriendlySam(rho=0.1, lmbda=0.6)
    run(friendly, toy_start(), lambda w, t: toy_gradient(w, t % 3), Sgd(lr=0.1), 4)
    toy_equal(friendly.mean, (1.3122084186, -1.1174144074, 1.2628281072))


def test_friendly_orders_are_one_method_with_another_sigma():
    # sigma_code = sigma lmbda / (1 - sigma (1 - lmbda)), for the same mean before the step
    old, g = toy_gradient(toy_start(), 1), toy_gradient(toy_start(), 2)
    paper = FriendlySam(sigma=0.5, lmbda=0.9, order="paper", mean=old).direction(g)
    code = FriendlySam(sigma=0.5 * 0.9 / (1 - 0.5 * 0.1), lmbda=0.9, mean=old).direction(g)
    a, b = (flat(d) / total_norm(d) for d in (paper, code))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_samar_ratios_and_weights():
    samar, weights, seen = Samar(rho=0.1), toy_start(), []
    base, last = Sgd(lr=0.1), None
    for number in range(4):
        size = total_norm(toy_gradient(weights, number))
        used = samar.lambda_0 if number == 0 else samar.weight
        seen.append((size / last if last else 1.0, used))
        last, weights = size, samar.step(weights, toy_gradient, base, number)
    ratios, used = zip(*seen, strict=True)
    assert ratios == pytest.approx((1, 0.5889123861, 0.8893544640, 0.9332035274), abs=TOY_DIGITS)
    assert used == pytest.approx((0.5, 0.5, 0.45, 0.405), rel=1e-14)


def test_cr_sam_direction_of_the_first_step():
    d = CrSam(rho=0.1, gamma=0.1, beta=0.01).direction(toy_start(), toy_gradient, 0)
    toy_equal(d, (1.7685809759, -2.5579710534, 1.6412115039))


def test_gsam_orthogonal_part_of_the_first_step():
    g = toy_gradient(toy_start(), 0)
    gs = toy_gradient(moved(toy_start(), g, 0.1 / total_norm(g)), 0)
    c = dot(g, gs) / dot(gs, gs)
    assert c == pytest.approx(0.9225761438, abs=TOY_DIGITS)
    toy_equal(total((1.0, g), (-c, gs)), (0.0695899945, 0.1038815387, 0.0866029246))


def test_gsam_with_a_radius_tied_to_the_learning_rate():
    method, base = Gsam(WithLr(0.2, 0.05, 0.1, 0.0), alpha=0.4), Sgd(lr=0.1)
    weights = toy_start()
    for number, lr in enumerate((0.1, 0.0666667, 0.0333333)):
        base.lr = lr
        weights = method.step(weights, toy_gradient, base, number)
    # the learning rates are known to seven digits
    torch.testing.assert_close(
        flat(weights), toys.row(0.6893949496, -0.1164214622, 1.7229379832), rtol=0, atol=2e-7
    )


def test_ae_sam_statistics_and_branches():
    method, weights, base, taken = AeSam(4, 0.1, 0.5, 0.5, 0.5), toy_start(), Sgd(lr=0.1), []
    for number in range(4):
        g = toy_gradient(weights, number)
        q = dot(g, g)
        taken.append(AeSam(4, 0.1, 0.5, 0.5, 0.5, method.mu, method.var).due(q, number))
        weights = method.step(weights, toy_gradient, base, number)
        if number == 1:
            expected = (3.5193268689, 4.3877884344, 7.2841537611)
            assert (q, method.mu, method.var) == pytest.approx(expected, abs=TOY_DIGITS)
    assert taken == [True, False, False, False]


def test_msam_stores_what_the_authors_store():
    method, base, weights = Msam(rho=0.1), Sgd(lr=0.1, momentum=0.9), toy_start()
    for number, expected in enumerate(
        (
            (0.7775680612, -0.2056047869, 1.7906522929),
            (0.5080286132, 0.0598918147, 1.5273011442),
            (0.1593880054, 0.2614977798, 1.2091356254),
        )
    ):
        weights = method.step(weights, toy_gradient, base, number)
        toy_equal(method.perturbed(weights, base), expected)


class DecayLast(Adam):
    """AdamW as the authors of MSAM write it: decay after the update and not before."""

    def step(self, weights, gradients):
        return {name: w * (1 - self.lr * 0.01) for name, w in super().step(weights, gradients).items()}


def test_msam_with_adam_gives_the_known_numbers_when_decay_comes_last():
    method, base = Msam(rho=0.1), DecayLast(lr=0.01)
    after = run(method, toy_start(), toy_gradient, base, 3)
    toy_equal(after[0], (0.9899010001, -0.4899510000, 1.9898010001))
    toy_equal(after[2], (0.9699322542, -0.4703189016, 1.9697656798))
    toy_equal(method.perturbed(after[2], base), (0.9137037913, -0.4034514138, 1.9211128377))
    first = DecayLast(lr=0.01)
    moved_once = run(Msam(rho=0.1), toy_start(), toy_gradient, first, 1)[0]
    toy_equal(method.perturbed(moved_once, first), (0.9374690613, -0.4205557869, 1.9404532930))


def one_step(problem, method):
    return run(method, problem.start, problem.gradient, Sgd(lr=0.1), 1)[0]


def test_random_point_of_the_sphere_with_a_given_draw():
    z = {"fc.weight": toys.row(0.3, -0.5, 0.2)}
    equal(total((0.05 / total_norm(z), z)), (0.0243332132, -0.0405553553, 0.0162221421))
    equal(one_step(ONE_TENSOR, RandSam(0.05, draws=[z])), (0.987566679, -2.01188893, 3.01513336))
    z |= {"fc.bias": toys.row(0.1, -0.4), "bn.weight": toys.row(0.6)}
    e = (0.0157242726, -0.0262071209, 0.0104828484, 0.00524142418, -0.0209656967, 0.0314485451)
    equal(total((0.05 / total_norm(z), z)), e)
    equal(
        one_step(THREE_TENSORS, RandSam(0.05, draws=[z])),
        (0.988427573, -2.01475858, 3.01685515, 0.48790343, -0.209517152, 1.44113087),
    )


def test_more_ascent_steps_find_more_sharpness():
    def rise(problem, method):
        visited = []

        def gradient(weights, step):
            visited.append(weights)
            return problem.gradient(weights, step)

        run(method, problem.start, gradient, Sgd(lr=0.1), 1)
        return problem.rise(total((1.0, visited[-1]), (-1.0, problem.start)))

    rises = [rise(ONE_TENSOR, MultiStepSam(0.05, n)) for n in (1, 2, 3)]
    best = ONE_TENSOR.rise({"fc.weight": toys.row(0.013447764, 0.0310743306, -0.0367905371)})
    assert rises[0] < rises[1] < rises[2] < best
    assert (rises[0], rises[2], best) == pytest.approx((0.0179167, 0.0179911, 0.0180041), abs=6e-8)
    drawn = RandSam(0.05, draws=[{"fc.weight": toys.row(0.3, -0.5, 0.2)}])
    assert rise(ONE_TENSOR, drawn) == pytest.approx(-0.00659, abs=6e-6)


def test_second_of_three_projected_ascent_steps():
    visited = []

    def gradient(weights, step):
        visited.append(weights)
        return ONE_TENSOR.gradient(weights, step)

    run(MultiStepSam(0.05, 3), ONE_TENSOR.start, gradient, Sgd(lr=0.1), 1)
    e = total((1.0, visited[2]), (-1.0, ONE_TENSOR.start))
    equal(e, (0.0153232452, 0.0326417102, -0.0346369299))


def test_a_perturbation_for_each_half_of_a_batch():
    halves = [
        Quadratic(ONE_TENSOR.start, {"fc.weight": toys.row(*slope)}, {"fc.weight": toys.row(*curvature)})
        for slope, curvature in (
            ((0.3, 0.2, -0.5), (1.5, 2.5, 3.5)),
            ((-0.1, 0.2, 0.1), (0.5, 1.5, 2.5)),
        )
    ]
    e = [perturbation(half.start, half.slope, rho=0.05) for half in halves]
    equal(e[0], (0.0243332132, 0.0162221421, -0.0405553553))
    equal(e[1], (-0.0204124145, 0.040824829, 0.0204124145))
    first, second = (half.gradient(moved(half.start, d)) for half, d in zip(halves, e, strict=True))
    mean = total((0.5, first), (0.5, second))
    equal(mean, (0.113146806, 0.250896299, -0.245456354))
    equal(moved(ONE_TENSOR.start, mean, -0.1), (0.988685319, -2.02508963, 3.02454564))


def test_k_sam_keeps_the_samples_it_chose_at_the_weights():
    w = toys.row(1, -2, 3)
    equal({"l": FOUR_SAMPLES.losses(w)}, (0.32, 0.55125, 0.5, 0.5202))
    assert k_sam.worst(FOUR_SAMPLES.losses(w), 2) == [1, 3]
    new = k_sam.step(FOUR_SAMPLES, w, k=2, rho=0.05, lr=0.1)
    equal({"w": new}, (1.05335091, -2.00070398, 3.00070398))
    g = FOUR_SAMPLES.gradient(w, [1, 3])
    equal({"g": g}, (-0.51, -0.015, 0.015))
    e = 0.05 * g / g.norm()
    equal({"e": e}, (-0.0499568034, -0.00146931775, 0.00146931775))
    equal({"l": FOUR_SAMPLES.losses(w + e)}, (0.28349082, 0.554339885, 0.606522173, 0.569263885))
    assert k_sam.worst(FOUR_SAMPLES.losses(w + e), 2) == [2, 3]


def test_k_sam_of_equal_losses_takes_the_first():
    assert k_sam.worst(toys.row(1, 2, 2, 2), 2) == [1, 2]


def test_normal_numbers_are_normal():
    z = normal(seed=5, step=1, tensor=2, count=40001)
    assert len(z) == 40001
    # five standard errors of the mean, the variance, the fourth moment and the correlation of a pair
    error = 5 / 200
    assert abs(z.mean()) < error
    assert abs((z**2).mean() - 1) < error * np.sqrt(2)
    assert abs((z**4).mean() - 3) < error * np.sqrt(96)
    assert abs((z[:-1:2] * z[1::2]).mean()) < error * np.sqrt(2)


def test_normal_numbers_do_not_depend_on_how_many_are_drawn():
    long = normal(5, 0, 3, 64)
    for count in (1, 2, 3, 4, 5, 63):
        assert np.array_equal(normal(5, 0, 3, count), long[:count])
    assert not np.array_equal(normal(5, 1, 3, 64), long)
    assert not np.array_equal(normal(5, 0, 4, 64), long)
