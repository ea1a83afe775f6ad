"""MESA's loss and average."""

from __future__ import annotations

import pytest
import torch

from sam_kernels.trajectory import Mesa, trajectory_loss


def test_loss_is_the_known_number():
    z = torch.tensor([[0.2, -0.1, 0.4]], dtype=torch.float64)
    reference = torch.tensor([[0.5, 0.0, 0.1]], dtype=torch.float64)
    assert abs(float(trajectory_loss(z, reference, 5.0)) - 0.0316046289) < 1e-10
    assert float(trajectory_loss(z.repeat(4, 1), reference.repeat(4, 1), 5.0)) == pytest.approx(0.0316046289)
    assert float(trajectory_loss(reference, reference)) == pytest.approx(0.0, abs=1e-12)


def test_the_average_follows_the_weights_and_gets_no_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    mesa = Mesa(model, decay=0.75)
    first = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].running_mean.fill_(4.0)
    mesa.update()
    torch.testing.assert_close(mesa.average.module[0].weight.detach(), first + 0.25)
    torch.testing.assert_close(mesa.average.module[1].running_mean, torch.full((3,), 1.0))
    x = torch.randn(5, 2)
    mesa.loss(x, model(x)).backward()
    assert model[0].weight.grad is not None
    assert all(p.grad is None for p in mesa.average.parameters())


@pytest.mark.parametrize("keywords", [{"decay": 1.0}, {"decay": -0.1}, {"weight": -1.0}])
def test_impossible_numbers_are_a_sentence(keywords):
    with pytest.raises(ValueError, match=f"Mesa: {next(iter(keywords))}"):
        Mesa(torch.nn.Linear(2, 2), **keywords)


def test_shapes_that_do_not_fit_are_a_sentence():
    with pytest.raises(ValueError, match="logits"):
        trajectory_loss(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="temperature"):
        trajectory_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)
