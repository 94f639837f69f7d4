"""A run from its settings to its metrics: prepare, expand, assemble, evaluate."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sparse_expansion import allocation
from sparse_expansion.algorithms.packing import PackedLayout, grid_bytes, router_bytes
from sparse_expansion.config import MEASURED, RunConfig, digest
from sparse_expansion.data.corpora import (
    calibration_windows,
    evaluation_windows,
    load_corpus,
    whole_windows,
)
from sparse_expansion.data.tokenization import Encode, encoder, load_tokenizer
from sparse_expansion.execution.base import Executor, Observer, Progress
from sparse_expansion.model.expansion import FORMAT_VERSION, QUANT_METHOD
from sparse_expansion.model.families import linear_shape
from sparse_expansion.model.manifest import MANIFEST_NAME
from sparse_expansion.model.streaming import INDEX_NAME, ModelShell
from sparse_expansion.plan import (
    ModelShape,
    evaluation_units,
    expansion_units,
    final_stages,
    group_shape,
    mlp_flops_per_token,
    needed_units,
)
from sparse_expansion.process_memory import peak_memory_bytes
from sparse_expansion.run_files import DRAFTS, TIMELINE_FILE
from sparse_expansion.store import Store, open_run, read_timeline, write_windows
from sparse_expansion.types import NllSum
from sparse_expansion.units import Unit, UnitReport


@dataclass
class StageWork:
    """What one stage's units came to, summed over units and workers."""

    units: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    """Estimated, see ``Unit.cost``."""
    traffic_bytes: float = 0.0
    """Estimated, see ``Unit.traffic_bytes``."""


@dataclass
class Measurements:
    """Collected over a run."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Wall-clock seconds by step of the run."""
    stages: dict[str, StageWork] = field(default_factory=lambda: defaultdict(StageWork))
    peak_memory_bytes: int = 0
    """Largest resident memory of any worker."""
    ceilings: dict[str, float] | None = None
    """What a worker's device can do, where that was measured."""

    def add(self, reports: Iterable[UnitReport], units: dict[str, Unit]) -> None:
        """Account for finished units."""
        for report in reports:
            unit = units[report.key]
            work = self.stages[unit.stage]
            work.units += 1
            work.seconds += report.seconds
            work.flops += unit.cost
            work.traffic_bytes += unit.traffic_bytes
            self.peak_memory_bytes = max(self.peak_memory_bytes, report.peak_memory_bytes)

    def profile(self) -> dict[str, Any] | None:
        """Every stage's work, and its shares of the ceilings, where those were measured."""
        if self.ceilings is None:
            return None
        flops = self.ceilings["matmul_flops_per_second"]
        copies = self.ceilings["copy_bytes_per_second"]
        stages = {
            name: {
                **asdict(work),
                "matmul_share": work.flops / (flops * work.seconds),
                "copy_share": work.traffic_bytes / (copies * work.seconds),
            }
            for name, work in sorted(self.stages.items())
        }
        return {"ceilings": self.ceilings, "stages": stages}


class Timeline:
    """Which worker did which unit when; a resumed run's goes on where the one before ended."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rows = read_timeline(store)

    def observed_by(self, observer: Observer) -> Observer:
        """The observer, and this."""

        def observe(progress: Progress) -> None:
            self.rows.append(
                {
                    "unit": progress.unit.key,
                    "stage": progress.unit.stage,
                    "layer": progress.unit.layer,
                    "worker": progress.worker,
                    "started": progress.started,
                    "seconds": progress.report.seconds,
                }
            )
            observer(progress)

        return observe

    def write(self) -> None:
        """Into the run's folder."""
        self.store.write_json(TIMELINE_FILE, self.rows)


def measure_ceilings(executor: Executor, config: RunConfig, measured: Measurements) -> None:
    """Have a worker find out what its device can do; takes a few seconds."""
    unit = Unit(key="ceilings", stage="ceilings")
    measured.ceilings = executor.run([unit], config, lambda progress: None)[unit.key].stats


