"""What recipes cost: the README says what is counted, and a step allocates nothing after the first."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from fixtures import every_backend
from torch.utils._python_dispatch import TorchDispatchMode

from sam_kernels import SAM, recipes
from sam_kernels.costs import cost

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| .* \| ([\d.or ]+) \| ([\d.or ]+) \| ([\d.or ]+) \|$", README, re.MULTILINE)


def spelled(*costs) -> str:
    first, second = (None if c is None else f"{round(c, 1):g}" for c in (*costs, None)[:2])
    return first if second in (None, first) else f"{first} or {second}"


def test_readme_has_a_row_for_every_recipe():
    assert sorted(name for name, *_ in ROWS) == recipes.names()


@pytest.mark.parametrize("name", recipes.names())
def test_readme_says_what_is_counted(name):
    perturbs, other = cost(recipes.get(name))
    written = {row[0]: row[1:] for row in ROWS}[name]
    counted = [
        spelled(*(None if c is None else getattr(c, field) for c in (perturbs, other)))
        for field in ("gradients", "bytes", "memory")
    ]
    assert list(written) == counted


def test_the_ideal_steps_move_what_the_design_says():
    """4 bytes for the norm, 16 for the perturbation, 20 for SGD's update and 28 for Adam's."""
    assert cost(recipes.sam())[0].bytes == 40
    assert cost(recipes.sam(), torch.optim.AdamW)[0].bytes == 48
    assert cost(recipes.sam())[0].passes == {"sq_norm": 1, "perturb_": 1, "descend_": 1}


def test_table_prints_every_recipe_in_a_line():
    lines = str(recipes.table()).splitlines()
    assert [line.split()[0] for line in lines[1:]] == recipes.names()


class Allocations(TorchDispatchMode):
    """Collects the sizes of new tensors as large as a parameter."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        made = name in ("empty", "empty_like", "new_empty", "clone", "zeros", "zeros_like", "empty_strided")
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if made and isinstance(x, torch.Tensor) and x.numel() >= self.least:
                self.found.append((name, tuple(x.shape)))
        return result


@pytest.mark.parametrize("name", recipes.names())
def test_a_native_step_allocates_nothing_after_the_first(name):
    """But scalars and coefficients: nothing of a parameter's size."""
    params = [torch.nn.Parameter(torch.randn(64, 65)), torch.nn.Parameter(torch.randn(4097))]
    named = [("norm.weight", params[0]), ("b.weight", params[1])]
    # Gradients of two passes never share memory; nor do those of the parts of a step.
    pool = itertools.cycle([[torch.randn_like(p) for p in params] for _ in range(4)])
    try:
        opt = SAM(named, torch.optim.SGD, recipe=name, backend="native", lr=0.01, momentum=0.9)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))

    def closure():
        for p, g in zip(params, next(pool), strict=True):
            p.grad = g
        return 0.0

    more = {"ahead": closure} if name == "sampa" else {}
    for _ in range(7):  # one period of every default
        opt.step(closure, **more)
    with Allocations(least=4097) as seen:
        for _ in range(7):
            opt.step(closure, **more)
    assert seen.found == []


@every_backend
def test_clipping_comes_after_the_combination(backend):
    """The bound holds for what the base gets, not for the gradients that it is made of."""

    def run(bound, base):
        generator = torch.Generator().manual_seed(3)
        w = torch.nn.Parameter(torch.randn(9, generator=generator))
        opt = SAM([w], base, recipe=recipes.gsam(0.3), lr=1.0, backend=backend, max_grad_norm=bound)

        def closure():
            loss = (w**4).sum()
            loss.backward()
            return loss

        before = w.detach().clone()
        opt.step(closure)
        return before - w.detach()

    free = run(None, torch.optim.SGD)
    clipped = run(0.25, torch.optim.SGD)
    assert free.norm() > 1
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.25), rtol=1e-5, atol=0)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-4, atol=1e-6)
    assert torch.equal(run(1e6, torch.optim.SGD), free)
    # A base that steps by itself is given the clipped gradient.
    torch.testing.assert_close(run(0.25, torch.optim.ASGD), clipped, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_impossible_bound_is_a_sentence(bound):
    with pytest.raises(ValueError, match="max_grad_norm"):
        SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, max_grad_norm=bound)


@pytest.mark.parametrize("m_sharpness", [False, True])
def test_statistics_of_batches_in_parts_are_those_of_the_first_pass(m_sharpness):
    def run(with_sam):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        parts = torch.randn(2, 8, 3)
        closures = [lambda x=x: model(x).square().mean().backward() for x in parts]
        if with_sam:
            opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
            opt.step(closures, m_sharpness=m_sharpness)
        else:
            for closure in closures:
                closure()
        return model[1].running_mean, model[1].running_var, model[1].num_batches_tracked

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_the_second_pass_sees_perturbed_weights_under_autocast_around_the_step():
    """Autocast keeps casts of weights for as long as it lasts, and these weights move inside."""
    model = torch.nn.Linear(8, 8)
    x, seen = torch.randn(4, 8), []
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1.0, lr=0.0)

    def closure():
        out = model(x)
        seen.append(out.detach().float())
        out.float().square().sum().backward()
        return out.sum()

    with torch.autocast("cpu", torch.bfloat16):
        opt.step(closure)
    assert len(seen) == 2
    assert (seen[0] - seen[1]).abs().max() > 0.1


@every_backend
@pytest.mark.parametrize(
    "recipe", [recipes.gsam(0.1), recipes.wsam(0.1), recipes.cr_sam(0.1)], ids=lambda r: r.name
)
def test_gradients_written_over_those_that_are_needed_are_noticed(backend, recipe):
    """A closure with static gradient buffers, as a CUDA graph has them."""
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    static = torch.empty(3)
    opt = SAM([w], torch.optim.SGD, recipe=recipe, backend=backend, lr=0.1)

    def closure():
        static.copy_(4 * w.detach() ** 3)
        w.grad = static
        return 0.0

    with pytest.raises(RuntimeError, match="copies_gradients"):
        opt.step(closure)
    assert torch.equal(w.detach(), torch.tensor([1.0, -2.0, 3.0]))
    opt.copies_gradients = True
    opt.step(closure)

    other = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    plain = SAM([other], torch.optim.SGD, recipe=recipe, backend=backend, lr=0.1)
    plain.step(lambda: (other**4).sum().backward())
    torch.testing.assert_close(w.detach(), other.detach())
