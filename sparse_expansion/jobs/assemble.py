"""The finished shards of a run as a model folder, and what its parts weigh."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparse_expansion.algorithms.packing.layout import PackedLayout, grid_bytes, router_bytes
from sparse_expansion.config import UNIFORM
from sparse_expansion.jobs.prepare import Prepared
from sparse_expansion.model.block_linears import linear_shape
from sparse_expansion.model.checkpoint import companions
from sparse_expansion.model.manifest import MANIFEST_NAME
from sparse_expansion.model.model_folder import CONFIG_NAME, INDEX_NAME
from sparse_expansion.model.quantizer import FORMAT_VERSION, QUANT_METHOD
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.plain_files import read_plain
from sparse_expansion.planning.resume import final_stages
from sparse_expansion.run_files import (
    ALLOCATION_FILE,
    DRAFTS,
    HIDDEN,
    parse_experts_key,
    shares_key,
)
from sparse_expansion.store import Store, json_bytes
from sparse_expansion.work.stages.make import trunk


def assemble(prepared: Prepared, store: Store) -> None:
    """Turn the finished shards into a model folder: index, tokenizer, and config.json last."""
    weights = _final_weights(prepared, store.record)
    shares = _shares_of_experts(prepared, store)
    config = json_bytes(_model_config(prepared, shares))
    index = {"metadata": {"total_size": weights.num_bytes}, "weight_map": weights.files()}
    files = {INDEX_NAME: json_bytes(index)}
    files |= {path.name: read_plain(path) for path in companions(prepared.shell.folder)}
    for name, data in files.items():
        store.write_bytes(name, data)
    store.write_sealed(
        MANIFEST_NAME,
        {
            "format_version": FORMAT_VERSION,
            "bytes": weights.num_bytes,
            "information_bytes": weights.trunk_bytes + information_bytes(prepared, shares),
            "tensors": weights.tensors,
            "files": {
                name: hashlib.sha256(data).hexdigest()
                for name, data in {**files, CONFIG_NAME: config}.items()
            },
        },
    )
    store.write_bytes(CONFIG_NAME, config)
    store.delete_folder(HIDDEN.rstrip("/"))
    store.delete_folder(DRAFTS.rstrip("/"))


def check_shares(prepared: Prepared, store: Store) -> None:
    """Answer shares of zeros by block that finished experts were not made with.

    A config.json that has them would describe a model that the files do not hold.

    Raises:
        ValueError: a finished expert was made with another share than its block's.
    """
    for key, record in store.records().items():
        unit = parse_experts_key(key)
        if unit is None or unit.layer >= prepared.shell.num_blocks:
            continue
        asked = prepared.config.compression.at(unit.layer).sparsity.fraction
        if record["stats"].get("sparsity", asked) != asked:
            raise ValueError(
                f"{store.path(ALLOCATION_FILE)} asks {asked:g} zeros of block {unit.layer}, and "
                "its finished experts have another share: put back the file that they were made "
                "with, or choose another --output"
            )


@dataclass
class _FinalWeights:
    """The tensors of an expanded model, as the markers of its units describe them."""

    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """File, dtype, shape, bytes and digest by name of the tensor."""
    num_bytes: int = 0
    """Bytes of all tensors."""
    trunk_bytes: int = 0
    """Bytes of the tensors that are not expanded."""

    def files(self) -> dict[str, str]:
        """The file of every tensor."""
        return {name: described["file"] for name, described in self.tensors.items()}


def _final_weights(
    prepared: Prepared, record_of: Callable[[str], dict[str, Any] | None]
) -> _FinalWeights:
    found = _FinalWeights()
    final = final_stages(prepared.units)
    for unit in prepared.units:
        if unit.stage not in final:
            continue
        record = record_of(unit.key)
        if record is None:
            raise AssertionError(f"unit {unit.key} is not finished")
        for name, file in record["files"].items():
            for tensor, described in file["tensors"].items():
                found.tensors[tensor] = {"file": name, **described}
                found.num_bytes += described["bytes"]
                found.trunk_bytes += described["bytes"] if unit.stage == trunk.name else 0
    return found


_Shares = tuple[dict[str, tuple[float, ...]], ...]
"""Of zeros, by block, a group's first linear, and expert, where these have shares of their own."""


