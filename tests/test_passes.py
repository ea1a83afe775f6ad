"""The six passes: reference against float64 formulas, every other backend against the reference."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import emulated
import interpreted
import numpy as np
import pytest
import torch
from torch import Tensor

from sam_kernels.backends import foreach, native, reference, triton
from sam_kernels.tensor_groups import ADAPTIVE, COLUMNS, EUCLIDEAN, FISHER, FIXED, Column, TensorGroup

pytestmark = pytest.mark.usefixtures("poisoned_empty", "no_grad")

HEADER = Path(__file__).parent.parent / "csrc" / "sam_kernels.h"

no_native = pytest.mark.skipif(native._native is None, reason=str(native._problem))
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and nothing to refuse")


def on(backend, device="cpu"):
    return SimpleNamespace(backend=backend, device=device)


# The backends that are compared with the reference, and where they run.
REFERENCE = pytest.param(on(reference.BACKEND), id="reference")
FOREACH = pytest.param(on(foreach.BACKEND), id="foreach")
NATIVE = pytest.param(on(native.BACKEND), id="native", marks=no_native)
EMULATED = pytest.param(on(emulated.BACKEND), id="emulated", marks=emulated.needed)
INTERPRETED = pytest.param(on(interpreted.BACKEND), id="interpreted", marks=interpreted.needed)


def on_cuda(backend):
    """The backend on the GPU, skipped with its own sentence if it refuses; nothing where there is no GPU."""
    if not torch.cuda.is_available():
        return []
    asked = {"device": torch.device("cuda", 0), "dtype": torch.float32, "dense": True, "compact": False}
    reason = backend.refusal(SimpleNamespace(**asked))
    mark = pytest.mark.skipif(reason is not None, reason=str(reason))
    return [pytest.param(on(backend, "cuda"), id=f"{backend.name}-cuda", marks=mark)]


FOREACH_CUDA = on_cuda(foreach.BACKEND)
NATIVE_CUDA = on_cuda(native.BACKEND)
TRITON_CUDA = on_cuda(triton.BACKEND)
# Those that walk whole blocks of lists of one dtype.
KERNELS = [NATIVE, *NATIVE_CUDA, EMULATED, INTERPRETED, *TRITON_CUDA]
OTHERS = [FOREACH, *FOREACH_CUDA, *KERNELS]
ALL = [REFERENCE, *OTHERS]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (F32, F64, BF16, F16)]
HALF = (BF16, F16)

# Elementwise results of order 1. Opmath results differ by a few roundings (fma or not, one order of
# factors or another); a half type may then round to the neighbour, which is one unit in the last place.
UNIT = {F64: 2.0**-52, F32: 2.0**-23, BF16: 2.0**-7, F16: 2.0**-10}
ROUNDINGS = {F64: 16, F32: 16, BF16: 1, F16: 1}
# ... which happens where opmath lands within its own error of a tie: far below one element in 100.
NEIGHBOURS = 0.01
# fp32 sums over at most 65536 elements, float64 beyond: 2e-5 was the worst of constant gradients.
SUM = {F64: 1e-12, F32: 3e-5, BF16: 3e-5, F16: 3e-5}
# fp32 powers: the exponent multiplies the error of the logarithm.
POWER = 64

# One element, around a SIMD lane, around the chunks of the engines, and empties first, between and last.
# In MIXED each of three rows in turn meets tensors with and without elements.
LANES = [(0,), (1,), (7,), (8,), (9,), (15,), (16,), (17,), (31,), (33,), (64,)]
CHUNKS = [(16383,), (16384,), (16385,)]
MIXED = [(3, 5), (17, 31), (0,), (1000,), (5, 4, 3, 3), (1,), (2, 0, 3), (0,)]

# A plain row, an adaptive one and one that takes no part, with every scalar different from its neutral.
ROWS = [
    {Column.METRIC: EUCLIDEAN, Column.RHO: 0.5, Column.EPS: 1e-12, Column.LR: 0.1},
    {Column.METRIC: ADAPTIVE, Column.ETA: 0.01, Column.RHO: -0.3, Column.EPS: 1e-3, Column.LR: 0.2},
    {Column.METRIC: FIXED, Column.RHO: 7.0, Column.LR: 0.3},
]
# Fisher's metric is served for norms of order 2 alone, so it is no row of the others.
FISHER_ROWS = [
    {Column.METRIC: FISHER, Column.ETA: 3.0, Column.RHO: 0.5, Column.EPS: 1e-12},
    {Column.METRIC: FISHER, Column.ETA: 0.2, Column.RHO: -0.3, Column.EPS: 1e-3},
    ROWS[1],
]


@pytest.fixture
def no_grad():
    """Backends are called under no_grad."""
    with torch.no_grad():
        yield


# ---- groups ----------------------------------------------------------------------------------------


def make_tensor(shape, dtype, memory, device="cpu"):
    """Standard normal values in a dense tensor: contiguous, off a cache line, or channels last."""
    values = torch.randn(shape, dtype=F64).to(dtype)  # on the CPU: the same everywhere
    if memory == "misaligned":
        block = torch.zeros(values.numel() + 1, dtype=dtype, device=device)
        return block[1:].view(shape).copy_(values)
    if memory == "channels_last" and values.dim() == 4:
        return values.to(device, memory_format=torch.channels_last)
    return values.to(device)


def make_group(
    dtype=F32, shapes=MIXED, *, rows=ROWS, missing=(), memory="plain", device="cpu", snapshots=True, seed=0
):
    """A tensor group with random weights and gradients; the same seed gives the same bits.

    Tensors use the rows in turn. `missing` indices have no gradient. Where the passes would perturb,
    `snapshots` hands out buffers of NaN.
    """
    torch.manual_seed(seed)
    params = [make_tensor(s, dtype, memory, device).requires_grad_() for s in shapes]
    grads = [make_tensor(s, dtype, memory, device) for s in shapes]
    row = [t % len(rows) for t in range(len(shapes))]
    keys = [(0, int(r[Column.METRIC]), r.get(Column.ETA, 0.0)) for r in rows]
    group = TensorGroup(params, row, keys)
    group.write_table([tuple(float(r.get(Column(c), 0.0)) for c in range(14)) for r in rows])
    group.grads = [None if t in missing else g for t, g in enumerate(grads)]
    if snapshots:
        take_snapshots(group)
    return group


def take_snapshots(group):
    group.snapshots = [
        torch.full_like(p, math.nan, requires_grad=False)
        if g is not None and group.keys[r][1] != FIXED
        else None
        for p, g, r in zip(group.params, group.grads, group.row, strict=True)
    ]


def scalar(value, device="cpu"):
    return torch.tensor(value, dtype=F64, device=device)


def copies(tensors):
    return [None if x is None else x.detach().clone() for x in tensors]


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def same_bits(xs, ys) -> bool:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        (x is None and y is None)
        or torch.equal(*(z.detach().cpu().contiguous().view(kinds[z.element_size()]) for z in (x, y)))
        for x, y in zip(xs, ys, strict=True)
    )


def assert_close(got, expected, dtype, *, roundings=1.0, what=""):
    """Every tensor within the stated roundings, and half types equal in nearly all elements."""
    different = total = 0
    for t, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert (x is None) == (y is None), f"{what}[{t}]"
        if x is None or x.numel() == 0:
            continue
        x, y = numbers(x), numbers(y) if isinstance(y, Tensor) else y
        allowed = UNIT[dtype] * ROUNDINGS[dtype] * (1 if dtype in HALF else roundings)
        # Relative to the larger of the element and 1, the size of the numbers that were added.
        excess = np.abs(x - y) / np.maximum(np.abs(y), 1.0)
        assert not np.isnan(x).any(), f"{what}[{t}] holds NaN"
        assert excess.max() <= allowed, f"{what}[{t}]: off by {excess.max():.3g}, allowed {allowed:.3g}"
        different += int((x != y).sum())
        total += x.size
    if dtype in HALF and total > 100:
        assert different <= NEIGHBOURS * total, f"{what}: {different} of {total} elements differ"


# ---- the formulas, in numpy and float64 ------------------------------------------------------------


def oracle_weight(w, g, row):
    if row[Column.METRIC] == FISHER:
        return (1 + row[Column.ETA] * g**2) ** -0.5
    return np.abs(w) + row.get(Column.ETA, 0.0) if row[Column.METRIC] == ADAPTIVE else np.ones_like(w)


def oracle_u(group, rows=ROWS):
    """T g per tensor, None where it takes no part."""
    return [
        None
        if g is None or rows[r][Column.METRIC] == FIXED
        else oracle_weight(numbers(p), numbers(g), rows[r]) * numbers(g)
        for p, g, r in zip(group.params, group.grads, group.row, strict=True)
    ]


def oracle_sums(us, kind, q=None, peak=None):
    def one(u):
        if u is None or u.size == 0:
            return 0.0
        if kind == "square":
            return float(np.sum(u**2))
        return float(np.max(np.abs(u))) if kind == "peak" else float(np.sum((np.abs(u) / peak) ** q))

    return np.array([one(u) for u in us])


def oracle_perturbed(group, norm, shape, q=None, peak=None, tensor_scale=None, rows=ROWS):
    new = []
    for t, (p, u, r) in enumerate(zip(group.params, oracle_u(group, rows), group.row, strict=True)):
        w = numbers(p)
        if u is None:
            new.append(w)
            continue
        row = rows[r]
        h = {"linear": lambda u: u, "sign": np.sign}.get(
            shape, lambda u: np.sign(u) * (np.abs(u) / peak) ** (q - 1)
        )
        scale = row[Column.RHO] if shape == "sign" else row[Column.RHO] / (norm + row[Column.EPS])
        scale *= 1.0 if tensor_scale is None else tensor_scale[t]
        new.append(w + scale * oracle_weight(w, numbers(group.grads[t]), row) * h(u))
    return new


# How each order of the ball is measured and perturbed: p -> (moment, shape, q).
BALLS = {
    2: ("square", "linear", None),
    math.inf: ("peak", "sign", None),
    4: ("power", "powered", 4 / 3),
    1.5: ("power", "powered", 3.0),
}
balls = pytest.mark.parametrize("p", BALLS)


def measure(backend, group, p):
    """norm, and the keywords of perturb_ that go with it."""
    moment, shape, q = BALLS[p]
    if p == 2:
        return backend.sq_norm(group).sqrt(), {}
    peak = backend.sq_norm(group, moment="peak")
    if p == math.inf:
        return peak, {"shape": shape}
    return backend.sq_norm(group, moment=moment, q=q, peak=peak) ** (1 / p), {
        "shape": shape,
        "q": q,
        "peak": peak,
    }


# ---- sq_norm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@balls
@pytest.mark.parametrize("missing", [(), (0, 4), (3,)], ids=str)
def test_sq_norm_is_its_formula(side, dtype, p, missing):
    group = make_group(dtype, missing=missing, device=side.device)
    moment, _, q = BALLS[p]
    us = oracle_u(group)
    peak = max(oracle_sums(us, "peak"))
    expected = oracle_sums(us, moment, q, peak)
    arguments = {"moment": moment, "q": q, "peak": scalar(peak, side.device)} if q else {"moment": moment}
    total = side.backend.sq_norm(group, **arguments)
    each = side.backend.sq_norm(group, per_tensor=True, **arguments)
    assert total.shape == () and total.dtype == F64 and total.device == group.device
    assert each.shape == (len(group.params),) and each.dtype == F64
    tolerance = SUM[dtype] * (4 if q else 1)
    np.testing.assert_allclose(
        numbers(total), expected.max() if p == math.inf else expected.sum(), rtol=tolerance
    )
    np.testing.assert_allclose(numbers(each), expected, rtol=tolerance)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moment", ["square", "peak"])
def test_sq_norm_of_weights_is_plain_and_of_the_same_tensors(side, dtype, moment):
    group = make_group(dtype, missing=(3,), device=side.device)
    measured = [None if u is None else numbers(p) for u, p in zip(oracle_u(group), group.params, strict=True)]
    each = side.backend.sq_norm(group, of="weight", moment=moment, per_tensor=True)
    total = side.backend.sq_norm(group, of="weight", moment=moment)
    expected = oracle_sums(measured, moment)
    np.testing.assert_allclose(numbers(each), expected, rtol=SUM[dtype])
    np.testing.assert_allclose(
        numbers(total), expected.sum() if moment == "square" else expected.max(), rtol=SUM[dtype]
    )


@pytest.mark.parametrize("side", OTHERS)
@pytest.mark.parametrize("shapes", [LANES, CHUNKS], ids=["lanes", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES)
@balls
def test_sq_norm_of_every_size(side, shapes, dtype, p):
    group = make_group(dtype, shapes, rows=ROWS[:2], device=side.device)
    moment, _, q = BALLS[p]
    arguments = {"moment": moment}
    if q:
        arguments |= {"q": q, "peak": reference.BACKEND.sq_norm(group, moment="peak")}
    expected = reference.BACKEND.sq_norm(group, per_tensor=True, **arguments)
    np.testing.assert_allclose(
        numbers(side.backend.sq_norm(group, per_tensor=True, **arguments)),
        numbers(expected),
        rtol=4 * SUM[dtype],
    )


@pytest.mark.parametrize("side", OTHERS)
def test_sq_norm_of_a_long_constant_tensor_keeps_its_digits(side):
    # Equal addends make a single fp32 accumulator drift: torch's own norm is 1 % off here.
    group = make_group(F32, [(1 << 22,)], rows=ROWS[:1], device=side.device, snapshots=False)
    group.grads[0].fill_(0.1)
    expected = numbers(group.grads[0].double().square().sum())
    np.testing.assert_allclose(numbers(side.backend.sq_norm(group)), expected, rtol=SUM[F32])


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("root", [1.0, 2.0, 3.0])
def test_the_root_is_taken_of_the_whole_sum_only(side, root):
    group = make_group(F32, rows=ROWS[:1], device=side.device, snapshots=False)
    total = numbers(side.backend.sq_norm(group))
    np.testing.assert_allclose(
        numbers(side.backend.sq_norm(group, root=root)), total ** (1 / root), rtol=1e-15
    )
    each = numbers(side.backend.sq_norm(group, root=root, per_tensor=True))
    np.testing.assert_allclose(each.sum(), total, rtol=SUM[F32])


@pytest.mark.parametrize("side", [REFERENCE, *KERNELS])
@pytest.mark.parametrize("size", [1e25, 1e-24], ids=str)
@pytest.mark.parametrize("metric", [EUCLIDEAN, ADAPTIVE])
def test_squares_may_leave_the_range_of_fp32(side, size, metric):
    rows = [{Column.METRIC: metric, Column.ETA: 1.0, Column.RHO: 0.1, Column.EPS: 0.0}]
    group = make_group(F32, [(3,), (16390,), (40,)], rows=rows, device=side.device, snapshots=False)
    for g in group.grads:
        g.mul_(size)
    expected = sum(float((u**2).sum()) for u in oracle_u(group, rows))
    got = float(side.backend.sq_norm(group))
    if size > 1:
        assert got == pytest.approx(expected, rel=SUM[F32])
    else:  # squares that underflow on the way are smaller than what fp32 keeps of the others
        assert got == pytest.approx(expected, rel=1e-3) or got == 0.0


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("moment", ["square", "peak", "power"])
@pytest.mark.parametrize("metric", [EUCLIDEAN, ADAPTIVE])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", [(0, 0), (1, 40), (2, 16399)], ids=str)
def test_one_bad_gradient_makes_every_sum_bad(side, moment, metric, bad, where):
    rows = [{Column.METRIC: metric, Column.RHO: 0.5}]
    group = make_group(F32, [(5,), (41,), (16400,)], rows=rows, device=side.device, snapshots=False)
    tensor, element = where
    group.params[tensor][element] = 0.0  # T = 0 times infinity must not vanish
    group.grads[tensor][element] = bad
    arguments = {"moment": moment}
    if moment == "power":
        arguments |= {"q": 4 / 3, "peak": side.backend.sq_norm(group, moment="peak")}
    assert not torch.isfinite(side.backend.sq_norm(group, **arguments))
    each = torch.isfinite(side.backend.sq_norm(group, per_tensor=True, **arguments)).tolist()
    assert not each[tensor]


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("missing", [range(8), ()], ids=["no gradients", "all fixed"])
def test_sq_norm_over_nothing_is_zero(side, missing):
    rows = ROWS if missing else ROWS[2:]
    group = make_group(F32, rows=rows, missing=missing, device=side.device)
    for moment in ("square", "peak"):
        assert side.backend.sq_norm(group, moment=moment).item() == 0.0
        assert side.backend.sq_norm(group, moment=moment, per_tensor=True).tolist() == [0.0] * 8


@pytest.mark.parametrize("side", ALL)
def test_sq_norm_returns_a_result_that_the_next_call_leaves_alone(side):
    group = make_group(device=side.device)
    first = side.backend.sq_norm(group)
    kept = first.clone()
    group.grads = [None if g is None else 2 * g for g in group.grads]
    second = side.backend.sq_norm(group)
    assert first == kept and second != kept


@pytest.mark.parametrize("side", ALL)
def test_sq_norm_writes_nothing(side):
    group = make_group(device=side.device)
    before = copies(group.params + group.grads)
    versions = [x._version for x in group.params + group.grads]
    measure(side.backend, group, 1.5)
    assert same_bits(group.params + group.grads, before)
    assert [x._version for x in group.params + group.grads] == versions


# ---- perturb_ --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@balls
@pytest.mark.parametrize("scaled", [False, True], ids=["", "tensor_scale"])
@pytest.mark.parametrize("missing", [(), (0, 3)], ids=str)
def test_perturb_is_its_formula(side, dtype, p, scaled, missing):
    group = make_group(dtype, missing=missing, device=side.device)
    before = copies(group.params)
    norm, arguments = measure(side.backend, group, p)
    norm = norm / 8  # the perturbation then reaches well into the digits of a half type
    scales = torch.rand(len(group.params), dtype=F64) + 0.5 if scaled else None
    if scaled:
        arguments["tensor_scale"] = scales.to(side.device)
    _, shape, q = BALLS[p]
    peak = numbers(arguments["peak"]) if q else None
    expected = oracle_perturbed(
        group, numbers(norm), shape, q, peak, None if scales is None else scales.numpy()
    )
    if dtype in HALF:
        expected = [numbers(torch.from_numpy(e).float().to(dtype)) for e in expected]
    side.backend.perturb_(group, norm, **arguments)
    assert_close(group.params, expected, dtype, roundings=POWER if q else 1, what="params")
    assert same_bits(
        [s for s in group.snapshots if s is not None],
        [w for w, s in zip(before, group.snapshots, strict=True) if s is not None],
    )
    unperturbed = [t for t, s in enumerate(group.snapshots) if s is None]
    assert same_bits([group.params[t] for t in unperturbed], [before[t] for t in unperturbed])


@pytest.mark.parametrize("side", ALL)
def test_only_tensors_that_were_handed_a_snapshot_are_perturbed(side):
    group = make_group(F32, rows=ROWS[:2], device=side.device)
    group.snapshots[3] = group.snapshots[5] = None
    before = copies(group.params)
    side.backend.perturb_(group, scalar(1.0, side.device))
    moved = [not same_bits([p], [w]) for p, w in zip(group.params, before, strict=True)]
    assert moved == [p.numel() > 0 and t not in (3, 5) for t, p in enumerate(group.params)]


@pytest.mark.parametrize("side", ALL)
@balls
def test_a_tensor_scale_that_overflows_moves_nothing(side, p):
    # Layer-wise radii divide by the norm of each tensor, and one of them may be zero.
    group = make_group(F32, rows=ROWS[:2], device=side.device)
    before = copies(group.params)
    norm, arguments = measure(side.backend, group, p)
    scales = torch.ones(len(group.params), dtype=F64, device=side.device)
    scales[3], scales[5] = math.inf, 1e300
    side.backend.perturb_(group, norm, tensor_scale=scales, **arguments)
    moved = [not same_bits([q], [w]) for q, w in zip(group.params, before, strict=True)]
    assert moved == [q.numel() > 0 and t not in (3, 5) for t, q in enumerate(group.params)]


@pytest.mark.parametrize("side", OTHERS)
@pytest.mark.parametrize("shapes", [LANES, CHUNKS], ids=["lanes", "chunks"])
@pytest.mark.parametrize("memory", ["plain", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_and_restore_every_size(side, shapes, memory, dtype):
    group, twin = (make_group(dtype, shapes, memory=memory, device=side.device) for _ in range(2))
    before = copies(group.params)
    norm = scalar(3.0, side.device)
    side.backend.perturb_(group, norm)
    reference.BACKEND.perturb_(twin, norm)
    assert_close(group.params, twin.params, dtype, what="params")
    assert same_bits(group.snapshots, twin.snapshots)
    assert not same_bits(group.params, before)
    side.backend.restore_(group)
    assert same_bits(group.params, before)


@pytest.mark.parametrize("side", OTHERS)
def test_several_chunks_and_a_piece(side):
    shapes = [(65535,), (65536,), (65537,), (3, 40001)]
    group, twin = (make_group(F32, shapes, device=side.device) for _ in range(2))
    norm, _ = measure(side.backend, group, 2)
    np.testing.assert_allclose(numbers(norm), numbers(measure(reference.BACKEND, twin, 2)[0]), rtol=SUM[F32])
    before = copies(group.params)
    side.backend.perturb_(group, norm)
    reference.BACKEND.perturb_(twin, norm)
    assert_close(group.params, twin.params, F32)
    side.backend.restore_(group)
    assert same_bits(group.params, before)


@pytest.mark.parametrize("side", OTHERS)
@pytest.mark.parametrize("p", [2, 1.5])
def test_channels_last_weights_meet_their_own_gradients(side, p):
    shapes = [(5, 4, 3, 3), (8, 2, 5, 5), (6,)]
    group = make_group(F32, shapes, memory="channels_last", device=side.device)
    expected_norm, arguments = measure(reference.BACKEND, group, p)
    norm, _ = measure(side.backend, group, p)
    np.testing.assert_allclose(numbers(norm), numbers(expected_norm), rtol=4 * SUM[F32])
    _, shape, q = BALLS[p]
    peak = numbers(arguments["peak"]) if q else None
    expected = oracle_perturbed(group, numbers(norm), shape, q, peak)
    side.backend.perturb_(group, norm, **arguments)
    assert_close(group.params, expected, F32, roundings=POWER if q else 1)
    assert group.params[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("shape", ["linear", "sign", "powered"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_that_is_not_finite_leaves_every_bit_of_the_weights(side, norm, shape, dtype):
    group = make_group(dtype, [(3, 5), (40,), (16400,)], device=side.device)
    for p, g in zip(group.params, group.grads, strict=True):
        p.view(-1)[:2] = torch.tensor([-0.0, 5e-8]).to(p)
        g.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf]).to(g)
    before = copies(group.params)
    arguments = {"q": 3.0, "peak": scalar(norm, side.device)} if shape == "powered" else {}
    side.backend.perturb_(group, scalar(norm, side.device), shape=shape, **arguments)
    assert same_bits(group.params, before)
    for snapshot, w in zip(group.snapshots, before, strict=True):
        assert snapshot is None or same_bits([snapshot], [w])


@pytest.mark.parametrize("side", ALL)
@balls
@pytest.mark.parametrize("eps", [1e-12, 0.0], ids=str)
def test_zero_gradients_move_nothing(side, p, eps):
    rows = [{**row, Column.EPS: eps} for row in ROWS]
    group = make_group(F32, rows=rows, device=side.device)
    for g in group.grads:
        g.zero_()
    before = copies(group.params)
    norm, arguments = measure(side.backend, group, p)
    assert norm == 0
    side.backend.perturb_(group, norm, **arguments)
    assert same_bits(group.params, before)


# Published vectors: three tensors, rho = 0.05, eps negligible; e by hand in float64.
TOY = {
    "fc.weight": ([1.0, -2.0, 3.0], [0.1, 0.2, -0.2]),
    "fc.bias": ([0.5, -0.25], [0.1, -0.3]),
    "bn.weight": ([1.5], [0.4]),
}
E, A, F = EUCLIDEAN, ADAPTIVE, FIXED
VECTORS = {
    "one tensor, p=2": (2, 0.0, (E,), [[0.0166666667, 0.0333333333, -0.0333333333]]),
    "one tensor, p=inf": (math.inf, 0.0, (E,), [[0.05, 0.05, -0.05]]),
    "one tensor, p=4": (4, 0.0, (E,), [[0.0318945476, 0.0401846119, -0.0401846119]]),
    "one tensor, p=1.5": (1.5, 0.0, (E,), [[0.00756259291, 0.0302503717, -0.0302503717]]),
    "p=2": (
        2,
        0.0,
        (E, E, E),
        [[0.00845154255, 0.0169030851, -0.0169030851], [0.00845154255, -0.0253546276], [0.0338061702]],
    ),
    "adaptive on weights": (
        2,
        0.01,
        (A, E, A),
        [[0.00510298831, 0.0404207099, -0.0906452003], [0.00500243928, -0.0150073179], [0.0456242472]],
    ),
    "adaptive everywhere": (
        2,
        0.0,
        (A, A, A),
        [[0.00527596143, 0.0422076914, -0.0949673057], [0.00131899036, -0.000989242767], [0.0474836528]],
    ),
    "adaptive, p=inf": (
        math.inf,
        0.01,
        (A, E, A),
        [[0.0505, 0.1005, -0.1505], [0.05, -0.05], [0.0755]],
    ),
    "normalization only": (2, 0.0, (F, F, E), [[0.0, 0.0, 0.0], [0.0, 0.0], [0.05]]),
    "adaptive normalization only": (2, 0.01, (F, F, A), [[0.0, 0.0, 0.0], [0.0, 0.0], [0.0755]]),
}


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("name", VECTORS)
def test_published_perturbations(side, name):
    p, eta, metrics, expected = VECTORS[name]
    tensors = list(TOY.values())[: len(metrics)]
    params = [torch.tensor(w, dtype=F64, device=side.device) for w, _ in tensors]
    keys = [(t, m, eta) for t, m in enumerate(metrics)]
    group = TensorGroup(params, list(range(len(params))), keys)
    group.write_table([(float(m), eta, 0.05, 1e-16) for m in metrics])
    group.grads = [torch.tensor(g, dtype=F64, device=side.device) for _, g in tensors]
    take_snapshots(group)
    norm, arguments = measure(side.backend, group, p)
    before = copies(params)
    side.backend.perturb_(group, norm, **arguments)
    for new, old, e in zip(params, before, expected, strict=True):
        # The vectors are printed with nine digits.
        np.testing.assert_allclose(numbers(new) - numbers(old), e, rtol=2e-8, atol=1e-12)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shapes", "memory"), [(MIXED, "plain"), (LANES + CHUNKS, "misaligned")], ids=["mixed", "sizes"]
)
def test_fishers_metric_is_its_formula(side, dtype, shapes, memory):
    group = make_group(dtype, shapes, rows=FISHER_ROWS, missing=(3,), memory=memory, device=side.device)
    before, us = copies(group.params), oracle_u(group, FISHER_ROWS)
    expected = oracle_sums(us, "square")
    each = side.backend.sq_norm(group, per_tensor=True)
    np.testing.assert_allclose(numbers(each), expected, rtol=SUM[dtype])
    norm = side.backend.sq_norm(group, root=2.0)
    np.testing.assert_allclose(numbers(norm), math.sqrt(expected.sum()), rtol=SUM[dtype])
    moved = oracle_perturbed(group, numbers(norm / 8), "linear", rows=FISHER_ROWS)
    if dtype in HALF:
        moved = [numbers(torch.from_numpy(e).float().to(dtype)) for e in moved]
    side.backend.perturb_(group, norm / 8)
    assert_close(group.params, moved, dtype)
    side.backend.restore_(group)
    assert same_bits(group.params, before)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_one_bad_gradient_shows_under_fishers_metric(side, bad):
    group = make_group(F32, rows=FISHER_ROWS, device=side.device)
    group.grads[3][999] = bad
    assert not torch.isfinite(side.backend.sq_norm(group))


@pytest.mark.parametrize("side", [NATIVE, EMULATED])
def test_fishers_metric_of_another_order_is_a_sentence(side):
    group = make_group(F32, rows=FISHER_ROWS)
    before, norm = copies(group.params), scalar(1.0)
    with pytest.raises(
        ValueError, match="sq_norm: .* with moment='square', not 'peak'; use backend='foreach'"
    ):
        side.backend.sq_norm(group, moment="peak")
    with pytest.raises(ValueError, match="perturb_: .* with shape='linear', not 'sign'"):
        side.backend.perturb_(group, norm, shape="sign")
    assert same_bits(group.params, before)
    assert side.backend.sq_norm(group, of="weight", moment="peak") > 0


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["linear", "sign", "powered"])
def test_a_gradient_may_lie_in_its_own_snapshot(side, dtype, shape):
    """A random direction of smoothing needs no memory of its own then."""
    rows = FISHER_ROWS if shape == "linear" else ROWS[:2]
    group, twin = (make_group(dtype, LANES + CHUNKS, rows=rows, device=side.device) for _ in range(2))
    before = copies(group.params)
    for t, g in enumerate(group.grads):
        group.grads[t] = group.snapshots[t].copy_(g)
    arguments = {"q": 3.0, "peak": scalar(5.0, side.device)} if shape == "powered" else {}
    for each in (group, twin):
        side.backend.perturb_(each, scalar(3.0, side.device), shape=shape, **arguments)
    assert same_bits(group.params, twin.params)
    assert same_bits(group.snapshots, before)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", [EUCLIDEAN, ADAPTIVE], ids=["euclidean", "adaptive"])
def test_the_ball_of_order_one_moves_the_largest_alone(side, dtype, metric):
    """q is infinite: (|u| / peak)^q is 1 for those that tie as the largest, 0 for the next smaller number."""
    row = {Column.METRIC: metric, Column.ETA: 0.5, Column.RHO: 0.25, Column.EPS: 0.0}
    group = make_group(dtype, [(40,), (0,), (16390,)], rows=[row], device=side.device)
    for t, place, g in [(0, 0, 70.0), (0, 39, -70.0), (2, 16384, 70.0), (2, 7, 69.5), (2, 3000, 0.0)]:
        group.params[t][place], group.grads[t][place] = 0.5, g  # T = 1 under either metric
    near = torch.nextafter(torch.tensor(70.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    group.params[2][16389], group.grads[2][16389] = 0.5, near.to(side.device)
    before = copies(group.params)
    peak = side.backend.sq_norm(group, moment="peak")
    power = {"moment": "power", "q": math.inf, "peak": peak}
    assert peak == 70.0
    assert side.backend.sq_norm(group, **power) == 3.0
    assert side.backend.sq_norm(group, per_tensor=True, **power).tolist() == [2.0, 0.0, 1.0]
    side.backend.perturb_(group, scalar(1.0, side.device), shape="powered", q=math.inf, peak=peak)
    expected = copies(before)
    expected[0][0] += 0.25
    expected[0][39] -= 0.25
    expected[2][16384] += 0.25
    assert all(torch.equal(p, e) for p, e in zip(group.params, expected, strict=True))


# ---- restore_ --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_bit_exact_and_only_where_a_snapshot_is(side, dtype):
    group = make_group(dtype, missing=(3,), device=side.device)
    for snapshot in group.snapshots:
        if snapshot is not None:
            snapshot.copy_(torch.randn(snapshot.shape))
            snapshot.view(-1)[:3] = torch.tensor([math.nan, -0.0, math.inf]).to(snapshot)[: snapshot.numel()]
    before = copies(group.params)
    side.backend.restore_(group)
    expected = [w if s is None else s for w, s in zip(before, group.snapshots, strict=True)]
    assert same_bits(group.params, expected)


# ---- grad_stats and combine_ -----------------------------------------------------------------------


def make_lists(group, count, dtype=None, missing=()):
    """Lists parallel to the parameters; `missing` holds (list, tensor) pairs."""
    return [
        [
            None if (i, t) in missing else torch.randn_like(p, dtype=dtype or p.dtype, requires_grad=False)
            for t, p in enumerate(group.params)
        ]
        for i in range(count)
    ]


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("missing", [(), ((0, 0), (1, 3), (2, 4)), tuple((0, t) for t in range(8))], ids=len)
def test_grad_stats_are_the_dots(side, dtype, count, missing):
    group = make_group(dtype, device=side.device)
    lists = make_lists(group, count, missing=missing)
    dots = side.backend.grad_stats(group, lists)
    expected, size = [], []
    for i in range(count):
        for j in range(i, count):
            both = [
                (numbers(x), numbers(y))
                for x, y in zip(lists[i], lists[j], strict=True)
                if x is not None and y is not None
            ]
            expected.append(sum(float(np.sum(x * y)) for x, y in both))
            size.append(sum(float(np.sum(np.abs(x * y))) for x, y in both))
    assert dots.dtype == F64 and dots.shape == (len(expected),)
    # A dot may cancel, so its error is measured by the sum of magnitudes.
    assert np.all(np.abs(numbers(dots) - expected) <= SUM[dtype] * np.array(size))


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_grad_stats_by_tensor(side, dtype, count):
    group = make_group(dtype, [*MIXED, (16385,), (0,)], device=side.device)
    lists = make_lists(group, count, missing={(0, 0), (1, 3), (2, 4)})
    each = side.backend.grad_stats(group, lists, per_tensor=True)
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    assert each.dtype == F64 and each.shape == (len(group.params), len(pairs))
    for t, row in enumerate(numbers(each)):
        for got, (i, j) in zip(row, pairs, strict=True):
            x, y = lists[i][t], lists[j][t]
            products = np.zeros(1) if x is None or y is None else numbers(x) * numbers(y)
            assert abs(got - products.sum()) <= SUM[dtype] * np.abs(products).sum(), (t, i, j)


@pytest.mark.parametrize("side", OTHERS)
def test_grad_stats_of_every_size(side):
    group = make_group(F32, [*LANES, *CHUNKS, (65535,), (65537,)], device=side.device)
    lists = make_lists(group, 3)
    expected = reference.BACKEND.grad_stats(group, lists)
    total = sum(p.numel() for p in group.params)
    np.testing.assert_allclose(
        numbers(side.backend.grad_stats(group, lists)), numbers(expected), atol=SUM[F32] * total, rtol=0
    )


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [MIXED, LANES + CHUNKS], ids=["mixed", "sizes"])
def test_combine_is_the_weighted_sum(side, dtype, shapes):
    group = make_group(dtype, shapes, device=side.device)
    lists = make_lists(group, 3, missing={(0, 0), (1, 0), (1, 3), (2, 3), (0, 4), (1, 4), (2, 4)})
    outs = make_lists(group, 2, missing={(1, 1)})
    untouched = copies(lists[0] + lists[1] + lists[2])
    weights = torch.tensor([[0.5, -1.5, 2.0], [1.0, 0.0, -0.25]], dtype=F64)
    side.backend.combine_(group, outs, lists, weights.to(side.device))
    for i, out in enumerate(outs):
        expected = [
            None
            if x is None
            else sum(a * (0.0 if y is None else numbers(y)) for a, y in zip(row, ys, strict=True))
            for row, x, ys in zip(
                [weights[i].tolist()] * len(out), out, zip(*lists, strict=True), strict=True
            )
        ]
        expected = [
            e if e is None or isinstance(e, np.ndarray) else np.zeros(x.shape)
            for e, x in zip(expected, out, strict=True)
        ]
        if dtype in HALF:
            expected = [
                None if e is None else numbers(torch.from_numpy(e).float().to(dtype)) for e in expected
            ]
        assert_close(out, expected, dtype, what=f"outs[{i}]")
    assert same_bits(lists[0] + lists[1] + lists[2], untouched)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_by_tensor(side, dtype):
    """Every tensor's block gives what the same coefficients give it when all tensors share them."""
    shapes = [*MIXED, (16385,), (0,)]
    group = make_group(dtype, shapes, device=side.device)
    lists = make_lists(group, 3, missing={(0, 0), (1, 3), (2, 3), (0, 3)})
    outs, twins = make_lists(group, 2, missing={(1, 1)}), make_lists(group, 2, missing={(1, 1)})
    weights = torch.randn(len(shapes), 2, 3, dtype=F64)
    weights[4, :, 1] = 0.0
    lists[1][4].fill_(math.nan)
    side.backend.combine_(group, outs, lists, weights.to(side.device))
    for t, own in enumerate(weights):
        only = [[x if k == t else None for k, x in enumerate(tensors)] for tensors in twins]
        reference.BACKEND.combine_(group, only, lists, own)
    for got, expected in zip(outs, twins, strict=True):
        assert_close(got, expected, dtype)


