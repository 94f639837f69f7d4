"""All experts of linears that share their input, multiplied by where their streams are: on a GPU.

Which expert a token has is known to the device alone, so that nothing waits for the host: kernels
find an expert's streams by a table of addresses. Of a few tokens the streams themselves are
multiplied, which are fewer bytes than the dense weight; for more, the weights are unpacked.

Shapes: T tokens, D input features, O output features, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.algorithms.packing.patterns import group_patterns
from sparse_expansion.algorithms.packing.streams import check_streams
from sparse_expansion.algorithms.quantization import AffineGrid

MAX_TOKENS = 16
"""Most tokens that are multiplied with the stored streams; more are with unpacked weights."""
UNIT = 8
"""Columns whose mask one thread holds, where patterns do not ask for another number."""
MAX_KEPT = 2**31 - 1
"""Most weights that an expert keeps: kernels count them in 32 bits."""
DENSE, BITMASK, PATTERNS = 0, 1, 2
"""How an expert's mask is stored."""


@dataclass(frozen=True)
class StoredLinear:
    """One linear's experts as they are stored, all on one device."""

    experts: Sequence[dict[str, torch.Tensor]]
    """Streams by name, as ``packing.pack_expert`` made them."""
    layouts: Sequence[PackedLayout]
    """Of every expert; they differ in the number of kept weights at most."""
    grid: AffineGrid | None
    bias_KO: torch.Tensor | None = None
    """Of every expert; rows may be one and the same memory."""


def have_kernels(device: torch.device) -> bool:
    """Whether experts can be multiplied by kernels there: on a GPU that Triton is installed for."""
    if device.type != "cuda":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


