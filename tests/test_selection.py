"""Which weights a mask selects: bit for bit what sorting says, however scores are spread over tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fixtures import every_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import ssam
from torch import Tensor
from torch.nn import Parameter

from sam_kernels import SAM, Recipe, ops, recipes
from sam_kernels.bitmask import count_bits, count_words, pack, unpack
from sam_kernels.policies import Member, TopScores
from sam_kernels.ranks import Ranks
from sam_kernels.selection import Block, Part, select, select_channels, select_groups
from sam_kernels.tensor_groups import collect

# 64 is a word; more than 4096 equal or nearly equal scores have their lower bits counted too.
SIZES = (1, 63, 64, 65, 300)
TOTAL = sum(SIZES)
MANY = 9001


def fused_lists(scores: list[Tensor], dtypes: list[torch.dtype], backend: str) -> list[Part]:
    """One part for each dtype among parameters of the scores' shapes; no parameter is ever read."""
    params = [
        Parameter(torch.empty_like(s, dtype=d).fill_(math.nan)) for s, d in zip(scores, dtypes, strict=True)
    ]
    score_of = dict(zip(params, scores, strict=True))
    groups = collect([{"params": params}], Recipe(), lambda _: Member())
    return [
        Part(
            group,
            ops.resolve(group, backend)[0],
            Ranks([score_of[p] for p in group.params]),
            Block([p.numel() for p in group.params], group.device),
            [True] * len(group.params),
        )
        for group in groups
    ]


def selected(
    scores: list[Tensor], keep: int, *, backend: str, exact: bool = False, dtypes: list | None = None
) -> np.ndarray:
    """The elements that are selected, in the order of the parts."""
    parts = fused_lists(scores, dtypes or [torch.float32] * len(scores), backend)
    with torch.no_grad():
        for part in parts:
            part.block.words.fill_(-1)  # of an earlier mask
        select(parts, keep, exact=exact)
    return np.concatenate([bools(part) for part in parts])


def bools(part: Part) -> np.ndarray:
    found = []
    for param, words in zip(part.group.params, part.block.views, strict=True):
        own = unpack(words, torch.zeros(param.numel()))
        assert int(count_bits(words).sum()) == int(own.sum()), "bits beyond the last element are set"
        found.append(own.numpy())
    return np.concatenate(found)


def split(flat: np.ndarray, sizes=SIZES) -> list[Tensor]:
    return list(torch.from_numpy(np.asarray(flat, dtype=np.float32)).split(list(sizes)))


def around(n: int) -> np.ndarray:
    """A few on either side of a threshold that most scores share."""
    x = np.full(n, 0.75, dtype=np.float32)
    x[::97] = np.nextafter(np.float32(0.75), np.float32(1))
    x[5::89] = np.nextafter(np.float32(0.75), np.float32(0))
    return x


