"""Measuring the perplexity of a dense or expanded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_expansion.api.listener import Listener
from sparse_expansion.api.models import ModelRequest, Origin
from sparse_expansion.api.opening import (
    check_eval_windows,
    open_executor,
    opened,
    profile_worker,
    window_length,
)
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.run import RunConfig
from sparse_expansion.config.values import field_values

if TYPE_CHECKING:
    from sparse_expansion.data.texts import TextRequest
    from sparse_expansion.model.streaming import ModelShell


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """What is asked for; wrong settings are answered when it is made, before anything is read."""

    model: ModelRequest
    dataset: Any
    """See ``TextRequest``."""
    values: Mapping[str, Any]
    """Of ``seqlen``, which may be None, ``text_column``, ``dtype``, and where the units run."""
    eval_windows: int | None = None
    """Windows to measure on; None for all."""

    def __post_init__(self) -> None:
        """Check the settings."""
        seqlen = self.values["seqlen"]
        if seqlen is not None and seqlen < 2:
            raise ValueError(f"--seqlen {seqlen} must be at least 2 tokens")
        _ = self.options
        check_eval_windows(self.eval_windows)

    @property
    def options(self) -> ExecutionOptions:
        """Where and with what its units run."""
        return ExecutionOptions(**field_values(ExecutionOptions, self.values))


def run_evaluation(job: EvaluationJob, listener: Listener) -> dict[str, Any]:
    """Measure, and give the perplexity with what belongs to it.

    Raises:
        ValueError: what was asked for cannot be done.
    """
    with opened(job, listener) as (origin, text):
        return _measure(job, origin, text, listener)


def open_model(origin: Origin, dtype: str, listener: Listener) -> ModelShell:
    """The model without its blocks; an expanded one's tensors are checked against its manifest."""
    from sparse_expansion.model.manifest import MANIFEST_NAME
    from sparse_expansion.model.verification import check_finite, verify

    listener.say(f"model {origin.name}")
    listener.doing("reading the model")
    shell = origin.shell(dtype)
    if shell.expansion is not None and (shell.folder / MANIFEST_NAME).exists():
        listener.doing("hashing the model's tensors")
        listener.say(f"{verify(shell.folder)} tensors agree with their digests")
    elif shell.expansion is not None:
        listener.say(f"no {MANIFEST_NAME}, as save_pretrained leaves it: no digests to check")
    if shell.expansion is not None:
        listener.doing("checking the model's numbers")
        check_finite(shell.files)
    return shell


def _measure(
    job: EvaluationJob, origin: Origin, text: TextRequest, listener: Listener
) -> dict[str, Any]:
    from sparse_expansion.data.tokenization import load_tokenizer
    from sparse_expansion.jobs.evaluate import evaluate
    from sparse_expansion.jobs.measurements import Measurements
    from sparse_expansion.jobs.prepare import evaluation_tokens

    measured = Measurements()
    config = RunConfig(dtype=job.values["dtype"])
    shell = open_model(origin, config.dtype, listener)
    seqlen = window_length(job.values["seqlen"], shell.config)
    listener.doing("reading the text")
    texts = text.load(load_tokenizer(shell.folder))
    listener.doing("tokenizing the text")
    tokens = evaluation_tokens(
        texts,
        seqlen=seqlen,
        max_windows=job.eval_windows,
        vocabulary=int(shell.config.vocab_size),
    )
    with closing(
        open_executor(origin, job.options, store=str(shell.folder), listener=listener)
    ) as executor:
        profile_worker(job.options, executor, config, measured, listener)
        listener.start("evaluate", shell.num_blocks)
        scores = evaluate(
            "dense",
            tokens,
            config,
            shell,
            executor,
            listener.update,
            measured,
            model_bytes=shell.files.num_bytes,
            num_ranges=job.options.eval_pipeline,
        )
    result: dict[str, Any] = {
        "model": origin.name,
        "is_expanded": shell.expansion is not None,
        "perplexity": scores.nll.perplexity,
        "num_eval_tokens": scores.nll.num_tokens,
        "num_windows": len(scores.per_window),
        "seqlen": seqlen,
        "dataset": text.name,
        "seconds": measured.seconds["evaluate_dense"],
        "peak_memory_bytes": measured.peak_memory_bytes,
        **measured.machine(),
    }
    if shell.expansion is not None:
        result["routed"] = _routed(shell, scores.tokens_by_expert)
    profile = measured.profile()
    if profile is not None:
        result["profile"] = profile
    return result


def _routed(shell: ModelShell, tokens_by_expert: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    from sparse_expansion.model.expansion import ExpandedLinear
    from sparse_expansion.report.experts import expert_rows
    from sparse_expansion.report.routed import RoutedGroup, routed_facts
    from sparse_expansion.store import Store

    linears = {
        f"{layer}.{name}": module
        for layer in range(shell.num_blocks)
        for name, module in shell.meta_block(layer).named_modules()
        if isinstance(module, ExpandedLinear) and hasattr(module, "router")
    }
    groups = {
        name: RoutedGroup(
            linear.in_features, linear.group.dense_weights, linear.group.kept_weights()
        )
        for name, linear in linears.items()
    }
    # A folder that was copied or saved again has no records of the run that made it.
    records = Store(str(shell.folder)).records()
    return routed_facts(tokens_by_expert, expert_rows(records), groups)
