"""Everybody who takes a SAM step here, behind one interface: `step_phase1()`, `step_phase2()`.

Phase 1 is norm and perturbation, phase 2 restore and update. Gradients stand in ``p.grad`` before
each. A peer that cannot run raises `Unavailable` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import EPS, RHO, Base

Slots = dict[str, list[Tensor]] | None


class Unavailable(Exception):
    """The peer cannot run here; the message says why."""


class Eager:
    """SAM as people write it in eager PyTorch: a loop over parameters, and `p.data` swapped to restore."""

    def __init__(self, params: list[Tensor], base: Base, slots: Slots = None, **form: Any) -> None:
        self.params = params
        self.base = base.build(params, slots, **form)
        self.saved: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step_phase1(self) -> None:
        # The factors of 1.0 stand where an adaptive form has its weights; they cost a copy each.
        norms = torch.stack([(1.0 * p.grad).norm(p=2) for p in self.params if p.grad is not None])
        scale = RHO / (torch.norm(norms, p=2) + EPS)
        for p in self.params:
            if p.grad is None:
                continue
            self.saved[p] = p.data.clone()
            e = 1.0 * p.grad * scale.to(p)
            p.add_(e)

    @torch.no_grad()
    def step_phase2(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.data = self.saved[p]
        self.base.step()


class PytorchOptimizer:
    """SAM of the package pytorch-optimizer. Its `foreach` reaches the base, so True excludes a fused base."""

    def __init__(self, params: list[Tensor], base: Base, slots: Slots = None, **form: Any) -> None:
        try:
            from pytorch_optimizer import SAM
        except ImportError as error:
            raise Unavailable(f"pytorch-optimizer is not installed ({error})") from error
        self.params = params
        self.optimizer = SAM(params, base.kind, rho=RHO, perturb_eps=EPS, **base.options, **form)
        base.adopt(self.optimizer.base_optimizer, params, slots)

    def step_phase1(self) -> None:
        self.optimizer.first_step()

    def step_phase2(self) -> None:
        self.optimizer.second_step()


class Foreach:
    """The best we could write with torch._foreach operators: buffers made once, restore by copy, fused base.

    With `reads_host` the scale is a Python number, which saves a pass and on an accelerator would wait
    for the device in every step; without, it stays a tensor.
    """

    def __init__(
        self, params: list[Tensor], base: Base, slots: Slots = None, *, reads_host: bool = False, **form: Any
    ) -> None:
        self.params = params
        self.weights = [p.detach() for p in params]
        self.snapshots = [torch.empty_like(w) for w in self.weights]
        self.base = base.build(params, slots, **form)
        self.reads_host = reads_host

    @torch.no_grad()
    def step_phase1(self) -> None:
        grads = [p.grad for p in self.params]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32 if grads[0].itemsize < 4 else None)
        scale = RHO / (torch.linalg.vector_norm(torch.stack(norms)) + EPS)
        torch._foreach_copy_(self.snapshots, self.weights)
        if self.reads_host:
            torch._foreach_add_(self.weights, grads, alpha=scale.item())
        else:
            torch._foreach_add_(self.weights, torch._foreach_mul(grads, scale.to(grads[0].dtype)))

    @torch.no_grad()
    def step_phase2(self) -> None:
        torch._foreach_copy_(self.weights, self.snapshots)
        self.base.step()


class Compiled:
    """The same under torch.compile, one function per half, the update inside the second.

    Two ways to write the second half, because neither is always the faster: `own_update` spells the
    update with foreach operators; otherwise torch's own optimizer step is compiled.
    """

    def __init__(self, params: list[Tensor], base: Base, slots: Slots = None, *, own_update: bool) -> None:
        if slots is None:
            raise Unavailable("the compiled halves are only timed on fixed lists, not inside a training step")
        self.params = params
        self.weights = [p.detach() for p in params]
        self.snapshots = [torch.empty_like(w) for w in self.weights]
        self.first_half = torch.compile(_first_half, fullgraph=True, dynamic=False)
        if own_update:
            step = (torch.zeros((), dtype=torch.float64),) if base.name == "adamw" else ()
            half = torch.compile(_SECOND_HALVES[base.name], fullgraph=True, dynamic=False)
            state = [slots[name] for name in base.slots]
            self.second_half: Callable[[list[Tensor]], None] = lambda grads: half(
                self.weights, grads, self.snapshots, *state, *step, **base.options
            )
        else:
            optimizer = base.build(params, slots, foreach=True)

            @torch.compile(dynamic=False)
            def half_of_torch() -> None:
                torch._foreach_copy_(params, self.snapshots)
                optimizer.step()

            self.second_half = lambda grads: half_of_torch()

    @torch.no_grad()
    def step_phase1(self) -> None:
        self.first_half(self.weights, [p.grad for p in self.params], self.snapshots)

    @torch.no_grad()
    def step_phase2(self) -> None:
        self.second_half([p.grad for p in self.params])


def _first_half(weights: list[Tensor], grads: list[Tensor], snapshots: list[Tensor]) -> None:
    norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
    scale = RHO / (torch.linalg.vector_norm(torch.stack(norms)) + EPS)
    torch._foreach_copy_(snapshots, weights)
    torch._foreach_add_(weights, torch._foreach_mul(grads, scale))


def _sgd_half(
    weights: list[Tensor],
    grads: list[Tensor],
    snapshots: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    torch._foreach_copy_(weights, snapshots)
    grads = torch._foreach_add(grads, weights, alpha=weight_decay)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, grads)
    torch._foreach_add_(weights, buffers, alpha=-lr)


def _adamw_half(
    weights: list[Tensor],
    grads: list[Tensor],
    snapshots: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    step: Tensor,
    *,
    lr: float,
    weight_decay: float,
) -> None:
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    step.add_(1)
    size = (-lr / (1 - beta1**step)).to(weights[0].dtype)
    root = (1 - beta2**step).sqrt().to(weights[0].dtype)
    torch._foreach_copy_(weights, snapshots)
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    denominators = torch._foreach_div(torch._foreach_sqrt(squares), root)
    torch._foreach_add_(denominators, eps)
    torch._foreach_add_(weights, torch._foreach_mul(torch._foreach_div(means, denominators), size))


_SECOND_HALVES = {"sgd": _sgd_half, "adamw": _adamw_half}


class Ours:
    """sam_kernels with one named backend."""

    def __init__(self, params: list[Tensor], base: Base, slots: Slots = None, *, backend: str) -> None:
        try:
            from sam_kernels import SAM
        except ImportError as error:
            raise Unavailable(f"sam_kernels does not import ({error})") from error
        try:
            self.optimizer = SAM(params, base.kind, rho=RHO, backend=backend, **base.options)
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
        self.params = params
        base.adopt(self.optimizer.base_optimizer, params, slots)

    def step_phase1(self) -> None:
        self.optimizer.first_step(zero_grad=False)

    def step_phase2(self) -> None:
        self.optimizer.second_step(zero_grad=False)

    def restores_bits(self) -> bool:
        """Whether perturbing moves the weights and restoring brings every bit back."""
        before = [p.detach().clone() for p in self.params]
        with self.optimizer.perturbed():
            moved = any(not torch.equal(p, b) for p, b in zip(self.params, before, strict=True))
        return moved and all(_same_bits(p.detach(), b) for p, b in zip(self.params, before, strict=True))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.view(kind), b.view(kind))


class BaseAlone:
    """No SAM at all: the update with one gradient."""

    def __init__(self, params: list[Tensor], base: Base, slots: Slots = None, **form: Any) -> None:
        self.params = params
        self.base = base.build(params, slots, **form)

    def step_phase1(self) -> None:
        pass

    def step_phase2(self) -> None:
        self.base.step()


@dataclass(frozen=True)
class Spec:
    """How a peer is called, made and counted.

    Attributes:
        ascent, restore: bytes per fp32 parameter of phase 1 and of the restore, counted from its
            operators: reads and writes of whole lists, every list larger than the caches.
        form: how its base updates, a key of UPDATE_BYTES.
        norm_error: the error of the norm the gate lets pass. torch adds up a whole tensor in one fp32
            accumulator on CPUs; ours is held to float64's answer.
    """

    key: str
    label: str
    make: Callable[..., Any]
    ascent: int
    restore: int
    form: str
    norm_error: float = 2e-3
    kind: str = "peer"

    def phase_bytes(self, base: Base, itemsize: int = 4) -> tuple[float, float]:
        """Bytes per parameter of the two phases."""
        scale = itemsize / 4
        return self.ascent * scale, (self.restore + UPDATE_BYTES[base.name, self.form]) * scale


# Bytes per fp32 parameter of the update: operator by operator for the loop and foreach forms
# (weight decay included), one read and one write of each list for the fused form. "whole" reads the
# snapshot in place of the weight, so it has the restore in it.
UPDATE_BYTES = {
    ("sgd", "loop"): 44,
    ("sgd", "foreach"): 44,
    ("sgd", "fused"): 20,
    ("sgd", "whole"): 20,
    ("adamw", "loop"): 80,
    ("adamw", "foreach"): 80,
    ("adamw", "fused"): 28,
    ("adamw", "whole"): 28,
}


def _with(kind: type, **options: Any) -> Callable[..., Any]:
    return lambda params, base, slots=None: kind(params, base, slots, **options)


_OURS = {"norm_error": 0.0, "kind": "ours"}

SPECS = {
    spec.key: spec
    for spec in (
        Spec("ours_native", "ours, native", _with(Ours, backend="native"), 20, 0, "whole", **_OURS),
        # 12 and not 20 for the perturbation: on a CPU the scale is a number the host may look at
        Spec(
            "ours_foreach",
            "ours, foreach backend",
            _with(Ours, backend="foreach"),
            24,
            8,
            "foreach",
            2e-5,
            "ours",
        ),
        Spec(
            "ours_reference",
            "ours, reference backend",
            _with(Ours, backend="reference"),
            0,
            0,
            "loop",
            **_OURS,
        ),
        Spec("eager_default", "eager SAM, default base", _with(Eager), 48, 0, "loop"),
        Spec("eager_foreach", "eager SAM, foreach base", _with(Eager, foreach=True), 48, 0, "foreach"),
        Spec("eager_fused", "eager SAM, fused base", _with(Eager, fused=True), 48, 0, "fused"),
        Spec(
            "po_loop", "pytorch-optimizer, foreach off", _with(PytorchOptimizer, foreach=False), 40, 8, "loop"
        ),
        Spec(
            "po_fused",
            "pytorch-optimizer, fused base",
            _with(PytorchOptimizer, foreach=False, fused=True),
            40,
            8,
            "fused",
        ),
        Spec(
            "po_foreach",
            "pytorch-optimizer, foreach on",
            _with(PytorchOptimizer, foreach=True),
            40,
            8,
            "foreach",
        ),
        Spec("foreach", "torch._foreach, fused base", _with(Foreach, fused=True), 32, 8, "fused"),
        Spec(
            "foreach_item",
            "torch._foreach, host scale, fused",
            _with(Foreach, reads_host=True, fused=True),
            24,
            8,
            "fused",
        ),
        Spec(
            "compile_own",
            "torch.compile, foreach update",
            _with(Compiled, own_update=True),
            20,
            0,
            "whole",
            kind="compiled",
        ),
        Spec(
            "compile_torch",
            "torch.compile, torch's step",
            _with(Compiled, own_update=False),
            20,
            0,
            "whole",
            kind="compiled",
        ),
        Spec(
            "base_alone",
            "base alone, fused (no SAM)",
            _with(BaseAlone, fused=True),
            0,
            0,
            "fused",
            kind="bound",
        ),
    )
}

# The bytes of our own step as copies of vectors as long as the list, one contestant per tool.
COPY = "copy"


def is_copy(key: str) -> bool:
    return key.startswith(COPY)


def label(key: str) -> str:
    """How tables and pictures call a peer."""
    return "our bytes as plain copies" if is_copy(key) else SPECS[key].label
