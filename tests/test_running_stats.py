"""running_stats.frozen: statistics as before, forward as ever, buffers in place."""

from __future__ import annotations

import pytest
import torch
from fixtures import bits
from torch import nn
from torch.nn import functional as F

from sam_kernels import SAM
from sam_kernels.running_stats import frozen


class Centering(nn.Module):
    """A layer of somebody's own: no momentum attribute, and a forward that binds a new tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_peak", torch.zeros(width))
        self.register_buffer("positions", torch.arange(width, dtype=torch.float32))
        self.register_buffer("running_var", None)

    def forward(self, x):
        mean = x.mean(0) if self.training else self.running_mean
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
            self.running_peak.copy_(torch.maximum(self.running_peak, x.detach().amax(0)))
            self.positions += 1
        return x - mean


# Each with the shape of a batch it takes; 4 channels.
LAYERS = {
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (6, 4, 5, 5)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), (6, 4, 2, 3, 3)),
    "cumulative average": (lambda: nn.BatchNorm2d(4, momentum=None), (6, 4, 5, 5)),
    "no affine part": (lambda: nn.BatchNorm1d(4, affine=False), (6, 4)),
    "float64": (lambda: nn.BatchNorm1d(4).double(), (6, 4)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), (6, 4, 5, 5)),
    "instance norm 3d": (
        lambda: nn.InstanceNorm3d(4, track_running_stats=True, affine=True),
        (6, 4, 2, 3, 3),
    ),
    "own class": (lambda: Centering(4), (6, 4)),
}


@pytest.fixture(params=LAYERS, ids=lambda name: name.replace(" ", "-"))
def layer(request) -> nn.Module:
    make, shape = LAYERS[request.param]
    layer = make()
    layer.shape_of_input = shape
    layer(as_input(layer))  # so that the statistics are not the initial ones
    return layer


def as_input(layer: nn.Module) -> torch.Tensor:
    return (3 + 2 * torch.randn(layer.shape_of_input)).to(next(layer.buffers()).dtype)


def statistics(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(buffer) for name, buffer in model.named_buffers() if "positions" not in name}


def test_statistics_are_as_before_and_the_forward_is_that_of_training(layer):
    x = as_input(layer)
    before = statistics(layer)
    with frozen(layer):
        inside = layer(x)
        moved = statistics(layer) != before
    assert moved, "the layer did not run in training mode, so the test shows nothing"
    assert statistics(layer) == before
    assert torch.equal(inside, layer(x))
    assert statistics(layer) != before


def test_buffers_keep_identity_and_address(layer):
    buffers = dict(layer.named_buffers())
    addresses = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    for _ in range(2):
        with frozen(layer):
            layer(as_input(layer))
        for name, buffer in layer.named_buffers():
            assert buffer is buffers[name]
            assert buffer.data_ptr() == addresses[name]


def test_other_buffers_are_left_alone():
    layer = Centering(4)
    with frozen(layer):
        layer(torch.randn(6, 4))
    assert layer.positions.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert layer.running_var is None


def test_an_exception_restores_too(layer):
    before = statistics(layer)
    with pytest.raises(KeyboardInterrupt), frozen(layer):
        layer(as_input(layer))
        raise KeyboardInterrupt
    assert statistics(layer) == before


def test_blocks_nest(layer):
    before = statistics(layer)
    with frozen(layer):
        layer(as_input(layer))
        between = statistics(layer)
        with frozen(layer):
            layer(as_input(layer))
        assert statistics(layer) == between
        layer(as_input(layer))
    assert statistics(layer) == before


def test_models_may_share_a_layer():
    shared = nn.BatchNorm1d(4)
    one, two = nn.Sequential(shared, nn.ReLU()), nn.Sequential(nn.Linear(4, 4), shared)
    before = statistics(shared)
    with frozen(one), frozen(two):
        one(torch.randn(6, 4))
        two(torch.randn(6, 4))
    assert statistics(shared) == before


def test_statistics_that_are_not_finite_do_not_stay(layer):
    before = statistics(layer)
    x = as_input(layer)
    with frozen(layer):
        layer(x * float("inf"))
    assert statistics(layer) == before


def test_eval_mode_is_untouched():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[0].eval()
    versions = [buffer._version for buffer in model[0].buffers()]
    before = statistics(model)
    with frozen(model):
        model(torch.randn(6, 4))
        assert not model[0].training and model[1].training
    assert not model[0].training and model[1].training
    assert statistics(model) == before
    assert [buffer._version for buffer in model[0].buffers()] == versions


def test_a_mode_changed_inside_makes_no_difference():
    model = nn.BatchNorm1d(4).eval()
    before = statistics(model)
    with frozen(model):
        model.train()
        model(torch.randn(6, 4))
    assert statistics(model) == before


def test_backward_after_the_block_works(layer):
    """Autograd holds running statistics; copying them back must not count as a change."""
    weight = torch.ones(4, dtype=next(layer.buffers()).dtype, requires_grad=True)

    def loss():
        x = as_input(layer)
        return (layer(x * weight.view(1, 4, *[1] * (x.ndim - 2))) ** 3).sum()

    outside = loss()
    with frozen(layer):
        inside = loss()
    (outside + inside).backward()
    assert torch.isfinite(weight.grad).all()


def test_sync_batch_norm_is_kept():
    layer = nn.SyncBatchNorm(4)
    before = statistics(layer)
    with frozen(layer):
        # Its own forward needs an accelerator; its buffers are those of every batch norm.
        F.batch_norm(torch.randn(6, 4), layer.running_mean, layer.running_var, training=True)
        layer.num_batches_tracked += 1
        assert statistics(layer) != before
    assert statistics(layer) == before


def test_lazy_layers_are_kept_once_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    x = torch.randn(6, 3)
    with frozen(model):
        model(x)  # the first forward: what it brings is kept
    assert model[1].num_batches_tracked.item() == 1
    before = statistics(model)
    with frozen(model):
        model(x)
    assert statistics(model) == before


def test_layers_without_statistics_are_no_matter():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False))
    with frozen(model):
        assert model(torch.randn(6, 4)).shape == (6, 4)


def test_something_else_than_a_module_is_refused():
    with (
        pytest.raises(TypeError, match=r"model is list; expected the torch\.nn\.Module"),
        frozen([nn.ReLU()]),
    ):
        pass


def test_a_step_with_a_model_counts_one_batch():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(8, 4)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, model=model)
    with torch.no_grad():
        mean_at_w = 0.1 * model[0](x).mean(0)

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert model[1].num_batches_tracked.item() == 1
    torch.testing.assert_close(model[1].running_mean, mean_at_w)
