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
import sysconfig
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


@pytest.mark.parametrize("mode", [None, "", "auto", "cpu", "cuda"])
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
    toolkit = setup.decide_cuda(env, decision)
    line = setup.summary(decision, toolkit)
    assert re.search(sentence, line) and "torch backends serve" in line
    assert "CUDA no (the native module, which drives it, is not built)" in line


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_asked_for_and_impossible_is_an_error(setup, case, mode):
    env, world, sentence = IMPOSSIBLE[case]
    with pytest.raises(SystemExit, match=rf"SAM_KERNELS_BUILD={mode}: .*{sentence}"):
        decide(setup, {**env, "SAM_KERNELS_BUILD": mode}, **world)


def test_an_unknown_mode_lists_the_known_ones(setup):
    with pytest.raises(SystemExit, match=r"'gpu' is not known\. Known: auto, none, cpu, cuda"):
        decide(setup, {"SAM_KERNELS_BUILD": "gpu"})


def test_a_compiler_is_asked_before_it_is_trusted(setup):
    assert setup.complaint(f"{sys.executable} -c 'raise SystemExit(3)'")


def test_the_summary_is_one_line_about_every_engine(setup):
    toolkit = setup.Toolkit("/bin/nvcc", "", "13.0", ("75", "90a+PTX"))
    line = setup.summary(setup.Decision(sys.executable), toolkit, ["avx512", "baseline"])
    assert re.fullmatch(
        r"sam_kernels: native CPU yes \(.* \d+\.\d+, avx512\+baseline\) "
        r"\| CUDA yes \(nvcc 13\.0, sm_75 sm_90a \+ PTX\) \| Triton .*",
        line,
    )


# ---- the decision about CUDA ----

NATIVE = "g++"
CUDA_13 = "75 80 86 87 88 89 90 100 110 103 120 121".split()
NVCC = """case $1 in
--version) echo "Cuda compilation tools, release 12.8, V12.8.93";;
--list-gpu-arch) echo compute_75; echo compute_90a;;
esac"""
CUDA_12_4 = "50 52 53 60 61 62 70 72 75 80 86 87 89 90 90a".split()


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def decide_cuda(setup, env, *, present="nvcc", version="13.0", known=CUDA_13, complaint=""):
    find = {place: place for place in present.split()}.get
    native = setup.Decision(NATIVE)
    return setup.decide_cuda(
        env, native, find, lambda nvcc: (version, known), lambda nvcc, host, arch: complaint
    )


@pytest.mark.parametrize("mode", [None, "auto", "cuda"])
def test_cuda_is_built_where_the_toolkit_is(setup, mode):
    toolkit = decide_cuda(setup, {} if mode is None else {"SAM_KERNELS_BUILD": mode})
    assert toolkit == ("nvcc", "", "13.0", ("75", "80", "86", "90", "100", "120+PTX"))


@pytest.mark.parametrize("mode", ["cpu", "none"])
def test_cuda_is_left_out_where_that_is_asked(setup, mode):
    assert decide_cuda(setup, {"SAM_KERNELS_BUILD": mode}) == (None, f"SAM_KERNELS_BUILD={mode}", "", ())


@pytest.mark.parametrize(
    ("env", "present", "taken"),
    [
        ({"CUDA_HOME": "/a", "CUDA_PATH": "/b"}, "/a/bin/nvcc /b/bin/nvcc nvcc", "/a/bin/nvcc"),
        ({"CUDA_HOME": "/a", "CUDA_PATH": "/b"}, "/b/bin/nvcc nvcc", "/b/bin/nvcc"),
        ({"CUDA_HOME": "/without/nvcc"}, "nvcc /usr/local/cuda/bin/nvcc", "nvcc"),
        ({}, "/usr/local/cuda/bin/nvcc", "/usr/local/cuda/bin/nvcc"),
    ],
)
def test_nvcc_is_looked_for_in_order(setup, env, present, taken):
    assert decide_cuda(setup, env, present=present).nvcc == taken


@pytest.mark.parametrize(
    ("env", "known", "archs"),
    [
        ({}, CUDA_12_4, "75 80 86 90+PTX"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}, CUDA_13, "80 90+PTX"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0"}, CUDA_13, "80 90"),
        ({"TORCH_CUDA_ARCH_LIST": " 9.0a;10.0, 12.0+PTX "}, CUDA_13, "90a 100 120+PTX"),
        ({"CUDA_ARCHS": "90"}, CUDA_13, "90"),
        ({"CUDA_ARCHS": "sm_90;100"}, CUDA_13, "90 100"),
        ({"CUDA_ARCHS": "90 90"}, CUDA_13, "90"),
        ({"CUDA_ARCHS": "90", "TORCH_CUDA_ARCH_LIST": "8.0"}, CUDA_13, "90"),
        ({"CUDA_ARCHS": "", "TORCH_CUDA_ARCH_LIST": "8.0"}, CUDA_13, "80"),
    ],
)
def test_targets_are_those_asked_for_or_every_generation(setup, env, known, archs):
    assert decide_cuda(setup, env, known=known).archs == tuple(archs.split())


