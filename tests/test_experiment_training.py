"""Training by a seed, and the groups of experiments that train; references are plain loops of torch."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sam_kernels import recipes
from sam_kernels.experiments import choices, models, registry, training, verdicts
from sam_kernels.experiments.experiment import Claim, Settings
from sam_kernels.experiments.models import mlp, wide_resnet
from sam_kernels.experiments.tables import Difference
from sam_kernels.experiments.training import train

BASE = {"lr": 0.1, "momentum": 0.9}
GROUPS = ("mnist", "m_sharpness", "first_order_magic", "samar")


def problem(n: int = 48, features: int = 16, classes: int = 6) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, features, generator=generator)
    y = (x @ torch.randn(features, classes, generator=generator)).argmax(1)
    return SimpleNamespace(x=x, y=y, x_test=x[: n // 2] + 0.1, y_test=y[: n // 2])


def small() -> torch.nn.Module:
    return mlp([16, 12, 6])


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def without_times(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("seconds", "seconds_per_epoch", "step_ms")}


# ---- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, "sam", "rand_sam", "ssam_d"])
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(recipe):
    runs = [
        train(small, problem(), recipe, base_kwargs=BASE, epochs=2, batch=8, seed=seed) for seed in (1, 1, 2)
    ]
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))
    assert without_times(runs[0].row()) == without_times(runs[1].row())
    assert not torch.equal(weights(runs[0].model), weights(runs[2].model))


def test_the_noise_of_a_recipe_goes_by_the_seed():
    model = small()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ends = []
    for seed in (1, 2):
        model.load_state_dict(start)
        split = problem(n=8)  # one batch, so that its order decides nothing
        train(
            model,
            split,
            "rand_sam",
            recipe_kwargs={"rho": 1.0},
            base_kwargs=BASE,
            epochs=1,
            batch=8,
            seed=seed,
        )
        ends.append(weights(model))
    assert (ends[0] - ends[1]).abs().max() > 1e-4


def test_arms_of_a_seed_share_first_weights_and_batches():
    firsts, seen = [], []
    for recipe, base in ((None, "sgd"), (None, "adam"), ("sam", "sgd"), ("multistep_sam", "sgd")):
        batches = []

        def build(batches=batches):
            model = small()
            firsts.append(weights(model))
            model.register_forward_pre_hook(
                lambda module, args: batches.append(args[0].clone()) if module.training else None
            )
            return model

        torch.rand(3)  # the state around it decides nothing
        train(build, problem(), recipe, base=base, base_kwargs={"lr": 0.01}, epochs=2, batch=8, seed=5)
        seen.append([b for i, b in enumerate(batches) if i == 0 or not torch.equal(b, batches[i - 1])])
    assert all(torch.equal(first, firsts[0]) for first in firsts)
    assert [len(batches) for batches in seen] == [12] * 4
    for batches in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(batches, seen[0], strict=True))


def test_masks_are_scored_on_samples_of_their_own_and_leave_the_batches_of_the_pair(monkeypatch):
    seen = []
    step = training._Run.step
    monkeypatch.setattr(
        training._Run,
        "step",
        lambda self, current, upcoming: (seen[-1].append(current.clone()), step(self, current, upcoming))[1],
    )
    for recipe, values in ((None, None), ("ssam_f", {"every": 2})):
        seen.append([])
        train(small, problem(), recipe, recipe_kwargs=values, base_kwargs=BASE, epochs=3, batch=8, seed=5)
    assert len(seen[0]) == len(seen[1]) == 18
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_random_state_and_threads_are_as_before():
    torch.manual_seed(11)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(11)
    train(small, problem(), "rand_sam", base_kwargs=BASE, epochs=1, batch=8)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def by_hand(split, lr_of, rho=0.0, m=None, epochs=2, batch=8, seed=4):
    """SGD without momentum, or SAM for groups of m, on the batches that the seed decides."""
    torch.manual_seed(seed)
    model = small()
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    step, steps = 0, epochs * (len(split.x) // batch)
    for _ in range(epochs):
        for chosen in torch.randperm(len(split.x), generator=generator).split(batch)[: len(split.x) // batch]:
            total = [torch.zeros_like(p) for p in params]
            for part in chosen.split(m or batch):

                def gradient(part=part):
                    return torch.autograd.grad(F.cross_entropy(model(split.x[part]), split.y[part]), params)

                grads = gradient()
                if rho:
                    norm = torch.cat([g.flatten() for g in grads]).norm()
                    before = [p.detach().clone() for p in params]
                    with torch.no_grad():
                        for p, g in zip(params, grads, strict=True):
                            p += rho * g / norm
                    grads = gradient()
                    with torch.no_grad():
                        for p, old in zip(params, before, strict=True):
                            p.copy_(old)
                for t, g in zip(total, grads, strict=True):
                    t += g * len(part) / batch
            with torch.no_grad():
                for p, t in zip(params, total, strict=True):
                    p -= lr_of(step, steps) * t
            step += 1
    return model


@pytest.mark.parametrize(
    ("schedule", "lr_of"),
    [
        ("constant", lambda step, steps: 0.2),
        ("cosine", lambda step, steps: 0.1 * (1 + math.cos(math.pi * step / steps))),
        ("inverse_sqrt", lambda step, steps: 0.2 / math.sqrt(step + 1)),
    ],
)
@pytest.mark.parametrize(("recipe", "rho", "m"), [(None, 0.0, None), ("sam", 0.3, None), ("sam", 0.3, 2)])
def test_training_is_what_a_loop_by_hand_does(schedule, lr_of, recipe, rho, m):
    split = problem(n=44)  # 4 of them sit each epoch out
    values = {"rho": rho} if recipe else None
    found = train(
        small, split, recipe, recipe_kwargs=values, m=m, base_kwargs={"lr": 0.2}, epochs=2, batch=8, seed=4,
        schedule=schedule,
    )  # fmt: skip
    expected = by_hand(split, lr_of, rho, m)
    torch.testing.assert_close(weights(found.model), weights(expected), rtol=1e-4, atol=1e-6)
    assert found.steps == 10 and found.gradients == (20 if recipe else 10)
    with torch.no_grad():
        loss = F.cross_entropy(expected(split.x_test), split.y_test).item()
    assert found.test.loss == pytest.approx(loss, rel=1e-4)
    assert found.row()["gap"] == pytest.approx(found.test.loss - found.train.loss)


@pytest.mark.parametrize(
    ("recipe", "keywords", "cost"),
    [
        (None, {}, 1),
        ("sam", {}, 2),
        ("multistep_sam", {"recipe_kwargs": {"n": 3}}, 4),
        ("cr_sam", {}, 3),
        ("rand_sam", {}, 1),
        ("k_sam", {"keep": 0.25}, 0.5),
        ("esam", {"keep": 0.5}, 1.5),
        ("sam", {"m": 2}, 2),
    ],
)
def test_a_budget_of_gradients_is_spent_and_not_exceeded(recipe, keywords, cost):
    differentiated = 0

    def build():
        def count(module, args, out):
            nonlocal differentiated
            if module.training and torch.is_grad_enabled():
                differentiated += len(args[0])

        model = small()
        model.register_forward_hook(count)
        return model

    found = train(build, problem(), recipe, base_kwargs=BASE, gradients=13, batch=8, seed=0, **keywords)
    assert found.gradients == differentiated / 8
    assert 13 - 2 * max(1, cost) < found.gradients <= 13
    # Two gradients are set aside for a step of ESAM, which then needs fewer.
    assert found.gradients == pytest.approx(found.steps * cost)


def test_arms_with_the_same_budget_get_the_same_gradients():
    counts = {
        recipe: train(small, problem(), recipe, base_kwargs=BASE, gradients=12, batch=8).gradients
        for recipe in (None, "sam", "samar", "vasso", "multistep_sam", "cr_sam")
    }
    assert set(counts.values()) == {12.0}


def test_epochs_and_curves_fit():
    found = train(small, problem(), "sam", base_kwargs=BASE, epochs=3, batch=8)
    assert (found.epochs, found.steps) == (3, 18)
    assert found.curves["gradients"] == [12.0, 24.0, 36.0]
    assert found.curves["test_loss"][-1] == found.test.loss
    cut = train(small, problem(), None, base_kwargs=BASE, gradients=9, batch=8)
    assert (cut.epochs, cut.curves["gradients"]) == (2, [6.0, 9.0])
    last = train(small, problem(), None, base_kwargs=BASE, epochs=3, batch=8, curves=False)
    assert last.curves["test_loss"] == [last.test.loss] and math.isfinite(last.test.loss)


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_trains(recipe):
    def build():
        return wide_resnet(10, 1, 6, image=(4, 4), stem=4)

    found = train(build, problem(), recipe, base_kwargs={"lr": 0.05, "momentum": 0.9}, epochs=4, batch=16)
    first, last = found.curves["train_loss"][0], found.train.loss
    assert not found.diverged and math.isfinite(last)
    assert last < first, f"{recipe}: {first} -> {last}"
    assert found.steps == 12


def test_masks_are_updated_when_they_are_due():
    found = train(
        small, problem(), "ssam_f", recipe_kwargs={"every": 6}, base_kwargs=BASE, epochs=2, batch=8
    )  # fmt: skip
    # Twice 48 single samples, the whole training set, beside two gradients in each of 12 steps.
    assert found.gradients == 24 + 2 * 48 / 8


def test_the_weight_that_a_rule_moves_is_kept_and_only_where_there_is_one():
    norms, weight, weights_ = [], 0.5, []
    # SAMAR by hand: rho 0 makes it the plain gradient, whose norms decide lambda.
    split, base = problem(), {"lr": 0.1}
    torch.manual_seed(3)
    model = small()
    generator = torch.Generator().manual_seed(3)
    for chosen in torch.randperm(48, generator=generator).split(8):
        loss = F.cross_entropy(model(split.x[chosen]), split.y[chosen])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        if len(norms) > 1:
            weight *= 1.2 if norms[-1] > norms[-2] else 0.7
        weights_.append(weight)
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * g
    values = {"rho": 0.0, "up": 1.2, "down": 0.7}
    found = train(
        small, split, "samar", recipe_kwargs=values, base_kwargs=base, epochs=1, batch=8, seed=3,
        schedule="constant",
    )  # fmt: skip
    row = found.row()
    assert row["lambda_mean"] == pytest.approx(sum(weights_) / 6, rel=1e-5)
    assert row["lambda_last"] == pytest.approx(weight, rel=1e-5)
    assert len(set(weights_)) > 3
    plain = train(small, split, "sam", base_kwargs=base, epochs=1, batch=8).row()
    assert "lambda_mean" not in plain and "lambda_last" not in plain


def test_statistics_of_batch_norm_are_those_of_the_first_pass():
    def build():
        return torch.nn.Sequential(torch.nn.Linear(16, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 6))

    found = train(build, problem(), "sam", base_kwargs=BASE, epochs=2, batch=8)
    assert found.model[1].num_batches_tracked.item() == found.steps


def test_a_loss_that_is_not_finite_ends_the_run_and_is_said():
    found = train(small, problem(), "sam", base_kwargs={"lr": 1e30}, epochs=5, batch=8)
    row = found.row()
    assert row["diverged"] is True and found.steps < 30
    json.dumps(row, allow_nan=False)
    assert row["train_loss"] is None and row["gap"] is None
    assert not train(small, problem(), "sam", base_kwargs=BASE, epochs=1, batch=8).diverged


def test_scores_are_counted_right_and_leave_the_mode():
    split, model = problem(), small()
    model.train()
    found = training.evaluate(model, split.x, split.y, batch=7)
    assert model.training
    with torch.no_grad():
        out = model(split.x)
    order = out.argsort(dim=1, descending=True)
    top1 = 100 * (order[:, 0] == split.y).float().mean().item()
    top5 = 100 * sum(y in row[:5] for y, row in zip(split.y.tolist(), order.tolist(), strict=True)) / len(out)
    assert (found.top1, found.top5) == (pytest.approx(top1), pytest.approx(top5))
    assert found.loss == pytest.approx(F.cross_entropy(out, split.y).item(), rel=1e-5)
    assert found.top1 < found.top5 < 100


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"base": "sdg", "epochs": 1}, "one of sgd, adam, adamw"),
        ({"schedule": "linear", "epochs": 1}, "expected 'constant', 'cosine' or 'inverse_sqrt'"),
        ({}, "one of epochs and gradients"),
        ({"epochs": 1, "gradients": 10}, "one of epochs and gradients"),
        ({"epochs": 0}, "at least 1"),
        ({"epochs": 1, "batch": 0}, "batch is 0"),
        ({"epochs": 1, "m": 4}, "a recipe"),
        ({"epochs": 1, "keep": 0.5}, "'k_sam' and 'esam'"),
        ({"epochs": 1, "recipe_kwargs": {"rho": 1}}, "a recipe's name"),
    ],
)
def test_what_makes_no_sense_is_refused(keywords, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(small, problem(), None, base_kwargs=BASE, **keywords)


def test_a_budget_below_one_step_is_refused():
    with pytest.raises(ValueError, match="less than one step of sam"):
        train(small, problem(), "sam", base_kwargs=BASE, gradients=1, batch=8)


# ---- models and choices ----------------------------------------------------------------------------


@pytest.mark.parametrize("image", [(8, 8), (32, 32)])
@pytest.mark.parametrize(
    "build",
    [
        lambda image: models.wide_resnet(10, 1, 7, 3, image, stem=4),
        lambda image: models.resnet((1, 1, 1), 7, 3, image, stem=4),
        lambda image: models.ood_network(7, 3, image, filters=4, units=8),
    ],
)
def test_networks_take_flat_and_square_images(build, image):
    model = build(image).eval()
    x = torch.randn(2, 3, *image)
    out = model(x)
    assert out.shape == (2, 7)
    assert torch.equal(out, model(x.flatten(1)))


def test_networks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="6 n \\+ 4"):
        models.wide_resnet(11)
    with pytest.raises(ValueError, match="at least inputs and classes"):
        models.mlp([3])
    with pytest.raises(ValueError, match="at least one block"):
        models.resnet((1, 0))


def test_choices_do_not_look_at_the_test_set():
    from sam_kernels.experiments.data import Split

    data = problem()
    split = Split(data.x, data.y, data.x_test, data.y_test, 6, "tiny")
    other = replace(split, x_test=-split.x_test, y_test=5 - split.y_test)
    rates = {lr: {"recipe": None, "base_kwargs": {"lr": lr}, "epochs": 2, "batch": 8} for lr in (1e-4, 0.2)}
    found = choices.compare(split, small, rates)
    assert found == choices.compare(other, small, rates)
    assert list(found) == [0.2, 1e-4], "what learns is first"
    lost = {**rates, "lost": {"recipe": None, "base_kwargs": {"lr": 1e30}, "epochs": 2, "batch": 8}}
    assert choices.compare(split, small, lost)["lost"] == math.inf


# ---- verdicts --------------------------------------------------------------------------------------


def difference(*values: float) -> Difference:
    return Difference.of(range(len(values)), values)


def test_mean_error_and_interval_are_those_of_students_t():
    stats = pytest.importorskip("scipy.stats", reason="scipy, which has Student's t, is not installed")
    values = [1.3, -0.2, 0.9, 2.4]
    found = difference(*values)
    assert found.error == pytest.approx(stats.sem(values))
    expected = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert found.interval == pytest.approx(expected)
    assert found.said() == ("+1.10 ± 0.54 (mean and standard error of 4 pairs; 95 % interval -0.61 to +2.81)")
    assert all(math.isnan(end) for one in (difference(1.0), difference()) for end in one.interval)
    against = stats.ttest_1samp(values, 0.0).pvalue
    assert verdicts.judge("", "", found, "less").doubt == pytest.approx(against)
    assert verdicts.judge("", "", found, "more").doubt == 1
    off = stats.ttest_1samp(values, 0.4).pvalue
    assert verdicts.judge("", "", found, "not more", margin=0.4).doubt == pytest.approx(off)
    assert verdicts.judge("", "", found, "alike", margin=0.4).doubt == pytest.approx(off)


def test_noise_alone_is_called_clear_in_one_of_twenty_cases_however_few_seeds():
    pytest.importorskip("scipy", reason="scipy, which has Student's t, is not installed")
    generator = torch.Generator().manual_seed(1)
    for n in (3, 5):
        draws = torch.randn(1500, n, generator=generator, dtype=torch.float64).tolist()
        share = sum(difference(*draw).is_clear for draw in draws) / 1500
        assert share == pytest.approx(0.05, abs=0.023)  # four standard errors


@pytest.mark.parametrize(
    ("values", "expected", "margin", "verdict"),
    [
        ((1.0, 1.2, 0.8), "more", 0, "agrees"),
        ((1.0, 1.2, 0.8), "less", 0, "disagrees"),
        ((1.0, -1.2, 0.8), "less", 0, "undecided"),
        ((1.0,), "more", 0, "undecided"),
        ((), "more", 0, "not measured"),
        ((math.nan, 1.0), "more", 0, "undecided"),
        ((0.1, -0.1, 0.0), "alike", 0.5, "agrees"),
        ((1.1, 0.9, 1.0), "alike", 0.5, "disagrees"),
        ((2.1, -0.9, 0.0), "alike", 0.5, "undecided"),
        ((-9.0, -9.5), "not more", 0.5, "agrees"),
        ((1.0, 1.1), "not more", 0.5, "undecided"),
        ((1.0, 1.1, 1.05), "not more", 0.5, "disagrees"),
        ((1.0, 1.2), "more", 0, "undecided"),  # 11 errors from zero, and yet of two seeds
        ((1.0, -1.1), "not more", 0.5, "undecided"),
    ],
)
def test_verdicts_go_by_the_stated_rule(values, expected, margin, verdict):
    assert verdicts.verdict_of(difference(*values), expected, margin) == verdict


def test_a_claim_of_several_parts_is_as_good_as_its_worst():
    def of(*found):
        return verdicts.together("", [Claim("", "", verdict) for verdict in found]).verdict

    assert of("agrees", "agrees") == "agrees"
    assert of("agrees", "undecided") == "undecided"
    assert of("agrees", "not measured") == "undecided"
    assert of("not measured", "not measured") == "not measured"
    assert of("agrees", "undecided", "disagrees") == "disagrees"


def test_parts_share_the_error_of_disagreeing():
    pytest.importorskip("scipy", reason="scipy, which has Student's t, is not installed")
    fine = verdicts.judge("", "", difference(1.0, 1.2, 0.8), "more")
    bad = verdicts.judge("", "", difference(-1.0, -1.3, -0.7), "more")
    assert bad.verdict == "disagrees" and 0.025 < bad.doubt < 0.05
    assert verdicts.together("", [bad]).verdict == "disagrees"
    assert verdicts.together("", [fine, bad]).verdict == "undecided"
    worse = verdicts.judge("", "", difference(-1.0, -1.1, -0.9), "more")
    assert worse.doubt < 0.01
    both = verdicts.together("", [fine, worse])
    assert both.verdict == "disagrees" and both.doubt == pytest.approx(2 * worse.doubt)
    # Claims of claims count all parts.
    assert verdicts.together("", [both, fine]).doubt == pytest.approx(4 * worse.doubt)


def test_a_size_that_is_quoted_is_not_said_to_agree():
    sentence = "The verdict is on the direction, not on the size."
    quoting = re.compile(r"\(.*(by|from) (about )?[\d.]+( - [\d.=\s]+)? (%|percentage)|\([\d.]+ against")
    seen = 0
    for name in ("out_of_distribution", "samar"):
        for claim in registry.get(name).findings([]).claims:
            assert (sentence in claim.measured) == bool(quoting.search(claim.says)), claim.says
            seen += sentence in claim.measured
    assert seen == 7 + 8
    text = verdicts.judge("", "x", difference(1.0, 1.1), "more", quotes=True).measured
    assert (
        text.endswith(sentence) and sentence not in verdicts.judge("", "x", difference(1.0), "more").measured
    )


def test_no_sentence_goes_by_two_standard_errors():
    folder = Path(verdicts.__file__).parent
    texts = [p.read_text() for p in folder.rglob("*.py")] + [
        registry.get(n).protocol for n in registry.names()
    ]
    assert not [text for text in texts if re.search(r"two\s+(of those|standard errors)", text)]


# ---- the groups ------------------------------------------------------------------------------------


def rows_of(name, numbers):
    """Rows for all trials of a group, as if they had run; numbers(trial) gives what differs."""
    experiment = registry.get(name)
    return [
        {"arm": t.arm, "seed": t.seed, "options": t.options, "numbers": numbers(t)}
        for t in experiment.trials(Settings())
    ]


def jitter(trial, size):
    """Noise that pairs do not share: mean 0 over five seeds, another for each arm."""
    step = len(trial.arm) % 4 + 1  # not a multiple of 5, so the order of the seeds differs by arm
    return size * ((trial.seed * step) % 5 - 2)


def scores_of(trial, loss, train_loss, accuracy, noise):
    test_loss = loss + jitter(trial, noise)
    curve = [2.0, 1.0, test_loss]
    return {
        "train_loss": train_loss,
        "test_loss": test_loss,
        "gap": test_loss - train_loss,
        "train_accuracy": 99.0,
        "test_accuracy": accuracy + jitter(trial, noise),
        "accuracy_gap": 99.0 - accuracy,
        "test_top5": 99.9,
        "last_train_accuracy": 99.0,
        "last_test_accuracy": accuracy,
        "generalization_error": 99.0 - accuracy + jitter(trial, noise),
        "step_ms": 1.0,
        "diverged": False,
        "curves": {name: curve for name in training.CURVES},
    }


def verdicts_of(name, numbers):
    return [claim.verdict for claim in registry.get(name).findings(rows_of(name, numbers)).claims]


def mnist_numbers(sign, noise):
    def numbers(trial):
        if trial.options["what"] == "time":
            return {"step_ms": {"sgd": 1.0, "adam": 1.2, "sam": 2.1 if sign > 0 else 4.0}[trial.arm]}
        loss = {"sgd": 0.5, "adam": 0.4 if sign > 0 else 0.9, "sam": 0.42 if sign > 0 else 0.58}[trial.arm]
        lost = {"sgd": 0.1, "adam": 0.05 if sign > 0 else 0.3, "sam": 0.1}[trial.arm]
        return scores_of(trial, loss, lost, 90.0, noise)

    return numbers


def m_numbers(sign, noise):
    def numbers(trial):
        if trial.options["what"] == "bound":
            at = [{"T": t, "mean": 0.1 if sign > 0 else 2.0, "bound": 1.0} for t in (100, 300)]
            return {"at": [{**one, "share": one["mean"]} for one in at]}
        halvings = math.log2(64 / trial.options.get("m", 64))
        return scores_of(trial, 0.5 - sign * 0.01 * halvings, 0.7, 90 + sign * 0.2 * halvings, noise)

    return numbers


def magic_numbers(sign, noise):
    def numbers(trial):
        n = trial.options.get("n", 1) if "multistep" not in trial.arm else int(trial.arm[-1])
        is_sgd = trial.arm.startswith("sgd")
        accuracy = 90 - sign * (1.0 * is_sgd + 0.5 * (n - 1)) - (1 - sign) * ("rand" in trial.arm)
        found = scores_of(trial, 0.3 + sign * 0.1 * is_sgd, 0.1, accuracy, noise)
        sharp = 0.2 + sign * 0.02 * n + jitter(trial, noise / 10)
        return {**found, "one_step": sharp, "projected_ascent": sharp, "random_direction": 0.01}

    return numbers


def samar_numbers(sign, noise):
    def numbers(trial):
        if trial.options["what"] == "slope":
            at = [{"K": k, "mean_squared": k ** (-0.5 * sign)} for k in (100, 1000)]
            return {"slope": -0.5 * sign, "at": at}
        return scores_of(trial, 0.5, 0.1, 90 + sign * trial.arm.startswith("samar"), noise)

    return numbers


NUMBERS = {
    "mnist": mnist_numbers,
    "m_sharpness": m_numbers,
    "first_order_magic": magic_numbers,
    "samar": samar_numbers,
}


@pytest.mark.parametrize("name", GROUPS)
def test_findings_know_agreement_disagreement_and_doubt(name):
    assert set(verdicts_of(name, NUMBERS[name](1, 1e-4))) == {"agrees"}
    assert set(verdicts_of(name, NUMBERS[name](-1, 1e-4))) == {"disagrees"}
    unsure = verdicts_of(name, NUMBERS[name](1, 20.0))
    assert "undecided" in unsure and "disagrees" not in unsure


@pytest.mark.parametrize("name", GROUPS)
def test_findings_work_on_what_there_is(name, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    experiment = registry.get(name)
    rows = rows_of(name, NUMBERS[name](1, 0.01))
    empty = experiment.findings([])
    assert {claim.verdict for claim in empty.claims} == {"not measured"}
    some = experiment.findings(
        [row for row in rows if row["arm"] in ("sgd", "sam, m=64") and row["seed"] == 0]
    )
    assert "agrees" not in {claim.verdict for claim in some.claims}
    assert any("Runs are missing" in table.note for table in some.tables)
    # A run that diverged is left out and said.
    lost = [dict(row) for row in rows]
    victim = next(row for row in lost if "curves" in row["numbers"])
    victim["numbers"] = {**victim["numbers"], "test_loss": None, "gap": None, "diverged": True}
    found = experiment.findings(lost)
    assert any("Left out: 1 of" in table.note for table in found.tables)
    for one in (empty, some, found):
        assert all(len(line) == len(table.columns) for table in one.tables for line in table.rows)
        json.dumps(one.numbers)
    some.draw(tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 5000


@pytest.mark.parametrize("name", GROUPS)
def test_a_test_loss_that_is_not_finite_leaves_the_findings_standing(name, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    rows = rows_of(name, NUMBERS[name](1, 0.01))
    for row in rows[:9]:
        if "test_loss" in row["numbers"]:
            row["numbers"] |= {"test_loss": None, "gap": None}
    found = registry.get(name).findings(rows)
    assert any("nan" in cell for table in found.tables for line in table.rows for cell in line)
    found.draw(tmp_path / "some.png")
    json.dumps(found.numbers)


@pytest.mark.parametrize("name", GROUPS)
def test_a_quick_trial_of_each_kind_runs(name):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    experiment = registry.get(name)
    trials = experiment.trials(Settings(quick=True))
    kinds = {trial.options.get("what"): trial for trial in reversed(trials)}
    rows = []
    for trial in kinds.values():
        numbers = experiment.run(trial, None)
        json.dumps(numbers, allow_nan=False)
        rows.append({"arm": trial.arm, "seed": trial.seed, "options": trial.options, "numbers": numbers})
    assert len(experiment.findings(rows).claims) >= 2


@pytest.mark.parametrize("name", GROUPS)
def test_trials_are_the_same_for_the_same_settings_and_apart_for_others(name, tmp_path):
    experiment = registry.get(name)
    keys = [trial.key for trial in experiment.trials(Settings())]
    assert keys == [trial.key for trial in experiment.trials(Settings())]
    assert len(set(keys)) == len(keys)
    fewer = {trial.key for trial in experiment.trials(Settings(seeds=2))}
    assert fewer < set(keys), "more seeds go on from fewer"
    trained = {trial.key for trial in experiment.trials(Settings()) if "data" in trial.options}
    for other in (Settings(quick=True), Settings(data=tmp_path)):
        assert not trained & {trial.key for trial in experiment.trials(other)}


def test_the_two_readings_of_samar_differ_in_what_one_step_up_and_one_down_leave(monkeypatch):
    from sam_kernels.experiments.groups import samar

    given = []

    def pretend(build, split, recipe, *, recipe_kwargs, **_):
        given.append((recipe, recipe_kwargs))
        return training.Trained(torch.nn.Identity())

    monkeypatch.setattr(samar, "train", pretend)
    monkeypatch.setattr(samar, "_setting", lambda *_: (None, None))
    scored = {"last_train_accuracy": 1.0, "last_test_accuracy": 1.0}
    monkeypatch.setattr(training.Trained, "row", lambda self: dict(scored))
    trials = [t for t in samar.trials(Settings()) if t.arm in samar.SAMAR and t.options["what"] == "train"]
    options = {arm: [(t.seed, t.options) for t in trials if t.arm == arm] for arm in samar.SAMAR}
    assert options["samar"] == options[samar.BALANCED], "the same seeds and settings"
    for arm in samar.SAMAR:
        samar.run(next(t for t in trials if t.arm == arm), None)
    made = [recipes.get(recipe, **values).combine for recipe, values in given]
    assert made[0].up * made[0].down == pytest.approx(0.99)
    assert made[1].up * made[1].down == pytest.approx(1.0)


def test_rows_of_samar_without_lambda_are_shown_beside_those_with_it():
    rows = rows_of("samar", samar_numbers(1, 0.01))
    for row in rows:
        if row["arm"] == "samar, down=1/1.1" and row["options"]["what"] == "train":
            row["numbers"] |= {"lambda_mean": 0.4, "lambda_last": 0.3}
    table = registry.get("samar").findings(rows).tables[0]
    cells = {line[0]: list(line[-2:]) for line in table.rows}
    assert cells["SAMAR, down=1/1.1"] == ["0.400 ± 0.000", "0.300 ± 0.000"]
    assert cells["SAMAR"] == cells["SAM"] == ["–", "–"]


# ---- out of distribution, cost and benefit ---------------------------------------------------------


def moved_rows(**more):
    from sam_kernels.experiments.groups import out_of_distribution as group

    return [
        {
            "arm": arm,
            "seed": seed,
            "options": {"data": name},
            "numbers": {
                "zero_shot": 50.0 + seed + 3 * (arm == "sam"),
                "gradual": 60.0 + seed,
                "way": [90.0, 80.0, 70.0, 60.0, 50.0],
                "source": 100.0,
                "diverged": False,
                **(more if (arm, seed) == ("sam", 1) else {}),
            },
        }
        for arm in group.ARMS
        for seed in range(3)
        for name in ("rotated", "brighter")
    ]


def test_a_run_that_diverged_while_it_followed_keeps_what_it_was_before(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    from sam_kernels.experiments.groups import out_of_distribution as group

    fine = group.findings(moved_rows()).numbers["gain over adam"]
    assert fine["zero_shot"]["sam"]["seeds"] == fine["gradual"]["sam"]["seeds"] == 3
    found = group.findings(moved_rows(gradual=None, adaptation_diverged=True))
    gain = found.numbers["gain over adam"]
    assert gain["zero_shot"]["sam"]["seeds"] == 3 and gain["gradual"]["sam"]["seeds"] == 2
    assert "Left out" not in found.tables[0].note
    assert "Left out: 1 of 3 runs of SAM" in found.tables[1].note
    found.draw(tmp_path / "some.png")

    def lost(model, *_):
        return training.Trained(model, diverged=True)

    monkeypatch.setattr(group, "adapt", lost)
    trial = next(t for t in group.trials(Settings(quick=True)) if t.arm == "sam")
    numbers = json.loads(json.dumps(group.run(trial, None), allow_nan=False))
    assert numbers["zero_shot"] > 0 and not numbers["diverged"]
    assert numbers["gradual"] is None and numbers["adaptation_diverged"]


def test_whole_batches_are_as_the_protocol_of_moved_data_says(monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    from sam_kernels.experiments.groups import out_of_distribution as group

    seen = []
    learn = training.train

    def count(model, split, *, epochs, **keywords):
        found = learn(model, split, epochs=1, **keywords)
        seen.append((len(split.x), found.steps * group.BATCH, found.steps * epochs))
        return found

    monkeypatch.setattr(group, "train", count)
    trial = next(t for t in group.trials(Settings()) if t.arm == "adam")
    group.run(trial, None)
    assert seen == [(600, 512, 400)] + 5 * [(144, 128, 25)]
    assert "512 in an epoch" in group.PROTOCOL and "takes 25 steps" in group.PROTOCOL


def test_nothing_leaves_the_front_by_noise():
    pytest.importorskip("scipy", reason="scipy, which has Student's t, is not installed")
    from sam_kernels.experiments.groups.cost_benefit.findings import front

    runs = {
        "sgd": (1.0, [80.0, 82.0, 81.0]),
        "like sgd": (1.01, [80.5, 80.9, 81.2]),  # dearer by less than the spread, less accurate by noise
        "sam": (2.0, [90.0, 92.0, 91.0]),
        "bad": (2.01, [70.0, 72.0, 71.0]),
        "dear": (2.5, [90.0, 92.0, 90.9]),  # clearly dearer, and not more accurate
        "other": (2.6, [None, None, None, 95.0]),  # no seed in common
    }

    def gain(b, a):
        pairs = [
            (seed, x - y)
            for seed, (x, y) in enumerate(zip(runs[b][1], runs[a][1], strict=False))
            if x is not None and y is not None
        ]
        return Difference.of([seed for seed, _ in pairs], [x for _, x in pairs])

    points = {name: (cost, sum(x or 0 for x in found)) for name, (cost, found) in runs.items()}
    assert front(points, 0.03, gain) == ["sgd", "like sgd", "sam", "other"]


def test_the_time_of_those_that_vary_is_that_of_all_blocks_together():
    from sam_kernels.experiments.groups.cost_benefit import VARYING, step_times

    def found(varying):
        now, taken = [0.0], [0]

        def plain():
            while True:
                now[0] += 1.0
                yield 0.0

        def varies():  # the base's price in three of four blocks, five times that in the fourth
            while True:
                now[0] += 5.0 if taken[0] // 10 % 4 == 0 else 1.0
                taken[0] += 1
                yield 0.0

        return step_times.beside(plain, {"rst": varies}, 24, varying=varying, clock=lambda: now[0])["rst"]

    assert found(())["ratio"] == 1.0
    together = found(VARYING)
    assert together["ratio"] == pytest.approx(2.0) and together["rounds"] == 24
    # The error of a mean of 24 ratios to a base that does not vary.
    ratios = torch.tensor([5.0] * 6 + [1.0] * 18)
    assert together["error"] == pytest.approx(float(ratios.std() / 24**0.5), rel=1e-5)
    assert set(VARYING) == {"ae_sam", "rst"}
