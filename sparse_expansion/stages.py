"""Units of work, and the worker that does them.

A worker is stateless as far as results go: whatever it caches (a captured block's inputs, a
loaded model shell) it can make again, with the same bytes, from the store and the source model.
That is what lets any worker do any unit, and a lost worker's units be done elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_expansion.algorithms import neurons
from sparse_expansion.algorithms.clustering import (
    balance_clusters,
    fit_kmeans,
    fit_pca,
    project,
    route,
)
from sparse_expansion.algorithms.hessian import (
    check_finite,
    hessian_sum,
    merge_hessians,
    merge_moments,
    moment_sum,
    shrink,
)
from sparse_expansion.algorithms.packing import PackedLayout, pack_expert
from sparse_expansion.algorithms.perplexity import window_nll
from sparse_expansion.algorithms.quantization import AffineGrid, fit_grid
from sparse_expansion.algorithms.sweep import compress_linears
from sparse_expansion.config import CLUSTERINGS, CompressionConfig, RunConfig
from sparse_expansion.data.activations import (
    ActivationBuffers,
    AllSeenError,
    AttentionOutputs,
    GroupInputs,
    outside_heap,
)
from sparse_expansion.model.expansion import ExpandedLinear, ExpertCache, expand_block
from sparse_expansion.model.families import LinearGroup, dense_linear
from sparse_expansion.model.refinement import STEP_TOKENS, Batch, refine, trained_block
from sparse_expansion.model.sources import ModelSource, fetch_model
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.process_memory import (
    keep_freed_memory,
    peak_memory_bytes,
    return_excess_memory,
)
from sparse_expansion.run_files import (
    clusters_file,
    experts_file,
    hidden_file,
    neurons_file,
    pruned_file,
    pruned_name,
    range_name,
    router_file,
)
from sparse_expansion.store import Store, read_windows
from sparse_expansion.types import CompressionError, HessianSum, MomentSum, NllSum, Router
from sparse_expansion.units import Unit, UnitReport

CHUNK_TOKENS = 8192
DENSE = " in the dense block"
"""Ends the name of a group's inputs in the dense block where it has others too."""
ATTENTION = "attention's outputs"
UNITS_PER_TRIM = 8
"""Units between looks at the heap's holes: after each they made a run a fifth slower, after eight a
thirtieth."""
TRUNK_SHARD_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker needs to know to be set up anywhere."""

    store: str
    source: ModelSource
    cache_dir: str | None = None
    revision: str | None = None
    device: str = "auto"
    threads: int | None = None
    activation_bytes: int = 2 << 30
    """Captured activations kept in memory; what is over goes to scratch files."""
    scratch: str | None = None

    @property
    def captured_bytes(self) -> int:
        """Captured activations kept at all, in memory and in scratch files."""
        return captured_bytes(self.activation_bytes)


class Worker:
    """Does units. One per process (or per Ray actor)."""

    config: RunConfig
    """Settings of the graph that the unit in hand belongs to."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Set threads and device; models are opened when first needed."""
        self.spec = spec
        self.store = Store(spec.store)
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.device = spec.device
        if spec.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.buffers = ActivationBuffers(memory_bytes=spec.activation_bytes, scratch=spec.scratch)
        self._shells: dict[tuple[str, str], ModelShell] = {}
        self._captured: OrderedDict[tuple[int, int], dict[str, torch.Tensor]] = OrderedDict()
        self._labels: dict[tuple[int, int, str], torch.Tensor] = {}
        self._expanded: tuple[tuple[int, str], nn.Module] | None = None
        self._units = 0
        keep_freed_memory()

    def use(self, config: RunConfig) -> None:
        """Take the settings of the graph whose units come next."""
        self.config = config
        # Products of float32 stay float32 unless asked: TF32 changes masks and grids.
        torch.backends.cuda.matmul.allow_tf32 = config.tf32

    def run(
        self, unit: Unit, config: RunConfig, inputs: list[Any]
    ) -> tuple[UnitReport, dict[str, Any]]:
        """Do a unit of a graph with these settings; returns its report and its outputs by name.

        Raises:
            CompressionError: the unit cannot be done; the message starts with its key.
        """
        start = time.perf_counter()
        self.use(config)
        if unit.stage not in ("advance", "recapture"):
            # Unpacked experts are as large as any stage's arrays: the next stage has its own.
            self._expanded = None
        method: Callable[..., tuple[dict[str, Any], dict[str, Any]]] = getattr(
            self, f"stage_{unit.stage}"
        )
        try:
            stats, outputs = method(*inputs, **unit.params)
        except CompressionError as error:
            raise CompressionError(f"{unit.key}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise CompressionError(
                f"{unit.key}: out of device memory ({str(error).splitlines()[0]}): use a smaller "
                "--experts-per-unit, or more memory per worker"
            ) from error
        finally:
            self.buffers.let_go()
            self._units += 1
            if self._units % UNITS_PER_TRIM == 0:
                return_excess_memory()
        files = stats.pop("files", None)
        if unit.is_persistent:
            self.store.commit(unit.key, {"files": files or {}, "stats": stats})
        return (
            UnitReport(unit.key, time.perf_counter() - start, peak_memory_bytes(), stats),
            outputs,
        )

    def forget_before(self, layer: int) -> None:
        """Free the captured activations of earlier blocks: nothing reads them any more."""
        for key in [key for key in self._captured if key[0] < layer]:
            self._drop_captured(*key)

    def stage_ceilings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What this worker's device can do: float32 products, and copies."""
        side, floats = 2048, 64 << 20
        A, B = (torch.randn(side, side, device=self.device) for _ in range(2))
        source = torch.ones(floats, device=self.device)
        target = torch.empty_like(source)
        return {
            "matmul_flops_per_second": 2 * side**3 / self._median_seconds(lambda: A @ B),
            "copy_bytes_per_second": 2
            * source.element_size()
            * floats
            / self._median_seconds(lambda: target.copy_(source)),
        }, {}

    def _median_seconds(self, work: Callable[[], object]) -> float:
        """Of five, after one to warm up."""
        found = []
        for _ in range(6):
            start = time.perf_counter()
            work()
            if self.device != "cpu":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return statistics.median(found[1:])

    # -- calibration ---------------------------------------------------------------------------

    def stage_embed(self, *, shard: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Hidden states that enter the first block, for one shard of windows."""
        tokens = self._shard_tokens(shard)
        return self._write_hidden(0, shard, self._embedded(tokens)), {}

    def stage_capture(self, *, layer: int, shard: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run the dense block on one shard; keep its group inputs; hand on a sample of them."""
        calibration = self.config.calibration
        stats: dict[str, Any] = {"tokens": calibration.windows_of(shard) * calibration.seqlen}
        hidden = self._capture(layer, shard)
        if hidden is not None and layer + 1 < self._shell().num_blocks:
            stats |= self._write_hidden(layer + 1, shard, hidden)
        captured = self._captured[layer, shard]
        for X_TD in captured.values():
            check_finite(X_TD)
        # Later groups' routers wait for the inputs that they will have.
        count = 1 if calibration.is_sequential else None
        names = [group.name for group in self._shell().family.groups][:count]
        return stats, {name: self._sample(captured[name]) for name in names}

    def stage_recapture(
        self, *, layer: int, shard: int, group: str, experts: list[tuple[int, int]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A group's inputs once the groups before it are compressed; hand on a sample of them."""
        X_TD = self._inputs(layer, shard, group, experts)[group]
        check_finite(X_TD)
        return {}, {group: self._sample(X_TD)}

    def stage_router(
        self, *samples: torch.Tensor, layer: int, group: str, seed: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """PCA and KMeans on all shards' samples; writes the router and the dense weights' grids."""
        routing = self.config.routing
        count = routing.at(layer).num_clusters
        router, gram, fit_tokens = self._fit_router(samples, count, seed)
        linears = self._group(group).linears
        prefix = self._shell().block_prefix(layer)
        owner = f"{prefix}{linears[0]}.router"
        tensors = {
            f"{owner}.mean": router.mean_D.cpu(),
            f"{owner}.centroids": router.centroids_KP.cpu(),
        }
        if router.components_PD is not None:
            tensors[f"{owner}.components"] = router.components_PD.cpu()
        compression = self.config.compression
        if compression.bits is not None:
            for linear in linears:
                grid = fit_grid(
                    self._dense_weight(layer, linear).float(),
                    bits=compression.bits,
                    symmetric=compression.symmetric,
                    group_size=compression.group_size,
                )
                tensors[f"{prefix}{linear}.grid.scale"] = grid.scale_OG
                tensors[f"{prefix}{linear}.grid.zero_point"] = grid.zero_point_OG
        name = router_file(layer, group)
        files = {name: self.store.write_tensors(name, tensors)}
        handed = replace(gram, sum_DD=gram.sum_DD.cpu())
        return {"files": files, "fit_tokens": fit_tokens}, {"gram": handed}

    def stage_gather(
        self,
        *,
        layer: int,
        shard: int,
        group: str,
        ranges: list[tuple[int, int]],
        summed: bool,
        recaptured: list[tuple[int, int]] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """One shard's inputs of ranges of experts: their rows, or the rows' Hessian sums.

        Where the inputs were captured again (behind the ranges of experts given), every row is
        followed by what it lacks of the dense block's.
        """
        inputs = self._inputs(layer, shard, group, recaptured)
        X_TD, dense_TD = inputs[group], inputs.get(group + DENSE)
        labels_T = self._shard_labels(layer, shard, group)

        def inputs_of(expert: int) -> torch.Tensor | HessianSum:
            chosen = torch.nonzero(labels_T == expert).flatten()
            part_TE = X_TD[chosen]
            if dense_TD is not None:
                part_TE = torch.cat([part_TE, dense_TD[chosen] - part_TE], dim=1)
            if not summed:
                return part_TE
            total = self._hessian(part_TE, X_TD.shape[1])
            cross_DD = None if total.cross_DD is None else outside_heap(total.cross_DD)
            return replace(total, sum_DD=outside_heap(total.sum_DD), cross_DD=cross_DD)

        return {}, {
            range_name(experts): [inputs_of(k) for k in range(experts[0], experts[1] + 1)]
            for experts in ranges
        }

    def stage_reduce(self, *shards: list[HessianSum]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Add up several shards' Hessian sums, expert by expert, in shard order."""
        return {}, {"inputs": [merge_hessians(parts) for parts in zip(*shards, strict=True)]}

    def stage_experts(
        self,
        gram: HessianSum,
        *shards: list[torch.Tensor | HessianSum],
        layer: int,
        group: str,
        experts: tuple[int, int],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Sum the Hessians in shard order, compress, and write the experts' file."""
        compression = self._compression(layer)
        width = gram.sum_DD.shape[0]
        floor = compression.min_tokens(width)
        H_KDD = torch.empty(experts[1] - experts[0] + 1, width, width, device=self.device)
        cross_KDD: torch.Tensor | None = None
        tokens, group_share = [], []
        for k, parts in enumerate(zip(*shards, strict=True)):
            # All shards hand on sums, or all hand on rows: one product of many rows is faster.
            sums = [part for part in parts if isinstance(part, HessianSum)]
            merged = (
                merge_hessians(sums)
                if sums
                else self._hessian(
                    torch.cat([part for part in parts if torch.is_tensor(part)]), width
                )
            )
            tokens.append(merged.num_tokens)
            merged, weight = lean(merged, gram, compression)
            group_share.append(weight)
            H_KDD[k] = merged.sum_DD
            if merged.cross_DD is not None:
                cross_KDD = torch.empty_like(H_KDD) if cross_KDD is None else cross_KDD
                cross_KDD[k] = merged.cross_DD
            # Before the next one is made: for a wide layer each is gigabytes.
            del merged
        prefix = self._shell().block_prefix(layer)
        linears = self._group(group).linears
        weights = {name: self._dense_weight(layer, name).to(self.device) for name in linears}
        grids: dict[str, AffineGrid | None] = dict.fromkeys(linears)
        if compression.bits is not None:
            stored = self.store.read_tensors(router_file(layer, group))
            for name in linears:
                scale = stored[f"{prefix}{name}.grid.scale"].to(self.device)
                zero = stored[f"{prefix}{name}.grid.zero_point"].to(self.device)
                size = min(compression.group_size or width, width)
                grids[name] = AffineGrid(scale, zero, compression.bits, size)
        made = compress_linears(weights, H_KDD, compression, grids, cross_KDD=cross_KDD)
        tensors = {}
        stats: dict[str, Any] = {
            "tokens": tokens,
            "starved": [count < floor for count in tokens],
            "group_share": group_share,
            "relative_error": {},
        }
        for name in linears:
            result = made[name]
            stats["damping_fraction"] = list(result.damping_fraction_K)
            stats["damping_attempts"] = list(result.damping_attempts_K)
            stats["dead_features"] = list(result.num_dead_K)
            stats["relative_error"][name] = list(result.relative_error_K)
            rows, columns = weights[name].shape
            layout = PackedLayout.of(rows, columns, compression)
            for offset in range(len(tokens)):
                packed = pack_expert(
                    result.weight_KOD[offset],
                    result.kept_KOD[offset],
                    None if result.codes_KOD is None else result.codes_KOD[offset],
                    layout=layout,
                    dtype=self._shell().dtype,
                )
                where = f"{prefix}{name}.experts.{experts[0] + offset}"
                tensors.update({f"{where}.{part}": value for part, value in packed.items()})
        file = experts_file(layer, group, experts, is_draft=self.config.refines)
        stats["files"] = {file: self.store.write_tensors(file, tensors)}
        return stats, {}

    def stage_refine(
        self, *, layer: int, experts: list[tuple[int, int]], seed: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Train a block's kept weights against the dense block; writes its experts' final files."""
        shell = self._shell()
        family, prefix = shell.family, shell.block_prefix(layer)
        block, linears = trained_block(self.expanded_block(layer, experts, family.groups))
        calibration = self.config.calibration
        windows = [calibration.windows_of(shard) for shard in range(calibration.num_shards)]
        size = max(1, STEP_TOKENS // calibration.seqlen)
        held = [held_windows(count) for count in windows]

        def batches(epoch: int | None) -> Iterator[Batch]:
            # One shard's hidden states at a time. Held out is what a shard ends with.
            generator = torch.Generator().manual_seed(seed + (epoch or 0))
            for shard in torch.randperm(len(windows), generator=generator).tolist():
                cut = windows[shard] - held[shard]
                order = torch.randperm(cut, generator=generator)
                if epoch is None:
                    order = torch.arange(cut, windows[shard])
                hidden, tokens = self._read_hidden(layer, shard), self._shard_tokens(shard)
                for chosen in order.split(size) if len(order) else ():
                    call = shell.call(layer, tokens[chosen])
                    yield Batch(hidden[chosen].to(self.device), call)

        per_epoch = sum(
            math.ceil((all_ - out) / size) for all_, out in zip(windows, held, strict=True)
        )
        found = refine(
            block,
            linears,
            shell.load_block(layer),
            self.config.refinement,
            batches=batches,
            held_out=lambda: batches(None),
            num_steps=self.config.refinement.finetune * per_epoch,
        )
        files = {}
        for group in family.groups:
            for part in experts:
                tensors = {
                    f"{prefix}{name}.experts.{k}.{stream}": value
                    for name in group.linears
                    for k in range(part[0], part[1] + 1)
                    for stream, value in linears[name].packed(k, shell.dtype).items()
                }
                file = experts_file(layer, group.name, part)
                files[file] = self.store.write_tensors(file, tensors)
        return {"files": files, **asdict(found)}, {}

    def stage_advance(
        self, *, layer: int, shard: int, experts: list[tuple[int, int]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run the compressed block on one shard: what the next block is calibrated on."""
        block = self._expanded_before(layer, None, experts, is_draft=False)
        out, _ = self._run_block(layer, shard, block)
        assert out is not None
        return self._write_hidden(layer + 1, shard, out), {}

    def stage_trunk(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Copy everything but the dense MLP weights, in files of a few gigabytes."""
        shell = self._shell()
        files: dict[str, Any] = {}
        pending: dict[str, torch.Tensor] = {}
        size = 0
        names = shell.trunk_names()
        for number, name in enumerate(names):
            tensor = shell.read(name)
            pending[shell.stored_name(name)] = tensor
            size += tensor.numel() * tensor.element_size()
            if size >= TRUNK_SHARD_BYTES or number + 1 == len(names):
                file = f"trunk-{len(files):05d}.safetensors"
                files[file] = self.store.write_tensors(file, pending)
                pending, size = {}, 0
        return {"files": files}, {}

    # -- evaluation ----------------------------------------------------------------------------

    def stage_evaluate(
        self,
        hidden: torch.Tensor | None = None,
        *,
        model: str,
        tokens: list[list[int]],
        layers: tuple[int, int],
        pruned: str | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Pass windows through a range of blocks; the last range scores them.

        Args:
            hidden: what the range before put out, None for the first.
            model: ``dense`` for the source, ``expanded`` for the store's finished folder.
            tokens: the windows.
            layers: first and last block.
            pruned: name of the pruned neurons to put in place of the dense ones.
        """
        shell = self._shell(model)
        windows = torch.tensor(tokens, dtype=torch.int64)
        hidden = self._embedded(windows, model) if hidden is None else hidden.clone()
        with torch.no_grad():
            for layer in range(layers[0], layers[1] + 1):
                block = shell.load_block(layer)
                if pruned is not None:
                    self._put_pruned(block, layer, pruned)
                self._pass(layer, block, windows, hidden, model)
                del block
                if shell.expansion is not None:
                    shell.cache.clear()
        if layers[1] + 1 < shell.num_blocks:
            return {}, {"hidden": hidden}
        nll = self._scores(windows, hidden, model)
        return {"nll": [(part.total, part.num_tokens) for part in nll]}, {}

    def stage_block_gaps(
        self, *, pruned: list[list[int]], scored: list[list[int]], layers: tuple[int, int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Loss of the dense model, and of it with one block pruned, for each of a range of blocks.

        All variants go through the blocks together, so every block is read once.

        Args:
            pruned: windows whose Hessians the blocks are pruned with, by a sweep.
            scored: windows whose loss is measured.
            layers: first and last block to prune.
        """
        shell = self._shell()
        to_prune, to_score = (torch.tensor(part, dtype=torch.int64) for part in (pruned, scored))
        calibration, dense = self._embedded(to_prune), self._embedded(to_score)
        streams: list[torch.Tensor] = []
        with torch.no_grad():
            for layer in range(shell.num_blocks):
                block = shell.load_block(layer)
                for hidden in streams:
                    self._pass(layer, block, to_score, hidden)
                if layers[0] <= layer <= layers[1]:
                    try:
                        other = self._pruned_block(layer, block, to_prune, calibration)
                    except CompressionError as error:
                        raise CompressionError(f"layer-{layer:03d}: {error}") from error
                    streams.append(dense.clone())
                    self._pass(layer, other, to_score, streams[-1])
                    del other
                elif layer < layers[0]:
                    self._pass(layer, block, to_prune, calibration)
                self._pass(layer, block, to_score, dense)
        losses = [sum(nll.total for nll in self._scores(to_score, h)) for h in (dense, *streams)]
        count = to_score.shape[0] * (to_score.shape[1] - 1)
        return {"dense": losses[0], "pruned": losses[1:], "num_tokens": count}, {}

    def _pruned_block(
        self, layer: int, block: nn.Module, windows: torch.Tensor, hidden: torch.Tensor
    ) -> nn.Module:
        """A copy whose MLP is swept on the windows, which also go through the dense block."""
        shell = self._shell()
        sums: dict[str, HessianSum] = {}
        with GroupInputs(block, shell.family.groups) as seen:
            for part in shell.batches(windows):
                call = shell.call(layer, windows[part])
                hidden[part] = call.run(block, hidden[part].to(self.device)).cpu()
                for name, X_TD in seen.inputs.items():
                    found = [sums[name]] if name in sums else []
                    sums[name] = merge_hessians([*found, self._hessian(X_TD)])
        # The block's own share is found by this: a plain sweep tells which blocks are sensitive.
        plain = CompressionConfig(
            sparsity=self.config.compression.sparsity, block_size=self.config.compression.block_size
        )
        other = shell.load_block(layer)
        for group in shell.family.groups:
            weights = {
                name: self._dense_weight(layer, name).to(self.device) for name in group.linears
            }
            H_KDD = sums[group.name].sum_DD[None]
            made = compress_linears(weights, H_KDD, plain, dict.fromkeys(weights))
            for name, result in made.items():
                set_weight(other.get_submodule(name), result.weight_KOD[0].to(shell.dtype))
        return other

    def _embedded(self, windows: torch.Tensor, model: str = "dense") -> torch.Tensor:
        """Hidden states that enter the first block, on the CPU."""
        shell = self._shell(model)
        return torch.cat([shell.embed(windows[part]).cpu() for part in shell.batches(windows)])

    def _pass(
        self,
        layer: int,
        block: nn.Module,
        windows: torch.Tensor,
        hidden: torch.Tensor,
        model: str = "dense",
    ) -> None:
        """Run a block on the hidden states of windows, in place."""
        shell = self._shell(model)
        for part in shell.batches(windows):
            call = shell.call(layer, windows[part])
            hidden[part] = call.run(block, hidden[part].to(self.device)).cpu()

    def _scores(
        self, windows: torch.Tensor, hidden: torch.Tensor, model: str = "dense"
    ) -> list[NllSum]:
        """Each window's loss, from what the last block put out."""
        nll: list[NllSum] = []
        for index in range(len(windows)):
            # One window at a time: the logits of a batch are larger than anything before them.
            part = slice(index, index + 1)
            logits = self._shell(model).head(windows[part], hidden[part])
            nll += window_nll(logits, windows[part].to(logits.device))
        return nll

    # -- analysis ------------------------------------------------------------------------------

    def stage_neurons(
        self, *, layer: int, group: str, models: dict[str, str], seed: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Describe every neuron of a group; writes a table of tensors, one row per neuron.

        Args:
            layer: of the block.
            group: of the linears.
            models: names and folders of expanded models, whose outputs on the same inputs are
                compared with the dense ones.
            seed: of the pairs for the mapping difficulty.
        """
        X_TD = self._inputs(layer, 0)[group].to(self.device)
        dense = self._shell().load_block(layer)
        others = {name: self._shell(folder).load_block(layer) for name, folder in models.items()}
        linears = self._group(group).linears
        labels: dict[str, torch.Tensor] = {}
        for name, block in others.items():
            first = block.get_submodule(linears[0])
            assert isinstance(first, ExpandedLinear)
            router = first.group_router.router()
            labels[name] = self._route(X_TD, router).to(self.device)
        tensors: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for linear in linears:
                Y_TO = dense.get_submodule(linear)(X_TD)
                columns = neurons.describe(X_TD, Y_TO, seed=seed)
                for name, block in others.items():
                    found = neurons.compare(Y_TO, block.get_submodule(linear)(X_TD), labels[name])
                    columns |= {f"{key}.{name}": value for key, value in found.items()}
                tensors |= {f"{linear}.{key}": value.cpu() for key, value in columns.items()}
        for folder in models.values():
            self._shell(folder).cache.clear()
        file = neurons_file(layer, group)
        files = {file: self.store.write_tensors(file, tensors)}
        return {"files": files, "tokens": X_TD.shape[0]}, {}

    # -- experiments ---------------------------------------------------------------------------

    def stage_clusters(
        self,
        *,
        layer: int,
        linear: str,
        group: str,
        num_clusters: int,
        calibration_tokens: int,
        neurons_kept: list[int],
        seed: int,
        clusterings: Sequence[str] = CLUSTERINGS,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Experts of one linear for one K, on their own clusters or on random tokens.

        Writes what ``neurons.compare`` finds on the tokens that were not calibrated on, per
        clustering, and the outputs of the neurons asked for.
        """
        compression = self.config.compression
        X_TD = self._inputs(layer, 0)[group]
        X_cal, X_held = X_TD[:calibration_tokens], X_TD[calibration_tokens:].to(self.device)
        sample = X_cal[evenly_spaced(len(X_cal), self.config.routing.fit_tokens)]
        router, gram, _ = self._fit_router([sample], num_clusters, seed)
        module = self._shell().load_block(layer).get_submodule(linear)
        W_OD = self._dense_weight(layer, linear).to(self.device)
        with torch.no_grad():
            dense_TO = module(X_held).float()
        tensors = {f"dense.{o}": dense_TO[:, o].cpu().clone() for o in neurons_kept}
        for clustering in clusterings:
            labels_T, held_T = self._route(X_cal, router), self._route(X_held, router)
            if clustering == "random":
                labels_T = shuffled(labels_T, f"{seed}/calibration")
                held_T = shuffled(held_T, f"{seed}/held-out")
            change_TO = torch.empty_like(dense_TO)
            for k in range(num_clusters):
                H = self._hessian(X_cal[labels_T == k])
                H, _ = lean(H, gram, compression)
                made = compress_linears({"": W_OD}, H.sum_DD[None], compression, {"": None})[""]
                chosen = torch.nonzero(held_T == k).flatten().to(self.device)
                delta_OD = made.weight_KOD[0] - W_OD.float()
                change_TO[chosen] = X_held[chosen].float() @ delta_OD.T
            other_TO = dense_TO + change_TO
            found = neurons.compare(dense_TO, other_TO, held_T.to(self.device))
            tensors |= {f"{clustering}.{name}": value.cpu() for name, value in found.items()}
            energy = dense_TO.double().square().sum()
            tensors[f"{clustering}.relative_error"] = change_TO.double().square().sum().cpu() / (
                energy.cpu()
            )
            tensors |= {f"{clustering}.{o}": other_TO[:, o].cpu().clone() for o in neurons_kept}
        name = clusters_file(layer, linear, num_clusters)
        return {"files": {name: self.store.write_tensors(name, tensors)}}, {}

    def stage_prune_neurons(
        self, *, layer: int, group: str, rankings: list[str], shares: list[float], seed: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Prune the first neurons of every ranking, and nothing else: rows to put in their place.

        For every linear of the group, ranking and share: the neurons' indices, and their weights
        after a sweep over these rows alone.
        """
        X_TD = self._inputs(layer, 0)[group]
        block = self._shell().load_block(layer)
        H_KDD = self._hessian(X_TD).sum_DD[None]
        chosen: dict[str, torch.Tensor] = {}
        weights: dict[str, torch.Tensor] = {}
        for number, linear in enumerate(self._group(group).linears):
            W_OD = self._dense_weight(layer, linear).to(self.device)
            with torch.no_grad():
                parts = X_TD.split(CHUNK_TOKENS)
                module = block.get_submodule(linear)
                Y_TO = torch.cat([module(part.to(self.device)) for part in parts])
            for ranking in rankings:
                order = neurons.rank(ranking, W_OD, Y_TO, seed=seed + number)
                for share in shares:
                    name = f"{linear}.{pruned_name(ranking, share)}"
                    chosen[name] = order[: max(1, round(share * len(order)))].clone()
                    weights[name] = W_OD[chosen[name]]
        made = compress_linears(weights, H_KDD, self.config.compression, dict.fromkeys(weights))
        tensors = {f"{name}.rows": rows.cpu() for name, rows in chosen.items()}
        for name, result in made.items():
            tensors[f"{name}.weight"] = result.weight_KOD[0].to(self._shell().dtype).cpu()
        file = pruned_file(layer, group)
        return {"files": {file: self.store.write_tensors(file, tensors)}}, {}

    def _put_pruned(self, block: nn.Module, layer: int, pruned: str) -> None:
        """Replace a dense block's rows by those that ``stage_prune_neurons`` wrote."""
        for group in self._shell().family.groups:
            tensors = self.store.read_tensors(pruned_file(layer, group.name))
            for linear in group.linears:
                module = block.get_submodule(linear)
                # A copy: what was read may be the file itself, mapped.
                weight = module.get_parameter("weight").detach().clone()
                rows = tensors[f"{linear}.{pruned}.rows"].to(weight.device)
                weight[rows] = tensors[f"{linear}.{pruned}.weight"].to(weight)
                set_weight(module, weight)

    # -- pieces --------------------------------------------------------------------------------

    def _expanded_before(
        self,
        layer: int,
        group: str | None,
        experts: list[tuple[int, int]],
        *,
        is_draft: bool = True,
    ) -> nn.Module:
        """``expanded_block`` of the groups before one (None: all), kept for the next shard."""
        key = layer, group or ""
        if self._expanded is None or self._expanded[0] != key:
            self._expanded = None
            groups = self._shell().family.groups
            names = [each.name for each in groups]
            count = len(groups) if group is None else names.index(group)
            block = self.expanded_block(layer, experts, groups[:count], is_draft=is_draft)
            self._expanded = key, block
        return self._expanded[1]

    def expanded_block(
        self,
        layer: int,
        experts: list[tuple[int, int]],
        groups: tuple[LinearGroup, ...],
        *,
        is_draft: bool = True,
    ) -> nn.Module:
        """A block with groups' experts as they were committed: the same modules that are served.

        Other linears are the dense ones.

        Args:
            layer: of the block.
            experts: all ranges of a group.
            groups: those to take.
            is_draft: take them as they are before their training, where there is one.
        """
        shell = self._shell()
        block = copy.deepcopy(shell.meta_block(layer))
        expand_block(
            block,
            tuple(group.linears for group in groups),
            self._compression(layer),
            self.config.routing.at(layer),
            cache=ExpertCache(None),
            dtype=shell.dtype,
        )
        prefix = shell.block_prefix(layer)
        state: dict[str, torch.Tensor] = {}
        for group in groups:
            names = [router_file(layer, group.name)]
            drafts = is_draft and self.config.refines
            names += [experts_file(layer, group.name, part, is_draft=drafts) for part in experts]
            for name in names:
                for key, tensor in self.store.read_tensors(name).items():
                    state[key.removeprefix(prefix)] = tensor
        for name in block.state_dict():
            if name not in state:
                state[name] = shell.read(prefix + name)
        block.load_state_dict(state, strict=True, assign=True)
        return block.to(self.device)

    def _shell(self, model: str = "dense") -> ModelShell:
        """Of the source (``dense``), the store's folder (``expanded``), or another folder."""
        dtype = self.config.dtype
        if (model, dtype) not in self._shells:
            if model == "dense":
                folder = fetch_model(
                    self.spec.source, cache_dir=self.spec.cache_dir, revision=self.spec.revision
                )
            elif model == "expanded":
                folder = self.store.fetch_folder(self.spec.scratch)
            else:
                folder = Path(model)
            self._shells[model, dtype] = ModelShell(folder, device=self.device, dtype=dtype)
        return self._shells[model, dtype]

    def _compression(self, layer: int) -> CompressionConfig:
        """A block's settings of pruning and quantization."""
        return self.config.compression.at(layer)

    def _group(self, name: str) -> LinearGroup:
        for group in self._shell().family.groups:
            if group.name == name:
                return group
        raise ValueError(f"no linear group {name!r}")

    def _dense_weight(self, layer: int, linear: str) -> torch.Tensor:
        shell = self._shell()
        dense_linear(shell.meta_block(layer), linear)
        weight = shell.read(f"{shell.block_prefix(layer)}{linear}.weight")
        if not bool(torch.isfinite(weight).all()):
            raise CompressionError(f"the dense weight of {linear} has NaN or infinite entries")
        return weight

    def _shard_tokens(self, shard: int) -> torch.Tensor:
        return read_windows(self.store, shard)

    def _read_hidden(self, layer: int, shard: int) -> torch.Tensor:
        return self.store.read_tensors(hidden_file(layer, shard))["hidden"]

    def _write_hidden(self, layer: int, shard: int, hidden: torch.Tensor) -> dict[str, Any]:
        name = hidden_file(layer, shard)
        return {"files": {name: self.store.write_tensors(name, {"hidden": hidden})}}

    def _inputs(
        self,
        layer: int,
        shard: int,
        group: str | None = None,
        recaptured: list[tuple[int, int]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Captured inputs by group.

        With ranges of experts the group's are those behind the compressed groups before it; the
        dense block's are then under its name and ``DENSE``.
        """
        if (layer, shard) not in self._captured:
            self._capture(layer, shard)
        captured = self._captured[layer, shard]
        if group is not None and recaptured is not None and group + DENSE not in captured:
            block = self._expanded_before(layer, group, recaptured)
            _, found = self._run_block(layer, shard, block, (self._group(group),), stop=True)
            captured |= {group + DENSE: captured[group], **found}
        return captured

    def _capture(self, layer: int, shard: int) -> torch.Tensor | None:
        """Run the dense block; its group inputs are kept in ``_captured``.

        Returns:
            Its output, unless the next block gets the compressed block's. Attention's outputs are
            kept for that one then.
        """
        self._make_room(layer)
        shell = self._shell()
        block, groups = shell.load_block(layer), shell.family.groups
        again = self.config.calibration.follows_compression
        out, found = self._run_block(layer, shard, block, groups, stop=again)
        self._captured[layer, shard] = found
        return out

    def _run_block(
        self,
        layer: int,
        shard: int,
        block: nn.Module,
        groups: tuple[LinearGroup, ...] = (),
        *,
        stop: bool = False,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """A block's output on a shard's hidden states, and the inputs of groups in it.

        Attention's outputs are taken from the shard's captured activations, or are among what is
        returned where the run stops.

        Args:
            layer: of the block.
            shard: of the windows.
            block: dense, or with compressed linears.
            groups: whose inputs are wanted.
            stop: before the last of these groups; there is no output then.
        """
        shell = self._shell()
        tokens = self._shard_tokens(shard)
        hidden = self._read_hidden(layer, shard)
        out = None if stop else torch.empty_like(hidden)
        buffers: dict[str, torch.Tensor] = {}
        kept_TD = self._captured.get((layer, shard), {}).get(ATTENTION)
        row = 0
        with (
            torch.no_grad(),
            GroupInputs(block, groups, stop=stop) as seen,
            AttentionOutputs(
                block, shell.family.attention, replays=kept_TD is not None
            ) as attention,
        ):
            for part in shell.batches(tokens):
                call = shell.call(layer, tokens[part])
                count = tokens[part].numel()
                rows = slice(row, row + count)
                if kept_TD is not None:
                    attention.output = kept_TD[rows].to(self.device).view(hidden[part].shape)
                with contextlib.suppress(AllSeenError):
                    found = call.run(block, hidden[part].to(self.device))
                    if out is not None:
                        out[part] = found.cpu()
                made = dict(seen.inputs)
                if stop and kept_TD is None:
                    assert attention.output is not None
                    made[ATTENTION] = attention.output.flatten(0, 1)
                for name, X_TD in made.items():
                    if name not in buffers:
                        shape = (tokens.numel(), X_TD.shape[1])
                        buffers[name] = self.buffers.allocate(shape, X_TD.dtype)
                    buffers[name][rows] = X_TD.cpu()
                row += count
        return out, buffers

    def _make_room(self, layer: int) -> None:
        """Drop the oldest other blocks' shards until another shard of the largest size fits."""
        sizes = {
            key: sum(tensor.numel() * tensor.element_size() for tensor in buffers.values())
            for key, buffers in self._captured.items()
        }
        excess = sum(sizes.values()) + max(sizes.values(), default=0) - self.spec.captured_bytes
        for key, size in sizes.items():
            if excess <= 0:
                break
            if key[0] != layer:
                self._drop_captured(*key)
                excess -= size

    def _drop_captured(self, layer: int, shard: int) -> None:
        for tensor in self._captured.pop((layer, shard), {}).values():
            self.buffers.release(tensor)
        for label_key in [key for key in self._labels if key[:2] == (layer, shard)]:
            del self._labels[label_key]

    def _sample(self, X_TD: torch.Tensor) -> torch.Tensor:
        """The shard's share of the ``fit_tokens`` rows that routers are fitted on."""
        total = self.config.calibration.num_tokens
        share = max(1, self.config.routing.fit_tokens * X_TD.shape[0] // total)
        return outside_heap(X_TD[evenly_spaced(X_TD.shape[0], share)])

    def _moments(self, X_TD: torch.Tensor) -> MomentSum:
        return merge_moments(moment_sum(part.to(self.device)) for part in X_TD.split(CHUNK_TOKENS))

    def _hessian(self, X_TE: torch.Tensor, width: int | None = None) -> HessianSum:
        """Summed in chunks of fixed size, so that it does not matter who sums.

        Rows wider than ``width`` go on with what they lack of the dense block's.
        """
        width = width or X_TE.shape[1]

        def summed(part_TE: torch.Tensor) -> HessianSum:
            lack_TD = part_TE[:, width:] if part_TE.shape[1] > width else None
            return hessian_sum(part_TE[:, :width], lack_TD)

        return merge_hessians(summed(part.to(self.device)) for part in X_TE.split(CHUNK_TOKENS))

    def _fit_router(
        self, samples: Sequence[torch.Tensor], num_clusters: int, seed: int
    ) -> tuple[Router, HessianSum, int]:
        """PCA and KMeans on the samples; the router, the samples' Hessian sum and their count."""
        routing = self.config.routing
        moments = merge_moments(self._moments(X_TD) for X_TD in samples)
        components_PD = None
        if routing.pca_reduction_factor is None:
            mean_D = (moments.sum_D / moments.gram.num_tokens).float()
        else:
            width = moments.sum_D.shape[0]
            mean_D, components_PD = fit_pca(moments, num_components=routing.num_components(width))
        Z_TP = torch.cat(
            [
                project(part.to(self.device), mean_D, components_PD)
                for X_TD in samples
                for part in X_TD.split(CHUNK_TOKENS)
            ]
        )
        centroids_KP = fit_kmeans(
            Z_TP,
            num_clusters=num_clusters,
            restarts=routing.restarts,
            max_iterations=routing.max_iterations,
            seed=seed,
        )
        if routing.balance:
            centroids_KP = balance_clusters(Z_TP, centroids_KP, least=routing.balance)
        return Router(mean_D, components_PD, centroids_KP), moments.gram, Z_TP.shape[0]

    def _route(self, X_TD: torch.Tensor, router: Router) -> torch.Tensor:
        """Labels of all tokens, on the CPU."""
        parts = X_TD.split(CHUNK_TOKENS)
        return torch.cat([route(part.to(self.device), router).cpu() for part in parts])

    def _shard_labels(self, layer: int, shard: int, group: str) -> torch.Tensor:
        key = (layer, shard, group)
        if key not in self._labels:
            stored = self.store.read_tensors(router_file(layer, group))
            owner = f"{self._shell().block_prefix(layer)}{self._group(group).linears[0]}.router"
            components = stored.get(f"{owner}.components")
            router = Router(
                stored[f"{owner}.mean"].to(self.device),
                None if components is None else components.to(self.device),
                stored[f"{owner}.centroids"].to(self.device),
            )
            labels_T = self._route(self._inputs(layer, shard)[group], router)
            if self.config.routing.clustering == "random":
                name = f"{self.config.calibration.seed}/{layer}/{group}/{shard}"
                labels_T = shuffled(labels_T, name)
            # Those of all shards of a block are kept: small, there may be millions of tokens.
            self._labels[key] = labels_T.to(torch.int16)
        return self._labels[key]


def lean(
    part: HessianSum, gram: HessianSum, compression: CompressionConfig
) -> tuple[HessianSum, float]:
    """The sums that an expert is made with, and how far they are its whole group's (0 to 1)."""
    if part.num_tokens < compression.min_tokens(part.sum_DD.shape[0]):
        # It would be fitted to these tokens alone: it becomes the plain SparseGPT expert.
        cross_DD = None if part.cross_DD is None else torch.zeros_like(part.cross_DD)
        return replace(gram, cross_DD=cross_DD), 1.0
    return shrink(part, gram) if compression.shrink_hessians else (part, 0.0)


def set_weight(linear: nn.Module, weight: torch.Tensor) -> None:
    """Give a dense linear another weight, as it is stored: never one that is mapped from a file."""
    linear.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def evenly_spaced(count: int, wanted: int) -> torch.Tensor:
    """Indices of at most so many of ``count`` rows, first and last among them."""
    share = min(count, wanted)
    return torch.linspace(0, count - 1, share, dtype=torch.float64).round().long()


def shuffled(labels_T: torch.Tensor, name: str) -> torch.Tensor:
    """The labels in a random order that the name alone decides: sizes stay, meaning goes."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return labels_T[torch.randperm(labels_T.shape[0], generator=generator)]


def held_windows(count: int) -> int:
    """How many of a shard's windows are not trained on: an eighth, none of a single one."""
    return max(1, count // 8) if count > 1 else 0


def captured_bytes(activation_bytes: int) -> int:
    """Captured activations that a worker keeps, scratch files included."""
    return 4 * activation_bytes
