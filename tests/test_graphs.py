"""CUDA graphs: which steps they can hold and why not others; recorded steps against the same steps taken."""

from __future__ import annotations

import pytest
import torch
from fixtures import assert_close, backends, base_state, same_bits, values, why_not
from tape import Spy, in_place_of_a_graph, like_an_accelerator
from torch import nn

from sam_kernels import SAM, graphs, recipes
from sam_kernels.schedules import ProportionalToLr

CHOOSES = "its cadence decides on the host which steps perturb"
DRAWS = "its random numbers go by the number of the step, which every replay would repeat"
EVOLVES = "its masks change in steps that the host chooses"
REFUSED = {
    "ae_sam": CHOOSES,
    "looksam": CHOOSES,
    "rst": CHOOSES,
    "esam": DRAWS,
    "rand_sam": DRAWS,
    "r_sam": DRAWS,
    "ssam_d": EVOLVES,
}
CAPTURED = [name for name in recipes.names() if name not in REFUSED]
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd without momentum": (torch.optim.SGD, {"lr": 0.05}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}),
}
every_base = pytest.mark.parametrize("base", BASES)


def net(device="cpu") -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(2, 2))
    return model.double().to(device)  # the last layer is never used


def loss_fn(model, x, y):
    return (model[:4](x) - y).square().mean()


def around(model, recipe, base="sgd", backend="foreach", **options) -> SAM:
    kind, arguments = BASES[base]
    inner = kind(model.named_parameters(), **arguments)
    if "adam" in base:
        for group in inner.param_groups:
            group["fused"] = True  # counters where the weights are, as on a GPU
    return SAM.wrap(inner, recipe, model=model, backend=backend, **options)


def batch(number, device="cpu"):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return x.to(device), (x.sum(1, keepdim=True) * torch.ones(4, 3, dtype=torch.float64)).to(device)


def has_momentum(name, base):
    return name != "msam" or base != "sgd without momentum"


# ---- what is refused ---------------------------------------------------------------------------------------


def test_every_recipe_is_captured_or_refused_with_its_reason():
    found = {name: graphs.recipe_refusal(recipes.get(name)) for name in recipes.names()}
    assert {name: sentence for name, sentence in found.items() if sentence} == REFUSED
    assert graphs.recipe_refusal(recipes.sam(every=3)) == CHOOSES
    assert graphs.recipe_refusal(recipes.looksam(k=1)) is None


@pytest.mark.parametrize(
    ("base", "options", "sentence"),
    [
        (torch.optim.RMSprop, {}, "RMSprop has no fused update, so the host reads whether its step is safe"),
        (torch.optim.SGD, {"rng": "replay"}, "rng='replay' sets the state of random number generators"),
        (torch.optim.SGD, {"backend": "reference"}, "backend 'reference' reads scalars on the host"),
        (torch.optim.Adam, {"backend": "foreach"}, "Adam counts its steps on the host.*capturable=True"),
        (torch.optim.SGD, {"recipe": "rst"}, "recipe 'rst': its cadence"),
    ],
)
def test_optimizers_whose_steps_read_the_host_are_refused(base, options, sentence):
    opt = SAM([nn.Parameter(torch.ones(2))], base, lr=0.1, **options)
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(graphs.refusal(opt))
    assert str(opt.capturable()).startswith("not capturable: ")


def test_capturable_says_what_stands_against_it():
    opt = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    assert str(opt.capturable()) == "not capturable: the parameters are on no CUDA device"


@pytest.mark.parametrize("form", ["closure", "first_step"])
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_during_a_capture_a_refused_step_says_so_and_moves_nothing(name, form, monkeypatch):
    model = net()
    opt = around(model, recipes.get(name))
    if form == "first_step" and opt.recipe.probe.needs_closure:
        pytest.skip("it has no two-step form")

    def closure():
        loss = loss_fn(model, *batch(0))
        loss.backward()
        return loss

    opt.step(closure)
    before = values(model.parameters())
    monkeypatch.setattr(graphs, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=f"a CUDA graph is being captured, .*{REFUSED[name]}"):
        opt.step(closure) if form == "closure" else opt.first_step()
    assert same_bits(model.parameters(), before)


