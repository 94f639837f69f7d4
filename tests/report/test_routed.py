"""Where an expanded model sends a text: hand values, and the model's own routing."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_expansion import evaluate
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.data.windows import evaluation_windows
from sparse_expansion.report.experts import ExpertRow, finished_experts, linear_facts
from sparse_expansion.report.routed import RoutedGroup, routed_facts
from sparse_expansion.report.tables import evaluation_table, expert_summary
from sparse_expansion.store import Store
from tests.model.running import expanded_linears


def row(expert, tokens):
    return ExpertRow(0, "mlp.up+gate", "mlp.up", expert, tokens, 0.1, False, 0.01, 1, 0)


def test_by_hand():
    experts = [row(0, 100), row(1, 3)]
    groups = {
        "0.mlp.up": RoutedGroup(16, 200, [100, 60]),
        "0.mlp.down": RoutedGroup(16, 100, [50, 90]),
    }
    facts = routed_facts({"0.mlp.up": [30, 10]}, experts, groups)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    used = math.exp(entropy)
    assert facts == pytest.approx({"used_experts": used, "kept_share": 0.45, "thin_share": 0.25})
    # A group without tokens says nothing; without records it is not known who is thin.
    counts = {"0.mlp.up": [5, 5], "0.mlp.down": [0, 0]}
    facts = routed_facts(counts, [], groups)
    assert facts == pytest.approx({"used_experts": 2.0, "kept_share": 0.4})
    # Large groups count for more, and those that more tokens pass.
    counts = {"0.mlp.up": [10, 10], "0.mlp.down": [5, 0]}
    facts = routed_facts(counts, [], groups)
    assert facts["kept_share"] == pytest.approx((10 * 160 + 5 * 50) / (20 * 200 + 5 * 100))
    assert routed_facts({}, experts, {}) == {}


@pytest.mark.parametrize(
    ("shares", "zeros", "told"),
    [
        ((0.2, 0.8), (0.2, 0.8), " 20 to 80 % "),
        ((0.5, 0.5), (0.5, 0.5), " 50 % "),
        ((None,), None, ""),
    ],
)
def test_a_linears_shares_of_zeros(shares, zeros, told):
    rows = [replace(row(expert, 10), sparsity=share) for expert, share in enumerate(shares)]
    (facts,) = linear_facts(rows)
    assert facts.zeros == zeros
    header, _, line = expert_summary([facts]).splitlines()
    assert "zeros" in header and told in line


@pytest.fixture(scope="module")
def result(measured_run, text_folder):
    return evaluate(measured_run, text_folder, seqlen=48, eval_windows=4).metrics


def test_a_text_is_routed_as_by_the_loaded_model(measured_run, text_folder, result):
    model = AutoModelForCausalLM.from_pretrained(measured_run)
    owners = [linear for linear in expanded_linears(model) if hasattr(linear, "router")]
    shares = {}

    def note(linear, inputs, output):
        experts = linear.router.experts(inputs[0].reshape(-1, linear.in_features))
        counts = torch.bincount(experts, minlength=len(linear.experts)).double()
        shares[linear] = counts / counts.sum()

    for linear in owners:
        linear.register_forward_hook(note)
    tokenizer = AutoTokenizer.from_pretrained(measured_run)
    text = load_corpus(text_folder).evaluation
    windows = evaluation_windows(
        text,
        lambda part, most=None: torch.tensor(tokenizer(part)["input_ids"]),
        seqlen=48,
        max_windows=4,
    )
    with torch.no_grad():
        model(windows)
    used = [math.exp(float(torch.special.entr(share).sum())) for share in shares.values()]
    assert len(used) == len(owners) > 2
    assert result["routed"]["used_experts"] == pytest.approx(sum(used) / len(used))
    tokens = {
        (f"layers.{each.layer}.{each.linear}", each.expert): each.tokens
        for each in finished_experts(Store(str(measured_run)))
    }
    thin = []
    for name, linear in model.named_modules():
        if linear in shares:
            own = [
                tokens[name.partition(".")[2], k] < linear.in_features
                for k in range(len(linear.experts))
            ]
            thin.append(float(shares[linear][torch.tensor(own)].sum()))
    assert 0 < result["routed"]["thin_share"] == pytest.approx(sum(thin) / len(thin))


def test_the_table_says_it(measured_run, text_folder, tmp_path, result):
    table = evaluation_table(result)
    assert f"as if {result['routed']['used_experts']:.1f} took equal shares" in table
    assert "tokens of thin experts" in table
    assert f"{result['routed']['kept_share']:.1%} of the dense MLPs'" in table
    copied = tmp_path / "copy"
    shutil.copytree(measured_run, copied, ignore=shutil.ignore_patterns("units", ".sparse*"))
    assert not Store(str(copied)).records()
    found = evaluate(copied, text_folder, seqlen=48, eval_windows=4).metrics
    assert found["routed"] == pytest.approx(
        {name: result["routed"][name] for name in ("used_experts", "kept_share")}
    )
    assert "tokens of thin experts" not in evaluation_table(found)
