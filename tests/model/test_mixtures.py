"""Mixtures of experts: their linears calibrated on the tokens that are routed to them."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from sparse_expansion.algorithms.compress import compress_experts
from sparse_expansion.algorithms.hessian import hessian_sum
from sparse_expansion.cli import main
from sparse_expansion.config import CompressionConfig, RoutingConfig
from sparse_expansion.jobs.assemble import dense_bytes
from sparse_expansion.jobs.export import _exportable
from sparse_expansion.model.expansion import ExpandedLinear
from sparse_expansion.model.families import family_of
from sparse_expansion.model.plain_blocks import MixtureExperts, fused_part
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.planning.shapes import model_shape
from sparse_expansion.report.experts import expert_rows
from tests import tiny
from tests.model.running import logits, stream
from tests.work.making import make, tensors

TOKENS = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(3))
STARVED = "--num_clusters 3 --dataset-size 6 --seqlen 32 --PCA_reduction_factor 4 --block-size 16"
STARVED += " --calibration-inputs sequential --finetune 1 --sparsity 0.5 --eval-windows 2"
STARVED += " --layer-sparsity uniform --data-shards 2 --pruner sparsegpt"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, tokenizer):
    """The folder of a block of experts, one of them shared, and a dense block behind it."""
    return tiny.save_random("qwen2_moe", tmp_path_factory.mktemp("mixture") / "m", tokenizer)


def fused_experts(*, num_experts=5, inner=6, width=8):
    config = tiny.random_model(
        "mixtral", num_local_experts=num_experts, intermediate_size=inner, hidden_size=width
    ).config
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return experts


def test_outputs_of_experts_are_transformers_own():
    """Against its loop, and against sums in float64; the last expert gets no token."""
    fused, mixture = fused_experts(), family_of("mixtral").mixture
    experts = MixtureExperts(fused, mixture)
    state = {}
    for name in experts.state_dict():
        parameter, expert, (index, count) = fused_part(f"layer.mlp.experts.{name}", mixture)
        fused_EOD = fused.get_parameter(parameter.rpartition(".")[2])
        state[name] = fused_EOD[expert].chunk(count)[index].detach()
    experts.load_state_dict(state, assign=True)
    X_TD = torch.randn(9, 8)
    chosen_TR = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights_TR = torch.rand(9, 2)
    with torch.no_grad():
        found = experts(X_TD, chosen_TR, weights_TR)
        wanted = fused(X_TD, chosen_TR, weights_TR)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    for token in range(9):
        oracle = torch.zeros(8, dtype=torch.float64)
        for expert, weight in zip(chosen_TR[token], weights_TR[token], strict=True):
            gate, up, down = (
                state[f"{expert}.{name}.weight"].double() for name in ("w1", "w3", "w2")
            )
            x = X_TD[token].double()
            inner = torch.nn.functional.silu(gate @ x) * (up @ x)
            oracle += weight.double() * (down @ inner)
        torch.testing.assert_close(found[token].double(), oracle, rtol=1e-5, atol=1e-5)
    assert experts(X_TD[:0], chosen_TR[:0], weights_TR[:0]).shape == (0, 8)


def test_fused_files_are_read_as_separate_ones(mixture, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(mixture)
    model.save_pretrained(tmp_path, save_original_format=False)
    shell, separate = ModelShell(tmp_path), ModelShell(mixture)
    assert "model.layers.0.mlp.experts.gate_up_proj" in shell.files
    assert "model.layers.0.mlp.experts.gate_up_proj" not in separate.files
    assert torch.equal(stream(shell, TOKENS), stream(separate, TOKENS))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert dense_bytes(shell) == dense_bytes(separate) == weights


def test_groups_are_those_that_a_block_has(mixture):
    shell = ModelShell(mixture)
    routed = [group.linears[0] for group in shell.groups(0) if group.is_routed]
    assert routed == [f"mlp.experts.{e}.gate_proj" for e in range(4)] + [
        f"mlp.experts.{e}.down_proj" for e in range(4)
    ]
    assert [group.level for group in shell.groups(0)] == [0] * 5 + [1] * 5
    assert [group.linears for group in shell.groups(1)] == [
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    shape = model_shape(shell)
    # Of four experts a token takes two; the shared one and the dense block take every token.
    shares = [group.tokens_share for group in shape.at(0).groups]
    assert shares == [1.0, *[0.5] * 4, 1.0, *[0.5] * 4]
    assert shape.at(0).mlp_weights == 3 * 32 * (40 + 4 * 24)
    used = 3 * 32 * (40 + 2 * 24)
    assert shape.at(0).block_flops(16) - shape.attention_flops(16) == 2 * used
    assert shape.at(1).mlp_weights == 3 * 32 * 64
    assert shape.groups_before(1) == 10


def routed_inputs(model, windows):
    """Inputs of the first block's experts' linears by name, as transformers' own router deals."""
    mlp = model.model.layers[0].mlp
    seen = []
    handle = mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(windows)
    handle.remove()
    ((X_TD, chosen_TR, _),) = seen
    inputs = {}
    for expert in range(4):
        own_TD = X_TD[(chosen_TR == expert).any(dim=1)]
        gate, up = (own_TD @ mlp.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        inputs[f"mlp.experts.{expert}.gate_proj"] = own_TD
        inputs[f"mlp.experts.{expert}.up_proj"] = own_TD
        inputs[f"mlp.experts.{expert}.down_proj"] = torch.nn.functional.silu(gate) * up
    return inputs


def test_an_expert_is_calibrated_on_the_tokens_routed_to_it(mixture, text_folder, tmp_path):
    """With one cluster: SparseGPT on the inputs that plain transformers hands the expert."""
    settings = {"schedule": "dense", "compression": CompressionConfig(), "data_shards": 1}
    store, windows, _ = make(mixture, text_folder, tmp_path / "o", **settings)
    found, shell = tensors(store), ModelShell(mixture)
    model = AutoModelForCausalLM.from_pretrained(mixture, experts_implementation="eager")
    with torch.no_grad():
        inputs = routed_inputs(model, windows)
    rows = {row.linear: row for row in expert_rows(store.records()) if row.layer == 0}
    assert sum(rows[f"mlp.experts.{e}.gate_proj"].tokens for e in range(4)) == 2 * windows.numel()
    for name, X_TD in inputs.items():
        assert rows[name].tokens == len(X_TD) > 0
        weight = shell.load_block(0).get_submodule(name).weight
        made = compress_experts(weight, hessian_sum(X_TD).sum_DD[None], CompressionConfig(), None)
        stored = found[f"model.layers.0.{name}.experts.0.values"]
        values = made.weight_KOD[0][made.kept_KOD[0]]
        assert float(torch.isclose(stored, values, rtol=1e-3, atol=1e-4).float().mean()) > 0.97
    # Routers of the mixture and the shared expert's gate stay as they are.
    gate = model.model.layers[0].mlp.gate.weight
    assert torch.equal(found["model.layers.0.mlp.gate.weight"], gate)


@pytest.fixture(scope="module")
def starved(tmp_path_factory, tokenizer, text_folder):
    """Folders of a model whose fifth expert no token is routed to, and of its expansion."""
    dense, output = (tmp_path_factory.mktemp("starved") / name for name in ("dense", "expanded"))
    model = tiny.random_model("mixtral", num_local_experts=5)
    # Of a pair one logit is positive: two are above the last one's, which is zero.
    first, second = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    gate = torch.stack([first, -first, second, -second, torch.zeros(32)])
    model.model.layers[0].mlp.gate.weight.data = gate
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    arguments = ["run", "--model", str(dense), "--dataset", str(text_folder), "--output"]
    assert main([*arguments, str(output), *STARVED.split()]) == 0
    return dense, output


def test_an_expert_without_tokens_is_counted_and_keeps_its_largest_weights(starved, capsys):
    dense, output = starved
    metrics = json.loads((output / "metrics.json").read_text())
    counts = metrics["mixtures"]
    assert (counts["experts"], counts["without_tokens"]) == (5, 1)
    # Three for each of its two groups of linears.
    assert 1 <= counts["starved"] < 5 and metrics["starved_experts"] >= 2 * 3
    assert main(["report", str(output)]) == 0
    assert f"{counts['starved']} of the mixture's 5 experts had" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(output)
    plain = AutoModelForCausalLM.from_pretrained(dense)
    expert = model.model.layers[0].mlp.experts[4]
    fused = plain.model.layers[0].mlp.experts
    gate, up = fused.gate_up_proj[4].detach().chunk(2)
    for name, weight in (("w1", gate), ("w3", up), ("w2", fused.down_proj[4].detach())):
        linear = expert.get_submodule(name)
        assert isinstance(linear, ExpandedLinear)
        for k in range(3):
            found = linear.unpack(k, torch.float32)
            # Of the 16 columns that are pruned together, half: the smaller ones.
            for columns, wanted in zip(found.split(16, 1), weight.split(16, 1), strict=True):
                kept = columns != 0
                assert int(kept.sum()) == wanted.numel() // 2
                torch.testing.assert_close(columns[kept], wanted[kept])
                assert wanted[kept].abs().min() >= wanted[~kept].abs().max()


def test_an_expanded_mixture_is_loaded_and_saved(starved, tmp_path):
    _, output = starved
    model, said = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = logits(model, TOKENS)
    torch.testing.assert_close(found, stream(ModelShell(output), TOKENS), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again, said = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again, TOKENS), found)
    # Under the names that transformers gives a mixture's files.
    assert torch.equal(stream(ModelShell(tmp_path), TOKENS), stream(ModelShell(output), TOKENS))


