"""bf16 weights: what rounding to nearest loses, and stochastic rounding, the same bits on every backend."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from fixtures import awkward_parameters, bits, every_backend, same_bits, values
from oracles.rounding import FIRST, sixteen, to_bfloat16
from test_masters import closure_of
from test_passes import (
    ALL,
    BF16,
    CHUNKS,
    F16,
    F32,
    F64,
    LANES,
    MIXED,
    NATIVE,
    copies,
    make_group,
    no_native,
    numbers,
    scalar,
)
from torch.nn import Parameter

from sam_kernels import SAM, recipes
from sam_kernels.backends import native, torch_random
from sam_kernels.bitmask import pack
from sam_kernels.rounding import Rounding, rounding_number
from sam_kernels.tensor_groups import EUCLIDEAN, Column

SEED, STEP = 0x9123456789ABCDEF, 0x80000003
every_side = pytest.mark.parametrize("side", ALL)
passes = pytest.mark.usefixtures("poisoned_empty", "no_grad")

# 2^-5 g of a bf16 g is exact, so that w + e is one rounding, with fma or without.
ROW = [{Column.METRIC: EUCLIDEAN, Column.RHO: 2.0**-5, Column.EPS: 0.0}]


@pytest.fixture
def no_grad():
    """Backends are called under no_grad."""
    with torch.no_grad():
        yield


def numbers_of(group):
    return [(1 << 30) + t * 77 for t in range(len(group.params))]


def in_memory(x):
    return x.detach().cpu().as_strided((x.numel(),), (1,))


def make(shapes=MIXED, memory="plain", device="cpu", **more):
    group = make_group(BF16, shapes, rows=ROW, memory=memory, device=device, **more)
    group.rounding = Rounding(SEED, STEP, numbers_of(group))
    return group


# ---- bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 8, 4096])
def test_bits_are_those_of_the_oracle(first):
    expected = sixteen(SEED, STEP, 5, first + 1003)[first:]
    got = torch_random.rounding_bits(SEED, STEP, 5, first, 1003, torch.device("cpu"))
    np.testing.assert_array_equal(got.numpy(), expected)


def test_tensors_have_numbers_that_masks_and_noise_have_not():
    assert rounding_number(0) == FIRST and rounding_number(9) == FIRST + 9


@passes
@every_side
@pytest.mark.parametrize(
    ("shapes", "memory"),
    [
        (MIXED, "plain"),
        (MIXED, "channels_last"),
        (LANES, "misaligned"),
        (CHUNKS, "plain"),
        (CHUNKS, "misaligned"),
    ],
    ids=["mixed", "channels_last", "lanes-misaligned", "chunks", "chunks-misaligned"],
)
def test_perturbed_weights_have_the_bits_of_the_oracle(side, shapes, memory):
    """Element by element in the order of memory, on every backend; the snapshot keeps every bit."""
    group = make(shapes, memory, side.device, missing=(1,))
    before = copies(group.params)
    side.backend.perturb_(group, scalar(1.0, side.device))
    for t, (p, w, g, s) in enumerate(zip(group.params, before, group.grads, group.snapshots, strict=True)):
        if s is None:
            assert bits(p) == bits(w)
            continue
        assert bits(s) == bits(w)
        moved = in_memory(w).float() + in_memory(g).float() / 32
        expected = to_bfloat16(moved.numpy(), sixteen(SEED, STEP, numbers_of(group)[t], p.numel()))
        np.testing.assert_array_equal(in_memory(p).float().numpy(), expected)


@passes
@every_side
def test_under_masks_too(side):
    shapes = [(5000,), (130,), (16390,), (7,), (64,)]
    group = make(shapes, device=side.device)
    chosen = [torch.rand(s) < 0.3 for s in shapes]
    chosen[0][64:2048] = False
    group.set_masks([pack(c).to(side.device) for c in chosen[:-1]] + [None])
    chosen[-1][:] = True
    before = copies(group.params)
    side.backend.perturb_(group, scalar(1.0, side.device))
    for t, (p, w, g, c) in enumerate(zip(group.params, before, group.grads, chosen, strict=True)):
        moved = (w.float() + g.float() / 32).cpu().numpy()
        rounded = to_bfloat16(moved, sixteen(SEED, STEP, numbers_of(group)[t], p.numel()))
        expected = np.where(c.numpy(), rounded, w.float().cpu().numpy())
        np.testing.assert_array_equal(p.detach().float().cpu().numpy(), expected)
    side.backend.restore_(group)
    assert same_bits(group.params, before)


@passes
@pytest.mark.parametrize("backend", [native.BACKEND, ALL[0].values[0].backend], ids=["native", "reference"])
@no_native
def test_compact_snapshots_too(backend):
    shapes = [(5000,), (130,), (7,)]
    group = make(shapes)
    group.compact = True
    chosen = [torch.rand(s) < 0.3 for s in shapes]
    group.set_masks([pack(c) for c in chosen])
    group.take_snapshots()
    before = copies(group.params)
    backend.perturb_(group, scalar(1.0))
    for t, (p, w, g, c) in enumerate(zip(group.params, before, group.grads, chosen, strict=True)):
        moved = (w.float() + g.float() / 32).numpy()
        rounded = to_bfloat16(moved, sixteen(SEED, STEP, numbers_of(group)[t], p.numel()))
        np.testing.assert_array_equal(
            p.detach().float().numpy(), np.where(c.numpy(), rounded, w.float().numpy())
        )
    backend.restore_(group)
    assert same_bits(group.params, before)


@passes
@every_side
def test_what_is_not_finite_and_what_does_not_move(side):
    group = make([(64,)], device=side.device)
    w, g = group.params[0], group.grads[0]
    g.zero_()
    w[:4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0], dtype=BF16)
    before = w.detach().clone()
    side.backend.perturb_(group, scalar(1.0, side.device))
    assert torch.isnan(w[2]) and bits(w[4:]) == bits(before[4:]) and bits(w[:2]) == bits(before[:2])
    assert w[3] == 0
    group.take_snapshots()
    w.fill_(1.0)
    g.fill_(math.nan)
    side.backend.perturb_(group, scalar(math.nan, side.device))
    assert (w == 1.0).all()


@passes
@every_side
def test_the_mean_is_what_was_rounded(side):
    """w + e is 1 + 0.3 of the distance to the next bfloat16; 2^16 elements, five standard errors."""
    count = 1 << 16
    group = make([(count,)], device=side.device)
    group.params[0].fill_(1.0)
    group.grads[0].fill_(0.3 * 2.0**-7 * 32)
    e = float(group.grads[0][0]) / 32
    side.backend.perturb_(group, scalar(1.0, side.device))
    moved = numbers(group.params[0]) - 1
    share = e / 2.0**-7
    assert set(np.unique(moved)) == {0.0, 2.0**-7}
    assert abs(moved.mean() / e - 1) < 5 * math.sqrt(share * (1 - share) / count) / share
    # Neighbours, which share words, are as independent as others.
    up = (moved > 0) - share
    for distance in (1, 2, 4, 8):
        assert abs((up[:-distance] * up[distance:]).mean()) < 5 * share * (1 - share) / math.sqrt(count)


@passes
def test_steps_tensors_and_seeds_have_bits_of_their_own():
    draws = [
        torch_random.rounding_bits(seed, step, tensor, 0, 4096, torch.device("cpu")).double()
        for seed, step, tensor in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1 << 40, 0, 0))
    ]
    for i, a in enumerate(draws):
        assert abs(float(a.mean()) - 32767.5) < 5 * 18918 / 64
        for b in draws[:i]:
            assert abs(float(((a - 32767.5) * (b - 32767.5)).mean())) < 5 * 18918**2 / 64


@passes
@pytest.mark.parametrize("side", [NATIVE])
def test_the_native_pass_refuses_other_types(side):
    group = make_group(F16, [(8,)], rows=ROW)
    group.rounding = Rounding(0, 0, [0])
    with pytest.raises(RuntimeError, match="stochastic rounding is for bf16 weights without masters"):
        side.backend.perturb_(group, scalar(1.0))


# ---- the optimizer ---------------------------------------------------------------------------------


def opt_of(params, backend="reference", **options):
    options = {"stochastic_rounding": True, "rho": 0.05, "lr": 0.1, **options}
    return SAM(params, torch.optim.SGD, backend=backend, **options)


@every_backend
def test_a_step_restores_the_snapshot_and_every_step_draws_anew(backend):
    params = awkward_parameters(BF16)
    opt = opt_of(params, backend, lr=0.0)
    before, closure, seen = values(params), closure_of(params, None), []
    for _ in range(3):
        torch.manual_seed(1)
        for p in params:
            p.grad = torch.randn(p.shape).to(BF16)
        opt.first_step()
        seen.append(params[9].detach().clone())
        closure()
        opt.second_step()
        assert same_bits(params, before)
    assert len({bits(x) for x in seen}) == 3
    other = awkward_parameters(BF16)
    again = opt_of(other, "reference", lr=0.0)
    torch.manual_seed(1)
    for p in other:
        p.grad = torch.randn(p.shape).to(BF16)
    again.first_step()
    apart = (other[9] != seen[0]).float().mean()
    assert apart < 0.002, "the same bits, but where w + e is a rounding of fp32 apart"


def test_micro_batches_and_further_ascents_draw_bits_of_their_own():
    drawn = []
    params = [Parameter(torch.randn(64).to(BF16))]
    opt = opt_of(params, recipe=recipes.multistep_sam(0.1, n=3, project=False), rho=None)
    ((group, backend),) = opt._groups()
    real = backend.perturb_

    def perturb_(group, *args, **kwargs):
        drawn.append((group.rounding.seed, group.rounding.step))
        return real(group, *args, **kwargs)

    opt._served = [
        (
            group,
            type(
                "Watched",
                (),
                {"__getattr__": lambda s, n: getattr(backend, n), "perturb_": staticmethod(perturb_)},
            )(),
        )
    ]
    closure = closure_of(params, None)
    opt.step(closure)
    opt.step([closure, closure_of(params, None, seed=2)], m_sharpness=True)
    assert len(drawn) == 9 and len(set(drawn)) == 9


def test_fp32_weights_are_perturbed_as_always():
    def perturbed(**options):
        torch.manual_seed(2)
        params = [Parameter(torch.randn(33)), Parameter(torch.randn(33).to(BF16))]
        opt = SAM(params, torch.optim.SGD, lr=0.1, rho=0.05, backend="reference", **options)
        for p in params:
            p.grad = torch.randn(33).to(p.dtype)
        opt.first_step()
        return params

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = perturbed()
    rounded = perturbed(stochastic_rounding=True)
    assert same_bits(plain[:1], rounded[:1]) and not same_bits(plain[1:], rounded[1:])


def test_float16_is_refused_in_words():
    sentence = r"stochastic_rounding=True and param_groups\[0\]\['params'\]\[1\] is torch.float16"
    params = [Parameter(torch.ones(3, dtype=BF16)), Parameter(torch.ones(3, dtype=F16))]
    with pytest.raises(ValueError, match=sentence):
        opt_of(params)
    opt = opt_of(params[:1])
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\] is torch.float16"):
        opt.add_param_group({"params": params[1:]})
    assert len(opt.param_groups) == 1
    assert "rounded at random" in str(opt.backends())


# ---- what is lost otherwise --------------------------------------------------------------------------


def warned(*params, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SAM(params, torch.optim.SGD, lr=0.1, **options)
    return [w for w in caught if issubclass(w.category, UserWarning)]


def test_one_warning_says_what_is_lost_and_what_to_do():
    weights = [Parameter(torch.ones(3, dtype=BF16)), Parameter(torch.ones(2, dtype=BF16))]
    (found,) = warned(*weights)
    for part in ("2 bfloat16 parameters", "0.28 is left", "master_weights=True", "stochastic_rounding=True"):
        assert part in str(found.message)
    assert found.filename == __file__
    assert not warned(*weights, master_weights=True) and not warned(*weights, stochastic_rounding=True)
    for dtype in (F16, F32, F64):
        assert not warned(Parameter(torch.ones(3, dtype=dtype)))
    # Parameters that are not perturbed lose nothing.
    norm = Parameter(torch.ones(3, dtype=F32))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SAM([("norm.weight", norm), ("fc.weight", weights[0])], torch.optim.SGD, recipe="nosam", lr=0.1)
    assert not caught


COUNT = 1 << 21
# ResNet-50 has 25.6 million parameters; a perturbation of one of many has the size of rho / sqrt(all).
ALL_OF_THEM = 25_600_000


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    ("rho", "how", "share", "moved"),
    [
        (0.05, {}, 0.278, 0.115),
        (0.05, {"master_weights": True}, 0.999, 0.196),
        (0.05, {"stochastic_rounding": True}, 1.000, 0.196),
        (0.5, {}, 0.989, None),
        (0.5, {"master_weights": True}, 1.000, None),
        (0.5, {"stochastic_rounding": True}, 1.000, None),
        (2.0, {}, 1.000, None),
    ],
    ids=str,
)
def test_how_much_of_a_perturbation_is_left(backend, rho, how, share, moved):
    """<Delta, e> / ||e||^2 with w ~ N(0, 0.02) and a Gaussian gradient, at the scale of a ResNet-50."""
    generator = torch.Generator().manual_seed(1)
    exact = 0.02 * torch.randn(COUNT, generator=generator)
    w = Parameter(exact.to(BF16))
    g = torch.randn(COUNT, generator=generator).to(BF16)
    radius = rho * math.sqrt(COUNT / ALL_OF_THEM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = SAM([w], torch.optim.SGD, rho=radius, lr=0.0, backend=backend, **how)
    if "master_weights" in how:
        # A master in training has low bits; here they are those of the weights before they were rounded.
        opt.state_dict()
        opt._slots.tensors["master"][w].copy_(exact)
    start = opt._slots.tensors["master"][w] if "master_weights" in how else w.detach().float()
    before = w.detach().clone()
    w.grad = g
    e = radius * g.double() / g.double().norm()
    opt.first_step()
    # Against the rounded weight: what the network sees move.
    delta = w.detach().double() - before.double()
    left = float((delta * e).sum() / (e * e).sum())
    assert left == pytest.approx(share, abs=0.012 if how else 0.006)
    if moved is not None:
        assert float((delta != 0).double().mean()) == pytest.approx(moved, abs=0.004)
    assert start.dtype == F32


@pytest.mark.parametrize("recipe", ["multistep_sam", "r_sam"])
def test_recipes_that_move_weights_by_sums_are_refused(recipe):
    with pytest.raises(ValueError, match="does not go with stochastic_rounding=True"):
        opt_of([Parameter(torch.ones(3).to(BF16))], recipe=recipe, rho=None)


def test_sampa_rounds_at_random_too():
    torch.manual_seed(3)
    w = Parameter((torch.randn(1 << 17) * 0.02).to(BF16))
    g = torch.randn(1 << 17)
    opt = SAM([w], torch.optim.SGD, recipe=recipes.sampa(rho=0.003), lr=0.0, stochastic_rounding=True)
    moved = []

    def closure():
        moved.append(w.detach().float() - before)
        w.grad = g.to(BF16)
        return torch.zeros(())

    before = w.detach().float().clone()
    opt.step(closure, ahead=closure)
    e = 0.003 * g / g.norm()
    share = [float((d * e).sum() / (e * e).sum()) for d in moved]
    assert min(abs(s - 1.0) for s in share) < 0.05, share
