"""What several commands do before their work, and after it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_expansion.cli.signals import catch_signals
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.messages import printable

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from sparse_expansion.execution.base import Executor
    from sparse_expansion.model.sources import ModelSource
    from sparse_expansion.model.streaming import ModelShell
    from sparse_expansion.store import Store


def silence_transformers(verbose: bool) -> None:
    """Keep transformers' own bars and advice from hiding ours."""
    if not verbose:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def begin_work(args: argparse.Namespace) -> None:
    """Load what computes: keep libraries quiet, and see that what is asked for is there.

    Raises:
        ValueError: the device that was asked for is unknown, or this machine has none, or not what
            is to run KMeans.
    """
    silence_transformers(args.verbose)
    from sparse_expansion.algorithms.kmeans import check_backend
    from sparse_expansion.work.spec import check_device

    # On a cluster the workers have the devices, and this process may have none.
    if args.executor == "local":
        check_device(args.device)
        if "kmeans" in args:
            check_backend(args.kmeans)


def fetch_shell(args: argparse.Namespace, source: ModelSource) -> ModelShell:
    """The model of a source, downloaded where it has to be, without its blocks.

    Raises:
        ValueError: it cannot be had, or is no model that is supported.
    """
    from sparse_expansion.model.sources import fetch_model
    from sparse_expansion.model.streaming import ModelShell

    folder = fetch_model(source, cache_dir=args.cache_dir, revision=args.model_revision)
    return ModelShell(folder, dtype=args.dtype)


def window_length(args: argparse.Namespace, model_config: Any) -> int:
    """Tokens in a window: what was asked for, or what is usual for the model's family.

    Raises:
        ValueError: the model has fewer positions, or it is less than 2.
    """
    from sparse_expansion.model.families import check_seqlen, default_seqlen

    seqlen = default_seqlen(model_config) if args.seqlen is None else int(args.seqlen)
    check_seqlen(seqlen, model_config)
    return seqlen


def evaluation_text_windows(
    args: argparse.Namespace, shell: ModelShell, seqlen: int, max_windows: int | None
) -> torch.Tensor:
    """Windows ``[N, L]`` of the evaluation text that the command was given, in the model's tokens.

    Args:
        args: of a command with a text.
        shell: of the model.
        seqlen: tokens in a window.
        max_windows: the first so many; all of them if None.
    """
    from sparse_expansion.data.corpora import load_corpus
    from sparse_expansion.data.tokenization import encoder, load_tokenizer
    from sparse_expansion.jobs.prepare import evaluation_tokens

    return evaluation_tokens(
        load_corpus(args.dataset, cache_dir=args.cache_dir).evaluation,
        encoder(load_tokenizer(shell.folder)),
        seqlen=seqlen,
        max_windows=max_windows,
        vocabulary=int(shell.config.vocab_size),
    )


def open_executor(
    args: argparse.Namespace, options: ExecutionOptions, *, store: str, source: ModelSource
) -> Executor:
    """The executor that was asked for.

    Args:
        args: of a command that downloads models.
        options: where and with what units run.
        store: folder or URL of the run.
        source: the dense model.
    """
    from sparse_expansion.work.spec import WorkerSpec

    spec = WorkerSpec(
        store=store,
        source=source,
        cache_dir=args.cache_dir,
        revision=args.model_revision,
        device=options.device,
        threads=options.threads,
        activation_bytes=options.activation_bytes,
        device_bytes=options.device_bytes,
        scratch=options.scratch,
    )
    if options.executor == "local":
        from sparse_expansion.execution.local import LocalExecutor

        return LocalExecutor(spec)
    from sparse_expansion.execution.ray.executor import RayExecutor

    executor = RayExecutor(spec, options)
    # Joining Ray put its own handler in place, which dumps a stack and dies.
    catch_signals()
    return executor


def open_run(folder: str) -> Store:
    """The store of a run's output folder or URL.

    Raises:
        ValueError: there is no such folder.
    """
    from sparse_expansion.store import Store

    if "://" not in folder and not Path(folder).is_dir():
        raise ValueError(f"run folder {folder} does not exist: give a run's --output")
    return Store(folder)


def check_output(output: str) -> None:
    """Answer a folder that cannot be made as bad input, and not as a failure after an hour.

    Raises:
        ValueError: it cannot be made.
    """
    if "://" in output:
        return
    path = Path(output).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output {output} is a file: choose a folder")
    parent = _nearest_folder(path)
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--output {output}: {parent} is not writable")


def check_room(output: str, needed: int) -> None:
    """Answer a disk that has no room for a run before it begins, and not after hours.

    Args:
        output: folder or URL of the run; what it holds already is counted.
        needed: bytes of the finished folder, and of what is there besides until then.

    Raises:
        ValueError: there is no room.
    """
    if "://" in output:
        return
    from sparse_expansion.report.formatting import format_bytes

    path = Path(output).expanduser().resolve()
    held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(_nearest_folder(path)).free
    if needed > held + free:
        raise ValueError(
            f"--output {output} needs {format_bytes(needed - held)} more, its disk has "
            f"{format_bytes(free)}: free some, or choose another folder"
        )


def _nearest_folder(path: Path) -> Path:
    """The folder itself, or the one above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def check_table(path: str | None) -> None:
    """Answer a table of another format.

    Raises:
        ValueError: the file's name does not end in .parquet.
    """
    if path is not None and not path.endswith(".parquet"):
        raise ValueError(f"--table {path} must end in .parquet")


def check_eval_windows(count: int | None) -> None:
    """Answer a number of windows on which nothing can be measured.

    Raises:
        ValueError: it is less than 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"--eval-windows {count} must be at least 1")


def print_result(args: argparse.Namespace, result: Any, text: str, *, sort_keys: bool) -> None:
    """Print a result to stdout: as JSON where that was asked for, else as text."""
    print(json.dumps(result, indent=1, sort_keys=sort_keys) if args.json else printable(text))


def present(
    args: argparse.Namespace,
    result: Any,
    text: str,
    *,
    columns: Callable[[], dict[str, list[Any]]],
    figures: Callable[[], dict[str, Figure]],
) -> None:
    """Write the table and the figures that were asked for, and print the result.

    Args:
        args: of the command.
        result: what ``--json`` prints.
        text: for a person.
        columns: makes the table's columns.
        figures: makes the figures by name of the file.
    """
    if args.table:
        from sparse_expansion.report.parquet import write_table

        write_table(columns(), args.table)
    if args.plots:
        from sparse_expansion.report.figures.canvas import save

        save(figures(), args.plots)
    print_result(args, result, text, sort_keys=False)
