"""Triton itself: whether it is there, new enough and able to compile for a device, and the kernels then."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import Any

import numpy
import torch

OLDEST = (3, 6)


def describe() -> str:
    """What Triton is doing on this machine, or why it is not; for the doctor."""
    problem = load()[1]
    if problem is not None:
        return problem
    if not torch.cuda.is_available():
        return f"triton {version()}; not used: torch {torch.__version__} sees no GPU to compile for"
    problem = device_problem(torch.cuda.current_device())
    return f"triton {version()}" + (f"; not used: {problem}" if problem else "")


def version() -> str:
    try:
        import triton
    except Exception:
        return "none"
    return str(triton.__version__)


def _number(text: Any) -> tuple[int, int] | None:
    """The first two numbers of a version."""
    found = re.match(r"(\d+)\.(\d+)", str(text))
    return None if found is None else (int(found[1]), int(found[2]))


@functools.cache
def load() -> tuple[Any, str | None]:
    """The kernels by name, or the sentence why there are none."""
    try:
        import triton
    except ImportError as problem:
        if problem.name == "triton":
            return None, (
                "Triton is not installed; pip install 'triton>=3.6' brings it (on Linux, for NVIDIA and "
                "AMD), or use backend='foreach'"
            )
        return None, f"Triton could not be imported: {problem}"
    except Exception as problem:  # whatever a broken installation raises, importing us does not
        return None, f"Triton could not be imported: {type(problem).__name__}: {problem}"
    number = _number(getattr(triton, "__version__", ""))
    if number is None:
        return None, f"what is imported as triton is not Triton, or has no version: {triton!r}"
    if number < OLDEST:
        return None, (
            f"Triton {triton.__version__} is too old; the passes need {OLDEST[0]}.{OLDEST[1]} or newer, or "
            "use backend='foreach'"
        )
    try:
        from .kernels import (
            accumulate,
            combine,
            count,
            descend,
            grad_stats,
            mark,
            noise,
            perturb,
            restore,
            sq_norm,
        )
    except Exception as problem:  # a Triton that has moved on must not take the other backends with it
        return None, (
            f"the kernels do not load under Triton {triton.__version__}: {type(problem).__name__}: {problem}"
        )
    return (
        SimpleNamespace(
            sq_norm=sq_norm.sq_norm_kernel,
            sum_by_tensor=sq_norm.sum_by_tensor_kernel,
            perturb=perturb.perturb_kernel,
            restore=restore.restore_kernel,
            round=restore.round_kernel,
            grad_stats=grad_stats.grad_stats_kernel,
            dots_by_tensor=grad_stats.dots_by_tensor_kernel,
            combine=combine.combine_kernel,
            noise=noise.noise_kernel,
            descend=descend.descend_kernel,
            accumulate=accumulate.accumulate_kernel,
            count=count.count_kernel,
            mark=mark.mark_kernel,
        ),
        None,
    )


def interpreter_problem() -> str | None:
    """Why Triton's interpreter cannot run the kernels here, or None."""
    problem = load()[1]
    if problem is None and _number(version()) == (3, 6) and (_number(numpy.__version__) or ()) >= (2, 5):
        return (
            f"the interpreter of Triton {version()} works with numpy below 2.5, and this is "
            f"{numpy.__version__}"
        )
    return problem


@functools.cache
def device_problem(index: int) -> str | None:
    """Why Triton cannot compile for that device, found out by asking its driver, or None."""
    import triton

    if triton.knobs.runtime.interpret:
        return (
            "TRITON_INTERPRET is set, and the interpreter runs on the host, where it cannot follow addresses "
            "of a GPU; unset it"
        )
    try:
        with torch.cuda.device(index):
            target = triton.runtime.driver.active.get_current_target()
    except Exception as problem:  # no C compiler, no Python headers, no driver: each in Triton's own words
        return f"Triton cannot compile for this device: {type(problem).__name__}: {problem}"
    if target.backend == "cuda" and int(target.arch) < 70:
        return f"the Triton passes need compute capability 7.0 or newer, and this device has sm_{target.arch}"
    return None
