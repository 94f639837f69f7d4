"""Every family's entry against the models that it describes."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_expansion.data.activations import AttentionOutputs
from sparse_expansion.model.block_linears import (
    block_groups,
    block_list,
    dense_linear,
    linear_shape,
)
from sparse_expansion.model.families import FAMILIES, default_seqlen, family_of, projection_weights
from sparse_expansion.model.plain_blocks import plain_blocks
from tests import tiny

BY_MODEL_TYPE = [
    pytest.param(family, form, id=form)
    for family in FAMILIES
    for form in tiny.CONFIGS
    if form.partition("/")[0] in family.model_types
]


def test_every_family_is_tested():
    known = {name for family in FAMILIES for name in family.model_types}
    assert known == {form.partition("/")[0] for form in tiny.CONFIGS}


def test_unknown_architecture_says_what_to_add():
    with pytest.raises(ValueError, match="'mamba' is not supported.*families.py"):
        family_of("mamba")
    with pytest.raises(ValueError, match="no block list"):
        block_list(torch.nn.Linear(1, 1), family_of("llama"))


@pytest.mark.parametrize(("family", "model_type"), BY_MODEL_TYPE)
def test_the_entry_fits_the_model(family, model_type):
    model = tiny.random_model(model_type)
    assert family_of(model.config.model_type) is family
    blocks = plain_blocks(model, family)
    assert len(blocks) == model.config.num_hidden_layers
    assert block_groups(blocks[0], family)
    for group in block_groups(blocks[0], family):
        weights = [dense_linear(blocks[0], name).weight for name in group.linears]
        shapes = [linear_shape(blocks[0], name) for name in group.linears]
        assert shapes == [tuple(weight.shape) for weight in weights]
        # Linears of a group read the same input.
        assert len({width for _, width in shapes}) == 1
    for first, second in family.aliases:
        assert first != second and first.endswith(".") and second.endswith(".")


@pytest.mark.parametrize(("family", "model_type"), BY_MODEL_TYPE)
def test_attentions_weights_are_those_of_its_projections(family, model_type):
    model = tiny.random_model(model_type)
    attention = block_list(model, family)[0].get_submodule(family.attention)
    # Cohere's norms of single heads are stored as matrices too.
    named = attention.named_parameters()
    matrices = [p.numel() for name, p in named if p.dim() == 2 and "norm" not in name]
    assert family.attention_weights(model.config) == sum(matrices)


def test_projections_by_hand():
    # q and o are 32 x (4 * 16), k and v 32 x (2 * 16).
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    assert projection_weights(config) == 2 * 32 * 64 + 2 * 32 * 32
    # Without key and value heads or a width of a head: four square matrices.
    assert projection_weights(SimpleNamespace(hidden_size=32, num_attention_heads=4)) == 4 * 32**2


@pytest.mark.parametrize(("family", "model_type"), BY_MODEL_TYPE)
def test_attention_is_recorded_and_replayed_in_the_familys_form(family, model_type):
    model = tiny.random_model(model_type)
    block = block_list(model, family)[-1]
    tokens, given = torch.randint(1, 500, (2, 12)), {"form": family.attention_output}
    with torch.no_grad():
        with AttentionOutputs(block, family.attention, replays=False, **given) as seen:
            wanted = model(tokens).logits
        assert seen.output.shape == (2, 12, model.config.hidden_size)
        attention = block.get_submodule(family.attention)
        attention.register_forward_hook(lambda *args: pytest.fail("run"))
        with AttentionOutputs(block, family.attention, replays=True, **given) as kept:
            kept.output = seen.output
            assert torch.equal(model(tokens).logits, wanted)


@pytest.mark.parametrize(("family", "model_type"), BY_MODEL_TYPE)
def test_what_the_last_linear_puts_out_is_added_to_the_blocks_output(family, model_type):
    model = tiny.random_model(model_type).eval()
    scale = family.output_scale(model.config)
    if family.mixture is not None:
        assert scale is None
        return
    block = block_list(model, family)[0]
    # There is one that is the last, and it is alone.
    first, last = family.groups
    assert (first.level, last.level) == (0, 1)
    (name,) = last.linears
    tokens = torch.randint(1, 500, (2, 12))
    change = 0.1 * torch.randn(2, 12, model.config.hidden_size)

    def output():
        found = []
        handle = block.register_forward_hook(
            lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model(tokens)
        handle.remove()
        return found[0]

    before = output()
    block.get_submodule(name).register_forward_hook(
        lambda module, args, out: out + change.view_as(out)
    )
    changed = output() - before
    if scale is None:
        assert not torch.allclose(changed / changed.norm(), change / change.norm(), atol=1e-3)
    else:
        torch.testing.assert_close(changed, scale * change, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "preferred"),
    [
        ("gpt_neox", 2048),
        ("llama", 4096),
        ("mistral", 4096),
        ("qwen2", 4096),
        ("qwen3", 4096),
        ("opt", 2048),
        ("gemma3_text", 4096),
        ("gpt2", 1024),
        ("gptj", 2048),
        ("phi", 2048),
        ("phi3", 4096),
    ],
)
def test_windows_are_as_long_as_the_family_likes_or_the_model_allows(model_type, preferred):
    for limit, wanted in ((32768, preferred), (preferred, preferred), (512, 512)):
        config = AutoConfig.for_model(model_type, max_position_embeddings=limit)
        assert default_seqlen(config) == wanted
    assert default_seqlen(SimpleNamespace(model_type=model_type)) == preferred


def test_a_block_list_of_another_version_is_named():
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", num_hidden_layers=1))
    with pytest.raises(ValueError, match="OPTForCausalLM has no block list 'model.layers'"):
        block_list(model, family_of("llama"))
    with pytest.raises(ValueError, match="has no linear 'mlp.gate_proj'"):
        linear_shape(block_list(model, family_of("opt"))[0], "mlp.gate_proj")
    with pytest.raises(ValueError, match="not a dense nn.Linear"):
        dense_linear(model, "model")
