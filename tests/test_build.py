"""What is built, what is said about it, and what a package holds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sam_kernels

ROOT = Path(__file__).resolve().parents[1]
SETUP = ROOT / "setup.py"
if not SETUP.exists():
    pytest.skip("these tests read the source tree, and it is not here", allow_module_level=True)


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module; its call of setup() is guarded."""
    spec = importlib.util.spec_from_file_location("setup_of_sam_kernels", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the decision ----


def decide(setup, env: dict[str, str], *, present: str = "g++ c++ cmake ninja", complaint: str = ""):
    tools = present.split()
    find = {tool: f"/bin/{tool}" for tool in tools}.get
    return setup.decide(env, find, lambda compiler: complaint)


@pytest.mark.parametrize("mode", [None, "", "auto", "cpu"])
def test_native_is_built_where_the_tools_are(setup, mode):
    pytest.importorskip("pybind11", reason="pybind11 is one of the tools, and it is not here")
    env = {} if mode is None else {"SAM_KERNELS_BUILD": mode}
    assert decide(setup, env).compiler == "g++"


def test_cxx_chooses_the_compiler(setup):
    pytest.importorskip("pybind11", reason="pybind11 is one of the tools, and it is not here")
    decision = decide(setup, {"CXX": "ccache mine++"}, present="ccache g++ cmake ninja")
    assert decision.compiler == "ccache mine++"


def test_none_builds_nothing_and_says_why(setup):
    assert decide(setup, {"SAM_KERNELS_BUILD": "none"}) == (None, "SAM_KERNELS_BUILD=none")


IMPOSSIBLE = {
    "no compiler": (
        {},
        {"present": "cmake ninja"},
        r"no C\+\+ compiler found; searched g\+\+, clang\+\+, c\+\+",
    ),
    "no such compiler": ({"CXX": "/no/c++"}, {}, r"searched /no/c\+\+ on PATH"),
    "no cmake": ({}, {"present": "g++ ninja"}, r"cmake.* not found"),
    "no ninja": ({}, {"present": "g++ cmake"}, r"ninja.* not found"),
    "no headers": ({}, {"complaint": "Python.h: No such file"}, r"g\+\+ cannot compile .*Python\.h"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_automatic_and_impossible_is_a_sentence(setup, case):
    env, world, sentence = IMPOSSIBLE[case]
    decision = decide(setup, env, **world)
    assert decision.compiler is None
    line = setup.summary(decision)
    assert re.search(sentence, line) and "torch backends serve" in line


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_asked_for_and_impossible_is_an_error(setup, case):
    env, world, sentence = IMPOSSIBLE[case]
    with pytest.raises(SystemExit, match=rf"SAM_KERNELS_BUILD=cpu: .*{sentence}"):
        decide(setup, {**env, "SAM_KERNELS_BUILD": "cpu"}, **world)


def test_cuda_is_refused_with_a_sentence(setup):
    with pytest.raises(SystemExit, match="no CUDA library"):
        decide(setup, {"SAM_KERNELS_BUILD": "cuda"})


def test_an_unknown_mode_lists_the_known_ones(setup):
    with pytest.raises(SystemExit, match=r"'gpu' is not known\. Known: auto, none, cpu"):
        decide(setup, {"SAM_KERNELS_BUILD": "gpu"})


def test_a_compiler_is_asked_before_it_is_trusted(setup):
    assert setup.complaint(f"{sys.executable} -c 'raise SystemExit(3)'")


def test_the_summary_is_one_line_about_every_engine(setup):
    line = setup.summary(setup.Decision(sys.executable), ["avx512", "baseline"])
    assert re.fullmatch(
        r"sam_kernels: native CPU yes \(.* \d+\.\d+, avx512\+baseline\) \| CUDA .* \| Triton .*", line
    )


# ---- the words ----


def table() -> set[str]:
    rows = re.findall(r"^\| *(`.*?) \|", (ROOT / "ENVIRONMENT.md").read_text(), re.M)
    return set(re.findall(r"`(\w+)`", " ".join(rows)))


def sources() -> dict[str, str]:
    files = [SETUP, ROOT / "CMakeLists.txt", ROOT / "Makefile", ROOT / "README.md"]
    for folder in ("sam_kernels", "csrc", "bench", "examples"):
        files += [
            p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".h", ".cpp", ".c", ".txt", ".md"}
        ]
    # Results name the version that was measured, which is their business.
    files = [path for path in files if "results" not in path.relative_to(ROOT).parts]
    return {str(path.relative_to(ROOT)): path.read_text() for path in files if path.exists()}


def test_every_variable_of_ours_is_in_the_table_and_back():
    # Names that end in _ are include guards, or a family of variables.
    found = {
        name for text in sources().values() for name in re.findall(r"\bSAM_KERNELS_[A-Z_]*[A-Z]\b", text)
    }
    assert found == {name for name in table() if name.startswith("SAM_KERNELS_")}


def test_every_variable_read_is_in_the_table():
    read = r"""(?:environ(?:ment)?(?:\.get\(|\[)|getenv\(|\benv(?:\.get\(|\[))\s*["'](\w+)["']"""
    found = {
        name for path, text in sources().items() for name in re.findall(read, text) if path[:5] != "bench"
    }
    assert found, "the pattern finds no reading at all"
    assert found <= table()


def test_setup_names_its_flags_at_the_top(setup):
    for name in ("SAM_KERNELS_BUILD", "SAM_KERNELS_DEBUG", "MAX_JOBS", "CMAKE_ARGS", "CXX"):
        assert name in setup.__doc__


def test_the_version_stands_in_one_place():
    version = sam_kernels.__version__
    holders = [
        path
        for path, text in sources().items()
        if re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.])", text)
    ]
    assert [path for path in holders if not path.endswith(".md")] == [
        os.path.join("sam_kernels", "_version.py")
    ]
    assert version not in (ROOT / "pyproject.toml").read_text()


