"""Memory that one worker of a run takes: a sum of the arrays that are alive at once.

Stages follow each other, so that the largest of them decides; what a worker holds throughout comes
on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from sparse_expansion.config import RunConfig
from sparse_expansion.planning.costs import (
    FLOAT32_BYTES,
    REDUCE_FAN_IN,
    captured_width,
    gathered_inputs,
    is_corrected,
    packed_bytes,
)
from sparse_expansion.planning.shapes import GroupShape, ModelShape
from sparse_expansion.planning.stage_memory import ParameterCounts, StageMemory, fit_tokens
from sparse_expansion.process_memory import FREED_BYTES_KEPT
from sparse_expansion.work.spec import (
    DEVICE_CONTEXT_BYTES,
    RESIDENT_SHARE,
    captured_bytes,
    waiting_bytes,
)

LIBRARY_BYTES = 640 << 20
"""Bytes of a worker that has loaded the libraries and nothing else, with a CPU's PyTorch."""
CUDA_LIBRARY_BYTES = 300 << 20
"""What a CUDA build of PyTorch takes beside this where it finds no GPU: its larger libraries."""
CUDA_CONTEXT_BYTES = 750 << 20
"""Bytes of a process's memory that CUDA takes, measured on an H100."""


@dataclass(frozen=True, kw_only=True)
class WorkerRoom:
    """What a worker may use of its machine."""

    activation_bytes: int = 2 << 30
    """Captured activations that it keeps in the host's memory."""
    gpu_bytes: int | None = None
    """Memory of its GPU, or of its share of one; None where the CPU computes."""
    device_bytes: int | None = None
    """What it keeps on the GPU between units; None for the default share."""

    def resident_bytes(self, wanted: int, working: int) -> int:
        """Bytes that stay on the GPU.

        Args:
            wanted: bytes of all that could stay there.
            working: bytes of the largest unit; by default what stays makes way for it.
        """
        if self.gpu_bytes is None:
            return 0
        if self.device_bytes is not None:
            return min(wanted, self.device_bytes)
        return min(wanted, int(RESIDENT_SHARE * self.gpu_bytes), max(0, self.gpu_bytes - working))


def worker_memory(
    config: RunConfig,
    shape: ModelShape,
    parameters: ParameterCounts,
    *,
    num_workers: int,
    room: WorkerRoom,
) -> dict[str, int]:
    """Bytes of one worker by stage, what it holds throughout, and the peak.

    ``held`` are the libraries, those of CUDA or its context, the embedding and head, captured
    activations, files that are being written and (with one worker) the values between units; a
    stage's bytes come on top. With a GPU these are the host's, less what stays on the card
    (``gpu_resident``); ``gpu_peak`` is that, the embedding and head, and the largest stage's arrays
    on the card.

    Args:
        config: of the run; the block with the most experts decides.
        shape: of the dense model.
        parameters: of the dense model.
        num_workers: equal workers that share the run.
        room: what a worker may use.
    """
    routing = replace(config.routing, num_clusters=config.routing.most_clusters, layer_clusters=())
    config = replace(config, routing=routing)
    kinds = [StageMemory(config, kind, parameters, num_workers) for kind in shape.kinds]
    of_stage = _largest(stages.all() for stages in kinds)
    held = _largest(
        _held_bytes(config, kind, parameters, num_workers, room) for kind in shape.kinds
    )
    on_gpu: dict[str, int] = {}
    if room.gpu_bytes is not None:
        held["cuda_context"] = CUDA_CONTEXT_BYTES
        read_again = max(stages.read_again_bytes() for stages in kinds)
        on_gpu = _gpu_memory(of_stage, read_again, held, room)
        # What does not stay on the card is the host's to hold.
        over = on_gpu.pop("over")
        for name in ("captured", "values"):
            if name in held:
                held[name] = min(held[name], over)
        held["captured"] = min(held["captured"], captured_bytes(room.activation_bytes))
    elif torch.version.cuda is not None:
        held["cuda_libraries"] = CUDA_LIBRARY_BYTES
    # Whatever is freed is kept for what comes next, which needs it in other sizes.
    kept = min(held["captured"], room.activation_bytes)
    used = max(of_stage.values()) + held.get("values", 0) + kept
    held["freed"] = min(FREED_BYTES_KEPT, used)
    # Blocks are measured before anything is captured, and before there is much to have been freed.
    before = held["libraries"] + held["embedding_and_head"]
    before += held.get("cuda_context", 0) + held.get("cuda_libraries", 0)
    peak = max(
        before + of_stage.get("block_gaps", 0),
        sum(held.values()) + max(size for name, size in of_stage.items() if name != "block_gaps"),
    )
    return {
        **{f"held: {name}": size for name, size in held.items()},
        **{f"stage: {name}": size for name, size in of_stage.items()},
        "peak": peak,
        **on_gpu,
    }


