"""Which streams an expert has, and how long they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparse_expansion.config import CompressionConfig, RoutingConfig, SparsityPattern

MAX_PATTERN_GROUP = 16
"""Largest M of N:M that is stored as patterns; larger groups have bitmasks."""


@dataclass(frozen=True)
class PackedLayout:
    """Which streams an expert of ``rows`` x ``columns`` weights has, and how long they are."""

    rows: int
    columns: int
    num_kept: int
    """Weights that are kept, of all rows."""
    bits: int | None
    """Bits of a code, None when values are stored."""
    is_sparse: bool
    """Whether any weight is dropped: else there is no mask."""
    group: int | None = None
    """M where patterns are stored, else None (a bitmask)."""
    group_kept: int = 0
    """Ones of a full group."""
    rest_kept: int = 0
    """Ones of a row's last, shorter group."""
    has_bias: bool = False
    """Whether the expert has a bias of its own."""

    @classmethod
    def of_experts(
        cls, rows: int, columns: int, config: CompressionConfig, shares: Sequence[float], count: int
    ) -> list[PackedLayout]:
        """The layouts of several experts, which differ in the number of kept weights at most.

        Args:
            rows: outputs of the linear.
            columns: its inputs.
            config: of the block.
            shares: of zeros, of every expert; none where all have the configuration's.
            count: of experts.
        """
        common = cls.of(rows, columns, config)
        if not shares:
            return [common] * count
        patterns = [SparsityPattern(fraction=share) for share in shares]
        kept = [pattern.num_kept(rows, columns, config.block_size) for pattern in patterns]
        return [replace(common, num_kept=own) for own in kept]

    @classmethod
    def of(cls, rows: int, columns: int, config: CompressionConfig) -> PackedLayout:
        """The layout that a configuration gives."""
        pattern = config.sparsity
        kept = pattern.num_kept(rows, columns, config.block_size)
        is_sparse = pattern.fraction > 0
        if pattern.group is None or pattern.pruned is None or pattern.group > MAX_PATTERN_GROUP:
            return cls(rows, columns, kept, config.bits, is_sparse, has_bias=config.expert_biases)
        rest = columns % pattern.group
        return cls(
            rows,
            columns,
            kept,
            config.bits,
            is_sparse,
            group=pattern.group,
            group_kept=pattern.group - pattern.pruned,
            rest_kept=rest - rest * pattern.pruned // pattern.group,
            has_bias=config.expert_biases,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the dense weight."""
        return self.rows, self.columns

    @property
    def groups_per_row(self) -> int:
        """How many patterns, of M weights or the rest of the row, a row has."""
        assert self.group is not None
        return -(-self.columns // self.group)

    @property
    def pattern_bits(self) -> int:
        """Bits of a pattern's index."""
        assert self.group is not None
        return (math.comb(self.group, self.group_kept) - 1).bit_length()

    def streams(self) -> dict[str, tuple[str, int]]:
        """Name -> (``uint8`` or ``value``, number of elements) of every stored tensor."""
        found: dict[str, tuple[str, int]] = {}
        if self.is_sparse and self.group is None:
            found["bitmask"] = ("uint8", packed_bytes(self.rows * self.columns, 1))
        elif self.is_sparse:
            fields = self.rows * self.groups_per_row
            found["patterns"] = ("uint8", packed_bytes(fields, self.pattern_bits))
        if self.bits is None:
            found["values"] = ("value", self.num_kept)
        else:
            found["codes"] = ("uint8", packed_bytes(self.num_kept, self.bits))
        if self.has_bias:
            found["bias"] = ("value", self.rows)
        return found

    def num_bytes(self, item_bytes: int) -> int:
        """Stored bytes of one expert with values of ``item_bytes``."""
        return sum(
            count * (1 if kind == "uint8" else item_bytes)
            for kind, count in self.streams().values()
        )

    def information_bits(self, item_bytes: int) -> float:
        """Bits that the expert's information takes: mask or patterns, values or codes, and a bias.

        Fields are counted with their share of a bit (``log2`` of a group's patterns), and without
        the bits that fill the last byte.
        """
        mask = 0.0
        if self.is_sparse and self.group is None:
            mask = self.rows * self.columns
        elif self.is_sparse:
            assert self.group is not None
            full, rest = divmod(self.columns, self.group)
            mask = self.rows * (
                full * math.log2(math.comb(self.group, self.group_kept))
                + math.log2(math.comb(rest, self.rest_kept))
            )
        bias = 8 * item_bytes * self.rows if self.has_bias else 0
        return mask + self.num_kept * (8 * item_bytes if self.bits is None else self.bits) + bias


def grid_bytes(rows: int, columns: int, config: CompressionConfig) -> int:
    """Stored bytes of a linear's scales and zero points (float32), 0 when not quantized."""
    if config.bits is None:
        return 0
    size = columns if config.group_size is None else min(config.group_size, columns)
    return 2 * 4 * rows * -(-columns // size)


def router_bytes(
    width: int, config: RoutingConfig, compression: CompressionConfig, *, is_routed: bool = False
) -> int:
    """Stored bytes of a linear group's router (float32), order of columns, and shares of zeros.

    Args:
        width: input features.
        config: of the router.
        compression: of the block; with shares of zeros that are measured, or were.
        is_routed: whether the linears are those of a mixture's experts.
    """
    features = config.num_components(width)
    components = 0 if config.pca_reduction_factor is None else features * width
    columns = width if compression.permutes else 0
    shares = config.num_clusters if compression.shares_out(is_routed=is_routed) else 0
    return 4 * (width + components + config.num_clusters * features + columns + shares)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` fields of ``bits`` bits."""
    return -(-count * bits // 8)
