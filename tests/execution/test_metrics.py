"""What is exported to Prometheus, and the dashboard and the page that are made for it."""

import json
import re
from types import SimpleNamespace

import pytest

from sparse_expansion.execution.ray import metrics
from tests.test_docs import ROOT


class Recorder:
    """In place of one of Ray's metrics: what it was told."""

    made = {}

    def __init__(self, name, text, tag_keys=()):
        self.kind, self.text, self.told = type(self).__name__, text, []
        Recorder.made[name] = self

    def inc(self, value, tags=None):
        self.told.append((value, tags))

    def set(self, value):
        self.told.append(value)


class Counter(Recorder):
    pass


class Gauge(Recorder):
    pass


@pytest.fixture
def exported(monkeypatch):
    """A run's metrics and the recorders of them by the name that Prometheus sees."""
    monkeypatch.setattr(Recorder, "made", {})
    monkeypatch.setattr(metrics, "Counter", Counter)
    monkeypatch.setattr(metrics, "Gauge", Gauge)
    run = metrics.RunMetrics()
    # Ray puts its name in front of all, and Prometheus's client "_total" behind what is counted.
    end = {"Counter": "_total", "Gauge": ""}
    return run, {f"ray_{name}{end[made.kind]}": made for name, made in Recorder.made.items()}


def queries(dashboard):
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        yield variable["query"]


def test_every_metric_of_the_dashboard_exists_and_is_in_it(exported):
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    asked = {name for query in queries(dashboard) for name in re.findall(r"ray_\w+", query)}
    assert asked == set(exported[1])
    # A rate is of what is counted, and what is set is no sum.
    for query in queries(dashboard):
        for name in re.findall(r"(?:rate|sum)\((ray_\w+)", query):
            assert exported[1][name].kind == "Counter"
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in dashboard["panels"]]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(set(places)) == len(places)


def test_every_metric_is_documented(exported):
    page = (ROOT / "docs" / "how-to.md").read_text()
    assert set(re.findall(r"^\| `(ray_\w+)`", page, re.M)) == set(exported[1])


def test_a_finished_units_metrics(exported):
    run, made = exported
    stats = {"starved": [True, False, True], "tokens": [1, 90, 2], "damping_attempts": [1, 3, 1]}
    unit = SimpleNamespace(stage="experts", makes_captures=False)
    run.finished(unit, SimpleNamespace(stats=stats, seconds=2.0), 512.0)
    tags = {"stage": "experts"}
    told = {name.removeprefix("ray_sparse_expansion_"): made[name].told for name in made}
    assert told == {
        "units_done_total": [(1, tags)],
        "experts_done_total": [(3, tags)],
        "starved_clusters_total": [(2, tags)],
        "damping_raised_total": [(1, tags)],
        "workers_lost_total": [],
        "value_bytes": [512.0],
        "tokens_per_second": [],
    }
    capture = SimpleNamespace(stage="capture", makes_captures=True)
    run.finished(capture, SimpleNamespace(stats={"tokens": 100}, seconds=4.0), 0.0)
    assert told["tokens_per_second"] == [25.0] and told["units_done_total"][1][0] == 1
