"""Lists, trajectories and comparisons for the correctness stage; nothing here needs a particular device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cases import Shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEMORIES = ("plain", "misaligned", "channels_last")

# Empty, tiny, odd, and around every chunk an engine may cut.
AWKWARD: list[Shape] = [
    (0,),
    (1,),
    (3,),
    (2, 0, 3),
    (17, 31),
    (5, 4, 3, 3),
    *((chunk + extra,) for chunk in (2048, 4096, 16384, 65536) for extra in (-1, 0, 1)),
    (0,),
]
MANY: list[Shape] = [(t % 7,) for t in range(10_000)]
# Beyond 67M elements chunks have their full length.
LONG: list[Shape] = [(65535,), (65536,), (70_000_001,), (1,), (65537,)]

# Roundings an element may be off by, relative to the larger of it and 1, the size of what was added:
# formulas are ordered alike but not always fused alike. A half type may round to the neighbour where
# opmath lands near a tie, which is rare.
_ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 2, torch.float16: 2}
_NEIGHBOURS = 0.05
_HALF = (torch.bfloat16, torch.float16)
# Sums of squares: fp32 within a chunk, float64 beyond.
SUM_ERROR = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-5, torch.float16: 3e-5}


@dataclass(frozen=True)
class Method:
    """A SAM optimizer to step.

    Attributes:
        build: makes it from parameters and the name of a backend.
        powers: whether it takes powers, whose error the exponent multiplies.
    """

    name: str
    build: Callable[[list[Any], str], Any]
    powers: bool = False


def methods() -> dict[str, Method]:
    """What is stepped: both update rules, the adaptive metric and the other norms."""
    from sam_kernels import SAM, Recipe, recipes
    from sam_kernels.policies import Euclidean

    sgd: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

    def with_sgd(**more: Any) -> Callable[[list[Any], str], Any]:
        return lambda params, backend: SAM(params, torch.optim.SGD, backend=backend, **sgd, **more)

    def with_adam(kind: Any, **more: Any) -> Callable[[list[Any], str], Any]:
        options = {"rho": 0.5, "lr": 0.01, "weight_decay": 0.01, **more}
        return lambda params, backend: SAM(params, kind, backend=backend, **options)

    found = (
        Method("sgd", with_sgd(rho=0.5)),
        Method("adam", with_adam(torch.optim.Adam)),
        Method("adamw", with_adam(torch.optim.AdamW)),
        Method("asam", with_sgd(recipe=recipes.asam(only=None))),
        Method("p_inf", with_sgd(recipe=Recipe(metric=Euclidean(p=math.inf), rho=0.01))),
        Method("p_3", with_sgd(recipe=Recipe(metric=Euclidean(p=3.0), rho=0.5)), powers=True),
    )
    return {method.name: method for method in found}


def draw(shapes: Sequence[Shape], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Standard normal values on the CPU: the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty(shape).normal_(generator=generator).to(dtype) for shape in shapes]


def place(values: Tensor, memory: str, device: torch.device) -> Tensor:
    """The values on a device: contiguous, one element off every alignment, or channels last."""
    if memory == "misaligned":
        block = torch.zeros(values.numel() + 1, dtype=values.dtype, device=device)
        return block[1:].view(values.shape).copy_(values)
    if memory == "channels_last" and values.dim() == 4:
        return values.to(device).contiguous(memory_format=torch.channels_last)
    return values.to(device, copy=True)


@dataclass
class Stops:
    """What a trajectory left at each of its stops, and what it broke on the way."""

    lists: dict[str, list[Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def mark(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.lists[name] = [x.detach().to("cpu", copy=True) for x in tensors]


def trajectory(
    method: Method,
    backend: str,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    memory: str = "plain",
    steps: int = 2,
) -> Stops:
    """Steps of a method from seeded weights and gradients, with a stop wherever something is written."""
    params = [torch.nn.Parameter(place(w, memory, device)) for w in draw(shapes, dtype, 0)]
    optimizer = method.build(params, backend)
    stops = Stops()
    for step in range(1, steps + 1):
        give(params, draw(shapes, dtype, 2 * step), memory)
        optimizer.first_step()
        stops.mark(f"step {step}, perturbed weights", params)
        give(params, draw(shapes, dtype, 2 * step + 1), memory)
        optimizer.second_step()
        stops.mark(f"step {step}, updated weights", params)
        for name, tensors in state_of(optimizer, params).items():
            stops.mark(f"step {step}, {name}", tensors)
    give(params, draw(shapes, dtype, 99), memory)
    before = [p.detach().clone() for p in params]
    with optimizer.perturbed():
        if not any(not torch.equal(p, b) for p, b in zip(params, before, strict=True)):
            stops.problems.append("nothing was perturbed")
    if not same_bits(params, before):
        stops.problems.append("restored weights differ in their bits")
    return stops


def give(params: Sequence[Tensor], values: Sequence[Tensor], memory: str) -> None:
    """Gradients placed like the weights."""
    for param, value in zip(params, values, strict=True):
        param.grad = place(value, memory, param.device)


def state_of(optimizer: Any, params: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The base optimizer's state by name; tensors that have none are left out."""
    found: dict[str, list[Tensor]] = {}
    for param in params:
        for name, value in sorted(optimizer.state.get(param, {}).items()):
            if value is not None:
                found.setdefault(name, []).append(torch.as_tensor(value))
    return found


