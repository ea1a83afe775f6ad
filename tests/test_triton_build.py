"""What Triton makes of the kernels, read without a GPU: registers, instructions, roundings."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import interpreted  # noqa: F401  # before Triton is imported
import pytest
import torch

import sam_kernels
from sam_kernels.backends import triton

# Every kernel for every target, and every dtype somewhere: what a dtype changes is settled before the target
# has a say. + is every variant.
SELECTED = {
    "sm_80": "float16",
    "sm_90": "float32+",
    "sm_100": "bfloat16",
    "gfx942": "float64",
}
ALSO = ("sm_90:bfloat16:restore masters",)  # its kernel is of half types alone
NVIDIA = [target for target in SELECTED if target.startswith("sm_")]
HELPER = Path(__file__).with_name("aot.py")

THREADS_OF_WARP = 32
REGISTERS_OF_THREAD, REGISTERS_OF_PROCESSOR = 255, 65536

# Bytes of a thread that an assembler sets aside once for a chunk to fit one more block of threads beside, and
# never in a loop over blocks.
SET_ASIDE = {
    ("sm_90", "float64", "descend adam masked"): 16,
    ("sm_100", "bfloat16", "perturb linear adaptive at random"): 8,  # by the assembler of Triton 3.6
}

pytestmark = pytest.mark.slow
if triton.load()[1] is not None:
    pytest.skip(triton.load()[1], allow_module_level=True)


# ---- what was compiled ----


class Compiled(NamedTuple):
    """One launch of the backend, compiled."""

    target: str
    dtype: str
    variant: str
    kernel: str
    constants: dict[str, Any]
    problem: str | None
    ttgir: str
    ptx: str
    amdgcn: str
    sass: str  # resource usage, then instructions

    def __str__(self) -> str:
        return f"{self.variant} ({self.kernel}), {self.dtype}, {self.target}"


def disassembler() -> tuple[str, dict[str, str]]:
    """cuobjdump, and an environment in which it finds nvdisasm: those of Triton, or others on PATH."""
    brought = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    path = os.pathsep.join([str(brought), os.environ.get("PATH", os.defpath)])
    cuobjdump = shutil.which("cuobjdump", path=path)
    if cuobjdump is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("cuobjdump and nvdisasm are neither in this Triton nor on PATH")
    return cuobjdump, {**os.environ, "PATH": path}


def compile_all(sources: Path, folder: Path, *selections: str) -> list[Compiled]:
    """Run tests/aot.py, compiling where the rest of this session interprets, and disassemble what comes."""
    cuobjdump, environment = disassembler()
    compiling = {name: x for name, x in os.environ.items() if not name.startswith("TRITON_")}
    compiling["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, str(HELPER), str(sources), str(folder), *selections]
    run = subprocess.run(command, capture_output=True, text=True, env=compiling)
    assert run.returncode == 0, run.stderr

    def finish(entry: dict[str, Any]) -> Compiled:
        code = entry.pop("code")
        text = {x: Path(code[x]).read_text() if x in code else "" for x in ("ttgir", "ptx", "amdgcn")}
        sass = ""
        if "cubin" in code:
            dump = [cuobjdump, "-res-usage", "-sass", code["cubin"]]
            sass = subprocess.run(dump, check=True, capture_output=True, text=True, env=environment).stdout
        return Compiled(**entry, **text, sass=sass)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(finish, json.loads((folder / "index.json").read_text())))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """All of SELECTED, which takes about a minute on two cores."""
    selections = (*(f"{target}:{dtypes}" for target, dtypes in SELECTED.items()), *ALSO)
    sources = Path(sam_kernels.__file__).parents[1]
    return compile_all(sources, tmp_path_factory.mktemp("triton"), *selections)


@pytest.fixture(params=NVIDIA)
def of_target(request, compiled: list[Compiled]) -> list[Compiled]:
    return [one for one in compiled if one.target == request.param]


def taken(compiled: list[Compiled], *names: str) -> set[tuple[Any, ...]]:
    """The values that some constants have together, over all launches which have them."""
    return {
        tuple(one.constants[name] for name in names)
        for one in compiled
        if all(name in one.constants for name in names)
    }


def test_every_kernel_compiles_for_every_target(of_target):
    assert not [f"{one}: {one.problem}" for one in of_target if one.problem is not None]
    assert {one.kernel for one in of_target} == set(vars(triton.load()[0]))


def test_every_variant_is_among_them(compiled):
    both = (False, True)
    product = itertools.product
    moments, shapes = triton._MOMENTS.values(), triton._SHAPES.values()
    assert taken(compiled, "MOMENT", "HAS_ADAPTIVE", "HAS_MASKS") == set(product(moments, both, both))
    assert taken(compiled, "SHAPE", "HAS_ADAPTIVE", "HAS_MASKS") == set(product(shapes, both, both))
    fisher = {(moment, False) for moment in moments} | {(triton._MOMENTS["square"], True)}
    assert taken(compiled, "MOMENT", "HAS_FISHER") == fisher
    fisher = {(shape, False) for shape in shapes} | {(triton._SHAPES["linear"], True)}
    assert taken(compiled, "SHAPE", "HAS_FISHER") == fisher
    assert taken(compiled, "COUNT") == {(1,), (2,), (3,)}
    assert taken(compiled, "IN", "OUT") == set(product((1, 2, 3), (1, 2)))
    rules = [(triton._RULES["sgd"], False), (triton._RULES["sgd"], True), (triton._RULES["adam"], False)]
    assert taken(compiled, "RULE", "HAS_BUFFERS", "HAS_MASKS") == {
        (*rule, masks) for rule in rules for masks in both
    }
    # without a mask to be within nothing is outside it
    within = [(False, False), (True, False), (True, True)]
    assert taken(compiled, "HAS_WITHIN", "OUTSIDE") == set(within)
    assert taken(compiled, "IS_RANDOM", "ADD") == {(False, False), (True, True)}
    assert taken(compiled, "HAS_MASTERS", "AT_RANDOM") == {(False, False), (True, False), (False, True)}
    masters = [(True, *rule) for rule in rules]
    assert {x for x in taken(compiled, "HAS_MASTERS", "RULE", "HAS_BUFFERS") if x[0]} == set(masters)
    assert {getattr(torch, one.dtype) for one in compiled} == set(triton._DTYPES)


def test_every_launch_has_the_options_of_all(compiled):
    assert not [str(one) for one in compiled if not triton._LAUNCH.items() <= one.constants.items()]


# ---- registers ----


def resources(one: Compiled) -> dict[str, int]:
    usage = re.search(rf"Function {one.kernel}_kernel:\n(.*)", one.sass)
    assert usage, f"{one}: cuobjdump says it in other words"
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", usage[1])}


def test_a_block_of_threads_fits_a_processor(of_target):
    for one in of_target:
        registers = resources(one)["REG"]
        allocated = -(-registers // 8) * 8  # a warp is given registers by eight for each thread
        threads = one.constants["num_warps"] * THREADS_OF_WARP
        assert registers <= REGISTERS_OF_THREAD, f"{one}: {registers}"
        assert threads * allocated <= REGISTERS_OF_PROCESSOR, f"{one}: {registers} for {threads} threads"


# ---- loads and stores ----


class Loop(NamedTuple):
    """Accesses in an innermost loop: of 16 bytes of global memory, of fewer bytes, of local memory."""

    loads: float
    stores: float
    narrow: int = 0
    local: int = 0


def fast_loops(one: Compiled) -> list[Loop]:
    """What a loop over aligned blocks has for each block, times the 16-byte accesses of a thread to a block.

    `narrow` is what is not loaded of lists of elements: coefficients, once for a block, and words, one for
    each access of 16 bytes.
    """
    c = one.constants
    words = 1 if c.get("HAS_MASKS") else 0
    copies = [Loop(1, 1, words)]
    rounded = [Loop(2, 1)]  # of masters, which are fp32 beside half types
    if one.kernel == "round":
        return rounded
    if one.kernel == "sq_norm":
        loops = [Loop(1, 0, words)] * (2 if c["HAS_FISHER"] else 1)
        loops += [Loop(3 if c["W"] != c["T"] else 2, 0, words)] if c["HAS_ADAPTIVE"] else []
        is_redone_in_double = c["MOMENT"] == triton._MOMENTS["square"] and c["S"] == "fp32"
        return loops * 2 if is_redone_in_double else loops
    if one.kernel == "perturb" and c["HAS_MASTERS"]:
        # Under a mask the weights are read for those that stay.
        return [Loop(3 + words, 1, words)] * (1 + c["HAS_ADAPTIVE"])
    if one.kernel == "perturb":
        return [Loop(2, 2, words)] * (1 + c["HAS_ADAPTIVE"] + c["HAS_FISHER"]) + copies
    if one.kernel == "restore":
        return copies
    if one.kernel == "grad_stats":
        return [Loop(c["COUNT"], 0)]
    if one.kernel == "combine":
        return [Loop(c["IN"], c["OUT"], c["IN"] * c["OUT"])]
    if one.kernel == "noise":
        return [Loop(0, 1)]
    if one.kernel == "descend" and c["HAS_MASTERS"]:
        state = 2 if c["RULE"] == triton._RULES["adam"] else int(c["HAS_BUFFERS"])
        return [Loop(3 + 2 * state, 3 + 2 * state)] + rounded
    if one.kernel == "descend" and c["RULE"] == triton._RULES["adam"]:
        return [Loop(4, 3, words)] + copies
    if one.kernel == "descend":
        return [Loop(3, 2, words) if c["HAS_BUFFERS"] else Loop(2, 1, words)] + copies
    if one.kernel == "accumulate":
        fp32 = 4 / getattr(torch, one.dtype).itemsize
        return [Loop(1 + fp32, fp32)]
    if one.kernel in ("count", "mark"):
        # words to be within; marking writes words, and candidates where there are some
        elements = 16 // getattr(torch, one.dtype).itemsize
        narrow = 1 + (1 + elements if one.kernel == "mark" else 0)
        return [] if c["IS_RANDOM"] else [Loop(1, 0, narrow)]
    assert one.kernel in ("sum_by_tensor", "dots_by_tensor")  # their tables are short
    return []


def wide_loops(sass: str) -> list[Loop]:
    """The innermost loops that have a 16-byte access, as the assembler unrolled them."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]
    jumps = [(at, re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)) for at, text in lines]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    found = []
    for begin, end in loops:
        if any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops):
            continue
        met: Counter[str] = Counter()
        for at, text in lines:
            if begin <= at <= end and (access := re.search(r"\b(LDG|STG|LDL|STL)\b[.\w]*", text)):
                width = re.search(r"\.(128|256)\b", access[0])
                if access[1] in ("LDL", "STL"):
                    met["local"] += 1
                elif width is None:
                    met["narrow"] += 1
                else:
                    met[access[1]] += int(width[1]) // 128
        if met["LDG"] or met["STG"]:
            found.append(Loop(met["LDG"], met["STG"], met["narrow"], met["local"]))
    return found


