"""Sparse SAM on ResNet-50's list: selecting masks, stepping with them, and what they take in memory.

Everything is held against what the authors publish (`published.py`), the step also against our own dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import oracle, published
from .cases import BASES, CASES, RHO, Base, Workspace, give_gradients
from .memory import metered, resident_peak
from .peers import Ours, Unavailable
from .records import Row, measured, single
from .steps import Log, Tick, step_of
from .timing import Contestant, Effort, clocked, interleave

CASE = "resnet50"
SPARSITIES = (0.5, 0.8, 0.9, 0.99)
# Of masks of whole output channels.
STRUCTURED = (0.9, 0.99)
DROP_RATE = 0.5

UPDATES = {"ssam_f": "SSAM-F, by given Fisher scores", "ssam_d": "SSAM-D, drop by gradient, grow at random"}
PUBLISHED = "published"
DENSE = "ours_native dense"
LABELS = {
    "ours_native": "ours, native",
    "ours_foreach": "ours, torch operators",
    PUBLISHED: "as published",
    "published_fused": "as published, fused base",
}

# The backends reference and foreach share one selection, in torch operators. It takes a second, as long at
# any sparsity: shown once, in rounds of its own. With random numbers it takes from six seconds, on a quiet
# machine, to minutes: left to the tests.
_ONCE, _AT = "ours_foreach", 0.9
_BRIEF = Effort(warmup=0, fewest=3, most=3)


@dataclass(frozen=True)
class Update:
    """Anew which weights are perturbed, everybody at every sparsity."""

    kind: str
    sparsities: tuple[float, ...] = SPARSITIES
    cap: int | None = None

    @property
    def name(self) -> str:
        return f"sparse/update/{self.kind}"


@dataclass(frozen=True)
class Step:
    """Norm, masked perturbation, restore and update, with every mask."""

    base: str
    cap: int | None = None

    @property
    def name(self) -> str:
        return f"sparse/step/{self.base}"


def label(peer: str) -> str:
    """How tables and pictures call a peer, whose key may end in what its mask is."""
    key, _, mask = peer.partition(" ")
    return f"{LABELS[key]}, {mask}" if mask else LABELS[key]


def measure(unit: Update | Step, effort: Effort, log: Log, tick: Tick) -> list[Row]:
    """The rows of a unit: whoever is right is timed, interleaved."""
    base = BASES["sgd" if isinstance(unit, Update) else unit.base]
    workspace = Workspace(CASES[CASE].shapes(unit.cap), torch.float32, base)
    about = {"section": "sparse", "case": CASE, "base": base.name, "dtype": "float32"}
    about |= {"tensors": len(workspace.first), "numel": workspace.numel}
    rows = (_update if isinstance(unit, Update) else _step)(unit, workspace, effort, log, tick)
    return [{**about, **row} for row in rows]


# ---- masks anew ------------------------------------------------------------------------------------


class _Fisher:
    """SSAM-F: one selection from scores that are there."""

    def __init__(
        self, workspace: Workspace, scores: list[Tensor], sparsity: float, backend: str | None
    ) -> None:
        self.params = workspace.parameters()
        self.scores = scores
        self.optimizer = _sam(self.params, "ssam_f", backend, sparsity=sparsity)
        self.keep = _live(self.optimizer, workspace.numel, sparsity)

    def begin(self) -> None:
        """Nothing: an update does not depend on the masks there are."""

    def run(self) -> None:
        if self.optimizer is None:
            self.masks = published.fisher_masks(self.scores, self.keep)
        else:
            self.optimizer.update_masks(scores=self.scores)

    def release(self) -> None:
        """Let go of masks that the next run would only replace."""
        self.masks = []

    def own_masks(self) -> int:
        """Make masks that nobody else holds, which a run can release; their bytes."""
        return 0

    def wrong(self) -> str | None:
        masks = _bools(self)
        ranking = torch.cat([x.flatten() for x in self.scores])
        last = ranking.kthvalue(len(ranking) - self.keep + 1).values
        for mask, score in zip(masks, self.scores, strict=True):
            if not mask[score > last].all() or mask[score < last].any():
                return "the mask does not have the highest scores"
        return _wrong_count(masks, self.keep, ties=int((ranking == last).sum()))


class _Dynamic:
    """SSAM-D: an update by the gradients of a step, always from the same masks."""

    def __init__(self, workspace: Workspace, _: list[Tensor], sparsity: float, backend: str | None) -> None:
        self.params = workspace.parameters()
        self.grads = workspace.first
        self.optimizer = _sam(self.params, "ssam_d", backend, sparsity=sparsity, drop_rate=DROP_RATE, every=1)
        live = _live(self.optimizer, workspace.numel, sparsity)
        self.kept = int(live * (1 - DROP_RATE))
        self.grown = live - self.kept
        generator = torch.Generator().manual_seed(0)
        self.before = [torch.rand(w.shape, generator=generator) >= sparsity for w in self.grads]
        if self.optimizer is None:
            self.initial = [mask.float() for mask in self.before]
            self.masks = list(self.initial)
        else:
            self.optimizer.update_masks(masks=self.before)
            # What happens in first_step(), without the passes around it.
            self.served = self.optimizer._groups()
            for group, _ in self.served:
                group.read_gradients()
            self.numbers = self.optimizer._numbers()
            self.step = 0

    def run(self) -> None:
        if self.optimizer is None:
            published.dynamic_masks(self.grads, self.masks, self.kept, self.grown)
        else:
            self.step += 1
            masks, policy = self.optimizer.masks, self.optimizer.recipe.mask
            masks.take(masks.evolve(self.served, policy, self.numbers, self.step))

    def begin(self) -> None:
        """The first masks again: gradients that never change would drop nothing after a while."""
        if self.optimizer is None:
            self.masks = list(self.initial)
        else:
            self.optimizer.update_masks(masks=self.before)

    def release(self) -> None:
        """Let go of masks that the next run would only replace."""
        self.begin()
        if self.optimizer is None:
            self.masks = []

    def own_masks(self) -> int:
        """Make masks that nobody else holds, which a run can release one by one; their bytes."""
        if self.optimizer is not None:
            return 0
        self.masks = [mask.clone() for mask in self.initial]
        return sum(mask.nbytes for mask in self.masks)

    def wrong(self) -> str | None:
        masks = _bools(self)
        inside = torch.cat([g[b].abs() for g, b in zip(self.grads, self.before, strict=True)])
        # Published, a small number is added to |g|, whose rounding makes neighbours equal.
        last = inside.kthvalue(len(inside) - self.kept + 1).values * (1 + 1e-6) if self.kept else torch.inf
        stayed = 0
        for mask, before, g in zip(masks, self.before, self.grads, strict=True):
            stayed += int((mask & before).sum())
            if not mask[before & (g.abs() > last)].all():
                return "a weight with one of the largest gradients was dropped"
        if stayed != self.kept:
            return f"{stayed} weights were kept; expected {self.kept}"
        return _wrong_count(masks, self.kept + self.grown, ties=1)


_KINDS = {"ssam_f": _Fisher, "ssam_d": _Dynamic}


def _sam(params: list[Tensor], recipe: str, backend: str | None, **options: Any) -> Any:
    """Our optimizer, or None for no backend."""
    if backend is None:
        return None
    try:
        from sam_kernels import SAM, recipes
    except ImportError as error:
        raise Unavailable(f"sam_kernels does not import ({error})") from error
    try:
        made = getattr(recipes, recipe)(**options)
        return SAM(_named(params), torch.optim.SGD, recipe=made, backend=backend, lr=0.1)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error


def _named(params: list[Tensor]) -> list[tuple[str, Tensor]]:
    """As a model names its parameters."""
    return [(f"tensor {i}", p) for i, p in enumerate(params)]


def _live(optimizer: Any, count: int, sparsity: float) -> int:
    """How many weights are perturbed; the roundings differ by one."""
    return count - int(count * sparsity) if optimizer is None else optimizer.recipe.mask.live(count)


def _bools(peer: _Fisher | _Dynamic) -> list[Tensor]:
    if peer.optimizer is None:
        return [mask != 0 for mask in peer.masks]
    return [peer.optimizer.masks[p] for p in peer.params]


def _mask_bytes(peer: _Fisher | _Dynamic) -> int:
    if peer.optimizer is None:
        return sum(mask.nbytes for mask in peer.masks)
    return peer.optimizer.masks.nbytes()


def _wrong_count(masks: list[Tensor], expected: int, ties: int) -> str | None:
    found = sum(int(mask.sum()) for mask in masks)
    if not expected <= found < expected + ties:
        return (
            f"the masks have {found:,} weights; expected {expected:,} and at most {ties - 1} equal ones more"
        )
    return None


@torch.no_grad()
def _update(unit: Update, workspace: Workspace, effort: Effort, log: Log, tick: Tick) -> list[Row]:
    rows: list[Row] = []
    timed: dict[str, Contestant] = {}
    slow: dict[str, Contestant] = {}
    # Gradients of one size in all layers crowd the scores together: the harder case for counting.
    pairs = zip(workspace.first, workspace.second, strict=True)
    scores = [a.square() + b.square() for a, b in pairs] if unit.kind == "ssam_f" else []
    for key in ("ours_native", *([_ONCE] if unit.kind == "ssam_f" else []), PUBLISHED):
        for sparsity in unit.sparsities if key != _ONCE else (_AT,):
            name = f"{key} {sparsity}"
            try:
                backend = key.removeprefix("ours_") if key != PUBLISHED else None
                peer = _KINDS[unit.kind](workspace, scores, sparsity, backend)
                peer.run()
                verdict = peer.wrong()
            except Unavailable as reason:
                rows.append(single(key, "skipped", str(reason)))
                log(f"  skipped  {LABELS[key]}: {reason}")
                break
            except Exception as error:  # a broken peer must not cost the others their numbers
                verdict = f"raised {type(error).__name__}: {error}"
            if verdict is not None:
                rows.append(single(name, "wrong", verdict))
                log(f"  WRONG    {label(name)}: {verdict}; it will not be timed")
                continue
            rows += _memory_of(peer, name)
            contestant = _again(peer)
            (slow if key == _ONCE else timed)[name] = contestant
    # A round of topk at every sparsity takes many seconds, and the gate has warmed everybody up.
    effort = replace(effort, warmup=1, fewest=min(effort.fewest, 7))
    for name, parts in (interleave(timed, effort, tick) | interleave(slow, _BRIEF, tick)).items():
        rows.append(measured(name, "total_ms", [1e3 * s for s in parts["total"]]))
    return rows


def _again(peer: _Fisher | _Dynamic) -> Contestant:
    run = clocked(peer.run)

    def contestant() -> dict[str, float]:
        peer.begin()
        return run()

    return contestant


def _memory_of(peer: _Fisher | _Dynamic, name: str) -> list[Row]:
    """What an update takes beyond weights, gradients, scores and the masks it replaces."""
    peer.release()
    with metered() as meter:
        old = peer.own_masks()
        peer.run()
    found = [single(name, "extra_bytes", meter.peak - old), single(name, "mask_bytes", _mask_bytes(peer))]
    # The less of two: the first may touch pages of libraries that nobody has touched before.
    peaks: list[int | None] = []
    for _ in range(2):
        peer.release()
        peer.own_masks()
        peaks.append(resident_peak(peer.run))
    if None not in peaks:
        found.append(single(name, "resident_bytes", min(peaks)))
    return found


# ---- steps with masks ------------------------------------------------------------------------------


class OursSparse(Ours):
    """sam_kernels with one named backend and given masks."""

    def __init__(
        self,
        params: list[Tensor],
        base: Base,
        slots: Any = None,
        *,
        backend: str,
        masks: list[Tensor],
        compact: bool = False,
    ) -> None:
        try:
            from sam_kernels import SAM, recipes
        except ImportError as error:
            raise Unavailable(f"sam_kernels does not import ({error})") from error
        try:
            made = recipes.ssam_f(rho=RHO, compact=compact)
            self.optimizer = SAM(_named(params), base.kind, recipe=made, backend=backend, **base.options)
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
        self.params = params
        base.adopt(self.optimizer.base_optimizer, params, slots)
        self.optimizer.update_masks(masks=masks)

    def snapshot_bytes(self) -> int:
        """Memory of the snapshots, which stand between steps."""
        return sum(x.nbytes for group, _ in self.optimizer._groups() for x in group.standing_snapshots or [])


def masks_of(workspace: Workspace, pattern: str, sparsity: float) -> list[Tensor]:
    """Bool masks of single weights ("random") or of whole output channels ("structured"), chosen at random.

    Every element of a vector is a channel.
    """
    generator = torch.Generator().manual_seed(0)
    masks = []
    for w in workspace.first:
        if pattern == "random":
            masks.append(torch.rand(w.shape, generator=generator) >= sparsity)
        else:
            chosen = torch.rand(len(w), generator=generator) >= sparsity
            masks.append(chosen.view(-1, *[1] * (w.dim() - 1)).expand(w.shape).contiguous())
    return masks


def step_masks() -> list[tuple[str, float]]:
    """Patterns and sparsities of the masks that steps are taken with."""
    return [("random", s) for s in SPARSITIES] + [("structured", s) for s in STRUCTURED]


def _step(unit: Step, workspace: Workspace, effort: Effort, log: Log, tick: Tick) -> list[Row]:
    base = BASES[unit.base]
    rows: list[Row] = []
    truth = oracle.trajectory(workspace, base)
    contestants: dict[str, Contestant] = {}
    makers: list[tuple[str, Callable[..., Any], list[Tensor] | None]] = [
        (DENSE, partial(Ours, backend="native"), None)
    ]
    for pattern, sparsity in step_masks():
        masks = masks_of(workspace, pattern, sparsity)
        native = partial(OursSparse, backend="native", masks=masks)
        makers.append((f"ours_native {pattern} {sparsity}", native, masks))
        compact = partial(native, compact=True)
        makers.append((f"ours_native compact {pattern} {sparsity}", compact, masks))
    # Of the others nothing depends on what is in the mask.
    masks = masks_of(workspace, "random", 0.9)
    dense_floats = [mask.float() for mask in masks]
    makers += [
        ("ours_foreach random 0.9", partial(OursSparse, backend="foreach", masks=masks), masks),
        (f"{PUBLISHED} any mask", partial(published.SparseSam, masks=dense_floats), masks),
        ("published_fused any mask", partial(published.SparseSam, masks=dense_floats, fused=True), masks),
    ]
    for name, make, masks in makers:
        try:
            peer, verdict = _admit(make, masks, workspace, base, truth)
        except Unavailable as reason:
            rows.append(single(name, "skipped", str(reason)))
            log(f"  skipped  {label(name)}: {reason}")
            continue
        except Exception as error:  # a broken peer must not cost the others their numbers
            verdict = f"raised {type(error).__name__}: {error}"
        if verdict is not None:
            rows.append(single(name, "wrong", verdict))
            log(f"  WRONG    {label(name)}: {verdict}; it will not be timed")
            continue
        contestants[name] = step_of(peer, workspace)
        live = workspace.numel if masks is None else sum(int(mask.sum()) for mask in masks)
        rows.append(single(name, "density", live / workspace.numel))
        if isinstance(peer, OursSparse):
            rows.append(single(name, "snapshot_bytes", peer.snapshot_bytes()))
    del truth, makers, masks, make
    workspace.reset()
    for name, parts in interleave(contestants, effort, tick).items():
        totals = [sum(values) for values in zip(*parts.values(), strict=True)]
        for metric, samples in zip(
            ("phase1_ms", "phase2_ms", "total_ms"), (*parts.values(), totals), strict=True
        ):
            rows.append(measured(name, metric, [1e3 * s for s in samples]))
    return rows


def _admit(
    make: Callable[..., Any],
    masks: list[Tensor] | None,
    workspace: Workspace,
    base: Base,
    truth: oracle.Trajectory,
) -> tuple[Any, str | None]:
    """A peer warmed up by the gate's steps, and what is wrong with it, if anything.

    The gradients of a gate step do not depend on the weights: masked or not, the update leads to the same.
    """
    workspace.reset()
    params = workspace.parameters()
    peer = make(params, base, workspace.slots)
    is_ours = isinstance(peer, Ours)
    allowed = oracle.tolerance(torch.float32, 0.0 if isinstance(peer, OursSparse) else 2e-3)
    for step in range(oracle.STEPS):
        first, second = oracle.gradients_of_step(workspace, step)
        give_gradients(params, first)
        before = [p.detach().clone() for p in params] if step == oracle.STEPS - 1 else []
        peer.step_phase1()
        if before and masks is not None:
            scale = RHO / torch.cat([g.flatten() for g in first]).double().norm().item()
            for p, old, g, mask, goal in zip(
                params, before, first, masks, truth.perturbed.weights, strict=True
            ):
                if not torch.equal(p.detach()[~mask], old[~mask]):
                    return peer, "weights outside the mask were perturbed"
                wanted = torch.where(mask, goal, goal - scale * g.double())
                error = oracle.Stop([wanted], truth.perturbed.reach).error([p])
                if error > allowed:
                    return peer, f"perturbed weights are off by {error:.2g} of their size"
        del before
        give_gradients(params, second)
        peer.step_phase2()
    error = truth.descended.error(params)
    if error > allowed:
        return peer, f"updated weights are off by {error:.2g} of their size"
    if is_ours:
        workspace.reset()
        if not make(workspace.parameters(), base, workspace.slots).restores_bits():
            return peer, "restored weights differ in their bits, or nothing was perturbed"
    return peer, None
