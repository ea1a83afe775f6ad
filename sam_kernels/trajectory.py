"""MESA: train against the predictions of the average of the weights; a loss, with no perturbation at all.

It needs no optimizer of ours. What is averaged and how is `torch.optim.swa_utils`; here is the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def trajectory_loss(logits: Tensor, reference: Tensor, temperature: float = 5.0) -> Tensor:
    """``T^2 mean_i KL(softmax(reference_i / T) || softmax(logits_i / T))``.

    Args:
        logits: [batch, classes], of the model that is trained.
        reference: [batch, classes], of the averaged model; no gradient goes through it.
        temperature: T, above 0 (default 5, AngusDujw/SAF).

    Raises:
        ValueError: if the shapes differ or the temperature is not positive.

    Example:
        >>> ours, theirs = torch.tensor([[[0.2, -0.1, 0.4]], [[0.5, 0.0, 0.1]]], dtype=torch.float64)
        >>> round(float(trajectory_loss(ours, theirs)), 6)
        0.031605

    Source: Du et al., "Sharpness-Aware Training for Free", NeurIPS 2022, arXiv 2205.14083.
    """
    if logits.shape != reference.shape or logits.dim() != 2:
        raise ValueError(
            f"trajectory_loss: logits are {tuple(logits.shape)} and reference {tuple(reference.shape)}; "
            "expected [batch, classes] of both"
        )
    if not temperature > 0:
        raise ValueError(f"trajectory_loss: temperature is {temperature!r}; expected a positive number")
    ours = torch.log_softmax(logits / temperature, dim=1)
    theirs = torch.log_softmax(reference.detach() / temperature, dim=1)
    divergence = nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


class Mesa:
    """The averaged model and its loss: ``loss + weight trajectory_loss(model(x), average(x))``.

    Args:
        model: what is trained.
        decay: of the average, ``average <- decay average + (1 - decay) w`` and likewise for buffers, 0 to
            below 1 (default 0.9998, as in the authors' run).
        weight: of the loss (default 0.8, likewise).
        temperature: see `trajectory_loss`.

    Raises:
        ValueError: if decay is not from 0 to below 1 or weight is negative.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mesa = Mesa(model)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> logits = model(x)
        >>> loss = torch.nn.functional.cross_entropy(logits, y) + mesa.loss(x, logits)
        >>> loss.backward()
        >>> opt.step()
        >>> mesa.update()  # after every step

    Source: Du et al., NeurIPS 2022, arXiv 2205.14083; AngusDujw/SAF, which begins some epochs into training.
    SAF, its sibling, compares with the sample's own logits of some epochs ago, which a data set has to keep.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9998, weight: float = 0.8, temperature: float = 5.0
    ) -> None:
        if not (isinstance(decay, int | float) and 0 <= decay < 1):
            raise ValueError(f"Mesa: decay is {decay!r}; expected a number from 0 to below 1")
        if not (isinstance(weight, int | float) and weight >= 0):
            raise ValueError(f"Mesa: weight is {weight!r}; expected a number of at least 0")
        self.model = model
        self.weight = weight
        self.temperature = temperature
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        # `AveragedModel` takes over the first weights that it is given, whatever the decay.
        self.average.update_parameters(model)
        self.average.eval()

    def loss(self, inputs: Any, logits: Tensor) -> Tensor:
        """What to add to the loss of a batch.

        Args:
            inputs: what the model was called with.
            logits: [batch, classes], what it returned.
        """
        with torch.no_grad():
            reference = self.average(inputs)
        return self.weight * trajectory_loss(logits, reference, self.temperature)

    def update(self) -> None:
        """Take the present weights into the average."""
        self.average.update_parameters(self.model)