def test_during_a_capture_schedules_and_first_steps_are_refused(monkeypatch):
    model = net()
    opt = around(model, recipes.sam(rho=lambda step: 0.1))

    def closure():
        loss = loss_fn(model, *batch(0))
        loss.backward()
        return loss

    monkeypatch.setattr(graphs, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="its rho is a schedule of the host; use .*make_graphed_step"):
        opt.step(closure)
    opt = around(model, recipes.sam())
    with pytest.raises(RuntimeError, match="state and buffers do not exist yet; take a step before"):
        opt.step(closure)
    monkeypatch.undo()
    opt.step(closure)
    monkeypatch.setattr(graphs, "is_capturing", lambda device: True)
    opt.step(closure)


# ---- what is captured: nothing of the host in it -----------------------------------------------------------


def test_the_spy_sees_what_it_is_for():
    on_device = torch.ones(3, device="meta")
    for crime in (
        lambda: torch.tensor([1.0, 2.0], device="meta"),
        lambda: on_device.copy_(torch.ones(3)),
        lambda: torch.ones(3).to("meta"),
        lambda: torch.ones(3)[0].item(),
    ):
        with Spy() as spy:
            crime()
        assert spy.found
    with Spy() as spy, pytest.raises(RuntimeError):
        on_device.sum().item()
    with Spy() as spy:
        torch.where(on_device > 0, on_device * 2 + torch.full((), 2.0, device="meta"), 0.0)
    assert not spy.found


@pytest.mark.parametrize("under_scaler", [False, True], ids=["", "scaled"])
@every_base
@pytest.mark.parametrize("name", CAPTURED)
def test_a_step_after_the_first_asks_nothing_of_the_host(name, base, under_scaler, monkeypatch):
    if not has_momentum(name, base):
        pytest.skip("it goes along the base's momentum")
    model = net("meta")
    recipe = recipes.get(name)
    bound = None if name == "wsam" else 0.5
    opt = around(model, recipe, base, max_grad_norm=bound)
    assert graphs.refusal(opt) is None
    x, y = batch(0, "meta")

    def closure():
        loss = loss_fn(model, x, y)
        loss.backward()
        return loss

    def step():
        if under_scaler:
            opt.grad_scale, opt.found_inf = (torch.ones((), device="meta") for _ in range(2))
        opt.step(closure, **({"ahead": closure} if name == "sampa" else {}))

    real = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: True if x.is_meta else real(x))
    for _ in range(2):
        step()  # state is made, and the host asks whether to make it
    monkeypatch.undo()
    spy = Spy()
    with spy:
        step()
    assert not spy.found


@pytest.mark.parametrize("name", ["sam", "gsam", "gnp", "wsam", "samar"])
def test_two_steps_under_a_scaler_ask_nothing_of_the_host(name, monkeypatch):
    model = net("meta")
    opt = around(model, recipes.get(name), "adamw")

    x, y = batch(0, "meta")

    def step():
        loss_fn(model, x, y).backward()
        opt.first_step(zero_grad=True)
        loss_fn(model, x, y).backward()
        opt.grad_scale, opt.found_inf = (torch.ones((), device="meta") for _ in range(2))
        opt.step()
        del opt.grad_scale, opt.found_inf
        opt.zero_grad()

    real = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: True if x.is_meta else real(x))
    for _ in range(2):
        step()
    monkeypatch.undo()
    with Spy() as spy:
        step()
    assert not spy.found


class Scaler:
    """As much of a GradScaler as a device without numbers can have."""

    def is_enabled(self):
        return True

    def scale(self, loss):
        return loss * torch.ones((), device="meta")

    def step(self, other):
        assert [p.grad.device.type for group in other.param_groups for p in group["params"]] == ["meta"]


