"""Progress: its words by hand, a log that is never silent for long, the bar of a terminal."""

import io
import logging
import math
import os
import pty
import re
import sys
import threading
import time
from dataclasses import replace

import pytest

from sparse_expansion.cli import main, progress
from sparse_expansion.cli.main import COMMANDS
from sparse_expansion.cli.phase import Phase
from sparse_expansion.cli.progress import ProgressLine
from sparse_expansion.execution.base import Progress, Working
from sparse_expansion.units import Unit, UnitReport


def ended(done, total, *, cost=(1.0, 4.0), stage="capture", worker="local", stats=None, **fields):
    unit = Unit(key=f"u{done}", stage=stage, **fields)
    report = UnitReport(unit.key, 1.0, 0, stats or {})
    return Progress(report, unit, done, total, *cost, worker=worker)


def test_the_words_of_calibration():
    phase = Phase("expand", 3, 100.0)
    assert phase.words(104.0) == "expand · 0:04 elapsed" and phase.share() is None
    unit = {"params": {"layer": 1}, "tokens": 300.0}
    phase.add(ended(1, 4, worker="worker-1@vm", **unit), 110.0)
    assert phase.words(112.0) == (
        "expand · block 2/3 · capture · 25 % · 0:12 elapsed · ETA 0:36 · 25 tokens/s · worker-1@vm"
    )
    # What is being done is said in place of what has ended, and counts by its share.
    waiting = Unit(key="w", stage="experts", params={"layer": 2}, tokens=100.0)
    working = [Working(waiting, 0.5, share=0.5), Working(waiting, 0.25)]
    assert phase.share(working) == 0.5
    assert phase.words(110.0, working) == (
        "expand · block 3/3 · experts · 2 units at work · 50 % · 0:10 elapsed · ETA 0:10 · "
        "35 tokens/s · worker-1@vm"
    )
    phase.step = "assembling \x1b"
    assert phase.words(4000.0, working) == r"expand · assembling \x1b · 1:05:00 elapsed"
    phase.add(ended(4, 4, cost=(4.0, 4.0), stage="advance", **unit), 160.0)
    assert phase.is_done and phase.words(161.0) == (
        "expand · block 2/3 · advance · 100 % · 1:01 elapsed · 10 tokens/s"
    )


