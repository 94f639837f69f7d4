"""The graph of a run: what each unit needs, and how sums are added up."""

from dataclasses import replace

import pytest

from sparse_expansion.config import (
    CalibrationConfig,
    CompressionConfig,
    RefinementConfig,
    RoutingConfig,
    RunConfig,
)
from sparse_expansion.planning.costs import REDUCE_FAN_IN, gathered_inputs
from sparse_expansion.planning.expansion import expansion_units
from sparse_expansion.planning.partition import even_parts, expert_ranges, gathered_ranges
from sparse_expansion.planning.shapes import GroupShape, ModelShape

SHAPE = ModelShape(
    2, 8, (GroupShape("up", 8, 16), GroupShape("down", 16, 8, level=1)), output_scale=1.0
)


def run(inputs, *, finetune=0, windows=4, seqlen=16, shards=2, **compression):
    return RunConfig(
        compression=CompressionConfig(**compression),
        routing=RoutingConfig(num_clusters=3),
        calibration=CalibrationConfig(
            calibration_inputs=inputs, dataset_size=windows, seqlen=seqlen, data_shards=shards
        ),
        refinement=RefinementConfig(finetune=finetune),
        experts_per_unit=2,
    )


def needs(unit):
    return {key for key, _ in unit.inputs} | set(unit.after)


@pytest.mark.parametrize("finetune", [0, 2])
@pytest.mark.parametrize("inputs", ["dense", "compressed", "sequential", "cumulative"])
def test_units_come_after_what_they_need(inputs, finetune):
    units = expansion_units(run(inputs, finetune=finetune), SHAPE)
    seen = {}
    for unit in units:
        assert unit.key not in seen
        assert needs(unit) <= set(seen)
        for key, output in unit.inputs:
            assert output in seen[key].outputs
        seen[unit.key] = unit


def test_a_block_by_hand():
    by_key = {unit.key: unit for unit in expansion_units(run("sequential", finetune=1), SHAPE)}
    keys = [key for key in by_key if key.startswith("layer-000/")]
    assert keys == [
        "layer-000/capture/shard-000",
        "layer-000/capture/shard-001",
        "layer-000/up/router",
        "layer-000/up/gather-000-002/shard-000",
        "layer-000/up/gather-000-002/shard-001",
        "layer-000/up/experts-000-001",
        "layer-000/up/experts-002-002",
        "layer-000/down/recapture/shard-000",
        "layer-000/down/recapture/shard-001",
        "layer-000/down/router",
        "layer-000/down/gather-000-002/shard-000",
        "layer-000/down/gather-000-002/shard-001",
        "layer-000/down/experts-000-001",
        "layer-000/down/experts-002-002",
        "layer-000/refine",
        "layer-000/advance/shard-000",
        "layer-000/advance/shard-001",
    ]
    up = {"layer-000/up/router", "layer-000/up/experts-000-001", "layer-000/up/experts-002-002"}
    down = {key.replace("/up/", "/down/") for key in up}
    capture = "layer-000/capture/shard-001"
    assert needs(by_key[keys[8]]) == {*up, capture}
    embedded = {"embed/shard-000", "embed/shard-001"}
    assert needs(by_key["layer-000/refine"]) == embedded | up | down
    assert needs(by_key["layer-000/advance/shard-001"]) == {"layer-000/refine", capture}
    assert needs(by_key["layer-001/capture/shard-001"]) == {"layer-000/advance/shard-001"}
    # The last block's output goes nowhere.
    assert not any(key.startswith("layer-001/advance") for key in by_key)
    assert by_key[keys[5]].inputs == (
        ("layer-000/up/router", "gram"),
        ("layer-000/up/gather-000-002/shard-000", "000-001"),
        ("layer-000/up/gather-000-002/shard-001", "000-001"),
    )
    # 32 tokens of a shard through up (8 x 16) and, for what outputs lack, through down; and through
    # the block: MLP, attention, scores.
    recapture = by_key[keys[8]]
    assert recapture.cost == 32 * 2 * (128 + 128)
    assert recapture.move_cost == 32 * 2 * (2 * 128 + 4 * 64 + 8 * 16)


