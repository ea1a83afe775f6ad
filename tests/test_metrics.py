"""What `opt.metrics` tells: compared with the same numbers computed beside the optimizer."""

from __future__ import annotations

import csv
import weakref
from pathlib import Path

import pytest
import torch
from fixtures import every_backend
from tape import Spy
from torch import nn

from sam_kernels import SAM, Recipe, recipes
from sam_kernels.policies import ByName


class Problem:
    """A small network whose every evaluation is written down: loss, gradients and weights."""

    def __init__(self, recipe="sam", seed=0, scale=1.0, **kwargs):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(9, 17), nn.LayerNorm(17), nn.Tanh(), nn.Linear(17, 3)).double()
        self.x, self.y = torch.randn(24, 9).double(), torch.randint(3, (24,))
        self.scale = scale
        kwargs = {"lr": 0.1, "momentum": 0.9, **kwargs}
        self.opt = SAM(
            self.model.named_parameters(), torch.optim.SGD, recipe=recipe, model=self.model, **kwargs
        )
        self.seen = []

    def closure(self, rows=slice(None)):
        loss = nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])
        (loss * self.scale).backward()
        params = list(self.model.parameters())
        grad = torch.cat([p.grad.flatten() for p in params]).clone() / self.scale
        self.seen.append((loss.item(), grad, torch.cat([p.detach().flatten() for p in params]).clone()))
        return loss

    def step(self, *args, **kwargs):
        self.seen.clear()
        before = torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()
        if isinstance(self.opt.recipe, Recipe) and self.opt.recipe.name == "sampa":
            kwargs["ahead"] = self.closure
        self.opt.step(*(args or (self.closure,)), **kwargs)
        return before


CLOSE = {"rtol": 1e-9, "atol": 0.0}
SINGLE = {"rtol": 1e-6, "atol": 0.0}  # triton's tables hold rho in float32 when interpreted, and so on


@every_backend
def test_metrics_are_those_of_the_step(backend):
    if backend == "interpreted":
        pytest.importorskip("triton")
    problem = Problem(backend=backend, rho=0.07)
    for _ in range(2):
        before = problem.step()
        (first, g, _), (second, _, at) = problem.seen
        found = problem.opt.metrics
        assert set(found) == {"loss", "loss_gap", "grad_norm", "perturbation_norm"}
        torch.testing.assert_close(found["loss"].item(), first, **CLOSE)
        torch.testing.assert_close(found["loss_gap"].item(), second - first, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(found["grad_norm"], g.norm(), **SINGLE)
        torch.testing.assert_close(found["perturbation_norm"], (at - before).norm(), **SINGLE)
        assert found["perturbation_norm"] > 0.069


MOVED_BY_ONE = [
    name
    for name in recipes.names()
    if name not in ("lookbehind_sam", "msam", "rand_sam", "looksam", "sampa", "r_sam", "ssam_f", "ssam_d")
]


@pytest.mark.parametrize("name", MOVED_BY_ONE)
def test_all_metrics_can_be_measured(name):
    problem = Problem(name, metrics=True)
    before = problem.step()
    found = problem.opt.metrics
    torch.testing.assert_close(found["grad_norm"], problem.seen[0][1].norm(), **CLOSE)
    if len(problem.seen) == 1:  # a cadence that left the perturbation out
        assert "perturbation_norm" not in found and "loss_gap" not in found
        return
    at = problem.seen[-1 if name == "multistep_sam" else 1]
    torch.testing.assert_close(found["perturbation_norm"], (at[2] - before).norm(), **CLOSE)
    torch.testing.assert_close(found["loss_gap"].item(), at[0] - problem.seen[0][0], rtol=1e-7, atol=1e-12)


def test_several_ascents_are_compared_at_the_last():
    problem = Problem("lookbehind_sam", metrics=True)
    before = problem.step()
    found = problem.opt.metrics
    last = problem.seen[-1]
    torch.testing.assert_close(found["loss_gap"].item(), last[0] - problem.seen[0][0], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found["perturbation_norm"], (last[2] - before).norm(), **CLOSE)
    assert len(problem.seen) == 3


@pytest.mark.parametrize("name", [*MOVED_BY_ONE, "msam", "rand_sam", "sampa", "ssam_d"])
def test_what_is_free_is_what_would_be_measured(name):
    free, measured = Problem(name), Problem(name, metrics=True)
    for _ in range(2):
        free.step()
        measured.step()
        of_all = measured.opt.metrics
        for key, value in free.opt.metrics.items():
            torch.testing.assert_close(value, of_all[key], rtol=1e-9, atol=1e-15)
    assert set(free.opt.metrics) <= set(of_all)


def test_masks_are_measured_where_they_apply():
    problem = Problem("ssam_d", metrics=True)
    for _ in range(3):
        before = problem.step()
        torch.testing.assert_close(
            problem.opt.metrics["perturbation_norm"], (problem.seen[1][2] - before).norm(), **CLOSE
        )


def test_the_free_norm_of_a_part_is_not_called_that_of_the_whole():
    problem = Problem(Recipe(mask=ByName(("0.*",)), rho=0.1))
    before = problem.step()
    assert "grad_norm" not in problem.opt.metrics
    torch.testing.assert_close(
        problem.opt.metrics["perturbation_norm"], (problem.seen[1][2] - before).norm(), **SINGLE
    )


def test_groups_of_several_radii_are_not_taken_for_one():
    weights = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(7))]
    groups = [{"params": weights[:1], "rho": 0.1}, {"params": weights[1:], "rho": 0.3}]
    for metrics in (False, True):
        opt = SAM(groups, torch.optim.SGD, lr=0.0, metrics=metrics)
        ats = []

        def closure(opt=opt, ats=ats):
            loss = sum((w**2).sum() for w in weights)
            loss.backward()
            ats.append(torch.cat([w.detach() for w in weights]))
            return loss

        opt.step(closure)
        if metrics:
            torch.testing.assert_close(
                opt.metrics["perturbation_norm"].float(), (ats[1] - ats[0]).norm(), rtol=1e-5, atol=0.0
            )
        else:
            assert "perturbation_norm" not in opt.metrics


