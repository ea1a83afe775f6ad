"""Four ranks: meshes of two dimensions, and checkpoints that other numbers of ranks load."""

from __future__ import annotations

import pytest
import torch
from gloo import Ranks
from problems import BASES, CLOSE, apart, assert_equal_to, trained


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2, "scenarios")
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4, "scenarios")
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("base", BASES)
def test_hybrid_sharding_is_one_process(four, base):
    assert_equal_to(trained(base), four("hsdp", base=base))


@pytest.mark.parametrize("base", BASES)
def test_fully_shard_over_tensor_parallelism_is_one_process(four, base):
    assert_equal_to(trained(base), four("fsdp2_and_tensor_parallel", base=base))


def test_collectives_are_one_for_each_mesh_dimension_of_each_sharding(four):
    for calls, groups in four("collectives_of_a_step", kind="both"):
        assert groups == 2 and calls == [1] * 3
    for calls, groups in four("collectives_of_a_step", kind="hsdp"):
        assert groups == 1 and calls == [1]


@pytest.mark.parametrize("two_step", [False, True])
def test_each_group_of_shards_perturbs_for_itself(four, two_step):
    assert_equal_to(trained(world=2), four("replicated_by_hooks", two_step=two_step))


def test_replicas_by_hooks_with_one_perturbation(four):
    assert_equal_to(trained(), four("replicated_by_hooks", across_ranks="synced"))


@pytest.mark.parametrize("kind, sentence", [("hybrid", "averages over already"), ("shards", "mix parts")])
def test_hooks_on_the_wrong_mesh_are_refused(four, kind, sentence):
    for said in four("hooks_on_the_wrong_mesh", kind=kind):
        assert sentence in said


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("recipe", ["sam", "looksam", "vasso", "samar", "ae_sam"])
@pytest.mark.parametrize("base", BASES)
def test_a_run_goes_on_from_a_distributed_checkpoint(two, four, tmp_path, recipe, base, before):
    given = {"folder": str(tmp_path), "recipe": recipe, "base": base, "before": before}
    (expected, _) = two("begin_and_save", **given)
    for found in two("load_and_go_on", **given):
        assert apart(found, expected) == 0.0, "bit for bit on as many ranks"
    for found in four("load_and_go_on", **given):
        assert apart(found, expected) <= CLOSE, "on other ranks sums have another order"


@pytest.mark.parametrize("recipe", ["sam", "samar"])
def test_flattened_keys_serve_recipes_that_keep_no_tensors(two, tmp_path, recipe):
    given = {"folder": str(tmp_path), "recipe": recipe, "flat": True}
    (expected, _) = two("begin_and_save", **given)
    for found in two("load_and_go_on", **given):
        assert apart(found, expected) == 0.0


def test_flattened_keys_that_lose_a_tensor_say_so(two, tmp_path):
    given = {"folder": str(tmp_path), "recipe": "vasso", "flat": True}
    two("begin_and_save", **given)
    for said in two("warnings_on_loading", **given):
        assert any("no sam_ema" in line and "flatten_optimizer_state_dict" in line for line in said)


def test_masters_of_bf16_shards_go_on_from_a_distributed_checkpoint(two, four, tmp_path):
    given = {"folder": str(tmp_path)}
    (weights, masters), _ = two("bf16_checkpoint", resume=False, **given)
    for found, own in two("bf16_checkpoint", resume=True, **given):
        assert apart(found, weights) == 0.0 and apart(own, masters) == 0.0
        assert all(torch.equal(master.bfloat16(), found[name]) for name, master in own.items())
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters.values()), "they have low bits"
    for found, own in four("bf16_checkpoint", resume=True, **given):
        # Sums of other batches in bf16: near, and every weight is its rounded master.
        assert apart(own, masters) < 0.1
        assert all(torch.equal(master.bfloat16(), found[name]) for name, master in own.items())


def test_masters_follow_weights_that_a_checkpoint_loads_in_place(two, tmp_path):
    assert two("masters_follow_what_is_loaded_in_place", folder=str(tmp_path)) == [True, True]


def test_a_rank_that_dies_in_the_second_pass_costs_one_step(two, tmp_path):
    (expected, _) = two("a_rank_that_dies", folder=str(tmp_path / "whole"), dies_at=None)
    (tmp_path / "broken").mkdir()
    with pytest.raises(AssertionError, match="rank 1 died"):
        two("a_rank_that_dies", folder=str(tmp_path / "broken"), dies_at=5)
    assert (tmp_path / "broken" / "done").read_text() == "5"
    for found in two("a_rank_that_dies", folder=str(tmp_path / "broken"), dies_at=None):
        assert apart(found, expected) == 0.0
