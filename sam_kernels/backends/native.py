"""Native backend: thin calls to the C++ and CUDA passes, one plan per tensor group.

The module behind it was built without torch and knows only addresses; this file reads them off the
tensors, hands over torch's thread pool and advances the version counters that a write through an
address would leave behind. Importing it never fails: `refusal` says what is missing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._version import ABI_VERSION
from ..ranks import Ranks
from ..tensor_groups import FISHER, TensorGroup
from .handover import count_descent, count_perturbation, count_write, has_momentum, measured, scalars

# enum samk_dtype, samk_moment, samk_shape, samk_rule
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MOMENTS = {"square": 0, "peak": 1, "power": 2}
_SHAPES = {"linear": 0, "sign": 1, "powered": 2}
_RULES = {"sgd": 0, "adam": 1}

_SOMEWHERE = torch.zeros(1)

_CUDA_LIBRARY = "libsam_kernels_cuda.so"

_ISA_VARIABLE = "SAM_KERNELS_CPU_ISA"


class Native:
    """The passes of libraries with the C interface: the CPU engine in the module, the CUDA library beside it.

    See `sam_kernels.backends.Backend` for the contract of each method.

    Args:
        name: what users call it.
        libraries: by device type, the library or the sentence why there is none.
    """

    def __init__(self, name: str, libraries: dict[str, Any]) -> None:
        self.name = name
        self._libraries = libraries

    def refusal(self, group: TensorGroup) -> str | None:
        if _problem is not None:
            return _problem
        library = self._libraries.get(group.device.type)
        if library is None:
            known = " and ".join(self._libraries)
            return f"the native passes serve {known} tensors, not {group.device.type} ones"
        if isinstance(library, str):
            return library
        if group.dtype not in _DTYPES:
            known = ", ".join(str(dtype)[6:] for dtype in _DTYPES)
            return f"the native passes calculate in {known}, not in {str(group.dtype)[6:]}"
        if group.compact and not library.is_cpu_engine:
            return "the CUDA passes keep whole snapshots; compact ones are served by foreach"
        if not group.dense:
            return "a parameter is a view with gaps or overlaps, and the native passes walk whole blocks"
        if group.device.type != "cpu":
            try:
                library.check_device(group.device.index)
            except RuntimeError as problem:
                return str(problem)
        return None

    def counts_on_device(self, group: TensorGroup) -> bool:
        """Whether step counters must live beside the tensors: the host cannot know of a skipped step."""
        return group.device.type != "cpu"

    def sq_norm(
        self,
        group: TensorGroup,
        *,
        of: str = "gradient",
        moment: str = "square",
        q: float | None = None,
        peak: Tensor | None = None,
        root: float = 1.0,
        per_tensor: bool = False,
        masked: bool = False,
    ) -> Tensor:
        if of == "gradient":
            _check_fisher(group, "sq_norm", "moment", moment, "square")
        plan = self._plan(group)
        _point_masks(plan, group)
        table, tensors, reads_weights = measured(group, of)
        kept = _DTYPES[group.kept_dtype]
        if reads_weights:
            plan.point(_native.PARAMS, "weights", group.weights, kept)
        if of == "weight":
            plan.point(_native.GRADS, "grads", tensors, kept)
        else:
            _point_gradients(plan, group)
        group.cache["native grads"] = tensors
        # Fresh results each time: the caller may hold an earlier one.
        total = torch.empty((), dtype=torch.float64, device=group.device)
        each = (
            torch.empty(len(group.params), dtype=torch.float64, device=group.device) if per_tensor else None
        )
        peak = scalars(peak, group, torch.float64)
        plan.sq_norm(
            table.data_ptr(),
            reads_weights,
            _MOMENTS[moment],
            q or 0.0,
            _at(peak),
            root,
            total.data_ptr(),
            _at(each),
            masked and group.masks is not None,
        )
        return total if each is None else each

    def perturb_(
        self,
        group: TensorGroup,
        norm: Tensor,
        *,
        shape: str = "linear",
        q: float | None = None,
        peak: Tensor | None = None,
        tensor_scale: Tensor | None = None,
    ) -> None:
        _check_fisher(group, "perturb_", "shape", shape, "linear")
        plan = self._plan(group)
        plan.point(_native.PARAMS, "params", group.params, _DTYPES[group.dtype])
        # The norm has just read the addresses of these very gradients.
        if group.cache.pop("native grads", None) is not group.grads:
            _point_gradients(plan, group)
        present = _point_snapshots(plan, group)
        _point_masks(plan, group)
        held = [scalars(x, group, torch.float64) for x in (peak, norm, tensor_scale)]
        drawn = group.rounding
        bits = (0, 0, []) if drawn is None else (drawn.seed, drawn.step, drawn.numbers)
        has_masters = group.masters is not None
        plan.perturb(group.table.data_ptr(), _SHAPES[shape], q or 0.0, *map(_at, held), has_masters, *bits)
        count_perturbation(group, present)

    def perturbations(self, group: TensorGroup) -> int:
        """How often the group was perturbed: a call that failed has written nothing, and is not counted."""
        count: int = self._plan(group).perturbations
        return count

    def restore_(self, group: TensorGroup) -> None:
        plan = self._plan(group)
        plan.point(_native.PARAMS, "params", group.params, _DTYPES[group.dtype])
        present = _point_snapshots(plan, group)
        _point_masks(plan, group)
        plan.restore(group.masters is not None)
        count_write(group.params, group.snapshots, present)

    def grad_stats(
        self, group: TensorGroup, lists: list[list[Tensor | None]], *, per_tensor: bool = False
    ) -> Tensor:
        plan = self._plan(group)
        for i, tensors in enumerate(lists):
            _point_foreign(plan, group, _native.LISTS + i, f"lists[{i}]", tensors)
        count = len(lists) * (len(lists) + 1) // 2
        dots = torch.empty(count, dtype=torch.float64, device=group.device)
        shape = len(group.params), count
        each = torch.empty(shape, dtype=torch.float64, device=group.device) if per_tensor else None
        plan.grad_stats(len(lists), dots.data_ptr(), _at(each))
        return dots if each is None else each

    def combine_(
        self,
        group: TensorGroup,
        outs: list[list[Tensor | None]],
        lists: list[list[Tensor | None]],
        coefficients: Tensor,
    ) -> None:
        plan = self._plan(group)
        for i, tensors in enumerate(lists):
            _point_foreign(plan, group, _native.LISTS + i, f"lists[{i}]", tensors)
        present = [
            _point_foreign(plan, group, _native.OUTS + i, f"outs[{i}]", tensors)
            for i, tensors in enumerate(outs)
        ]
        weights = scalars(coefficients, group, torch.float64)
        plan.combine(len(lists), len(outs), _at(weights), coefficients.dim() == 3)
        for out, count in zip(outs, present, strict=True):
            count_write(out, out, count)

    def noise_(
        self, group: TensorGroup, outs: list[Tensor | None], seed: int, step: int, numbers: list[int]
    ) -> None:
        plan = self._plan(group)
        present = _point_foreign(plan, group, _native.OUTS, "outs", outs)
        plan.noise(seed, step, numbers)
        count_write(outs, outs, present)

    def descend_(
        self,
        group: TensorGroup,
        rule: str,
        slots: dict[str, list[Any]],
        *,
        guard: Tensor | None = None,
        found_inf: Tensor | None = None,
        inv_scale: Tensor | None = None,
    ) -> None:
        plan = self._plan(group)
        code = _DTYPES[group.dtype]
        plan.point(_native.PARAMS, "params", group.params, code)
        moving = _point_gradients(plan, group)
        _point_snapshots(plan, group)
        _point_masks(plan, group)
        state = {"momentum_buffer": 0} if rule == "sgd" else {"exp_avg": 0, "exp_avg_sq": 0}
        kept = group.kept_dtype
        for i, name in enumerate(state):
            tensors = slots[name]
            state[name] = plan.point(_native.LISTS + i, name, tensors, _DTYPES[kept], kept, hold=True)
        if rule == "adam":
            counters, float32 = slots["step"], torch.float32
            state["step"] = plan.point(_native.STEPS, "step", counters, _DTYPES[float32], float32, hold=True)
        guard = scalars(guard, group, torch.float64)
        inv_scale = scalars(inv_scale, group, torch.float32)
        found_inf = scalars(found_inf, group, torch.float32)
        plan.descend(
            group.table.data_ptr(),
            _RULES[rule],
            slots.get("fresh", []),
            has_momentum(group),
            _at(guard),
            _at(found_inf),
            _at(inv_scale),
            group.masters is not None,
        )
        count_descent(group, slots, state, moving)

    def accumulate_squares_(self, group: TensorGroup, scores: list[Tensor | None]) -> None:
        plan = self._plan(group)
        _point_gradients(plan, group)
        present = plan.point(_native.LISTS, "scores", scores, _DTYPES[torch.float32], torch.float32)
        plan.accumulate()
        count_write(scores, scores, present)

    def count_ranks(
        self,
        group: TensorGroup,
        ranks: Ranks,
        masks: list[Tensor | None],
        *,
        prefix: int,
        shift: int,
        bits: int,
    ) -> Tensor:
        plan = self._plan(group)
        counts = torch.zeros(1 << bits, dtype=torch.int64, device=group.device)
        plan.point(_native.MASKS, "masks", masks, 0)
        try:
            plan.count(_point_ranks(plan, group, ranks), prefix, shift, bits, counts.data_ptr())
        finally:
            _forget_masks(plan, group)
        return counts

    def mark_(
        self,
        group: TensorGroup,
        ranks: Ranks,
        masks: list[Tensor | None],
        *,
        threshold: int,
        shift: int,
        add: bool = False,
        positions: list[int] | None = None,
        candidates: Tensor | None = None,
        found: Tensor | None = None,
    ) -> None:
        plan = self._plan(group)
        present = plan.point(_native.MASKS, "masks", masks, 0)
        capacity = 0 if candidates is None else candidates.numel()
        try:
            plan.mark(
                _point_ranks(plan, group, ranks),
                threshold,
                shift,
                add,
                positions or [],
                _at(candidates),
                capacity,
                _at(found),
            )
        finally:
            _forget_masks(plan, group)
        count_write(masks, masks, present)

    def _plan(self, group: TensorGroup) -> Any:
        """The plan of the group's layout, made once; the group is rebuilt when its layout changes."""
        plan = group.cache.get("native")
        if plan is None:
            library = self._libraries[group.device.type]
            plan = _native.Plan([p.numel() for p in group.params], group.row, library, group.device)
            group.cache["native"] = plan
            size = plan.workspace_bytes()
            if size:
                group.cache["native workspace"] = torch.zeros(size, dtype=torch.uint8, device=group.device)
        workspace = group.cache.get("native workspace")
        if workspace is not None:
            plan.place(workspace.data_ptr(), *_stream(group.device))
        return plan


