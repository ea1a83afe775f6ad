"""The Trainer of Hugging Face: exact against a plain loop, for every normalization of losses it knows."""

from __future__ import annotations

import pytest
import ranks
import references
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sam_kernels import SAM
from sam_kernels.compat import davda54
from sam_kernels.trainers.transformers import SAMTrainerMixin

pytest.importorskip("accelerate", reason="accelerate is not installed: make test-trainers does so")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: make test-trainers does so"
)

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

RHO, LR, BATCH, BATCHES, EPOCHS = 0.3, 0.2, 4, 5, 2
X, Y = references.data(BATCH * BATCHES)
IGNORED = Y.clone()
IGNORED[[1, 2, 9, 16]] = -100  # so that micro-batches count differently


class Averaging(nn.Module):
    """A model that knows nothing of its batch: the Trainer divides its losses by the number of them."""

    def __init__(self):
        super().__init__()
        self.net = references.network()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Summing(Averaging):
    """A model that is told how many labels the whole step has, as transformers' own are."""

    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels, reduction="sum") / num_items_in_batch, "logits": logits}


class Trainer(SAMTrainerMixin, transformers.Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"x": X[index], "labels": IGNORED[index]}


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trainer_of(model, tmp_path, k=1, clip=0.0, cls=Trainer, **settings):
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": LR}
    options |= {"per_device_train_batch_size": BATCH, "save_strategy": "no", "num_train_epochs": EPOCHS}
    keywords = {"sam": settings.pop("sam", {"rho": RHO})} if cls is Trainer else {}
    optimizers = settings.pop("optimizers", (None, None))
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        gradient_accumulation_steps=k,
        max_grad_norm=clip,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        **{**options, **settings},
    )
    return cls(
        model=model, args=args, train_dataset=Rows(), data_collator=collate, optimizers=optimizers, **keywords
    )


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerators of one process share what the first was told."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def windows(k):
    return references.windows(list(zip(X.split(BATCH), IGNORED.split(BATCH), strict=True)), k, EPOCHS)


def labels_in(batches):
    return sum(int((y != -100).sum()) for _, y in batches)


def reference(kind, k, clip, make=lambda parameters: torch.optim.SGD(parameters, lr=LR)):
    model = references.network()
    steps = []
    for batches in windows(k):
        count, items = len(batches), labels_in(batches)

        def part(x, y, count=count, items=items):
            def loss():
                if kind is Summing:
                    return cross_entropy(model(x), y, reduction="sum") / items
                return cross_entropy(model(x), y) / count

            return loss

        steps.append([part(*batch) for batch in batches])
    first = references.train(model, make(model.parameters()), steps, rho=RHO, clip=clip or None)
    return model, first


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("kind", [Averaging, Summing])
def test_the_trainer_is_exact(kind, k, clip, tmp_path):
    model = kind()
    trainer = trainer_of(model, tmp_path, k, clip)
    trainer.train()
    expected, first = reference(kind, k, clip)
    assert references.largest_difference(model.net, references.network()) > 1e-2, "nothing was trained"
    assert references.largest_difference(model.net, expected) <= 1e-13
    assert trainer.state.global_step == len(first)
    if k == 1:
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert logged == pytest.approx([float(loss) for loss in first], abs=1e-4), "logged: that of pass one"


def replicated(rank, folder, k):
    """DDP: the ranks take micro-batches of two samples in turns."""
    model = Summing()
    trainer_of(model, folder, k, per_device_train_batch_size=BATCH // ranks.RANKS).train()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.slow
def test_the_trainer_is_exact_on_two_ranks(tmp_path):
    first, second = ranks.on_two(replicated, tmp_path, tmp_path, 2)
    expected, _ = reference(Summing, 2, None)
    for mine, other, p in zip(first, second, expected.parameters(), strict=True):
        assert torch.equal(mine, other), "the ranks differ"
        assert float((mine - p.detach()).abs().max()) <= 1e-13


def test_the_plain_trainer_divides_losses_as_the_reference_does(tmp_path):
    """A control: without SAM, Trainer and reference agree, so the normalization assumed here is its own."""
    model = Summing()
    cls = type("Plain", (transformers.Trainer,), {"_get_train_sampler": Trainer._get_train_sampler})
    trainer_of(model, tmp_path, 2, cls=cls).train()
    expected = references.network()
    base = torch.optim.SGD(expected.parameters(), lr=LR)
    for batches in windows(2):
        items = labels_in(batches)
        expected.zero_grad()
        for x, y in batches:
            (cross_entropy(expected(x), y, reduction="sum") / items).backward()
        base.step()
    assert references.largest_difference(model.net, expected) <= 1e-13


def test_the_default_optimizer_and_a_schedule(tmp_path):
    """AdamW as the Trainer makes it, with its param groups, under a linear schedule."""
    model = Averaging()
    settings = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "weight_decay": 0.1}
    trainer = trainer_of(model, tmp_path, 2, learning_rate=0.05, **settings)
    trainer.train()
    steps = trainer.state.global_step
    expected = references.network()
    decayed = [p for n, p in expected.named_parameters() if n in ("0.weight", "3.weight")]
    others = [p for n, p in expected.named_parameters() if n not in ("0.weight", "3.weight")]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    base = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1 - step / steps)
    for batches in windows(2):
        count = len(batches)
        parts = [lambda x=x, y=y, n=count: cross_entropy(expected(x), y) / n for x, y in batches]
        references.train(expected, base, [parts], rho=RHO)
        schedule.step()
    assert references.largest_difference(model.net, references.network()) > 1e-2, "nothing was trained"
    # Adam divides by the root of its second moment, which for hardly used weights is as small as the errors.
    assert references.largest_difference(model.net, expected) <= 1e-9


