"""The GPU: whether there is one, what it is, and the clocks and counters that the stages use.

The stages reach the device through `Gpu` alone, so that a test can put a CPU in its place and run
every line of them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import machine
from ..records import Results, Row, single

# A unit measured under another one of these has to be measured again.
_FINGERPRINT = ("gpu", "driver", "torch", "triton", "tree")

# Sources that only show what was measured: a better picture must not cost a day's figures.
_SHOWING = ("bench/plot.py", "bench/report.py", "bench/gpu/report.py", "bench/gpu/pictures.py")

_CYCLES_PER_MICROSECOND = 2000  # of the spin kernel that keeps a device busy; more than any card's clock


def absence() -> str | None:
    """Why nothing can be measured here, or None when there is a device."""
    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} was built without CUDA"
    try:
        torch.cuda.init()
    except Exception as problem:  # torch raises AssertionError, RuntimeError or its own, by version
        return f"no CUDA device: {' '.join(str(problem).split())}"
    return None


class Gpu:
    """One CUDA device.

    Args:
        index: which.
    """

    backends = ("native", "triton")  # what is checked and measured
    cpu_engine = "native"  # what they are held against on the CPU

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(index)
        properties = torch.cuda.get_device_properties(index)
        self.name = properties.name
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 50 * 2**20

    def count(self) -> int:
        return torch.cuda.device_count()

    def free_bytes(self) -> int:
        """Memory that can still be had, after giving back what torch holds in reserve."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def is_lost(self) -> bool:
        """Whether a kernel has destroyed the context, after which nothing works in this process."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False

    def spin(self, microseconds: float = 0) -> None:
        """A kernel that does nothing for a while; with 0, an empty kernel."""
        torch.cuda._sleep(int(microseconds * _CYCLES_PER_MICROSECOND))

    def laps(self, runs: Sequence[Callable[[], object]], ahead: float = 0) -> list[float]:
        """Seconds of the device for each of the runs, one after another, by events.

        Args:
            runs: what to time.
            ahead: microseconds the device is kept busy first, so that the host is ahead of it and launch
                latency is not in the result; 0 leaves it in, as in an eager program.
        """
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        self.synchronize()
        if ahead:
            self.spin(ahead)
        events[0].record()
        for run, event in zip(runs, events[1:], strict=True):
            run()
            event.record()
        events[-1].synchronize()
        return [1e-3 * a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]

    def capture(self, run: Callable[[], object], warmup: int = 3) -> Callable[[], object]:
        """Warm up on a side stream, capture one run in a graph, and return its replay."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(warmup):
                run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def host_seconds(self, run: Callable[[], object], is_busy: bool) -> float:
        """Seconds until the call returns; with `is_busy` the device has work ahead and cannot hold it up."""
        self.synchronize()
        if is_busy:
            self.spin(20_000)
        start = time.perf_counter()
        run()
        lasted = time.perf_counter() - start
        self.synchronize()
        return lasted

    def launches(self, run: Callable[[], object]) -> int | None:
        """Kernels, copies and fills of one run; None if the profiler sees none (no CUPTI, or forbidden)."""
        self.synchronize()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            run()
            self.synchronize()
        # The exported trace names its categories; the event objects do so only in newer torch.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            return count_launches(json.loads(path.read_text())) or None

    def peak_extra(self, run: Callable[[], object]) -> int:
        """Bytes allocated at the worst moment of the run, beyond what was allocated before it."""
        gc.collect()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def count_launches(trace: dict[str, Any]) -> int:
    """Events of a Chrome trace that occupy the device; ranges that merely annotate it do not count."""
    occupying = ("kernel", "gpu_memcpy", "gpu_memset")
    return sum(event.get("cat", "").lower() in occupying for event in trace.get("traceEvents", ()))