SCORES = {
    "normal": lambda n, r: r.standard_normal(n),
    "all equal": lambda n, r: np.full(n, 0.25),
    "all zero": lambda n, r: np.zeros(n),
    "one outlier": lambda n, r: np.where(np.arange(n) == n // 2, 1e30, 1e-30 * r.random(n)),
    "denormal": lambda n, r: r.integers(0, 5, n) * 1e-45,
    "negative zeros": lambda n, r: np.where(r.random(n) < 0.9, np.copysign(0.0, r.random(n) - 0.5), -1e-45),
    "infinite": lambda n, r: np.where(r.random(n) < 0.3, -np.inf, np.where(r.random(n) < 0.3, np.inf, 3e38)),
    "nan": lambda n, r: np.where(r.random(n) < 0.2, np.nan, np.where(r.random(n) < 0.5, np.inf, 1.0)),
    "signed nan": lambda n, r: np.where(r.random(n) < 0.6, np.copysign(np.nan, r.random(n) - 0.5), 1.0),
    "ties": lambda n, r: np.round(r.standard_normal(n), 1),
    "ties at the threshold": lambda n, r: around(n),
    "signs": lambda n, r: np.copysign(np.arange(n), r.random(n) - 0.5),
    "all powers": lambda n, r: np.ldexp(1.0 + r.random(n), r.integers(-149, 128, n)),
}
every_kind = pytest.mark.parametrize("kind", SCORES)


@every_backend
@every_kind
@pytest.mark.parametrize("exact", [False, True], ids=["all ties", "exact"])
def test_selected_are_those_of_topk(kind, exact, backend):
    flat = SCORES[kind](TOTAL, np.random.default_rng(3)).astype(np.float32)
    sizes = torch.from_numpy(np.abs(flat))
    for keep in (0, 1, TOTAL // 3, TOTAL // 2, TOTAL - 1, TOTAL, TOTAL + 7):
        mask = selected(split(flat), keep, backend=backend, exact=exact)
        assert np.array_equal(mask, ssam.top(flat, keep, exact)), keep
        if not 0 < keep <= TOTAL:
            assert mask.sum() == min(keep, TOTAL)
            continue
        best = sizes.topk(keep).values
        if exact:
            assert mask.sum() == keep
            kept = sizes[torch.from_numpy(mask)].sort(descending=True).values
            torch.testing.assert_close(kept, best, rtol=0, atol=0, equal_nan=True)
        else:
            last = sizes.kthvalue(TOTAL - keep + 1).values
            wanted = sizes.isnan() if last.isnan() else sizes.isnan() | (sizes >= last)
            assert np.array_equal(mask, wanted.numpy()), keep


def one_bin(n: int, r) -> np.ndarray:
    """All different, all with the same eleven highest bits: [1, 1.125)."""
    return 1 + r.permutation(n) * 2.0**-22


def one_of_the_second_level(n: int, r) -> np.ndarray:
    """Only the nine lowest bits differ, so that there are many of each."""
    return 1 + r.integers(0, 512, n) * 2.0**-23


def last_number(n: int, r) -> np.ndarray:
    """One score above thousands that are equal to the last bit, and a few below."""
    return np.where(np.arange(n) == 77, 2.0, np.where(np.arange(n) % 3, 1.0, 0.5))


CROWDS = {f.__name__: f for f in (one_bin, one_of_the_second_level, last_number)}


@every_backend
@pytest.mark.parametrize("kind", CROWDS)
@pytest.mark.parametrize("exact", [False, True], ids=["all ties", "exact"])
def test_bins_with_thousands_of_candidates_are_counted_further(kind, exact, backend):
    flat = CROWDS[kind](MANY, np.random.default_rng(5)).astype(np.float32)
    for keep in (1, 2, 1234, 4500, MANY - 1):
        mask = selected(split(flat, (4000, 1, 5000)), keep, backend=backend, exact=exact)
        assert np.array_equal(mask, ssam.top(flat, keep, exact)), keep
        assert mask.sum() == keep if exact else mask.sum() >= keep


@pytest.mark.parametrize("exact", [False, True], ids=["all ties", "exact"])
def test_a_million_scores(exact):
    flat = np.random.default_rng(6).standard_normal(1_000_003).astype(np.float32) ** 2
    mask = selected(split(flat, (700_001, 300_002)), 123_457, backend="foreach", exact=exact)
    assert np.array_equal(mask, ssam.top(flat, 123_457, exact))


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
few_numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 2.0, math.inf, math.nan, 1.0 + 2.0**-23])


@every_backend
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_how_scores_are_spread_over_tensors_makes_no_difference(backend, data):
    flat = data.draw(
        st.lists(few_numbers | st.floats(width=32, allow_nan=True), min_size=1, max_size=200), label="scores"
    )
    keep = data.draw(st.integers(0, len(flat)), label="keep")
    exact = data.draw(st.booleans(), label="exact")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(flat)), max_size=6), label="cuts"))
    sizes = np.diff([0, *cuts, len(flat)]).tolist()
    together = selected(split(flat, [len(flat)]), keep, backend=backend, exact=exact)
    assert np.array_equal(together, ssam.top(np.array(flat, np.float32), keep, exact))
    apart = selected(split(flat, sizes), keep, backend=backend, exact=exact)
    assert np.array_equal(apart, together)
    # Tensors of one dtype are one list. The lists come in the order in which their first tensors do, and
    # sorted so, the elements of the lists are in the order of the tensors.
    dtypes = sorted(
        data.draw(
            st.lists(st.sampled_from(DTYPES), min_size=len(sizes), max_size=len(sizes)), label="dtypes"
        ),
        key=DTYPES.index,
    )
    mixed = selected(split(flat, sizes), keep, backend=backend, exact=exact, dtypes=dtypes)
    assert np.array_equal(mixed, together)


