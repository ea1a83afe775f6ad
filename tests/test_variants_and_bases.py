"""Recipes that use gradients or momenta besides the base optimizer: whatever the base does with its own."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from fixtures import every_backend

from sam_kernels import SAM, Recipe, recipes
from sam_kernels.policies import Dynamic, Momentum, Noise

START = (1.0, -2.0, 3.0)


class Scaling(torch.optim.Optimizer):
    """Steps with half of the gradient, which it may halve in place."""

    def __init__(self, params, lr, in_place):
        super().__init__(params, {"lr": lr})
        self.in_place = in_place

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    g = p.grad.mul_(0.5) if self.in_place else 0.5 * p.grad
                    p.sub_(group["lr"] * g)


def train(opt, w, steps=3):
    def closure():
        loss = (w**4).sum() / 4
        loss.backward()
        return loss

    for _ in range(steps):
        opt.step(closure, ahead=closure if opt.recipe.name == "sampa" else None)
    return w.detach().clone()


@every_backend
@pytest.mark.parametrize("name", ["wsam", "lookbehind_sam", "gsam", "cr_sam", "sampa"])
def test_a_base_may_write_into_its_gradients(name, backend):
    ends = []
    for in_place in (True, False):
        w = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
        opt = SAM([w], Scaling, recipe=name, backend=backend, lr=0.01, in_place=in_place)
        ends.append(train(opt, w))
    torch.testing.assert_close(*ends, rtol=1e-13, atol=0)


@every_backend
def test_momentum_sam_is_the_same_for_the_negated_loss_that_is_maximized(backend):
    ends = []
    for sign in (1.0, -1.0):
        w = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
        opt = SAM(
            [w],
            torch.optim.SGD,
            recipe=recipes.msam(0.5),
            backend=backend,
            lr=0.01,
            momentum=0.9,
            maximize=sign < 0,
        )
        for _ in range(4):
            opt.step(lambda w=w, sign=sign: (sign * (w**4).sum() / 4).backward())
        ends.append(w.detach())
    torch.testing.assert_close(*ends, rtol=1e-13, atol=0)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_momentum_sam_asks_for_a_base_with_momentum(base):
    w = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="momentum"):
        SAM([w], base, recipe="msam", lr=0.1)
    opt = SAM([w], torch.optim.SGD, recipe="msam", lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="momentum"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "momentum": 0.0})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("direction", [Noise(), Momentum()], ids=lambda d: type(d).__name__)
def test_a_mask_that_goes_by_gradients_needs_some(direction):
    with pytest.raises(ValueError, match="Dynamic"):
        Recipe(direction=direction, mask=Dynamic())


@every_backend
def test_momentum_of_a_checkpoint_in_another_layout_is_that_momentum(backend):
    ends = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        generator = torch.Generator().manual_seed(1)
        w = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
        w = torch.nn.Parameter(w.to(memory_format=torch.channels_last))
        opt = SAM([w], torch.optim.SGD, recipe="sampa", backend=backend, lr=0.01, momentum=0.9)
        train(opt, w, 2)
        saved = copy.deepcopy(opt.state_dict())
        for entry in saved["state"].values():
            for key, value in entry.items():
                if isinstance(value, torch.Tensor) and value.dim() == 4:
                    entry[key] = value.contiguous(memory_format=memory_format)
        opt.load_state_dict(saved)
        ends.append(train(opt, w, 2))
    torch.testing.assert_close(*ends, rtol=1e-13, atol=0)


@every_backend
def test_parameters_that_join_within_a_step_are_refused_where_they_cannot_be_served(backend):
    w, late = torch.nn.Parameter(torch.tensor(START)), torch.nn.Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, recipe="lookbehind_sam", backend=backend, lr=0.1)
    passes = []

    def closure():
        passes.append(0)
        if len(passes) == 2:
            opt.base_optimizer.param_groups[0]["params"].append(late)
        (w**4).sum().backward()

    with pytest.raises(RuntimeError, match="added or removed"):
        opt.step(closure)
    assert w.tolist() == list(START)
    opt.step(closure)
    assert not any(group.is_perturbed for group, _ in opt._groups())


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_a_norm_that_is_not_finite_skips_a_step_that_is_clipped(base, backend):
    for dtype in (torch.float32, torch.float64):
        w = torch.nn.Parameter(torch.tensor(START, dtype=dtype))
        opt = SAM([w], base, backend=backend, lr=0.1, max_grad_norm=1.0)
        (w**2).sum().backward()
        opt.first_step(zero_grad=True)
        (w**2).sum().backward()
        w.grad[1] = float("inf")
        opt.second_step()
        assert w.tolist() == list(START)


@pytest.mark.parametrize("name", recipes.names())
def test_gradients_do_not_outlive_zero_grad(name):
    """With a base of its own step too: held on to, they would add to the peak of the next backward pass."""
    params = [torch.nn.Parameter(torch.tensor(START)), torch.nn.Parameter(torch.tensor(START))]
    named = [("norm.weight", params[0]), ("b.weight", params[1])]
    opt = SAM(named, torch.optim.NAdam, recipe=name, backend="foreach", lr=0.01, max_grad_norm=None)

    def closure():
        sum((p**4).sum() for p in params).backward()

    for _ in range(2):
        opt.step(closure, ahead=closure if name == "sampa" else None)
    alive = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