def narrow_access(one: Compiled) -> str | None:
    """What is wrong with the loops over aligned blocks: a missing one, or accesses of fewer than 16 bytes."""
    size = getattr(torch, one.dtype).itemsize
    threads = one.constants["num_warps"] * THREADS_OF_WARP
    accesses = one.constants["BLOCK"] * size // (16 * threads)

    def is_unrolled(found: Loop, block: Loop) -> bool:
        times, rest = divmod(found.loads + found.stores, (block.loads + block.stores) * accesses)
        enough = rest == 0 and found.stores == times * block.stores * accesses
        return enough and found.narrow <= times * block.narrow * (1 if one.kernel == "combine" else accesses)

    expected, found = fast_loops(one), wide_loops(one.sass)
    if len(expected) == len(found):
        for order in itertools.permutations(expected):
            if all(map(is_unrolled, found, order)):
                return None
    return f"{one}: expected {accesses} times each of {expected}, or a multiple, and found {found}"


def test_aligned_blocks_move_sixteen_bytes_at_a_time(of_target):
    assert not [problem for one in of_target if (problem := narrow_access(one))]


# ---- local memory ----


def spill(one: Compiled) -> str | None:
    """What lies in local memory instead of registers."""
    used = resources(one)
    if used["LOCAL"] or used["STACK"] > SET_ASIDE.get((one.target, one.dtype, one.variant), 0):
        return f"{one}: {used}"
    if not used["STACK"] and re.search(r"\b(?:LDL|STL)\b", one.sass):
        return f"{one}: local memory without a stack"
    met = sum(loop.local for loop in wide_loops(one.sass))
    return f"{one}: {met} accesses of local memory in loops over blocks" if met else None


