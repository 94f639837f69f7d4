"""Write-behind: units go on while files are written, and none counts before its marker is there."""

import threading
from concurrent.futures import Future, wait
from types import SimpleNamespace

import pytest
import torch

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.base import Working
from sparse_expansion.execution.local import LocalExecutor
from sparse_expansion.store import Store
from sparse_expansion.units import Unit, UnitReport
from sparse_expansion.work.worker import Computed
from sparse_expansion.work.writing import WriteBehind


class SlowStore(Store):
    """Writes tensors when it is allowed to."""

    def __init__(self, root):
        super().__init__(root)
        self.allowed = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def write_tensors(self, name, tensors):
        self.begun.release()
        self.allowed.acquire()
        return super().write_tensors(name, tensors)


def test_a_marker_comes_after_its_files(tmp_path):
    store = SlowStore(tmp_path)
    files = WriteBehind(store, 1000)
    records = {name: files.write(name, {"x": torch.ones(10)}) for name in ("a", "b")}
    written = files.commit("unit", {"stats": {}}, records)
    store.begun.acquire()
    assert files.waiting_bytes == 80 and not written.done() and store.record("unit") is None
    store.allowed.release(2)
    written.result()
    assert files.waiting_bytes == 0
    found = store.record("unit")
    assert list(found["files"]) == ["a", "b"] and store.is_intact(found)


def test_a_bounded_number_of_bytes_waits(tmp_path):
    store = SlowStore(tmp_path)
    files = WriteBehind(store, 100)
    started = [threading.Event() for _ in range(3)]

    def make():
        for number, begun in enumerate(started):
            begun.set()
            files.write(str(number), {"x": torch.ones(12)})

    maker = threading.Thread(target=make)
    maker.start()
    store.begun.acquire()
    started[2].wait()
    # The third file would be over the bound: it waits for the first.
    assert files.waiting_bytes == 96 and maker.is_alive()
    store.allowed.release()
    maker.join()
    assert files.waiting_bytes <= 100
    store.allowed.release(2)


def test_several_files_are_written_at_a_time_and_the_marker_waits_for_all(tmp_path):
    store = SlowStore(tmp_path)
    files = WriteBehind(store, 1000, threads=2)
    records = {name: files.write(name, {"x": torch.ones(3)}) for name in ("a", "b")}
    written = files.commit("unit", {"stats": {}}, records)
    store.begun.acquire()
    store.begun.acquire()
    store.allowed.release()
    wait(records.values(), return_when="FIRST_COMPLETED")
    assert sum(record.done() for record in records.values()) == 1 and not written.done()
    store.allowed.release()
    written.result()
    assert store.is_intact(store.record("unit"))


def test_a_file_that_is_larger_than_may_wait_is_waited_for(tmp_path):
    store = SlowStore(tmp_path)
    store.allowed.release()
    files = WriteBehind(store, 100)
    assert files.write("a", {"x": torch.ones(1000)}).done() and store.exists("a")


def test_a_file_that_cannot_be_written_leaves_no_marker(tmp_path, monkeypatch):
    store = Store(tmp_path)
    files = WriteBehind(store, 1000)

    def full(name, tensors):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_tensors", full)
        record = files.write("a", {"x": torch.ones(3)})
        written = files.commit("unit", {"stats": {}}, {"a": record})
        with pytest.raises(OSError, match="No space left"):
            written.result()
    assert store.record("unit") is None and files.waiting_bytes == 0
    # The next unit's files are none of its business.
    other = files.commit("other", {"stats": {}}, {"b": files.write("b", {"x": torch.ones(3)})})
    other.result()
    assert store.record("other") is not None


class FakeWorker:
    """Computes units in no time; their files are written when the test says so."""

    def __init__(self, spec):
        self.log = []
        self.written = {}
        self.on_run = lambda key: None

    def forget_before(self, layer):
        pass

    def run(self, unit, config, inputs):
        self.log.append(unit.key)
        report = UnitReport(unit.key, 0.0, 0, {})
        future = Future() if unit.is_persistent else None
        if future is not None:
            self.written[unit.key] = future
        self.on_run(unit.key)
        return Computed(report, {name: unit.key for name in unit.outputs}, future)


@pytest.fixture
def executor(monkeypatch):
    monkeypatch.setattr("sparse_expansion.execution.local.Worker", FakeWorker)
    return LocalExecutor(None)


def unit(key, **fields):
    return Unit(key=key, stage="s", **fields)


def test_units_go_on_but_for_those_that_need_the_files(executor):
    units = [
        unit("a", is_persistent=True, cost=2),
        unit("b", after=("a",), cost=1),
        unit("c"),
        unit("d"),
    ]
    log, written = executor.worker.log, executor.worker.written

    def on_run(key):
        if key == "d":
            assert log == ["a", "c", "d"]
            written["a"].set_result(None)

    executor.worker.on_run = on_run
    seen = []
    executor.run(units, RunConfig(), lambda progress: seen.append(progress.unit.key))
    assert log == ["a", "c", "d", "b"]
    assert seen.index("a") < seen.index("b") and sorted(seen) == ["a", "b", "c", "d"]


def test_a_later_block_is_not_begun_while_an_earlier_ones_files_are_written(executor):
    units = [unit("a", is_persistent=True, layer=0), unit("b", layer=1)]
    log, written = executor.worker.log, executor.worker.written
    executor.worker.on_run = lambda key: (
        key == "a"
        and threading.Timer(
            0.0, lambda: (log.append("a is written"), written["a"].set_result(None))
        ).start()
    )
    executor.run(units, RunConfig(), lambda progress: None)
    assert log == ["a", "a is written", "b"]


def test_an_error_of_the_files_is_the_units(executor):
    units = [unit("a", is_persistent=True), unit("b", after=("a",))]
    executor.worker.on_run = lambda key: executor.worker.written[key].set_exception(
        OSError("no space left")
    )
    seen = []
    with pytest.raises(OSError, match="no space left"):
        executor.run(units, RunConfig(), lambda progress: seen.append(progress))
    assert executor.worker.log == ["a"] and not seen


def test_what_was_computed_before_a_failure_is_kept(executor):
    units = [unit("a", is_persistent=True, cost=2), unit("b", cost=1)]
    written = executor.worker.written

    def on_run(key):
        if key == "b":
            threading.Timer(0.0, lambda: written["a"].set_result(None)).start()
            raise KeyboardInterrupt

    executor.worker.on_run = on_run
    with pytest.raises(KeyboardInterrupt):
        executor.run(units, RunConfig(), lambda progress: None)
    assert written["a"].done()


def test_who_asks_is_told_what_is_done(executor):
    units = [unit("a", cost=3, layer=0), unit("b", cost=1, layer=1)]
    executor.worker.context = SimpleNamespace(place=(None, 0.0), device="cpu")
    told = []

    def on_run(key):
        if key == "b":
            executor.worker.context.place = (7, 0.5)
        told.extend(executor.working())

    executor.worker.on_run = on_run
    assert executor.working() == [] and not executor.uses_gpus
    executor.run(units, RunConfig(), lambda progress: None)
    assert told == [Working(units[0], 0.75), Working(units[1], 0.25, 7, 0.5)]
    assert executor.working() == []
