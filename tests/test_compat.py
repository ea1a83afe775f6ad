"""The drop-in classes: numbers, order of arguments, closure rule, errors and checkpoints of the originals."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from fixtures import same_bits, values
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

import sam_kernels
from sam_kernels.compat import davda54, pytorch_optimizer

try:
    import pytorch_optimizer as original
except ImportError:
    original = None

needs_original = pytest.mark.skipif(original is None, reason="the package pytorch-optimizer is not installed")
both = pytest.mark.parametrize("module", [davda54, pytorch_optimizer], ids=["davda54", "pytorch_optimizer"])

STEPS = 5


class Problem:
    """A small network with weights of two, one and four dimensions, and batches that differ by step."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        self.model = nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
        ).to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) / 2)
        self.xs = torch.randn(STEPS, 8, 16, generator=generator, dtype=dtype)
        self.ys = torch.randn(STEPS, 8, 2, generator=generator, dtype=dtype)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self, step: int) -> torch.Tensor:
        return (self.model(self.xs[step]) - self.ys[step]).square().mean()

    def gradients(self, step: int) -> list[torch.Tensor]:
        return [g.clone() for g in torch.autograd.grad(self.loss(step), self.params)]

    def groups(self) -> list[dict]:
        """The convolution as it comes; the linear layer with a rho, lr and metric of its own."""
        first, second = self.params[:2], self.params[2:]
        return [{"params": first}, {"params": second, "rho": 0.2, "adaptive": True, "lr": 0.03}]


def train(opt: Optimizer, problem: Problem, steps: range = range(STEPS)) -> list[torch.Tensor]:
    """Train as users of the one-call classes do."""
    for step in steps:

        def closure(step: int = step) -> torch.Tensor:
            loss = problem.loss(step)
            loss.backward()
            return loss

        closure()
        opt.step(closure)
        opt.zero_grad()
    return values(problem.params)


def derived(problem: Problem, *, adaptive: bool, two_groups: bool, eps: float = 1e-12, use_gc: bool = False):
    """SAM around SGD with momentum 0.9 and weight decay 0.01, written down once more, by hand."""
    params = problem.params
    rho, lr = [0.1] * len(params), [0.05] * len(params)
    scaled = [adaptive] * len(params)
    if two_groups:
        rho[2:], lr[2:], scaled[2:] = [0.2] * 2, [0.03] * 2, [True] * 2
    momentum = [None] * len(params)
    for step in range(STEPS):
        grads = problem.gradients(step)
        before = values(params)
        total = 0.0
        for w, g, s in zip(before, grads, scaled, strict=True):
            total += float(((w.abs() * g) if s else g).pow(2).sum())
        norm = total**0.5 + eps
        with torch.no_grad():
            for p, w, g, s, r in zip(params, before, grads, scaled, rho, strict=True):
                if use_gc and g.ndim > 1:
                    g = g - g.flatten(1).mean(1).view(-1, *[1] * (g.ndim - 1))
                p.copy_(w + r / norm * (w * w * g if s else g))
        grads = problem.gradients(step)
        with torch.no_grad():
            for i, (p, w, g) in enumerate(zip(params, before, grads, strict=True)):
                g = g + 0.01 * w
                momentum[i] = g if momentum[i] is None else 0.9 * momentum[i] + g
                p.copy_(w - lr[i] * momentum[i])
    return values(params)


BASE = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"lr": 0.02, "weight_decay": 0.1}


