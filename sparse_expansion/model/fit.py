"""Whether a config describes a model that can be built, and the one that its files hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sparse_expansion.messages import one_line

_MOST_BLOCKS, _MOST_WIDTH, _MOST_EXPERTS = 1 << 13, 1 << 25, 1 << 12
"""Bounds of what a config may ask for: far beyond any model, and built in seconds."""
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "word_embed_proj_dim",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_MIXTURE_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")
"""Widths that mean nothing where no block is a mixture, and may be any then."""
_EXPERTS = ("num_experts", "num_local_experts")
"""How many experts mixtures have; 0 is none."""
_OWN_ATTENTION = ("eager", "sdpa")
"""Attentions that are PyTorch's and transformers' own; others are fetched, or need packages."""


def check_config(config: Any, path: Path) -> None:
    """Answer a config that would be built for hours, or has code fetched.

    Args:
        config: of transformers.
        path: where it was read.

    Raises:
        ValueError: it is such a one.
    """
    bounds = {
        "num_hidden_layers": (1, _MOST_BLOCKS),
        **dict.fromkeys(_WIDTHS, (1, _MOST_WIDTH)),
        **dict.fromkeys(_MIXTURE_WIDTHS, (0, _MOST_WIDTH)),
        **dict.fromkeys(_EXPERTS, (0, _MOST_EXPERTS)),
    }
    for name, (least, most) in bounds.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not least <= value <= most:
            raise ValueError(
                f"{path} has {name} {value}, models have {least} to {most}: download the model "
                "again"
            )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, *_OWN_ATTENTION):
        raise ValueError(
            f"{path} names the attention implementation {attention!r}, which would be code from "
            f"elsewhere: remove it, or name one of {', '.join(_OWN_ATTENTION)}"
        )


def build_without_weights(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The model that a config describes, on the meta device, buffers excepted.

    Args:
        config: of transformers.
        dtype: of the weights; the config's if None.

    Raises:
        ValueError: it describes none.
    """
    # Loading by transformers, which this module is imported for too, does without.
    from accelerate import init_empty_weights

    named = {} if dtype is None else {"dtype": dtype}
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **named)
        # Positions that were computed in the weights' dtype are rounded. Transformers makes what
        # files do not hold once more when it loads a model, in float32.
        with torch.no_grad():
            for module in model.modules():
                if module._non_persistent_buffers_set:
                    model._init_weights(module)
        return model
    except Exception as error:
        # Settings that fit nothing end in whatever a module makes of them.
        raise ValueError(f"config.json describes no model: {one_line(error)}") from None


def check_sizes(
    config: Any, shapes: Mapping[str, tuple[int, ...]], blocks: str, path: Path
) -> None:
    """Answer a config of more or wider blocks than the files have, before they are built.

    Args:
        config: of transformers.
        shapes: of the files' tensors by name.
        blocks: module path of the list of blocks.
        path: of the config.

    Raises:
        ValueError: the files have fewer, or narrower ones.
    """
    # The streams of experts are long, and say nothing of widths.
    widest = max(
        (
            max(shape, default=0)
            for name, shape in shapes.items()
            if ".experts." not in name or len(shape) > 1
        ),
        default=0,
    )
    for name in _WIDTHS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > widest:
            raise ValueError(
                f"{path} has {name} {value}, and no tensor of the weight files is wider than "
                f"{widest}: it is another model's config, or damaged"
            )
    pattern = re.compile(rf"(?:^|\.){re.escape(blocks.rpartition('.')[2])}\.(\d{{1,9}})\.")
    found = (pattern.search(name) for name in shapes)
    asked = int(config.num_hidden_layers)
    count = 1 + max((int(match[1]) for match in found if match), default=-1)
    if count < asked:
        raise ValueError(
            f"{path} has {asked} blocks, the weight files have {count}: the checkpoint is "
            "incomplete, or its config another model's"
        )


def check_shapes(
    state: Mapping[str, torch.Tensor],
    file_name: Callable[[str], str | None],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    """Answer a config that is another model's, before any weight is read.

    Args:
        state: of the model that the config describes, without weights.
        file_name: the name under which the files hold a tensor; None where they do not.
        shapes: of the files' tensors by name.
        folder: of both.

    Raises:
        ValueError: a tensor's shape in the files is not that which the config gives it.
    """
    for name, tensor in state.items():
        found = file_name(name)
        if found is not None and shapes[found] != tuple(tensor.shape):
            raise ValueError(
                f"{folder} does not fit its config.json: {found} is of shape "
                f"{list(shapes[found])}, and {list(tensor.shape)} by the config"
            )
