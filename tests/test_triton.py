"""The Triton backend around its kernels: what it refuses and why, what it uploads, how often it launches."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import interpreted
import numpy as np
import pytest
import torch
from cases import RECIPES
from torch.nn import Parameter

from sam_kernels import SAM, backends, recipes
from sam_kernels.backends import reference, triton
from sam_kernels.backends.triton import plan, runtime
from sam_kernels.tensor_groups import EUCLIDEAN, FISHER, TensorGroup


def stand_in(device="cuda", dtype=torch.float32, dense=True):
    """What `refusal` looks at, on a device this machine may not have."""
    return SimpleNamespace(device=torch.device(device, 0), dtype=dtype, dense=dense, compact=False)


@pytest.fixture
def fresh_runtime():
    """Nothing is remembered of what Triton was or could do."""
    for found in (runtime.load, runtime.device_problem):
        found.cache_clear()
    yield
    for found in (runtime.load, runtime.device_problem):
        found.cache_clear()


@pytest.fixture
def without_kernels(monkeypatch, fresh_runtime):
    """Triton's modules can be taken away, or replaced, until the test is over."""

    def replace(module):
        for name in [name for name in sys.modules if name == "triton" or name.startswith("triton.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "triton", module)

    return replace


# ---- what is refused, and why ----------------------------------------------------------------------


def test_it_stands_between_the_compiled_engine_and_foreach():
    assert backends.names()[:3] == ["native", "triton", "foreach"]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"device": "cpu"}, "the Triton passes serve cuda tensors, not cpu ones"),
        ({"dtype": torch.float8_e4m3fn}, "calculate in float32, float64, bfloat16, float16, not in float8"),
        ({"dense": False}, "a view with gaps or overlaps"),
    ],
)
def test_refusals_are_sentences(changed, sentence):
    assert sentence in triton.BACKEND.refusal(stand_in(**changed))


def test_without_triton_the_sentence_says_how_to_get_it(without_kernels):
    without_kernels(None)  # what import finds for a module that is not there
    sentence = triton.BACKEND.refusal(stand_in())
    assert sentence.startswith("Triton is not installed; pip install 'triton>=3.6'")
    assert runtime.describe() == sentence


def test_a_triton_that_is_too_old_is_refused(without_kernels):
    without_kernels(SimpleNamespace(__version__="3.5.1"))
    assert triton.BACKEND.refusal(stand_in()).startswith(
        "Triton 3.5.1 is too old; the passes need 3.6 or newer"
    )


@pytest.mark.parametrize("version", [{}, {"__version__": "unknown"}], ids=["a folder of that name", "odd"])
def test_what_is_no_triton_is_refused(without_kernels, version):
    without_kernels(SimpleNamespace(**version))
    assert "is not Triton, or has no version" in triton.BACKEND.refusal(stand_in())


def test_a_triton_that_breaks_at_import_is_a_sentence(monkeypatch, without_kernels):
    def broken(name, *rest):
        if name == "triton":
            raise OSError("libtriton.so: file too short")
        return whole(name, *rest)

    whole = __builtins__["__import__"]
    monkeypatch.setitem(__builtins__, "__import__", broken)
    assert "could not be imported: OSError: libtriton.so" in triton.BACKEND.refusal(stand_in())


@interpreted.needed
def test_the_interpreter_is_refused_for_addresses_of_a_gpu(fresh_runtime):
    assert "TRITON_INTERPRET is set" in triton.BACKEND.refusal(stand_in())


@interpreted.needed
def test_a_device_it_cannot_compile_for_is_a_sentence(monkeypatch, fresh_runtime):
    import triton as compiler

    def no_target():
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=no_target))
    monkeypatch.setattr(compiler.runtime, "driver", driver)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    sentence = runtime.device_problem(0)
    assert sentence == "Triton cannot compile for this device: RuntimeError: Failed to find C compiler"


@interpreted.needed
@pytest.mark.parametrize(("arch", "serves"), [(61, False), (70, True), (90, True)])
def test_a_device_without_ordered_atomics_is_refused(monkeypatch, fresh_runtime, arch, serves):
    import triton as compiler

    target = SimpleNamespace(backend="cuda", arch=arch)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(compiler.runtime, "driver", driver)
    sentence = runtime.device_problem(0)
    assert (sentence is None) == serves
    assert serves or "capability 7.0 or newer, and this device has sm_61" in sentence


