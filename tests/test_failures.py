"""A pass that fails at any point leaves the weights as they were: also where directions lie in snapshots."""

from __future__ import annotations

import pytest
import torch
from fixtures import backends, same_bits, values

from sam_kernels import SAM, Recipe, recipes
from sam_kernels.policies import Ema, Friendly, RandomStart

PASSES = ("sq_norm", "perturb_", "combine_", "grad_stats", "noise_", "descend_")
RECIPES = (
    recipes.sam(0.5),
    recipes.friendly_sam(0.5),
    recipes.rand_sam(0.5),
    recipes.r_sam(0.5),
    recipes.r_sam(0.5, keep_noise=False),
    Recipe(direction=Friendly(), probe=RandomStart(), rho=0.5),
    Recipe(direction=Ema(0.5), probe=RandomStart(keep_noise=False), rho=0.5),
    recipes.multistep_sam(0.5),
    recipes.cr_sam(0.5),
    recipes.gsam(0.5),
    recipes.lookbehind_sam(0.5),
)


class Failing:
    """A backend of which the n-th call of a pass raises, before it has run or after."""

    def __init__(self, backend, name, number, after, problem):
        self._backend, self._name, self._left = backend, name, number
        self._after, self._problem = after, problem
        self.name = backend.name
        self.calls = 0

    def __getattr__(self, name):
        run = getattr(self._backend, name)
        if name != self._name:
            return run

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self._left and not self._after:
                raise self._problem
            result = run(*args, **kwargs)
            if self.calls == self._left:
                raise self._problem
            return result

        return call


@pytest.mark.parametrize(
    "backend", [b for b in backends() if b.values[0] in ("reference", "foreach", "native")]
)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.name}-{type(r.probe).__name__}")
@pytest.mark.parametrize("problem", [MemoryError, KeyboardInterrupt])
def test_weights_come_back_whatever_fails(backend, recipe, problem):
    generator = torch.Generator().manual_seed(5)
    shapes, kinds = ((9,), (4, 3), (17,)), (torch.float32, torch.float64, torch.float32)
    for name in PASSES:
        for number in (1, 2, 4):
            for after in (False, True):
                params = [
                    torch.nn.Parameter(torch.randn(s, generator=generator, dtype=k))
                    for s, k in zip(shapes, kinds, strict=True)
                ]
                opt = SAM(params, torch.optim.SGD, recipe=recipe, backend=backend, lr=0.0, momentum=0.9)

                def closure(params=params):
                    sum((p.double() ** 4).sum() for p in params).backward()
                    return 0.0

                opt.step(closure)  # with lr 0 nothing moves, and all state is there
                before = values(params)
                failing = [
                    (group, Failing(chosen, name, number, after, problem()))
                    for group, chosen in opt._groups()
                ]
                opt._served = failing
                try:
                    opt.step(closure)
                except problem:
                    pass
                assert same_bits(before, params), (name, number, after)
                opt._served = [(group, wrapped._backend) for group, wrapped in failing]
                opt.allow_plain_step = True
                opt.step()  # a plain one: nothing of the failed step is left for it
                assert same_bits(before, params), (name, number, after, "next step")
