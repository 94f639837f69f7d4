"""The settings of a run: frozen, checked on construction, and digested for resuming.

Only the standard library is imported here, so that a bad flag is answered
before PyTorch is even loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

UNIFORM, MEASURED = "uniform", "measured"
ALLOCATIONS = (UNIFORM, MEASURED)
"""Ways to share out zeros over the blocks, beside a list of shares."""
CALIBRATION_INPUTS = ("compressed", "sequential", "dense")
CLUSTERINGS = ("kmeans", "random")
PRUNERS = ("sparsegpt", "admm", "wanda", "magnitude")
RANKINGS = ("wasserstein", "mean", "variance", "magnitude", "random")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SHARD_TOKENS = 131_072


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_layers(name: str, values: tuple[float, ...], num_layers: int) -> None:
    _require(
        len(values) in (0, num_layers),
        f"{name} is of {len(values)} blocks, the model has {num_layers}: make it for this model",
    )


@dataclass(frozen=True, kw_only=True)
class SparsityPattern:
    """Which share of a weight is set to zero, and in what shape.

    Either ``fraction`` of every sweep block (unstructured), or ``pruned`` of every
    ``group`` consecutive input columns of each row (N:M). N counts the weights that are
    *removed*, as in SparseGPT's ``prunen``/``prunem``: 1:4 leaves three of four.
    """

    fraction: float
    """Share of zeros, 0 to 1."""
    pruned: int | None = None
    """N of N:M, None when unstructured."""
    group: int | None = None
    """M of N:M, None when unstructured."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.group is None or self.pruned is None:
            _require(
                math.isfinite(self.fraction) and 0.0 <= self.fraction <= 1.0,
                f"sparsity {self.fraction} is outside 0 to 1: give the share of zeros, e.g. 0.5, "
                "or N:M, e.g. 2:4",
            )
        else:
            _require(
                self.group >= 1 and 0 <= self.pruned <= self.group,
                f"sparsity {self.pruned}:{self.group} needs 0 <= N <= M and M >= 1: "
                "N of every M weights are removed, e.g. 2:4",
            )

    @classmethod
    def parse(cls, text: str) -> SparsityPattern:
        """Read ``0.5``, ``2:4`` or ``(2, 4)``.

        Raises:
            ValueError: the text is none of these, or out of bounds.
        """
        match = re.fullmatch(r"\s*\(?\s*(\d+)\s*[:,]\s*(\d+)\s*\)?\s*", text)
        if match:
            pruned, group = int(match[1]), int(match[2])
            _require(group >= 1, f"sparsity {text!r}: M must be at least 1, e.g. 2:4")
            return cls(fraction=pruned / group, pruned=pruned, group=group)
        try:
            fraction = float(text)
        except ValueError:
            raise ValueError(
                f"sparsity {text!r} is neither a share of zeros (0.5) nor N:M (2:4 or '(2, 4)')"
            ) from None
        return cls(fraction=fraction)

    def num_pruned(self, numel: int) -> int:
        """Exact number of zeros in an unstructured block of ``numel`` weights."""
        return math.floor(self.fraction * numel + 0.5)

    def num_kept(self, rows: int, columns: int, block_size: int) -> int:
        """Exact number of weights left in a ``rows`` x ``columns`` matrix."""
        if self.group is not None and self.pruned is not None:
            full, rest = divmod(columns, self.group)
            # A last, shorter group loses its proportional share, rounded down.
            return rows * (columns - full * self.pruned - rest * self.pruned // self.group)
        kept = 0
        for start in range(0, columns, block_size):
            numel = rows * min(block_size, columns - start)
            kept += numel - self.num_pruned(numel)
        return kept

    def __str__(self) -> str:
        if self.group is not None:
            return f"{self.pruned}:{self.group}"
        return f"{self.fraction:g}"


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """How one expert's weight is pruned and quantized."""

    sparsity: SparsityPattern = field(default_factory=lambda: SparsityPattern(fraction=0.5))
    """Share and shape of the zeros."""
    layer_sparsity: str | tuple[float, ...] = UNIFORM
    """``uniform``: every block has the same share of zeros; ``measured``: an unstructured run first
    finds shares by what each block loses when it alone is pruned; or the share of every block, with
    the sparsity's as their mean."""
    pruner: str = "sparsegpt"
    """``sparsegpt``: the column sweep, which makes up for what it removes; ``admm``: mask and
    weights solved for together, and the sweep rounds; ``wanda`` and ``magnitude`` choose by a
    score of the dense weights and leave the kept ones as they are."""
    solver_iterations: int = 12
    """Of ``admm``."""
    bits: int | None = None
    """Bits per kept weight (2 to 8), None for no quantization."""
    symmetric: bool = False
    """Symmetric grid (zero point in the middle) instead of an asymmetric one."""
    group_size: int | None = None
    """Input columns that share a scale, None for one scale per output row."""
    act_order: bool = False
    """Sweep columns by falling Hessian diagonal; groups stay where they were (static)."""
    block_size: int = 128
    """Columns per lazy block of the sweep."""
    damping_fraction: float = 0.01
    """Share of the mean Hessian diagonal that is added to the diagonal."""
    min_tokens_per_expert: int | None = None
    """Below this many tokens an expert uses the whole group's Hessian; None is auto (an eighth of
    the input width; 1 with ``shrink_hessians``)."""
    shrink_hessians: bool = False
    """Whether experts' Hessians are drawn towards the group's, by what their tokens leave
    uncertain."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        _require(
            self.bits is None or 2 <= self.bits <= 8,
            f"bits {self.bits} is outside 2 to 8: use --bits 4, or leave --quantize away",
        )
        _require(self.block_size >= 1, f"block_size {self.block_size} must be at least 1, e.g. 128")
        _require(
            math.isfinite(self.damping_fraction) and 0 < self.damping_fraction <= 10,
            f"damping_fraction {self.damping_fraction} is outside 0 to 10, e.g. 0.01",
        )
        _require(
            self.group_size is None or self.group_size >= 1,
            f"group_size {self.group_size} must be at least 1, e.g. 128",
        )
        _require(
            self.min_tokens_per_expert is None or self.min_tokens_per_expert >= 0,
            f"min_tokens_per_expert {self.min_tokens_per_expert} must not be negative",
        )
        _require(self.pruner in PRUNERS, f"pruner {self.pruner!r} is none of {', '.join(PRUNERS)}")
        _require(
            self.pruner in ("sparsegpt", "admm") or (self.bits is None and not self.act_order),
            f"pruner {self.pruner} leaves kept weights as they are: drop --quantize and "
            "--act-order, or use --pruner sparsegpt",
        )
        _require(
            1 <= self.solver_iterations <= 1000,
            f"solver_iterations {self.solver_iterations} is outside 1 to 1000, e.g. 12",
        )
        group = self.sparsity.group
        if self.layer_sparsity != UNIFORM:
            self._check_layer_sparsity()
        if group is not None:
            _require(
                self.block_size % group == 0,
                f"sparsity {self.sparsity}: M = {group} must divide block_size "
                f"{self.block_size}; use --block-size {max(1, self.block_size // group) * group}",
            )
            _require(
                not self.act_order,
                f"act_order reorders columns, which N:M sparsity {self.sparsity} forbids: "
                "drop one of the two",
            )

    def _check_layer_sparsity(self) -> None:
        _require(
            self.sparsity.group is None,
            f"layer_sparsity gives shares of zeros, {self.sparsity} is N:M: drop one of the two",
        )
        if isinstance(self.layer_sparsity, str):
            _require(
                self.layer_sparsity in ALLOCATIONS,
                f"layer_sparsity {self.layer_sparsity!r} is none of {', '.join(ALLOCATIONS)}",
            )
            return
        for share in self.layer_sparsity:
            _require(0 <= share <= 1, f"layer_sparsity {share} is outside 0 to 1")
        mean = sum(self.layer_sparsity) / len(self.layer_sparsity)
        _require(
            abs(mean - self.sparsity.fraction) < 1e-3,
            f"layer_sparsity has mean {mean:.4g}, sparsity is {self.sparsity}: use --sparsity "
            f"{mean:.4g}",
        )

    def check_layers(self, num_layers: int) -> None:
        """Answer a list of blocks' sparsities that is another model's.

        Raises:
            ValueError: it has another length.
        """
        _require_layers("layer_sparsity", self.shares, num_layers)

    def at(self, layer: int) -> CompressionConfig:
        """The settings of one block, by its number from 0."""
        if not self.shares:
            return self
        pattern = SparsityPattern(fraction=self.shares[layer])
        return dataclasses.replace(self, sparsity=pattern, layer_sparsity=UNIFORM)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of zeros of every block; empty where all are alike, or still to be measured."""
        return () if isinstance(self.layer_sparsity, str) else self.layer_sparsity

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressionConfig:
        """Read back what ``dataclasses.asdict`` gave, also through JSON."""
        given = dict(data)
        given["sparsity"] = SparsityPattern(**given["sparsity"])
        # Earlier runs had the way under a name of its own, and an empty list for no shares.
        way = given.pop("allocation", UNIFORM)
        shares = given.get("layer_sparsity", UNIFORM)
        given["layer_sparsity"] = shares if isinstance(shares, str) else tuple(shares) or way
        return cls(**given)

    def min_tokens(self, width: int) -> int:
        """Tokens below which an expert of ``width`` input features is starved."""
        if self.min_tokens_per_expert is not None:
            return self.min_tokens_per_expert
        return 1 if self.shrink_hessians else max(1, width // 8)


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How a linear group's inputs are clustered."""

    num_clusters: int = 16
    """K: clusters, and experts, per linear group."""
    layer_clusters: tuple[int, ...] = ()
    """K of every block, with ``num_clusters`` times the blocks as their sum at most; empty: all
    alike."""
    pca_reduction_factor: int | None = 32
    """PCA keeps ``width // factor`` components; None routes on the full input."""
    restarts: int = 4
    """KMeans runs from different seeds; the lowest inertia is kept."""
    max_iterations: int = 100
    """Lloyd iterations per restart at most."""
    fit_tokens: int = 65536
    """KMeans is fitted on at most this many calibration tokens (evenly spaced)."""
    clustering: str = "kmeans"
    """``kmeans``: experts are made on their own clusters; ``random``: a control, on random tokens,
    as many as the cluster has in each shard. Routers are the same."""
    balance: float = 0.0
    """Least tokens of a cluster, as a share of the mean cluster's: smaller ones are merged with
    their neighbours, and the largest split. 0 leaves clusters as KMeans found them."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        _require(
            1 <= self.num_clusters <= 4096,
            f"num_clusters {self.num_clusters} is outside 1 to 4096, e.g. 16",
        )
        if self.layer_clusters:
            _require(
                min(self.layer_clusters) >= 1 and max(self.layer_clusters) <= 4096,
                f"layer_clusters {self.layer_clusters} are not all within 1 to 4096",
            )
            mean = sum(self.layer_clusters) / len(self.layer_clusters)
            _require(
                mean <= self.num_clusters,
                f"layer_clusters have mean {mean:.4g}, num_clusters is {self.num_clusters}: use "
                f"--num_clusters {math.ceil(mean)}",
            )
        _require(
            self.pca_reduction_factor is None or self.pca_reduction_factor >= 1,
            f"PCA_reduction_factor {self.pca_reduction_factor} must be at least 1, e.g. 32",
        )
        _require(self.restarts >= 1, f"kmeans_restarts {self.restarts} must be at least 1, e.g. 4")
        _require(
            self.max_iterations >= 1,
            f"kmeans iterations {self.max_iterations} must be at least 1, e.g. 100",
        )
        _require(
            self.fit_tokens >= self.num_clusters,
            f"kmeans_tokens {self.fit_tokens} must be at least num_clusters {self.num_clusters}",
        )
        _require(
            0 <= self.balance <= 0.9,
            f"balance {self.balance} is outside 0 to 0.9: least share of the mean cluster's "
            "tokens, e.g. 0.25",
        )
        _require(
            self.clustering in CLUSTERINGS,
            f"clustering {self.clustering!r} is none of {', '.join(CLUSTERINGS)}",
        )

    @property
    def most_clusters(self) -> int:
        """K of the block that has the most."""
        return max(self.layer_clusters, default=self.num_clusters)

    def check_layers(self, num_layers: int) -> None:
        """Answer a list of blocks' clusters that is another model's.

        Raises:
            ValueError: it has another length.
        """
        _require_layers("layer_clusters", self.layer_clusters, num_layers)

    def at(self, layer: int) -> RoutingConfig:
        """The settings of one block, by its number from 0."""
        if not self.layer_clusters:
            return self
        return dataclasses.replace(self, num_clusters=self.layer_clusters[layer], layer_clusters=())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RoutingConfig:
        """Read back what ``dataclasses.asdict`` gave, also through JSON."""
        return cls(**{**data, "layer_clusters": tuple(data.get("layer_clusters", ()))})

    def num_components(self, width: int) -> int:
        """PCA components for inputs of ``width`` features (``width`` without PCA)."""
        if self.pca_reduction_factor is None:
            return width
        return max(1, width // self.pca_reduction_factor)


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What the experts are made on."""

    dataset: str = "wikitext2"
    """``wikitext2``, ``c4``, ``pydoc``, or a folder or file."""
    dataset_size: int = 128
    """Calibration windows."""
    whole_text: bool = False
    """Whether the windows are all those of the text, end to end, and ``dataset_size`` their number
    once the text is read; else they start at random places."""
    seqlen: int = 2048
    """Tokens per window."""
    seed: int = 0
    """Seed of the windows and of KMeans."""
    calibration_inputs: str = "compressed"
    """``compressed``: every block sees what the compressed blocks before it put out (the
    paper's); ``sequential``: and inside a block later linears see what compressed earlier ones put
    out, and make up for it; ``dense``: every block sees the dense model's activations."""
    data_shards: int | None = None
    """Shards of the windows, which are held one at a time: by default 4, and more where one would
    have over 131,072 tokens. Sums are merged in shard order, so the result depends on this number
    and never on the number of workers."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        _require(
            self.dataset_size >= 1,
            f"dataset_size {self.dataset_size} must be at least 1 window, e.g. 128",
        )
        _require(self.seqlen >= 2, f"seqlen {self.seqlen} must be at least 2 tokens, e.g. 2048")
        _require(0 <= self.seed < 2**32, f"seed {self.seed} is outside 0 to 2**32 - 1")
        _require(
            self.calibration_inputs in CALIBRATION_INPUTS,
            f"calibration_inputs {self.calibration_inputs!r} is none of "
            f"{', '.join(CALIBRATION_INPUTS)}",
        )
        _require(
            self.data_shards is None or self.data_shards >= 1,
            f"data_shards {self.data_shards} must be at least 1, e.g. 4",
        )

    @property
    def follows_compression(self) -> bool:
        """Whether a block waits for the compressed blocks before it."""
        return self.calibration_inputs != "dense"

    @property
    def is_sequential(self) -> bool:
        """Whether a block's later groups wait for the compressed groups before them."""
        return self.calibration_inputs == "sequential"

    def is_paired(self, group: int) -> bool:
        """Whether a block's group of this number has the dense block's inputs beside its own."""
        return self.is_sequential and group > 0

    @property
    def num_shards(self) -> int:
        """Shards in use: never more than there are windows."""
        shards = self.data_shards or max(4, math.ceil(self.num_tokens / SHARD_TOKENS))
        return min(shards, self.dataset_size)

    @property
    def num_tokens(self) -> int:
        """Of all windows."""
        return self.dataset_size * self.seqlen

    def windows_of(self, shard: int) -> int:
        """Windows of a shard: as ``Tensor.tensor_split`` deals them out."""
        return self.dataset_size // self.num_shards + (shard < self.dataset_size % self.num_shards)


@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """How a block's kept weights are trained once its experts are made."""

    finetune: int = 0
    """Passes over the calibration windows; 0 leaves the pruner's weights as they are."""
    finetune_rate: float = 2e-4
    """Adam's learning rate, at its highest."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        _require(
            0 <= self.finetune <= 1000,
            f"finetune {self.finetune} is outside 0 to 1000: passes over the windows, e.g. 2",
        )
        _require(
            math.isfinite(self.finetune_rate) and 0 < self.finetune_rate <= 1,
            f"finetune_rate {self.finetune_rate} is outside 0 to 1, e.g. 0.0002",
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RefinementConfig:
        """Read back what ``dataclasses.asdict`` gave, also under the names of earlier runs."""
        earlier = {"epochs": "finetune", "learning_rate": "finetune_rate"}
        return cls(**{earlier.get(name, name): value for name, value in data.items()})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes."""

    compression: CompressionConfig = field(default_factory=CompressionConfig)
    """Pruning and quantization."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """PCA and KMeans."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Calibration text and schedule."""
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    """Training of the kept weights."""
    dtype: str = "auto"
    """Storage and compute dtype; ``auto`` keeps the source's."""
    tf32: bool = False
    """Whether a GPU may round the factors of float32 products to TF32 (10 bits)."""
    experts_per_unit: int = 4
    """Experts that one unit of work makes and one file holds."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        _require(self.dtype in DTYPES, f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        _require(
            self.experts_per_unit >= 1,
            f"experts_per_unit {self.experts_per_unit} must be at least 1, e.g. 4",
        )

    def check_layers(self, num_layers: int) -> None:
        """Answer lists by block that are another model's.

        Raises:
            ValueError: one has another length.
        """
        self.compression.check_layers(num_layers)
        self.routing.check_layers(num_layers)

    def at(self, layer: int) -> RunConfig:
        """The settings of one block, by its number from 0."""
        return dataclasses.replace(
            self, compression=self.compression.at(layer), routing=self.routing.at(layer)
        )

    @property
    def refines(self) -> bool:
        """Whether experts are drafts until their block has been trained."""
        return self.refinement.finetune > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunConfig:
        """Read back what ``to_dict`` wrote."""
        return cls(
            compression=CompressionConfig.from_dict(data["compression"]),
            routing=RoutingConfig.from_dict(data["routing"]),
            calibration=CalibrationConfig(**data["calibration"]),
            refinement=RefinementConfig.from_dict(data.get("refinement", {})),
            dtype=data["dtype"],
            tf32=data.get("tf32", False),
            experts_per_unit=data["experts_per_unit"],
        )


def digest(*parts: Any) -> str:
    """SHA-256 over the canonical JSON of ``parts``, 16 hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
