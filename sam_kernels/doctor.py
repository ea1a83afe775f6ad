"""``python -m sam_kernels.doctor``: what this installation can do, and why not more."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__, backends
from .tensor_groups import TensorGroup


def report() -> str:
    """The report as text: versions, machine, backends with reasons, build, environment.

    Example:
        >>> "backend native" in report()
        True
    """
    lines = [
        ("sam_kernels", f"{__version__} in {Path(__file__).parent}"),
        ("python", f"{platform.python_version()}, {sys.executable}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("numpy", _version("numpy")),
        ("triton", _version("triton")),
        ("platform", platform.platform()),
        ("cpu", f"{cpu()}, {os.cpu_count()} logical cores"),
        ("cuda library", _said(_cuda_library)),
        ("cuda driver", _said(_cuda_driver)),
        ("cuda device", _said(_cuda_device)),
        *((f"backend {name}", _said(_backend, name)) for name in backends.names()),
        ("build", _said(_build)),
        *((key, value) for key, value in sorted(os.environ.items()) if key.startswith("SAM_KERNELS_")),
    ]
    width = max(len(key) for key, _ in lines) + 2
    return "\n".join(f"{key:<{width}}{value}" for key, value in lines)


def _said(ask: Callable[..., str], *arguments: str) -> str:
    """The answer, or the exception as an answer: a doctor reports what is broken and goes on."""
    try:
        return ask(*arguments)
    except Exception as problem:
        return f"not available: {type(problem).__name__}: {problem}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu() -> str:
    """The name of the processor."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _cuda_library() -> str:
    from .backends import native

    return native.describe_cuda()


def _cuda_driver() -> str:
    """The newest CUDA that the driver runs. It is asked itself, since a torch may know nothing of it."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "none: this machine has no NVIDIA driver library"
    found = ctypes.c_int(0)
    status = driver.cuDriverGetVersion(ctypes.byref(found))
    if status != 0:
        return f"not working: cuDriverGetVersion answers {status}"
    return f"runs CUDA {found.value // 1000}.{found.value % 1000 // 10} and older"


def _cuda_device() -> str:
    """The devices torch would use: passes get their tensors from torch, whatever else the driver sees."""
    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"none: torch {torch.__version__} for CUDA {torch.version.cuda} sees no device"
    found = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return ", ".join(found)


def _backend(name: str) -> str:
    backend = backends.get(name)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    refusals = [
        backend.refusal(TensorGroup([torch.zeros(1, device=device)], [0], [(0, 1, 0.0)]))
        for device in devices
    ]
    describe = getattr(sys.modules[type(backend).__module__], "describe", None)
    if None not in refusals:
        return f"not available: {describe() if describe else refusals[0]}"
    return f"available: {describe()}" if describe else "available"


def _build() -> str:
    record = Path(__file__).with_name("_build.json")
    if not record.exists():
        return "not recorded (this package was not installed by pip)"
    return str(json.loads(record.read_text())["summary"])


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
