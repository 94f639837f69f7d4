"""Which units of work there are, what they need of each other, and what they cost.

One graph serves both schedules and all executors. Per block ``i``:

    capture(i, shard) -> router(i, group) -> gather(i, group, experts, shard)
      -> experts(i, group, experts)

``capture`` hands on a sample of its inputs, on which the router is fitted; ``gather`` hands on the
inputs that are routed to some experts, or with many tokens their Hessian sums, which ``reduce``
units add up.

``compressed`` adds ``advance(i, shard)``, the compressed block's output, which the next block's
capture waits for; with ``dense`` the next capture waits for this one alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from sparse_expansion.algorithms.clustering import OVERSAMPLING, takes_subspace_iteration
from sparse_expansion.algorithms.packing import PackedLayout
from sparse_expansion.config import CLUSTERINGS, CompressionConfig, RunConfig
from sparse_expansion.model.families import LinearGroup, linear_shape
from sparse_expansion.run_files import range_name
from sparse_expansion.units import Unit

GATHER_BYTES = 512 << 20
"""A unit that gathers hands on at most this much, or one range of experts."""
GROUP_BYTES = 8 << 30
"""All shards together hand on at most this much at a time, or one range of experts."""
REDUCE_FAN_IN = 8
"""Hessian sums that are added up at a time."""
SUBSPACE_ITERATIONS = 15.0
"""Of a PCA, as seen on SmolLM2's layers."""
SORT_FLOPS = 200.0
"""What sorting and describing one output costs, in products' time."""
LLOYD_ITERATIONS = 20.0
"""Of a KMeans restart, as seen on SmolLM2's layers."""


@dataclass(frozen=True)
class GroupShape:
    """A linear group's name, input width, outputs of its linears together, and their number."""

    name: str
    width: int
    rows: int
    num_linears: int = 1

    @property
    def weights(self) -> int:
        """Of its linears together."""
        return self.width * self.rows


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model."""

    num_layers: int
    hidden_size: int
    groups: tuple[GroupShape, ...]
    item_bytes: int = 4
    """Bytes of one activation."""

    @property
    def block_weights(self) -> int:
        """Of a block: its MLP, and attention's four projections (fewer with shared heads)."""
        return sum(group.weights for group in self.groups) + 4 * self.hidden_size**2

    def attention_flops(self, seqlen: int) -> float:
        """Of one token through a block's attention: its products, and its scores and sums."""
        return 2.0 * (4 * self.hidden_size**2 + self.hidden_size * seqlen)

    def block_flops(self, seqlen: int) -> float:
        """Of one token through a block."""
        return self.attention_flops(seqlen) + 2.0 * sum(group.weights for group in self.groups)


def group_shape(block: nn.Module, group: LinearGroup) -> GroupShape:
    """A group's shape, read off a block (on the meta device too).

    Raises:
        ValueError: the block lacks one of the linears, or they differ in their input width.
    """
    shapes = [linear_shape(block, name) for name in group.linears]
    if len({width for _, width in shapes}) != 1:
        raise ValueError(f"linears {', '.join(group.linears)} do not share one input width")
    rows = sum(rows for rows, _ in shapes)
    return GroupShape(group.name, shapes[0][1], rows, num_linears=len(shapes))


def expert_ranges(num_clusters: int, experts_per_unit: int) -> list[tuple[int, int]]:
    """First and last expert of every unit."""
    return [
        (first, min(first + experts_per_unit, num_clusters) - 1)
        for first in range(0, num_clusters, experts_per_unit)
    ]


def hands_on_sums(config: RunConfig, width: int, item_bytes: int) -> bool:
    """Whether shards hand on Hessian sums instead of the rows behind them.

    Rows are smaller for few tokens and leave the products to whoever is free, but grow with the
    tokens; sums (``D x D``, added up ``REDUCE_FAN_IN`` at a time) do not.
    """
    calibration = config.calibration
    rows = calibration.dataset_size * calibration.seqlen / config.routing.num_clusters
    return rows * item_bytes > REDUCE_FAN_IN * 4 * 4.0 * width


