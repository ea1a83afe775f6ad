"""Compiles what the Triton backend would launch, for GPUs that need not be here: a program, not a test.

    python tests/aot.py SOURCES FOLDER TARGET:DTYPE,...[:PASS,...] ...

as in `sm_90:float32+,float64 gfx942:float32:restore`, where + asks for every variant. The backend itself is
asked for its passes, so arguments, constants and launch options are its own; what it would launch is compiled
by the way that a launch takes, up to the launch. FOLDER gets the code, and index.json that lists it.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Launch(NamedTuple):
    kernel: str
    arguments: tuple[Any, ...]
    constants: dict[str, Any]  # constexpr arguments and launch options


# ---- what the backend asks for ----


class Recorder:
    """Stands where the kernels stand: `recorder.restore[grid](...)` is kept instead of run."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __getattr__(self, kernel: str) -> Any:
        def keep(*arguments: Any, **constants: Any) -> None:
            self.launches.append(Launch(kernel, arguments, constants))

        return type("Kernel", (), {"__getitem__": lambda self, grid: keep})()


def variants(dtype: str, every: bool) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """(name, call of a pass) for every variant, or for those whose code differs most."""
    import torch

    from sam_kernels.ranks import Ranks
    from sam_kernels.rounding import Rounding
    from sam_kernels.tensor_groups import ADAPTIVE, EUCLIDEAN, FISHER, Column, TensorGroup

    one = torch.ones((), dtype=torch.float64)
    by_tensor = torch.ones(2, dtype=torch.float64)
    amp = {"found_inf": torch.zeros(()), "inv_scale": torch.ones(())}

    def tensors() -> list[Any]:
        return [torch.ones(size, dtype=getattr(torch, dtype)) for size in (5000, 3)]

    def words() -> list[Any]:
        return [torch.ones(79, dtype=torch.int64), torch.ones(1, dtype=torch.int64)]

    def wide() -> list[Any]:
        return [torch.ones(size) for size in (5000, 3)]

    def group(
        metric: int = EUCLIDEAN,
        momentum: float = 0.0,
        masks: bool = False,
        masters: bool = False,
        drawn: bool = False,
    ) -> TensorGroup:
        made = TensorGroup(tensors(), [0, 0], [(0, metric, 0.01)])
        row = [0.5] * len(Column)
        row[Column.MOMENTUM] = momentum
        made.rows = [tuple(row)]
        made.grads, made.snapshots = tensors(), tensors()
        made.masks = words() if masks else None
        if masters:
            made.set_masters(wide())
            made.take_snapshots()
            made.snapshots = list(made.masters or ())
        made.rounding = Rounding(1 << 62, 5, [0, 1]) if drawn else None
        return made

    def sq_norm(metric: int, masked: bool = False, masters: bool = False, **arguments: Any):
        made = group(metric, masks=masked, masters=masters)
        return lambda backend: backend.sq_norm(made, masked=masked, **arguments)

    def perturb(
        metric: int, masks: bool = False, masters: bool = False, drawn: bool = False, **arguments: Any
    ):
        made = group(metric, masks=masks, masters=masters, drawn=drawn)
        return lambda backend: backend.perturb_(made, one, **arguments)

    def restore(masks: bool = False, masters: bool = False):
        return lambda backend: backend.restore_(group(masks=masks, masters=masters))

    def grad_stats(count: int, **by_tensor: bool):
        return lambda backend: backend.grad_stats(group(), [tensors() for _ in range(count)], **by_tensor)

    def combine(ins: int, outs: int):
        lists, coefficients = [tensors() for _ in range(ins + outs)], torch.ones(outs, ins)
        return lambda backend: backend.combine_(group(), lists[:outs], lists[outs:], coefficients)

    def noise():
        return lambda backend: backend.noise_(group(), tensors(), 1 << 63, 5, [0, 1])

    def sgd(momentum: float = 0.0, masks: bool = False, masters: bool = False, **checks: Any):
        state = wide if masters else tensors
        slots = {"momentum_buffer": state() if momentum else [None, None]}
        made = group(momentum=momentum, masks=masks, masters=masters)
        return lambda backend: backend.descend_(made, "sgd", slots, **checks)

    def adam(masks: bool = False, masters: bool = False, **checks: Any):
        steps, state = [torch.zeros(()), torch.zeros(())], wide if masters else tensors
        slots = {"exp_avg": state(), "exp_avg_sq": state(), "step": steps}
        made = group(masks=masks, masters=masters)
        return lambda backend: backend.descend_(made, "adam", slots, **checks)

    def accumulate():
        scores = [torch.zeros(size) for size in (5000, 3)]
        return lambda backend: backend.accumulate_squares_(group(), scores)

    def ranks(is_random: bool, **within: Any) -> Ranks:
        return Ranks(numbers=[0, 1], **within) if is_random else Ranks(tensors(), **within)

    def count_ranks(is_random: bool = False, **within: Any):
        made = ranks(is_random, **within)
        return lambda backend: backend.count_ranks(group(), made, words(), prefix=0, shift=20, bits=11)

    def mark(is_random: bool = False, add: bool = False, collects: bool = True, **within: Any):
        made, room = ranks(is_random, **within), torch.zeros(9, dtype=torch.int64)
        wanted = {"positions": [0, 5056], "candidates": room, "found": room} if collects else {}
        return lambda backend: backend.mark_(group(), made, words(), threshold=5, shift=20, add=add, **wanted)

    power = {"moment": "power", "q": 1.5, "root": 1.5, "peak": one}
    powered = {"shape": "powered", "q": 3.0, "peak": one}

    yield "sq_norm square", sq_norm(EUCLIDEAN, root=2.0, per_tensor=True)
    yield "sq_norm square adaptive", sq_norm(ADAPTIVE, root=2.0)
    yield "sq_norm power adaptive", sq_norm(ADAPTIVE, **power)
    yield "perturb linear", perturb(EUCLIDEAN, tensor_scale=by_tensor)
    yield "perturb powered adaptive", perturb(ADAPTIVE, **powered)
    yield "restore", restore()
    yield "grad_stats 3", grad_stats(3, per_tensor=True)
    yield "combine 3 to 2", combine(3, 2)
    yield "noise", noise()
    yield "descend sgd", sgd()
    yield "descend sgd momentum", sgd(0.9, guard=one, **amp)
    yield "descend adam", adam(guard=one)
    yield "sq_norm square masked", sq_norm(EUCLIDEAN, masked=True)
    yield "sq_norm power adaptive masked", sq_norm(ADAPTIVE, masked=True, **power)
    yield "perturb linear masked", perturb(EUCLIDEAN, masks=True)
    yield "perturb powered adaptive masked", perturb(ADAPTIVE, masks=True, **powered)
    yield "restore masked", restore(masks=True)
    yield "descend sgd masked", sgd(masks=True)
    yield "descend sgd momentum masked", sgd(0.9, masks=True, guard=one, **amp)
    yield "descend adam masked", adam(masks=True, guard=one)
    yield "accumulate", accumulate()
    yield "count", count_ranks()
    yield "mark", mark(within=words())
    if dtype in ("bfloat16", "float16"):
        yield "sq_norm square adaptive masters", sq_norm(ADAPTIVE, masters=True, root=2.0)
        yield "perturb linear masters", perturb(EUCLIDEAN, masters=True)
        yield "perturb linear adaptive masters", perturb(ADAPTIVE, masters=True)
        yield "perturb powered adaptive masters", perturb(ADAPTIVE, masters=True, **powered)
        yield "perturb linear masked masters", perturb(EUCLIDEAN, masks=True, masters=True)
        yield "restore masters", restore(masters=True)
        yield "descend sgd masters", sgd(masters=True)
        yield "descend sgd momentum masters", sgd(0.9, masters=True, guard=one, **amp)
        yield "descend adam masters", adam(masters=True, guard=one, **amp)
    if dtype == "bfloat16":
        yield "perturb linear at random", perturb(EUCLIDEAN, drawn=True)
        yield "perturb linear adaptive at random", perturb(ADAPTIVE, drawn=True)
        yield "perturb powered at random", perturb(EUCLIDEAN, drawn=True, **powered)
        yield "perturb linear masked at random", perturb(EUCLIDEAN, masks=True, drawn=True)
    if not every:
        return
    yield "sq_norm square fisher", sq_norm(FISHER, root=2.0)
    yield "perturb linear fisher", perturb(FISHER)
    yield "sq_norm peak", sq_norm(EUCLIDEAN, moment="peak", per_tensor=True)
    yield "sq_norm peak adaptive", sq_norm(ADAPTIVE, moment="peak")
    yield "sq_norm power", sq_norm(EUCLIDEAN, per_tensor=True, **power)
    yield "perturb linear adaptive", perturb(ADAPTIVE)
    yield "perturb sign", perturb(EUCLIDEAN, shape="sign")
    yield "perturb sign adaptive", perturb(ADAPTIVE, shape="sign", tensor_scale=by_tensor)
    yield "perturb powered", perturb(EUCLIDEAN, tensor_scale=by_tensor, **powered)
    for count in (1, 2):
        yield f"grad_stats {count}", grad_stats(count)
    for ins, outs in ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2)):
        yield f"combine {ins} to {outs}", combine(ins, outs)
    yield "descend sgd guarded", sgd(guard=one)
    yield "descend sgd momentum unguarded", sgd(0.9)
    yield "descend adam amp", adam(guard=one, **amp)
    yield "descend adam unguarded", adam()
    yield "sq_norm square adaptive masked", sq_norm(ADAPTIVE, masked=True, root=2.0)
    yield "sq_norm peak masked", sq_norm(EUCLIDEAN, masked=True, moment="peak")
    yield "sq_norm peak adaptive masked", sq_norm(ADAPTIVE, masked=True, moment="peak")
    yield "sq_norm power masked", sq_norm(EUCLIDEAN, masked=True, **power)
    yield "perturb linear adaptive masked", perturb(ADAPTIVE, masks=True)
    yield "perturb sign masked", perturb(EUCLIDEAN, masks=True, shape="sign")
    yield "perturb sign adaptive masked", perturb(ADAPTIVE, masks=True, shape="sign")
    yield "perturb powered masked", perturb(EUCLIDEAN, masks=True, **powered)
    yield "count within", count_ranks(within=words())
    yield "count outside", count_ranks(within=words(), outside=True)
    yield "count random", count_ranks(is_random=True)
    yield "mark outside", mark(within=words(), outside=True, collects=False)
    yield "mark random", mark(is_random=True, add=True)
    yield "mark random outside", mark(is_random=True, add=True, within=words(), outside=True)


