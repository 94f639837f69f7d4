"""The units of one linear group of a block: its router, its gathered inputs, and its experts."""

from __future__ import annotations

from functools import cached_property

from sparse_expansion.planning.block import BlockPlan
from sparse_expansion.planning.costs import (
    FLOAT32_BYTES,
    FLOAT64_BYTES,
    REDUCE_FAN_IN,
    GatheredInputs,
    correction_flops,
    expert_bytes,
    experts_flops,
    gathered_inputs,
    hessian_flops,
    router_flops,
    routing_flops,
    shares_flops,
)
from sparse_expansion.planning.partition import gathered_ranges, range_size
from sparse_expansion.run_files import (
    ExpertRange,
    capture_key,
    experts_key,
    gather_key,
    range_name,
    reduce_key,
    router_key,
    shard_affinity,
    shares_key,
    weigh_key,
)
from sparse_expansion.units import Unit
from sparse_expansion.work.stages import calibrate, make


class GroupUnits:
    """The units of one linear group of a block."""

    def __init__(self, block: BlockPlan, position: int) -> None:
        """``position`` is the group's place among those of the block."""
        self.block = block
        self.position = position
        self.group = block.shape.groups[position]
        self.paired = block.calibration.is_paired(self.group.level)
        self.residuals = self.group.rows if self.paired else 0
        self.weighs = block.config.compression.weighs(
            self.group.level, is_routed=self.group.is_routed
        )
        self.is_corrected = block.is_corrected(self.group)
        self.shares_out = block.config.compression.shares_out(is_routed=self.group.is_routed)
        tokens = block.shard_tokens * self.group.tokens_share
        self.expert_tokens = tokens / block.config.routing.num_clusters
        """Tokens of one shard that are routed to one expert, on average."""
        self.captured_bytes = int(tokens * self.group.width * block.shape.item_bytes)
        """Bytes of one shard's inputs of the group."""

    @property
    def results(self) -> list[str]:
        """Keys of the units after which the group is compressed."""
        layer, name = self.block.layer, self.group.name
        experts = [experts_key(layer, name, experts) for experts in self.block.ranges]
        return [router_key(layer, name), *self._shares_keys, *experts]

    @property
    def _shares_keys(self) -> list[str]:
        """Key of the unit that shares out zeros, where there is one."""
        return [shares_key(self.block.layer, self.group.name)] if self.shares_out else []

    @property
    def _weights(self) -> list[tuple[str, str]]:
        """(unit key, output name) of what outputs count for on every shard, where they differ."""
        layer, name = self.block.layer, self.group.name
        shards = self.block.shards if self.weighs else ()
        return [(weigh_key(layer, name, shard), "outputs") for shard in shards]

    @cached_property
    def gathered(self) -> GatheredInputs:
        """What one shard hands on for one expert."""
        block = self.block
        item = block.shape.item_bytes
        return gathered_inputs(
            block.config,
            self.group.width,
            item,
            residuals=self.residuals,
            tokens_share=self.group.tokens_share,
        )

    def units(self) -> list[Unit]:
        """All units of the group, in order."""
        block = self.block
        units = [self._router()]
        if self.weighs:
            units += [self._weigh(shard) for shard in block.shards]
        if self.shares_out:
            units.append(self._shares())
        spans = gathered_ranges(block.ranges, self.gathered.num_bytes, len(block.shards))
        for span in spans:
            units += [self._gather(span, shard) for shard in block.shards]
        for span in spans:
            for experts in span:
                units += self._experts(experts, span)
        return units

    def _source(self, shard: int) -> str:
        """Key of the unit that captures the group's inputs."""
        if self.paired:
            return self.block.recapture_key(self.group.level, shard)
        return capture_key(self.block.layer, shard)

    def _router(self) -> Unit:
        """The unit that fits the group's router on the shards' samples."""
        block, name, width = self.block, self.group.name, self.group.width
        seed = block.calibration.seed + block.shape.groups_before(block.layer) + self.position
        fit_tokens = block.fit_tokens_of(self.group)
        handed_bytes, clusters = FLOAT32_BYTES * width**2, block.config.routing.num_clusters
        if self.shares_out:
            handed_bytes += FLOAT64_BYTES * clusters * (width + 1)
        cost = router_flops(block.config, width, fit_tokens, self.group.rows)
        if self.is_corrected:
            handed_bytes += FLOAT32_BYTES * self.group.rows * (width + clusters)
            cost += correction_flops(self.group, fit_tokens)
        return calibrate.router.unit(
            key=router_key(block.layer, name),
            params={"layer": block.layer, "group": name, "seed": seed},
            inputs=tuple((self._source(shard), name) for shard in block.shards),
            outputs=(
                "gram",
                *(("clusters",) if self.shares_out else ()),
                *(("correction",) if self.is_corrected else ()),
            ),
            is_persistent=True,
            layer=block.layer,
            rank=1,
            output_bytes=handed_bytes,
            traffic_bytes=int(fit_tokens * width * block.shape.item_bytes) + handed_bytes,
            cost=cost,
        )

    def _weigh(self, shard: int) -> Unit:
        """The unit that measures on one shard how much the block depends on the outputs."""
        block, name = self.block, self.group.name
        return calibrate.weigh.unit(
            key=weigh_key(block.layer, name, shard),
            params={"layer": block.layer, "shard": shard, "group": name},
            after=(router_key(block.layer, name), self._source(shard)),
            outputs=("outputs",),
            affinity=shard_affinity(block.layer, shard),
            layer=block.layer,
            # What it hands on is small, and all experts may wait for it.
            rank=1,
            cost=block.shard_tokens * 2.0 * self.group.used_weights,
            move_cost=block.shard_flops,
            output_bytes=self._outputs_bytes,
            traffic_bytes=self.captured_bytes + self._outputs_bytes,
        )

    @property
    def _outputs_bytes(self) -> int:
        """Bytes of what the outputs of all clusters' experts count for, on one shard."""
        return FLOAT64_BYTES * self.block.config.routing.num_clusters * self.group.rows

    def _shares(self) -> Unit:
        """The unit that shares out zeros over the experts."""
        block, group = self.block, self.group
        clusters = block.config.routing.num_clusters
        return calibrate.shares.unit(
            key=shares_key(block.layer, group.name),
            params={"layer": block.layer, "group": group.name},
            inputs=((router_key(block.layer, group.name), "clusters"), *self._weights),
            is_persistent=True,
            layer=block.layer,
            rank=1,
            cost=clusters * shares_flops(group),
            traffic_bytes=len(block.shards) * self._outputs_bytes + group.rows * group.width,
        )

    def _gather(self, span: list[ExpertRange], shard: int) -> Unit:
        """The unit that hands on one shard's inputs of several ranges of experts."""
        block, name, width = self.block, self.group.name, self.group.width
        experts = (span[0][0], span[-1][1])
        count = range_size(experts)
        summing = 0.0
        if self.gathered.is_summed:
            summing = hessian_flops(width, self.expert_tokens, residuals=self.residuals)
        return calibrate.gather.unit(
            key=gather_key(block.layer, name, experts, shard),
            params={
                "layer": block.layer,
                "shard": shard,
                "group": name,
                "ranges": span,
                "summed": self.gathered.is_summed,
                **({"recaptured": block.ranges} if self.paired else {}),
            },
            after=(router_key(block.layer, name), self._source(shard)),
            outputs=tuple(range_name(part) for part in span),
            affinity=shard_affinity(block.layer, shard),
            layer=block.layer,
            rank=4,
            cost=count * (self.expert_tokens * routing_flops(block.config, width) + summing),
            move_cost=block.shard_flops,
            output_bytes=count * self.gathered.num_bytes,
            traffic_bytes=self.captured_bytes + count * self.gathered.num_bytes,
        )

    def _experts(self, experts: ExpertRange, span: list[ExpertRange]) -> list[Unit]:
        """The unit that makes a range of experts, behind those that add up its Hessian sums."""
        block, name = self.block, self.group.name
        spanned = (span[0][0], span[-1][1])
        parts = [
            (gather_key(block.layer, name, spanned, shard), range_name(experts))
            for shard in block.shards
        ]
        weights = self._weights
        from_router = ("gram", "correction") if self.is_corrected else ("gram",)
        reductions, parts = self._reductions(experts, parts)
        count = range_size(experts)
        # Where sums are handed on, the shards have done the products.
        tokens = 0.0 if self.gathered.is_summed else self.expert_tokens * len(block.shards)
        flops = experts_flops(self.group, block.config.compression, tokens, paired=self.paired)
        moved = len(parts) * self.gathered.num_bytes + expert_bytes(block.config, self.group)
        unit = make.experts.unit(
            key=experts_key(block.layer, name, experts),
            params={
                "layer": block.layer,
                "group": name,
                "experts": experts,
                **({"weighed": len(weights)} if weights else {}),
                **({"corrected": True} if self.is_corrected else {}),
            },
            inputs=(
                *((router_key(block.layer, name), output) for output in from_router),
                *weights,
                *parts,
            ),
            after=tuple(self._shares_keys),
            is_persistent=True,
            layer=block.layer,
            # Before further gathering: experts consume what fills memory.
            rank=2,
            cost=count * flops,
            traffic_bytes=count * moved,
        )
        return [*reductions, unit]

    def _reductions(
        self, experts: ExpertRange, parts: list[tuple[str, str]]
    ) -> tuple[list[Unit], list[tuple[str, str]]]:
        """Units that add up Hessian sums, level by level, until one unit can take what is left.

        Args:
            experts: the range whose sums they are.
            parts: (unit key, output name) of every shard's sums.

        Returns:
            The units, and (unit key, output name) of the sums that are left.
        """
        block, name = self.block, self.group.name
        count = range_size(experts)
        moved = count * self.gathered.num_bytes
        units: list[Unit] = []
        level = 0
        while self.gathered.is_summed and len(parts) > REDUCE_FAN_IN:
            merged: list[tuple[str, str]] = []
            for first in range(0, len(parts), REDUCE_FAN_IN):
                taken = parts[first : first + REDUCE_FAN_IN]
                unit = calibrate.reduce.unit(
                    key=reduce_key(block.layer, name, experts, level, len(merged)),
                    inputs=tuple(taken),
                    outputs=("inputs",),
                    layer=block.layer,
                    rank=3,
                    cost=float(len(taken) * count * self.group.width**2),
                    output_bytes=moved,
                    traffic_bytes=(len(taken) + 1) * moved,
                )
                units.append(unit)
                merged.append((unit.key, "inputs"))
            parts = merged
            level += 1
        return units, parts
