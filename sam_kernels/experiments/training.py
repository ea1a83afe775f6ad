"""Train one network one way, by a seed, and say what came of it; accuracies are in percent."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipes, sampling
from ..optimizer import SAM
from ..policies import Anticipated
from ..recipe import Recipe
from .models import seeded

Schedule = Literal["constant", "cosine", "inverse_sqrt"]

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
CURVES = ("gradients", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
LAST = 10  # epochs of the mean accuracies
FISHER_SAMPLES = 128  # single samples that score the weights of `ssam_f`; its authors take 1024
MASKS = 1 << 32  # what the seed of those samples is beyond that of the batches
SHARE = {"k_sam": 0.5}  # of the samples of a batch, where a method must choose some


class Data(Protocol):
    """What `data.Split` is: x float32 and y labels, to train and to test."""

    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> Tensor: ...
    @property
    def x_test(self) -> Tensor: ...
    @property
    def y_test(self) -> Tensor: ...


@dataclass
class Score:
    """Mean cross-entropy, and the share of samples whose label is first, or among the first five."""

    loss: float
    top1: float
    top5: float


@dataclass
class Trained:
    """What training came to.

    Attributes:
        model: as it is now.
        curves: lists with a number for each epoch: gradients so far, train and test loss and accuracy.
        train, test: scores at the end.
        gradients: samples differentiated, in batches: 1 for a step of the base, 2 for one of SAM.
        steps: of the optimizer.
        epochs: passes over the training set, the last may be short.
        seconds: training alone, without scores.
        step_ms: median time of a step.
        diverged: whether a loss was not finite, which ended the training.
        lambda_mean, lambda_last: of the weight that a rule such as SAMAR's moves, mean over the steps of what
            it came to, and at the end; nan for recipes without.
    """

    model: nn.Module
    curves: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in CURVES})
    train: Score = field(default_factory=lambda: Score(math.nan, math.nan, math.nan))
    test: Score = field(default_factory=lambda: Score(math.nan, math.nan, math.nan))
    gradients: float = 0.0
    steps: int = 0
    epochs: int = 0
    seconds: float = 0.0
    step_ms: float = math.nan
    diverged: bool = False
    lambda_mean: float = math.nan
    lambda_last: float = math.nan

    def mean_of_last(self, name: str) -> float:
        """Mean of a curve over the last ten epochs, or as many as there are."""
        values = [v for v in self.curves[name][-LAST:] if v is not None]
        return statistics.fmean(values) if values else math.nan

    def row(self) -> dict[str, Any]:
        """All numbers, for a line of JSON; None stands for what is not finite.

        "gap" is test loss less train loss, "accuracy_gap" train accuracy less test accuracy.
        """
        numbers = {
            "train_loss": self.train.loss,
            "test_loss": self.test.loss,
            "gap": self.test.loss - self.train.loss,
            "train_accuracy": self.train.top1,
            "test_accuracy": self.test.top1,
            "accuracy_gap": self.train.top1 - self.test.top1,
            "train_top5": self.train.top5,
            "test_top5": self.test.top5,
            "last_train_accuracy": self.mean_of_last("train_accuracy"),
            "last_test_accuracy": self.mean_of_last("test_accuracy"),
            "gradients": self.gradients,
            "steps": self.steps,
            "epochs": self.epochs,
            "seconds": self.seconds,
            "seconds_per_epoch": self.seconds / self.epochs if self.epochs else math.nan,
            "step_ms": self.step_ms,
        }
        if not math.isnan(self.lambda_last):
            numbers |= {"lambda_mean": self.lambda_mean, "lambda_last": self.lambda_last}
        finite = {name: _finite(value) for name, value in numbers.items()}
        return {**finite, "diverged": self.diverged, "curves": self.curves}


def train(
    model: nn.Module | Callable[[], nn.Module],
    split: Data,
    recipe: str | Recipe | None,
    *,
    base: str = "sgd",
    base_kwargs: Mapping[str, Any] | None = None,
    recipe_kwargs: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    gradients: float | None = None,
    batch: int = 50,
    seed: int = 0,
    schedule: Schedule = "cosine",
    m: int | None = None,
    keep: float | None = None,
    curves: bool = True,
    on_epoch: Callable[[Trained], None] | None = None,
) -> Trained:
    """Train a classifier with a recipe around a base optimizer, or with the base alone.

    Everything follows from the seed: initial weights, the order of the samples (a generator of its own, so
    that arms see the same batches), dropout and a recipe's noise. One thread; torch's random state and number
    of threads are as before. An epoch is a random order cut into whole batches; the rest sits it out.

    Args:
        model: trained in place; or a function that builds it, called under the seed, so that the initial
            weights of all arms are the same.
        split: the data, see `data.Split`.
        recipe: a name or a `Recipe`; None for the base alone. Steps that need more than a closure are
            served: `sampa` sees the next batch, `ssam_f` has its masks updated, `k_sam` its samples chosen.
        base: "sgd", "adam" or "adamw".
        base_kwargs: e.g. ``{"lr": 0.1, "momentum": 0.9}``.
        recipe_kwargs: of a recipe given by name; its `seed`, if it has one, is ours unless named here.
        epochs: how long; or
        gradients: a budget, counted as `Trained.gradients`, never exceeded. Give one of the two.
        batch: samples of a step.
        schedule: of the learning rate: "cosine" to 0, "constant", or "inverse_sqrt", ``lr / sqrt(t)``.
        m: perturb for every m samples of the batch by themselves (m-sharpness).
        keep: share of the batch on which to step: of the largest losses (`k_sam`, default 0.5), or, in the
            second pass, of those that rise most (`esam`, default all).
        curves: score after every epoch, which on small data takes a third of the time; False at the end only.
        on_epoch: called after each epoch.

    Raises:
        ValueError: for an unknown base or schedule, a budget or batch that makes no sense, m or keep where
            they do not go, and whatever `SAM` refuses.

    Example:
        >>> from types import SimpleNamespace
        >>> from sam_kernels.experiments.models import mlp
        >>> x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        >>> split = SimpleNamespace(x=x, y=(x[:, 0] > 0).long(), x_test=x, y_test=(x[:, 0] > 0).long())
        >>> base = {"lr": 0.5}
        >>> found = train(lambda: mlp([6, 8, 2]), split, "sam", base_kwargs=base, gradients=80, batch=10)
        >>> found.gradients, found.steps, found.epochs, found.test.top1 > 85
        (80.0, 40, 10, True)
    """
    _check(base, schedule, epochs, gradients, batch, len(split.x))
    with _one_thread(), torch.random.fork_rng([], device_type="cpu"):
        if not isinstance(model, nn.Module):
            model = seeded(model, seed)
        torch.manual_seed(seed)
        made = _optimizer(model, recipe, base, dict(base_kwargs or {}), dict(recipe_kwargs or {}), seed)
        run = _Run(model, split, made, min(batch, len(split.x)), seed, m, keep, curves)
        return run.go(epochs, gradients, schedule, on_epoch)


def steps(
    model: nn.Module,
    split: Data,
    recipe: str | Recipe | None,
    *,
    base: str = "sgd",
    base_kwargs: Mapping[str, Any] | None = None,
    recipe_kwargs: Mapping[str, Any] | None = None,
    batch: int = 50,
    seed: int = 0,
    keep: float | None = None,
) -> Iterator[float]:
    """The steps of `train`, one each time the next loss is asked for: to be timed beside those of others.

    The learning rate is constant, nothing is scored, there is no end; the number of threads is left alone.

    Args:
        model, split, recipe, base, base_kwargs, recipe_kwargs, batch, seed, keep: as in `train`.

    Example:
        >>> from types import SimpleNamespace
        >>> from sam_kernels.experiments.models import mlp
        >>> x, y = torch.randn(20, 6), torch.arange(20) % 2
        >>> split = SimpleNamespace(x=x, y=y, x_test=x, y_test=y)
        >>> taken = steps(mlp([6, 8, 2]), split, "sam", base_kwargs={"lr": 0.1}, batch=10)
        >>> next(taken) > 0, next(taken) > 0
        (True, True)
    """
    _check(base, "constant", 1, None, batch, len(split.x))
    opt = _optimizer(model, recipe, base, dict(base_kwargs or {}), dict(recipe_kwargs or {}), seed)
    run = _Run(model, split, opt, min(batch, len(split.x)), seed, None, keep, False)
    model.train()
    batches = run.batches()
    current = next(batches)
    for upcoming in batches:
        yield run.step(current, upcoming)
        current = upcoming


def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> Score:
    """Scores in evaluation mode, which is undone.

    Args:
        x, y: inputs [n, ...] and labels [n].
        batch: samples at a time.
    """
    was_training = model.training
    model.eval()
    total = first = five = 0.0
    try:
        with torch.no_grad():
            for part, labels in zip(x.split(batch), y.split(batch), strict=True):
                out = model(part)
                total += F.cross_entropy(out, labels, reduction="sum").double().item()
                best = out.topk(min(5, out.shape[1]), dim=1).indices == labels[:, None]
                first += best[:, 0].sum().item()
                five += best.sum().item()
    finally:
        model.train(was_training)
    return Score(total / len(x), 100 * first / len(x), 100 * five / len(x))


class _Run:
    """One training: batches, closures and what they cost."""

    def __init__(
        self,
        model: nn.Module,
        split: Data,
        opt: torch.optim.Optimizer,
        batch: int,
        seed: int,
        m: int | None,
        keep: float | None,
        curves: bool,
    ) -> None:
        self.model, self.split, self.opt, self.batch, self.m = model, split, opt, batch, m
        self.curves = curves
        self.name = opt.recipe.name if isinstance(opt, SAM) else None
        self.keep = SHARE.get(self.name or "") if keep is None else keep
        if keep is not None and self.name not in ("k_sam", "esam"):
            raise ValueError(f"train: keep is for recipes 'k_sam' and 'esam', not {self.name!r}")
        if m is not None and not (isinstance(opt, SAM) and 1 <= m <= batch):
            raise ValueError(f"train: m is {m!r}; expected 1 to {batch} samples of a batch, and a recipe")
        self.generator = torch.Generator().manual_seed(seed)
        # What masks are scored on must not move the batches, which a pair shares.
        self.singles = torch.Generator().manual_seed(MASKS + seed)
        self.lambdas: list[float] = []
        self.per_epoch = len(split.x) // batch
        self.samples = 0  # differentiated so far

    def go(
        self,
        epochs: int | None,
        gradients: float | None,
        schedule: Schedule,
        on_epoch: Callable[[Trained], None] | None,
    ) -> Trained:
        found = Trained(self.model)
        lrs = [group["lr"] for group in self.opt.param_groups]
        steps = math.inf if epochs is None else epochs * self.per_epoch
        budget = math.inf if gradients is None else gradients * self.batch
        times: list[float] = []
        batches = self.batches()
        self.model.train()
        current = next(batches)
        while found.steps < steps and self.samples + self._cost() <= budget and not found.diverged:
            done = found.steps / steps if gradients is None else self.samples / budget
            for group, lr in zip(self.opt.param_groups, lrs, strict=True):
                group["lr"] = lr * _share(schedule, done, found.steps)
            upcoming = next(batches)
            start = time.perf_counter()
            loss = self.step(current, upcoming)
            times.append(time.perf_counter() - start)
            self._read_lambda()
            current = upcoming
            found.steps += 1
            found.diverged = not math.isfinite(loss)
            if found.steps % self.per_epoch == 0:
                self._note(found, times)
                if on_epoch is not None:
                    on_epoch(found)
        if found.steps % self.per_epoch:
            self._note(found, times)  # the last epoch was cut short
        elif not found.steps:
            raise ValueError(f"train: a budget of {gradients} gradients is less than one step of {self.name}")
        if not self.curves:
            self._score(found)
        if self.lambdas:
            found.lambda_mean, found.lambda_last = statistics.fmean(self.lambdas), self.lambdas[-1]
        return found

    def _read_lambda(self) -> None:
        if isinstance(self.opt, SAM) and "lambda" in self.opt._slots.scalars:
            self.lambdas.append(float(self.opt._slots.scalars["lambda"]))

    def _note(self, found: Trained, times: list[float]) -> None:
        found.epochs += 1
        found.gradients = self.samples / self.batch
        found.seconds, found.step_ms = math.fsum(times), 1e3 * statistics.median(times)
        if self.curves:
            self._score(found)

    def _score(self, found: Trained) -> None:
        split = self.split
        found.train = evaluate(self.model, split.x, split.y)
        found.test = evaluate(self.model, split.x_test, split.y_test)
        found.diverged = found.diverged or not math.isfinite(found.train.loss)
        numbers = (found.gradients, found.train.loss, found.train.top1, found.test.loss, found.test.top1)
        for name, value in zip(CURVES, numbers, strict=True):
            found.curves[name].append(_finite(value))

    def batches(self) -> Iterator[Tensor]:
        """Indices of the batches, epoch after epoch."""
        while True:
            order = torch.randperm(len(self.split.x), generator=self.generator)
            yield from order[: self.per_epoch * self.batch].split(self.batch)

    def _cost(self) -> int:
        """Samples the coming step may differentiate."""
        opt = self.opt
        if not isinstance(opt, SAM):
            return self.batch
        size = self.batch
        if self.name == "k_sam" and self.keep is not None:
            size = max(1, math.ceil(round(self.keep * size, 6)))
        if not opt.is_due:
            return size
        extra = FISHER_SAMPLES if self._updates_masks() else 0
        # Its first step evaluates one gradient more, what the step before would have anticipated.
        first = size if isinstance(opt.recipe.probe, Anticipated) and not self.samples else 0
        return opt.recipe.gradients * size + extra + first

    def _updates_masks(self) -> bool:
        return isinstance(self.opt, SAM) and self.opt.masks_are_due

    def step(self, current: Tensor, upcoming: Tensor) -> float:
        """One step; the loss of its first pass."""
        opt, x, y = self.opt, self.split.x[current], self.split.y[current]
        if not isinstance(opt, SAM):
            return float(opt.step(self._closure(x, y, clears=True)))  # type: ignore[arg-type]
        if self._updates_masks():
            count = min(FISHER_SAMPLES, len(self.split.x))
            few = torch.randperm(len(self.split.x), generator=self.singles)[:count]
            singles = [(self.split.x[few], self.split.y[few])]
            opt.update_masks(singles, self._losses)
            self.samples += count
        if self.m is not None:
            parts = zip(x.split(self.m), y.split(self.m), strict=True)
            closures = [self._closure(*part, share=len(part[0]) / len(x)) for part in parts]
            return float(sum(map(float, opt.step(closures, m_sharpness=True))))
        if isinstance(opt.recipe.probe, Anticipated):
            ahead = self._closure(self.split.x[upcoming], self.split.y[upcoming])
            return float(opt.step(self._closure(x, y), ahead=ahead))
        if self.keep is not None:
            choose = sampling.top_losses if self.name == "k_sam" else sampling.sharpest
            return float(opt.step(self._counted(choose(self._losses, (x, y), self.keep, self.model))))
        return float(opt.step(self._closure(x, y)))

    def _losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")

    def _closure(
        self, x: Tensor, y: Tensor, *, share: float = 1.0, clears: bool = False
    ) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            if clears:
                self.opt.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            if share != 1.0:
                loss = loss * share
            loss.backward()
            self.samples += len(x)
            return loss.detach()

        return closure

    def _counted(self, closure: Any) -> Callable[[], Tensor]:
        """A closure of `sampling`, with the samples it kept counted."""

        def counted() -> Tensor:
            loss = closure()
            self.samples += closure.size if closure.kept is None else len(closure.kept)
            return loss

        return counted


def _optimizer(
    model: nn.Module,
    recipe: str | Recipe | None,
    base: str,
    base_kwargs: dict[str, Any],
    recipe_kwargs: dict[str, Any],
    seed: int,
) -> torch.optim.Optimizer:
    if not isinstance(recipe, str):
        if recipe_kwargs:
            raise ValueError(f"train: recipe_kwargs {recipe_kwargs} go with a recipe's name, not {recipe!r}")
        if recipe is None:
            return BASES[base](model.parameters(), **base_kwargs)
        return SAM(model.named_parameters(), BASES[base], recipe=recipe, model=model, **base_kwargs)
    if "seed" not in recipe_kwargs and recipe in recipes.names():
        if "seed" in inspect.signature(getattr(recipes, recipe)).parameters:
            recipe_kwargs["seed"] = seed
    made = recipes.get(recipe, **recipe_kwargs)
    return SAM(model.named_parameters(), BASES[base], recipe=made, model=model, **base_kwargs)


def _check(
    base: str, schedule: str, epochs: int | None, gradients: float | None, batch: int, samples: int
) -> None:
    if base not in BASES:
        raise ValueError(f"train: base is {base!r}; expected one of {', '.join(BASES)}")
    if schedule not in ("constant", "cosine", "inverse_sqrt"):
        raise ValueError(f"train: schedule is {schedule!r}; expected 'constant', 'cosine' or 'inverse_sqrt'")
    if (epochs is None) == (gradients is None):
        raise ValueError("train: expected one of epochs and gradients, which say how long to train")
    if (epochs is not None and epochs < 1) or (gradients is not None and not gradients >= 1):
        raise ValueError(f"train: epochs is {epochs!r} and gradients {gradients!r}; expected at least 1")
    if batch < 1 or samples < 1:
        raise ValueError(f"train: batch is {batch!r} of {samples} samples; expected at least 1 of each")


def _share(schedule: Schedule, done: float, step: int) -> float:
    """The learning rate of a step as a share of the first; done is the share of training behind it."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0 if schedule == "constant" else 1 / math.sqrt(step + 1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine; small networks are faster so, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
