"""Where units run whose files nobody keeps."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_expansion.api.models import Origin
from sparse_expansion.api.opening import open_executor
from sparse_expansion.config.execution import ExecutionOptions

if TYPE_CHECKING:
    from sparse_expansion.execution.base import Executor, Observer
    from sparse_expansion.store import Store


@dataclass(frozen=True)
class Workplace:
    """Where the units of an experiment run."""

    store: Store
    executor: Executor
    observer: Observer


@contextmanager
def passing_workplace(
    args: argparse.Namespace, options: ExecutionOptions, model: Origin, num_blocks: int
) -> Iterator[Workplace]:
    """A folder that is thrown away, an executor, and progress on stderr.

    Args:
        args: of a command that runs units.
        options: where and with what they run.
        model: the dense one.
        num_blocks: of the model, for the progress.
    """
    from sparse_expansion.store import Store

    with (
        tempfile.TemporaryDirectory(prefix="sparse-expansion-", dir=args.scratch) as where,
        closing(open_executor(model, options, store=where, listener=args.progress)) as executor,
    ):
        args.progress.start(args.command, num_blocks)
        yield Workplace(Store(where), executor, args.progress.update)
