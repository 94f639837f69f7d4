"""The schedules: what a block is calibrated on, how often it runs, what a starved expert gets."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from sparse_expansion.algorithms.compress import compress_experts
from sparse_expansion.algorithms.hessian import hessian_sum
from sparse_expansion.config import (
    CompressionConfig,
    RunConfig,
    SparsityPattern,
)
from sparse_expansion.data.activations import GroupInputs
from sparse_expansion.model.block_calls import BlockCall
from sparse_expansion.model.sources import resolve_name
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.work import blocks
from sparse_expansion.work.context import WorkContext
from sparse_expansion.work.spec import WorkerSpec
from sparse_expansion.work.stages.calibrate import advance, capture, embed, gather, recapture
from tests.work.making import make, tensors


@pytest.mark.parametrize("schedule", ["compressed", "sequential", "cumulative", "dense"])
def test_one_cluster_is_plain_sparsegpt(schedule, tmp_path, llama_folder, text_folder):
    """The whole pipeline against SparseGPT written as one loop over a whole model in memory."""
    store, windows, _ = make(llama_folder, text_folder, tmp_path / "o", schedule=schedule)
    found = tensors(store)
    shell = ModelShell(llama_folder)
    hidden = dense_hidden = shell.embed(windows)
    for layer in range(shell.num_blocks):
        block = shell.load_block(layer)
        call = shell.call(layer, windows)
        with torch.no_grad(), GroupInputs(block, shell.family.groups) as seen:
            dense_out = call.run(block, hidden)
        with torch.no_grad():
            dense_hidden = call.run(block, dense_hidden)
        for group in shell.family.groups:
            X = seen.inputs[group.name]
            is_last = group is shell.family.groups[-1]
            if schedule in ("sequential", "cumulative") and is_last:
                with torch.no_grad(), GroupInputs(block, (group,)) as now:
                    lacking = (dense_hidden - call.run(block, hidden)).flatten(0, 1)
                X = now.inputs[group.name]
            H = hessian_sum(X).sum_DD[None]
            for name in group.linears:
                linear = block.get_submodule(name)
                weight = linear.weight
                if X is not seen.inputs[group.name]:
                    # |W dense - V x|^2 + damping |W - V|^2, by its normal equations.
                    damped = H[0].double() + 0.01 * H[0].diagonal().mean() * torch.eye(len(H[0]))
                    dense_X = seen.inputs[group.name].double()
                    pull = 0.01 * H[0].diagonal().mean().double()
                    wanted = weight.double() @ (dense_X.T @ X.double())
                    wanted += pull * weight.double()
                    if schedule == "cumulative":
                        # What the blocks before have changed, and of that what is not chance.
                        upstream = lacking.double() - (dense_X - X.double()) @ weight.double().T
                        cross = upstream.T @ X.double()
                        signal = float((cross * torch.linalg.solve(damped, cross.T).T).sum())
                        free = float(torch.linalg.solve(damped, H[0].double()).trace())
                        chance = float(upstream.square().sum()) / len(X) * free
                        share = chance / signal if signal > 0 else 1.0
                        assert layer == 0 or 0 < share < 1
                        wanted += (1 - min(1.0, share)) * cross
                    weight = torch.linalg.solve(damped, wanted.T).T.float()
                made = compress_experts(weight, H, CompressionConfig(block_size=16), None)
                linear.weight.copy_(made.weight_KOD[0])
                prefix = f"model.layers.{layer}.{name}.experts.0"
                values = made.weight_KOD[0][made.kept_KOD[0]]
                stored = found[f"{prefix}.values"]
                # Sums over shards differ from one sum in the last bits.
                close = torch.isclose(stored, values, rtol=1e-3, atol=1e-4).float().mean()
                assert float(close) > 0.97, (layer, name)
        with torch.no_grad():
            hidden = dense_out if schedule == "dense" else call.run(block, hidden)


def test_schedules_agree_on_the_first_block_and_differ_after(tmp_path, llama_folder, text_folder):
    made = {
        schedule: tensors(
            make(llama_folder, text_folder, tmp_path / schedule, clusters=3, schedule=schedule)[0]
        )
        for schedule in ("compressed", "sequential", "cumulative", "dense")
    }
    first = [name for name in made["dense"] if "layers.0.mlp" in name]
    assert len(first) > 10
    for name in first:
        assert torch.equal(made["dense"][name], made["compressed"][name]), name
        # No block comes before it that the last linear could make up for.
        both = made["sequential"][name], made["cumulative"][name]
        if both[0].is_floating_point() and both[0].numel():
            close = torch.isclose(*both, rtol=1e-3, atol=1e-4).float().mean()
            assert float(close) > 0.97, name
        if "down_proj" in name and "experts" in name:
            assert not torch.equal(made["sequential"][name], made["dense"][name]), name
        else:
            is_down = "down_proj" in name
            assert is_down or torch.equal(made["sequential"][name], made["dense"][name]), name
    last = "model.layers.2.mlp.down_proj.experts.0.values"
    assert not torch.equal(made["dense"][last], made["compressed"][last])
    assert not torch.isclose(made["cumulative"][last], made["sequential"][last], rtol=0.01).all()


@pytest.mark.parametrize(
    ("schedule", "passes"), [("compressed", 5), ("sequential", 8), ("cumulative", 11), ("dense", 3)]
)
def test_forward_passes(schedule, passes, tmp_path, llama_folder, text_folder, monkeypatch):
    """Two passes a block (one for the last, whose output no one needs); one when dense; and
    one more when its second group waits for the first, and one of the dense model's own states
    where these count. Its attention runs in the first and in that alone."""
    calls, attended = [], []
    run, attend = BlockCall.run, LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention,
        "forward",
        lambda *args, **given: attended.append(1) or attend(*args, **given),
    )
    monkeypatch.setattr(
        BlockCall, "run", lambda self, block, hidden: calls.append(1) or run(self, block, hidden)
    )
    make(llama_folder, text_folder, tmp_path / "o", clusters=3, schedule=schedule)
    # Four shards, each one batch.
    assert len(calls) == 4 * passes
    assert len(attended) == 4 * 3 * (2 if schedule == "cumulative" else 1)


def test_sums_and_rows_give_the_same_experts(tmp_path, llama_folder, text_folder, monkeypatch):
    """Shards hand on Hessian sums where there are many tokens, with what outputs lack."""
    rows = tensors(make(llama_folder, text_folder, tmp_path / "r", schedule="sequential")[0])
    monkeypatch.setattr("sparse_expansion.planning.costs.hands_on_sums", lambda *given: True)
    sums = tensors(make(llama_folder, text_folder, tmp_path / "s", schedule="sequential")[0])
    for name in (name for name in rows if name.endswith("layers.0.mlp.down_proj.experts.0.values")):
        close = torch.isclose(rows[name], sums[name], rtol=1e-3, atol=1e-4).float().mean()
        assert float(close) > 0.97


@pytest.mark.parametrize("schedule", ["sequential", "cumulative"])
def test_a_fresh_worker_captures_all_again(schedule, tmp_path, llama_folder, text_folder):
    """What a lost worker held is made again from the store, with the same numbers."""
    store, _, _ = make(llama_folder, text_folder, tmp_path / "o", schedule=schedule)
    config = RunConfig.from_dict(store.read_json("run/run.json")["config"])
    source = resolve_name(str(llama_folder))
    group, ranges = "mlp.down_proj", [(0, 0)]
    # Hidden states are deleted at the end of a run.
    workers = [
        WorkContext(WorkerSpec(store=str(tmp_path / "o"), source=source, threads=1))
        for _ in range(2)
    ]
    for worker in workers:
        worker.use(config)
    for file in embed.function(workers[0], shard=1).files.values():
        file.result()
    for file in capture.function(workers[0], layer=0, shard=1).files.values():
        file.result()
    recapture.function(workers[0], layer=0, shard=1, level=1, experts=ranges)
    given = {"layer": 0, "shard": 1, "group": group, "ranges": ranges, "summed": False}

    def gathered(worker, **more):
        return gather.function(worker, **given, **more).outputs["000-000"][0]

    made = [gathered(worker, recaptured=ranges) for worker in workers]
    assert torch.equal(made[0], made[1])
    # 72 inputs, and what the 32 outputs for them lack.
    assert made[0].shape[1] == 72 + 32
    assert made[0][:, 72:].abs().max() > 0
    assert torch.equal(gathered(workers[1]), made[1])
    # The first has attention's outputs, the second runs it again.
    workers[1].captures.drop(0, 1)
    hidden = [
        advance.function(worker, layer=0, shard=1, experts=ranges).files for worker in workers
    ]
    first, second = ({name: file.result() for name, file in each.items()} for each in hidden)
    assert first == second


def test_starved_experts_use_the_whole_groups_hessian(tmp_path, llama_folder, text_folder):
    everyone = CompressionConfig(block_size=16, min_tokens_per_expert=10**9)
    starved, _, _ = make(
        llama_folder, text_folder, tmp_path / "a", clusters=3, compression=everyone
    )
    plain, _, _ = make(llama_folder, text_folder, tmp_path / "b", clusters=1)
    for record in [value for key, value in starved.records().items() if "experts" in key]:
        assert record["stats"]["starved"] == [True] * 3
    ours, theirs = tensors(starved), tensors(plain)
    for expert in range(3):
        name = "model.layers.0.mlp.gate_proj.experts.{}.values"
        torch.testing.assert_close(
            ours[name.format(expert)], theirs[name.format(0)], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("schedule", ["compressed", "sequential"])
def test_hessians_are_shrunk_where_it_is_asked_for(schedule, tmp_path, llama_folder, text_folder):
    shares = {}
    for shrinks in (False, True):
        compression = CompressionConfig(
            block_size=16, min_tokens_per_expert=1, shrink_hessians=shrinks
        )
        store, _, _ = make(
            llama_folder,
            text_folder,
            tmp_path / str(shrinks),
            clusters=3,
            schedule=schedule,
            compression=compression,
        )
        stats = [value["stats"] for key, value in store.records().items() if "experts" in key]
        shares[shrinks] = [share for each in stats for share in each["group_share"]]
        shares[shrinks, "tensors"] = tensors(store)
    assert set(shares[False]) == {0.0}
    assert all(0 < share <= 1 for share in shares[True]) and len(set(shares[True])) > 3
    name = "model.layers.0.mlp.down_proj.experts.1.values"
    assert not torch.equal(shares[False, "tensors"][name], shares[True, "tensors"][name])


def test_one_experts_hessian_is_its_groups_however_it_is_shrunk(
    tmp_path, llama_folder, text_folder
):
    found = [
        tensors(
            make(
                llama_folder,
                text_folder,
                tmp_path / str(shrinks),
                compression=CompressionConfig(block_size=16, shrink_hessians=shrinks),
            )[0]
        )
        for shrinks in (False, True)
    ]
    name = "model.layers.0.mlp.gate_proj.experts.0.values"
    torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["dense", "compressed", "sequential"])
def test_outputs_are_weighed_where_zeros_may_lie_anywhere(
    schedule, tmp_path, llama_folder, text_folder
):
    def kept(name, pattern, weighs):
        compression = CompressionConfig(
            block_size=16, sparsity=SparsityPattern.parse(pattern), weigh_outputs=weighs
        )
        store, _, _ = make(
            llama_folder,
            text_folder,
            tmp_path / name,
            clusters=2,
            schedule=schedule,
            compression=compression,
            data_shards=2,
        )
        return tensors(store)

    plain, weighed = kept("plain", "0.5", False), kept("weighed", "0.5", True)
    for linear, is_weighed in (("gate_proj", True), ("up_proj", True), ("down_proj", False)):
        name = f"model.layers.0.mlp.{linear}.experts.1.bitmask"
        same = torch.equal(plain[name], weighed[name])
        # A linear behind them that makes up for them is made on other inputs.
        assert same is (not is_weighed and schedule != "sequential")
        values = name.replace("bitmask", "values")
        assert plain[values].shape == weighed[values].shape
    others = kept("n:m", "2:4", False), kept("weighed n:m", "2:4", True)
    assert all(torch.equal(value, others[1][name]) for name, value in others[0].items())


@pytest.mark.parametrize("shards", [1, 3])
def test_outputs_of_experts_with_biases_have_the_dense_mean(
    shards, tmp_path, neox_folder, text_folder
):
    """Of the block that has the dense inputs; its later linear makes up for the earlier one."""
    _, windows, _ = make(
        neox_folder,
        text_folder,
        tmp_path / "o",
        clusters=3,
        schedule="sequential",
        compression=CompressionConfig(block_size=16, expert_biases=True, shrink_hessians=True),
        data_shards=shards,
    )
    dense, expanded = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (neox_folder, tmp_path / "o")
    )
    ends = []

    def hook(module, args, out):
        ends.append((args[0].flatten(0, 1), out.flatten(0, 1)))

    for name in ("dense_h_to_4h", "dense_4h_to_h"):
        for model in (dense, expanded):
            linear = model.gpt_neox.layers[0].mlp.get_submodule(name)
            handle = linear.register_forward_hook(hook)
            with torch.no_grad():
                model(windows)
            handle.remove()
        (_, wanted), (inputs, found) = ends[-2:]
        experts = linear.group_router(inputs).experts_T
        assert len(experts.unique()) == 3
        for k in range(3):
            lost = (wanted - found)[experts == k].float()
            assert float(lost.mean(0).abs().max()) < 0.01 * float(lost.square().mean().sqrt())


def test_balanced_clusters_in_a_run(tmp_path, llama_folder, text_folder):
    sizes = {}
    for balance in (0.0, 0.6):
        store, _, _ = make(
            llama_folder, text_folder, tmp_path / str(balance), clusters=6, balance=balance
        )
        stats = store.record("layer-000/mlp.down_proj/experts-000-003")["stats"]
        rest = store.record("layer-000/mlp.down_proj/experts-004-005")["stats"]
        sizes[balance] = stats["tokens"] + rest["tokens"]
    assert sum(sizes[0.0]) == sum(sizes[0.6]) and min(sizes[0.6]) > min(sizes[0.0])


def test_an_empty_cluster_is_an_expert_all_the_same(tmp_path, llama_folder, text_folder):
    store, _, _ = make(llama_folder, text_folder, tmp_path / "o", clusters=60, dataset_size=4)
    records = [value for key, value in store.records().items() if "/experts" in key]
    assert any(any(record["stats"]["starved"]) for record in records)
    assert all(
        torch.isfinite(value).all()
        for name, value in tensors(store).items()
        if name.endswith("values")
    )


def test_shards_change_only_the_last_bits(tmp_path, llama_folder, text_folder):
    """The shard count is part of the configuration; its effect is rounding alone."""
    one = tensors(make(llama_folder, text_folder, tmp_path / "1", data_shards=1)[0])
    three = tensors(make(llama_folder, text_folder, tmp_path / "3", data_shards=3)[0])
    name = "model.layers.0.mlp.gate_proj.experts.0.values"
    close = torch.isclose(one[name], three[name], rtol=1e-3, atol=1e-4).float().mean()
    assert float(close) > 0.98


def test_more_clusters_than_tokens_is_an_error(tmp_path, llama_folder, text_folder):
    with pytest.raises(ValueError, match="layer-000.*router.*cannot fill 300 clusters"):
        make(llama_folder, text_folder, tmp_path / "o", clusters=300, dataset_size=8)


def test_a_blocks_experts_are_unpacked_once_for_all_shards(
    tmp_path, llama_folder, text_folder, monkeypatch
):
    made = []
    original = blocks.expanded_block

    def counted(context, layer, experts, groups, **given):
        made.append(layer)
        return original(context, layer, experts, groups, **given)

    monkeypatch.setattr(blocks, "expanded_block", counted)
    _, _, measured = make(llama_folder, text_folder, tmp_path / "o", clusters=2, data_shards=3)
    assert measured.stages["advance"].units == 2 * 3
    assert made == [0, 1]


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_what_is_left_as_it_is_makes_up_for_nothing(pruner, tmp_path, llama_folder, text_folder):
    """Kept weights of pruners that change none, and those of a model that loses nothing."""
    shell = ModelShell(llama_folder)
    sparsity = SparsityPattern(fraction=0.5 if pruner == "wanda" else 0.0)
    compression = CompressionConfig(pruner=pruner, sparsity=sparsity, block_size=16)
    store, _, _ = make(
        llama_folder, text_folder, tmp_path / "o", schedule="cumulative", compression=compression
    )
    found = tensors(store)
    for layer in range(shell.num_blocks):
        weight = shell.load_block(layer).mlp.down_proj.weight.detach()
        values = found[f"model.layers.{layer}.mlp.down_proj.experts.0.values"]
        assert torch.isin(values, weight).all()
    record = store.record("layer-002/mlp.down_proj/router")["stats"]
    assert ("upstream" in record) is (pruner == "sparsegpt")


def test_the_part_that_is_explained_is_on_record(tmp_path, llama_folder, text_folder):
    store, _, _ = make(
        llama_folder,
        text_folder,
        tmp_path / "o",
        clusters=3,
        schedule="cumulative",
        dataset_size=60,
    )
    found = store.record("layer-002/mlp.down_proj/router")["stats"]["upstream"]
    assert 0 < found["shrinkage"] < 1 and 0 < found["explained"] < 1
    # Nothing comes before the first block.
    for key in ("layer-000/mlp.down_proj", "layer-002/mlp.gate_proj+up_proj"):
        assert "upstream" not in store.record(f"{key}/router")["stats"]
