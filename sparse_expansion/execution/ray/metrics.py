"""What Ray exports of a run to its dashboard and to Prometheus."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

from sparse_expansion.units import Unit, UnitReport


class RunMetrics:
    """Counters and gauges that Ray exports to its dashboard and to Prometheus."""

    def __init__(self) -> None:
        def counter(name: str, text: str) -> Any:
            return Counter(f"sparse_expansion_{name}", text, tag_keys=("stage",))

        self.units = counter("units_done", "Units of work finished")
        self.experts = counter("experts_done", "Experts finished")
        self.starved = counter("starved_clusters", "Experts with too few tokens of their own")
        self.damping = counter("damping_raised", "Experts whose Hessian needed more damping")
        self.lost = counter("workers_lost", "Workers lost")
        self.stored = Gauge("sparse_expansion_value_bytes", "Bytes of values between units")
        self.speed = Gauge("sparse_expansion_tokens_per_second", "Tokens captured per second")

    def finished(self, unit: Unit, report: UnitReport, value_bytes: float) -> None:
        """Count a finished unit.

        Args:
            unit: that was done.
            report: of the unit.
            value_bytes: bytes of values that wait between units now.
        """
        tags = {"stage": unit.stage}
        self.units.inc(1, tags)
        self.stored.set(value_bytes)
        stats = report.stats
        if "starved" in stats:
            self.experts.inc(len(stats["tokens"]), tags)
            if sum(stats["starved"]):
                self.starved.inc(sum(stats["starved"]), tags)
            raised = sum(attempts > 1 for attempts in stats["damping_attempts"])
            if raised:
                self.damping.inc(raised, tags)
        if unit.makes_captures and report.seconds > 0:
            self.speed.set(stats.get("tokens", 0) / report.seconds)
