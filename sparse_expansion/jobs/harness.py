"""Tasks of lm-evaluation-harness on a dense or expanded model; the only home of ``lm_eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_expansion.jobs.task_names import no_harness, task_folder, unknown_tasks
from sparse_expansion.jobs.whole_model import load_whole
from sparse_expansion.plain_files import read_plain


def check_tasks(tasks: list[str], task_path: str | None, *, include_defaults: bool = True) -> Any:
    """The harness's task manager, once it is certain that it knows all tasks.

    Args:
        tasks: names of tasks or groups.
        task_path: a folder with more task files, None for the harness's own tasks alone.
        include_defaults: whether the harness's own tasks are known too: there are thousands, and
            reading their index takes half a minute.

    Raises:
        ValueError: the harness is not installed, a task is unknown, or a task file of the user's
            folder names Python code.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise no_harness() from None
    if task_path is not None:
        for file in sorted(task_folder(task_path).rglob("*.yaml")):
            if "!function" in read_plain(file).decode("utf-8", "replace"):
                raise ValueError(
                    f"{file} names a Python function (!function), which is not run from files: "
                    "write the task with templates alone"
                )
    manager = TaskManager(include_path=task_path, include_defaults=include_defaults)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise unknown_tasks(unknown)
    return manager


def run_tasks(
    folder: Path,
    tasks: list[str],
    manager: Any,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Run the tasks on a model; returns the harness's metrics by task, under its own names.

    Args:
        folder: a model folder; the whole model is loaded, its experts stay compressed.
        tasks: names of tasks or groups.
        manager: the task manager from ``check_tasks``.
        num_fewshot: examples before every question, None for the task's own number.
        limit: documents per task, None for all.
        batch_size: sequences that go through the model together.
        device: ``cpu``, ``cuda`` or ``auto``.
        dtype: dtype of weights and arithmetic, ``auto`` for the checkpoint's.
    """
    # Who asks for tasks has checked the digests, and that the format is this package's.
    model, tokenizer = load_whole(folder, device=device, dtype=dtype, verify=False)
    found = evaluate_tasks(
        model,
        tokenizer,
        tasks,
        manager,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        log_samples=False,
    )
    results = {}
    for task, metrics in found["results"].items():
        # A group that has no score of its own has nothing but its name.
        numbers = {
            name: value for name, value in metrics.items() if isinstance(value, (int, float))
        }
        if numbers:
            results[task] = numbers
    return results


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    manager: Any,
    *,
    batch_size: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """What the harness finds for a model that is loaded, under its own names.

    Args:
        model: of transformers, dense or expanded.
        tokenizer: the model's.
        tasks: names of tasks or groups.
        manager: the task manager from ``check_tasks``.
        batch_size: sequences that go through the model together.
        options: more of the harness's ``simple_evaluate``.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found: dict[str, Any] = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks,
        task_manager=manager,
        **options,
    )
    return found
