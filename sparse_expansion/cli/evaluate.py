"""``evaluate``: the perplexity of a model, or its scores on tasks."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import TYPE_CHECKING, Any

from sparse_expansion.cli.command import Command
from sparse_expansion.cli.flags import add_settings
from sparse_expansion.cli.opening import (
    begin_work,
    check_eval_windows,
    evaluation_text_windows,
    fetch_shell,
    open_executor,
    print_result,
    window_length,
)
from sparse_expansion.cli.progress import ProgressLine
from sparse_expansion.cli.settings import execution_options
from sparse_expansion.cli.shared_flags import (
    add_eval_windows,
    add_execution,
    add_model,
    add_text,
)
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.run import RunConfig

if TYPE_CHECKING:
    from sparse_expansion.model.sources import ModelSource
    from sparse_expansion.model.streaming import ModelShell

_EXAMPLES = """\
  sparse-expansion evaluate --model ./expanded --dataset pydoc --seqlen 512 --eval-windows 32
  sparse-expansion evaluate --model pythia --model_size 70m --dataset wikitext2 --json
  # tasks of lm-evaluation-harness
  sparse-expansion evaluate --model ./expanded --tasks arc_easy,hellaswag --limit 200
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_text(parser)
    add_execution(parser)
    add_eval_windows(parser)
    add_settings(parser, RunConfig, names=("dtype",))
    group = parser.add_argument_group("tasks (lm-evaluation-harness, in place of perplexity)")
    group.add_argument("--tasks", metavar="NAMES", help="Comma-separated tasks of the harness.")
    group.add_argument(
        "--task-path",
        metavar="DIR",
        help="Folder of more task files (.yaml), which are code: give only those that you trust.",
    )
    group.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="Examples before every question; each task's own number without it.",
    )
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="Documents of every task; all of them without it.",
    )
    group.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="Sequences at a time."
    )


def check_tasks(args: argparse.Namespace) -> None:
    """Check the bounds of the flags of tasks.

    Raises:
        ValueError: a value is out of bounds, or flags contradict each other.
    """
    if args.tasks is None:
        for flag in ("task_path", "num_fewshot", "limit"):
            if getattr(args, flag) is not None:
                name = "--" + flag.replace("_", "-")
                raise ValueError(f"{name} needs --tasks: add it, or drop {name}")
        return
    if args.executor != "local":
        raise ValueError("--tasks runs in this process: drop --executor ray")
    if not _task_names(args):
        raise ValueError("--tasks names no task, e.g. --tasks arc_easy")
    for flag, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag.replace('_', '-')} {value} must be at least {least}")


def _task_names(args: argparse.Namespace) -> list[str]:
    return [name for name in args.tasks.split(",") if name]


def run(args: argparse.Namespace) -> int:
    """Measure a dense or expanded model."""
    if args.seqlen is not None and args.seqlen < 2:
        raise ValueError(f"--seqlen {args.seqlen} must be at least 2 tokens")
    options = execution_options(args)
    check_eval_windows(args.eval_windows)
    check_tasks(args)
    return _measure_perplexity(args, options) if args.tasks is None else _run_tasks(args)


def _open_model(args: argparse.Namespace, source: ModelSource, line: ProgressLine) -> ModelShell:
    """The model without its blocks; an expanded one's tensors are checked against its manifest."""
    from sparse_expansion.model.manifest import MANIFEST_NAME
    from sparse_expansion.model.verification import check_finite, verify

    line.say(f"model {source.location}")
    shell = fetch_shell(args, source)
    if shell.expansion is not None and (shell.folder / MANIFEST_NAME).exists():
        line.say(f"{verify(shell.folder)} tensors agree with their digests")
    elif shell.expansion is not None:
        line.say(f"no {MANIFEST_NAME}, as save_pretrained leaves it: no digests to check")
    if shell.expansion is not None:
        check_finite(shell.files)
    return shell


def _measure_perplexity(args: argparse.Namespace, options: ExecutionOptions) -> int:
    from sparse_expansion.data.corpora import check_dataset
    from sparse_expansion.model.sources import resolve_name

    check_dataset(args.dataset)
    source = resolve_name(args.model, args.model_size)
    begin_work(args)
    from sparse_expansion.jobs.evaluate import evaluate
    from sparse_expansion.jobs.measurements import Measurements, measure_ceilings
    from sparse_expansion.report.tables import evaluation_table

    measured = Measurements()
    config = RunConfig(dtype=args.dtype)
    with closing(ProgressLine()) as line:
        shell = _open_model(args, source, line)
        seqlen = window_length(args, shell.config)
        tokens = evaluation_text_windows(args, shell, seqlen, args.eval_windows)
        where = str(shell.folder)
        with closing(open_executor(args, options, store=where, source=source)) as executor:
            if options.profile:
                line.say("measuring the ceilings of a worker")
                measure_ceilings(executor, config, measured)
            line.start("evaluate", shell.num_blocks)
            nll, per_window = evaluate(
                "dense",
                tokens,
                config,
                shell,
                executor,
                line.update,
                measured,
                model_bytes=shell.files.num_bytes,
                num_shards=executor.num_workers,
                num_ranges=options.eval_pipeline,
            )
    result: dict[str, Any] = {
        "model": source.location,
        "is_expanded": shell.expansion is not None,
        "perplexity": nll.perplexity,
        "num_eval_tokens": nll.num_tokens,
        "num_windows": len(per_window),
        "seqlen": seqlen,
        "dataset": args.dataset,
        "seconds": measured.seconds["evaluate_dense"],
        "peak_memory_bytes": measured.peak_memory_bytes,
        **measured.machine(),
    }
    profile = measured.profile()
    if profile is not None:
        result["profile"] = profile
    print_result(args, result, evaluation_table(result), sort_keys=True)
    return 0


def _run_tasks(args: argparse.Namespace) -> int:
    from sparse_expansion.jobs.harness import check_tasks as known_tasks
    from sparse_expansion.jobs.harness import run_tasks
    from sparse_expansion.model.sources import resolve_name
    from sparse_expansion.report.tables import tasks_table

    source = resolve_name(args.model, args.model_size)
    tasks = _task_names(args)
    with closing(ProgressLine()) as line:
        if args.task_path is not None:
            # Before they are read.
            line.say(
                f"task files of {args.task_path} can run any code: use only those that you trust"
            )
        manager = known_tasks(tasks, args.task_path)
        begin_work(args)
        shell = _open_model(args, source, line)
        if args.threads is not None:
            import torch

            torch.set_num_threads(args.threads)
        scores = run_tasks(
            shell.folder,
            tasks,
            manager,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
        )
    result = {"model": source.location, "is_expanded": shell.expansion is not None, "tasks": scores}
    print_result(args, result, tasks_table(scores), sort_keys=True)
    return 0


EVALUATE = Command(
    name="evaluate",
    help="Measure the perplexity of a dense or expanded model, or its scores on tasks.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
