"""What several test files share: the backends that can run here, bit comparisons, awkward parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import emulated
import interpreted
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sam_kernels import SAM

LONG = 65537
BACKENDS = ("reference", "foreach", "native", emulated.BACKEND.name, interpreted.BACKEND.name)


@functools.cache
def why_not(backend: str) -> str | None:
    """Return the sentence with which a backend refuses this machine, or None when it runs."""
    weight = Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    try:
        opt = SAM([weight], torch.optim.SGD, lr=0.1, backend=backend)
        opt.first_step()
        opt.second_step()
    except Exception as refusal:  # a defect is no refusal: then the tests run, and show it
        refused = isinstance(refusal, (RuntimeError, ValueError, ImportError)) and f"'{backend}'" in str(
            refusal
        )
        return str(refusal) if refused else None
    return None


def backends() -> list:
    """Return one parameter per backend, skipped with its own reason where it cannot run."""
    return [
        pytest.param(
            name, marks=pytest.mark.skipif(why_not(name) is not None, reason=why_not(name) or "runs")
        )
        for name in BACKENDS
    ]


every_backend = pytest.mark.parametrize("backend", backends())

# Where bf16 weights are rounded to nearest on purpose; tests/test_rounding.py has what is said about it.
rounds_to_nearest = pytest.mark.filterwarnings(r"ignore:SAM. \d+ bfloat16 parameter:UserWarning")


def values(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return detached copies."""
    return [t.detach().clone() for t in tensors]


def bits(tensor: Tensor) -> bytes:
    """Return the elements of a tensor, in logical order, as bytes: tells -0 from 0 and NaN from NaN."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same_bits(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Return whether two lists of tensors are equal bit for bit."""
    left, right = list(left), list(right)
    return len(left) == len(right) and all(bits(a) == bits(b) for a, b in zip(left, right, strict=True))


def assert_close(actual: Iterable[Tensor], expected: Iterable[Tensor], relative: float) -> None:
    """Compare tensor by tensor, the error measured against the norm of the expected tensor."""
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape, f"tensor {index}: shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        error, size = float((a - b).norm()), float(b.norm())
        assert error <= relative * max(size, 1e-3), (
            f"tensor {index}: error {error:.3e} of {size:.3e}\n{a}\n{b}"
        )


def base_state(opt: SAM) -> list[Tensor]:
    """Return copies of every tensor in the base optimizer's state, in a fixed order."""
    found = []
    for group in opt.param_groups:
        for p in group["params"]:
            slots = opt.base_optimizer.state.get(p, {})
            for key in sorted(slots):
                slot = slots[key]
                found.append(
                    slot.detach().clone() if isinstance(slot, Tensor) else torch.tensor(float(slot or 0))
                )
    return found


def awkward_parameters(
    dtype: torch.dtype = torch.float32, seed: int = 0, longest: int = 2049
) -> list[Parameter]:
    """Return parameters of every layout we promise to serve; the last one is empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [
        normal(),  # no dimension
        normal(0),  # empty, in the middle of the list
        normal(1),
        normal(7),  # one less than a 32-byte lane of floats
        normal(8),
        normal(9),
        normal(4, 6).t(),  # dense, but not contiguous
        normal(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        normal(102)[1:],  # starts off an aligned address
        normal(longest),  # many lanes and a tail; LONG is more than one chunk
        normal(3, 0, 2),  # an empty last tensor is not special
    ]
    return [Parameter(t) for t in tensors]


def give_gradients(parameters: Sequence[Parameter], seed: int, scale: float = 1.0) -> list[Tensor]:
    """Set random, non-zero gradients in each parameter's own layout and return them."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        p.grad = torch.empty_like(p).copy_(g)
    return [p.grad for p in parameters]


def batches(
    steps: int, rows: int, columns: int, seed: int = 7, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return one random batch a step."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)
    ]


class Norm(torch.nn.Module):
    """Layer normalization of seven features in elementwise operations: torch's own wakes every thread."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = Parameter(torch.ones(7)), Parameter(torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight + self.bias


def small_net(dtype: torch.dtype = torch.float64, seed: int = 3) -> torch.nn.Sequential:
    """Return a net with weights, biases and a normalization layer, none of them zero."""
    net = torch.nn.Sequential()
    net.add_module("fc1", torch.nn.Linear(5, 7))
    net.add_module("norm1", Norm())
    net.add_module("act", torch.nn.Tanh())
    net.add_module("fc2", torch.nn.Linear(7, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            # rounded to float32 so that every precision starts from the same point
            p.copy_((0.3 + torch.randn(p.shape, generator=generator)) * 0.6)
    return net.to(dtype)


def squared_error(output: Tensor, step: int = 0) -> Tensor:
    """Return a loss with a target that moves with the step."""
    return (output - 0.1 * (step + 1)).pow(2).mean()


def backward_of(model: torch.nn.Module, inputs: Tensor, step: int = 0):
    """Return a closure that evaluates the loss, accumulates its gradients and does not zero them."""

    def closure() -> Tensor:
        loss = squared_error(model(inputs), step)
        loss.backward()
        return loss

    return closure
