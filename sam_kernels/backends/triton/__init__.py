"""Triton backend: the six passes as Triton kernels, for GPUs where nothing was compiled at installation.

Triton is asked for when a tensor group on a GPU is first looked at. Importing this file never fails:
`refusal` says what is missing.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ranks import Ranks
from ...tensor_groups import FISHER, TensorGroup
from ..handover import count_descent, count_perturbation, count_write, has_momentum, measured, scalars
from .plan import List, Plan, Table
from .runtime import describe as describe
from .runtime import device_problem, interpreter_problem, load

# enum samk_moment, samk_shape, samk_rule
_MOMENTS = {"square": 0, "peak": 1, "power": 2}
_SHAPES = {"linear": 0, "sign": 1, "powered": 2}
_RULES = {"sgd": 0, "adam": 1}

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_BITS = {2: "int16", 4: "int32", 8: "int64"}

# A block is two 16-byte loads for each of 256 threads; half of that where a kernel would run out of registers
# otherwise: powers take many, and so do sixteen elements at a time of three lists or more.
_BLOCK_BYTES = 8192
_LAUNCH = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
# Left to itself, NVIDIA's assembler spills a few registers of kernels with powers, and of updates under
# masks, to fit one more block in.
_ROOMY_LAUNCH = {**_LAUNCH, "maxnreg": 128} if torch.version.hip is None else _LAUNCH
_PROGRAMS_PER_PROCESSOR = 4
# Under the interpreter programs run one after the other; a few show what more than one does.
_INTERPRETED_PROGRAMS = 3


class Triton:
    """The passes as Triton kernels over tables of addresses.

    See `sam_kernels.backends.Backend` for the contract of each method.

    Args:
        name: what users call it.
        device_type: "cuda", which is also what torch calls AMD's GPUs; "cpu" for Triton's interpreter.
    """

    def __init__(self, name: str = "triton", device_type: str = "cuda") -> None:
        self.name = name
        self._device_type = device_type

    def refusal(self, group: TensorGroup) -> str | None:
        if group.device.type != self._device_type:
            return f"the Triton passes serve {self._device_type} tensors, not {group.device.type} ones"
        if group.dtype not in _DTYPES:
            known = ", ".join(str(dtype)[6:] for dtype in _DTYPES)
            return f"the Triton passes calculate in {known}, not in {str(group.dtype)[6:]}"
        if group.compact:
            return "the Triton passes keep whole snapshots; compact ones are served by foreach"
        if not group.dense:
            return "a parameter is a view with gaps or overlaps, and the Triton passes walk whole blocks"
        if self._device_type == "cpu":
            return interpreter_problem()
        return load()[1] or device_problem(group.device.index or 0)

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
        plan = _plan(group)
        has_fisher = of == "gradient" and _has_fisher(group, moment, "square")
        scalar_table, tensors, reads_weights = measured(group, of)
        # The perturbation reads the same gradients: one upload for both.
        table = plan.table("sq_norm, perturb_" if of == "gradient" else "sq_norm of weights")
        # Masters are where the perturbation has snapshots: there it finds them as they are.
        row = List.PARAMS if group.masters is None else List.SNAPSHOTS
        if reads_weights:
            plan.point(table, row, "weights", group.weights, group.kept_dtype)
            table.snapshots = None if row == List.SNAPSHOTS else table.snapshots
        dtype = group.dtype if of == "gradient" else group.kept_dtype
        plan.point(table, List.GRADS, "grads", tensors, dtype, vouched=True)
        has_masks = masked and _point_masks(plan, table, group)
        # Fresh results each time: the caller may hold an earlier one.
        total = torch.empty((), dtype=torch.float64, device=group.device)
        self._launch(
            "sq_norm",
            plan,
            table,
            scalar_table,
            plan.chunks,
            plan.count,
            scalars(peak, group, torch.float64),
            plan.partials,
            plan.counter,
            total,
            **_settings(dtype, takes_powers=moment == "power"),
            W=_type(group.kept_dtype),
            WEIGHTS=int(row),
            MOMENT=_MOMENTS[moment],
            HAS_ADAPTIVE=reads_weights,
            HAS_FISHER=has_fisher,
            HAS_MASKS=has_masks,
            Q=q,
            ROOT=float(root),
        )
        if not per_tensor:
            return total
        each = torch.empty(plan.count, dtype=torch.float64, device=group.device)
        with _on(group.device):
            load()[0].sum_by_tensor[(plan.count,)](
                plan.partials, plan.first, each, MOMENT=_MOMENTS[moment], BLOCK=256, **_LAUNCH
            )
        return each

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
        plan = _plan(group)
        has_fisher = _has_fisher(group, shape, "linear")
        table = plan.table("sq_norm, perturb_")
        plan.point(table, List.PARAMS, "params", group.params, group.dtype, vouched=True)
        plan.point(table, List.GRADS, "grads", group.grads, group.dtype, vouched=True)
        present = _point_snapshots(plan, table, group)
        has_masks = _point_masks(plan, table, group)
        has_masters, drawn = group.masters is not None, group.rounding
        if drawn is not None:
            table.put(List.NUMBERS, _integers("numbers", drawn.numbers, plan))
        self._launch(
            "perturb",
            plan,
            table,
            group.table,
            plan.chunks,
            plan.count,
            *(scalars(x, group, torch.float64) for x in (norm, peak, tensor_scale)),
            0 if drawn is None else _signed(drawn.seed),
            0 if drawn is None else drawn.step,
            **_settings(
                group.dtype,
                takes_powers=shape == "powered",
                many_lists=has_masters and has_masks,
                takes_masks=has_masters and has_masks,
            ),
            M=_type(group.kept_dtype),
            SHAPE=_SHAPES[shape],
            HAS_MASTERS=has_masters,
            AT_RANDOM=drawn is not None,
            HAS_ADAPTIVE=group.reads_weights,
            HAS_FISHER=has_fisher,
            HAS_MASKS=has_masks,
            Q=q,
        )
        count_perturbation(group, present)

    def restore_(self, group: TensorGroup) -> None:
        plan = _plan(group)
        table = plan.table("restore_")
        plan.point(table, List.PARAMS, "params", group.params, group.dtype, vouched=True)
        present = _point_snapshots(plan, table, group)
        arguments = (plan, table, plan.chunks, plan.count)
        if group.masters is None:
            has_masks = _point_masks(plan, table, group)
            self._launch("restore", *arguments, **_bits(group.dtype), HAS_MASKS=has_masks)
        else:
            settings = _settings(group.dtype, many_lists=True)
            settings.pop("S")
            self._launch("round", *arguments, **settings, M=_type(group.kept_dtype))
        count_write(group.params, group.snapshots, present)

    def grad_stats(
        self, group: TensorGroup, lists: list[list[Tensor | None]], *, per_tensor: bool = False
    ) -> Tensor:
        plan = _plan(group)
        table = plan.table("grad_stats")
        dtype = self._point_foreign("grad_stats", plan, table, group, lists=lists)
        dots = torch.empty(len(lists) * (len(lists) + 1) // 2, dtype=torch.float64, device=group.device)
        self._launch(
            "grad_stats",
            plan,
            table,
            plan.chunks,
            plan.count,
            plan.partials,
            plan.counter,
            dots,
            **_settings(dtype, many_lists=len(lists) > 2),
            COUNT=len(lists),
        )
        if not per_tensor:
            return dots
        each = torch.empty(plan.count, len(dots), dtype=torch.float64, device=group.device)
        with _on(group.device):
            load()[0].dots_by_tensor[(plan.count,)](
                plan.partials, plan.first, each, COUNT=len(lists), BLOCK=256, **_LAUNCH
            )
        return each

    def combine_(
        self,
        group: TensorGroup,
        outs: list[list[Tensor | None]],
        lists: list[list[Tensor | None]],
        coefficients: Tensor,
    ) -> None:
        plan = _plan(group)
        table = plan.table("combine_")
        dtype = self._point_foreign("combine_", plan, table, group, lists=lists, outs=outs)
        block = (len(outs), len(lists))
        if tuple(coefficients.shape) not in (block, (plan.count, *block)):
            raise ValueError(
                f"combine_: got coefficients of shape {tuple(coefficients.shape)}; expected {block}, or "
                f"{(plan.count, *block)} with those of every tensor"
            )
        self._launch(
            "combine",
            plan,
            table,
            plan.chunks,
            plan.count,
            scalars(coefficients, group, torch.float64),
            len(outs) * len(lists) if coefficients.dim() == 3 else 0,
            **_settings(dtype),
            IN=len(lists),
            OUT=len(outs),
        )
        for out in outs:
            count_write(out, out, sum(x is not None for x in out))

    def noise_(
        self, group: TensorGroup, outs: list[Tensor | None], seed: int, step: int, numbers: list[int]
    ) -> None:
        plan = _plan(group)
        table = plan.table("noise_")
        dtype = self._point_foreign("noise_", plan, table, group, outs=[outs])
        table.put(List.NUMBERS, _integers("numbers", numbers, plan))
        settings = _settings(dtype)
        settings.pop("S")
        self._launch("noise", plan, table, plan.chunks, plan.count, _signed(seed), step, **settings)
        count_write(outs, outs, sum(x is not None for x in outs))

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
        plan = _plan(group)
        # Steps that perturb and steps that do not may take turns, so each kind has its own addresses.
        table = plan.table("descend_" if any(x is not None for x in group.snapshots) else "descend_ alone")
        plan.point(table, List.PARAMS, "params", group.params, group.dtype, vouched=True)
        moving = plan.point(table, List.GRADS, "grads", group.grads, group.dtype, vouched=True)
        _point_snapshots(plan, table, group)
        names = ["momentum_buffer"] if rule == "sgd" else ["exp_avg", "exp_avg_sq"]
        state = {
            name: plan.point(table, List.LISTS + i, name, slots[name], group.kept_dtype, hold=True)
            for i, name in enumerate(names)
        }
        if rule == "adam":
            ones = [1] * plan.count
            counters = slots["step"]
            state["step"] = plan.point(table, List.STEPS, "step", counters, torch.float32, ones, hold=True)
        _require(table, group, rule, state)
        fresh = slots.get("fresh") or []
        table.put(List.FRESH, np.array(fresh, dtype=np.int64) if fresh else np.zeros(plan.count, np.int64))
        has_masters = group.masters is not None
        # Masters are whole, and weights that were not perturbed are the rounded masters: no mask is asked.
        has_masks = not has_masters and _point_masks(plan, table, group)
        self._launch(
            "descend",
            plan,
            table,
            group.table,
            plan.chunks,
            plan.count,
            scalars(guard, group, torch.float64),
            scalars(found_inf, group, torch.float32),
            scalars(inv_scale, group, torch.float32),
            plan.counter,
            **_settings(group.dtype, many_lists=rule == "adam" or has_masters, takes_masks=has_masks),
            M=_type(group.kept_dtype),
            HAS_MASTERS=has_masters,
            RULE=_RULES[rule],
            HAS_BUFFERS=rule == "sgd" and state["momentum_buffer"] > 0,
            HAS_MASKS=has_masks,
        )
        count_descent(group, slots, state, moving)

    def accumulate_squares_(self, group: TensorGroup, scores: list[Tensor | None]) -> None:
        plan = _plan(group)
        table = plan.table("accumulate_squares_")
        plan.point(table, List.GRADS, "grads", group.grads, group.dtype, vouched=True)
        present = plan.point(table, List.LISTS, "scores", scores, torch.float32)
        settings = _settings(group.dtype)
        settings.pop("S")
        self._launch("accumulate", plan, table, plan.chunks, plan.count, **settings)
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
        plan = _plan(group)
        table = plan.table("selection")
        plan.point(table, List.MASKS, "masks", masks, torch.int64, plan.words)
        settings = self._point_ranks("count_ranks", plan, table, group, ranks)
        counts = torch.zeros(_grid(plan), 1 << bits, dtype=torch.int32, device=group.device)
        self._launch(
            "count",
            plan,
            table,
            plan.chunks,
            plan.count,
            _signed(ranks.seed),
            ranks.step,
            prefix,
            shift,
            counts,
            **settings,
            BITS=bits,
        )
        return counts.sum(0)

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
        plan = _plan(group)
        table = plan.table("selection")
        present = plan.point(table, List.MASKS, "masks", masks, torch.int64, plan.words)
        settings = self._point_ranks("mark_", plan, table, group, ranks)
        if candidates is not None:
            table.put(List.POSITIONS, _integers("positions", positions, plan))
        self._launch(
            "mark",
            plan,
            table,
            plan.chunks,
            plan.count,
            _signed(ranks.seed),
            ranks.step,
            threshold,
            shift,
            candidates,
            0 if candidates is None else candidates.numel(),
            found,
            **settings,
            ADD=add,
        )
        count_write(masks, masks, present)

    def _point_ranks(
        self, kernel: str, plan: Plan, table: Table, group: TensorGroup, ranks: Ranks
    ) -> dict[str, Any]:
        """Point at what ranks are made of; the constants that say what it is."""
        dtype = torch.float32
        if ranks.scores is None:
            table.put(List.NUMBERS, _integers("numbers", ranks.numbers, plan))
        else:
            dtype = self._point_foreign(kernel, plan, table, group, lists=[ranks.scores])
        if ranks.within is not None:
            plan.point(table, List.WITHIN, "within", ranks.within, torch.int64, plan.words)
        settings = _settings(dtype, many_lists=True)
        settings.pop("S")
        return {
            **settings,
            "IS_RANDOM": ranks.scores is None,
            "HAS_WITHIN": ranks.within is not None,
            "OUTSIDE": ranks.within is not None and ranks.outside,
        }

    def _point_foreign(
        self, kernel: str, plan: Plan, table: Table, group: TensorGroup, **lists: list[list[Tensor | None]]
    ) -> torch.dtype:
        """Point at lists that the group did not make; their one dtype."""
        found = {
            f"{name}[{i}]": next((x.dtype for x in tensors if x is not None), None)
            for name, columns in lists.items()
            for i, tensors in enumerate(columns)
        }
        dtypes = {dtype for dtype in found.values() if dtype is not None} or {group.dtype}
        if len(dtypes) > 1:
            raise ValueError(f"{kernel}: {', '.join(map(str, dtypes))} among the lists; expected one dtype")
        (dtype,) = dtypes
        if dtype not in _DTYPES:
            raise ValueError(
                f"{kernel}: the lists are {dtype}; expected one of {', '.join(map(str, _DTYPES))}"
            )
        for name, columns in lists.items():
            row, most = (List.LISTS, 3) if name == "lists" else (List.OUTS, 2)
            if not 1 <= len(columns) <= most:
                raise ValueError(f"{kernel}: got {len(columns)} {name}; expected 1 to {most}")
            for i, tensors in enumerate(columns):
                plan.point(table, row + i, f"{name}[{i}]", tensors, dtype)
        return dtype

    def _launch(self, kernel: str, plan: Plan, table: Table, *arguments: Any, **constants: Any) -> None:
        kernels = load()[0]
        with _on(plan.device):
            getattr(kernels, kernel)[(_grid(plan),)](plan.layout, table.on_device(), *arguments, **constants)


def _plan(group: TensorGroup) -> Plan:
    """The plan of the group's layout, made once; the group is rebuilt when its layout changes."""
    plan = group.cache.get("triton")
    if plan is None:
        plan = Plan([p.numel() for p in group.params], group.row, group.device)
        group.cache["triton"] = plan
    return plan


