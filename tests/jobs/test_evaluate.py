"""Evaluations in several shards: losses come in on the way, and are the same numbers."""

import torch

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.local import LocalExecutor
from sparse_expansion.jobs import evaluate as job
from sparse_expansion.jobs.measurements import Measurements
from sparse_expansion.model import streaming
from sparse_expansion.model.sources import resolve_name
from sparse_expansion.planning.evaluation import evaluation_units
from sparse_expansion.work.spec import WorkerSpec


def test_shards_on_a_cpu(neox_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "TOKENS_PER_FORWARD", 64)
    executor = LocalExecutor(
        WorkerSpec(
            store=str(tmp_path),
            source=resolve_name(str(neox_folder)),
            device="cpu",
            threads=1,
        )
    )
    shell = streaming.ModelShell(neox_folder)
    windows = torch.randint(1, 400, (9, 32))

    def losses(shard_tokens):
        monkeypatch.setattr(job, "SHARD_TOKENS", shard_tokens)
        seen = []
        scores = job.evaluate(
            "dense", windows, RunConfig(), shell, executor, seen.append, Measurements()
        )
        assert scores.nll.num_tokens == 9 * 31 and sum(each.unit.tokens for each in seen) == 9 * 32
        return scores.per_window, [len(each.report.stats["nll"]) for each in seen]

    whole, units = losses(1000)
    assert units == [9]
    # Two windows pass together, so none of these pairs is parted.
    parted, units = losses(96)
    assert units == [2, 4, 3] and parted == whole
    _, units = losses(1)
    assert len(units) == job.SHARDS_OF_WORKER


def test_every_worker_on_a_gpu_reads_the_model_once(monkeypatch):
    class Gpus:
        num_workers, uses_gpus = 3, True

    assert job._num_shards(torch.zeros(10_000, 2048), Gpus()) == 3
    monkeypatch.setattr(Gpus, "uses_gpus", False)
    assert job._num_shards(torch.zeros(10_000, 2048), Gpus()) == 12
    assert job._num_shards(torch.zeros(1, 2048), Gpus()) == 3


def test_tokens_of_a_pipeline_are_counted_once():
    units = evaluation_units(
        "dense", [[1] * 8] * 6, num_layers=5, num_shards=2, num_ranges=2, flops_per_token=1.0
    )
    assert len(units) == 4 and sum(unit.tokens for unit in units) == 48
