"""The experts of a run, one by one and by linear, from the markers of its finished units."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparse_expansion.run_files import parse_experts_key
from sparse_expansion.store import Store


@dataclass(frozen=True)
class ExpertRow:
    """What is known of one expert of one linear."""

    layer: int
    group: str
    """Name of the linears that share the expert's inputs."""
    linear: str
    expert: int
    tokens: int
    """Calibration tokens of the expert's cluster."""
    relative_error: float
    """Share of the output energy on these tokens that is lost."""
    is_starved: bool
    """Whether the tokens were too few, and the whole group's Hessian was used."""
    damping_fraction: float
    """The damping that sufficed, as a share of the Hessian's mean diagonal."""
    damping_attempts: int
    """Factorizations that were tried."""
    dead_features: int
    """Input features that no token of the cluster used."""
    sparsity: float | None = None
    """The expert's share of zeros; None where it was made before that was noted."""

    @property
    def is_damping_raised(self) -> bool:
        """Whether the asked damping did not suffice."""
        return self.damping_attempts > 1

    def to_dict(self) -> dict[str, Any]:
        """The row as ``analyze --json`` prints it."""
        return asdict(self)


def expert_rows(records: Mapping[str, dict[str, Any]]) -> tuple[ExpertRow, ...]:
    """One row per linear and expert, in order of block, group, linear and expert.

    Args:
        records: markers of finished units by key; those of other stages are passed over.
    """
    rows = []
    for key, record in records.items():
        unit = parse_experts_key(key)
        if unit is None:
            continue
        stats = record["stats"]
        for linear, errors in stats["relative_error"].items():
            for offset, error in enumerate(errors):
                rows.append(
                    ExpertRow(
                        layer=unit.layer,
                        group=unit.group,
                        linear=linear,
                        expert=unit.experts[0] + offset,
                        tokens=stats["tokens"][offset],
                        relative_error=error,
                        is_starved=stats["starved"][offset],
                        damping_fraction=stats["damping_fraction"][offset],
                        damping_attempts=stats["damping_attempts"][offset],
                        dead_features=stats["dead_features"][offset],
                        sparsity=stats["shares"][offset]
                        if "shares" in stats
                        else stats.get("sparsity"),
                    )
                )
    return tuple(sorted(rows, key=lambda row: (row.layer, row.group, row.linear, row.expert)))


def finished_experts(store: Store) -> tuple[ExpertRow, ...]:
    """The finished experts of a run's folder.

    Raises:
        ValueError: it holds none.
    """
    rows = expert_rows(store.records())
    if not rows:
        raise ValueError(f"{store.root} has no finished experts: give a run's --output folder")
    return rows


@dataclass(frozen=True)
class ExpertCounts:
    """How many experts were made, and how many of them needed help."""

    experts: int
    starved: int
    """Experts that had too few tokens."""
    raised: int
    """Experts that needed more than the asked damping."""

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, Any]) -> ExpertCounts:
        """The counts that a finished run's metrics keep."""
        return cls(metrics["num_experts"], metrics["starved_experts"], metrics["raised_damping"])


def count_experts(rows: Iterable[ExpertRow]) -> ExpertCounts:
    """Count the experts behind the rows.

    Linears of a group share their inputs, and so their clusters and Hessians: an expert counts
    once for all of them.
    """
    experts = {(row.layer, row.group, row.expert): row for row in rows}.values()
    return ExpertCounts(
        experts=len(experts),
        starved=sum(row.is_starved for row in experts),
        raised=sum(row.is_damping_raised for row in experts),
    )


@dataclass(frozen=True)
class MixtureCounts:
    """How many experts a model's mixtures have, and how many of them calibration hardly reached.

    These are the experts of the dense model, in whose linears' place the experts of clusters are.
    """

    experts: int
    starved: int
    """Those whose tokens were too few for every cluster of every linear."""
    without_tokens: int
    """Those of them that no calibration token was routed to."""


def count_mixtures(rows: Iterable[ExpertRow]) -> MixtureCounts:
    """Count the mixtures' experts behind the rows; none of a model without mixtures."""
    experts: dict[tuple[int, str], list[ExpertRow]] = defaultdict(list)
    for row in rows:
        found = re.match(r".*\.experts\.\d+(?=\.)", row.linear)
        if found is not None:
            experts[row.layer, found[0]].append(row)
    return MixtureCounts(
        experts=len(experts),
        starved=sum(all(row.is_starved for row in each) for each in experts.values()),
        without_tokens=sum(not any(row.tokens for row in each) for each in experts.values()),
    )


@dataclass(frozen=True)
class LinearFacts:
    """What the experts of one linear of one block come to."""

    layer: int
    linear: str
    num_experts: int
    largest_share: float
    """Share of the calibration tokens that are in the largest cluster."""
    smallest_share: float
    """Share of the calibration tokens that are in the smallest cluster."""
    starved: int
    """Experts that had too few tokens."""
    error: float
    """Share of the output energy that is lost, weighted by tokens."""
    damping_fraction: float
    """Largest damping of any of the experts."""
    zeros: tuple[float, float] | None = None
    """Smallest and largest share of zeros of any of them; None where that was not noted."""


def linear_facts(rows: Iterable[ExpertRow]) -> tuple[LinearFacts, ...]:
    """The facts of every linear of every block, in the order of the rows."""
    linears: dict[tuple[int, str], list[ExpertRow]] = defaultdict(list)
    for row in rows:
        linears[row.layer, row.linear].append(row)
    facts = []
    for (layer, linear), experts in linears.items():
        tokens = [row.tokens for row in experts]
        total = max(1, sum(tokens))
        zeros = [row.sparsity for row in experts if row.sparsity is not None]
        facts.append(
            LinearFacts(
                layer=layer,
                linear=linear,
                num_experts=len(experts),
                largest_share=max(tokens) / total,
                smallest_share=min(tokens) / total,
                starved=count_experts(experts).starved,
                error=sum(row.relative_error * row.tokens for row in experts) / total,
                damping_fraction=max(row.damping_fraction for row in experts),
                zeros=(min(zeros), max(zeros)) if zeros else None,
            )
        )
    return tuple(facts)
