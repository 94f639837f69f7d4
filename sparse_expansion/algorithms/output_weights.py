"""What errors of outputs count for, where the rows of a matrix compete for what is kept.

Shapes: K experts, O output features.
"""

from __future__ import annotations

import torch

OUTPUT_FLOOR = 0.5
"""Weight of an output that nothing depends on in the calibration text, where the mean has 1 more.

With a hundredth, other kinds of text lose far more than the calibration's gains, see
docs/choices.md."""


def sensitivity_weights(squares_KO: torch.Tensor, of_group_O: torch.Tensor) -> torch.Tensor:
    """What errors of experts' outputs are multiplied with before they are compared ``[K, O]``.

    Their squares are the outputs' sensitivities relative to their mean, half the expert's and half
    the whole group's, plus ``OUTPUT_FLOOR``: what its own tokens did not use is of use elsewhere.

    Args:
        squares_KO: sums over every expert's tokens, see ``data.sensitivities``.
        of_group_O: over all tokens of the group.
    """
    both = [of_group_O.expand_as(squares_KO), squares_KO]
    means = [squares.mean(dim=1, keepdim=True) for squares in both]
    relative = [
        squares / torch.where(mean > 0, mean, 1.0)
        for squares, mean in zip(both, means, strict=True)
    ]
    return (torch.stack(relative).mean(dim=0) + OUTPUT_FLOOR).sqrt().float()
