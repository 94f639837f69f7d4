"""What differs between architectures: one ``Family`` entry each, and nothing elsewhere.

How to add a family: append a ``Family`` to ``FAMILIES``. It names the module path of the decoder
blocks, a block's attention, and the MLP linears of a block, those that read the same input
together, and the level at which they stand. An architecture whose attention returns a bare tensor
says so, one whose attention is not made of the usual q, k, v and o projections brings a count of
its weights, one whose blocks may be mixtures of experts names their parts, and so on for what has a
default below. Then add a tiny configuration of it to the tests, which check every family.

Nothing here needs PyTorch, so that a model of another architecture is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

AttentionOutput = Literal["tuple", "tensor"]
"""The form in which a block's attention returns its output: first of a tuple, or by itself."""


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that share one input, hence one router and one Hessian."""

    linears: tuple[str, ...]
    """The names of the linears inside the block; in a family's entry ``*`` stands for the number of
    every expert of a mixture."""
    level: int = 0
    """How many groups of the block its input has passed through."""

    @property
    def is_routed(self) -> bool:
        """Whether the linears are those of a mixture's experts, which see some tokens each."""
        return ".experts." in self.linears[0]

    @property
    def name(self) -> str:
        """The group's name in unit keys and files: its first linear, and the others' last parts."""
        first, *rest = self.linears
        return "+".join([first, *(name.rsplit(".", 1)[-1] for name in rest)])


def projection_weights(config: Any) -> int:
    """Weights of the q, k, v and o projections of one block, biases not counted.

    Args:
        config: a transformers config with ``hidden_size`` and ``num_attention_heads``.
            ``num_key_value_heads`` and ``head_dim`` count where the config sets them; otherwise
            every head has its own keys and values, and the heads share the hidden size.
    """
    heads = int(config.num_attention_heads)
    key_value_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * int(config.hidden_size) * head_dim * (heads + key_value_heads)


def _falcon_attention_weights(config: Any) -> int:
    """Weights of Falcon's fused projection and of the one after attention, biases not counted.

    Its older form counts as many heads of keys as of queries in the config, whatever there are.
    """
    heads = int(config.num_attention_heads)
    key_value_heads = heads
    if config.new_decoder_architecture:
        key_value_heads = int(config.num_kv_heads)
    elif config.multi_query:
        key_value_heads = 1
    head_dim = int(config.hidden_size) // heads
    return 2 * int(config.hidden_size) * head_dim * (heads + key_value_heads)


def adds_output(config: Any) -> float | None:
    """A block adds what its last linear puts out to what does not depend on it."""
    return 1.0


def no_output_scale(config: Any) -> float | None:
    """A norm stands between a block's last linear and its output, or a mixture's weights do."""
    return None


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Names inside a block whose MLP may be a mixture of experts.

    Files have every expert's linears by themselves; transformers keeps those of all experts in two
    parameters, ``gate_up_proj [E, 2 F, D]`` and ``down_proj [E, D, F]``.
    """

    experts: str = "mlp.experts"
    """The module path of the experts."""
    gate: str = "gate_proj"
    """What files call an expert's linear whose output goes through the activation function."""
    up: str = "up_proj"
    """What files call the linear whose output is multiplied with that."""
    down: str = "down_proj"
    """What files call the linear of that product."""

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linear groups of every expert."""
        each = f"{self.experts}.*"
        return (
            LinearGroup((f"{each}.{self.gate}", f"{each}.{self.up}")),
            LinearGroup((f"{each}.{self.down}",), level=1),
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture's adapter."""

    model_types: tuple[str, ...]
    """The ``config.model_type`` values that the adapter serves."""
    blocks: str
    """The module path of the list of decoder blocks."""
    attention: str
    """The name of a block's attention, which comes before its MLP."""
    groups: tuple[LinearGroup, ...]
    """The linear groups of a block's MLP, in the order in which data passes through them; with a
    ``mixture`` those of every kind of block, which ``block_groups`` chooses from."""
    default_seqlen: int
    """Tokens per window where nobody asks for another number."""
    attention_output: AttentionOutput = "tuple"
    """The form in which a block's attention returns its output."""
    attention_weights: Callable[[Any], int] = projection_weights
    """Counts the weights of one block's attention, given the model's config."""
    output_scale: Callable[[Any], float | None] = adds_output
    """What a block's last linear puts out is multiplied with this before it is added to the block's
    output, given the model's config; None where it is not simply added."""
    is_transposed: bool = False
    """Whether the MLP's linears are of the kind ``Conv1D``, whose weights are ``[D, O]``."""
    mixture: Mixture | None = None
    """Where blocks may have experts of which a router chooses a few for every token."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Pairs of parts of names that files and transformers versions use for the same module."""
    rope_names: tuple[tuple[str, str], ...] = (
        ("rope_theta", "rope_theta"),
        ("partial_rotary_factor", "partial_rotary_factor"),
    )
    """Settings of rotary positions, and their names in configs of transformers 4.

    Where kinds of attention differ in them, the kind stands before a dot; version 4 knows a scaling
    of the kind that is named first."""