class StoredExperts:
    """Tables that lead kernels to the streams of all experts of linears that share their input.

    It holds 16 bytes an expert, 4 bytes a row of every bitmask, and experts' biases. The streams
    themselves are not held: they have to stay where they are as long as it is used.
    """

    def __init__(self, linears: Sequence[StoredLinear]) -> None:
        """Check the streams, and look where rows begin in them: the host waits for that.

        Args:
            linears: whose experts they are, all on one device, with layouts, grids and biases of
                one form.

        Raises:
            ValueError: a stream does not fit the layout.
        """
        for linear in linears:
            for streams, layout in zip(linear.experts, linear.layouts, strict=True):
                if layout.num_kept > MAX_KEPT:
                    raise ValueError(f"an expert keeps {layout.num_kept} weights, over {MAX_KEPT}")
                check_streams(streams, layout, linear.grid)
        self.layout = layout = linears[0].layouts[0]
        self.num_linears, self.num_experts = len(linears), len(linears[0].experts)
        self._kind = BITMASK if layout.group is None else PATTERNS
        if not layout.is_sparse:
            self._kind = DENSE
        value_name = "values" if layout.bits is None else "codes"
        mask_name = (value_name, "bitmask", "patterns")[self._kind]
        some = linears[0].experts[0]
        self.device, self._value_dtype = some[value_name].device, some[value_name].dtype
        self._mask_bytes = some[mask_name].numel()
        bias_KO, grid = linears[0].bias_KO, linears[0].grid
        self._bias_dtype = None if bias_KO is None else bias_KO.dtype
        self._grid_size = 0 if grid is None else grid.group_size
        self.masks = self._addresses(linears, mask_name)
        """Addresses of masks (int64) by linear and expert, and of ``values`` likewise."""
        self.values = self._addresses(linears, value_name)
        # What a kernel does not use still needs an address.
        unused = self.masks, self.masks
        self._grids = [
            unused if one is None else (_plain(one.scale_OG), _plain(one.zero_point_OG))
            for one in (linear.grid for linear in linears)
        ]
        self._scales = self._table([scale.data_ptr() for scale, _ in self._grids])
        self._zero_points = self._table([zero_point.data_ptr() for _, zero_point in self._grids])
        self.biases = [linear.bias_KO for linear in linears]
        """Of every linear, as they were given."""
        rows = [[None] * self.num_experts if one is None else list(one) for one in self.biases]
        self._biases = self._table(
            [[0 if row_O is None else row_O.data_ptr() for row_O in row] for row in rows]
        )
        self._patterns = self._pattern_tables()
        self._is_aligned = not bool((self.values % 4).any())
        self.starts = self._row_starts(linears)
        """Kept weights before every row of every bitmask, ``[linears, K, O]`` (int32)."""

    def _addresses(self, linears: Sequence[StoredLinear], name: str) -> torch.Tensor:
        return self._table([[one[name].data_ptr() for one in linear.experts] for linear in linears])

    def _table(self, addresses: Any) -> torch.Tensor:
        return torch.tensor(addresses, dtype=torch.int64, device=self.device)

    def _pattern_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask of every index of a pattern, of full groups and of the last of a row."""
        layout = self.layout
        if self._kind != PATTERNS:
            empty = torch.zeros(1, dtype=torch.int32, device=self.device)
            return empty, empty
        assert layout.group is not None
        # An index that is out of range keeps nothing, and the count of its row tells.
        tables = torch.zeros(2, 1 << layout.pattern_bits, dtype=torch.int32)
        rest = layout.columns % layout.group
        for table, size, kept in zip(
            tables, (layout.group, rest), (layout.group_kept, layout.rest_kept), strict=True
        ):
            known = torch.from_numpy(group_patterns(size, kept).astype("int32"))
            table[: len(known)] = known
        full, short = tables.to(self.device)
        return full, short

    def _row_starts(self, linears: Sequence[StoredLinear]) -> torch.Tensor:
        """Where rows begin among kept weights, of masks that keep as many as their layouts do."""
        layout, shape = self.layout, (self.num_linears, self.num_experts, self.layout.rows)
        counts = torch.full(shape, self._row_kept, dtype=torch.int32, device=self.device)
        if self._kind != DENSE:
            self._count_kept(counts)
        kept = self._table([[one.num_kept for one in linear.layouts] for linear in linears])
        is_right = (counts.sum(dim=2, dtype=torch.int64) == kept).all()
        if self._kind == PATTERNS:
            is_right &= (counts == self._row_kept).all()
        used = layout.rows * layout.columns % 8
        if self._kind == BITMASK and used:
            last = [one["bitmask"][-1:] for linear in linears for one in linear.experts]
            is_right &= (torch.cat(last) >> used == 0).all()
        if not bool(is_right):
            raise ValueError(
                f"masks of experts keep other weights than the layouts' {kept.tolist()}: the "
                "checkpoint is damaged"
            )
        return counts.cumsum(dim=2, dtype=torch.int32) - counts

    @property
    def _row_kept(self) -> int:
        """Kept weights of a row, where that is the same for every row."""
        layout = self.layout
        if self._kind == DENSE:
            return layout.columns
        if layout.group is None:
            return 0
        return layout.columns // layout.group * layout.group_kept + layout.rest_kept

    @cached_property
    def _mask_constants(self) -> dict[str, Any]:
        """What kernels that read masks are compiled for."""
        group = self.layout.group
        return {
            "O": self.layout.rows,
            "D": self.layout.columns,
            "KIND": self._kind,
            # Whole groups, eight columns or as near to it as they come.
            "UNIT": UNIT if group is None else group * max(1, UNIT // group),
            "GROUP": group or 1,
            "FIELD_BITS": 0 if group is None else self.layout.pattern_bits,
        }

    @cached_property
    def _value_constants(self) -> dict[str, Any]:
        """What kernels that read values are compiled for."""
        return {
            "ROW_KEPT": self._row_kept,
            "CODE_BITS": self.layout.bits or 0,
            "GRID_SIZE": self._grid_size,
        }

    @cached_property
    def form(self) -> int:
        """How kernels read a row, see ``kernels.triton_matvec``."""
        from sparse_expansion.algorithms.kernels import triton_matvec as kernel

        layout, columns = self.layout, self.layout.columns
        has_halves = layout.bits is None and self._value_dtype.itemsize == 2
        if not self._is_aligned:
            return kernel.UNITS
        if (layout.group, layout.group_kept) == (4, 2) and columns % kernel.PAIR_COLUMNS == 0:
            has_grid = layout.bits == 4 and self._grid_size % kernel.PAIR_COLUMNS == 0
            if has_halves or has_grid:
                return kernel.PAIRS
        is_bitmask = self._kind == BITMASK and columns % kernel.WINDOW_COLUMNS == 0
        return kernel.WINDOWS if is_bitmask and has_halves else kernel.UNITS

    def multiply(self, X_TD: torch.Tensor, experts_T: torch.Tensor) -> torch.Tensor:
        """Every linear's ``W_k x`` with its bias, ``[linears, T, O]``: few tokens, float32 sums.

        Args:
            X_TD: ``MAX_TOKENS`` tokens at most, float32, bfloat16 or float16.
            experts_T: every token's expert (int64).
        """
        from sparse_expansion.algorithms.kernels import triton_matvec as kernel
        from sparse_expansion.algorithms.kernels.triton_streams import POINTEES

        tokens, rows = len(X_TD), self.layout.rows
        out = X_TD.new_empty(self.num_linears, tokens, rows)
        if not tokens:
            return out
        tile = kernel.tile_of(self.form, tokens, self.layout.bits is not None)
        kernel.multiply_stored[(tokens, -(-rows // tile["ROWS"]), self.num_linears)](
            X_TD.contiguous(),
            experts_T,
            out,
            self.masks,
            self.values,
            self.starts,
            self._scales,
            self._zero_points,
            self._biases,
            *self._patterns,
            tokens,
            self.num_experts,
            self._mask_bytes,
            VALUE=POINTEES[self._value_dtype],
            BIAS=None if self._bias_dtype is None else POINTEES[self._bias_dtype],
            PADDED=MAX_TOKENS,
            TOKENS=1 if tokens == 1 else kernel.TOKENS,
            FORM=self.form,
            LANES=kernel.LANES,
            GROUP_KEPT=self.layout.group_kept,
            **tile,
            **self._mask_constants,
            **self._value_constants,
        )
        return out

    def unpack(
        self,
        first: int,
        count: int,
        dtype: torch.dtype,
        sizes_K: torch.Tensor | None = None,
        *,
        linear: int = 0,
    ) -> torch.Tensor:
        """Dense weights ``[count, O, D]`` of experts of one linear.

        Args:
            first: the first expert.
            count: how many.
            dtype: of the result.
            sizes_K: every expert's tokens (int64); the weights of those without are left unset.
            linear: which of the linears.
        """
        from sparse_expansion.algorithms.kernels import triton_unpack as kernel
        from sparse_expansion.algorithms.kernels.triton_streams import POINTEES

        out = torch.empty(count, *self.layout.shape, dtype=dtype, device=self.device)
        scale, zero_point = self._grids[linear]
        kernel.unpack_rows[(-(-self.layout.rows // kernel.ROWS), count)](
            out,
            self.masks if sizes_K is None else sizes_K[first:],
            self.masks[linear, first:],
            self.values[linear, first:],
            self.starts[linear, first:],
            scale,
            zero_point,
            *self._patterns,
            self._mask_bytes,
            VALUE=POINTEES[self._value_dtype],
            SKIPS=sizes_K is not None,
            PADDED_UNIT=1 << (self._mask_constants["UNIT"] - 1).bit_length(),
            UNITS=kernel.UNITS,
            ROWS=kernel.ROWS,
            **self._mask_constants,
            **self._value_constants,
        )
        return out

    def _count_kept(self, counts: torch.Tensor) -> None:
        """Write the kept weights of every row by linear and expert, ``[linears, K, O]``."""
        from sparse_expansion.algorithms.kernels import triton_unpack as kernel

        tiles = -(-self.layout.rows // kernel.COUNT_ROWS)
        kernel.count_kept[(tiles, self.masks.numel())](
            self.masks,
            counts,
            *self._patterns,
            self._mask_bytes,
            ROWS=kernel.COUNT_ROWS,
            LANES=kernel.LANES,
            **self._mask_constants,
        )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().contiguous()
