"""What the CUDA kernels serve beyond the other engines, through the C ABI.

Half gradients of fp32 weights, fp32 masters of half weights, lists that take several launches.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int32, c_int64, c_uint8, c_void_p

import emulated
import pytest
import torch

from sam_kernels import SAM, state
from sam_kernels.backends import native
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
        ("row", POINTER(c_int32)),
        ("table", c_void_p),
        ("shape", c_int32),
        ("q", c_double),
        ("peak", c_void_p),
        ("norm", c_void_p),
        ("tensor_scale", c_void_p),
        ("queue", Queue),
    ]


class Descend(Structure):
    _fields_ = [
        ("params", List),
        ("grads", List),
        ("snapshots", List),
        ("masters", List),
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


@pytest.fixture(scope="module")
def library():
    lib = ctypes.CDLL(str(emulated.LIBRARY))
    lib.samk_plan_create.restype = c_void_p
    lib.samk_plan_create.argtypes = [POINTER(c_int64), c_int64]
    lib.samk_plan_destroy.argtypes = [c_void_p]
    lib.samk_plan_workspace_bytes.restype = c_int64
    lib.samk_plan_workspace_bytes.argtypes = [c_void_p]
    lib.samk_last_error.restype = c_char_p
    for name in ("sq_norm", "perturb", "descend"):
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
    return List(addresses(tensors), CODES[next(x.dtype for x in tensors if x is not None)])


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
    monkeypatch.setattr(state, "lives_on_device", lambda value: isinstance(value, torch.Tensor))
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
