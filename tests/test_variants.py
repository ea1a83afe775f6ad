"""Every variant, step after step: the authors' numbers, and six steps beside its oracle."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from cases import BASES, ONE_TENSOR, Quadratic, row, toy_loss, toy_parameters
from fixtures import (
    assert_close,
    backends,
    backward_of,
    batches,
    every_backend,
    small_net,
    squared_error,
    values,
    why_not,
)
from oracles import toys
from oracles.bases import Sgd
from oracles.normal import noise
from oracles.trajectory import gradient_of
from torch.nn import Parameter
from variants import VARIANTS, VECTORS

from sam_kernels import SAM, recipes

STEPS = 6
THREE = ("reference", "foreach", "native")
three_backends = pytest.mark.parametrize("backend", [b for b in backends() if b.values[0] in THREE])


def recipe_of(case):
    """Return the recipe that a row of the table asks for."""
    if case.recipe == "sam" and case.inside:
        return recipes.sam(**case.arguments, decay="inside")
    recipe = recipes.get(case.recipe, **case.arguments)
    return dataclasses.replace(recipe, decay="inside") if case.inside else recipe


# ---- the numbers of the authors ---------------------------------------------------------------------------


def backward_through(loss, visited=None, weights=()):
    """Return a closure that differentiates loss(), and that writes down where it was called."""

    def closure():
        if visited is not None:
            visited.append(values(weights))
        value = loss()
        value.backward()
        return value

    return closure


@every_backend
@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v.label)
def test_known_numbers(vector, backend):
    if vector.problem is None:
        weights = toy_parameters()
        rtol, atol = 0.0, vector.tolerance
    else:
        weights = {name: Parameter(w.clone()) for name, w in vector.problem.start.items()}
        rtol, atol = 2e-8, 1e-11  # nine significant digits
    problem = vector.problem and Quadratic(**vars(vector.problem))
    base = {"lr": 0.1, **vector.base}
    opt = SAM(weights.items(), torch.optim.SGD, recipe=recipe_of(vector), backend=backend, **base)
    start, visited = values(weights.values()), []

    def closure(step):
        loss = (lambda: toy_loss(weights, step % vector.period)) if problem is None else problem_loss
        return backward_through(loss, visited, weights.values())

    def problem_loss():
        return problem.loss(weights)

    for step in range(max(vector.after)):
        more = {"ahead": closure(step + 1)} if vector.recipe == "sampa" else {}
        opt.step(closure(step), **more)
        if step == 0 and vector.e is not None:
            e = torch.cat([w - s for w, s in zip(visited[-1], start, strict=True)])
            torch.testing.assert_close(e, row(*vector.e), rtol=rtol, atol=atol)
        if step + 1 in vector.after:
            torch.testing.assert_close(toys.flat(weights), row(*vector.after[step + 1]), rtol=rtol, atol=atol)


@three_backends
def test_gsam_with_a_radius_tied_to_the_learning_rate(backend):
    from sam_kernels.schedules import ProportionalToLr

    weights = toy_parameters()
    rho = ProportionalToLr(rho_max=0.2, rho_min=0.05, lr_max=0.1, lr_min=0.0)
    recipe = recipes.gsam(rho=rho, alpha=0.4)
    opt = SAM(weights.items(), torch.optim.SGD, recipe=recipe, backend=backend, lr=0.1)
    for step, lr in enumerate((0.1, 0.0666667, 0.0333333)):
        opt.param_groups[0]["lr"] = lr
        opt.step(backward_through(lambda step=step: toy_loss(weights, step)))
    # the learning rates are known to seven digits
    expected = row(0.6893949496, -0.1164214622, 1.7229379832)
    torch.testing.assert_close(toys.flat(weights), expected, rtol=0, atol=2e-7)


@three_backends
def test_k_sam_takes_both_gradients_on_the_samples_of_highest_loss(backend):
    from sam_kernels import sampling

    problem = toys.FOUR_SAMPLES
    w = Parameter(row(1, -2, 3))
    opt = SAM([w], torch.optim.SGD, recipe=recipes.k_sam(rho=0.05), backend=backend, lr=0.1)

    def losses(batch):
        x, y = batch
        return 0.5 * (x @ w - y) ** 2

    closure = sampling.top_losses(losses, (problem.x, problem.y), keep=2)
    opt.step(closure)
    assert sorted(closure.kept.tolist()) == [1, 3]
    torch.testing.assert_close(w.detach(), row(1.05335091, -2.00070398, 3.00070398), rtol=2e-8, atol=0)


def two_halves(weights):
    """Return closures of two losses, each halved, whose mean is the problem of one tensor."""
    first = Quadratic(ONE_TENSOR.start, {"fc.weight": row(0.3, 0.2, -0.5)}, {"fc.weight": row(1.5, 2.5, 3.5)})
    second = Quadratic(
        ONE_TENSOR.start, {"fc.weight": row(-0.1, 0.2, 0.1)}, {"fc.weight": row(0.5, 1.5, 2.5)}
    )
    return [backward_through(lambda p=p: 0.5 * p.loss(weights)) for p in (first, second)]


@three_backends
@pytest.mark.parametrize(
    ("m_sharpness", "expected"),
    [(True, (0.988685319, -2.02508963, 3.02454564)), (False, (0.988333333, -2.02666667, 3.03))],
    ids=["a perturbation for each closure", "one perturbation"],
)
def test_two_closures_are_one_step(m_sharpness, expected, backend):
    weights = ONE_TENSOR.parameters()
    opt = SAM(weights.items(), torch.optim.SGD, recipe=recipes.sam(rho=0.05), backend=backend, lr=0.1)
    opt.step(two_halves(weights), **({"m_sharpness": True} if m_sharpness else {}))
    torch.testing.assert_close(toys.flat(weights), row(*expected), rtol=2e-8, atol=0)


# ---- six steps beside the oracle --------------------------------------------------------------------------


@dataclasses.dataclass
class Toy:
    """The toy problem, whose gradient the oracle has written out and the package differentiates."""

    dtype: torch.dtype = torch.float64

    def parameters(self):
        """Return named parameters of this dtype."""
        return {name: Parameter(w.detach().to(self.dtype)) for name, w in toy_parameters().items()}

    def closure(self, weights, step):
        """Return the closure of one batch."""
        return backward_through(lambda: toy_loss({n: w.double() for n, w in weights.items()}, step % 4))

    def oracle(self):
        """Return start and gradient for the oracle."""
        return toys.toy_start(), toys.toy_gradient


@dataclasses.dataclass
class Net:
    """Two layers and a normalization between them; every step has its batch."""

    dtype: torch.dtype = torch.float64

    def parameters(self):
        """Return the net's named parameters."""
        self.model = small_net(self.dtype)
        return dict(self.model.named_parameters())

    def closure(self, weights, step):
        """Return the closure of one batch."""
        return backward_of(self.model, batches(STEPS + 1, 4, 5, dtype=self.dtype)[step], step)

    def oracle(self):
        """Return start and gradient for the oracle."""
        model = small_net()
        return dict(model.named_parameters()), gradient_of(model, squared_error, batches(STEPS + 1, 4, 5))


