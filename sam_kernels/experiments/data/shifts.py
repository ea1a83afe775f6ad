"""Data that change along a way: a source, samples between, and a target where the change is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .split import Split

Changes = Callable[[Tensor, Tensor], Tensor]
"""``(images, amounts)``: images of shape [n, c, h, w], each changed by its amount from 0 to 1."""


@dataclass(frozen=True)
class Shift:
    """Samples of a source, of the way to a target in their order along it, and of the target.

    Args:
        x, between, x_target: float32, shape [n, features]; of the source, the way and the target.
        y, y_target: int64 classes, shape [n]; the way has labels too, which training must not see.
        y_between: those, to measure with.
        classes: how many there are.
        name: what to call it.
        image_shape: (channels, height, width) of a row that is an image; None for tables.

    Example:
        >>> x, y = torch.rand(9, 4), torch.arange(9) % 2
        >>> shift = Shift(x[:3], y[:3], x[3:7], y[3:7], x[7:], y[7:], 2, "tiny")
        >>> [len(part) for part in shift.domains(2)], len(shift.split().x_test)
        ([2, 2], 2)
    """

    x: Tensor
    y: Tensor
    between: Tensor
    y_between: Tensor
    x_target: Tensor
    y_target: Tensor
    classes: int
    name: str
    image_shape: tuple[int, int, int] | None = None

    def split(self) -> Split:
        """The source to train on and the target to test on: zero-shot accuracy is its test accuracy."""
        return Split(self.x, self.y, self.x_target, self.y_target, self.classes, self.name, self.image_shape)

    def domains(self, count: int) -> list[Tensor]:
        """The samples of the way in `count` domains of equal size, one after the other, without labels.

        Raises:
            ValueError: if there are fewer samples than domains.
        """
        if not 1 <= count <= len(self.between):
            raise ValueError(
                f"{self.name}: {count!r} domains asked for; expected 1 to {len(self.between)}, the samples "
                "between source and target"
            )
        return list(self.between.tensor_split(count))


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Images turned about their middle, counterclockwise; what was outside is 0.

    Bilinear interpolation by torch's grid_sample, so that a whole batch turns at once, each by its angle.

    Args:
        images: float32, shape [n, c, h, w], h = w.
        degrees: an angle for each, shape [n].

    Raises:
        ValueError: if the images are not square, or there is not one angle for each.

    Example:
        >>> image = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> rotated(image, torch.tensor([90.0])).round().tolist()
        [[[[1.0, 3.0], [0.0, 2.0]]]]
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3] or degrees.shape != images.shape[:1]:
        raise ValueError(
            f"rotated: images {tuple(images.shape)} and degrees {tuple(degrees.shape)}; expected square "
            "images [n, c, h, h] and an angle for each, [n]"
        )
    angle = degrees.to(images) * (torch.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # Rows say where in the original each new pixel lies: x to the right, y down.
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def along(
    x: Tensor,
    y: Tensor,
    image: tuple[int, int, int],
    change: Changes,
    sizes: tuple[int, int, int],
    classes: int,
    name: str,
    seed: int,
) -> Shift:
    """Deal samples out to source, way and target, and change each by its amount: 0, rising, 1.

    No image is in two of them. Sample i of the n on the way is changed by ``(i + 1/2) / n``.

    Args:
        x, y: all samples, images as flat rows.
        image: their shape.
        change: what happens to them.
        sizes: samples of the source, the way and the target; together at most all.
        classes, name: as in `Shift`.
        seed: of who goes where.
    """
    if min(sizes) < 1 or sum(sizes) > len(x):
        raise ValueError(
            f"{name}: sizes is {sizes!r}; expected three numbers that add up to at most {len(x)}"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: sum(sizes)]
    source, way, target = order.split(sizes)
    amounts = (torch.arange(len(way)) + 0.5) / len(way)

    def changed(rows: Tensor, by: Tensor) -> Tensor:
        return change(x[rows].reshape(-1, *image), by).flatten(1)

    return Shift(
        changed(source, torch.zeros(len(source))),
        y[source],
        changed(way, amounts),
        y[way],
        changed(target, torch.ones(len(target))),
        y[target],
        classes,
        name,
        image,
    )
