"""What Lightning hands over, by stand-ins: a wrapper that imitates its optimizer, closures of its making."""

from __future__ import annotations

import functools

import pytest
import references
import torch
from torch.nn.functional import cross_entropy

from sam_kernels import SAM, closures
from sam_kernels.trainers import window

RHO, LR = 0.3, 0.2
X, Y = references.data(8)


class LightningOptimizer:
    """As Lightning's: of the class of what it wraps too, reading the attributes of that."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        kind = type(optimizer)
        self.__class__ = type(f"Lightning{kind.__name__}", (LightningOptimizer, kind), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def loss_of(model):
    loss = cross_entropy(model(X), Y)
    loss.backward()
    return loss


@pytest.mark.parametrize("form", ["two steps", "perturbed"])
def test_methods_of_an_imitation_are_those_of_the_optimizer(form):
    model, expected = references.network(), references.network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    wrapper = LightningOptimizer(opt)
    assert isinstance(wrapper, SAM) and wrapper.param_groups is opt.param_groups
    for _ in range(3):
        wrapper.zero_grad()
        loss_of(model)
        if form == "two steps":
            wrapper.first_step(zero_grad=True)
            loss_of(model)
        else:
            with wrapper.perturbed():
                loss_of(model)
        wrapper.step()
    base = torch.optim.SGD(expected.parameters(), lr=LR)
    references.train(expected, base, [[lambda: cross_entropy(expected(X), Y)]] * 3, rho=RHO)
    assert references.largest_difference(model, expected) <= 1e-13
    assert "_phase" not in wrapper.__dict__


def test_subclasses_that_imitate_nothing_keep_their_methods():
    class Mine(SAM):
        pass

    assert Mine.first_step is SAM.first_step


def closure_of(module, **attributes):
    kind = type("Closure", (), {"__module__": module, "__call__": lambda self: None})
    made = kind()
    for name, value in attributes.items():
        setattr(made, name, value)
    return functools.partial(lambda model, optimizer, closure: closure(), None, None, made)


@pytest.mark.parametrize("library", ["lightning.pytorch", "pytorch_lightning"])
def test_the_closure_of_a_last_micro_batch_is_refused(library):
    model = references.network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    module = f"{library}.loops.optimization.automatic"
    with pytest.raises(RuntimeError, match="last micro-batch only.*SAMCallback"):
        opt.step(closure_of(module, _backward_fn=print, _zero_grad_fn=None))
    opt.step(closure_of(module, _backward_fn=print, _zero_grad_fn=print))
    opt.step(closure_of("my.own.module", _backward_fn=print, _zero_grad_fn=None))


def test_hooks_alone_are_called_and_are_no_closure():
    called = []

    def do_nothing_closure():
        called.append(1)

    do_nothing_closure.__module__ = "lightning.pytorch.core.optimizer"
    hooks = functools.partial(lambda model, optimizer, closure: closure(), None, None, do_nothing_closure)
    assert closures.has_hooks_alone(hooks) and not closures.has_hooks_alone(print)
    model, expected = references.network(), references.network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    loss_of(model)
    opt.first_step(zero_grad=True)
    loss_of(model)
    opt.step(hooks)
    base = torch.optim.SGD(expected.parameters(), lr=LR)
    references.train(expected, base, [[lambda: cross_entropy(expected(X), Y)]], rho=RHO)
    assert references.largest_difference(model, expected) <= 1e-13
    assert called == [1]

    def failing():
        raise OSError("a hook")

    failing.__module__, failing.__name__ = do_nothing_closure.__module__, "do_nothing_closure"
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model)
    opt.first_step(zero_grad=True)
    loss_of(model)
    with pytest.raises(OSError, match="a hook"):
        opt.step(failing)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert not window.is_perturbed(opt)
