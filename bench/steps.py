"""The optimizer phase: one SAM step of every peer on one parameter list, gradients already there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import oracle, stream
from .cases import BASES, CASES, Base, Workspace, give_gradients
from .memory import metered
from .peers import COPY, SPECS, Spec, Unavailable, is_copy
from .records import Row, measured, single
from .timing import Contestant, Effort, Samples, interleave

Log = Callable[[str], None]
Tick = Callable[[int, int], None]

# Vectors of 256 MB are beyond every cache; longer ones would only take memory from the peers.
_LONGEST_COPIED = 2**26

# The reference backend is written to be read; on larger lists its gate would outlast the timing.
_MOST_REFERENCED = 30_000_000

# The compile time of a list grows with its tensors; beyond this it would be the whole benchmark.
_MOST_COMPILED = 400


@dataclass(frozen=True)
class Unit:
    """What is measured together.

    Attributes:
        cap: cut tensors to this many elements; 1 leaves nothing but the cost of the calls.
        compiled: whether torch.compile takes part, or the reason why not.
    """

    section: str
    case: str
    base: str
    dtype: torch.dtype
    cap: int | None = None
    compiled: bool | str = True

    @property
    def name(self) -> str:
        return "/".join((self.section, self.case, self.base, str(self.dtype)[6:]))


def measure(unit: Unit, effort: Effort, log: Log, tick: Tick) -> list[Row]:
    """Admit every peer through the gate, then time those that passed, interleaved."""
    base = BASES[unit.base]
    workspace = Workspace(CASES[unit.case].shapes(unit.cap), unit.dtype, base)
    about = {"section": unit.section, "case": unit.case, "base": unit.base, "dtype": str(unit.dtype)[6:]}
    rows: list[Row] = []
    truth = oracle.trajectory(workspace, base)
    contestants: dict[str, Contestant] = {}
    for key, spec in SPECS.items():
        refusal = _refusal(unit, spec, workspace)
        if refusal is not None:
            rows.append(single(key, "skipped", refusal))
            log(f"  skipped  {spec.label}: {refusal}")
            continue
        try:
            peer, found, verdict = _admit(spec, workspace, base, truth)
        except Unavailable as reason:
            rows.append(single(key, "skipped", str(reason)))
            log(f"  skipped  {spec.label}: {reason}")
            continue
        except Exception as error:  # a broken peer must not cost the others their numbers
            peer, found, verdict = None, [], f"raised {type(error).__name__}: {error}"
        rows += found
        if verdict is not None:
            rows.append(single(key, "wrong", verdict))
            log(f"  WRONG    {spec.label}: {verdict}; it will not be timed")
        elif key != "ours_reference":
            contestants[key] = step_of(peer, workspace)
    del truth
    workspace.reset()
    workspace.initial = []
    if unit.section == "step":
        contestants |= _copy_contestants(workspace, base)
    samples = interleave(contestants, effort, tick)
    rows += _keep_one(samples)
    for key, parts in samples.items():
        # Quantiles of the sum, which are not the sums of quantiles.
        totals = [sum(values) for values in zip(*parts.values(), strict=True)]
        per_phase = _bytes(key, base, workspace)
        for metric, samples, count in zip(
            ("phase1_ms", "phase2_ms", "total_ms"),
            (*parts.values(), totals),
            (*per_phase, sum(per_phase)),
            strict=True,
        ):
            rows.append(measured(key, metric, [1e3 * s for s in samples], bytes=count))
    torch._dynamo.reset()
    size = {"tensors": len(workspace.first), "numel": workspace.numel}
    return [{**about, **size, **row} for row in rows]


def _refusal(unit: Unit, spec: Spec, workspace: Workspace) -> str | None:
    tensors = len(workspace.first)
    if spec.kind == "compiled":
        if isinstance(unit.compiled, str):
            return unit.compiled
        if tensors > _MOST_COMPILED:
            return f"compile time grows with the list, and {tensors} tensors would take many minutes"
    if spec.key == "ours_reference" and (unit.section != "step" or workspace.numel > _MOST_REFERENCED):
        return "it is for reading and checking, and is checked on smaller lists"
    return None


def _admit(
    spec: Spec, workspace: Workspace, base: Base, truth: oracle.Trajectory
) -> tuple[Any, list[Row], str | None]:
    """A peer warmed up by the gate's steps, rows about it, and what is wrong with it, if anything."""
    rows: list[Row] = []
    workspace.reset()
    params = workspace.parameters()
    seconds = [time.perf_counter()]
    with metered() if spec.kind == "compiled" else _unmetered() as meter:
        peer = spec.make(params, base, workspace.slots)
    seconds.append(time.perf_counter())
    errors = []
    for step in range(oracle.STEPS):
        first, second = oracle.gradients_of_step(workspace, step)
        give_gradients(params, first)
        started = time.perf_counter()
        peer.step_phase1()
        between = time.perf_counter()
        if step == oracle.STEPS - 1 and spec.kind != "bound":
            errors.append(truth.perturbed.error(params))
        give_gradients(params, second)
        resumed = time.perf_counter()
        peer.step_phase2()
        if step == 0:
            halves = (between - started, time.perf_counter() - resumed)
    errors.append(truth.descended.error(params))
    if spec.kind == "compiled":
        rows += [single(spec.key, f"compile{i + 1}_s", half) for i, half in enumerate(halves)]
        give_gradients(params, workspace.first)
        with metered() as steady:
            _one_step(peer, workspace)
        extra = meter.left + steady.peak
    else:
        rows.append(single(spec.key, "first_call_ms", 1e3 * (seconds[1] - seconds[0] + sum(halves))))
        extra = _extra_memory(spec, workspace, base)
    rows.append(single(spec.key, "extra_bytes", extra))
    rows.append(single(spec.key, "error", max(errors)))
    verdict = None
    allowed = oracle.tolerance(workspace.dtype, spec.norm_error)
    if max(errors) > allowed:
        where = "perturbed weights" if errors[0] > allowed and len(errors) > 1 else "updated weights"
        verdict = f"{where} are off by {max(errors):.2g} of their size; allowed is {allowed:.2g}"
    elif spec.kind == "ours":
        workspace.reset()
        if not spec.make(workspace.parameters(), base, workspace.slots).restores_bits():
            verdict = "restored weights differ in their bits, or nothing was perturbed"
    return peer, rows, verdict


