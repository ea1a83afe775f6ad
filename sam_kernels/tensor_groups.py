"""Parameters sorted into lists that one launch can serve: same device, same dtype, dense or not.

Param groups do not split a list: each tensor names its row in a small table of scalars, so a model
with thirty param groups still takes one launch per pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .bitmask import count_bits, flatten, is_dense, unpack_from
from .policies import Adaptive, Fisher, Member, Metric
from .recipe import Recipe
from .sharding import WHOLE, Sharding, is_dtensor, local, local_gradient, sharding_of, wrapped
from .watch import MOVED, SAME, watch


class Column(IntEnum):
    """Columns of the table of scalars; `enum samk_column` of csrc/sam_kernels.h, name by name."""

    METRIC = 0
    ETA = 1
    RHO = 2
    EPS = 3
    LR = 4
    WEIGHT_DECAY = 5
    MAXIMIZE = 6
    MOMENTUM = 7
    DAMPENING = 8
    NESTEROV = 9
    BETA1 = 10
    BETA2 = 11
    ADAM_EPS = 12
    DECOUPLED = 13


COLUMNS = 16

# `enum samk_metric`
FIXED, EUCLIDEAN, ADAPTIVE, FISHER = 0, 1, 2, 3

_get_dtype = operator.attrgetter("dtype")

# Snapshots start on cache-line boundaries, so that streaming stores can be used on all of them.
_ALIGN_BYTES = 64


def lives_on_device(value: Any) -> bool:
    """Whether a hyperparameter is a tensor that the host would have to wait for."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def number(value: Any) -> float | Tensor:
    """A hyperparameter as a number, or the tensor that the device has it in."""
    return value.detach() if lives_on_device(value) else float(value)


