"""Lightning: automatic optimization unmodified, and with SAMCallback under accumulation."""

from __future__ import annotations

import warnings

import pytest
import ranks
import references
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from sam_kernels import SAM
from sam_kernels.compat import davda54
from sam_kernels.trainers import lightning as ours

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: make test-trainers does so")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter. step flavor"),
]

RHO, LR, BATCH, BATCHES, EPOCHS = 0.3, 0.2, 4, 5, 2
X, Y = references.data(BATCH * BATCHES)
PRECISIONS = {"64-true": torch.float64, "32-true": torch.float32, "bf16-mixed": torch.float32}
# Lightning clips the first gradient too, which moves e by the 1e-12 that is added to its norm, 5e-2 then.
TOLERANCE = {"64-true": 2e-12, "32-true": 2e-6, "bf16-mixed": 2e-6}


class Module(pl.LightningModule):
    def __init__(self, dtype=torch.float64, recipe=None, optimizer=None, rng="advance"):
        super().__init__()
        self.net = references.network(dtype)
        self.make = optimizer
        self.sam = {"rho": RHO, "recipe": recipe, "rng": rng, "model": self.net}
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.seen.append(batch_idx)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def configure_optimizers(self):
        if self.make is not None:
            return self.make(self.parameters())
        return SAM(self.parameters(), torch.optim.SGD, lr=LR, momentum=0.9, **self.sam)