def same_bits(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    """Whether two lists have the same bits, NaN and signed zeros included, wherever they are."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def bits(x: Tensor) -> Tensor:
        return x.detach().cpu().contiguous().view(kinds[x.element_size()])

    return len(xs) == len(ys) and all(torch.equal(bits(x), bits(y)) for x, y in zip(xs, ys, strict=True))


def difference(
    got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype, slack: int = 1
) -> str | None:
    """A sentence if two lists differ by more than rounding, else None."""
    if len(got) != len(want):
        return f"{len(got)} tensors in place of {len(want)}"
    allowed = _ROUNDINGS[dtype] * torch.finfo(dtype).eps * slack
    different = total = 0
    worst, where = 0.0, 0
    for t, (x, y) in enumerate(zip(got, want, strict=True)):
        if x.numel() == 0:
            continue
        x64, y64 = x.detach().cpu().double(), y.detach().cpu().double()
        if not torch.equal(torch.isfinite(x64), torch.isfinite(y64)):
            return f"tensor {t} is not finite in other places"
        excess = ((x64 - y64).abs() / y64.abs().clamp(min=1.0)).nan_to_num(0.0, 0.0, 0.0).max().item()
        if excess > worst:
            worst, where = excess, t
        different += int((x64 != y64).sum())
        total += x.numel()
    if worst > allowed:
        return f"tensor {where} is off by {worst:.3g}, allowed {allowed:.3g}"
    if dtype in _HALF and total > 1000 and different > _NEIGHBOURS * slack * total:
        return f"{different} of {total} elements round to the neighbour"
    return None


def differences(got: Stops, want: Stops, dtype: torch.dtype, slack: int = 1) -> list[str]:
    """Every stop at which two trajectories differ, and what the first of them broke."""
    found = list(got.problems)
    if got.lists.keys() != want.lists.keys():
        return [*found, f"stops {sorted(got.lists)} in place of {sorted(want.lists)}"]
    for name, tensors in got.lists.items():
        # Step counters are float32 whatever the weights are.
        kind = torch.float32 if name.endswith(", step") else dtype
        sentence = difference(tensors, want.lists[name], kind, slack)
        if sentence is not None:
            found.append(f"{name}: {sentence}")
    return found


# ---- single passes, whose elementwise results must have the same bits on every device ---------------


def pass_results(
    backend: str, dtype: torch.dtype, device: torch.device, memory: str
) -> dict[str, list[Tensor]]:
    """What each elementwise pass writes from the same inputs, the norm included."""
    from sam_kernels import ops

    def fresh(seed: int) -> list[Tensor]:
        return [place(x, memory, device) for x in draw(AWKWARD, dtype, seed)]

    def counters(value: float) -> list[Tensor]:
        return [torch.tensor(value, device=device) for _ in AWKWARD]

    norm = torch.tensor(3.7, dtype=torch.float64, device=device)
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for adaptive in (False, True):
            w, g, s = fresh(0), fresh(1), fresh(2)
            ops.perturb_(w, g, s, norm, rho=0.5, adaptive=adaptive, eta=0.01, backend=backend)
            found |= {f"perturb_, adaptive={adaptive}": w, f"its snapshot, adaptive={adaptive}": s}
        w = fresh(0)
        ops.restore_(w, fresh(2), backend=backend)
        found["restore_"] = w
        outs = [fresh(5), fresh(6)]
        weights = torch.tensor([[0.5, -0.25, 0.1], [0.3, 0.0, 2.0]], dtype=torch.float64, device=device)
        ops.combine_(outs, [fresh(0), fresh(1), fresh(2)], weights, backend=backend)
        found |= {"combine_, first": outs[0], "combine_, second": outs[1]}
        for nesterov in (False, True):
            w, m = fresh(0), fresh(3)
            options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
            ops.descend_sgd_(w, fresh(1), fresh(2), m, **options, backend=backend)  # type: ignore[arg-type]
            found |= {f"descend_sgd_, nesterov={nesterov}": w, f"its momentum, nesterov={nesterov}": m}
        for decoupled in (False, True):
            w, m, v, steps = fresh(0), fresh(3), [x.square() for x in fresh(4)], counters(2.0)
            ops.descend_adam_(
                w,
                fresh(1),
                fresh(2),
                m,
                v,
                steps,
                lr=0.01,
                weight_decay=0.01,
                decoupled=decoupled,
                backend=backend,
            )
            kind = "adamw" if decoupled else "adam"
            found |= {f"descend {kind}": w, f"{kind} mean": m, f"{kind} square": v, f"{kind} steps": steps}
    return found


def sums(backend: str, dtype: torch.dtype, device: torch.device, memory: str) -> dict[str, float]:
    """What each summing pass returns."""
    from sam_kernels import ops

    w, g, s = ([place(x, memory, device) for x in draw(AWKWARD, dtype, seed)] for seed in range(3))
    with torch.no_grad():
        dots = ops.grad_stats([w, g, s], backend=backend).tolist()
        return {
            "sq_norm": ops.sq_norm(g, backend=backend).item(),
            "sq_norm, adaptive": ops.sq_norm(g, w, adaptive=True, eta=0.01, backend=backend).item(),
            # Dots of independent lists nearly cancel and have few digits; those of a list with itself do not.
            **{f"grad_stats {i}": dots[i] for i in (0, 3, 5)},
        }