def slug(name: str) -> str:
    """A device's name as a folder name, like nvidia-h200."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def describe(gpu: Gpu) -> dict[str, Any]:
    """GPU, driver, versions and sources: what goes into every row."""
    return {
        "gpu": gpu.name,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cpu": machine.cpu_model(),
        "cores": machine.cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "pytorch_optimizer": machine.peer_version(),
        "sam_kernels": machine.package_version(),
        "commit": _commit(),
        "tree": tree_hash(machine.ROOT, build_of_libraries()),
        "library": cuda_library(),
    }


def cuda_library() -> str:
    """What the CUDA library is, or why it cannot be used."""
    try:
        from sam_kernels.backends import native

        return str(native.describe_cuda())
    except (ImportError, AttributeError) as problem:
        return f"this sam_kernels knows no CUDA library ({problem})"


def _commit() -> str:
    """COMMIT where the sources were copied without their history, as on a machine lent for a while."""
    return os.environ.get("COMMIT") or machine.commit()


def build_of_libraries() -> str:
    """What the build recorded and the CUDA library says: compilers, targets and other settings than usual."""
    from sam_kernels.backends import native

    recorded = machine.ROOT / "sam_kernels" / "_build.json"
    library = native._libraries.get("cuda")
    said = library.build_info() if hasattr(library, "build_info") else "no CUDA library"
    return f"{recorded.read_text() if recorded.exists() else ''} {said}"


def tree_hash(root: Path, build: str = "") -> str:
    """A name for the sources and how they were built: figures and correctness belong to one such state.

    Not for the libraries' bytes: nvcc writes others every time.
    """
    digest = hashlib.sha256(build.encode())
    for pattern in ("CMakeLists.txt", "setup.py", "csrc/**/*", "sam_kernels/**/*.py", "bench/**/*.py"):
        for path in sorted(root.glob(pattern)):
            if path.is_file() and path.relative_to(root).as_posix() not in _SHOWING:
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def is_fault(unit: str, row: Row) -> bool:
    """Whether a row says that we are wrong; a peer that is wrong is only left out."""
    if row["metric"] != "wrong":
        return False
    has_peers = unit.split("/")[0] in ("phase", "train")
    return not has_peers or row["peer"].startswith(("ours", unit))


STARTED = "started"  # the metric of a row that stands while its unit is measured


class GpuResults(Results):
    """Rows of a GPU. A unit is done if it was measured with these sources and nothing of ours was wrong.

    A unit that ended its process, by a hang, a crash or a lost context, leaves rows that know how often:
    `attempts`.
    """

    def has(self, unit: str) -> bool:
        rows = self._of(unit)
        return super().has(unit) and not any(is_fault(unit, row) or row["metric"] == STARTED for row in rows)

    def state(self, unit: str) -> str:
        """What became of a unit, in a word or two."""
        rows = self._of(unit)
        if not rows:
            return "to do"
        if any(row["metric"] == STARTED for row in rows):
            return "to do: it was begun and did not end"
        if not all(map(self._is_ours, rows)):
            return "to do: other sources, card or versions measured it"
        return "done" if self.has(unit) else "wrong"

    def begin(self, unit: str, attempts: int) -> None:
        """Say on disk that a unit is being measured; what a former run left of it stays until it is done."""
        self._before = list(self.rows)
        row = {"unit": unit, **single(unit, STARTED, True, attempts=attempts), "machine": self.machine}
        self.rows = [r for r in self.rows if (r["unit"], r["metric"]) != (unit, STARTED)] + [row]
        self.save()

    def retract(self) -> None:
        """Undo the last `begin`."""
        self.rows = self._before
        self.save()

    def attempts(self, unit: str, is_any_call: bool = True) -> int:
        """How often it ended its process, with these sources; of `is_any_call` or of this call alone."""
        rows = [row for row in self._of(unit) if self._is_ours(row)]
        return max((row.get("attempts", 0) for row in rows if is_any_call or self._is_now(row)), default=0)

    def is_of_this_call(self, unit: str) -> bool:
        rows = self._of(unit)
        return bool(rows) and all(map(self._is_now, rows))

    def broken(self) -> dict[str, int]:
        """Attempts of the units that ended a process of this call; without those that were given up."""
        found = {row["unit"] for row in self.rows if "attempts" in row and "given_up" not in row}
        return {unit: self.attempts(unit, is_any_call=False) for unit in sorted(found)}

    def _of(self, unit: str) -> list[Row]:
        return [row for row in self.rows if row["unit"] == unit]

    def _is_now(self, row: Row) -> bool:
        """Whether it was measured by this call of the command, in whichever of its processes."""
        began = self.machine.get("began")
        return began is not None and row["machine"].get("began") == began

    def _is_ours(self, row: Row) -> bool:
        return all(row["machine"].get(key) == self.machine.get(key) for key in _FINGERPRINT)

    def current(self) -> GpuResults:
        """Only the rows of these sources: what a table of this run may show."""
        copy = GpuResults(self.path, self.machine)
        copy.rows = [row for row in self.rows if self._is_ours(row) and row["metric"] != STARTED]
        return copy


def rate(row: Row | None) -> float | None:
    """GB/s of a row of milliseconds that knows its bytes."""
    return None if row is None else row["bytes"] / row["p50"] / 1e6


def median_of(run: Callable[[], float], times: int) -> list[float]:
    """`times` samples after three that are thrown away; without the collector, as in timing.interleave."""
    for _ in range(3):
        run()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return [run() for _ in range(times)]
    finally:
        if was_enabled:
            gc.enable()
