"""The optimizer as a user of torch.optim meets it: construction, forms of a step, groups, hooks, copies."""

from __future__ import annotations

import collections
import copy
import inspect
import pickle
import types
import warnings

import pytest
import torch
from fixtures import (
    assert_close,
    backward_of,
    base_state,
    batches,
    every_backend,
    give_gradients,
    same_bits,
    small_net,
    values,
    why_not,
)
from torch.nn import Parameter

from sam_kernels import SAM, recipes

INPUTS = batches(8, 4, 5)


def run(opt, model, steps, form="closure", first=0, inputs=INPUTS):
    """Train in one of the forms a step can be spelled."""
    for step in range(first, first + steps):
        backward = backward_of(model, inputs[step], step)
        if form == "closure":
            opt.step(backward)
            continue
        opt.zero_grad()
        backward()
        if form == "two-step":
            opt.first_step(zero_grad=True)
            backward()
            opt.second_step(zero_grad=True)
        elif form == "aliases":
            opt.ascent_step(zero_grad=True)
            backward()
            opt.descent_step(zero_grad=True)
        elif form == "step":
            opt.first_step(True)
            backward()
            opt.step()
        elif form == "perturbed":
            with opt.perturbed():
                backward()
            opt.step()


FORMS = ("closure", "two-step", "aliases", "step", "perturbed")


# --- construction -------------------------------------------------------------------------------------------


def test_positional_order_is_params_base_rho_adaptive():
    w = Parameter(torch.tensor([2.0, 0.0], dtype=torch.float64))
    opt = SAM([w], torch.optim.SGD, 0.5, True, lr=0.1)
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    opt.first_step()
    assert_close([w], [torch.tensor([3.0, 0.0], dtype=torch.float64)], 1e-11)  # e = rho * w^2 g / |w g|


def test_base_as_class_and_as_instance_agree():
    trained = []
    for given in ("class", "instance", "wrap"):
        model = small_net()
        if given == "class":
            opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
        else:
            base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            if given == "instance":
                opt = SAM(model.parameters(), base, rho=0.1)
            else:
                opt = SAM.wrap(base, recipes.sam(rho=0.1))
            assert opt.base_optimizer is base
        run(opt, model, 3)
        trained.append(values(model.parameters()))
    assert same_bits(trained[0], trained[1])
    assert same_bits(trained[0], trained[2])


def test_wrapped_instance_shares_its_groups_and_keeps_its_state():
    model = small_net()
    base = torch.optim.Adam([{"params": [p]} for p in model.parameters()], lr=0.01)
    backward_of(model, INPUTS[0])()
    base.step()
    opt = SAM.wrap(base, recipes.sam())
    assert opt.param_groups is base.param_groups
    run(opt, model, 1)
    assert {float(s["step"]) for s in base.state.values()} == {2.0}


def test_wrapping_a_class_is_a_sentence():
    with pytest.raises(TypeError, match="instance"):
        SAM.wrap(torch.optim.SGD, recipes.sam())


@pytest.mark.parametrize(
    "base", [None, "sgd", int, torch.nn.Linear(1, 1)], ids=["none", "name", "int", "module"]
)
def test_a_base_that_is_no_optimizer_is_a_sentence(base):
    with pytest.raises(TypeError, match="(?i)base_optimizer.*optimizer"):
        SAM([Parameter(torch.ones(1))], base)


def test_base_arguments_next_to_an_instance_are_contradictory():
    w = Parameter(torch.ones(1))
    with pytest.raises((TypeError, ValueError), match="lr"):
        SAM([w], torch.optim.SGD([w], lr=0.1), lr=0.2)


def test_instance_that_holds_other_parameters_is_contradictory():
    with pytest.raises((TypeError, ValueError), match="param"):
        SAM([Parameter(torch.ones(1))], torch.optim.SGD([Parameter(torch.ones(1))], lr=0.1))


def test_no_parameters_is_a_sentence_of_the_constructor():
    with pytest.raises(ValueError, match="empty parameter list"):
        SAM([], torch.optim.SGD, lr=0.1)