def test_a_base_optimizer_of_ones_own_is_wrapped(tmp_path):
    model = Averaging()
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    trainer_of(model, tmp_path, 2, optimizers=(base, None)).train()
    expected, _ = reference(
        Averaging, 2, None, lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9)
    )
    assert references.largest_difference(model.net, expected) <= 1e-13


def test_an_optimizer_of_ones_own_and_a_cadence(tmp_path):
    """Steps that do not perturb evaluate nothing twice."""
    model = Averaging()
    calls = []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    opt = SAM(model.parameters(), torch.optim.SGD, recipe="rst", lr=LR)
    trainer_of(model, tmp_path, 1, optimizers=(opt, None), sam=None).train()
    due = sum(opt.recipe.cadence.is_due(step) for step in range(BATCHES * EPOCHS))
    assert 0 < due < BATCHES * EPOCHS
    assert len(calls) == BATCHES * EPOCHS + due


@pytest.mark.parametrize(("rng", "is_same"), [("replay", True), ("advance", False)])
def test_dropout_masks_can_be_those_of_the_first_pass(rng, is_same, tmp_path):
    model, masks = Averaging(), []
    model.net.register_forward_hook(lambda *_: masks.append(torch.rand(3)))
    trainer_of(model, tmp_path, 2, sam={"rho": RHO, "rng": rng}).train()
    expected, _ = reference(Averaging, 2, None)
    assert references.largest_difference(model.net, expected) <= 1e-13
    for step in range(2):
        first, second = masks[4 * step : 4 * step + 2], masks[4 * step + 2 : 4 * step + 4]
        assert all(torch.equal(a, b) == is_same for a, b in zip(first, second, strict=True))
    assert not torch.equal(masks[0], masks[4]), "the next step has masks of its own"


def test_resuming_is_going_on(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 0.05}
    straight, resumed = Averaging(), Averaging()
    trainer_of(straight, tmp_path, 2, **settings).train()
    half = [p.detach().clone() for p in resumed.parameters()]
    again = trainer_of(resumed, tmp_path, 2, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert any(not torch.equal(p, w) for p, w in zip(resumed.parameters(), half, strict=True))
    assert references.largest_difference(straight, resumed) == 0
    assert again.optimizer.param_groups[0]["sam_step"] == again.state.global_step == 6


def test_a_failure_at_perturbed_weights_leaves_them_restored(tmp_path):
    model = Averaging()
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:  # two micro-batches at w, one at w + e
            raise OSError("no more data")

    model.net.register_forward_hook(fail)
    trainer = trainer_of(model, tmp_path, 2)
    with pytest.raises(OSError, match="no more data"):
        trainer.train()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("poisoned", [{6, 8}, {8}], ids=["both passes", "the second pass"])
def test_a_gradient_scaler(poisoned, clip, tmp_path):
    """As fp16 would have it, but for the casts: scaled gradients, and the second step overflows."""
    model, calls = Averaging(), []

    def poison(module, inputs, output):
        calls.append(1)
        return output * float("inf") if len(calls) in poisoned else output

    model.net.register_forward_hook(poison)
    trainer = trainer_of(model, tmp_path, 2, clip, num_train_epochs=1)
    accelerator = trainer.accelerator  # which scales on GPUs alone; autocast leaves fp64 as it is
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True
    accelerator.state._mixed_precision = "fp16"
    trainer.train()
    assert accelerator.scaler.get_scale() == 512.0
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert 0 < float(norms[0]) < 10, "the Trainer has clipped what was scaled"
    expected = references.network()
    base = torch.optim.SGD(expected.parameters(), lr=LR)
    for number, batches in enumerate(windows(2)[:3]):
        count = len(batches)
        parts = [lambda x=x, y=y, n=count: cross_entropy(expected(x), y) / n for x, y in batches]
        if number != 1:
            references.train(expected, base, [parts], rho=RHO, clip=clip or None)
    assert references.largest_difference(model.net, expected) <= 1e-12


# ---- what is refused ---------------------------------------------------------------------------


def test_the_other_sam_is_refused(tmp_path):
    model = Averaging()
    other = davda54.SAM(model.parameters(), torch.optim.SGD, lr=LR)
    with pytest.raises(TypeError, match="davda54.SAM calls its closure once"):
        trainer_of(model, tmp_path, optimizers=(other, None)).train()


def test_recipes_of_more_gradients_are_refused(tmp_path):
    model = Averaging()
    with pytest.raises(RuntimeError, match="evaluates 4 gradients"):
        trainer_of(model, tmp_path, sam={"recipe": "multistep_sam"}).train()
