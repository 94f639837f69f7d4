"""The facts of a run folder, finished or not, read once for all views of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from sparse_expansion.model.manifest import MANIFEST_FORM, MANIFEST_NAME
from sparse_expansion.report.experts import ExpertRow, LinearFacts, expert_rows, linear_facts
from sparse_expansion.run_files import COMMAND_FILE, METRICS_FILE, RUN_FILE, parse_weight_file
from sparse_expansion.run_folder import (
    read_allocation,
    read_identity,
    read_metrics,
    read_timeline,
)
from sparse_expansion.store import Store


@dataclass(frozen=True)
class RunFacts:
    """What was asked of a run, what came out, and what is missing."""

    root: str
    """The run's folder or URL."""
    model: str
    """The dense model, as the run was given it."""
    config: dict[str, Any]
    """The run's settings as they were written, maybe by an earlier version."""
    is_finished: bool
    finished_units: int
    """Number of finished units."""
    command: str | None
    """The command line, where the run keeps it."""
    metrics: dict[str, Any] | None
    """The content of ``metrics.json``; None while the run is unfinished."""
    experts: tuple[ExpertRow, ...]
    """Every finished expert of every linear."""
    linears: tuple[LinearFacts, ...]
    """What the finished experts of every linear come to."""
    timeline: tuple[dict[str, Any], ...]
    """Rows of ``run/timeline.json``."""
    allocation: tuple[dict[str, Any], ...]
    """Rows of what was measured to share out the zeros, one for every block; maybe none."""
    part_bytes: dict[str, int]
    """Bytes by part of the model (``trunk``, ``router``, ``experts``), from its manifest."""

    @property
    def name(self) -> str:
        """The last part of the model's path or hub id."""
        return model_name(self.model)

    def to_dict(self) -> dict[str, Any]:
        """The facts as ``report --json`` prints them."""
        found: dict[str, Any] = {
            "model": self.model,
            "config": self.config,
            "is_finished": self.is_finished,
            "finished_units": self.finished_units,
        }
        if self.command is not None:
            found["command"] = self.command
        if self.metrics is not None:
            found["metrics"] = self.metrics
        if self.experts:
            found["experts"] = [row.to_dict() for row in self.experts]
        return found


def read_facts(store: Store) -> RunFacts:
    """Read a run's folder.

    Raises:
        ValueError: it holds no run.
    """
    if not store.exists(RUN_FILE):
        raise ValueError(f"{store.root} holds no run: give the --output folder of one")
    identity = read_identity(store)
    records = store.records()
    experts = expert_rows(records)
    is_finished = store.exists(METRICS_FILE)
    has_command = store.exists(COMMAND_FILE)
    return RunFacts(
        root=store.root,
        model=identity["model"],
        config=identity["config"],
        is_finished=is_finished,
        finished_units=len(records),
        command=store.read_json(COMMAND_FILE, {"command": str})["command"] if has_command else None,
        metrics=read_metrics(store) if is_finished else None,
        experts=experts,
        linears=linear_facts(experts),
        timeline=tuple(read_timeline(store)),
        allocation=tuple(read_allocation(store)),
        part_bytes=_part_bytes(store),
    )


def model_name(source: str) -> str:
    """The last part of a model's path or hub id."""
    return source.rstrip("/").rpartition("/")[2] or source


def _part_bytes(store: Store) -> dict[str, int]:
    """Bytes by part of the model, of an unfinished run none."""
    if not store.exists(MANIFEST_NAME):
        return {}
    found: dict[str, int] = defaultdict(int)
    for tensor in store.read_json(MANIFEST_NAME, MANIFEST_FORM)["tensors"].values():
        part = parse_weight_file(tensor["file"])
        if part is not None:
            found[part] += tensor["bytes"]
    return dict(found)
