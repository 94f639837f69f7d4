"""How every kernel on a CPU is compiled."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
jit: Any = numba.njit(nogil=True, cache=True, error_model="numpy")
"""Compiles a loop to the results that its operations give one by one."""
# A product and a sum may be one instruction, as in any BLAS.
tile_jit: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
"""Compiles a loop over the rows of a tile of weights."""
