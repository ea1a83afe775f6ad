"""accelerate: prepare() before and after, micro-batches, and parameters that are exchanged for others."""

from __future__ import annotations

import pytest
import ranks
import references
import torch
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from sam_kernels import SAM
from sam_kernels.trainers import accelerate as ours

accelerate = pytest.importorskip(
    "accelerate", reason="accelerate is not installed: make test-trainers does so"
)

RHO, LR, BATCH, BATCHES = 0.3, 0.2, 4, 6
X, Y = references.data(BATCH * BATCHES)
DATA = list(zip(X.split(BATCH), Y.split(BATCH), strict=True))
BASES = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, eps=1e-3),  # no fused update
}


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerators of one process share what the first was told."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def sam(model, base="sgd"):
    return SAM.wrap(BASES[base](model.parameters()), rho=RHO)


def reference(k, base="sgd", data=DATA):
    model = references.network()
    steps = [
        [lambda x=x, y=y, n=len(window): cross_entropy(model(x), y) / n for x, y in window]  # noqa: B008
        for window in references.windows(data, k)
    ]
    references.train(model, BASES[base](model.parameters()), steps, rho=RHO)
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("order", ["together", "model first", "optimizer first"])
def test_prepared_before_or_after(order, base):
    accelerator = accelerate.Accelerator(cpu=True)
    model = references.network()
    if order == "together":
        prepared, optimizer = accelerator.prepare(model, sam(model, base))
    elif order == "model first":
        prepared = accelerator.prepare(model)
        optimizer = accelerator.prepare(sam(prepared, base))
    else:
        optimizer = accelerator.prepare(sam(model, base))
        prepared = accelerator.prepare(model)
    for x, y in DATA:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = cross_entropy(prepared(x), y)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    assert references.largest_difference(model, reference(1, base)) <= 1e-13


@pytest.mark.parametrize("steps_of_the_accelerator", [1, 4])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_micro_batches_are_one_batch(k, steps_of_the_accelerator):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps_of_the_accelerator)
    model = references.network()
    prepared, optimizer = accelerator.prepare(model, sam(model))
    for window in references.windows(DATA, k):
        before = [cross_entropy(model(x), y).detach() for x, y in window]
        losses = ours.step(
            accelerator, optimizer, prepared, lambda b: cross_entropy(prepared(b[0]), b[1]), window
        )
        assert all(torch.equal(a, b) for a, b in zip(losses, before, strict=True))
    assert references.largest_difference(model, reference(k)) <= 1e-13


def test_losses_that_are_normalized_already():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = references.network()
    prepared, optimizer = accelerator.prepare(model, sam(model))
    for window in references.windows(DATA, 2):
        count = len(window)
        ours.step(
            accelerator,
            optimizer,
            prepared,
            lambda b, n=count: cross_entropy(prepared(b[0]), b[1]) / n,
            window,
            mean=False,
        )
    assert references.largest_difference(model, reference(2)) <= 1e-13


@pytest.mark.parametrize("k", [1, 2])
def test_a_gradient_scaler(k):
    """As fp16 would have it, but for the casts: scaled gradients, and one step that overflows."""
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = references.network()
    prepared, optimizer = accelerator.prepare(model, sam(model))
    kept = []
    for number, part in enumerate(references.windows(DATA, k)):

        def loss_fn(batch, factor=float("inf") if number == 1 else 1.0):  # noqa: B008
            return cross_entropy(prepared(batch[0]), batch[1]) * factor

        before = [p.detach().clone() for p in model.parameters()]
        ours.step(accelerator, optimizer, prepared, loss_fn, part)
        if number == 1:
            assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
            assert accelerator.scaler.get_scale() == 512.0
        else:
            kept += part
    assert references.largest_difference(model, reference(k, data=kept)) <= 1e-12


def test_bf16_is_a_step_under_autocast():
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, expected = references.network(torch.float32), references.network(torch.float32)
    prepared, optimizer = accelerator.prepare(model, sam(model))
    x, y = X.float(), Y

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            logits = expected(x)
        return cross_entropy(logits.float(), y)  # accelerate returns fp32 outputs

    for _ in range(4):
        ours.step(accelerator, optimizer, prepared, lambda b: cross_entropy(prepared(b), y), [x])
    base = BASES["sgd"](expected.parameters())
    references.train(expected, base, [[loss]] * 4, rho=RHO)
    assert references.largest_difference(model, references.network(torch.float32)) > 1e-2
    assert references.largest_difference(model, expected) <= 2e-6


# ---- parameters that are exchanged -------------------------------------------------------------