def _settings(
    dtype: torch.dtype, takes_powers: bool = False, many_lists: bool = False, takes_masks: bool = False
) -> dict[str, Any]:
    """Stored type, calculating type, block size and launch options, as kernels take them."""
    import triton.language as tl

    halves = 2 if takes_powers or (many_lists and dtype.itemsize == 2) else 1
    return {
        "T": _type(dtype),
        "S": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": _BLOCK_BYTES // halves // dtype.itemsize,
        **(_ROOMY_LAUNCH if takes_powers or takes_masks else _LAUNCH),
    }


def _type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype)[6:])


def _bits(dtype: torch.dtype) -> dict[str, Any]:
    import triton.language as tl

    return {"T": getattr(tl, _BITS[dtype.itemsize]), "BLOCK": _BLOCK_BYTES // dtype.itemsize, **_LAUNCH}


def _point_snapshots(plan: Plan, table: Table, group: TensorGroup) -> int:
    """How many tensors have a snapshot; addresses of buffers that stand between steps are read once."""
    standing = group.standing_snapshots is not None and group.snapshots is group.standing_snapshots
    if standing and table.snapshots is group.snapshots:
        return plan.count
    present = plan.point(table, List.SNAPSHOTS, "snapshots", group.snapshots, group.kept_dtype)
    table.snapshots = group.snapshots if standing else None
    return present


def _point_masks(plan: Plan, table: Table, group: TensorGroup) -> bool:
    """Whether the group has masks. They stand where they are: addresses are read when the list is another."""
    if group.masks is None:
        return False
    if table.masks is not group.masks:
        plan.point(table, List.MASKS, "masks", group.masks, torch.int64, plan.words)
        table.masks = group.masks
    return True


def _has_fisher(group: TensorGroup, wanted: str, served: str) -> bool:
    """Whether Fisher's metric measures any tensor. Kernels have it for norms of order 2: no other has a use.

    Raises:
        ValueError: if it does, and another moment or shape is wanted.
    """
    found = any(metric == FISHER for _, metric, _ in group.keys)
    if found and wanted != served:
        raise ValueError(
            f"the Triton passes have Fisher's metric under the norm of order 2 ({served!r}), not under "
            f"{wanted!r}; use backend='foreach'"
        )
    return found


def _require(table: Table, group: TensorGroup, rule: str, state: dict[str, int]) -> None:
    """Refuse a gradient without the state its rule writes: that would be a write to address 0."""
    needs = table.rows[List.GRADS] != 0
    if rule == "sgd":
        needs &= np.array(has_momentum(group), dtype=bool)[group.row]
    for i, name in enumerate(state):
        row = List.STEPS if name == "step" else List.LISTS + i
        for t in np.flatnonzero(needs & (table.rows[row] == 0)).tolist():
            raise ValueError(f"descend_: grads[{t}] is there but {name}[{t}] is None")


def _integers(name: str, numbers: list[int] | None, plan: Plan) -> np.ndarray:
    """One number for each tensor, as a row of a table."""
    if numbers is None or len(numbers) != plan.count:
        entries = "none" if numbers is None else len(numbers)
        raise ValueError(f"{name} has {entries} entries, but the plan has {plan.count} tensors")
    return np.array(numbers, dtype=np.int64)


def _signed(number: int) -> int:
    """The integer of 64 bits with a sign that has the bits of one without."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _grid(plan: Plan) -> int:
    """Programs of a launch."""
    return min(plan.chunks, _programs(plan.device))


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _processors(device.index or 0) * _PROGRAMS_PER_PROCESSOR


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _on(device: torch.device) -> Any:
    """Triton launches on the current device and its current stream."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


BACKEND = Triton()
