"""The making of an expanded model: which units are left, and what follows when one finishes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from sparse_expansion.config import MEASURED
from sparse_expansion.execution.base import Executor, Observer, Progress
from sparse_expansion.jobs.allocation import shares_of
from sparse_expansion.jobs.assemble import assemble, check_shares
from sparse_expansion.jobs.measurements import Measurements
from sparse_expansion.jobs.prepare import Prepared
from sparse_expansion.planning.resume import needed_units
from sparse_expansion.planning.shapes import model_shape
from sparse_expansion.run_files import DRAFTS, HIDDEN, TIMELINE_FILE, block_scratch_files
from sparse_expansion.run_folder import read_timeline
from sparse_expansion.store import Store
from sparse_expansion.units import Unit


def expand(
    prepared: Prepared,
    store: Store,
    executor: Executor,
    observer: Observer,
    measured: Measurements,
    *,
    begin: Callable[[str], None],
    doing: Callable[[str], None],
) -> None:
    """Make (or finish making) the expanded model in the store's folder.

    Args:
        prepared: the run; sparsities that had to be measured are put into its config.
        store: the output folder, which the run has claimed.
        executor: does the units.
        observer: is told of every finished unit.
        measured: is added to.
        begin: is told of every phase's title, each of which is a graph of units of its own.
        doing: is told of the steps that may take long.

    Raises:
        CompressionError: a unit failed for a reason of its own.
    """
    start = time.perf_counter()
    timeline = Timeline(store)
    work = _Expansion(prepared, store, executor, timeline.observed_by(observer), measured)
    try:
        if prepared.config.compression.layer_sparsity == MEASURED:
            begin("measure blocks")
            work.settle_sparsities()
        begin("expand")
        doing("looking for what is done")
        todo = work.open_units()
        doing("")
        work.finish_units(todo)
    finally:
        # What was done before a unit failed or a signal came is part of the story.
        timeline.write()
    measured.seconds["expand"] += time.perf_counter() - start
    start = time.perf_counter()
    doing("assembling the model's folder")
    assemble(prepared, store)
    measured.seconds["assemble"] += time.perf_counter() - start


@dataclass(frozen=True)
class _Expansion:
    """What the two steps of one expansion share."""

    prepared: Prepared
    store: Store
    executor: Executor
    observer: Observer
    measured: Measurements

    def settle_sparsities(self) -> None:
        """Measure every block's share of zeros."""
        config = self.prepared.config

        def observe(progress: Progress) -> None:
            self.measured.add([progress.report], {progress.unit.key: progress.unit})
            self.observer(progress)

        shares = shares_of(
            self.store,
            config,
            model_shape(self.prepared.shell),
            executor=self.executor,
            observer=observe,
        )
        compression = replace(config.compression, layer_sparsity=shares)
        self.prepared.config = replace(config, compression=compression)
        check_shares(self.prepared, self.store)

    def open_units(self) -> list[Unit]:
        """The units whose files are not there, or not whole, and those that they need."""

        def is_committed(unit: Unit) -> bool:
            record = self.store.record(unit.key)
            return record is not None and self.store.is_intact(record)

        return needed_units(self.prepared.units, is_committed)

    def finish_units(self, todo: list[Unit]) -> None:
        """Do these units."""
        cleaner = _BlockCleaner(self.store, todo)

        def observe(progress: Progress) -> None:
            cleaner.finished(progress.unit)
            self.observer(progress)

        reports = self.executor.run(todo, self.prepared.config, observe)
        self.measured.add(reports.values(), {unit.key: unit for unit in todo})


class Timeline:
    """Which worker did which unit when; a resumed run's goes on where the one before ended."""

    def __init__(self, store: Store) -> None:
        """Begin with the rows that the run's folder has."""
        self.store = store
        self.rows = read_timeline(store)

    def observed_by(self, observer: Observer) -> Observer:
        """An observer that adds a row here and then tells the given one."""

        def observe(progress: Progress) -> None:
            self.rows.append(
                {
                    "unit": progress.unit.key,
                    "stage": progress.unit.stage,
                    "layer": progress.unit.layer,
                    "worker": progress.worker,
                    "started": progress.started,
                    "seconds": progress.report.seconds,
                }
            )
            observer(progress)

        return observe

    def write(self) -> None:
        """Write all rows into the run's folder."""
        self.store.write_json(TIMELINE_FILE, self.rows)


class _BlockCleaner:
    """Removes a block's input hidden states and drafts once none of its units is left to do."""

    def __init__(self, store: Store, units: Iterable[Unit]) -> None:
        self.store = store
        self.unfinished: dict[int, set[str]] = defaultdict(set)
        for unit in units:
            self.unfinished[unit.layer].add(unit.key)

    def finished(self, unit: Unit) -> None:
        """Account for a finished unit."""
        # By key: a unit whose values were lost with their worker ends more than once.
        unfinished = self.unfinished[unit.layer]
        unfinished.discard(unit.key)
        if unit.layer < 0 or unfinished:
            return
        for folder, start in zip((HIDDEN, DRAFTS), block_scratch_files(unit.layer), strict=True):
            for file in self.store.list(folder.rstrip("/")):
                if file.startswith(start):
                    self.store.delete(file)
