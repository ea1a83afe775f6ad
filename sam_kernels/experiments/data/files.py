"""Readers of the original files: IDX, CIFAR's pickles, Covertype's table, folders of portraits."""

from __future__ import annotations

import gzip
import io
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

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


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def read_idx(path: Path) -> NDArray[Any]:
    """An array in the IDX format of MNIST, plain or gzipped.

    Two zero bytes, a byte for the type, a byte for the number of dimensions, their sizes as big-endian
    32-bit numbers, then the values.

    Raises:
        ValueError: if the file has another format, or ends too early or too late.

    Source: LeCun, Cortes, Burges, "The MNIST database", file format at the end of its page.
    """
    data = _bytes(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in IDX_TYPES or not data[3]:
        raise ValueError(
            f"{path} is no IDX file: it begins with {data[:4]!r}; expected two zero bytes, a type"
        )
    head = 4 + 4 * data[3]
    shape = tuple(np.frombuffer(data[4:head], ">u4").astype(int).tolist())
    dtype = np.dtype(IDX_TYPES[data[2]])
    expected = head + dtype.itemsize * int(np.prod(shape))
    if len(data) != expected:
        raise ValueError(
            f"{path} has {len(data)} bytes, but an IDX file of shape {shape} has {expected}: it is damaged, "
            "fetch it again"
        )
    return np.frombuffer(data, dtype, offset=head).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numbers, strings, containers and numpy arrays. A pickle may name any function to call."""

    ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),  # how Python 3 writes bytes into old protocols
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only numpy arrays are read from pickles here: a "
                "pickle can run any program. Fetch the file again from its authors"
            )
        if name == "_reconstruct":
            module = np.ndarray(0).__reduce__()[0].__module__  # numpy 2 moved it
        return super().find_class(module, name)


def read_pickle(path: Path) -> dict[Any, Any]:
    """A dict of numbers, bytes, containers and arrays from a pickle, as CIFAR's python version has them.

    Strings of Python 2 come as bytes. Nothing else is built, so that a pickle cannot run anything.

    Raises:
        pickle.UnpicklingError: if it holds anything else, or is no pickle.
    """
    stream: BinaryIO = io.BytesIO(_bytes(path))
    try:
        data = _ArraysOnly(stream, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, IndexError, ValueError, UnicodeDecodeError) as error:
        raise pickle.UnpicklingError(f"{path} cannot be read as a pickle of arrays: {error}") from error
    if not isinstance(data, dict):
        raise pickle.UnpicklingError(f"{path} holds {type(data).__name__}; expected a dict, as CIFAR's files")
    return data


def read_table(path: Path, columns: int) -> NDArray[np.float32]:
    """Comma-separated numbers without a header, plain or gzipped, shape [rows, columns]; float32.

    Raises:
        ValueError: if a cell is no number or a row has another length.
    """
    try:
        table = np.loadtxt(io.BytesIO(_bytes(path)), dtype=np.float32, delimiter=",", ndmin=2)
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
