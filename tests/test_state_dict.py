"""Checkpoints: torch's own layout, both ways, and a resumed run that is the uninterrupted one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import BASES, RECIPES
from fixtures import (
    assert_close,
    backward_of,
    base_state,
    batches,
    every_backend,
    same_bits,
    small_net,
    values,
)
from torch.nn import Parameter

from sam_kernels import SAM, recipes

INPUTS = batches(8, 4, 5)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def train(opt, model, steps):
    for step in steps:
        opt.step(backward_of(model, INPUTS[step], step))


@every_backend
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda c: c.label)
@pytest.mark.parametrize(
    "base", [b for b in BASES if b.label in ("sgd-momentum", "adam", "adamw-amsgrad")], ids=lambda c: c.label
)
def test_resumed_run_equals_the_uninterrupted_one(base, recipe, backend):
    def fresh():
        model = small_net()
        return model, SAM(
            model.named_parameters(), base.base, backend=backend, **recipe.options(), **base.arguments
        )

    model, opt = fresh()
    train(opt, model, range(3))
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    train(opt, model, range(3, 6))
    other, resumed = fresh()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    resumed.load_state_dict(saved["opt"])  # twice is once
    train(resumed, other, range(3, 6))
    assert same_bits(model.parameters(), other.parameters())
    assert same_bits(base_state(opt), base_state(resumed))


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_cadence_resumes_where_it_stopped(stop):
    def fresh():
        model = small_net()
        return model, SAM(model.parameters(), torch.optim.SGD, recipe=recipes.sam(every=3), lr=0.1)

    model, opt = fresh()
    train(opt, model, range(stop))
    other, resumed = fresh()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    calls = []
    for step in range(stop, 7):

        def closure(step=step):
            calls.append(step)
            return backward_of(other, INPUTS[step], step)()

        resumed.step(closure)
    assert calls == sorted([*range(stop, 7), *(s for s in (3, 6) if s >= stop)])


def test_state_dict_is_a_snapshot_of_now_and_loading_does_not_alias():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    train(opt, model, range(2))
    saved = copy.deepcopy(opt.state_dict())
    other = SAM(small_net().parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    other.load_state_dict(saved)
    train(opt, model, range(2, 4))
    loaded = [slots["momentum_buffer"] for slots in other.state_dict()["state"].values()]
    assert same_bits(loaded, [slots["momentum_buffer"] for slots in saved["state"].values()])


FUSED = [b for b in BASES if not b.label.endswith("maximize")]


@every_backend
@pytest.mark.parametrize("base", FUSED, ids=lambda c: c.label)
def test_checkpoint_of_torch_loads_into_sam(base, backend):
    model = small_net()
    plain = base.base(model.parameters(), **base.arguments)
    for step in range(2):
        plain.zero_grad()
        backward_of(model, INPUTS[step], step)()
        plain.step()
    other = small_net()
    other.load_state_dict(model.state_dict())
    # rho = 0 is the base optimizer, so both must go on alike from here
    opt = SAM(other.parameters(), base.base, rho=0.0, backend=backend, **base.arguments)
    opt.load_state_dict(through_a_file(plain.state_dict()))
    assert opt.param_groups[0]["rho"] == 0.0
    for step in range(2, 4):
        plain.zero_grad()
        backward_of(model, INPUTS[step], step)()
        plain.step()
        opt.step(backward_of(other, INPUTS[step], step))
    assert_close(other.parameters(), model.parameters(), 1e-13)
    plain_state = [
        v for s in plain.state.values() for k, v in sorted(s.items()) if isinstance(v, torch.Tensor)
    ]
    assert_close([t for t in base_state(opt)][: len(plain_state)], plain_state, 1e-12)


@every_backend
@pytest.mark.parametrize("base", FUSED, ids=lambda c: c.label)
def test_checkpoint_of_sam_loads_into_torch(base, backend):
    model = small_net()
    opt = SAM(model.parameters(), base.base, rho=0.0, backend=backend, **base.arguments)
    train(opt, model, range(2))
    other = small_net()
    other.load_state_dict(model.state_dict())
    plain = base.base(other.parameters(), **base.arguments)
    plain.load_state_dict(through_a_file(opt.state_dict()))
    for step in range(2, 4):
        opt.step(backward_of(model, INPUTS[step], step))
        plain.zero_grad()
        backward_of(other, INPUTS[step], step)()
        plain.step()
    assert_close(model.parameters(), other.parameters(), 1e-13)


@every_backend
@pytest.mark.parametrize("base", FUSED, ids=lambda c: c.label)
def test_state_layout_is_that_of_torch(base, backend):
    model, other = small_net(torch.float32), small_net(torch.float32)
    opt = SAM(model.parameters(), base.base, backend=backend, **base.arguments)
    plain = base.base(other.parameters(), **base.arguments)
    opt.step(backward_of(model, INPUTS[0].float()))
    backward_of(other, INPUTS[0].float())()
    plain.step()
    ours, theirs = opt.state_dict(), plain.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for index, slots in theirs["state"].items():
        assert ours["state"][index].keys() == slots.keys()
        for key, slot in slots.items():
            mine = ours["state"][index][key]
            assert type(mine) is type(slot)
            if isinstance(slot, torch.Tensor):
                assert (mine.dtype, mine.shape, mine.stride()) == (slot.dtype, slot.shape, slot.stride())
    assert set(theirs["param_groups"][0]) <= set(ours["param_groups"][0])
    assert {"rho", "adaptive"} <= set(ours["param_groups"][0])


def test_loading_brings_back_rho_and_lr_of_the_checkpoint():
    w = Parameter(torch.ones(1))
    opt = SAM([w], torch.optim.SGD, rho=0.3, lr=0.7)
    other = SAM([Parameter(torch.ones(1))], torch.optim.SGD, rho=0.1, lr=0.1)
    other.load_state_dict(opt.state_dict())
    assert (other.param_groups[0]["rho"], other.param_groups[0]["lr"]) == (0.3, 0.7)


@pytest.mark.parametrize("what", ["groups", "parameters", "not a state"])
def test_checkpoint_that_does_not_fit_loses_nothing(what):
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    train(opt, model, range(2))
    before, groups = base_state(opt), opt.param_groups
    if what == "groups":
        bad = SAM([{"params": [p]} for p in small_net().parameters()], torch.optim.SGD, lr=0.1).state_dict()
    elif what == "parameters":
        bad = SAM(list(small_net().parameters())[:2], torch.optim.SGD, lr=0.1).state_dict()
    else:
        bad = {"weights": 3}
    with pytest.raises((ValueError, KeyError)):
        opt.load_state_dict(bad)
    assert same_bits(base_state(opt), before)
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert opt.param_groups == groups
    train(opt, model, range(2, 3))


def test_state_dict_before_the_first_step_loads():
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.AdamW, lr=0.01)
    other_model = small_net()
    other = SAM(other_model.parameters(), torch.optim.AdamW, lr=0.01)
    other.load_state_dict(through_a_file(opt.state_dict()))
    for m, o in ((model, opt), (other_model, other)):
        train(o, m, range(2))
    assert same_bits(model.parameters(), other_model.parameters())


@every_backend
def test_old_checkpoint_with_a_number_as_step_count_loads(backend):
    w, v = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    opts = [SAM([p], torch.optim.Adam, rho=0.0, backend=backend, lr=0.1) for p in (w, v)]
    for _ in range(2):
        w.grad = torch.ones(3)
        opts[0].first_step()
        opts[0].second_step()
    saved = copy.deepcopy(opts[0].state_dict())
    for slots in saved["state"].values():
        slots["step"] = int(slots["step"])
    opts[1].load_state_dict(saved)
    with torch.no_grad():
        v.copy_(w)
    for p, opt in zip((w, v), opts, strict=True):
        p.grad = torch.full((3,), 0.5)
        opt.first_step()
        opt.second_step()
    assert same_bits([w], [v])


def test_state_dict_hooks_fire():
    opt = SAM([Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1)
    fired = []
    opt.register_state_dict_pre_hook(lambda o: fired.append("before saving"))
    opt.register_state_dict_post_hook(lambda o, state: fired.append("after saving"))
    opt.register_load_state_dict_pre_hook(lambda o, state: fired.append("before loading"))
    opt.register_load_state_dict_post_hook(lambda o: fired.append("after loading"))
    opt.load_state_dict(opt.state_dict())
    assert fired == ["before saving", "after saving", "before loading", "after loading"]


def test_state_is_cast_to_the_precision_of_the_parameter():
    model, wide = small_net(torch.float32), small_net(torch.float64)
    opt = SAM(model.parameters(), torch.optim.Adam, lr=0.01)
    opt.step(backward_of(model, INPUTS[0].float()))
    other = SAM(wide.parameters(), torch.optim.Adam, lr=0.01)
    other.load_state_dict(opt.state_dict())
    slots = next(iter(other.base_optimizer.state.values()))
    assert slots["exp_avg"].dtype == torch.float64
    assert slots["step"].dtype == torch.float32
    other.step(backward_of(wide, INPUTS[1]))
    assert all(bool(torch.isfinite(v).all()) for v in values(wide.parameters()))


@pytest.mark.parametrize(
    ("base", "slot"), [(torch.optim.SGD, "momentum_buffer"), (torch.optim.Adam, "exp_avg")]
)
def test_state_of_another_shape_is_a_sentence_and_nothing_moves(base, slot):
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    w = Parameter(torch.ones(6))
    opt = SAM([w], base, lr=0.1, **options)
    w.grad = torch.ones(6)
    opt.first_step()
    opt.second_step()
    opt.state[w][slot] = torch.zeros(4)
    before = w.detach().clone()
    opt.first_step()
    with pytest.raises(ValueError, match=rf"{slot}.*\(4,\); expected \(6,\)"):
        opt.second_step()
    assert torch.equal(w, before)


@every_backend
@pytest.mark.parametrize(
    ("base", "slot"), [(torch.optim.SGD, "momentum_buffer"), (torch.optim.Adam, "exp_avg")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_state_that_does_not_fit_moves_no_other_tensor_and_creates_no_state(dtype, base, slot, backend):
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    v, w = Parameter(torch.ones(6)), Parameter(torch.ones(6, dtype=dtype))  # one group of tensors or two
    opt = SAM([v, w], base, backend=backend, lr=0.1, **options)
    w.grad = torch.ones_like(w)
    opt.first_step()
    opt.second_step()
    opt.state[w][slot] = torch.zeros(4, dtype=dtype)
    before = values([v, w])
    v.grad = torch.ones_like(v)
    opt.first_step()
    with pytest.raises(ValueError, match="expected"):
        opt.second_step()
    assert same_bits([v, w], before)
    assert v not in opt.state


@every_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_an_update_that_fails_leaves_no_state_behind(base, backend, monkeypatch):
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    w, plain = Parameter(torch.ones(6)), Parameter(torch.ones(6))
    opt, other = (SAM([p], base, backend=backend, lr=0.1, **options) for p in (w, plain))
    w.grad = torch.ones(6)
    opt.first_step()

    def fail(*_, **__):
        raise OSError("kernel")

    with monkeypatch.context() as patch:
        patch.setattr(type(opt._served[0][1]), "descend_", fail)
        with pytest.raises(OSError, match="kernel"):
            opt.second_step()
    assert torch.equal(w.detach(), torch.ones(6))
    assert not opt.state
    for p, o in ((w, opt), (plain, other)):
        p.grad = torch.ones(6)
        o.first_step()
        o.second_step()
    assert same_bits([w, *base_state(opt)], [plain, *base_state(other)])


@pytest.mark.parametrize(("key", "value"), [("rho", -3.0), ("rho", "big"), ("adaptive", "yes")])
def test_a_checkpoint_with_a_radius_that_makes_no_sense_loads_nothing(key, value):
    model = small_net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    train(opt, model, range(2))
    before, rate = base_state(opt), opt.param_groups[0]["lr"]
    bad = copy.deepcopy(opt.state_dict())
    bad["param_groups"][0] |= {key: value, "lr": 7.0}
    bad["state"][0]["momentum_buffer"].fill_(99.0)
    with pytest.raises(
        (ValueError, TypeError), match=rf"load_state_dict\(\): param_groups\[0\].*{key} is {value!r}"
    ):
        opt.load_state_dict(bad)
    assert same_bits(base_state(opt), before)
    assert opt.param_groups[0]["lr"] == rate
    assert opt.param_groups[0][key] != value


@every_backend
def test_a_skipped_step_is_counted_as_an_attempt_and_nothing_else(backend):
    w = Parameter(torch.ones(2))
    opt = SAM([w], torch.optim.SGD, recipe=recipes.sam(every=2), backend=backend, lr=0.1, momentum=0.9)
    w.grad = torch.tensor([float("nan"), 1.0])
    opt.first_step()
    opt.second_step()
    assert opt.param_groups[0]["sam_step"] == 1
    assert not opt.is_due
    assert not opt.state
    assert torch.equal(w.detach(), torch.ones(2))


def test_places_that_nothing_was_loaded_into_are_none():
    w = Parameter(torch.randn(6))
    opt = SAM([w], torch.optim.SGD, recipe="vasso", lr=0.1)
    for _ in range(2):
        w.grad = torch.randn(6)
        opt.first_step(zero_grad=True)
        w.grad = torch.randn(6)
        opt.step()
    saved = opt.state_dict()
    assert saved["state"][0]["sam_ema"].any()
    saved["state"][0]["sam_ema"] = torch.zeros(6)  # as a partial load of a distributed checkpoint leaves it
    other = SAM([w], torch.optim.SGD, recipe="vasso", lr=0.1)
    with pytest.warns(UserWarning, match="no sam_ema"):
        other.load_state_dict(saved)
    assert "sam_ema" not in other.state_dict()["state"].get(0, {})