# ---- the same numbers ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("two_groups", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_numbers_are_those_of_the_formula(module, adaptive, two_groups):
    expected = derived(Problem(), adaptive=adaptive, two_groups=two_groups)
    problem = Problem()
    opt = module.SAM(problem.groups() if two_groups else problem.params, SGD, 0.1, adaptive, **BASE)
    # float64 throughout; sums are taken in another order.
    torch.testing.assert_close(train(opt, problem), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_centralized_gradients_are_those_of_the_formula(adaptive):
    expected = derived(Problem(), adaptive=adaptive, two_groups=True, use_gc=True)
    problem = Problem()
    opt = pytorch_optimizer.SAM(problem.groups(), SGD, rho=0.1, adaptive=adaptive, use_gc=True, **BASE)
    torch.testing.assert_close(train(opt, problem), expected, rtol=1e-10, atol=1e-12)
    assert not same_bits(expected, derived(Problem(), adaptive=adaptive, two_groups=True))


def test_perturb_eps_is_added_to_the_norm():
    expected = derived(Problem(), adaptive=False, two_groups=False, eps=0.5)
    problem = Problem()
    opt = pytorch_optimizer.SAM(problem.params, SGD, 0.1, perturb_eps=0.5, **BASE)
    torch.testing.assert_close(train(opt, problem), expected, rtol=1e-10, atol=1e-12)


@needs_original
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("use_gc", [False, True], ids=["raw", "centralized"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("base, options", [(SGD, BASE), (AdamW, ADAMW)], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("two_groups", [False, True], ids=["one group", "two groups"])
def test_numbers_are_those_of_the_installed_package(two_groups, base, options, adaptive, use_gc, foreach):
    trained = []
    for kind in (original.SAM, pytorch_optimizer.SAM):
        problem = Problem(torch.float32)
        params = problem.groups() if two_groups else problem.params
        opt = kind(params, base, 0.1, adaptive, use_gc, 1e-12, foreach, **options)
        trained.append(train(opt, problem))
    # fp32 on both sides: a few units in the last place of a step, five steps.
    torch.testing.assert_close(trained[1], trained[0], rtol=2e-5, atol=2e-6)


@both
def test_two_calls_are_the_closure_in_two_halves(module):
    by_closure, by_halves = Problem(), Problem()
    expected = train(module.SAM(by_closure.params, SGD, **BASE), by_closure)
    opt = module.SAM(by_halves.params, SGD, **BASE)
    for step in range(STEPS):
        by_halves.loss(step).backward()
        opt.first_step(True)
        by_halves.loss(step).backward()
        opt.second_step(zero_grad=True)
    assert same_bits(values(by_halves.params), expected)


@both
def test_parameters_return_in_place(module):
    problem = Problem()
    addresses = [p.data_ptr() for p in problem.params]
    train(module.SAM(problem.params, SGD, **BASE), problem)
    assert [p.data_ptr() for p in problem.params] == addresses


# ---- the closure rule ------------------------------------------------------------------------------


@both
def test_the_closure_is_called_once_with_grad_mode_and_cleared_gradients(module):
    problem = Problem()
    opt = module.SAM(problem.params, SGD, rho=0.5, lr=0.1)
    before = values(problem.params)
    seen = []

    def closure():
        seen.append((torch.is_grad_enabled(), [p.grad for p in problem.params], values(problem.params)))
        problem.loss(0).backward()
        return 7.0

    problem.loss(0).backward()
    with torch.no_grad():
        returned = opt.step(closure)
    assert returned is None
    ((grad_mode, grads, inside),) = seen
    assert grad_mode
    assert all(g is None or not g.any() for g in grads)
    moved = torch.cat([(a - b).flatten() for a, b in zip(inside, before, strict=True)])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.5, dtype=torch.float64))


@both
def test_gradients_of_the_second_pass_are_left_for_the_caller(module):
    problem = Problem()
    opt = module.SAM(problem.params, SGD, lr=0.1)
    problem.loss(0).backward()
    opt.step(lambda: problem.loss(1).backward())
    assert all(p.grad is not None for p in problem.params)


@both
def test_a_closure_that_raises_leaves_the_weights(module):
    problem = Problem()
    opt = module.SAM(problem.params, SGD, **BASE)
    before = values(problem.params)

    def out_of_memory():
        raise MemoryError

    problem.loss(0).backward()
    with pytest.raises(MemoryError):
        opt.step(out_of_memory)
    assert same_bits(values(problem.params), before)
    train(opt, problem)  # and the next step is an ordinary one


@both
def test_hooks_fire_once_and_schedulers_do_not_warn(module):
    problem = Problem()
    opt = module.SAM(problem.params, SGD, **BASE)
    scheduler = StepLR(opt, 1, gamma=0.5)
    calls = []
    opt.register_step_post_hook(lambda *args: calls.append("after"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(opt, problem, range(1))
        scheduler.step()
    assert calls == ["after"]
    assert opt.base_optimizer.param_groups[0]["lr"] == 0.025


@both
def test_step_without_a_closure_finishes_a_pending_first_step(module):
    problem, twin = Problem(), Problem()
    opt = module.SAM(problem.params, SGD, **BASE)
    problem.loss(0).backward()
    opt.first_step(zero_grad=True)
    problem.loss(0).backward()
    opt.step()
    assert same_bits(values(problem.params), train(module.SAM(twin.params, SGD, **BASE), twin, range(1)))


def test_missing_closure_is_an_error_with_a_sentence():
    problem = Problem()
    problem.loss(0).backward()
    for kinds in (AssertionError, RuntimeError):
        with pytest.raises(kinds, match="needs a closure"):
            davda54.SAM(problem.params, SGD, lr=0.1).step()
    with pytest.raises(pytorch_optimizer.NoClosureError, match="SAM requires closure"):
        pytorch_optimizer.SAM(problem.params, SGD, lr=0.1).step()


@needs_original
def test_missing_closure_is_the_installed_packages_own_error():
    from pytorch_optimizer.base.exception import NoClosureError

    opt = pytorch_optimizer.SAM(Problem().params, SGD, lr=0.1)
    with pytest.raises(NoClosureError):
        opt.step(None)


@both
def test_a_step_at_learning_rate_zero_creates_state(module):
    """torch's distributed checkpoint asks for it this way, and neither original can answer."""
    problem = Problem()
    opt = module.SAM(problem.params, AdamW, lr=0.0)
    before = values(problem.params)
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    opt.step(closure=None)
    assert same_bits(values(problem.params), before)
    assert set(opt.state) == set(problem.params)


@both
def test_plain_steps_are_for_those_who_ask(module):
    problem, twin = Problem(), Problem()
    opt = module.SAM(problem.params, SGD, allow_plain_step=True, **BASE)
    base = SGD(twin.params, **BASE)
    for each, of in ((problem, opt), (twin, base)):
        each.loss(0).backward()
        of.step()
    torch.testing.assert_close(values(problem.params), values(twin.params), rtol=1e-12, atol=1e-14)


# ---- construction ----------------------------------------------------------------------------------


def test_positional_order():
    names = list(inspect.signature(davda54.SAM).parameters)
    assert names[:4] == ["params", "base_optimizer", "rho", "adaptive"]
    assert inspect.signature(davda54.SAM).parameters["rho"].default == 0.05


@needs_original
def test_positional_order_and_defaults_of_the_installed_package():
    theirs = list(inspect.signature(original.SAM).parameters.values())[:-1]
    ours = inspect.signature(pytorch_optimizer.SAM).parameters
    for parameter, name in zip(theirs, ours, strict=False):
        assert parameter.name == name
        assert parameter.default == ours[name].default
        assert ours[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@both
def test_groups_are_shared_and_carry_rho_and_adaptive(module):
    problem = Problem()
    opt = module.SAM(problem.groups(), SGD, 0.1, **BASE)
    assert isinstance(opt, sam_kernels.SAM) and isinstance(opt, Optimizer)
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert [(g["rho"], g["adaptive"]) for g in opt.param_groups] == [(0.1, False), (0.2, True)]
    assert isinstance(opt.base_optimizer, SGD)
    assert opt.defaults["momentum"] == 0.9


@both
def test_a_base_of_your_own(module):
    class Halving(Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.5)

    problem = Problem()
    before = values(problem.params)
    opt = module.SAM(problem.params, Halving, lr=1.0)
    train(opt, problem, range(1))
    assert same_bits(values(problem.params), [0.5 * w for w in before])


def test_negative_rho():
    params = Problem().params
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match="rho is -0.1"):
            davda54.SAM(params, SGD, rho=-0.1, lr=0.1)
    with pytest.raises(ValueError, match="rho is -0.1"):
        pytorch_optimizer.SAM(params, SGD, rho=-0.1, lr=0.1)
    with pytest.raises(ValueError, match="eps is -1"):
        pytorch_optimizer.SAM(params, SGD, perturb_eps=-1.0, lr=0.1)


def test_arguments_of_the_family_are_tolerated():
    params = Problem().params
    opt = pytorch_optimizer.SAM(params, SGD, lr=0.1, model=None, num_data=1)
    assert str(opt) == "SAM"
    assert "lr: 0.1" in repr(opt)
    group = {"params": []}
    opt.init_group(group)
    opt.init_group(group, updates=[])
    assert group["step"] == 0


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_reaches_a_base_that_has_it(foreach):
    opt = pytorch_optimizer.SAM(Problem().params, SGD, foreach=foreach, lr=0.1)
    assert opt.param_groups[0]["foreach"] is foreach


def test_foreach_is_no_error_for_a_base_without_it():
    opt = pytorch_optimizer.SAM(Problem().params, torch.optim.SparseAdam, foreach=True, lr=0.1)
    assert isinstance(opt.base_optimizer, torch.optim.SparseAdam)


# ---- checkpoints -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("base, options", [(SGD, BASE), (AdamW, ADAMW)], ids=["SGD", "AdamW"])
def test_a_resumed_run_continues_bit_for_bit(module, base, options):
    straight, resumed = Problem(), Problem()
    expected = train(module.SAM(straight.params, base, **options), straight)
    train(opt := module.SAM(resumed.params, base, **options), resumed, range(2))
    saved = copy.deepcopy(opt.state_dict())
    fresh = module.SAM(resumed.params, base, **{**options, "lr": 99.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(saved)
    assert same_bits(train(fresh, resumed, range(2, STEPS)), expected)


def old_checkpoint(opt: Optimizer) -> dict:
    """What davda54/sam writes: the copies of the weights, the groups, and no state of the base."""
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {i: {"old_p": p.detach().clone()} for i, p in enumerate(Problem().params)}
    for group in saved["param_groups"]:
        group.pop("sam_step", None)
        group["lr"] = 0.007
    return saved


@both
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_a_checkpoint_of_weight_copies_loads_without_them(module, base):
    problem, twin = Problem(), Problem()
    opt = module.SAM(problem.params, base, lr=0.05)
    with pytest.warns(UserWarning, match="copies of the weights"):
        opt.load_state_dict(old_checkpoint(opt))
    assert not opt.state
    assert opt.param_groups[0]["lr"] == 0.007
    expected = train(module.SAM(twin.params, base, lr=0.007), twin)
    assert same_bits(train(opt, problem), expected)


@both
def test_weight_copies_beside_real_state_go_quietly(module):
    problem = Problem()
    opt = module.SAM(problem.params, SGD, **BASE)
    train(opt, problem, range(2))
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        entry["old_p"] = torch.zeros(3)
    fresh = module.SAM(problem.params, SGD, **BASE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(saved)
    assert all(set(entry) == {"momentum_buffer"} for entry in fresh.state.values())
    assert "old_p" in saved["state"][0], "the caller's checkpoint was changed"


def test_checkpoints_with_and_without_a_base_optimizer_key():
    straight = Problem()
    expected = train(pytorch_optimizer.SAM(straight.params, SGD, 0.1, **BASE), straight)
    for nested in (False, True):
        problem = Problem()
        opt = pytorch_optimizer.SAM(problem.params, SGD, 0.1, **BASE)
        train(opt, problem, range(2))
        saved = copy.deepcopy(opt.state_dict())
        if nested:
            inner = copy.deepcopy(saved)
            for group in inner["param_groups"]:
                del group["rho"], group["adaptive"]
            saved = {"state": {}, "param_groups": saved["param_groups"], "base_optimizer": inner}
        fresh = pytorch_optimizer.SAM(problem.params, SGD, 0.3, **BASE)
        fresh.load_state_dict(saved)
        assert fresh.param_groups[0]["rho"] == 0.1
        assert same_bits(train(fresh, problem, range(2, STEPS)), expected)


@needs_original
def test_a_checkpoint_of_the_installed_package_continues():
    straight, resumed = Problem(torch.float32), Problem(torch.float32)
    expected = train(original.SAM(straight.params, SGD, 0.1, **BASE), straight)
    train(opt := original.SAM(resumed.params, SGD, 0.1, **BASE), resumed, range(2))
    ours = pytorch_optimizer.SAM(resumed.params, SGD, 0.5, **BASE)
    ours.load_state_dict(copy.deepcopy(opt.state_dict()))
    torch.testing.assert_close(train(ours, resumed, range(2, STEPS)), expected, rtol=2e-5, atol=2e-6)


@needs_original
def test_the_installed_package_loads_ours():
    straight, resumed = Problem(torch.float32), Problem(torch.float32)
    expected = train(original.SAM(straight.params, SGD, 0.1, **BASE), straight)
    train(opt := pytorch_optimizer.SAM(resumed.params, SGD, 0.1, **BASE), resumed, range(2))
    theirs = original.SAM(resumed.params, SGD, 0.5, **BASE)
    theirs.load_state_dict(copy.deepcopy(opt.state_dict()))
    torch.testing.assert_close(train(theirs, resumed, range(2, STEPS)), expected, rtol=2e-5, atol=2e-6)


@both
def test_copies_and_pickles_keep_the_class(module):
    problem = Problem()
    opt = module.SAM(problem.params, SGD, **BASE)
    train(opt, problem, range(2))
    twin = copy.deepcopy(opt)
    assert type(twin) is module.SAM
    assert twin.base_optimizer.param_groups is twin.param_groups


@both
def test_a_closure_without_a_backward_before_it_names_the_rule(module):
    problem = Problem()
    opt = module.SAM(problem.params, SGD, **BASE)
    before, calls = values(problem.params), []

    def closure() -> torch.Tensor:
        calls.append(1)
        loss = problem.loss(0)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"called once.*after your own backward.*backward\(\) before step"):
        opt.step(closure)
    assert not calls
    assert same_bits(values(problem.params), before)
    closure()
    opt.step(closure)
    assert not same_bits(values(problem.params), before)


def test_a_subclass_may_prepare_the_gradients_between_norm_and_perturbation() -> None:
    class Halved(sam_kernels.SAM):
        def _prepare_gradients(self, served) -> None:
            for group, _ in served:
                for grad in group.grads:
                    grad.mul_(0.5)

    w = nn.Parameter(torch.zeros(2))
    opt = Halved([w], SGD, rho=1.0, lr=0.1)
    w.grad = torch.tensor([3.0, 4.0])
    opt.first_step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.3, 0.4]))
