"""Names of tasks of lm-evaluation-harness, looked at without importing it.

Its import and its index of some fourteen thousand files take half a minute; a mistyped name is
answered once they have been read as text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

from sparse_expansion.config.nearest import did_you_mean

_PLAIN_NAME = re.compile(r"[\w.+-]+")
"""A name that is no pattern and no path of a task's file."""
_NAMES = re.compile(rb"^(?:task|group|tag):[ \t]*([\w.+-]+)", re.MULTILINE)
_NOT_A_NAME = re.compile(rb"[^\w.+-]+")


def check_spelling(tasks: list[str], task_path: str | None) -> None:
    """Answer names that stand in no file of tasks.

    Args:
        tasks: names of tasks or groups, patterns or paths; the latter two are left to the harness.
        task_path: a folder with more task files, None for the harness's own alone.

    Raises:
        ValueError: the harness is not installed, the folder is not there, or such a name is among
            them.
    """
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise no_harness()
    folders = [Path(spec.submodule_search_locations[0]) / "tasks"]
    if task_path is not None:
        folders.append(task_folder(task_path))
    wanted = {name for name in tasks if _PLAIN_NAME.fullmatch(name)}
    known: set[str] = set()
    for content in _task_files(folders):
        if not wanted:
            return
        words = set(_NOT_A_NAME.split(content))
        wanted = {name for name in wanted if name.encode() not in words}
        known.update(name.decode() for name in _NAMES.findall(content))
    if wanted:
        raise unknown_tasks([name for name in tasks if name in wanted], known)


def task_folder(name: str) -> Path:
    """The folder of a user's task files.

    Raises:
        ValueError: it is no folder.
    """
    if not Path(name).is_dir():
        raise ValueError(f"--task-path {name} is not a folder of task files (.yaml)")
    return Path(name)


def no_harness() -> ValueError:
    """The error where lm-evaluation-harness is not installed."""
    return ValueError("--tasks needs lm-evaluation-harness: pip install 'sparse-expansion[eval]'")


def unknown_tasks(names: list[str], known: Collection[str] = ()) -> ValueError:
    """The error of names that the harness does not know.

    Args:
        names: at least one.
        known: names that it has, of which the nearest is offered.
    """
    return ValueError(
        f"--tasks: the harness knows no {', '.join(names)}{did_you_mean(names[0], sorted(known))}; "
        "`lm_eval ls tasks` lists those that it has, --task-path adds a folder of your own"
    )


def _task_files(folders: list[Path]) -> Iterator[bytes]:
    """The contents of all files that may hold tasks."""
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                file = os.path.join(place, name)
                if name.endswith((".yaml", ".yml")) and os.path.isfile(file):
                    with open(file, "rb") as stream:
                        yield stream.read()
