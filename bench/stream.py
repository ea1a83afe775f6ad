"""Plain loops over memory: stream.c where there is a C compiler, torch's operators everywhere."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("stream.c")

# The loops of stream.c take multiples of this many elements.
_LEAST = 64


@cache
def _library() -> ctypes.CDLL | None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stream.so"
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(target), str(_SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        library = ctypes.CDLL(str(target))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.stream_sum.argtypes, library.stream_sum.restype = [pointer, size], ctypes.c_double
    library.stream_triad.argtypes = [pointer, pointer, pointer, ctypes.c_float, size]
    lists = {"copy": 2, "sum3": 4, "save_update": 3, "update1": 4, "update2": 5}
    for name, count in lists.items():
        getattr(library, f"stream_{name}").argtypes = [pointer] * count + [size]
    return library


def _library_for(x: Tensor) -> ctypes.CDLL | None:
    return _library() if x.numel() >= _LEAST else None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # Python threads: ctypes lets go of the interpreter, and a second OpenMP pool would fight torch's.
    return ThreadPoolExecutor(threads)


def _in_parallel(
    loop: Callable[..., object], tensors: tuple[Tensor, ...], *scalars: float
) -> Callable[[], None]:
    """The loop over the vectors, each thread its share; shares are multiples of _LEAST."""
    count, threads = tensors[0].numel() // _LEAST * _LEAST, torch.get_num_threads()
    share = -(-count // threads // _LEAST) * _LEAST
    parts = [(at, min(share, count - at)) for at in range(0, count, share)]

    def on_part(at: int, n: int) -> None:
        loop(*(x.data_ptr() + 4 * at for x in tensors), *scalars, n)

    def run() -> None:
        futures = [_pool(threads).submit(on_part, *part) for part in parts[1:]]
        on_part(*parts[0])
        for future in futures:
            future.result()

    return run


def reads(x: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read a float32 vector once: 4 bytes per element."""
    found: dict[str, Callable[[], object]] = {"read: torch.sum": x.sum, "read: torch norm": x.norm}
    library = _library_for(x)
    if library is not None:
        found["read: C sum"] = _in_parallel(library.stream_sum, (x,))
    return found


def copies(out: Tensor, x: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to copy one float32 vector to another: 8 bytes per element."""
    found: dict[str, Callable[[], object]] = {"copy: torch": lambda: out.copy_(x)}
    library = _library_for(x)
    if library is not None:
        found["copy: C streaming"] = _in_parallel(library.stream_copy, (out, x))
    return found


def triads(out: Tensor, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to write ``x + a y``: 12 bytes per element."""
    found: dict[str, Callable[[], object]] = {"triad: torch": lambda: torch.add(x, y, alpha=0.5, out=out)}
    library = _library_for(x)
    if library is not None:
        found["triad: C streaming"] = _in_parallel(library.stream_triad, (out, x, y), 0.5)
    return found


def mixes(
    w: Tensor, g: Tensor, saved: Tensor, m: Tensor, v: Tensor, out: Tensor
) -> dict[str, Callable[[], object]]:
    """Loops with as many reads and writes as a pass and next to no arithmetic; only stream.c has them."""
    library = _library_for(w)
    if library is None:
        return {}
    return {
        "like combine_: C": _in_parallel(library.stream_sum3, (out, g, saved, m)),
        "like perturb_: C": _in_parallel(library.stream_save_update, (w, g, saved)),
        "like descend_ sgd: C": _in_parallel(library.stream_update1, (w, g, saved, m)),
        "like descend_ adamw: C": _in_parallel(library.stream_update2, (w, g, saved, m, v)),
    }