@pytest.mark.parametrize("name", [name for name in CAPTURED if name != "sampa"])
def test_a_scaler_that_is_given_asks_nothing_of_the_host(name, monkeypatch):
    model = net("meta")
    opt, scaler = around(model, recipes.get(name), "adamw"), Scaler()
    x, y = batch(0, "meta")

    def closure():
        loss = loss_fn(model, x, y)
        scaler.scale(loss).backward()
        return loss

    real = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: True if x.is_meta else real(x))
    for _ in range(2):
        opt.step(closure, scaler=scaler)
    monkeypatch.undo()
    with Spy() as spy:
        opt.step(closure, scaler=scaler)
    assert not spy.found


def test_rates_and_radii_on_the_device_are_not_read(monkeypatch):
    for options in ({"rho": None}, {"recipe": ProportionalToLr(0.5, 0.1, 0.2, 0.0)}):
        model = net("meta")
        rho = options.get("recipe", 0.05)
        opt = around(model, recipes.sam(rho=rho), backend="foreach")
        for group in opt.param_groups:
            group["lr"] = torch.ones((), device="meta")
            if not isinstance(rho, ProportionalToLr):
                group["rho"] = torch.ones((), device="meta")
        served = opt._groups()
        opt._write_tables(served)
        with Spy() as spy, torch.no_grad():
            opt._write_tables(served)
        assert not spy.found
        assert served[0][0].follows_tensors
        assert graphs.refusal(opt) == (
            "backend 'foreach' reads hyperparameters that are tensors; give it numbers"
        )


def test_a_radius_follows_a_rate_that_is_a_tensor():
    schedule = ProportionalToLr(rho_max=0.5, rho_min=0.1, lr_max=0.2, lr_min=0.1)
    for lr in (0.0, 0.1, 0.125, 0.2, 0.3):
        assert schedule.at(torch.tensor(lr, dtype=torch.float64)).item() == pytest.approx(schedule.at(lr))


# ---- make_graphed_step, a tape in the place of the graph ---------------------------------------------------


@pytest.fixture
def taped(monkeypatch):
    """`make_graphed_step` on the CPU: a tape records in place of a graph, and puts back what it has moved."""

    def make(model, opt, **options):
        with in_place_of_a_graph(monkeypatch, model, opt):
            return graphs.make_graphed_step(model, loss_fn, opt, batch(0), **options)

    with like_an_accelerator(monkeypatch):
        yield make


def results(model, opt):
    slots = [x for own in opt._slots.tensors.values() for x in own.values()]
    scalars = [torch.as_tensor(x).reshape(()) for x in opt._slots.scalars.values()]
    return [*values(model.parameters()), *values(model.buffers()), *base_state(opt), *slots, *scalars]


def eager(model, opt, number):
    def closure():
        loss = loss_fn(model, *batch(number))
        loss.backward()
        return loss.detach()

    return opt.step(closure)


def taken_with(base, names=CAPTURED):
    return [(name, base) for name in names if name != "sampa"]


@pytest.mark.parametrize(
    "backend", [case for case in backends() if case.values[0] in ("foreach", "emulated")]
)
@pytest.mark.parametrize(
    ("name", "base"),
    [*taken_with("sgd"), *taken_with("adamw", ["gsam", "lookbehind_sam", "sam", "vasso", "wsam"])]
    + taken_with("sgd without momentum", ["sam"])
    + taken_with("adam", ["sam"]),
)
def test_replayed_steps_are_the_steps_taken(name, base, backend, taped):
    recipe = recipes.nosam(types=(nn.BatchNorm1d,)) if name == "nosam" else recipes.get(name)
    bound = None if name == "wsam" else 0.5
    models = net(), net()
    opts = [around(model, recipe, base, backend, max_grad_norm=bound) for model in models]
    step = taped(models[0], opts[0])
    for _ in range(3):
        eager(models[1], opts[1], 0)
    assert_close(results(models[0], opts[0]), results(models[1], opts[1]), 1e-13)
    for number in range(1, 4):
        ours, theirs = step(*batch(number)), eager(models[1], opts[1], number)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        torch.testing.assert_close(opts[0].metrics, opts[1].metrics, rtol=1e-9, atol=1e-12)
    assert_close(results(models[0], opts[0]), results(models[1], opts[1]), 1e-12)
    assert [g["sam_step"] for g in opts[0].param_groups] == [6]
    assert not same_bits(models[0].parameters(), net().parameters())


