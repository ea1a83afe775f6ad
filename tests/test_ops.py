"""The passes as functions and as operators of torch: schemas, fakes, checks and messages."""

import pytest
import torch

from sam_kernels import backends, ops

SHAPES = [(3, 5), (17,), (0,), (1,), (2, 2, 2)]


def available():
    group_of = ops._group("test", [torch.zeros(1)], {})
    return [name for name in backends.names() if backends.get(name).refusal(group_of) is None]


def lists(count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
        for _ in range(count)
    ]


@pytest.fixture(params=["reference", "foreach", "native"])
def backend(request):
    if request.param not in available():
        pytest.skip(f"backend {request.param} is not available here")
    return request.param


def operator_calls():
    w, g, s, m, v = lists(5)
    v = [x.square() for x in v]
    steps = [torch.tensor(2.0) for _ in SHAPES]
    norm = torch.tensor(1.5, dtype=torch.float64)
    coefficients = torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    o = torch.ops.sam_kernels
    return [
        (o.sq_norm, (g, w, True, 0.1), {}),
        (o.sq_norm, (g, []), {}),
        (o.perturb_, (w, g, s, norm, 0.05), {"adaptive": True, "eta": 0.01}),
        (o.restore_, (w, s), {}),
        (o.grad_stats, (g, w, []), {}),
        (o.combine_, (w, g, s, [], coefficients), {}),
        (o.descend_sgd_, (w, g, s, m, 0.1, 0.9), {}),
        (o.descend_adam_, (w, g, s, m, v, steps, 0.1), {}),
        (o.noise_, (w, 5, 3), {}),
    ]


every_call = pytest.mark.parametrize(
    "index", range(len(operator_calls())), ids=lambda i: f"{operator_calls()[i][0].__name__}-{i}"
)


def test_every_operator_is_called():
    called = {operator.__name__ for operator, _, _ in operator_calls()}
    assert called == set(ops._SCHEMAS)


@every_call
def test_operators_pass_opcheck(index):
    operator, args, kwargs = operator_calls()[index]
    torch.library.opcheck(operator.default, args, kwargs)


