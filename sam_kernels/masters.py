"""fp32 masters of half-precision weights: the master is the truth, and ``w = round(master)``.

The perturbation is ``w = round(master + e)`` and the restore ``w = round(master)``, so masters stand where
snapshots would, and no snapshot is kept. The fused update reads and writes master and state in fp32, and w
once.

note: [who changed the weights]
A master follows its weight where somebody else has changed that, `model.load_state_dict` for one: before a
step, if the version counter of the parameter is not the one our last pass left, every element with
``round(master) != w`` is made anew from w; the others keep the low bits of their masters. So w wins, whatever
was loaded in which order, and what was saved together goes on with every bit. A write through ``p.data``
advances no counter that could be seen: `SAM.refresh_masters` is for those. DTensors are compared before every
step (6 bytes per weight), since `torch.distributed.checkpoint` writes into their local tensors unseen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import state
from .perturbation import Served
from .policies import Decoupled, OneStep
from .recipe import Recipe
from .sharding import local
from .slots import MASTER, Slots
from .tensor_groups import TensorGroup

HALF = (torch.bfloat16, torch.float16)

# Keys of `Optimizer.state` under which bases that step through masters of their own have them: that of
# TransformerEngine's FusedAdam(master_weights=True), and the name torch-native ones use.
OFFERED = ("master_param", "master_weight")

# State of the base optimizers we fuse; fp32 beside masters.
_MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")

_BITS = torch.int16


def check(recipe: Recipe, base: Optimizer) -> None:
    """Raise a sentence where masters cannot be kept.

    Raises:
        ValueError: if the base steps by itself, or the recipe needs snapshots or moves weights besides.
    """
    rule, sentence = state.fused_rule(base)
    if rule is None and not offers(base):
        raise ValueError(
            "SAM: master_weights=True needs a base optimizer whose update is fused, which reads and writes "
            f"the masters; {sentence}, and its own step would move the weights alone. Use SGD, Adam or "
            "AdamW of torch.optim, a base with masters of its own (state[p]['master_param'] and an attribute "
            "master_weights), or stochastic_rounding=True, or fp32 parameters under autocast"
        )
    refused = None
    if not isinstance(recipe.probe, OneStep):
        refused = f"its probe, {type(recipe.probe).__name__}, moves weights that are perturbed already"
    elif getattr(recipe.mask, "compact", False):
        refused = "compact snapshots were asked for, and with masters there are none"
    elif isinstance(recipe.combine, Decoupled):
        refused = "it moves the weights by a second gradient after the base's update"
    if refused is not None:
        raise ValueError(
            f"recipe '{recipe.name}' does not go with master_weights=True: {refused}. Use "
            "stochastic_rounding=True, or fp32 parameters under autocast"
        )


# note: [masters of the base]
# A base that steps by itself may keep masters too. Then they are the truth: perturbed from, restored to, and
# written by the base's own step. Before its first step there are none, and ours stand in, which are w
# exactly.


def offers(base: Optimizer) -> bool:
    """Whether a base keeps fp32 masters itself; see note [masters of the base].

    Example:
        >>> offers(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
        False
    """
    has_any = any(key in entry for entry in base.state.values() for key in OFFERED)
    return has_any or bool(getattr(base, "master_weights", False))


def _theirs(base: Optimizer, owner: Tensor) -> Tensor | None:
    """The base's master of a parameter, its local part; None where there is none in fp32."""
    entry = base.state.get(owner, {})
    found = next((entry[key] for key in OFFERED if isinstance(entry.get(key), Tensor)), None)
    is_one = found is not None and found.dtype == torch.float32 and found.shape == owner.shape
    return local(found) if is_one else None


def prepare(served: Served, slots: Slots, base: Optimizer, anyway: bool = False) -> None:
    """Give groups of half types their masters, as note [who changed the weights] says; w is not perturbed.

    Args:
        anyway: look at the weights whatever their version counters say.
    """
    for group, _ in served:
        if group.dtype in HALF and not group.is_perturbed:
            _prepare(group, slots, base, anyway)
        elif group.dtype not in HALF and slots.tensors.get(MASTER):
            slots.drop(MASTER, group.owners)  # parameters that were cast since are their own masters


def _prepare(group: TensorGroup, slots: Slots, base: Optimizer, anyway: bool) -> None:
    if group.settled is not None and not anyway:
        # What distributed checkpoints load into local tensors in place moves no counter at all.
        if not group.has_dtensors and group.settled == group.versions():
            return
    masters: list[Tensor] = []
    theirs = [_theirs(base, owner) for owner in group.owners]
    slots.drop(MASTER, [owner for owner, x in zip(group.owners, theirs, strict=True) if x is not None])
    for p, master, their in zip(group.params, slots.lists(MASTER, group), theirs, strict=True):
        if their is not None:
            master = their
        elif master is None:
            master = torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(p)
        else:
            _follow(master, p)
        masters.append(master)
    slots.put(MASTER, group, [None if x is not None else m for m, x in zip(masters, theirs, strict=True)])
    if group.masters is None or any(a is not b for a, b in zip(group.masters, masters, strict=True)):
        group.set_masters(masters)
    group.settle()


def begin_descent(served: Served) -> None:
    """Tensors that were not perturbed are updated through masters too, and go back to them on failure."""
    for group, _ in served:
        if group.masters is None:
            continue
        pairs = zip(group.masters, group.snapshots, group.grads, strict=True)
        group.snapshots = [None if s is None and g is None else master for master, s, g in pairs]
        group.is_perturbed = True


def _follow(master: Tensor, param: Tensor) -> None:
    """``master = w`` in every element where ``round(master) != w``."""
    is_ours = master.to(param.dtype).view(_BITS) == param.detach().view(_BITS)
    master.copy_(torch.where(is_ours, master, param.detach().float()))


# ---- checkpoints -----------------------------------------------------------------------------------


def check_loaded(loaded: dict[Tensor, dict[str, Tensor]], has_masters: bool) -> None:
    """Raise a sentence where a checkpoint has masters that nobody would keep.

    Raises:
        ValueError: if the optimizer keeps none, or the parameter is no half type now.
    """
    for param, own in loaded.items():
        if MASTER not in own:
            continue
        if not has_masters:
            raise ValueError(
                "load_state_dict(): the checkpoint holds fp32 masters (sam_master), and fp32 state, whose "
                "low bits would be lost here; build the optimizer with master_weights=True, or drop "
                "sam_master from the state of the checkpoint's parameters to go on from the rounded weights"
            )
        if param.dtype not in HALF:
            raise ValueError(
                f"load_state_dict(): the checkpoint holds an fp32 master (sam_master) of a parameter that is "
                f"{param.dtype} now; expected torch.bfloat16 or torch.float16, as it was saved. To train in "
                "another dtype, copy the masters into the parameters and drop sam_master"
            )


def widen_state(base: Optimizer, saved: dict[Tensor, dict[str, Any]]) -> None:
    """State beside half-precision weights in fp32: `Optimizer.load_state_dict` casts it to their dtype.

    Args:
        saved: by parameter, the state as a checkpoint has it.
    """
    for param, held in base.state.items():
        if param.dtype not in HALF:
            continue
        entry = saved.get(param, {})
        for name in _MOMENTS:
            value = entry.get(name)
            if isinstance(value, Tensor) and value.shape == param.shape:
                wide = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
                held[name] = wide.copy_(value)
