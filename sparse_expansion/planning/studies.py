"""Units of studies on a dense model: numbers of clusters, pruned neurons, neurons' outputs.

All calibration windows are one shard: a neuron's distribution needs all of its outputs at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_expansion.config import CLUSTERINGS, RunConfig
from sparse_expansion.planning.costs import SORT_FLOPS, experts_flops
from sparse_expansion.planning.forward import capture_unit, embed_unit
from sparse_expansion.planning.shapes import ModelShape
from sparse_expansion.run_files import clusters_key, neurons_key, prune_neurons_key
from sparse_expansion.units import Unit
from sparse_expansion.work.stages import study


def dense_pass(config: RunConfig, shape: ModelShape, last_layer: int) -> list[Unit]:
    """The embedding, and the captures of all blocks up to one, of all windows as one shard.

    Raises:
        ValueError: see ``check_no_mixture``.
    """
    check_no_mixture(shape)
    units = [embed_unit(config, shape, 0)]
    for layer in range(last_layer + 1):
        is_persistent = layer + 1 < shape.num_layers
        after = units[-1].key
        units.append(
            capture_unit(config, shape, layer, 0, after=after, is_persistent=is_persistent)
        )
    return units


def check_no_mixture(shape: ModelShape) -> None:
    """Answer a model whose neurons see some tokens each.

    Raises:
        ValueError: it has mixtures of experts.
    """
    if any(group.tokens_share < 1 for kind in shape.kinds for group in kind.groups):
        raise ValueError(
            "the model is a mixture of experts: studies of single neurons and of numbers of "
            "clusters are of linears that all tokens pass through; expand it, or look at "
            "another model"
        )


def _reading(capture: Unit) -> dict[str, Any]:
    """Fields of the units that read a block's captured inputs, and write files."""
    return {
        "after": (capture.key,),
        "is_persistent": True,
        "affinity": capture.affinity,
        "layer": capture.layer,
        "rank": 1,
        "move_cost": capture.cost,
    }


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
        layers: numbers of the blocks.
        linears: name of every linear, and of its linear group.
        clusters: numbers of clusters.
        calibration_tokens: number of the windows' first tokens, on which experts are made; the
            others are held out.
        neurons: numbers of the neurons whose outputs are kept.
        clusterings: of ``CLUSTERINGS``.
    """
    units = dense_pass(config, shape, max(layers))
    captures = units[1:]
    tokens = config.calibration.num_tokens
    shapes = {group.name: group for group in shape.groups}
    for layer in layers:
        for linear, group in linears.items():
            for count in clusters:
                sweeps = experts_flops(shapes[group], config.compression, 0.0) * count
                units.append(
                    study.clusters.unit(
                        key=clusters_key(layer, linear, count),
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
                        cost=len(clusterings) * (sweeps + tokens * float(shapes[group].width) ** 2),
                        **_reading(captures[layer]),
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
        shares: shares of the neurons of every linear, 0 to 1.
    """
    tokens = config.calibration.num_tokens
    units = dense_pass(config, shape, shape.num_layers - 1)
    for layer, capture in enumerate(units[1:]):
        for position, group in enumerate(shape.groups):
            units.append(
                study.prune_neurons.unit(
                    key=prune_neurons_key(layer, group.name),
                    params={
                        "layer": layer,
                        "group": group.name,
                        "rankings": list(rankings),
                        "shares": list(shares),
                        "seed": config.calibration.seed + 1000 * layer + 100 * position,
                    },
                    cost=tokens * group.rows * (2.0 * group.width + SORT_FLOPS)
                    + experts_flops(group, config.compression, tokens),
                    **_reading(capture),
                )
            )
    return units


def analysis_units(config: RunConfig, shape: ModelShape, models: dict[str, str]) -> list[Unit]:
    """Units that describe every neuron on the dense model's own activations, in one pass.

    Args:
        config: of the windows (``dense`` inputs, one data shard).
        shape: of the dense model.
        models: names and folders of expanded models to compare with.
    """
    tokens = config.calibration.num_tokens
    units = dense_pass(config, shape, shape.num_layers - 1)
    for layer, capture in enumerate(units[1:]):
        for position, group in enumerate(shape.groups):
            outputs = tokens * group.rows
            units.append(
                study.neurons.unit(
                    key=neurons_key(layer, group.name),
                    params={
                        "layer": layer,
                        "group": group.name,
                        "models": models,
                        "seed": config.calibration.seed + layer * len(shape.groups) + position,
                    },
                    # Every model takes a product, and sorting.
                    cost=outputs * (2.0 * group.width + SORT_FLOPS) * (1 + len(models)),
                    **_reading(capture),
                    traffic_bytes=8 * outputs * (1 + len(models)),
                )
            )
    return units