def test_unknown_base_argument_names_itself():
    with pytest.raises(TypeError, match="momentun"):
        SAM([Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1, momentun=0.9)


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="tritn.*foreach.*reference"):
        SAM([Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1, backend="tritn")


def test_complex_parameters_are_refused_with_a_sentence():
    w = Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError), match="complex"):
        opt = SAM([w], torch.optim.SGD, lr=0.1)
        w.grad = torch.ones_like(w)
        opt.first_step()
    assert torch.equal(w.detach(), torch.ones(2, dtype=torch.complex64))


def test_lbfgs_is_refused_with_a_sentence():
    with pytest.raises((TypeError, ValueError, RuntimeError), match="LBFGS"):
        SAM([Parameter(torch.ones(2))], torch.optim.LBFGS, lr=0.1)


def test_repr_names_the_recipe_and_lists_the_groups():
    text = repr(SAM([Parameter(torch.ones(1))], torch.optim.SGD, recipe="asam", lr=0.125))
    assert "SAM" in text
    assert "asam" in text.lower()
    assert "0.125" in text


def test_backends_says_what_runs_and_why_the_others_were_passed_over(monkeypatch):
    monkeypatch.delenv("SAM_KERNELS_BACKEND", raising=False)
    w = Parameter(torch.ones(1))
    opt = SAM([w], torch.optim.SGD, lr=0.1, backend="reference")
    w.grad = torch.ones(1)
    opt.first_step()
    opt.second_step()
    report = str(opt.backends())
    assert "reference" in report
    automatic = str(SAM([Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1).backends())
    assert "native" in automatic  # it is the first choice: it runs, or there is a reason why not
    refusal = why_not("native")
    assert refusal is None or "foreach" in automatic
    assert refusal is None or "native module" in automatic


# --- one step, five spellings -------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("form", FORMS[1:])
def test_the_forms_of_a_step_agree_bit_for_bit(form, base, backend):
    trained = []
    for spelled in ("closure", form):
        model = small_net(torch.float32)
        opt = SAM(model.parameters(), base, backend=backend, lr=0.01)
        run(opt, model, 3, spelled, inputs=[x.float() for x in INPUTS])
        trained.append(values(model.parameters()) + base_state(opt))
    assert same_bits(*trained)


def test_step_returns_the_loss_of_the_first_pass_itself():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    losses = []

    def closure():
        losses.append(backward_of(model, INPUTS[0])())
        return losses[-1]

    returned = opt.step(closure)
    assert len(losses) == 2
    assert returned is losses[0]
    assert float(losses[1].detach()) > float(losses[0].detach())


def test_step_evaluates_at_w_and_at_w_plus_e():
    model = small_net()
    weights = list(model.parameters())
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.25, lr=0.1)
    start, probes = values(weights), []

    def closure():
        probes.append(values(weights))
        return backward_of(model, INPUTS[0])()

    opt.step(closure)
    assert same_bits(probes[0], start)
    distance = torch.cat([(a - b).reshape(-1) for a, b in zip(probes[1], start, strict=True)]).norm()
    assert float(distance) == pytest.approx(0.25, rel=1e-10)


def test_step_enables_grad_for_the_closure():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    enabled = []

    def closure():
        enabled.append(torch.is_grad_enabled())
        return backward_of(model, INPUTS[0])()

    with torch.no_grad():
        opt.step(closure)
        assert not torch.is_grad_enabled()
    assert enabled == [True, True]


def test_step_zeroes_gradients_before_each_pass():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    give_gradients(list(model.parameters()), seed=0, scale=1e6)  # left over from somewhere
    seen = []

    def closure():
        seen.append(all(p.grad is None or not p.grad.any() for p in model.parameters()))
        return backward_of(model, INPUTS[0])()

    opt.step(closure)
    assert seen == [True, True]


def test_closure_by_keyword_is_the_same_step():
    trained = []
    for keyword in (False, True):
        model = small_net()
        opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        backward = backward_of(model, INPUTS[0])
        opt.step(closure=backward) if keyword else opt.step(backward)
        trained.append(values(model.parameters()))
    assert same_bits(*trained)


@pytest.mark.parametrize("loss", [None, 3.5])
def test_a_closure_may_return_anything(loss):
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)

    def closure():
        backward_of(model, INPUTS[0])()
        return loss

    assert opt.step(closure) == loss


