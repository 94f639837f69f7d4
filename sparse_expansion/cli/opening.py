"""What several commands do before their work, and after it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_expansion.api.models import ModelRequest, Origin, named_origin
from sparse_expansion.api.opening import check_devices
from sparse_expansion.cli.progress import silence_transformers
from sparse_expansion.messages import printable

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from sparse_expansion.data.texts import TextRequest
    from sparse_expansion.model.streaming import ModelShell
    from sparse_expansion.store import Store


def begin_work(args: argparse.Namespace) -> None:
    """Load what computes: keep libraries quiet, and see that what is asked for is there.

    Raises:
        ValueError: the device that was asked for is unknown, or this machine has none, or not what
            is to run KMeans.
    """
    args.progress.doing("loading libraries")
    check_devices(getattr(args, "executor", "local"), args.device, getattr(args, "kmeans", None))
    silence_transformers(args.verbose)


def model_request(args: argparse.Namespace) -> ModelRequest:
    """The model that a command was given."""
    return ModelRequest(
        model=args.model,
        size=args.model_size,
        revision=args.model_revision,
        cache_dir=args.cache_dir,
    )


def origin(args: argparse.Namespace, model: str, size: str | None = None) -> Origin:
    """Where a model of this name comes from, for a command that downloads models.

    Raises:
        ValueError: the name leads nowhere.
    """
    return named_origin(model, size, cache_dir=args.cache_dir, revision=args.model_revision)


def text_request(args: argparse.Namespace) -> TextRequest:
    """The text that a command was given."""
    from sparse_expansion.data.texts import TextRequest

    return TextRequest(dataset=args.dataset, cache_dir=args.cache_dir, column=args.text_column)


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
    from sparse_expansion.data.tokenization import load_tokenizer
    from sparse_expansion.jobs.prepare import evaluation_tokens

    args.progress.doing("reading the text")
    texts = text_request(args).load(load_tokenizer(shell.folder))
    args.progress.doing("tokenizing the text")
    return evaluation_tokens(
        texts,
        seqlen=seqlen,
        max_windows=max_windows,
        vocabulary=int(shell.config.vocab_size),
    )


def open_run(folder: str) -> Store:
    """The store of a run's output folder or URL.

    Raises:
        ValueError: there is no such folder.
    """
    check_run(folder)
    from sparse_expansion.store import Store

    return Store(folder)


def check_run(*folders: str | None) -> None:
    """Answer a run's folder that is not there, before anything is loaded.

    Raises:
        ValueError: there is no such folder.
    """
    for folder in folders:
        if folder is not None and "://" not in folder and not Path(folder).is_dir():
            raise ValueError(f"run folder {folder} does not exist: give a run's --output")


def check_table(path: str | None) -> None:
    """Answer a table of another format.

    Raises:
        ValueError: the file's name does not end in .parquet.
    """
    if path is not None and not path.endswith(".parquet"):
        raise ValueError(f"--table {path} must end in .parquet")


def print_result(args: argparse.Namespace, result: Any, text: str, *, sort_keys: bool) -> None:
    """Print a result to stdout: as JSON where that was asked for, else as text.

    It ends the progress, which a terminal shows in the same place.
    """
    args.progress.close()
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