def _shares_of_experts(prepared: Prepared, store: Store) -> _Shares:
    """Shares that experts were made with."""
    shell = prepared.shell
    shares: list[dict[str, tuple[float, ...]]] = [{} for _ in range(shell.num_blocks)]
    for layer, found in enumerate(shares):
        for group in shell.groups(layer):
            record = store.record(shares_key(layer, group.name))
            if record is not None:
                found[group.linears[0]] = tuple(record["stats"]["sparsity"])
    return tuple(shares)


def _model_config(prepared: Prepared, shares: _Shares) -> dict[str, Any]:
    """The content of ``config.json``: the dense model's, and how its MLPs were expanded."""
    # None may have been shared out, though it was asked for.
    compression = replace(
        prepared.config.compression, expert_sparsity=shares if any(shares) else UNIFORM
    )
    shell = prepared.shell
    config: dict[str, Any] = shell.config.to_dict()
    config["dtype"] = str(shell.dtype).removeprefix("torch.")
    config["architectures"] = [shell.architecture]
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "groups": shell.group_names(),
        "compression": asdict(compression),
        "routing": asdict(prepared.config.routing),
    }
    return config


def information_bytes(prepared: Prepared, shares: _Shares) -> float:
    """The information in the expanded weights: a count to hold the files' size against.

    Bits of a mask (one per weight, or ``log2`` of the number of patterns per N:M group), of kept
    values or codes, of scales and zero points, and of routers.

    Args:
        prepared: the run.
        shares: of zeros, by block, group and expert.
    """
    config = prepared.config
    shell = prepared.shell
    item_bytes = shell.dtype.itemsize
    total = 0.0
    for layer in range(shell.num_blocks):
        compression, routing = config.compression.at(layer), config.routing.at(layer)
        for group in shell.groups(layer):
            own = shares[layer].get(group.linears[0], ())
            for position, linear in enumerate(group.linears):
                rows, width = linear_shape(shell.meta_block(layer), linear)
                layouts = PackedLayout.of_experts(
                    rows, width, compression, own, routing.num_clusters
                )
                total += sum(layout.information_bits(item_bytes) for layout in layouts) / 8
                total += grid_bytes(rows, width, config.compression)
                if position == 0:
                    total += router_bytes(width, routing, compression, is_routed=group.is_routed)
    return total


def dense_bytes(shell: ModelShell) -> int:
    """Bytes of the dense model's parameters in the run's dtype."""
    trunk = {shell.file_name(name) for name in shell.trunk_names()}
    counted = {*trunk, *shell.dense_weights()}
    return sum(
        math.prod(shell.files.shapes[name]) * shell.dtype.itemsize
        for name in shell.files.names()
        if name in counted
    )


def bits_per_weight(prepared: Prepared, records: Mapping[str, dict[str, Any]]) -> float:
    """Stored bits of all that the expanded linears became, per weight that they had.

    They are those of every expert's streams, whichever a token is routed to, of grids and of
    routers, as the tensors of finished units have them.

    Args:
        prepared: the run.
        records: the markers of finished units by key.
    """
    weights = _final_weights(prepared, records.get)
    shell = prepared.shell
    dense = sum(math.prod(shell.files.shapes[name]) for name in shell.dense_weights())
    return 8 * (weights.num_bytes - weights.trunk_bytes) / dense


def checkpoint_bytes(store: Store) -> int:
    """Bytes of the expanded model's weight files."""
    return sum(
        int(store.fs.size(store.path(name)))
        for name in store.list("")
        if name.endswith(".safetensors") and "/" not in name
    )
