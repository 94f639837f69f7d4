"""Command line: flags to settings, settings to a job, results to stdout, progress to stderr."""

from sparse_expansion.cli.main import main

__all__ = ["main"]
