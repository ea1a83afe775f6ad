"""`master_weights=True`: what the optimizer promises, at every stop of a step and over checkpoints."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings

import pytest
import torch
from fixtures import assert_close, awkward_parameters, every_backend, same_bits, values
from oracles import bases, masters
from test_costs import Allocations
from torch.nn import Parameter

from sam_kernels import SAM, recipes
from sam_kernels.costs import cost

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
half = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}
BASES = [
    pytest.param((torch.optim.SGD, SGD, lambda: bases.Sgd(**SGD)), id="sgd"),
    pytest.param((torch.optim.AdamW, ADAMW, lambda: bases.adamw(**ADAMW)), id="adamw"),
]
every_base = pytest.mark.parametrize("base", BASES)


def make(backend="reference", dtype=BF16, base=BASES[0].values[0], seed=0, **options):
    params = awkward_parameters(dtype, seed)
    kind, arguments, _ = base
    options = {"rho": 0.3, **arguments, **options}
    opt = SAM(params, kind, backend=backend, master_weights=True, **options)
    return params, opt


def closure_of(params, opt, seen=None, seed=0):
    """Gradients that depend on the weights and on the call; what was seen is kept."""
    generator = torch.Generator().manual_seed(seed)

    def closure():
        for p in params:
            noise = torch.randn(p.shape, generator=generator)
            p.grad = (0.5 * p.detach().float() + noise).to(p.dtype)
        if seen is not None:
            seen.append(([p.detach().clone() for p in params], [p.grad.clone() for p in params]))
        return 0.0

    return closure


def masters_of(params, opt):
    return [opt._slots.tensors["master"][p] for p in params]


def assert_rounded(params, opt):
    assert same_bits(params, [m.to(p.dtype) for p, m in zip(params, masters_of(params, opt), strict=True)])


def named(tensors):
    return {str(i): t for i, t in enumerate(tensors)}


# ---- trajectories ----------------------------------------------------------------------------------


@every_backend
@half
@every_base
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "adaptive"])
def test_whole_steps_are_those_of_fp32_masters(backend, dtype, base, adaptive):
    """The oracle is told the gradients that were computed, so one weight that rounds elsewhere stays one."""
    params, opt = make(backend, dtype, base, adaptive=adaptive)
    start = {name: p.detach().double() for name, p in named(params).items()}
    oracle = masters.Masters(start, base[2](), dtype, rho=0.3, eta=0.0 if adaptive else None)
    seen: list = []
    closure = closure_of(params, opt, seen)
    addresses = [p.data_ptr() for p in params]
    neighbours = total = 0
    for _ in range(5):
        opt.step(closure)
        (_, first), (perturbed, second) = seen[-2:]
        expected = oracle.perturbed(named(first))
        for name, p in named(perturbed).items():
            unit = 2.0**-7 if dtype == BF16 else 2.0**-10
            torch.testing.assert_close(p.double(), expected[name].double(), rtol=unit, atol=1e-6)
            neighbours, total = neighbours + int((p != expected[name]).sum()), total + p.numel()
        oracle.descend(named(second))
        assert_close(masters_of(params, opt), oracle.values.values(), 1e-6)
        assert_rounded(params, opt)
    assert neighbours <= 0.001 * total + 2
    assert [p.data_ptr() for p in params] == addresses
    for entry in opt.base_optimizer.state.values():
        assert all(x.dtype == F32 for x in entry.values())


@every_backend
def test_the_two_step_form_and_gradients_that_come_and_go(backend):
    params, opt = make(backend)
    closure = closure_of(params, opt)
    for missing in (3, 9, 2):
        closure()
        params[missing].grad = None
        opt.first_step(zero_grad=True)
        assert all(m is not None for m in masters_of(params, opt))
        moved = [not torch.equal(p, m.to(BF16)) for p, m in zip(params, masters_of(params, opt), strict=True)]
        assert any(moved) and not moved[missing]
        closure()
        params[4].grad = None
        before = masters_of(params, opt)[4].clone()
        opt.second_step(zero_grad=True)
        assert_rounded(params, opt)
        assert same_bits([before], [masters_of(params, opt)[4]])


@every_backend
@pytest.mark.parametrize(
    "recipe", ["looksam", "vasso", "friendly_sam", "msam", "rand_sam", "gsam", "ssam_f", "ssam_d"]
)
def test_other_recipes_serve_from_masters(backend, recipe):
    """Directions, combinations, masks and steps that do not perturb: weights are the rounded masters."""
    params = awkward_parameters(BF16)
    start = values(params)
    arguments = {"samples": None} if recipe == "ssam_f" else {}
    opt = SAM(params, torch.optim.SGD, recipe=recipe, backend=backend, master_weights=True, **SGD)
    closure = closure_of(params, opt)
    for _ in range(6):
        opt.step(closure)
        assert_rounded(params, opt)
        assert not arguments or opt is not None
    low = sum(float((m - m.to(BF16).float()).abs().sum()) for m in masters_of(params, opt))
    assert low > 0, "masters hold more than the weights"
    assert not same_bits(params, start)


def test_a_step_that_does_not_perturb_goes_through_the_masters():
    params, opt = make(recipe=recipes.sam(0.3, every=2), base=(torch.optim.SGD, {"lr": 1e-4}, None), rho=None)
    closure = closure_of(params, opt)
    opt.step(closure)
    before = masters_of(params, opt)[9].clone()
    opt.step(closure)  # not due: an update of 1e-4 is lost in bf16, not in fp32
    moved = masters_of(params, opt)[9] - before
    assert float(moved.abs().max()) < 1e-3 and float((moved != 0).float().mean()) > 0.99
    assert_rounded(params, opt)


@every_backend
def test_fp32_parameters_beside_are_served_as_always(backend):
    def run(with_half):
        torch.manual_seed(3)
        wide, narrow = Parameter(torch.randn(37)), Parameter(torch.randn(50).to(BF16))
        opt = SAM(
            [wide, narrow] if with_half else [wide],
            torch.optim.AdamW,
            rho=0.1,
            backend=backend,
            master_weights=True,
            **ADAMW,
        )

        def closure():
            wide.grad = wide.detach() * 0.5 + 1
            narrow.grad = torch.zeros_like(narrow)  # takes no part in the norm
            return 0.0

        for _ in range(3):
            opt.step(closure)
        return wide, narrow, opt

    wide, narrow, opt = run(True)
    assert same_bits([wide], [run(False)[0]])
    assert set(opt._slots.tensors["master"]) == {narrow}


@pytest.mark.parametrize("name", ["native", "reference"])
def test_bytes_and_memory_are_those_of_the_design(name):
    """2 for the norm, 8 for the perturbation, 20 and 28 for the updates; no snapshot, 4 of the master."""
    for base, update in ((torch.optim.SGD, 20), (torch.optim.AdamW, 28)):
        found, _ = cost(recipes.sam(), base, dtype=BF16, master_weights=True)
        assert found.bytes == 2 + 8 + update
        assert found.memory == 4
        assert found.passes == {"sq_norm": 1, "perturb_": 1, "descend_": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding to nearest, which is not what this is about
        plain, _ = cost(recipes.sam(), torch.optim.AdamW, dtype=BF16)
    assert plain.bytes == 24 and plain.memory == 2
    adaptive, _ = cost(recipes.asam(only=None), torch.optim.SGD, dtype=BF16, master_weights=True)
    assert adaptive.bytes == 2 + 4 + 8 + 20


# ---- who changed the weights -----------------------------------------------------------------------


def steps(params, opt, count=2, seed=0):
    closure = closure_of(params, opt, seed=seed)
    for _ in range(count):
        opt.step(closure)


@every_backend
def test_loaded_weights_are_not_undone(backend):
    params, opt = make(backend)
    steps(params, opt)
    before = [m.clone() for m in masters_of(params, opt)]
    new = [p.detach() + 8 for p in params]
    with torch.no_grad():
        new[9][::2] = params[9][::2]  # loaded as they were
        for p, x in zip(params, new, strict=True):
            p.copy_(x)
    closure = closure_of(params, opt)
    closure()
    opt.first_step()
    found = masters_of(params, opt)
    kept = found[9][::2] == before[9][::2]
    assert kept.all(), "weights that are the same keep the low bits of their masters"
    assert torch.equal(found[9][1::2], new[9][1::2].float())
    for i in (0, 2, 3, 4, 5, 6, 7, 8):
        assert torch.equal(found[i], new[i].float())
    opt.second_step()
    assert_rounded(params, opt)


def test_the_weights_of_a_model_checkpoint_win_in_either_order():
    torch.manual_seed(1)
    model = torch.nn.Linear(5, 3).to(BF16)
    opt = SAM(model.parameters(), torch.optim.SGD, master_weights=True, **SGD)
    steps(list(model.parameters()), opt, 3)
    saved = copy.deepcopy({"model": model.state_dict(), "opt": opt.state_dict()})
    exact = [m.clone() for m in masters_of(model.parameters(), opt)]
    assert not all(torch.equal(m, m.to(BF16).float()) for m in exact)
    for order in ("model first", "optimizer first"):
        other = torch.nn.Linear(5, 3).to(BF16)
        resumed = SAM(other.parameters(), torch.optim.SGD, master_weights=True, **SGD)
        steps(list(other.parameters()), resumed, 1, seed=7)
        if order == "model first":
            other.load_state_dict(saved["model"])
            resumed.load_state_dict(saved["opt"])
        else:
            resumed.load_state_dict(saved["opt"])
            other.load_state_dict(saved["model"])
        resumed.refresh_masters()
        assert same_bits(masters_of(other.parameters(), resumed), exact)
    # The optimizer's alone: the weights that are there win over masters of others.
    third = torch.nn.Linear(5, 3).to(BF16)
    alone = SAM(third.parameters(), torch.optim.SGD, master_weights=True, **SGD)
    alone.load_state_dict(saved["opt"])
    alone.refresh_masters()
    assert same_bits(masters_of(third.parameters(), alone), [p.float() for p in third.parameters()])


def test_writes_through_data_need_a_word():
    params, opt = make()
    steps(params, opt)
    params[9].data.fill_(4.0)
    opt.refresh_masters()
    assert (masters_of(params, opt)[9] == 4.0).all()
    assert_rounded(params, opt)
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"refresh_masters\(\): the weights are perturbed"):
        opt.refresh_masters()


def test_a_change_of_dtype_ends_and_begins_masters():
    model = torch.nn.Linear(3, 2).to(BF16)
    opt = SAM(model.parameters(), torch.optim.SGD, master_weights=True, lr=0.1, momentum=0.9)
    steps(list(model.parameters()), opt)
    model.float()
    for p in model.parameters():
        p.grad = None
    start = values(model.parameters())
    steps(list(model.parameters()), opt)
    assert not same_bits(model.parameters(), start)
    assert all(entry["momentum_buffer"].dtype == F32 for entry in opt.base_optimizer.state.values())
    assert all("sam_master" not in entry for entry in opt.state_dict()["state"].values())
    model.to(BF16)
    for p in model.parameters():
        p.grad = None
    steps(list(model.parameters()), opt)
    assert_rounded(list(model.parameters()), opt)


# ---- failures --------------------------------------------------------------------------------------


class Broken(Exception):
    pass


@every_backend
@pytest.mark.parametrize("call", [0, 1])
def test_a_closure_that_raises_leaves_rounded_masters(backend, call):
    params, opt = make(backend)
    steps(params, opt)
    before, exact = values(params), [m.clone() for m in masters_of(params, opt)]
    fine, calls = closure_of(params, opt), []

    def closure():
        calls.append(1)
        if len(calls) > call:
            raise Broken
        return fine()

    with pytest.raises(Broken):
        opt.step(closure)
    assert same_bits(params, before) and same_bits(masters_of(params, opt), exact)
    steps(params, opt, 1)
    assert_rounded(params, opt)


@pytest.mark.parametrize("name", ["perturb_", "descend_", "sq_norm", "restore_"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_pass_that_fails_leaves_rounded_masters(backend, name, when, monkeypatch):
    params, opt = make(backend, recipe=recipes.sam(0.3, every=2), rho=None)
    steps(params, opt, 2)
    ((_, chosen),) = opt._groups()
    real = getattr(chosen, name)

    def broken(*args, **kwargs):
        if when == "after":
            real(*args, **kwargs)
        raise Broken

    for due in (True, False):
        assert opt.is_due == due
        with monkeypatch.context() as patch:
            patch.setattr(type(chosen), name, lambda self, *a, **k: broken(*a, **k))
            closure = closure_of(params, opt)
            if name == "restore_" and due:
                closure()
                with pytest.raises(Broken), opt.perturbed():
                    pass
            elif not due and name != "descend_":
                opt.step(closure)
                continue
            else:
                with pytest.raises(Broken):
                    opt.step(closure)
        assert_rounded(params, opt)
        steps(params, opt, 1)
        assert_rounded(params, opt)


@pytest.mark.parametrize("backend", ["reference", "foreach"])
def test_a_perturbation_that_fails_between_two_tensors_is_taken_back(backend, monkeypatch):
    """Torch's operators write tensor by tensor."""
    params, opt = make(backend)
    steps(params, opt, 1)
    before = values(params)
    count, real = [], torch.Tensor.copy_

    def copy_(self, *args, **kwargs):
        count.append(1)
        if len(count) == 5:
            raise Broken
        return real(self, *args, **kwargs)

    closure_of(params, opt)()
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch, "_foreach_add_", lambda *a, **k: (_ for _ in ()).throw(Broken))
    with pytest.raises(Broken):
        opt.first_step()
    monkeypatch.undo()
    assert same_bits(params, before)
    assert_rounded(params, opt)


