"""Decides what to build, lets CMake build it, and says what was decided.

Environment flags (ENVIRONMENT.md has the table):
    SAM_KERNELS_BUILD   auto | none | cpu. auto builds the native module where a C++ compiler is found;
                        cpu insists on it; none gives a pure Python package. cuda is reserved.
    SAM_KERNELS_DEBUG   1 builds without optimisation, with debug information.
    MAX_JOBS            parallel compile jobs (default: all cores).
    CMAKE_ARGS          further arguments for cmake.
    CXX                 the C++ compiler.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu")
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Decision:
    """Whether the native module is built, and the sentence about it."""

    native: bool
    sentence: str


def decide(env: dict[str, str], which=shutil.which) -> Decision:
    """Decide from the environment alone; raises SystemExit for a wish that cannot be honoured."""
    mode = env.get("SAM_KERNELS_BUILD", "auto")
    if mode == "cuda":
        raise SystemExit("SAM_KERNELS_BUILD=cuda: this version has no CUDA library yet; use auto, cpu or none")
    if mode not in MODES:
        raise SystemExit(f"SAM_KERNELS_BUILD={mode!r} is not known. Known: {', '.join(MODES)}")
    if mode == "none":
        return Decision(False, "no (SAM_KERNELS_BUILD=none)")
    wanted = [env["CXX"]] if env.get("CXX") else list(COMPILERS)
    compiler = next((path for name in wanted if (path := which(shlex.split(name)[-1]))), None)
    if compiler is None:
        searched = f"no C++ compiler found (searched {', '.join(wanted)} on PATH"
        if mode == "cpu":
            raise SystemExit(
                f"SAM_KERNELS_BUILD=cpu: {searched}); install one, set CXX, or use SAM_KERNELS_BUILD=auto"
            )
        return Decision(False, f"no ({searched}; set CXX); the torch backends serve instead")
    return Decision(True, f"yes ({compiler})")


def summary(decision: Decision) -> str:
    return f"sam_kernels: native CPU {decision.sentence} | CUDA no (not in this version) | Triton no (not in this version)"


class BuildNative(build_ext):
    """Runs CMake where setuptools would run a compiler."""

    def run(self) -> None:
        print(summary(DECISION), file=sys.stderr)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        debug = os.environ.get("SAM_KERNELS_DEBUG", "0") == "1"
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={target.parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_native", *jobs], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


class BuildPython(build_py):
    """Adds the record of the decision, which the doctor prints."""

    def run(self) -> None:
        super().run()
        package = ROOT / "sam_kernels" if self.editable_mode else Path(self.build_lib) / "sam_kernels"
        if not DECISION.native:
            for stale in package.glob("_native*"):
                stale.unlink()  # a former build must not end up in a package that says it has none
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps({"summary": summary(DECISION)}) + "\n")


if __name__ == "__main__":
    DECISION = decide(dict(os.environ))
    setup(
        ext_modules=[Extension("sam_kernels._native", sources=[])] if DECISION.native else [],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    )
