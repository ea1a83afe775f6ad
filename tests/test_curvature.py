"""Curvature: against Hessians by complex steps in numpy, and what it leaves of the model."""

from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from fixtures import same_bits, values
from oracles import curvature as oracle
from torch import nn
from torch.nn import functional as F

from sam_kernels.sharpness import (
    Objective,
    along_gradient,
    eigenvalues,
    hessian_vector_product,
    trace,
)
from sam_kernels.sharpness.hessian import Hessian
from sam_kernels.sharpness.vectors import gaussian, rademacher


class Toy(nn.Module):
    """The loss itself, a function of c; its batches are all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(oracle.TOY_START[:2]))
        self.b = nn.Parameter(torch.tensor(oracle.TOY_START[2:]))

    def forward(self, c):
        (a1, a2), (b,) = self.a, self.b
        push = (c * torch.cat([self.a, self.b])).sum(-1).mean()
        return 0.5 * (a1**2 + 4 * a2**2 + 0.5 * b**2) + 0.3 * a1 * b + 0.1 * a2**4 + push


def itself(output, target):
    return output


C = torch.tensor(oracle.TOY_PUSH)[None]
TOY = (itself, [(C, C)])
H0 = np.array([[1, 0, 0.3], [0, 4.3, 0], [0.3, 0, 0.5]])

needs_scipy = pytest.mark.skipif(
    importlib.util.find_spec("scipy") is None, reason="scipy, which has Lanczos, is not installed"
)
METHODS = [pytest.param("lanczos", marks=needs_scipy), "power", "dense"]

INPUTS, HIDDEN, CLASSES = 4, 5, 3


def problem(dtype=torch.float64, sizes=(7, 7, 3)):
    """A small network away from its minimum, and batches of unequal sizes."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.8)
    x = torch.randn(sum(sizes), INPUTS, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (sum(sizes),), generator=generator)
    batches = list(zip(x.to(dtype).split(sizes), y.split(sizes), strict=True))
    w = torch.cat([p.detach().double().flatten() for p in model.parameters()]).numpy()
    dense = oracle.hessian(lambda w: oracle.mlp_gradient(w, x.numpy(), y.numpy(), HIDDEN, CLASSES), w)
    return model, F.cross_entropy, batches, dense


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors]).numpy()


# ---- products ------------------------------------------------------------------------------------------


def test_the_oracle_has_the_hessian_of_the_toy():
    np.testing.assert_allclose(oracle.hessian(oracle.toy_gradient, oracle.TOY_START), H0, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("method", "tolerance"), [("exact", 1e-14), ("difference", 1e-7)])
def test_products_with_unit_vectors_are_the_hessian_of_the_toy(method, tolerance):
    columns = [
        flat(hessian_vector_product(Toy(), *TOY, [unit[:2], unit[2:]], method=method))
        for unit in torch.eye(3, dtype=torch.float64)
    ]
    np.testing.assert_allclose(np.stack(columns, 1), H0, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("method", "tolerance"), [("exact", 1e-12), ("difference", 1e-6)])
def test_products_are_of_the_mean_over_samples_of_unequal_batches(method, tolerance):
    model, loss_fn, batches, dense = problem()
    v = gaussian(list(model.parameters()), seed=1)
    found = flat(hessian_vector_product(model, loss_fn, batches, v, method=method))
    np.testing.assert_allclose(found, dense @ flat(v), rtol=tolerance, atol=tolerance)


def test_products_by_difference_do_not_depend_on_the_length_of_v():
    model, loss_fn, batches, dense = problem()
    v = gaussian(list(model.parameters()), seed=1)
    for scale in (1e-8, 1e8):
        scaled = [scale * x for x in v]
        found = flat(hessian_vector_product(model, loss_fn, batches, scaled, method="difference"))
        np.testing.assert_allclose(found / scale, dense @ flat(v), rtol=1e-6, atol=1e-6)


def test_the_step_of_a_difference_is_the_one_asked_for():
    # Along a2 the gradient is 4 a + 0.4 a^3 + c, whose central difference is 4 + 0.4 (3 a^2 + h^2).
    e = [torch.tensor([0.0, 1.0]), torch.zeros(1)]
    found = flat(hessian_vector_product(Toy(), *TOY, e, method="difference", h=0.5))
    np.testing.assert_allclose(found, [0, 4 + 0.4 * (3 * 0.25 + 0.25), 0], atol=1e-12)


