"""Random numbers in the passes of a step (F6): the same again, the stream going on as after one pass."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from fixtures import assert_close, same_bits, values
from torch import nn

from sam_kernels import SAM, recipes, rng, running_stats


class Noisy(nn.Module):
    """A net with dropout that keeps the masks it drew, and with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.fc1, self.norm, self.fc2 = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 1)
        self.masks: list[torch.Tensor] = []

    def forward(self, x):
        mask = (torch.rand(x.shape[0], 12) < 0.5).float()
        self.masks.append(mask)
        return self.fc2(self.norm(self.fc1(x)) * mask)


X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


def backward_of(model, rows=slice(None), weight=1.0):
    def closure():
        loss = weight * (model(X[rows]) - 1).square().mean()
        loss.backward()
        return loss

    return closure


def build(**options):
    model = Noisy()
    options = {"rho": 0.3, "rng": "replay", "model": model, **options}
    return model, SAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)


def stream_after_one_pass(model_of=Noisy, passes=1):
    """The numbers that follow the seed and so many forward passes of one batch."""
    torch.manual_seed(11)
    model = model_of()
    torch.manual_seed(12)
    for _ in range(passes):
        model(X)
    return torch.rand(4)


@pytest.mark.parametrize(
    "name", ["sam", "multistep_sam", "cr_sam", "lookbehind_sam", "r_sam", "rand_sam", "msam"]
)
def test_f6_all_passes_of_a_step_draw_the_same_and_the_stream_goes_on_as_after_one(name):
    model, opt = build(recipe=recipes.get(name), rho=None, momentum=0.9)
    torch.manual_seed(12)
    opt.step(backward_of(model))
    after = torch.rand(4)
    assert len(model.masks) == opt.recipe.gradients
    assert all(torch.equal(mask, model.masks[0]) for mask in model.masks)
    assert 0 < model.masks[0].mean() < 1
    assert torch.equal(after, stream_after_one_pass())
    count = len(model.masks)
    opt.step(backward_of(model))
    assert not torch.equal(model.masks[count], model.masks[0])  # another step, other masks


def test_f6_running_statistics_are_those_of_one_pass():
    model, opt = build()
    once = copy.deepcopy(model)
    for step in range(2):
        torch.manual_seed(step)
        opt.step(backward_of(model))
        if step == 0:
            once(X)
            assert same_bits(model.norm.buffers(), once.norm.buffers())
    assert model.norm.num_batches_tracked.item() == 2


def test_by_default_every_pass_draws_its_own():
    model, opt = build(rng="advance")
    torch.manual_seed(12)
    opt.step(backward_of(model))
    after = torch.rand(4)
    assert not torch.equal(model.masks[0], model.masks[1])
    assert torch.equal(after, stream_after_one_pass(passes=2))


def test_lists_of_closures_repeat_the_masks_of_each_part():
    parts = [slice(0, 4), slice(4, 8)]
    for m_sharpness in (False, True):
        model, opt = build()
        torch.manual_seed(12)
        opt.step([backward_of(model, rows, 0.5) for rows in parts], m_sharpness=m_sharpness)
        after = torch.rand(4)
        a, b, c, d = model.masks
        pairs = [(a, b), (c, d)] if m_sharpness else [(a, c), (b, d)]
        assert all(torch.equal(*pair) for pair in pairs)
        assert not torch.equal(a, d)
        torch.manual_seed(12)
        for rows in parts:
            model(X[rows])
        assert torch.equal(after, torch.rand(4))


@pytest.mark.parametrize("number", [1, 2])
def test_f6_a_closure_that_raises_leaves_the_stream_of_one_pass(number):
    model, opt = build()
    before, calls = values(model.parameters()), []

    def closure():
        calls.append(1)
        loss = backward_of(model)()
        if len(calls) == number:
            raise KeyboardInterrupt
        return loss

    torch.manual_seed(12)
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert same_bits(model.parameters(), before)
    assert torch.equal(torch.rand(4), stream_after_one_pass())


