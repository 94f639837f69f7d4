"""Every family from end to end: streamed, expanded, loaded, saved again, exported."""

import json
import logging
import math
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from sparse_expansion.algorithms.perplexity import window_nll
from sparse_expansion.cli import main
from sparse_expansion.model.expansion import ExpandedLinear
from sparse_expansion.model.families import FAMILIES
from sparse_expansion.model.streaming import ModelShell
from tests import tiny
from tests.model.running import expand, expanded_linears, logits, stream

EVERY_FAMILY = pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
PLAIN_FORMS = [form for form in sorted(tiny.CONFIGS) if "/" not in form]
EVERY_TYPE = pytest.mark.parametrize("model_type", PLAIN_FORMS)
# Guards are by the names of linears, which are an entry's.
EVERY_ENTRY = pytest.mark.parametrize("model_type", [each.model_types[0] for each in FAMILIES])
TOKENS = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(3))
QUICK = "--data-shards 1 --layer-sparsity uniform --experts-per-unit 3".split()
ONE_DENSE_EXPERT = (
    "--num_clusters 1 --sparsity 0 --calibration-inputs dense --no_PCA --data-shards 1".split()
)


@pytest.fixture(scope="module")
def short_text(tmp_path_factory, text_folder):
    """As much text as the few windows of these runs take."""
    folder = tmp_path_factory.mktemp("short")
    for name in ("train.txt", "test.txt"):
        (folder / name).write_text((text_folder / name).read_text()[:15_000])
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer):
    """The folder of a family's random model, made once."""
    made = {}

    def folder(model_type):
        if model_type not in made:
            path = tmp_path_factory.mktemp("dense") / "m"
            made[model_type] = tiny.save_random(model_type, path, tokenizer)
        return made[model_type]

    return folder


@pytest.fixture(scope="module")
def expanded(dense, tmp_path_factory, short_text):
    """The folder of its expansion by three experts, made once."""
    made = {}

    def folder(model_type):
        if model_type not in made:
            path = tmp_path_factory.mktemp("expanded") / "m"
            # The measurement of shares prunes dense blocks in place: one transposed kind will do.
            flags = [] if model_type == "gpt2" else QUICK
            made[model_type] = expand(dense(model_type), short_text, path, *flags)
        return made[model_type]

    return folder


@EVERY_FAMILY
def test_the_streamed_model_is_transformers_own(model_type, dense):
    shell = ModelShell(dense(model_type))
    model = AutoModelForCausalLM.from_pretrained(dense(model_type))
    wanted, found = logits(model, TOKENS), stream(shell, TOKENS)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        loss = float(model(TOKENS, labels=TOKENS).loss)
    parts = window_nll(found, TOKENS)
    total, count = sum(part.total for part in parts), sum(part.num_tokens for part in parts)
    assert math.exp(total / count) == pytest.approx(math.exp(loss), rel=1e-6)
    assert [shell.architecture] == model.config.architectures


@pytest.mark.parametrize("model_type", ["gemma3_text", "gptj"])
def test_positions_are_not_rounded_with_the_weights(model_type, tmp_path):
    """GPT-J computes its table of positions in the dtype that it is built in."""
    tiny.random_model(model_type).bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = stream(ModelShell(tmp_path), TOKENS)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, logits(model, TOKENS))


@EVERY_TYPE
def test_expands_loads_and_generates(model_type, dense, expanded):
    output = expanded(model_type)
    model = AutoModelForCausalLM.from_pretrained(output)
    streamed = stream(ModelShell(output), TOKENS)
    torch.testing.assert_close(logits(model, TOKENS), streamed, rtol=1e-4, atol=1e-4)
    generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 44)
    shell = ModelShell(dense(model_type))
    found = [name for name, part in model.named_modules() if isinstance(part, ExpandedLinear)]
    assert sorted(found) == sorted(shell.expanded_names())
    # What is stored is pruned: the model is another one than the dense.
    assert not torch.allclose(streamed, stream(shell, TOKENS), rtol=1e-4, atol=1e-4)


@EVERY_FAMILY
def test_one_dense_expert_is_the_dense_model_and_exports_as_it(
    model_type, dense, short_text, tmp_path
):
    """A linear that is not pruned has its own weights, in our format and in the plain one."""
    wanted = logits(AutoModelForCausalLM.from_pretrained(dense(model_type)), TOKENS)
    output = expand(dense(model_type), short_text, tmp_path / "one", *ONE_DENSE_EXPERT)
    model = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(logits(model, TOKENS), wanted, rtol=1e-5, atol=1e-5)
    assert main(["export", str(output), "--output", str(tmp_path / "plain")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not expanded_linears(plain)
    torch.testing.assert_close(logits(plain, TOKENS), wanted, rtol=1e-5, atol=1e-5)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (dense(model_type), tmp_path / "plain")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def transformers_says(caplog):
    """What transformers logs, which goes past the root logger."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@EVERY_ENTRY
def test_a_program_that_does_not_know_the_format_refuses_it(
    model_type, expanded, tmp_path, monkeypatch, transformers_says
):
    """In place of a model with made-up weights and a warning. Saved again it still is refused."""
    output = expanded(model_type)
    model = AutoModelForCausalLM.from_pretrained(output)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, TOKENS), logits(model, TOKENS))
    for known in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(known, "sparse_expansion")
    # The command line had it say errors alone.
    transformers_says.set_level(logging.WARNING, "transformers")
    for loader, name in ((AutoModelForCausalLM, output), (AutoModel, tmp_path / "again")):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            loader.from_pretrained(name)
        # Among the tensors that it cannot place, transformers lists one that says what to do.
        assert "Before loading, import sparse_expansion" in transformers_says.text
        transformers_says.clear()


@EVERY_FAMILY
def test_every_family_can_be_planned(model_type, dense, capsys):
    arguments = ["plan", "--model", str(dense(model_type)), "--seqlen", "32", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    model = tiny.random_model(model_type)
    assert found["parameters"] == model.num_parameters()


def test_transposed_linears_have_no_packed_form(dense, short_text, tmp_path, capsys):
    flags = ["--quantize", "--pruner", "sparsegpt"]
    output = expand(dense("gpt2"), short_text, tmp_path / "x", *ONE_DENSE_EXPERT, *flags)
    where = ["--output", str(tmp_path / "packed"), "--format", "pack-quantized"]
    assert main(["export", str(output), *where]) == 2
    assert "no form for the transposed linears of gpt2" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("model_type", ["cohere2", "gemma2", "gemma3_text"])
def test_blocks_with_windows_and_positions_of_their_own_are_called_with_them(model_type, dense):
    """A block that is called with another's windows is seen."""
    shell = ModelShell(dense(model_type))
    wanted = logits(AutoModelForCausalLM.from_pretrained(dense(model_type)), TOKENS)
    hidden = shell.embed(TOKENS)
    with torch.no_grad():
        for layer in range(shell.num_blocks):
            hidden = shell.call(0, TOKENS).run(shell.load_block(layer), hidden)
    assert not torch.allclose(shell.head(TOKENS, hidden), wanted, rtol=1e-3, atol=1e-3)


def test_a_setting_that_only_the_models_code_finds_wrong_is_one_line(
    dense, short_text, tmp_path, capsys
):
    folder = tmp_path / "m"
    shutil.copytree(dense("falcon"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_dropout": None}))
    where = ["--model", str(folder), "--dataset", str(short_text), "--seqlen", "16"]
    assert main(["evaluate", *where, "--eval-windows", "1"]) == 1
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert "TypeError: '<' not supported" in error and "error: evaluate" in error
