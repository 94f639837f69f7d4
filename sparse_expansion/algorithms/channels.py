"""Channel permutation: which input columns share a group of N:M.

N of every M consecutive weights of a row go, whatever they are worth: where three of the four that
matter most are neighbours, one of them is lost. The inputs' order is free, if whoever multiplies
takes them in it too (Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021). Columns
are dealt out to the groups by what they are worth, and then exchanged by assignment problems (Zhang
et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR
2024, section 4.2).

Shapes: O rows of all linears that share the inputs, D input features, G groups of M columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_expansion.config import SparsityPattern

ROUNDS = 2
"""Times that the columns of every place are assigned anew; a third gains a thousandth of that."""
MAX_ROWS = 4096
"""Rows that are looked at where there are more, evenly spaced."""
MAX_GROUPS = 512
"""Groups among which columns are exchanged; an assignment takes the cube of it."""
GAIN_BYTES = {"cpu": 1 << 18, "cuda": 1 << 28}
"""Memory of the gains of several rows, which are made at once and added up."""


def channel_permutation(
    weights: Sequence[torch.Tensor], energy_D: torch.Tensor, pattern: SparsityPattern
) -> torch.Tensor:
    """An order of the input features by which N:M keeps more of the outputs' energy.

    A weight is worth ``w^2`` times its input's energy, as a share of its row's sum. Groups keep the
    M - N that are worth the most in every row; the sum of these over all rows grows with every
    exchange. Features behind the last whole group stay there.

    Args:
        weights: dense weights ``[O, D]`` that share the inputs.
        energy_D: ``sum x_j^2`` of every input feature, or in proportion to it.
        pattern: N:M with 0 < N < M.

    Returns:
        ``[D]`` int32: the feature that is to be column 0, 1, ...
    """
    assert pattern.group is not None and pattern.pruned is not None
    size, kept = pattern.group, pattern.group - pattern.pruned
    width = len(energy_D)
    worth_OD = squares_of_rows(weights, MAX_ROWS).mul_(energy_D.float())
    worth_OD /= worth_OD.sum(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    num_groups = width // size
    falling_D = worth_OD[:, : num_groups * size].sum(dim=0).argsort(descending=True, stable=True)
    # Every group gets one of the best, one of the next, and so on, there and back.
    dealt_MG = falling_D.view(size, num_groups).clone()
    dealt_MG[1::2] = dealt_MG[1::2].flip(1)
    groups_GM = dealt_MG.T.contiguous()
    parts = -(-num_groups // MAX_GROUPS)
    for first in range(parts):
        # Each part has groups of all kinds.
        part_GM = groups_GM[first::parts].clone()
        for _ in range(ROUNDS):
            for place in range(size):
                _assign(worth_OD, part_GM, place, kept)
        groups_GM[first::parts] = part_GM
    rest = torch.arange(num_groups * size, width, device=groups_GM.device)
    return torch.cat([groups_GM.flatten(), rest]).int()


def squares_of_rows(weights: Sequence[torch.Tensor], most: int) -> torch.Tensor:
    """``w^2`` in float32 of at most about so many rows of all linears together, evenly spaced."""
    return torch.cat([rows.float() for rows in evenly_spaced_rows(weights, most)]).square_()


def evenly_spaced_rows(matrices: Sequence[torch.Tensor], most: int) -> list[torch.Tensor]:
    """At most about so many rows of all matrices together, evenly spaced."""
    num_rows = sum(len(rows) for rows in matrices)
    return [rows[:: -(-num_rows // most)] for rows in matrices]


def _assign(worth_OD: torch.Tensor, groups_GM: torch.Tensor, place: int, kept: int) -> None:
    """Share out the columns at one place of every group anew, for the most that is kept.

    In a row, a group keeps the ``kept - 1`` best of its others, and the better one of the next and
    the column that it gets.
    """
    # Loaded when needed: who only loads a model has no use for it.
    from scipy.optimize import linear_sum_assignment

    others = [other for other in range(groups_GM.shape[1]) if other != place]
    num_groups = len(groups_GM)
    gain_GG = torch.zeros(num_groups, num_groups, device=worth_OD.device)
    room = GAIN_BYTES["cuda" if worth_OD.is_cuda else "cpu"]
    at_once = max(1, room // (gain_GG.nbytes or 1))
    others_OGM = worth_OD[:, groups_GM[:, others].flatten()].view(len(worth_OD), num_groups, -1)
    next_OG = others_OGM.topk(kept, dim=2).values[:, :, -1].contiguous()
    offered_OG = worth_OD[:, groups_GM[:, place]]
    for known_OG, new_OG in zip(next_OG.split(at_once), offered_OG.split(at_once), strict=True):
        gain_GG += torch.maximum(known_OG[:, :, None], new_OG[:, None, :]).sum(dim=0)
    _, chosen = linear_sum_assignment(gain_GG.double().cpu().numpy(), maximize=True)
    groups_GM[:, place] = groups_GM[torch.from_numpy(chosen).to(groups_GM.device), place]


def permutation_flops(num_rows: int, width: int, pattern: SparsityPattern) -> float:
    """Operations of ``channel_permutation``: comparisons, and their sums."""
    assert pattern.group is not None
    groups = width // pattern.group
    pairs = groups * min(groups, MAX_GROUPS)
    return ROUNDS * pattern.group * 2.0 * min(num_rows, MAX_ROWS) * pairs


def permutation_bytes(num_rows: int, width: int, item_bytes: int) -> int:
    """Bytes of ``channel_permutation``: rows and two copies, and the weights and sums they are of.

    Args:
        num_rows: of all linears that share the inputs.
        width: input features.
        item_bytes: of one weight.
    """
    return 3 * 4 * min(num_rows, MAX_ROWS) * width + 4 * width**2 + item_bytes * num_rows * width
