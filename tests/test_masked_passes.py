"""Masks in the passes, and the three parts of their selection: every backend against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles.philox import random_word
from test_passes import (
    ALL,
    BF16,
    DTYPES,
    EMULATED,
    F32,
    FISHER_ROWS,
    FOREACH,
    INTERPRETED,
    MIXED,
    NATIVE,
    OTHERS,
    REFERENCE,
    ROWS,
    SUM,
    assert_close,
    copies,
    make_group,
    no_native,
    numbers,
    same_bits,
    scalar,
)

from sam_kernels.backends import native, reference
from sam_kernels.bitmask import count_words, pack, unpack
from sam_kernels.ranks import Ranks
from sam_kernels.tensor_groups import FIXED, Column

pytestmark = pytest.mark.usefixtures("poisoned_empty", "no_grad")

# Around a word, a SIMD lane and the chunks of the engines; an empty tensor last.
SIZES = [(1,), (63,), (64,), (65,), (17, 31), (0,), (128, 9), (16383,), (16384,), (16385,), (4097,), (0,)]


@pytest.fixture
def no_grad():
    """Backends are called under no_grad."""
    with torch.no_grad():
        yield


def make_masks(group, density=0.5, *, dense=(), blocks=True, seed=1):
    """Random bits; every third word is 0 and every seventh all ones where blocks are wanted."""
    random = np.random.default_rng(seed)
    masks = []
    for t, p in enumerate(group.params):
        bits = random.random(p.numel()) < density
        if blocks:
            word = np.arange(p.numel()) // 64
            bits = (bits & (word % 3 != 1)) | (word % 7 == 3)
        mask = torch.empty_like(p, dtype=torch.bool, requires_grad=False)
        flat = mask.as_strided((p.numel(),), (1,), mask.storage_offset())
        flat.copy_(torch.from_numpy(bits))
        masks.append(None if t in dense else pack(mask))
    return masks


def bools(group, masks):
    return [
        torch.ones_like(p, dtype=torch.bool) if words is None else unpack(words, p)
        for p, words in zip(group.params, masks, strict=True)
    ]


def masked_group(dtype, shapes=SIZES, *, density=0.5, dense=(2, 6), rows=ROWS[:2], device="cpu", **more):
    group = make_group(dtype, shapes, rows=rows, device=device, **more)
    group.masks = make_masks(group, density, dense=dense)
    return group


def choose(mask, moved, still):
    return [torch.where(m, x, y) for m, x, y in zip(mask, moved, still, strict=True)]


shapes_of_perturbation = pytest.mark.parametrize("shape", ["linear", "sign", "powered"])


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@shapes_of_perturbation
@pytest.mark.parametrize("memory", ["plain", "misaligned", "channels_last"])
def test_only_selected_elements_move_and_they_as_without_a_mask(side, dtype, shape, memory):
    shapes = [(3, 5), (5, 4, 3, 3), (130,), (0,), (9, 16, 3, 3)] if memory == "channels_last" else SIZES
    group = masked_group(dtype, shapes, memory=memory, device=side.device)
    before, mask = copies(group.params), bools(group, group.masks)
    arguments = {"shape": shape}
    if shape == "powered":
        arguments |= {"q": 1.5, "peak": scalar(4.0, side.device)}
    side.backend.perturb_(group, scalar(3.0, side.device), **arguments)
    twin = make_group(dtype, shapes, rows=ROWS[:2], memory=memory, device=side.device)
    side.backend.perturb_(twin, scalar(3.0, side.device), **arguments)
    assert same_bits(group.params, choose(mask, twin.params, before))
    # Every word with a bit in it has its snapshot.
    for m, words, snapshot, old in zip(mask, group.masks, group.snapshots, before, strict=True):
        if words is not None:
            m = unpack(torch.where(words == 0, 0, -1), m)
        assert torch.equal(snapshot[m], old[m])
    side.backend.restore_(group)
    assert same_bits(group.params, before)


@pytest.mark.parametrize("side", ALL)
def test_infinite_gradients_of_unselected_elements_do_not_reach_them(side):
    group = masked_group(F32, device=side.device)
    before, mask = copies(group.params), bools(group, group.masks)
    for g, m in zip(group.grads, mask, strict=True):
        g[~m] = math.inf
    side.backend.perturb_(group, scalar(3.0, side.device))
    assert all(torch.isfinite(p).all() for p in group.params)
    assert same_bits(choose(mask, before, group.params), before)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_moves_nothing(side, norm):
    group = masked_group(F32, device=side.device)
    before = copies(group.params)
    side.backend.perturb_(group, scalar(norm, side.device))
    assert same_bits(group.params, before)
    side.backend.restore_(group)
    assert same_bits(group.params, before)


@pytest.mark.parametrize("side", ALL)
def test_tensors_without_gradient_or_part_stay_out(side):
    group = masked_group(F32, MIXED, dense=(1,), rows=ROWS, missing=(3,), device=side.device)
    before, mask = copies(group.params), bools(group, group.masks)
    side.backend.perturb_(group, scalar(3.0, side.device))
    for t, (p, old, m) in enumerate(zip(group.params, before, mask, strict=True)):
        moved = t != 3 and group.keys[group.row[t]][1] != FIXED
        assert torch.equal(p != old, m & (group.grads[t] != 0) if moved else torch.zeros_like(m)), t
    side.backend.restore_(group)
    assert same_bits(group.params, before)


def state_of(group, rule, seed=5):
    torch.manual_seed(seed)
    fresh = [torch.randn(p.shape).abs().to(p) for p in group.params]
    fresh = [torch.empty_like(p).copy_(x) for p, x in zip(group.params, fresh, strict=True)]
    if rule == "sgd":
        return {"momentum_buffer": fresh, "fresh": []}
    step = [torch.tensor(3.0, device=group.device) for _ in group.params]
    return {"exp_avg": fresh, "exp_avg_sq": copies(fresh), "step": step}


BASE = {
    Column.LR: 0.1,
    Column.WEIGHT_DECAY: 0.01,
    Column.MOMENTUM: 0.9,
    Column.BETA1: 0.9,
    Column.BETA2: 0.99,
    Column.ADAM_EPS: 1e-3,
}


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("memory", ["plain", "misaligned"])
def test_the_update_starts_from_what_was_there_before_the_perturbation(side, dtype, rule, memory):
    rows = [{**row, **BASE} for row in ROWS[:2]]
    group = masked_group(dtype, rows=rows, missing=(4,), memory=memory, device=side.device)
    twin = make_group(dtype, SIZES, rows=rows, missing=(4,), memory=memory, device=side.device)
    twin.snapshots = [None] * len(twin.params)
    side.backend.perturb_(group, scalar(3.0, side.device))
    slots, twins = state_of(group, rule), state_of(twin, rule)
    side.backend.descend_(group, rule, slots)
    side.backend.descend_(twin, rule, twins)
    assert same_bits(group.params, twin.params)
    for name in slots:
        assert name == "fresh" or same_bits(slots[name], twins[name])


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_an_update_that_is_skipped_restores(side, rule):
    rows = [{**row, **BASE} for row in ROWS[:2]]
    group = masked_group(F32, rows=rows, device=side.device)
    before = copies(group.params)
    side.backend.perturb_(group, scalar(3.0, side.device))
    slots = state_of(group, rule)
    kept = {name: copies(tensors) for name, tensors in slots.items()}
    side.backend.descend_(group, rule, slots, guard=scalar(math.nan, side.device))
    side.backend.restore_(group)
    assert same_bits(group.params, before)
    assert all(same_bits(slots[name], kept[name]) for name in slots)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moment", ["square", "peak"])
def test_the_masked_norm_is_that_of_the_selected_elements(side, dtype, moment):
    group = masked_group(dtype, device=side.device)
    mask = bools(group, group.masks)
    whole = side.backend.sq_norm(group, moment=moment, per_tensor=True)
    masked = side.backend.sq_norm(group, moment=moment, per_tensor=True, masked=True)
    for g, m in zip(group.grads, mask, strict=True):
        g.copy_(torch.where(m, g, 0))
    group.masks = None
    expected = reference.BACKEND.sq_norm(group, moment=moment, per_tensor=True)
    np.testing.assert_allclose(numbers(masked), numbers(expected), rtol=SUM[dtype])
    assert (numbers(masked) <= numbers(whole) * (1 + SUM[dtype])).all()
    total = side.backend.sq_norm(group, moment=moment, masked=True)  # no masks: the whole norm
    joined = expected.max() if moment == "peak" else expected.sum()
    np.testing.assert_allclose(numbers(total), numbers(joined), rtol=SUM[dtype])


@pytest.mark.parametrize("side", OTHERS)
def test_fishers_metric_under_masks(side):
    group, twin = (masked_group(F32, rows=FISHER_ROWS, device=side.device) for _ in range(2))
    expected = reference.BACKEND.sq_norm(twin, masked=True, per_tensor=True)
    each = side.backend.sq_norm(group, masked=True, per_tensor=True)
    np.testing.assert_allclose(numbers(each), numbers(expected), rtol=SUM[F32])
    for backend, own in ((side.backend, group), (reference.BACKEND, twin)):
        backend.perturb_(own, scalar(3.0, side.device))
    assert_close(group.params, twin.params, F32)


@pytest.mark.parametrize("side", OTHERS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_gradient_in_its_own_snapshot_under_masks(side, dtype):
    group, twin = (masked_group(dtype, device=side.device) for _ in range(2))
    before = copies(group.params)
    for t, g in enumerate(group.grads):
        group.grads[t] = group.snapshots[t].copy_(g)
    for own in (group, twin):
        side.backend.perturb_(own, scalar(3.0, side.device))
    assert same_bits(group.params, twin.params)
    side.backend.restore_(group)
    assert same_bits(group.params, before)


@pytest.mark.parametrize("side", OTHERS)
def test_masked_norm_of_an_infinite_gradient_outside_the_mask_is_finite(side):
    group = masked_group(F32, device=side.device)
    for g, m in zip(group.grads, bools(group, group.masks), strict=True):
        g[~m] = math.inf
    assert math.isfinite(side.backend.sq_norm(group, masked=True))
    assert not math.isfinite(side.backend.sq_norm(group))


# Backends that keep compact snapshots; the others refuse, and the automatic choice steps down.
COMPACT = [REFERENCE, FOREACH, NATIVE]


@pytest.mark.parametrize("side", COMPACT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", ["plain", "misaligned", "channels_last"])
@pytest.mark.parametrize("rule", [None, "sgd", "adam"])
def test_compact_snapshots_hold_the_selected_elements_alone(side, dtype, memory, rule):
    shapes = [(3, 5), (5, 4, 3, 3), (130,), (0,), (9, 16, 3, 3)] if memory == "channels_last" else SIZES
    rows = [{**row, **BASE} for row in ROWS[:2]]
    group, twin = (
        masked_group(dtype, shapes, rows=rows, memory=memory, device=side.device, missing=(1,))
        for _ in range(2)
    )
    before, mask = copies(group.params), bools(group, group.masks)
    group.compact = True
    group.set_masks(group.masks)
    group.take_snapshots()
    twin.snapshots[1] = None
    for t, (m, words, g) in enumerate(zip(mask, group.masks, group.grads, strict=True)):
        size = m.numel() if words is None else int(m.sum())
        assert g is None if group.snapshots[t] is None else group.snapshots[t].numel() == size
        if group.snapshots[t] is not None:
            group.snapshots[t].fill_(math.nan)
    for one in (group, twin):
        side.backend.perturb_(one, scalar(3.0, side.device))
    assert_close(group.params, twin.params, dtype)
    if rule is None:
        side.backend.restore_(group)
        assert same_bits(group.params, before)
        return
    slots = state_of(group, rule)
    side.backend.descend_(group, rule, slots)
    side.backend.descend_(twin, rule, state_of(twin, rule))
    assert same_bits(group.params, twin.params)


@pytest.mark.parametrize("side", COMPACT)
@pytest.mark.parametrize("rule", [None, "sgd"])
def test_compact_snapshots_restore_where_nothing_moved(side, rule):
    group = masked_group(F32, rows=[{**row, **BASE} for row in ROWS[:2]], device=side.device)
    before = copies(group.params)
    group.compact = True
    group.set_masks(group.masks)
    group.take_snapshots()
    side.backend.perturb_(group, scalar(math.nan, side.device))
    assert same_bits(group.params, before)
    if rule is None:
        side.backend.restore_(group)
    else:
        side.backend.descend_(group, rule, state_of(group, rule), guard=scalar(math.nan, side.device))
    assert same_bits(group.params, before)
    side.backend.perturb_(group, scalar(3.0, side.device))
    group.copy_back()  # what a failed step does, without any backend
    assert same_bits(group.params, before)


@pytest.mark.parametrize("side", [EMULATED, INTERPRETED])
def test_backends_without_compact_snapshots_say_so(side):
    group = make_group(F32, device=side.device)
    assert side.backend.refusal(group) is None
    group.compact = True
    assert "compact ones are served by foreach" in side.backend.refusal(group)


# ---- selection -------------------------------------------------------------------------------------

ADVERSARIAL = {
    "normal": lambda n, r: r.standard_normal(n),
    "equal": lambda n, r: np.full(n, 0.25),
    "outlier": lambda n, r: np.where(np.arange(n) == n // 2, 1e30, 0.0),
    "denormal": lambda n, r: r.integers(0, 5, n) * 1e-45,
    "zeros": lambda n, r: np.where(r.random(n) < 0.5, 0.0, -0.0),
    "infinite": lambda n, r: np.where(r.random(n) < 0.2, -np.inf, r.standard_normal(n)),
    "nan": lambda n, r: np.where(r.random(n) < 0.2, np.nan, np.where(r.random(n) < 0.2, np.inf, 1.0)),
    "steps": lambda n, r: np.round(r.standard_normal(n), 1),
}
scores_of_every_kind = pytest.mark.parametrize("kind", ADVERSARIAL)


def make_scores(group, kind, dtype=F32, missing=()):
    random = np.random.default_rng(7)
    scores = []
    for t, p in enumerate(group.params):
        values = torch.from_numpy(ADVERSARIAL[kind](p.numel(), random)).to(p.device, dtype)
        score = torch.empty_like(p, dtype=dtype, requires_grad=False)
        score.as_strided((p.numel(),), (1,)).copy_(values)
        scores.append(None if t in missing else score)
    return scores


def oracle_ranks(group, ranks):
    """Per tensor in memory order, as whole numbers; -1 where an element takes no part."""
    found = []
    for t, p in enumerate(group.params):
        n = p.numel()
        if ranks.scores is None:
            rank = random_word(ranks.seed, ranks.step, ranks.numbers[t], np.arange(n)).astype(np.int64) >> 1
        elif ranks.scores[t] is None:
            rank = np.zeros(n, dtype=np.int64)
        else:
            x = ranks.scores[t].as_strided((n,), (1,), ranks.scores[t].storage_offset())
            x = np.abs(x.float().cpu().numpy())
            rank = np.where(np.isnan(x), 0x7F800001, x.view(np.int32).astype(np.int64))
        part = np.ones(n, dtype=bool)
        if ranks.within is not None:
            words = ranks.within[t]
            if words is not None:
                part = unpack(words, torch.zeros(n)).cpu().numpy()
            part = ~part if ranks.outside else part
        found.append(np.where(part, rank, -1))
    return found


def empty_masks(group, missing=(), fill=-1):
    """Words full of ones, which a pass must overwrite."""
    return [
        None if t in missing else torch.full((count_words(p.numel()),), fill, device=group.device)
        for t, p in enumerate(group.params)
    ]


def starts(group):
    words = [count_words(p.numel()) for p in group.params]
    return [64 * sum(words[:t]) for t in range(len(words))]


def ranks_of_kind(group, kind):
    """Scores, scores under a mask or outside one, and random numbers."""
    within = make_masks(group, 0.3, dense=(2,))
    if kind == "random":
        return Ranks(seed=11 << 40 | 5, step=3, numbers=[7 * t for t in range(len(group.params))])
    if kind == "random outside":
        numbers = list(range(len(group.params)))
        return Ranks(seed=1, step=0, numbers=numbers, within=within, outside=True)
    if kind == "plain":
        return Ranks(make_scores(group, "normal", missing=(3,)))
    return Ranks(make_scores(group, "normal"), within=within, outside=kind == "outside")


kinds_of_ranks = pytest.mark.parametrize(
    "ranks_kind", ["plain", "within", "outside", "random", "random outside"]
)


@pytest.mark.parametrize("side", ALL)
@kinds_of_ranks
def test_counts_are_those_of_the_ranks(side, ranks_kind):
    group = make_group(F32, SIZES, rows=ROWS[:1], device=side.device)
    ranks = ranks_of_kind(group, ranks_kind)
    masks = empty_masks(group, missing=(4,))
    flat = np.concatenate([r for t, r in enumerate(oracle_ranks(group, ranks)) if t != 4])
    flat = flat[flat >= 0]
    common = int(np.bincount(flat >> 20).argmax())
    for prefix, shift, bits in [(0, 20, 11), (common, 9, 11), (common << 11 | 1000, 0, 9)]:
        counts = side.backend.count_ranks(group, ranks, masks, prefix=prefix, shift=shift, bits=bits)
        chosen = flat[flat >> (shift + bits) == prefix] >> shift & (1 << bits) - 1
        assert counts.shape == (1 << bits,) and counts.dtype == torch.int64
        assert np.array_equal(counts.cpu().numpy(), np.bincount(chosen, minlength=1 << bits))


@pytest.mark.parametrize("side", ALL)
@scores_of_every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_every_kind_are_counted_by_their_bits(side, kind, dtype):
    group = make_group(dtype, [(130,), (64, 5), (1,)], rows=ROWS[:1], device=side.device)
    ranks = Ranks(make_scores(group, kind, dtype))
    flat = np.concatenate(oracle_ranks(group, ranks))
    counts = side.backend.count_ranks(group, ranks, empty_masks(group), prefix=0, shift=20, bits=11)
    assert np.array_equal(counts.cpu().numpy(), np.bincount(flat >> 20, minlength=2048))


@pytest.mark.parametrize("side", ALL)
@kinds_of_ranks
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shift", [0, 20])
def test_marks_are_the_higher_ranks_and_candidates_those_at_the_threshold(side, ranks_kind, add, shift):
    group = make_group(F32, SIZES, rows=ROWS[:1], device=side.device)
    ranks = ranks_of_kind(group, ranks_kind)
    truth = oracle_ranks(group, ranks)
    flat = np.concatenate(truth)
    present = np.sort(flat[flat >= 0])
    threshold = int(present[len(present) // 2]) >> shift
    masks = make_masks(group, 0.2, dense=(4,), seed=9) if add else empty_masks(group, missing=(4,))
    old = [
        np.zeros(p.numel(), bool) if m is None else np_bits(m, p)
        for p, m in zip(group.params, masks, strict=True)
    ]
    candidates = torch.full((20000,), -1, dtype=torch.int64, device=side.device)
    found = torch.zeros(1, dtype=torch.int64, device=side.device)
    side.backend.mark_(
        group, ranks, masks,
        threshold=threshold, shift=shift, add=add,
        positions=starts(group), candidates=candidates, found=found,
    )  # fmt: skip
    expected = []
    for t, (p, rank, start) in enumerate(zip(group.params, truth, starts(group), strict=True)):
        if t == 4:
            continue
        high = (rank >= 0) & (rank >> shift > threshold)
        assert np.array_equal(np_bits(masks[t], p), high | old[t] if add else high), t
        assert np_bits(masks[t], torch.zeros(count_words(p.numel()) * 64))[p.numel() :].sum() == 0
        at = np.flatnonzero((rank >= 0) & (rank >> shift == threshold))
        expected += [(int(rank[i]) & (1 << shift) - 1) << 43 | (1 << 43) - 1 - (start + int(i)) for i in at]
    assert int(found) == len(expected) > 0
    assert sorted(candidates[: len(expected)].tolist()) == sorted(expected)
    assert (candidates[len(expected) :] == -1).all()


def np_bits(words, p):
    return unpack(words, torch.zeros(p.numel())).cpu().numpy()


@pytest.mark.parametrize("side", ALL)
def test_candidates_beyond_the_array_are_counted_only(side):
    group = make_group(F32, SIZES, rows=ROWS[:1], device=side.device)
    ranks = Ranks(make_scores(group, "equal"))
    room = torch.full((101,), -7, dtype=torch.int64, device=side.device)
    found = torch.zeros(1, dtype=torch.int64, device=side.device)
    threshold = int(np.float32(0.25).view(np.int32)) >> 20
    side.backend.mark_(
        group, ranks, empty_masks(group), threshold=threshold, shift=20,
        positions=starts(group), candidates=room[:100], found=found,
    )  # fmt: skip
    assert int(found) == sum(p.numel() for p in group.params)
    assert room[100] == -7 and len(set(room[:100].tolist())) == 100


@pytest.mark.parametrize("side", ALL)
def test_a_threshold_below_zero_marks_everything_that_takes_part(side):
    group = make_group(F32, SIZES, rows=ROWS[:1], device=side.device)
    within = make_masks(group, 0.5)
    masks = empty_masks(group, fill=0)
    side.backend.mark_(group, Ranks(make_scores(group, "zeros"), within), masks, threshold=-1, shift=0)
    assert same_bits(masks, within)


@pytest.mark.parametrize("side", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", ["plain", "misaligned"])
def test_squares_are_accumulated_in_fp32(side, dtype, memory):
    group = make_group(dtype, SIZES, rows=ROWS[:1], missing=(4,), memory=memory, device=side.device)
    scores = make_scores(group, "normal", missing=(3,))
    expected = [
        score if score is None or g is None else score + g.float().square()
        for score, g in zip(copies(scores), group.grads, strict=True)
    ]
    side.backend.accumulate_squares_(group, scores)
    for got, want in zip(scores, expected, strict=True):
        if want is not None:
            np.testing.assert_allclose(numbers(got), numbers(want), rtol=3e-7, atol=3e-7)
            assert got.dtype == F32


@pytest.mark.parametrize("side", OTHERS)
def test_a_selection_leaves_the_masks_of_the_group_in_force(side):
    group = masked_group(F32, device=side.device)
    before, mask = copies(group.params), bools(group, group.masks)
    side.backend.perturb_(group, scalar(3.0, side.device))
    side.backend.restore_(group)
    side.backend.mark_(group, Ranks(make_scores(group, "normal")), empty_masks(group), threshold=5, shift=0)
    side.backend.count_ranks(
        group, Ranks(make_scores(group, "normal")), empty_masks(group), prefix=0, shift=20, bits=11
    )
    side.backend.perturb_(group, scalar(3.0, side.device))
    assert same_bits(choose(mask, before, group.params), before)


@no_native
@pytest.mark.parametrize("pattern", ["random", "scattered", "rows"])
def test_neither_threads_nor_streaming_stores_change_a_bit(pattern):
    """Large enough that the passes run on several threads and write past the caches."""
    shapes = [(3, 1024, 1024), (700_001,), (65,)]
    density = {"random": 0.5, "scattered": 0.01, "rows": 0.1}[pattern]
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, None):  # None: the same by the reference
        group = make_group(F32, shapes, rows=[{**ROWS[0], **BASE}])
        group.masks = make_masks(group, density, blocks=False)
        if pattern == "rows":
            for words in group.masks:
                words.copy_(torch.where(torch.arange(len(words)) // 16 % 10 == 0, -1, 0))
            group.masks[1][-1] &= (1 << 700_001 % 64) - 1
            group.masks[2][-1] &= 1
        slots = state_of(group, "sgd")
        side = reference.BACKEND if count is None else native.BACKEND
        try:
            torch.set_num_threads(count or threads)
            norm = side.sq_norm(group, root=2.0, masked=True)
            side.perturb_(group, scalar(3.0))
            moved = copies(group.params)
            side.descend_(group, "sgd", slots)
            ranks = Ranks(make_scores(group, "normal"))
            counts = side.count_ranks(group, ranks, empty_masks(group), prefix=0, shift=20, bits=11)
            marks = empty_masks(group)
            room, found = torch.zeros(1 << 20, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            side.mark_(
                group, ranks, marks, threshold=0x3F800000 >> 16, shift=16,
                positions=starts(group), candidates=room, found=found,
            )  # fmt: skip
        finally:
            torch.set_num_threads(threads)
        results.append((norm, counts, room.sort().values, found, *marks, *moved, *group.params))
    one, two, expected = results
    assert same_bits(one, two)
    assert torch.allclose(one[0], expected[0], rtol=SUM[F32])
    assert same_bits(one[1:-6], expected[1:-6])
    for got, want in zip(one[-6:], expected[-6:], strict=True):
        np.testing.assert_allclose(numbers(got), numbers(want), rtol=1e-5, atol=1e-6)
