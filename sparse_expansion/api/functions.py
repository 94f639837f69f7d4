"""The functions that other programs call."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparse_expansion.api.evaluation import EvaluationJob, run_evaluation
from sparse_expansion.api.expansion import ExpansionJob, run_expansion
from sparse_expansion.api.listener import Listener
from sparse_expansion.api.models import ModelRequest
from sparse_expansion.api.result import Result
from sparse_expansion.config.checks import require_text
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.fields import settings_of
from sparse_expansion.config.kinds import of_kind
from sparse_expansion.config.run import RunConfig
from sparse_expansion.config.values import (
    SWITCHES,
    check_names,
    completed,
    known_settings,
    plain_values,
)
from sparse_expansion.run_files import IN_MEMORY, SETTINGS_FILE

_OF_EVALUATION = ("seqlen", "text_column", "dtype", *settings_of(ExecutionOptions))
_ARGUMENTS = (
    *("model", "dataset", "config", "output", "executor", "tokenizer", "model_size"),
    *("model_revision", "cache_dir", "resume", "measure", "eval_windows", "listener"),
)


def expand(
    model: Any,
    dataset: Any = "wikitext2",
    *,
    config: RunConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    executor: str | ExecutionOptions | None = None,
    tokenizer: Any = None,
    model_size: str | None = None,
    model_revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    measure: bool = False,
    eval_windows: int | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Result:
    """Make an expanded model, as the command ``expand`` does; with ``measure``, as ``run`` does.

    Args:
        model: a path, a hub id, ``pythia`` or ``llama`` with ``model_size``, or a loaded model of
            transformers with its ``tokenizer``, which is written to a folder of its own first.
        dataset: a name such as ``wikitext2``, ``pydoc`` or ``hf:owner/name``, a path, several of
            them with weights (``a:0.7,b:0.3``), a ``datasets.Dataset``, a list of strings or of
            rows, or a list of lists of token ids.
        config: all settings of the run; without it those of the ``preset`` (``best`` if none is
            named) and the fields' defaults.
        output: folder or URL of the expanded model; without it a folder that is deleted with the
            result.
        executor: ``local`` or ``ray``, or all settings of where and with what the units run.
        tokenizer: that of a loaded model.
        model_size: of a named family's model.
        model_revision: on the hub.
        cache_dir: folder for downloads and conversions.
        resume: whether to go on with an interrupted run in the output folder.
        measure: whether to measure the perplexities of the dense and the expanded model.
        eval_windows: windows to measure on; all of the text's without it.
        listener: is told of what happens.
        settings: fields of the settings' classes by name, such as ``sparsity="2:4"`` or
            ``threads=4``; they override ``config`` and ``executor``.

    Raises:
        ValueError: what was asked for is wrong or cannot be done, in the line that the command
            prints.
    """
    check_names(settings, {*known_settings(), *SWITCHES} - {"dataset", "executor"}, _ARGUMENTS)
    _check_listener(listener)
    for name, switch in (("resume", resume), ("measure", measure)):
        of_kind(bool, name, switch)
    asked = _text("output", output)
    if asked is not None:
        # Before it is made whole: an empty path would be the current folder.
        require_text("--output", asked)
    given = {**_config(config), **_executor(executor)}
    is_named = isinstance(dataset, str | Path)
    given |= {"dataset": str(dataset) if is_named else IN_MEMORY, **settings}
    kept = tempfile.TemporaryDirectory(prefix="sparse-expansion-") if asked is None else None
    if kept is not None and resume:
        raise ValueError("--resume needs the --output folder of the run to continue")
    folder = asked if asked is not None else str(kept and kept.name)
    if "://" not in folder:
        folder = str(Path(folder).expanduser().resolve())
    name = "run" if measure else "expand"
    job = ExpansionJob(
        model=_model(model, tokenizer, model_size, model_revision, cache_dir),
        dataset=dataset,
        values=completed(given),
        command=shlex.join(["sparse-expansion", name, "--config", f"{folder}/{SETTINGS_FILE}"]),
        output=folder,
        resume=resume,
        measures=measure,
        eval_windows=eval_windows,
    )
    return Result(run_expansion(job, listener or Listener()), folder, kept)


def evaluate(
    model: Any,
    dataset: Any = "wikitext2",
    *,
    executor: str | ExecutionOptions | None = None,
    tokenizer: Any = None,
    model_size: str | None = None,
    model_revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    eval_windows: int | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Result:
    """Measure the perplexity of a dense or expanded model, as the command ``evaluate`` does.

    Args:
        model: see ``expand``; an expanded model may also be the ``Result`` that made it.
        dataset: see ``expand``.
        executor: ``local`` or ``ray``, or all settings of where and with what the units run.
        tokenizer: that of a loaded model.
        model_size: of a named family's model.
        model_revision: on the hub.
        cache_dir: folder for downloads and conversions.
        eval_windows: windows to measure on; all of the text's without it.
        listener: is told of what happens.
        settings: ``seqlen``, ``text_column``, ``dtype``, and by name, fields of
            ``ExecutionOptions``.

    Returns:
        A result whose ``metrics`` have ``perplexity``.

    Raises:
        ValueError: what was asked for is wrong or cannot be done, in the line that the command
            prints.
    """
    check_names(settings, set(_OF_EVALUATION) - {"executor"}, _ARGUMENTS)
    _check_listener(listener)
    if isinstance(model, Result):
        model = model.folder
    job = EvaluationJob(
        model=_model(model, tokenizer, model_size, model_revision, cache_dir),
        dataset=dataset,
        values=completed({**_executor(executor), **settings}),
        eval_windows=eval_windows,
    )
    metrics = run_evaluation(job, listener or Listener())
    is_folder = isinstance(model, str | Path) and Path(model).expanduser().is_dir()
    return Result(metrics, str(Path(model).expanduser().resolve()) if is_folder else None)


def _model(
    model: Any,
    tokenizer: Any,
    size: str | None,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> ModelRequest:
    return ModelRequest(
        model=model,
        tokenizer=tokenizer,
        size=_text("model_size", size),
        revision=_text("model_revision", revision),
        cache_dir=_text("cache_dir", cache_dir),
    )


def _text(name: str, value: Any) -> str | None:
    return None if value is None else str(of_kind(str, name, value))


def _check_listener(listener: Any) -> None:
    if listener is not None and not isinstance(listener, Listener):
        raise ValueError(f"listener of type {type(listener).__name__} is no Listener")


def _config(config: Any) -> Mapping[str, Any]:
    if config is None:
        return {}
    if not isinstance(config, RunConfig):
        raise ValueError(f"config of type {type(config).__name__} is no RunConfig")
    return plain_values(config)


def _executor(executor: Any) -> Mapping[str, Any]:
    if executor is None:
        return {}
    if isinstance(executor, str):
        return {"executor": executor}
    if not isinstance(executor, ExecutionOptions):
        raise ValueError(
            f"executor of type {type(executor).__name__} is neither a name nor ExecutionOptions"
        )
    return asdict(executor)