PROBLEMS = {"toy": Toy, "net": Net}


def distinct(points: list) -> list:
    """Drop points that repeat the one before: two gradients at one place may be one."""
    kept = []
    for point in points:
        if not kept or not all(torch.equal(a, b) for a, b in zip(point, kept[-1], strict=True)):
            kept.append(point)
    return kept


@functools.cache
def expected_steps(label: str, base_label: str, problem: str) -> list:
    """Return for each step where the oracle took gradients, and the weights after it."""
    case = next(v for v in VARIANTS if v.label == label)
    base_case = next(b for b in BASES if b.label == base_label)
    options = {**base_case.arguments, **({"weight_decay": 0.0} if case.inside else {})}
    weights, of = PROBLEMS[problem]().oracle()
    weights = {name: w.detach().double().clone() for name, w in weights.items()}
    method, base, steps = case.method(), base_case.oracle(**options), []
    for step in range(STEPS):
        visited = []

        def gradient(at, batch, visited=visited):
            visited.append(values(at.values()))
            return of(at, batch)

        weights = method.step(weights, gradient, base, step)
        steps.append((distinct(visited), list(weights.values())))
    return steps


def pairs() -> list:
    """Return each variant with each base; decay inside the gradients is SGD's only."""
    found = []
    for case in VARIANTS:
        for base in BASES:
            if base.label == "sgd-momentum" or (base.label == "adamw" and not case.inside):
                found.append(pytest.param(case, base, id=f"{case.label}-{base.label}"))
    return found


ENGINES = [
    pytest.param(
        backend,
        dtype,
        id=f"{backend}-{name}",
        marks=pytest.mark.skipif(why_not(backend) is not None, reason=why_not(backend) or "runs"),
    )
    for backend, dtype, name in (
        ("reference", torch.float64, "f64"),
        ("native", torch.float64, "f64"),
        ("native", torch.float32, "f32"),
    )
]