def test_the_dense_models_states_are_followed_where_blocks_make_up_for_all():
    units = {
        inputs: {unit.key: unit for unit in expansion_units(run(inputs), SHAPE)}
        for inputs in ("sequential", "cumulative")
    }
    plain, all_ = (units[inputs]["layer-001/capture/shard-001"] for inputs in units)
    assert [unit.key for unit in units["sequential"].values()] == list(units["cumulative"])
    # The last block's too: they are what it is to put out.
    assert all_.is_persistent and not plain.is_persistent
    # 32 tokens: attention and up, and all of the block.
    attention = 2 * (4 * 64 + 8 * 16)
    assert plain.cost == 32 * (attention + 2 * 128)
    assert all_.cost == plain.cost + 32 * (attention + 2 * (128 + 128))
    assert all_.traffic_bytes == plain.traffic_bytes + 2 * 32 * 8 * 4
    router, experts = (
        units["cumulative"][f"layer-001/{key}"] for key in ("down/router", "down/experts-002-002")
    )
    assert router.outputs == ("gram", "correction") and experts.params["corrected"] is True
    assert experts.inputs[:2] == ((router.key, "gram"), (router.key, "correction"))
    # A sample has 8 numbers more of each of 32 tokens, and all experts get 8 x 16 and 3 x 8.
    plain, again = (units[inputs]["layer-001/down/recapture/shard-001"] for inputs in units)
    assert again.output_bytes == plain.output_bytes + 32 * 8 * 4
    assert router.output_bytes == 4 * (16 * 16 + 8 * 16 + 3 * 8)
    assert units["cumulative"]["layer-001/up/router"].outputs == ("gram",)
    # Of a family in which the last linear is not simply added nothing changes.
    other = replace(SHAPE, output_scale=None)
    assert expansion_units(run("cumulative"), other) == list(units["sequential"].values())


def test_zeros_are_shared_out_once_outputs_are_weighed():
    """On all shards: nothing waits for what one range of experts is gathered for."""
    config = run("sequential", weigh_outputs=True, pruner="admm", expert_sparsity="measured")
    units = expansion_units(config, SHAPE)
    seen = {}
    for unit in units:
        assert needs(unit) <= set(seen)
        for key, output in unit.inputs:
            assert output in seen[key].outputs
        seen[unit.key] = unit
    weighed = [f"layer-000/up/weigh/shard-00{shard}" for shard in range(2)]
    assert needs(seen[weighed[1]]) == {"layer-000/up/router", "layer-000/capture/shard-001"}
    assert seen["layer-000/up/shares"].inputs == (
        ("layer-000/up/router", "clusters"),
        *((key, "outputs") for key in weighed),
    )
    experts = seen["layer-000/up/experts-002-002"]
    assert experts.inputs[1:3] == tuple((key, "outputs") for key in weighed)
    assert experts.params["weighed"] == 2
    assert "layer-000/up/shares" in experts.after
    # The last linears' outputs are the block's.
    assert "layer-000/down/weigh/shard-000" not in seen
    assert seen["layer-000/down/shares"].inputs == (("layer-000/down/router", "clusters"),)
    assert "weighed" not in seen["layer-000/down/experts-000-001"].params
    assert needs(seen["layer-000/down/recapture/shard-000"]) >= {"layer-000/up/shares"}
    # Float64 sums of three experts' 16 outputs; moments of three clusters' eight inputs.
    assert seen[weighed[0]].output_bytes == 8 * 3 * 16
    assert seen["layer-000/up/router"].output_bytes == 4 * 8 * 8 + 8 * 3 * 9


