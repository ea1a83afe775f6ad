"""The passes over half-precision weights with fp32 masters: every backend against float64 formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_passes import (
    ADAPTIVE,
    ALL,
    BALLS,
    BF16,
    CHUNKS,
    EUCLIDEAN,
    F16,
    F32,
    F64,
    FISHER_ROWS,
    FIXED,
    LANES,
    MIXED,
    ROWS,
    SUM,
    Column,
    copies,
    make_tensor,
    measure,
    numbers,
    oracle_weight,
    same_bits,
    scalar,
)

from sam_kernels.bitmask import pack
from sam_kernels.tensor_groups import TensorGroup

pytestmark = pytest.mark.usefixtures("poisoned_empty", "no_grad")

half = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
every_side = pytest.mark.parametrize("side", ALL)
layouts = pytest.mark.parametrize(
    ("shapes", "memory"),
    [(MIXED, "plain"), (MIXED, "channels_last"), (LANES, "misaligned"), (CHUNKS, "plain")],
    ids=["mixed", "channels_last", "lanes-misaligned", "chunks"],
)

# fp32 results of order 1 of one expression, with fma or without.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


@pytest.fixture
def no_grad():
    """Backends are called under no_grad."""
    with torch.no_grad():
        yield


def make_group(dtype, shapes=MIXED, *, rows=ROWS, missing=(), memory="plain", device="cpu", seed=0):
    """Random masters, their rounded copies and gradients; masters stand where there is a gradient."""
    torch.manual_seed(seed)
    masters = [make_tensor(s, F32, memory, device) for s in shapes]
    params = [make_tensor(s, dtype, memory, device).copy_(m) for s, m in zip(shapes, masters, strict=True)]
    grads = [make_tensor(s, dtype, memory, device) for s in shapes]
    row = [t % len(rows) for t in range(len(shapes))]
    keys = [(0, int(r[Column.METRIC]), r.get(Column.ETA, 0.0)) for r in rows]
    group = TensorGroup(params, row, keys)
    group.write_table([tuple(float(r.get(Column(c), 0.0)) for c in range(14)) for r in rows])
    group.grads = [None if t in missing else g for t, g in enumerate(grads)]
    group.set_masters(masters)
    group.take_snapshots()
    return group


def rounded(group):
    return [m.to(group.dtype) for m in group.masters]


def u_of(group, rows=ROWS):
    """T g per tensor with T of the master, None where it takes no part."""
    return [
        None
        if g is None or rows[r][Column.METRIC] == FIXED
        else oracle_weight(numbers(m), numbers(g), rows[r]) * numbers(g)
        for m, g, r in zip(group.masters, group.grads, group.row, strict=True)
    ]


def assert_rounds(weights, expected, dtype):
    """`expected` is float64. Its rounded value, or the neighbour where fp32 is on the other side of a tie."""
    different = total = 0
    for x, y in zip(weights, expected, strict=True):
        right = torch.from_numpy(np.asarray(y)).to(F32).to(dtype).cpu()
        apart = (x.cpu().view(torch.int16).int() - right.view(torch.int16).int()).abs()
        assert not apart.numel() or apart.max() <= 1
        different += int(apart.sum())
        total += apart.numel()
    assert different <= 0.001 * total + 1, f"{different} of {total} elements differ"


def test_taking_snapshots_takes_the_masters_and_no_memory():
    group = make_group(BF16, missing=(1,))
    taken = [s is m for s, m in zip(group.snapshots, group.masters, strict=True)]
    chosen = [
        g is not None and ROWS[r][Column.METRIC] != FIXED for g, r in zip(group.grads, group.row, strict=True)
    ]
    assert taken == chosen and any(taken) and not all(taken)
    assert group.buffer_bytes() == 0


@every_side
@half
@pytest.mark.parametrize("p", BALLS)
@pytest.mark.parametrize("missing", [(), (0, 4)], ids=str)
def test_the_norm_measures_the_masters(side, dtype, p, missing):
    group = make_group(dtype, missing=missing, device=side.device)
    us = [u for u in u_of(group) if u is not None]
    q = 2 if p == 2 else 1 if p == math.inf else p / (p - 1)
    flat = np.abs(np.concatenate([u.ravel() for u in us]))
    expected = flat.max() if p == math.inf else (flat**q).sum() ** (1 / q)
    norm, arguments = measure(side.backend, group, p)
    if "peak" in arguments:  # powers are taken of u over its peak
        expected = ((flat / flat.max()) ** q).sum() ** (1 / p)
    np.testing.assert_allclose(numbers(norm), expected, rtol=SUM[F32] * 4)


@every_side
@half
def test_the_rounded_weights_would_give_another_norm(side, dtype):
    rows = [{Column.METRIC: ADAPTIVE, Column.ETA: 0.0, Column.RHO: 0.1}]
    group = make_group(dtype, [(5,), (3,)], rows=rows, device=side.device)
    exact, wrong = (
        math.sqrt(
            sum(
                float((numbers(w) ** 2 * numbers(g) ** 2).sum()) for w, g in zip(ws, group.grads, strict=True)
            )
        )
        for ws in (group.masters, group.params)
    )
    assert abs(exact - wrong) > 1e-5 * exact
    assert float(side.backend.sq_norm(group, root=2.0)) == pytest.approx(exact, rel=1e-6)
    each = side.backend.sq_norm(group, of="weight", per_tensor=True)
    np.testing.assert_allclose(numbers(each), [(numbers(m) ** 2).sum() for m in group.masters], rtol=1e-6)


@every_side
@half
@layouts
def test_perturb_rounds_the_perturbed_master_once(side, dtype, shapes, memory):
    group = make_group(dtype, shapes, memory=memory, missing=(1, 6), device=side.device)
    masters, grads = copies(group.masters), copies(group.grads)
    side.backend.sq_norm(group)
    versions = [p._version for p in group.params]
    side.backend.perturb_(group, scalar(5.0, side.device))
    expected = []
    for m, u, g, r in zip(group.masters, u_of(group), group.grads, group.row, strict=True):
        w, row = numbers(m), ROWS[r]
        if u is not None:
            scale = row[Column.RHO] / (5.0 + row[Column.EPS])
            w = w + scale * oracle_weight(w, numbers(g), row) * u
        expected.append(w)
    assert_rounds(group.params, expected, dtype)
    moved = [not torch.equal(a, b) for a, b in zip(group.params, rounded(group), strict=True)]
    assert any(moved) and moved == [m and s is not None for m, s in zip(moved, group.snapshots, strict=True)]
    assert same_bits(group.masters, masters) and same_bits(group.grads, grads)
    advanced = [p._version > v for p, v in zip(group.params, versions, strict=True)]
    assert all(a >= (s is not None) for a, s in zip(advanced, group.snapshots, strict=True))


@every_side
@pytest.mark.parametrize("p", [math.inf, 4])
def test_other_balls_and_tensor_scales(side, p):
    group = make_group(BF16, device=side.device)
    norm, arguments = measure(side.backend, group, p)
    scales = torch.rand(len(group.params), dtype=F64) + 0.5
    side.backend.perturb_(group, norm, tensor_scale=scales.to(side.device), **arguments)
    expected = []
    for t, (m, u, g, r) in enumerate(zip(group.masters, u_of(group), group.grads, group.row, strict=True)):
        w, row = numbers(m), ROWS[r]
        if u is not None:
            if p == math.inf:
                h, scale = np.sign(u), row[Column.RHO]
            else:
                peak = numbers(arguments["peak"])
                h, scale = (
                    np.sign(u) * (np.abs(u) / peak) ** (1 / 3),
                    row[Column.RHO] / (float(norm) + row[Column.EPS]),
                )
            w = w + scale * float(scales[t]) * oracle_weight(w, numbers(g), row) * h
        expected.append(w)
    assert_rounds(group.params, expected, BF16)


@every_side
def test_fishers_metric(side):
    group = make_group(BF16, rows=FISHER_ROWS, device=side.device)
    us = u_of(group, FISHER_ROWS)
    norm = side.backend.sq_norm(group, root=2.0)
    assert float(norm) == pytest.approx(math.sqrt(sum(float((u**2).sum()) for u in us)), rel=1e-5)
    side.backend.perturb_(group, norm / 8)
    expected = []
    for m, u, g, r in zip(group.masters, us, group.grads, group.row, strict=True):
        w, row = numbers(m), FISHER_ROWS[r]
        scale = row[Column.RHO] / (float(norm) / 8 + row[Column.EPS])
        expected.append(w + scale * oracle_weight(w, numbers(g), row) * u)
    assert_rounds(group.params, expected, BF16)


@every_side
@half
@pytest.mark.parametrize("norm", [math.nan, math.inf], ids=str)
def test_a_norm_that_is_not_finite_moves_nothing(side, dtype, norm):
    group = make_group(dtype, [(5,), (16390,)], rows=ROWS[:1], device=side.device)
    group.grads[0].fill_(math.nan)
    before, masters = copies(group.params), copies(group.masters)
    side.backend.perturb_(group, scalar(norm, side.device))
    assert same_bits(group.params, before) and same_bits(group.masters, masters)


@every_side
@half
@layouts
def test_restore_rounds_the_masters(side, dtype, shapes, memory):
    group = make_group(dtype, shapes, memory=memory, missing=(2,), device=side.device)
    before = [
        p.fill_(3.0).clone() if s is None else w
        for p, s, w in zip(group.params, group.snapshots, rounded(group), strict=True)
    ]
    for p in group.params:
        p.fill_(3.0)
    masters = copies(group.masters)
    side.backend.restore_(group)
    assert same_bits(group.params, before) and same_bits(group.masters, masters)


BASE = {
    "sgd": {Column.LR: 0.1},
    "momentum": {Column.LR: 0.1, Column.MOMENTUM: 0.9, Column.DAMPENING: 0.2, Column.WEIGHT_DECAY: 0.01},
    "nesterov": {Column.LR: 0.1, Column.MOMENTUM: 0.9, Column.NESTEROV: 1, Column.MAXIMIZE: 1},
    "adam": {
        Column.LR: 0.1,
        Column.BETA1: 0.9,
        Column.BETA2: 0.99,
        Column.ADAM_EPS: 1e-3,
        Column.WEIGHT_DECAY: 0.1,
    },
    "adamw": {
        Column.LR: 0.1,
        Column.BETA1: 0.8,
        Column.BETA2: 0.95,
        Column.ADAM_EPS: 1e-3,
        Column.WEIGHT_DECAY: 0.1,
        Column.DECOUPLED: 1,
    },
}


def make_descent(name, dtype, shapes=MIXED, *, missing=(), memory="plain", device="cpu"):
    """A perturbed group, the rule, and fp32 state; tensors without a gradient have a master all the same."""
    row = {Column.METRIC: EUCLIDEAN, Column.RHO: 0.5, Column.EPS: 1e-12, **BASE[name]}
    group = make_group(dtype, shapes, rows=[row], missing=missing, memory=memory, device=device)
    group.snapshots = list(group.masters)
    for p in group.params:
        p.fill_(math.nan)  # nobody may read the perturbed weights
    rule = "adam" if name.startswith("adam") else "sgd"
    like = [torch.randn_like(m) for m in group.masters]
    if rule == "adam":
        steps = [torch.tensor(4.0, device=device) for _ in shapes]
        return group, rule, {"exp_avg": like, "exp_avg_sq": [x.abs() for x in copies(like)], "step": steps}
    fresh = [t % 2 == 1 for t in range(len(shapes))]
    buffers = [x.fill_(math.nan) if new else x for x, new in zip(like, fresh, strict=True)]
    return (
        group,
        rule,
        {"momentum_buffer": buffers if name != "sgd" else [None] * len(shapes), "fresh": fresh},
    )


def oracle_step(name, m, g, state):
    """The master and the state after the update, float64."""
    r = {c: 0.0 for c in Column} | BASE[name]
    g = -g if r[Column.MAXIMIZE] else g
    if not name.startswith("adam"):
        g = g + r[Column.WEIGHT_DECAY] * m
        if name == "sgd":
            return m - r[Column.LR] * g, []
        old, fresh = state
        buffer = g if fresh else r[Column.MOMENTUM] * old + (1 - r[Column.DAMPENING]) * g
        along = g + r[Column.MOMENTUM] * buffer if r[Column.NESTEROV] else buffer
        return m - r[Column.LR] * along, [buffer]
    mean, square, t = state
    if r[Column.DECOUPLED]:
        m = m * (1 - r[Column.LR] * r[Column.WEIGHT_DECAY])
    else:
        g = g + r[Column.WEIGHT_DECAY] * m
    b1, b2 = r[Column.BETA1], r[Column.BETA2]
    mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g * g
    root = np.sqrt(square / (1 - b2**t)) + r[Column.ADAM_EPS]
    return m - r[Column.LR] * mean / (1 - b1**t) / root, [mean, square]


@every_side
@half
@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "inv_scale"])
def test_descend_is_its_formula_in_fp32(side, dtype, name, scaled):
    group, rule, slots = make_descent(name, dtype, missing=(3,), device=side.device)
    masters, before = copies(group.masters), {k: copies(v) for k, v in slots.items() if k != "fresh"}
    more = {"inv_scale": torch.tensor(0.5, device=side.device)} if scaled else {}
    side.backend.descend_(group, rule, slots, guard=scalar(1.0, side.device), **more)
    assert same_bits(group.params, rounded(group)), "w = round(master)"
    for t, (m, g) in enumerate(zip(masters, group.grads, strict=True)):
        if g is None:
            assert same_bits([group.masters[t]], [m])
            continue
        if rule == "adam":
            state = [numbers(before["exp_avg"][t]), numbers(before["exp_avg_sq"][t]), 5]
            after = [slots["exp_avg"][t], slots["exp_avg_sq"][t]]
            assert float(slots["step"][t]) == 5
        else:
            old = before["momentum_buffer"][t]
            state = [None if old is None else numbers(old), slots["fresh"][t]]
            after = [slots["momentum_buffer"][t]]
        expected, expected_state = oracle_step(name, numbers(m), numbers(g) * (0.5 if scaled else 1), state)
        np.testing.assert_allclose(numbers(group.masters[t]), expected, **CLOSE)
        for x, y in zip(after, expected_state, strict=False):
            assert x.dtype == F32
            np.testing.assert_allclose(numbers(x), y, **CLOSE)


@every_side
@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize(
    ("shapes", "memory"), [(LANES, "misaligned"), (CHUNKS, "plain"), (MIXED, "channels_last")]
)
def test_descend_at_every_size(side, name, shapes, memory):
    group, rule, slots = make_descent(name, BF16, shapes, memory=memory, device=side.device)
    masters, before = copies(group.masters), {k: copies(v) for k, v in slots.items() if k != "fresh"}
    side.backend.descend_(group, rule, slots)
    assert same_bits(group.params, rounded(group))
    for t, (m, g) in enumerate(zip(masters, group.grads, strict=True)):
        if rule == "adam":
            state = [numbers(before["exp_avg"][t]), numbers(before["exp_avg_sq"][t]), 5]
        else:
            state = [numbers(before["momentum_buffer"][t]), slots["fresh"][t]]
        expected, _ = oracle_step(name, numbers(m), numbers(g), state)
        np.testing.assert_allclose(numbers(group.masters[t]), expected, **CLOSE)


@every_side
@half
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("how", ["guard", "found_inf"])
def test_an_unsafe_descent_rounds_the_masters_and_does_nothing_else(side, dtype, name, how):
    group, rule, slots = make_descent(name, dtype, missing=(3,), device=side.device)
    written = [*group.masters, *(x for k, xs in slots.items() if k != "fresh" for x in xs)]
    before = copies(written)
    bad = (
        {"guard": scalar(math.nan, side.device)}
        if how == "guard"
        else {"found_inf": torch.ones((), device=side.device)}
    )
    group.grads[0].fill_(math.inf)
    side.backend.descend_(group, rule, slots, **bad)
    assert same_bits(written, before)
    assert same_bits(group.params, rounded(group))


@every_side
@half
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_masks_choose_what_is_perturbed_and_nothing_else(side, dtype, name):
    shapes = [(5000,), (130,), (16390,), (7,), (64,)]
    group, rule, slots = make_descent(name, dtype, shapes, device=side.device)
    for p, w in zip(group.params, rounded(group), strict=True):
        p.copy_(w)
    chosen = [torch.rand(s) < 0.3 for s in shapes]
    chosen[0][64:2048] = False  # words that are 0
    group.set_masks([pack(c).to(side.device) for c in chosen[:-1]] + [None])
    norm = side.backend.sq_norm(group, masked=True)
    chosen[-1][:] = True
    expected = sum(
        float((numbers(g)[c.numpy()] ** 2).sum()) for g, c in zip(group.grads, chosen, strict=True)
    )
    assert float(norm) == pytest.approx(expected, rel=SUM[F32])
    side.backend.perturb_(group, scalar(5.0, side.device))
    moved = [
        numbers(m) + np.where(c.numpy(), 0.1 * numbers(g), 0.0)
        for m, g, c in zip(group.masters, group.grads, chosen, strict=True)
    ]
    assert_rounds(group.params, moved, dtype)
    for p, w, c in zip(group.params, rounded(group), chosen, strict=True):
        assert torch.equal(p.cpu()[~c], w.cpu()[~c])
    perturbed = copies(group.params)
    side.backend.restore_(group)
    assert same_bits(group.params, rounded(group))
    for p, w in zip(group.params, perturbed, strict=True):
        p.copy_(w)
    masters = copies(group.masters)
    before = {k: copies(v) for k, v in slots.items() if k != "fresh"}
    side.backend.descend_(group, rule, slots)
    assert same_bits(group.params, rounded(group))
    for t, (m, g) in enumerate(zip(masters, group.grads, strict=True)):
        state = (
            [numbers(before["exp_avg"][t]), numbers(before["exp_avg_sq"][t]), 5]
            if rule == "adam"
            else [numbers(before["momentum_buffer"][t]), slots["fresh"][t]]
        )
        np.testing.assert_allclose(
            numbers(group.masters[t]), oracle_step(name, numbers(m), numbers(g), state)[0], **CLOSE
        )


@every_side
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_fp16_masters_beyond_its_range_are_infinite_weights(side, name):
    group, _, _ = make_descent(name, F16, [(40,)], device=side.device)
    group.masters[0].fill_(1e6)
    side.backend.restore_(group)
    assert torch.isinf(group.params[0]).all()
