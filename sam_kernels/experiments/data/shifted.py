"""Data sets that move: digits by default, MNIST, Covertype and Portraits where a user has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files
from .digits import CLASSES, IMAGE, all_digits
from .named import mnist_files
from .shifts import Shift, along, rotated


def _turned(images: Tensor, amounts: Tensor) -> Tensor:
    return rotated(images, 60 * amounts)


def _brighter(images: Tensor, amounts: Tensor) -> Tensor:
    return images + amounts.reshape(-1, 1, 1, 1)


DIGITS_SIZES = (600, 800, 397)


def rotated_digits(seed: int = 0) -> Shift:
    """scikit-learn's digits, upright in the source (600), turning (800), turned by 60 degrees (397).

    Args:
        seed: of which image goes where.

    Example:
        >>> shift = rotated_digits()
        >>> shift.x.shape, shift.between.shape, shift.x_target.shape
        (torch.Size([600, 64]), torch.Size([800, 64]), torch.Size([397, 64]))
    """
    return along(*all_digits(), IMAGE, _turned, DIGITS_SIZES, CLASSES, "rotated digits", seed)


def brighter_digits(seed: int = 0) -> Shift:
    """scikit-learn's digits as they are in the source (600), with 1 added to all pixels in the target (397).

    Args:
        seed: of which image goes where.

    Example:
        >>> shift = brighter_digits()
        >>> float(shift.x.min()), float(shift.x_target.min())
        (0.0, 1.0)
    """
    return along(*all_digits(), IMAGE, _brighter, DIGITS_SIZES, CLASSES, "brighter digits", seed)


def _mnist(folder: Path | str, part: int) -> tuple[Tensor, Tensor]:
    x, y = (files.read_idx(path) for path in mnist_files(folder)[2 * part : 2 * part + 2])
    return torch.tensor(x.reshape(len(x), -1)).to(torch.float32) / 255, torch.tensor(y, dtype=torch.int64)


def rotated_mnist(folder: Path | str, seed: int = 0) -> Shift:
    """MNIST's test images: a third upright, four ninths turning, the others turned by 60 degrees.

    The authors' code takes all 10,000 as source and, turned, as target; here no image is in both.

    Raises:
        FileNotFoundError: if the files are not there, see `data.mnist`.
    """
    x, y = _mnist(folder, 1)
    sizes = (len(x) // 3, 4 * len(x) // 9, len(x) - len(x) // 3 - 4 * len(x) // 9)
    return along(x, y, (1, 28, 28), _turned, sizes, CLASSES, "rotated MNIST", seed)


def brighter_mnist(folder: Path | str, seed: int = 0) -> Shift:
    """Color-shift MNIST: 6 of 50 training images as they are, 42 on the way, 2 with 1 added to all pixels.

    Raises:
        FileNotFoundError: if the files are not there, see `data.mnist`.
    """
    x, y = _mnist(folder, 0)
    share = min(1000, len(x) // 50)
    return along(
        x, y, (1, 28, 28), _brighter, (6 * share, 42 * share, 2 * share), CLASSES, "color-shift MNIST", seed
    )


def _covertype_file(folder: Path | str) -> Path:
    source = "https://archive.ics.uci.edu/dataset/31/covertype"
    return files.found(folder, ("", "covertype"), ("covtype.data",), "Covertype", source)[0]


def covertype(folder: Path | str, seed: int = 0) -> Shift:
    """Covertype, the two most frequent kinds of forest, in the order of their distance to water.

    Columns are standardized. Of 495,141 samples the 10,000 nearest are the source, then 400,000 on the way,
    then 20,000 of the target; of fewer samples the same shares.

    Args:
        folder: has covtype.data or covtype.data.gz, by itself or in covertype.
        seed: of nothing, the order is that of the data.

    Raises:
        FileNotFoundError: if the file is not there; it says where it was looked for.

    Source: Blackard and Dean, UCI 1998; samjschapiro/SAM-GDA for the sizes.
    """
    table = torch.from_numpy(files.read_table(_covertype_file(folder), 55))
    table = table[table[:, -1] <= 2]
    table = table[table[:, 3].argsort(stable=True)]  # horizontal distance to hydrology
    x, y = table[:, :-1], table[:, -1].to(torch.int64) - 1
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    share = min(1.0, len(x) / 430_000)
    return _in_order(x, y, (int(10_000 * share), int(400_000 * share), int(20_000 * share)), 2, "Covertype")


def _portraits_folder(folder: Path | str) -> Path:
    names = ("", "portraits", "faces_aligned_small_mirrored_co_aligned_cropped_cleaned")
    places = [Path(folder) / name for name in names]
    for place in places:
        if (place / "F").is_dir() and (place / "M").is_dir():
            return place
    raise FileNotFoundError(
        "Portraits are not there. Looked for folders F and M of images, both in one of: "
        f"{', '.join(map(str, places))}. They come from "
        "https://people.eecs.berkeley.edu/~shiry/projects/yearbooks/yearbooks.html"
    )


def portraits(folder: Path | str, seed: int = 0) -> Shift:
    """Portraits of American high-school yearbooks by year: 2,000 as source, 14,000 between, 2,000 as target.

    Args:
        folder: has folders F and M of images with the year in their names, by itself, in portraits, or in
            faces_aligned_small_mirrored_co_aligned_cropped_cleaned as the authors' archive has it. Of fewer
            images the same shares are taken.
        seed: of nothing, the order is that of the years.

    Raises:
        FileNotFoundError: if the folders are not there; it says where they were looked for.

    Source: Ginosar et al., "A Century of Portraits", 2015, arXiv 1511.02575; samjschapiro/SAM-GDA for the
    sizes.
    """
    pixels, labels, _ = files.read_portraits(_portraits_folder(folder))
    x, y = torch.from_numpy(pixels), torch.from_numpy(labels)
    share = min(1.0, len(x) / 18_000)
    sizes = (int(2000 * share), int(14_000 * share), int(2000 * share))
    return _in_order(x, y, sizes, 2, "Portraits", (1, 32, 32))


def _in_order(
    x: Tensor,
    y: Tensor,
    sizes: tuple[int, int, int],
    classes: int,
    name: str,
    image: tuple[int, int, int] | None = None,
) -> Shift:
    if min(sizes) < 1:
        raise ValueError(f"{name}: {len(x)} samples are too few for a source, a way and a target")
    (xs, xb, xt), (ys, yb, yt) = (t[: sum(sizes)].split(sizes) for t in (x, y))
    return Shift(xs, ys, xb, yb, xt, yt, classes, name, image)


EMBEDDED: dict[str, Callable[[int], Shift]] = {"rotated": rotated_digits, "brighter": brighter_digits}
ORIGINAL: dict[str, Callable[[Path | str, int], Shift]] = {
    "rotated": rotated_mnist,
    "brighter": brighter_mnist,
    "covertype": covertype,
    "portraits": portraits,
}


def shift(name: str, folder: Path | str | None = None, seed: int = 0) -> Shift:
    """The shift of that name: "rotated" or "brighter" digits, or with a folder an original data set.

    Args:
        name: "rotated", "brighter"; with a folder also "covertype" and "portraits".
        folder: of original files; None for the digits of scikit-learn.
        seed: of which image goes where.

    Raises:
        ValueError: if the name is unknown.
        FileNotFoundError: if the folder lacks the files.

    Example:
        >>> shift("rotated").name
        'rotated digits'
    """
    known = EMBEDDED if folder is None else ORIGINAL
    if name not in known:
        place = "of the embedded data" if folder is None else "of the original data"
        raise ValueError(f"shift {name!r} is none {place}. Known: {', '.join(known)}")
    return EMBEDDED[name](seed) if folder is None else ORIGINAL[name](folder, seed)


def is_there(name: str, folder: Path | str) -> bool:
    """Whether a folder has the files of an original data set where `shift` looks, without reading them."""
    places: dict[str, Callable[[Path | str], Any]] = {
        "covertype": _covertype_file,
        "portraits": _portraits_folder,
    }
    try:
        places.get(name, mnist_files)(folder)
    except FileNotFoundError:
        return False
    return True
