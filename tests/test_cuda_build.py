"""What nvcc makes of csrc/ops/cuda, read without a GPU: registers, symbols, instructions, first words."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import sam_kernels

ROOT = Path(__file__).resolve().parents[1]
NAME = "libsam_kernels_cuda.so"
MASKED = ("sq_norm", "perturb", "restore", "descend")
PASSES = (*MASKED, "grad_stats", "combine", "noise", "accumulate", "count", "mark")
WRITERS = ("perturb", "restore", "combine", "noise", "descend", "accumulate")
# One generation each with what its instructions differ in; a library has those it was built for.
READ_TARGETS = ("80", "90", "100")

pytestmark = pytest.mark.slow
if not (ROOT / "CMakeLists.txt").exists():
    pytest.skip("these tests read the source tree, and it is not here", allow_module_level=True)


def find(tool: str, *folders: Path) -> str | None:
    """A program on PATH, beside this interpreter, in the CUDA toolkit, or in one of the folders."""
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [Path(sysconfig.get_path("scripts")), *homes, Path("/usr/local/cuda/bin"), *folders]
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(map(str, places)))


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on PATH")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- the library ----


class Built(NamedTuple):
    library: Path
    logs: Path  # what ptxas said, one file for each source


def sources() -> list[Path]:
    return [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if "tests" not in p.parts)]


def installed() -> Built | None:
    """The installed library, if the build tree that it came from is here and no source is newer."""
    library = Path(sam_kernels.__file__).with_name(NAME)
    for tree in (ROOT / "build").glob("cuda*"):
        if not ((tree / NAME).exists() and (tree / "ptxas").exists() and library.exists()):
            continue
        is_this = (tree / NAME).read_bytes() == library.read_bytes()
        built = (tree / NAME).stat().st_mtime
        if is_this and all(path.stat().st_mtime <= built for path in sources() if path.is_file()):
            return Built(library, tree / "ptxas")
    return None


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The library: the installed one, or built for sm_90 alone, which takes a minute on two cores."""
    if found := installed():
        return found
    nvcc, cmake, ninja = find("nvcc"), find("cmake"), find("ninja")
    if nvcc is None:
        pytest.skip("nvcc is not on this machine, so there is no CUDA library to read")
    if cmake is None or ninja is None:
        pytest.skip("building the CUDA library needs cmake and ninja")
    tree = tmp_path_factory.mktemp("cuda")
    configure = [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-DSAMK_BUILD_PYTHON=OFF", "-DSAMK_CUDA=ON", "-DSAMK_CUDA_ARCHS=90"]
    configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    for command in (configure, [cmake, "--build", str(tree), "--target", "samk_cuda"]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return Built(tree / NAME, tree / "ptxas")


@pytest.fixture(scope="session")
def library(built: Built) -> ctypes.CDLL:
    library = ctypes.CDLL(str(built.library))
    library.samk_last_error.restype = library.samk_build_info.restype = ctypes.c_char_p
    return library


# ---- what ptxas said ----


def functions(log: str) -> Iterator[tuple[str, str, str]]:
    """(function, target, what was said of it) for every kernel and every function that it calls."""
    target = ""
    for part in re.split(r"^ptxas info\s*: (?=Compiling entry|Function prop)", log, flags=re.M)[1:]:
        if entry := re.match(r"Compiling entry function '\w+' for '(\w+)'", part):
            target = entry[1]
        else:
            head, _, said = part.partition("\n")
            yield head.rpartition(" ")[2], target, said


def test_no_kernel_of_any_target_spills(built):
    seen = defaultdict(set)
    for name in PASSES:
        for function, target, said in functions((built.logs / f"{name}.cu.log").read_text()):
            numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", said)
            assert numbers, f"{function} for {target}: {said}"
            assert (numbers[2], numbers[3]) == ("0", "0"), f"{function} for {target}: {numbers[0]}"
            seen[target].add(name)
    assert seen, "ptxas was not asked, or says it in other words"
    assert all(found == set(PASSES) for found in seen.values()), seen


# ---- what the file is ----


def test_exported_is_the_c_abi_and_nothing_else(built):
    symbols = [line.split() for line in output("nm", "-D", "--defined-only", str(built.library)).splitlines()]
    names = {words[-1] for words in symbols}
    header = (ROOT / "csrc" / "sam_kernels.h").read_text()
    declared = set(re.findall(r"^SAMK_API [^;(]*?(samk_\w+)\(", header, re.M))
    assert {f"samk_{name}" for name in PASSES} <= names <= declared


def test_nothing_of_torch_or_of_the_driver_is_needed(built):
    missing = output("nm", "-D", "--undefined-only", str(built.library))
    assert "GLIBC" in missing
    # at:: and c10:: as they are mangled, torch's C symbols, and CUDA's, which are linked in or asked for late
    wrong = r".*(?:N\d*K?2at\d|N\d*K?3c10\d|2at\dTensor|5torch|\b(?:aoti_)?torch_|\bcuda?[A-Z]).*"
    assert not re.findall(wrong, missing)
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", str(built.library)))
    assert needed
    assert not [name for name in needed if re.search(r"torch|c10|cuda|python", name)]


def test_it_runs_from_any_folder(built):
    assert not re.search(r"RPATH|RUNPATH", output("readelf", "-d", str(built.library)))


# ---- what it says without a device ----


def test_it_loads_and_names_its_targets(library):
    header = (ROOT / "csrc" / "sam_kernels.h").read_text()
    assert library.samk_abi_version() == int(re.search(r"SAMK_ABI_VERSION (\d+)", header)[1])
    assert re.fullmatch(
        r"CUDA \d+\.\d+;( sm_\d+[af]?)+(, PTX \d+\.\d[af]?)*", library.samk_build_info().decode()
    )


def test_the_targets_it_names_are_those_it_has(library, built):
    named = set(re.findall(r"sm_(\w+)", library.samk_build_info().decode()))
    log = (built.logs / "restore.cu.log").read_text()
    assert named == set(re.findall(r"^ptxas info .*Compiling entry function .* for 'sm_(\w+)'", log, re.M))


def test_without_a_device_there_is_a_sentence(library):
    status = library.samk_check_device(0)
    if status == 0:
        pytest.skip("a device that can be used is here")
    assert re.fullmatch(r"no CUDA device can be used: \w.*", library.samk_last_error().decode())


def test_a_pass_without_a_device_fails_and_is_no_crash(library):
    if library.samk_check_device(0) == 0:
        pytest.skip("a device that can be used is here")
    library.samk_plan_create.restype = ctypes.c_void_p
    library.samk_plan_workspace_bytes.restype = ctypes.c_int64
    sizes = (ctypes.c_int64 * 3)(5, 0, 100_000)
    plan = ctypes.c_void_p(library.samk_plan_create(sizes, 3))
    assert library.samk_plan_workspace_bytes(plan) > 0
    # samk_restore_args: five lists, then the queue; every tensor takes part, at addresses nobody reads
    addresses = (ctypes.c_void_p * 3)(16, 32, 48)

    class List(ctypes.Structure):
        _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]

    class Restore(ctypes.Structure):
        _fields_ = [
            ("params", List),
            ("snapshots", List),
            ("masters", List),
            ("masks", List),
            ("offsets", List),
            ("stream", ctypes.c_void_p),
            ("device", ctypes.c_int32),
        ]

    one = List(ctypes.addressof(addresses), 0)
    assert library.samk_restore(plan, ctypes.byref(Restore(one, one, List(), List(), List(), None, 0))) != 0
    assert re.match(r"\w.* ", library.samk_last_error().decode())
    library.samk_plan_destroy(plan)


def test_a_negative_size_is_refused(library):
    library.samk_plan_create.restype = ctypes.c_void_p
    assert library.samk_plan_create((ctypes.c_int64 * 2)(3, -1), 2) is None
    assert library.samk_last_error() == b"samk_plan_create: numel[1] is negative"


# ---- instructions ----


def disassembler() -> tuple[str, dict[str, str]]:
    """cuobjdump and an environment in which it finds nvdisasm; Triton brings both."""
    triton = importlib.util.find_spec("triton")
    brought = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton and triton.origin else []
    cuobjdump, nvdisasm = find("cuobjdump", *brought), find("nvdisasm", *brought)
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("cuobjdump and nvdisasm are not on PATH, nor in the toolkit, nor in Triton")
    return cuobjdump, {**os.environ, "PATH": f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="session", params=READ_TARGETS)
def kernels(request, built: Built, library: ctypes.CDLL) -> dict[str, list[str]]:
    """The accesses to memory of every kernel of one target, by its mangled name."""
    cuobjdump, environment = disassembler()
    if f"sm_{request.param}" not in library.samk_build_info().decode().replace(",", "").split():
        pytest.skip(f"this library was not built for sm_{request.param}")
    command = [cuobjdump, "-sass", "-arch", f"sm_{request.param}", str(built.library)]
    found = defaultdict(list)
    kernel = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if "Function :" in line:
                kernel = line.split()[-1]
            elif instruction := re.search(r"\b(?:LD|ST)G?\.E[.\w]*", line):
                found[kernel].append(instruction[0])
    assert process.returncode == 0
    return found


@pytest.fixture(scope="session")
def instructions(kernels) -> dict[tuple[str, bool], list[list[str]]]:
    """Those of each fp32 kernel, by pass and whether there are masks."""
    found = defaultdict(list)
    scores = r"(?:NS_5ranks8OfScoresI)?"
    for kernel, accesses in kernels.items():
        # fp32 in every list; restore moves bits, which are unsigned integers to it
        if taken := re.search(rf"\d({'|'.join(PASSES)})_kernelI{scores}(?:f+|j)(?=[LE])", kernel):
            found[taken[1], "Lb1E" in kernel.partition("Parameters")[0]].append(accesses)
    return found


@pytest.mark.parametrize("name", MASKED)
def test_under_a_mask_fp32_moves_sixteen_bytes_at_a_time_and_words_whole(instructions, name):
    assert len(instructions[name, True]) == len(instructions[name, False]) > 0
    for accesses in instructions[name, True]:
        assert [x for x in accesses if re.fullmatch(r"LDG\.E\.(\w+\.)*64(\.\w+)*", x)], "the words"
        for kind, is_needed in (("LDG", True), ("STG", name in WRITERS)):
            wide = [x for x in accesses if re.fullmatch(rf"{kind}\.E\.(\w+\.)*128(\.\w+)*", x)]
            assert bool(wide) == is_needed, sorted(set(accesses))
        # What a word decides on is read ahead all the same: 48 KB beside four blocks.
        order = "".join(x[0] for x in accesses if re.search(r"\.128\b", x))
        assert max(map(len, order.split("S"))) >= 3, order


@pytest.mark.parametrize("name", PASSES)
def test_fp32_moves_sixteen_bytes_at_a_time(instructions, name):
    met = sorted({x for accesses in instructions[name, False] for x in accesses})
    wide_loads = [x for x in met if re.fullmatch(r"LDG\.E\.(\w+\.)*128(\.\w+)*", x)]
    assert bool(wide_loads) == (name != "noise"), met
    wide_stores = [x for x in met if re.fullmatch(r"STG\.E\.(\w+\.)*128(\.\w+)*", x)]
    assert bool(wide_stores) == (name in WRITERS), met


# Loads of 16 bytes before the first store, times 256 threads, times blocks, make the 48 KB of kBytesInFlight.
# Types as they are mangled, whether there are masters, the rule, loads, blocks.
READ_AHEAD = [
    ("ff", 0, "sgd", 3, 4),
    ("ff", 0, "adam", 4, 4),
    ("dd", 0, "sgd", 6, 2),
    ("dd", 0, "adam", 8, 2),
    ("NS_4bf16ES2_", 0, "sgd", 6, 3),
    ("NS_4bf16ES2_", 0, "adam", 4, 3),
    ("NS_3f16ES2_", 0, "sgd", 6, 3),
    ("NS_3f16ES2_", 0, "adam", 4, 3),
    ("NS_4bf16ES2_", 1, "sgd", 10, 2),
    ("NS_4bf16ES2_", 1, "adam", 7, 2),
    ("fNS_4bf16E", 0, "sgd", 10, 2),
    ("fNS_4bf16E", 0, "adam", 7, 2),
]


@pytest.mark.parametrize("masks", [0, 1])
@pytest.mark.parametrize(("types", "masters", "rule", "loads", "blocks"), READ_AHEAD)
def test_a_descent_reads_ahead(kernels, types, masters, rule, loads, blocks, masks):
    if masters and masks:
        pytest.skip("masters are whole, so no mask is asked")
    assert loads * 16 * 256 * blocks >= 48 * 1024
    name = f"descend_kernelI{types}Lb{masters}ELi{int(rule == 'adam')}ELb{masks}E"
    ((kernel, accesses),) = [item for item in kernels.items() if name in item[0]]
    word = "".join("l" if x.startswith("LD") else "s" for x in accesses if re.search(r"\.128\b", x))
    assert max(map(len, word.split("s"))) >= loads, f"{kernel}: {word}"


# ---- sources ----


def test_a_pass_over_half_types_compiles_as_torch_would_compile_it(tmp_path):
    """Torch's own builds switch the operators of CUDA's half types off; no source of ours may need them."""
    nvcc = find("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on this machine")
    off = "HALF_OPERATORS HALF_CONVERSIONS HALF2_OPERATORS BFLOAT16_CONVERSIONS"
    command = [nvcc, "-std=c++17", "-arch=compute_90", "-ptx", f"-I{ROOT / 'csrc'}"]
    command += [f"-D__CUDA_NO_{name}__" for name in off.split()]
    command += [str(ROOT / "csrc" / "ops" / "cuda" / "combine.cu"), "-o", str(tmp_path / "combine.ptx")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
