"""Base optimizers: the fused ones step exactly as torch's own, any other takes its own step after restore."""

from __future__ import annotations

import pytest
import torch
from cases import BASES
from fixtures import (
    assert_close,
    awkward_parameters,
    base_state,
    every_backend,
    give_gradients,
    rounds_to_nearest,
    same_bits,
    values,
)
from torch.nn import Parameter

from sam_kernels import SAM

OTHERS = {
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
}


class Signed(torch.optim.Optimizer):
    """A base of somebody else's making: sign descent with a counter, which expects no closure."""

    def __init__(self, params, lr=0.1, *, shrink=0.5):
        super().__init__(params, {"lr": lr, "shrink": shrink})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["count"] = state.get("count", 0) + 1
                    p.sub_(p.grad.sign() * group["lr"] * group["shrink"] ** state["count"])


def sam_against_base(base, arguments, backend, dtype, steps=3):
    """Return weights and state after steps of SAM, and after the base alone on the second gradients."""
    ours, theirs = awkward_parameters(dtype), awkward_parameters(dtype)
    opt = SAM(ours, base, rho=0.5, backend=backend, **arguments)
    plain = base(theirs, **arguments)
    for seed in range(steps):
        give_gradients(ours, seed)
        opt.first_step(zero_grad=True)
        give_gradients(ours, seed + 50)
        opt.second_step(zero_grad=True)
        give_gradients(theirs, seed + 50)
        plain.step()
    state = [
        v if isinstance(v, torch.Tensor) else torch.tensor(float(v or 0))
        for p in theirs
        for _, v in sorted(plain.state[p].items())
    ]
    return values(ours), base_state(opt), values(theirs), state


# float64 to its last digits; float32 to a few roundings of the intermediate values
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-14), (torch.float32, 3e-7)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("base", BASES, ids=lambda c: c.label)
@every_backend
def test_fused_descent_is_the_step_of_torch(backend, base, dtype, relative):
    weights, state, expected, expected_state = sam_against_base(base.base, base.arguments, backend, dtype)
    assert_close(weights, expected, relative)
    assert_close(state, expected_state, relative)


# torch rounds every intermediate to the half type, we round once: a few units in the last place
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(
    "base", [b for b in BASES if b.label in ("sgd-momentum", "adam", "adamw")], ids=lambda c: c.label
)
@every_backend
@rounds_to_nearest
def test_fused_descent_in_half_precision(backend, base, dtype):
    # a large eps: float16 second moments underflow to different zeros
    arguments = {**base.arguments, **({"eps": 0.1} if "eps" in base.arguments else {})}
    weights, _, expected, _ = sam_against_base(base.base, arguments, backend, dtype)
    assert all(w.dtype == dtype for w in weights)
    for w, e in zip(weights, expected, strict=True):
        error, size = (w.double() - e.double()).abs(), e.double().abs().clamp(min=1.0)
        assert bool((error <= 4 * torch.finfo(dtype).eps * size).all()), float((error / size).max())


@pytest.mark.parametrize("name", OTHERS)
@every_backend
def test_any_other_base_takes_its_own_step_at_the_restored_weights(backend, name):
    weights, state, expected, expected_state = sam_against_base(*OTHERS[name], backend, torch.float32)
    assert same_bits(weights, expected)
    assert same_bits(state, expected_state)


@every_backend
def test_base_of_somebody_elses_making(backend):
    weights, state, expected, expected_state = sam_against_base(
        Signed, {"lr": 0.2, "shrink": 0.25}, backend, torch.float32
    )
    assert same_bits(weights, expected)
    assert same_bits(state, expected_state)