CUDA_IMPOSSIBLE = {
    "no nvcc": (
        {"CUDA_HOME": "/opt/cuda"},
        {"present": ""},
        r"no nvcc found; searched CUDA_HOME=/opt/cuda, CUDA_PATH \(not set\), PATH, /usr/local/cuda",
    ),
    "not nvcc": ({}, {"version": ""}, "nvcc --version names no release"),
    "old": ({}, {"version": "11.8"}, r"is of CUDA 11\.8; 12\.1 or newer is needed"),
    "no such target": ({"CUDA_ARCHS": "91"}, {}, "CUDA_ARCHS has '91'; .* serve 75 80"),
    "too old a target": (
        {"TORCH_CUDA_ARCH_LIST": "6.0 7.0"},
        {"known": CUDA_12_4},
        r"TORCH_CUDA_ARCH_LIST has '6\.0'; .* serve 70 72 75",
    ),
    "not a target": ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, {}, "has 'Hopper'; expected targets such as 8.0"),
    "no compiler for it": ({}, {"complaint": "unsupported GNU version!"}, r"nvcc with g\+\+ cannot .*GNU"),
}


@pytest.mark.parametrize("case", CUDA_IMPOSSIBLE)
def test_automatic_and_impossible_cuda_is_a_sentence(setup, case):
    env, world, sentence = CUDA_IMPOSSIBLE[case]
    toolkit = decide_cuda(setup, env, **world)
    assert toolkit.nvcc is None
    assert re.search(rf"\| CUDA no \(.*{sentence}.*\) \|", setup.summary(setup.Decision(None), toolkit))


@pytest.mark.parametrize("case", CUDA_IMPOSSIBLE)
def test_cuda_asked_for_and_impossible_is_an_error(setup, case):
    env, world, sentence = CUDA_IMPOSSIBLE[case]
    with pytest.raises(SystemExit, match=rf"SAM_KERNELS_BUILD=cuda: .*{sentence}"):
        decide_cuda(setup, {**env, "SAM_KERNELS_BUILD": "cuda"}, **world)


def test_nvcc_gets_the_compiler_without_its_launcher(setup):
    assert setup.host_compiler({}, "ccache mine++") == "mine++"
    assert setup.host_compiler({"CUDAHOSTCXX": "other++"}, "ccache mine++") == "other++"


def test_nvcc_is_asked_for_its_release_wherever_it_lies(setup, tmp_path):
    assert setup.ask_nvcc(program(tmp_path / "nvcc", NVCC)) == ("12.8", ["75", "90a"])
    assert setup.ask_nvcc("false") == ("", [])


def test_nvcc_is_tried_before_it_is_trusted(setup, tmp_path):
    broken = program(tmp_path / "nvcc", "echo 'note\nhost.h: error: unsupported GNU version' >&2; exit 2")
    assert setup.cuda_complaint(broken, "g++", "90") == "host.h: error: unsupported GNU version"
    assert setup.cuda_complaint("true", "g++", "90") == ""


# ---- the words ----


def table() -> set[str]:
    rows = re.findall(r"^\| *(`.*?) \|", (ROOT / "ENVIRONMENT.md").read_text(), re.M)
    return set(re.findall(r"`(\w+)`", " ".join(rows)))


def sources() -> dict[str, str]:
    files = [SETUP, ROOT / "CMakeLists.txt", ROOT / "Makefile", ROOT / "README.md"]
    for folder in ("sam_kernels", "csrc", "bench", "examples"):
        files += [
            p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".md"}
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
    general = "SAM_KERNELS_BUILD SAM_KERNELS_DEBUG MAX_JOBS CMAKE_ARGS CXX"
    cuda = "CUDAHOSTCXX CUDA_HOME CUDA_PATH CUDA_ARCHS TORCH_CUDA_ARCH_LIST"
    for name in [*general.split(), *cuda.split()]:
        assert name in setup.__doc__
        assert name in table()


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
        for library in ("_native.cpython-311-x86_64-linux-gnu.so", "libsam_kernels_cuda.so"):
            (copy / folder / library).write_bytes(b"stale")
        (copy / folder / "_build.json").write_text('{"summary": "stale"}')
    (copy / "build/lib/sam_kernels/removed.py").touch()
    return copy


