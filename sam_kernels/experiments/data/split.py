"""Samples to train on and samples to test on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """A data set, cut into training and test samples.

    Args:
        x, x_test: float32, shape [n, features], images as flat rows.
        y, y_test: int64 classes from 0 to ``classes - 1``, shape [n].
        classes: how many there are.
        name: what to call it.
        image_shape: (channels, height, width) of a row that is an image; None for tables.

    Raises:
        ValueError: if rows and labels differ in number, or `image_shape` does not fit the features.

    Example:
        >>> x, y = torch.rand(6, 4), torch.arange(6) % 2
        >>> Split(x[:4], y[:4], x[4:], y[4:], 2, "tiny", (1, 2, 2)).as_images().x.shape
        torch.Size([4, 1, 2, 2])
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    name: str
    image_shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for part, x, y in (("training", self.x, self.y), ("test", self.x_test, self.y_test)):
            if len(x) != len(y):
                raise ValueError(f"Split {self.name!r}: {len(x)} {part} samples but {len(y)} labels")
            if self.image_shape is not None and prod(x.shape[1:]) != prod(self.image_shape):
                raise ValueError(
                    f"Split {self.name!r}: {part} samples have shape {tuple(x.shape[1:])}, no image of shape "
                    f"{self.image_shape}"
                )

    def as_images(self) -> Split:
        """The same with x and x_test of shape [n, channels, height, width]; needs an `image_shape`."""
        if self.image_shape is None:
            raise ValueError(f"Split {self.name!r}: its samples are no images; use a network for flat rows")
        return replace(
            self,
            x=self.x.reshape(-1, *self.image_shape),
            x_test=self.x_test.reshape(-1, *self.image_shape),
        )


def flipped(y: Tensor, noise: float, classes: int, seed: int) -> Tensor:
    """Labels of which a share is wrong: ``round(noise n)`` of them, drawn by seed, become another class.

    Args:
        y: int64 labels, shape [n].
        noise: the share, from 0 to 1; each wrong class is as likely as any other.
        classes: how many there are, at least 2.
        seed: of which labels are wrong and what they become. More noise with the same seed makes the same
            labels wrong, and more.

    Raises:
        ValueError: if noise is not from 0 to 1 or there is no other class.

    Example:
        >>> y = torch.zeros(10, dtype=torch.int64)
        >>> int((flipped(y, 0.4, 3, seed=0) != y).sum())
        4
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"label noise is {noise!r}; expected a share from 0 to 1")
    if classes < 2:
        raise ValueError(f"label noise: there are {classes} classes, and none to flip a label to")
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(y), generator=generator)[: round(noise * len(y))]
    others = (y + torch.randint(1, classes, (len(y),), generator=generator)) % classes
    found = y.clone()
    found[wrong] = others[wrong]
    return found