class Outputs(pl.Callback):
    """Keep what other callbacks are told a batch's loss was."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def fit(module, *callbacks, precision="64-true", k=1, epochs=EPOCHS, rank=None, ckpt_path=None, **settings):
    dtype, devices, batch, sampler = PRECISIONS.get(precision, torch.float32), 1, BATCH, None
    dataset = TensorDataset(X.to(dtype), Y)
    if rank is not None:  # every second sample
        devices, batch = ranks.RANKS, BATCH // ranks.RANKS
        sampler = DistributedSampler(dataset, devices, rank, shuffle=False)
        settings.update(strategy="ddp", use_distributed_sampler=False)
    trainer = settings.pop("library", pl).Trainer(
        accelerator="cpu",
        devices=devices,
        max_epochs=epochs,
        accumulate_grad_batches=k,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"precision": precision} if precision else {}),
        **settings,
    )
    trainer.fit(module, DataLoader(dataset, batch_size=batch, sampler=sampler), ckpt_path=ckpt_path)
    return trainer


def reference(k=1, precision="64-true", clip=None, epochs=EPOCHS):
    """The plain loop, and the loss of each step at the weights it began with."""
    dtype = PRECISIONS[precision]
    model = references.network(dtype)
    batches = list(zip(X.to(dtype).split(BATCH), Y.split(BATCH), strict=True))

    def part(x, y):
        def loss():
            with torch.autocast("cpu", torch.bfloat16, precision == "bf16-mixed", cache_enabled=False):
                return cross_entropy(model(x), y) / k

        return loss

    steps = [[part(*batch) for batch in window] for window in references.windows(batches, k, epochs)]
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    first = references.train(model, base, steps, rho=RHO, clip=clip)
    return model, first


@pytest.mark.parametrize(
    ("precision", "clip", "with_callback"),
    [
        ("64-true", None, False),
        ("64-true", 0.05, True),
        ("32-true", 0.05, False),
        ("bf16-mixed", None, True),
        ("bf16-mixed", 0.05, False),
        ("bf16-mixed", 0.05, True),
    ],
)
def test_automatic_optimization_is_exact(precision, clip, with_callback):
    module = Module(PRECISIONS[precision])
    callbacks = [ours.SAMCallback()] if with_callback else []
    trainer = fit(module, *callbacks, precision=precision, gradient_clip_val=clip)
    expected, _ = reference(precision=precision, clip=clip)
    assert references.largest_difference(module.net, expected) <= TOLERANCE[precision]
    assert trainer.global_step == BATCHES * EPOCHS
    assert len(module.seen) == 2 * BATCHES * EPOCHS


@pytest.mark.parametrize(
    ("precision", "clip", "k"),
    [("64-true", None, 2), ("64-true", 0.05, 3), ("32-true", None, 3), ("bf16-mixed", 0.05, 2)],
)
def test_accumulation_is_exact_with_the_callback(k, precision, clip):
    module = Module(PRECISIONS[precision])
    trainer = fit(module, ours.SAMCallback(), k=k, precision=precision, gradient_clip_val=clip)
    expected, _ = reference(k, precision, clip)
    assert references.largest_difference(module.net, expected) <= TOLERANCE[precision]
    assert len(module.seen) == 2 * BATCHES * EPOCHS, "each micro-batch is evaluated twice and no more"
    assert trainer.global_step == len(references.windows(range(BATCHES), k, EPOCHS))


def test_accumulation_without_the_callback_is_refused():
    module = Module()
    with pytest.raises(RuntimeError, match="Lightning accumulates gradients.*SAMCallback"):
        fit(module, k=2)
    assert references.largest_difference(module.net, references.network()) == 0


@pytest.mark.parametrize("recipe", ["cr_sam", "gsam", "rand_sam", "lookbehind_sam"])
def test_accumulation_is_that_of_a_list_of_closures(recipe):
    """Whatever gradients a recipe wants, and wherever; the reference is one batch of the same samples."""
    module = Module(recipe=recipe)
    fit(module, ours.SAMCallback(), k=BATCHES, epochs=3)
    model = references.network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, recipe=recipe, lr=LR, momentum=0.9, model=model)
    for _ in range(3):

        def closure():
            loss = cross_entropy(model(X), Y)
            loss.backward()
            return loss

        opt.step(closure)
    assert references.largest_difference(module.net, references.network()) > 1e-2, "nothing was trained"
    assert references.largest_difference(module.net, model) <= 1e-13


@pytest.mark.parametrize("k", [1, 2])
def test_dropout_masks_can_be_those_of_the_first_pass(k):
    """Every micro-batch meets the same masks in both passes, if asked for."""

    class Noisy(Module):
        def training_step(self, batch, batch_idx):
            self.masks.append(torch.rand(3))
            return super().training_step(batch, batch_idx)

    expected, _ = reference(k, epochs=1)
    for rng, is_same in (("replay", True), ("advance", False)):
        module = Noisy(rng=rng)
        module.masks = []
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*gradients that were there before.*")
            fit(module, ours.SAMCallback(), k=k, epochs=1)
        assert references.largest_difference(module.net, expected) <= TOLERANCE["64-true"]
        # With accumulation the pass to repeat begins after the micro-batches that Lightning has run itself.
        start = k - 1 if is_same else 0
        first, second = module.masks[start : start + k], module.masks[start + k : start + 2 * k]
        assert all(torch.equal(a, b) == is_same for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("k", [1, 2])
def test_losses_are_those_of_the_first_pass(k):
    outputs = Outputs()
    module = Module()
    trainer = fit(module, ours.SAMCallback(), outputs, k=k, epochs=1)
    model, first = reference(k, epochs=1)
    if k == 1:
        assert outputs.losses == pytest.approx([float(loss) for loss in first], rel=1e-12)
        assert float(trainer.callback_metrics["loss"]) == pytest.approx(
            float(torch.stack(first).mean()), rel=1e-6
        )
    else:
        assert outputs.losses[0] == pytest.approx(float(first[0]), rel=1e-12)
        assert len(outputs.losses) == BATCHES


class ByHand(Module):
    """The two-step form in manual optimization."""

    def __init__(self, perturbs=True):
        super().__init__()
        self.automatic_optimization = False
        self.perturbs = perturbs

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        x, y = batch
        opt.zero_grad()
        self.manual_backward(cross_entropy(self.net(x), y))
        if self.perturbs:
            opt.first_step(zero_grad=True)
            self.manual_backward(cross_entropy(self.net(x), y))
        opt.step()

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(optimizer)


@pytest.mark.parametrize("sam", [SAM, davda54.SAM])
def test_two_steps_by_hand(sam):
    """Lightning's wrapper of the optimizer inherits first_step, which must not begin a step of its own."""
    module = ByHand()
    module.make = lambda p: sam(p, torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9)
    trainer = fit(module)
    assert isinstance(module.optimizers(), pl.core.optimizer.LightningOptimizer)
    expected, _ = reference()
    assert references.largest_difference(module.net, expected) <= TOLERANCE["64-true"]
    assert trainer.global_step == len(module.seen) == BATCHES * EPOCHS


def test_a_step_by_hand_with_nothing_pending_is_refused():
    """Lightning hands over a closure that does nothing; it is no gradient of zeros."""
    module = ByHand(perturbs=False)
    with pytest.raises(RuntimeError, match="nothing pending"):
        fit(module)
    assert references.largest_difference(module.net, references.network()) == 0


def replicated(rank, k):
    """The same training under DDP."""
    module = Module()
    fit(module, ours.SAMCallback(), k=k, rank=rank)
    return [p.detach().clone() for p in module.net.parameters()]


