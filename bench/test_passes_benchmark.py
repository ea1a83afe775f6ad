"""Every pass under pytest-benchmark, for the developer of a kernel: pytest bench --benchmark-only

Compare with an earlier run by --benchmark-autosave and --benchmark-compare.
"""

from __future__ import annotations

import pytest
import torch

from . import passes

pytest.importorskip("pytest_benchmark")

# Lists of 32 MB: six of them are beyond most last-level caches, and a round still takes milliseconds.
NUMEL = 2**23


@pytest.fixture(scope="module")
def vectors() -> passes.Vectors:
    return passes.Vectors(NUMEL, torch.float32)


@pytest.mark.parametrize("backend", passes.BACKENDS)
@pytest.mark.parametrize("name", passes.BYTES)
def test_pass(benchmark, vectors: passes.Vectors, name: str, backend: str) -> None:  # type: ignore[no-untyped-def]
    try:
        run = passes.calls(vectors, backend)[name]
    except RuntimeError as reason:
        pytest.skip(str(reason))
    benchmark.group = name
    benchmark.name = f"{name} {backend}"
    benchmark.pedantic(run, warmup_rounds=3, rounds=15)
    benchmark.extra_info["GB/s"] = passes.BYTES[name] * NUMEL / benchmark.stats.stats.median / 1e9
