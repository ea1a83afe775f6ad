"""Composer, by a stand-in that calls optimizers, closures and scaler as the source of that trainer does."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections import defaultdict

import pytest
import references
import torch
from torch.amp.grad_scaler import GradScaler, OptState, _refresh_per_optimizer_state
from torch.nn.functional import cross_entropy

from sam_kernels.compat import composer as ours

RHO, LR, BATCH, MICRO, STEPS = 0.3, 0.2, 8, 4, 4
X, Y = references.data(BATCH * STEPS)
DATA = list(zip(X.split(BATCH), Y.split(BATCH), strict=True))


class ClosureScaler(GradScaler):
    """A scaler that is ready anew for every pass; a closure that overflows returns None."""

    def __init__(self, scale=1024.0):
        super().__init__("cpu", init_scale=scale)

    def step(self, optimizer, *args, **kwargs):
        closure = kwargs["closure"]

        def scaled(**keywords):
            self._per_optimizer_states[id(optimizer)]["stage"] = OptState.READY
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None
            loss = closure(**keywords)
            self.unscale_(optimizer)
            found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
            return None if any(float(value) for value in found) else loss

        return optimizer.step(closure=scaled)

    def update(self, new_scale=None):
        super().update(new_scale)
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)


class Trainer:
    """As much of a trainer as an optimizer meets."""

    def __init__(self, model, optimizer, scaler=None, poison=()):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.poison = set(poison)  # passes whose loss overflows
        self.passes, self.logged = [], {}

    def train_microbatches(self, microbatches, loss_dict, ddp_sync=True):
        self.optimizer.zero_grad()
        number = len(self.passes)
        self.passes.append((ddp_sync, loss_dict is self.logged))
        total = 0.0
        for x, y in microbatches:
            loss = cross_entropy(self.model(x), y) * (len(y) / BATCH)
            if number in self.poison:
                loss = loss * float("inf")
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total += float(loss.detach())
        loss_dict["loss/train/total"] = total
        return total

    def train_batch(self, x, y):
        microbatches = list(zip(x.split(MICRO), y.split(MICRO), strict=True))

        def closure(loss_dict=self.logged, **kwargs):
            return self.train_microbatches(microbatches, loss_dict, **kwargs)

        if self.scaler is None:
            return self.optimizer.step(closure=closure)
        loss = self.scaler.step(self.optimizer, closure=closure)
        self.scaler.update()
        return loss


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def reference(rho_of=lambda step: RHO, steps=range(STEPS)):
    model = references.network()
    base, first = sgd(model), []
    for number in steps:
        x, y = DATA[number]
        parts = [lambda x=x, y=y: cross_entropy(model(x), y)]
        first += references.train(model, base, [parts], rho=rho_of(number))
    return model, first


@pytest.mark.parametrize("scaled", [False, True])
def test_micro_batches_are_exact(scaled):
    model = references.network()
    trainer = Trainer(model, ours.SAMOptimizer(sgd(model), rho=RHO), ClosureScaler() if scaled else None)
    losses, logged = [], []
    for batch in DATA:
        losses.append(trainer.train_batch(*batch))
        logged.append(trainer.logged["loss/train/total"])
    expected, first = reference()
    assert references.largest_difference(model, expected) <= 1e-13
    assert losses == pytest.approx([float(loss) for loss in first], rel=1e-12)
    assert logged == losses, "the loss at w + e was logged"
    assert trainer.passes == [(False, True), (True, False)] * STEPS


@pytest.mark.parametrize("poisoned", [2, 3])
def test_an_overflow_in_either_pass_skips_the_step(poisoned):
    """Pass 2 is the first of the second step, pass 3 its second."""
    model = references.network()
    opt = ours.SAMOptimizer(sgd(model), rho=RHO)
    trainer = Trainer(model, opt, ClosureScaler(), poison=[poisoned])
    trainer.train_batch(*DATA[0])
    before = [p.detach().clone() for p in model.parameters()]
    assert trainer.train_batch(*DATA[1]) is None
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert trainer.scaler.get_scale() == 512.0
    for number in (2, 3):
        trainer.train_batch(*DATA[number])
    assert references.largest_difference(model, reference(steps=[0, 2, 3])[0]) <= 1e-13
    assert opt.param_groups[0]["sam_step"] == 3


def test_the_interval_ends_with_the_perturbed_step():
    model = references.network()
    trainer = Trainer(model, ours.SAMOptimizer(sgd(model), rho=RHO, interval=3))
    for batch in DATA:
        trainer.train_batch(*batch)
    expected, _ = reference(lambda step: RHO if step == 2 else 0.0)
    assert references.largest_difference(model, expected) <= 1e-13
    assert trainer.passes == [(True, True), (True, True), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize(
    ("recipe", "synced"),
    [
        ("sam", [False, True]),
        ("multistep_sam", [False, False, False, True]),
        ("rand_sam", [True]),
        ("gsam", [True, True]),  # the first gradient is in the update
        ("vasso", [True, True]),  # and in an average that checkpoints have
        ("ae_sam", [True, True]),  # and decides whether there is a second pass
    ],
)
def test_gradients_that_outlive_the_perturbation_are_averaged(recipe, synced):
    model = references.network()
    trainer = Trainer(model, ours.SAMOptimizer(sgd(model), recipe=recipe))
    trainer.train_batch(*DATA[0])
    assert [sync for sync, _ in trainer.passes] == synced


# ---- the algorithm -----------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch):
    """The parts of Composer that the algorithm asks for, and the module as imported beside them."""
    core, scaler = types.ModuleType("composer.core"), types.ModuleType("composer.trainer._scaler")
    core.Algorithm = type("Algorithm", (), {})
    scaler.ClosureGradScaler = ClosureScaler
    names = {"composer": types.ModuleType("composer"), "composer.core": core}
    names |= {"composer.trainer": types.ModuleType("composer.trainer"), "composer.trainer._scaler": scaler}
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("composer_beside_library", ours.__file__)
    module = importlib.util.module_from_spec(spec)
    module.__package__ = "sam_kernels.compat"
    monkeypatch.setitem(sys.modules, "composer_beside_library", module)
    spec.loader.exec_module(module)
    return module, core.Algorithm


class Event:
    def __init__(self, value):
        self.value = value


def test_the_algorithm_wraps_after_loading(library):
    module, algorithm_class = library
    algorithm = module.SAM(rho=RHO, epsilon=1e-10)
    assert isinstance(algorithm, algorithm_class)
    events = ("init", "after_load", "fit_start")
    assert [name for name in events if algorithm.match(Event(name), None)] == ["after_load"]

    model = references.network()
    state = types.SimpleNamespace(optimizers=(sgd(model),), scaler=None, deepspeed_enabled=False)
    algorithm.apply(Event("after_load"), state, None)
    (opt,) = state.optimizers
    assert isinstance(opt, module.SAMOptimizer) and opt._step_supports_amp_closure
    assert isinstance(state.scaler, ClosureScaler)
    assert opt.recipe.eps == 1e-10
    trainer = Trainer(model, opt, state.scaler)
    for batch in DATA:
        trainer.train_batch(*batch)
    assert references.largest_difference(model, reference()[0]) <= 1e-10  # its eps is 1e-12

    state.deepspeed_enabled = True
    with pytest.raises(RuntimeError, match="DeepSpeed's engine steps by itself"):
        algorithm.apply(Event("after_load"), state, None)


def test_resuming_is_going_on(library):
    """Composer loads into the bare optimizer, and the algorithm wraps it then."""
    module, _ = library
    straight = references.network()
    trainer = Trainer(straight, module.SAMOptimizer(sgd(straight), rho=RHO, interval=2))
    for batch in DATA[:3]:
        trainer.train_batch(*batch)
    saved = {"model": straight.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    saved = copy.deepcopy(saved)
    resumed = references.network()
    resumed.load_state_dict(saved["model"])
    base = sgd(resumed)
    base.load_state_dict(saved["optimizer"])
    again = Trainer(resumed, module.SAMOptimizer(base, rho=RHO, interval=2))
    trainer.train_batch(*DATA[3])
    again.train_batch(*DATA[3])
    assert references.largest_difference(straight, resumed) == 0
    assert again.optimizer.param_groups[0]["sam_step"] == 4


def test_nonsense_is_refused_when_the_algorithm_is_made():
    with pytest.raises(ValueError, match="interval is 0"):
        ours.SAM(interval=0)
    with pytest.raises(ValueError, match="rho"):
        ours.SAM(rho=-1.0)
    with pytest.raises(ValueError, match="recipe"):
        ours.SAM(recipe="no such recipe")


def test_an_interval_is_refused_where_the_recipe_chooses_its_steps():
    base = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="looksam.*chooses its steps"):
        ours.SAMOptimizer(base, interval=3, recipe="looksam")
