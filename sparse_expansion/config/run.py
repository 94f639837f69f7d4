"""Everything that decides what a run computes, and its digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from sparse_expansion.config.calibration import (
    AUTO_INPUTS,
    CUMULATIVE,
    SEQUENTIAL,
    CalibrationConfig,
)
from sparse_expansion.config.checks import require
from sparse_expansion.config.compression import CompressionConfig
from sparse_expansion.config.fields import setting
from sparse_expansion.config.kinds import check_kinds
from sparse_expansion.config.pruners import PRUNERS
from sparse_expansion.config.routing import RoutingConfig

AUTO_PRODUCTS, FLOAT32, BFLOAT16X3 = "auto", "float32", "bfloat16x3"
PRODUCTS = (AUTO_PRODUCTS, FLOAT32, BFLOAT16X3)
"""Ways to take large products of float32 matrices."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """How a block's kept weights are trained once its experts are made."""

    finetune: int = setting(
        0,
        "Passes over the calibration windows in which the kept weights of every block are trained "
        "against the dense block, 1 where no number is given; masks and grids stay, an eighth of "
        "the windows is held out, and the best pass on them is kept.",
        metavar="EPOCHS",
        bare=1,
        meanings={0: "weights stay as the pruner left them"},
        group="refinement",
    )
    finetune_rate: float = setting(
        2e-4, "Learning rate of Adam at its highest.", metavar="RATE", group="refinement"
    )

    def __post_init__(self) -> None:
        """Check kinds and bounds."""
        check_kinds(self)
        require(
            0 <= self.finetune <= 1000,
            f"finetune {self.finetune} is outside 0 to 1000: passes over the windows, e.g. 2",
        )
        require(
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

    compression: CompressionConfig = setting(
        CompressionConfig(), "Settings of pruning and quantization.", flag=""
    )
    routing: RoutingConfig = setting(RoutingConfig(), "Settings of PCA and KMeans.", flag="")
    calibration: CalibrationConfig = setting(
        CalibrationConfig(),
        "Settings of the calibration text and of its way through the model.",
        flag="",
    )
    refinement: RefinementConfig = setting(
        RefinementConfig(), "Settings of the training of the kept weights.", flag=""
    )
    dtype: str = setting(
        "auto",
        "Dtype that weights are stored and computed in; auto keeps that of the source.",
        choices=DTYPES,
        group="pruning",
    )
    tf32: bool = setting(
        False,
        "Let GPUs round the factors of float32 products to TF32 (10 bits), which is faster and "
        "gives other masks.",
        group="pruning",
    )
    products: str = setting(
        AUTO_PRODUCTS,
        "How the solver's and the sweep's large products are taken: in float32, or by three "
        "products of bfloat16 parts with float32 sums (16 bits), which GPUs take in a third of the "
        "time; auto takes the latter on GPUs.",
        choices=PRODUCTS,
        group="pruning",
    )
    experts_per_unit: int = setting(
        4, "Experts that one unit of work makes and one file holds.", metavar="N", group="experts"
    )

    def __post_init__(self) -> None:
        """Check kinds and bounds."""
        check_kinds(self)
        require(
            self.experts_per_unit >= 1,
            f"experts_per_unit {self.experts_per_unit} must be at least 1, e.g. 4",
        )
        if self.calibration.calibration_inputs == AUTO_INPUTS:
            # Records and reports say what was done, and not that it was left open.
            is_pattern = self.compression.sparsity.group is not None
            inputs = CUMULATIVE if is_pattern else SEQUENTIAL
            calibration = dataclasses.replace(self.calibration, calibration_inputs=inputs)
            object.__setattr__(self, "calibration", calibration)

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
    def makes_up_for_all(self) -> bool:
        """Whether a block's last linear makes up for all blocks before, where the family allows it.

        Pruners that leave weights as they are do not.
        """
        updates = PRUNERS[self.compression.pruner].takes_grid
        return self.calibration.is_cumulative and updates

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
            products=data.get("products", FLOAT32),
            experts_per_unit=data["experts_per_unit"],
        )


def digest(*parts: Any) -> str:
    """SHA-256 over the canonical JSON of ``parts``, 16 hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
