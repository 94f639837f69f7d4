"""How every kernel on a CPU is compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    import numba
except ImportError:
    numba = None

HAVE_NUMBA = numba is not None
"""Whether kernels are compiled. Without Numba a model can be loaded and used: PyTorch's own
operations unpack its experts, and nothing calls a kernel."""
LANES = 16
"""Values that the vector kernels take at a time."""
Array = np.ndarray[Any, np.dtype[Any]]


def _compiler(**options: Any) -> Callable[[Any], Any]:
    """A decorator that compiles a loop, and keeps the result on disk where there is a place for it.

    The place is beside the module or in the user's cache folder. In a container neither may be
    writable: the loop is compiled in every process then.
    """

    def compiled(function: Any) -> Any:
        if not HAVE_NUMBA:
            return function
        compile_ = functools.partial(numba.njit, nogil=True, error_model="numpy", **options)
        try:
            return compile_(cache=True)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return compile_()(function)

    return compiled


jit: Any = _compiler()
"""Compiles a loop to the results that its operations give one by one."""
# A product and a sum may be one instruction, as in any BLAS.
tile_jit: Any = _compiler(fastmath={"contract"})
"""Compiles a loop over the rows of a tile of weights."""
