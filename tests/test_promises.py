"""The promises, one by one and in their order."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import RECIPES
from fixtures import (
    BACKENDS,
    LONG,
    assert_close,
    awkward_parameters,
    backward_of,
    base_state,
    batches,
    every_backend,
    give_gradients,
    rounds_to_nearest,
    same_bits,
    small_net,
    values,
    why_not,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from sam_kernels import SAM, recipes

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
every_base = pytest.mark.parametrize(
    ("base", "arguments"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        # a larger eps keeps float16 moments, which underflow, from blowing a step up
        (torch.optim.Adam, {"lr": 0.01, "eps": 1e-2}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-2}),
        (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-2}),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop"],
)
INPUTS = batches(8, 4, 5)


def two_step(opt, parameters, seed, scale=1.0):
    give_gradients(parameters, seed, scale)
    opt.first_step(zero_grad=True)
    give_gradients(parameters, seed + 1, scale)
    opt.second_step(zero_grad=True)


# --- 1. Restore is bit-exact; addresses never change; nothing is allocated after the first step -------------


@every_backend
@every_dtype
@pytest.mark.parametrize("recipe", ["sam", "asam", "layerwise_sam"])
@pytest.mark.filterwarnings("ignore:.*name")
@rounds_to_nearest
def test_restore_is_bit_exact(recipe, dtype, backend):
    parameters = awkward_parameters(dtype, longest=LONG if recipe == "sam" else 2049)
    # a radius that moves every tensor, also in bfloat16
    opt = SAM(parameters, torch.optim.SGD, recipe=recipe, rho=50.0, backend=backend, lr=0.1)
    for seed in range(2):
        before = values(parameters)
        give_gradients(parameters, seed)
        with opt.perturbed():
            assert not any(
                torch.equal(a, b) for a, b in zip(parameters, before, strict=True) if a.numel() > 8
            )
            give_gradients(parameters, seed + 10)
        assert same_bits(parameters, before)
        opt.step()


@every_backend
def test_restore_keeps_negative_zeros_and_subnormals(backend):
    w = Parameter(torch.tensor([-0.0, 0.0, 1e-42, -3e-45, 3.4e38, 1.0]))
    before = values([w])
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    w.grad = torch.ones(6)
    with opt.perturbed():
        assert float(w[1]) > 0
    assert same_bits([w], before)


@every_backend
@every_base
def test_addresses_and_strides_of_parameters_never_change(base, arguments, backend):
    parameters = awkward_parameters()
    opt = SAM(parameters, base, backend=backend, **arguments)
    before = [(p.data_ptr(), p.stride(), p.untyped_storage().data_ptr()) for p in parameters]
    for seed in range(3):
        two_step(opt, parameters, seed)
    assert before == [(p.data_ptr(), p.stride(), p.untyped_storage().data_ptr()) for p in parameters]


@pytest.fixture
def only_new_objects():
    """Hide everything that already lives from `living_bytes`, which would take a second to look through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def living_bytes() -> int:
    """Return the bytes of every tensor the garbage collector knows."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@every_backend
@every_base
@pytest.mark.usefixtures("only_new_objects")
def test_steps_after_the_first_hold_no_more_memory(base, arguments, backend):
    parameters = [Parameter(torch.randn(1000)) for _ in range(5)]
    opt = SAM(parameters, base, backend=backend, **arguments)
    two_step(opt, parameters, 0)
    held = living_bytes()
    for seed in range(1, 4):
        two_step(opt, parameters, seed)
    assert living_bytes() <= held


def allocated(action) -> int:
    """Return the bytes of every allocation of at least a page while `action` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        action()
    found = (
        event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    return sum(n for n in found if n >= 4096)


@pytest.mark.skipif(why_not("native") is not None, reason=str(why_not("native")))
@pytest.mark.parametrize(
    ("base", "arguments"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}), (torch.optim.AdamW, {"lr": 0.1})],
    ids=["sgd", "adamw"],
)
def test_native_step_allocates_nothing_after_the_first(base, arguments):
    parameters = [Parameter(torch.randn(1 << 16)) for _ in range(4)]
    opt = SAM(parameters, base, backend="native", **arguments)
    two_step(opt, parameters, 0)
    give_gradients(parameters, 1)
    assert allocated(lambda: torch.empty(1 << 16)) >= 1 << 18  # the measure itself works

    def step():
        opt.first_step()
        opt.second_step()

    step()
    assert allocated(step) == 0