@pytest.mark.parametrize("form", ["first_step", "perturbed"])
def test_two_step_form_with_the_first_pass_marked(form):
    model, opt = build()
    by_closure, other = build()
    for seed in (12, 13):
        torch.manual_seed(seed)
        other.step(backward_of(by_closure))
        expected = torch.rand(4)
        torch.manual_seed(seed)
        opt.zero_grad()
        with opt.first_pass():
            backward_of(model)()
        if form == "first_step":
            opt.first_step(zero_grad=True)
            with running_stats.frozen(model):
                backward_of(model)()
        else:
            with opt.perturbed(), running_stats.frozen(model):
                backward_of(model)()
            assert torch.equal(torch.rand(4), expected)  # the block is over, and with it the repetition
            torch.manual_seed(seed)
            model(X)
            model.masks.pop()
        opt.step()
        assert torch.equal(torch.rand(4), expected)
        assert torch.equal(model.masks[-1], model.masks[-2])
    assert_close(model.parameters(), by_closure.parameters(), 1e-6)


def test_a_perturbed_block_that_raises_puts_the_stream_back():
    model, opt = build()
    torch.manual_seed(12)
    with opt.first_pass():
        backward_of(model)()
    with pytest.raises(ZeroDivisionError), opt.perturbed():
        backward_of(model)()
        1 / 0  # noqa: B018
    assert torch.equal(torch.rand(4), stream_after_one_pass())


def test_steps_that_are_not_due_and_steps_given_up():
    model, opt = build(recipe=recipes.sam(every=2))
    for step in range(4):
        torch.manual_seed(12)
        opt.zero_grad()
        with opt.first_pass():
            backward_of(model)()
        opt.first_step(zero_grad=True)
        backward_of(model)()
        if step > 1:
            opt.zero_grad()  # given up
        opt.step()
        assert torch.equal(torch.rand(4), stream_after_one_pass())


def test_first_step_without_a_marked_pass_is_refused():
    model, opt = build()
    backward_of(model)()
    before = values(model.parameters())
    with pytest.raises(
        RuntimeError, match=r"run its forward and backward inside `with opt\.first_pass\(\):`"
    ):
        opt.first_step()
    assert same_bits(model.parameters(), before)
    with opt.first_pass():
        backward_of(model)()
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"first_pass\(\): the weights are perturbed"), opt.first_pass():
        pass
    backward_of(model)()
    opt.step()
    backward_of(model)()
    with pytest.raises(RuntimeError, match="first_pass"):  # that of the step before is over
        opt.first_step()


def test_what_cannot_be_replayed_is_refused():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="rng is 'repeat'; expected 'advance' or 'replay'"):
        SAM([w], torch.optim.SGD, lr=0.1, rng="repeat")
    with pytest.raises(ValueError, match="recipe 'sampa' are of different batches"):
        SAM([w], torch.optim.SGD, lr=0.1, rng="replay", recipe="sampa")


def test_copies_keep_the_choice():
    _, opt = build()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other.rng == "replay"
        assert not other._replay.has_first


def test_generators_of_devices_are_kept_too(monkeypatch):
    """A device that this machine may not have, its generator a list."""
    states = {0: 5, 1: 7}
    module = SimpleNamespace(
        get_rng_state=lambda device: torch.tensor(states[device.index]),
        set_rng_state=lambda state, device: states.__setitem__(device.index, int(state)),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(rng, "is_capturing", lambda device: False)
    replay = rng.Replay()
    devices = [torch.device("cuda", 1), torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")]
    with replay.around(0, devices):
        states.update({0: 50, 1: 70})
    with replay.around(1, devices):
        assert states == {0: 5, 1: 7}
        states.update({0: 50, 1: 70, 2: 0})
    assert states == {0: 50, 1: 70, 2: 0}
    monkeypatch.setattr(rng, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="which a CUDA graph does not record"):
        replay.note(devices)
