"""What a step asks of its lists: compiled answers are those of Python, and doubts are Python's to settle."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from sam_kernels import SAM, tensor_groups, watch
from sam_kernels.tensor_groups import EUCLIDEAN, TensorGroup
from sam_kernels.watch import MOVED, SAME, UNSURE

needs_module = pytest.mark.skipif(
    watch._module is None, reason="no compiled module, or torch has no exchange"
)

SHAPES = [(3, 2), (), (0,), (1, 5), (4, 1, 3)]


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    params: list[torch.Tensor] = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def group_of(params: list[torch.Tensor]) -> TensorGroup:
    return TensorGroup(params, [0] * len(params), [(0, EUCLIDEAN, 0.0)])


def look(params: list[torch.Tensor], change) -> int:
    seen = watch.watch(params)
    assert seen.look() == SAME
    change(params)
    return seen.look()


# What may become of a parameter between two passes, and what a watch says of it.
CHANGES = {
    "nothing": (lambda ps: None, SAME),
    "new values": (lambda ps: ps[0].data.fill_(3.0), SAME),
    "other memory": (lambda ps: setattr(ps[0], "data", ps[0].data.clone()), MOVED),
    "other memory of the last": (lambda ps: setattr(ps[-1], "data", ps[-1].data.clone()), MOVED),
    "fewer elements": (lambda ps: setattr(ps[0], "data", ps[0].data[:2]), UNSURE),
    "elements of one that had none": (lambda ps: setattr(ps[2], "data", torch.ones(2)), UNSURE),
    "another shape of as many": (lambda ps: setattr(ps[0], "data", ps[0].data.view(2, 3)), SAME),
    "another order": (lambda ps: setattr(ps[0], "data", ps[0].data.t().contiguous().t()), UNSURE),
    "gaps": (lambda ps: setattr(ps[0], "data", torch.ones(3, 4)[:, ::2]), UNSURE),
    "another dtype": (lambda ps: setattr(ps[0], "data", ps[0].data.double()), UNSURE),
    "half of the bytes": (lambda ps: setattr(ps[0], "data", ps[0].data.bfloat16()), UNSURE),
}


@needs_module
@pytest.mark.parametrize("name", CHANGES)
def test_a_watch_sees_what_became_of_a_parameter(name):
    change, expected = CHANGES[name]
    assert look(parameters(*SHAPES), change) == expected


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_group_is_current_by_either_way(name, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(watch, "_module", None)
    elif watch._module is None:
        pytest.skip("no compiled module")
    change, expected = CHANGES[name]
    params = parameters(*SHAPES)
    group = group_of(params)
    assert (group.watch is not None) == is_compiled
    assert group.is_current()
    change(params)
    assert group.is_current() == (expected != UNSURE)


@needs_module
def test_steps_along_dimensions_of_one_element_say_nothing():
    params = [nn.Parameter(torch.ones(1, 4, 1))]
    assert (
        look(params, lambda ps: setattr(ps[0], "data", torch.ones(4).as_strided((1, 4, 1), (77, 1, 9))))
        == MOVED
    )


@needs_module
def test_parameters_in_channels_last_are_watched_in_their_order():
    def picture() -> torch.Tensor:
        return torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)

    params: list[torch.Tensor] = [nn.Parameter(picture()), nn.Parameter(torch.randn(3))]
    seen = watch.watch(params)
    assert seen.look() == SAME
    params[0].grad, params[1].grad = picture(), torch.randn(3)
    grads, present = seen.gradients()
    assert grads[0] is params[0].grad and grads[1] is params[1].grad and present == 2
    params[0].grad = torch.randn(2, 3, 4, 5)
    assert seen.gradients() is None
    params[0].data = torch.randn(2, 3, 4, 5)
    assert seen.look() == UNSURE


# Gradients that do not lie like their parameters, which somebody has to make fit.
UNFIT = {
    "sparse": lambda p: torch.randn(p.shape).to_sparse(),
    "in another order": lambda p: torch.randn(p.shape[::-1]).t(),
    "expanded": lambda p: torch.randn(()).expand(p.shape),
}


@needs_module
@pytest.mark.parametrize("name", UNFIT)
def test_gradients_that_do_not_fit_are_left_to_python(name):
    params = parameters(*SHAPES)
    params[0].grad = UNFIT[name](params[0])
    seen = watch.watch(params)
    assert seen.gradients() is None
    group = group_of(params)
    group.read_gradients()
    assert group.has_all_grads and group.grads[0].is_contiguous()
    assert torch.equal(group.grads[0], params[0].grad.to_dense())
    assert all(g is p.grad for g, p in zip(group.grads[1:], params[1:], strict=True))


@pytest.mark.parametrize("is_compiled", [True, False])
def test_gradients_that_are_missing_are_none(is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(watch, "_module", None)
    params = parameters(*SHAPES)
    params[1].grad = None
    group = group_of(params)
    group.read_gradients()
    assert group.grads[1] is None and not group.has_all_grads
    assert [g is p.grad for g, p in zip(group.grads, params, strict=True)] == [True] * len(params)
    params[1].grad = torch.ones(())
    group.read_gradients()
    assert group.has_all_grads and group.grads[1] is params[1].grad


@needs_module
def test_gradients_are_let_go():
    params = parameters((3,), (4,))
    group = group_of(params)
    group.read_gradients()
    kept = [weakref.ref(g) for g in group.grads]
    for p in params:
        p.grad = None
    gc.collect()
    assert all(one() is not None for one in kept)  # a pass may still be about to read them
    group.drop_gradients()
    gc.collect()
    assert all(one() is None for one in kept)


@needs_module
def test_addresses_of_gradients_are_those_of_the_list_at_hand():
    """A list that was changed in place, or given in its stead, is looked at again."""
    params = parameters((64,), (64,))
    group = group_of(params)
    backend = pytest.importorskip("sam_kernels.backends").get("native")
    group.write_table([(float(EUCLIDEAN), 0.0, 0.1, 0.0)])
    group.read_gradients()
    assert backend.sq_norm(group).item() == pytest.approx(sum(float(p.grad.square().sum()) for p in params))
    group.grads[0] = torch.full((64,), 2.0)
    expected = 256.0 + float(params[1].grad.square().sum())
    assert backend.sq_norm(group).item() == pytest.approx(expected)
    group.grads = [torch.full((64,), 1.0), None]
    assert backend.sq_norm(group).item() == 64.0
    group.read_gradients()
    params[0].grad = torch.full((64,), 3.0)
    group.read_gradients()
    assert backend.sq_norm(group).item() == pytest.approx(576.0 + float(params[1].grad.square().sum()))


@needs_module
def test_fake_tensors_and_tensors_without_memory_have_no_watch():
    assert watch.watch([torch.empty(3, device="meta")]) is None
    with torch._subclasses.FakeTensorMode():
        assert watch.watch([torch.empty(3)]) is None


def test_the_python_answers_are_the_compiled_ones(monkeypatch):
    x, y, z = object(), object(), object()
    entries = [{"a": x, "b": y}, {"a": z}, {}]
    questions = [
        lambda: watch.are_same([x, y], [x, y]),
        lambda: watch.are_same([x, y], [x, z]),
        lambda: watch.are_same([], [x]),
        lambda: watch.are_same((x, y), [x, y]),
        lambda: watch.hold(entries[:2], "a", [x, z]),
        lambda: watch.hold(entries[:2], "a", [x, x]),
        lambda: watch.hold(entries, "a", [x, z, None]),
        lambda: watch.hold(entries[:1], "a", [x, z]),
        lambda: watch.has_values({1: x, 2: y}, [x, y]),
        lambda: watch.has_values({2: y, 1: x}, [x, y]),
        lambda: watch.has_values({1: x}, [x, y]),
    ]
    compiled = [question() for question in questions]
    monkeypatch.setattr(watch, "_module", None)
    assert compiled == [question() for question in questions]
    assert compiled == [True, False, False, True, True, False, False, False, True, False, False]


def test_steps_are_the_same_bits_either_way(monkeypatch):
    def train() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        params = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((5, 3), (7,), (0,), (2, 2))]
        opt = SAM(params, torch.optim.AdamW, rho=0.1, lr=0.01)
        for step in range(4):
            for second in (False, True):
                for t, p in enumerate(params):
                    p.grad = None if step == t else torch.randn(p.shape, generator=generator)
                opt.second_step() if second else opt.first_step()
            params[1].data = params[1].data.clone()
        return [p.detach() for p in params]

    compiled = train()
    monkeypatch.setattr(watch, "_module", None)
    assert all(map(torch.equal, compiled, train()))


def test_a_table_is_written_again_when_a_number_changes(monkeypatch):
    """What was written is remembered, and everything that may change is compared."""
    written: list[int] = []
    write = tensor_groups.TensorGroup.write_table
    monkeypatch.setattr(
        tensor_groups.TensorGroup, "write_table", lambda self, rows: (written.append(1), write(self, rows))[1]
    )
    params = parameters((4,), (3,))
    opt = SAM(params, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)

    def writes() -> int:
        written.clear()
        for p in params:
            p.grad = torch.ones_like(p)
        opt.first_step()
        opt.second_step()
        return len(written)

    assert writes() > 0 and writes() == 0
    for key, value in {
        "lr": 0.2, "momentum": 0.5, "weight_decay": 0.1, "rho": 0.3, "maximize": True, "dampening": 0.1
    }.items():  # fmt: skip
        opt.param_groups[0][key] = value
        assert writes() > 0, key
        assert writes() == 0, key
    rate = torch.tensor(0.05)
    opt.param_groups[0]["lr"] = rate
    assert writes() > 0
    rate.fill_(0.0)  # in its place: only asking it tells
    before = [p.detach().clone() for p in params]
    assert writes() > 0
    assert all(map(torch.equal, before, params))