@every_backend
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_an_optimizer_of_several_dtypes_ranks_them_together(backend, data):
    sizes = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=6), label="sizes")
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES[:3]), min_size=len(sizes), max_size=len(sizes)))
    numbers = st.lists(few_numbers, min_size=sum(sizes), max_size=sum(sizes))
    flat = np.array(data.draw(numbers, label="scores"), np.float32)
    params = [Parameter(torch.zeros(n, dtype=d)) for n, d in zip(sizes, dtypes, strict=True)]
    opt = SAM(params, torch.optim.SGD, recipe=recipes.ssam_f(sparsity=0.6), backend=backend, lr=0.1)
    opt.update_masks(scores=split(flat, sizes))
    mask = np.concatenate([opt.masks[p].numpy() for p in params])
    keep = sum(sizes) - round(0.6 * sum(sizes))
    assert np.array_equal(mask, ssam.top(flat, keep, exact=False))


@every_backend
def test_of_equal_scores_the_first_in_memory_wins(backend):
    transposed = torch.ones(3, 4).t()
    last = torch.ones(2, 2, 2, 2).contiguous(memory_format=torch.channels_last)
    parts = fused_lists([transposed, last], [torch.float32] * 2, backend)
    with torch.no_grad():
        select(parts, 5, exact=True)
        (first, other) = parts[0].block.views
        assert pack(unpack(first, transposed)).tolist() == [0b11111]
        assert other.tolist() == [0]
        select(parts, 14, exact=True)
    assert first.tolist() == [0b111111111111]
    assert other.tolist() == [0b11]


@every_backend
@pytest.mark.parametrize("kind", ["all equal", "ties at the threshold", "nan"])
def test_lists_of_several_dtypes_are_one_ranking(kind, backend):
    flat = SCORES[kind](TOTAL, np.random.default_rng(2)).astype(np.float32)
    dtypes = [DTYPES[0], *DTYPES[:4]]
    for keep in (1, 64, 65, 129, TOTAL // 2, TOTAL - 1):
        for exact in (False, True):
            mask = selected(split(flat), keep, backend=backend, exact=exact, dtypes=dtypes)
            assert np.array_equal(mask, ssam.top(flat, keep, exact)), (keep, exact)


@every_backend
def test_tensors_that_take_no_part_keep_their_words(backend):
    parts = fused_lists([torch.arange(100.0), torch.arange(70.0) + 1000], [torch.float32] * 2, backend)
    parts[0].takes_part[1] = False
    parts[0].block.words.fill_(0x5555)
    with torch.no_grad():
        select(parts, 10)
    first, other = parts[0].block.views
    assert unpack(first, torch.zeros(100)).nonzero().flatten().tolist() == list(range(90, 100))
    assert other.tolist() == [0x5555] * 2


@every_backend
@pytest.mark.parametrize("exact", [False, True], ids=["all ties", "exact"])
@pytest.mark.parametrize("outside", [False, True])
def test_selection_among_the_elements_of_a_mask_or_outside_it(outside, exact, backend):
    random = np.random.default_rng(8)
    flat = np.round(random.standard_normal(TOTAL), 1).astype(np.float32)
    old = random.random(TOTAL) < 0.4
    stay = old & (random.random(TOTAL) < 0.5)
    competing = np.flatnonzero(~old if outside else old)

    def words(mask: np.ndarray) -> list[Tensor]:
        return [pack(m) for m in torch.from_numpy(mask).split(list(SIZES))]

    for keep in (0, 1, 50, len(competing) - 1, len(competing), TOTAL):
        (part,) = fused_lists(split(flat), [torch.float32] * len(SIZES), backend)
        part.ranks.within, part.ranks.outside = words(old), outside
        part.block.words.copy_(torch.cat(words(stay)))
        with torch.no_grad():
            select([part], keep, exact=exact, add=outside)
        expected = stay.copy() if outside else np.zeros(TOTAL, dtype=bool)
        expected[competing[ssam.top(flat[competing], keep, exact)]] = True
        assert np.array_equal(bools(part), expected), keep


# ---- n:m -----------------------------------------------------------------------------------------------


def as_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.movedim(0, 1).contiguous().movedim(0, 1)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    return unpack(select_groups(scores, n, m), scores)


def test_the_example_of_the_paper_s_code():
    scores = torch.tensor([[4.0, 3, 2, 1, 1, 2, 3, 4]])
    assert nm_mask(scores, 2, 4).int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 3), (16, 32)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("trailing", [(), (3, 3), (5,)], ids=["linear", "conv2d", "conv1d"])