def tolerance(case, dtype: torch.dtype) -> float:
    """Return the relative tolerance of six steps."""
    if dtype == torch.float32:
        return 1e-4  # gradients of float32, and differences of gradients
    # the package's normal numbers are float32 sums, the oracle's are the library's: 2e-6 of the noise
    return 1e-6 if case.draws else 1e-9


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("case", "base"), pairs())
@pytest.mark.parametrize(("backend", "dtype"), ENGINES)
def test_six_steps_follow_the_oracle(backend, dtype, case, base, problem):
    expected = expected_steps(case.label, base.label, problem)
    of = PROBLEMS[problem](dtype)
    weights = of.parameters()
    options = {**base.arguments, **({"weight_decay": case.inside} if case.inside else {})}
    opt = SAM(weights.items(), base.base, recipe=recipe_of(case), backend=backend, **options)
    relative = tolerance(case, dtype)
    for step, (points, after) in enumerate(expected):
        visited = []

        def closure(batch, visited=visited):
            backward = of.closure(weights, batch)

            def call():
                visited.append(values(weights.values()))
                return backward()

            return call

        more = {"ahead": closure(step + 1)} if case.recipe == "sampa" else {}
        opt.step(closure(step), **more)
        visited = distinct(visited)
        assert len(visited) == len(points), f"step {step}: gradients at {len(visited)} points"
        if case.recipe == "sampa":  # its two gradients wait for nothing, and may come in any order
            visited, points = (
                sorted(at, key=lambda point: float(sum(w.double().sum() for w in point)))
                for at in (visited, points)
            )
        for actual, point in zip(visited, points, strict=True):
            assert_close(actual, point, relative)
        assert_close(weights.values(), after, relative)


@pytest.mark.parametrize("case", VARIANTS, ids=lambda c: c.label)
def test_table_tells_a_variant_from_plain_sgd_and_from_its_neighbours(case):
    def ends(label):
        return toys.flat(dict(enumerate(expected_steps(label, "sgd-momentum", "net")[-1][1])))

    weights, gradient = Net().oracle()
    base = Sgd(lr=0.1, momentum=0.9, weight_decay=case.inside or 0.01)
    for step in range(STEPS):
        weights = base.step(weights, gradient(weights, step))
    # ten times what float32 may be off
    assert float((ends(case.label) - toys.flat(weights)).norm()) > 1e-3
    for other in VARIANTS:
        if other.label != case.label:
            assert float((ends(case.label) - ends(other.label)).norm()) > 1e-3, other.label


# ---- the random numbers ------------------------------------------------------------------------------------


@every_backend
def test_noise_is_the_oracles_within_float32(backend):
    weights = {str(n): Parameter(torch.zeros(n, dtype=torch.float64)) for n in (1, 3, 4, 5, 1027)}
    opt = SAM(
        weights.items(), torch.optim.SGD, recipe=recipes.rand_sam(rho=1.0, seed=11), backend=backend, lr=1
    )
    for step in range(2):
        visited = []
        zero = backward_through(
            lambda: sum((0 * w).sum() for w in weights.values()), visited, weights.values()
        )
        opt.step(zero)
        (probe,) = visited
        z = noise({name: w.detach() for name, w in weights.items()}, seed=11, step=step)
        size = torch.cat(list(z.values())).norm()
        actual = torch.cat(probe) * size
        torch.testing.assert_close(actual, torch.cat(list(z.values())), rtol=0, atol=2e-6)


# ---- the two-step form -------------------------------------------------------------------------------------

NEED_A_CLOSURE = ("cr_sam", "multistep_sam", "r_sam", "sampa", "lookbehind_sam")
ONE_GRADIENT = ("rand_sam", "msam")


@pytest.mark.parametrize(
    "case", [v for v in VARIANTS if v.recipe not in NEED_A_CLOSURE], ids=lambda c: c.label
)
def test_two_step_form_is_the_closure_form(case):
    expected = expected_steps(case.label, "sgd-momentum", "net")
    of = Net()
    weights = of.parameters()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": case.inside or 0.01}
    opt = SAM(weights.items(), torch.optim.SGD, recipe=recipe_of(case), backend="reference", **options)
    for step, (_, after) in enumerate(expected):
        backward = of.closure(weights, step)
        opt.zero_grad()
        if case.recipe not in ONE_GRADIENT:
            backward()
        opt.first_step(zero_grad=True)
        backward()
        opt.second_step(zero_grad=True)
        assert_close(weights.values(), after, tolerance(case, torch.float64))


@pytest.mark.parametrize("name", NEED_A_CLOSURE)
def test_variant_of_more_than_two_stops_says_that_it_needs_a_closure(name):
    w = Parameter(torch.ones(3, dtype=torch.float64))
    opt = SAM([("weight", w)], torch.optim.SGD, recipe=name, lr=0.1)
    w.grad = torch.ones_like(w)
    with pytest.raises((RuntimeError, ValueError), match=f"(?s){name}.*closure"):
        opt.first_step()
    assert torch.equal(w, torch.ones_like(w))
