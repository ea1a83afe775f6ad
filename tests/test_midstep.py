"""What may happen between the passes of a step or make it fail; the weights are the user's own afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from fixtures import assert_close, base_state, every_backend, same_bits, values
from torch.nn import Parameter

from sam_kernels import SAM, recipes


def step(opt, w, gradient):
    for half in (opt.first_step, opt.second_step):
        w.grad = gradient.clone()
        half()


def fail(*_):
    raise OSError("hook")


# --- parameters that change between steps -------------------------------------------------------------------


@every_backend
def test_data_transposed_at_the_same_address_is_noticed(backend):
    w = Parameter(torch.randn(4, 4))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=1.0)
    step(opt, w, torch.randn(4, 4))
    w.data = w.data.t()
    before, gradient = w.detach().clone(), torch.zeros(4, 4)
    gradient[0, 1] = 1.0
    step(opt, w, gradient)
    assert_close([w], [before - gradient], 1e-7)


@every_backend
def test_data_shrunk_at_the_same_address_is_noticed(backend):
    block = torch.ones(8)
    w = Parameter(block)
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.5)
    step(opt, w, torch.ones(8))
    w.data, w.grad = w.data[:3], None
    step(opt, w, torch.ones(3))
    assert_close([block], [torch.tensor([0.0] * 3 + [0.5] * 5)], 1e-7)


@every_backend
def test_data_of_another_type_at_the_same_address_is_noticed(backend):
    w = Parameter(torch.ones(4, dtype=torch.float16))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.5)
    step(opt, w, torch.ones_like(w))
    w.data, w.grad = w.data.view(torch.bfloat16), None
    before = w.detach().clone()
    step(opt, w, torch.ones_like(w))
    assert_close([w], [before - 0.5], 1e-2)


@every_backend
def test_data_of_another_shape_and_the_same_size_is_served_or_raises_with_the_weights_as_they_were(backend):
    w = Parameter(torch.ones(1, 4))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.5)
    step(opt, w, torch.ones(1, 4))
    w.data, w.grad = w.data.view(4), None
    try:
        step(opt, w, torch.ones(4))
    except RuntimeError:
        assert torch.equal(w.detach(), torch.full((4,), 0.5))
    else:
        assert torch.equal(w.detach(), torch.zeros(4))


# --- parameters that change within a step -------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_cast_between_the_passes_restores_and_is_a_sentence(dtype, base, backend):
    v, w = Parameter(torch.tensor([0.5, 0.25])), Parameter(torch.tensor([1.0, 2.0]))
    opt = SAM([v, w], base, rho=0.5, backend=backend, lr=0.1)
    v.grad, w.grad = torch.ones(2), torch.ones(2)
    opt.first_step()
    w.data = w.data.to(dtype)
    w.grad = torch.ones(2, dtype=dtype)
    with pytest.raises(
        RuntimeError, match=rf"\[0\]\['params'\]\[1\] was torch.float32.* is {dtype}.*restored"
    ):
        opt.second_step()
    assert torch.equal(v.detach(), torch.tensor([0.5, 0.25]))
    assert torch.equal(w.detach(), torch.tensor([1.0, 2.0], dtype=dtype))
    step(opt, w, torch.zeros(2, dtype=dtype))  # and nothing is pending


@every_backend
def test_a_parameter_shrunk_between_the_passes_is_a_sentence_and_the_others_are_restored(backend):
    v, w = Parameter(torch.ones(2)), Parameter(torch.ones(4))
    opt = SAM([v, w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    v.grad, w.grad = torch.ones(2), torch.ones(4)
    opt.first_step()
    w.data, w.grad = w.data[:3], None
    with pytest.raises(RuntimeError, match=r"\(4,\).*\(3,\).*All others are restored"):
        opt.second_step()
    assert torch.equal(v.detach(), torch.ones(2))


@every_backend
def test_a_cast_inside_the_perturbed_block_restores_and_is_a_sentence(backend):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    w.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="float64"), opt.perturbed():
        w.data = w.data.double()
    assert torch.equal(w.detach(), torch.ones(2, dtype=torch.float64))


@every_backend
def test_looking_at_the_backends_after_a_cast_does_not_lose_the_snapshots(backend):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    w.grad = torch.ones(2)
    opt.first_step()
    w.data = w.data.double()
    assert backend in str(opt.backends())
    w.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="restored"):
        opt.second_step()
    assert torch.equal(w.detach(), torch.ones(2, dtype=torch.float64))


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_parameter_replaced_between_the_passes_is_restored_and_a_sentence(base, backend):
    old, new = Parameter(torch.ones(2)), Parameter(torch.full((2,), 5.0))
    opt = SAM([old], base, rho=0.5, backend=backend, lr=0.1)
    old.grad = torch.ones(2)
    opt.first_step()
    opt.param_groups[0]["params"][0] = new
    new.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"replaced in param_groups.*between steps"):
        opt.second_step()
    assert torch.equal(old.detach(), torch.ones(2))
    assert torch.equal(new.detach(), torch.full((2,), 5.0))


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_group_added_through_the_base_between_the_passes_takes_the_update(base, backend):
    w, joined = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    plain = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    opt, expected = SAM([w], base, rho=0.5, backend=backend, lr=0.1), base(plain, lr=0.1)
    w.grad = torch.ones(2)
    opt.first_step()
    opt.base_optimizer.add_param_group({"params": [joined]})
    for p in (w, joined, *plain):
        p.grad = torch.ones(2)
    opt.second_step()
    expected.step()
    assert same_bits([w, joined], plain)
    assert [group["sam_step"] for group in opt.param_groups] == [1, 1]


# --- steps that fail ----------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("form", ["closure", "perturbed"])
def test_a_failed_step_with_a_non_finite_gradient_leaves_no_guard_for_the_next(form, backend):
    w = Parameter(torch.ones(2))
    opt = SAM(
        [w], torch.optim.SGD, recipe=recipes.sam(every=2), backend=backend, lr=0.5, allow_plain_step=True
    )
    passes = []

    def closure():
        passes.append(1)
        if len(passes) == 2:
            raise FloatingPointError
        w.grad = torch.tensor([float("nan"), 1.0])

    with pytest.raises(FloatingPointError):
        if form == "closure":
            opt.step(closure)
        else:
            closure()
            with opt.perturbed():
                closure()
    w.grad = torch.ones(2)
    opt.step()
    assert torch.equal(w.detach(), torch.full((2,), 0.5))


@every_backend
def test_loading_a_checkpoint_forgets_the_guard_of_a_failed_step(backend):
    def closure():
        w.grad = torch.full((2,), size)
        if opt._phase != "idle":
            raise FloatingPointError

    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, recipe=recipes.sam(every=2), backend=backend, lr=0.5)
    step(opt, w, torch.ones(2))
    not_due = copy.deepcopy(opt.state_dict())
    step(opt, w, torch.ones(2))
    size = float("inf")
    with pytest.raises(FloatingPointError):
        opt.step(closure)
    opt.load_state_dict(not_due)
    size, before = 1.0, w.detach().clone()
    opt.step(closure)
    assert torch.equal(w.detach(), before - 0.5)


@every_backend
def test_a_hook_that_raises_on_a_step_that_is_not_due_leaves_nothing_pending(backend):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, recipe=recipes.sam(every=2), backend=backend, lr=0.5)
    step(opt, w, torch.ones(2))
    handle = opt.register_step_pre_hook(fail)
    with pytest.raises(OSError, match="hook"):
        step(opt, w, torch.ones(2))
    handle.remove()
    step(opt, w, torch.ones(2))
    assert torch.equal(w.detach(), torch.zeros(2))


def test_a_step_that_is_not_due_may_be_saved_and_says_what_is_pending():
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, recipe=recipes.sam(every=2), lr=0.5)
    step(opt, w, torch.ones(2))
    w.grad = torch.ones(2)
    opt.first_step()
    assert opt.state_dict()["param_groups"][0]["sam_step"] == 1
    for again in (opt.first_step, lambda: opt.load_state_dict(opt.state_dict())):
        with pytest.raises(RuntimeError, match="does not perturb.*'sam'.*second_step"):
            again()
    opt.second_step()
    assert torch.equal(w.detach(), torch.zeros(2))


# --- steps without a second backward ------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("every", [1, 2])
def test_no_second_backward_at_all_is_a_sentence(every, backend):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, recipe=recipes.sam(every=every), backend=backend, lr=0.5)
    step(opt, w, torch.zeros(2))
    w.grad = torch.ones(2)
    opt.first_step()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient.*backward\(\) again"):
        opt.step()
    assert torch.equal(w.detach(), torch.ones(2))
    step(opt, w, torch.ones(2))
    assert torch.equal(w.detach(), torch.full((2,), 0.5))


@every_backend
@pytest.mark.parametrize("form", ["first_step", "perturbed"])
def test_a_step_is_given_up_as_the_message_says(form, backend):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.5, momentum=0.9)
    w.sum().backward()
    if form == "first_step":
        opt.first_step(zero_grad=True)
        (w * float("inf")).sum().backward()
    else:
        with opt.perturbed():
            (w * float("inf")).sum().backward()
    with pytest.raises(RuntimeError, match=r"to give the step up, zero_grad\(\) and then step\(\)"):
        opt.first_step()
    opt.zero_grad()
    opt.step()
    assert torch.equal(w.detach(), torch.ones(2))
    assert not base_state(opt)
    step(opt, w, torch.ones(2))
    assert same_bits(values([w]), [torch.full((2,), 0.5)])