@pytest.mark.parametrize("side", ALL)
def test_combine_may_write_the_lists_it_reads(side):
    group = make_group(F32, device=side.device)
    lists = make_lists(group, 2)
    a, b = copies(lists[0]), copies(lists[1])
    weights = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64, device=side.device)  # exchange them
    side.backend.combine_(group, lists, lists, weights)
    assert same_bits(lists[0], b) and same_bits(lists[1], a)


@pytest.mark.parametrize("side", ALL)
def test_a_zero_coefficient_never_reads(side):
    group = make_group(F32, device=side.device)
    lists = make_lists(group, 2)
    for x in lists[1]:
        x.fill_(math.nan)
    outs = make_lists(group, 1)
    weights = torch.tensor([[1.0, 0.0]], dtype=F64, device=side.device)
    side.backend.combine_(group, outs, lists, weights)
    assert same_bits(outs[0], lists[0])


@pytest.mark.parametrize("side", ALL)
def test_combine_into_slots_of_another_dtype(side):
    # A policy may keep its moving average in fp32 beside bf16 weights.
    group = make_group(BF16, device=side.device)
    if side.backend.name in ("native", "emulated", "interpreted", "triton"):
        with pytest.raises((RuntimeError, ValueError), match="combine.*dtype"):
            lists = [make_lists(group, 1, dtype=d)[0] for d in (F32, BF16)]
            weights = torch.ones(1, 2, dtype=F64, device=side.device)
            side.backend.combine_(group, lists[:1], lists, weights)
        return
    ema, grads = make_lists(group, 1, dtype=F32)[0], make_lists(group, 1)[0]
    expected = [0.9 * numbers(m) + 0.1 * numbers(g) for m, g in zip(ema, grads, strict=True)]
    weights = torch.tensor([[0.9, 0.1]], dtype=F64, device=side.device)
    side.backend.combine_(group, [ema], [ema, grads], weights)
    assert_close(ema, expected, F32)