def isa() -> str | None:
    """The instruction set in use ("baseline", "avx2", "avx512"), or None without the native module."""
    return None if _native is None else _native.isa()


def describe() -> str:
    """What the native module is doing on this machine, or why it is not there; for the doctor."""
    if _native is None:
        return str(_problem)
    isas = ", ".join(_native.available_isas())
    line = f"cpu passes with {_native.isa()} instructions (this machine has {isas}), {_threads}"
    return line if _problem is None else f"{line}; not used: {_problem}"


def _load() -> tuple[Any, str | None]:
    """The compiled module, or the sentence why there is none."""
    name = f"{__package__.rpartition('.')[0]}._native"
    try:
        module = import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name != name:
            return None, f"the native module could not be loaded: {problem}"
        return None, (
            "the native module was not built with this installation (python -m sam_kernels.doctor says why); "
            "reinstall with a C++ compiler, or use backend='foreach'"
        )
    except ImportError as problem:
        return None, f"the native module could not be loaded: {problem}; reinstall the package"
    if module.abi_version != ABI_VERSION:
        return None, (
            f"the native module was built for version {module.abi_version} of the C interface and this "
            f"package speaks version {ABI_VERSION}; reinstall the package, so that both come from one source"
        )
    return module, None


def _hand_over_threads(module: ModuleType) -> str:
    """Let the passes run on torch's own thread pool; a second pool would fight it for the cores."""
    library = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library))
        functions = torch_cpu.torch_parallel_for, torch_cpu.torch_get_num_threads
    except (OSError, AttributeError):
        return f"on one thread (torch {torch.__version__} exports no torch_parallel_for; 2.10 and later do)"
    module.set_thread_pool(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))
    return "on torch's thread pool"