def test_a_product_with_zero_is_zero():
    zero = [torch.zeros(2), torch.zeros(1)]
    for method in ("exact", "difference"):
        assert not flat(hessian_vector_product(Toy(), *TOY, zero, method=method)).any()


def test_tied_weights_count_once():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(11, 4, generator=generator, dtype=torch.float64)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 3, bias=False, dtype=torch.float64)
            self.second = nn.Linear(4, 3, bias=False, dtype=torch.float64)
            self.second.weight = self.first.weight

        def forward(self, x):
            return torch.tanh(self.first(x)) @ self.second.weight

    model = Tied()
    w = flat([model.first.weight])
    dense = oracle.hessian(lambda w: oracle.tied_gradient(w, x.numpy(), 3), w)
    batches = [(x[:8], x[:8]), (x[8:], x[8:])]
    v = gaussian([model.first.weight], seed=0)
    for method, tolerance in (("exact", 1e-12), ("difference", 1e-6)):
        found = flat(hessian_vector_product(model, F.mse_loss, batches, v, method=method))
        np.testing.assert_allclose(found, dense @ flat(v), rtol=tolerance, atol=tolerance)
    assert eigenvalues(model, F.mse_loss, batches, 2).values == pytest.approx(oracle.outermost(dense, 2))


def test_frozen_parameters_are_no_weights_and_unused_ones_have_no_curvature():
    model, loss_fn, batches, dense = problem()
    model[0].weight.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    own = INPUTS * HIDDEN
    block = np.zeros((len(dense) - own + 2,) * 2)
    block[2:, 2:] = dense[own:, own:]
    params = [p for p in model.parameters() if p.requires_grad]
    assert params[0] is model.unused
    v = gaussian(params, seed=2)
    for method, tolerance in (("exact", 1e-12), ("difference", 1e-6)):
        found = flat(hessian_vector_product(model, loss_fn, batches, v, method=method))
        np.testing.assert_allclose(found, block @ flat(v), rtol=tolerance, atol=tolerance)
        assert not found[:2].any()


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature():
    model = nn.Linear(3, 1)
    x = torch.randn(5, 3)
    v = gaussian(list(model.parameters()), seed=0)
    found = hessian_vector_product(model, lambda out, y: out.mean(), [(x, x)], v)
    assert not flat(found).any()
    for method in ("power", "dense"):
        spectrum = eigenvalues(model, lambda out, y: out.mean(), [(x, x)], 2, method=method)
        assert spectrum.values == (0, 0) and spectrum.converged, method


@needs_scipy
def test_lanczos_finds_nothing_where_there_is_no_curvature():
    wide = nn.Linear(40, 1)  # large enough that Lanczos itself is asked
    x = torch.randn(5, 40)
    spectrum = eigenvalues(wide, lambda out, y: out.mean(), [(x, x)], 2, method="lanczos")
    assert spectrum.method == "lanczos" and spectrum.values == (0, 0) and spectrum.converged


def test_batch_norm_is_evaluated_with_its_running_statistics():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    model(x * 3 + 1)  # statistics that are not those of x
    assert model.training
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    v = gaussian(list(model.parameters()), seed=4)
    buffers = values(model.buffers())
    found = flat(hessian_vector_product(model, F.mse_loss, [(x[:4], y[:4]), (x[4:], y[4:])], v))
    assert same_bits(values(model.buffers()), buffers) and model.training and model[1].training

    model.eval()
    pieces = [s.numel() for s in shapes]

    def loss(w):
        parts = [p.view(s) for p, s in zip(w.split(pieces), shapes, strict=True)]
        output = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))
        return F.mse_loss(output, y)

    dense = torch.func.hessian(loss)(w).numpy()
    np.testing.assert_allclose(found, dense @ flat(v), rtol=1e-10, atol=1e-12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x):
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v)