def test_studies_of_neurons_say_that_they_take_no_mixture(mixture, text_folder, capsys):
    flags = ["--model", str(mixture), "--dataset", str(text_folder), "--seqlen", "16"]
    assert main(["sweep-clusters", *flags, "--layer", "0", "--num_clusters", "2"]) == 2
    assert "the model is a mixture of experts" in capsys.readouterr().err


def test_packed_experts_of_a_mixture_have_no_other_format():
    expansion = SimpleNamespace(
        routing_config=lambda: RoutingConfig(num_clusters=1),
        compression_config=lambda: CompressionConfig(bits=4),
    )
    shell = SimpleNamespace(
        expansion=expansion,
        family=family_of("olmoe"),
        config=SimpleNamespace(model_type="olmoe"),
        folder="folder",
    )
    with pytest.raises(ValueError, match="export olmoe with --format dense"):
        _exportable(shell, "pack-quantized")


def test_a_config_of_more_experts_per_token_than_there_are(mixture, tmp_path, capsys):
    config = json.loads((mixture / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 9}))
    assert main(["plan", "--model", str(tmp_path), "--seqlen", "16"]) == 2
    assert "num_experts_per_tok 9, and blocks of 4 experts" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": 10**6}))
    assert main(["plan", "--model", str(tmp_path), "--seqlen", "16"]) == 2
    assert "models have 0 to 4096" in capsys.readouterr().err
