"""The networks of the documents, at sizes for two cores; parameter counts are those of 8 x 8 digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AsImage(nn.Module):
    """Samples as images [n, channels, height, width], whether they come flat or not."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.shape = (channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.shape)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What `build` returns, with initial weights that depend on the seed alone.

    torch's random state is as before.

    Example:
        >>> one, two = (seeded(lambda: mlp([4, 3]), seed=7) for _ in range(2))
        >>> torch.equal(one[1].weight, two[1].weight)
        True
    """
    with torch.random.fork_rng([], device_type="cpu"):
        torch.manual_seed(seed)
        return build()


def count(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Fully connected layers with ReLU between them; 64-500-300-10 has 185,810 parameters.

    Args:
        sizes: inputs, hidden units, classes; at least two.

    Raises:
        ValueError: for fewer than two sizes.

    Example:
        >>> count(mlp([64, 500, 300, 10])), count(mlp([784, 500, 300, 10]))
        (185810, 545810)
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp: sizes is {list(sizes)!r}; expected at least inputs and classes")
    layers: list[nn.Module] = [nn.Flatten()]
    for index, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        if index:
            layers.append(nn.ReLU())
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


def _conv(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class PreActivation(nn.Module):
    """Block of a wide ResNet: norm, ReLU, convolution, twice, plus what came in."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs)
        is_same = inputs == outputs and stride == 1
        self.shortcut = None if is_same else _conv(inputs, outputs, stride, size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(y))))


class PostActivation(nn.Module):
    """Basic block of a ResNet: convolution and norm, twice, plus what came in, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs), nn.BatchNorm2d(outputs)
        is_same = inputs == outputs and stride == 1
        self.shortcut = (
            None
            if is_same
            else nn.Sequential(_conv(inputs, outputs, stride, size=1), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(skip + self.norm2(self.conv2(y)))


def wide_resnet(
    depth: int = 10,
    width: int = 1,
    classes: int = 10,
    channels: int = 1,
    image: tuple[int, int] = (8, 8),
    *,
    stem: int = 16,
) -> nn.Sequential:
    """WRN-depth-width without dropout: three groups of pre-activation blocks of 16, 32, 64 times `width`.

    WRN-10-1 has 77,562 parameters on 8 x 8 digits. The documents' is ``wide_resnet(28, 10, channels=3,
    image=(32, 32))``, of 36.5 million.

    Args:
        depth: ``6 n + 4``, n blocks in each group.
        width: factor of the channels.
        classes, channels, image: of the data; images may come flat.
        stem: channels of the first convolution, of which the groups have 1, 2 and 4 times `width` (default
            16, the paper's).

    Raises:
        ValueError: for another depth.

    Example:
        >>> count(wide_resnet(10, 1)), count(wide_resnet(10, 1, stem=8))
        (77562, 19714)

    Source: Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146.
    """
    blocks, rest = divmod(depth - 4, 6)
    if blocks < 1 or rest:
        raise ValueError(f"wide_resnet: depth is {depth!r}; expected 6 n + 4, e.g. 10, 16 or 28")
    layers: list[nn.Module] = [AsImage(channels, *image), _conv(channels, stem)]
    inputs = stem
    for outputs, stride in ((stem * width, 1), (2 * stem * width, 2), (4 * stem * width, 2)):
        for block in range(blocks):
            layers.append(PreActivation(inputs, outputs, stride if block == 0 else 1))
            inputs = outputs
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def resnet(
    blocks: Sequence[int] = (1, 1, 1),
    classes: int = 10,
    channels: int = 1,
    image: tuple[int, int] = (8, 8),
    *,
    stem: int = 16,
) -> nn.Sequential:
    """ResNet of basic blocks without the first pooling; each group halves the image and doubles the channels.

    The default, with one block in each of three groups, has 77,754 parameters on 8 x 8 digits. ResNet-34 as
    it is used on CIFAR is ``resnet((3, 4, 6, 3), channels=3, image=(32, 32), stem=64)``, of 21.3 million.

    Args:
        blocks: of each group; the first keeps the size of the image.
        classes, channels, image: of the data; images may come flat.
        stem: channels of the first convolution and group.

    Raises:
        ValueError: without blocks.

    Example:
        >>> count(resnet()), count(resnet((3, 4, 6, 3), channels=3, image=(32, 32), stem=64))
        (77754, 21282122)

    Source: He, Zhang, Ren, Sun, CVPR 2016, arXiv 1512.03385.
    """
    if not blocks or min(blocks) < 1:
        raise ValueError(f"resnet: blocks is {tuple(blocks)!r}; expected at least one block in each group")
    layers: list[nn.Module] = [AsImage(channels, *image), _conv(channels, stem)]
    layers += [nn.BatchNorm2d(stem), nn.ReLU()]
    inputs = stem
    for group, number in enumerate(blocks):
        for block in range(number):
            stride = 2 if group and block == 0 else 1
            layers.append(PostActivation(inputs, stem * 2**group, stride))
            inputs = stem * 2**group
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


def ood_network(
    classes: int = 10,
    channels: int = 1,
    image: tuple[int, int] = (8, 8),
    *,
    filters: int = 32,
    units: int = 128,
) -> nn.Sequential:
    """The network of the out-of-distribution study: three convolutions, three linear layers.

    Convolutions of 3 x 3 keep the size and have ReLU; then linear layers of `units` with ReLU, dropout 0.5
    and batch norm before the last. 299,146 parameters on 8 x 8 digits.

    Args:
        classes, channels, image: of the data; images may come flat.
        filters, units: of the convolutions and the linear layers (default 32 and 128, the authors').

    Example:
        >>> count(ood_network()), count(ood_network(image=(28, 28)))
        (299146, 3248266)

    Source: samjschapiro/SAM-GDA, the authors' code for arXiv 2412.05169; there the image is 28 x 28.
    """
    height, width = image
    layers: list[nn.Module] = [AsImage(channels, height, width)]
    for inputs in (channels, filters, filters):
        layers += [nn.Conv2d(inputs, filters, 3, padding=1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(filters * height * width, units), nn.ReLU(), nn.Linear(units, units)]
    layers += [nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(units), nn.Linear(units, classes)]
    return nn.Sequential(*layers)


def tabular_network(inputs: int = 54, classes: int = 2, units: int = 256) -> nn.Sequential:
    """The same study's network for tables: three linear layers with ReLU, dropout 0.5, batch norm, a linear.

    Example:
        >>> count(tabular_network())
        146690

    Source: as `ood_network`.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for size in (inputs, units, units):
        layers += [nn.Linear(size, units), nn.ReLU()]
    layers += [nn.Dropout(0.5), nn.BatchNorm1d(units), nn.Linear(units, classes)]
    return nn.Sequential(*layers)