def test_an_operator_without_second_derivative_is_named_and_difference_serves_it():
    torch.manual_seed(1)
    model, x = Attention(), torch.randn(4, 5, 6)
    batches = [(x, torch.randn(4, 1, 5, 6))]
    v = gaussian(list(model.parameters()), seed=0)
    backend = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel(backend.MATH):
        truth = flat(hessian_vector_product(model, F.mse_loss, batches, v))
    with torch.nn.attention.sdpa_kernel(backend.FLASH_ATTENTION):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice.*'difference'"):
            hessian_vector_product(model, F.mse_loss, batches, v)
        found = flat(hessian_vector_product(model, F.mse_loss, batches, v, method="difference"))
    assert np.linalg.norm(found - truth) < 0.01 * np.linalg.norm(truth)


def test_the_default_step_serves_float32_networks():
    model, loss_fn, batches, _ = problem(torch.float32)
    dense = problem()[3]
    v = gaussian(list(model.parameters()), seed=1)
    found = flat(hessian_vector_product(model, loss_fn, batches, v, method="difference"))
    assert np.linalg.norm(found - dense @ flat(v)) < 2e-3 * np.linalg.norm(dense @ flat(v))
    exact = eigenvalues(model, loss_fn, batches, 2)
    assert exact.values == pytest.approx(oracle.outermost(dense, 2), rel=1e-5)
    by_difference = eigenvalues(model, loss_fn, batches, 2, hvp="difference", tol=0.01)
    assert by_difference.values == pytest.approx(oracle.outermost(dense, 2), rel=2e-3)


def test_mixed_dtypes_move_together():
    model, loss_fn, batches, dense = problem()
    model[2].float()
    mixed = nn.Sequential(*model[:2], Cast(), model[2])
    v = gaussian(list(mixed.parameters()), seed=1)
    assert {x.dtype for x in v} == {torch.float64, torch.float32}
    found = hessian_vector_product(mixed, loss_fn, batches, v, method="difference")
    assert [x.dtype for x in found] == [x.dtype for x in v]
    assert np.linalg.norm(flat(found) - dense @ flat(v)) < 2e-3 * np.linalg.norm(dense @ flat(v))


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


# ---- eigenvalues ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "power", "dense"])
def test_the_largest_eigenvalue_of_the_toy(method):
    spectrum = eigenvalues(Toy(), *TOY, method=method)
    assert spectrum.values[0] == pytest.approx(4.3, rel=1e-6)
    np.testing.assert_allclose(flat(spectrum.vectors[0]), [0, 1, 0], atol=1e-3)
    assert spectrum.converged


def test_power_iteration_follows_the_sequence_of_the_toy():
    ones = np.ones(3)
    published = [2.1333290667, 3.9452899923, 4.2725448289, 4.2980537742, 4.2998611655]
    np.testing.assert_allclose(oracle.power_iteration(H0, ones / 3**0.5, 5, tau=1e-6), published, atol=1e-10)
    start = [torch.ones(2), torch.ones(1)]
    found = eigenvalues(Toy(), *TOY, method="power", start=start, tol=1e-9)
    history = found.history[0]
    np.testing.assert_allclose(history, oracle.power_iteration(H0, ones, len(history)), rtol=1e-13)
    np.testing.assert_allclose(history[:5], published, rtol=3e-6)  # PyHessian divides by ||v|| + 1e-6
    assert found.values[0] == pytest.approx(4.3, rel=1e-13), "the last estimate, not the one before"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["largest", "magnitude"])
def test_the_outermost_eigenvalues_of_a_network(method, which):
    model, loss_fn, batches, dense = problem()
    truth = oracle.outermost(dense, 3, which == "magnitude")
    found = eigenvalues(model, loss_fn, batches, 3, which=which, method=method, tol=1e-4, steps=2000)
    assert found.converged and found.method == method and found.which == which
    np.testing.assert_allclose(found.values, truth, rtol=1e-5)
    for value, v, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        assert [x.shape for x in v] == [p.shape for p in model.parameters()]
        assert np.linalg.norm(flat(v)) == pytest.approx(1)
        assert abs(flat(v)).max() == flat(v).max(), "of v and -v the one whose largest entry is positive"
        assert np.linalg.norm(dense @ flat(v) - value * flat(v)) == pytest.approx(residual, abs=1e-10)
        assert residual <= 1e-4 * abs(truth).max()
    gram = np.stack([flat(v) for v in found.vectors])
    np.testing.assert_allclose(gram @ gram.T, np.eye(3), atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_largest_is_by_value_where_a_negative_one_is_farther_out(method):
    diagonal = torch.linspace(-5, 2, 40, dtype=torch.float64)

    class Saddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(40, dtype=torch.float64))

        def forward(self, x):
            return 0.5 * (diagonal * self.w**2).sum() * x.mean()

    one = torch.ones(1, 1, dtype=torch.float64)
    largest = eigenvalues(Saddle(), itself, [(one, one)], 2, method=method, tol=1e-4, steps=3000)
    assert largest.values == pytest.approx(diagonal.flip(0)[:2].tolist(), rel=1e-5)
    assert largest.converged
    farthest = eigenvalues(Saddle(), itself, [(one, one)], 2, method=method, which="magnitude", steps=3000)
    assert farthest.values == pytest.approx(diagonal[:2].tolist(), rel=1e-4)