def test_the_two_steps_return_none():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    assert opt.first_step() is None
    assert opt.second_step() is None


def test_zero_grad_of_the_two_steps_is_off_by_default():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    opt.first_step()
    assert torch.equal(w.grad, torch.ones(2))
    opt.second_step()
    assert torch.equal(w.grad, torch.ones(2))


def test_zero_grad_of_the_two_steps_clears_gradients():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    opt.first_step(zero_grad=True)
    assert w.grad is None or not w.grad.any()
    w.grad = torch.ones(2)
    opt.second_step(zero_grad=True)
    assert w.grad is None or not w.grad.any()


def test_perturbed_zeroes_the_gradients_it_has_used():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    with opt.perturbed():
        assert w.grad is None or not w.grad.any()


def test_perturbed_descends_with_the_gradients_computed_inside():
    w = Parameter(torch.zeros(2, dtype=torch.float64))
    opt = SAM([w], torch.optim.SGD, lr=0.5)
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    with opt.perturbed():
        assert_close([w], [torch.tensor([0.03, 0.04], dtype=torch.float64)], 1e-11)
        w.grad = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert torch.equal(w, torch.zeros(2, dtype=torch.float64))
    opt.step()
    assert torch.equal(w.detach(), torch.tensor([-0.5, 0.5], dtype=torch.float64))


def test_perturbed_then_second_step_is_the_same_descent():
    w = Parameter(torch.zeros(2))
    opt = SAM([w], torch.optim.SGD, lr=0.5)
    w.grad = torch.ones(2)
    with opt.perturbed():
        w.grad = torch.tensor([1.0, -1.0])
    opt.second_step(zero_grad=True)
    assert torch.equal(w.detach(), torch.tensor([-0.5, 0.5]))
    assert w.grad is None or not w.grad.any()


def test_perturbed_does_not_nest():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    with opt.perturbed():
        w.grad = torch.ones(2)
        here = w.detach().clone()
        with pytest.raises(RuntimeError, match="perturbed"), opt.perturbed():
            pass
        assert torch.equal(w, here)
    assert torch.equal(w, torch.ones(2))


def test_training_lowers_the_loss():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.05, momentum=0.9)
    losses = [float(opt.step(backward_of(model, INPUTS[0])).detach()) for _ in range(40)]
    assert losses[-1] < 0.05 * losses[0]


# --- groups and learning rates ------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_tensor_lr_equals_float_lr(base, backend):
    trained = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        model = small_net()
        opt = SAM(model.parameters(), base, backend=backend, lr=lr)
        run(opt, model, 3)
        trained.append(values(model.parameters()))
    assert_close(*trained, 1e-13)


@every_backend
def test_tensor_lr_changed_in_place_is_used(backend):
    lr = torch.tensor(0.5)
    w = Parameter(torch.zeros(2))
    opt = SAM([w], torch.optim.SGD, backend=backend, lr=lr)
    for rate in (0.5, 0.25):
        opt.param_groups[0]["lr"].fill_(rate)
        before = w.detach().clone()
        w.grad = torch.ones(2)
        opt.first_step()
        w.grad = torch.ones(2)
        opt.step()
        assert torch.equal(w.detach(), before - rate)


@every_backend
def test_rho_of_a_group_can_be_changed_later(backend):
    w = Parameter(torch.zeros(2, dtype=torch.float64))
    opt = SAM([w], torch.optim.SGD, rho=0.05, backend=backend, lr=0.1)
    for rho in (0.05, 0.5, 0.0):
        with torch.no_grad():
            w.zero_()
        opt.param_groups[0]["rho"] = rho
        w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
        opt.first_step()
        assert_close([w], [torch.tensor([0.6, 0.8], dtype=torch.float64) * rho], 1e-11)
        opt.second_step()


@every_backend
def test_each_group_keeps_its_own_lr_momentum_and_decay(backend):
    a, b = Parameter(torch.ones(2, dtype=torch.float64)), Parameter(torch.ones(2, dtype=torch.float64))
    groups = [{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.1, "rho": 0.0}]
    opt = SAM(groups, torch.optim.SGD, backend=backend, lr=0.1)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    opt.first_step()
    assert torch.equal(b, torch.ones_like(b))
    opt.step()
    assert_close([a, b], [torch.full_like(a, 0.5), torch.full_like(b, 1 - 0.1 * 1.1)], 1e-14)