def is_capturing(device: torch.device) -> bool:
    """Whether torch's current stream on the device records a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):  # the other way takes as long as a launch
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class TensorGroup:
    """Parallel lists over the parameters of one device and dtype, and what the passes need of them.

    Args:
        params: leaf tensors of one device and dtype, whose local tensors become the group's `params`; they
            themselves are its `owners`, to which gradients, state and masks belong.
        row: per tensor, its row of `table`.
        keys: per row, ``(index of the param group, metric code, eta)``.
        applies: per tensor, whether the metric's T differs from 1 (layer-wise metrics read it).
        dense: whether every parameter fills its memory block (see `is_dense`).
        compact: whether snapshots under a mask hold the selected elements alone.
        sharding: how the elements of all of them are spread over ranks.
    """

    def __init__(
        self,
        params: list[Tensor],
        row: list[int],
        keys: list[tuple[int, int, float]],
        applies: list[bool] | None = None,
        dense: bool = True,
        compact: bool = False,
        sharding: Sharding = WHOLE,
    ) -> None:
        self.owners = params
        self.has_dtensors = any(map(is_dtensor, params))
        self.sharding = sharding
        self.params = params = list(map(local, params)) if self.has_dtensors else params
        self.row = row
        self.keys = keys
        self.dense = dense
        self.device = params[0].device
        self.dtype = params[0].dtype
        self.table = torch.zeros(len(keys), COLUMNS, dtype=torch.float64, device=self.device)
        self.grads: list[Tensor | None] = [None] * len(params)
        self.snapshots: list[Tensor | None] = [None] * len(params)
        self.masters: list[Tensor] | None = None  # fp32; they stand where snapshots would
        self.settled: list[int] | None = None  # versions of weights that are the rounded masters
        self.rounding: Any = None  # of `sam_kernels.rounding`, for bf16 weights that are rounded at random
        self.masks: list[Tensor | None] | None = None  # words of bits, see `sam_kernels.bitmask`
        self.compact = compact
        self.offsets: list[Tensor | None] | None = None  # by word, its place in a compact snapshot
        self.cache: dict[str, Any] = {}
        self.is_perturbed = False
        self.seen_grads: tuple[Tensor | None, ...] | None = None  # those whose addresses `watch` knows
        self.has_all_grads = False
        self.is_captured = False  # whether a CUDA graph has recorded addresses of ours
        self.reads = 0  # how often gradients were read; what a backend keeps of them is stamped with it
        self._applies = applies if applies is not None else [True] * len(params)
        self._applies_tensor: Tensor | None = None
        self._buffers: list[Tensor | None] = [None] * len(params)
        self._constants: dict[tuple[tuple[float, ...], ...], Tensor] = {}
        self._row_index: Tensor | None = None
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._scratch: list[Tensor | None] = [None] * len(params)
        self.standing_snapshots: list[Tensor | None] | None = None
        self.rows: list[tuple[float, ...]] = []  # the numbers that were last written into the table
        self.follows_tensors = False  # whether the table holds more than `rows`, from tensors on the device
        self._addresses = list(map(Tensor.data_ptr, params))
        self._layout = list(map(_layout_of, params))
        self._sizes = list(map(Tensor.numel, params))
        self._all_contiguous = all(p.is_contiguous() for p in params)
        self.watch = None if self.has_dtensors else watch(params)
        self.participates = [keys[r][1] != FIXED for r in row]
        self._all_participate = all(self.participates)

    def __repr__(self) -> str:
        count = len(self.params)
        spread = f", spread over {len(self.sharding.groups)} mesh dimensions" if self.sharding.groups else ""
        return f"{count} {str(self.dtype)[6:]} tensor{'s' if count != 1 else ''} on {self.device}{spread}"

    def is_current(self) -> bool:
        """Whether the parameters still have the device, dtype, shape and strides the group was built for."""
        seen = None if self.watch is None else self.watch.look(self.params)
        if seen == SAME:
            return True
        if seen == MOVED:
            self.settled = None  # other memory may hold other weights
            return True
        if not self._holds_locals():
            return False
        params = self.params
        addresses = list(map(Tensor.data_ptr, params))
        if self._all_contiguous and addresses == self._addresses:
            # An address says nothing of what lies there; asked without a Python loop over thousands.
            # Contiguous tensors of equal size are equal to every pass, whatever their shapes.
            return (
                list(map(Tensor.numel, params)) == self._sizes
                and set(map(_get_dtype, params)) == {self.dtype}
                and all(map(Tensor.is_contiguous, params))
            )
        if self.changed() is not None:
            return False
        self._addresses = addresses
        self.settled = None  # other memory may hold other weights
        return True

    def changed(self) -> int | None:
        """The first tensor that is not what the group was built for, or None."""
        if not self._holds_locals():
            return next(
                t for t, (p, o) in enumerate(zip(self.params, self.owners, strict=True)) if p is not local(o)
            )
        for t, (p, layout) in enumerate(zip(self.params, self._layout, strict=True)):
            if _layout_of(p) != layout:
                return t
        return None

    def _holds_locals(self) -> bool:
        """Whether DTensors still have the local tensors they had; FSDP gives them others when it sets up."""
        return not self.has_dtensors or all(
            p is local(o) for p, o in zip(self.params, self.owners, strict=True)
        )

    def describe_change(self, t: int) -> str:
        """What became of tensor t since the group was built, for messages."""
        if self.params[t] is not local(self.owners[t]):
            return "was given another local tensor"
        return f"was {_describe(*self._layout[t])} and is {_describe(*_layout_of(self.params[t]))} now"

    # ---- scalars -------------------------------------------------------------------------------

    def write_table(self, rows: list[tuple[float | Tensor, ...]]) -> None:
        """Write the rows (at most 16 values each) if any number changed since last time.

        Args:
            rows: 0-d tensors among the numbers are copied on their device in every call, and never read here.

        Raises:
            RuntimeError: if a number changed while a CUDA graph is captured, which would replay the old one.
        """
        tensors = [
            (r, c, x) for r, row in enumerate(rows) for c, x in enumerate(row) if isinstance(x, Tensor)
        ]
        self.follows_tensors = bool(tensors)
        self.note_capture()
        self._write_numbers([tuple(0.0 if isinstance(x, Tensor) else x for x in row) for row in rows])
        for r, c, x in tensors:
            self.table[r, c].copy_(x.detach())

    def note_capture(self) -> None:
        """Remember it where a CUDA graph is being recorded."""
        self.is_captured = self.is_captured or is_capturing(self.device)

    def fill_table(self, row: tuple[float, ...]) -> None:
        """Write one row by operations of the device alone, which a CUDA graph may record."""
        for c, x in enumerate(row):
            if x:
                self.table[0, c].fill_(x)
        self.rows = [row]

    def _write_numbers(self, rows: list[tuple[float, ...]]) -> None:
        if rows == self.rows:
            return
        padded = torch.tensor([[*r, *[0.0] * (COLUMNS - len(r))] for r in rows], dtype=torch.float64)
        if self.device.type == "cuda":
            if is_capturing(self.device):
                raise RuntimeError(
                    "a hyperparameter changed during the capture of a CUDA graph, and a replay would repeat "
                    "its old value; take one step with these values before capturing"
                )
            # From pinned memory the host need not wait; torch keeps the block until the copy is over.
            padded = padded.pin_memory()
        self.table.copy_(padded, non_blocking=True)
        self.rows = rows

    def applies(self) -> Tensor:
        """[count] float64 on the device: 1 where the metric's T differs from 1."""
        if self._applies_tensor is None:
            flags = [float(flag) for flag in self._applies]
            self._applies_tensor = torch.tensor(flags, dtype=torch.float64, device=self.device)
        return self._applies_tensor

    @property
    def reads_weights(self) -> bool:
        """Whether the metric of any tensor measures weights, so that the norm reads them too."""
        return any(metric == ADAPTIVE for _, metric, _ in self.keys)

    # ---- masters -------------------------------------------------------------------------------

    def set_masters(self, masters: list[Tensor]) -> None:
        """Keep fp32 weights of which the parameters are the rounded copies; see `sam_kernels.masters`."""
        self.masters = masters
        self._buffers = list(masters)
        self.standing_snapshots = None

    def settle(self) -> None:
        """The weights are the rounded masters: what changes them from here on is not us."""
        if self.masters is not None:
            self.settled = self.versions()

    def versions(self) -> list[int]:
        """What the version counters of the parameters say; of DTensors those count that users see."""
        return [p._version for p in self.owners]

    def count_moved(self) -> None:
        """Weights were written: passes count that on local tensors, of which autograd knows nothing."""
        if self.has_dtensors:
            increment_version(self.owners)

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of snapshots and of the base optimizer's state."""
        return self.dtype if self.masters is None else torch.float32

    @property
    def weights(self) -> list[Tensor]:
        """What metrics measure: the masters where there are any."""
        return self.params if self.masters is None else self.masters

    # ---- gradients -----------------------------------------------------------------------------

    def read_gradients(self) -> None:
        """Take the present gradients; where needed densify, cast or re-order them to fit the weights."""
        self.seen_grads = None  # first: what the watch knows may be of others from here on
        found = None if self.watch is None else self.watch.gradients(self.params)
        if found is not None:
            self.grads, present = found
            self.seen_grads = tuple(self.grads)
            self.has_all_grads = present == len(self.params)
            self.reads += 1
            return
        grads = self.own_gradients()
        self.has_all_grads = True
        try:
            fits = self._all_contiguous and _are_plain(grads, self.dtype)  # type: ignore[arg-type]
        except TypeError:  # a None among them; asking each one beforehand would cost a pass of its own
            present = [g for g in grads if g is not None]
            fits = self._all_contiguous and _are_plain(present, self.dtype)
            self.has_all_grads = False
        if not fits:
            grads = [None if g is None else fitted(g, p) for g, p in zip(grads, self.params, strict=True)]
            self.has_all_grads = not has_none(grads)
        self.grads = grads
        self.reads += 1

    def own_gradients(self) -> list[Tensor | None]:
        """The local gradients as their parameters have them."""
        if not self.has_dtensors:
            return [p.grad for p in self.owners]
        return [local_gradient(p.grad, p) for p in self.owners]

    def give_gradient(self, t: int, grad: Tensor | None) -> None:
        """Make a local tensor the gradient of parameter t."""
        owner = self.owners[t]
        owner.grad = None if grad is None else wrapped(grad, owner)

    def aim(self, grads: list[Tensor | None]) -> None:
        """Put other tensors in the place of the gradients."""
        self.grads = grads
        self.has_all_grads = not has_none(grads)

    def movable(self) -> list[Tensor | None]:
        """The parameters that noise may move: those that take part and are trained."""
        triples = zip(self.params, self.owners, self.participates, strict=True)
        return [p if takes and owner.requires_grad else None for p, owner, takes in triples]

    def drop_gradients(self) -> None:
        """Let go of the gradients: held on to, they would outlive `zero_grad` and the next backward."""
        self.grads = [None] * len(self.params)
        self.seen_grads = None

    # ---- masks and snapshots -------------------------------------------------------------------

    def set_masks(self, masks: list[Tensor | None] | None) -> None:
        """Which elements are perturbed from now on. For compact snapshots the host waits for counts."""
        self.masks = None if masks is None or all(words is None for words in masks) else masks
        if not self.compact:
            return
        self._buffers = [None] * len(self.params)
        self.standing_snapshots = self.offsets = None
        if self.masks is not None:
            self.offsets = [None if words is None else _offsets(words) for words in self.masks]

    def is_compact(self, t: int) -> bool:
        """Whether the snapshot of tensor t holds the elements under its mask alone."""
        return self.offsets is not None and self.offsets[t] is not None

    def take_snapshots(self) -> None:
        """Hand a buffer to every tensor that is about to be perturbed, and None to the others.

        Buffers are allocated the first time a tensor needs one and keep their storage afterwards.
        """
        if self._all_participate and self.has_all_grads and self.standing_snapshots is not None:
            self.snapshots = self.standing_snapshots
            return
        chosen = [
            takes_part and grad is not None
            for takes_part, grad in zip(self.participates, self.grads, strict=True)
        ]
        missing = [t for t, take in enumerate(chosen) if take and self._buffers[t] is None]
        if missing:
            self._allocate(missing)
        self.snapshots = [
            buffer if take else None for take, buffer in zip(chosen, self._buffers, strict=True)
        ]
        if all(chosen):
            # From now on the same list object: a backend that has read its addresses keeps them.
            self.standing_snapshots = self.snapshots

    def scratch(self, t: int) -> Tensor:
        """A buffer like parameter t, allocated the first time it is asked for."""
        buffer = self._scratch[t]
        if buffer is None:
            buffer = self._scratch[t] = torch.empty_like(self.params[t], requires_grad=False)
        return buffer

    def scratch_like(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """Buffers for the tensors that are there."""
        return [None if x is None else self.scratch(t) for t, x in enumerate(tensors)]

    def scratch_gradient(self, t: int, number: int = 0) -> Tensor:
        """A buffer for a gradient of parameter t that outlives the next backward pass; there are several."""
        buffer = self._kept.get((number, t))
        if buffer is None:
            buffer = self._kept[number, t] = torch.empty_like(self.params[t], requires_grad=False)
        return buffer

    def kept_like(self, tensors: list[Tensor | None], number: int = 0) -> list[Tensor | None]:
        """Buffers that outlive a backward pass, for the tensors that are there."""
        return [None if x is None else self.scratch_gradient(t, number) for t, x in enumerate(tensors)]

    def buffer_bytes(self) -> int:
        """Memory of what the group has allocated beside parameters: snapshots and scratch."""
        snapshots = self._buffers if self.masters is None else []  # masters are no buffers of ours
        lists = (snapshots, self._scratch, list(self._kept.values()))
        return sum(x.numel() * x.element_size() for own in lists for x in own if x is not None)

    def scratch_snapshot(self, t: int, snapshot: Tensor) -> Tensor:
        """A buffer like the snapshot of tensor t, which may be compact."""
        if not self.is_compact(t):
            return self.scratch(t)
        return torch.empty_like(snapshot)

    def constants(self, *rows: tuple[float, ...]) -> Tensor:
        """float64 [rows, columns] on the device, made once: coefficients that no step changes."""
        held = self._constants.get(rows)
        if held is None:
            held = self._constants[rows] = torch.tensor(rows, dtype=torch.float64, device=self.device)
        return held

    def row_index(self) -> Tensor:
        """int64 [count] on the device: per tensor, its row of the table."""
        if self._row_index is None:
            self._row_index = torch.tensor(self.row, device=self.device)
        return self._row_index

    def perturbed(self) -> list[Tensor | None]:
        """The parameters that have a snapshot."""
        return [None if s is None else p for p, s in zip(self.params, self.snapshots, strict=True)]

    def drop_snapshots(self) -> None:
        """Forget which tensors were perturbed; the buffers stay for the next step."""
        self.snapshots = [None] * len(self.params)

    def copy_back(self) -> None:
        """``w = snapshot`` wherever that is possible, for a step that failed, whatever made it fail.

        Converts where somebody gave a perturbed parameter another dtype, device or strides.
        """
        for t, (param, snapshot) in enumerate(zip(self.params, self.snapshots, strict=True)):
            if snapshot is None or not self.fits(t):
                continue
            words = None if self.masks is None else self.masks[t]
            if self.masters is not None:
                snapshot, words = snapshot.to(self.dtype), None  # of all weights, perturbed or not
            if words is None:
                param.copy_(snapshot.view_as(param) if snapshot.shape != param.shape else snapshot)
                continue
            # Of weights that were not perturbed there may be no snapshot. All this is for the parameter as it
            # was, and it may have other strides now.
            layout = self._layout[t][2:]
            mask, saved = unpack_from(words, layout), snapshot
            if self.is_compact(t):
                saved = torch.empty_strided(*layout, dtype=snapshot.dtype, device=snapshot.device)
                put_back(saved, mask, snapshot)
            mask, saved = (x.to(param.device).reshape(param.shape) for x in (mask, saved))
            param.copy_(torch.where(mask, saved.to(param.dtype), param))

    def fits(self, t: int) -> bool:
        """Whether the snapshot of tensor t, if there is one, still fits its parameter."""
        param, snapshot = self.params[t], self.snapshots[t]
        if self.is_compact(t):
            return param.numel() == self._sizes[t]
        if snapshot is None or snapshot.shape == param.shape:
            return True
        return snapshot.numel() == param.numel() and snapshot.is_contiguous() and param.is_contiguous()

    def _allocate(self, indices: list[int]) -> None:
        """One block for all new buffers: thousands of small allocations would cost more than the pass."""
        compact = list(filter(self.is_compact, indices))
        if compact:
            self._allocate_compact(compact)
            indices = [t for t in indices if self._buffers[t] is None]
        if not self.dense:
            for t in indices:
                self._buffers[t] = torch.empty_like(self.params[t], requires_grad=False)
            return
        quantum = _ALIGN_BYTES // self.params[0].element_size()
        offsets, total = [], 0
        for t in indices:
            offsets.append(total)
            total += -(-self.params[t].numel() // quantum) * quantum
        block = torch.empty(total, dtype=self.dtype, device=self.device)
        for t, offset in zip(indices, offsets, strict=True):
            p = self.params[t]
            self._buffers[t] = block.as_strided(p.size(), p.stride(), offset)

    def _allocate_compact(self, indices: list[int]) -> None:
        counts = torch.stack([count_bits(self.masks[t]).sum() for t in indices]).tolist()  # type: ignore[index, arg-type]
        block = torch.empty(sum(counts), dtype=self.dtype, device=self.device)
        for t, buffer in zip(indices, block.split(counts), strict=True):
            self._buffers[t] = buffer


_NONE = id(None)


def _offsets(words: Tensor) -> Tensor:
    """Per word, how many elements before it are selected."""
    counts = count_bits(words)
    return counts.cumsum(0) - counts


def put_back(tensor: Tensor, mask: Tensor, values: Tensor) -> None:
    """``tensor[mask] = values`` in the order of memory, with conversion to the tensor's dtype and device."""
    values = values.to(tensor.device, tensor.dtype)
    if is_dense(tensor):
        flatten(tensor).masked_scatter_(flatten(mask).to(tensor.device), values)
    else:
        tensor.masked_scatter_(mask.to(tensor.device), values)


def has_none(items: list[Any]) -> bool:
    """``None in items`` by identity: tensors overload ==, and thousands of them would take a while."""
    return _NONE in set(map(id, items))


def _are_plain(grads: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether all are strided, contiguous and of that dtype, asked without a Python loop."""
    # A sparse tensor answers False here too.
    are_dense = all(map(Tensor.is_contiguous, grads)) and not set(map(_get_dtype, grads)) - {dtype}
    return are_dense and not any(map(Tensor.is_neg, grads))


def _layout_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _describe(device: torch.device, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]) -> str:
    return f"{dtype} {tuple(shape)} with strides {strides} on {device}"


def fitted(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient, or a slot, as a dense tensor with dtype, device and strides of its parameter.

    Raises:
        ValueError: if it has another shape.
    """
    if grad.shape != param.shape:
        raise ValueError(
            f"a tensor of shape {tuple(grad.shape)} belongs to a parameter of shape {tuple(param.shape)}; "
            "expected the same shape. Was state of another model loaded?"
        )
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    is_alike = grad.dtype == param.dtype and grad.device == param.device
    # Behind complex numbers a gradient may be one of which a bit says that its numbers are negated.
    if is_alike and not grad.is_neg() and (grad.stride() == param.stride() or grad.numel() <= 1):
        return grad
    return torch.empty_like(param, requires_grad=False).copy_(grad)


def collect(
    param_groups: list[dict[str, Any]],
    recipe: Recipe,
    member_of: Callable[[Tensor], Member],
    adaptive_key: str = "adaptive",
    known_shardings: Mapping[int, Sharding] | None = None,
) -> list[TensorGroup]:
    """Sort the parameters of an optimizer into tensor groups.

    Args:
        param_groups: as `torch.optim` keeps them.
        recipe: decides participation (mask) and metric per tensor.
        member_of: what is known about a parameter.
        adaptive_key: where True in a param group means ``T = |w|`` for it.
        known_shardings: as `sharding.flat_shardings` finds them.

    Raises:
        ValueError: if a parameter is complex, sparse or not a plain tensor, shares memory with itself or
            another, or the mask cannot decide.
    """
    lists: dict[tuple[Any, ...], tuple[list[Tensor], list[int], list[Any], list[bool]]] = {}
    seen: set[int] = set()
    places: list[tuple[Tensor, str]] = []
    for index, group in enumerate(param_groups):
        for position, param in enumerate(group["params"]):
            own = local(param)
            _check_parameter(own, index, position)
            if id(param) in seen:
                continue  # torch.optim only warns about duplicates; perturbing twice would be wrong
            seen.add(id(param))
            member = member_of(param)
            dense, sharding = is_dense(own), sharding_of(param, known_shardings or {})
            params, row, keys, applies = lists.setdefault(
                (own.device, own.dtype, dense, sharding), ([], [], [], [])
            )
            places.append((own, f"param_groups[{index}]['params'][{position}]"))
            key = (index, *_metric_of(recipe, bool(group.get(adaptive_key, False)), member))
            if key not in keys:
                keys.append(key)
            params.append(param)
            row.append(keys.index(key))
            applies.append(recipe.metric.applies_to(member))
    _check_overlaps(places)
    compact = getattr(recipe.mask, "compact", False)
    return [
        TensorGroup(params, row, keys, applies, dense, compact, sharding)
        for (_, _, dense, sharding), (params, row, keys, applies) in lists.items()
    ]


def _metric_of(recipe: Recipe, adaptive: bool, member: Member) -> tuple[int, float]:
    refusal = recipe.mask.refusal(member) or recipe.metric.refusal(member)
    if refusal is not None:
        raise ValueError(f"recipe '{recipe.name}': {refusal}")
    if not recipe.mask.selects(member):
        return FIXED, 0.0
    metric: Metric = recipe.metric
    if isinstance(metric, Fisher):
        return FISHER, metric.eta
    if isinstance(metric, Adaptive):
        return (ADAPTIVE, metric.eta) if metric.applies_to(member) else (EUCLIDEAN, 0.0)
    return (ADAPTIVE, 0.0) if adaptive else (EUCLIDEAN, 0.0)


def _check_parameter(param: Tensor, index: int, position: int) -> None:
    where = f"param_groups[{index}]['params'][{position}]"
    if param.is_complex():
        raise ValueError(
            f"{where} is {param.dtype}; sharpness-aware minimization of complex parameters is not defined "
            "here. Give the optimizer torch.view_as_real of it"
        )
    if not param.is_floating_point():
        raise ValueError(f"{where} is {param.dtype}; expected a floating-point parameter")
    if param.layout != torch.strided:
        raise ValueError(f"{where} has layout {param.layout}; expected a dense parameter")
    if param.is_neg():
        raise ValueError(f"{where} is a negated view; give the optimizer a parameter of resolve_neg() of it")


def _check_overlaps(places: list[tuple[Tensor, str]]) -> None:
    """Refuse elements that belong to two parameters, or twice to one: restoring them has no one answer."""
    spans: dict[torch.device, list[tuple[int, int, Tensor, str]]] = {}
    for param, where in places:
        start = 0 if param.device.type == "meta" else param.data_ptr()
        if start == 0 or param.numel() == 0:
            continue
        if not is_dense(param) and _repeats(param):
            raise ValueError(
                f"{where} of shape {tuple(param.shape)} and strides {param.stride()} holds the same element "
                "more than once, as expand() makes it; give the optimizer the tensor it was made from"
            )
        reach = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
        end = start + (reach + 1) * param.element_size()
        spans.setdefault(param.device, []).append((start, end, param, where))
    for on_device in spans.values():
        on_device.sort(key=operator.itemgetter(0))
        reached: list[tuple[int, int, Tensor, str]] = []  # those that end beyond the present start
        for span in on_device:
            reached = [other for other in reached if other[1] > span[0]]
            for other in reached:
                # Interleaved views of one tensor, columns of a matrix say, may still share nothing.
                if _share(other[2], span[2]):
                    raise ValueError(
                        f"{other[3]} and {span[3]} are different parameters over the same memory, which "
                        "would be perturbed and updated twice; tie weights by using one Parameter in both "
                        "places"
                    )
            reached.append(span)


def _repeats(tensor: Tensor) -> bool:
    """Whether an element of memory appears in the tensor more than once."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride == 0:
            return True
        if stride <= reach:  # windows, or something rare that only looks like them
            return _addresses(tensor).unique().numel() < tensor.numel()
        reach += (size - 1) * stride
    return False


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans of memory overlap have an element in common."""
    return (is_dense(a) and is_dense(b)) or bool(torch.isin(_addresses(a), _addresses(b)).any())


def _addresses(tensor: Tensor) -> Tensor:
    """The address of every element."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return (tensor.data_ptr() + offsets * tensor.element_size()).flatten()
