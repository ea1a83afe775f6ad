"""Readers of the original files: IDX, Covertype's table, folders of portraits. CIFAR's are in `pickles`."""

from __future__ import annotations

import gzip
import io
import math
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def found(
    folder: Path | str, places: Iterable[str], names: Iterable[str], what: str, source: str
) -> list[Path]:
    """Where files lie: one of `places` below a folder that has all `names`, each of them plain or .gz.

    Raises:
        FileNotFoundError: if none does; it names folder, places, files and where they come from.
    """
    folder, places, names = Path(folder), list(places), list(names)
    for place in places:
        paths = [_plain_or_gz(folder / place / name) for name in names]
        if all(path is not None for path in paths):
            return [path for path in paths if path is not None]
    where = ", ".join(str(folder / place) for place in places)
    state = "" if folder.is_dir() else f" {folder} is no folder."
    raise FileNotFoundError(
        f"{what} is not there. Looked for {', '.join(names)} (or the same with .gz), all in one of: {where}."
        f"{state} The files come from {source}; put them there, or leave out --data to run on the embedded "
        "digits"
    )


def _plain_or_gz(path: Path) -> Path | None:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    return None


def content(path: Path) -> bytes:
    """The bytes of a file, unpacked if it is gzipped, whatever its name.

    Raises:
        ValueError: if it is gzipped and damaged.
    """
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is gzipped and damaged ({error}); fetch it again") from error


def read_idx(path: Path) -> NDArray[Any]:
    """An array in the IDX format of MNIST, plain or gzipped.

    Two zero bytes, a byte for the type, a byte for the number of dimensions, their sizes as big-endian
    32-bit numbers, then the values.

    Raises:
        ValueError: if the file has another format, or ends too early or too late.

    Source: LeCun, Cortes, Burges, "The MNIST database", file format at the end of its page.
    """
    data = content(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in IDX_TYPES or not 1 <= data[3] <= 32:
        raise ValueError(
            f"{path} is no IDX file: it begins with {data[:4]!r}; expected two zero bytes, a type and a "
            "number of dimensions from 1 to 32"
        )
    head = 4 + 4 * data[3]
    if len(data) < head:
        raise ValueError(
            f"{path} has {len(data)} bytes, but the head of an IDX file of {data[3]} dimensions has {head}: "
            "it is damaged, fetch it again"
        )
    shape = tuple(np.frombuffer(data[4:head], ">u4").astype(int).tolist())
    dtype = np.dtype(IDX_TYPES[data[2]])
    expected = head + dtype.itemsize * math.prod(shape)  # Python's numbers: sizes of 32 bits overflow numpy's
    if len(data) != expected:
        raise ValueError(
            f"{path} has {len(data)} bytes, but an IDX file of shape {shape} has {expected}: it is damaged, "
            "fetch it again"
        )
    if len(data) == head:
        raise ValueError(f"{path} is an IDX file of shape {shape}, which holds nothing; expected samples")
    return np.frombuffer(data, dtype, offset=head).reshape(shape)


def read_table(path: Path, columns: int) -> NDArray[np.float32]:
    """Comma-separated numbers without a header, plain or gzipped, shape [rows, columns]; float32.

    Raises:
        ValueError: if there are no rows, a cell is no number or a row has another length.
    """
    data = content(path)
    if not data.strip():
        raise ValueError(f"{path} is empty; expected rows of {columns} numbers with commas between them")
    try:
        table = np.loadtxt(io.BytesIO(data), dtype=np.float32, delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path} is no table of numbers with commas between them: {error}") from error
    if table.shape[1] != columns:
        raise ValueError(f"{path} has {table.shape[1]} columns; expected {columns}")
    return table


YEAR = re.compile(r"(?<!\d)(1[89]\d\d|20\d\d)(?!\d)")


def read_portraits(folder: Path, size: int = 32) -> tuple[NDArray[np.float32], NDArray[np.int64], list[int]]:
    """Grey portraits in folders F and M, in the order of the years in their file names.

    Args:
        folder: has the folders F and M of images (.png, .jpg).
        size: height and width they are scaled to (default 32).

    Returns:
        pixels in [0, 1], shape [n, size * size]; 0 for F and 1 for M, shape [n]; the years.

    Raises:
        ImportError: without pillow.
        ValueError: if a file name has no year.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(
            "portraits are read with pillow, which is not installed: pip install pillow"
        ) from None
    taken: list[tuple[int, str, int, Path]] = []
    for label, sex in enumerate(("F", "M")):
        for path in sorted((folder / sex).iterdir()):
            if path.suffix.lower() in {".png", ".jpg", ".jpeg"}:
                year = YEAR.search(path.name)
                if year is None:
                    raise ValueError(
                        f"{path} has no year in its name; expected e.g. 1935_Ohio_School_0-1.png"
                    )
                taken.append((int(year[0]), path.name, label, path))
    taken.sort()
    pixels = np.zeros((len(taken), size * size), np.float32)
    for row, (_, _, _, path) in zip(pixels, taken, strict=True):
        with Image.open(path) as image:
            small = image.convert("L").resize((size, size), Image.Resampling.BILINEAR)
        row[:] = np.asarray(small, np.float32).ravel() / 255
    return pixels, np.array([t[2] for t in taken], np.int64), [t[0] for t in taken]