@every_backend
def test_subclass_of_sgd_keeps_its_own_step(backend):
    class Halved(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.sub_(0.5 * group["lr"] * p.grad)

    w = Parameter(torch.ones(2))
    opt = SAM([w], Halved, rho=0.5, backend=backend, lr=0.2)
    w.grad = torch.ones(2)
    opt.first_step()
    opt.second_step()
    assert_close([w], [torch.full((2,), 0.9)], 1e-6)


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_hooks_registered_on_the_base_fire(base, backend):
    w = Parameter(torch.ones(2))
    opt = SAM([w], base, backend=backend, lr=0.1)
    fired = []
    opt.base_optimizer.register_step_pre_hook(lambda o, a, k: fired.append("pre"))
    opt.base_optimizer.register_step_post_hook(lambda o, a, k: fired.append("post"))
    for _ in range(2):
        w.grad = torch.ones(2)
        opt.first_step()
        opt.second_step()
    assert fired == ["pre", "post"] * 2


@every_backend
@pytest.mark.parametrize("base", [b for b in BASES if "maximize" not in b.arguments], ids=lambda c: c.label)
def test_maximizing_f_is_minimizing_its_negative_at_every_stop(base, backend):
    both = []
    for sign in (1.0, -1.0):
        torch.manual_seed(0)
        weights = [
            Parameter(torch.randn(6, dtype=torch.float64)),
            Parameter(torch.randn(2, 2, dtype=torch.float64)),
        ]
        opt = SAM(weights, base.base, rho=0.5, backend=backend, maximize=sign < 0, **base.arguments)
        stops = []
        for seed in range(3):
            give_gradients(weights, seed, scale=sign)
            with opt.perturbed():
                stops += values(weights)
                give_gradients(weights, seed + 9, scale=sign)
            opt.step()
            stops += values(weights)
        both.append(stops)
    assert_close(*both, 1e-15)


@every_backend
def test_maximize_attacks_downhill(backend):
    w = Parameter(torch.zeros(2, dtype=torch.float64))
    opt = SAM([w], torch.optim.SGD, rho=1.0, backend=backend, lr=0.1, maximize=True)
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    opt.first_step()
    assert_close([w], [torch.tensor([-0.6, -0.8], dtype=torch.float64)], 1e-11)


@every_backend
def test_maximize_of_one_group_only(backend):
    a, b = Parameter(torch.zeros(1, dtype=torch.float64)), Parameter(torch.zeros(1, dtype=torch.float64))
    opt = SAM(
        [{"params": [a], "maximize": True}, {"params": [b]}],
        torch.optim.SGD,
        rho=1.0,
        backend=backend,
        lr=0.1,
    )
    a.grad, b.grad = torch.full_like(a, 3.0), torch.full_like(b, 4.0)
    opt.first_step()
    assert_close([a, b], [torch.full_like(a, -0.6), torch.full_like(b, 0.8)], 1e-11)
    opt.second_step()
    assert_close([a, b], [torch.full_like(a, 0.3), torch.full_like(b, -0.4)], 1e-11)


@every_backend
@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_implementation_flags_of_the_base_do_not_change_the_numbers(base, flag, backend):
    trained = []
    for arguments in ({}, {flag: True}):
        w = Parameter(torch.linspace(-1, 1, 9))
        opt = SAM([w], base, rho=0.5, backend=backend, lr=0.1, weight_decay=0.1, **arguments)
        for seed in range(3):
            give_gradients([w], seed)
            opt.first_step()
            give_gradients([w], seed + 9)
            opt.second_step()
        trained.append(values([w]))
    assert_close(*trained, 3e-7)


@every_backend
def test_amsgrad_says_where_it_steps_down_or_is_fused(backend):
    w = Parameter(torch.ones(3))
    opt = SAM([w], torch.optim.Adam, backend=backend, lr=0.1, amsgrad=True)
    w.grad = torch.ones(3)
    opt.first_step()
    opt.second_step()
    report = str(opt.backends())
    assert "max_exp_avg_sq" in opt.base_optimizer.state[w]
    # either the fused update serves amsgrad, or the report says that the base takes its own step and why
    assert "amsgrad" in report or backend in report


@every_backend
def test_base_weight_decay_does_not_enter_the_perturbation(backend):
    moved = []
    for decay in (0.0, 10.0):
        w = Parameter(torch.tensor([5.0, -7.0]))
        opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1, weight_decay=decay)
        w.grad = torch.tensor([3.0, 4.0])
        opt.first_step()
        moved += values([w])
    assert same_bits(moved[:1], moved[1:])


@every_backend
def test_momentum_starts_from_the_second_gradient(backend):
    w = Parameter(torch.zeros(2))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1, momentum=0.9, dampening=0.5)
    w.grad = torch.tensor([100.0, 100.0])
    opt.first_step(zero_grad=True)
    w.grad = torch.tensor([1.0, 2.0])
    opt.second_step()
    assert torch.equal(opt.base_optimizer.state[w]["momentum_buffer"], torch.tensor([1.0, 2.0]))


@every_backend
def test_step_counter_of_adam_advances_once_a_step(backend):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.Adam, backend=backend, lr=0.1)
    for expected in (1.0, 2.0, 3.0):
        w.grad = torch.ones(2)
        opt.first_step()
        opt.second_step()
        assert float(opt.base_optimizer.state[w]["step"]) == expected


