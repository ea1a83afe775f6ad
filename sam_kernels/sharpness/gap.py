"""How much better a model does on the data it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .checks import finite
from .objective import Forward, Objective


@dataclass(frozen=True)
class Gap:
    """Losses and accuracies on two sets of data.

    Attributes:
        train_loss, test_loss: mean loss of a sample.
        train_accuracy, test_accuracy: share of correct labels, 0 to 1, or None where there are no labels.

    Example:
        >>> found = Gap(train_loss=0.25, test_loss=0.75, train_accuracy=1.0, test_accuracy=0.875)
        >>> found.loss, found.accuracy
        (0.5, 0.125)
    """

    train_loss: float
    test_loss: float
    train_accuracy: float | None = None
    test_accuracy: float | None = None

    @property
    def loss(self) -> float:
        """``test_loss - train_loss``: positive where the model does worse on test data."""
        return self.test_loss - self.train_loss

    @property
    def accuracy(self) -> float | None:
        """``train_accuracy - test_accuracy``: positive where the model does worse on test data."""
        if self.train_accuracy is None or self.test_accuracy is None:
            return None
        return self.train_accuracy - self.test_accuracy


class _Hits:
    """A loss function that counts correct labels on its way."""

    def __init__(self, loss_fn: Callable[..., Tensor]) -> None:
        self._loss_fn = loss_fn
        self._right: list[Tensor] = []
        self._count: int | None = 0  # None once a batch has no labels to compare

    def __call__(self, *arguments: Any) -> Tensor:
        if self._count is not None and _are_classes(*arguments):
            outputs, targets = arguments[:2]
            self._right.append((outputs.argmax(1) == targets).sum())  # read at the end, once
            self._count += len(targets)
        else:
            self._count = None
        return self._loss_fn(*arguments)

    @property
    def accuracy(self) -> float | None:
        return sum(int(n) for n in self._right) / self._count if self._count else None


def _are_classes(*arguments: Any) -> bool:
    """Whether these are scores [n, classes] and integer labels [n]."""
    if len(arguments) < 2 or not all(isinstance(x, Tensor) for x in arguments[:2]):
        return False
    outputs, targets = arguments[:2]
    return (
        outputs.dim() == 2
        and outputs.shape[1] > 1
        and outputs.is_floating_point()
        and targets.shape == outputs.shape[:1]
        and not (targets.is_floating_point() or targets.is_complex())
    )


def generalization_gap(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    train: Iterable[Any],
    test: Iterable[Any],
    *,
    forward: Forward | None = None,
    samples: int | None = None,
) -> Gap:
    """Loss and accuracy on training and test data, and their differences.

    ``loss = L_test - L_train``, ``accuracy = A_train - A_test``. Accuracies are measured where loss_fn is
    given scores [n, classes] and integer labels [n]; elsewhere they are None.

    Args:
        model: the module; it is evaluated in evaluation mode, and left as it was.
        loss_fn: ``loss_fn(model(inputs), targets)``, the mean loss of a batch.
        train, test: batches (inputs, targets).
        forward, samples: those of `Objective`, for either set.

    Raises:
        ValueError: if a loss is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> train = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> test = [(torch.randn(4, 2), torch.randint(3, (4,)))]
        >>> found = generalization_gap(model, torch.nn.functional.cross_entropy, train, test)
        >>> found.loss == found.test_loss - found.train_loss
        True
    """
    losses, accuracies = [], []
    for name, loader in (("training", train), ("test", test)):
        hits = _Hits(loss_fn)
        objective = Objective(model, hits, loader, forward=forward, samples=samples)
        with objective.held():
            losses.append(finite(objective.loss(), f"on {name} data"))
        accuracies.append(hits.accuracy)
    return Gap(losses[0], losses[1], accuracies[0], accuracies[1])