def test_groups_carry_rho_and_adaptive():
    opt = SAM(
        [{"params": [Parameter(torch.ones(1))]}, {"params": [Parameter(torch.ones(1))], "rho": 0.3}],
        torch.optim.SGD,
        rho=0.1,
        lr=0.1,
    )
    assert [g["rho"] for g in opt.param_groups] == [0.1, 0.3]
    assert [g["adaptive"] for g in opt.param_groups] == [False, False]


@every_backend
def test_adaptive_of_a_group_can_be_changed_later(backend):
    w = Parameter(torch.tensor([2.0, 0.0], dtype=torch.float64))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.0)
    for adaptive, moved in ((False, (2.3, 0.4)), (True, (3.0, 0.0)), (False, (2.3, 0.4))):
        opt.param_groups[0]["adaptive"] = adaptive
        w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
        opt.first_step()
        assert_close([w], [torch.tensor(moved, dtype=torch.float64)], 1e-11)
        opt.second_step()


@every_backend
def test_group_without_parameters_is_no_error(backend):
    w = Parameter(torch.ones(2))
    opt = SAM([{"params": [w]}, {"params": []}], torch.optim.SGD, backend=backend, lr=0.5)
    w.grad = torch.ones(2)
    opt.first_step()
    opt.step()
    assert torch.equal(w.detach(), torch.full((2,), 0.5))


def test_negative_rho_of_a_group_is_a_sentence():
    with pytest.raises(ValueError, match="rho"):
        SAM([{"params": [Parameter(torch.ones(1))], "rho": -1.0}], torch.optim.SGD, lr=0.1)


def test_negative_rho_set_later_is_a_sentence_and_moves_nothing():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    opt.param_groups[0]["rho"] = -0.1
    w.grad = torch.ones(2)
    with pytest.raises(ValueError, match="rho"):
        opt.first_step()
    assert torch.equal(w, torch.ones(2))


@every_backend
def test_added_group_is_perturbed_and_updated_with_the_defaults_of_the_base(backend):
    a, b = Parameter(torch.zeros(1, dtype=torch.float64)), Parameter(torch.zeros(1, dtype=torch.float64))
    opt = SAM([a], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1, momentum=0.9)
    a.grad = torch.ones_like(a)
    opt.first_step()
    opt.second_step()
    opt.add_param_group({"params": [b]})
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert len(opt.param_groups) == 2
    assert opt.param_groups[1]["momentum"] == 0.9
    assert opt.param_groups[1]["rho"] == 0.5
    start = values([a, b])
    a.grad, b.grad = torch.full_like(a, 3.0), torch.full_like(b, 4.0)
    opt.first_step()
    assert_close([a, b], [start[0] + 0.3, start[1] + 0.4], 1e-11)
    opt.second_step()
    assert_close([b], [torch.full_like(b, -0.4)], 1e-12)
    assert "momentum_buffer" in opt.base_optimizer.state[b]


def test_group_added_through_the_base_is_perturbed_too():
    a, b = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    opt = SAM([a], torch.optim.SGD, rho=0.5, lr=0.1)
    opt.base_optimizer.add_param_group({"params": [b]})
    a.grad, b.grad = torch.full_like(a, 3.0), torch.full_like(b, 4.0)
    opt.first_step()
    assert_close([a, b], [torch.tensor([0.3]), torch.tensor([0.4])], 1e-6)


def test_parameter_in_two_groups_is_refused():
    a = Parameter(torch.zeros(1))
    opt = SAM([a], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="more than one"):
        opt.add_param_group({"params": [a]})
    assert len(opt.param_groups) == 1


def test_zero_rho_is_the_base_optimizer():
    model, plain = small_net(), small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.0, lr=0.1, momentum=0.9)
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        opt.step(backward_of(model, INPUTS[step], step))
        base.zero_grad()
        backward_of(plain, INPUTS[step], step)()
        base.step()
    assert_close(model.parameters(), plain.parameters(), 1e-14)


