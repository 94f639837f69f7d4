"""How a linear group's inputs are clustered."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from sparse_expansion.config.by_block import read_by_block
from sparse_expansion.config.checks import require, require_layers
from sparse_expansion.config.fields import setting
from sparse_expansion.config.kinds import check_kinds

CLUSTERINGS = ("kmeans", "random")
KMEANS_BACKENDS = ("auto", "torch", "sklearn", "cuml")


def read_layer_clusters(path: str) -> tuple[int, ...]:
    """Numbers of clusters by block: a JSON list, or an object with ``layer_clusters``.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    return tuple(read_by_block(path, "layer_clusters", int, "[8, 24]"))


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How a linear group's inputs are clustered."""

    num_clusters: int = setting(
        16,
        "Clusters, and so experts, of every linear group.",
        short=("-nc",),
        metavar="K",
        group="experts",
    )
    layer_clusters: tuple[int, ...] = setting(
        (),
        "Number of clusters of every block, from a file (what allocate --num-clusters writes, or a "
        "JSON list), with --num-clusters as their mean at most.",
        metavar="FILE",
        parse=read_layer_clusters,
        meanings={(): "the same number in all blocks"},
        group="experts",
    )
    pca_reduction_factor: int | None = setting(
        32,
        "Routers see the inputs through a PCA, with the input width divided by this factor as the "
        "number of components.",
        short=("-pcrf",),
        metavar="FACTOR",
        meanings={None: "no PCA"},
        group="experts",
    )
    kmeans: str = setting(
        KMEANS_BACKENDS[0],
        "What KMeans is run by: PyTorch on the worker's device, scikit-learn on its CPU, or cuML "
        "on its GPU, whose routers cannot be made again bit for bit.",
        choices=KMEANS_BACKENDS,
        meanings={"auto": "PyTorch on a GPU, scikit-learn on a CPU"},
        group="experts",
    )
    restarts: int = setting(
        4,
        "KMeans runs from so many different seeds, and the lowest inertia is kept.",
        flag="--kmeans-restarts",
        metavar="N",
        group="experts",
    )
    max_iterations: int = setting(
        100,
        "Lloyd iterations of a KMeans run at most.",
        flag="--kmeans-iterations",
        metavar="N",
        group="experts",
    )
    fit_tokens: int = setting(
        65536,
        "KMeans is fitted on at most so many calibration tokens, evenly spaced.",
        flag="--kmeans-tokens",
        metavar="TOKENS",
        group="experts",
    )
    clustering: str = setting(
        CLUSTERINGS[0],
        "Tokens that an expert is made on: kmeans takes those of its cluster, and random, a "
        "control, as many random ones in each shard; routers are the same.",
        choices=CLUSTERINGS,
        group="experts",
    )
    balance: float = setting(
        0.0,
        "Least tokens of a cluster, as a share of those of the mean cluster: smaller clusters are "
        "merged with their neighbours, and the largest are split.",
        metavar="SHARE",
        meanings={0.0: "clusters stay as KMeans found them"},
        group="experts",
    )

    def __post_init__(self) -> None:
        """Check kinds and bounds."""
        check_kinds(self)
        require(
            1 <= self.num_clusters <= 4096,
            f"num_clusters {self.num_clusters} is outside 1 to 4096, e.g. 16",
        )
        if self.layer_clusters:
            require(
                min(self.layer_clusters) >= 1 and max(self.layer_clusters) <= 4096,
                f"layer_clusters {self.layer_clusters} are not all within 1 to 4096",
            )
            mean = sum(self.layer_clusters) / len(self.layer_clusters)
            require(
                mean <= self.num_clusters,
                f"layer_clusters have mean {mean:.4g}, num_clusters is {self.num_clusters}: use "
                f"--num_clusters {math.ceil(mean)}",
            )
        require(
            self.pca_reduction_factor is None or self.pca_reduction_factor >= 1,
            f"PCA_reduction_factor {self.pca_reduction_factor} must be at least 1, e.g. 32",
        )
        require(self.restarts >= 1, f"kmeans_restarts {self.restarts} must be at least 1, e.g. 4")
        require(
            self.max_iterations >= 1,
            f"kmeans iterations {self.max_iterations} must be at least 1, e.g. 100",
        )
        require(
            self.fit_tokens >= self.num_clusters,
            f"kmeans_tokens {self.fit_tokens} must be at least num_clusters {self.num_clusters}",
        )
        require(
            0 <= self.balance <= 0.9,
            f"balance {self.balance} is outside 0 to 0.9: least share of the mean cluster's "
            "tokens, e.g. 0.25",
        )

    @property
    def most_clusters(self) -> int:
        """K of the block that has the most."""
        return max(self.layer_clusters, default=self.num_clusters)

    @property
    def is_reproducible(self) -> bool:
        """Whether routers made again from the same seed have the same bytes."""
        return self.kmeans != "cuml"

    def check_layers(self, num_layers: int) -> None:
        """Answer a list of blocks' clusters that is another model's.

        Raises:
            ValueError: it has another length.
        """
        require_layers("layer_clusters", self.layer_clusters, num_layers)

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