def model_shape(shell: ModelShell) -> ModelShape:
    """What planning needs, read off the meta model.

    Raises:
        ValueError: blocks differ in the shapes of their MLPs.
    """
    shapes = [
        tuple(group_shape(shell.meta_block(layer), group) for group in shell.family.groups)
        for layer in range(shell.num_blocks)
    ]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("the model's blocks differ in their MLP shapes, which is not supported")
    return ModelShape(
        shell.num_blocks, int(shell.config.hidden_size), shapes[0], shell.dtype.itemsize
    )


def check_vocabulary(tokens: torch.Tensor, vocabulary: int) -> None:
    """Answer a tokenizer that does not belong to the model before a lookup crashes.

    Raises:
        ValueError: a token id is outside the embedding.
    """
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives id {largest}, the model has {vocabulary} embeddings: the "
            "tokenizer in the model folder belongs to another model"
        )


def tokens_digest(windows: torch.Tensor) -> str:
    """A name for windows ``[N, L]``: 16 hex digits of a SHA-256 over their shape and ids."""
    ids = windows.to(torch.int32).numpy().astype("<i4")
    return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()[:16]


@dataclass
class Prepared:
    """A run that has passed all checks."""

    config: RunConfig
    shell: ModelShell
    units: list[Unit]
    identity: dict[str, Any]
    evaluation_text: str
    encode: Encode


def prepare(
    config: RunConfig,
    folder: Path,
    *,
    dataset: str,
    cache_dir: str | None,
    model_name: str,
) -> tuple[Prepared, torch.Tensor]:
    """Everything that can fail early: model, tokenizer, text, windows, shapes.

    Returns:
        The prepared run (its config knows how many windows there are) and the windows ``[N, L]``.
    """
    shell = ModelShell(folder, dtype=config.dtype)
    if shell.expansion is not None:
        raise ValueError(f"{folder} is already an expanded model: expand the dense one")
    shape = model_shape(shell)
    config.check_layers(shape.num_layers)
    limit = getattr(shell.config, "max_position_embeddings", None)
    if limit is not None and config.calibration.seqlen > limit:
        raise ValueError(
            f"seqlen {config.calibration.seqlen} is more than the model's {limit} positions: use "
            f"--seqlen {limit} or less"
        )
    corpus = load_corpus(dataset, cache_dir=cache_dir)
    encode = encoder(load_tokenizer(folder))
    calibration = config.calibration
    if calibration.whole_text:
        windows = whole_windows(
            corpus.calibration, encode, seqlen=calibration.seqlen, kind="calibration"
        )
        calibration = replace(calibration, dataset_size=len(windows))
    else:
        windows = calibration_windows(
            corpus.calibration,
            encode,
            num_windows=calibration.dataset_size,
            seqlen=calibration.seqlen,
            seed=calibration.seed,
        )
    check_vocabulary(windows, int(shell.config.vocab_size))
    calibration = replace(calibration, data_shards=calibration.num_shards)
    config = replace(config, calibration=calibration)
    identity = {
        "config": config.to_dict(),
        "model": model_name,
        "weights": shell.files.fingerprint(),
        "calibration_tokens": tokens_digest(windows),
    }
    # The same run under other paths is the same run: weights and tokens are named by content.
    settings = config.to_dict()
    del settings["calibration"]["dataset"]
    identity["digest"] = digest(settings, identity["weights"], identity["calibration_tokens"])
    units = expansion_units(config, shape)
    return Prepared(config, shell, units, identity, corpus.evaluation, encode), windows


def slow_dtype(dtype: torch.dtype) -> str | None:
    """A line of advice where this machine multiplies the dtype slowly, else None."""
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype == torch.float32 or torch.cuda.is_available() or capability.startswith("AVX512"):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name} is many times slower than float32 on a CPU without instructions for it "
        f"({capability} here): without a GPU, --dtype float32 is faster and stores larger values"
    )