def test_every_group_of_m_has_its_n_highest(n, m, layout, ties, trailing):
    if layout == "channels_last" and len(trailing) != 2:
        layout = "transposed"
    scores = as_layout(torch.randn(6, 3 * m, *trailing), layout)
    scores = (scores * 2).round() if ties else scores
    mask = nm_mask(scores, n, m)
    assert mask.stride() == scores.stride()
    per_group = mask.movedim(1, -1).reshape(-1, m).sum(1)
    assert (per_group == n).all()
    assert np.array_equal(mask.numpy(), ssam.groups(scores.numpy(), n, m))


def test_equal_scores_keep_the_first_of_each_group():
    assert nm_mask(torch.zeros(2, 8), 2, 4).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2
    nan = torch.tensor([[1.0, math.nan, math.inf, math.nan]])
    assert nm_mask(nan, 2, 4).int().tolist() == [[0, 1, 0, 1]]
    assert nm_mask(nan, 3, 4).int().tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize(("n", "m"), [(2, 256), (1, 257), (300, 512), (3, 600)])
def test_wide_groups(n, m):
    for scores in (torch.randn(3, 2 * m), torch.zeros(3, 2 * m)):
        mask = nm_mask(scores, n, m)
        assert np.array_equal(mask.numpy(), ssam.groups(scores.numpy(), n, m))


def test_n_of_m_through_the_optimizer():
    linear, conv = torch.nn.Linear(12, 5), torch.nn.Conv2d(8, 6, 3)
    narrow, first = torch.nn.Linear(6, 4, bias=False), torch.nn.Conv2d(3, 4, 3, bias=False)
    with torch.no_grad():
        linear.weight.set_(torch.randn(12, 5).t())
    conv.to(memory_format=torch.channels_last)
    scalar = Parameter(torch.tensor(1.0))
    params = [*linear.parameters(), *conv.parameters(), *narrow.parameters(), *first.parameters(), scalar]
    opt = SAM(params, torch.optim.SGD, recipe=recipes.ssam_f(pattern="nm"), backend="reference", lr=0.1)
    scores = {p: torch.randn(p.shape) for p in params}  # contiguous, whatever the parameter is
    opt.update_masks(scores=scores)
    for p in (linear.weight, conv.weight):
        assert np.array_equal(opt.masks[p].numpy(), ssam.groups(scores[p].numpy(), 2, 4))
        assert opt.masks.words(p).shape == (count_words(p.numel()),)
    for p in (linear.bias, conv.bias, narrow.weight, first.weight, scalar):
        assert opt.masks[p].all()
    sparse = linear.weight.numel() + conv.weight.numel()
    assert int(opt.masks.count()) == sum(p.numel() for p in params) - sparse // 2


# ---- whole channels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_whole_channels_reach_the_target_and_overshoot_by_less_than_one(sparsity, ties):
    shapes = [(6, 5), (4, 3, 3, 3), (7,), (9, 2), ()]
    params = [Parameter(torch.zeros(s)) for s in shapes]
    params[1] = Parameter(torch.zeros(shapes[1]).contiguous(memory_format=torch.channels_last))
    recipe = Recipe(mask=TopScores(sparsity, pattern="structured"))
    opt = SAM(params, torch.optim.SGD, recipe=recipe, backend="reference", lr=0.1)
    scores = [(torch.randn(s) * 2).round() if ties else torch.randn(s) for s in shapes]
    opt.update_masks(scores=scores)
    masks = [opt.masks[p].numpy() for p in params]
    keep = recipe.mask.live(sum(p.numel() for p in params))
    count = sum(m.sum() for m in masks)
    assert keep <= count < keep + 27  # the largest channel
    assert int(opt.masks.count()) == count
    flat = [m.reshape(len(m) if m.ndim else 1, -1) for m in masks]
    assert all((m.all(1) == m.any(1)).all() for m in flat)
    arrays = [s.reshape(1).numpy() if s.dim() == 0 else s.numpy() for s in scores]
    # Means of few float32 numbers; where they tie, they do so exactly.
    for got, wanted in zip(masks, ssam.channels(arrays, keep), strict=True):
        assert np.array_equal(got.reshape(wanted.shape), wanted)


