"""Python API: ``expand`` makes expanded models and ``evaluate`` measures them, as the commands do.

Nothing that takes long is imported before one of them is called.
"""

from sparse_expansion.api.functions import evaluate, expand
from sparse_expansion.api.result import Result

__all__ = ["Result", "evaluate", "expand"]