# ---- descend_ --------------------------------------------------------------------------------------

SGD = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "nesterov": {"lr": 0.1, "momentum": 0.8, "nesterov": True},
    "decay": {"lr": 0.1, "weight_decay": 0.05},
    "everything": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.05, "maximize": True},
    "nesterov decay maximize": {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.05,
        "maximize": True,
    },
}
ADAM = {
    "plain": {"lr": 0.01},
    "betas": {"lr": 0.01, "betas": (0.3, 0.95), "eps": 1e-3},
    "decay": {"lr": 0.01, "weight_decay": 0.1},
    "maximize": {"lr": 0.01, "maximize": True, "weight_decay": 0.1},
}
ADAMW = {"adamw": {"lr": 0.01, "weight_decay": 0.1}, "adamw maximize": {"lr": 0.01, "maximize": True}}
BASES = (
    [(torch.optim.SGD, k) for k in SGD.values()]
    + [(torch.optim.Adam, k) for k in ADAM.values()]
    + [(torch.optim.AdamW, k) for k in ADAMW.values()]
)
BASE_NAMES = [*(f"sgd {n}" for n in SGD), *(f"adam {n}" for n in ADAM), *ADAMW]
bases = pytest.mark.parametrize(("optimizer", "options"), BASES, ids=BASE_NAMES)


