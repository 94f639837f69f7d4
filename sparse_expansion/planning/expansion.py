"""The units that make an expanded model, block by block."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_expansion.config import RunConfig
from sparse_expansion.planning.block import BlockPlan
from sparse_expansion.planning.costs import block_packed_bytes, makes_up_for_all, refine_flops
from sparse_expansion.planning.forward import capture_unit, embed_unit
from sparse_expansion.planning.groups import GroupUnits
from sparse_expansion.planning.shapes import ModelShape
from sparse_expansion.run_files import (
    TRUNK_KEY,
    advance_key,
    capture_key,
    embed_key,
    refine_key,
    shard_affinity,
)
from sparse_expansion.units import Unit
from sparse_expansion.work.stages import calibrate, make


def expansion_units(config: RunConfig, shape: ModelShape) -> list[Unit]:
    """All units that make an expanded model; every unit comes after those that it needs."""
    units = [make.trunk.unit(key=TRUNK_KEY, is_persistent=True, layer=-1, cost=1.0)]
    units += [embed_unit(config, shape, shard) for shard in range(config.calibration.num_shards)]
    for layer in range(shape.num_layers):
        units += _block_units(BlockPlan(config.at(layer), shape.at(layer), layer))
    return units


def _block_units(block: BlockPlan) -> list[Unit]:
    """All units of a block, in order."""
    units = _capture_units(block)
    compressed: list[str] = []
    for level, positions in block.positions.items():
        # Groups of one level do not wait for each other: a mixture has one for every expert.
        groups = [GroupUnits(block, position) for position in positions]
        if block.calibration.is_paired(level):
            units += [_recapture_unit(block, level, shard, compressed) for shard in block.shards]
        for group in groups:
            units += group.units()
        compressed = [*compressed, *(key for group in groups for key in group.results)]
    if block.config.refines:
        units.append(_refine_unit(block, compressed))
        compressed = [units[-1].key]
    if block.calibration.follows_compression and not block.is_last:
        units += [_advance_unit(block, shard, compressed) for shard in block.shards]
    return units


def _entry_key(block: BlockPlan, shard: int) -> str:
    """Key of the unit that makes one shard's hidden states before the block."""
    if block.layer == 0:
        return embed_key(shard)
    if block.calibration.follows_compression:
        return advance_key(block.layer - 1, shard)
    return capture_key(block.layer - 1, shard)


def _capture_units(block: BlockPlan) -> list[Unit]:
    """The units that run the shards through the dense block."""
    calibration, groups = block.calibration, block.shape.groups
    # With sequential calibration, later groups' routers wait for the inputs that these groups will
    # have behind compressed linears.
    sampled = block.level_groups(0) if calibration.is_sequential else groups
    return [
        capture_unit(
            block.config,
            block.shape,
            block.layer,
            shard,
            after=_entry_key(block, shard),
            # The dense model's states behind the last block are what it is to put out.
            is_persistent=makes_up_for_all(block.config, block.shape)
            or (not calibration.follows_compression and not block.is_last),
            outputs=tuple(group.name for group in sampled),
            output_bytes=block.sample_bytes(sampled),
        )
        for shard in block.shards
    ]


def _recapture_unit(block: BlockPlan, level: int, shard: int, compressed: Sequence[str]) -> Unit:
    """The unit that makes the inputs which a level's groups have behind compressed linears.

    Args:
        block: of the groups.
        level: of the groups.
        shard: of the windows.
        compressed: keys of the units that compress the groups of earlier levels.
    """
    groups, item = block.level_groups(level), block.shape.item_bytes
    earlier = sum(group.used_weights for group in block.shape.groups if group.level < level)
    widths = sum((group.width + group.rows) * group.tokens_share for group in groups)
    captured = int(block.shard_tokens * widths * item)
    used = sum(group.used_weights for group in groups)
    # What the outputs lack: the products of inputs' differences.
    products, hidden_bytes = earlier + used, 2 * block.hidden_bytes
    if any(map(block.is_corrected, groups)):
        # The block's own output is compared with the dense model's.
        products += used
        hidden_bytes += 2 * block.hidden_bytes
    return calibrate.recapture.unit(
        key=block.recapture_key(level, shard),
        params={"layer": block.layer, "shard": shard, "level": level, "experts": block.ranges},
        after=(*compressed, capture_key(block.layer, shard)),
        outputs=tuple(group.name for group in groups),
        affinity=shard_affinity(block.layer, shard),
        layer=block.layer,
        rank=0,
        cost=block.shard_tokens * 2.0 * products,
        move_cost=block.shard_flops,
        cache_bytes=captured,
        output_bytes=block.sample_bytes(groups),
        traffic_bytes=hidden_bytes + captured,
    )


def _refine_unit(block: BlockPlan, compressed: Sequence[str]) -> Unit:
    """The unit that trains a block's experts, once the units that make them are done."""
    calibration, shape = block.calibration, block.shape
    epochs = block.config.refinement.finetune
    return make.refine_block.unit(
        key=refine_key(block.layer),
        params={
            "layer": block.layer,
            "experts": block.ranges,
            "seed": calibration.seed + 1000 * (block.layer + 1),
        },
        after=(*(_entry_key(block, shard) for shard in block.shards), *compressed),
        is_persistent=True,
        layer=block.layer,
        rank=4,
        cost=refine_flops(block.config, shape),
        traffic_bytes=int(
            epochs * calibration.num_tokens * shape.hidden_size * shape.item_bytes
            # The drafts, and what replaces them.
            + 2 * block_packed_bytes(block.config, shape)
        ),
    )


def _advance_unit(block: BlockPlan, shard: int, compressed: Sequence[str]) -> Unit:
    """The unit that takes one shard's hidden states through the compressed block.

    Attention's outputs are kept by the capture; on another worker they are made again.
    """
    seqlen = block.calibration.seqlen
    attention_flops = block.shape.attention_flops(seqlen)
    mlp_flops = block.shape.block_flops(seqlen) - attention_flops
    return calibrate.advance.unit(
        key=advance_key(block.layer, shard),
        params={"layer": block.layer, "shard": shard, "experts": block.ranges},
        after=(*compressed, capture_key(block.layer, shard)),
        is_persistent=True,
        affinity=shard_affinity(block.layer, shard),
        layer=block.layer,
        rank=5,
        cost=block.shard_tokens * mlp_flops,
        move_cost=block.shard_tokens * attention_flops,
        traffic_bytes=2 * block.hidden_bytes + block_packed_bytes(block.config, block.shape),
    )
