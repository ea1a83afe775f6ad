"""CUDA libraries with other settings of csrc/core/tuning.h, side by side: python -m bench.gpu.variants

Builds for the card at hand what these sources and this compiler have not built yet, and prints what became of
the kernels that stage 6 measures: registers, and bytes that are spilled. Where one spills, its pass is left
out of the sweep.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import machine
from .settings import SWEEPS, Variant

FOLDER = machine.ROOT / "build" / "variants"
LIBRARY = "libsam_kernels_cuda.so"

# The kernels of the passes in stage 6, as the compiler spells them, by pass and dtype.
_TYPES = {"float32": "float", "bfloat16": "samk::bf16"}
_BITS = {"float32": "unsigned int", "bfloat16": "unsigned short"}
KERNELS = {
    (name, dtype): kernel
    for dtype, t in _TYPES.items()
    for name, kernel in {
        "sq_norm": f"sq_norm_kernel<{t}, {t}, 0, false>",
        "perturb_": f"perturb_kernel<{t}, {t}, {t}, 0, false, 0>",
        "restore_": f"restore_kernel<{_BITS[dtype]}, false>",
        "descend_ sgd": f"descend_kernel<{t}, {t}, false, 0, false>",
        "descend_ adamw": f"descend_kernel<{t}, {t}, false, 1, false>",
    }.items()
}

LATE = "not built: the time is over"

_JOBS_EACH = 4  # compilers that one build keeps busy most of its time


@dataclass(frozen=True)
class Kernel:
    """What the assembler said of one kernel."""

    registers: int
    spilled: int


@dataclass(frozen=True)
class Built:
    """A library, or the sentence why there is none.

    Attributes:
        kernels: by pass and dtype.
        others: how many of the kernels that are not measured spill.
    """

    library: Path
    problem: str | None = None
    kernels: Mapping[tuple[str, str], Kernel] = field(default_factory=dict)
    others: int = 0
    seconds: float = 0.0


def build(variants: Iterable[Variant], arch: str, jobs: int, ends: float = float("inf")) -> dict[str, Built]:
    """Build what is not there yet, several at a time; what is begun after `ends` is not built.

    Args:
        arch: compute capability, such as "90".
        jobs: compilers at a time, all builds together.
        ends: seconds of time.monotonic.
    """
    chosen = {variant.name: variant for variant in variants}
    each = min(jobs, _JOBS_EACH)
    with ThreadPoolExecutor(max(1, jobs // each)) as pool:
        built = pool.map(partial(_build_one, arch=arch, jobs=each, ends=ends), chosen.values())
        return dict(zip(chosen, built, strict=True))


def is_built(variant: Variant, arch: str) -> bool:
    """Whether these sources and this compiler have built it already."""
    tree = _tree(variant)
    stamp = tree / "built-as.txt"
    return (tree / LIBRARY).exists() and stamp.exists() and stamp.read_text() == _state(variant, arch)


def _build_one(variant: Variant, arch: str, jobs: int, ends: float) -> Built:
    tree = _tree(variant)
    library, began = tree / LIBRARY, time.monotonic()
    if not is_built(variant, arch):
        if began > ends:
            return Built(library, LATE)
        if absent := [name for name in ("nvcc", "cmake", "ninja") if tool(name) is None]:
            return Built(library, f"not built: {', '.join(absent)} not found")
        problem = _run_cmake(tree, variant, arch, jobs)
        if problem is not None:
            return Built(library, problem)
        (tree / "built-as.txt").write_text(_state(variant, arch))
    kernels = read_logs(tree / "ptxas")
    measured = {key: kernels[name] for key, name in KERNELS.items()}
    others = sum(x.spilled > 0 for name, x in kernels.items() if name not in KERNELS.values())
    return Built(library, None, measured, others, time.monotonic() - began)


def _run_cmake(tree: Path, variant: Variant, arch: str, jobs: int) -> str | None:
    """Configure and build; the first line that says what is wrong, if anything is."""
    tree.mkdir(parents=True, exist_ok=True)
    (tree / "built-as.txt").unlink(missing_ok=True)
    settings = ";".join(f"{name}={value}" for name, value in sorted(variant.settings.items()))
    configure = [str(tool("cmake")), "-S", str(machine.ROOT), "-B", str(tree), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DCMAKE_CUDA_COMPILER={tool('nvcc')}"]
    configure += ["-DSAMK_BUILD_PYTHON=OFF", "-DSAMK_CUDA=ON", f"-DSAMK_CUDA_ARCHS={arch}"]
    configure += [f"-DSAMK_CUDA_TUNING={settings}"]
    make = [str(tool("cmake")), "--build", str(tree), "--target", "samk_cuda", "--parallel", str(jobs)]
    for command in (configure, make):
        done = subprocess.run(command, capture_output=True, text=True)
        (tree / "build.log").write_text(said := done.stdout + done.stderr)
        if done.returncode != 0:
            lines = said.strip().splitlines() or [f"exit status {done.returncode}"]
            return next((line for line in lines if "error" in line.lower()), lines[-1])
    return None


def read_logs(folder: Path) -> dict[str, Kernel]:
    """What ptxas said of every kernel, by its name without namespaces and parameters."""
    found: dict[str, Kernel] = {}
    for log in sorted(folder.glob("*.cu.log")):
        parts = re.split(r"^ptxas info\s*: Compiling entry function '", log.read_text(), flags=re.M)[1:]
        names = _demangled([part.partition("'")[0] for part in parts])
        for name, part in zip(names, parts, strict=True):
            # Functions that a kernel calls are said of after it: what they spill is the kernel's.
            spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", part))
            used = re.search(r"Used (\d+) registers", part)
            if used is None:
                raise ValueError(f"{log} does not say how many registers {name} has")
            found[name] = Kernel(int(used[1]), spilled)
    return found


def _demangled(names: list[str]) -> list[str]:
    """Names of kernels as KERNELS has them; c++filt comes with every compiler that nvcc works with."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [
        re.sub(r"^void |samk::\(anonymous namespace\)::", "", line).partition(">(")[0] + ">"
        for line in text.splitlines()
    ]