def launches(vendor: str, dtype: str, every: bool, names: list[str]) -> Iterator[tuple[str, Launch]]:
    """What the backend launches for the variants, or for those of the given names."""
    import torch

    from sam_kernels.backends import triton

    torch.version.hip = "as if" if vendor == "amd" else None
    importlib.reload(triton)  # its launch options are settled by whose torch this is
    for name, call in variants(dtype, every):
        if not names or name in names:
            recorder = Recorder()
            triton.load = lambda recorder=recorder: (recorder, None)
            call(triton.Triton("recorded", "cpu"))
            yield from ((name, launch) for launch in recorder.launches)


# ---- compiling it ----


class Driver:
    """As much of a GPU as compiling needs."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        is_nvidia = target.startswith("sm_")
        self._target = GPUTarget("cuda", int(target[3:]), 32) if is_nvidia else GPUTarget("hip", target, 64)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # kernels keep what they compiled under the device

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_launch(stem: Path, target: str, dtype: str, name: str, launch: Launch) -> dict[str, Any]:
    """Compile one launch; its entry in the index."""
    import triton

    from sam_kernels.backends.triton.runtime import load

    triton.runtime.driver.set_active(Driver(target))
    constants = {
        key: x if isinstance(x, int | float | None) else str(x) for key, x in launch.constants.items()
    }
    entry = {
        "target": target,
        "dtype": dtype,
        "variant": name,
        "kernel": launch.kernel,
        "constants": constants,
    }
    try:
        kernel = getattr(load()[0], launch.kernel)
        asm = kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.constants).asm
    except Exception as problem:
        return {**entry, "problem": f"{type(problem).__name__}: {problem}", "code": {}}
    code = {}
    for stage in {"ttgir", "ptx", "cubin", "amdgcn", "hsaco"} & set(asm):
        path = stem.with_suffix(f".{stage}")
        path.write_bytes(asm[stage] if isinstance(asm[stage], bytes) else asm[stage].encode())
        code[stage] = str(path)
    return {**entry, "problem": None, "code": code}


def main(sources: str, folder: str, *selections: str) -> None:
    sys.path.insert(0, sources)
    from triton.backends import backends

    work = []
    for target, dtypes, *names in (selection.split(":") for selection in selections):
        vendor = "nvidia" if target.startswith("sm_") else "amd"
        if vendor in backends:
            for dtype in dtypes.split(","):
                chosen = names[0].split(",") if names else []
                found = launches(vendor, dtype.rstrip("+"), dtype.endswith("+"), chosen)
                work += [(target, dtype.rstrip("+"), *item) for item in found]
    # Forked, since launches hold tensors and functions; nothing was compiled before that.
    workers = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), workers) as pool:
        jobs = [pool.submit(compile_launch, Path(folder, str(n)), *item) for n, item in enumerate(work)]
        index = [job.result() for job in jobs]
    Path(folder, "index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main(*sys.argv[1:])