def test_asked_for_by_name_where_it_cannot_serve_it_raises():
    with pytest.raises(RuntimeError, match="'triton' was requested for .* not cpu ones"):
        SAM([Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, backend="triton").first_step()


def test_importing_the_package_neither_imports_triton_nor_prints():
    code = "import sys, sam_kernels, sam_kernels.backends.triton; assert 'triton' not in sys.modules"
    # torch itself may import Triton; then there is nothing to see here
    bare = subprocess.run(
        [sys.executable, "-c", "import sys, torch; sys.exit('triton' in sys.modules)"], capture_output=True
    )
    if bare.returncode:
        code = "import sam_kernels, sam_kernels.backends.triton"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [1],
        [4095, 4096, 4097, 0],
        [3 * 65536 + 1] * 500,
        [t % 7 for t in range(5000)],
        [2**31 + 5, 3],
    ],
    ids=str,
)
def test_every_element_is_in_one_chunk(sizes):
    chunks, first = plan.cut(sizes, list(range(len(sizes))))
    tensor, begin, length, number, row = chunks.T
    assert sorted(number) == list(range(len(chunks)))
    assert (row == tensor).all()
    order = np.argsort(number)
    for t in range(len(sizes)):
        mine = order[first[t] : first[t + 1]]
        assert (tensor[mine] == t).all()
        ends = begin[mine] + length[mine]
        assert begin[mine][0] == 0 and ends[-1] == sizes[t] and (begin[mine][1:] == ends[:-1]).all()
    assert (np.diff(length) <= 0).all()  # longest first
    assert length.max() <= plan.LARGEST


def test_chunks_depend_on_the_total_size_alone():
    assert [plan.chunk_size(n) for n in (0, 8 << 20, (8 << 20) - 1, 1 << 40)] == [4096, 8192, 4096, 65536]


# ---- addresses -------------------------------------------------------------------------------------


CPU = torch.device("cpu")


@pytest.fixture
def layout():
    return plan.Plan([3, 0, 5], [0, 0, 0], CPU)


def tensors():
    return [torch.zeros(3), torch.zeros(0), torch.zeros(5)]


@pytest.fixture
def uploads(monkeypatch):
    """A mark for every upload of addresses."""
    marks = []
    upload = plan.Table._upload
    monkeypatch.setattr(plan.Table, "_upload", lambda self: (marks.append(1), upload(self))[1])
    return marks


def test_addresses_are_uploaded_only_when_one_changed(layout, uploads):
    table, lists = layout.table("perturb_"), tensors()
    for _ in range(3):
        layout.point(table, plan.List.PARAMS, "params", lists, torch.float32)
        table.on_device()
    assert len(uploads) == 1
    layout.point(table, plan.List.GRADS, "grads", [lists[0], None, lists[2]], torch.float32)
    assert table.on_device()[plan.List.GRADS].tolist() == [lists[0].data_ptr(), 0, lists[2].data_ptr()]
    assert len(uploads) == 2


def test_a_tensor_without_elements_takes_part(layout):
    table = layout.table("perturb_")
    assert layout.point(table, plan.List.PARAMS, "params", tensors(), torch.float32) == 3
    assert table.on_device()[plan.List.PARAMS, 1] != 0


def test_tensors_on_another_device_are_refused(layout, monkeypatch):
    layout.device = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"exp_avg\[0\] is on cpu but the parameters are on cuda:0"):
        layout.point(layout.table("descend_"), plan.List.LISTS, "exp_avg", tensors(), torch.float32)


def test_an_address_that_changes_during_a_capture_is_refused_and_a_graph_keeps_its_table(layout, monkeypatch):
    table, lists = layout.table("perturb_"), tensors()
    layout.point(table, plan.List.PARAMS, "params", lists, torch.float32)
    table.on_device()
    monkeypatch.setattr(plan, "is_capturing", lambda device: True)
    captured = table.on_device()
    kept = captured.clone()
    others = tensors()  # kept, or the second list could get the memory of the first
    layout.point(table, plan.List.PARAMS, "params", others, torch.float32)
    with pytest.raises(RuntimeError, match="during the capture of a CUDA graph.*set_to_none=False"):
        table.on_device()
    with pytest.raises(RuntimeError, match="during the capture of a CUDA graph"):
        plan.Plan([3], [0], CPU)
    monkeypatch.setattr(plan, "is_capturing", lambda device: False)
    later = table.on_device()
    assert later is not captured and torch.equal(captured, kept) and not torch.equal(later, kept)


