"""sampling: which samples a step is taken on, what that costs, and what the choice leaves behind."""

from __future__ import annotations

import collections
from contextlib import nullcontext

import pytest
import torch
from cases import row
from fixtures import bits, small_net
from torch import nn
from torch.nn import Parameter

from sam_kernels import SAM, recipes
from sam_kernels.sampling import sharpest, top_losses

# The published numbers carry nine significant digits.
DIGITS = 2e-8


class Lines:
    """A loss per sample that is linear in one weight: ``at_0 + rise * w``. Counts what it is asked for."""

    def __init__(self, at_0, rise, start: float = 0.0) -> None:
        self.w = Parameter(row(start))
        self.batch = (torch.tensor(at_0, dtype=torch.float64), torch.tensor(rise, dtype=torch.float64))
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, batch, **kwargs):
        at_0, rise = batch
        self.calls.append((len(at_0), torch.is_grad_enabled()))
        return at_0 + rise * self.w

    def optimizer(self, **options) -> SAM:
        """With this radius e is 1 for any gradient above 0, so w goes from 0 to 1 and back."""
        return SAM([self.w], torch.optim.SGD, lr=0.1, backend="reference", **{"rho": 1.0, **options})


def least_squares():
    """The K-SAM vector: l_i = (x_i . w - y_i)^2 / 2."""
    w = Parameter(row(1, -2, 3))
    x = torch.stack([row(1, 0, 2), row(0, 1, -1), row(2, 1, 0), row(1, -1, 1)])
    y = row(6.2, -3.95, 1.0, 7.02)
    opt = SAM([w], torch.optim.SGD, rho=0.05, lr=0.1, backend="reference")
    return w, opt, (x, y), lambda batch: 0.5 * (batch[0] @ w - batch[1]) ** 2


# ---- K-SAM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [2, 0.5])
def test_ksam_takes_both_gradients_on_the_samples_chosen_at_the_weights(keep):
    w, opt, batch, losses = least_squares()
    closure = top_losses(losses, batch, keep=keep)
    loss = opt.step(closure)
    assert closure.kept.tolist() == [1, 3]
    torch.testing.assert_close(loss, torch.tensor((0.55125 + 0.5202) / 2, dtype=torch.float64))
    torch.testing.assert_close(w.data, row(1.05335091, -2.00070398, 3.00070398), rtol=DIGITS, atol=0)


def test_ksam_can_choose_again_at_the_perturbed_weights():
    w, opt, batch, losses = least_squares()
    closure = top_losses(losses, batch, keep=2, reselect=True)
    opt.step(closure)
    assert closure.kept.tolist() == [2, 3]
    torch.testing.assert_close(w.data, row(1.1634892, -1.99828176, 3.05335091), rtol=DIGITS, atol=0)


@pytest.mark.parametrize("keep", [4, 400, 1.0])
def test_keeping_everything_is_plain_sam_and_scores_nothing(keep):
    w, opt, batch, losses = least_squares()
    calls = []
    opt.step(top_losses(lambda batch: calls.append(1) or losses(batch), batch, keep=keep))
    plain, plain_opt, _, plain_losses = least_squares()

    def closure():
        loss = plain_losses(batch).mean()
        loss.backward()
        return loss

    plain_opt.step(closure)
    assert bits(w) == bits(plain)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("keep", "expected"),
    # 0.07 * 100 and 0.29 * 100 are not 7 and 29 in floating point
    [(1, 1), (7, 7), (0.07, 7), (0.071, 8), (0.29, 29), (0.001, 1), (1e-9, 1), (0.991, None), (99, 99)],
)
def test_a_fraction_is_rounded_up(keep, expected):
    lines = Lines([0.0] * 100, [1.0] * 100)
    closure = top_losses(lines, lines.batch, keep=keep)
    closure()
    assert (None if closure.kept is None else len(closure.kept)) == expected


def test_ties_go_to_the_lowest_index_and_nan_is_largest():
    # long enough for the parallel and the vectorized sorts, which are not stable unless asked
    many = [float(i % 3) for i in range(5000)]
    lines = Lines(many, [1.0] * 5000)
    closure = top_losses(lines, lines.batch, keep=10)
    closure()
    assert closure.kept.tolist() == list(range(2, 32, 3))
    lines = Lines([1.0, float("nan"), 2.0, float("inf"), float("nan"), 0.0], [1.0] * 6)
    for keep, expected in {1: [1], 2: [1, 4], 3: [1, 3, 4], 4: [1, 2, 3, 4]}.items():
        closure = top_losses(lines, lines.batch, keep=keep)
        closure()
        assert closure.kept.tolist() == expected