def tool(name: str) -> str | None:
    """A program beside this interpreter, on PATH or in the CUDA toolkit."""
    homes = [f"{os.environ[key]}/bin" for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    places = [sysconfig.get_path("scripts"), *homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(places))


def _tree(variant: Variant) -> Path:
    return FOLDER / re.sub(r"[^\w=.+-]", "_", variant.name)


def _state(variant: Variant, arch: str) -> str:
    """Everything a library follows from."""
    return f"{variant.settings} sm_{arch} {_sources()}"


@cache
def _sources() -> str:
    """A name for the sources of the CUDA library and for the compiler, as this process found them."""
    digest = hashlib.sha256()
    files = [machine.ROOT / "CMakeLists.txt", *sorted((machine.ROOT / "csrc").rglob("*"))]
    for path in files:
        if path.is_file() and "tests" not in path.parts:
            digest.update(str(path.relative_to(machine.ROOT)).encode() + b"\0" + path.read_bytes())
    nvcc = tool("nvcc")
    digest.update(subprocess.run([nvcc, "--version"], capture_output=True).stdout if nvcc else b"no nvcc")
    return digest.hexdigest()[:12]


def report(built: Mapping[str, Built]) -> Table:
    """Registers of every measured kernel, and what is spilled."""
    table = Table(title="registers, and bytes spilled", title_justify="left")
    table.add_column("library")
    for name, dtype in KERNELS:
        table.add_column(f"{name}\n{dtype}", justify="right")
    table.add_column("others\nthat spill", justify="right")
    table.add_column("s", justify="right")
    for name, one in built.items():
        if one.problem is not None:
            table.add_row(name, one.problem)
            continue
        cells = [
            f"{k.registers}" + (f" [red]+{k.spilled} B" if k.spilled else "") for k in one.kernels.values()
        ]
        table.add_row(name, *cells, str(one.others), f"{one.seconds:.0f}")
    return table


def main(arguments: list[str] | None = None) -> int:
    variants = {v.name: v for sweep in SWEEPS for v in sweep.variants}
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.variants", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"all by default: {', '.join(variants)}")
    parser.add_argument("--arch", help="compute capability, such as 90 (default: that of the card)")
    parser.add_argument("--jobs", type=int, default=machine.cores(), help="compilers at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no build after so long")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(variants):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    chosen = [variants[name] for name in options.names] or list(variants.values())
    arch = options.arch or arch_of_card()
    began = time.monotonic()
    built = build(chosen, arch, options.jobs, began + options.seconds)
    console = Console(width=None if Console().is_terminal else 200, highlight=False)
    console.print(report(built))
    console.print(f"sm_{arch}, {time.monotonic() - began:.0f} s; the libraries lie in {FOLDER}", markup=False)
    return 1 if any(one.problem for one in built.values()) else 0


def arch_of_card() -> str:
    """Compute capability of the first card, as CMake takes it."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}"


if __name__ == "__main__":
    raise SystemExit(main())
