"""CIFAR's pickles: dicts of labels and arrays, read without running anything that they ask for.

A pickle names functions to call and states to give to objects. Python's own unpickler does as it says, and
numpy's ``__setstate__`` trusts shapes and types that it is given. So no name leads out of this file: those
that numpy writes get stand-ins, which check what they are given, and any other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files

TYPES = {"u1": "|", "i1": "|", "i8": "<>"}
"""The types of arrays that are read, with the byte orders each may have."""


class _Type:
    """Stands for a numpy.dtype: its kind, and with `__setstate__` its byte order."""

    __slots__ = ("kind", "order")

    def __init__(self, kind: Any, *_: Any) -> None:
        self.kind, self.order = _word(kind), ""
        if self.kind not in TYPES:
            raise ValueError(f"it has an array of type {self.kind[:20]!r}; expected {', '.join(TYPES)}")

    def __setstate__(self, state: Any) -> None:
        order = _word(state[1])
        if len(order) != 1 or order not in TYPES[self.kind] or any(part is not None for part in state[2:5]):
            raise ValueError(f"its type {self.kind} is not a plain one of byte order {TYPES[self.kind]}")
        self.order = order


class _Array:
    """Stands for a numpy.ndarray, which it builds from its bytes once it knows that they fit."""

    __slots__ = ("array",)
    array: NDArray[Any] | None

    def __init__(self, *_: Any) -> None:
        self.array = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, data = state
        if type(kind) is not _Type or not kind.order or type(data) is not bytes:
            raise ValueError("it has an array that is not a type and bytes")
        if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("it has an array with a shape that is not of sizes")
        dtype = np.dtype(kind.order + kind.kind)
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"it has an array whose {len(data)} bytes do not fit its shape")
        self.array = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


def _word(value: Any) -> str:
    """A str, also from the bytes that Python 2 wrote."""
    if type(value) is bytes:
        return value.decode("latin1")
    if type(value) is not str:
        raise ValueError(f"it has {type(value).__name__} where a word is expected")
    return value


def _latin1(text: Any, encoding: Any = "") -> bytes:
    """Stands for _codecs.encode, with which Python 3 writes bytes into old protocols."""
    if type(text) is not str or _word(encoding) != "latin1":
        raise ValueError("it encodes text, but not as the latin1 of bytes in old protocols")
    return text.encode("latin1")


STANDS_FOR: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever handed to _reconstruct
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # numpy 2 moved it
    ("_codecs", "encode"): _latin1,
}

# What numbers, words, containers and arrays are made of, for the reader of pickle that is written in Python:
# the one in C takes memory for any index that a damaged file asks it to remember.
OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 "
    "LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET "
    "GLOBAL STACK_GLOBAL REDUCE BUILD"
).split()
_read: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch  # type: ignore[attr-defined]


def _build(self: Any) -> None:
    if type(self.stack[-2]) not in (_Array, _Type):
        raise ValueError(f"it gives a state to {type(self.stack[-2]).__name__}, which has none")
    _read[pickle.BUILD[0]](self)


def _with_plain_keys(code: bytes, keys: slice) -> Callable[[Any], None]:
    def read(self: Any) -> None:
        if not all(type(key) in (bytes, str, int) for key in self.stack[keys]):
            raise ValueError("it has a dict with keys that are no words")
        _read[code[0]](self)

    return read


class _ArraysOnly(pickle._Unpickler):  # type: ignore[name-defined, misc]
    dispatch = {
        **{getattr(pickle, name)[0]: _read[getattr(pickle, name)[0]] for name in OPCODES},
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _with_plain_keys(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _with_plain_keys(pickle.SETITEMS, slice(0, None, 2)),
        pickle.DICT[0]: _with_plain_keys(pickle.DICT, slice(0, None, 2)),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STANDS_FOR:
            raise pickle.UnpicklingError(
                f"it asks for {module[:80]}.{name[:80]}, and only numpy arrays are read from pickles here: a "
                "pickle can run any program. Fetch the file again from its authors"
            )
        return STANDS_FOR[module, name]


def read_pickle(path: Path) -> dict[Any, Any]:
    """A dict from a pickle, as CIFAR's python version has them.

    Its values are numbers, words, lists and the like, or arrays of one-byte integers and int64, which are not
    writeable. Strings of Python 2 come as bytes. Nothing that the file names is imported or called, and an
    array is made only of bytes that fit its shape. A hostile file can still be as large as it likes.

    Raises:
        ValueError: if it is gzipped and damaged.
        pickle.UnpicklingError: if it holds anything else, or is no pickle.
    """
    data = files.content(path)
    try:
        found = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # whatever bytes that are no pickle lead to
        why = str(error) if isinstance(error, (pickle.UnpicklingError, ValueError)) else type(error).__name__
        why = " ".join(why[:400].split())  # it may quote the file
        raise pickle.UnpicklingError(
            f"{path} cannot be read; expected a pickle of a dict with arrays, as CIFAR's files: {why}"
        ) from error
    if type(found) is not dict:
        raise pickle.UnpicklingError(
            f"{path} holds {type(found).__name__}; expected a dict, as CIFAR's files"
        )
    made = {key: value.array if type(value) is _Array else value for key, value in found.items()}
    if any(value is None for key, value in made.items() if type(found[key]) is _Array):
        raise pickle.UnpicklingError(f"{path} has an array without a shape and bytes; fetch it again")
    return made