def test_the_installed_version_is_that_of_the_source():
    try:
        installed = importlib.metadata.version("sam_kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("sam_kernels is imported from its source tree, and not installed")
    assert installed == sam_kernels.__version__


def test_the_build_asks_for_no_torch():
    requires = re.search(r"^requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert requires and "pybind11" in requires[1] and "torch" not in requires[1]


# ---- the native module ----


def native_file() -> Path:
    spec = importlib.util.find_spec("sam_kernels._native")
    if spec is None or spec.origin is None:
        pytest.skip("the native module was not built; python -m sam_kernels.doctor says why")
    return Path(spec.origin)


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on PATH")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_native_has_no_symbol_of_torch():
    symbols = output("nm", "-D", str(native_file()))
    assert "PyInit__native" in symbols
    # at:: and c10:: as they are mangled, on their own or as arguments; the rest are torch's C symbols
    assert not re.findall(r".*(?:N\d*K?2at\d|N\d*K?3c10\d|2at\dTensor|5torch|\b(?:aoti_)?torch_).*", symbols)


def test_native_links_no_library_of_torch():
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", str(native_file())))
    assert needed
    assert not [name for name in needed if re.search(r"torch|c10|cuda|python\d", name)]


def test_native_loads_without_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_native', {str(native_file())!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert module.isa() and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


# ---- import ----


def test_import_starts_no_cuda_and_needs_no_native_module():
    code = """
import sys
sys.modules["sam_kernels._native"] = None  # as if it had never been built
import torch
import sam_kernels
from sam_kernels import SAM, doctor
assert not torch.cuda.is_initialized()
w = torch.nn.Parameter(torch.ones(3))
opt = SAM([w], torch.optim.SGD, lr=0.1, rho=0.05)
def closure():
    loss = w.square().sum()
    loss.backward()
    return loss
opt.step(closure)
assert not torch.equal(w, torch.ones(3))
assert "foreach" in str(opt.backends()), opt.backends()
assert "backend native     not available: the native module" in doctor.report()
try:
    SAM([w], torch.optim.SGD, lr=0.1, backend="native").step(closure)
except RuntimeError as refused:
    assert "'native' was requested" in str(refused), refused
else:
    raise AssertionError("a forced backend that is not there must not be replaced in silence")
assert not torch.cuda.is_initialized()
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SAM_KERNELS_")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


# ---- packages ----


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The source tree with what former builds may have left in it."""
    try:
        importlib.metadata.version("pip")
        enough = int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        enough = False
    if not enough:
        pytest.skip("building a package here needs pip and setuptools 77 or newer in this environment")
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(
        ROOT / "sam_kernels", copy / "sam_kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    platform = f"lib.linux-x86_64-{sys.implementation.cache_tag}"
    for folder in ("sam_kernels", "build/lib/sam_kernels", f"build/{platform}/sam_kernels"):
        (copy / folder).mkdir(parents=True, exist_ok=True)
        (copy / folder / "_native.cpython-311-x86_64-linux-gnu.so").write_bytes(b"stale")
        (copy / folder / "_build.json").write_text('{"summary": "stale"}')
    (copy / "build/lib/sam_kernels/removed.py").touch()
    return copy


def pip_wheel(copy: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "out",
        ".",
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SAM_KERNELS_", "PYTHONPATH", "CXX"))}
    return subprocess.run(command, cwd=copy, env=clean | environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"SAM_KERNELS_BUILD": "none"}, "SAM_KERNELS_BUILD=none"), ({"CXX": "/no/c++"}, "searched /no/c++")],
    ids=["asked for", "no compiler"],
)
def test_a_wheel_without_native_holds_no_library(copy, environment, reason):
    result = pip_wheel(copy, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (copy / "out").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert reason in json.loads(archive.read("sam_kernels/_build.json"))["summary"]
    assert not [name for name in names if re.search(r"\.(so|pyd|dylib)$|removed\.py", name)]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sam_kernels").rglob("*.py")}
    assert modules | {"sam_kernels/py.typed"} <= set(names)


@pytest.mark.slow
def test_a_wheel_that_cannot_be_as_asked_is_not_made(copy):
    result = pip_wheel(copy, SAM_KERNELS_BUILD="cpu", CXX="/no/c++")
    assert result.returncode != 0
    assert "SAM_KERNELS_BUILD=cpu: no C++ compiler found; searched /no/c++" in result.stdout + result.stderr


@pytest.mark.slow
def test_a_source_distribution_holds_the_sources_alone(copy):
    code = "from setuptools import build_meta; build_meta.build_sdist('out')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (archive,) = (copy / "out").iterdir()
    shutil.unpack_archive(archive, copy / "unpacked")
    (root,) = (copy / "unpacked").iterdir()
    held = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    wanted = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "csrc").rglob("*")
        if p.suffix in {".h", ".cpp", ".txt"}
    }
    assert (
        wanted | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "sam_kernels/py.typed"} <= held
    )
    assert not [name for name in held if name.endswith(("_build.json", ".so", ".pyc"))]