def expand(
    prepared: Prepared,
    store: Store,
    executor: Executor,
    observer: Observer,
    measured: Measurements,
) -> None:
    """Make (or finish making) the expanded model in the store's folder."""
    start = time.perf_counter()
    timeline = Timeline(store)
    try:
        _allocate(prepared, store, executor, timeline.observed_by(observer), measured)
        _make(prepared, store, executor, timeline.observed_by(observer), measured)
    finally:
        # What was done before a unit failed or a signal came is part of the story.
        timeline.write()
    measured.seconds["expand"] += time.perf_counter() - start
    start = time.perf_counter()
    assemble(prepared, store)
    measured.seconds["assemble"] += time.perf_counter() - start


def _allocate(
    prepared: Prepared,
    store: Store,
    executor: Executor,
    observer: Observer,
    measured: Measurements,
) -> None:
    """Settle what every block gets, where that is to be measured."""
    compression = prepared.config.compression
    if compression.layer_sparsity != MEASURED:
        return

    def observe(progress: Progress) -> None:
        measured.add([progress.report], {progress.unit.key: progress.unit})
        observer(progress)

    shares = allocation.shares_of(
        store,
        prepared.config,
        model_shape(prepared.shell),
        executor=executor,
        observer=observe,
    )
    compression = replace(compression, layer_sparsity=shares)
    prepared.config = replace(prepared.config, compression=compression)


def _make(
    prepared: Prepared,
    store: Store,
    executor: Executor,
    observer: Observer,
    measured: Measurements,
) -> None:
    """Do all units that are not done."""

    def is_committed(unit: Unit) -> bool:
        record = store.record(unit.key)
        return record is not None and store.is_intact(record)

    todo = needed_units(prepared.units, is_committed)
    by_key = {unit.key: unit for unit in todo}
    cleaner = _BlockCleaner(store, todo)

    def observe(progress: Progress) -> None:
        cleaner.finished(progress.unit)
        observer(progress)

    measured.add(executor.run(todo, prepared.config, observe).values(), by_key)


class _BlockCleaner:
    """Removes a block's input hidden states and drafts once nothing of it is left to do."""

    def __init__(self, store: Store, units: list[Unit]) -> None:
        self.store = store
        self.left: dict[int, set[str]] = defaultdict(set)
        for unit in units:
            self.left[unit.layer].add(unit.key)

    def finished(self, unit: Unit) -> None:
        # By key: a unit whose values were lost with their worker ends more than once.
        left = self.left[unit.layer]
        left.discard(unit.key)
        if unit.layer >= 0 and not left:
            for folder, name in (("run/hidden/", "layer"), (DRAFTS, "experts")):
                for file in self.store.list(folder.rstrip("/")):
                    if file.startswith(f"{folder}{name}-{unit.layer:03d}-"):
                        self.store.delete(file)


def assemble(prepared: Prepared, store: Store) -> None:
    """Turn the finished shards into a model folder: index, tokenizer, and config.json last."""
    weight_map: dict[str, str] = {}
    manifest: dict[str, Any] = {}
    total = trunk = 0
    final = final_stages(prepared.units)
    for unit in prepared.units:
        if unit.stage not in final:
            continue
        record = store.record(unit.key)
        if record is None:
            raise AssertionError(f"unit {unit.key} is not finished")
        for name, file in record["files"].items():
            for tensor, described in file["tensors"].items():
                weight_map[tensor] = name
                manifest[tensor] = {"file": name, **described}
                total += described["bytes"]
                trunk += described["bytes"] if unit.stage == "trunk" else 0
    store.write_json(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for path in sorted(prepared.shell.folder.iterdir()):
        if path.is_file() and is_companion(path.name):
            store.write_bytes(path.name, path.read_bytes())
    config = prepared.shell.config.to_dict()
    config["dtype"] = str(prepared.shell.dtype).removeprefix("torch.")
    config["architectures"] = [type(prepared.shell._model).__name__]
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "groups": [list(group.linears) for group in prepared.shell.family.groups],
        "compression": asdict(prepared.config.compression),
        "routing": asdict(prepared.config.routing),
    }
    store.write_json(
        MANIFEST_NAME,
        {
            "format_version": FORMAT_VERSION,
            "bytes": total,
            "bare_bytes": trunk + bare_bytes(prepared),
            "tensors": manifest,
        },
    )
    store.write_json("config.json", config)
    store.delete_folder("run/hidden")
    store.delete_folder(DRAFTS.rstrip("/"))


