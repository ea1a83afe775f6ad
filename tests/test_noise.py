"""Normal numbers by counter: plain torch by the method of Box and Muller, every backend by its bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles.philox import random_word
from test_passes import (
    ALL,
    CHUNKS,
    DTYPES,
    EMULATED,
    F32,
    LANES,
    MIXED,
    NATIVE,
    copies,
    make_group,
    no_native,
    numbers,
    same_bits,
)

from sam_kernels.backends import native, torch_random

pytestmark = pytest.mark.usefixtures("poisoned_empty", "no_grad")

SEED, STEP = 0x9123456789ABCDEF, 0x80000003


@pytest.fixture
def no_grad():
    """Backends are called under no_grad."""
    with torch.no_grad():
        yield


def poisoned(tensors, dtype=None):
    return [torch.full_like(x, math.nan, dtype=dtype, requires_grad=False) for x in tensors]


def numbers_of(group):
    """Places among all parameters, some of them beyond 31 bits."""
    return [t * 0x30000001 % (1 << 32) for t in range(len(group.params))]


def expected(group, dtype, seed=SEED, step=STEP):
    """Per tensor its numbers in the order of memory."""
    return [
        torch_random.normal(seed, step, number, 0, p.numel(), torch.device("cpu")).to(dtype)
        for p, number in zip(group.params, numbers_of(group), strict=True)
    ]


def in_memory(x):
    return None if x is None else x.as_strided((x.numel(),), (1,))


@pytest.mark.parametrize("seed", [0, SEED])
def test_numbers_are_those_of_box_and_muller(seed):
    words = random_word(seed, 5, 7, np.arange(4000)).reshape(-1, 2)
    radius = np.sqrt(-2 * np.log(((words[:, 0] >> 8) + 1.0) / 2**24))
    angle = 2 * np.pi * (words[:, 1] >> 8) / 2**24
    oracle = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    got = torch_random.normal(seed, 5, 7, 0, 4000, torch.device("cpu"))
    assert got.dtype == F32
    np.testing.assert_allclose(numbers(got), oracle, rtol=0, atol=2e-6)


def test_numbers_are_standard_normal():
    x = numbers(torch_random.normal(1, 2, 3, 0, 1 << 18, torch.device("cpu")))
    # Five standard errors each; the largest of so many is near 4.7.
    assert abs(x.mean()) < 0.01 and abs(x.var() - 1) < 0.014 and abs((x**4).mean() - 3) < 0.1
    assert abs((x[:-1] * x[1:]).mean()) < 0.01 and 4 < np.abs(x).max() < 6


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shapes", "memory"), [(MIXED, "plain"), (LANES + CHUNKS, "misaligned"), (LANES + CHUNKS, "plain")]
)
def test_every_backend_has_the_same_bits(side, dtype, shapes, memory):
    group = make_group(dtype, shapes, memory=memory, device=side.device)
    outs = group.grads  # memory of the same kind as the parameters
    for x in outs:
        x.fill_(math.nan)
    before = copies(group.params)
    side.backend.noise_(group, outs, SEED, STEP, numbers_of(group))
    assert same_bits(map(in_memory, outs), expected(group, dtype))
    assert same_bits(group.params, before)


@pytest.mark.parametrize("side", ALL)
def test_only_what_is_there_is_written_and_counted(side):
    group = make_group(F32, device=side.device)
    outs, wanted = poisoned(group.params), expected(group, F32)
    outs[1] = outs[4] = wanted[1] = wanted[4] = None
    versions = [None if x is None else x._version for x in outs]
    side.backend.noise_(group, outs, SEED, STEP, numbers_of(group))
    assert same_bits(map(in_memory, outs), wanted)
    assert all(x is None or x.numel() == 0 or x._version > v for x, v in zip(outs, versions, strict=True))


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_numbers_follow_the_order_of_memory_and_the_dtype_of_the_list(side, dtype):
    group = make_group(F32, [(5, 4, 3, 3), (8, 2, 5, 5)], memory="channels_last", device=side.device)
    outs = poisoned(group.params, dtype)
    side.backend.noise_(group, outs, SEED, STEP, numbers_of(group))
    assert outs[0].is_contiguous(memory_format=torch.channels_last)
    assert same_bits(map(in_memory, outs), expected(group, dtype))


@pytest.mark.parametrize("side", [NATIVE, EMULATED])
def test_numbers_that_are_missing_are_a_sentence(side):
    group = make_group(F32)
    with pytest.raises(ValueError, match="noise_: a number is needed for every tensor"):
        side.backend.noise_(group, poisoned(group.params), SEED, STEP, [1, 2])


@no_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_instruction_set_changes_no_number(dtype):
    chosen = native.isa()
    group = make_group(dtype, LANES + CHUNKS)
    try:
        for name in native._native.available_isas():
            native._native.set_isa(name)
            outs = poisoned(group.params)
            native.BACKEND.noise_(group, outs, SEED, STEP, numbers_of(group))
            assert same_bits(outs, expected(group, dtype)), name
    finally:
        native._native.set_isa(chosen)
