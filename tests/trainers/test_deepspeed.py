"""DeepSpeed: the driver around ZeRO-1 and ZeRO-2 on two ranks against a plain loop on one."""

from __future__ import annotations

import os

import pytest
import ranks
import references
import torch
from torch.nn.functional import cross_entropy

from sam_kernels import recipes
from sam_kernels.trainers import deepspeed as ours

RHO, LR, BATCH, STEPS = 0.3, 0.2, 8, 4
X, Y = references.data(BATCH * STEPS, torch.float32)
DATA = list(zip(X.split(BATCH), Y.split(BATCH), strict=True))
BASES = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05, eps=1e-3),
}


def start():
    """Import DeepSpeed for CPUs, with gloo: collectives of its own would take minutes to compile."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return deepspeed


def engine_of(model, stage, base="sgd", k=1, clip=0.0, **settings):
    zero = {"stage": stage, **settings.pop("zero", {})}
    config = {
        "train_micro_batch_size_per_gpu": BATCH // ranks.RANKS,
        "gradient_accumulation_steps": k,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **settings,
    }
    optimizer = BASES[base](model.parameters())
    return start().initialize(model=model, optimizer=optimizer, config=config)[0]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(rank, cases):
    """Weights and losses of every case, and what was refused."""
    results = []
    for stage, base, recipe, clip, every in cases:
        model = references.network(torch.float32)
        engine = engine_of(model, stage, base, clip=clip)
        driver = ours.Driver(engine, recipes.get(recipe, rho=RHO, every=every))
        losses = []
        for x, y in DATA:
            loss = driver.step(lambda x=x, y=y, e=engine: cross_entropy(e(x[rank::2]), y[rank::2]))
            losses.append(float(loss))
        results.append((weights(model), losses))
    return results, failed_at_perturbed_weights(rank), refusals()


def failed_at_perturbed_weights(rank):
    """Whether weights and the next step are as if a step that raised had not been."""
    model = references.network(torch.float32)
    engine = engine_of(model, 1)
    driver = ours.Driver(engine, rho=RHO)
    before, calls = weights(model), []
    x, y = DATA[0]

    def fails():
        calls.append(1)
        if len(calls) == 2:
            moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
            raise OSError("at perturbed weights" if moved else "nothing was perturbed")
        return cross_entropy(engine(x[rank::2]), y[rank::2])

    try:
        driver.step(fails)
    except OSError as error:
        same = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        return str(error), same
    return "no error", False


def refusals():
    said = {}
    for name, settings in {
        "stage 3": {"stage": 3},
        "bf16": {"stage": 1, "bf16": {"enabled": True}},
        "accumulation": {"stage": 1, "k": 2},
    }.items():
        engine = engine_of(references.network(torch.float32), **settings)
        try:
            ours.Driver(engine)
        except RuntimeError as error:
            said[name] = str(error)
    return said


CASES = [
    (stage, base, recipe, clip, every)
    for stage in (0, 1, 2)
    for base, recipe, clip, every in [
        ("sgd", "sam", 0.0, 1),
        ("adam", "asam", 0.0, 1),
        ("sgd", "sam", 0.05, 1),
        ("sgd", "sam", 0.0, 2),
    ]
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: make test-trainers does so")
    return ranks.on_two(trained, tmp_path_factory.mktemp("ranks"), CASES)


def asam_metric(name, w):
    return w.abs() + 0.01 if name.endswith("weight") else None


def reference(base, recipe, clip, every):
    model = references.network(torch.float32)
    optimizer = BASES[base](model.parameters())
    metric = asam_metric if recipe == "asam" else None
    for number, (x, y) in enumerate(DATA):
        parts = [lambda x=x, y=y: cross_entropy(model(x), y)]
        rho = 0.0 if number % every else RHO
        references.train(model, optimizer, [parts], rho=rho, clip=clip or None, metric=metric)
    return weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="zero{0[0]}-{0[1]}-{0[2]}-{0[3]}-{0[4]}".format)
def test_two_ranks_are_one_process(results, case):
    expected, start_weights = reference(*case[1:]), weights(references.network(torch.float32))
    assert max(float((expected[n] - w).abs().max()) for n, w in start_weights.items()) > 1e-2
    number = CASES.index(case)
    (first, losses), (second, others) = results[0][0][number], results[1][0][number]
    for name, w in expected.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between the ranks"
        assert float((first[name] - w).abs().max()) <= 2e-6
    initial = references.network(torch.float32)
    x, y = DATA[0]
    expected_loss = float(cross_entropy(initial(x), y).detach())
    assert (losses[0] + others[0]) / 2 == pytest.approx(expected_loss, rel=1e-6)


@pytest.mark.slow
def test_a_failure_leaves_weights_restored(results):
    assert [result[1] for result in results] == [("at perturbed weights", True)] * 2


@pytest.mark.slow
def test_untested_engines_are_refused(results):
    said = results[0][2]
    assert set(said) == {"stage 3", "bf16", "accumulation"}
    assert "stage 3" in said["stage 3"] and "use stage 1 or 2" in said["stage 3"]
    assert "bf16" in said["bf16"]
    assert "gradient_accumulation_steps is 2" in said["accumulation"]


# ---- without DeepSpeed -------------------------------------------------------------------------


class Engine:
    """As much of an engine as the checks look at."""

    def __init__(self, **settings):
        self.module = torch.nn.Linear(2, 1)
        self.settings = {"stage": 1, "fp16": False, "bf16": False, "offload": None, "k": 1, **settings}

    def zero_optimization_stage(self):
        return self.settings["stage"]

    def fp16_enabled(self):
        return self.settings["fp16"]

    def bfloat16_enabled(self):
        return self.settings["bf16"]

    def zero_offload_optimizer(self):
        return self.settings["offload"]

    def zero_offload_param(self):
        return None

    def gradient_accumulation_steps(self):
        return self.settings["k"]


class OffloadConfig:
    device = "cpu"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stage": 3}, "ZeRO stage 3"),
        ({"fp16": True}, "fp16 or bf16"),
        ({"offload": OffloadConfig}, "offloading"),
        ({"k": 4}, "gradient_accumulation_steps is 4"),
    ],
)
def test_settings_are_refused_in_words(settings, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        ours.Driver(Engine(**settings))


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_that_need_more_are_refused_in_words(name):
    recipe = recipes.get(name)
    try:
        driver = ours.Driver(Engine(), recipe)
    except (ValueError, TypeError) as refusal:
        assert name not in {"sam", "asam", "fisher_sam", "layerwise_sam", "esam", "rst", "ae_sam", "k_sam"}
        assert "recipe" in str(refusal)
    else:
        assert recipe.gradients == 2 and recipe.combine.gradients == 1
        assert driver.sam.recipe.name == name
