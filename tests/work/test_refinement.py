"""Training of kept weights: what stays, what moves, and how it goes through a run."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparse_expansion  # noqa: F401
from sparse_expansion.algorithms.packing.experts import unpack_kept
from sparse_expansion.cli import main
from sparse_expansion.config import CompressionConfig, RefinementConfig, SparsityPattern
from sparse_expansion.model.expansion import ExpandedLinear
from sparse_expansion.model.refinement import Batch, output_loss, refine, trainable_block
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.store import Store
from sparse_expansion.work.stages.make import held_windows, refine_block
from tests.tiny import SMALL_RUN
from tests.work.making import make, tensors

SHAPES = {
    "half": CompressionConfig(block_size=16, sparsity=SparsityPattern(fraction=0.5)),
    "2:4, 4 bits": CompressionConfig(block_size=16, sparsity=SparsityPattern.parse("2:4"), bits=4),
    "dense, 3 bits": CompressionConfig(
        block_size=16, sparsity=SparsityPattern(fraction=0.0), bits=3, group_size=16
    ),
}
TRAINED = RefinementConfig(finetune=4, finetune_rate=3e-4)


@pytest.fixture(params=SHAPES)
def expanded(request, tmp_path, llama_folder, text_folder):
    """A block of a run without training, its dense one, and windows that enter it."""
    store, windows, _ = make(
        llama_folder, text_folder, tmp_path / "o", clusters=3, compression=SHAPES[request.param]
    )
    shell = ModelShell(store.local_path())
    hidden = shell.embed(windows)
    dense = ModelShell(llama_folder)
    batch = Batch(hidden, shell.call(0, windows))
    return shell.load_block(0), dense.load_block(0), batch


def test_untrained_linears_are_the_served_ones(expanded):
    block, _, batch = expanded
    copied, linears = trainable_block(block)
    assert set(linears) == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    with torch.no_grad():
        served, trained = batch.call.run(block, batch.hidden), batch.call.run(copied, batch.hidden)
    assert torch.allclose(served, trained, rtol=1e-5, atol=1e-6)
    for name, linear in linears.items():
        module = block.get_submodule(name)
        for expert in range(3):
            packed = linear.packed(expert, torch.float32)
            for stream, value in module.tensors(expert).items():
                assert torch.equal(packed[stream], value), (name, stream)


# On a grid they are the straight-through estimator's, which no difference shows.
@pytest.mark.parametrize("expanded", ["half"], indirect=True)
def test_gradients_are_those_of_the_loss(expanded):
    """Central differences in float64 of the kept weights that the stored ones are equal to."""
    block, dense, batch = expanded
    copied, linears = trainable_block(block)
    linear = linears["mlp.down_proj"]
    with torch.no_grad():
        target = batch.call.run(dense, batch.hidden)
    output_loss(batch.call.run(copied, batch.hidden), target).backward()
    gradient = linear.weight_KOD.grad

    double = copy.deepcopy(copied).double()
    call = type(batch.call)(
        batch.call.args,
        {
            key: tuple(v.double() for v in value) if isinstance(value, tuple) else value
            for key, value in batch.call.kwargs.items()
        },
    )
    weight = double.get_submodule("mlp.down_proj").weight_KOD.data
    hidden, step = batch.hidden.double(), 1e-3
    flat = gradient.abs().flatten().argsort(descending=True)[:5].tolist()
    for index in flat:
        found = []
        for sign in (1, -1):
            weight.view(-1)[index] += sign * step
            with torch.no_grad():
                out = call.run(double, hidden).double()
            wanted = target.double()
            error = (out - wanted).square().mean(-1) / (wanted.square().mean(-1) + 1e-6)
            found.append(float(error.mean()))
            weight.view(-1)[index] -= sign * step
        assert float(gradient.view(-1)[index]) == pytest.approx(
            (found[0] - found[1]) / (2 * step), rel=2e-2
        )


def test_training_keeps_masks_and_grids_and_lowers_the_loss(expanded):
    block, dense, batch = expanded
    copied, linears = trainable_block(block)
    kept = {name: linear.kept_KOD.clone() for name, linear in linears.items()}
    found = refine(
        copied,
        linears,
        dense,
        batches=lambda epoch: [batch] * 8,
        held_out=lambda: [batch],
        num_steps=32,
        epochs=4,
        learning_rate=1e-3,
    )
    assert found.loss_after < found.loss_before and found.steps == 32 and found.epoch > 0
    moved = 0
    for name, linear in linears.items():
        module = block.get_submodule(name)
        assert isinstance(module, ExpandedLinear)
        for expert in range(3):
            packed = linear.packed(expert, torch.float32)
            assert torch.equal(unpack_kept(packed, module.layout), kept[name][expert])
            stored = dict(module.tensors(expert))
            moved += any(not torch.equal(packed[part], stored[part]) for part in packed)
            # What will be served is what was trained with.
            for part, value in packed.items():
                module.experts[expert].get_parameter(part).data.copy_(value)
            assert torch.allclose(
                module.unpack(expert, torch.float32), linear.effective_weight(expert), atol=1e-6
            )
    assert moved > 3


def test_training_that_makes_it_worse_is_thrown_away(expanded):
    block, dense, batch = expanded
    copied, linears = trainable_block(block)
    before = {name: linear.weight_KOD.detach().clone() for name, linear in linears.items()}
    found = refine(
        copied,
        linears,
        dense,
        batches=lambda epoch: [batch],
        held_out=lambda: [batch],
        num_steps=2,
        epochs=2,
        learning_rate=1.0,
    )
    assert found.epoch == 0 and found.loss_after == found.loss_before
    for name, linear in linears.items():
        assert torch.equal(linear.weight_KOD, before[name])


def test_every_shard_holds_windows_out():
    assert [held_windows(count) for count in (1, 2, 8, 16, 100)] == [0, 1, 1, 2, 12]


@pytest.mark.parametrize("schedule", ["compressed", "sequential", "dense"])
def test_a_run_with_training(schedule, tmp_path, llama_folder, text_folder):
    given = dict(clusters=2, schedule=schedule, dataset_size=16)
    plain = tensors(make(llama_folder, text_folder, tmp_path / "plain", **given)[0])
    store, windows, measured = make(
        llama_folder, text_folder, tmp_path / "o", refinement=TRAINED, **given
    )
    found = tensors(store)
    again = tensors(
        make(llama_folder, text_folder, tmp_path / "again", refinement=TRAINED, **given)[0]
    )
    assert set(found) == set(plain)
    assert all(torch.equal(found[name], again[name]) for name in found)
    # Masks of the first block are the pruner's: later ones see other inputs, or none of it.
    first = [name for name in found if ".layers.0.mlp" in name]
    for name in first:
        if name.endswith("bitmask"):
            assert torch.equal(found[name], plain[name]), name
    values = [name for name in first if name.endswith("values")]
    assert any(not torch.equal(found[name], plain[name]) for name in values)
    records = {key: value["stats"] for key, value in store.records().items() if "refine" in key}
    assert len(records) == 3 == measured.stages["refine"].units
    for stats in records.values():
        assert stats["loss_after"] <= stats["loss_before"]
    assert any(stats["epoch"] > 0 for stats in records.values())
    assert not store.list("run/drafts") and not store.list("run/hidden")
    model = AutoModelForCausalLM.from_pretrained(store.local_path())
    assert torch.isfinite(model(windows[:1]).logits).all()


def test_a_killed_run_goes_on_from_its_drafts(tmp_path, llama_folder, text_folder, monkeypatch):
    given = dict(clusters=2, refinement=TRAINED, experts_per_unit=1)
    whole = tensors(make(llama_folder, text_folder, tmp_path / "whole", **given)[0])
    trained = refine_block.function

    def dies(self, *, layer, **rest):
        if layer == 1:
            raise KeyboardInterrupt
        return trained(self, layer=layer, **rest)

    monkeypatch.setitem(vars(refine_block), "function", dies)
    with pytest.raises(KeyboardInterrupt):
        make(llama_folder, text_folder, tmp_path / "o", **given)
    monkeypatch.setitem(vars(refine_block), "function", trained)
    store = Store(tmp_path / "o")
    drafts = store.list("run/drafts")
    assert drafts and all(name.startswith("run/drafts/experts-001-") for name in drafts)
    before = set(store.records())
    resumed, _, measured = make(llama_folder, text_folder, tmp_path / "o", resume=True, **given)
    assert measured.stages["refine"].units == 2
    # Block 1's drafts are used as they are.
    assert measured.stages["experts"].units == len(
        [key for key in set(resumed.records()) - before if "/experts-" in key]
    )
    found = tensors(resumed)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_run_on_the_command_line(tmp_path, neox_folder, text_folder, capsys):
    run = ["run", "--model", str(neox_folder), "--dataset", str(text_folder), *SMALL_RUN]
    assert main([*run, "--eval-windows", "3", "--finetune", "--output", str(tmp_path / "o")]) == 0
    text = capsys.readouterr().out
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert metrics["config"]["refinement"] == {"finetune": 1, "finetune_rate": 2e-4}
    found = metrics["refinement"]
    assert 0 <= found["trained_blocks"] <= 3 and found["loss_after"] <= found["loss_before"]
    # The metrics are those of the three blocks' records.
    records = Store(tmp_path / "o").records()
    stats = [records[f"layer-{layer:03d}/refine"]["stats"] for layer in range(3)]
    assert found["trained_blocks"] == sum(each["epoch"] == 1 for each in stats)
    for name in ("loss_before", "loss_after"):
        assert found[name] == pytest.approx(sum(each[name] for each in stats) / 3)
    # Each of four shards has three windows, of which it holds one out; one step takes the others.
    assert [each["steps"] for each in stats] == [4, 4, 4]
    assert f"training changed {found['trained_blocks']} blocks" in text
    assert f"{found['loss_before']:.3e} -> {found['loss_after']:.3e}" in text
    # One window: nothing to hold out.
    alone = [*run, "--dataset-size", "1", "--num-clusters", "1", "--finetune", "2", "--json"]
    assert main([*alone, "--eval-windows", "3"]) == 0
    found = json.loads(capsys.readouterr().out)["refinement"]
    assert found["loss_before"] is None and found["trained_blocks"] == 3


def test_training_is_planned(neox_folder, capsys):
    plans = {}
    for epochs in (0, 1, 3):
        more = ["--finetune", str(epochs)] if epochs else []
        assert main(["plan", "--model", str(neox_folder), *SMALL_RUN[:-2], *more, "--json"]) == 0
        plans[epochs] = json.loads(capsys.readouterr().out)
    assert plans[3]["units"]["refine"] == 3 and "refine" not in plans[0]["units"]
    assert plans[3]["flops"]["refine"] > 0 and plans[3]["memory_bytes"]["stage: refine"] > 0
    # Training is the one difference to the plan without it.
    for what in ("units", "flops"):
        other = {name: value for name, value in plans[3][what].items() if name != "refine"}
        assert other == plans[0][what]
    assert plans[3]["flops"]["refine"] == 3 * plans[1]["flops"]["refine"]
    # Four passes through a block forward (a step back is two) for every token of 12 windows of 48,
    # in three blocks: attention's four projections of 64, and the MLP's 64 x 256 twice.
    products = 4 * 64**2 + 2 * 64 * 256
    scores = 64 * 48
    assert plans[1]["flops"]["refine"] == 4 * 3 * 12 * 48 * 2 * (products + scores)
    # Memory holds the float32 weights of four experts, their gradients, two moments and the best
    # so far, however many epochs there are; it is what the whole run needs most.
    trained = 4 * 2 * 64 * 256 * (5 * 4 + 1)
    memory = {epochs: plan["memory_bytes"] for epochs, plan in plans.items()}
    assert memory[1] == memory[3]
    assert (
        trained
        < memory[1]["stage: refine"]
        == max(size for name, size in memory[1].items() if name.startswith("stage: "))
    )
    assert memory[1]["peak"] > memory[0]["peak"]
    for name in memory[0].keys() - {"peak", "held: freed"}:
        assert memory[1][name] == memory[0][name], name