@interpreted.needed
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda case: case.label)
def test_steps_with_everything_in_place_upload_nothing_and_can_be_captured(
    uploads, monkeypatch, recipe, base
):
    norms = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(3), "fc": torch.nn.Linear(3, 2)})
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    opt = SAM.wrap(
        base(norms.parameters(), lr=0.1, **momentum), model=norms, backend="interpreted", **recipe.options()
    )

    def step():
        for p in norms.parameters():
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
        opt.first_step()
        opt.second_step()

    for _ in range(4):
        step()
    uploads.clear()
    monkeypatch.setattr(plan, "is_capturing", lambda device: True)
    for _ in range(2):
        step()
    assert not uploads


def test_lists_that_take_turns_are_uploaded_once_each(layout, uploads):
    table, turns = layout.table("combine_"), [tensors() for _ in range(plan.KEPT)]
    for _ in range(3):
        for lists in turns:
            layout.point(table, plan.List.LISTS, "lists[0]", lists, torch.float32)
            found = table.on_device()[plan.List.LISTS].tolist()
            assert found[0] == lists[0].data_ptr() and found[2] == lists[2].data_ptr()
    assert len(uploads) == plan.KEPT
    others = [tensors() for _ in range(2)]
    for lists in [*others, turns[2]]:  # the two that were used longest ago have made room
        layout.point(table, plan.List.LISTS, "lists[0]", lists, torch.float32)
        assert table.on_device()[plan.List.LISTS, 0] == lists[0].data_ptr()
    assert len(uploads) == plan.KEPT + 2


def test_tables_of_a_graph_make_no_room(layout, monkeypatch):
    table, first = layout.table("combine_"), tensors()
    monkeypatch.setattr(plan, "is_capturing", lambda device: False)
    layout.point(table, plan.List.LISTS, "lists[0]", first, torch.float32)
    table.on_device()
    monkeypatch.setattr(plan, "is_capturing", lambda device: True)
    captured = table.on_device()
    kept = captured.clone()
    monkeypatch.setattr(plan, "is_capturing", lambda device: False)
    later = [tensors() for _ in range(2 * plan.KEPT)]
    for lists in later:
        layout.point(table, plan.List.LISTS, "lists[0]", lists, torch.float32)
        assert table.on_device() is not captured
    assert torch.equal(captured, kept)
    layout.point(table, plan.List.LISTS, "lists[0]", first, torch.float32)
    assert table.on_device() is captured


@interpreted.needed
@pytest.mark.parametrize("name", ["cr_sam", "friendly_sam", "gnp", "gsam", "lookbehind_sam", "multistep_sam"])
def test_whole_steps_of_recipes_with_several_lists_upload_nothing_either(name, uploads, monkeypatch):
    weights = [Parameter(torch.randn(3, 4)), Parameter(torch.randn(5))]
    bound = {"recipe": recipes.get(name), "max_grad_norm": 0.5, "backend": "interpreted"}
    opt = SAM(weights, torch.optim.SGD, lr=0.1, momentum=0.9, **bound)
    opt.copies_gradients = opt._clears_by_zeros = True

    def closure():
        loss = sum((w**2).sum() for w in weights)
        loss.backward()
        return loss

    for _ in range(4):
        opt.step(closure)
    uploads.clear()
    monkeypatch.setattr(plan, "is_capturing", lambda device: True)
    opt.step(closure)
    assert not uploads


