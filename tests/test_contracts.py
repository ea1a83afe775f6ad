"""What surrounding code relies on: phases of a step (C) and the interface of an optimizer (A)."""

from __future__ import annotations

import inspect
import types
import warnings

import pytest
import torch
from fixtures import (
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
)
from torch.nn import Parameter

from sam_kernels import SAM, recipes

INPUTS = batches(6, 4, 5)
every_fused_base = pytest.mark.parametrize(
    ("base", "arguments"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {}), (torch.optim.AdamW, {})],
    ids=["sgd", "adam", "adamw"],
)


# --- C: numerics and phases ---------------------------------------------------------------------------------


@every_backend
def test_c1_interrupt_in_pass_two_leaves_the_old_weights(backend):
    model = small_net(torch.float32)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, backend=backend, lr=0.1, momentum=0.9)
    before, calls = values(model.parameters()), []

    def closure():
        calls.append(1)
        loss = backward_of(model, INPUTS[0].float())()
        if len(calls) == 2:
            assert not same_bits(model.parameters(), before)
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert same_bits(model.parameters(), before)
    assert not base_state(opt)


@pytest.mark.parametrize("name", recipes.names())
def test_c1_interrupt_in_any_pass_of_any_recipe_leaves_the_old_weights(name):
    model = small_net(torch.float32)
    always = {"late": -100.0, "early": -100.0} if name == "ae_sam" else {}
    recipe = recipes.get(name, **always)
    opt = SAM(model.named_parameters(), torch.optim.SGD, recipe=recipe, lr=0.1, momentum=0.9)
    calls = []

    def closure(failing=0):
        calls.append(1)
        loss = backward_of(model, INPUTS[0].float())()
        if len(calls) == failing:
            raise KeyboardInterrupt
        return loss

    def step(failing=0):
        calls.clear()
        more = {"ahead": closure} if name == "sampa" else {}
        opt.step(lambda: closure(failing), **more)

    step()
    for number in range(1, recipe.gradients + (name != "sampa")):
        while not opt.is_due:
            step()
        before = values(model.parameters())
        with pytest.raises(KeyboardInterrupt):
            step(number)
        assert same_bits(model.parameters(), before)
        step()
        assert not same_bits(model.parameters(), before)


