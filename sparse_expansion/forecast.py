"""What a run will take: units, floating-point operations, memory and bytes, from a config alone.

The byte counts of the checkpoint are exact (they follow from exact weight counts); memory and
operations are estimates of the dominant terms, stated one by one.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from sparse_expansion.algorithms.packing import PackedLayout, grid_bytes, router_bytes
from sparse_expansion.config import RunConfig
from sparse_expansion.model.families import block_list, family_of, linear_shape
from sparse_expansion.plan import ModelShape, expansion_units, group_shape

FLOAT32_BYTES = 4


def forecast(config: RunConfig, model_config: Any) -> dict[str, Any]:
    """Units, FLOPs by stage, bytes of the checkpoint and of memory.

    Raises:
        ValueError: the architecture is not supported.
    """
    family = family_of(model_config.model_type)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(model_config)
    block = block_list(model, family)[0]
    num_layers = len(block_list(model, family))
    dtype = config.dtype if config.dtype != "auto" else getattr(model_config, "dtype", None)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    item = torch.empty(0, dtype=dtype).element_size()
    groups = []
    expert_bytes = dense_mlp = routing_bytes = 0
    for group in family.groups:
        shapes = [linear_shape(block, name) for name in group.linears]
        width = shapes[0][1]
        groups.append(group_shape(block, group))
        for rows, _ in shapes:
            expert_bytes += PackedLayout.of(rows, width, config.compression).num_bytes(item)
            dense_mlp += rows * width
            routing_bytes += grid_bytes(rows, width, config.compression)
        routing_bytes += router_bytes(width, config.routing)
    shape = ModelShape(num_layers, int(model_config.hidden_size), tuple(groups), item)
    units = expansion_units(config, shape)
    flops: Counter[str] = Counter()
    for unit in units:
        flops[unit.stage] += int(unit.cost)
    parameters = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    if getattr(model_config, "tie_word_embeddings", False) and head is not None:
        # On the meta device the tie is not made, but a checkpoint holds the tensor once.
        if head.weight is not model.get_input_embeddings().weight:
            parameters -= head.weight.numel()
    trunk = parameters - num_layers * dense_mlp
    experts = num_layers * config.routing.num_clusters * expert_bytes
    widest = max(group.width for group in groups)
    tokens = config.calibration.dataset_size * config.calibration.seqlen
    shard_tokens = -(-tokens // config.calibration.num_shards)
    block_bytes = item * sum(p.numel() for p in block.parameters())
    per_unit = min(config.experts_per_unit, config.routing.num_clusters)
    rows = max(group.rows for group in groups)
    return {
        "model_type": model_config.model_type,
        "num_layers": num_layers,
        "groups": [
            {"name": group.name, "width": group.width, "rows": group.rows} for group in groups
        ],
        "parameters": parameters,
        "units": dict(Counter(unit.stage for unit in units)),
        "calibration_tokens": tokens,
        "flops": dict(flops),
        "checkpoint_bytes": item * trunk + experts + num_layers * routing_bytes,
        "dense_checkpoint_bytes": item * parameters,
        "expert_bytes": experts,
        "router_bytes": num_layers * routing_bytes,
        "memory_bytes": {
            "shell": item * trunk,
            "block": block_bytes,
            "captured_activations_per_shard": item
            * shard_tokens
            * sum(group.width for group in groups),
            "hidden_states_per_shard": item * shard_tokens * int(model_config.hidden_size),
            "hessians_and_factors_per_unit": 3 * per_unit * widest**2 * FLOAT32_BYTES,
            "weights_per_unit": 3 * per_unit * rows * widest * FLOAT32_BYTES,
        },
        "config": config.to_dict(),
    }