def test_named_parameters_keep_their_names():
    model = small_net()
    opt = SAM(model.named_parameters(), torch.optim.SGD, lr=0.1)
    assert opt.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert opt.state_dict()["param_groups"][0]["param_names"] == opt.param_groups[0]["param_names"]


# --- hooks, schedulers, closures that freeze ----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_step_hooks_fire_once_a_step_in_every_form(form):
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    fired = []
    opt.register_step_pre_hook(lambda o, args, kwargs: fired.append("pre"))
    opt.register_step_post_hook(lambda o, args, kwargs: fired.append("post"))
    run(opt, model, 2, form)
    assert fired == ["pre", "post"] * 2


@pytest.mark.parametrize("form", FORMS)
def test_post_hook_sees_the_updated_weights(form):
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    seen = []
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(values(model.parameters())))
    run(opt, model, 1, form)
    assert same_bits(seen[0], model.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on", ["sam", "base"])
@pytest.mark.parametrize("kind", ["StepLR", "OneCycleLR"])
def test_schedulers_do_not_warn_and_are_obeyed(kind, on, form):
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = opt if on == "sam" else opt.base_optimizer
        if kind == "StepLR":
            scheduler = torch.optim.lr_scheduler.StepLR(target, step_size=1, gamma=0.5)
        else:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(target, max_lr=0.4, total_steps=10)
        rates = []
        for step in range(3):
            run(opt, model, 1, form, first=step)
            scheduler.step()
            rates.append(opt.param_groups[0]["lr"])
    assert opt.param_groups[0]["lr"] == opt.base_optimizer.param_groups[0]["lr"]
    if kind == "StepLR":
        assert rates == [0.05, 0.025, 0.0125]
    before = values(model.parameters())
    opt.param_groups[0]["lr"] = 0.0
    run(opt, model, 1, form, first=3)
    assert same_bits(before, model.parameters())


class Normalized(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)
        )

    def forward(self, x):
        return self.inner(x)


def test_model_argument_updates_running_statistics_in_the_first_pass_only():
    torch.manual_seed(0)
    model = Normalized().double()
    once = copy.deepcopy(model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, model=model, lr=0.0)
    norm, expected = model.inner[1], once.inner[1]
    for step in range(3):
        opt.step(backward_of(model, INPUTS[step], step))
        once(INPUTS[step])
        assert torch.equal(norm.running_mean, expected.running_mean)
        assert torch.equal(norm.running_var, expected.running_var)
        assert int(norm.num_batches_tracked) == step + 1
        assert norm.training
        assert norm.momentum == expected.momentum


def test_without_the_model_argument_running_statistics_follow_every_pass():
    model = Normalized().double()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    opt.step(backward_of(model, INPUTS[0]))
    assert int(model.inner[1].num_batches_tracked) == 2


def test_running_statistics_thaw_when_the_second_pass_raises():
    model = Normalized().double()
    opt = SAM(model.parameters(), torch.optim.SGD, model=model, lr=0.1)
    calls = []

    def closure():
        calls.append(1)
        loss = backward_of(model, INPUTS[0])()
        if len(calls) == 2:
            raise KeyError("second pass")
        return loss

    with pytest.raises(KeyError):
        opt.step(closure)
    model(INPUTS[1])
    assert int(model.inner[1].num_batches_tracked) == 2  # the first pass, and this call


# --- what is refused at the door ----------------------------------------------------------------------------