@interpreted.needed
def test_masks_are_uploaded_when_the_list_is_another(uploads):
    params = [torch.randn(size, requires_grad=True) for size in (200, 3)]
    group = TensorGroup(params, [0, 0], [(0, 1, 0.0)])
    group.write_table([(1.0, 0.0, 0.05, 1e-12)])
    group.grads = [torch.randn_like(p, requires_grad=False) for p in params]
    group.take_snapshots()
    scores = [torch.zeros_like(p, requires_grad=False) for p in params]

    def step():
        with torch.no_grad():
            norm = interpreted.BACKEND.sq_norm(group, root=2.0, masked=True)
            interpreted.BACKEND.perturb_(group, norm)
            interpreted.BACKEND.restore_(group)
            interpreted.BACKEND.accumulate_squares_(group, scores)

    for masks in ([torch.ones(4, dtype=torch.int64), None], [torch.zeros(4, dtype=torch.int64), None]):
        group.masks = masks
        step()
        assert uploads
        uploads.clear()
        step()
        assert not uploads


# ---- launches --------------------------------------------------------------------------------------


@interpreted.needed
@pytest.mark.parametrize(
    ("base", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})], ids=["sgd", "adamw"]
)
@pytest.mark.parametrize("count", [1, 3, 60])
def test_a_step_is_three_launches(monkeypatch, base, options, count):
    weights = [Parameter(torch.ones(2)) for _ in range(count)]
    opt = SAM(weights, base, lr=0.1, backend="interpreted", **options)
    launched = []
    launch = triton.Triton._launch

    def counted(self, kernel, *rest, **more):
        launched.append(kernel)
        launch(self, kernel, *rest, **more)

    monkeypatch.setattr(triton.Triton, "_launch", counted)
    for w in weights:
        w.grad = torch.ones(2)
    opt.first_step()
    for w in weights:
        w.grad = torch.ones(2)
    opt.second_step()
    assert launched == ["sq_norm", "perturb", "descend"]


@interpreted.needed
@pytest.mark.parametrize("programs", [1, 2, 7, 64])
def test_the_number_of_programs_changes_no_bit(monkeypatch, programs):
    def step():
        torch.manual_seed(3)
        params = [torch.randn(size, requires_grad=True) for size in (9000, 1, 0, 4097)]
        group = TensorGroup(params, [0] * 4, [(0, 2, 0.01)])
        group.write_table([(2.0, 0.01, 0.05, 1e-12)])
        group.grads = [torch.randn_like(p, requires_grad=False) for p in params]
        group.take_snapshots()
        with torch.no_grad():
            norm = interpreted.BACKEND.sq_norm(group, root=2.0)
            interpreted.BACKEND.perturb_(group, norm)
            dots = interpreted.BACKEND.grad_stats(group, [group.grads, group.params])
        return [norm, dots, *params]

    monkeypatch.setattr(triton, "_INTERPRETED_PROGRAMS", 3)
    expected = step()
    monkeypatch.setattr(triton, "_INTERPRETED_PROGRAMS", programs)
    assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))


# ---- what the kernels do beside the passes of others -------------------------------------------------


def small_group(metrics, dtype=torch.float32, size=70):
    """A tensor for every metric, with eta 4 and rho 0.5."""
    params = [torch.randn(size, dtype=dtype).requires_grad_() for _ in metrics]
    group = TensorGroup(params, list(range(len(metrics))), [(0, metric, 4.0) for metric in metrics])
    group.write_table([(float(metric), 4.0, 0.5, 0.0) for metric in metrics])
    group.grads = [torch.randn(size, dtype=dtype) for _ in metrics]
    group.snapshots = [torch.empty(size, dtype=dtype) for _ in metrics]
    return group


@interpreted.needed
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("metrics", [[FISHER], [1, FISHER, 2]], ids=str)
def test_fishers_metric_weighs_by_the_gradient_twice(metrics, masked):
    group, other = small_group(metrics), small_group(metrics)
    for one in (group, other):
        one.grads = [g.clone() for g in group.grads]
        one.masks = [torch.tensor([0x0F0F0F0F0F0F0F0F, 0])] * len(metrics) if masked else None
    with torch.no_grad():
        for w, v in zip(group.params, other.params, strict=True):
            w.copy_(v)
        norm = interpreted.BACKEND.sq_norm(group, root=2.0, masked=masked)
        expected = reference.BACKEND.sq_norm(other, root=2.0, masked=masked)
        interpreted.BACKEND.perturb_(group, expected)
        reference.BACKEND.perturb_(other, expected)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(group.params, other.params, rtol=1e-6, atol=1e-7)