# --- every optimizer of torch, and bases with a rho of their own ------------------------------------------


EVERY = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
)


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_of_torch_is_a_base_or_refused_with_a_sentence(name):
    base = getattr(torch.optim, name)
    if name == "LBFGS":
        with pytest.raises(TypeError, match="LBFGS evaluates its own closure.*use one"):
            SAM([Parameter(torch.ones(2))], base, lr=0.1)
        return
    sparse = name == "SparseAdam"  # takes sparse gradients only
    tables = [torch.nn.Embedding(6, 3, sparse=sparse, dtype=torch.float64) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    w, v = (table.weight for table in tables)
    opt, plain = SAM([w], base, rho=0.05, lr=0.1), base([v], lr=0.1)
    defaults = {key: value for key, value in plain.param_groups[0].items() if key != "params"}
    assert defaults.items() <= opt.param_groups[0].items()
    rows = torch.tensor([1, 4, 4])
    for step in range(2):

        def loss(table, step=step):
            return ((table(rows) - step) ** 2).sum()

        loss(tables[0]).backward()
        loss(tables[1]).backward()
        start, gradient = v.detach().clone(), v.grad.to_dense()
        opt.first_step(zero_grad=True)
        probe = start + 0.05 * gradient / gradient.norm()
        assert_close([w], [probe], 1e-11)
        loss(tables[0]).backward()
        opt.second_step(zero_grad=True)
        with torch.no_grad():
            v.copy_(probe)
        plain.zero_grad()
        loss(tables[1]).backward()
        with torch.no_grad():
            v.copy_(start)
        plain.step()
        plain.zero_grad()
        assert_close([w], [v], 1e-10)


def test_a_base_with_a_rho_of_its_own_keeps_it_and_ours_is_sam_rho():
    w = Parameter(torch.zeros(1))
    opt = SAM([{"params": [w], "rho": 0.8}], torch.optim.Adadelta, rho=0.05, lr=1.0)
    assert (opt.param_groups[0]["rho"], opt.param_groups[0]["sam_rho"]) == (0.8, 0.05)
    wrapped = SAM.wrap(torch.optim.Adadelta([w], rho=0.95), rho=0.3)
    assert (wrapped.param_groups[0]["rho"], wrapped.param_groups[0]["sam_rho"]) == (0.95, 0.3)
    opt.param_groups[0]["sam_rho"] = 0.25
    w.grad = torch.ones(1)
    opt.first_step()
    assert_close([w], [torch.full((1,), 0.25)], 1e-6)
    opt.second_step()


def test_a_schedule_of_the_radius_leaves_the_rho_of_the_base_alone():
    w = Parameter(torch.zeros(1))
    opt = SAM.wrap(torch.optim.Adadelta([w], lr=0.0, rho=0.95), rho=lambda step: 0.5 + step)
    for radius in (0.5, 1.5):
        w.grad = torch.ones(1)
        opt.first_step()
        assert_close([w], [torch.full((1,), radius)], 1e-6)
        opt.second_step()
    assert opt.param_groups[0]["rho"] == 0.95


def test_a_checkpoint_of_a_base_with_a_rho_of_its_own_goes_both_ways():
    w, v = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    opt, plain = SAM([w], torch.optim.Adadelta, rho=0.05), torch.optim.Adadelta([v], rho=0.7)
    opt.load_state_dict(plain.state_dict())
    assert (opt.param_groups[0]["rho"], opt.param_groups[0]["sam_rho"]) == (0.7, 0.05)
    plain.load_state_dict(opt.state_dict())
    assert plain.param_groups[0]["rho"] == 0.7


def test_a_base_with_an_adaptive_of_its_own_keeps_it():
    class Adapting(torch.optim.SGD):
        def __init__(self, params, lr=0.0, adaptive="rows"):
            super().__init__(params, lr=lr)
            self.defaults["adaptive"] = adaptive
            for group in self.param_groups:
                group["adaptive"] = adaptive

    w = Parameter(torch.tensor([2.0, 0.0]))
    opt = SAM([w], Adapting, rho=0.5)
    w.grad = torch.tensor([3.0, 4.0])
    opt.first_step()
    assert_close([w], [torch.tensor([2.3, 0.4])], 1e-6)
    assert (opt.param_groups[0]["adaptive"], opt.param_groups[0]["sam_adaptive"]) == ("rows", False)