@pytest.mark.slow
def test_accumulation_is_exact_on_two_ranks(tmp_path):
    first, second = ranks.on_two(replicated, tmp_path, 2)
    expected, _ = reference(2)
    for mine, other, p in zip(first, second, expected.parameters(), strict=True):
        assert torch.equal(mine, other), "the ranks differ"
        assert float((mine - p.detach()).abs().max()) <= TOLERANCE["64-true"]


def test_a_learning_rate_schedule_goes_on_without_warnings():
    def make(parameters):
        opt = SAM(parameters, torch.optim.SGD, rho=RHO, lr=LR)
        return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)}

    module = Module(optimizer=make)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        warnings.filterwarnings("error", message=".*optimizer.step.*")
        trainer = fit(module, ours.SAMCallback())
    opt = trainer.optimizers[0]
    assert opt.param_groups[0]["lr"] == LR * 0.5**EPOCHS


def test_resuming_is_going_on(tmp_path):
    straight, half, resumed = Module(), Module(), Module()
    fit(straight, ours.SAMCallback(), k=2)
    fit(half, ours.SAMCallback(), k=2, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, ours.SAMCallback(), k=2, ckpt_path=tmp_path / "half.ckpt")
    assert references.largest_difference(straight.net, half.net) > 1e-2
    assert references.largest_difference(straight.net, resumed.net) == 0


def test_the_optimizer_is_as_it_was_after_the_fit():
    callback, module = ours.SAMCallback(), Module()
    trainer = fit(module, callback)
    opt = trainer.optimizers[0]
    assert "step" not in opt.__dict__
    assert opt._phase == "idle"
    fit(Module(), callback, k=2)  # and the callback serves again

    class Interrupted(Module):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 3:
                raise OSError("no more data")
            return super().training_step(batch, batch_idx)

    module = Interrupted()
    with pytest.raises(OSError, match="no more data"):
        fit(module, callback)
    # Three passes were complete, so it failed at the perturbed weights of the second step.
    expected = references.network()
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)
    references.train(expected, base, [[lambda: cross_entropy(expected(X[:BATCH]), Y[:BATCH])]], rho=RHO)
    assert references.largest_difference(module.net, expected) <= 1e-13
    assert "step" not in module.optimizers(use_pl_optimizer=False).__dict__


def test_the_other_name_of_lightning():
    """pytorch_lightning has base classes of its own, and Lightning minds which."""
    other = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

    class Callback(ours.Hooks, other.Callback):
        pass

    class OtherModule(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = references.network()

        def training_step(self, batch):  # without batch_idx, which is as good
            return {"loss": cross_entropy(self.net(batch[0]), batch[1])}

        def configure_optimizers(self):
            return SAM(self.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9)

    module = OtherModule()
    fit(module, Callback(), k=2, library=other)
    assert references.largest_difference(module.net, reference(2)[0]) <= TOLERANCE["64-true"]
    with pytest.raises(RuntimeError, match="Lightning accumulates gradients"):
        fit(OtherModule(), k=2, library=other)


# ---- what is refused ---------------------------------------------------------------------------


def sixteen_mixed():
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return {"precision": None, "plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]}


def test_a_gradient_scaler_is_refused_with_the_callback():
    module = Module(torch.float32)
    with pytest.raises(RuntimeError, match="scales the loss.*'bf16-mixed'"):
        fit(module, ours.SAMCallback(), **sixteen_mixed())
    assert references.largest_difference(module.net, references.network(torch.float32)) == 0


def test_a_gradient_scaler_is_refused_without_the_callback():
    """Lightning runs the closure itself and then calls step(), no SAM step: the optimizer says so."""
    module = Module(torch.float32)
    with pytest.raises(RuntimeError, match="nothing pending"):
        fit(module, **sixteen_mixed())
    assert references.largest_difference(module.net, references.network(torch.float32)) == 0


def test_optimization_by_hand_is_refused():
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="optimizes by hand"):
        fit(module, ours.SAMCallback())


def test_batches_from_an_iterator_are_refused():
    class Iterating(Module):
        def training_step(self, dataloader_iter):
            return super().training_step(*next(dataloader_iter)[:2])

    with pytest.raises(RuntimeError, match="dataloader_iter"):
        fit(Iterating(), ours.SAMCallback())


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=LR),
        lambda parameters: davda54.SAM(parameters, torch.optim.SGD, lr=LR),
    ],
)
def test_other_optimizers_are_refused(make):
    with pytest.raises(TypeError, match=r"expected sam_kernels.SAM|use sam_kernels.SAM"):
        fit(Module(optimizer=make), ours.SAMCallback())
