"""What the experts are made on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from sparse_expansion.config.checks import require
from sparse_expansion.config.fields import setting
from sparse_expansion.config.kinds import check_kinds

AUTO_INPUTS, SEQUENTIAL, CUMULATIVE = "auto", "sequential", "cumulative"
CALIBRATION_INPUTS = (AUTO_INPUTS, "compressed", SEQUENTIAL, CUMULATIVE, "dense")
ALL_WINDOWS = "all"
"""Number of windows that stands for the whole text."""
LEAST_SHARDS = 4
"""Shards of the windows where their number is not given, at least."""
SHARD_TOKENS = 131_072
"""Tokens of a shard where the number of shards is not given, at most."""


def parse_windows(text: str) -> int | str:
    """A number of windows, or ``ALL_WINDOWS``.

    Raises:
        ValueError: it is neither.
    """
    if text != ALL_WINDOWS and not re.fullmatch(r"-?\d+", text):
        raise ValueError(f"--dataset-size {text!r} is neither a number nor {ALL_WINDOWS}")
    return text if text == ALL_WINDOWS else int(text)


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What the experts are made on."""

    dataset: str = setting(
        "wikitext2",
        "Text to work on: wikitext2, c4, pydoc or stdlib (the language reference and the library's "
        "source code of the installed Python, which need no network), a folder with train or "
        "valid and test files (.txt, .jsonl, .parquet), one such file, "
        "hf:owner/name[:config][@split] on the hub, or several with weights, as a:0.7,b:0.3.",
        short=("-d",),
        metavar="DATA",
        group="data",
    )
    dataset_size: int = setting(
        128,
        "Calibration windows at random places of the text, or all for the whole text, end to end.",
        short=("-ds",),
        metavar="N",
        parse=parse_windows,
        group="calibration",
    )
    whole_text: bool = setting(
        False,
        "Whether the windows are all those of the text, end to end, with dataset_size as their "
        "number once the text is read, and not at random places.",
        flag="",
    )
    own_text: float = setting(
        0.0,
        "Share of the windows that come from text which the model writes itself before the run; "
        "the whole model is loaded for it.",
        metavar="SHARE",
        group="calibration",
    )
    seqlen: int = setting(
        2048,
        "Tokens in a window.",
        metavar="TOKENS",
        meanings={None: "as usual for the model's family, and no more than the model's maximum"},
        group="data",
    )
    seed: int = setting(
        0,
        "Seed of all that is drawn at random: windows, starts of KMeans, pairs of neurons.",
        metavar="SEED",
        group="calibration",
    )
    calibration_inputs: str = setting(
        "compressed",
        "What a block is calibrated on: compressed is the output of the compressed blocks before "
        "it (the paper's way), sequential is this and, inside a block, the output of compressed "
        "linears before, whose errors later ones make up for, cumulative is this with the last "
        "linear of a block making up for all blocks before too, dense is the activations of the "
        "dense model, and auto is cumulative where sparsity is N:M and sequential elsewhere.",
        choices=CALIBRATION_INPUTS,
        group="calibration",
    )
    data_shards: int | None = setting(
        None,
        "Shards of the windows, which are held one at a time; sums are merged in their order, so "
        "that the result depends on this number and never on the number of workers.",
        metavar="N",
        meanings={
            None: f"{LEAST_SHARDS}, and more where one would have over {SHARD_TOKENS:,} tokens"
        },
        group="calibration",
    )

    def __post_init__(self) -> None:
        """Check kinds and bounds."""
        check_kinds(self)
        as_given: Any = self.dataset_size
        if as_given == ALL_WINDOWS:
            # Their number is known once the text is read.
            object.__setattr__(self, "whole_text", True)
            object.__setattr__(self, "dataset_size", 1)
        require(
            self.dataset_size >= 1,
            f"dataset_size {self.dataset_size} must be at least 1 window, e.g. 128",
        )
        require(
            0 <= self.own_text < 1,
            f"own_text {self.own_text:g} is outside 0 to 1 (exclusive): a share of the windows, "
            "e.g. 0.5",
        )
        require(self.seqlen >= 2, f"seqlen {self.seqlen} must be at least 2 tokens, e.g. 2048")
        require(0 <= self.seed < 2**32, f"seed {self.seed} is outside 0 to 2**32 - 1")
        require(
            self.data_shards is None or self.data_shards >= 1,
            f"data_shards {self.data_shards} must be at least 1, e.g. 4",
        )

    @property
    def follows_compression(self) -> bool:
        """Whether a block waits for the compressed blocks before it."""
        return self.calibration_inputs != "dense"

    @property
    def is_sequential(self) -> bool:
        """Whether a block's later groups wait for the compressed groups before them."""
        return self.calibration_inputs in (SEQUENTIAL, CUMULATIVE)

    @property
    def is_cumulative(self) -> bool:
        """Whether a block's last group makes up for what the blocks before it have changed."""
        return self.calibration_inputs == CUMULATIVE

    def is_paired(self, level: int) -> bool:
        """Whether groups of this level have what their dense outputs lack beside their inputs."""
        return self.is_sequential and level > 0

    @property
    def num_shards(self) -> int:
        """Shards in use: never more than there are windows."""
        shards = self.data_shards or max(LEAST_SHARDS, math.ceil(self.num_tokens / SHARD_TOKENS))
        return min(shards, self.dataset_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows together."""
        return self.dataset_size * self.seqlen

    def windows_of(self, shard: int) -> int:
        """Number of windows in a shard, dealt out as ``Tensor.tensor_split`` does."""
        return self.dataset_size // self.num_shards + (shard < self.dataset_size % self.num_shards)