def bare_bytes(prepared: Prepared) -> float:
    """The information in the expanded weights: a count to hold the files' size against.

    Bits of a mask (one per weight, or ``log2`` of the number of patterns per N:M group), of kept
    values or codes, of scales and zero points, and of routers.
    """
    config = prepared.config
    shell = prepared.shell
    item = shell.dtype.itemsize
    total = 0.0
    for layer in range(shell.num_blocks):
        for group in shell.family.groups:
            for position, linear in enumerate(group.linears):
                rows, width = linear_shape(shell.meta_block(layer), linear)
                layout = PackedLayout.of(rows, width, config.compression.at(layer))
                total += config.routing.at(layer).num_clusters * layout.bare_bits(item) / 8
                total += grid_bytes(rows, width, config.compression)
                if position == 0:
                    total += router_bytes(width, config.routing.at(layer))
    return total


def is_companion(name: str) -> bool:
    """Tokenizer, generation and licence files, which travel with a model unchanged."""
    if name in ("config.json", INDEX_NAME, MANIFEST_NAME, "README.md"):
        return False
    if name.endswith((".model", ".jinja")) or name.upper().startswith(("LICENSE", "NOTICE")):
        return True
    starts = (
        "tokenizer",
        "vocab",
        "merges",
        "special_tokens",
        "added_tokens",
        "generation_config",
        "chat_template",
    )
    return name.startswith(starts) and name.endswith((".json", ".txt"))


def evaluate(
    model: str,
    windows: torch.Tensor,
    config: RunConfig,
    shell: ModelShell,
    executor: Executor,
    observer: Observer,
    measured: Measurements,
    *,
    num_shards: int = 1,
    num_ranges: int = 1,
    model_bytes: float = 0.0,
    pruned: str | None = None,
) -> tuple[NllSum, list[NllSum]]:
    """Perplexity of ``dense`` (the source) or ``expanded`` (the store's folder).

    Args:
        model: which of the two.
        windows: ``[N, L]``.
        config: with the dtype to compute in.
        shell: of either, for its shape.
        executor: does the units.
        observer: is told of every finished unit.
        measured: is added to.
        num_shards: shards of the windows.
        num_ranges: ranges of blocks.
        model_bytes: of its weight files, for a profile.
        pruned: name of the pruned neurons to put in place of the dense ones.

    Returns:
        The sum over all windows, and each window's.
    """
    start = time.perf_counter()
    shape = model_shape(shell)
    head = 2.0 * shape.hidden_size * int(shell.config.vocab_size)
    units = evaluation_units(
        model,
        windows.tolist(),
        num_layers=shape.num_layers,
        num_shards=num_shards,
        num_ranges=num_ranges,
        flops_per_token=shape.num_layers * shape.block_flops(windows.shape[1]) + head,
        model_bytes=model_bytes,
        pruned=pruned,
    )
    reports = executor.run(units, config, observer)
    measured.add(reports.values(), {unit.key: unit for unit in units})
    measured.seconds[f"evaluate_{model}"] += time.perf_counter() - start
    per_window = [
        NllSum(total, count)
        for unit in units
        for total, count in reports[unit.key].stats.get("nll", [])
    ]
    whole = NllSum(0.0, 0)
    for part in per_window:
        whole = whole + part
    return whole, per_window