def test_all_eigenvalues_of_a_tiny_model_can_be_had():
    found = eigenvalues(Toy(), *TOY, 3)
    assert found.method == "dense" and found.products == 3
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(H0)[::-1], rtol=1e-12)


def test_a_start_near_the_eigenvector_saves_products():
    model, loss_fn, batches, _ = problem()
    cold = eigenvalues(model, loss_fn, batches, method="power")
    warm = eigenvalues(model, loss_fn, batches, method="power", start=cold.vectors[0])
    assert warm.products < cold.products / 2
    assert warm.values == pytest.approx(cold.values, rel=1e-5)


def test_rough_eigenvectors_do_not_hold_up_those_after_them():
    # What products leave along a vector that is only roughly found is no residual of the next one.
    model, loss_fn, batches, _ = problem()
    options = {"which": "magnitude", "method": "power", "tol": 0.1, "steps": 1000, "seed": 1}
    found = eigenvalues(model, loss_fn, batches, 4, **options)
    assert found.converged and found.products < 200


def test_too_few_steps_are_said():
    model, loss_fn, batches, dense = problem()
    with pytest.warns(UserWarning, match="by power after 3 products.*residual"):
        found = eigenvalues(model, loss_fn, batches, method="power", steps=3, tol=1e-9)
    assert not found.converged and found.products == 3
    assert 0 < found.values[0] < oracle.outermost(dense, 1)[0]


@needs_scipy
def test_lanczos_that_found_nothing_says_so():
    model, loss_fn, batches, _ = problem()
    with pytest.raises(RuntimeError, match="found none of 1 eigenvalues.*more steps"):
        eigenvalues(model, loss_fn, batches, method="lanczos", steps=2, ncv=2, tol=1e-12)


def test_a_hessian_that_is_not_finite_has_no_eigenvalues():
    model, loss_fn, batches, _ = problem()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    for method in ("auto", "power", "dense"):
        with pytest.warns(UserWarning, match="not finite"):
            found = eigenvalues(model, loss_fn, batches, 2, method=method)
        assert len(found.values) == 2 and all(map(math.isnan, found.values))
        assert found.vectors == () and not found.converged


@needs_scipy
def test_the_same_seed_gives_the_same_bits_whatever_torch_has_drawn():
    model, loss_fn, batches, _ = problem(torch.float32)
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        np.random.seed(noise)
        found = eigenvalues(model, loss_fn, batches, 2, method="lanczos", seed=7)
        runs.append((found.values, flat(found.vectors[1]).tobytes(), trace(model, loss_fn, batches).values))
    assert runs[0] == runs[1]


def test_without_scipy_power_iteration_serves_and_lanczos_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "scipy"] + ["scipy"]:
        monkeypatch.setitem(sys.modules, name, None)
    model, loss_fn, batches, dense = problem()
    found = eigenvalues(model, loss_fn, batches)
    assert found.method == "power" and found.values[0] == pytest.approx(oracle.outermost(dense, 1)[0])
    with pytest.raises(ImportError, match=r"needs scipy.*pip install 'sam_kernels\[sharpness\]'"):
        eigenvalues(model, loss_fn, batches, method="lanczos")


# ---- trace and curvature along the gradient ------------------------------------------------------------


