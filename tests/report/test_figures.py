"""Figures: that they show the numbers they were given, and are the same bytes every time."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from sparse_expansion.cli import main
from sparse_expansion.report.experts import LinearFacts
from sparse_expansion.report.figures import run, studies
from sparse_expansion.report.figures.canvas import save
from sparse_expansion.report.figures.comparison import perplexity_against_cost
from sparse_expansion.run_files import TIMELINE_FILE
from sparse_expansion.store import Store
from tests.tiny import SMALL_RUN


def lines(axes):
    """Data of the axes' lines by label."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_units_of_a_stage_that_touch_are_one_bar():
    assert run.merged_spans([(5, 1), (0, 2), (2.05, 1), (2.5, 0.2)], 0.1) == [(0, 3.05), (5, 1)]


def test_a_timeline_has_a_row_per_worker_and_a_bar_per_stretch():
    rows = [
        {"worker": "b", "stage": "capture", "started": 100.0, "seconds": 10.0},
        {"worker": "a", "stage": "router", "started": 110.0, "seconds": 5.0},
        {"worker": "a", "stage": "capture", "started": 120.0, "seconds": 5.0},
    ]
    figure = run.timeline(rows)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    bars = {
        (found.get_label(), path.get_extents().x0, path.get_extents().width)
        for found in axes.collections
        for path in found.get_paths()
    }
    found = {(round(start, 6), round(width, 6)) for _, start, width in bars}
    assert found == {(0.0, 10.0), (10.0, 5.0), (20.0, 5.0)}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["capture", "router"]


def test_the_legend_of_all_stages_is_within_the_timeline():
    stages = (
        "trunk embed block_gaps capture router gather reduce experts recapture refine_block advance"
    ).split()
    rows = [
        {"worker": f"worker-{i % 2}@host", "stage": stage, "started": float(i), "seconds": 1.0}
        for i, stage in enumerate(stages)
    ]
    figure = run.timeline(rows)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert len(legend.get_texts()) == len(stages)
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
    assert box.y0 >= figure.axes[0].get_window_extent().y1


def test_linears_with_the_same_clusters_are_one_line():
    shares = {"gate": (0.4, 0.1), "up": (0.4, 0.1), "down": (0.5, 0.2)}
    facts = [
        LinearFacts(layer, name, 4, largest, smallest, 0, 0.1 * layer, 0.01)
        for layer in (0, 1)
        for name, (largest, smallest) in shares.items()
    ]
    (axes,) = run.shares_by_block(facts).axes
    named = {name: line for name, line in lines(axes).items() if name[0] != "_"}
    assert named == {"gate, up": [[0, 0.4], [1, 0.4]], "down": [[0, 0.5], [1, 0.5]]}
    assert len(axes.get_lines()) == 4
    (axes,) = run.errors_by_block(facts).axes
    marks = [(line.get_marker(), line.get_markersize()) for line in axes.get_lines()]
    assert len(set(marks)) == 3 and list(lines(axes)) == ["gate", "up", "down"]


def test_a_timeline_of_very_many_workers_shows_those_that_worked_most():
    rows = [
        {"worker": f"w{i:06}", "stage": f"stage-{i % 90}", "started": float(i), "seconds": 1.0 + i}
        for i in range(100_000)
    ]
    figure = run.timeline(rows)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"w{i:06}" for i in range(100_000 - run.MOST_SHOWN, 100_000)]
    assert f"those {run.MOST_SHOWN} of 100000 workers" in axes.get_xlabel()
    assert len(figure.legends[0].get_texts()) <= run.MOST_SHOWN


NAMES = ["$x_{", "$x_{$", "$$", r"\$\alpha", "_hidden", "a\x1b[2Jb", "<b>&\x00"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_labels_and_no_formulas(name, tmp_path):
    """Every one is shown, and the SVG is XML."""
    wanted = name.replace("\x1b", r"\x1b").replace("\x00", r"\x00")
    costs = {"perplexity_dense": 2.0, "perplexity": 3.0, "cost": 0.5, "bytes": 0.5}
    figures = {
        "timeline": run.timeline(
            [{"worker": name, "stage": name, "started": 0.0, "seconds": 1.0}],
        ),
        "comparison": perplexity_against_cost([{"name": name, **costs}]),
        "clusters": studies.errors_over_clusters(
            [{"clustering": name, "num_clusters": 2, "error": 0.5}], title=name
        ),
    }
    for path in save(figures, tmp_path):
        if path.suffix == ".svg":
            texts = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
            assert wanted in [text.text.strip() for text in texts], path


def test_errors_over_clusters_and_perplexity_over_share():
    rows = [
        {"clustering": name, "num_clusters": count, "error": error}
        for name, errors in {"kmeans": (0.4, 0.3), "random": (0.4, 0.5)}.items()
        for count, error in zip((1, 4), errors, strict=True)
    ]
    (axes,) = studies.errors_over_clusters(rows, title="t").axes
    assert lines(axes) == {"kmeans": [[1, 0.4], [4, 0.3]], "random": [[1, 0.4], [4, 0.5]]}
    rows = [
        {"ranking": "random", "share": share, "perplexity": value}
        for share, value in ((0.1, 12.0), (0.01, 11.0))
    ]
    (axes,) = studies.perplexity_over_share(rows, 10.0).axes
    assert lines(axes)["random"] == [[1.0, 11.0], [10.0, 12.0]]
    assert {y for _, y in lines(axes)["dense"]} == {10.0}


def test_distributions_share_their_bins():
    generator = np.random.default_rng(0)
    dense = generator.normal(size=5000)
    figure = studies.neuron_distributions(dense, {"4 clusters": dense + 0.01}, title="n")
    (axes,) = figure.axes
    filled = sum(patch.get_height() for patch in axes.patches[:80])
    width = axes.patches[0].get_width()
    assert filled * width == pytest.approx(1, abs=1e-6)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "4 clusters"]