def asked_for(**arguments):
    return lambda: SAM([Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, **arguments)


SENTENCES = {
    "model": (asked_for(model="x"), "model is 'x'; expected the torch.nn.Module"),
    "adaptive": (asked_for(adaptive="yes"), "adaptive is 'yes'; expected True"),
    "rho": (asked_for(rho=True), "rho is True; expected a finite number"),
    "group": (
        lambda: SAM([{"params": [Parameter(torch.ones(2))], "adaptive": "no"}], torch.optim.SGD, lr=0.1),
        r"param_groups\[0\]: adaptive is 'no'; expected True",
    ),
    "added group": (
        lambda: asked_for()().add_param_group({"params": [Parameter(torch.ones(2))], "adaptive": "no"}),
        "adaptive is 'no'; expected True",
    ),
    "closure": (lambda: asked_for()().step(5), r"step\(\): closure is 5; expected a function"),
    "base": (
        lambda: SAM([Parameter(torch.ones(2))], SAM),
        "SAM is a sharpness-aware optimizer itself; expected",
    ),
    "eta": (lambda: recipes.asam(eta="a"), "eta is 'a'; expected a finite number"),
    "layerwise eta": (lambda: recipes.layerwise_sam(eta=None), "eta is None; expected a finite number"),
    "types": (
        lambda: recipes.nosam(types=[torch.nn.LayerNorm]),
        r"types is \[.*LayerNorm.*\]; expected a tuple of module classes",
    ),
    "type": (
        lambda: recipes.nosam(types=torch.nn.LayerNorm),
        "types is .*LayerNorm.*; expected a tuple of module classes",
    ),
}


@pytest.mark.parametrize("what", SENTENCES)
def test_arguments_that_make_no_sense_are_sentences(what):
    ask, sentence = SENTENCES[what]
    with pytest.raises((TypeError, ValueError), match=sentence):
        ask()


@pytest.mark.filterwarnings("ignore:.*name")
def test_adaptive_set_later_beside_a_recipe_with_a_metric_is_a_sentence_and_moves_nothing():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, recipe="layerwise_sam", lr=0.1)
    opt.param_groups[0]["adaptive"] = True
    w.grad = torch.ones(2)
    with pytest.raises(TypeError, match=r"param_groups\[0\]: adaptive=True and recipe 'layerwise_sam'"):
        opt.first_step()
    assert torch.equal(w.detach(), torch.ones(2))


@pytest.mark.parametrize("size", [4, 1 << 12])
def test_a_parameter_that_overlaps_itself_is_refused_at_construction(size):
    groups = [{"params": [Parameter(torch.ones(2))]}, {"params": [Parameter(torch.ones(1).expand(size))]}]
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\] of shape.*more than once"):
        SAM(groups, torch.optim.SGD, lr=0.1)


def test_windows_over_one_tensor_are_refused_at_construction():
    with pytest.raises(ValueError, match="more than once"):
        SAM([Parameter(torch.ones(6).as_strided((3, 4), (1, 1)))], torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("ranges", [((0, 4), (0, 4)), ((0, 4), (3, 6)), ((0, 6), (2, 3))], ids=str)
def test_two_parameters_over_one_memory_are_refused_at_construction(ranges):
    block = torch.ones(6)
    groups = [{"params": [Parameter(torch.ones(2))]}]
    groups += [{"params": [Parameter(block[start:stop])]} for start, stop in ranges]
    message = r"param_groups\[[12]\]\['params'\]\[0\] and param_groups\[[12]\].*over the same memory"
    with pytest.raises(ValueError, match=message):
        SAM(groups, torch.optim.SGD, lr=0.1)


def test_a_row_and_a_column_that_cross_are_refused_and_views_that_share_nothing_are_not():
    table = torch.ones(4, 4)
    with pytest.raises(ValueError, match="over the same memory"):
        SAM([Parameter(table[:, 1]), Parameter(table[:, 2]), Parameter(table[3])], torch.optim.SGD, lr=0.1)
    SAM([Parameter(table[:, k]) for k in range(4)], torch.optim.SGD, lr=0.1)
    interlocked = torch.ones(8).as_strided((3, 2), (2, 3))  # elements 0 2 4 and 3 5 7
    SAM([Parameter(interlocked)], torch.optim.SGD, lr=0.1)


def test_one_parameter_in_two_places_of_a_model_is_served_once():
    tied = torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(tied, torch.nn.Tanh(), tied)
    SAM(model.parameters(), torch.optim.SGD, lr=0.1)


# --- what belongs to the base -------------------------------------------------------------------------------


def test_empty_state_and_groups_can_be_set():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1, momentum=0.9)
    for half in (opt.first_step, opt.second_step):
        w.grad = torch.ones(2)
        half()
    assert opt.state
    fresh = collections.defaultdict(dict)
    opt.state = fresh
    assert opt.base_optimizer.state is fresh
    opt.param_groups = []
    assert opt.base_optimizer.param_groups == []


