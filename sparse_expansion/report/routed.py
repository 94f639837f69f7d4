"""Where an expanded model sends a text: whether its experts were made on text like it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_expansion.report.experts import ExpertRow


@dataclass(frozen=True)
class RoutedGroup:
    """A group of linears that share a router."""

    width: int
    """Their input features."""
    dense: int
    """Dense weights of all of them."""
    kept: Sequence[int]
    """How many of those every expert keeps."""


def routed_facts(
    tokens_by_expert: Mapping[str, Sequence[int]],
    experts: Sequence[ExpertRow],
    groups: Mapping[str, RoutedGroup],
) -> dict[str, Any]:
    """What became of a text's tokens.

    Args:
        tokens_by_expert: tokens that every expert of a group was given, by block and first linear
            of the group, such as ``3.mlp.down_proj``.
        experts: the finished experts of the run; empty where its records are not at hand.
        groups: by the same names.

    Returns:
        On average over the groups ``used_experts``, ``exp`` of the entropy of the experts' shares,
        which is K where all get as much, and 1 where one gets everything; with records also
        ``thin_share``, the share of tokens whose expert was made on fewer calibration tokens than
        its input has features. Of all groups together ``kept_share``: of the dense weights that a
        token would be multiplied with, the share that it is.
    """
    calibrated = {(f"{row.layer}.{row.linear}", row.expert): row.tokens for row in experts}
    used, thin = [], []
    dense = multiplied = 0
    for name, tokens in tokens_by_expert.items():
        total = sum(tokens)
        if not total:
            continue
        shares = [count / total for count in tokens]
        used.append(math.exp(-sum(share * math.log(share) for share in shares if share)))
        dense += total * groups[name].dense
        multiplied += sum(a * b for a, b in zip(tokens, groups[name].kept, strict=True))
        width = groups[name].width
        thin.append(
            sum(
                share
                for expert, share in enumerate(shares)
                if calibrated.get((name, expert), width) < width
            )
        )
    if not used:
        return {}
    facts = {"used_experts": statistics.mean(used), "kept_share": multiplied / dense}
    if experts:
        facts["thin_share"] = statistics.mean(thin)
    return facts
