"""Units that take calibration windows through a model: the embedding, and blocks' captures."""

from __future__ import annotations

from sparse_expansion.config import RunConfig
from sparse_expansion.planning.costs import captured_width, makes_up_for_all, shard_tokens
from sparse_expansion.planning.shapes import ModelShape
from sparse_expansion.run_files import capture_key, embed_key, shard_affinity
from sparse_expansion.units import Unit
from sparse_expansion.work.stages import calibrate


def embed_unit(config: RunConfig, shape: ModelShape, shard: int) -> Unit:
    """The unit that embeds one shard of the windows."""
    activations = shard_tokens(config.calibration) * shape.hidden_size
    return calibrate.embed.unit(
        key=embed_key(shard),
        params={"shard": shard},
        is_persistent=True,
        cost=activations,
        traffic_bytes=2 * int(activations * shape.item_bytes),
    )


def capture_unit(
    config: RunConfig,
    shape: ModelShape,
    layer: int,
    shard: int,
    *,
    after: str,
    is_persistent: bool,
    outputs: tuple[str, ...] = (),
    output_bytes: int = 0,
) -> Unit:
    """The unit that runs one shard through a block and keeps the inputs of its linears.

    Args:
        config: of the windows, and whether blocks follow compressed ones.
        shape: of the dense model.
        layer: number of the block.
        shard: number of the shard.
        after: key of the unit that makes the hidden states which enter the block.
        is_persistent: whether the block's output is written, for the next block's capture, or the
            dense model's.
        outputs: names of the linear groups of whose inputs a sample is handed on.
        output_bytes: bytes of these samples.
    """
    calibration = config.calibration
    tokens = shard_tokens(calibration)
    hidden_bytes = int(tokens * shape.hidden_size * shape.item_bytes)
    captured = int(tokens * captured_width(config, shape) * shape.item_bytes)
    flops = shape.block_flops(calibration.seqlen)
    if calibration.follows_compression:
        # The last group's output is not wanted: ``advance`` makes the compressed one.
        flops -= 2.0 * shape.groups[-1].used_weights
    if makes_up_for_all(config, shape):
        # The dense model's states pass through all of the block.
        flops += shape.block_flops(calibration.seqlen)
        hidden_bytes *= 2
    return calibrate.capture.unit(
        key=capture_key(layer, shard),
        params={"layer": layer, "shard": shard},
        after=(after,),
        outputs=outputs,
        is_persistent=is_persistent,
        affinity=shard_affinity(layer, shard),
        layer=layer,
        cost=tokens * flops,
        tokens=tokens / shape.num_layers,
        cache_bytes=captured,
        output_bytes=output_bytes,
        traffic_bytes=shape.item_bytes * shape.block_weights + 2 * hidden_bytes + captured,
    )
