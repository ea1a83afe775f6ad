"""Two ranks against one process: replicas and shards, every recipe, accumulation, failures, refusals."""

from __future__ import annotations

import pytest
import scenarios
import torch
from gloo import Ranks
from problems import BASES, CLOSE, RHO, STEPS, apart, assert_equal_to, gradient, net, part, trained

from sam_kernels import recipes


@pytest.fixture(scope="module")
def ranks():
    two = Ranks(2, "scenarios")
    yield two
    two.stop()


def test_the_reference_itself_moves_and_the_two_meanings_differ():
    assert apart(trained(steps=0), trained()) > 0.1
    assert apart(trained(world=2), trained()) > 1e-3


# ---- replicas ------------------------------------------------------------------------------------

WRAPS = [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}]


@pytest.mark.parametrize("two_step", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_replicas_that_share_a_perturbation_are_one_process(ranks, base, two_step):
    assert_equal_to(trained(base), ranks("ddp", base=base, two_step=two_step))


@pytest.mark.parametrize("two_step", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_replicas_that_perturb_for_themselves_are_m_sharpness(ranks, base, two_step):
    found = ranks("ddp", base=base, two_step=two_step, across_ranks="per_rank")
    assert_equal_to(trained(base, world=2), found)


@pytest.mark.parametrize("wraps", WRAPS, ids=lambda wraps: next(iter(wraps), "plain"))
@pytest.mark.parametrize("across_ranks", ["synced", "per_rank"])
def test_options_of_ddp_change_nothing(ranks, wraps, across_ranks):
    expected = trained(world=1 if across_ranks == "synced" else 2)
    assert_equal_to(expected, ranks("ddp", wraps=wraps, across_ranks=across_ranks))


def test_a_static_graph_serves_one_perturbation_and_refuses_two(ranks):
    assert_equal_to(trained(), ranks("ddp", wraps={"static_graph": True}))
    (said, _) = ranks("refusal", kind="static", across_ranks="per_rank")
    assert "static_graph" in said and "pytorch#143580" in said


def test_first_gradients_in_buckets_are_kept_for_a_combination(ranks):
    plain = scenarios.whole_weights("gsam")
    found = ranks("ddp", recipe="gsam", wraps={"gradient_as_bucket_view": True})
    assert_equal_to(plain, found, 1e-13)


def test_two_hundred_steps_of_bf16_leave_replicas_equal_to_the_bit(ranks):
    one, other = ranks("bf16_replicas")
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = dict(net(torch.bfloat16).named_parameters())
    assert not torch.equal(one["inner.weight"], start["inner.weight"])


@pytest.mark.parametrize("two_step", [False, True])
def test_a_branch_that_one_rank_uses_is_restored_where_it_was_perturbed(ranks, two_step):
    one, other = ranks("a_branch_of_one_rank", two_step=two_step)
    assert apart(one, other) == 0.0 and all(w.isfinite().all() for w in one.values())


def test_ranks_skip_together_where_one_gradient_is_not_finite(ranks):
    for before, after in ranks("overflow_on_one_rank"):
        assert apart(before, after) == 0.0


def test_the_base_may_share_its_state_between_ranks(ranks):
    assert_equal_to(trained(), ranks("zero_redundancy"))


# ---- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_step", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_fully_shard_is_one_process(ranks, base, two_step):
    assert_equal_to(trained(base), ranks("fsdp2", base=base, two_step=two_step))


@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
def test_fully_shard_on_every_backend(ranks, backend):
    assert_equal_to(trained("AdamW"), ranks("fsdp2", base="AdamW", backend=backend), 1e-14)


@pytest.mark.parametrize("reshard", [True, False])
def test_weights_that_stay_gathered_after_the_forward_pass(ranks, reshard):
    assert_equal_to(trained(), ranks("fsdp2", wraps={"reshard_after_forward": reshard}))


def test_weights_that_stay_gathered_after_the_backward_pass_are_gathered_anew(ranks):
    assert_equal_to(trained(), ranks("fsdp2", keep_gathered=True))
    # Without the module nobody can know, and the perturbation is without effect; this is said beforehand.
    unknown = ranks("fsdp2", keep_gathered=True, known=False)
    assert apart(unknown[0], trained()) > 1e-2
    (said, _), (nothing, _) = ranks("warnings_of", known=False), ranks("warnings_of", known=True)
    assert len(said) == 1 and "model=" in said[0] and not nothing


# Those are refused on shards, and random numbers of weights go by their parts.
REFUSED, RANDOM = {"ssam_f", "ssam_d"}, {"esam", "r_sam", "rand_sam"}


@pytest.mark.parametrize("recipe", sorted(set(recipes.names()) - REFUSED - RANDOM))
def test_every_recipe_on_shards_is_the_recipe_on_whole_weights(ranks, recipe):
    found = ranks("recipe_under_fsdp2", recipe=recipe)
    assert_equal_to(scenarios.whole_weights(recipe), [weights for weights, _ in found], 1e-12)
    assert all("spread over 1 mesh dimensions: native" in said for _, said in found)


@pytest.mark.parametrize("recipe", sorted(RANDOM))
def test_recipes_that_draw_by_weight_run_on_shards(ranks, recipe):
    for weights, _ in ranks("recipe_under_fsdp2", recipe=recipe):
        assert 1e-4 < apart(weights, scenarios.whole_weights(recipe)) < 1.0


def test_parts_have_noise_of_their_own(ranks):
    (made, same) = ranks("noise_of_ranks")
    assert torch.equal(made, same)
    assert abs(float(made.norm()) - RHO) < 1e-6
    assert not torch.isclose(made[:4], made[4:]).any()


def test_state_is_spread_as_its_parameter_is(ranks):
    for base, names in (("SGD", {"momentum_buffer"}), ("AdamW", {"exp_avg", "exp_avg_sq"})):
        for found in ranks("state_of_parameters", base=base):
            assert {name for name, _ in found} == names and all(alike for _, alike in found)


def test_mixed_precision_of_fully_shard_perturbs_fp32_shards(ranks):
    for weights, dtypes in ranks("bf16_policy"):
        assert dtypes == [{"torch.float32"}] * STEPS
        assert apart({k: w.double() for k, w in weights.items()}, trained()) < 0.05


@pytest.mark.parametrize("base", BASES)
def test_tensor_parallelism_is_one_process(ranks, base):
    assert_equal_to(trained(base), ranks("tensor_parallel", base=base))


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_one_process(ranks, use_orig_params):
    expected = trained()
    for found in ranks("fsdp1", use_orig_params=use_orig_params):
        if use_orig_params:
            assert apart(found, expected) <= CLOSE
        else:
            flat = torch.cat([w.flatten() for w in expected.values()])
            assert float((found["flat"][: len(flat)] - flat).abs().max()) <= CLOSE


def test_fsdp1_that_shards_nothing_counts_each_element_once(ranks):
    assert_equal_to(trained(), ranks("fsdp1", strategy="NO_SHARD"))


# ---- batches in parts, failures, refusals --------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_batch_in_parts_on_ranks_is_the_batch(ranks, kind):
    assert_equal_to(trained(), ranks("in_parts", kind=kind))


def test_a_batch_in_parts_with_a_perturbation_per_rank(ranks):
    assert_equal_to(trained(world=2), ranks("in_parts", kind="ddp", across_ranks="per_rank"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_exception_in_the_second_pass_leaves_the_weights(ranks, kind):
    for before, after, passes in ranks("an_exception_in_the_second_pass", kind=kind):
        assert passes == 2 and apart(before, after) == 0.0


@pytest.mark.parametrize("kind, across_ranks", [("ddp", "synced"), ("ddp", "per_rank"), ("fsdp2", "synced")])
def test_a_scaler_changes_nothing_and_all_ranks_skip_together(ranks, kind, across_ranks):
    world = 2 if across_ranks == "per_rank" else 1
    for taken, scale in ranks("scaled", kind=kind, across_ranks=across_ranks):
        assert apart(taken[-1], trained(world=world)) <= 1e-12, "eps is added to the norm of scaled gradients"
        assert scale == 1024.0
    for taken, scale in ranks("scaled", kind=kind, across_ranks=across_ranks, overflow=True):
        moved = [apart(before, after) for before, after in zip(taken, taken[1:], strict=False)]
        assert moved[1] == 0.0 and min(moved[0], *moved[2:]) > 0.0 and scale == 512.0


def test_a_norm_of_shards_is_one_collective(ranks):
    for calls, _ in ranks("collectives_of_a_step", kind="fsdp2"):
        assert calls == [1]


def test_a_gradient_that_is_still_to_be_summed_is_refused(ranks):
    for said in ranks("a_partial_gradient"):
        assert "still to be summed" in said and "redistribute" in said


def test_autograd_sees_what_is_written_into_a_dtensor(ranks):
    for said in ranks("a_retained_graph"):
        assert "modified by an inplace operation" in said


@pytest.mark.parametrize(
    "kind, options, sentence",
    [
        ("plain", {"across_ranks": "per_rank"}, "pass the DistributedDataParallel module as model="),
        ("plain", {"across_ranks": "all"}, "expected 'synced' or 'per_rank'"),
        ("fsdp2", {"across_ranks": "per_rank"}, "replicas="),
        ("ddp", {"across_ranks": "per_rank", "recipe": "gsam"}, "combines gradients"),
        ("ddp", {"across_ranks": "per_rank", "recipe": "vasso"}, "remembers gradients"),
        ("ddp", {"across_ranks": "per_rank", "recipe": "ae_sam"}, "its cadence"),
        ("ddp", {"across_ranks": "per_rank", "recipe": "ssam_d"}, "its masks"),
        ("fsdp2", {"recipe": "ssam_f"}, "selects weights by rank"),
    ],
)
def test_what_cannot_be_had_is_refused_in_words(ranks, kind, options, sentence):
    for said in ranks("refusal", kind=kind, **options):
        assert sentence in said


@pytest.mark.parametrize("recipe", recipes.names())
def test_replicas_that_perturb_for_themselves_stay_equal_or_are_refused(ranks, recipe):
    one, other = ranks("a_step_of", recipe=recipe)
    if isinstance(one, str):
        assert "'per_rank'" in one and one == other
    else:
        assert apart(one, other) == 0.0


def test_a_first_pass_that_was_averaged_is_no_ranks_own(ranks):
    for said in ranks("a_first_pass_that_was_averaged"):
        assert "inside `with opt.first_pass():`" in said


def test_a_static_graph_serves_batches_in_parts(ranks):
    assert_equal_to(trained(), ranks("in_parts", kind="static"))


def test_what_fsdp1_cannot_have_is_refused_in_words(ranks):
    for said in ranks("flat_refusals"):
        assert len(said) == 5
        assert "model=" in said[0] and "use_orig_params=True" in said[1]
        assert "fully_shard" in said[2] and "fully_shard" in said[3]
        assert "scaler.unscale_(opt)" in said[4]


@pytest.mark.parametrize("recipe, base", [("looksam", "SGD"), ("rst", "SGD"), ("sam", "SGD")])
def test_looking_at_the_state_takes_no_step(ranks, recipe, base):
    for counts in ranks("looks_at_state", recipe=recipe, base=base):
        assert counts == [1, 1, 1]


def test_the_gradient_of_the_problem_is_autograds():
    model = net()
    scenarios.loss_of(model, *part(0, 0, 1)).backward()
    expected = gradient({name: p.detach() for name, p in model.named_parameters()}, *part(0, 0, 1))
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