def test_groups_of_one_level_do_not_wait_for_each_other():
    """A mixture's experts: one pass behind all of a level's compressed linears, for all of them."""
    groups = [GroupShape(f"up.{e}", 8, 16, tokens_share=0.5) for e in range(3)]
    groups += [GroupShape(f"down.{e}", 16, 8, level=1, tokens_share=0.5) for e in range(3)]
    dense = GroupShape("up", 8, 16), GroupShape("down", 16, 8, level=1)
    shape = ModelShape(2, 8, tuple(groups), layer_groups=(tuple(groups), dense))
    by_key = {unit.key: unit for unit in expansion_units(run("sequential"), shape)}
    again = [key for key in by_key if "/recapture/" in key]
    assert again == [f"layer-000/down.0/recapture/shard-00{shard}" for shard in range(2)] + [
        f"layer-001/down/recapture/shard-00{shard}" for shard in range(2)
    ]
    assert by_key[again[0]].outputs == ("down.0", "down.1", "down.2")
    waits = needs(by_key[again[0]])
    assert {key for key in waits if key.endswith("/router")} == {
        f"layer-000/up.{e}/router" for e in range(3)
    }
    assert needs(by_key["layer-000/up.2/router"]) == {
        f"layer-000/capture/shard-00{shard}" for shard in range(2)
    }
    assert needs(by_key["layer-000/down.2/router"]) == set(again[:2])
    # Routers' seeds go on from block to block, and half of the tokens is half of the work.
    assert by_key["layer-001/up/router"].params["seed"] == 6
    whole = by_key["layer-001/up/gather-000-002/shard-000"].cost
    assert by_key["layer-000/up.0/gather-000-002/shard-000"].cost == whole / 2


def test_sums_are_added_up_once_each_and_few_at_a_time():
    # One level of sums is not enough, and the last sum of the first level has no partner.
    shards = REDUCE_FAN_IN**2 + 1
    config = run("dense", windows=2 * shards, seqlen=64, shards=shards)
    assert gathered_inputs(config, 16, 4).is_summed
    by_key = {unit.key: unit for unit in expansion_units(config, SHAPE)}
    for unit in by_key.values():
        if unit.stage in ("experts", "reduce"):
            parts = [key for key, output in unit.inputs if output != "gram"]
            assert len(parts) <= REDUCE_FAN_IN
            assert {by_key[key].stage for key in parts} <= {"gather", "reduce"}
    for unit in (unit for unit in by_key.values() if unit.stage == "experts"):
        reached, pending = [], [key for key, output in unit.inputs if output != "gram"]
        while pending:
            source = by_key[pending.pop()]
            if source.stage == "gather":
                reached.append(source.params["shard"])
            else:
                pending += [key for key, _ in source.inputs]
        assert sorted(reached) == list(range(shards))


def test_the_smaller_of_rows_and_sums_is_handed_on():
    # A sum of 8 x 8 in float32 is 256 bytes; an expert's rows of all shards may take four times
    # as much for each of the eight sums that are added up: 8 * 4 * 4 * 8 / 4 = 256 rows.
    found = gathered_inputs(run("dense", windows=3, seqlen=256), 8, 4)
    assert not found.is_summed and found.num_bytes == 3 * 256 / 2 / 3 * 8 * 4
    found = gathered_inputs(run("dense", windows=4, seqlen=256), 8, 4)
    assert found.is_summed and found.num_bytes == 4 * 8 * 8
    # What five outputs lack comes on top of either.
    found = gathered_inputs(run("dense", windows=4, seqlen=256), 8, 4, residuals=5)
    assert found.is_summed and found.num_bytes == 4 * 8 * (8 + 5)
    found = gathered_inputs(run("dense", windows=3, seqlen=256), 8, 4, residuals=5)
    assert not found.is_summed and found.num_bytes == 3 * 256 / 2 / 3 * 13 * 4


def test_partitions_by_hand():
    ranges = expert_ranges(5, 2)
    assert ranges == [(0, 1), (2, 3), (4, 4)]
    # 512 MiB at a time for each shard: two ranges of two experts of 128 MiB.
    assert gathered_ranges(ranges, 128 << 20, 1) == [[(0, 1), (2, 3)], [(4, 4)]]
    # 8 GiB of all shards together: one range of 32 shards.
    assert gathered_ranges(ranges, 128 << 20, 32) == [[(0, 1)], [(2, 3)], [(4, 4)]]
    assert even_parts(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert even_parts(2, 5) == [(0, 1), (1, 2)]