@every_call
def test_every_operator_runs_inside_a_compiled_graph(index):
    def lists_of(args):
        return [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if torch.is_tensor(x)]

    (operator, args, kwargs), (_, own, _) = operator_calls()[index], operator_calls()[index]
    compiled = torch.compile(lambda *a: operator(*a, **kwargs), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    ours, theirs = compiled(*args), operator(*own, **kwargs)
    assert (ours is None) == (theirs is None)
    if theirs is not None:
        assert torch.equal(ours, theirs) and theirs.abs().sum() > 0
    fresh = lists_of(operator_calls()[index][1])
    moved = [not torch.equal(x, y) for x, y in zip(lists_of(own), fresh, strict=True)]
    assert any(moved) == operator.__name__.endswith("_")
    assert all(torch.equal(x, y) for x, y in zip(lists_of(args), lists_of(own), strict=True))


def test_operators_mutate_and_advance_versions():
    w, g, s = lists(3)
    before = [x.clone() for x in w]
    versions = [x._version for x in w + s]
    torch.ops.sam_kernels.perturb_(w, g, s, torch.tensor(1.0, dtype=torch.float64), 0.5)
    for x, old, kept, grad in zip(w, before, s, g, strict=True):
        assert torch.equal(kept, old)
        torch.testing.assert_close(x, old + 0.5 * grad)
    assert all(x._version > v for x, v in zip(w + s, versions, strict=True) if x.numel())


def test_a_step_from_the_functions_is_a_sam_step(backend):
    w, g0, g1, s, m = lists(5)
    expected_w, expected_m = [], []
    norm = torch.sqrt(sum(x.double().square().sum() for x in g0))
    for x, grad, buffer in zip(w, g1, m, strict=True):
        moved = 0.9 * buffer + grad
        expected_m.append(moved)
        expected_w.append(x - 0.1 * moved)
    start = [x.clone() for x in w]
    got = ops.sq_norm(g0, backend=backend).sqrt()
    torch.testing.assert_close(got, norm, rtol=1e-6, atol=0)
    ops.perturb_(w, g0, s, got, rho=0.5, backend=backend)
    for x, old, grad in zip(w, start, g0, strict=True):
        torch.testing.assert_close(x, old + (0.5 / norm).float() * grad, rtol=1e-6, atol=1e-6)
    ops.descend_sgd_(w, g1, s, m, lr=0.1, momentum=0.9, backend=backend)
    for got_list, expected in ((w, expected_w), (m, expected_m)):
        for x, y in zip(got_list, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    ops.restore_(w, s, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(w, start, strict=True))


def test_grad_stats_and_combine_agree_with_plain_sums(backend):
    a, b, c = lists(3)
    out = [torch.full(x.shape, float("nan")) for x in a]
    stats = ops.grad_stats([a, b, c], backend=backend)
    pairs = [(a, a), (a, b), (a, c), (b, b), (b, c), (c, c)]
    expected = torch.stack(
        [sum((x.double() * y.double()).sum() for x, y in zip(*pair, strict=True)) for pair in pairs]
    )
    torch.testing.assert_close(stats, expected, rtol=1e-6, atol=1e-6)
    coefficients = torch.tensor([[0.5, 0.0, -2.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    expected_c = [x + y + z for x, y, z in zip(a, b, c, strict=True)]
    expected_out = [0.5 * x - 2.0 * z for x, z in zip(a, c, strict=True)]
    ops.combine_([out, c], [a, b, c], coefficients, backend=backend)
    for x, y in zip(out + c, expected_out + expected_c, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_operators_run_inside_a_compiled_graph():
    def body(w, g, s):
        norm = torch.ops.sam_kernels.sq_norm(g, [], False, 0.0).sqrt()
        torch.ops.sam_kernels.perturb_(w, g, s, norm, 0.5)
        return norm

    w, g, s = lists(3)
    w2 = [x.clone() for x in w]
    torch.compile(body, fullgraph=True, backend="aot_eager")(w, g, s)
    body(w2, g, [torch.empty_like(x) for x in w])
    assert all(torch.equal(x, y) for x, y in zip(w, w2, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, g: ops.sq_norm([]), "the list of tensors is empty"),
        (lambda w, g: ops.sq_norm(g, adaptive=True), "adaptive=True needs params"),
        (lambda w, g: ops.sq_norm(g, w[1:]), r"grads has 5 tensors; expected 4"),
        (lambda w, g: ops.restore_(w, g[:2]), r"snapshots has 2 tensors; expected 5"),
        (
            lambda w, g: ops.restore_(w, [*g[:1], g[1].half(), *g[2:]]),
            r"snapshots\[1\] has dtype torch.float16; expected torch.float32",
        ),
        (lambda w, g: ops.restore_(w, [g[0].reshape(5, 3), *g[1:]]), r"snapshots\[0\] has shape \(5, 3\)"),
        (
            lambda w, g: ops.restore_(w, [torch.empty(5, 3).t(), *g[1:]]),
            r"snapshots\[0\] has strides \(1, 3\); expected \(5, 1\)",
        ),
        (lambda w, g: ops.perturb_(w, g, g, torch.zeros(2)), "norm has shape"),
        (lambda w, g: ops.grad_stats([]), "0 lists were given; expected 1 to 3"),
        (lambda w, g: ops.combine_([w], [g], torch.zeros(1, 2)), "coefficients is torch.float32"),
        (lambda w, g: ops.descend_sgd_(w, g, [], [], lr=0.1, momentum=0.9), "expected momentum_buffers"),
        (lambda w, g: ops.descend_adam_(w, g, [], w, w, [], lr=0.1), "steps has 0 tensors"),
        (
            lambda w, g: ops.restore_(w, g, backend="tritn"),
            "'tritn' is not known. Known: native, triton, foreach",
        ),
    ],
)
def test_bad_lists_get_a_sentence_and_nothing_moves(call, message):
    w, g = lists(2)
    before = [x.clone() for x in w]
    with pytest.raises(ValueError, match=message):
        call(w, g)
    assert all(torch.equal(x, y) for x, y in zip(w, before, strict=True))


def test_counters_on_another_device_are_refused():
    w, zero = [torch.ones(2)], torch.zeros(2)
    step = torch.zeros((), device="meta")
    with pytest.raises(ValueError, match=r"descend_adam_: steps\[0\] is on meta; .* expects it on cpu"):
        ops.descend_adam_(w, [torch.ones(2)], [], [zero.clone()], [zero.clone()], [step], lr=0.1)
    assert torch.equal(w[0], torch.ones(2))


@pytest.mark.parametrize("captures", [False, True])
def test_passes_give_the_same_where_their_scalars_are_filled_on_the_device(monkeypatch, captures):
    monkeypatch.setattr(ops, "is_capturing", lambda device: captures)
    w, snapshots = [torch.tensor([1.0, -2.0])], [torch.zeros(2)]
    norm = ops.sq_norm([torch.tensor([3.0, 4.0])], w, adaptive=True, eta=0.5)
    assert norm.item() == pytest.approx(4.5**2 + 10**2)
    ops.perturb_(w, [torch.tensor([3.0, 4.0])], snapshots, torch.tensor(5.0), rho=0.5)
    torch.testing.assert_close(w[0], torch.tensor([1.3, -1.6]))
