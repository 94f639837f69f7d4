"""Making an expanded model, and measuring it and the dense one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_expansion.api.listener import Listener
from sparse_expansion.api.models import ModelRequest, Origin
from sparse_expansion.api.opening import (
    check_eval_windows,
    check_output,
    check_room,
    open_executor,
    opened,
    profile_worker,
    window_length,
)
from sparse_expansion.config.calibration import CalibrationConfig
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.values import field_values, plain_values, run_config

if TYPE_CHECKING:
    import torch

    from sparse_expansion.config.run import RunConfig
    from sparse_expansion.execution.base import Executor
    from sparse_expansion.jobs.measurements import Measurements
    from sparse_expansion.jobs.prepare import Prepared, WriteOwn
    from sparse_expansion.store import Store


@dataclass(frozen=True, kw_only=True)
class ExpansionJob:
    """What is asked for; wrong settings are answered when it is made, before anything is read."""

    model: ModelRequest
    dataset: Any
    """See ``TextRequest``."""
    values: Mapping[str, Any]
    """Of all settings, by name; ``seqlen`` may be None."""
    command: str
    """The command line by which it can be done again."""
    output: str | None = None
    """Folder or URL of the expanded model; None for one that is thrown away."""
    resume: bool = False
    measures: bool = False
    """Whether perplexities are measured."""
    eval_windows: int | None = None
    """Windows to measure on; None for all."""

    def __post_init__(self) -> None:
        """Check the settings and the output folder."""
        run_config(self.values, self.values["seqlen"] or CalibrationConfig.seqlen)
        _ = self.options
        check_eval_windows(self.eval_windows)
        if self.output is not None:
            check_output(self.output)
        elif self.resume:
            raise ValueError("--resume needs the --output folder of the run to continue")

    @property
    def options(self) -> ExecutionOptions:
        """Where and with what its units run."""
        return ExecutionOptions(**field_values(ExecutionOptions, self.values))

    def settings(self, seqlen: int) -> dict[str, Any]:
        """What ``run.yaml`` has: values by name, by which the same is asked for again.

        Args:
            seqlen: tokens in a window.
        """
        from sparse_expansion.data.names import whole_name

        config = run_config(self.values, seqlen)
        options = asdict(self.options)
        usual = asdict(ExecutionOptions())
        return {
            **self.model.settings(),
            **plain_values(config),
            "dataset": whole_name(str(self.values["dataset"])),
            "text_column": self.values["text_column"],
            "quantize": config.compression.bits is not None,
            "eval_windows": self.eval_windows,
            **{name: value for name, value in options.items() if value != usual[name]},
        }


def run_expansion(job: ExpansionJob, listener: Listener) -> dict[str, Any]:
    """Make the model, write it to its folder, and give its metrics.

    Raises:
        ValueError: what was asked for cannot be done.
    """
    with opened(job, listener, kmeans=job.values["kmeans"]) as (origin, text):
        return _expand_and_measure(job, origin, text, listener)


def _expand_and_measure(
    job: ExpansionJob, origin: Origin, text: Any, listener: Listener
) -> dict[str, Any]:
    from sparse_expansion.jobs.forecast import disk_bytes
    from sparse_expansion.jobs.measurements import Measurements
    from sparse_expansion.jobs.metrics import mixed_threads
    from sparse_expansion.jobs.prepare import claim
    from sparse_expansion.run_files import COMMAND_FILE, SETTINGS_FILE
    from sparse_expansion.run_folder import alone_in
    from sparse_expansion.settings_file import settings_text
    from sparse_expansion.store import Store

    options = job.options
    prepared, windows = _prepare(job, origin, text, listener)
    listener.doing("tokenizing the evaluation text")
    tokens = _evaluation_tokens(job, prepared) if job.measures else None
    listener.doing("preparing the output folder")
    with _output_folder(job.output) as output:
        check_room(output, disk_bytes(prepared.config, prepared.shell.config))
        store = Store(output)
        with alone_in(store):
            claim(store, prepared, windows, resume=job.resume)
            del windows
            if advice := mixed_threads(store, options.threads):
                listener.say(advice)
            store.write_sealed(COMMAND_FILE, {"command": job.command})
            asked = settings_text(job.settings(prepared.config.calibration.seqlen))
            store.write_bytes(SETTINGS_FILE, asked.encode())
            where = output if "://" in output else str(Path(output).expanduser().resolve())
            measured = Measurements()
            with closing(
                open_executor(origin, options, store=where, listener=listener)
            ) as executor:
                metrics = _expand(job, prepared, store, executor, listener, measured)
                if tokens is not None:
                    _evaluate(options, prepared, tokens, executor, listener, measured, metrics)
                return _finish(store, origin, metrics, measured)


def _prepare(
    job: ExpansionJob, origin: Origin, text: Any, listener: Listener
) -> tuple[Prepared, torch.Tensor]:
    from sparse_expansion.jobs.prepare import prepare, slow_dtype
    from sparse_expansion.model.checkpoint import load_config

    listener.say(f"model {origin.name}")
    listener.doing("fetching the model")
    folder = origin.fetch()
    seqlen = window_length(job.values["seqlen"], load_config(folder))
    config = run_config(job.values, seqlen)
    prepared, windows = prepare(
        config,
        folder,
        text=text,
        model_name=origin.name,
        doing=listener.doing,
        write_own=_writer(job, config, folder, listener),
    )
    if advice := slow_dtype(prepared.shell.dtype):
        listener.say(advice)
    return prepared, windows


def _writer(
    job: ExpansionJob, config: RunConfig, folder: Path, listener: Listener
) -> WriteOwn | None:
    """Has the model write text on this machine; None where none is asked for."""
    if not config.calibration.own_text:
        return None
    from sparse_expansion.jobs.calibration_text import Writer
    from sparse_expansion.model.sources import default_cache_dir

    options, cache_dir = job.options, job.model.cache_dir
    writer = Writer(
        folder=folder,
        # What is named for the workers of a cluster need not be here.
        device=options.device if options.executor == "local" else "auto",
        dtype=config.dtype,
        threads=options.threads,
        cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir),
        doing=listener.doing,
    )
    return partial(writer.write, config.calibration)


def _evaluation_tokens(job: ExpansionJob, prepared: Prepared) -> torch.Tensor:
    from sparse_expansion.jobs.prepare import evaluation_tokens

    return evaluation_tokens(
        prepared.texts,
        seqlen=prepared.config.calibration.seqlen,
        max_windows=job.eval_windows,
        vocabulary=int(prepared.shell.config.vocab_size),
    )


@contextmanager
def _output_folder(asked: str | None) -> Iterator[str]:
    """The folder that was asked for, or one that is thrown away."""
    if asked is not None:
        yield asked
        return
    with tempfile.TemporaryDirectory(prefix="sparse-expansion-") as folder:
        yield folder


def _expand(
    job: ExpansionJob,
    prepared: Prepared,
    store: Store,
    executor: Executor,
    listener: Listener,
    measured: Measurements,
) -> dict[str, Any]:
    """Metrics of the expanded model."""
    from sparse_expansion.jobs.expand import expand
    from sparse_expansion.jobs.metrics import expansion_metrics

    profile_worker(job.options, executor, prepared.config, measured, listener)
    expand(
        prepared,
        store,
        executor,
        listener.update,
        measured,
        begin=lambda title: listener.start(title, prepared.shell.num_blocks),
        doing=listener.doing,
    )
    listener.doing("measuring the model's files")
    metrics = expansion_metrics(prepared, store, job.options.executor)
    metrics["command"] = job.command
    return metrics


def _evaluate(
    options: ExecutionOptions,
    prepared: Prepared,
    tokens: torch.Tensor,
    executor: Executor,
    listener: Listener,
    measured: Measurements,
    metrics: dict[str, Any],
) -> None:
    """Add the perplexities of the dense and the expanded model to the metrics."""
    from sparse_expansion.jobs.evaluate import evaluate

    for kind in ("dense", "expanded"):
        prefix = "dense_" if kind == "dense" else ""
        listener.start(f"evaluate {kind}", prepared.shell.num_blocks)
        nll = evaluate(
            kind,
            tokens,
            prepared.config,
            prepared.shell,
            executor,
            listener.update,
            measured,
            model_bytes=metrics[f"{prefix}checkpoint_bytes"],
            num_ranges=options.eval_pipeline,
        ).nll
        listener.say(f"{kind} perplexity {nll.perplexity:.3f}")
        metrics[f"perplexity_{kind}"] = nll.perplexity
        metrics["num_eval_tokens"] = nll.num_tokens


def _finish(
    store: Store, origin: Origin, metrics: dict[str, Any], measured: Measurements
) -> dict[str, Any]:
    """Write the metrics and the model card."""
    from sparse_expansion.jobs.metrics import finish_metrics
    from sparse_expansion.report.card import model_card
    from sparse_expansion.run_files import METRICS_FILE

    metrics = finish_metrics(metrics, measured)
    store.write_sealed(METRICS_FILE, metrics)
    card = model_card(metrics, origin.name, is_hub_id=origin.source.kind == "hub")
    store.write_bytes("README.md", card.encode())
    return metrics
