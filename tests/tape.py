"""What a CUDA graph would make of a step, without a GPU: a spy for what it forbids, and a tape for a graph.

The spy watches steps of parameters on the device "meta", which stands for an accelerator: it has no numbers,
so a host that reads one fails. The tape stands for the graph itself: it keeps every operator that a step on
the CPU runs, with the tensors and numbers of that time, and runs them once more over the same memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam_kernels import graphs, ops, rng, tensor_groups
from sam_kernels.backends import foreach, native
from sam_kernels.backends.triton import plan

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Spy(TorchDispatchMode):
    """Collects what no graph can record: reads by the host, copies to and fro, tensors of Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._makers = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}

    def __enter__(self):
        # On a device without numbers these do not reach the dispatcher.
        for name, make in self._makers.items():
            setattr(torch, name, functools.partial(self._make, name, make))
        return super().__enter__()

    def __exit__(self, *problem):
        for name, make in self._makers.items():
            setattr(torch, name, make)
        return super().__exit__(*problem)

    def _make(self, name, make, data, *args, **kwargs):
        made = make(data, *args, **kwargs)
        if made.is_meta and made is not data:
            self.found.append(f"torch.{name}({data!r})")
        return made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(func)
        if any(read in name for read in READS):
            self.found.append(f"{name}: the host reads")
        out = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        devices = {x.device.type for x in [*given, *_tensors(out)]}
        # A single number of the host's goes along with a launch; more have to be copied.
        if len(devices) > 1 and ("copy" in name or any(x.device.type == "cpu" and x.dim() for x in given)):
            self.found.append(f"{name}: a copy between {sorted(devices)}")
        return out


class Tape(TorchDispatchMode):
    """Operators in the order they ran; everything they made is kept, as by the memory pool of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Callable[[], None]] = []
        self._constants: list[Tensor] = []  # made of Python numbers

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_read = any(read in str(func) for read in READS)
        assert not is_read or any(args[0] is x for x in self._constants), f"{func}: the host reads"
        args = tuple(list(x) if isinstance(x, list) else x for x in args)
        out = func(*args, **kwargs)
        if "lift_fresh" in str(func):
            self._constants.append(out)
        if func.namespace != "profiler" and not is_read:
            self._steps.append(lambda: self._again(func, args, kwargs, out))
        return out

    def call(self, function, args, kwargs):
        """What is not an operator of torch, a pass of a compiled engine: remembered with its addresses."""
        args = tuple(list(x) if isinstance(x, list) else x for x in args)
        self._steps.append(lambda: function(*args, **kwargs))
        return function(*args, **kwargs)

    @staticmethod
    def _again(func, args, kwargs, out) -> None:
        returned = func(*args, **kwargs)
        returns = func._schema.returns
        outs, news = ([out], [returned]) if len(returns) == 1 else (out or (), returned or ())
        for spec, old, new in zip(returns, outs, news, strict=False):
            if spec.alias_info is not None:
                continue  # a view, or written in place
            for into, x in zip(_tensors(old), _tensors(new), strict=True):
                into.copy_(x)

    def replay(self) -> None:
        with torch.no_grad():
            for step in self._steps:
                step()


class Recorded:
    """A plan of the compiled engine whose calls go onto a tape."""

    def __init__(self, plan, tape: Tape) -> None:
        self._plan, self._tape = plan, tape

    def take(self, watch, grads, dtype):
        """What a watch has just seen it knows no more at a replay; the addresses are what a graph has."""
        present = self._plan.take(watch, grads, dtype)
        return present if present < 0 else self.point(native._native.GRADS, "grads", grads, dtype)

    def __getattr__(self, name):
        function = getattr(self._plan, name)
        return lambda *args, **kwargs: self._tape.call(function, args, kwargs)


@contextmanager
def like_an_accelerator(monkeypatch) -> Iterator[None]:
    """The foreach backend reads no scalars, as if those on the CPU were on a device."""
    with monkeypatch.context() as patch:
        patch.setattr(foreach, "_known", lambda x: x)
        patch.setattr(foreach, "bool", lambda x: x, raising=False)

        def factors(x, members=None):
            every = list(x.unbind())
            return every if members is None else [every[t] for t in members]

        def host_table(group):
            width = group.table.shape[1]
            return [[*row, *[0.0] * (width - len(row))] for row in group.rows]

        patch.setattr(foreach, "_factors", factors)
        patch.setattr(foreach, "_host_table", host_table)
        yield


@contextmanager
def capturing(monkeypatch) -> Iterator[None]:
    """Everybody who asks is told that a graph is being captured, as everywhere inside torch.cuda.graph."""
    with monkeypatch.context() as patch:
        for module in (tensor_groups, graphs, ops, rng, plan):
            patch.setattr(module, "is_capturing", lambda device: True)
        yield


def record(monkeypatch, run: Callable[[], Any], persistent: list[Tensor]) -> tuple[Callable[[], None], Any]:
    """Record one run; as a capture does it changes nothing, so what persists is put back."""
    kept, tape = [x.detach().clone() for x in persistent], Tape()
    plan_of = native.Native._plan
    with monkeypatch.context() as patch:
        patch.setattr(native.Native, "_plan", lambda self, group: Recorded(plan_of(self, group), tape))
        with capturing(patch), tape:
            result = run()
    with torch.no_grad():
        for x, old in zip(persistent, kept, strict=True):
            x.copy_(old)
    return tape.replay, result


@contextmanager
def in_place_of_a_graph(monkeypatch, model, opt) -> Iterator[None]:
    """`make_graphed_step` on the CPU: a tape records in place of a graph, and puts back what it has moved."""

    def on_tape(run, device):
        slots = [x for own in opt._slots.tensors.values() for x in own.values()]
        state = [x for own in opt.base_optimizer.state.values() for x in own.values()]
        scalars = list(opt._slots.scalars.values())
        persistent = [*model.parameters(), *model.buffers(), *slots, *state, *scalars]
        return record(monkeypatch, run, [x for x in persistent if isinstance(x, torch.Tensor)])

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "_device_of", lambda opt: torch.device("cpu"))
        patch.setattr(graphs, "_on_side_stream", lambda run, device: run())
        patch.setattr(graphs, "_record", on_tape)
        yield
