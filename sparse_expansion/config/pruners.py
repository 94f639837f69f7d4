"""The pruners that can be chosen, by name, and what the settings have to know of each.

Only the standard library is imported here, so that the command line can list the pruners, and
settings can be checked, before PyTorch is loaded. How a pruner works is in
``sparse_expansion.algorithms.pruners``, in the module of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PrunerTraits:
    """What settings and the command line have to know of a pruner."""

    help: str
    """One plain sentence for the help of ``--pruner``."""
    takes_grid: bool
    """Whether it can round what it keeps to a quantization grid, and take columns by their
    importance (``act_order``)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of ``CompressionConfig`` fields that replace the fields' own defaults when this pruner
    is chosen and neither a flag nor the preset gives them."""


PRUNERS: dict[str, PrunerTraits] = {
    "sparsegpt": PrunerTraits(
        help="sweeps over the columns once, and corrects later columns for what earlier ones lost",
        takes_grid=True,
    ),
    "admm": PrunerTraits(
        help="solves for mask and weights together: loses less than sparsegpt, and takes longer",
        takes_grid=True,
        defaults={"solver_iterations": 10},
    ),
    "wanda": PrunerTraits(
        help="removes the smallest weights times the norms of their inputs, in every row alike, "
        "and leaves the others as they are",
        takes_grid=False,
    ),
    "magnitude": PrunerTraits(
        help="removes the smallest weights, and leaves the others as they are",
        takes_grid=False,
    ),
}
"""Every pruner has a module of its name in ``sparse_expansion.algorithms.pruners``."""