def test_the_trace_of_the_toy_is_a_mean_of_its_two_values():
    found = trace(Toy(), *TOY, draws=64, seed=5)
    for value, v in zip(found.values, draws_of(Toy(), 64, 5), strict=True):
        assert value == pytest.approx(5.8 + 0.6 * v[0] * v[2], rel=1e-12)  # 6.4 or 5.2
    assert {round(value, 9) for value in found.values} == {6.4, 5.2}
    assert abs(found - 5.8) < 3 * found.error
    assert found.error == pytest.approx(np.std(found.values, ddof=1) / 8)


def draws_of(model, draws, seed):
    return [flat(rademacher(list(model.parameters()), seed, draw)) for draw in range(draws)]


def test_the_trace_of_a_network_is_within_its_error():
    model, loss_fn, batches, dense = problem()
    found = trace(model, loss_fn, batches, draws=200)
    assert [v @ dense @ v for v in draws_of(model, 200, 0)] == pytest.approx(found.values)
    assert abs(found - np.trace(dense)) < 3 * found.error < np.trace(dense) / 2
    assert trace(model, loss_fn, batches, draws=3, seed=1).values != found.values[:3]


def test_random_signs_are_independent_and_even():
    v = np.stack(draws_of(problem()[0], 500, 0))
    assert set(np.unique(v)) == {-1, 1}
    # 43 * 42 / 2 correlations of 500 signs: the largest of so many normal ones is below 5 / sqrt(500).
    away = v.T @ v / 500 - np.eye(v.shape[1])
    assert abs(away).max() < 5 / 500**0.5
    assert abs(v.mean(0)).max() < 5 / 500**0.5


def test_the_trace_stops_when_its_error_is_small_and_not_before():
    model, loss_fn, batches, _ = problem()
    all_draws = trace(model, loss_fn, batches, draws=200)
    found = trace(model, loss_fn, batches, draws=200, tol=0.2)
    n = len(found.values)
    assert 8 < n < 200 and found.values == all_draws.values[:n]
    assert found.error <= 0.2 * abs(found)
    before = np.array(all_draws.values[: n - 1])
    assert np.std(before, ddof=1) / (n - 1) ** 0.5 > 0.2 * abs(before.mean())
    # H diagonal: every draw is the trace, and eight show it.
    batch = torch.ones(1, 1), torch.zeros(1, 1)
    assert trace(nn.Linear(1, 1, bias=False), F.mse_loss, [batch], tol=1e-3).values == (2.0,) * 8


def test_curvature_along_the_gradient_of_the_toy():
    g = oracle.toy_gradient(oracle.TOY_START)
    assert along_gradient(Toy(), *TOY) == pytest.approx(g @ H0 @ g / (g @ g), rel=1e-12)
    found = along_gradient(Toy(), *TOY, rho=0.1)
    assert found == pytest.approx(2.6231273143, abs=1e-8)
    assert found.error == 0
    e = 0.1 * g / np.linalg.norm(g)
    at = oracle.TOY_START
    truth = (oracle.toy_loss(at + e) + oracle.toy_loss(at - e) - 2 * oracle.toy_loss(at)) / 0.01
    assert found == pytest.approx(truth, rel=1e-11)