def _force_isa(module: ModuleType) -> str | None:
    """Honour SAM_KERNELS_CPU_ISA, or return the sentence why it cannot be."""
    forced = os.environ.get(_ISA_VARIABLE)
    if not forced:
        return None
    available = module.available_isas()
    if forced not in available:
        return f"{_ISA_VARIABLE}={forced!r} is not available; this machine has {', '.join(available)}"
    module.set_isa(forced)
    return None


def _stream(device: torch.device) -> tuple[int, int]:
    """Torch's current stream on the device, and the device's ordinal."""
    if device.type != "cuda":
        return 0, 0
    # What Triton and torch's own compiled code ask; the public way makes an object each time.
    return torch._C._cuda_getCurrentRawStream(device.index), device.index


def _check_fisher(group: TensorGroup, name: str, what: str, asked: str, served: str) -> None:
    """Fisher's metric is compiled for norms of order 2 alone, and a device's table cannot be asked."""
    if asked != served and any(metric == FISHER for _, metric, _ in group.keys):
        raise ValueError(
            f"{name}: the native passes serve Fisher's metric with {what}={served!r}, not {asked!r}; "
            "use backend='foreach'"
        )


def _point_gradients(plan: Any, group: TensorGroup) -> int:
    """How many tensors have a gradient; those that the group has just read are not looked at again."""
    code, present = _DTYPES[group.dtype], -1
    if group.watch is not None and group.seen_grads is not None:
        present = plan.point_seen(group.watch, group.seen_grads, group.grads, code)
    return present if present >= 0 else plan.point(_native.GRADS, "grads", group.grads, code)


