"""CUDA graphs: a whole training step recorded once and replayed, and what stands against it.

A graph repeats what the device did and nothing that the host did. So a step can be recorded where the host
neither reads the device nor decides anything that differs from step to step:

- Recipes that choose their steps: no. ``every=k`` of any, looksam, rst, ae_sam (which reads the norm too).
- Recipes with random numbers: no. rand_sam, r_sam, esam; theirs go by the number of the step.
- Masks that change by themselves: no. ssam_d. After ``update_masks`` of ssam_f the step is recorded anew.
- All other recipes: yes. sampa by hand, as `make_graphed_step` knows one batch a step.
- SGD, Adam, AdamW: yes. Adam and AdamW need capturable=True where the backend is "foreach".
- Other bases: no. The host reads whether a gradient was finite before they step.
- rng="replay" and stochastic_rounding: no. The host sets generators, and random bits go by the step's number.
- Several ranks (DDP, FSDP, tensor parallelism): not tried, and refused.

A parameter that is frozen after the recording goes on moving: the graph has its update.

Numbers (lr, rho, weight decay, ...) may change between replays of `make_graphed_step`: kernels read them in a
table on the device, which is written before each replay. Foreach operators take them as arguments, which a
graph holds fast; there, and in the few recipes that use numbers beside the table, a change is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import masters, state
from .backends.handover import has_momentum
from .policies import (
    Anticipated,
    Bernoulli,
    Decoupled,
    Dynamic,
    Every,
    EveryStep,
    Given,
    Noise,
    RandomStart,
)
from .recipe import Recipe
from .tensor_groups import is_capturing, lives_on_device

if TYPE_CHECKING:
    from .optimizer import SAM


def recipe_refusal(recipe: Recipe) -> str | None:
    """Why no graph can replay steps of the recipe, or None.

    Example:
        >>> from sam_kernels import recipes
        >>> recipe_refusal(recipes.gsam()) is None
        True
        >>> recipe_refusal(recipes.gsam(every=2))
        'its cadence decides on the host which steps perturb'
    """
    cadence = recipe.cadence
    if not (type(cadence) is EveryStep or (type(cadence) is Every and cadence.k == 1)):
        return "its cadence decides on the host which steps perturb"
    is_random = isinstance(recipe.direction, Noise) or isinstance(recipe.probe, RandomStart)
    if is_random or isinstance(recipe.mask, Bernoulli):
        return "its random numbers go by the number of the step, which every replay would repeat"
    if isinstance(recipe.mask, Dynamic) or (isinstance(recipe.mask, Given) and recipe.mask.every is not None):
        return "its masks change in steps that the host chooses"
    return None


def refusal(opt: SAM) -> str | None:
    """Why a graph cannot replay steps of this optimizer, whatever device it is on, or None.

    Example:
        >>> from sam_kernels import SAM
        >>> refusal(SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.RMSprop, lr=0.1))
        'RMSprop has no fused update, so the host reads whether its step is safe'
    """
    of_recipe = recipe_refusal(opt.recipe)
    if of_recipe is not None:
        return f"recipe '{opt.recipe.name}': {of_recipe}"
    rule, sentence = state.fused_rule(opt.base_optimizer)
    if rule is None:
        return f"{sentence}, so the host reads whether its step is safe"
    if opt.rng == "replay":
        return "rng='replay' sets the state of random number generators from the host"
    if opt.stochastic_rounding:
        return "stochastic_rounding=True draws by the number of the step, which every replay would repeat"
    if opt.ranks.are_several or any(group.has_dtensors for group, _ in opt._groups()):
        return "several ranks share the step, and collectives in a graph have not been tried"
    names = {backend.name for _, backend in opt._groups()}
    if "reference" in names:
        return "backend 'reference' reads scalars on the host"
    if "foreach" in names:
        groups = opt.param_groups
        if any(lives_on_device(group.get(key)) for group in groups for key in (*_NUMBERS, opt._rho_key)):
            return "backend 'foreach' reads hyperparameters that are tensors; give it numbers"
        beside = all(group.get("capturable") or group.get("fused") for group in groups)
        if rule == "adam" and not beside:
            return (
                f"{type(opt.base_optimizer).__name__} counts its steps on the host, which then reads whether "
                "a step is safe; give it capturable=True"
            )
    return None


_NUMBERS = ("lr", "weight_decay", "momentum", "dampening", "eps")


def check_capture(opt: SAM, what: str) -> None:
    """Before a step: a sentence where a graph is being recorded and would not repeat the step.

    Raises:
        RuntimeError: saying why; the capture fails, and the weights are as before.
    """
    groups = [group for group, _ in opt._served or ()]
    if not any(map(is_capturing, {group.device for group in groups} or opt._devices())):
        return
    sentence = refusal(opt)
    if sentence is None and callable(opt.recipe.rho) and not opt._rewrites_tables:
        sentence = "its rho is a schedule of the host; use sam_kernels.graphs.make_graphed_step"
    if sentence is None and not any(group.reads for group in groups):
        sentence = "state and buffers do not exist yet; take a step before the capture"
    if sentence is not None:
        raise RuntimeError(f"{what}: a CUDA graph is being captured, and cannot replay this step: {sentence}")


class GraphedStep:
    """What `make_graphed_step` returns: call it with a batch for a step and its loss."""

    def __init__(
        self, opt: SAM, places: Sequence[Tensor], grads: list[Tensor], loss: Tensor, replay: Callable[[], Any]
    ) -> None:
        self._opt = opt
        self._places = list(places)
        self._grads = grads  # the graph writes into them, whatever becomes of `.grad`
        self._loss = loss
        self._replay = replay
        self._known = _known(opt)
        self._record = opt._record  # of the recorded step: every replay writes its numbers
        self._fixed = _fixed(opt)

    @torch.no_grad()
    def __call__(self, *batch: Tensor) -> Tensor:
        """Take a step.

        Args:
            batch: tensors of the shapes and dtypes of the sample's.

        Returns:
            The loss at the weights before the step, a tensor of its own.

        Raises:
            ValueError: if the batch has other shapes than the sample.
            RuntimeError: if something that the graph holds fast has changed since it was recorded.
        """
        opt = self._opt
        _check_batch(batch, self._places)
        opt._require_idle("a graphed step")
        sentence = _graphed_refusal(opt)
        if sentence is not None:
            raise RuntimeError(f"a graphed step: since it was recorded, {sentence}")
        served = opt._groups()
        if opt.master_weights:
            masters.prepare(
                served, opt._slots, opt.base_optimizer
            )  # in place: weights that were loaded since are followed
        known = _known(opt)
        if len(known) != len(self._known) or not all(map(is_, known, self._known)):
            raise RuntimeError(
                "a graphed step: parameters, optimizer state or masks were replaced since it was recorded, "
                "and the graph knows the former ones; make another by make_graphed_step"
            )
        opt._write_tables(served)
        if _fixed(opt) != self._fixed:
            raise RuntimeError(
                "a graphed step: a hyperparameter changed that this graph holds fast, for its backend or "
                "recipe takes it as a number; make another by make_graphed_step, or use a backend of kernels "
                "(native, triton), which read lr and rho on the device"
            )
        for place, x in zip(self._places, batch, strict=True):
            place.copy_(x, non_blocking=True)
        self._replay()
        opt._record = self._record
        self._record.refresh(opt)
        for group in opt.param_groups:
            group["sam_step"] += 1
        for stepped in (opt, opt.base_optimizer):
            stepped._opt_called = True  # type: ignore[attr-defined]
        return self._loss.clone()


def make_graphed_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    opt: SAM,
    sample: Sequence[Tensor],
    warmup: int = 3,
) -> GraphedStep:
    """Record a whole training step in one CUDA graph: all forward and backward passes, and what is between.

    First takes `warmup` steps on the sample, which count and train like any others; that makes state and
    buffers. Gradients then stay in fixed places. Between replays lr, rho and other numbers may change where
    kernels read them in a table, see the module. The rest is as torch asks: static shapes, no host reads in
    `loss_fn`, autocast inside of it, parameters on one device.

    Args:
        model: what is trained.
        loss_fn: ``loss_fn(model, *batch)`` returns the loss, a scalar tensor.
        opt: around SGD, Adam or AdamW; `SAM.capturable` says whether a graph can hold its steps.
        sample: a batch; all later ones have its shapes and dtypes.
        warmup: steps before the capture, at least 2 (default 3).

    Returns:
        A function ``step(*batch) -> loss``.

    Raises:
        RuntimeError: without a CUDA device, or where the step cannot be recorded; the message says why.
        ValueError: if sample is not a sequence of tensors, or warmup is below 2.

    Example:
        >>> from sam_kernels import SAM
        >>> def train_on_gpu(model, loader):
        ...     def loss_fn(model, x, y):
        ...         return torch.nn.functional.cross_entropy(model(x), y)
        ...     opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        ...     step = make_graphed_step(model, loss_fn, opt, sample=next(iter(loader)))
        ...     return [step(x, y) for x, y in loader]
    """
    opt._require_idle("make_graphed_step()")
    if isinstance(sample, Tensor) or not sample or not all(isinstance(x, Tensor) for x in sample):
        raise ValueError("make_graphed_step: sample is not a sequence of tensors; expected those of a batch")
    if not isinstance(warmup, int) or warmup < 2:
        raise ValueError(f"make_graphed_step: warmup is {warmup!r}; expected a whole number of at least 2")
    device = _device_of(opt)
    sentence = _graphed_refusal(opt)
    if sentence is not None:
        raise RuntimeError(f"make_graphed_step: a CUDA graph cannot replay these steps: {sentence}")
    places = [x.detach().to(device, copy=True) for x in sample]

    def closure() -> Tensor:
        loss = loss_fn(model, *places)
        loss.backward()
        return loss.detach()

    def warm_up() -> None:
        opt.zero_grad()  # from here on a gradient means that a parameter takes part
        opt._clears_by_zeros = True
        opt.step(closure)
        _fix_gradients(opt)
        for _ in range(warmup - 1):
            opt.step(closure)
        with torch.no_grad():
            opt._write_tables(opt._groups())  # a schedule's next number, which must not change in a capture

    kept = opt.copies_gradients
    opt.copies_gradients = opt._rewrites_tables = True
    try:
        _on_side_stream(warm_up, device)
        counts = [group["sam_step"] for group in opt.param_groups]
        try:
            replay, loss = _record(lambda: opt.step(closure), device)
        finally:
            # The host has counted a step that the device has not taken.
            for group, count in zip(opt.param_groups, counts, strict=True):
                group["sam_step"] = count
    finally:
        opt.copies_gradients, opt._rewrites_tables, opt._clears_by_zeros = kept, False, False
    grads = [p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None]
    return GraphedStep(opt, places, grads, loss, replay)


def _graphed_refusal(opt: SAM) -> str | None:
    if isinstance(opt.recipe.probe, Anticipated):
        return f"recipe '{opt.recipe.name}': its step takes the next batch too; record it by torch.cuda.graph"
    if opt._optimizer_step_pre_hooks or opt._optimizer_step_post_hooks:
        return "step hooks are registered, and would run when the step is recorded only"
    return refusal(opt)


def _device_of(opt: SAM) -> torch.device:
    """The one CUDA device of the parameters.

    Raises:
        RuntimeError: if they are elsewhere, or on several.
    """
    devices = {group.device for group, _ in opt._groups()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices))) or "nowhere"
        raise RuntimeError(
            f"make_graphed_step: the parameters are on {found}; expected one CUDA device, since graphs are "
            "CUDA's. opt.step(closure) takes the same steps anywhere"
        )
    return devices.pop()


def _fix_gradients(opt: SAM) -> None:
    """From here on gradients are added to zeros in places that stay."""
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad = torch.zeros_like(p, requires_grad=False)


def _on_side_stream(run: Callable[[], None], device: torch.device) -> None:
    """As torch asks for before a capture."""
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        run()
    here.wait_stream(side)
    torch.cuda.synchronize(device)


def _record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], Any]:
    """The replay of what `run` asks of the device, and what it returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def _check_batch(batch: Sequence[Any], places: Sequence[Tensor]) -> None:
    found = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in batch]
    expected = [(tuple(x.shape), x.dtype) for x in places]
    if found != expected:
        raise ValueError(
            f"a graphed step: the batch is {found}; expected {expected}, as the sample was, since a graph "
            "has one shape"
        )


def _known(opt: SAM) -> list[Any]:
    """What holds the tensors that the graph knows by address: loading and rebuilding make others of these."""
    known: list[Any] = [opt.base_optimizer.state, opt._slots.tensors, *opt._slots.scalars.values()]
    for group, _ in opt._groups():
        known += [group, group.masks]
    return known


def _fixed(opt: SAM) -> list[Any]:
    """The numbers that the graph has taken as they were."""
    fixed: list[Any] = [opt.max_grad_norm]
    is_beside = isinstance(opt.recipe.combine, Decoupled) or opt.recipe.decay == "inside"
    for group, backend in opt._groups():
        fixed.append(has_momentum(group))
        if backend.name == "foreach":
            fixed.append(list(group.rows))
    if is_beside:
        fixed += [
            [g.get(key) for key in _NUMBERS if not lives_on_device(g.get(key))] for g in opt.param_groups
        ]
    return fixed
