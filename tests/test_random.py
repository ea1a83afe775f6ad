"""Philox as numpy, as Triton and (by one checksum) as C++: the same words for the same arguments."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import philox as oracle

ROOT = Path(__file__).resolve().parents[1]
RANDOM = ROOT / "sam_kernels" / "backends" / "triton" / "math" / "random.py"
CPP_TEST = ROOT / "csrc" / "tests" / "random_test.cpp"

ONES = 0xFFFFFFFF
# Counter, key and words, as they come with Random123, the library of the paper's authors.
VECTORS = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}

# What the checksum is taken over, in this order; csrc/tests/random_test.cpp goes through the same.
SEEDS = [0, -1, 1 << 63, 0x0123456789ABCDEF]
STEPS = [0, 1, 0xFFFFFFFE]
TENSORS = [0, 7, 0x80000001]
FIRSTS = [0, (1 << 31) - 50, (1 << 34) - 50, 1 << 61]
COUNT = 101

# Appended to the text of random.py: a file of its own, which is loaded afresh, for whether functions are
# interpreted or compiled is settled where they are decorated.
KERNELS = """

@triton.jit
def philox_kernel(numbers, out):
    c0, c1 = tl.load(numbers).to(tl.uint32), tl.load(numbers + 1).to(tl.uint32)
    c2, c3 = tl.load(numbers + 2).to(tl.uint32), tl.load(numbers + 3).to(tl.uint32)
    words = philox(c0, c1, c2, c3, tl.load(numbers + 4).to(tl.uint32), tl.load(numbers + 5).to(tl.uint32))
    tl.store(out, words.x0)
    tl.store(out + 1, words.x1)
    tl.store(out + 2, words.x2)
    tl.store(out + 3, words.x3)


@triton.jit
def word_kernel(elements, out, numbers, n, seed, step, tensor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = random_word(seed, step, tensor, tl.load(elements + i, i < n, 0))
    tl.store(out + i, word, i < n)
    tl.store(numbers + i, uniform(word), i < n)


@triton.jit
def uniform_kernel(words, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, uniform(tl.load(words + i, i < n, 0).to(tl.uint32)), i < n)
"""

# Compiles word_kernel for cards that need not be there, for each way in which its numbers can arrive.
COMPILE = """

if __name__ == "__main__":
    import sys

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"elements": "*i64", "out": "*i64", "numbers": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    block = {(7,): 1024}
    one = {(5,): 1, (6,): 1}  # what Triton makes of a step and a tensor of 1
    for arch in sys.argv[1:]:
        for seed, number, values in [("i64", "i32", {}), ("u64", "i64", {}), ("i32", "constexpr", one)]:
            given = {**types, "seed": seed, "step": number, "tensor": number}
            source = ASTSource(word_kernel, given, constexprs={**values, **block})
            compiled = triton.compile(source, target=GPUTarget("cuda", int(arch), 32))
            print(arch, len(compiled.asm["cubin"]) > 0, "mul.hi.u32" in compiled.asm["ptx"])
    # A debug build stops where a sum or product overflows, unless it was told that this is meant.
    source = ASTSource(philox_kernel, {"numbers": "*i64", "out": "*i64"})
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"debug": True})
    print("asserts", compiled.asm["ttir"].count("tt.assert"))
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The functions of random.py, and kernels that call them, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    path = tmp_path_factory.mktemp("random") / "interpreted_random.py"
    path.write_text(RANDOM.read_text() + KERNELS)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


