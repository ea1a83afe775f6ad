"""Tensor sizes to chunks, and tensor lists to tables of addresses on the device. Knows no pass.

note: [tables]
Kernels take addresses from int64 tables, so one launch serves any number of tensors. The chunks follow
from the sizes alone and are uploaded once. Passes that read different lists have different tables, each
uploaded before a pass in one asynchronous copy from pinned memory, and only if its addresses are not those of
one that is there already.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...bitmask import count_words
from ...tensor_groups import is_capturing
from ...watch import are_same

Tensors = Sequence[Tensor | None]

# Chunks are powers of two between these; the smallest is the largest block of any dtype, so that a whole
# chunk is whole blocks and whole words of a mask.
SMALLEST, LARGEST = 4096, 65536


class List(IntEnum):
    """Rows of the table of addresses."""

    PARAMS = 0
    GRADS = 1
    SNAPSHOTS = 2
    LISTS = 3  # three: lists of combine_ and grad_stats, state of the base optimizer
    OUTS = 6  # two
    STEPS = 8
    FRESH = 9  # no address: 1 where a momentum buffer takes the gradient
    MASKS = 10
    WITHIN = 11  # masks of the elements that take part in a selection
    NUMBERS = 12  # no address: of the tensor, for its random numbers
    POSITIONS = 13  # no address: of the tensor's first element among all


ROWS = len(List) + 3

# tensor, first element, elements, number in tensor order, row of the table of scalars
CHUNK_COLUMNS = 5

# Tables of one pass that stay on the device; the recipes' steps have six lists at most that take turns.
KEPT = 8

# What stands for the address of a tensor without elements, which has none: it takes part all the same.
_NOTHING = 16

_get_dtype, _get_device = operator.attrgetter("dtype"), operator.attrgetter("device")

_CAPTURING = (
    "the address of a tensor changed during the capture of a CUDA graph, and the Triton passes would have to "
    "wait for its upload; take a step with the same tensors first, with gradients that stay where they are "
    "(zero_grad(set_to_none=False)), or use the native backend"
)


def chunk_size(total: int) -> int:
    """Elements of a chunk: about a thousand chunks, chosen by size alone, so that sums have one order.

    Example:
        >>> chunk_size(1), chunk_size(10_000_000), chunk_size(10**9)
        (4096, 8192, 65536)
    """
    size = SMALLEST
    while size < LARGEST and size * 2 * 1024 <= total:
        size *= 2
    return size


def cut(sizes: list[int], row: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The chunks of a list of tensors, and per tensor the number of its first one.

    Whole chunks come first and then the tails, longest first, so that programs that take every n-th chunk end
    at nearly the same time. Every tensor has one tail, perhaps an empty one.

    Returns:
        ``[chunks, CHUNK_COLUMNS]`` and ``[tensors + 1]``, both int64.
    """
    numel = np.array(sizes, dtype=np.int64)
    size = chunk_size(int(numel.sum()))
    counts = numel // size + 1
    first = np.concatenate([[0], np.cumsum(counts)])
    tensor = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(first[-1])
    begin = (number - first[tensor]) * size
    length = np.minimum(numel[tensor] - begin, size)
    chunks = np.stack([tensor, begin, length, number, np.array(row, dtype=np.int64)[tensor]], axis=1)
    order = np.argsort(-length, kind="stable")
    return np.ascontiguousarray(chunks[order]), first


@dataclass(eq=False)
class Upload:
    """A table on the device, and the numbers in it."""

    rows: np.ndarray
    numbers: Tensor
    is_captured: bool = False  # a graph reads it at every replay: it is the graph's then