@every_backend
def test_c3_branch_used_in_one_pass_only(backend):
    model = torch.nn.ModuleList([torch.nn.Linear(3, 1) for _ in range(3)])
    weights = list(model.parameters())
    opt = SAM(weights, torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    x = torch.ones(2, 3)
    before, passes = values(weights), []

    def closure():
        passes.append(values(weights))
        used = [model[0], model[1]] if len(passes) == 1 else [model[0], model[2]]
        loss = sum(layer(x).sum() for layer in used)
        loss.backward()
        return loss

    opt.step(closure)
    assert [torch.equal(a, b) for a, b in zip(passes[1], before, strict=True)] == [False] * 4 + [True] * 2
    assert [torch.equal(a, b) for a, b in zip(weights, before, strict=True)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    torch.testing.assert_close(weights[4].detach(), before[4] - 0.1 * 2)


@every_backend
def test_c4_no_gradient_in_the_next_step_leaves_a_parameter_alone(backend):
    a, b = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    opt = SAM([a, b], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1, momentum=0.9)
    for p in (a, b):
        p.grad = torch.ones(3)
    opt.first_step()
    opt.second_step(zero_grad=True)
    here, state = values([b]), values([opt.base_optimizer.state[b]["momentum_buffer"]])
    for _ in range(2):
        a.grad = torch.ones(3)
        opt.first_step()
        opt.second_step(zero_grad=True)
    assert same_bits([b], here)
    assert same_bits([opt.base_optimizer.state[b]["momentum_buffer"]], state)


@every_backend
@rounds_to_nearest
def test_c5_one_norm_over_groups_and_dtypes(backend):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    weights = [Parameter(torch.zeros(4, dtype=d)) for d in dtypes]
    opt = SAM(
        [{"params": weights[:2]}, {"params": weights[2:]}], torch.optim.SGD, rho=1.0, backend=backend, lr=0.1
    )
    for index, w in enumerate(weights):
        w.grad = torch.full_like(w, index + 1.0)
    opt.first_step()
    norm = (4 * (1 + 4 + 9 + 16)) ** 0.5
    for index, w in enumerate(weights):
        assert_close(
            [w],
            [torch.full((4,), (index + 1.0) / norm, dtype=torch.float64)],
            max(torch.finfo(w.dtype).eps, 1e-11),
        )
    opt.second_step()
    assert [w.dtype for w in weights] == list(dtypes)


@every_backend
@every_fused_base
def test_c5_gradients_in_another_layout_than_their_parameter(base, arguments, backend):
    trained = []
    for twisted in (False, True):
        torch.manual_seed(0)
        weights = [
            Parameter(torch.randn(4, 6)),
            Parameter(torch.randn(2, 3, 4, 5)),
            Parameter(torch.randn(6, 4).t()),
        ]
        opt = SAM(weights, base, rho=0.5, backend=backend, lr=0.01, **arguments)
        for seed in range(2):
            for passes in (opt.first_step, opt.second_step):
                give_gradients(weights, seed)
                if twisted:
                    weights[0].grad = weights[0].grad.t().contiguous().t()
                    weights[1].grad = weights[1].grad.contiguous(memory_format=torch.channels_last)
                    weights[2].grad = weights[2].grad.contiguous()
                passes(zero_grad=True)
        trained.append(values(weights))
    assert_close(trained[1], trained[0], 1e-7)


@every_backend
@every_fused_base
def test_c5_expanded_gradients(base, arguments, backend):
    w, plain = Parameter(torch.ones(3, 4)), Parameter(torch.ones(3, 4))
    opts = [SAM([p], base, rho=0.5, backend=backend, lr=0.01, **arguments) for p in (w, plain)]
    for p, opt in zip((w, plain), opts, strict=True):
        for passes in (opt.first_step, opt.second_step):
            g = torch.tensor(0.5).expand(3, 4)
            p.grad = g if p is w else g.contiguous()
            passes()
    assert_close([w], [plain], 1e-7)


@every_backend
def test_c5_strided_parameter_works_or_is_refused_with_a_sentence(backend):
    storage = torch.arange(16.0).reshape(4, 4)
    holes = storage.clone()
    w = Parameter(storage[:, ::2])
    try:
        opt = SAM([w], torch.optim.SGD, rho=1.0, backend=backend, lr=0.1)
        w.grad = torch.ones(4, 2)
        opt.first_step()
    except (RuntimeError, ValueError) as refusal:
        assert len(str(refusal).split()) > 4
        assert torch.equal(storage, holes)
        return
    assert_close([w], [holes[:, ::2] + 8**-0.5], 1e-6)
    opt.second_step()
    assert_close([w], [holes[:, ::2] - 0.1], 1e-6)
    assert torch.equal(storage[:, 1::2], holes[:, 1::2])


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_c6_non_finite_norm_writes_nothing_into_weights(bad, backend):
    parameters = awkward_parameters()
    opt = SAM(parameters, torch.optim.SGD, backend=backend, lr=0.1)
    before = values(parameters)
    give_gradients(parameters, 0)
    with torch.no_grad():
        parameters[3].grad[2] = bad
    opt.first_step()
    assert same_bits(parameters, before)


@every_backend
@every_fused_base
def test_c7_version_counters_advance_for_every_mutated_tensor(base, arguments, backend):
    w = Parameter(torch.ones(3))
    opt = SAM([w], base, rho=0.5, backend=backend, lr=0.1, **arguments)
    for _ in range(2):
        w.grad = torch.ones(3)
        start = w._version
        opt.first_step()
        perturbed = w._version
        w.grad = torch.ones(3)
        slots = [
            t for t in opt.base_optimizer.state.get(w, {}).values() if isinstance(t, torch.Tensor) and t.dim()
        ]
        versions = [t._version for t in slots]
        opt.second_step()
        assert start < perturbed < w._version
        assert all(now._version > then for now, then in zip(slots, versions, strict=True))
    assert slots


@every_backend
def test_c7_backward_through_a_retained_graph_is_detected(backend):
    w = Parameter(torch.ones(3))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    opt.first_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    second = (w * w).sum()
    second.backward(retain_graph=True)
    opt.second_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


@every_backend
def test_c7_restoring_through_perturbed_is_detected_too(backend):
    w = Parameter(torch.ones(3))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    w.grad = torch.ones(3)
    with opt.perturbed():
        loss = (w * w).sum()
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_backend
@every_fused_base
def test_c8_gradients_that_are_views_of_one_buffer_overwritten_in_pass_two(base, arguments, backend):
    trained = []
    for views in (False, True):
        torch.manual_seed(0)
        weights = [Parameter(torch.randn(5)), Parameter(torch.randn(2, 3))]
        opt = SAM(weights, base, rho=0.5, backend=backend, lr=0.1, **arguments)
        bucket = torch.zeros(11)
        if views:
            weights[0].grad, weights[1].grad = bucket[:5], bucket[5:].view(2, 3)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            new = torch.randn(11, generator=generator)
            if views:
                bucket.copy_(new)
            else:
                weights[0].grad, weights[1].grad = new[:5].clone(), new[5:].view(2, 3).clone()
            (opt.second_step if seed % 2 else opt.first_step)()
        trained.append(values(weights))
    assert same_bits(*trained)


@every_backend
def test_c9_a_closure_that_zeroes_gradients_itself_gives_the_same_result(backend):
    trained = []
    for zeroes in (None, True, False):
        model = small_net()
        opt = SAM(model.parameters(), torch.optim.SGD, backend=backend, lr=0.1, momentum=0.9)
        for step in range(3):

            def closure(step=step, model=model, opt=opt, zeroes=zeroes):
                if zeroes is not None:
                    opt.zero_grad(set_to_none=zeroes)
                return backward_of(model, INPUTS[step], step)()

            opt.step(closure)
        trained.append(values(model.parameters()))
    assert same_bits(trained[0], trained[1])
    assert same_bits(trained[0], trained[2])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_c9_zero_grad_honours_set_to_none(set_to_none):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    opt.zero_grad(set_to_none=set_to_none)
    assert (w.grad is None) == set_to_none


# --- A: interface -------------------------------------------------------------------------------------------


def test_a1_is_an_optimizer():
    w = Parameter(torch.ones(1))
    opt = SAM([w], torch.optim.SGD, lr=0.1, momentum=0.9)
    assert isinstance(opt, torch.optim.Optimizer)
    assert isinstance(opt.base_optimizer, torch.optim.SGD)
    assert opt.defaults["lr"] == 0.1
    assert opt.defaults["momentum"] == 0.9
    assert opt.param_groups is opt.base_optimizer.param_groups
    w.grad = torch.ones(1)
    opt.first_step()
    opt.step()
    assert "momentum_buffer" in opt.state[w]


def test_a1_groups_are_shared_after_load_state_dict_and_lr_set_then_is_used():
    w = Parameter(torch.zeros(1))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups is opt.base_optimizer.param_groups
    opt.param_groups[0]["lr"] = 2.0
    w.grad = torch.ones(1)
    opt.first_step()
    opt.step()
    assert float(w) == -2.0


def test_a1_state_is_the_state_of_the_base_after_load_state_dict():
    w = Parameter(torch.zeros(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1, momentum=0.9)
    w.grad = torch.ones(2)
    opt.first_step()
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert opt.state[w]["momentum_buffer"] is opt.base_optimizer.state[w]["momentum_buffer"]


@pytest.mark.parametrize("saved_by", ["torch", "sam"])
def test_a1_groups_are_shared_after_the_base_loads_a_checkpoint_itself(saved_by):
    w = Parameter(torch.zeros(2, dtype=torch.float64))
    opt = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    other = torch.optim.SGD([Parameter(torch.zeros(2))], lr=0.25, momentum=0.9)
    opt.base_optimizer.load_state_dict((other if saved_by == "torch" else opt).state_dict())
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    opt.first_step()
    assert_close([w], [torch.tensor([0.3, 0.4], dtype=torch.float64)], 1e-11)
    opt.step()
    assert opt.param_groups is opt.base_optimizer.param_groups
    lr = 0.25 if saved_by == "torch" else 0.1
    assert_close([w], [torch.tensor([-3.0, -4.0], dtype=torch.float64) * lr], 1e-14)


def test_a1_a_rate_set_on_the_base_is_used():
    w = Parameter(torch.zeros(1))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    for group in opt.base_optimizer.param_groups:
        group["lr"] = 3.0
    w.grad = torch.ones(1)
    opt.first_step()
    opt.step()
    assert float(w) == -3.0


def test_a2_closure_runs_at_both_points_with_grad():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    seen = []

    def closure():
        seen.append((torch.is_grad_enabled(), values(model.parameters())))
        return backward_of(model, INPUTS[0])()

    with torch.no_grad():
        loss = opt.step(closure)
    assert [enabled for enabled, _ in seen] == [True, True]
    assert not same_bits(seen[0][1], seen[1][1])
    fresh = small_net()
    torch.testing.assert_close(loss.detach(), backward_of(fresh, INPUTS[0])().detach(), rtol=0, atol=0)


@pytest.mark.parametrize("finish", ["step", "second_step"])
def test_a3_two_step_form_does_not_upset_schedulers(finish):
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1)
        backward_of(model, INPUTS[0])()
        opt.first_step(zero_grad=True)
        backward_of(model, INPUTS[0])()
        getattr(opt, finish)()
        scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_a4_probe_with_zero_lr_creates_state_and_moves_nothing(base, lr):
    if base is torch.optim.RMSprop and isinstance(lr, torch.Tensor):
        pytest.skip("torch's RMSprop takes a tensor lr only where it is capturable")
    w = Parameter(torch.ones(3))
    arguments = {"momentum": 0.9} if base is torch.optim.SGD else {}
    opt = SAM([w], base, lr=lr, **arguments)
    w.grad = torch.zeros(3)
    opt.step(closure=None)
    assert torch.equal(w, torch.ones(3))
    assert opt.base_optimizer.state[w]


def test_a4_base_without_any_lr_is_not_a_probe():
    class Fixed(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            raise AssertionError("the base took a plain step")

    w = Parameter(torch.ones(1))
    opt = SAM([w], Fixed)
    w.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="sam"):
        opt.step()


def test_a4_one_group_with_lr_is_not_a_probe():
    a, b = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    opt = SAM([{"params": [a], "lr": 0.0}, {"params": [b]}], torch.optim.SGD, lr=0.1)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    with pytest.raises(RuntimeError, match="sam"):
        opt.step()
    assert float(b) == 1.0


@every_backend
def test_a4_allow_plain_step_is_the_base_step(backend):
    w, plain = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    opt = SAM([w], torch.optim.SGD, allow_plain_step=True, backend=backend, lr=0.1, momentum=0.9)
    base = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    for step in range(3):
        w.grad, plain.grad = torch.full((3,), 1.0 + step), torch.full((3,), 1.0 + step)
        opt.step()
        base.step()
    assert_close([w], [plain], 1e-7)


def test_a4_get_and_set_optimizer_state_dict_round_trip():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = small_net(), small_net()
    opt = SAM(model.parameters(), torch.optim.AdamW, recipe=recipes.sam(every=2), lr=0.01)
    for step in range(3):
        opt.step(backward_of(model, INPUTS[step], step))
    state = get_optimizer_state_dict(model, opt)
    other.load_state_dict(model.state_dict())
    resumed = SAM(other.parameters(), torch.optim.AdamW, recipe=recipes.sam(every=2), lr=0.01)
    set_optimizer_state_dict(other, resumed, state)
    assert same_bits(base_state(opt), base_state(resumed))
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    assert resumed.param_groups[0]["lr"] == 0.01


def test_a4_get_optimizer_state_dict_before_the_first_step_changes_no_weights():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = small_net()
    opt = SAM(model.parameters(), torch.optim.AdamW, lr=0.01)
    before = values(model.parameters())
    state = get_optimizer_state_dict(model, opt)
    assert same_bits(model.parameters(), before)
    assert opt.param_groups[0]["lr"] == 0.01
    assert state["state"]


def test_a5_state_dict_holds_moments_and_steps_and_nothing_transient():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.AdamW, lr=0.01)
    opt.step(backward_of(model, INPUTS[0]))
    plain = torch.optim.AdamW(small_net().parameters(), lr=0.01)
    for p in plain.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    plain.step()
    for index, slots in plain.state_dict()["state"].items():
        ours = opt.state_dict()["state"][index]
        assert set(ours) == set(slots)
        for key, slot in slots.items():
            assert (ours[key].dtype, ours[key].shape, ours[key].device) == (
                slot.dtype,
                slot.shape,
                slot.device,
            )


def test_a6_parameters_replaced_between_construction_and_first_step():
    w, placeholder = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    opt = SAM([placeholder], torch.optim.SGD, rho=0.5, lr=0.1)
    opt.param_groups[0]["params"][0] = w
    w.grad = torch.ones(3)
    opt.first_step()
    assert bool((w > 1).all())
    opt.step()
    assert_close([w], [torch.full((3,), 0.9)], 1e-6)
    assert torch.equal(placeholder, torch.ones(3))


@every_backend
def test_a6_parameters_replaced_between_two_steps(backend):
    old, new = Parameter(torch.ones(3)), Parameter(torch.full((5,), 2.0))
    opt = SAM([old], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    for w in (old, new):
        opt.param_groups[0]["params"][0] = w
        w.grad = torch.ones_like(w)
        opt.first_step()
        opt.step()
    assert_close([old, new], [torch.full((3,), 0.9), torch.full((5,), 1.9)], 1e-6)


@every_backend
def test_a6_storage_replaced_between_two_steps(backend):
    w = Parameter(torch.ones(3))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    kept = []
    for value in (1.0, 2.0, 3.0):
        kept.append(w.data)
        w.data = torch.full((3,), value)  # somebody else's doing: module.to, a sharding library
        w.grad = torch.ones(3)
        opt.first_step()
        opt.step()
        assert_close([w], [torch.full((3,), value - 0.1)], 1e-6)
    assert_close([kept[1]], [torch.full((3,), 0.9)], 1e-6)


@every_backend
def test_a6_module_cast_after_construction(backend):
    model = torch.nn.Linear(3, 2)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    model.double()
    opt.step(lambda: [loss := model(torch.ones(1, 3, dtype=torch.float64)).pow(2).sum(), loss.backward()][0])
    assert model.weight.dtype == torch.float64


def test_a7_signatures():
    assert inspect.signature(SAM.zero_grad).parameters["set_to_none"].default is True
    assert "grad_scaler" not in inspect.signature(SAM.step).parameters
    assert next(iter(list(inspect.signature(SAM.step).parameters)[1:])) == "closure"


def test_a7_step_replaced_on_the_instance_still_steps():
    w = Parameter(torch.ones(1))
    opt = SAM([w], torch.optim.SGD, lr=0.5)
    original = opt.step
    opt.step = types.MethodType(lambda self, *a, **k: original(*a, **k), opt)
    w.grad = torch.ones(1)
    opt.first_step()
    opt.step()
    assert float(w) == 0.5


@every_backend
def test_a8_double_first_step_is_loud_and_can_still_be_restored(backend):
    w = Parameter(torch.tensor([1.0, 2.0]))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.0)
    w.grad = torch.ones(2)
    opt.first_step()
    here = values([w])
    with pytest.raises(RuntimeError, match="first_step"):
        opt.first_step()
    assert same_bits([w], here)
    w.grad = torch.ones(2)
    opt.second_step()
    assert torch.equal(w.detach(), torch.tensor([1.0, 2.0]))


def test_a8_zero_grad_then_step_is_loud():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="sam"):
        opt.step()


@every_backend
def test_a8_step_without_a_second_backward_never_leaves_perturbed_weights(backend):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    w.grad = torch.ones(2)
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="gradient"):
        opt.step()
    assert torch.equal(w, torch.ones(2))


def test_a8_state_dict_while_perturbed_is_loud():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.ones(2)
    opt.first_step()
    with pytest.raises(RuntimeError, match="perturbed"):
        opt.state_dict()
    opt.second_step()
    assert opt.state_dict()


@pytest.mark.parametrize("what", ["state_dict", "load_state_dict"])
def test_a8_also_inside_the_perturbed_block(what):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    saved = opt.state_dict()
    w.grad = torch.ones(2)
    with opt.perturbed():
        with pytest.raises(RuntimeError, match="perturbed"):
            opt.state_dict() if what == "state_dict" else opt.load_state_dict(saved)
        w.grad = torch.ones(2)
    opt.step()
    assert_close([w], [torch.full((2,), 0.9)], 1e-6)