@pytest.mark.parametrize("metrics", [False, True])
def test_nothing_waits_for_the_device(metrics):
    problem = Problem(metrics=metrics, backend="native")
    problem.step()

    def closure():
        loss = nn.functional.cross_entropy(problem.model(problem.x), problem.y)
        loss.backward()
        return loss

    with Spy() as spy:
        problem.opt.step(closure)
        found = problem.opt.metrics
    assert not spy.found
    assert len(found) == 4


def test_metrics_are_new_tensors_that_outlive_the_next_step():
    problem = Problem()
    problem.step()
    kept = problem.opt.metrics
    before = {name: value.item() for name, value in kept.items()}
    problem.step()
    assert {name: value.item() for name, value in kept.items()} == before
    assert problem.opt.metrics["loss"].item() != before["loss"]


@pytest.mark.parametrize("recipe", ["sam", "wsam", "gnp"])
def test_the_scale_of_a_scaler_is_taken_out(recipe):
    plain = Problem(recipe, metrics=True)
    scaled = Problem(recipe, metrics=True, scale=1024.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain.step()

    def closure():
        loss = nn.functional.cross_entropy(scaled.model(scaled.x), scaled.y)
        scaler.scale(loss).backward()
        return loss

    scaled.opt.step(closure, scaler=scaler)
    for name, value in plain.opt.metrics.items():
        torch.testing.assert_close(scaled.opt.metrics[name], value, rtol=1e-6, atol=1e-12)


def test_the_two_step_form_has_norms_and_the_scale_comes_last():
    problem = Problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def backward():
        scaler.scale(nn.functional.cross_entropy(problem.model(problem.x), problem.y)).backward()

    backward()
    norm = torch.cat([p.grad.flatten() for p in problem.model.parameters()]).norm() / 256
    problem.opt.first_step(zero_grad=True)
    backward()
    scaler.step(problem.opt)
    found = problem.opt.metrics
    assert set(found) == {"grad_norm", "perturbation_norm"}
    torch.testing.assert_close(found["grad_norm"], norm, rtol=1e-6, atol=0.0)


def test_micro_batches_add_up_and_own_perturbations_are_averaged():
    halves = [slice(12), slice(12, None)]
    problem = Problem(metrics=True)
    closures = [lambda rows=rows: problem.closure(rows) for rows in halves]
    problem.step(closures)
    whole = problem.opt.metrics
    torch.testing.assert_close(whole["loss"].item(), problem.seen[0][0] + problem.seen[1][0], **CLOSE)
    # Autograd has added the second gradient to the first.
    torch.testing.assert_close(whole["grad_norm"], problem.seen[1][1].norm(), **CLOSE)
    before = problem.step(closures, m_sharpness=True)
    apart = problem.opt.metrics
    norms = torch.stack([problem.seen[i][1].norm() for i in (0, 2)])
    moves = torch.stack([(problem.seen[i][2] - before).norm() for i in (1, 3)])
    torch.testing.assert_close(apart["grad_norm"], norms.mean(), **CLOSE)
    torch.testing.assert_close(apart["perturbation_norm"], moves.mean(), **CLOSE)


def test_a_gradient_that_is_not_finite_moves_nothing():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = SAM([w], torch.optim.SGD, lr=0.1)

    def closure():
        loss = (w * torch.tensor([1.0, float("inf")])).sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.metrics["perturbation_norm"].item() == 0.0
    assert not torch.isfinite(opt.metrics["grad_norm"])


def test_losses_are_those_of_the_step_whatever_becomes_of_their_tensors():
    problem, place = Problem(), torch.zeros((), dtype=torch.float64)
    seen = []

    def closure():
        loss = problem.closure()
        seen.append(loss.item())
        return place.copy_(loss.detach())

    loss = problem.opt.step(closure)
    loss /= 4
    found = problem.opt.metrics
    torch.testing.assert_close(found["loss"].item(), seen[0], **CLOSE)
    torch.testing.assert_close(found["loss_gap"].item(), seen[1] - seen[0], rtol=1e-7, atol=1e-12)


def test_what_a_closure_returns_is_not_kept_alive():
    problem = Problem()
    graphs, outputs = [], []

    def closure():
        out = problem.model(problem.x)
        loss = nn.functional.cross_entropy(out, problem.y)
        loss.backward()
        graphs.append(weakref.ref(loss))
        outputs.append(weakref.ref(out))
        return loss if len(graphs) < 5 else (loss, out)

    problem.opt.step(closure)
    assert all(ref() is None for ref in graphs)
    assert "loss" in problem.opt.metrics
    problem.opt.step(closure)
    problem.opt.step(closure)
    assert all(ref() is None for ref in outputs)
    assert set(problem.opt.metrics) == {"grad_norm", "perturbation_norm"}


def test_a_step_that_failed_leaves_no_metrics():
    problem = Problem()
    problem.step()

    def fails():
        raise OSError("no more data")

    with pytest.raises(OSError):
        problem.opt.step(fails)
    assert problem.opt.metrics == {}


def test_bfloat16_masters_tell_how_far_the_masters_went():
    torch.manual_seed(0)
    model = nn.Linear(40, 30).bfloat16()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, master_weights=True, metrics=True)

    def closure():
        loss = model(torch.ones(4, 40).bfloat16()).float().square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    # Rounded weights are off by up to 2^-9 of their size, so the distance is near rho and not equal to it.
    assert 0.04 < opt.metrics["perturbation_norm"].item() < 0.07