def base_row(optimizer, options, metric=EUCLIDEAN):
    row = {
        Column.METRIC: metric,
        Column.RHO: 0.5,
        Column.EPS: 1e-12,
        Column.LR: options["lr"],
        Column.WEIGHT_DECAY: options.get("weight_decay", 0.01 if optimizer is torch.optim.AdamW else 0.0),
        Column.MAXIMIZE: options.get("maximize", False),
    }
    if optimizer is torch.optim.SGD:
        row |= {
            Column.MOMENTUM: options.get("momentum", 0.0),
            Column.DAMPENING: options.get("dampening", 0.0),
            Column.NESTEROV: options.get("nesterov", False),
        }
    else:
        beta1, beta2 = options.get("betas", (0.9, 0.999))
        row |= {
            Column.BETA1: beta1,
            Column.BETA2: beta2,
            Column.ADAM_EPS: options.get("eps", 1e-8),
            Column.DECOUPLED: optimizer is torch.optim.AdamW,
        }
    return row


def rule_of(optimizer):
    return "sgd" if optimizer is torch.optim.SGD else "adam"


def make_slots(group, rule, momentum=True):
    """State as torch creates it; momentum buffers are fresh and hold NaN until they are written."""
    there = [g is not None for g in group.grads]
    if rule == "sgd":
        buffers = [
            torch.full_like(p, math.nan, requires_grad=False) if g and momentum else None
            for p, g in zip(group.params, there, strict=True)
        ]
        return {"momentum_buffer": buffers, "fresh": [b is not None for b in buffers]}
    zeros = [
        [
            torch.zeros_like(p, requires_grad=False) if g else None
            for p, g in zip(group.params, there, strict=True)
        ]
        for _ in range(2)
    ]
    steps = [torch.tensor(0.0, device=group.device) if g else None for g in there]
    return {"exp_avg": zeros[0], "exp_avg_sq": zeros[1], "step": steps}