def evaluation_tokens(
    text: str,
    encode: Encode,
    *,
    seqlen: int,
    max_windows: int | None,
    vocabulary: int,
) -> torch.Tensor:
    """Checked evaluation windows ``[N, L]``."""
    windows = evaluation_windows(text, encode, seqlen=seqlen, max_windows=max_windows)
    check_vocabulary(windows, vocabulary)
    return windows


def dense_bytes(shell: ModelShell) -> int:
    """Bytes of the dense model's parameters in the run's dtype."""
    size = torch.empty(0, dtype=shell.dtype).element_size()
    names = {shell.file_name(name) for name in shell.trunk_names()}
    total = 0
    for name in shell.files.names():
        if name in names or any(
            name.endswith(f"{linear}.weight")
            for group in shell.family.groups
            for linear in group.linears
        ):
            total += shell.files.read(name).numel() * size
    return total


def checkpoint_bytes(store: Store) -> int:
    """Bytes of the expanded model's weight files."""
    files = {
        name: 0 for name in store.list("") if name.endswith(".safetensors") and "/" not in name
    }
    return sum(int(store.fs.size(store.path(name))) for name in files)


def expansion_metrics(prepared: Prepared, store: Store, executor: str) -> dict[str, Any]:
    """What the markers of a finished expansion add up to."""
    experts = starved = raised = 0
    damping = prepared.config.compression.damping_fraction
    for unit in prepared.units:
        if unit.stage != "experts":
            continue
        record = store.record(unit.key)
        assert record is not None
        stats = record["stats"]
        experts += len(stats["tokens"])
        starved += sum(stats["starved"])
        raised += sum(fraction > damping for fraction in stats["damping_fraction"])
    return {
        "config": prepared.config.to_dict(),
        "model": prepared.identity["model"],
        "calibration_inputs": prepared.config.calibration.calibration_inputs,
        "executor": executor,
        "num_experts": experts,
        "mlp_flops_per_token": mlp_flops_per_token(prepared.config, model_shape(prepared.shell)),
        "starved_experts": starved,
        **refinement_metrics(prepared, store),
        "raised_damping": raised,
        "checkpoint_bytes": checkpoint_bytes(store),
        "dense_checkpoint_bytes": dense_bytes(prepared.shell),
    }


def refinement_metrics(prepared: Prepared, store: Store) -> dict[str, Any]:
    """What training came to, where there was any: losses on held-out windows, over all blocks."""
    units = [unit for unit in prepared.units if unit.stage == "refine"]
    if not units:
        return {}
    records = [store.record(unit.key) for unit in units]
    stats = [record["stats"] for record in records if record is not None]
    found = {"trained_blocks": sum(each["epoch"] > 0 for each in stats)}
    for name in ("loss_before", "loss_after"):
        losses = [each[name] for each in stats]
        found[name] = None if None in losses else sum(losses) / len(losses)
    return {"refinement": found}


def finish_metrics(metrics: dict[str, Any], measured: Measurements) -> dict[str, Any]:
    """Add times and memory."""
    profile = measured.profile()
    return {
        **metrics,
        **({} if profile is None else {"profile": profile}),
        "seconds": dict(measured.seconds),
        "unit_seconds": {name: work.seconds for name, work in measured.stages.items()},
        "peak_memory_bytes": max(measured.peak_memory_bytes, peak_memory_bytes()),
    }


def claim(store: Store, prepared: Prepared, windows: torch.Tensor, *, resume: bool) -> None:
    """Claim the output folder (see ``store.open_run``), and put the windows ``[N, L]`` there.

    From now on they are read shard by shard: the caller need not keep them.
    """
    open_run(store, json.loads(json.dumps(prepared.identity)), resume=resume)
    write_windows(store, windows, prepared.config.calibration.num_shards)