@interpreted.needed
def test_fishers_metric_is_that_of_the_norm_of_order_two_alone():
    group, one = small_group([FISHER]), torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match="norm of order 2 .'square'., not under 'peak'; use backend="):
        interpreted.BACKEND.sq_norm(group, moment="peak")
    with pytest.raises(ValueError, match="norm of order 2 .'linear'., not under 'sign'; use backend="):
        interpreted.BACKEND.perturb_(group, one, shape="sign")
    assert interpreted.BACKEND.sq_norm(group, of="weight", moment="peak") == group.params[0].abs().max()


@interpreted.needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("peak", [1.0, 1.9999998807907104, 1e-30, 0.0], ids=str)
def test_an_infinite_power_counts_the_largest_and_moves_nothing_else(dtype, peak):
    group = small_group([EUCLIDEAN], dtype)
    top = torch.tensor(peak, dtype=dtype)
    group.grads[0].copy_(top * torch.linspace(-0.9, 0.9, 70))
    group.grads[0][[3, 40]] = torch.stack([top, -top])
    group.grads[0][5] = torch.nextafter(top, torch.zeros_like(top))  # the largest ratio below 1
    before = group.params[0].detach().clone()
    ball = {"q": float("inf"), "peak": top.double()}
    with torch.no_grad():
        total = interpreted.BACKEND.sq_norm(group, moment="power", **ball)
        norm = torch.ones((), dtype=torch.float64)
        interpreted.BACKEND.perturb_(group, norm, shape="powered", **ball)
    sign = torch.zeros(70, dtype=dtype)
    sign[3], sign[40] = (0.5, -0.5) if peak else (0.0, 0.0)
    assert total == (2.0 if peak else 0.0)
    assert torch.equal(group.params[0], before + sign)


@interpreted.needed
@pytest.mark.parametrize("masked", [False, True])
def test_a_gradient_may_be_its_own_snapshot(masked):
    group = small_group([EUCLIDEAN, FISHER], size=4200)
    other = small_group([EUCLIDEAN, FISHER], size=4200)
    with torch.no_grad():
        for t, w in enumerate(group.params):
            w.copy_(other.params[t])
            group.grads[t].copy_(other.grads[t])
        if masked:
            group.masks = other.masks = [torch.full((66,), -2), None]
        group.snapshots = group.grads
        norm = torch.full((), 3.0, dtype=torch.float64)
        interpreted.BACKEND.perturb_(group, norm)
        interpreted.BACKEND.perturb_(other, norm)
    for mine, its in [(group.params, other.params), (group.snapshots, other.snapshots)]:
        assert all(map(torch.equal, mine, its))


@interpreted.needed
def test_dots_by_tensor_are_those_of_the_tensor():
    group = small_group([EUCLIDEAN] * 3, size=4100)
    lists = [group.grads, [None, *group.grads[1:]], [group.grads[1], None, group.grads[0]]]
    for count in (1, 2, 3):
        each = interpreted.BACKEND.grad_stats(group, lists[:count], per_tensor=True)
        expected = reference.BACKEND.grad_stats(group, lists[:count], per_tensor=True)
        assert each.shape == (3, count * (count + 1) // 2)
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-3)
        assert (each == 0).eq(expected == 0).all()


@interpreted.needed
@pytest.mark.parametrize("outs", [1, 2])
def test_coefficients_of_every_tensor(outs):
    group = small_group([EUCLIDEAN] * 3)
    lists = [group.grads, [None, *(torch.randn(70) for _ in range(2))]]
    coefficients = torch.randn(3, outs, 2, dtype=torch.float64)
    coefficients[2, :, 1] = 0
    lists[1][2].fill_(float("nan"))
    got, expected = ([[torch.empty(70) for _ in range(3)] for _ in range(outs)] for _ in range(2))
    interpreted.BACKEND.combine_(group, got, lists, coefficients)
    reference.BACKEND.combine_(group, expected, lists, coefficients)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 2\); expected \(1, 2\), or \(3, 1, 2\) with those"):
        interpreted.BACKEND.combine_(group, got[:1], lists, coefficients[:2, :1])