def _point_snapshots(plan: Any, group: TensorGroup) -> int:
    """How many tensors have a snapshot; addresses of buffers that stand between steps are read once."""
    standing = group.standing_snapshots is not None and group.snapshots is group.standing_snapshots
    if standing and group.cache.get("native snapshots") is group.snapshots:
        return len(group.params)
    snapshots = group.snapshots
    if group.offsets is not None:  # one of no elements has no address, yet its tensor takes part
        snapshots = [x if x is None or x.numel() else _SOMEWHERE for x in snapshots]
    present: int = plan.point(_native.SNAPSHOTS, "snapshots", snapshots, _DTYPES[group.kept_dtype])
    group.cache["native snapshots"] = group.snapshots if standing else None
    return present


def _point_masks(plan: Any, group: TensorGroup) -> None:
    """Masks stand where they are between steps; their addresses are read when the list is another."""
    if group.cache.get("native masks") is group.masks:
        return
    plan.forget_masks()
    if group.masks is not None:
        plan.point(_native.MASKS, "masks", group.masks, 0, torch.int64)
    if group.offsets is not None:
        plan.point(_native.OFFSETS, "offsets", group.offsets, 0, torch.int64)
    group.cache["native masks"] = group.masks


def _forget_masks(plan: Any, group: TensorGroup) -> None:
    """A selection has pointed the plan at masks of its own."""
    plan.forget_masks()
    group.cache["native masks"] = None


def _point_ranks(plan: Any, group: TensorGroup, ranks: Ranks) -> tuple[Any, ...]:
    """Point at the lists of the ranks; the rest as the module takes it."""
    if ranks.scores is not None:
        _point_foreign(plan, group, _native.LISTS, "scores", ranks.scores)
    if ranks.within is not None:
        plan.point(_native.WITHIN, "within", ranks.within, 0, torch.int64)
    is_random = ranks.scores is None
    return is_random, ranks.seed, ranks.step, ranks.numbers, ranks.within is not None, ranks.outside


def _point_foreign(plan: Any, group: TensorGroup, slot: int, name: str, tensors: list[Tensor | None]) -> int:
    """Point at a list that the group did not make: its dtype and sizes are checked on the way."""
    dtype = next((x.dtype for x in tensors if x is not None), group.dtype)
    if dtype not in _DTYPES:
        raise ValueError(f"{name} is {dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    return plan.point(slot, name, tensors, _DTYPES[dtype], dtype)


def _at(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


def _open_cuda() -> Any:
    """The CUDA library of this installation, or the sentence why there is none."""
    path = Path(__file__).parents[1] / _CUDA_LIBRARY
    if not path.exists():
        return (
            "the CUDA library was not built with this installation (python -m sam_kernels.doctor says why); "
            "reinstall where nvcc is, or use backend='triton'"
        )
    try:
        return _native.Library(str(path))
    except RuntimeError as problem:
        return f"the CUDA library could not be loaded: {problem}"


def describe_cuda() -> str:
    """What the CUDA library is and can do on this machine, or why it is not there; for the doctor."""
    if _native is None:
        return str(_problem)
    library = _libraries["cuda"]
    if isinstance(library, str):
        return library
    try:
        library.check_device(0)
    except RuntimeError as problem:
        return f"built with {library.build_info()}; not used: {problem}"
    return f"built with {library.build_info()}"


_native, _problem = _load()
_threads = ""
_libraries: dict[str, Any] = {}
if _native is not None:
    _threads = _hand_over_threads(_native)
    _problem = _force_isa(_native)
    _libraries = {"cpu": _native.Library(), "cuda": _open_cuda()}

BACKEND = Native("native", _libraries)
