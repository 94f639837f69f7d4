"""Where units run whose files nobody keeps."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_expansion.cli.opening import open_executor
from sparse_expansion.cli.progress import ProgressLine
from sparse_expansion.config.execution import ExecutionOptions

if TYPE_CHECKING:
    from sparse_expansion.execution.base import Executor, Observer
    from sparse_expansion.model.sources import ModelSource
    from sparse_expansion.store import Store


@dataclass(frozen=True)
class Workplace:
    """Where the units of an experiment run."""

    store: Store
    executor: Executor
    observer: Observer


@contextmanager
def passing_workplace(
    args: argparse.Namespace, options: ExecutionOptions, source: ModelSource, num_blocks: int
) -> Iterator[Workplace]:
    """A folder that is thrown away, an executor, and progress on stderr.

    Args:
        args: of a command that runs units.
        options: where and with what they run.
        source: the dense model.
        num_blocks: of the model, for the progress.
    """
    from sparse_expansion.store import Store

    with (
        tempfile.TemporaryDirectory(prefix="sparse-expansion-", dir=args.scratch) as where,
        closing(ProgressLine()) as line,
        closing(open_executor(args, options, store=where, source=source)) as executor,
    ):
        line.start(args.command, num_blocks)
        yield Workplace(Store(where), executor, line.update)
