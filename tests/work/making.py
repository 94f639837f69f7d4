"""One expansion of a model folder by a local worker, and what came out of it."""

from __future__ import annotations

from safetensors.torch import load_file

from sparse_expansion.config import (
    CalibrationConfig,
    CompressionConfig,
    RefinementConfig,
    RoutingConfig,
    RunConfig,
)
from sparse_expansion.data.texts import TextRequest
from sparse_expansion.execution.local import LocalExecutor
from sparse_expansion.jobs.expand import expand
from sparse_expansion.jobs.measurements import Measurements
from sparse_expansion.jobs.prepare import claim, prepare
from sparse_expansion.model.sources import resolve_name
from sparse_expansion.store import Store
from sparse_expansion.work.spec import WorkerSpec


def make(
    folder,
    text,
    output,
    *,
    clusters=1,
    schedule="compressed",
    compression=None,
    refinement=None,
    experts_per_unit=4,
    resume=False,
    balance=0.0,
    worker=None,
    **changes,
):
    calibration = {"dataset_size": 8, "seqlen": 32, "calibration_inputs": schedule, **changes}
    config = RunConfig(
        compression=compression or CompressionConfig(block_size=16),
        routing=RoutingConfig(num_clusters=clusters, pca_reduction_factor=4, balance=balance),
        calibration=CalibrationConfig(**calibration),
        refinement=refinement or RefinementConfig(),
        experts_per_unit=experts_per_unit,
    )
    prepared, windows = prepare(
        config, folder, text=TextRequest(dataset=str(text)), model_name="m", doing=print
    )
    store = Store(output)
    claim(store, prepared, windows, resume=resume)
    spec = WorkerSpec(
        store=str(output), source=resolve_name(str(folder)), threads=1, **(worker or {})
    )
    measured = Measurements()
    executor = LocalExecutor(spec)
    expand(prepared, store, executor, lambda progress: None, measured, begin=print, doing=print)
    return store, windows, measured


def tensors(store):
    found = {}
    for name in store.list(""):
        if name.endswith(".safetensors") and "/" not in name:
            found.update(load_file(store.path(name)))
    return found