_GATED_MLP = (
    LinearGroup(("mlp.gate_proj", "mlp.up_proj")),
    LinearGroup(("mlp.down_proj",), level=1),
)
_SHARED_EXPERT = (
    LinearGroup(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
    LinearGroup(("mlp.shared_expert.down_proj",), level=1),
)
_MIXTRAL = Mixture(gate="w1", up="w3", down="w2")

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        attention="attention",
        groups=(LinearGroup(("mlp.dense_h_to_4h",)), LinearGroup(("mlp.dense_4h_to_h",), level=1)),
        default_seqlen=2048,
        aliases=(("embed_out.", "lm_head."),),
        rope_names=(("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")),
    ),
    Family(
        model_types=(
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "cohere",
            "cohere2",
            "smollm3",
            "stablelm",
        ),
        blocks="model.layers",
        attention="self_attn",
        groups=_GATED_MLP,
        default_seqlen=4096,
    ),
    Family(
        model_types=("granite",),
        blocks="model.layers",
        attention="self_attn",
        groups=_GATED_MLP,
        default_seqlen=4096,
        output_scale=lambda config: float(config.residual_multiplier),
    ),
    Family(
        model_types=("gemma2", "olmo2"),
        blocks="model.layers",
        attention="self_attn",
        groups=_GATED_MLP,
        default_seqlen=4096,
        output_scale=no_output_scale,
    ),
    Family(
        model_types=("falcon",),
        blocks="transformer.h",
        attention="self_attention",
        groups=(LinearGroup(("mlp.dense_h_to_4h",)), LinearGroup(("mlp.dense_4h_to_h",), level=1)),
        default_seqlen=2048,
        attention_weights=_falcon_attention_weights,
    ),
    Family(
        model_types=("gemma3_text",),
        blocks="model.layers",
        attention="self_attn",
        groups=_GATED_MLP,
        default_seqlen=4096,
        output_scale=no_output_scale,
        rope_names=(
            ("full_attention.rope_theta", "rope_theta"),
            ("sliding_attention.rope_theta", "rope_local_base_freq"),
        ),
    ),
    Family(
        model_types=("gpt2",),
        blocks="transformer.h",
        attention="attn",
        groups=(LinearGroup(("mlp.c_fc",)), LinearGroup(("mlp.c_proj",), level=1)),
        default_seqlen=1024,
        is_transposed=True,
    ),
    Family(
        model_types=("gptj",),
        blocks="transformer.h",
        attention="attn",
        groups=(LinearGroup(("mlp.fc_in",)), LinearGroup(("mlp.fc_out",), level=1)),
        default_seqlen=2048,
    ),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        attention="self_attn",
        groups=(LinearGroup(("fc1",)), LinearGroup(("fc2",), level=1)),
        default_seqlen=2048,
        # Its smallest form but one normalises what it adds up.
        output_scale=lambda config: 1.0 if config.do_layer_norm_before else None,
    ),
    Family(
        model_types=("phi",),
        blocks="model.layers",
        attention="self_attn",
        groups=(LinearGroup(("mlp.fc1",)), LinearGroup(("mlp.fc2",), level=1)),
        default_seqlen=2048,
    ),
    Family(
        model_types=("phi3",),
        blocks="model.layers",
        attention="self_attn",
        groups=(LinearGroup(("mlp.gate_up_proj",)), LinearGroup(("mlp.down_proj",), level=1)),
        default_seqlen=4096,
    ),
    Family(
        model_types=("mixtral",),
        blocks="model.layers",
        attention="self_attn",
        groups=_MIXTRAL.groups,
        mixture=_MIXTRAL,
        default_seqlen=4096,
        output_scale=no_output_scale,
        aliases=((".block_sparse_moe.", ".mlp."),),
    ),
    Family(
        model_types=("olmoe", "qwen2_moe", "qwen3_moe"),
        blocks="model.layers",
        attention="self_attn",
        groups=(*_GATED_MLP, *_SHARED_EXPERT, *Mixture().groups),
        mixture=Mixture(),
        default_seqlen=4096,
        output_scale=no_output_scale,
    ),
)


def family_of(model_type: str) -> Family:
    """The adapter that serves ``config.model_type``.

    Raises:
        ValueError: there is no such adapter; the message says what to add.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ValueError(
        f"architecture {model_type!r} is not supported (known: {known}): add a Family with its "
        "block list and its MLP linears to sparse_expansion/model/families.py, see "
        "docs/how-to.md"
    )


def default_seqlen(config: Any) -> int:
    """Tokens per window where nobody asks for a number: the family's, or all that the model has.

    Raises:
        ValueError: the architecture is not supported.
    """
    preferred = family_of(config.model_type).default_seqlen
    return min(preferred, int(getattr(config, "max_position_embeddings", None) or preferred))


def check_seqlen(seqlen: int, config: Any) -> None:
    """Answer windows that the model cannot take, before any work.

    Args:
        seqlen: tokens in a window.
        config: a transformers config.

    Raises:
        ValueError: a window has too few tokens to score one, or more than the model has positions.
    """
    if seqlen < 2:
        raise ValueError(f"--seqlen {seqlen} must be at least 2 tokens")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise ValueError(
            f"seqlen {seqlen} is more than the model's {limit} positions: use --seqlen {limit} or "
            "less"
        )
