"""Names of a run's files and of its units, made here and read back here."""

from __future__ import annotations

import re
from dataclasses import dataclass

RUN_FILE = "run/run.json"
"""What the folder was claimed for: settings, model, weights, calibration tokens."""
UNITS = "run/units"
"""Folder of the markers of finished units."""
ALLOCATION_FILE = "run/allocation.json"
"""What every block lost when it alone was pruned, and its share of zeros."""
METRICS_FILE = "metrics.json"
SETTINGS_FILE = "run.yaml"
"""What was asked for, in a form by which it can be asked for again."""
COMMAND_FILE = "run/command.json"
TIMELINE_FILE = "run/timeline.json"
CALIBRATION = "run/calibration"
"""Folder of the calibration windows, a file per shard."""
HIDDEN = "run/hidden/"
"""Folder of the hidden states that enter blocks."""
DRAFTS = "run/drafts/"
"""Folder of experts that are still to be trained."""

IN_MEMORY = "<in memory>"
"""What results call a text or a model that lies in no file."""

TRUNK_KEY = "trunk"
"""Key of the unit that copies what is neither expert nor router."""

ExpertRange = tuple[int, int]
"""First and last expert of a unit."""


def foreign_output(root: str) -> ValueError:
    """The error that an output folder has files of something else than a run."""
    return ValueError(f"--output {root} is not empty and holds no run: choose another folder")


def block_key(layer: int) -> str:
    """What the keys of a block's units begin with: ``layer-003``."""
    return f"layer-{layer:03d}"


def group_key(layer: int, group: str) -> str:
    """What the keys of a linear group's units begin with: ``layer-003/mlp.down_proj``."""
    return f"{block_key(layer)}/{group}"


def shard_name(shard: int) -> str:
    """How the keys of one shard's units end: ``shard-002``."""
    return f"shard-{shard:03d}"


def router_key(layer: int, group: str) -> str:
    """Key of the unit that fits a group's router."""
    return f"{group_key(layer, group)}/router"


def experts_key(layer: int, group: str, experts: ExpertRange) -> str:
    """Key of the unit that makes a range of a group's experts."""
    return f"{group_key(layer, group)}/experts-{range_name(experts)}"


def embed_key(shard: int) -> str:
    """Key of the unit that embeds one shard of the windows."""
    return f"embed/{shard_name(shard)}"


def shard_affinity(layer: int, shard: int) -> str:
    """Affinity of the units that work on one shard's captured inputs of a block."""
    return f"{block_key(layer)}/{shard_name(shard)}"


def capture_key(layer: int, shard: int) -> str:
    """Key of the unit that captures one shard's inputs of a block's linears."""
    return f"{block_key(layer)}/capture/{shard_name(shard)}"


def weigh_key(layer: int, group: str, shard: int) -> str:
    """Key of the unit that measures on a shard how much the block depends on a group's outputs."""
    return f"{group_key(layer, group)}/weigh/{shard_name(shard)}"


def shares_key(layer: int, group: str) -> str:
    """Key of the unit that shares out zeros over a group's experts."""
    return f"{group_key(layer, group)}/shares"


def recapture_key(layer: int, group: str, shard: int) -> str:
    """Key of the unit that captures a group's inputs behind compressed linears of its block."""
    return f"{group_key(layer, group)}/recapture/{shard_name(shard)}"


def gather_key(layer: int, group: str, experts: ExpertRange, shard: int) -> str:
    """Key of the unit that gathers one shard's inputs of a span of experts."""
    return f"{group_key(layer, group)}/gather-{range_name(experts)}/{shard_name(shard)}"


def reduce_key(layer: int, group: str, experts: ExpertRange, level: int, position: int) -> str:
    """Key of a unit that adds up Hessian sums: its level in the tree, and its place there."""
    return f"{group_key(layer, group)}/reduce-{range_name(experts)}/{level}-{position:03d}"


def refine_key(layer: int) -> str:
    """Key of the unit that trains a block's experts."""
    return f"{block_key(layer)}/refine"


def advance_key(layer: int, shard: int) -> str:
    """Key of the unit that takes one shard's hidden states through a compressed block."""
    return f"{block_key(layer)}/advance/{shard_name(shard)}"


def neurons_key(layer: int, group: str) -> str:
    """Key of the unit that describes a group's neurons."""
    return f"{group_key(layer, group)}/neurons"