def test_no_kernel_of_any_target_spills(of_target):
    assert not [problem for one in of_target if (problem := spill(one))]


# ---- a gradient as its own snapshot ----


def race(one: Compiled) -> str | None:
    """A block in which a thread may write to a snapshot before another has read the gradient there."""
    reads: list[str] = []
    written = waited = False
    for line in one.ttgir.splitlines():
        waited |= re.search(r"\b(?:ttg|gpu)\.(?:local_)?barrier\b", line) is not None
        access = re.search(r"\btt\.(load|store) .*: (tensor<[\dx]+!tt\.ptr<\w+>, #\w+>)", line)
        if access is None:
            continue
        if access[1] == "load":
            reads = [access[2]] if written else [*reads, access[2]]
            written = waited = False
        else:
            written = True
            if len(reads) > 1 and not waited and set(reads) != {access[2]}:
                return f"{one}: {reads} are read and {access[2]} is written"
    return None


def test_a_gradient_may_be_its_own_snapshot(compiled):
    # With masters no snapshot is written.
    perturbations = [one for one in compiled if one.kernel == "perturb" and not one.constants["HAS_MASTERS"]]
    assert all("tt.store" in one.ttgir for one in perturbations)
    assert not [problem for one in perturbations if (problem := race(one))]


# ---- roundings ----


def approximation(one: Compiled) -> str | None:
    """A quotient or a root of fp32 that is not rounded as IEEE wants."""
    found = re.findall(r"\b(?:div\.(?:full|approx)|r?sqrt\.approx|rcp\.approx)(?:\.ftz)?\.f32\b", one.ptx)
    return f"{one}: {sorted(set(found))}" if found else None