class Table:
    """The addresses that one pass reads, on the host and on the device. note: [tables]

    A step may run a pass more than once, over lists that take turns. So the last few tables stay on the
    device: in the next step, or in a CUDA graph, they are there.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.rows = np.zeros((ROWS, count), dtype=np.int64)
        self.snapshots: Any = None  # the list of snapshots that was read last, where it stands between steps
        self.masks: Any = None  # the list of masks that was read last
        self.held: dict[int, list[Any]] = {}  # by row, the tensors that were read last
        self._device = device
        self._uploads: list[Upload] = []  # used last comes last
        self._free: list[Tensor] = []
        self._is_stale = True

    def holds(self, row: int, tensors: Tensors, addresses: np.ndarray) -> bool:
        """Whether the row is of these very tensors, and they are where they were."""
        return are_same(list(tensors), self.held.get(row, [])) and np.array_equal(self.rows[row], addresses)

    def put(self, row: int, numbers: np.ndarray) -> None:
        """Write one row."""
        if not np.array_equal(self.rows[row], numbers):
            self.rows[row] = numbers
            self._is_stale = True

    def on_device(self) -> Tensor:
        """The table on the device, as it is after what was put into it.

        Raises:
            RuntimeError: if an address changed while a CUDA graph is captured.
        """
        capturing = is_capturing(self._device)
        if self._is_stale:
            found = next((one for one in self._uploads if np.array_equal(one.rows, self.rows)), None)
            if found is None:
                if capturing:
                    raise RuntimeError(_CAPTURING)
                found = self._upload()
            else:
                self._uploads.remove(found)
            self._uploads.append(found)
            self._is_stale = False
        present = self._uploads[-1]
        present.is_captured = present.is_captured or capturing
        return present.numbers

    def _upload(self) -> Upload:
        if not self._free:
            oldest = next((one for one in self._uploads if not one.is_captured), None)
            if oldest is None:  # the first time, or graphs have taken all there were
                places = torch.empty(KEPT, *self.rows.shape, dtype=torch.int64, device=self._device)
                self._free = list(places.unbind())  # at once, so that no later step takes memory
            else:
                self._uploads.remove(oldest)
                self._free.append(oldest.numbers)
        numbers = self._free.pop()
        numbers.copy_(_ready(torch.from_numpy(self.rows.copy()), self._device), non_blocking=True)
        return Upload(self.rows.copy(), numbers)


class Plan:
    """The chunks of one layout and the addresses of each pass over it, on its device.

    Args:
        sizes: elements of each tensor.
        row: per tensor, its row of the table of scalars.
        device: where the tensors are.

    Raises:
        RuntimeError: while a CUDA graph is captured.
    """

    def __init__(self, sizes: list[int], row: list[int], device: torch.device) -> None:
        if is_capturing(device):
            raise RuntimeError(_CAPTURING)
        chunks, first = (torch.from_numpy(x) for x in cut(sizes, row))
        self.device = device
        self.chunks = len(chunks)
        self.count = len(sizes)
        self.layout = _ready(chunks, device).to(device, non_blocking=True)
        self.first = _ready(first, device).to(device, non_blocking=True)
        self.partials = torch.zeros(self.chunks, 6, dtype=torch.float64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.words = [count_words(size) for size in sizes]
        self._sizes = sizes
        self._tables: dict[str, Table] = {}

    def table(self, name: str) -> Table:
        """The table of that name. One for all passes would change within a step, out of a graph's reach."""
        if name not in self._tables:
            self._tables[name] = Table(self.count, self.device)
        return self._tables[name]

    def point(
        self,
        table: Table,
        row: int,
        name: str,
        tensors: Tensors,
        dtype: torch.dtype,
        sizes: Any = None,
        *,
        vouched: bool = False,
        hold: bool = False,
    ) -> int:
        """Take the addresses of one list; returns how many of its tensors are there.

        Args:
            table: of the pass that will read it.
            row: of that table.
            name: of the list, for messages.
            sizes: elements each tensor must have; those of the plan by default.
            vouched: the tensor group has seen to it that dtypes and devices are right; sizes are checked.
            hold: these are the same tensors for many steps; they are checked where one or its address is new.

        Raises:
            ValueError: if a tensor has another size, dtype or device, or no memory.
        """
        sizes = self._sizes if sizes is None else sizes
        try:
            addresses = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))  # type: ignore[arg-type]
            is_there = None
        except TypeError:  # a None among them; asking each one beforehand would cost a pass of its own
            addresses = np.array([0 if x is None else x.data_ptr() for x in tensors], dtype=np.int64)
            is_there = np.array([x is not None for x in tensors])
        if not addresses.all():
            missing = addresses == 0 if is_there is None else (addresses == 0) & is_there
            self._check_memory(name, tensors, missing)
            addresses[missing] = _NOTHING
        is_known = (
            self._have_sizes(tensors, sizes) if vouched else hold and table.holds(row, tensors, addresses)
        )
        if len(tensors) != self.count or not (is_known or self._fits(tensors, dtype, sizes)):
            self._check(name, tensors, dtype, sizes)
        if hold:
            table.held[row] = list(tensors)
        table.put(row, addresses)
        return len(tensors) if is_there is None else int(is_there.sum())

    @staticmethod
    def _have_sizes(tensors: Tensors, sizes: list[int]) -> bool:
        try:
            return list(map(Tensor.numel, tensors)) == sizes  # type: ignore[arg-type]
        except TypeError:  # a None among them
            return all(x is None or x.numel() == size for x, size in zip(tensors, sizes, strict=False))

    def _fits(self, tensors: Tensors, dtype: torch.dtype, sizes: list[int]) -> bool:
        """Whether all are there and of that dtype and these sizes, asked without a Python loop."""
        try:
            return (
                list(map(Tensor.numel, tensors)) == sizes  # type: ignore[arg-type]
                and set(map(_get_dtype, tensors)) == {dtype}
                and set(map(_get_device, tensors)) == {self.device}
            )
        except (AttributeError, TypeError):  # a None among them
            return False

    def _check(self, name: str, tensors: Tensors, dtype: torch.dtype, sizes: list[int]) -> None:
        if len(tensors) != self.count:
            raise ValueError(f"{name} has {len(tensors)} entries, but the plan has {self.count} tensors")
        for t, (x, size) in enumerate(zip(tensors, sizes, strict=True)):
            if x is None:
                continue
            if x.dtype != dtype:
                raise ValueError(
                    f"{name}[{t}] is {x.dtype} but the list is {dtype}; a list must have one dtype"
                )
            if x.device != self.device:
                raise ValueError(
                    f"{name}[{t}] is on {x.device} but the parameters are on {self.device}; move the "
                    "optimizer's state with its parameters"
                )
            if x.numel() != size:
                raise ValueError(f"{name}[{t}] has {x.numel()} elements, expected {size}")

    def _check_memory(self, name: str, tensors: Tensors, missing: np.ndarray) -> None:
        for t in np.flatnonzero(missing).tolist():
            size = tensors[t].numel()  # type: ignore[union-attr]
            if size:
                raise ValueError(
                    f"{name}[{t}] has {size} elements but no memory in this process (its data_ptr is 0); "
                    "pass local tensors, not DTensors or meta tensors"
                )


def _ready(block: Tensor, device: torch.device) -> Tensor:
    """Host memory that is copied without waiting; torch keeps a pinned block until its copy is over."""
    return block.pin_memory() if device.type == "cuda" else block