def _largest(found: Iterable[dict[str, int]]) -> dict[str, int]:
    """The largest of every kind of block, by name."""
    largest: dict[str, int] = {}
    for each in found:
        for name, size in each.items():
            largest[name] = max(size, largest.get(name, 0))
    return largest


def _gpu_memory(
    of_stage: dict[str, int], read_again: int, held: dict[str, int], room: WorkerRoom
) -> dict[str, int]:
    """Bytes on the card, and those that are over what may stay there."""
    # Rows and sums stay from where they are made to where they are used.
    on_card = {name: size for name, size in of_stage.items() if name not in ("gather", "trunk")}
    working = max(on_card.values()) + held["embedding_and_head"] + DEVICE_CONTEXT_BYTES
    wanted = held["captured"] + held.get("values", 0) + read_again
    resident = room.resident_bytes(wanted, working)
    return {"gpu_resident": resident, "gpu_peak": working + resident, "over": wanted - resident}


def _held_bytes(
    config: RunConfig,
    shape: ModelShape,
    parameters: ParameterCounts,
    num_workers: int,
    room: WorkerRoom,
) -> dict[str, int]:
    """Bytes that a worker holds throughout, by what they are."""
    calibration, item = config.calibration, shape.item_bytes
    vocabulary_parameters = parameters.outside(shape.num_layers)
    widths = captured_width(config, shape)
    if calibration.is_sequential:
        # Later groups' inputs are held with what their outputs lack, and for a moment as they are
        # in the dense block too.
        widths += math.ceil(
            sum(
                (group.width + group.rows) * group.tokens_share
                for group in shape.groups
                if group.level
            )
        )
    captured = calibration.num_tokens * widths * item
    share = 1.0 if num_workers == 1 else 1 / min(num_workers, calibration.num_shards)
    held = {
        "libraries": LIBRARY_BYTES,
        "embedding_and_head": vocabulary_parameters * item,
        "captured": int(min(captured * share, _captured_limit(room))),
        "writing": _writing_bytes(config, shape, room),
    }
    if num_workers == 1:
        # Samples for the routers, then one group's gathered inputs: in the worker's own memory.
        samples = sum(fit_tokens(config, group) * group.width for group in shape.groups) * item
        samples += FLOAT32_BYTES * sum(
            fit_tokens(config, group) * group.rows
            for group in shape.groups
            if is_corrected(config, shape, group)
        )
        gathered = max(_all_gathered_bytes(config, group, item) for group in shape.groups)
        held["values"] = max(samples, gathered)
    return held


def _captured_limit(room: WorkerRoom) -> float:
    """Bytes of captured activations that a worker keeps in all of its memories."""
    on_gpu = 0
    if room.gpu_bytes is not None:
        share = RESIDENT_SHARE * room.gpu_bytes
        on_gpu = int(share) if room.device_bytes is None else room.device_bytes
    return captured_bytes(room.activation_bytes) + on_gpu


def _writing_bytes(config: RunConfig, shape: ModelShape, room: WorkerRoom) -> int:
    """Bytes of files that are written while the next unit is computed: tensors, and the file's."""
    count = min(config.experts_per_unit, config.routing.num_clusters)
    largest = max(count * packed_bytes(config, group, shape.item_bytes) for group in shape.groups)
    return 2 * min(largest, waiting_bytes("cpu" if room.gpu_bytes is None else "cuda"))


def _all_gathered_bytes(config: RunConfig, group: GroupShape, item: int) -> int:
    """Bytes that all shards together hand on for all experts of a group at a time."""
    shards = config.calibration.num_shards
    residuals = group.rows if config.calibration.is_paired(group.level) else 0
    gathered = gathered_inputs(
        config, group.width, item, residuals=residuals, tokens_share=group.tokens_share
    )
    if gathered.is_summed:
        # Added up as soon as there are enough: one level of the tree, and the one above it.
        shards = min(shards, 2 * REDUCE_FAN_IN)
    return config.routing.num_clusters * shards * gathered.num_bytes