class _unmetered:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


def _extra_memory(spec: Spec, workspace: Workspace, base: Base) -> int:
    """Peak bytes beyond weights, gradients and the base's state, from construction to the second step."""
    params = workspace.parameters()
    with metered() as meter:
        peer = spec.make(params, base, workspace.slots)
        for _ in range(2):
            _one_step(peer, workspace)
    return meter.peak


def _one_step(peer: Any, workspace: Workspace) -> None:
    give_gradients(peer.params, workspace.first)
    peer.step_phase1()
    give_gradients(peer.params, workspace.second)
    peer.step_phase2()


def step_of(peer: Any, workspace: Workspace) -> Contestant:
    """A peer's step in its two phases."""

    def contestant() -> dict[str, float]:
        give_gradients(peer.params, workspace.first)
        start = time.perf_counter()
        peer.step_phase1()
        middle = time.perf_counter()
        give_gradients(peer.params, workspace.second)
        resumed = time.perf_counter()
        peer.step_phase2()
        return {"phase1": middle - start, "phase2": time.perf_counter() - resumed}

    return contestant


def _bytes(key: str, base: Base, workspace: Workspace) -> tuple[float, float]:
    """Bytes each phase must move."""
    spec = SPECS["ours_native" if is_copy(key) else key]
    first, second = spec.phase_bytes(base, workspace.dtype.itemsize)
    return first * workspace.numel, second * workspace.numel


def _copy_contestants(workspace: Workspace, base: Base) -> dict[str, Contestant]:
    """The bytes of our step as copies of vectors as long as the list, with every tool there is."""
    elements = min(max(1, workspace.numel * workspace.dtype.itemsize // 4), _LONGEST_COPIED)
    out, x = torch.zeros(elements), torch.ones(elements)
    phases = _bytes(COPY, base, workspace)

    def pieces(tool: str, count: float) -> list[Callable[[], object]]:
        whole, rest = divmod(int(count / 8), elements)
        parts = [stream.copies(out, x)[tool]] * whole
        last = stream.copies(out[:rest], x[:rest])
        return parts + ([last[tool]] if rest and tool in last else [])

    def contestant(tool: str) -> Contestant:
        first, second = (_clocked(pieces(tool, count)) for count in phases)
        return lambda: {"phase1": first(), "phase2": second()}

    return {tool: contestant(tool) for tool in stream.copies(out, x)}


def _clocked(parts: list[Callable[[], object]]) -> Callable[[], float]:
    """Seconds for running the parts one after another."""

    def run() -> float:
        start = time.perf_counter()
        for part in parts:
            part()
        return time.perf_counter() - start

    return run


def _keep_one(samples: Samples) -> list[Row]:
    """Of the tools that copy, keep the fastest as COPY, and a row that says which it was."""
    tools = {name: samples.pop(name) for name in list(samples) if is_copy(name)}
    if not tools:
        return []
    fastest = min(tools, key=lambda name: sum(map(statistics.median, tools[name].values())))
    samples[COPY] = tools[fastest]
    return [single(COPY, "tool", fastest)]
