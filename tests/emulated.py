"""The CUDA sources, compiled for the CPU and registered as the backend "emulated".

CMake's target samk_emulated compiles csrc/ops/cuda/*.cu unchanged against csrc/tests/shim, where the threads
of a block are fibers. It is built here when it is older than its sources, which takes about a minute.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from sam_kernels import backends
from sam_kernels.backends import native

ROOT = Path(__file__).resolve().parent.parent


def _tool(name: str) -> str | None:
    # Those of this environment first, as in the Makefile: another cmake would compile everything again.
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def _folder() -> Path:
    """Where `make test-cpp` compiles the same sources: beside the package, or by themselves."""
    package = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    cache = package / "CMakeCache.txt"
    # A build of pip's under isolation has lost its tools by now.
    is_ours = cache.exists() and f"={_tool('ninja')}\n" in cache.read_text()
    return package if is_ours else ROOT / "build" / "cpp"


BUILD = _folder()
LIBRARY = BUILD / "libsamk_emulated.so"


def _is_fresh() -> bool:
    sources = [*ROOT.glob("csrc/**/*.*"), ROOT / "CMakeLists.txt"]
    return LIBRARY.exists() and LIBRARY.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def _build() -> str | None:
    """Build the library, or return the sentence why it cannot be."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None or ninja is None:
        return "cmake and ninja are needed to compile the CUDA sources for the CPU"
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        return "a C++ compiler is needed to compile the CUDA sources for the CPU"
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DSAMK_BUILD_PYTHON={'ON' if BUILD.name.startswith('native') else 'OFF'}"]
    for command in (configure, [cmake, "--build", str(BUILD), "--target", "samk_emulated"]):
        done = subprocess.run(command, capture_output=True, text=True)
        # A source that does not compile is a defect, not a reason to skip.
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return None


def _build_once() -> str | None:
    """Build unless another process of the tests has, or is about to."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return None if _is_fresh() else _build()


def _needless() -> str | None:
    """Why the CUDA sources are not wanted on the CPU, or None: building them takes a GPU's time."""
    is_gpu_alone = os.environ.get("SAM_KERNELS_TEST_DEVICE", "cpu") == "cuda"
    return "SAM_KERNELS_TEST_DEVICE=cuda: the CUDA sources run on the GPU" if is_gpu_alone else None


def _load() -> tuple[native.Native, str | None]:
    problem = native._problem or _needless() or _build_once()
    libraries = {"cpu": native._native.Library(str(LIBRARY))} if problem is None else {"cpu": problem}
    return native.Native("emulated", libraries), problem


BACKEND, PROBLEM = _load()
if "emulated" not in backends.names():
    backends.register(BACKEND)

needed = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
