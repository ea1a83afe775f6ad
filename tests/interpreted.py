"""Triton's interpreter as the backend "interpreted": the kernels unchanged, on CPU tensors.

Whether kernels are interpreted is settled when Triton is imported. Without a GPU the tests do so; with one
they compile, unless TRITON_INTERPRET=1 was set by whoever started them.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sam_kernels import backends
from sam_kernels.backends import triton
from sam_kernels.backends.triton.runtime import interpreter_problem


def _problem() -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for the GPU here; TRITON_INTERPRET=1 runs its interpreter"
    return interpreter_problem()


PROBLEM = _problem()
BACKEND = triton.Triton("interpreted", "cpu")
if BACKEND.name not in backends.names():
    backends.register(BACKEND)

needed = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


def _patch_once_a_launch() -> None:
    """The interpreter re-patches triton.language at every call between kernel functions: most of its time.

    The first call of a launch has done it for all that follow until the launch ends.
    """
    from triton import language as tl
    from triton.runtime import interpreter as at

    patch, run = at._patch_lang, at.GridExecutor.__call__
    patched: set[frozenset[int]] = set()

    def patch_once(fn):
        modules = {id(x) for x in (tl, tl.core) if any(value is x for value in fn.__globals__.values())}
        if frozenset(modules) in patched:
            return None
        patched.add(frozenset(modules))
        return patch(fn)

    def run_afresh(self, *args, **kwargs):
        patched.clear()
        return run(self, *args, **kwargs)

    at._patch_lang, at.GridExecutor.__call__ = patch_once, run_afresh


if PROBLEM is None:
    _patch_once_a_launch()
