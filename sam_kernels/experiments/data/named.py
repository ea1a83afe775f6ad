"""Original data sets from a folder of the user's: MNIST, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import files, pickles
from .split import Split, flipped

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MNIST_PLACES = ("", "MNIST/raw", "MNIST", "mnist")
MNIST_SOURCE = "http://yann.lecun.com/exdb/mnist, or torchvision.datasets.MNIST(folder, download=True)"
CIFAR_SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html, the python version, unpacked"


def mnist_files(folder: Path | str) -> list[Path]:
    """Where MNIST's four files are; raises FileNotFoundError if they are not."""
    return files.found(folder, MNIST_PLACES, MNIST_FILES, "MNIST", MNIST_SOURCE)


def cifar_files(folder: Path | str, classes: int) -> list[Path]:
    """Where CIFAR's files are, the test batch last; raises FileNotFoundError if they are not."""
    if classes == 10:
        place, names = "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    elif classes == 100:
        place, names = "cifar-100-python", ["train", "test"]
    else:
        raise ValueError(f"cifar: classes is {classes!r}; expected 10 or 100")
    return files.found(folder, (place, ""), names, f"CIFAR-{classes}", CIFAR_SOURCE)


def require(name: str, folder: Path | str) -> None:
    """See to it that a folder has a data set, without reading it.

    Args:
        name: "mnist", "cifar10" or "cifar100"; others need nothing.
        folder: as in `mnist` and `cifar`.

    Raises:
        FileNotFoundError: if the files are not there; it says where they were looked for.

    Example:
        >>> require("digits", "/no/such/folder")
    """
    if name == "mnist":
        mnist_files(folder)
    elif name in ("cifar10", "cifar100"):
        cifar_files(folder, int(name.removeprefix("cifar")))


def mnist(
    folder: Path | str,
    train: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    *,
    test: int | None = None,
    download: bool = False,
) -> Split:
    """MNIST from its four IDX files, plain or gzipped: 60,000 and 10,000 images of 28 x 28 pixels.

    Args:
        folder: has the files, by itself or in MNIST/raw, MNIST or mnist.
        train: training samples, a draw that is always the same (default: all).
        noise: share of the training labels that is wrong (default 0).
        seed: of the wrong labels.
        test: test samples, the first so many (default: all).
        download: let torchvision fetch what is missing.

    Raises:
        FileNotFoundError: if the files are not there; it says where they were looked for.
        ValueError: if a file is damaged, or train or test is more than there are.

    Example:
        >>> mnist("/no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: MNIST is not there. Looked for train-images-idx3-ubyte, ...

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998.
    """
    if download:
        _fetch("MNIST", folder)
    x, y, x_test, y_test = (files.read_idx(path) for path in mnist_files(folder))
    image = (1, *x.shape[1:])
    return _split(x, y, x_test, y_test, 10, "MNIST", image, train, test, noise, seed)


def cifar(
    folder: Path | str,
    classes: int = 10,
    train: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    *,
    test: int | None = None,
    download: bool = False,
) -> Split:
    """CIFAR-10 or CIFAR-100 from the pickles of its python version: 50,000 and 10,000 images of 3 x 32 x 32.

    The pickles are read by a reader that imports and calls nothing they name, see `pickles.read_pickle`.
    Pixels are in [0, 1]; standardize them yourself.

    Args:
        folder: has cifar-10-batches-py or cifar-100-python, or is that folder.
        classes: 10 or 100, the latter by fine labels.
        train, noise, seed, test, download: as in `mnist`.

    Raises:
        FileNotFoundError: if the files are not there; it says where they were looked for.
        ValueError: if classes is neither, a file is damaged, or train or test is more than there are.
        pickle.UnpicklingError: if a file is no pickle of arrays.

    Example:
        >>> cifar("/no/such/folder", 100)
        Traceback (most recent call last):
        FileNotFoundError: CIFAR-100 is not there. Looked for train, test (or the same with .gz), ...

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    if classes not in (10, 100):
        raise ValueError(f"cifar: classes is {classes!r}; expected 10 or 100")
    if download:
        _fetch(f"CIFAR{classes}", folder)
    name = f"CIFAR-{classes}"
    parts = [_pictures(path, classes) for path in cifar_files(folder, classes)]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return _split(x, y, *parts[-1], classes, name, (3, 32, 32), train, test, noise, seed)


def _pictures(path: Path, classes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    batch = pickles.read_pickle(path)
    key, expected = (
        b"labels" if classes == 10 else b"fine_labels",
        f"a batch of CIFAR-{classes}, python version",
    )
    missing = [k for k in (b"data", key) if k not in batch]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}; expected {expected}")
    x, y = batch[b"data"], batch[key]
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3 * 32 * 32:
        raise ValueError(f"{path}: its data are no uint8 of shape [n, 3072]; expected {expected}")
    if isinstance(y, np.ndarray) and y.ndim == 1:
        y = y.tolist()
    if type(y) is not list or not all(type(label) is int and 0 <= label < classes for label in y):
        raise ValueError(f"{path}: its labels are no numbers from 0 to {classes - 1}; expected {expected}")
    if not len(x) == len(y) > 0:
        raise ValueError(f"{path} has {len(x)} images and {len(y)} labels; expected {expected}")
    return x, np.array(y, np.int64)


def _fetch(kind: str, folder: Path | str) -> None:
    try:
        from torchvision import datasets
    except ImportError:
        raise ImportError(
            f"download: torchvision, which fetches {kind}, is not installed: pip install torchvision, or put "
            f"the original files into {folder}"
        ) from None
    for train in (True, False):
        getattr(datasets, kind)(root=str(folder), train=train, download=True)


def _split(
    x: NDArray[Any],
    y: NDArray[Any],
    x_test: NDArray[Any],
    y_test: NDArray[Any],
    classes: int,
    name: str,
    image: tuple[int, ...],
    train: int | None,
    test: int | None,
    noise: float,
    seed: int,
) -> Split:
    for what, asked, n in (("train", train, len(x)), ("test", test, len(x_test))):
        if asked is not None and not 1 <= asked <= n:
            raise ValueError(f"{name}: {what} is {asked!r}; expected 1 to {n}, the samples there are")
    kept = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:train].numpy()
    labels = torch.tensor(y[kept], dtype=torch.int64)
    return Split(
        _pixels(x[kept]),
        flipped(labels, noise, classes, seed),
        _pixels(x_test[:test]),
        torch.tensor(y_test[:test], dtype=torch.int64),
        classes,
        name,
        (image[0], image[1], image[2]),
    )


def _pixels(x: NDArray[Any]) -> Tensor:
    return torch.tensor(x.reshape(len(x), -1)).to(torch.float32) / 255
