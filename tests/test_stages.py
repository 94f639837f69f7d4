"""The schedules: what a block is calibrated on, how often it runs, what a starved expert gets."""

import ctypes
import os

import pytest
import torch
from safetensors.torch import load_file

from sparse_expansion import jobs, stages
from sparse_expansion.algorithms.hessian import hessian_sum
from sparse_expansion.algorithms.sweep import compress_experts
from sparse_expansion.config import (
    CalibrationConfig,
    CompressionConfig,
    RoutingConfig,
    RunConfig,
)
from sparse_expansion.data.activations import GroupInputs
from sparse_expansion.execution.local import LocalExecutor
from sparse_expansion.model.sources import resolve_name
from sparse_expansion.model.streaming import BlockCall, ModelShell
from sparse_expansion.plan import expansion_units, needed_units
from sparse_expansion.stages import Worker, WorkerSpec
from sparse_expansion.store import Store


def make(folder, text, output, *, clusters=1, schedule="compressed", compression=None, **changes):
    calibration = {"dataset_size": 8, "seqlen": 32, "calibration_inputs": schedule, **changes}
    config = RunConfig(
        compression=compression or CompressionConfig(block_size=16),
        routing=RoutingConfig(num_clusters=clusters, pca_reduction_factor=4),
        calibration=CalibrationConfig(**calibration),
    )
    prepared, windows = jobs.prepare(
        config, folder, dataset=str(text), cache_dir=None, model_name="m"
    )
    store = Store(output)
    jobs.claim(store, prepared, resume=False)
    spec = WorkerSpec(store=str(output), source=resolve_name(str(folder)), config=config, threads=1)
    measured = jobs.Measurements()
    jobs.expand(prepared, windows, store, LocalExecutor(spec), lambda progress: None, measured)
    return store, windows, measured


def tensors(store):
    found = {}
    for name in store.list(""):
        if name.endswith(".safetensors") and "/" not in name:
            found.update(load_file(store.path(name)))
    return found


@pytest.mark.parametrize("schedule", ["compressed", "dense"])
def test_one_cluster_is_plain_sparsegpt(schedule, tmp_path, llama_folder, text_folder):
    """The whole pipeline against SparseGPT written as one loop over a whole model in memory."""
    store, windows, _ = make(llama_folder, text_folder, tmp_path / "o", schedule=schedule)
    found = tensors(store)
    shell = ModelShell(llama_folder)
    hidden = shell.embed(windows)
    for layer in range(shell.num_blocks):
        block = shell.load_block(layer)
        call = shell.call(layer, windows)
        with torch.no_grad(), GroupInputs(block, shell.family.groups) as seen:
            dense_out = call.run(block, hidden)
        for group in shell.family.groups:
            H = hessian_sum(seen.inputs[group.name]).sum_DD[None]
            for name in group.linears:
                linear = block.get_submodule(name)
                made = compress_experts(linear.weight, H, CompressionConfig(block_size=16), None)
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
        for schedule in ("compressed", "dense")
    }
    first = [name for name in made["dense"] if "layers.0.mlp" in name]
    assert len(first) > 10
    for name in first:
        assert torch.equal(made["dense"][name], made["compressed"][name]), name
    last = "model.layers.2.mlp.down_proj.experts.0.values"
    assert not torch.equal(made["dense"][last], made["compressed"][last])


@pytest.mark.parametrize(("schedule", "passes"), [("compressed", 5), ("dense", 3)])
def test_forward_passes(schedule, passes, tmp_path, llama_folder, text_folder, monkeypatch):
    """Two passes a block (one for the last, whose output no one needs); one when dense."""
    calls = []
    run = BlockCall.run
    monkeypatch.setattr(
        BlockCall, "run", lambda self, block, hidden: calls.append(1) or run(self, block, hidden)
    )
    make(llama_folder, text_folder, tmp_path / "o", clusters=3, schedule=schedule)
    # Four shards, each one batch.
    assert len(calls) == 4 * passes


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


def test_needed_units_skip_what_is_finished():
    from sparse_expansion.plan import GroupShape, ModelShape

    shape = ModelShape(3, 8, (GroupShape("a", 8, 16), GroupShape("b", 16, 8)))
    config = RunConfig(routing=RoutingConfig(num_clusters=4))
    units = expansion_units(config, shape)
    assert len({unit.key for unit in units}) == len(units)
    keys = {unit.key for unit in units}
    for unit in units:
        assert {source for source, _ in unit.inputs} | set(unit.after) <= keys
    assert needed_units(units, lambda unit: False) == units
    assert needed_units(units, lambda unit: unit.is_persistent) == []
    # Blocks 0 and 1 done, with the hidden states before block 2 on disk.
    left = needed_units(units, lambda unit: unit.is_persistent and unit.layer < 2)
    assert {unit.layer for unit in left} == {2}
    # One range of experts of the last block missing: its block's capture, but no other block.
    missing = next(unit for unit in units if unit.layer == 2 and unit.stage == "experts")
    left = needed_units(units, lambda unit: unit.is_persistent and unit is not missing)
    stages = {unit.stage for unit in left}
    assert stages == {"capture", "router", "gather", "experts"}
    assert {unit.layer for unit in left} == {2}


def test_a_blocks_experts_are_unpacked_once_for_all_shards(
    tmp_path, llama_folder, text_folder, monkeypatch
):
    made = []
    original = Worker.expanded_block

    def counted(self, layer, experts):
        made.append(layer)
        return original(self, layer, experts)

    monkeypatch.setattr(Worker, "expanded_block", counted)
    _, _, measured = make(llama_folder, text_folder, tmp_path / "o", clusters=2, data_shards=3)
    assert measured.stages["advance"].units == 2 * 3
    assert made == [0, 1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later")
def test_holes_in_the_heap_are_given_back(monkeypatch):
    monkeypatch.setattr(stages, "FREED_BYTES_KEPT", 64 << 20)
    stages.keep_freed_memory()

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # Large things that go, and between them small ones that stay.
    large, small = [], []
    for _ in range(40):
        large.append(torch.ones(1 << 20))
        small.append(torch.ones(64))
    full = resident()
    del large
    kept = resident()
    stages.return_excess_memory()
    assert resident() < full - (100 << 20)
    assert resident() <= kept and len(small) == 40