def test_a_scatter_shows_every_linear_and_at_most_so_many_neurons(monkeypatch):
    monkeypatch.setattr(studies, "SCATTERED_NEURONS", 50)
    columns = {
        "linear": ["up"] * 100 + ["down"] * 100,
        "wasserstein": list(np.linspace(0.1, 1, 200)),
        "difficulty": list(np.linspace(1, 2, 200)),
    }
    assert set(studies.neuron_figures(columns)) == {"wasserstein-difficulty"}
    (axes,) = studies.neuron_scatter(columns, "difficulty", "d").axes
    assert [found.get_label() for found in axes.collections] == ["up", "down"]
    assert [len(found.get_offsets()) for found in axes.collections] == [25, 25]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, neox_folder, text_folder):
    root = tmp_path_factory.mktemp("plots")
    where = ["--model", str(neox_folder), "--dataset", str(text_folder), "--sparsity", "0.8"]
    for clusters in ("1", "4"):
        flags = [*SMALL_RUN, "--num_clusters", clusters, "--eval-windows", "4"]
        assert main(["run", *where, "--output", str(root / clusters), *flags]) == 0
    return root


def test_a_runs_figures(runs, tmp_path, capsys):
    assert main(["report", str(runs / "4"), "--plots", str(tmp_path / "p")]) == 0
    assert main(["analyze", str(runs / "4"), "--plots", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    names = {path.name for path in (tmp_path / "p").iterdir()}
    stems = {"errors", "cluster-shares", "cluster-sizes", "timeline", "allocation"}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")}
    for path in (tmp_path / "p").glob("*.svg"):
        ElementTree.parse(path)
        if path.stem not in ("timeline", "allocation"):
            assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    for path in (tmp_path / "p").glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_timeline_is_kept_over_an_interruption(runs, neox_folder, text_folder, tmp_path):
    import json
    import shutil

    rows = Store(str(runs / "4")).read_json(TIMELINE_FILE)
    assert {row["stage"] for row in rows} >= {"embed", "capture", "router", "experts", "advance"}
    assert all(row["seconds"] > 0 and row["started"] > 1e9 for row in rows)
    half = tmp_path / "half"
    shutil.copytree(runs / "4", half)
    units = half / "run" / "units"
    sorted(units.glob("layer-002/*/experts-*.json"))[0].unlink()
    where = ["--model", str(neox_folder), "--dataset", str(text_folder), "--sparsity", "0.8"]
    flags = [*SMALL_RUN, "--output", str(half), "--resume"]
    assert main(["expand", *where, *flags]) == 0
    again = json.loads((half / TIMELINE_FILE).read_text())
    assert again[: len(rows)] == rows and len(again) > len(rows)


def test_compare(runs, tmp_path, capsys):
    import json
    import math

    flags = ["--table", str(tmp_path / "t.parquet"), "--plots", str(tmp_path)]
    assert main(["compare", str(runs / "1"), str(runs / "4"), "--json", *flags]) == 0
    one, four = json.loads(capsys.readouterr().out)
    metrics = Store(str(runs / "4")).read_json("metrics.json")
    assert (one["name"], four["name"]) == ("1", "4")
    assert four["perplexity"] == metrics["perplexity_expanded"]
    assert four["gap"] == pytest.approx(
        math.log(metrics["perplexity_expanded"] / metrics["perplexity_dense"])
    )
    assert one["bytes"] < four["bytes"] and one["cost"] < four["cost"]
    assert (tmp_path / "perplexity-cost.svg").exists() and (tmp_path / "t.parquet").exists()
    assert main(["compare", str(runs / "1"), str(runs / "4")]) == 0
    assert "4 experts per linear, 80 % sparse" in capsys.readouterr().out


def test_compare_needs_finished_runs(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(runs / "1"), str(tmp_path / "empty")]) == 2
    assert "holds no finished run" in capsys.readouterr().err
