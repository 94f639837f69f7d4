"""Settings of a run in words."""

import pytest

from sparse_expansion.config import RunConfig
from sparse_expansion.report.describe import describe_weights


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((0.4, 0.6), "50 % sparse (blocks 40 to 60 %)"),
        # What is told is rounded: a span of one figure is none.
        ((0.4999, 0.5001), "50 % sparse"),
        ("measured", "50 % sparse"),
    ],
)
def test_shares_of_blocks(shares, words):
    compression = RunConfig().to_dict()["compression"]
    assert describe_weights({"compression": {**compression, "layer_sparsity": shares}}) == words