def interpreted(kernels, seed, step, tensor, elements, block=128):
    """Return the words of some elements and their numbers in [0, 1)."""
    n = len(elements)
    words, numbers = torch.empty(n, dtype=torch.int64), torch.empty(n)
    kernels.word_kernel[(-(-n // block),)](
        torch.from_numpy(elements), words, numbers, n, seed, step, tensor, BLOCK=block
    )
    return words.numpy().astype(np.uint32), numbers.numpy()


def checksum(random_word) -> int:
    total = 0
    for seed, step, tensor, first in itertools.product(SEEDS, STEPS, TENSORS, FIRSTS):
        for word in random_word(seed, step, tensor, np.arange(first, first + COUNT)).tolist():
            total = (total ^ word) * 0x100000001B3 % (1 << 64)
    return total


def checksum_of_cpp() -> int:
    return int(re.search(r"kChecksum = (0x[0-9a-f]+);", CPP_TEST.read_text()).group(1), 16)


@pytest.mark.parametrize("name", VECTORS)
def test_oracle_gives_the_published_words(name):
    counter, key, words = VECTORS[name]
    assert oracle.philox(np.array([counter]), tuple(key)).tolist() == [words]


def test_oracle_gives_the_checksum_of_the_cpp_test():
    assert checksum(oracle.random_word) == checksum_of_cpp()


@pytest.mark.triton
@pytest.mark.parametrize("name", VECTORS)
def test_triton_gives_the_published_words(kernels, name):
    counter, key, words = VECTORS[name]
    out = torch.empty(4, dtype=torch.int64)
    kernels.philox_kernel[(1,)](torch.tensor([*counter, *key]), out)
    assert out.tolist() == words


@pytest.mark.triton
def test_triton_gives_the_checksum_of_the_cpp_test(kernels):
    assert checksum(lambda *arguments: interpreted(kernels, *arguments)[0]) == checksum_of_cpp()


@pytest.mark.triton
@pytest.mark.parametrize("seed", [0, 1, -1, -(1 << 63), (1 << 63) + 5, 20])
@pytest.mark.parametrize("first", [0, 3, (1 << 34) - 7, (1 << 40) + 1, (1 << 63) - 300])
def test_triton_is_the_oracle_bit_for_bit(kernels, seed, first):
    elements = np.arange(first, first + 299)
    words, numbers = interpreted(kernels, seed, 1, 3, elements)
    expected = oracle.random_word(seed, 1, 3, elements)
    assert np.array_equal(words, expected)
    assert np.array_equal(numbers.view(np.int32), oracle.uniform(expected).view(np.int32))


@pytest.mark.triton
def test_words_are_those_of_their_element_whatever_the_blocks_and_the_order(kernels):
    elements = np.arange((1 << 34) - 100, (1 << 34) + 157)
    expected = oracle.random_word(5, 6, 7, elements)
    for block in (16, 64, 512):
        order = np.random.default_rng(block).permutation(len(elements))
        assert np.array_equal(interpreted(kernels, 5, 6, 7, elements, block)[0], expected)
        assert np.array_equal(interpreted(kernels, 5, 6, 7, elements[order], block)[0], expected[order])


def test_every_argument_counts():
    elements = np.arange(64)
    lists = [
        oracle.random_word(*arguments).tobytes()
        for arguments in [
            (0, 0, 0, elements),
            (1, 0, 0, elements),
            (1 << 32, 0, 0, elements),
            (0, 1, 0, elements),
            (0, 0, 1, elements),
            (0, 0, 0, elements + (1 << 34)),
        ]
    ]
    assert len(set(lists)) == len(lists)


@pytest.mark.triton
def test_uniform_is_exact_and_below_one(kernels):
    ends = [0, 0xFF, 0x100, 0x7FFFFFFF, 0x80000000, 0xFFFFFEFF, 0xFFFFFF00, ONES]
    words = np.concatenate([ends, np.random.default_rng(1).integers(0, 1 << 32, 2000)])
    out = torch.empty(len(words))
    kernels.uniform_kernel[(-(-len(words) // 1024),)](torch.from_numpy(words), out, len(words), BLOCK=1024)
    got = out.numpy()
    assert np.array_equal(got.astype(np.float64) * 2**24, words >> 8)
    assert np.array_equal(got, oracle.uniform(words))
    assert got.min() == 0 and got.max() == 1 - 2.0**-24


@pytest.mark.triton
def test_random_compiles_for_cards_that_are_not_here(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    script = tmp_path / "compiled_random.py"
    script.write_text(RANDOM.read_text() + KERNELS + COMPILE)
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(script), "80", "90", "100"], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [f"{arch} True True" for arch in (80, 90, 100) for _ in range(3)]
    assert done.stdout.splitlines() == [*expected, "asserts 0"]