def test_channels_of_one_tensor():
    scores = torch.tensor([[1.0, 1.0], [-5.0, 5.0], [3.0, 4.0], [0.0, 0.0]])
    (words,) = select_channels([scores], 3)
    assert unpack(words, scores).int().tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]


# ---- per tensor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True], ids=["all ties", "exact"])
@every_kind
def test_scope_tensor_takes_the_same_share_of_every_tensor(kind, exact):
    flat = SCORES[kind](TOTAL, np.random.default_rng(4)).astype(np.float32)
    params = [Parameter(torch.zeros(n)) for n in (*SIZES, 0)]
    recipe = recipes.ssam_f(sparsity=0.7, scope="tensor", exact=exact)
    opt = SAM(params, torch.optim.SGD, recipe=recipe, backend="reference", lr=0.1)
    scores = split(flat, (*SIZES, 0))
    opt.update_masks(scores=scores)
    for p, own in zip(params, scores, strict=True):
        keep = p.numel() - round(p.numel() * 0.7)
        assert np.array_equal(opt.masks[p].numpy(), ssam.top(own.numpy(), keep, exact))


@pytest.mark.parametrize("pattern", ["unstructured", "nm", "structured"])
def test_nothing_but_empty_tensors(pattern):
    params = [Parameter(torch.zeros(0)), Parameter(torch.zeros(0, 4)), Parameter(torch.zeros(3, 0))]
    opt = SAM(params, torch.optim.SGD, recipe=recipes.ssam_f(pattern=pattern), backend="reference", lr=0.1)
    opt.update_masks(scores=[torch.zeros_like(p) for p in params])
    assert int(opt.masks.count()) == 0
    assert opt.masks.densities().isnan().all()


# ---- the words ----------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_masks_are_packed_in_the_order_of_memory(data):
    shape = data.draw(st.lists(st.integers(0, 7), max_size=4), label="shape")
    order = data.draw(st.permutations(range(len(shape))), label="order")
    seed = data.draw(st.integers(0, 2**32 - 1), label="seed")
    inverse = np.argsort(order).astype(int).tolist()
    memory = np.random.default_rng(seed).random([shape[i] for i in order]) < 0.5
    mask = torch.from_numpy(memory).permute(inverse) if shape else torch.from_numpy(np.asarray(memory))
    words = pack(mask)
    raw = np.packbits(memory.reshape(-1), bitorder="little")
    raw = np.pad(raw, (0, -len(raw) % 8))
    assert words.dtype == torch.int64
    assert words.shape == (count_words(mask.numel()),)
    assert words.numpy().tobytes() == raw.tobytes()
    again = unpack(words, mask)
    assert again.dtype == torch.bool
    assert torch.equal(again, mask)
    if mask.numel():
        assert again.stride() == mask.stride()


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_masks_of_tensors_with_gaps_come_back(data):
    rows, columns, step = (data.draw(st.integers(1, n)) for n in (20, 20, 4))
    mask = (torch.rand(rows, columns * step) < 0.5)[:, ::step]
    words = pack(mask)
    assert words.shape == (count_words(mask.numel()),)
    assert torch.equal(unpack(words, mask), mask)


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, -1, -(2**63), 2**63 - 1]), max_size=40)
)
def test_bits_are_counted(numbers):
    words = torch.tensor(numbers, dtype=torch.int64)
    counts = count_bits(words)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [(n & 0xFFFFFFFFFFFFFFFF).bit_count() for n in numbers]
