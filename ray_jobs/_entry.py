"""What the entry points share: the command line, on the cluster that the job runs in."""

from __future__ import annotations

import sys

from sparse_expansion.cli.flags import normalise_flags
from sparse_expansion.cli.main import main


def job(command: str) -> int:
    """Run a subcommand with Ray as the executor and the job's own cluster as the address."""
    arguments = normalise_flags(sys.argv[1:])
    flags = {argument.split("=")[0] for argument in arguments}
    if "--executor" not in flags:
        arguments += ["--executor", "ray"]
        if "--ray-address" not in flags:
            arguments += ["--ray-address", "auto"]
    return main([command, *arguments])
