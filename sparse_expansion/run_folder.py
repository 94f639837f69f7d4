"""What a run's folder holds beside units: claim, lock, windows, shares, timeline, metrics."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparse_expansion.config.checks import NUMBER, has_form
from sparse_expansion.run_files import (
    ALLOCATION_FILE,
    METRICS_FILE,
    RUN_FILE,
    TIMELINE_FILE,
    foreign_output,
    windows_file,
)
from sparse_expansion.store import TEMPORARY, Store

_log = logging.getLogger(__name__)
FIRST_TEMPORARY = f"{os.path.dirname(RUN_FILE)}/{TEMPORARY}"
_TIMELINE_ROW = {"unit": str, "stage": str, "worker": str, "started": NUMBER, "seconds": NUMBER}
_COMPRESSION_FORM = {"sparsity": {"fraction": (*NUMBER, type(None))}}
CONFIG_FORM = {
    "compression": _COMPRESSION_FORM,
    "routing": {"num_clusters": int},
    "calibration": {"dataset_size": int, "seqlen": int},
}
"""What the views of a run rely on in its settings."""
_IDENTITY_FORM = {"config": CONFIG_FORM, "model": str, "digest": str}
METRICS_FORM = {
    "config": CONFIG_FORM,
    "seconds": {...: NUMBER},
    "unit_seconds": {...: NUMBER},
    "peak_memory_bytes": NUMBER,
    "checkpoint_bytes": NUMBER,
    "dense_checkpoint_bytes": NUMBER,
}
"""What the views of a finished run rely on."""
_WORK_FORM = {"units": int, "seconds": NUMBER, "matmul_share": NUMBER, "copy_share": NUMBER}
MAYBE_IN_METRICS = {
    "perplexity_dense": NUMBER,
    "perplexity_expanded": NUMBER,
    "num_eval_tokens": int,
    "bits_per_weight": NUMBER,
    "num_experts": int,
    "starved_experts": int,
    "raised_damping": int,
    "mlp_flops_per_token": {...: NUMBER},
    "mixtures": {"experts": int, "starved": int, "without_tokens": int},
    "refinement": {"trained_blocks": int},
    "profile": {"stages": {...: _WORK_FORM}},
    "devices": [str],
    "device_peak_memory_bytes": NUMBER,
    "unit_threads": [int],
    "versions": {...: str},
}
"""What they show where it is there: runs of earlier versions lack some."""


def read_allocation(store: Store) -> list[dict[str, Any]]:
    """Rows of what was measured to share out a run's zeros, one for every block; maybe none."""
    if not store.exists(ALLOCATION_FILE):
        return []
    found: list[dict[str, Any]] = read_shares(store)["rows"]
    return found


def read_shares(store: Store) -> dict[str, Any]:
    """What a run has measured to share out its zeros: ``layer_sparsity``, and ``rows`` by block.

    Raises:
        ValueError: the file is damaged.
    """
    form = {"layer_sparsity": [NUMBER], "rows": [dict]}
    remedy = "delete it, and continue with --resume: it is measured again"
    found: dict[str, Any] = store.read_json(ALLOCATION_FILE, form, remedy=remedy)
    return found


def read_metrics(store: Store) -> dict[str, Any]:
    """The metrics of a finished run.

    Raises:
        ValueError: the file is damaged.
    """
    remedy = "make it again with --resume"
    found: dict[str, Any] = store.read_json(METRICS_FILE, METRICS_FORM, remedy=remedy)
    for key, form in MAYBE_IN_METRICS.items():
        if key in found and not has_form(found[key], form):
            raise ValueError(f"{store.path(METRICS_FILE)} is damaged in {key}: {remedy}")
    return found


def write_windows(store: Store, windows: torch.Tensor, num_shards: int) -> None:
    """Put calibration windows ``[N, L]`` into a run's folder, a file per shard, as int32."""
    for shard, part in enumerate(windows.tensor_split(num_shards)):
        store.write_tensors(windows_file(shard), {"tokens": part.to(torch.int32)})


def read_windows(store: Store, shard: int) -> torch.Tensor:
    """A shard's calibration windows ``[N, L]``, int64."""
    return store.read_tensors(windows_file(shard))["tokens"].long()


def read_timeline(store: Store) -> list[dict[str, Any]]:
    """Rows of the run's timeline so far, none before its first expansion has ended."""
    if not store.exists(TIMELINE_FILE):
        return []
    # It is for people to look at: a run goes on without what was damaged.
    return store.read_intact_json(TIMELINE_FILE, [_TIMELINE_ROW]) or []


def open_run(store: Store, identity: dict[str, Any], *, resume: bool) -> None:
    """Claim the output folder for a run with this identity, or continue that very run.

    Raises:
        ValueError: the folder holds something else, or the same run and ``resume`` is not set.
    """
    if store.exists(RUN_FILE):
        found = read_identity(store, {"digest": str})
        if found.get("digest") != identity["digest"]:
            different = [
                key
                for key in sorted(identity)
                if key != "digest" and found.get(key) != identity[key]
            ]
            raise ValueError(
                f"--output {store.root} holds another run (different {', '.join(different)}): "
                "choose another folder, or delete it"
            )
        if not resume:
            raise ValueError(
                f"--output {store.root} already holds this run: add --resume to continue it, or "
                "choose another folder"
            )
        store.sweep_temporaries()
        return
    # The first write of all may have been cut short.
    if any(not name.startswith(FIRST_TEMPORARY) for name in store.list("")):
        raise foreign_output(store.root)
    store.sweep_temporaries()
    store.write_sealed(RUN_FILE, identity)


@contextmanager
def alone_in(store: Store) -> Iterator[None]:
    """Keep other processes of this machine out of a run's folder while the block runs.

    Two drivers of one run would sweep away each other's half-written files. The lock ends with the
    process, however that ends. A URL has none.

    Raises:
        ValueError: another process holds the folder.
    """
    if not store.is_local:
        yield
        return
    os.makedirs(store.base, exist_ok=True)
    # The folder itself is locked: a file for it would be one more thing to find and to explain.
    descriptor = os.open(store.base, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--output {store.root} is in use by another run: wait for it, or choose another "
                "folder"
            ) from None
        except OSError as error:
            # A file system without locks: it goes as it went before there was one.
            _log.info("%s cannot be locked (%s)", store.base, error)
        yield
    finally:
        os.close(descriptor)


def read_identity(store: Store, form: Any = _IDENTITY_FORM) -> dict[str, Any]:
    """What a run's folder is claimed for.

    Args:
        store: the folder.
        form: what the caller relies on, see ``has_form``.

    Raises:
        ValueError: the file is damaged, so that nobody knows.
    """
    # What is no file is told as such.
    store.read_bytes(RUN_FILE)
    found: dict[str, Any] | None = store.read_intact_json(RUN_FILE, form)
    if found is None:
        raise ValueError(
            f"{store.path(RUN_FILE)} is damaged, or was changed by hand, and with it what the run "
            f"was: delete the folder --output {store.root} and start again"
        )
    return found