def prune_neurons_key(layer: int, group: str) -> str:
    """Key of the unit that prunes a group's first neurons of every ranking."""
    return f"{group_key(layer, group)}/prune-neurons"


def clusters_key(layer: int, linear: str, num_clusters: int) -> str:
    """Key of the unit that tries one number of clusters on a linear."""
    return f"{group_key(layer, linear)}/clusters-{num_clusters:04d}"


def block_gaps_key(layers: tuple[int, int]) -> str:
    """Key of the unit that scores windows with one block pruned at a time, first to last."""
    return f"block-gaps/{range_name(layers)}"


def evaluate_key(name: str, shard: int, blocks: int) -> str:
    """Key of the unit that scores one shard of windows through one range of a model's blocks."""
    return f"evaluate-{name}/{shard_name(shard)}/blocks-{blocks:03d}"


def evaluate_affinity(name: str, blocks: int) -> str:
    """Affinity of the units that share one range of a model's blocks."""
    return f"evaluate-{name}/blocks-{blocks:03d}"


@dataclass(frozen=True)
class ExpertsKey:
    """What the key of a unit of experts says."""

    layer: int
    group: str
    experts: ExpertRange


def parse_experts_key(key: str) -> ExpertsKey | None:
    """The inverse of ``experts_key``; None for the key of another unit."""
    found = re.fullmatch(r"layer-(\d+)/([^/]+)/experts-(\d+)-(\d+)", key)
    if found is None:
        return None
    layer, group, first, last = found.groups()
    return ExpertsKey(int(layer), group, (int(first), int(last)))


def windows_file(shard: int) -> str:
    """File of one shard's calibration windows."""
    return f"{CALIBRATION}/{shard_name(shard)}.safetensors"


def router_file(layer: int, group: str) -> str:
    """File of a group's router (and grids)."""
    return f"router-{layer:03d}-{group}.safetensors"


def shares_file(layer: int, group: str) -> str:
    """File of the shares of zeros of a group's experts: a part of its router."""
    return f"router-{layer:03d}-{group}-shares.safetensors"


def range_name(experts: ExpertRange) -> str:
    """A range of experts, as ``000-003``."""
    return f"{experts[0]:03d}-{experts[1]:03d}"


def trunk_file(number: int) -> str:
    """One of the files of what is neither expert nor router."""
    return f"trunk-{number:05d}.safetensors"


def experts_file(layer: int, group: str, experts: ExpertRange, *, is_draft: bool = False) -> str:
    """File of a range of a group's experts; drafts are trained before they are final."""
    start = block_scratch_files(layer)[1] if is_draft else f"experts-{layer:03d}-"
    return f"{start}{group}-{range_name(experts)}.safetensors"


def parse_weight_file(name: str) -> str | None:
    """The part of an expanded model that a weight file holds; None for another file.

    Returns:
        ``trunk``, ``router`` or ``experts``.
    """
    found = re.fullmatch(r"(trunk|router|experts)-\d+.*\.safetensors", name)
    return None if found is None else found[1]


def neurons_file(layer: int, group: str) -> str:
    """File of what is known of a group's neurons."""
    return f"neurons-{layer:03d}-{group}.safetensors"


def clusters_file(layer: int, linear: str, num_clusters: int) -> str:
    """File of what one number of clusters did to a linear."""
    return f"clusters-{layer:03d}-{linear}-{num_clusters:04d}.safetensors"


def pruned_file(layer: int, group: str) -> str:
    """File of a group's pruned neurons."""
    return f"pruned-{layer:03d}-{group}.safetensors"


def pruned_name(ranking: str, share: float) -> str:
    """Name of a model whose neurons are pruned that a ranking puts first."""
    return f"{ranking}-{share:g}"


def block_scratch_files(layer: int) -> tuple[str, str]:
    """How the names of a block's hidden states and drafts begin; they go when it is finished."""
    return f"{HIDDEN}{block_key(layer)}-", f"{DRAFTS}experts-{layer:03d}-"


def dense_hidden_file(layer: int, shard: int) -> str:
    """File of one shard's hidden states before a block of the dense model."""
    return f"{block_scratch_files(layer)[0]}dense-{shard_name(shard)}.safetensors"


def hidden_file(layer: int, shard: int) -> str:
    """File of one shard's hidden states before a block."""
    return f"{block_scratch_files(layer)[0]}{shard_name(shard)}.safetensors"
