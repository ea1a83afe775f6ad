"""What a step asks of its lists: compiled answers are those of Python, and doubts are Python's to settle."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sam_kernels import SAM, backends, tensor_groups, watch
from sam_kernels._version import ABI_VERSION
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
    assert seen.look(params) == SAME
    change(params)
    return seen.look(params)


# What may become of a parameter between two passes, and what a watch says of it.
CHANGES = {
    "nothing": (lambda ps: None, SAME),
    "new values": (lambda ps: ps[0].data.fill_(3.0), SAME),
    "other memory": (lambda ps: setattr(ps[0], "data", ps[0].data.clone()), MOVED),
    "other memory of the last": (lambda ps: setattr(ps[-1], "data", ps[-1].data.clone()), MOVED),
    "fewer elements": (lambda ps: setattr(ps[0], "data", ps[0].data[:2]), UNSURE),
    "elements of one that had none": (lambda ps: setattr(ps[2], "data", torch.ones(2)), UNSURE),
    "another shape and memory": (lambda ps: setattr(ps[0], "data", ps[0].data.view(2, 3).clone()), UNSURE),
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
def test_another_shape_in_the_same_memory_is_for_python_to_judge():
    params = parameters(*SHAPES)
    assert look(params, lambda ps: setattr(ps[0], "data", ps[0].data.view(2, 3))) == UNSURE


@needs_module
def test_a_list_of_other_length_is_not_looked_at():
    params = parameters(*SHAPES)
    seen = watch.watch(params)
    assert seen.look(params[:2]) == UNSURE and seen.look([]) == UNSURE
    assert seen.gradients(params[:2]) is None


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
    assert seen.look(params) == SAME
    params[0].grad, params[1].grad = picture(), torch.randn(3)
    grads, present = seen.gradients(params)
    assert grads[0] is params[0].grad and grads[1] is params[1].grad and present == 2
    params[0].grad = torch.randn(2, 3, 4, 5)
    assert seen.gradients(params) is None
    params[0].data = torch.randn(2, 3, 4, 5)
    assert seen.look(params) == UNSURE


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
    assert seen.gradients(params) is None
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
    backend = backends.get("native")
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
def test_a_gradient_that_cannot_be_had_leaves_no_addresses_behind():
    class Shy(nn.Parameter):
        """A parameter that does not give its gradient."""

        is_shy = False

        @property
        def grad(self):
            if self.is_shy:
                raise RuntimeError("not now")
            return super().grad

    params: list[torch.Tensor] = [nn.Parameter(torch.ones(4)), Shy(torch.ones(4))]
    torch.Tensor.grad.__set__(params[0], torch.full((4,), 2.0))
    torch.Tensor.grad.__set__(params[1], torch.full((4,), 3.0))
    group = group_of(params)
    group.write_table([(float(EUCLIDEAN), 0.0, 0.1, 0.0)])
    group.read_gradients()
    params[1].is_shy = True
    with pytest.raises(RuntimeError, match="not now"):
        group.read_gradients()
    assert group.seen_grads is None
    assert backends.get("native").sq_norm(group).item() == 4 * 4.0 + 4 * 9.0  # of the list read before


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
        lambda: watch.have(entries[:2], "a", [x, z]),
        lambda: watch.have(entries[:2], "a", [x, x]),
        lambda: watch.have(entries, "a", [x, z, None]),
        lambda: watch.have(entries[:1], "a", [x, z]),
        lambda: watch.has_items({y: x, z: y}, [y, z], [x, y]),
        lambda: watch.has_items({z: x, y: y}, [y, z], [x, y]),
        lambda: watch.has_items({z: y, y: x}, [y, z], [x, y]),
        lambda: watch.has_items({y: x}, [y, z], [x, y]),
    ]
    compiled = [question() for question in questions]
    monkeypatch.setattr(watch, "_module", None)
    assert compiled == [question() for question in questions]
    assert compiled == [True, False, False, True, True, False, False, False, True, False, False, False]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("backend", ["auto", "foreach"])
def test_steps_are_the_same_bits_either_way(base, backend, monkeypatch):
    """With gradients that come and go, memory that is exchanged, and state that is replaced."""
    more = {"momentum": 0.9} if base is torch.optim.SGD else {}

    def train() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        params = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((5, 3), (7,), (1,), (2, 2))]
        opt = SAM(params, base, rho=0.1, lr=0.01, backend=backend, **more)
        for step in range(6):
            for second in (False, True):
                for t, p in enumerate(params):
                    p.grad = None if step == t else torch.randn(p.shape, generator=generator)
                opt.second_step() if second else opt.first_step()
            params[1].data = params[1].data.clone()
            if step == 3:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            if step == 4:  # the entries of two parameters in each other's place
                first, last = (opt.state.pop(params[t]) for t in (0, 3))
                opt.state[params[3]] = {k: v + 1 if v.shape == (2, 2) else v for k, v in last.items()}
                opt.state[params[0]] = first
        state = [x for p in params for x in opt.state[p].values() if isinstance(x, torch.Tensor)]
        assert len(state) >= 4
        return [p.detach() for p in params] + state

    compiled = train()
    monkeypatch.setattr(watch, "_module", None)
    assert all(map(torch.equal, compiled, train()))


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_entries_that_change_places_are_found_by_their_parameters(backend):
    a, b = params = parameters((4,), (4,))
    opt = SAM(params, torch.optim.SGD, rho=0.0, lr=1.0, momentum=0.5, backend=backend)
    opt.first_step()
    opt.second_step()
    of_a, of_b = opt.state.pop(a), opt.state.pop(b)
    opt.state[b], opt.state[a] = of_a, of_b  # the values as before, in their order
    buffer, before = of_b["momentum_buffer"].clone(), a.detach().clone()
    opt.first_step()
    opt.second_step()
    torch.testing.assert_close(a.detach(), before - 0.5 * buffer - a.grad)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_a_gradient_that_only_says_it_is_negated_is_negated(backend, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(watch, "_module", None)
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))
    opt = SAM([p, q], torch.optim.SGD, rho=0.0, lr=0.1, backend=backend)

    def gradient() -> None:
        opt.zero_grad()
        (torch.complex(torch.zeros(1), p).conj() * (2 + 3j)).real.sum().backward()
        (torch.complex(torch.zeros(3), q).conj() * (2 + 3j)).real.sum().backward()

    gradient()
    assert p.grad.is_neg() and p.grad.item() == 3.0
    opt.first_step()
    gradient()
    opt.second_step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.7]))
    torch.testing.assert_close(q.detach(), torch.full((3,), 0.7))


def test_a_parameter_that_only_says_it_is_negated_is_refused():
    z = torch.ones(1, dtype=torch.complex64).conj().imag
    assert z.is_neg()
    with pytest.raises(ValueError, match=r"negated view; give the optimizer a parameter of resolve_neg"):
        SAM([nn.Parameter(z)], torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_momentum_of_another_shape_is_no_direction(backend):
    p = nn.Parameter(torch.ones(100))
    opt = SAM([p], torch.optim.SGD, recipe="msam", lr=0.1, momentum=0.9, backend=backend)
    opt.state[p]["momentum_buffer"] = torch.ones(10)
    p.grad = torch.ones(100)
    with pytest.raises(ValueError, match=r"shape \(10,\) belongs to a parameter of shape \(100,\)"):
        opt.first_step()
    assert torch.equal(p.detach(), torch.ones(100))


@needs_module
def test_an_optimizer_that_its_parameters_know_is_collected():
    p = nn.Parameter(torch.ones(3))
    opt = SAM([p], torch.optim.SGD, lr=0.1, momentum=0.9)
    p.owner = opt
    p.grad = torch.ones(3)
    opt.first_step()
    p.grad = torch.ones(3)
    opt.second_step()
    gone = weakref.ref(opt), weakref.ref(p)
    del opt, p
    gc.collect()
    assert [one() for one in gone] == [None, None]


@pytest.mark.parametrize(
    "module",
    [
        SimpleNamespace(),
        SimpleNamespace(abi_version=6, set_exchange=lambda capsule: True),
        SimpleNamespace(abi_version=ABI_VERSION),
        SimpleNamespace(abi_version=ABI_VERSION, set_exchange=lambda capsule: False),
    ],
    ids=["nothing", "another version", "no exchange", "another exchange"],
)
def test_a_module_that_does_not_fit_is_left_alone(module, monkeypatch):
    monkeypatch.setattr(watch, "import_module", lambda name: module)
    assert watch._load() is None


@needs_module
@pytest.mark.parametrize("exchange", [None, 5, "capsule", object()])
def test_a_torch_with_another_exchange_is_asked_in_python(exchange, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", exchange)
        assert watch._load() is None
    assert watch._load() is not None  # which also gives the module its exchange back


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
    rate = torch.tensor(0.2)  # equal to the number before
    opt.param_groups[0]["lr"] = rate
    assert writes() > 0 and writes() > 0
    rate.fill_(0.0)  # in its place: only asking it tells
    before = [p.detach().clone() for p in params]
    assert writes() > 0
    assert all(map(torch.equal, before, params))
    opt.param_groups[0]["lr"] = 0.2
    assert writes() > 0 and writes() == 0
    opt.recipe = replace(opt.recipe, eps=0.5)
    assert writes() > 0 and writes() == 0
    opt.add_param_group({"params": parameters((2,))})
    assert writes() > 0 and writes() == 0


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_rates_that_are_changed_in_their_place_are_noticed(backend):
    """A list of betas, and a number of numpy's."""

    def train(change) -> torch.Tensor:
        p = nn.Parameter(torch.ones(3))
        opt = SAM([p], torch.optim.Adam, rho=0.05, lr=0.1, backend=backend)
        opt.param_groups[0]["betas"], opt.param_groups[0]["lr"] = [0.9, 0.999], np.array(0.1)
        for step in range(2):
            for second in (False, True):
                p.grad = torch.tensor([1.0, -2.0, 3.0]) * (1 + step + second)
                opt.second_step() if second else opt.first_step()
            change(opt.param_groups[0])
        return p.detach()

    def in_place(group) -> None:
        group["betas"][0] = 0.1
        group["lr"].fill(0.3)

    def anew(group) -> None:
        group["betas"], group["lr"] = (0.1, 0.999), 0.3

    assert torch.equal(train(in_place), train(anew))
    assert not torch.equal(train(in_place), train(lambda group: None))


def test_options_that_no_fused_update_reads_may_be_anything():
    class Odd(torch.optim.SGD):
        """A base whose options have the names of others'."""

        def __init__(self, params, lr):
            super().__init__(params, lr=lr)
            for group in self.param_groups:
                group["betas"], group["eps"] = 0.9, np.ones(2)

    p = nn.Parameter(torch.ones(3))
    opt = SAM([p], Odd, rho=0.05, lr=0.1)
    for _ in range(2):
        opt.param_groups[0]["eps"] = np.ones(2)
        p.grad = torch.ones(3)
        opt.first_step()
        opt.second_step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))
