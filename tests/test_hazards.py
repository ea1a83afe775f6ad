"""Mistakes other implementations make, each with its own test."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from fixtures import (
    assert_close,
    backward_of,
    base_state,
    every_backend,
    rounds_to_nearest,
    same_bits,
    small_net,
    values,
)
from torch import Tensor
from torch.nn import Parameter

from sam_kernels import SAM, recipes, running_stats, state, tensor_groups
from sam_kernels.tensor_groups import TensorGroup


def parameters(*numbers: float, dtype=torch.float32) -> list[Parameter]:
    return [Parameter(torch.tensor([n], dtype=dtype)) for n in numbers]


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_h1_gradient_in_pass_one_only_is_restored(base, backend):
    a, b = parameters(1.0, 2.0)
    opt = SAM([a, b], base, rho=0.5, backend=backend, lr=0.1)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    opt.first_step(zero_grad=True)
    assert float(a) > 1.0
    b.grad = torch.ones(1)
    opt.second_step(zero_grad=True)
    assert float(a) == 1.0
    assert float(b) < 2.0


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_h1_gradient_in_pass_two_only_is_updated_and_not_restored(base, backend):
    a, b = parameters(1.0, 2.0)
    opt = SAM([a, b], base, rho=0.5, backend=backend, lr=0.1)
    a.grad = torch.ones(1)
    opt.first_step(zero_grad=True)
    with torch.no_grad():
        b.fill_(5.0)  # whoever wrote it, it was never perturbed
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    opt.second_step(zero_grad=True)
    assert 3.9 < float(b) < 5.0  # RMSprop's first step is ten times its lr
    assert float(a) < 1.0


@every_backend
def test_h1_stale_snapshots_are_never_used_in_a_later_step(backend):
    a, b = parameters(1.0, 2.0)
    opt = SAM([a, b], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    opt.first_step(zero_grad=True)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    opt.second_step(zero_grad=True)
    with torch.no_grad():
        a.fill_(7.0)
    b.grad = torch.ones(1)
    opt.first_step(zero_grad=True)
    assert float(a) == 7.0
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    opt.second_step(zero_grad=True)
    torch.testing.assert_close(float(a), 6.9)


@every_backend
@pytest.mark.parametrize("p", [2.0, float("inf"), 1.5, 4.0])
def test_h2_zero_gradient_gives_zero_and_not_nan(p, backend):
    (w,) = parameters(1.0)
    opt = SAM([w], torch.optim.SGD, recipe=recipes.sam(p=p), backend=backend, lr=0.1)
    w.grad = torch.zeros(1)
    opt.first_step()
    assert float(w) == 1.0


@every_backend
def test_h2_zero_weights_under_the_adaptive_metric_give_zero_and_not_nan(backend):
    w = Parameter(torch.zeros(3))
    opt = SAM([w], torch.optim.SGD, rho=0.5, adaptive=True, backend=backend, lr=0.1)
    w.grad = torch.ones(3)
    opt.first_step()
    assert torch.equal(w, torch.zeros(3))


@every_backend
def test_h3_all_gradients_missing_is_no_error(backend):
    (w,) = parameters(1.0)
    opt = SAM([w], torch.optim.SGD, backend=backend, lr=0.1)
    opt.first_step()
    opt.second_step()
    opt.step(lambda: torch.tensor(0.0))
    assert float(w) == 1.0


@every_backend
def test_h4_a_pointer_to_a_parameter_stays_valid(backend):
    w = Parameter(torch.ones(4))
    view, address = w.data.view(2, 2), w.data_ptr()
    opt = SAM([w], torch.optim.SGD, rho=0.5, backend=backend, lr=0.1)
    for _ in range(3):
        w.grad = torch.ones(4)
        opt.first_step()
        assert torch.equal(view.reshape(4), w.data)
        opt.second_step()
        assert torch.equal(view.reshape(4), w.data)
        assert w.data_ptr() == address


@every_backend
def test_h4_restores_do_not_drift(backend):
    w = Parameter(torch.randn(10_000, generator=torch.Generator().manual_seed(0)))
    before = values([w])
    opt = SAM([w], torch.optim.SGD, backend=backend, lr=0.0)
    for seed in range(10):
        w.grad = torch.randn(10_000, generator=torch.Generator().manual_seed(seed))
        opt.first_step()
        opt.second_step()
    assert same_bits([w], before)


@every_backend
@rounds_to_nearest
def test_h5_bfloat16_perturbation_is_computed_in_float32(backend):
    # each element of e is 3/512, three quarters of the spacing of bfloat16 above 1
    w = Parameter(torch.full((256,), 1.0, dtype=torch.bfloat16))
    opt = SAM([w], torch.optim.SGD, rho=0.09375, backend=backend, lr=0.1)
    w.grad = torch.ones_like(w)
    opt.first_step()
    expected = (torch.ones(256) + 0.09375 / 16).to(torch.bfloat16)
    assert torch.equal(w.detach(), expected)


@every_backend
@pytest.mark.parametrize("size", [6e-8, 1e-4, 60000.0])
def test_h6_float16_gradients_of_any_size_give_the_same_perturbation(size, backend):
    w = Parameter(torch.zeros(300, dtype=torch.float16))
    opt = SAM([w], torch.optim.SGD, rho=1.0, backend=backend, lr=0.1)
    w.grad = torch.full_like(w, size)
    opt.first_step()
    assert_close([w], [torch.full((300,), 300**-0.5)], 1e-3)


@every_backend
@pytest.mark.parametrize("size", [1e-18, 1e18])
@pytest.mark.parametrize("p", [2.0, 4.0])
def test_h6_float32_gradients_at_the_edge_of_the_range(size, p, backend):
    # 1e18 squared is beyond float32 when four are summed to the fourth power; 1e-18 squared vanishes
    w = Parameter(torch.zeros(64))
    eps_free = recipes.sam(rho=1.0, p=p)
    opt = SAM([w], torch.optim.SGD, recipe=eps_free, backend=backend, lr=0.1)
    w.grad = torch.full((64,), size)
    opt.first_step()
    expected = 64.0 ** (-1.0 / p)
    if size > 1:
        assert_close([w], [torch.full((64,), expected)], 1e-5)
    else:
        # the guard against zero may shrink e, never blow it up
        assert bool(torch.isfinite(w).all())
        assert float(w.max()) <= expected * (1 + 1e-5)


def test_h7_batch_statistics_stay_those_of_pass_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    once = copy.deepcopy(model)
    x = torch.randn(8, 3)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    model(x).pow(2).mean().backward()
    opt.first_step(zero_grad=True)
    with running_stats.frozen(model):
        model(x).pow(2).mean().backward()
    opt.second_step()
    once(x)
    assert same_bits(model[1].buffers(), once[1].buffers())


def test_h8_random_streams_advance_as_the_closure_asks():
    # a fresh dropout mask in each pass: the optimizer itself draws nothing
    w = Parameter(torch.ones(100))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    masks = []

    def closure():
        masks.append(torch.rand(4))
        loss = (w**2).sum()
        loss.backward()
        return loss

    torch.manual_seed(5)
    opt.step(closure)
    after = torch.rand(4)
    torch.manual_seed(5)
    expected = [torch.rand(4) for _ in range(3)]
    assert same_bits([*masks, after], expected)


def test_h9_checkpoint_holds_base_state_and_no_snapshots():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    opt.step(backward_of(model, torch.ones(2, 5, dtype=torch.float64)))
    state = opt.state_dict()["state"]
    assert {key for slots in state.values() for key in slots} == {"momentum_buffer"}
    assert len(state) == len(list(model.parameters()))


@every_backend
def test_h12_forgotten_zero_grad_between_passes_accumulates_in_the_two_step_form_only(backend):
    a, b = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    for w, form in ((a, "two-step"), (b, "closure")):
        opt = SAM([w], torch.optim.SGD, rho=0.0, backend=backend, lr=1.0)

        def closure(w=w):
            loss = w.sum()
            loss.backward()
            return loss

        if form == "closure":
            opt.step(closure)
        else:
            closure()
            opt.first_step()  # the caller did not ask for zero_grad
            closure()
            opt.second_step()
    assert float(a) == -2.0
    assert float(b) == -1.0


@every_backend
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_h13_sparse_gradients_equal_dense_ones(base, adaptive, backend):
    indices = torch.tensor([1, 3, 3, 5])  # a repeated row: uncoalesced values must be summed first
    trained = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = torch.nn.Embedding(7, 3, sparse=sparse)
        head = torch.nn.Linear(3, 1)
        weights = [*table.parameters(), *head.parameters()]
        opt = SAM(weights, base, rho=0.5, adaptive=adaptive, backend=backend, lr=0.1)
        stops = []
        for _ in range(2):

            def closure(table=table, head=head, weights=weights, stops=stops):
                stops.append(values(weights))
                loss = head(table(indices)).pow(2).sum()
                loss.backward()
                return loss

            opt.step(closure)
        trained.append([t for stop in stops for t in stop] + values(weights) + base_state(opt))
    assert_close(trained[1], trained[0], 1e-6)


# ---- memory and devices ----------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_gradients_that_were_dropped_are_freed(backend, base):
    # Held on to, they would stand beside the next backward's: four bytes a parameter at the peak.
    weights = parameters(1.0, 2.0)
    opt = SAM(weights, base, lr=0.1, backend=backend)
    for form in (opt.first_step, opt.second_step):
        for w in weights:
            w.grad = torch.ones(1)
        held = [weakref.ref(w.grad) for w in weights]
        form(zero_grad=True)
        gc.collect()
        assert [grad() for grad in held] == [None, None]


def test_a_step_that_fails_lets_go_of_its_gradients(monkeypatch):
    weights = parameters(1.0)
    opt = SAM(weights, torch.optim.SGD, lr=0.1, backend="reference")
    opt.step(lambda: weights[0].pow(2).sum().backward())

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    backend = opt._groups()[0][1]
    monkeypatch.setattr(type(backend), "perturb_", broken)
    weights[0].grad = torch.ones(1)
    held = weakref.ref(weights[0].grad)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.first_step()
    weights[0].grad = None
    gc.collect()
    assert held() is None


def moved_group():
    """Weights on a device that has no memory here, as a group; whatever is on the CPU did not move along."""
    weight = Parameter(torch.ones(3, device="meta"))
    group = TensorGroup([weight], [0], [(0, 1, 0.0)])
    group.grads, group.has_all_grads = [torch.ones(3, device="meta")], True
    return weight, group


@pytest.mark.parametrize(("base", "rule"), [(torch.optim.SGD, "sgd"), (torch.optim.Adam, "adam")])
def test_state_follows_weights_to_another_device(base, rule):
    weight, group = moved_group()
    opt = base([weight], lr=0.1, **({"momentum": 0.9} if rule == "sgd" else {}))
    names = ["momentum_buffer"] if rule == "sgd" else ["exp_avg", "exp_avg_sq"]
    opt.state[weight] = {name: torch.zeros(3) for name in names}
    if rule == "adam":
        opt.state[weight]["step"] = torch.tensor(4.0)
    slots = state.slots(opt, group, rule, counts_on_device=False)
    for name in names:
        assert slots[name][0].device.type == "meta"
        assert opt.state[weight][name] is slots[name][0]
    if rule == "adam":
        assert slots["step"][0].device.type == "cpu"  # torch's own place for it
        group.cache.clear()
        assert state.slots(opt, group, rule, counts_on_device=True)["step"][0].device.type == "meta"


def test_a_counter_left_on_a_device_comes_back_with_the_weights():
    (weight,) = parameters(1.0)
    group = TensorGroup([weight], [0], [(0, 1, 0.0)])
    group.grads, group.has_all_grads = [torch.ones(1)], True
    opt = torch.optim.Adam([weight], lr=0.1)
    opt.state[weight] = {name: torch.zeros(1) for name in ("exp_avg", "exp_avg_sq")}
    moved = []

    class Elsewhere(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 0))

        def to(self, device):
            moved.append(device)
            return torch.tensor(4.0)

    opt.state[weight]["step"] = torch.tensor(4.0).as_subclass(Elsewhere)
    assert state.slots(opt, group, "adam")["step"][0].device.type == "cpu"
    assert moved == [torch.device("cpu")]


def test_groups_whose_memory_a_graph_holds_outlive_their_successors(monkeypatch):
    weights = parameters(1.0)
    opt = SAM(weights, torch.optim.SGD, lr=0.1)
    opt.step(lambda: weights[0].pow(2).sum().backward())
    monkeypatch.setattr(tensor_groups, "is_capturing", lambda device: True)
    opt.step(lambda: weights[0].pow(2).sum().backward())
    monkeypatch.undo()
    captured = weakref.ref(opt._groups()[0][0])
    opt.load_state_dict(opt.state_dict())
    opt.step(lambda: weights[0].pow(2).sum().backward())
    gc.collect()
    assert captured() is not None and captured() is not opt._groups()[0][0]
    later = weakref.ref(opt._groups()[0][0])
    opt.load_state_dict(opt.state_dict())
    opt.step(lambda: weights[0].pow(2).sum().backward())
    gc.collect()
    assert later() is None  # no graph knows that one


# ---- gradients of micro-batches that a closure would drop -------------------------------------------


def micro_batches():
    w = Parameter(torch.tensor([1.0, -2.0]))
    opt = SAM([w], torch.optim.SGD, lr=0.1)

    def closure(share: float = 1.0) -> Tensor:
        loss = share * (w**2).sum()
        loss.backward()
        return loss

    return w, opt, closure


def test_gradients_that_a_closure_drops_are_named_once():
    _, opt, closure = micro_batches()
    closure(0.5)  # an earlier micro-batch, as trainers with accumulation evaluate it
    with pytest.warns(
        UserWarning, match=r"gradients that were there before are dropped.*opt\.step\(\[closure"
    ):
        opt.step(closure)
    opt.zero_grad()
    closure(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)


@pytest.mark.parametrize("clear", ["nothing", "drop", "zeros"])
def test_gradients_that_a_step_has_used_are_no_reason_to_warn(clear):
    _, opt, closure = micro_batches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)
        if clear != "nothing":
            opt.zero_grad(set_to_none=clear == "drop")
        opt.step([closure, closure])
        closure()
        opt.first_step(zero_grad=True)
        closure()
        opt.step()
        opt.step(closure)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)