def test_the_perplexity_so_far_is_of_the_graph_in_hand():
    phase = Phase("evaluate dense", 3, 0.0)
    scored = Unit(key="e", stage="evaluate", tokens=60.0)
    assert phase.words(1.0, [Working(scored, 1.0, layer=1, share=0.25)]) == (
        "evaluate dense · block 2/3 · 25 % · 0:01 elapsed · ETA 0:03 · 15 tokens/s"
    )
    first = {"stats": {"nll": [(3 * math.log(2), 3), (math.log(2), 1)]}, "stage": "evaluate"}
    phase.add(ended(1, 2, cost=(0.0, 0.0), **first), 1.0)
    assert "perplexity 2.000 so far" in phase.words(2.0)
    second = {"stats": {"nll": [(4 * math.log(8), 4)]}, "stage": "evaluate"}
    phase.add(ended(2, 2, cost=(0.0, 0.0), **second), 2.0)
    assert phase.words(2.0).endswith("perplexity 4.000")
    # Another model is scored in the same phase.
    phase.add(ended(1, 2, **second), 4.0)
    assert phase.words(4.0).endswith("25 % · 0:04 elapsed · ETA 0:06 · perplexity 8.000 so far")
    phase.add(ended(2, 2, stage="evaluate", stats={"nll": [(math.nan, 1)]}), 4.0)
    phase.add(ended(1, 1, stage="evaluate", stats={"nll": [(9e9, 1)]}), 4.0)
    assert phase.words(4.0).endswith("perplexity inf")


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_log_is_not_silent_where_no_unit_ends(monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    stream = io.StringIO()
    line = ProgressLine(stream)
    wait_for(lambda: stream.getvalue().startswith("starting · 0:00 elapsed\n"))
    line.doing("reading the model")
    wait_for(lambda: stream.getvalue().count("reading the model · 0:00 elapsed\n") >= 2)
    line.start("expand", 3)
    line.update(ended(1, 2, params={"layer": 0}))
    wait_for(lambda: "expand · block 1/3 · capture · 25 %" in stream.getvalue())
    line.say("dense\x1b[8m")
    assert r"dense\x1b[8m" in stream.getvalue()
    line.update(ended(2, 2, cost=(4.0, 4.0)))
    assert "100 %" in stream.getvalue()
    line.close()
    line.close()
    before = stream.getvalue()
    time.sleep(0.1)
    assert stream.getvalue() == before


def test_a_log_says_something_every_five_seconds():
    assert progress.LOG_SECONDS < 5


class Gone(io.StringIO):
    """A stream that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError


def test_a_log_that_nobody_reads_ends_nothing(monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    before = set(threading.enumerate())
    line = ProgressLine(Gone())
    (thread,) = set(threading.enumerate()) - before
    thread.join(30)
    assert not thread.is_alive()
    line.close()


def plain(output):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)


@pytest.fixture
def terminal(monkeypatch):
    """A terminal as a stream, and what came out at its other end."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 0.02)
    master, slave = pty.openpty()
    seen = []

    def read():
        try:
            while part := os.read(master, 65536):
                seen.append(part.decode(errors="replace"))
        except OSError:
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with open(slave, "w", encoding="utf-8") as stream:
        yield stream, lambda: "".join(seen)
    reader.join(30)
    os.close(master)


def test_a_terminal_has_a_bar(terminal, monkeypatch):
    stream, output = terminal
    monkeypatch.setattr(sys, "stderr", stream)
    stdout = sys.stdout
    line = ProgressLine(stream)
    line.doing("reading [bold]the[/bold] model")
    wait_for(lambda: "reading [bold]the[/bold] model" in plain(output()))
    assert sys.stdout is stdout
    line.start("evaluate dense", 3)
    unit = {"stage": "evaluate", "tokens": 50.0}
    line.update(ended(1, 2, stats={"nll": [(math.log(2), 1)]}, **unit))
    wait_for(lambda: "perplexity 2.000 so far" in plain(output()))
    assert "25 %" in plain(output()) and "━" in output() and "ETA" in output()
    line.say("a [line] of its own")
    print("a warning", file=sys.stderr)
    line.update(ended(2, 2, cost=(4.0, 4.0), **unit))
    line.close()
    assert sys.stderr is stream
    print("the result", file=stream, flush=True)
    wait_for(lambda: "the result" in output())
    shown = plain(output())
    for text in ("a [line] of its own", "a warning", "evaluate dense · 100 %"):
        assert text in shown
    # The cursor is there, and below the last line nothing is drawn any more.
    assert output().rindex("\x1b[?25h") > output().rindex("\x1b[?25l")
    assert shown.endswith("the result\r\n")


def test_a_terminal_that_cannot_rewrite_lines_gets_a_log(terminal, monkeypatch):
    stream, output = terminal
    monkeypatch.setenv("TERM", "dumb")
    line = ProgressLine(stream)
    line.say("a line")
    wait_for(lambda: output() == "a line\r\n")
    line.close()


def test_nothing_is_said_after_the_command(monkeypatch, capsys):
    """Neither by a command that ends well, nor by one that fails; results are on stdout alone."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    threads = []

    def run(args):
        threads.extend(each for each in threading.enumerate() if each.name == "progress")
        args.progress.doing("a long step")
        time.sleep(0.1)
        logging.getLogger("sparse_expansion.test").warning("a warning")
        if args.folder == "bad":
            raise ValueError("bad input")
        return 0

    monkeypatch.setitem(COMMANDS, "report", replace(COMMANDS["report"], run=run))
    assert main(["report", "good", "--json"]) == 0
    assert main(["report", "bad"]) == 2
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    found = capsys.readouterr()
    assert found.out == "" and "a long step · 0:00 elapsed\n" in found.err
    assert found.err.endswith("sparse-expansion: error: bad input\n")


def test_no_thread_outlives_its_progress():
    """What still runs when the interpreter goes may abort the process after its work is done."""
    line = ProgressLine(io.StringIO())
    assert any(thread.name == "progress" for thread in threading.enumerate())
    others = [thread for thread in threading.enumerate() if thread is not line._thread]
    line.close()
    line.close()
    assert threading.enumerate() == others
