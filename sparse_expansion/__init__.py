"""Sparse Expansion: routed, pruned and quantized experts for a language model's MLPs.

Importing the package registers the ``sparse_expansion`` quantization method with transformers,
so that ``AutoModelForCausalLM.from_pretrained`` loads expanded folders. That is the one effect
of the import.
"""

from sparse_expansion.model.expansion import (
    ExpandedLinear,
    SparseExpansionConfig,
    SparseExpansionQuantizer,
)
from sparse_expansion.model.manifest import verify

__version__ = "0.1.0"
__all__ = [
    "ExpandedLinear",
    "SparseExpansionConfig",
    "SparseExpansionQuantizer",
    "__version__",
    "verify",
]
