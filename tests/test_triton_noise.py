"""Normal numbers of the Triton backend: the bits of plain torch, whatever the sizes, dtypes and addresses."""

from __future__ import annotations

import interpreted
import pytest
import torch
from test_passes import DTYPES, F16, F32, INTERPRETED, TRITON_CUDA, make_group, same_bits

from sam_kernels.backends import torch_random

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_empty", "no_grad")]

sides = pytest.mark.parametrize("side", [INTERPRETED, *TRITON_CUDA])


@pytest.fixture
def no_grad():
    """Backends are called under no_grad."""
    with torch.no_grad():
        yield


# Less than four neighbours, a block that is not whole, whole blocks, and chunks of which one is not whole.
SIZES = [(3,), (0,), (1025,), (8192,), (4096 + 6,)]
NUMBERS = [0, 7, 1, 0xFFFFFFFF, 5]


def drawn(outs, seed, step, numbers):
    """What plain torch draws on the CPU, the same for every device."""
    expected = [None if out is None else torch.zeros(out.shape, dtype=out.dtype) for out in outs]
    torch_random.noise_(make_group(shapes=[(1,)]), expected, seed, step, numbers)
    return expected


@sides
@pytest.mark.parametrize("memory", ["plain", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_has_the_bits_of_plain_torch(side, dtype, memory):
    group = make_group(dtype, SIZES, memory=memory, device=side.device)
    seed, step = -5, 0x80000001
    versions = [g._version for g in group.grads]
    side.backend.noise_(group, group.grads, seed, step, NUMBERS)
    assert same_bits(group.grads, drawn(group.grads, seed, step, NUMBERS))
    assert [g._version for g in group.grads] == [before + 1 for before in versions]


@sides
def test_noise_leaves_out_what_is_not_there_and_has_the_dtype_of_its_list(side):
    group = make_group(F16, [(40,), (9,), (4,)], device=side.device)
    outs = [torch.zeros(40, device=side.device), None, torch.zeros(4, device=side.device)]
    for seed, step in [((1 << 64) - 1, 0), (3, 1)]:
        side.backend.noise_(group, outs, seed, step, [2, 3, 4])
        assert outs[0].dtype == F32 and same_bits(outs, drawn(outs, seed, step, [2, 3, 4]))
    with pytest.raises(ValueError, match="numbers has 2 entries, but the plan has 3 tensors"):
        side.backend.noise_(group, outs, 0, 0, [1, 2])


# ---- the formulas, where they turn ----

# Around every power of two and every change of the series; around every quadrant and half of one.
_TURNS = [1, 2, 3, 1 << 12, 11863283, 11863284, 1 << 23, (1 << 24) - 1, 1 << 24]
FIRST = sorted({k for turn in _TURNS for k in range(turn - 2, turn + 3) if 1 <= k <= 1 << 24})
SECOND = sorted({(n * (1 << 21) + step) % (1 << 24) for n in range(8) for step in (-2, -1, 0, 1, 2)})

if interpreted.PROBLEM is None:
    import triton
    import triton.language as tl

    from sam_kernels.backends.triton.math.normal import normal_pair

    @triton.jit
    def pair_kernel(words, out, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        a = tl.load(words + i, i < n, 0).to(tl.uint32)
        b = tl.load(words + n + i, i < n, 0).to(tl.uint32)
        drawn = normal_pair(a, b)
        tl.store(out + i, drawn.x, i < n)
        tl.store(out + n + i, drawn.y, i < n)


@interpreted.needed
def test_pairs_have_the_bits_of_plain_torch_where_the_formula_turns():
    first = torch.tensor(FIRST).sub_(1).repeat_interleave(len(SECOND))
    words = torch.stack([first, torch.tensor(SECOND).repeat(len(FIRST))]) << 8 | 0xA5
    out = torch.zeros(words.shape)
    pair_kernel[(1,)](words, out, words.shape[1], BLOCK=2048)
    assert words.shape[1] <= 2048
    assert same_bits([out], [torch.stack(torch_random.normal_pair(*words))])
    assert (out == 0).any() and out.isfinite().all()