def put_placeholders(optimizer):
    """As accelerate does before it shards: entries that are no parameters, and data_ptr a number."""
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype, device=p.device)
            group["params"][i].data_ptr = p.data_ptr()


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
@pytest.mark.parametrize("base", BASES)
def test_parameters_may_be_exchanged_before_the_first_step(base, backend):
    """What FSDP2 does to an optimizer in accelerate, with plain tensors in the place of shards."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    accelerator = accelerate.Accelerator(cpu=True)
    model = references.network()
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.endswith("weight")]},
        {"params": [p for n, p in model.named_parameters() if n.endswith("bias")], "rho": 0.1},
    ]
    inner = SAM.wrap(BASES[base](groups), rho=RHO, backend=backend, model=model)
    optimizer = accelerator.prepare(inner)
    old = dict(model.named_parameters())
    put_placeholders(optimizer)
    mapping = {}
    for name, p in old.items():
        module, _, leaf = name.rpartition(".")
        new = Parameter(p.detach().clone())
        setattr(model.get_submodule(module), leaf, new)
        mapping[p.data_ptr()] = new
    fsdp2_switch_optimizer_parameters(optimizer, mapping)
    unmoved = {name: p.detach().clone() for name, p in old.items()}

    twin = references.network()
    twin_groups = [
        {"params": [p for n, p in twin.named_parameters() if n.endswith("weight")]},
        {"params": [p for n, p in twin.named_parameters() if n.endswith("bias")], "rho": 0.1},
    ]
    untouched = SAM.wrap(BASES[base](twin_groups), rho=RHO, backend=backend)
    for x, y in DATA:
        for net, opt in ((model, optimizer), (twin, untouched)):

            def closure(net=net, x=x, y=y):
                loss = cross_entropy(net(x), y)
                loss.backward()
                return loss

            opt.step(closure)
    assert references.largest_difference(model, twin) == 0
    assert references.largest_difference(model, references.network()) > 1e-2, "nothing was trained"
    assert all(torch.equal(old[name], w) for name, w in unmoved.items()), "the former ones were written"
    assert set(inner.state) <= set(model.parameters())


def sharded(rank, k):
    """FSDP2 with accelerate's own exchange of parameters; returns whole weights."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = references.network()
    optimizer = sam(model)
    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    put_placeholders(optimizer)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (ranks.RANKS,)))
    present = dict(model.named_parameters())
    assert all(isinstance(p, DTensor) for p in present.values())
    fsdp2_switch_optimizer_parameters(optimizer, {ptr: present[name] for ptr, name in names.items()})
    for window in references.windows(DATA, k):

        def part(x, y, n=0):
            def closure():
                loss = cross_entropy(model(x), y) / n
                loss.backward()
                return loss

            return closure

        optimizer.step([part(x[rank::2], y[rank::2], len(window)) for x, y in window])
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def replicated(rank, k):
    """DDP as accelerate sets it up."""
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == ranks.RANKS
    model = references.network()
    prepared, optimizer = accelerator.prepare(model, sam(model))
    for window in references.windows(DATA, k):
        mine = [(x[rank::2], y[rank::2]) for x, y in window]
        ours.step(accelerator, optimizer, prepared, lambda b: cross_entropy(prepared(b[0]), b[1]), mine)
    return {name: p.detach() for name, p in model.named_parameters()}


def both(rank, k):
    return {"replicated by DDP": replicated(rank, k), "sharded by FSDP2": sharded(rank, k)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.on_two(both, tmp_path_factory.mktemp("ranks"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["replicated by DDP", "sharded by FSDP2"])
def test_two_ranks_are_one_process(results, how):
    expected = {name: p.detach() for name, p in reference(2).named_parameters()}
    first, second = (result[how] for result in results)
    for name, w in expected.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between the ranks"
        assert float((first[name] - w).abs().max()) <= 1e-13


# ---- what is refused ---------------------------------------------------------------------------


def test_what_cannot_be_a_step_is_refused():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = references.network()
    prepared, optimizer = accelerator.prepare(model, sam(model))

    def loss_fn(batch):
        return cross_entropy(prepared(batch[0]), batch[1])

    with pytest.raises(ValueError, match="no batches"):
        ours.step(accelerator, optimizer, prepared, loss_fn, [])
    with accelerator.accumulate(prepared), pytest.raises(RuntimeError, match="holds this step back"):
        ours.step(accelerator, optimizer, prepared, loss_fn, DATA[:2])
    accelerator.gradient_state._set_sync_gradients(True)
    plain = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=LR))
    with pytest.raises(TypeError, match="AcceleratedOptimizer; expected sam_kernels.SAM"):
        ours.step(accelerator, plain, prepared, loss_fn, DATA[:2])
    assert references.largest_difference(model, references.network()) == 0