def package(
    copy: Path, command: list[str] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Make a wheel, or run another command, with nothing set but this environment."""
    wheel = [
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
    ours = ("SAM_KERNELS_", "PYTHONPATH", "CXX", "CUDA", "TORCH_CUDA_ARCH_LIST")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run(command or wheel, cwd=copy, env=clean | environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"SAM_KERNELS_BUILD": "none"}, "SAM_KERNELS_BUILD=none"), ({"CXX": "/no/c++"}, "searched /no/c++")],
    ids=["asked for", "no compiler"],
)
def test_a_wheel_without_native_holds_no_library(copy, environment, reason):
    result = package(copy, **environment)
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
@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_a_wheel_that_cannot_be_as_asked_is_not_made(copy, mode):
    result = package(copy, SAM_KERNELS_BUILD=mode, CXX="/no/c++")
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert f"SAM_KERNELS_BUILD={mode}: no C++ compiler found; searched /no/c++" in said


MODULE = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"

# A cmake that builds nothing: it installs empty files, and fails where the test wants it to.
CMAKE = """case $1 in
-S) mkdir -p $4; echo '[]' >$4/compile_commands.json;;
--build) case $2 in */cuda-*) echo "building $2"; [ -z "$FAIL" ] || { echo "error: $FAIL"; exit 3; };; esac;;
--install) mkdir -p $4/sam_kernels
    case $2 in */cuda-*) built=libsam_kernels_cuda.so;; *) built=$MODULE;; esac
    : >$4/sam_kernels/$built;;
esac"""


@pytest.fixture
def toolbox(copy: Path) -> dict[str, str]:
    """An environment whose cmake and nvcc are a few lines of shell."""
    pytest.importorskip("pybind11", reason="pybind11 is one of the tools, and it is not here")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    for name, script in {"bin/cmake": CMAKE, "bin/ninja": "exit 1", "cuda/bin/nvcc": NVCC}.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        program(copy / name, script)
    path = f"{copy}/bin:{os.environ['PATH']}"
    return {"PATH": path, "MODULE": MODULE, "CUDA_HOME": f"{copy}/cuda", "CUDA_ARCHS": "75"}


def libraries_in(copy: Path) -> tuple[set[str], str]:
    """The libraries that the one wheel holds, and its summary."""
    (wheel,) = (copy / "out").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        held = {name.rpartition("/")[2] for name in archive.namelist() if name.endswith(".so")}
        return held, json.loads(archive.read("sam_kernels/_build.json"))["summary"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_a_wheel_with_cuda_holds_both_libraries(copy, toolbox, mode):
    result = package(copy, **toolbox, SAM_KERNELS_BUILD=mode)
    assert result.returncode == 0, result.stdout + result.stderr
    held, line = libraries_in(copy)
    assert held == {MODULE, "libsam_kernels_cuda.so"}
    assert "| CUDA yes (nvcc 12.8, sm_75) |" in line


@pytest.mark.slow
def test_a_wheel_without_cuda_holds_no_stale_one(copy, toolbox):
    result = package(copy, **toolbox, SAM_KERNELS_BUILD="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    held, line = libraries_in(copy)
    assert held == {MODULE}
    assert "native CPU yes" in line and "| CUDA no (SAM_KERNELS_BUILD=cpu) |" in line


EDITABLE = ["-c", "from setuptools import build_meta; build_meta.build_editable('out')"]
IN_PLACE = ["setup.py", "-q", "build_ext", "--inplace"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "cpu"])
@pytest.mark.parametrize("way", [EDITABLE, IN_PLACE], ids=["editable", "in place"])
def test_an_editable_install_or_none_has_the_libraries_in_the_source_tree(copy, toolbox, mode, way):
    command = [sys.executable, *way]
    result = package(copy, command, **toolbox, SAM_KERNELS_BUILD=mode)
    assert result.returncode == 0, result.stdout + result.stderr
    library = copy / "sam_kernels" / "libsam_kernels_cuda.so"
    assert library.read_bytes() == b"" if mode == "auto" else not library.exists()
    assert (copy / "sam_kernels" / MODULE).read_bytes() == b""
    assert "CUDA" in json.loads((copy / "sam_kernels" / "_build.json").read_text())["summary"]


@pytest.mark.slow
def test_a_build_in_place_without_a_compiler_leaves_nothing_stale_and_says_why(copy):
    result = package(copy, [sys.executable, *IN_PLACE], CXX="/no/c++")
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list((copy / "sam_kernels").glob("*.so"))
    assert "searched /no/c++" in result.stderr
    assert "searched /no/c++" in json.loads((copy / "sam_kernels" / "_build.json").read_text())["summary"]


@pytest.mark.slow
def test_a_cuda_build_that_fails_by_itself_leaves_the_rest(copy, toolbox):
    result = package(copy, **toolbox, FAIL="ptxas gave up")
    assert result.returncode == 0, result.stdout + result.stderr
    held, line = libraries_in(copy)
    assert held == {MODULE}
    log = copy / "build" / "cuda.log"
    assert f"| CUDA no (its build with nvcc 12.8 failed; {log} says why) |" in line
    assert "error: ptxas gave up" in log.read_text()


@pytest.mark.slow
def test_a_cuda_build_that_was_asked_for_and_fails_is_an_error(copy, toolbox):
    result = package(copy, **toolbox, SAM_KERNELS_BUILD="cuda", FAIL="ptxas gave up")
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert "error: ptxas gave up" in said and "the CUDA build failed, and the lines above say why" in said


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
        if p.suffix in {".h", ".cpp", ".cu", ".cuh"}
    }
    assert (
        wanted | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "sam_kernels/py.typed"} <= held
    )
    assert not [name for name in held if name.endswith(("_build.json", ".so", ".pyc"))]