# --- copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_deepcopy_trains_on_alone_and_alike(base):
    model = small_net()
    opt = SAM(model.named_parameters(), base, recipe=recipes.sam(every=2), lr=0.01)
    run(opt, model, 3)
    copied_model, copied = copy.deepcopy((model, opt))
    assert copied.param_groups is copied.base_optimizer.param_groups
    here = values(model.parameters())
    run(copied, copied_model, 3, first=3)
    assert same_bits(here, model.parameters())
    run(opt, model, 3, first=3)
    assert same_bits(model.parameters(), copied_model.parameters())


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_pickle_keeps_recipe_state_and_groups(base):
    model = small_net()
    opt = SAM(model.named_parameters(), base, recipe=recipes.asam(rho=0.3, every=2), lr=0.01)
    run(opt, model, 3)
    other_model, other = pickle.loads(pickle.dumps((model, opt)))
    assert other.param_groups is other.base_optimizer.param_groups
    run(opt, model, 3, first=3)
    run(other, other_model, 3, first=3)
    assert same_bits(model.parameters(), other_model.parameters())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_taken_while_perturbed_is_refused_or_can_be_restored(how):
    w = Parameter(torch.tensor([1.0, 2.0]))
    opt = SAM([w], torch.optim.SGD, lr=0.0)
    w.grad = torch.ones(2)
    opt.first_step()
    try:
        other = how(opt)
    except RuntimeError as refusal:
        assert "perturbed" in str(refusal)
    else:
        (v,) = other.param_groups[0]["params"]
        v.grad = torch.ones(2)
        other.step()
        assert torch.equal(v.detach(), torch.tensor([1.0, 2.0]))
    opt.step()
    assert torch.equal(w.detach(), torch.tensor([1.0, 2.0]))


def test_hooks_and_closure_keywords_do_not_stand_in_the_way_of_pickle():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for register in (
        opt.register_step_pre_hook,
        opt.register_step_post_hook,
        opt.register_state_dict_pre_hook,
        opt.register_state_dict_post_hook,
        opt.register_load_state_dict_pre_hook,
        opt.register_load_state_dict_post_hook,
    ):
        register(lambda *_: None)
    opt.closure_kwargs = lambda probe: {}
    run(opt, model, 1)
    other_model, other = pickle.loads(pickle.dumps((model, opt)))
    run(opt, model, 1, first=1)
    run(other, other_model, 1, first=1)
    other.register_step_post_hook(lambda *_: None)
    other.load_state_dict(other.state_dict())
    assert same_bits(model.parameters(), other_model.parameters())


# --- signature ----------------------------------------------------------------------------------------------


def test_signatures_outsiders_rely_on():
    parameters = inspect.signature(SAM.__init__).parameters
    assert list(parameters)[1:5] == ["params", "base_optimizer", "rho", "adaptive"]
    for name in ("recipe", "backend", "model", "allow_plain_step"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["rho"].default is None
    assert parameters["backend"].default == "auto"
    assert "set_to_none" in inspect.signature(SAM.zero_grad).parameters
    assert "grad_scaler" not in inspect.signature(SAM.step).parameters


def test_step_can_be_replaced_on_the_instance():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    original, calls = opt.step, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    opt.step = types.MethodType(counted, opt)
    run(opt, model, 1, "step")
    run(opt, model, 1, "closure", first=1)
    assert len(calls) == 2


def test_loss_goes_down_for_maximize_too():
    w = Parameter(torch.tensor([2.0]))
    opt = SAM([w], torch.optim.SGD, lr=0.1, maximize=True)

    def closure():
        loss = -(w**2).sum()
        loss.backward()
        return loss

    for _ in range(20):
        opt.step(closure)
    assert abs(w.item()) < 0.1


def test_closure_keywords_reach_each_pass():
    w = Parameter(torch.ones(3))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    opt.closure_kwargs = lambda probe: {"ddp_sync": probe > 0}
    seen = []

    def closure(ddp_sync):
        seen.append(ddp_sync)
        loss = w.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert seen == [False, True]