def test_what_cannot_be_measured_is_refused_in_words():
    w = nn.Parameter(torch.randn(3))
    with pytest.raises(TypeError, match="metrics is 'all'; expected True or False"):
        SAM([w], torch.optim.SGD, lr=0.1, metrics="all")
    with pytest.raises(ValueError, match="leave out compact=True or metrics=True"):
        SAM([w], torch.optim.SGD, lr=0.1, recipe=recipes.ssam_f(compact=True), metrics=True)


@pytest.fixture
def log_metrics(monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    return pytest.importorskip("examples.log_metrics")


def test_the_example_writes_every_step_and_reads_the_device_seldom(log_metrics, tmp_path, capsys):
    assert log_metrics.main(["--steps", "120", "--csv", str(tmp_path / "m.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(120))
    assert all(
        float(row["grad_norm"]) > 0 and 0.049 < float(row["perturbation_norm"]) < 0.051 for row in rows
    )
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    written = []
    log = log_metrics.Log([lambda step, row: written.append(step)], every=50)
    for step in range(99):
        log.add(step, {"loss": torch.tensor(1.0)})
    assert written == list(range(50))
    log.flush()
    assert written == list(range(99))


def test_the_example_writes_events_for_tensorboard(log_metrics, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert (
        log_metrics.main(["--steps", "7", "--csv", str(tmp_path / "m.csv"), "--tensorboard", str(tmp_path)])
        == 0
    )
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(f"sam/{name}" for name in log_metrics.NAMES)
    assert len(events.Scalars("sam/loss_gap")) == 7
