"""Where an expanded model sends a text: whether its experts were made on text like it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_expansion.report.experts import ExpertRow


def routed_facts(
    tokens_by_expert: Mapping[str, Sequence[int]],
    experts: Sequence[ExpertRow],
    widths: Mapping[str, int],
    kept: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """What became of a text's tokens, on average over the groups of linears.

    Args:
        tokens_by_expert: tokens that every expert of a group was given, by block and first linear
            of the group, such as ``3.mlp.down_proj``.
        experts: the finished experts of the run; empty where its records are not at hand.
        widths: input features of the same linears.
        kept: of the dense weights of such a group's linears, the share that every expert keeps.

    Returns:
        ``used_experts``: ``exp`` of the entropy of the experts' shares, which is K where all get
        as much, and 1 where one gets everything. ``kept_share``: of the dense weights, the share
        that a token is multiplied with. With records ``thin_share``: the share of tokens whose
        expert was made on fewer calibration tokens than its input has features.
    """
    calibrated = {(f"{row.layer}.{row.linear}", row.expert): row.tokens for row in experts}
    used, thin, multiplied = [], [], []
    for name, tokens in tokens_by_expert.items():
        total = sum(tokens)
        if not total:
            continue
        shares = [count / total for count in tokens]
        used.append(math.exp(-sum(share * math.log(share) for share in shares if share)))
        multiplied.append(sum(a * b for a, b in zip(shares, kept[name], strict=True)))
        width = widths[name]
        thin.append(
            sum(
                share
                for expert, share in enumerate(shares)
                if calibrated.get((name, expert), width) < width
            )
        )
    if not used:
        return {}
    facts = {"used_experts": statistics.mean(used), "kept_share": statistics.mean(multiplied)}
    if experts:
        facts["thin_share"] = statistics.mean(thin)
    return facts