def state_lists(slots):
    return [tensors for name, tensors in slots.items() if name != "fresh"]


def displace(group):
    """Stand at a perturbed point: some weights moved away, their snapshots holding the old ones."""
    group.snapshots = [None] * len(group.params)
    for t, p in enumerate(group.params):
        if t % 3 != 1:
            group.snapshots[t] = p.detach().clone()
            p.add_(1.0)


@pytest.mark.parametrize("side", ALL)
@bases
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shapes", [MIXED, LANES + CHUNKS], ids=["mixed", "sizes"])
def test_three_descents_are_three_steps_of_torch(side, optimizer, options, dtype, shapes):
    rule = rule_of(optimizer)
    missing = (3,)
    group = make_group(
        dtype,
        shapes,
        rows=[base_row(optimizer, options)],
        missing=missing,
        device=side.device,
        snapshots=False,
    )
    others = [p.detach().clone().requires_grad_() for p in group.params]
    base = optimizer(others, foreach=False, **options)
    slots = make_slots(group, rule, options.get("momentum"))
    for step in range(3):
        torch.manual_seed(step)
        for t, (p, other) in enumerate(zip(group.params, others, strict=True)):
            group.grads[t] = None if t in missing else torch.randn_like(p, requires_grad=False)
            other.grad = copies([group.grads[t]])[0]
        displace(group)
        side.backend.descend_(group, rule, slots)
        base.step()
        slots["fresh"] = []
        assert_close(group.params, others, dtype, what=f"params after step {step}")
    for name, tensors in slots.items():
        if name != "fresh":
            expected = [base.state[p].get(name) if base.state.get(p) else None for p in others]
            assert_close(tensors, expected, F32 if name == "step" else dtype, what=name)


@pytest.mark.parametrize("side", ALL)
@bases
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shapes", [LANES, [(1000,), (0,), (3, 5)]], ids=["lanes", "mixed"])
def test_half_descents_round_once(side, optimizer, options, dtype, shapes):
    """One step from the same half values, computed in float64 by torch and rounded at the end."""
    rule, row = rule_of(optimizer), base_row(optimizer, options)
    group = make_group(dtype, shapes, rows=[row], device=side.device, snapshots=False)
    others = [p.detach().double().requires_grad_() for p in group.params]
    base = optimizer(others, foreach=False, **options)
    slots = make_slots(group, rule, options.get("momentum"))
    for other, g in zip(others, group.grads, strict=True):
        other.grad = g.double()
    displace(group)
    side.backend.descend_(group, rule, slots)
    base.step()
    assert_close(group.params, [o.float().to(dtype) for o in others], dtype, what="params")
    for name, tensors in slots.items():
        if name not in ("fresh", "step"):
            expected = [base.state[o].get(name) for o in others]
            expected = [None if e is None else e.float().to(dtype) for e in expected]
            assert_close(tensors, expected, dtype, what=name)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_rows_keep_their_own_scalars_in_one_descent(side, rule):
    optimizer = torch.optim.SGD if rule == "sgd" else torch.optim.Adam
    options = [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.3, "weight_decay": 0.1}, {"lr": 0.01, "maximize": True}]
    if rule == "adam":
        options[0].pop("momentum")
    rows = [base_row(optimizer, o, m) for o, m in zip(options, (EUCLIDEAN, ADAPTIVE, FIXED), strict=True)]
    group = make_group(F32, rows=rows, device=side.device, snapshots=False)
    others = [p.detach().clone().requires_grad_() for p in group.params]
    base = optimizer(
        [{"params": [p for t, p in enumerate(others) if t % 3 == r], **o} for r, o in enumerate(options)],
        foreach=False,
        lr=1.0,
    )
    slots = make_slots(group, rule)
    if rule == "sgd":  # only the first row has momentum
        slots["momentum_buffer"] = [b if t % 3 == 0 else None for t, b in enumerate(slots["momentum_buffer"])]
        slots["fresh"] = [b is not None for b in slots["momentum_buffer"]]
    for other, g in zip(others, group.grads, strict=True):
        other.grad = g.clone()
    displace(group)
    side.backend.descend_(group, rule, slots)
    base.step()
    assert_close(group.params, others, F32)


