"""``python -m sam_kernels.doctor``: what this installation can do, and why not more."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__, backends
from .backends import native
from .tensor_groups import TensorGroup


def report() -> str:
    """The report as text: versions, machine, backends with reasons, build, environment.

    Example:
        >>> "backend native" in report()
        True
    """
    lines = [
        ("sam_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("numpy", _version("numpy")),
        ("triton", _version("triton")),
        ("platform", f"{platform.platform()}, {platform.machine()}"),
        ("build", _build()),
    ]
    probe = TensorGroup([torch.zeros(1)], [0], [(0, 1, 0.0)])
    for name in backends.names():
        sentence = backends.get(name).refusal(probe)
        note = "available" if sentence is None else f"not available: {sentence}"
        if name == "native" and sentence is None:
            note += f"; {native.describe()}"
        lines.append((f"backend {name}", note))
    cuda = "a device is visible to torch" if torch.cuda.is_available() else "no device is visible to torch"
    lines.append(("cuda", f"{cuda}; this version serves such tensors through foreach and reference"))
    lines += [(key, value) for key, value in sorted(os.environ.items()) if key.startswith("SAM_KERNELS_")]
    width = max(len(key) for key, _ in lines) + 2
    return "\n".join(f"{key:<{width}}{value}" for key, value in lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _build() -> str:
    record = Path(__file__).with_name("_build.json")
    if not record.exists():
        return "not recorded (the package was not installed)"
    return str(json.loads(record.read_text())["summary"])


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
