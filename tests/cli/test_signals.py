"""Signals, and what becomes of the exceptions that they raise."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from sparse_expansion.cli import main, signals
from sparse_expansion.cli.main import COMMANDS


@pytest.fixture
def command(monkeypatch):
    """Sets what `report` does, and puts the handlers back that it leaves behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell lets what it starts in the background ignore SIGINT, and the program leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def does(run):
        monkeypatch.setitem(COMMANDS, "report", replace(COMMANDS["report"], run=run))

    yield does
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")]
)
@pytest.mark.parametrize("becomes", [None, ImportError, SystemError, ValueError, OSError])
def test_an_exception_that_becomes_another_is_still_the_signal(
    becomes, number, word, command, capsys
):
    """Python's import system, Ray's compiled code, and libraries that catch what they can."""

    def run(args):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt as error:
            if becomes is None:
                raise
            raise becomes("cannot load module more than once per process") from error

    command(run)
    assert main(["report", "x"]) == 128 + number
    assert capsys.readouterr().err == (
        f"sparse-expansion: error: {word}: finished units are kept, continue with --resume\n"
    )


def test_a_signal_within_generated_code_ends_with_its_own_code():
    """As while a dataclass is made, whose methods are strings that Python runs."""
    program = (
        "import os, signal\n"
        "from dataclasses import replace\n"
        "from sparse_expansion.cli import main\n"
        "from sparse_expansion.cli.main import COMMANDS\n"
        "def run(args): exec('os.kill(os.getpid(), signal.SIGTERM)')\n"
        "COMMANDS['report'] = replace(COMMANDS['report'], run=run)\n"
        "code = main(['report', 'x'])\n"
        "assert code == 143, code\n"
    )
    # Python's own ending by SIGINT is tested for after `-c` and `-m`, not after a script's file.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "terminated" in done.stderr, (done.returncode, done.stderr)


def test_a_signal_that_comes_twice_is_obeyed_once(command, capsys):
    """To the process and to its group, or by an impatient hand, while it cleans up."""
    cleaned = []

    def run(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            cleaned.append(True)

    command(run)
    assert main(["report", "x"]) == 143
    assert cleaned and capsys.readouterr().err.count("terminated: finished units are kept") == 1


def test_cleaning_up_that_hangs_is_cut_short(command, capsys, monkeypatch):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(signals.os, "_exit", end)

    def run(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            with pytest.raises(Ended, match="143"):
                os.kill(os.getpid(), signal.SIGTERM)

    command(run)
    assert main(["report", "x"]) == 143
    assert "terminated" in capsys.readouterr().err


def test_errors_without_a_signal_stay_what_they_are(command, capsys):
    def run(args):
        raise SystemError("a defect")

    command(run)
    with pytest.raises(SystemError, match="a defect"):
        main(["report", "x"])


def test_an_ignored_interrupt_stays_ignored(command):
    """As a shell asks of what it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(args):
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    command(run)
    assert main(["report", "x"]) == 0