def adversarial(group):
    """Weights and gradients among which a multiplication by zero would show."""
    for p, g in zip(group.params, group.grads, strict=True):
        if p.numel():
            p.view(-1)[0] = -0.0
        if g is not None and g.numel():
            g.view(-1)[0] = math.nan


UNSAFE = {
    "guard nan": {"guard": scalar(math.nan)},
    "guard inf": {"guard": scalar(math.inf)},
    "found_inf": {"found_inf": torch.tensor(1.0)},
    "found_inf on two devices": {"found_inf": torch.tensor(2.0)},
    "found_inf, guard fine": {"found_inf": torch.tensor(1.0), "guard": scalar(2.0)},
    "guard, found_inf fine": {"found_inf": torch.tensor(0.0), "guard": scalar(math.nan)},
}


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("unsafe", UNSAFE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unsafe_step_restores_and_moves_nothing_else(side, rule, unsafe, dtype):
    optimizer = torch.optim.SGD if rule == "sgd" else torch.optim.Adam
    row = base_row(optimizer, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})
    group = make_group(
        dtype, LANES + [(16400,)], rows=[row], missing=(6,), device=side.device, snapshots=False
    )
    adversarial(group)
    before = copies(group.params)
    slots = make_slots(group, rule)
    slots["fresh"] = []
    for tensors in state_lists(slots):
        for x in tensors:
            if x is not None:
                x.copy_(torch.rand(x.shape) + 1)
                x.view(-1)[:1] = -0.0
    kept = [copies(tensors) for tensors in state_lists(slots)]
    displace(group)
    arguments = {name: x.to(side.device) for name, x in UNSAFE[unsafe].items()}
    side.backend.descend_(group, rule, slots, **arguments)
    assert same_bits(group.params, before)
    for tensors, old in zip(state_lists(slots), kept, strict=True):
        assert same_bits(tensors, old)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_safe_scalars_change_nothing_and_inv_scale_multiplies_the_gradients(side, rule, dtype):
    optimizer = torch.optim.SGD if rule == "sgd" else torch.optim.Adam
    row = base_row(optimizer, {"lr": 0.1, "momentum": 0.9})
    groups = [make_group(dtype, rows=[row], device=side.device, snapshots=False) for _ in range(2)]
    slots = [make_slots(group, rule) for group in groups]
    groups[1].grads = [4 * g for g in groups[1].grads]
    side.backend.descend_(groups[0], rule, slots[0])
    side.backend.descend_(
        groups[1],
        rule,
        slots[1],
        guard=scalar(2.0, side.device),
        found_inf=torch.zeros((), device=side.device),
        inv_scale=torch.tensor(0.25, device=side.device),
    )
    assert same_bits(groups[0].params, groups[1].params)
    for a, b in zip(state_lists(slots[0]), state_lists(slots[1]), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_without_gradients_a_descent_only_restores(side, rule):
    row = base_row(torch.optim.SGD if rule == "sgd" else torch.optim.Adam, {"lr": 0.1, "momentum": 0.9})
    group = make_group(F32, rows=[row], missing=range(8), device=side.device, snapshots=False)
    before = copies(group.params)
    slots = make_slots(group, rule)
    displace(group)
    side.backend.descend_(group, rule, slots)
    assert same_bits(group.params, before)


@pytest.mark.parametrize("side", ALL)
def test_the_counters_of_empty_tensors_advance_as_in_torch(side):
    row = base_row(torch.optim.Adam, {"lr": 0.1})
    group = make_group(F32, [(0,), (3,), (2, 0)], rows=[row], device=side.device, snapshots=False)
    slots = make_slots(group, "adam")
    side.backend.descend_(group, "adam", slots)
    assert [float(step) for step in slots["step"]] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("side", ALL)
def test_counters_of_different_age_correct_their_own_bias(side):
    row = base_row(torch.optim.Adam, {"lr": 0.1})
    group = make_group(F32, [(20,)] * 3, rows=[row], device=side.device, snapshots=False)
    slots = make_slots(group, "adam")
    others = [p.detach().clone().requires_grad_() for p in group.params]
    base = torch.optim.Adam(others, lr=0.1, foreach=False)
    for t, (other, g) in enumerate(zip(others, group.grads, strict=True)):
        other.grad = g.clone()
        slots["step"][t].fill_(10.0**t)
        zeros = [torch.zeros_like(other) for _ in range(2)]
        base.state[other] = {"step": torch.tensor(10.0**t), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
    side.backend.descend_(group, "adam", slots)
    base.step()
    assert_close(group.params, others, F32)


# ---- what holds for every pass ---------------------------------------------------------------------


def every_pass(backend, group, rule="adam"):
    """One of each, in the order of a step; returns everything that came out."""
    slots = make_slots(group, rule)
    norm, arguments = measure(backend, group, 1.5)
    backend.perturb_(group, norm, **arguments)
    perturbed = copies(group.params)
    lists = [group.grads, list(group.params)]
    dots = torch.cat(
        [backend.grad_stats(group, lists), backend.grad_stats(group, lists, per_tensor=True).flatten()]
    )
    weights = torch.tensor([[0.7, 0.2]], dtype=F64, device=group.device)
    combined, noise = copies(group.grads), copies(group.grads)
    backend.combine_(group, [combined], lists, weights)
    factors = torch.linspace(0.5, 1.0, len(group.params), dtype=F64, device=group.device)
    backend.combine_(group, [combined], [combined, list(group.params)], factors.view(-1, 1, 1) * weights)
    backend.noise_(group, noise, 5, 6, list(range(len(noise))))
    group.grads = combined
    backend.descend_(group, rule, slots)
    return [
        norm,
        dots,
        backend.sq_norm(group),
        *perturbed,
        *group.params,
        *slots["exp_avg"],
        *slots["exp_avg_sq"],
        *noise,
    ]


def full_rows():
    options = {"lr": 0.1, "weight_decay": 0.1}
    return [
        {**base_row(torch.optim.Adam, options), **{c: row[c] for c in (Column.METRIC, Column.RHO)}}
        for row in ROWS
    ]


@pytest.mark.parametrize("side", [FOREACH, NATIVE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(side, dtype):
    shapes = [(70000,), (5,), (0,), (33000,), (16385,)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(every_pass(side.backend, make_group(dtype, shapes, rows=full_rows())))
    finally:
        torch.set_num_threads(threads)
    # grad_stats of foreach sums by torch, which splits a sum among threads.
    skip = 1 if side.backend is foreach.BACKEND else None
    for other in results[1:]:
        assert same_bits(results[0][:skip], other[:skip])
        assert same_bits(results[0][2:], other[2:])


@no_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_instruction_set_changes_no_bit(dtype):
    chosen = native.isa()
    results = []
    try:
        for name in native._native.available_isas():
            native._native.set_isa(name)
            assert native.isa() == name
            group = make_group(dtype, LANES + CHUNKS, rows=full_rows())
            results.append(every_pass(native.BACKEND, group))
    finally:
        native._native.set_isa(chosen)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("side", OTHERS)
def test_thousands_of_tiny_tensors(side):
    # An interpreter takes ten milliseconds for each; 200 are more than its programs and still one launch.
    # Of foreach, whose lists are torch's business, 1,000 say as much.
    count = {"interpreted": 200, "foreach": 1000}.get(side.backend.name, 5000)
    shapes = [(t % 7,) for t in range(count)]
    # The reference would launch a hundred kernels for each; it stays on the CPU.
    group, twin = (
        make_group(F32, shapes, rows=full_rows(), missing=range(0, count, 11), device=device)
        for device in (side.device, "cpu")
    )
    got, expected = every_pass(side.backend, group), every_pass(reference.BACKEND, twin)
    np.testing.assert_allclose(numbers(got[0]), numbers(expected[0]), rtol=1e-5)
    np.testing.assert_allclose(numbers(got[1]), numbers(expected[1]), rtol=1e-5, atol=1e-3)
    assert_close(got[3:], expected[3:], F32, roundings=POWER)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("missing", [(), (0, 3)], ids=["all", "some"])
def test_every_write_is_counted_and_nothing_else(side, rule, missing):
    optimizer = torch.optim.SGD if rule == "sgd" else torch.optim.Adam
    row = base_row(optimizer, {"lr": 0.1, "momentum": 0.9})
    rows = [row, {**row, Column.METRIC: FIXED}] if missing else [row]
    group = make_group(rows=rows, missing=missing, device=side.device)
    slots = make_slots(group, rule)

    def advanced(tensors, run):
        old = [None if x is None else x._version for x in tensors]
        run()
        return [x is not None and x._version > v for x, v in zip(tensors, old, strict=True)]

    def there(tensors):
        return [x is not None for x in tensors]

    norm = scalar(1.0, side.device)
    perturbed = there(group.snapshots)
    assert advanced(group.params, lambda: side.backend.perturb_(group, norm)) == perturbed
    assert advanced(group.snapshots, lambda: side.backend.perturb_(group, norm)) == perturbed
    assert advanced(group.params, lambda: side.backend.restore_(group)) == perturbed
    for t in missing[:1]:  # perturbed and with state, but without a second gradient
        group.snapshots[t] = group.params[t].detach().clone()
        for name, tensors in slots.items():
            if name != "fresh":
                tensors[t] = (
                    scalar(3.0, side.device).float()
                    if name == "step"
                    else torch.zeros_like(group.snapshots[t])
                )
    moved = [g or s for g, s in zip(there(group.grads), there(group.snapshots), strict=True)]
    assert advanced(group.params, lambda: side.backend.descend_(group, rule, slots)) == moved
    slots["fresh"] = []
    for tensors in state_lists(slots):
        assert advanced(tensors, lambda: side.backend.descend_(group, rule, slots)) == there(group.grads)
    out = copies(group.grads)
    weights = torch.tensor([[2.0]], dtype=F64, device=side.device)
    assert advanced(out, lambda: side.backend.combine_(group, [out], [group.grads], weights)) == there(out)


@pytest.mark.parametrize("side", ALL)
def test_autograd_notices_a_graph_that_outlived_its_weights(side):
    group = make_group(F32, [(4,)], rows=ROWS[:1], device=side.device)
    with torch.enable_grad():
        loss = group.params[0].square().sum()
    side.backend.perturb_(group, scalar(1.0, side.device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("side", ALL)
def test_no_tensor_changes_its_address(side):
    group = make_group(F32, rows=full_rows(), device=side.device)
    tensors = group.params + [s for s in group.snapshots if s is not None]
    addresses = [x.data_ptr() for x in tensors]
    every_pass(side.backend, group)
    assert [x.data_ptr() for x in tensors] == addresses


@pytest.mark.parametrize("side", ALL)
def test_gradients_are_never_written(side):
    group = make_group(F32, rows=full_rows(), device=side.device)
    grads = group.grads
    before = copies(grads)
    every_pass(side.backend, group)
    assert same_bits(grads, before)


# ---- foreach: what it does where reading a scalar would stall the device ---------------------------


@pytest.fixture
def unread_scalars(monkeypatch):
    """Device scalars stay tensors, as on an accelerator."""
    monkeypatch.setattr(foreach, "_known", lambda x: x)
    monkeypatch.setattr(
        foreach,
        "_factors",
        lambda x, members=None: [x[t] for t in (range(len(x)) if members is None else members)],
    )


@pytest.mark.usefixtures("unread_scalars")
@pytest.mark.parametrize("dtype", DTYPES)
class TestForeachWithoutReadingTheDevice:
    @balls
    @pytest.mark.parametrize("scaled", [False, True], ids=["", "tensor_scale"])
    def test_perturb(self, dtype, p, scaled):
        group, twin = make_group(dtype), make_group(dtype)
        norm, arguments = measure(foreach.BACKEND, group, p)
        if scaled:
            arguments["tensor_scale"] = torch.rand(len(group.params), dtype=F64)
        foreach.BACKEND.perturb_(group, norm, **arguments)
        reference.BACKEND.perturb_(twin, norm, **arguments)
        assert_close(group.params, twin.params, dtype, roundings=POWER)

    def test_norm_that_is_not_finite(self, dtype):
        group = make_group(dtype)
        adversarial(group)
        before = copies(group.params)
        foreach.BACKEND.perturb_(group, scalar(math.nan))
        assert same_bits(group.params, before)

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    @pytest.mark.parametrize("unsafe", [None, *UNSAFE])
    def test_descend(self, dtype, optimizer, unsafe):
        rule = rule_of(optimizer)
        row = base_row(optimizer, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})
        group, twin = (make_group(dtype, rows=[row], missing=(2,), snapshots=False) for _ in range(2))
        scalars = {"guard": scalar(1.0)} if unsafe is None else UNSAFE[unsafe]
        for each, backend in ((group, foreach.BACKEND), (twin, reference.BACKEND)):
            if unsafe:
                adversarial(each)
            each.slots = make_slots(each, rule)
            displace(each)
            backend.descend_(each, rule, each.slots, inv_scale=torch.tensor(0.5), **scalars)
        lists = [
            (group.params, twin.params),
            *zip(state_lists(group.slots), state_lists(twin.slots), strict=True),
        ]
        for got, expected in lists:
            if unsafe:
                assert same_bits(got, expected)
            else:
                assert_close(got, expected, dtype)

    def test_combine(self, dtype):
        group = make_group(dtype)
        lists = make_lists(group, 3, missing={(0, 3)})
        for x in lists[2]:
            x.fill_(math.nan)
        outs, expected = make_lists(group, 1), make_lists(group, 1)
        weights = torch.tensor([[0.5, 2.0, 0.0]], dtype=F64)
        foreach.BACKEND.combine_(group, outs, lists, weights)
        reference.BACKEND.combine_(group, expected, lists, weights)
        assert_close(outs[0], expected[0], dtype)


# ---- refusals, messages, mirrored numbers ----------------------------------------------------------


def stand_in(**changed):
    """The attributes of a group that a refusal may look at."""
    plain = {"device": torch.device("cpu"), "dtype": F32, "dense": True, "compact": False}
    return SimpleNamespace(**{**plain, **changed})


@pytest.mark.parametrize(
    ("backend", "changed", "sentence"),
    [
        (reference, {"dtype": torch.complex64}, "complex64 has no perturbation"),
        (foreach, {"dtype": torch.complex64}, "complex64 has no perturbation"),
        (foreach, {"dtype": torch.float8_e4m3fn}, "do not calculate in torch.float8_e4m3fn"),
        pytest.param(native, {"dtype": torch.float8_e4m3fn}, "not in float8_e4m3fn", marks=no_native),
        pytest.param(native, {"device": torch.device("cuda", 0)}, "CUDA", marks=[no_native, no_gpu]),
        pytest.param(native, {"device": torch.device("mps", 0)}, "not mps ones", marks=no_native),
        pytest.param(native, {"dense": False}, "view with gaps", marks=no_native),
    ],
)
def test_refusals_are_sentences(backend, changed, sentence):
    assert backend.BACKEND.refusal(stand_in()) is None
    assert sentence in backend.BACKEND.refusal(stand_in(**changed))


@pytest.mark.parametrize("side", [REFERENCE, FOREACH, *FOREACH_CUDA])
def test_parameters_with_gaps_are_served_without_touching_the_gaps(side):
    block = torch.randn(200, 300, device=side.device)
    kept = block.clone()
    view = block[:, ::2].requires_grad_()
    group = TensorGroup([view], [0], [(0, EUCLIDEAN, 0.0)], dense=False)
    group.write_table([(float(EUCLIDEAN), 0.0, 0.5, 1e-12)])
    group.grads = [torch.randn_like(view, requires_grad=False)]
    take_snapshots(group)
    before = copies(group.params)
    norm = side.backend.sq_norm(group)
    np.testing.assert_allclose(numbers(norm), np.sum(numbers(group.grads[0]) ** 2), rtol=SUM[F32])
    weights = side.backend.sq_norm(group, of="weight")
    np.testing.assert_allclose(numbers(weights), np.sum(numbers(view) ** 2), rtol=SUM[F32])
    expected = oracle_perturbed(group, numbers(norm.sqrt()), "linear", rows=ROWS)
    side.backend.perturb_(group, norm.sqrt())
    assert_close(group.params, expected, F32)
    side.backend.restore_(group)
    assert same_bits(group.params, before)
    assert torch.equal(block, kept)


def test_native_without_its_module_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(native, "import_module", lambda name: (_ for _ in ()).throw(missing_module(name)))
    module, sentence = native._load()
    assert module is None and "was not built" in sentence and "backend='foreach'" in sentence


def missing_module(name):
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_native_of_another_interface_version_is_refused(monkeypatch):
    monkeypatch.setattr(native, "import_module", lambda name: SimpleNamespace(abi_version=99))
    module, sentence = native._load()
    assert module is None and re.search(
        f"version 99 .* speaks version {native.ABI_VERSION}; reinstall", sentence
    )


def test_native_without_a_thread_pool_says_so(monkeypatch):
    # torch before 2.10 has no stable symbol for it.
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: SimpleNamespace())
    assert "on one thread" in native._hand_over_threads(SimpleNamespace())


@no_native
def test_native_runs_on_the_thread_pool_of_torch():
    assert "on torch's thread pool" in native.describe()


@no_native
def test_an_instruction_set_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setenv("SAM_KERNELS_CPU_ISA", "avx9")
    sentence = native._force_isa(native._native)
    assert "SAM_KERNELS_CPU_ISA='avx9' is not available; this machine has baseline" in sentence
    with pytest.raises(RuntimeError, match="avx9"):
        native._native.set_isa("avx9")


@no_native
def test_a_forced_instruction_set_is_used(monkeypatch):
    chosen = native.isa()
    monkeypatch.setenv("SAM_KERNELS_CPU_ISA", "baseline")
    try:
        assert native._force_isa(native._native) is None
        assert native.isa() == "baseline" and "baseline instructions" in native.describe()
    finally:
        native._native.set_isa(chosen)


@pytest.fixture(params=[NATIVE, INTERPRETED])
def backend(request):
    return request.param.backend


class TestChecksBeforeItWrites:
    def test_memory_that_is_not_there(self, backend):
        group = make_group(F32)
        group.grads[3] = torch.empty_like(group.grads[3], device="meta")
        with pytest.raises(ValueError, match=r"grads\[3\] has 1000 elements but no memory"):
            backend.sq_norm(group)

    def test_lists_of_another_length(self, backend):
        group = make_group(F32)
        group.grads = group.grads[:-1]
        with pytest.raises(ValueError, match="grads has 7 entries, but the plan has 8 tensors"):
            backend.sq_norm(group)

    def test_lists_of_mixed_dtype_or_size(self, backend):
        group = make_group(F32)
        lists = make_lists(group, 1)
        lists[0][2] = lists[0][2].double()
        with pytest.raises(
            ValueError, match=r"lists\[0\]\[2\] is torch.float64 but the list is torch.float32"
        ):
            backend.grad_stats(group, lists)
        lists = make_lists(group, 1)
        lists[0][5] = torch.zeros(9)
        with pytest.raises(ValueError, match=r"lists\[0\]\[5\] has 9 elements, expected 1"):
            backend.grad_stats(group, lists)

    def test_state_whose_memory_was_exchanged(self, backend):
        group = make_group(F32, [(4,)], rows=[base_row(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})])
        slots = make_slots(group, "sgd")
        backend.descend_(group, "sgd", slots)
        slots["momentum_buffer"][0].data = torch.zeros(3, dtype=F16)
        with pytest.raises(ValueError, match=r"momentum_buffer\[0\] is torch.float16"):
            backend.descend_(group, "sgd", slots)

    @pytest.mark.parametrize("name", ["momentum_buffer", "exp_avg", "exp_avg_sq", "step"])
    def test_state_that_is_missing(self, backend, name):
        rule = "sgd" if name == "momentum_buffer" else "adam"
        row = base_row(torch.optim.SGD if rule == "sgd" else torch.optim.Adam, {"lr": 0.1, "momentum": 0.9})
        group = make_group(F32, rows=[row], snapshots=False)
        slots = make_slots(group, rule)
        slots[name][2] = None
        before = copies(group.params)
        with pytest.raises(ValueError, match=rf"grads\[2\] is there but {name}\[2\] is None"):
            backend.descend_(group, rule, slots)
        assert same_bits(group.params, before)

    def test_too_many_lists(self, backend):
        group = make_group(F32)
        with pytest.raises(ValueError, match="grad_stats: got 4 lists; expected 1 to 3"):
            backend.grad_stats(group, make_lists(group, 4))


def header_enum(name):
    """The members of a C enum and their values."""
    body = re.search(rf"enum {name} {{(.*?)}};", HEADER.read_text(), re.S)[1]
    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", body)
    values, nxt = {}, 0
    for item in filter(None, (part.strip() for part in body.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        nxt = int(value) if value else nxt
        values[key] = nxt
        nxt += 1
    return values


def test_python_and_c_use_the_same_numbers():
    version = re.search(r"#define SAMK_ABI_VERSION (\d+)", HEADER.read_text())
    assert native.ABI_VERSION == int(version[1])
    columns = header_enum("samk_column")
    assert columns.pop("SAMK_COLUMNS") == COLUMNS
    assert columns == {f"SAMK_{c.name}": c.value for c in Column}
    assert header_enum("samk_metric") == {
        "SAMK_FIXED": FIXED,
        "SAMK_EUCLIDEAN": EUCLIDEAN,
        "SAMK_ADAPTIVE": ADAPTIVE,
        "SAMK_FISHER": FISHER,
    }
    for enum, ours in (("moment", native._MOMENTS), ("shape", native._SHAPES), ("rule", native._RULES)):
        assert header_enum(f"samk_{enum}") == {f"SAMK_{name.upper()}": value for name, value in ours.items()}
    names = {F32: "SAMK_F32", F64: "SAMK_F64", BF16: "SAMK_BF16", F16: "SAMK_F16"}
    assert header_enum("samk_dtype") == {names[d]: code for d, code in native._DTYPES.items()}


# ---- the range of squares --------------------------------------------------------------------------


@pytest.mark.parametrize("side", [NATIVE, EMULATED, INTERPRETED])
@pytest.mark.parametrize("exponent", [-30, -55, -60, -70, -74, -75, -80, 70])
def test_squares_out_of_range_cost_less_than_half_the_least_number_each(side, exponent):
    """2^-149 is the least fp32 number, and the squares of 2^-75 and less are closer to 0 than to it."""
    group = make_group(F32, [(5000,)], rows=ROWS[:1], device=side.device, snapshots=False)
    group.grads[0].mul_(2.0**exponent)
    expected = float((group.grads[0].double() ** 2).sum())
    got = float(side.backend.sq_norm(group))
    assert abs(got - expected) <= SUM[F32] * expected + 5000 * 2.0**-150


# ---- devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [NATIVE, EMULATED])
@pytest.mark.parametrize("name", ["momentum_buffer", "exp_avg", "exp_avg_sq", "step"])
def test_state_on_another_device_is_refused_before_it_writes(side, name):
    rule = "sgd" if name == "momentum_buffer" else "adam"
    row = base_row(torch.optim.SGD if rule == "sgd" else torch.optim.Adam, {"lr": 0.1, "momentum": 0.9})
    group = make_group(F32, rows=[row], snapshots=False)
    slots = make_slots(group, rule)
    side.backend.descend_(group, rule, slots)
    slots[name][3] = slots[name][3].to("meta")
    before = copies(group.params)
    where = rf"{name}\[3\] is on meta but the parameters are on cpu"
    with pytest.raises(ValueError, match=f"{where}; move the optimizer's state with its parameters$"):
        side.backend.descend_(group, rule, slots)
    assert same_bits(group.params, before)


@pytest.mark.parametrize("side", [NATIVE, EMULATED])
def test_lists_on_another_device_are_refused(side):
    group = make_group(F32)
    lists = make_lists(group, 1)
    lists[0][3] = lists[0][3].to("meta")
    with pytest.raises(ValueError, match=r"lists\[0\]\[3\] is on meta but the parameters are on cpu$"):
        side.backend.grad_stats(group, lists)


@no_native
def test_state_that_is_known_is_not_asked_again():
    asked = []

    class State(SimpleNamespace):
        @property
        def device(self):
            asked.append("device")
            return torch.device("cpu")

    memory = torch.zeros(4)
    state = State(dtype=F32, data_ptr=lambda: memory.data_ptr(), numel=lambda: 4)
    plan = native._native.Plan([4], [0], native._native.Library(), torch.device("cpu"))
    for _ in range(3):
        assert plan.point(native._native.LISTS, "exp_avg", [state], 0, F32, hold=True) == 1
    assert asked == ["device"]


@no_native
def test_the_cpu_library_has_no_device_to_check():
    for ask in (lambda library: library.check_device(0), lambda library: library.build_info()):
        with pytest.raises(RuntimeError, match="the CPU library serves no devices"):
            ask(native._native.Library())


# ---- long chunks -----------------------------------------------------------------------------------


@no_native
@emulated.needed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_kernels_that_read_ahead_have_the_bits_of_the_cpu(dtype, rule):
    """A list this long has chunks in which a thread moves several packs; shorter ones end in single packs."""
    row = base_row(torch.optim.SGD if rule == "sgd" else torch.optim.AdamW, {"lr": 0.1, "momentum": 0.9})
    row[Column.WEIGHT_DECAY] = 0.01
    shapes = [((1 << 23) + 8193,), (3, 5)]
    results = []
    for backend in (native.BACKEND, emulated.BACKEND):
        group = make_group(dtype, shapes, rows=[row])
        slots = make_slots(group, rule)
        backend.perturb_(group, scalar(100.0))
        backend.descend_(group, rule, slots)
        slots["fresh"] = []
        backend.descend_(group, rule, slots)
        results.append([*group.params, *group.snapshots, *sum(state_lists(slots), [])])
        backend.restore_(group)
        assert same_bits(group.params, group.snapshots)
    assert same_bits(*results)
