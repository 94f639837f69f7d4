"""Sparse Expansion: routed, pruned and quantized experts for a language model's MLPs.

Importing the package registers the ``sparse_expansion`` checkpoint format with transformers, so
that ``AutoModelForCausalLM.from_pretrained`` loads expanded folders. That is the one effect of the
import. The package's own command line goes without it: ``--help`` must not wait for PyTorch, and
the commands that open models register the format themselves.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "ExpandedLinear",
    "Result",
    "SparseExpansionConfig",
    "SparseExpansionQuantizer",
    "__version__",
    "evaluate",
    "expand",
    "verify",
]

_MODULE_OF = {
    "ExpandedLinear": "sparse_expansion.model.expansion",
    "Result": "sparse_expansion.api",
    "SparseExpansionConfig": "sparse_expansion.model.quantizer",
    "SparseExpansionQuantizer": "sparse_expansion.model.quantizer",
    "evaluate": "sparse_expansion.api",
    "expand": "sparse_expansion.api",
    "verify": "sparse_expansion.model.verification",
}
"""The modules that define the public names."""

if TYPE_CHECKING:
    from sparse_expansion.api import Result, evaluate, expand
    from sparse_expansion.model.expansion import ExpandedLinear
    from sparse_expansion.model.quantizer import SparseExpansionConfig, SparseExpansionQuantizer
    from sparse_expansion.model.verification import verify
else:

    def __getattr__(name: str) -> object:
        """A public name, imported when it is first read (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The names that are there already, and the public ones that are yet to be imported."""
    return sorted({*globals(), *__all__})


def register() -> None:
    """Register the checkpoint format with transformers; a second call changes nothing."""
    import_module("sparse_expansion.model.quantizer")
    for name in _MODULE_OF:
        globals()[name] = getattr(import_module(_MODULE_OF[name]), name)


def _is_own_command_line() -> bool:
    """Whether the running program is the console script or ``python -m sparse_expansion...``."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":
        # While runpy looks for the module to run, and imports this package on the way, argv[0] is
        # "-m". The module's name is then in orig_argv alone, in front of the program's arguments
        # (and behind the "-m" where that was written without a space).
        module = sys.orig_argv[-len(sys.argv)].rpartition("-m")[2]
        return module.split(".")[0] == __name__
    return Path(program).stem == "sparse-expansion"


if not _is_own_command_line():
    register()