@every_backend
@pytest.mark.usefixtures("only_new_objects")
def test_snapshots_keep_their_storage_between_steps(backend):
    # the second step must not free and allocate: the same number of distinct buffers lives through five steps
    parameters = [Parameter(torch.randn(5000)) for _ in range(3)]
    opt = SAM(parameters, torch.optim.SGD, backend=backend, lr=0.1)
    held = []
    for seed in range(5):
        give_gradients(parameters, seed)
        opt.first_step()
        held.append(living_bytes())
        opt.second_step(zero_grad=True)
    assert len(set(held[1:])) == 1


# --- 2. The perturbed set is decided in pass 1 and restored exactly -----------------------------------------


pattern = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 40)), min_size=1, max_size=9)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if why_not(b) is None])
@settings(max_examples=40, deadline=None)
@given(patterns=st.lists(pattern, min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_the_set_restored_is_the_set_perturbed(backend, patterns, seed):
    sizes = [n for _, _, n in patterns[0]]
    parameters = [
        Parameter(torch.randn(n, generator=torch.Generator().manual_seed(seed + i)))
        for i, n in enumerate(sizes)
    ]
    opt = SAM(parameters, torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    for step, participation in enumerate(patterns):
        both = list(zip(parameters, participation, strict=False))
        before = values(parameters)
        opt.zero_grad()
        for p, (first, _, _) in both:
            p.grad = torch.full_like(p, 0.3 + step) if first else None
        opt.first_step(zero_grad=True)
        for p, b, in_first in zip(
            parameters, before, [f for _, (f, _, _) in both] + [False] * 9, strict=False
        ):
            assert in_first == (not torch.equal(p, b)) or p.numel() == 0
        for p, (_, second, _) in both:
            p.grad = torch.ones_like(p) if second else None
        any_first, any_second = (any(p[i] for _, p in both) for i in (0, 1))
        if any_first and not any_second:
            with pytest.raises(RuntimeError, match="gradient"):  # no second backward at all
                opt.second_step()
        else:
            opt.second_step(zero_grad=True)
        seconds = [s for _, (_, s, _) in both] + [False] * len(parameters)
        for p, b, in_second in zip(parameters, before, seconds, strict=False):
            if in_second:
                torch.testing.assert_close(p.detach(), b - 0.1)
            else:
                assert same_bits([p], [b])


# --- 3. Zero, missing, non-finite and empty -----------------------------------------------------------------


@every_backend
@every_dtype
@pytest.mark.parametrize(
    "recipe",
    [("sam", {}), ("sam", {"p": float("inf")}), ("sam", {"p": 3.0}), ("asam", {}), ("layerwise_sam", {})],
)
@pytest.mark.filterwarnings("ignore:.*name")
def test_zero_gradient_moves_nothing(recipe, dtype, backend):
    name, arguments = recipe
    parameters = awkward_parameters(dtype)
    opt = SAM(parameters, torch.optim.SGD, recipe=recipes.get(name, **arguments), backend=backend, lr=0.1)
    before = values(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    opt.first_step()
    assert same_bits(parameters, before)
    opt.second_step()
    assert same_bits(parameters, before)


@every_backend
@every_base
def test_no_gradients_is_a_no_op(base, arguments, backend):
    parameters = awkward_parameters()
    opt = SAM(parameters, base, backend=backend, **arguments)
    before = values(parameters)
    opt.first_step()
    opt.second_step()
    assert same_bits(parameters, before)
    assert not base_state(opt)


@every_backend
@every_base
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("form", ["closure", "two-step", "perturbed"])
def test_non_finite_first_gradient_skips_the_step_and_touches_no_state(form, bad, base, arguments, backend):
    parameters = [Parameter(torch.randn(5)), Parameter(torch.randn(3000)), Parameter(torch.randn(()))]
    opt = SAM(parameters, base, backend=backend, **arguments)
    for seed in range(2):
        two_step(opt, parameters, seed)
    weights, state = values(parameters), base_state(opt)
    passes = []

    def gradients():
        passes.append(values(parameters))
        give_gradients(parameters, 5)
        if len(passes) == 1:
            parameters[1].grad[2999] = bad
        return torch.tensor(1.0)

    if form == "closure":
        opt.step(gradients)
    elif form == "two-step":
        gradients()
        opt.first_step(zero_grad=True)
        gradients()
        opt.second_step()
    else:
        gradients()
        with opt.perturbed():
            gradients()
        opt.step()
    assert all(same_bits(seen, weights) for seen in passes)
    assert same_bits(parameters, weights)
    assert same_bits(base_state(opt), state)
    two_step(opt, parameters, 9)  # and the next step is an ordinary one
    assert not same_bits(parameters[:1], weights[:1])
    assert all(bool(torch.isfinite(p).all()) for p in parameters)


@every_backend
@pytest.mark.parametrize("recipe", [c for c in RECIPES if c.recipe != "nosam"], ids=lambda c: c.label)
def test_one_non_finite_element_stops_every_tensor_whatever_the_recipe(recipe, backend):
    weights = {name: Parameter(torch.ones(4)) for name in ("a.weight", "b.weight", "c.bias")}
    before = values(weights.values())
    opt = SAM(weights.items(), torch.optim.SGD, backend=backend, lr=0.1, **recipe.options())
    give_gradients(list(weights.values()), 0)
    weights["b.weight"].grad[1] = float("inf")
    opt.first_step()
    assert same_bits(weights.values(), before)
    give_gradients(list(weights.values()), 1)
    opt.second_step()
    assert same_bits(weights.values(), before)


@every_backend
def test_skipped_first_step_leaves_no_state_that_counts_it(backend):
    skipped, plain = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    opts = [SAM([w], torch.optim.Adam, backend=backend, lr=0.1) for w in (skipped, plain)]
    skipped.grad = torch.full((3,), float("inf"))
    opts[0].first_step()
    skipped.grad = torch.ones(3)
    opts[0].second_step()
    for w, opt in zip((skipped, plain), opts, strict=True):
        two_step(opt, [w], 3)
    assert same_bits([skipped], [plain])
    assert same_bits(base_state(opts[0]), base_state(opts[1]))


@every_backend
@every_base
@pytest.mark.parametrize("where", ["first", "middle", "last", "all"])
def test_empty_tensors_are_not_special(where, base, arguments, backend):
    full = [torch.randn(4), torch.randn(3000)]
    empty = torch.empty(0, 3)
    order = {
        "first": [empty, *full],
        "middle": [full[0], empty, full[1]],
        "last": [*full, empty],
        "all": [empty] * 2,
    }
    parameters = [Parameter(t.clone()) for t in order[where]]
    plain = [Parameter(t.clone()) for t in full]
    opt, expected = (
        SAM(parameters, base, backend=backend, **arguments),
        SAM(plain, base, backend=backend, **arguments),
    )
    for step in range(2):
        for group, o in ((parameters, opt), (plain, expected)):
            for passes in (o.first_step, o.second_step):
                for p in group:
                    p.grad = torch.linspace(-1, 1.5 + step, p.numel()).reshape(p.shape)
                passes(zero_grad=True)
    if where != "all":
        assert same_bits([p for p in parameters if p.numel()], plain)


# --- 4. Norms -----------------------------------------------------------------------------------------------


def large_gradient_step(backend):
    generator = torch.Generator().manual_seed(11)
    parameters = [Parameter(torch.zeros(n)) for n in (1_000_003, 17, 300_000)]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    opt = SAM(parameters, torch.optim.SGD, rho=1.0, backend=backend, lr=0.1)
    opt.first_step()
    return parameters


@every_backend
def test_same_inputs_give_the_same_bits_run_to_run(backend):
    first = values(large_gradient_step(backend))
    assert same_bits(first, large_gradient_step(backend))


@every_backend
def test_same_inputs_give_the_same_bits_for_any_thread_count(backend):
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(values(large_gradient_step(backend)))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@every_backend
def test_norm_of_a_million_elements_is_exact_to_float32(backend):
    parameters = large_gradient_step(backend)
    total = sum(float((p.grad.double() ** 2).sum()) for p in parameters) ** 0.5
    # w was zero, so the weights are e itself; a plain float32 running sum would be off by 1e-4
    assert_close(parameters, [p.grad.double() / total for p in parameters], 2e-7)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@rounds_to_nearest
def test_half_precision_norms_do_not_overflow(dtype, backend):
    w = Parameter(torch.zeros(1 << 20, dtype=dtype))
    w.grad = torch.full_like(w, 60.0)  # sum of squares 3.8e9, norm 61440
    SAM([w], torch.optim.SGD, rho=1024.0, backend=backend, lr=0.1).first_step()
    assert torch.equal(w.detach(), torch.ones_like(w))  # 1024 * 60 / 61440


# --- 5. Low precision ---------------------------------------------------------------------------------------


@every_backend
@every_dtype
def test_perturbation_rounds_once(dtype, backend):
    parameters = awkward_parameters(dtype, longest=LONG)
    before = [w.double() for w in values(parameters)]
    gradients = [g.double() for g in values(give_gradients(parameters, 4))]
    total = sum(float((g**2).sum()) for g in gradients) ** 0.5 + 1e-12  # the guard against zero
    SAM(parameters, torch.optim.SGD, rho=30.0, backend=backend, lr=0.1).first_step()
    # half a unit in the last place of the result, and before it float32 arithmetic: foreach sums a whole
    # tensor of halves in float32, which leaves a few 1e-6 in the norm
    half_ulp = torch.finfo(dtype).eps / 2
    slack = {torch.float64: 8 * half_ulp, torch.float32: 8 * half_ulp}.get(
        dtype, 32 * torch.finfo(torch.float32).eps
    )
    for p, w, g in zip(parameters, before, gradients, strict=True):
        exact = w + 30.0 * g / total
        error = (p.detach().double() - exact).abs()
        largest = half_ulp * exact.abs() * (1 + half_ulp) + slack * (w.abs() + (30.0 * g / total).abs())
        assert bool((error <= largest + torch.finfo(dtype).tiny).all()), float((error / exact.abs()).max())


# --- 6. state_dict in a new process -------------------------------------------------------------------------


RESUME = """
    import sys, torch
    from sam_kernels import SAM, recipes
    saved = torch.load(sys.argv[1], weights_only=True)
    weights = {name: torch.nn.Parameter(w) for name, w in saved["weights"].items()}
    opt = SAM(weights.items(), torch.optim.AdamW, recipe=recipes.asam(rho=0.3, every=2), lr=0.01)
    opt.load_state_dict(saved["opt"])
    for x in saved["inputs"]:
        def closure():
            loss = sum(((w * x).tanh() ** 2).sum() for w in weights.values())
            loss.backward()
            return loss
        opt.step(closure)
    torch.save({name: w.detach() for name, w in weights.items()}, sys.argv[2])
"""


def test_state_dict_continues_bit_for_bit_in_a_new_process(tmp_path):
    # elementwise losses only: a matrix product may round differently at another address
    weights = {"fc.weight": Parameter(torch.randn(5)), "fc.bias": Parameter(torch.randn(5))}
    opt = SAM(weights.items(), torch.optim.AdamW, recipe=recipes.asam(rho=0.3, every=2), lr=0.01)
    inputs = [torch.randn(5) for _ in range(6)]

    def train(some):
        for x in some:

            def closure(x=x):
                loss = sum(((w * x).tanh() ** 2).sum() for w in weights.values())
                loss.backward()
                return loss

            opt.step(closure)

    train(inputs[:3])
    saved, resumed = tmp_path / "saved.pt", tmp_path / "resumed.pt"
    here = {name: w.detach() for name, w in weights.items()}
    torch.save({"weights": here, "opt": opt.state_dict(), "inputs": inputs[3:]}, saved)
    train(inputs[3:])
    subprocess.run([sys.executable, "-c", textwrap.dedent(RESUME), saved, resumed], check=True, timeout=120)
    other = torch.load(resumed, weights_only=True)
    assert same_bits(weights.values(), other.values())


# --- 7. Exceptions ------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Neither an Exception nor anything we could have thought of."""


@every_backend
@every_base
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("failing_pass", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_exception_in_a_closure_leaves_weights_and_state(when, failing_pass, error, base, arguments, backend):
    model = small_net(torch.float32)
    opt = SAM(model.parameters(), base, rho=0.5, backend=backend, **arguments)
    opt.step(backward_of(model, INPUTS[0].float()))
    weights, state = values(model.parameters()), base_state(opt)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == failing_pass and when == "before":
            raise error("here")
        loss = backward_of(model, INPUTS[1].float())()
        if len(calls) == failing_pass:
            raise error("here")
        return loss

    with pytest.raises(error):
        opt.step(closure)
    assert same_bits(model.parameters(), weights)
    assert same_bits(base_state(opt), state)
    # the step can be taken again, and is the one that was interrupted
    retry = small_net(torch.float32)
    other = SAM(retry.parameters(), base, rho=0.5, backend=backend, **arguments)
    for m, o in ((model, opt), (retry, other)):
        if m is retry:
            o.step(backward_of(m, INPUTS[0].float()))
        o.step(backward_of(m, INPUTS[1].float()))
    assert same_bits(model.parameters(), retry.parameters())


@every_backend
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_perturbed_restores_whatever_happens_inside(error, backend):
    parameters = awkward_parameters()
    opt = SAM(parameters, torch.optim.SGD, backend=backend, lr=0.1, momentum=0.9)
    two_step(opt, parameters, 0)
    weights, state = values(parameters), base_state(opt)
    give_gradients(parameters, 2)
    with pytest.raises(error), opt.perturbed():
        raise error("inside")
    assert same_bits(parameters, weights)
    assert same_bits(base_state(opt), state)
    two_step(opt, parameters, 4)  # training goes on


@every_backend
@pytest.mark.parametrize("form", ["closure", "two-step"])
def test_exception_in_the_base_optimizer_leaves_no_perturbed_weights(form, backend):
    class Failing(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            raise OSError("base")

    w = Parameter(torch.ones(4))
    opt = SAM([w], Failing, backend=backend)

    def closure():
        w.grad = torch.ones(4)
        return torch.tensor(0.0)

    with pytest.raises(OSError, match="base"):
        if form == "closure":
            opt.step(closure)
        else:
            closure()
            opt.first_step()
            closure()
            opt.second_step()
    assert torch.equal(w, torch.ones(4))


@every_backend
@pytest.mark.parametrize("owner", ["sam", "base"])
@pytest.mark.parametrize("form", ["closure", "two-step"])
def test_exception_in_a_hook_leaves_no_perturbed_weights(form, owner, backend):
    w = Parameter(torch.ones(4))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)

    def fail(*_):
        raise OSError("hook")

    (opt if owner == "sam" else opt.base_optimizer).register_step_pre_hook(fail)

    def closure():
        w.grad = torch.ones(4)
        return torch.tensor(0.0)

    with pytest.raises(OSError, match="hook"):
        if form == "closure":
            opt.step(closure)
        else:
            closure()
            opt.first_step()
            closure()
            opt.step()
    assert torch.equal(w, torch.ones(4))


# --- 8. Same numbers from every backend, at every stop ------------------------------------------------------


# float64: the order of summation; float32: its rounding; half types: one flipped rounding of a stored weight
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}


@every_dtype
@every_base
@pytest.mark.parametrize("recipe", ["sam", "asam", "layerwise_sam"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS[1:] if why_not(b) is None])
@pytest.mark.filterwarnings("ignore:.*name")
@rounds_to_nearest
def test_backends_agree_with_the_reference_at_every_stop(backend, recipe, base, arguments, dtype):
    both = []
    for name in ("reference", backend):
        parameters = awkward_parameters(dtype)
        opt = SAM(parameters, base, recipe=recipe, backend=name, **arguments)
        stops = []
        for seed in range(2):
            give_gradients(parameters, seed)
            with opt.perturbed():
                stops.append(values(parameters))
                give_gradients(parameters, seed + 10)
            stops.append(values(parameters))
            opt.step()
            stops.append(values(parameters) + base_state(opt))
        both.append(stops)
    for expected, actual in zip(*both, strict=True):
        assert [t.dtype for t in expected] == [t.dtype for t in actual]
        assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", [b for b in BACKENDS[1:] if why_not(b) is None])
@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    rho=st.floats(0, 2),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_backends_agree_on_random_lists(backend, shapes, seed, rho, scale):
    moved = []
    for name in ("reference", backend):
        generator = torch.Generator().manual_seed(seed)
        parameters = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        opt = SAM(parameters, torch.optim.SGD, rho=rho, backend=name, lr=0.1 / scale, momentum=0.9)
        for step in range(2):
            two_step(opt, parameters, seed + 2 * step, scale)
        moved.append(values(parameters))
    assert_close(moved[1], moved[0], 1e-6)


# --- 9. Sentences, and nothing is lost ----------------------------------------------------------------------


def finish(opt, w):
    """Finish the pending step with a known gradient."""
    w.grad = torch.tensor([1.0, -1.0])
    opt.step()


MISUSE = {
    "first_step twice": lambda opt, w: opt.first_step(),
    "state_dict while perturbed": lambda opt, w: opt.state_dict(),
    "load_state_dict while perturbed": lambda opt, w: opt.load_state_dict(
        torch.optim.SGD([w], lr=0.5).state_dict()
    ),
    "add_param_group while perturbed": lambda opt, w: opt.add_param_group(
        {"params": [Parameter(torch.ones(1))]}
    ),
    "step(closure) while perturbed": lambda opt, w: opt.step(lambda: torch.tensor(0.0)),
}


@every_backend
@pytest.mark.parametrize("what", MISUSE)
def test_misuse_while_perturbed_is_a_sentence_and_loses_nothing(what, backend):
    w = Parameter(torch.tensor([1.0, 2.0]))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.5, momentum=0.9)
    finish_before = Parameter(torch.tensor([1.0, 2.0]))
    other = SAM([finish_before], torch.optim.SGD, rho=0.5, backend=backend, lr=0.5, momentum=0.9)
    for v, o in ((w, opt), (finish_before, other)):
        v.grad = torch.ones(2)
        o.first_step()
        finish(o, v)
        v.grad = torch.tensor([3.0, 4.0])
        o.first_step()
    here, state = values([w]), base_state(opt)
    with pytest.raises(RuntimeError, match=r"(?s)\w+ \w+ \w+.*(second_step|step\(\)|restore|perturb)"):
        MISUSE[what](opt, w)
    assert same_bits([w], here)
    assert same_bits(base_state(opt), state)
    assert len(opt.param_groups) == 1
    for v, o in ((w, opt), (finish_before, other)):
        finish(o, v)
    assert same_bits([w], [finish_before])
    assert same_bits(base_state(opt), base_state(other))


@pytest.mark.parametrize("recipe", ["sam", "asam", "layerwise_sam"])
@pytest.mark.filterwarnings("ignore:.*name")
def test_step_with_nothing_pending_names_the_recipe(recipe):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, recipe=recipe, lr=0.1)
    w.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=recipe):
        opt.step()
    assert torch.equal(w, torch.ones(2))


@pytest.mark.parametrize("name", ["second_step", "descent_step"])
def test_second_step_with_nothing_pending_is_a_sentence(name):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="first_step"):
        getattr(opt, name)()
    assert torch.equal(w, torch.ones(2))


