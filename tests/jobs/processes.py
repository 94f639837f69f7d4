"""Runs in processes of their own, to be killed and interrupted.

They are forked from a server that has imported what they need and done nothing else: importing
PyTorch takes longer than the whole run.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import time

from tests.tiny import SMALL_RUN

IMPORTED = (
    "sparse_expansion.jobs.expand",
    "sparse_expansion.jobs.metrics",
    "sparse_expansion.report.card",
    "sparse_expansion.report.tables",
    "sparse_expansion.execution.local",
    "transformers.models.gpt_neox.modeling_gpt_neox",
)


def arguments(model, text, output):
    """The command line of a small run."""
    where = ["--model", str(model), "--dataset", str(text), "--output", str(output)]
    return ["expand", *where, *SMALL_RUN]


def start(command, log, worker_program=None, constants=None):
    """The process of a command line; its exit code and messages are those of the program.

    ``worker_program`` is what a Ray that it starts is to start workers with; ``constants`` are
    values of module-level names in place of theirs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    process = context.Process(
        target=_run, args=(command, str(log), worker_program, constants or {})
    )
    process.start()
    return process


def wait_for(condition, process):
    """Until the process has come so far."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)


def _run(command, log, worker_program, constants):
    from sparse_expansion.cli import main

    if worker_program is not None:
        sys.executable = worker_program
        # Without it a run joins a Ray that other tests have started on this machine.
        os.environ["RAY_ADDRESS"] = "local"
    for name, value in constants.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    # A shell lets what it starts in the background ignore SIGINT, and its children with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, sys.stdout.fileno())
    os.dup2(stream, sys.stderr.fileno())
    sys.exit(main(command))
