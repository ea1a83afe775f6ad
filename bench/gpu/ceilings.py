"""Stage 1: what the memory gives, and what a launch costs. Every other figure is held against these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from ..records import Results, Row, measured, single
from ..timing import interleave
from .device import rate
from .session import Session, Unit

# Bytes of one vector: at 1 GiB the L2 is out of the picture, and at 4 GiB the ramps at both ends are too.
SIZES = (2**30, 2**32)
COPY, READ, TRIAD, WRITE = "copy", "read", "triad", "write"

_LAUNCHES = 1000

# Of torch's lists of tensors: how much a launch is told decides how many launches a foreach peer takes.
_HEADER = Path("include/ATen/native/cuda/MultiTensorApply.cuh")


def units(session: Session) -> Iterator[Unit]:
    for size in SIZES:
        yield Unit(f"ceilings/{size // 2**30}GiB", partial(_rates, size))
    yield Unit("ceilings/launch", _launch)
    yield Unit("ceilings/torch", _torch)


def ceiling(results: Results, kind: str) -> float | None:
    """GB/s of the fastest loop of that kind, of any size and tool."""
    rows = [row for row in results.rows if row["peer"].split(":")[0] == kind and row["metric"] == "ms"]
    return max((found for row in rows if (found := rate(row)) is not None), default=None)


def tools(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> dict[str, tuple[int, Callable[[], object]]]:
    """Loops over whole vectors: lists moved, and the call. More than one where torch has more than one."""
    return {
        f"{COPY}: copy_": (2, lambda: a.copy_(b)),
        f"{COPY}: mul": (2, lambda: torch.mul(b, 1.0, out=a)),
        f"{READ}: sum": (1, lambda: b.sum()),
        f"{READ}: norm": (1, lambda: torch.linalg.vector_norm(b)),
        f"{READ}: dot": (2, lambda: torch.dot(b, c)),
        f"{TRIAD}: add": (3, lambda: torch.add(b, c, alpha=2.0, out=a)),
        f"{WRITE}: fill_": (1, lambda: a.fill_(1.0)),
    }


def _rates(size: int, session: Session) -> list[Row]:
    elements = min(size // 4, session.cap or size)
    # Random numbers, as in lists: a card draws less power for constants, and may run faster.
    a, b, c = (torch.empty(elements, device=session.gpu.device).normal_() for _ in range(3))
    found = tools(a, b, c)

    def contestant(run: Callable[[], object]) -> Callable[[], dict[str, float]]:
        return lambda: {"total": session.gpu.laps([run], ahead=50)[0]}

    samples = interleave({name: contestant(run) for name, (_, run) in found.items()}, session.effort(4))
    return [
        measured(name, "ms", [1e3 * s for s in parts["total"]], bytes=4 * elements * found[name][0])
        for name, parts in samples.items()
    ]


def _launch(session: Session) -> list[Row]:
    """An empty kernel: microseconds of host and device each, one after another, eager and in a graph."""
    gpu = session.gpu
    count = _LAUNCHES if session.cap is None else 3

    def many() -> None:
        for _ in range(count):
            gpu.spin()

    replay = gpu.capture(many, warmup=1)
    times = 20 if session.cap is None else 2
    per_kernel = 1e6 / count
    eager = [per_kernel * gpu.laps([many])[0] for _ in range(times)]
    graph = [per_kernel * gpu.laps([replay])[0] for _ in range(times)]
    # A hundred at a time, or a full queue would hold the host up.
    few = min(count, 100)

    def some() -> None:
        for _ in range(few):
            gpu.spin()

    host = [1e6 / few * gpu.host_seconds(some, is_busy=True) for _ in range(times)]
    return [
        measured("launch", "eager_us", eager),
        measured("launch", "graph_us", graph),
        measured("launch", "host_us", host),
        single("launch", "kernels", count),
    ]


def _torch(session: Session) -> list[Row]:
    found = foreach_variant(Path(torch.__file__).parent / _HEADER)
    session.log(f"  torch {torch.__version__}: {found}")
    return [single("torch._foreach", "kernel_arguments", found)]


def foreach_variant(header: Path) -> str:
    """Which kernel arguments the foreach operators of the installed torch have, by its header.

    Since the 32 KB variant the header asks for the version of CUDA; before, all of it is for 4 KB.
    """
    if not header.exists():
        return f"unknown: this torch comes without {header.name}"
    asked = [line.strip() for line in header.read_text().splitlines() if "CUDART_VERSION" in line]
    if not asked:
        return "4 KB: its header does not ask for CUDART_VERSION"
    return f"32 KB where {asked[0]!r}; built with CUDA {torch.version.cuda}"