def test_without_a_gradient_there_is_no_direction():
    model = nn.Linear(2, 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    batches = [(torch.ones(3, 2), torch.zeros(3, 1))]
    assert math.isnan(along_gradient(model, F.mse_loss, batches))
    assert math.isnan(along_gradient(model, F.mse_loss, batches, rho=0.1))


# ---- what is left of the model -------------------------------------------------------------------------

MEASURES = {
    "product": lambda *a: hessian_vector_product(*a, gaussian(list(a[0].parameters()), 0)),
    "difference": lambda *a: hessian_vector_product(
        *a, gaussian(list(a[0].parameters()), 0), method="difference"
    ),
    "lanczos": lambda *a: eigenvalues(*a, method="lanczos"),
    "lanczos of differences": lambda *a: eigenvalues(*a, method="lanczos", hvp="difference", tol=0.1),
    "power": lambda *a: eigenvalues(*a, method="power"),
    "trace": lambda *a: trace(*a, draws=3),
    "trace of differences": lambda *a: trace(*a, draws=3, hvp="difference"),
    "along the gradient": lambda *a: along_gradient(*a, rho=0.1),
}


def network():
    torch.manual_seed(0)
    layers = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
    model = nn.Sequential(*layers)
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    F.cross_entropy(model(x), y).backward()
    model[1].eval()
    return model, [(x[:8], y[:8]), (x[8:], y[8:])]


def look_of(model):
    return (
        [t.numpy().tobytes() for t in values([*model.parameters(), *model.buffers()])],
        [p.grad.numpy().tobytes() for p in model.parameters()],
        [id(p.grad) for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


LANCZOS = {"lanczos", "lanczos of differences"}
NAMES = [pytest.param(name, marks=[needs_scipy] if name in LANCZOS else []) for name in MEASURES]


@pytest.mark.parametrize("name", NAMES)
def test_a_measure_leaves_the_model_as_it_was(name):
    model, batches = network()
    before = look_of(model)
    MEASURES[name](model, F.cross_entropy, batches)
    assert look_of(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_measure_leaves_the_model_as_it_was(name):
    model, batches = network()
    before = look_of(model)
    calls = []

    def interrupted(output, target):
        calls.append(None)
        if len(calls) == (2 if name == "product" else 4):
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    with pytest.raises(KeyboardInterrupt):
        MEASURES[name](model, interrupted, batches)
    assert look_of(model) == before


def test_weights_are_moved_while_differences_are_taken_and_only_then():
    model, batches = network()
    objective = Objective(model, F.cross_entropy, batches)
    before = values(model.parameters())
    seen = []
    objective.loss_fn = lambda output, y: (
        seen.append(values(model.parameters())) or F.cross_entropy(output, y)
    )
    with objective.held():
        Hessian(objective, "difference", 0.25)([torch.ones_like(p) for p in objective.params])
        assert same_bits(values(model.parameters()), before)
    for moved, sign in zip(seen, (1, 1, -1, -1), strict=True):
        for m, b in zip(moved, before, strict=True):
            torch.testing.assert_close(m - b, torch.full_like(b, sign * 0.25))


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda *a: eigenvalues(*a, 4), "k is 4; expected 1 to 3, the number of weights"),
        (lambda *a: eigenvalues(*a, 0), "k is 0; expected 1 to 3"),
        (lambda *a: eigenvalues(*a, which="smallest"), "'largest' or 'magnitude'"),
        (lambda *a: eigenvalues(*a, method="qr"), "'auto', 'lanczos', 'power' or 'dense'"),
        (lambda *a: eigenvalues(*a, tol=0), "tol is 0; expected a share"),
        (lambda *a: eigenvalues(*a, steps=0), "steps is 0"),
        (lambda *a: eigenvalues(*a, 2, ncv=2), "ncv is 2; expected more than k=2"),
        (lambda *a: eigenvalues(*a, start=[torch.zeros(2), torch.zeros(1)]), "start is zero"),
        (lambda *a: eigenvalues(*a, start=[torch.zeros(2)]), "start has 1 tensors; expected 2"),
        (lambda *a: eigenvalues(*a, hvp="fast"), "'exact' or 'difference'"),
        (
            lambda *a: hessian_vector_product(*a, [torch.ones(2), torch.ones(2)]),
            r"vectors\[1\] is \(2,\).*'b'",
        ),
        (lambda *a: hessian_vector_product(*a, [torch.ones(2)] * 2, h=-1), "h is -1; expected a positive"),
        (lambda *a: trace(*a, draws=0), "draws is 0; expected a whole number"),
        (lambda *a: trace(*a, tol=-1), "tol is -1"),
        (lambda *a: trace(*a, seed=-1), "seed is -1"),
        (lambda *a: along_gradient(*a, rho=0), "rho is 0; expected a positive number"),
    ],
)
def test_what_makes_no_sense_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(Toy(), *TOY)


def test_operators_that_can_be_differentiated_once_are_not_passed_by():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    class Squared(nn.Module):
        def forward(self, x):
            return Square.apply(x)

    model = nn.Sequential(nn.Linear(4, 5), Squared(), nn.Linear(5, 3))
    data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    with pytest.raises(RuntimeError, match="once_differentiable.*take products by 'difference'"):
        eigenvalues(model, F.cross_entropy, data)
    found = eigenvalues(model, F.cross_entropy, data, hvp="difference", tol=0.05)
    model[1] = nn.Identity()
    model[1].forward = lambda x: x * x
    exact = eigenvalues(model, F.cross_entropy, data)
    assert abs(found.values[0] / exact.values[0] - 1) < 0.02
