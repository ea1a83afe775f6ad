"""Decides what to build, lets CMake build it, and says what was decided.

Environment flags (ENVIRONMENT.md has the table):
    SAM_KERNELS_BUILD     auto | none | cpu | cuda. auto builds the native module and the CUDA library, each
                          where the tools for it are found; cpu insists on the module and leaves the library
                          out; cuda insists on both; none makes a pure Python package.
    SAM_KERNELS_DEBUG     1 keeps assertions and debug information.
    MAX_JOBS              parallel compile jobs (default: all cores).
    CMAKE_ARGS            further arguments for cmake.
    CXX                   the C++ compiler; CUDAHOSTCXX the one that nvcc uses, if it is to be another.
    CUDA_HOME, CUDA_PATH  the CUDA toolkit (default: nvcc on PATH, then /usr/local/cuda).
    CUDA_ARCHS            targets of the CUDA library, such as "80;90+PTX"; then TORCH_CUDA_ARCH_LIST counts,
                          then every generation the toolkit knows.
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
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
COMPILERS = ("g++", "clang++", "c++")
CUDA_LIBRARY = "libsam_kernels_cuda.so"
OLDEST_CUDA = (12, 1)  # the first that takes 32 kB of kernel parameters
OLDEST_ARCH = 70  # likewise
# One binary for each generation: it runs on every later card of the same major number.
ARCHS = ("75", "80", "86", "90", "100", "120")


class Decision(NamedTuple):
    """The compiler command that builds the native module, or None and the reason why none does."""

    compiler: str | None
    reason: str = ""


class Toolkit(NamedTuple):
    """The nvcc that builds the CUDA library, and for which targets; or None and the reason why none does."""

    nvcc: str | None
    reason: str = ""
    version: str = ""
    archs: tuple[str, ...] = ()


class BuildFailure(Exception):
    """A command of the build that failed, in words."""


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
    if mode != "auto":
        raise SystemExit(f"SAM_KERNELS_BUILD={mode}: {reason}; SAM_KERNELS_BUILD=auto installs without it")
    return Decision(None, reason)


def host_compiler(env: Mapping[str, str], compiler: str) -> str:
    """The compiler that nvcc hands C++ to: that of the native module, without a launcher before it."""
    return env.get("CUDAHOSTCXX") or shlex.split(compiler)[-1]


def ask_nvcc(nvcc: str) -> tuple[str, list[str]]:
    """The release of an nvcc and the targets it knows; it may be a wrapper, so its place tells nothing."""
    answers = [
        subprocess.run([nvcc, question], capture_output=True, text=True).stdout
        for question in ("--version", "--list-gpu-arch")
    ]
    release = re.search(r"release (\d+\.\d+)", answers[0])
    return release[1] if release else "", re.findall(r"compute_(\d+\w?)", answers[1])


def cuda_complaint(nvcc: str, host: str, arch: str) -> str:
    """What an nvcc with this host compiler says against a kernel in C++17; empty if nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(
            "#include <cuda_runtime.h>\n#include <string>\n__global__ void kernel(int* x) { *x = 1; }\n"
        )
        command = [nvcc, "-ccbin", host, "-std=c++17", f"-arch=sm_{arch}", "-c", str(source)]
        result = subprocess.run(
            [*command, "-o", str(source.with_suffix(".o"))], capture_output=True, text=True
        )
    lines = (result.stderr + result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
    return "" if result.returncode == 0 else next((line for line in lines if "error" in line), lines[0])


def choose_archs(env: Mapping[str, str], known: list[str]) -> tuple[str, ...]:
    """Targets as CMake takes them, "90" or "90+PTX": those asked for, or every generation this nvcc knows."""
    for name in ("CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        words = re.split(r"[\s;,]+", (env.get(name) or "").strip())
        if words == [""]:
            continue
        archs = []
        for word in words:
            parts = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)(\+PTX)?", word)
            if parts is None:
                raise ValueError(f"{name} has {word!r}; expected targets such as 8.0, 90 or 9.0+PTX")
            number = parts[1] + parts[2]
            if int(number) < OLDEST_ARCH or number not in known:
                serve = " ".join(arch for arch in known if int(arch.rstrip("af")) >= OLDEST_ARCH)
                raise ValueError(f"{name} has {word!r}; this nvcc and these kernels serve {serve}")
            archs.append(number + (parts[3] or "") + (parts[4] or ""))
        return tuple(dict.fromkeys(archs))
    archs = [arch for arch in ARCHS if arch in known]
    if not archs:
        raise ValueError(f"nvcc knows none of {' '.join(ARCHS)}; set CUDA_ARCHS")
    return (*archs[:-1], f"{archs[-1]}+PTX")


def examine_cuda(
    env: Mapping[str, str],
    host: str,
    find: Callable[[str], str | None],
    ask: Callable[[str], tuple[str, list[str]]],
    complaint: Callable[[str, str, str], str],
) -> Toolkit:
    """The toolkit at hand; ValueError says why there is none that could serve."""
    homes = {name: env.get(name) for name in ("CUDA_HOME", "CUDA_PATH")}
    places = [f"{home}/bin/nvcc" for home in homes.values() if home]
    nvcc = next(filter(None, map(find, [*places, "nvcc", "/usr/local/cuda/bin/nvcc"])), None)
    if nvcc is None:
        named = ", ".join(f"{name}={home}" if home else f"{name} (not set)" for name, home in homes.items())
        raise ValueError(f"no nvcc found; searched {named}, PATH, /usr/local/cuda")
    version, known = ask(nvcc)
    if not version:
        raise ValueError(f"{nvcc} --version names no release")
    if tuple(map(int, version.split("."))) < OLDEST_CUDA:
        raise ValueError(f"{nvcc} is of CUDA {version}; {'.'.join(map(str, OLDEST_CUDA))} or newer is needed")
    archs = choose_archs(env, known)
    if problem := complaint(nvcc, host, archs[0].removesuffix("+PTX")):
        raise ValueError(f"{nvcc} with {host} cannot compile a kernel: {problem}")
    return Toolkit(nvcc, "", version, archs)


def decide_cuda(
    env: Mapping[str, str],
    native: Decision,
    find: Callable[[str], str | None] = find,
    ask: Callable[[str], tuple[str, list[str]]] = ask_nvcc,
    complaint: Callable[[str, str, str], str] = cuda_complaint,
) -> Toolkit:
    """Decide about the CUDA library in the same way; the native module drives it, and must be there."""
    mode = env.get("SAM_KERNELS_BUILD") or "auto"
    if mode in ("none", "cpu"):
        return Toolkit(None, f"SAM_KERNELS_BUILD={mode}")
    if native.compiler is None:
        return Toolkit(None, "the native module, which drives it, is not built")
    try:
        return examine_cuda(env, host_compiler(env, native.compiler), find, ask, complaint)
    except ValueError as problem:
        if mode == "auto":
            return Toolkit(None, str(problem))
        raise SystemExit(
            f"SAM_KERNELS_BUILD={mode}: {problem}; SAM_KERNELS_BUILD=auto installs without it"
        ) from None


def summary(decision: Decision, toolkit: Toolkit, instruction_sets: list[str] | None = None) -> str:
    """One line about every engine."""
    native = f"no ({decision.reason}); torch backends serve"
    if decision.compiler:
        command = shlex.split(decision.compiler)
        version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
        number = re.search(r"\d+\.\d+", version)
        compiler = f"{Path(command[-1]).name} {number[0] if number else 'of unknown version'}"
        native = f"yes ({compiler}, {'+'.join(instruction_sets or ['instruction sets unknown'])})"
    cuda = f"no ({toolkit.reason})"
    if toolkit.nvcc:
        targets = " ".join(f"sm_{arch.removesuffix('+PTX')}" for arch in toolkit.archs)
        ptx = " + PTX" if any(arch.endswith("+PTX") for arch in toolkit.archs) else ""
        cuda = f"yes (nvcc {toolkit.version}, {targets}{ptx})"
    return f"sam_kernels: native CPU {native} | CUDA {cuda} | Triton wherever it is installed"


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
        start_afresh(package)


def start_afresh(package: Path) -> None:
    """Remove the libraries of a former build, and say so where none will take their place."""
    (package / CUDA_LIBRARY).unlink(missing_ok=True)
    if DECISION.compiler is None:
        for stale in package.glob("_native.*"):
            stale.unlink()
        record(package, summary(DECISION, TOOLKIT))


class BuildNative(build_ext):
    """Runs CMake where setuptools would run a compiler."""

    is_in_place = False  # python setup.py build_ext --inplace, for a checkout that is installed nowhere

    def run(self) -> None:
        self.is_in_place = bool(self.inplace)  # setuptools builds elsewhere, and forgets it meanwhile
        if self.is_in_place:
            start_afresh(ROOT / "sam_kernels")
            # It would be left there if it were newer than what is built now.
            (ROOT / "sam_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(
                missing_ok=True
            )
        super().run()

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        try:
            build = build_with_cmake(
                f"native-{sys.implementation.cache_tag}",
                "_native",
                package.parent,
                [f"-DPython_EXECUTABLE={sys.executable}"],
            )
        except BuildFailure as failure:
            raise SystemExit(
                f"sam_kernels: the native build failed, and the lines above say why: {failure}. "
                "SAM_KERNELS_BUILD=none installs without it."
            ) from None
        # Both copy extension modules into the source tree afterwards, and nothing else.
        home = ROOT / "sam_kernels" if self.editable_mode or self.is_in_place else package
        toolkit = build_cuda(home.parent)
        compiled = re.findall(r"SAMK_ISA=(\w+)", (build / "compile_commands.json").read_text())
        line = summary(DECISION, toolkit, list(dict.fromkeys(reversed(compiled))))
        record(home, line)


def build_cuda(prefix: Path) -> Toolkit:
    """Build the CUDA library as decided; what became of it. In a tree of its own, so that it may fail."""
    if TOOLKIT.nvcc is None:
        return TOOLKIT
    log = ROOT / "build" / "cuda.log"
    print(
        f"sam_kernels: building the CUDA library for {' '.join(TOOLKIT.archs)}; log in {log}", file=sys.stderr
    )
    options = ["-DSAMK_BUILD_PYTHON=OFF", "-DSAMK_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={TOOLKIT.nvcc}"]
    options += [f"-DSAMK_CUDA_ARCHS={';'.join(TOOLKIT.archs)}"]
    try:
        build_with_cmake(f"cuda-{TOOLKIT.version}", "samk_cuda", prefix, options, log)
    except BuildFailure as failure:
        print(log.read_text(), file=sys.stderr)
        if os.environ.get("SAM_KERNELS_BUILD") == "cuda":
            raise SystemExit(
                f"sam_kernels: the CUDA build failed, and the lines above say why: {failure}. "
                "SAM_KERNELS_BUILD=cpu installs without it."
            ) from None
        return Toolkit(None, f"its build with nvcc {TOOLKIT.version} failed; {log} says why")
    return TOOLKIT


def build_with_cmake(
    name: str, target: str, prefix: Path, options: list[str], log: Path | None = None
) -> Path:
    """Configure, build and install one target; the build tree. With a log, that is where the output goes."""
    debug = os.environ.get("SAM_KERNELS_DEBUG", "0") == "1"
    build = ROOT / "build" / f"{name}{'-debug' if debug else ''}"
    cmake = find("cmake") or "cmake"
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={find('ninja')}", *options]
    configure += [f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}"]
    configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    compiler = str(DECISION.compiler)
    environment = {**os.environ, "CXX": compiler, "CUDAHOSTCXX": host_compiler(os.environ, compiler)}
    # Object files are kept for the next build only where it would be configured alike; CMake itself
    # holds on to compilers and programs that have moved, as they do under build isolation.
    settings = ["CXX", "CXXFLAGS", "LDFLAGS"]
    settings += ["CUDAHOSTCXX", "CUDAFLAGS"] if target == "samk_cuda" else []
    alike = "\n".join([*configure, *(f"{k}={environment.get(k)}" for k in settings)])
    configured = build / "configured-as.txt"
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    if not configured.exists() or configured.read_text() != alike:
        shutil.rmtree(build, ignore_errors=True)
        run(configure, environment, log)
        configured.write_text(alike)
    jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    run([cmake, "--build", str(build), "--target", target, *jobs], environment, log)
    run([cmake, "--install", str(build), "--prefix", str(prefix)], environment, log)
    return build


def run(command: list[str], environment: dict[str, str], log: Path | None) -> None:
    """Run one command of the build, with what it says in the log if there is one."""
    with open(log or os.devnull, "a") as sink:
        told = {"stdout": sink, "stderr": subprocess.STDOUT} if log else {}
        status = subprocess.run(command, env=environment, **told).returncode
    if status != 0:
        raise BuildFailure(f"{shlex.join(command)} (status {status})")


if __name__ == "__main__":
    DECISION = decide(os.environ)
    TOOLKIT = decide_cuda(os.environ, DECISION)
    setup(
        ext_modules=[Extension("sam_kernels._native", sources=[])] if DECISION.compiler else [],
        cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
    )