@pytest.mark.skipif(why_not("emulated") is not None, reason=why_not("emulated") or "runs")
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_kernels_follow_rates_radii_and_schedules_between_replays(base, taped):
    models = net(), net()
    recipe = recipes.sam(rho=lambda step: 0.1 * (1 + step))
    opts = [around(model, recipe, base, "emulated") for model in models]
    step = taped(models[0], opts[0])
    for _ in range(3):
        eager(models[1], opts[1], 0)
    for number in range(1, 5):
        for opt in opts:
            opt.param_groups[0]["lr"] = 0.02 * number
            opt.param_groups[0]["weight_decay"] = 0.01 * number
        step(*batch(number))
        eager(models[1], opts[1], number)
        assert opts[0].param_groups[0]["rho"] == opts[1].param_groups[0]["rho"]
        torch.testing.assert_close(opts[0].metrics, opts[1].metrics, rtol=1e-9, atol=1e-12)
        assert opts[0].metrics["perturbation_norm"] > 0.1 * (2 + number)
    assert_close(results(models[0], opts[0]), results(models[1], opts[1]), 1e-12)


def test_replays_follow_weights_that_were_loaded(taped):
    def half_net(factor):
        model = net("cpu").to(torch.bfloat16)
        model[0].register_forward_pre_hook(lambda layer, inputs: inputs[0].bfloat16())
        with torch.no_grad():
            model[0].weight.mul_(factor)
        return model

    results = []
    for graphed in (True, False):
        model = half_net(1.0)
        opt = around(model, recipes.sam(rho=0.05), base="sgd", backend="foreach", master_weights=True)
        if graphed:
            step = taped(model, opt, warmup=3)
        for _ in range(0 if graphed else 3):
            eager(model, opt, 0)
        model.load_state_dict(half_net(-3.0).state_dict())
        if graphed:
            step(*batch(5))
        else:
            eager(model, opt, 5)
        results.append([p.detach().float() for p in model.parameters()])
    assert_close(*results, relative=0.02)


def test_schedulers_drive_replays(taped):
    opt = around(model := net(), recipes.sam(), backend="emulated")
    if why_not("emulated") is not None:
        pytest.skip("the emulated engine is not there")
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    step = taped(model, opt)
    other = around(twin := net(), recipes.sam(), backend="emulated")
    for _ in range(3):
        eager(twin, other, 0)
    for number in range(1, 4):
        step(*batch(number))
        scheduler.step()
        eager(twin, other, number)
        other.param_groups[0]["lr"] *= 0.5
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05 / 8)
    assert_close(model.parameters(), twin.parameters(), 1e-12)


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        (recipes.sam(), {"lr": 0.01}),
        (recipes.sam(), {"rho": 0.3}),
        (recipes.wsam(), {"lr": 0.01}),
        (recipes.sam(decay="inside"), {"weight_decay": 0.2}),
    ],
    ids=["lr", "rho", "wsam", "decay inside"],
)
def test_numbers_that_a_graph_holds_fast_are_refused_when_they_change(recipe, change, taped):
    opt = around(model := net(), recipe)
    step = taped(model, opt)
    before = values(model.parameters())
    kept = {key: opt.param_groups[0][key] for key in change}
    opt.param_groups[0].update(change)
    with pytest.raises(RuntimeError, match="a hyperparameter changed that this graph holds fast"):
        step(*batch(1))
    assert same_bits(model.parameters(), before)
    opt.param_groups[0].update(kept)
    step(*batch(1))
    assert not same_bits(model.parameters(), before)


