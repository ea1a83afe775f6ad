"""What the CUDA kernels serve beyond the other engines, through the C ABI.

Half gradients of fp32 weights, fp32 masters of half weights, lists that take several launches.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import shutil
from contextlib import contextmanager
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)

import emulated
import numpy as np
import pytest
import torch
from oracles.philox import random_word

from sam_kernels import SAM, tensor_groups
from sam_kernels.backends import native
from sam_kernels.bitmask import count_words, pack, unpack
from sam_kernels.tensor_groups import ADAPTIVE, COLUMNS, EUCLIDEAN, Column

pytestmark = emulated.needed

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CODES = {F32: 0, F64: 1, BF16: 2, F16: 3}
SGD, ADAM = 0, 1
# 2048 is the chunk of a list this small.
SIZES = [0, 1, 7, 8, 9, 2047, 2048, 2049, 3 * 2048 + 5, 0]


class List(Structure):
    _fields_ = [("data", POINTER(c_void_p)), ("dtype", c_int32)]


class Queue(Structure):
    _fields_ = [("stream", c_void_p), ("device", c_int32)]


class SqNorm(Structure):
    _fields_ = [
        ("grads", List),
        ("params", List),
        ("masks", List),
        ("row", POINTER(c_int32)),
        ("table", c_void_p),
        ("moment", c_int32),
        ("q", c_double),
        ("peak", c_void_p),
        ("root", c_double),
        ("out", c_void_p),
        ("per_tensor", c_void_p),
        ("workspace", c_void_p),
        ("queue", Queue),
    ]


class Perturb(Structure):
    _fields_ = [
        ("params", List),
        ("grads", List),
        ("snapshots", List),
        ("masters", List),
        ("masks", List),
        ("offsets", List),
        ("row", POINTER(c_int32)),
        ("table", c_void_p),
        ("shape", c_int32),
        ("q", c_double),
        ("peak", c_void_p),
        ("norm", c_void_p),
        ("tensor_scale", c_void_p),
        ("number", POINTER(c_uint32)),
        ("seed", c_uint64),
        ("step", c_uint32),
        ("queue", Queue),
    ]


class Restore(Structure):
    _fields_ = [
        ("params", List),
        ("snapshots", List),
        ("masters", List),
        ("masks", List),
        ("offsets", List),
        ("queue", Queue),
    ]


class Descend(Structure):
    _fields_ = [
        ("params", List),
        ("grads", List),
        ("snapshots", List),
        ("masters", List),
        ("masks", List),
        ("offsets", List),
        ("state", List * 2),
        ("step", POINTER(c_void_p)),
        ("fresh", POINTER(c_uint8)),
        ("row", POINTER(c_int32)),
        ("table", c_void_p),
        ("rule", c_int32),
        ("guard", c_void_p),
        ("found_inf", c_void_p),
        ("inv_scale", c_void_p),
        ("workspace", c_void_p),
        ("queue", Queue),
    ]


class Accumulate(Structure):
    _fields_ = [("scores", List), ("grads", List), ("queue", Queue)]


class Ranks(Structure):
    _fields_ = [
        ("scores", List),
        ("is_random", c_int32),
        ("seed", c_uint64),
        ("step", c_uint32),
        ("number", POINTER(c_uint32)),
        ("within", List),
        ("outside", c_int32),
    ]


class Count(Structure):
    _fields_ = [
        ("ranks", Ranks),
        ("masks", List),
        ("prefix", c_int32),
        ("shift", c_int32),
        ("bits", c_int32),
        ("counts", c_void_p),
        ("queue", Queue),
    ]


class Mark(Structure):
    _fields_ = [
        ("ranks", Ranks),
        ("masks", List),
        ("threshold", c_int32),
        ("shift", c_int32),
        ("add", c_int32),
        ("position", POINTER(c_int64)),
        ("candidates", c_void_p),
        ("capacity", c_int64),
        ("found", c_void_p),
        ("queue", Queue),
    ]


@pytest.fixture(scope="module")
def library():
    lib = ctypes.CDLL(str(emulated.LIBRARY))
    lib.samk_plan_create.restype = c_void_p
    lib.samk_plan_create.argtypes = [POINTER(c_int64), c_int64]
    lib.samk_plan_destroy.argtypes = [c_void_p]
    lib.samk_plan_workspace_bytes.restype = c_int64
    lib.samk_plan_workspace_bytes.argtypes = [c_void_p]
    lib.samk_last_error.restype = c_char_p
    for name in ("sq_norm", "perturb", "restore", "descend", "accumulate", "count", "mark"):
        getattr(lib, f"samk_{name}").restype = c_int
        getattr(lib, f"samk_{name}").argtypes = [c_void_p, c_void_p]
    return lib


class Plan:
    """A plan with its workspace; `run` calls a pass and raises its sentence."""

    def __init__(self, lib, sizes):
        self.lib, self.count = lib, len(sizes)
        self.pointer = lib.samk_plan_create((c_int64 * len(sizes))(*sizes), len(sizes))
        self.workspace = torch.zeros(lib.samk_plan_workspace_bytes(self.pointer), dtype=torch.uint8)
        self.row = (c_int32 * len(sizes))(*[0] * len(sizes))

    def run(self, name, arguments):
        if hasattr(arguments, "row"):
            arguments.row = self.row
        if hasattr(arguments, "workspace"):
            arguments.workspace = self.workspace.data_ptr()
        if getattr(self.lib, f"samk_{name}")(self.pointer, ctypes.byref(arguments)) != 0:
            raise RuntimeError(self.lib.samk_last_error().decode())


NOTHING = ctypes.create_string_buffer(64)


def addresses(tensors):
    values = [None if x is None else x.data_ptr() or ctypes.addressof(NOTHING) for x in tensors]
    return (c_void_p * len(values))(*values)


def as_list(tensors):
    return List(addresses(tensors), CODES.get(next(x.dtype for x in tensors if x is not None), 0))


def table(**columns):
    row = torch.zeros(1, COLUMNS, dtype=F64)
    row[0, Column.METRIC] = EUCLIDEAN
    for name, value in columns.items():
        row[0, Column[name]] = value
    return row


def randoms(dtype, sizes=SIZES, scale=1.0):
    return [(torch.randn(n, dtype=F64) * scale).to(dtype) for n in sizes]


def measure(plan, grads, params, rows):
    norm = torch.empty((), dtype=F64)
    plan.run(
        "sq_norm",
        SqNorm(
            grads=as_list(grads),
            params=as_list(params),
            table=rows.data_ptr(),
            root=2.0,
            out=norm.data_ptr(),
        ),
    )
    return norm


@pytest.mark.parametrize("half", [BF16, F16], ids=str)
@pytest.mark.parametrize("metric", [EUCLIDEAN, ADAPTIVE], ids=["euclidean", "adaptive"])
def test_half_gradients_of_fp32_weights(library, half, metric):
    plan, w, g = Plan(library, SIZES), randoms(F32), randoms(half)
    buffers, snapshots = randoms(F32), [torch.full((n,), math.nan) for n in SIZES]
    rows = table(METRIC=metric, ETA=0.1, RHO=0.5, EPS=1e-12, LR=0.1, MOMENTUM=0.9, WEIGHT_DECAY=0.01)
    start, first = [x.clone() for x in w], [x.clone() for x in buffers]

    scale = [x.abs() + 0.1 if metric == ADAPTIVE else torch.ones_like(x) for x in start]
    expected = math.sqrt(
        sum(float(((t * x.float()).double() ** 2).sum()) for t, x in zip(scale, g, strict=True))
    )
    norm = measure(plan, g, w, rows)
    assert float(norm) == pytest.approx(expected, rel=1e-6)

    lists = {"params": as_list(w), "grads": as_list(g), "snapshots": as_list(snapshots)}
    plan.run("perturb", Perturb(**lists, table=rows.data_ptr(), norm=norm.data_ptr()))
    assert all(torch.equal(a, b) for a, b in zip(snapshots, start, strict=True))
    for x, old, t, d in zip(w, start, scale, g, strict=True):
        torch.testing.assert_close(x, old + 0.5 / expected * t * t * d.float(), rtol=2e-6, atol=2e-7)

    plan.run(
        "descend",
        Descend(**lists, state=(List * 2)(as_list(buffers), List()), table=rows.data_ptr(), rule=SGD),
    )
    for x, old, b, b0, d in zip(w, start, buffers, first, g, strict=True):
        moved = 0.9 * b0 + (d.float() + 0.01 * old)
        torch.testing.assert_close(b, moved, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(x, old - 0.1 * moved, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("half", [BF16, F16], ids=str)
@pytest.mark.parametrize("rule", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
def test_half_weights_with_fp32_masters(library, half, rule, safe):
    plan, masters, g = Plan(library, SIZES), randoms(F32), randoms(half)
    w = [x.to(half) for x in masters]
    rows = table(RHO=0.5, EPS=1e-12, LR=0.1, MOMENTUM=0.9, BETA1=0.9, BETA2=0.99, ADAM_EPS=1e-8, DECOUPLED=1)
    rows[0, Column.WEIGHT_DECAY] = 0.0
    start = [x.clone() for x in masters]
    norm = measure(plan, g, w, rows)
    lists = {"params": as_list(w), "grads": as_list(g), "masters": as_list(masters)}
    plan.run("perturb", Perturb(**lists, table=rows.data_ptr(), norm=norm.data_ptr()))
    assert all(torch.equal(a, b) for a, b in zip(masters, start, strict=True)), "masters are only read"
    differs = 0
    for x, old, d in zip(w, start, g, strict=True):
        expected = (old.double() + 0.5 / float(norm) * d.double()).float().to(half)
        torch.testing.assert_close(x.float(), expected.float(), rtol=2.0**-7, atol=1e-6)
        differs += int((x != expected).sum())
    assert differs <= 0.01 * sum(SIZES), "the displacement is rounded once, from the master"

    state = [randoms(F32), [x.abs() for x in randoms(F32)]]
    before = [[x.clone() for x in tensors] for tensors in state]
    steps = [torch.tensor(4.0) for _ in SIZES]
    guard = torch.tensor(1.0 if safe else math.nan, dtype=F64)
    plan.run(
        "descend",
        Descend(
            **lists,
            state=(List * 2)(as_list(state[0]), as_list(state[1]) if rule == ADAM else List()),
            step=addresses(steps) if rule == ADAM else None,
            table=rows.data_ptr(),
            rule=rule,
            guard=guard.data_ptr(),
        ),
    )
    for t, (x, old, master, d) in enumerate(zip(w, start, masters, g, strict=True)):
        m, v = before[0][t], before[1][t]
        if not safe:
            expected = old
            assert torch.equal(state[0][t], m)
        elif rule == SGD:
            expected = old - 0.1 * (0.9 * m + d.float())
        else:
            m, v = m + 0.1 * (d.float() - m), 0.99 * v + 0.01 * d.float() ** 2
            corrected = v.sqrt() / math.sqrt(1 - 0.99**5) + 1e-8
            expected = old - 0.1 / (1 - 0.9**5) * m / corrected
        torch.testing.assert_close(master, expected, rtol=3e-6, atol=3e-6)
        assert torch.equal(x, master.to(half)), "the weights are the rounded masters again"
        assert float(steps[t]) == (5.0 if rule == ADAM and safe else 4.0)


def test_ten_thousand_tensors_take_several_launches_and_one_sum(library):
    sizes = [(t * 7919) % 130 for t in range(10_000)]
    plan, w, g = Plan(library, sizes), randoms(F32, sizes), randoms(F32, sizes)
    rows, snapshots = table(RHO=0.5), [torch.empty(n) for n in sizes]
    start = [x.clone() for x in w]
    norm = measure(plan, g, w, rows)
    assert float(norm) == pytest.approx(math.sqrt(sum(float((x.double() ** 2).sum()) for x in g)), rel=1e-6)
    lists = {"params": as_list(w), "grads": as_list(g), "snapshots": as_list(snapshots)}
    plan.run("perturb", Perturb(**lists, table=rows.data_ptr(), norm=norm.data_ptr()))
    assert torch.equal(torch.cat(snapshots), torch.cat(start))
    torch.testing.assert_close(
        torch.cat(w), torch.cat(start) + 0.5 / float(norm) * torch.cat(g), rtol=2e-6, atol=1e-7
    )
    rows = table(LR=0.1, BETA1=0.9, BETA2=0.99, ADAM_EPS=1e-8)
    steps, state = [torch.zeros(()) for _ in sizes], [[torch.zeros(n) for n in sizes] for _ in range(2)]
    plan.run(
        "descend",
        Descend(
            **lists,
            state=(List * 2)(*map(as_list, state)),
            step=addresses(steps),
            table=rows.data_ptr(),
            rule=ADAM,
        ),
    )
    assert all(float(step) == 1.0 for step in steps)
    # In the first step of Adam the moments are the gradient and its square.
    moved, flat = torch.cat(w) - torch.cat(start), torch.cat(g)
    torch.testing.assert_close(moved, -0.1 * flat / (flat.abs() + 1e-8), rtol=1e-4, atol=1e-6)


def test_mixes_that_are_not_served_are_sentences(library):
    plan, w, g = Plan(library, [4]), randoms(BF16, [4]), randoms(F32, [4])
    rows, norm = table(RHO=0.5), torch.ones((), dtype=F64)
    lists = {"params": as_list(w), "grads": as_list(g), "snapshots": as_list(w)}
    with pytest.raises(RuntimeError, match="perturb_: weights of dtype code 2 with gradients of code 0"):
        plan.run("perturb", Perturb(**lists, table=rows.data_ptr(), norm=norm.data_ptr()))
    lists = {"params": as_list(g), "grads": as_list(g), "masters": as_list(g)}
    with pytest.raises(RuntimeError, match="perturb_: masters are served in fp32 beside"):
        plan.run("perturb", Perturb(**lists, table=rows.data_ptr(), norm=norm.data_ptr()))


def test_scaled_gradients_and_found_inf_keep_every_bit(library):
    plan, w, g = Plan(library, SIZES), randoms(F32), randoms(F32)
    start, snapshots = [x.clone() for x in w], [x.clone() for x in w]
    for x in w:
        x.add_(1.0)
    found, inverse, rows = torch.tensor(2.0), torch.tensor(0.5), table(LR=0.1)
    arguments = Descend(
        params=as_list(w),
        grads=as_list(g),
        snapshots=as_list(snapshots),
        state=(List * 2)(),
        table=rows.data_ptr(),
        rule=SGD,
        found_inf=found.data_ptr(),
        inv_scale=inverse.data_ptr(),
    )
    plan.run("descend", arguments)
    assert all(torch.equal(a, b) for a, b in zip(w, start, strict=True))
    found.zero_()
    plan.run("descend", arguments)
    for x, old, d in zip(w, start, g, strict=True):
        torch.testing.assert_close(x, old - 0.1 * 0.5 * d)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_a_learning_rate_on_the_device_is_followed_and_not_read(monkeypatch, optimizer):
    """A CUDA graph replays the copy of the tensor, so a schedule may change it between replays."""

    def run(rate, change):
        torch.manual_seed(3)
        weight = torch.nn.Parameter(torch.randn(40))
        opt = SAM([weight], optimizer, lr=rate, backend="emulated")
        for step in range(3):
            change(opt.param_groups[0], 0.1 / (step + 1))
            weight.grad = torch.randn(40)
            opt.first_step()
            weight.grad = torch.randn(40)
            opt.second_step()
        return weight.detach(), opt

    expected, _ = run(0.1, lambda group, value: group.update(lr=value))
    # On this machine every tensor is on the CPU: let those count as the device's.
    monkeypatch.setattr(tensor_groups, "lives_on_device", lambda value: isinstance(value, torch.Tensor))
    got, opt = run(torch.tensor(0.1), lambda group, value: group["lr"].fill_(value))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    ((group, _),) = opt._served
    assert group.follows_tensors and group.rows[0][Column.LR] == 0.0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("count", "launches"), [(161, 3), (580, 3), (1400, {"SGD": 2 + 2 + 2, "AdamW": 2 + 2 + 3})]
)
def test_a_step_is_three_launches(optimizer, count, launches):
    """Norm, perturb, descend: one launch each for up to 580 tensors, with the root taken in the first."""
    kernel_launches = ctypes.CDLL(str(emulated.LIBRARY)).samk_shim_launches
    kernel_launches.restype = ctypes.c_uint64
    weights = [torch.nn.Parameter(torch.randn(5)) for _ in range(count)]
    momentum = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    opt = SAM(weights, optimizer, lr=0.1, backend="emulated", **momentum)
    for _ in range(2):
        before = kernel_launches()
        for step in (opt.first_step, opt.second_step):
            for weight in weights:
                weight.grad = torch.randn(5)
            step()
        expected = launches if isinstance(launches, int) else launches[optimizer.__name__]
        assert kernel_launches() - before == expected


def test_a_long_tensor_sums_its_chunks_in_one_order(library):
    sizes = [5, 100 * 2048 + 3, 40 * 2048, 0]
    plan, g = Plan(library, sizes), randoms(F32, sizes)
    expected = [float((x.double() ** 2).sum()) for x in g]
    rows, found = table(), []
    try:
        for seed in (0, 1, 2):
            library.samk_shim_seed(seed)
            each, total = torch.full((4,), math.nan, dtype=F64), torch.empty((), dtype=F64)
            arguments = SqNorm(grads=as_list(g), table=rows.data_ptr(), out=total.data_ptr())
            arguments.per_tensor = each.data_ptr()
            plan.run("sq_norm", arguments)
            found.append(each.tolist())
    finally:
        library.samk_shim_seed(0)
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx(expected, rel=1e-6)


# ---- masks ----

# Chunks of several sizes begin and end within these; every third word of a mask is 0.
MASKED = [0, 1, 63, 64, 65, 2047, 2048, 2049, 3 * 2048 + 130, 7000]
orders = pytest.mark.parametrize("order", [0, 1, 2])


@contextmanager
def shuffled(library, order):
    """Blocks, and threads between barriers, in another order."""
    library.samk_shim_seed(order)
    try:
        yield
    finally:
        library.samk_shim_seed(0)


def make_masks(sizes, dense=(), seed=0):
    random, masks = torch.Generator().manual_seed(seed), []
    for t, n in enumerate(sizes):
        bits = (torch.rand(n, generator=random) < 0.4) & (torch.arange(n) // 64 % 3 != 1)
        masks.append(None if t in dense else pack(bits))
    return masks


def bits_of(masks, sizes):
    return [
        torch.ones(n, dtype=torch.bool) if x is None else unpack(x, torch.zeros(n))
        for x, n in zip(masks, sizes, strict=True)
    ]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def clones(tensors):
    return [x.clone() for x in tensors]


@orders
@pytest.mark.parametrize(("weight", "grad"), [(F32, F32), (F32, BF16), (F16, F16)], ids=str)
@pytest.mark.parametrize("rule", [SGD, ADAM], ids=["sgd", "adam"])
def test_masked_passes_give_the_bits_of_the_dense_ones_in_any_order(library, order, weight, grad, rule):
    plan, w, g = Plan(library, MASKED), randoms(weight, MASKED), randoms(grad, MASKED)
    masks = make_masks(MASKED, dense=(5,))
    chosen, start, twin, saved = bits_of(masks, MASKED), clones(w), clones(w), clones(w)
    snapshots = [torch.full((n,), math.nan, dtype=weight) for n in MASKED]
    rows, norm = table(RHO=0.5, LR=0.1, MOMENTUM=0.9, BETA1=0.9, BETA2=0.99, ADAM_EPS=1e-8), scalar_of(3.0)
    lists = {"params": as_list(w), "grads": as_list(g), "snapshots": as_list(snapshots)}
    masked = {**lists, "masks": as_list(masks)}
    plan.run(
        "perturb",
        Perturb(
            params=as_list(twin),
            grads=as_list(g),
            snapshots=as_list(saved),
            table=rows.data_ptr(),
            norm=norm.data_ptr(),
        ),
    )
    with shuffled(library, order):
        plan.run("perturb", Perturb(**masked, table=rows.data_ptr(), norm=norm.data_ptr()))
    assert same(w, [torch.where(m, x, y) for m, x, y in zip(chosen, twin, start, strict=True)])
    for words, snapshot, old in zip(masks, snapshots, start, strict=True):
        whole = torch.ones(()) if words is None else (words != 0).repeat_interleave(64)[: len(old)]
        assert torch.equal(snapshot.nan_to_num(9), torch.where(whole != 0, old, 9))
    perturbed = clones(w)
    with shuffled(library, order):
        plan.run(
            "restore", Restore(params=lists["params"], snapshots=lists["snapshots"], masks=masked["masks"])
        )
    assert same(w, start)

    state = [clones(start), [x.abs() for x in start]]
    steps = [torch.tensor(4.0) for _ in MASKED]

    def descend(params, **more):
        moments, counters = [clones(x) for x in state], clones(steps)
        arguments = Descend(
            params=as_list(params),
            grads=as_list(g),
            state=(List * 2)(as_list(moments[0]), as_list(moments[1]) if rule == ADAM else List()),
            step=addresses(counters) if rule == ADAM else None,
            table=rows.data_ptr(),
            rule=rule,
            **more,
        )
        plan.run("descend", arguments)
        return params + moments[0] + moments[1] + counters

    expected = descend(clones(start))
    before = {"snapshots": lists["snapshots"], "masks": masked["masks"]}
    with shuffled(library, order):
        assert same(descend(clones(perturbed), **before), expected)
        guard = scalar_of(math.inf)
        skipped = descend(clones(perturbed), **before, guard=guard.data_ptr())
    assert same(skipped, start + state[0] + state[1] + steps)


def scalar_of(value):
    return torch.tensor(value, dtype=F64)


@orders
@pytest.mark.parametrize("half", [BF16, F16], ids=str)
def test_masks_beside_masters(library, order, half):
    plan, masters, g = Plan(library, MASKED), randoms(F32, MASKED), randoms(half, MASKED)
    masks = make_masks(MASKED, dense=(5,))
    chosen, w, twin = bits_of(masks, MASKED), [x.to(half) for x in masters], [x.to(half) for x in masters]
    start, rows, norm = clones(w), table(RHO=0.5, LR=0.1), scalar_of(3.0)
    more = {"grads": as_list(g), "masters": as_list(masters), "table": rows.data_ptr()}
    plan.run("perturb", Perturb(**more, params=as_list(twin), norm=norm.data_ptr()))
    masked = {**more, "params": as_list(w), "masks": as_list(masks)}
    with shuffled(library, order):
        plan.run("perturb", Perturb(**masked, norm=norm.data_ptr()))
    assert same(w, [torch.where(m, x, y) for m, x, y in zip(chosen, twin, start, strict=True)])
    moved = [x - 0.1 * d.float() for x, d in zip(masters, g, strict=True)]
    plan.run("descend", Descend(**masked, state=(List * 2)(), rule=SGD))
    for x, master, expected in zip(w, masters, moved, strict=True):
        torch.testing.assert_close(master, expected)
        assert torch.equal(x, master.to(half))


@pytest.mark.parametrize("root", [1.0, 2.0])
def test_a_masked_sum_has_one_order_and_a_second_look_under_the_mask(library, root):
    plan, masks = Plan(library, MASKED), make_masks(MASKED, dense=(5,))
    chosen, rows = bits_of(masks, MASKED), table()
    for scale in (1.0, 1e-25, 1e25):  # the last two add up in double only
        g = [torch.where(m, x * scale, math.nan) for m, x in zip(chosen, randoms(F32, MASKED), strict=True)]
        expected = sum(float((x[m].double() ** 2).sum()) for m, x in zip(chosen, g, strict=True))
        found = set()
        for order in (0, 1, 2):
            norm = torch.empty((), dtype=F64)
            arguments = SqNorm(grads=as_list(g), masks=as_list(masks), table=rows.data_ptr(), root=root)
            arguments.out = norm.data_ptr()
            with shuffled(library, order):
                plan.run("sq_norm", arguments)
            found.add(float(norm))
        assert len(found) == 1
        assert found.pop() == pytest.approx(expected ** (1 / root), rel=1e-6)


@contextmanager
def closed(*tensors):
    """Nobody may touch the middle page of these tensors of three: who does ends the process."""
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    middle = [x.data_ptr() + mmap.PAGESIZE for x in tensors]
    try:
        for at in middle:
            assert protect(c_void_p(at), mmap.PAGESIZE, 0) == 0
        yield
    finally:
        for at in middle:
            assert protect(c_void_p(at), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


def test_where_a_word_is_zero_nothing_but_the_word_is_read_or_written(library):
    page = mmap.PAGESIZE // 4
    plan = Plan(library, [3 * page])
    w, g, snapshot, scores = (
        torch.frombuffer(mmap.mmap(-1, 3 * mmap.PAGESIZE), dtype=F32).fill_(value) for value in (1, 2, 3, 4)
    )
    bits = torch.rand(3 * page) < 0.5
    bits[page : 2 * page] = False
    words, rows, norm = pack(bits), table(RHO=1.5, LR=0.25), scalar_of(3.0)
    lists = {"params": as_list([w]), "snapshots": as_list([snapshot]), "masks": as_list([words])}
    more = {"grads": as_list([g]), "table": rows.data_ptr()}
    with closed(w, g, snapshot):
        total = torch.empty((), dtype=F64)
        plan.run("sq_norm", SqNorm(**more, masks=lists["masks"], out=total.data_ptr()))
        plan.run("perturb", Perturb(**lists, **more, norm=norm.data_ptr()))
    assert float(total) == 4.0 * int(bits.sum())
    assert torch.equal(w, torch.where(bits, 2.0, 1.0))
    with closed(w, snapshot):
        plan.run("restore", Restore(**lists))
        bad = scalar_of(math.nan)
        plan.run("perturb", Perturb(**lists, **more, norm=bad.data_ptr()))
    assert (w == 1).all()
    with closed(snapshot):
        plan.run("descend", Descend(**lists, **more, state=(List * 2)(), rule=SGD))
    assert (w == 0.5).all()
    ranks, counts = Ranks(scores=as_list([scores]), within=lists["masks"]), torch.zeros(1, dtype=torch.int64)
    marked = torch.full_like(words, -1)
    with closed(scores):
        plan.run("count", Count(ranks=ranks, masks=as_list([marked]), shift=31, counts=counts.data_ptr()))
        plan.run("mark", Mark(ranks=ranks, masks=as_list([marked]), threshold=-1))
    assert int(counts) == int(bits.sum()) and torch.equal(marked, words)


# ---- selection ----


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("is_random", [False, True], ids=["scores", "random"])
def test_a_selection_over_several_launches_is_the_same_in_any_order(library, dtype, is_random):
    """Numbers and positions go with their tensors, and a warp's candidates never share a place."""
    sizes = [(t * 7919) % 200 for t in range(1500)] + [9000, 2048]
    plan, scores = Plan(library, sizes), randoms(dtype, sizes)
    numbers = [3 * t + 1 for t in range(len(sizes))]
    starts = np.concatenate([[0], np.cumsum([64 * count_words(n) for n in sizes])[:-1]])
    within = make_masks(sizes, dense=range(0, 1500, 7))
    ranks, part = Ranks(within=as_list(within)), bits_of(within, sizes)
    if is_random:
        ranks.is_random, ranks.seed, ranks.step = 1, 5 << 40 | 3, 9
        ranks.number = (c_uint32 * len(sizes))(*numbers)
        truth = [
            random_word(5 << 40 | 3, 9, number, np.arange(n)).astype(np.int64) >> 1
            for number, n in zip(numbers, sizes, strict=True)
        ]
    else:
        ranks.scores = as_list(scores)
        truth = [x.float().abs().view(torch.int32).numpy().astype(np.int64) for x in scores]
    flat = np.concatenate(truth)
    here = torch.cat(part).numpy()
    place = np.concatenate([start + np.arange(n) for start, n in zip(starts, sizes, strict=True)])
    threshold = int(np.sort(flat[here])[int(here.sum()) // 2]) >> 20
    at = here & (flat >> 20 == threshold)
    candidates = sorted((flat[at] % (1 << 20) << 43 | (1 << 43) - 1 - place[at]).tolist())
    for order in (0, 1, 2):
        counts, found = torch.zeros(2048, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        got = torch.full((len(candidates) + 7,), -1, dtype=torch.int64)
        words = [torch.full((count_words(n),), -1) for n in sizes]
        with shuffled(library, order):
            plan.run(
                "count",
                Count(ranks=ranks, masks=as_list(words), shift=20, bits=11, counts=counts.data_ptr()),
            )
            plan.run(
                "mark",
                Mark(
                    ranks=ranks,
                    masks=as_list(words),
                    threshold=threshold,
                    shift=20,
                    position=(c_int64 * len(sizes))(*starts.tolist()),
                    candidates=got.data_ptr(),
                    capacity=len(got),
                    found=found.data_ptr(),
                ),
            )
        assert np.array_equal(counts.numpy(), np.bincount(flat[here] >> 20, minlength=2048))
        assert np.array_equal(torch.cat(bits_of(words, sizes)).numpy(), here & (flat >> 20 > threshold))
        assert int(found) == len(candidates) and (got[len(candidates) :] == -1).all()
        assert sorted(got[: len(candidates)].tolist()) == candidates


def test_equal_ranks_all_fall_into_one_bin_and_all_are_candidates(library):
    """The bin of a block takes every one of its threads, and a counter every warp."""
    sizes = [40_000, 1, 63]
    plan, total, scores = Plan(library, sizes), sum(sizes), [torch.ones(n) for n in sizes]
    words = [torch.zeros(count_words(n), dtype=torch.int64) for n in sizes]
    ranks = Ranks(scores=as_list(scores))
    counts, found = torch.full((2,), 5, dtype=torch.int64), torch.tensor([1 << 40])
    plan.run("count", Count(ranks=ranks, masks=as_list(words), shift=30, bits=1, counts=counts.data_ptr()))
    assert counts.tolist() == [5 + total, 5]
    mark = Mark(ranks=ranks, masks=as_list(words), threshold=0x3F800000 >> 20, shift=20, capacity=10)
    room = torch.zeros(10, dtype=torch.int64)
    mark.position = (c_int64 * 3)(0, 1 << 20, 1 << 40)
    mark.candidates, mark.found = room.data_ptr(), found.data_ptr()
    plan.run("mark", mark)
    assert int(found) == (1 << 40) + total and not room.any(), "it is counted from where the counter stands"
    assert not torch.cat(words).any()


def test_selections_that_are_not_served_are_sentences(library):
    plan, scores = Plan(library, [4]), as_list([torch.ones(4)])
    words, room = torch.zeros(1, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    ranks, masks = Ranks(scores=scores), as_list([words])

    def refused(name, arguments, sentence):
        with pytest.raises(RuntimeError, match=sentence):
            plan.run(name, arguments)

    refused("count", Count(ranks=ranks, masks=masks, bits=12), "count_ranks: expected 0 to 11 bits")
    refused("count", Count(ranks=ranks, masks=masks, shift=32), "count_ranks: expected a shift of 0 to 31")
    refused("mark", Mark(ranks=ranks, masks=masks, shift=-1), "mark_: expected a shift of 0 to 31")
    refused("mark", Mark(ranks=Ranks(is_random=1), masks=masks), "mark_: random ranks need the number of")
    wants = Mark(ranks=ranks, masks=masks, candidates=room.data_ptr(), capacity=8, found=room.data_ptr())
    refused("mark", wants, "mark_: candidates need the position of every tensor")
    halves = as_list([torch.ones(4, dtype=BF16)])
    refused("accumulate", Accumulate(scores=halves, grads=scores), "accumulate_: scores are fp32")


# ---- devices ----


def refusal(library, device=0):
    try:
        library.check_device(device)
    except RuntimeError as problem:
        return str(problem)
    return None


@pytest.mark.parametrize(
    ("driver", "capability", "status", "sentence"),
    [
        (12010, 70, 0, None),
        (13000, 103, 0, None),
        (12000, 90, 0, r"need a driver for CUDA 12\.1 or newer \(R530\), and this one is for CUDA 12\.0$"),
        (11080, 90, 0, r"this one is for CUDA 11\.8$"),
        (12010, 61, 0, r"need compute capability 7\.0"),
        (
            13000,
            70,
            209,
            r"no kernels for sm_70 \(CUDA device 0\); it was built with .*CUDA_ARCHS=70, .*image",
        ),
        (13000, 103, 98, r"no kernels for sm_103 .*invalid device function"),
        (12010, 120, 222, r"no kernels for sm_120 .*unsupported toolchain"),
    ],
)
def test_a_device_that_cannot_run_the_kernels_is_refused(tmp_path, driver, capability, status, sentence):
    path = shutil.copy(emulated.LIBRARY, tmp_path)  # a library of its own: it keeps its answer
    pretend = ctypes.CDLL(path).samk_shim_pretend
    pretend(driver, capability, status)
    library = native._native.Library(str(path))
    answer = refusal(library)
    assert answer is None if sentence is None else re.search(sentence, answer)
    pretend(12010, 90, 209 if sentence is None else 0)
    assert refusal(library) == answer, "it is asked once"


def test_a_device_that_has_no_memory_now_is_asked_again(tmp_path):
    path = shutil.copy(emulated.LIBRARY, tmp_path)
    pretend = ctypes.CDLL(path).samk_shim_pretend
    library = native._native.Library(str(path))
    pretend(12010, 90, 2)
    assert refusal(library) == "device: CUDA error 2, out of memory"
    pretend(12010, 90, 0)
    assert refusal(library) is None


def test_a_device_that_is_not_there_is_a_sentence():
    library = native._native.Library(str(emulated.LIBRARY))
    for index in (-1, 1):
        assert refusal(library, index) == f"CUDA device {index} does not exist; there are 1"