def test_ksam_scores_once_without_gradient():
    lines = Lines([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    lines.optimizer().step(top_losses(lines, lines.batch, keep=3))
    assert lines.calls == [(4, False), (3, True), (3, True)]
    lines.calls.clear()
    lines.optimizer().step(top_losses(lines, lines.batch, keep=3, reselect=True))
    assert lines.calls == [(4, False), (3, True), (4, False), (3, True)]


# ---- ESAM's selection ------------------------------------------------------------------------------


AT_0, AT_1 = (0.2, 0.5, 1.0, 0.1, 0.7, 0.3), (0.5, 0.55, 1.6, 0.35, 0.75, 0.9)


def rising() -> Lines:
    """The vector of ESAM's selection: losses before at w = 0, after at w = 1, where SAM goes."""
    return Lines(AT_0, [after - before for before, after in zip(AT_0, AT_1, strict=True)])


@pytest.mark.parametrize(("quirks", "kept", "slope"), [(True, [2, 5], 0.6), (False, [0, 2, 5], 0.5)])
def test_the_samples_that_rise_most_are_kept(quirks, kept, slope):
    lines = rising()
    closure = sharpest(lines, lines.batch, keep=0.5, official_quirks=quirks)
    loss = lines.optimizer().step(closure)
    assert closure.kept.tolist() == kept
    torch.testing.assert_close(loss, torch.tensor(sum(AT_0) / 6, dtype=torch.float64))
    torch.testing.assert_close(lines.w.data, row(-0.1 * slope), rtol=1e-9, atol=0)


def test_the_first_pass_is_no_extra_forward():
    lines = rising()
    lines.optimizer().step(sharpest(lines, lines.batch))
    assert lines.calls == [(6, True), (6, False), (3, True)]


@pytest.mark.parametrize(("keep", "quirks"), [(1.0, False), (1, False), (1.0, True), (0.99, True)])
def test_keeping_all_scores_nothing(keep, quirks):
    lines = rising()
    closure = sharpest(lines, lines.batch, keep=keep, official_quirks=quirks)
    lines.optimizer().step(closure)
    assert closure.kept is None
    assert lines.calls == [(6, True), (6, True)]


@pytest.mark.parametrize(("keep", "count"), [(0.99, 5), (0.6, 3), (0.25, 1), (0.1, 1), (0.01, 1)])
def test_the_share_is_rounded_and_never_empty(keep, count):
    lines = Lines([0.0] * 5, [5.0, 4.0, 3.0, 2.0, 1.0])
    closure = sharpest(lines, lines.batch, keep=keep)
    lines.optimizer().step(closure)
    assert closure.kept.tolist() == list(range(count))


def test_equal_rises_keep_the_lowest_index_and_nan_is_kept():
    lines = Lines([0.0] * 6, [1.0, 2.0, 2.0, 1.0, 2.0, 1.0])
    closure = sharpest(lines, lines.batch, keep=2 / 3)
    lines.optimizer().step(closure)
    assert closure.kept.tolist() == [0, 1, 2, 4]
    lines = Lines([0.0, 0.0, 0.0, float("nan")], [1.0, 1.0, 1.0, 1.0])
    closure = sharpest(lines, lines.batch, keep=0.5)
    closure()
    closure()
    assert closure.kept.tolist() == [0, 3]


@pytest.mark.parametrize("rises", [[1.0] * 6, [2.0, 2.0, 2.0, 2.0, 1.0, 1.0]])
def test_quirks_that_leave_no_sample_say_so(rises):
    lines = Lines([0.0] * 6, rises)
    opt = lines.optimizer()
    with pytest.raises(ValueError, match="sharpest: .* keep=0.5 of a batch of 6 leaves none: .* number 3 of"):
        opt.step(sharpest(lines, lines.batch, official_quirks=True))
    assert lines.w.item() == 0.0, "the weights were not restored"
    with pytest.raises(ValueError, match="leaves none"):
        opt.step(sharpest(lines, lines.batch, keep=0.1, official_quirks=True))


# ---- both ------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "x y")


class Batch(collections.UserDict):
    """More than a dict, as tokenizers return it."""


BATCHES = {
    "tensor": lambda x, y: torch.cat([x, y], 1),
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named tuple": Pair,
    "dict": lambda x, y: {"x": x, "y": y, "scale": torch.ones(()), "of all": torch.ones(3), "name": "batch"},
    "more than a dict": lambda x, y: Batch(x=x, y=y),
    "nested": lambda x, y: ({"inputs": [x]}, {"labels": y, "rows": None}),
}


def xy(batch):
    if isinstance(batch, torch.Tensor):
        return batch[:, :5], batch[:, 5:]
    if isinstance(batch, Pair):
        return batch.x, batch.y
    if isinstance(batch, (dict, Batch)):
        assert batch.get("name", "batch") == "batch" and len(batch.get("of all", "abc")) == 3
        return batch["x"], batch["y"]
    if isinstance(batch[0], dict):
        return batch[0]["inputs"][0], batch[1]["labels"]
    return batch


@pytest.mark.parametrize("make", [top_losses, sharpest])
@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_form(make, kind):
    x, y = torch.randn(8, 5).double(), torch.randn(8, 3).double()
    net = small_net()
    seen = []

    def losses(batch):
        inputs, labels = xy(batch)
        seen.append((type(batch), len(inputs), len(labels)))
        return (net(inputs) - labels).square().mean(1)

    batch = BATCHES[kind](x, y)
    closure = make(losses, batch, keep=0.25)
    SAM(net.parameters(), torch.optim.SGD, lr=0.1).step(closure)
    assert {kind for kind, _, _ in seen} == {type(batch)}
    assert {(n, m) for _, n, m in seen} == {(8, 8), (2, 2)}
    assert all(torch.equal(a, b) for a, b in zip(xy(batch), (x, y), strict=True)), "the batch itself changed"


@pytest.mark.parametrize("make", [top_losses, sharpest])
def test_one_call_under_every_k(make):
    lines = Lines([1.0, 2.0, 3.0, 40.0], [1.0, 1.0, 1.0, 5.0])
    opt = lines.optimizer(recipe=recipes.sam(rho=1.0, every=2))
    opt.step(make(lines, lines.batch, keep=0.25))
    lines.calls.clear()
    before = lines.w.item()
    opt.step(make(lines, lines.batch, keep=0.25))
    # K-SAM descends on the sample with the largest loss, whose slope is 5; ESAM selects in second passes only
    kept, slope = ([(4, False), (1, True)], 5.0) if make is top_losses else ([(4, True)], 2.0)
    assert lines.calls == kept
    assert lines.w.item() == pytest.approx(before - 0.1 * slope, rel=1e-9)


@pytest.mark.parametrize("make", [top_losses, sharpest])
def test_each_closure_of_several_counts_its_own_passes(make):
    # As an optimizer given a list calls them: all first passes, then all second ones; or batch by batch.
    lines = rising()
    orders = {"exact": (0, 1, 0, 1), "one by one": (0, 0, 1, 1)}
    found = {}
    for name, order in orders.items():
        closures = [make(lines, lines.batch, keep=0.5) for _ in range(2)]
        kept = []
        for position, index in enumerate(order):
            with torch.no_grad():
                lines.w.fill_(float(index in order[:position]))
            closures[index]()
            kept.append(closures[index].kept)
        found[name] = [None if k is None else k.tolist() for k in kept]
        assert [closure.passes for closure in closures] == [2, 2]
    expected = {top_losses: [[1, 2, 4]] * 4, sharpest: [None, None, [0, 2, 5], [0, 2, 5]]}[make]
    assert found["exact"] == expected
    assert sorted(map(str, found["one by one"])) == sorted(map(str, expected))


@pytest.mark.parametrize("make", [top_losses, sharpest])
def test_later_passes_keep_the_choice(make):
    lines = rising()
    closure = make(lines, lines.batch, keep=0.5)
    for position in (0.0, 1.0, -1.0):
        with torch.no_grad():
            lines.w.fill_(position)
        closure()
    second = [1, 2, 4] if make is top_losses else [0, 2, 5]
    assert closure.kept.tolist() == second
    assert [count for count, grad in lines.calls if not grad] == [6]


def batch_norm_net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()


@pytest.mark.parametrize("make", [top_losses, sharpest])
def test_statistics_are_those_of_the_first_gradient_pass(make):
    net = batch_norm_net()
    x = torch.randn(8, 4).double()
    opt = SAM(net.parameters(), torch.optim.SGD, lr=0.1, model=net)
    closure = make(lambda x: net(x).square().flatten(), x, 0.5, net)
    twin = batch_norm_net()
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        losses = twin(x).square().flatten()
        twin.load_state_dict(net.state_dict())
        twin(x[losses.sort(descending=True).indices[:4].sort().values] if make is top_losses else x)
    opt.step(closure)
    assert int(net[1].num_batches_tracked) == 1
    assert bits(net[1].running_mean) == bits(twin[1].running_mean)
    assert bits(net[1].running_var) == bits(twin[1].running_var)
    assert net.training


@pytest.mark.parametrize("make", [top_losses, sharpest])
def test_no_graph_is_kept(make):
    lines = rising()
    closure = make(lines, lines.batch, keep=0.5)
    loss = lines.optimizer().step(closure)
    assert not loss.requires_grad
    held = [value for value in vars(closure).values() if isinstance(value, torch.Tensor)]
    assert held and not any(value.requires_grad for value in held)


@pytest.mark.parametrize("make", [top_losses, sharpest])
def test_random_state_and_grad_mode_are_as_the_gradient_passes_leave_them(make):
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x = torch.randn(8, 4).double()
    closure = make(lambda x: net(x).square().flatten(), x, 0.5)
    torch.manual_seed(3)
    with torch.no_grad():
        closure()
        assert not torch.is_grad_enabled()
    closure()
    assert torch.is_grad_enabled()
    after = torch.random.get_rng_state()
    torch.manual_seed(3)
    for count in (4, 4) if make is top_losses else (8, 4):
        net(x[:count])
    assert torch.equal(after, torch.random.get_rng_state()), "scoring moved the random state"


@pytest.mark.parametrize("make", [top_losses, sharpest])
def test_autocast_around_the_step_is_autocast_around_the_loss(make):
    x = torch.randn(8, 4)
    start = nn.Linear(4, 1).state_dict()

    def weights_after_a_step(around_the_step: bool):
        net = nn.Linear(4, 1)
        net.load_state_dict(start)
        opt = SAM(net.parameters(), torch.optim.SGD, rho=2.0, lr=0.1, backend="reference")

        def losses(x):
            with torch.autocast("cpu", torch.bfloat16):
                return net(x).float().square().flatten()

        closure = make(losses, x, 0.5, reselect=True) if make is top_losses else make(losses, x, 0.5)
        # not enabled=False, which counts as a region too
        with torch.autocast("cpu", torch.bfloat16) if around_the_step else nullcontext():
            opt.step(closure)
        return closure.kept.tolist(), bits(net.weight)

    assert weights_after_a_step(True) == weights_after_a_step(False)


@pytest.mark.parametrize("make", [top_losses, sharpest])
def test_keywords_of_the_optimizer_reach_the_loss(make):
    lines = rising()
    seen = []

    def losses(batch, probe):
        seen.append(probe)
        return lines(batch)

    opt = lines.optimizer()
    opt.closure_kwargs = lambda probe: {"probe": probe}
    opt.step(make(losses, lines.batch, keep=0.5))
    assert seen == ([0, 0, 1] if make is top_losses else [0, 1, 1])


def test_a_failing_loss_leaves_the_weights_restored():
    lines = Lines([1.0, 2.0], [1.0, 1.0])

    def losses(batch):
        if len(lines.calls) > 1:
            raise KeyError("no such column")
        return lines(batch)

    opt = lines.optimizer()
    with pytest.raises(KeyError):
        opt.step(sharpest(losses, lines.batch))
    assert lines.w.item() == 0.0


@pytest.mark.parametrize("make", [top_losses, sharpest])
@pytest.mark.parametrize(
    ("losses", "error", "sentence"),
    [
        (lambda x: x.mean(), ValueError, r"a scalar; expected one loss per sample, .* reduction='none'"),
        (lambda x: x[:3, 0], ValueError, r"shape \(3,\); expected \(4,\)"),
        (lambda x: x, ValueError, r"shape \(4, 2\); expected \(4,\), one per sample .* Average"),
        (lambda x: [1.0] * 4, TypeError, r"returned list; expected a tensor of one loss per sample"),
    ],
)
def test_losses_that_are_not_one_per_sample(make, losses, error, sentence):
    with pytest.raises(error, match=f"{make.__name__}: loss_fn .*{sentence}"):
        make(losses, torch.ones(4, 2, requires_grad=True), keep=0.5)()


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, -0.5, float("nan"), float("inf"), True, "half", None])
@pytest.mark.parametrize("make", [top_losses, sharpest])
def test_keep_out_of_range(make, keep):
    with pytest.raises(ValueError, match=rf"{make.__name__}: keep is {keep!r}; expected .*\(0, 1\]"):
        make(lambda x: x, torch.ones(4), keep)


def test_a_share_is_no_count():
    with pytest.raises(ValueError, match="sharpest: keep is 3; expected the share"):
        sharpest(lambda x: x, torch.ones(4), 3)


@pytest.mark.parametrize("make", [top_losses, sharpest])
@pytest.mark.parametrize("batch", [torch.ones(0, 2), torch.ones(()), {}, ["text"], None])
def test_a_batch_without_samples(make, batch):
    with pytest.raises(ValueError, match=f"{make.__name__}: batch is {type(batch).__name__} without samples"):
        make(lambda x: x, batch, 0.5)


@pytest.mark.parametrize("make", [top_losses, sharpest])
def test_a_loss_that_is_no_function(make):
    with pytest.raises(TypeError, match=f"{make.__name__}: loss_fn is tensor.*; expected a function"):
        make(torch.ones(3), torch.ones(3), 0.5)