def gathered_bytes(config: RunConfig, width: int, item_bytes: int, *, paired: bool = False) -> int:
    """What one shard hands on for one expert; twice as much with what the inputs lack."""
    count = 2 if paired else 1
    if hands_on_sums(config, width, item_bytes):
        return count * 4 * width**2
    calibration = config.calibration
    shard_tokens = calibration.dataset_size * calibration.seqlen / calibration.num_shards
    return int(count * shard_tokens / config.routing.num_clusters * item_bytes * width)


def gathered_ranges(
    ranges: list[tuple[int, int]], expert_bytes: int, num_shards: int
) -> list[list[tuple[int, int]]]:
    """Ranges that one unit gathers for: as many as keep what is handed on bounded."""
    size = ranges[0][1] - ranges[0][0] + 1
    of_range = max(1, size * expert_bytes)
    count = max(1, min(GATHER_BYTES // of_range, GROUP_BYTES // (of_range * num_shards)))
    return [ranges[first : first + count] for first in range(0, len(ranges), count)]


def router_flops(config: RunConfig, width: int, tokens: float) -> float:
    """Operations to fit a router on ``tokens`` tokens: Gram matrix (half of it), PCA, KMeans."""
    routing = config.routing
    features = routing.num_components(width)
    pca = 0.0
    if routing.pca_reduction_factor is not None:
        if takes_subspace_iteration(width, features):
            pca = SUBSPACE_ITERATIONS * 2.0 * width**2 * (features + OVERSAMPLING)
        else:
            # Tridiagonal form (4/3 D^3) and the wanted vectors back (2 D^2 P).
            pca = 4 / 3 * width**3 + 2.0 * width**2 * features
    kmeans = 2.0 * tokens * features * routing.num_clusters * routing.restarts * LLOYD_ITERATIONS
    return tokens * width * (width + 2.0 * features) + pca + kmeans


def mlp_flops_per_token(config: RunConfig, shape: ModelShape) -> dict[str, float]:
    """Operations of all MLP linears on one token: dense, kept weights alone, and routers."""
    found = {"dense": 0.0, "experts": 0.0, "router": 0.0}
    for layer in range(shape.num_layers):
        here = config.at(layer)
        for group in shape.groups:
            found["dense"] += 2.0 * group.rows * group.width
            layout = PackedLayout.of(group.rows, group.width, here.compression)
            found["experts"] += 2.0 * layout.num_kept
            found["router"] += routing_flops(here, group.width)
    return found


def routing_flops(config: RunConfig, width: int) -> float:
    """Operations to route one token: see ``clustering.route``."""
    clusters, features = config.routing.num_clusters, config.routing.num_components(width)
    if clusters == 1:
        return 0.0
    if config.routing.pca_reduction_factor is None or clusters <= features:
        return 2.0 * width * clusters
    return 2.0 * features * (width + clusters)


def experts_flops(
    group: GroupShape, compression: CompressionConfig, tokens: float, *, paired: bool = False
) -> float:
    """Operations of one expert: Hessian (half of it), what its pruner does, and its error.

    The sweep: a factorization takes ``D^3 / 3``, errors of earlier blocks ``O D^2``, inside blocks
    ``O D block_size``. ADMM: an inverse (``D^3``), and a product with it per iteration; one more
    is its target, and one its error. Scores: their error. ``paired``: with what the inputs lack,
    another (full) sum, a product and two triangular solves.
    """
    width, rows = float(group.width), float(group.rows)
    found = tokens * width**2 * (3 if paired else 1)
    if compression.pruner == "sparsegpt" or compression.bits is not None:
        found += width**3 / 3 + rows * width * (width + compression.block_size)
    if paired:
        found += 4 * rows * width**2
    if compression.pruner == "admm":
        found += width**3 + 2 * rows * width**2 * (compression.solver_iterations - 1)
    if compression.pruner != "sparsegpt":
        found += 2 * rows * width**2 * (2 if compression.pruner == "admm" else 1)
    return found


def packed_bytes(config: RunConfig, group: GroupShape, item_bytes: int) -> int:
    """Stored bytes of one expert of all linears of a group."""
    return PackedLayout.of(group.rows, group.width, config.compression).num_bytes(item_bytes)


def expert_bytes(config: RunConfig, group: GroupShape) -> int:
    """Bytes that making one expert reads and writes at least: Hessian, factor, weights."""
    return 4 * (2 * group.width**2 + 2 * group.rows * group.width) + packed_bytes(config, group, 4)


def _embed_unit(shape: ModelShape, shard: int, tokens: float) -> Unit:
    return Unit(
        key=f"embed/shard-{shard:03d}",
        stage="embed",
        params={"shard": shard},
        is_persistent=True,
        cost=tokens * shape.hidden_size,
        traffic_bytes=2 * int(tokens * shape.hidden_size * shape.item_bytes),
    )


def captured_width(config: RunConfig, shape: ModelShape) -> int:
    """Activations that a block's capture keeps of a token: the groups' inputs.

    And attention's outputs, where the block runs again with compressed linears.
    """
    attention = shape.hidden_size if config.calibration.follows_compression else 0
    return sum(group.width for group in shape.groups) + attention


def _capture_unit(
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
    calibration = config.calibration
    tokens = calibration.dataset_size * calibration.seqlen / calibration.num_shards
    hidden_bytes = int(tokens * shape.hidden_size * shape.item_bytes)
    captured = int(tokens * captured_width(config, shape) * shape.item_bytes)
    flops = shape.block_flops(calibration.seqlen)
    if calibration.follows_compression:
        flops -= 2.0 * shape.groups[-1].weights
    return Unit(
        key=f"layer-{layer:03d}/capture/shard-{shard:03d}",
        stage="capture",
        params={"layer": layer, "shard": shard},
        after=(after,),
        outputs=outputs,
        is_persistent=is_persistent,
        affinity=f"layer-{layer:03d}/shard-{shard:03d}",
        layer=layer,
        cost=tokens * flops,
        cache_bytes=captured,
        output_bytes=output_bytes,
        traffic_bytes=shape.item_bytes * shape.block_weights + 2 * hidden_bytes + captured,
    )


def expansion_units(config: RunConfig, shape: ModelShape) -> list[Unit]:
    """All units that make an expanded model."""
    calibration = config.calibration
    shards = range(calibration.num_shards)
    compressed = calibration.follows_compression
    tokens = calibration.dataset_size * calibration.seqlen
    shard_tokens = tokens / len(shards)
    fit_tokens = min(tokens, config.routing.fit_tokens)
    item = shape.item_bytes
    hidden_bytes = int(shard_tokens * shape.hidden_size * item)
    units = [Unit(key="trunk", stage="trunk", is_persistent=True, layer=-1, cost=1.0)]
    units += [_embed_unit(shape, s, shard_tokens) for s in shards]
    # Later groups' routers wait for the inputs that they will have.
    handed = shape.groups[:1] if calibration.is_sequential else shape.groups
    block_flops = shape.block_flops(calibration.seqlen)
    attention_flops = shape.attention_flops(calibration.seqlen)
    run = config
    for i in range(shape.num_layers):
        config = run.at(i)
        ranges = expert_ranges(config.routing.num_clusters, config.experts_per_unit)
        where = f"layer-{i:03d}"
        affinity = [f"{where}/shard-{s:03d}" for s in shards]
        entered: list[str] = []
        for s in shards:
            if i == 0:
                before = f"embed/shard-{s:03d}"
            else:
                stage = "advance" if compressed else "capture"
                before = f"layer-{i - 1:03d}/{stage}/shard-{s:03d}"
            entered.append(before)
            units.append(
                _capture_unit(
                    config,
                    shape,
                    i,
                    s,
                    after=before,
                    is_persistent=not compressed and i + 1 < shape.num_layers,
                    outputs=tuple(group.name for group in handed),
                    output_bytes=int(
                        fit_tokens / len(shards) * sum(group.width for group in handed) * item
                    ),
                )
            )
        made: list[str] = []
        for g, group in enumerate(shape.groups):
            at = f"{where}/{group.name}"
            paired = calibration.is_paired(g)
            seen_in = f"{at}/recapture" if paired else f"{where}/capture"
            if paired:
                units += [
                    Unit(
                        key=f"{seen_in}/shard-{s:03d}",
                        stage="recapture",
                        params={"layer": i, "shard": s, "group": group.name, "experts": ranges},
                        after=(*made, f"{where}/capture/shard-{s:03d}"),
                        outputs=(group.name,),
                        affinity=affinity[s],
                        layer=i,
                        rank=0,
                        cost=shard_tokens * 2.0 * sum(each.weights for each in shape.groups[:g]),
                        move_cost=shard_tokens * block_flops,
                        cache_bytes=int(shard_tokens * group.width * item),
                        output_bytes=int(fit_tokens / len(shards) * group.width * item),
                        traffic_bytes=2 * hidden_bytes + int(shard_tokens * group.width * item),
                    )
                    for s in shards
                ]
            units.append(
                Unit(
                    key=f"{at}/router",
                    stage="router",
                    params={
                        "layer": i,
                        "group": group.name,
                        "seed": calibration.seed + i * len(shape.groups) + g,
                    },
                    inputs=tuple((f"{seen_in}/shard-{s:03d}", group.name) for s in shards),
                    outputs=("gram",),
                    is_persistent=True,
                    layer=i,
                    rank=1,
                    output_bytes=4 * group.width**2,
                    traffic_bytes=int(fit_tokens * group.width * item) + 4 * group.width**2,
                    cost=router_flops(config, group.width, fit_tokens),
                )
            )
            expected = shard_tokens / config.routing.num_clusters
            summed = hands_on_sums(config, group.width, item)
            moved = gathered_bytes(config, group.width, item, paired=paired)
            hessian = expected * group.width**2 * (3 if paired else 1)
            source: dict[tuple[int, int], str] = {}
            for part in gathered_ranges(ranges, moved, len(shards)):
                first, last = part[0][0], part[-1][1]
                count = last - first + 1
                name = f"gather-{first:03d}-{last:03d}"
                source |= dict.fromkeys(part, f"{at}/{name}")
                for s in shards:
                    units.append(
                        Unit(
                            key=f"{at}/{name}/shard-{s:03d}",
                            stage="gather",
                            params={
                                "layer": i,
                                "shard": s,
                                "group": group.name,
                                "ranges": part,
                                "summed": summed,
                                **({"recaptured": ranges} if paired else {}),
                            },
                            after=(f"{at}/router", f"{seen_in}/shard-{s:03d}"),
                            outputs=tuple(range_name(experts) for experts in part),
                            affinity=affinity[s],
                            layer=i,
                            rank=4,
                            cost=count
                            * (
                                expected * routing_flops(config, group.width)
                                + (hessian if summed else 0.0)
                            ),
                            move_cost=shard_tokens * block_flops,
                            output_bytes=count * moved,
                            traffic_bytes=int(shard_tokens * group.width * item) + count * moved,
                        )
                    )
            for experts in ranges:
                count = experts[1] - experts[0] + 1
                parts = [(f"{source[experts]}/shard-{s:03d}", range_name(experts)) for s in shards]
                level = 0
                while summed and len(parts) > REDUCE_FAN_IN:
                    merged: list[tuple[str, str]] = []
                    for first in range(0, len(parts), REDUCE_FAN_IN):
                        key = f"{at}/reduce-{range_name(experts)}/{level}-{len(merged):03d}"
                        taken = parts[first : first + REDUCE_FAN_IN]
                        units.append(
                            Unit(
                                key=key,
                                stage="reduce",
                                inputs=tuple(taken),
                                outputs=("inputs",),
                                layer=i,
                                rank=3,
                                cost=float(len(taken) * count * group.width**2),
                                output_bytes=count * moved,
                                traffic_bytes=(len(taken) + 1) * count * moved,
                            )
                        )
                        merged.append((key, "inputs"))
                    parts = merged
                    level += 1
                units.append(
                    Unit(
                        key=f"{at}/experts-{range_name(experts)}",
                        stage="experts",
                        params={"layer": i, "group": group.name, "experts": experts},
                        inputs=((f"{at}/router", "gram"), *parts),
                        is_persistent=True,
                        layer=i,
                        # Before further gathering: experts consume what fills memory.
                        rank=2,
                        cost=count
                        * experts_flops(
                            group,
                            config.compression,
                            0.0 if summed else expected * len(shards),
                            paired=paired,
                        ),
                        traffic_bytes=count * (len(parts) * moved + expert_bytes(config, group)),
                    )
                )
            made += [f"{at}/router", *(f"{at}/experts-{range_name(part)}" for part in ranges)]
        if config.refines:
            units.append(_refine_unit(config, shape, i, ranges, after=[*entered, *made]))
            made = [units[-1].key]
        if compressed and i + 1 < shape.num_layers:
            for s in shards:
                units.append(
                    Unit(
                        key=f"{where}/advance/shard-{s:03d}",
                        stage="advance",
                        params={"layer": i, "shard": s, "experts": ranges},
                        after=(*made, f"{where}/capture/shard-{s:03d}"),
                        is_persistent=True,
                        affinity=affinity[s],
                        layer=i,
                        rank=5,
                        cost=shard_tokens * (block_flops - attention_flops),
                        move_cost=shard_tokens * attention_flops,
                        traffic_bytes=2 * hidden_bytes
                        + config.routing.num_clusters
                        * sum(packed_bytes(config, group, item) for group in shape.groups),
                    )
                )
    return units


def _refine_unit(
    config: RunConfig,
    shape: ModelShape,
    layer: int,
    ranges: list[tuple[int, int]],
    *,
    after: list[str],
) -> Unit:
    calibration = config.calibration
    tokens = calibration.dataset_size * calibration.seqlen
    return Unit(
        key=f"layer-{layer:03d}/refine",
        stage="refine",
        params={"layer": layer, "experts": ranges, "seed": calibration.seed + 1000 * (layer + 1)},
        after=tuple(after),
        is_persistent=True,
        layer=layer,
        rank=4,
        cost=refine_flops(config, shape),
        traffic_bytes=int(
            config.refinement.finetune * tokens * shape.hidden_size * shape.item_bytes
            # A draft and what replaces it.
            + 2
            * config.routing.num_clusters
            * sum(packed_bytes(config, group, shape.item_bytes) for group in shape.groups)
        ),
    )


def refine_flops(config: RunConfig, shape: ModelShape) -> float:
    """Operations to train a block: the dense one forward, the expanded one forward and back."""
    calibration = config.calibration
    tokens = calibration.dataset_size * calibration.seqlen
    return 4.0 * config.refinement.finetune * tokens * shape.block_flops(calibration.seqlen)


def _dense_pass(config: RunConfig, shape: ModelShape, last_layer: int) -> list[Unit]:
    """The embedding, and the captures of all blocks up to one: all windows are one shard."""
    tokens = config.calibration.dataset_size * config.calibration.seqlen
    units = [_embed_unit(shape, 0, tokens)]
    for i in range(last_layer + 1):
        is_persistent = i + 1 < shape.num_layers
        after = units[-1].key
        units.append(_capture_unit(config, shape, i, 0, after=after, is_persistent=is_persistent))
    return units


def cluster_units(
    config: RunConfig,
    shape: ModelShape,
    *,
    layers: Sequence[int],
    linears: dict[str, str],
    clusters: Sequence[int],
    calibration_tokens: int,
    neurons: Sequence[int] = (),
    clusterings: Sequence[str] = CLUSTERINGS,
) -> list[Unit]:
    """Units that try numbers of clusters on linears of some blocks.

    Args:
        config: of the windows (``dense`` inputs, one data shard), pruning and routing.
        shape: of the dense model.
        layers: of the blocks.
        linears: the group of every linear.
        clusters: numbers of clusters.
        calibration_tokens: the first of the windows' tokens; the others are held out.
        neurons: whose outputs are kept.
        clusterings: of ``CLUSTERINGS``.
    """
    units = _dense_pass(config, shape, max(layers))
    captures = units[1:]
    tokens = config.calibration.dataset_size * config.calibration.seqlen
    shapes = {group.name: group for group in shape.groups}
    for layer in layers:
        for linear, group in linears.items():
            for count in clusters:
                sweeps = experts_flops(shapes[group], config.compression, 0.0) * count
                units.append(
                    Unit(
                        key=f"layer-{layer:03d}/{linear}/clusters-{count:04d}",
                        stage="clusters",
                        params={
                            "layer": layer,
                            "linear": linear,
                            "group": group,
                            "num_clusters": count,
                            "calibration_tokens": calibration_tokens,
                            "neurons_kept": list(neurons),
                            "seed": config.calibration.seed,
                            "clusterings": list(clusterings),
                        },
                        after=(captures[layer].key,),
                        is_persistent=True,
                        affinity=captures[layer].affinity,
                        layer=layer,
                        rank=1,
                        cost=len(clusterings) * (sweeps + tokens * float(shapes[group].width) ** 2),
                        move_cost=captures[layer].cost,
                    )
                )
    return units


def pruning_units(
    config: RunConfig, shape: ModelShape, *, rankings: Sequence[str], shares: Sequence[float]
) -> list[Unit]:
    """Units that prune the first neurons of every ranking, in every block.

    Args:
        config: of the windows (``dense`` inputs, one data shard), and of pruning.
        shape: of the dense model.
        rankings: of ``neurons.RANKINGS``.
        shares: of the neurons of every linear.
    """
    tokens = config.calibration.dataset_size * config.calibration.seqlen
    units = _dense_pass(config, shape, shape.num_layers - 1)
    for i, capture in enumerate(units[1:]):
        for g, group in enumerate(shape.groups):
            units.append(
                Unit(
                    key=f"layer-{i:03d}/{group.name}/prune-neurons",
                    stage="prune_neurons",
                    params={
                        "layer": i,
                        "group": group.name,
                        "rankings": list(rankings),
                        "shares": list(shares),
                        "seed": config.calibration.seed + 1000 * i + 100 * g,
                    },
                    after=(capture.key,),
                    is_persistent=True,
                    affinity=capture.affinity,
                    layer=i,
                    rank=1,
                    cost=tokens * group.rows * (2.0 * group.width + SORT_FLOPS)
                    + experts_flops(group, config.compression, tokens),
                    move_cost=capture.cost,
                )
            )
    return units


def block_gap_units(
    config: RunConfig,
    shape: ModelShape,
    pruned: list[list[int]],
    scored: list[list[int]],
    *,
    num_ranges: int,
) -> list[Unit]:
    """Units that score windows with one block pruned at a time, for a range of blocks each."""
    num_ranges = max(1, min(num_ranges, shape.num_layers))
    bounds = [shape.num_layers * r // num_ranges for r in range(num_ranges + 1)]
    return [
        Unit(
            key=f"block-gaps/{range_name((first, end - 1))}",
            stage="block_gaps",
            params={"pruned": pruned, "scored": scored, "layers": (first, end - 1)},
            rank=r,
            cost=block_gap_flops(config, shape, (first, end - 1), len(pruned), len(scored)),
        )
        for r, (first, end) in enumerate(itertools.pairwise(bounds))
    ]


def block_gap_flops(
    config: RunConfig, shape: ModelShape, layers: tuple[int, int], pruned: int, scored: int
) -> float:
    """Operations of such a unit, for so many windows."""
    seqlen = config.calibration.seqlen
    first, last = layers
    # The dense stream, and every pruned block's from that block on.
    passes = shape.num_layers + sum(shape.num_layers - i for i in range(first, last + 1))
    windows = scored * passes + pruned * (last + 1)
    plain = dataclasses.replace(config.compression, pruner="sparsegpt", bits=None)
    sweeps = sum(experts_flops(group, plain, float(pruned * seqlen)) for group in shape.groups)
    return windows * seqlen * shape.block_flops(seqlen) + (last - first + 1) * sweeps


def analysis_units(config: RunConfig, shape: ModelShape, models: dict[str, str]) -> list[Unit]:
    """Units that describe every neuron on the dense model's own activations, in one pass.

    All windows are one shard: a neuron's distribution needs all of its outputs at once.

    Args:
        config: of the windows (``dense`` inputs, one data shard).
        shape: of the dense model.
        models: names and folders of expanded models to compare with.
    """
    tokens = config.calibration.dataset_size * config.calibration.seqlen
    units = _dense_pass(config, shape, shape.num_layers - 1)
    for i, capture in enumerate(units[1:]):
        for g, group in enumerate(shape.groups):
            outputs = tokens * group.rows
            units.append(
                Unit(
                    key=f"layer-{i:03d}/{group.name}/neurons",
                    stage="neurons",
                    params={
                        "layer": i,
                        "group": group.name,
                        "models": models,
                        "seed": config.calibration.seed + i * len(shape.groups) + g,
                    },
                    after=(capture.key,),
                    is_persistent=True,
                    affinity=capture.affinity,
                    layer=i,
                    rank=1,
                    # A product, and sorting, for every model.
                    cost=outputs * (2.0 * group.width + SORT_FLOPS) * (1 + len(models)),
                    move_cost=capture.cost,
                    traffic_bytes=8 * outputs * (1 + len(models)),
                )
            )
    return units


def evaluation_units(
    model: str,
    windows: list[list[int]],
    *,
    num_layers: int,
    num_shards: int = 1,
    num_ranges: int = 1,
    flops_per_token: float = 1.0,
    model_bytes: float = 0.0,
    pruned: str | None = None,
) -> list[Unit]:
    """Units that score windows: shards of windows, each through ranges of blocks in turn.

    One range is data-parallel evaluation; several are a pipeline for a model that no worker
    should read whole. ``pruned`` names the pruned neurons to put in place of the dense ones.
    """
    name = model if pruned is None else f"{model}-{pruned}"
    num_shards = max(1, min(num_shards, len(windows)))
    num_ranges = max(1, min(num_ranges, num_layers))
    bounds = [num_layers * r // num_ranges for r in range(num_ranges + 1)]
    cuts = [len(windows) * s // num_shards for s in range(num_shards + 1)]
    units = []
    for s in range(num_shards):
        part = windows[cuts[s] : cuts[s + 1]]
        for r in range(num_ranges):
            last = r + 1 == num_ranges
            units.append(
                Unit(
                    key=f"evaluate-{name}/shard-{s:03d}/blocks-{r:03d}",
                    stage="evaluate",
                    params={
                        "model": model,
                        "tokens": part,
                        "layers": (bounds[r], bounds[r + 1] - 1),
                        **({} if pruned is None else {"pruned": pruned}),
                    },
                    inputs=(
                        ()
                        if r == 0
                        else ((f"evaluate-{name}/shard-{s:03d}/blocks-{r - 1:03d}", "hidden"),)
                    ),
                    outputs=() if last else ("hidden",),
                    affinity=f"evaluate-{name}/blocks-{r:03d}" if num_ranges > 1 else None,
                    layer=s,
                    rank=r,
                    cost=flops_per_token * sum(map(len, part)) / num_ranges,
                    traffic_bytes=int(model_bytes / num_ranges),
                )
            )
    return units


def final_stages(units: Iterable[Unit]) -> set[str]:
    """Stages whose files are the result: experts that are trained afterwards are drafts."""
    stages = {unit.stage for unit in units}
    return {"trunk", "router", "neurons", "refine" if "refine" in stages else "experts"}


def needed_units(units: Iterable[Unit], is_committed: Callable[[Unit], bool]) -> list[Unit]:
    """The units still to be done, in the given order.

    A finished unit with files is left out unless a value it hands on (which is not on disk) is
    needed; hidden states between finished blocks are not made again.
    """
    by_key = {unit.key: unit for unit in units}
    committed: dict[str, bool] = {}

    def done(unit: Unit) -> bool:
        if unit.key not in committed:
            committed[unit.key] = unit.is_persistent and is_committed(unit)
        return committed[unit.key]

    consumed = {key for unit in by_key.values() for key, _ in unit.inputs}
    consumed |= {key for unit in by_key.values() for key in unit.after}
    final = final_stages(by_key.values())
    goals = [unit for unit in by_key.values() if unit.stage in final or unit.key not in consumed]
    needed: set[str] = set()
    stack = [unit.key for unit in goals if not done(unit)]
    while stack:
        key = stack.pop()
        if key in needed:
            continue
        needed.add(key)
        unit = by_key[key]
        stack += [source for source, _ in unit.inputs]
        for source in unit.after:
            other = by_key[source]
            if other.is_persistent and not done(other):
                stack.append(source)
            elif not other.is_persistent:
                stack.append(source)
    return [unit for unit in by_key.values() if unit.key in needed]
