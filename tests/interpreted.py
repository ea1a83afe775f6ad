"""Triton's interpreter as the backend "interpreted": the kernels unchanged, on CPU tensors.

Whether kernels are interpreted is settled when Triton is imported. Without a GPU the tests do so; with one they
compile, unless TRITON_INTERPRET=1 was set by whoever started them.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sam_kernels import backends
from sam_kernels.backends import triton


def _problem() -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for the GPU here; TRITON_INTERPRET=1 runs its interpreter"
    return triton._load()[1]


PROBLEM = _problem()
BACKEND = triton.Triton("interpreted", "cpu")
if BACKEND.name not in backends.names():
    backends.register(BACKEND)

needed = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
