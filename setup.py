"""Decides what to build, lets CMake build it, and says what was decided.

Environment flags (ENVIRONMENT.md has the table):
    SAM_KERNELS_BUILD   auto | none | cpu. auto builds the native module where the tools for it are found;
                        cpu insists on it; none makes a pure Python package. cuda is reserved.
    SAM_KERNELS_DEBUG   1 keeps assertions and debug information.
    MAX_JOBS            parallel compile jobs (default: all cores).
    CMAKE_ARGS          further arguments for cmake.
    CXX                 the C++ compiler.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu")
COMPILERS = ("g++", "clang++", "c++")


class Decision(NamedTuple):
    """The compiler command that builds the native module, or None and the reason why none does."""

    compiler: str | None
    reason: str = ""


def find(tool: str) -> str | None:
    """Where a program is: on PATH, or beside this interpreter, whose environment need not be activated."""
    return shutil.which(tool) or shutil.which(tool, path=sysconfig.get_path("scripts"))


def complaint(compiler: str) -> str:
    """What a compiler says against a Python module in C++17; empty if nothing."""
    command = [*shlex.split(compiler), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    command.append(f"-I{sysconfig.get_path('include')}")
    source = "#include <Python.h>\n#include <string_view>\nint main() { return std::string_view().size(); }\n"
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    return "" if result.returncode == 0 else next((line for line in lines if "error" in line), lines[0])


def decide(
    env: Mapping[str, str],
    find: Callable[[str], str | None] = find,
    complaint: Callable[[str], str] = complaint,
) -> Decision:
    """Decide from the environment; a wish that cannot be honoured exits with what was searched."""
    mode = env.get("SAM_KERNELS_BUILD") or "auto"
    if mode == "cuda":
        raise SystemExit(
            "SAM_KERNELS_BUILD=cuda: this version has no CUDA library yet; use auto, cpu or none"
        )
    if mode not in MODES:
        raise SystemExit(f"SAM_KERNELS_BUILD={mode!r} is not known. Known: {', '.join(MODES)}")
    if mode == "none":
        return Decision(None, "SAM_KERNELS_BUILD=none")
    names = [env["CXX"]] if env.get("CXX") else COMPILERS
    compiler = next((name for name in names if find(shlex.split(name)[0])), None)
    absent = [tool for tool in ("cmake", "ninja") if not find(tool)]
    absent += [] if find_spec("pybind11") else ["pybind11"]
    if compiler is None:
        reason = f"no C++ compiler found; searched {', '.join(names)} on PATH; install one or set CXX"
    elif absent:
        reason = f"{', '.join(absent)} not found; pip install {' '.join(absent)}, or build with isolation"
    elif problem := complaint(compiler):
        reason = f"{compiler} cannot compile a Python module in C++17: {problem}"
    else:
        return Decision(compiler)
    if mode == "cpu":
        raise SystemExit(f"SAM_KERNELS_BUILD=cpu: {reason}; SAM_KERNELS_BUILD=auto installs without it")
    return Decision(None, reason)


def summary(decision: Decision, instruction_sets: list[str] | None = None) -> str:
    """One line about every engine."""
    native = f"no ({decision.reason}); torch backends serve"
    if decision.compiler:
        command = shlex.split(decision.compiler)
        version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
        number = re.search(r"\d+\.\d+", version)
        compiler = f"{Path(command[-1]).name} {number[0] if number else 'of unknown version'}"
        native = f"yes ({compiler}, {'+'.join(instruction_sets or ['instruction sets unknown'])})"
    return (
        f"sam_kernels: native CPU {native} | CUDA no (not in this version) | Triton no (not in this version)"
    )


def record(package: Path, line: str) -> None:
    """Say what was decided, and leave it in the package, where the doctor reads it."""
    print(line, file=sys.stderr)
    (package / "_build.json").write_text(json.dumps({"summary": line}) + "\n")


class BuildPython(build_py):
    """Starts from nothing: what a former build left must not travel in this package."""

    def run(self) -> None:
        package = ROOT / "sam_kernels" if self.editable_mode else Path(self.build_lib) / "sam_kernels"
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        if DECISION.compiler is None:
            for stale in package.glob("_native.*"):
                stale.unlink()
            record(package, summary(DECISION))


class BuildNative(build_ext):
    """Runs CMake where setuptools would run a compiler."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        debug = os.environ.get("SAM_KERNELS_DEBUG", "0") == "1"
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}{'-debug' if debug else ''}"
        cmake = find("cmake") or "cmake"
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={find('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        environment = {**os.environ, "CXX": str(DECISION.compiler)}
        # Object files are kept for the next build only where it would be configured alike; CMake itself
        # holds on to compilers and programs that have moved, as they do under build isolation.
        alike = "\n".join(
            [*configure, *(f"{k}={environment.get(k)}" for k in ("CXX", "CXXFLAGS", "LDFLAGS"))]
        )
        configured = build / "configured-as.txt"
        if not configured.exists() or configured.read_text() != alike:
            shutil.rmtree(build, ignore_errors=True)
            self._run(configure, environment)
            configured.write_text(alike)
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        self._run([cmake, "--build", str(build), "--target", "_native", *jobs], environment)
        self._run([cmake, "--install", str(build), "--prefix", str(package.parent)], environment)
        compiled = re.findall(r"SAMK_ISA=(\w+)", (build / "compile_commands.json").read_text())
        line = summary(DECISION, list(dict.fromkeys(reversed(compiled))))
        record(ROOT / "sam_kernels" if self.editable_mode else package, line)

    @staticmethod
    def _run(command: list[str], environment: dict[str, str]) -> None:
        try:
            subprocess.run(command, check=True, env=environment)
        except subprocess.CalledProcessError as failure:
            raise SystemExit(
                f"sam_kernels: the native build failed, and the lines above say why: {shlex.join(command)} "
                f"(status {failure.returncode}). SAM_KERNELS_BUILD=none installs without it."
            ) from None


if __name__ == "__main__":
    DECISION = decide(os.environ)
    setup(
        ext_modules=[Extension("sam_kernels._native", sources=[])] if DECISION.compiler else [],
        cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
    )
