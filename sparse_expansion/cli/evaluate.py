"""``evaluate``: the perplexity of a model, or its scores on tasks."""

from __future__ import annotations

import argparse

from sparse_expansion.api.evaluation import EvaluationJob, open_model, run_evaluation
from sparse_expansion.cli.command import Command
from sparse_expansion.cli.flags import add_settings
from sparse_expansion.cli.opening import begin_work, model_request, origin, print_result
from sparse_expansion.cli.shared_flags import (
    add_config,
    add_eval_windows,
    add_execution,
    add_model,
    add_text,
)
from sparse_expansion.config.run import RunConfig
from sparse_expansion.jobs.task_names import check_spelling

_EXAMPLES = """\
  sparse-expansion evaluate --model ./expanded --dataset pydoc --seqlen 512 --eval-windows 32
  sparse-expansion evaluate --model pythia --model_size 70m --dataset wikitext2 --json
  # tasks of lm-evaluation-harness
  sparse-expansion evaluate --model ./expanded --tasks arc_easy,hellaswag --limit 200
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_config(parser)
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
    job = EvaluationJob(
        model=model_request(args),
        dataset=args.dataset,
        values=vars(args),
        eval_windows=args.eval_windows,
    )
    check_tasks(args)
    if args.tasks is not None:
        return _run_tasks(args)
    result = run_evaluation(job, args.progress)
    from sparse_expansion.report.tables import evaluation_table

    print_result(args, result, evaluation_table(result), sort_keys=True)
    return 0


def _run_tasks(args: argparse.Namespace) -> int:
    source = origin(args, args.model, args.model_size)
    args.progress.doing("looking for the tasks")
    tasks = _task_names(args)
    check_spelling(tasks, args.task_path)
    begin_work(args)
    from sparse_expansion.jobs.harness import check_tasks as known_tasks
    from sparse_expansion.jobs.harness import run_tasks
    from sparse_expansion.report.tables import tasks_table

    if args.task_path is not None:
        # Before they are read.
        args.progress.say(
            f"task files of {args.task_path} can run any code: use only those that you trust"
        )
    args.progress.doing("reading the tasks")
    manager = known_tasks(tasks, args.task_path)
    shell = open_model(source, args.dtype, args.progress)
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    args.progress.doing(f"running {len(tasks)} tasks")
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
    result = {"model": source.name, "is_expanded": shell.expansion is not None, "tasks": scores}
    print_result(args, result, tasks_table(scores), sort_keys=True)
    return 0


EVALUATE = Command(
    name="evaluate",
    help="Measure the perplexity of a dense or expanded model, or its scores on tasks.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
