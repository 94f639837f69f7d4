"""The registry of stages: what is said with a stage, and units that do not fit theirs."""

from __future__ import annotations

import sys

import pytest
import torch

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.local import LocalExecutor
from sparse_expansion.model.sources import resolve_name
from sparse_expansion.work.registry import Done, Stage, _fits, stage_of
from sparse_expansion.work.spec import WorkerSpec
from sparse_expansion.work.stages.calibrate import advance, capture, gather, recapture
from sparse_expansion.work.stages.make import experts, refine_block, trunk

GIVEN = {"layer": 1, "shard": 0, "group": "mlp.up", "ranges": [(0, 3)], "summed": False}


def test_a_unit_carries_its_stages_name_and_nature():
    unit = gather.unit(key="k", params=GIVEN, outputs=("000-003",), layer=1)
    assert (unit.stage, unit.params, unit.layer) == ("gather", GIVEN, 1)
    assert not unit.makes_captures
    assert capture.unit(key="k", params={"layer": 0, "shard": 1}).makes_captures
    assert stage_of("gather") is gather and stage_of("refine") is refine_block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 1}, "no parameter 'layers' .*has layer, shard, group, ranges, summed"),
        ({"shard": None}, "shard None of stage gather is no <class 'int'>"),
        ({"layer": True}, "layer True of stage gather"),
        ({"ranges": [(0, 3, 5)]}, "ranges"),
        ({"ranges": [0, 3]}, "ranges"),
        ({"summed": 1}, "summed 1"),
        ({"recaptured": "000-003"}, "recaptured"),
    ],
)
def test_parameters_that_do_not_fit_fail_when_planned(change, message):
    with pytest.raises(TypeError, match=f"layer-001/x: .*{message}"):
        gather.unit(key="layer-001/x", params={**GIVEN, **change})


def test_a_missing_parameter_is_named():
    given = {name: value for name, value in GIVEN.items() if name != "group"}
    with pytest.raises(TypeError, match="k: stage gather needs a parameter 'group'"):
        gather.unit(key="k", params=given)
    # An optional one may be left out, or be None.
    assert gather.unit(key="k", params={**GIVEN, "recaptured": None}).params["recaptured"] is None


def test_values_by_type():
    assert _fits(3, float) and not _fits(3.0, int) and not _fits(False, float)
    assert _fits({"a": "b"}, dict[str, str]) and not _fits({"a": 1}, dict[str, str])
    assert _fits([], list[int]) and not _fits((1,), list[int])
    assert _fits((1, 2), tuple[int, int]) and not _fits((1,), tuple[int, int])
    assert _fits((1, 2, 3), tuple[int, ...]) and _fits(None, int | None)


def test_what_is_special_is_said_with_the_stage():
    assert trunk.is_final and experts.is_final and refine_block.replaces == experts.name
    assert not gather.is_final and not capture.keeps_expanded_block
    assert recapture.keeps_expanded_block and advance.keeps_expanded_block
    assert all(one.loads_block for one in (capture, recapture, advance, refine_block))


def test_an_unknown_stage_names_the_known_ones():
    with pytest.raises(ValueError, match="no stage 'nothing' .*capture.*experts.*trunk"):
        stage_of("nothing")


def test_a_stage_is_one_file(tmp_path, monkeypatch, llama_folder):
    """A module in the package of stages is found by its name: it stands in no list."""
    from sparse_expansion.work import registry, stages

    (tmp_path / "count_blocks.py").write_text(
        "from sparse_expansion.work.registry import Done, stage\n\n\n"
        "@stage()\n"
        "def count_blocks(context, *, times: int):\n"
        "    return Done(stats={'blocks': times * context.shell().num_blocks})\n"
    )
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(tmp_path)])
    try:
        made = stage_of("count_blocks")
        assert isinstance(made, Stage) and made.parameters == {"times": (int, False)}
        spec = WorkerSpec(
            store=str(tmp_path / "o"), source=resolve_name(str(llama_folder)), threads=1
        )
        unit = made.unit(key="u", params={"times": 5})
        reports = LocalExecutor(spec).run([unit], RunConfig(), lambda progress: None)
        assert reports["u"].stats == {"blocks": 15}
    finally:
        registry._STAGES.pop("count_blocks", None)
        sys.modules.pop("sparse_expansion.work.stages.count_blocks", None)


def test_two_stages_cannot_share_a_name():
    def capture(context: object, *, layer: int) -> Done:
        return Done()

    from sparse_expansion.work.registry import stage

    capture.__module__ = "elsewhere"
    with pytest.raises(ValueError, match="capture is registered twice"):
        stage()(capture)
    assert stage_of("capture").function.__module__.endswith("calibrate")


def test_tf32_only_where_it_is_asked_for(tmp_path, llama_folder):
    from sparse_expansion.work.worker import Worker

    worker = Worker(WorkerSpec(store=str(tmp_path), source=resolve_name(str(llama_folder))))
    for asked in (True, False):
        worker.context.use(RunConfig(tf32=asked))
        assert torch.backends.cuda.matmul.allow_tf32 is asked
