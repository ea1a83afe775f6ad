"""The handwritten digits that come with scikit-learn: real, small, and nothing to download."""

from __future__ import annotations

import torch
from torch import Tensor

from .split import Split, flipped

CLASSES = 10
IMAGE = (1, 8, 8)


def all_digits() -> tuple[Tensor, Tensor]:
    """All 1,797: x float32 in [0, 1], shape [1797, 64]; y int64, shape [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "the digits need scikit-learn, which is not installed: pip install 'sam_kernels[experiments]'"
        ) from None
    bunch = load_digits()
    return torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target, dtype=torch.int64)


def digits(train: int = 1000, noise: float = 0.0, seed: int = 0) -> Split:
    """scikit-learn's 1,797 images of 8 x 8 pixels in 10 classes, in a split that is always the same.

    Args:
        train: training samples (default 1000, as many as the review takes of MNIST); at most 1000, the first
            of the same 1000. The other 797 images are the test samples, whatever `train` is.
        noise: share of the training labels that is wrong (default 0); test labels are never touched.
        seed: of the wrong labels, and of nothing else.

    Raises:
        ImportError: without scikit-learn.
        ValueError: if train is not from 1 to 1000 or noise not from 0 to 1.

    Example:
        >>> split = digits(noise=0.2)
        >>> split.x.shape, split.x_test.shape, int((split.y != digits().y).sum())
        (torch.Size([1000, 64]), torch.Size([797, 64]), 200)

    Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998; the test part, as
    scikit-learn ships it.
    """
    if not 1 <= train <= 1000:
        raise ValueError(
            f"digits: train is {train!r}; expected 1 to 1000 of the 1,797 images, 797 are for testing"
        )
    x, y = all_digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, unseen = order[:train], order[1000:]
    labels = flipped(y[seen], noise, CLASSES, seed)
    return Split(x[seen], labels, x[unseen], y[unseen], CLASSES, "digits", IMAGE)