def test_what_the_graph_knows_by_address_must_stay(taped):
    opt = around(model := net(), recipes.sam())
    step = taped(model, opt)
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="state or masks were replaced since it was recorded"):
        step(*batch(1))
    opt = around(model, recipes.ssam_f(sparsity=0.5))
    step = taped(model, opt)
    step(*batch(1))
    opt.update_masks([batch(0)], lambda b: loss_fn(model, *b))
    with pytest.raises(RuntimeError, match="state or masks were replaced since it was recorded"):
        step(*batch(1))


def test_batches_of_another_shape_are_refused(taped):
    opt = around(model := net(), recipes.sam())
    step = taped(model, opt)
    x, y = batch(0)
    for wrong in ((x,), (x[:2], y[:2]), (x.float(), y), (x, "y")):
        with pytest.raises(ValueError, match="a graphed step: the batch is .*since a graph has one shape"):
            step(*wrong)


def test_losses_are_tensors_of_their_own(taped):
    opt = around(model := net(), recipes.sam())
    step = taped(model, opt)
    first = step(*batch(1))
    kept = first.clone()
    step(*batch(2))
    assert torch.equal(first, kept)


def test_parameters_without_gradients_stay_without(taped):
    opt = around(model := net(), recipes.sam(), "adamw")
    step = taped(model, opt)
    before = values(model[4].parameters())
    step(*batch(1))
    assert same_bits(model[4].parameters(), before)
    assert all(p.grad is None for p in model[4].parameters())
    assert not opt.copies_gradients and not opt._clears_by_zeros


def test_what_cannot_be_recorded_is_refused_in_words(monkeypatch):
    opt = around(model := net(), recipes.sam())
    with pytest.raises(RuntimeError, match="the parameters are on cpu; expected one CUDA device"):
        graphs.make_graphed_step(model, loss_fn, opt, batch(0))
    with pytest.raises(ValueError, match="sample is not a sequence of tensors"):
        graphs.make_graphed_step(model, loss_fn, opt, [])
    with pytest.raises(ValueError, match="warmup is 1"):
        graphs.make_graphed_step(model, loss_fn, opt, batch(0), warmup=1)
    monkeypatch.setattr(graphs, "_device_of", lambda opt: torch.device("cpu"))
    with pytest.raises(RuntimeError, match="recipe 'sampa': its step takes the next batch too"):
        graphs.make_graphed_step(model, loss_fn, around(model, recipes.sampa()), batch(0))
    with pytest.raises(RuntimeError, match="recipe 'rst': its cadence"):
        graphs.make_graphed_step(model, loss_fn, around(model, recipes.rst()), batch(0))
    opt.register_step_pre_hook(lambda *rest: None)
    with pytest.raises(RuntimeError, match="step hooks are registered"):
        graphs.make_graphed_step(model, loss_fn, opt, batch(0))


# ---- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("backend", ["native", "triton", "foreach"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", [name for name in CAPTURED if name != "sampa"])
def test_on_a_gpu_replays_are_the_steps_taken(name, base, backend):
    recipe = recipes.nosam(types=(nn.BatchNorm1d,)) if name == "nosam" else recipes.get(name)
    models = net("cuda"), net("cuda")
    try:
        opts = [around(model, recipe, base, backend) for model in models]
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    step = graphs.make_graphed_step(models[0], loss_fn, opts[0], batch(0, "cuda"))

    def taken(number):
        x, y = batch(number, "cuda")

        def closure():
            loss = loss_fn(models[1], x, y)
            loss.backward()
            return loss.detach()

        return opts[1].step(closure)

    for _ in range(3):
        taken(0)
    for number in range(1, 5):
        torch.testing.assert_close(step(*batch(number)), taken(number), rtol=1e-9, atol=0)
    assert_close(results(models[0], opts[0]), results(models[1], opts[1]), 1e-9)
