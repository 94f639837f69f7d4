"""What is known of the work in hand, and how it is said in a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparse_expansion.messages import printable

if TYPE_CHECKING:
    from sparse_expansion.execution.base import Progress, Working

LEAST_SHARE = 0.02
"""Share of the work that is done before an ETA is given."""


class Phase:
    """A phase of a command: units of work, one graph after another, or a single step."""

    def __init__(self, title: str, num_blocks: int, now: float) -> None:
        """Nothing is done yet.

        Args:
            title: of the phase; empty for steps outside of phases.
            num_blocks: of the model.
            now: when it begins, in seconds of a clock of its own.
        """
        self.title, self.num_blocks = title, num_blocks
        self.step = ""
        """What is done besides units, such as reading the model; empty while units are done."""
        self._begin = self._graph_begin = self._last_end = now
        self._ended: Progress | None = None
        self._tokens = 0.0
        self._scored = (0.0, 0)
        """Sum of losses, and the tokens that it is of: together, for another thread may ask."""

    def add(self, progress: Progress, now: float) -> None:
        """Account for a unit that has ended."""
        if progress.num_done <= 1:
            # A phase may do several graphs: another model is scored, say.
            self._graph_begin = self._last_end
            self._tokens, self._scored = 0.0, (0.0, 0)
        self.step = ""
        self._ended, self._last_end = progress, now
        self._tokens += progress.unit.tokens
        for total, count in progress.report.stats.get("nll", ()):
            self._scored = (self._scored[0] + total, self._scored[1] + count)

    @property
    def is_done(self) -> bool:
        """Whether all units of the graph have ended."""
        ended = self._ended
        return ended is not None and ended.num_done == ended.num_total

    def share(self, working: Sequence[Working] = ()) -> float | None:
        """Share of the graph's work that is done; None where none is being done."""
        ended = self._ended
        if self.step or (ended is None and not working):
            return None
        begun = sum(each.share * each.weight for each in working)
        if ended is None:
            return min(1.0, begun)
        return min(1.0, begun + (ended.cost_done / ended.cost_total if ended.cost_total else 1.0))

    def words(self, now: float, working: Sequence[Working] = ()) -> str:
        """What is done, how far it has come, time gone and left, and how fast it goes.

        Args:
            now: by the clock of the phase's begin.
            working: the units that are being done.
        """
        return _joined(self.place(working), self.timing(now, working), self.measures(now, working))

    def place(self, working: Sequence[Working] = ()) -> str:
        """The phase, its block and its stage: of what is being done, or else has ended last."""
        return _joined(self.title, *self._place(working))

    def timing(self, now: float, working: Sequence[Working] = ()) -> str:
        """The share that is done, the time since the phase began, and how long it may still take.

        The latter is of the graph in hand, by the operations that its units take.
        """
        share = self.share(working)
        parts = [] if share is None else [f"{100 * share:.0f} %"]
        parts.append(f"{clock(now - self._begin)} elapsed")
        if share is not None and LEAST_SHARE <= share and not self.is_done:
            parts.append(f"ETA {clock((now - self._graph_begin) * (1 - share) / share)}")
        return _joined(*parts)

    def measures(self, now: float, working: Sequence[Working] = ()) -> str:
        """Tokens in a second, the perplexity of the windows that were scored, and the worker."""
        if self.step:
            return ""
        found = []
        tokens = self._tokens + sum(each.share * each.unit.tokens for each in working)
        seconds = (self._last_end if self.is_done else now) - self._graph_begin
        if tokens and seconds > 0:
            found.append(f"{tokens / seconds:,.0f} tokens/s")
        loss, count = self._scored
        if count:
            mean = loss / count
            perplexity = math.exp(mean) if mean < math.log(1e9) else math.inf
            found.append(f"perplexity {perplexity:.3f}" + ("" if self.is_done else " so far"))
        if self._ended is not None and self._ended.worker != "local":
            found.append(self._ended.worker)
        return _joined(*found)

    def _place(self, working: Sequence[Working]) -> list[str]:
        """Block and stage: of what is being done, or where nothing is, of what has ended."""
        if self.step:
            return [self.step]
        if working:
            unit, layer = working[0].unit, working[0].layer
        elif self._ended is not None:
            unit, layer = self._ended.unit, None
        else:
            return []
        if layer is None:
            # Units of several blocks say themselves, while they are done, in which one they are.
            layer = unit.params.get("layer", -1)
        block = f"block {layer + 1}/{self.num_blocks}" if layer >= 0 else ""
        stage = "" if self.title.startswith(unit.stage) else unit.stage.replace("_", " ")
        more = f"{len(working)} units at work" if len(working) > 1 else ""
        return [block, stage, more]


def _joined(*parts: str) -> str:
    return printable(" · ".join(part for part in parts if part))


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
