"""torch.compile (F5): one graph of a compiled model serves all passes of all steps."""

from __future__ import annotations

import pytest
import torch
from fixtures import assert_close, batches, small_net, squared_error, values
from torch import nn
from torch._dynamo.testing import CompileCounter

from sam_kernels import SAM, recipes

INPUTS = batches(4, 4, 5)
BASES = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def train(model, run, base="sgd", form="closure", **options):
    kind, arguments = BASES[base]
    opt = SAM(model.parameters(), kind, lr=0.05, model=model, **arguments, **options)
    losses = []
    for step, x in enumerate(INPUTS):

        def backward(x=x, step=step):
            loss = squared_error(run(x), step)
            loss.backward()
            return loss.detach()

        if form == "closure":
            losses.append(opt.step(backward))
            continue
        opt.zero_grad()
        losses.append(backward())
        opt.first_step(zero_grad=True)
        backward()
        opt.step()
    return [*values(model.parameters()), *losses]


@pytest.mark.parametrize("form", ["closure", "two-step"])
@pytest.mark.parametrize("base", BASES)
def test_f5_one_graph_and_no_recompilation(base, form, counter):
    plain, model = small_net(), small_net()
    got = train(model, torch.compile(model, backend=counter, fullgraph=True), base, form)
    assert counter.frame_count == 1
    assert_close(got, train(plain, plain, base, form), 1e-12)


@pytest.mark.parametrize(
    "name",
    ["cr_sam", "gsam", "lookbehind_sam", "looksam", "multistep_sam", "r_sam", "rand_sam", "vasso", "wsam"],
)
def test_f5_recipes_of_other_passes_need_no_other_graph(name, counter):
    plain, model = small_net(), small_net()
    options = {"recipe": recipes.get(name)}
    got = train(model, torch.compile(model, backend=counter, fullgraph=True), **options)
    assert counter.frame_count == 1
    assert_close(got, train(plain, plain, **options), 1e-12)


def test_f5_batch_norm_and_dropout_kept_for_all_passes(counter):
    def build():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()

    plain, model = build(), build()
    torch.manual_seed(1)
    got = train(model, torch.compile(model, backend=counter, fullgraph=True), rng="replay")
    torch.manual_seed(1)
    expected = train(plain, plain, rng="replay")
    assert counter.frame_count == 1
    assert_close(got, expected, 1e-12)
    assert_close(model[1].buffers(), plain[1].buffers(), 1e-12)
    assert model[1].num_batches_tracked.item() == len(INPUTS)


def test_f5_a_compiled_loss_under_autograd_of_its_own(counter):
    """aot_eager traces the backward too; weights that moved between passes are read anew."""
    plain, model = small_net(), small_net()
    torch._dynamo.reset()
    assert_close(train(model, torch.compile(model, backend="aot_eager")), train(plain, plain), 1e-12)