def test_second_step_twice_is_a_sentence():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    opt.first_step()
    opt.second_step()
    here = values([w])
    with pytest.raises(RuntimeError, match="first_step"):
        opt.second_step()
    assert same_bits([w], here)


@pytest.mark.skipif(why_not("native") is None, reason="every backend runs here")
def test_a_backend_that_cannot_run_raises_what_and_what_to_do():
    with pytest.raises((RuntimeError, ValueError, ImportError), match="(?s)native.*(build|install)"):
        opt = SAM([Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1, backend="native")
        opt.param_groups[0]["params"][0].grad = torch.ones(1)
        opt.first_step()


def test_integer_parameters_are_refused_with_a_sentence():
    w = torch.ones(3, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError, RuntimeError), match="int64"):
        opt = SAM([w], torch.optim.SGD, lr=0.1)
        opt.first_step()


def test_an_expanded_parameter_is_refused_or_raises_before_anything_moves():
    plain, expanded = Parameter(torch.ones(3)), Parameter(torch.ones(1).expand(3))
    with pytest.raises((ValueError, RuntimeError)):
        opt = SAM([plain, expanded], torch.optim.SGD, lr=0.1)
        plain.grad, expanded.grad = torch.ones(3), torch.ones(3)
        opt.first_step()
    assert torch.equal(plain, torch.ones(3))
    assert torch.equal(expanded, torch.ones(3))
