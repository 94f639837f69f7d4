"""Inner loops, compiled: Numba's on a CPU, Triton's on a GPU. No other place knows either.

Importers name the module that they need. On a CPU each kernel works on a slice of its arrays and
releases the interpreter lock; ``threads.split`` runs slices on as many threads as PyTorch has, so
that a worker of one thread stays on one core. No kernel's result depends on how its work is split.
Packed values are moved as unsigned integers of their size, which is the same for every dtype.

``threads`` splits work, ``bits`` holds the loops over bit streams, ``decide`` those that choose and
round weights, ``vectors`` those that take sixteen values at a time, and ``triton_decide`` the
GPU's. Numba's cache looks at a kernel's own file only: whoever changes ``llvm`` or ``jit`` has to
delete ``__pycache__``.
"""