@every_backend
@every_base
@pytest.mark.parametrize("which", [0, 1])
def test_gradients_that_are_not_finite_skip_the_step(backend, base, which):
    params, opt = make(backend, base=base)
    steps(params, opt)
    before = values(params)
    kept = [m.clone() for m in masters_of(params, opt)]
    fine, calls = closure_of(params, opt), []

    def closure():
        fine()
        if len(calls) == which:
            params[4].grad[1] = math.inf
        calls.append(1)
        return 0.0

    opt.max_grad_norm = 10.0  # whose norm is what finds a bad second gradient
    opt.step(closure)
    assert same_bits(params, before) and same_bits(masters_of(params, opt), kept)


@every_backend
def test_versions_advance_and_saved_tensors_are_found_stale(backend):
    params, opt = make(backend)
    w = params[9]
    loss = (w.float() ** 2).sum() * 0 + (w * w).sum()
    closure = closure_of(params, opt)
    closure()
    opt.first_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    versions = [p._version for p in params]
    closure()
    opt.second_step()
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "options", "sentence"),
    [
        (
            torch.optim.RMSprop,
            {},
            "RMSprop has no fused update, and its own step would move the weights alone",
        ),
        (torch.optim.Adam, {"amsgrad": True}, r"Adam\(amsgrad=True\) has no fused update"),
        (
            torch.optim.SGD,
            {"recipe": "multistep_sam"},
            "its probe, MultiStep, moves weights that are perturbed",
        ),
        (torch.optim.SGD, {"recipe": "sampa"}, "its probe, Anticipated"),
        (torch.optim.SGD, {"recipe": "cr_sam"}, "its probe, Mirrored"),
        (torch.optim.SGD, {"recipe": "r_sam"}, "its probe, RandomStart"),
        (torch.optim.SGD, {"recipe": "lookbehind_sam"}, "its probe, Lookbehind"),
        (torch.optim.SGD, {"recipe": recipes.ssam_f(compact=True)}, "compact snapshots were asked for"),
        (torch.optim.SGD, {"recipe": recipes.wsam()}, "moves the weights by a second gradient"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_at_construction(base, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SAM([Parameter(torch.ones(3, dtype=BF16))], base, lr=0.1, master_weights=True, **options)


def test_a_base_that_stops_being_fused_is_refused_in_words():
    params, opt = make()
    steps(params, opt)
    before = values(params)
    opt.base_optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match="step hooks are registered on the SGD itself"):
        opt.step(closure_of(params, opt))
    assert same_bits(params, before)


def test_options_that_make_no_sense():
    with pytest.raises(TypeError, match="master_weights is 1; expected True or False"):
        SAM([Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, master_weights=1)
    with pytest.raises(TypeError, match="two answers to one question"):
        SAM(
            [Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, master_weights=True, stochastic_rounding=True
        )


def test_backends_says_so():
    _, opt = make()
    assert "rounded from fp32 masters, no snapshots" in str(opt.backends())


# ---- checkpoints -----------------------------------------------------------------------------------


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_backend
@half
@every_base
def test_resumed_run_equals_the_uninterrupted_one(backend, dtype, base):
    params, opt = make(backend, dtype, base)
    steps(params, opt, 3)
    saved = through_a_file({"params": [p.detach() for p in params], "opt": opt.state_dict()})
    low = saved["opt"]["state"][9]
    assert all(x.dtype == F32 for x in low.values()) and "sam_master" in low
    steps(params, opt, 3, seed=5)
    other, resumed = make(backend, dtype, base, seed=4)
    with torch.no_grad():
        for p, x in zip(other, saved["params"], strict=True):
            p.copy_(x)
    resumed.load_state_dict(saved["opt"])
    resumed.load_state_dict(saved["opt"])
    steps(other, resumed, 3, seed=5)
    assert same_bits(params, other)
    assert same_bits(masters_of(params, opt), masters_of(other, resumed))
    for p, q in zip(params, other, strict=True):
        assert same_bits(opt.state[p].values(), resumed.state[q].values())


@every_base
def test_what_was_loaded_is_no_longer_the_checkpoint(base):
    params, opt = make(base=base)
    steps(params, opt, 2)
    saved = through_a_file(opt.state_dict())
    kept = copy.deepcopy(saved["state"])
    resumed_params, resumed = make(base=base)
    resumed.load_state_dict(saved)
    steps(resumed_params, resumed, 2)
    for number, entry in kept.items():
        large = {k: v for k, v in entry.items() if k != "step"}  # torch hands counters over as they are
        assert same_bits(large.values(), [saved["state"][number][k] for k in large])


@every_base
def test_a_checkpoint_without_masters_loads(base):
    kind, arguments, _ = base
    params = awkward_parameters(BF16)
    plain = kind(params, **arguments)
    closure_of(params, None)()
    plain.step()
    other, opt = make(base=base)
    with torch.no_grad():
        for p, q in zip(other, params, strict=True):
            p.copy_(q)
    opt.load_state_dict(through_a_file(plain.state_dict()))
    opt.refresh_masters()
    assert same_bits(masters_of(other, opt), [p.float() for p in params])
    for p, q in zip(params, other, strict=True):
        for name, x in plain.state[p].items():
            found = opt.state[q][name]
            assert found.dtype == F32 and torch.equal(found, x.float())
    steps(other, opt)
    assert_rounded(other, opt)


def test_a_checkpoint_with_masters_is_not_dropped_in_silence():
    params, opt = make()
    steps(params, opt)
    saved = opt.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = SAM(awkward_parameters(BF16), torch.optim.SGD, **SGD)
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(
        ValueError, match="holds fp32 masters .* build the optimizer with master_weights=True"
    ):
        plain.load_state_dict(saved)
    assert plain.state_dict()["state"] == before["state"] == {}
    for entry in saved["state"].values():
        entry.pop("sam_master")
    plain.load_state_dict(saved)  # as the sentence says
    wide = SAM(awkward_parameters(F32), torch.optim.SGD, master_weights=True, **SGD)
    with pytest.raises(ValueError, match="fp32 master .* of a parameter that is torch.float32 now"):
        wide.load_state_dict(opt.state_dict())


def test_a_checkpoint_before_the_first_step_has_masters_and_state_is_fp32():
    """torch's distributed checkpoint loads into a state that a step at rate 0 has made."""
    params, opt = make(base=BASES[1].values[0])
    assert all(entry["sam_master"].dtype == F32 for entry in opt.state_dict()["state"].values())
    before = values(params)
    for group in opt.param_groups:
        group["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    opt.step()  # with the state of the first
    assert same_bits(params, before)
    for entry in opt.state_dict()["state"].values():
        assert entry["exp_avg"].dtype == entry["exp_avg_sq"].dtype == entry["sam_master"].dtype == F32


def test_a_copy_has_masters_of_its_own():
    params, opt = make()
    steps(params, opt)
    twin = copy.deepcopy(opt)
    own = [p for group in twin.param_groups for p in group["params"]]
    exact = [m.clone() for m in masters_of(params, opt)]
    steps(own, twin, 2)
    assert same_bits(masters_of(params, opt), exact)
    assert_rounded(own, twin)


def test_lists_of_closures_and_added_groups():
    params, opt = make()
    parts = [closure_of(params, opt, seed=s) for s in (1, 2)]

    def adding(part):
        def closure():
            before = [p.grad for p in params]
            part()
            for p, g in zip(params, before, strict=True):
                if g is not None:
                    g += p.grad
                    p.grad = g
            return 0.0

        return closure

    parts = [adding(part) for part in parts]
    opt.step(parts)
    assert_rounded(params, opt)
    opt.step(parts, m_sharpness=True)
    assert_rounded(params, opt)
    more = Parameter(torch.randn(5).to(BF16))
    opt.add_param_group({"params": [more]})
    steps([*params, more], opt)
    assert_rounded([*params, more], opt)


@every_base
def test_distributed_checkpoints_keep_masters_and_wide_state(base):
    """Torch's own way: state by name, loaded into an optimizer that has taken no step."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def fresh(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).to(BF16)
        kind, arguments, _ = base
        return model, SAM(model.parameters(), kind, rho=0.1, master_weights=True, **arguments)

    model, opt = fresh(0)
    steps(list(model.parameters()), opt, 3)
    saved = through_a_file({"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)})
    other, resumed = fresh(1)
    other.load_state_dict(saved["model"])
    set_optimizer_state_dict(other, resumed, saved["opt"])
    for each, own in ((model, opt), (other, resumed)):
        steps(list(each.parameters()), own, 2, seed=9)
    assert same_bits(model.parameters(), other.parameters())
    both = [masters_of(list(m.parameters()), o) for m, o in ((model, opt), (other, resumed))]
    assert same_bits(*both)


@every_base
@pytest.mark.parametrize("recipe", ["sam", "asam", "msam", "friendly_sam", "ssam_d"])
def test_a_native_step_allocates_nothing_but_masters_and_state(base, recipe):
    """No snapshot in the first step, and nothing of a parameter's size from the second on."""
    params = [Parameter(torch.randn(64, 65).to(BF16)), Parameter(torch.randn(4097).to(BF16))]
    pool = itertools.cycle([[torch.randn_like(p) for p in params] for _ in range(4)])
    kind, arguments, _ = base
    more = (
        {"recipe": recipe}
        if recipe == "sam"
        else {"recipe": recipes.asam(only=None) if recipe == "asam" else recipes.get(recipe)}
    )
    opt = SAM(params, kind, backend="native", master_weights=True, **more, **arguments)

    def closure():
        for p, g in zip(params, next(pool), strict=True):
            p.grad = g
        return 0.0

    with Allocations(least=4097) as seen:
        opt.step(closure)
    if recipe == "sam":
        state = 1 if kind is torch.optim.SGD else 2
        assert sum(name.startswith("empty") for name, _ in seen.found) == 2 * (1 + state)
    opt.step(closure)
    with Allocations(least=4097) as seen:
        for _ in range(3):
            opt.step(closure)
    assert seen.found == []
    ((group, _),) = opt._groups()
    assert (group.buffer_bytes() == 0) == (recipe in ("sam", "asam", "ssam_d"))


def test_weights_in_other_memory_are_followed():
    w = Parameter(torch.zeros(5, dtype=torch.bfloat16))
    opt = SAM([w], torch.optim.SGD, lr=0.0, master_weights=True)

    def closure():
        loss = (w.float() ** 2).sum()
        loss.backward()
        return loss

    opt.step(closure)
    w.data = torch.full((5,), 7.0, dtype=torch.bfloat16)
    opt.step(closure)
    assert w.tolist() == [7.0] * 5


class OwnMasters(torch.optim.Optimizer):
    """A base that steps by itself, through fp32 masters of its own."""

    master_weights = True

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "master_param" not in self.state[p]:
                    self.state[p]["master_param"] = p.detach().float()
                master = self.state[p]["master_param"]
                master -= group["lr"] * p.grad.float()
                p.copy_(master)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_of_the_base_are_perturbed_from_and_restored_to(backend, dtype):
    torch.manual_seed(5)
    shapes, lr, rho = [(33,), (), (0,), (4, 5)], 2.0**-6, 0.01
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    opt = SAM(params, OwnMasters, rho=rho, lr=lr, master_weights=True, backend=backend)
    masters = [p.detach().float().double() for p in params]
    for step in range(4):
        first, second = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
        for p, g in zip(params, first, strict=True):
            p.grad = g.clone()
        opt.first_step(zero_grad=True)
        norm = sum(float((g.double() ** 2).sum()) for g in first) ** 0.5
        for p, m, g in zip(params, masters, first, strict=True):
            torch.testing.assert_close(p.detach(), (m + rho / norm * g.double()).float().to(dtype))
        for p, g in zip(params, second, strict=True):
            p.grad = g.clone()
        if step == 2:  # given up: back to the masters, bit for bit
            opt._abandon()
        else:
            opt.step()
            masters = [(m - lr * g.double()).float().double() for m, g in zip(masters, second, strict=True)]
        assert same_bits(params, [m.float().to(dtype) for m in masters])
    assert all("sam_master" not in entry for entry in opt.state_dict()["state"].values())
    assert any(not torch.equal(m.float(), m.to(dtype).float()) for m in masters), "they have low bits"