def test_quotients_and_roots_of_fp32_are_those_of_ieee(of_target):
    assert not [problem for one in of_target if (problem := approximation(one))]
    exact = r"(?:div|sqrt)\.rn\.f32\b"
    for one in of_target:
        found = set(re.findall(exact, one.ptx))
        if one.kernel == "noise":
            assert found == {"div.rn.f32", "sqrt.rn.f32"}, str(one)
        if one.constants.get("S") == "fp32":
            if one.variant.startswith("descend adam") or "fisher" in one.variant:
                assert found == {"div.rn.f32", "sqrt.rn.f32"}, str(one)
            elif "power" in one.variant and one.kernel != "sum_by_tensor":
                assert found == {"div.rn.f32"}, str(one)


def has_no_fma(one: Compiled) -> bool:
    """Whether the formula has products and sums, but none of them fused."""
    plain = r"noise|grad_stats|sq_norm (square(?! fisher)|peak)|combine 1 "
    return re.match(plain, one.variant) is not None


def contraction(one: Compiled) -> str | None:
    """An operation that the assembler may fuse, or one that was fused where the source says otherwise."""
    found = re.findall(r"\b(?:add|sub|mul)(?:\.ftz)?\.f(?:32|64)(?:x2)?\b", one.ptx)
    if has_no_fma(one):
        found += re.findall(r"\bfma\.[.\w]+", one.ptx)
        # of an fp64 root of the norm, fma is a part; of a quotient and a root in fp32, seven to ten are
        fused = re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f32\w*", one.amdgcn)
        found += fused if len(fused) > 10 * len(re.findall(r"\bv_div_fixup_f32", one.amdgcn)) else []
    return f"{one}: {sorted(set(found))}" if found else None


def test_nothing_is_fused_but_what_says_fma(compiled):
    assert not [problem for one in compiled if (problem := contraction(one))]
    fused = [one for one in compiled if re.match(r"perturb linear|combine [23] |descend", one.variant)]
    assert not [
        str(one) for one in fused if not re.search(r"\bfma\.rn\.|\bv_(?:pk_)?fmac?_", one.ptx + one.amdgcn)
    ]


# ---- these tests can fail ----


def damage(path: Path, pattern: str, replacement: str, times: int) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.S)
    assert count == times, f"{path.name}: {pattern} is there {count} times"
    path.write_text(text)


def test_all_of_this_is_seen_where_it_is_wrong(tmp_path):
    """A copy of the package: aligned in two places of four, of fast quotients and few registers."""
    package = tmp_path / "sam_kernels"
    shutil.copytree(
        Path(sam_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    backend = package / "backends" / "triton"
    for name in ("read", "write_if"):
        hint = rf"(def {name}\((?:(?!@triton).)*?)tl\.multiple_of\(pointer, 16\)"
        damage(backend / "engine.py", hint, r"\1pointer", 1)
    damage(backend / "rounding.py", r"tl\.div_rn\(x, y\)", "x / y", 1)
    damage(backend / "rounding.py", r"tl\.sqrt_rn\(x\)", "tl.sqrt(x)", 1)
    damage(backend / "kernels" / "perturb.py", r"tl\.debug_barrier\(\)", "pass", 2)
    wrong = r'\1, "enable_fp_fusion": True, "maxnreg": 32}'
    damage(backend / "__init__.py", r"(\b_LAUNCH = \{.*?)\}", wrong, 1)
    unhinted = ["sq_norm square", "perturb linear", "restore", "combine 3 to 2", "descend sgd momentum"]
    names = [*unhinted, "grad_stats 3", "descend adam"]
    found = compile_all(tmp_path, tmp_path, f"sm_90:float32:{','.join(names)}")
    by_name = {one.variant: one for one in found if not one.kernel.endswith("by_tensor")}
    assert set(by_name) == set(names)
    assert [name for name in names if narrow_access(by_name[name])] == [*unhinted, "descend adam"]
    assert approximation(by_name["descend adam"])
    assert contraction(by_name["grad_stats 3"])
    assert spill(by_name["grad_stats 3"])
    assert race(by_name["perturb linear"])


# ---- another vendor ----


def test_every_kernel_compiles_for_amd(compiled):
    found = [one for one in compiled if one.target not in NVIDIA]
    if not found:
        pytest.skip("this Triton does not carry the compiler for AMD's GPUs")
    assert not [f"{one}: {one.problem}" for one in found if one.problem is not None]
    assert {one.kernel for one in found} == set(vars(triton.load()[0])) - {"round"}  # of half types alone
    scratch = {str(one): re.findall(r"^; ScratchSize: (\d+)", one.amdgcn, re.M) for one in found}
    assert not {name: bytes for name, bytes in scratch.items() if set(bytes) != {"0"}}
