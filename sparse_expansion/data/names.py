"""What ``--dataset`` names, looked at without PyTorch: a wrong name is answered at once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_expansion.config.checks import require_text
from sparse_expansion.config.nearest import did_you_mean
from sparse_expansion.data.local_text import check_beginning, check_local

NAMED = ("wikitext2", "c4", "pydoc", "stdlib")
_NAMED_OF_HUB = ("wikitext2", "c4")
HUB = "hf:"
"""What the names of other data sets of the hub begin with."""
_WEIGHT = re.compile(r":(\d+(?:\.\d*)?|\.\d+)$")
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([^@]+))?(?:@([\w.-]+))?")


def weighted_sources(dataset: str) -> list[tuple[str, float]]:
    """The texts that a name stands for, with their shares, which add up to 1.

    Several texts are written ``a:0.7,b:0.3``, each with a weight. What is a name or a path as a
    whole is one text, whatever commas and colons are in it; one text alone has no weight.

    Raises:
        ValueError: a weight is no share, or a text is named twice.
    """
    entries = _entries(dataset)
    names = [name for name, _ in entries]
    if len(entries) == 1:
        return [(dataset, 1.0)]
    for name, weight in entries:
        if not 0 < float(weight) < math.inf:
            raise ValueError(f"dataset {name!r} has weight {weight}: give it more, or leave it out")
        if names.count(name) > 1:
            raise ValueError(f"dataset {name!r} is named twice: add up its weights")
    total = sum(float(weight) for _, weight in entries)
    return [(name, float(weight) / total) for name, weight in entries]


def _entries(dataset: str) -> list[tuple[str, str]]:
    """Names and weights as they are written; the name alone, with an empty weight, of one text."""
    found: list[tuple[str, str]] = []
    rest = ""
    for word in dataset.split(","):
        rest = f"{rest},{word}" if rest else word
        match = _WEIGHT.search(rest)
        if match:
            found.append((rest[: match.start()], match[1]))
            rest = ""
    if len(found) < 2 or rest or dataset in NAMED or Path(dataset).expanduser().exists():
        return [(dataset, "")]
    return found


def whole_name(dataset: str) -> str:
    """A name that means the same in whatever folder it is read: paths are made whole."""
    entries = _entries(dataset)
    if len(entries) == 1:
        return _whole_path(dataset)
    return ",".join(f"{_whole_path(name)}:{weight}" for name, weight in entries)


def _whole_path(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in NAMED and path.exists() else name


@dataclass(frozen=True)
class HubName:
    """A data set of the hub."""

    repository: str
    config: str | None
    split: str | None


def hub_name(dataset: str) -> HubName:
    """What ``hf:owner/name[:config][@split]`` names.

    Raises:
        ValueError: it is not of this form.
    """
    match = _HUB_NAME.fullmatch(dataset.removeprefix(HUB))
    if match is None:
        raise ValueError(
            f"dataset {dataset!r} is not of the form {HUB}owner/name[:config][@split], "
            f"e.g. {HUB}Salesforce/wikitext:wikitext-2-raw-v1@test"
        )
    return HubName(*match.groups())


def check_text(dataset: Any, column: str | None = None) -> None:
    """Reject a wrong ``--dataset``, of one text or several, before anything is loaded.

    Args:
        dataset: see ``TextRequest``.
        column: of rows, see ``Rows``.

    Raises:
        ValueError: it is empty; see ``check_dataset``, ``weighted_sources`` and
            ``check_beginning``.
    """
    if isinstance(dataset, str):
        require_text("--dataset", dataset)
    names = (
        [name for name, _ in weighted_sources(dataset)] if isinstance(dataset, str) else [dataset]
    )
    for name in names:
        check_dataset(name)
        if isinstance(name, str | Path) and name not in NAMED and not is_of_hub(name):
            check_beginning(Path(name).expanduser(), column)


def check_dataset(dataset: Any) -> None:
    """Reject a wrong ``--dataset`` before any long work.

    Raises:
        ValueError: the data set is neither a known name nor an existing folder or file that can
            hold text, nor in memory.
    """
    if dataset in NAMED if isinstance(dataset, str) else not isinstance(dataset, Path):
        return
    path = Path(dataset).expanduser()
    if is_of_hub(dataset):
        hub_name(str(dataset))
        return
    if "://" in str(dataset):
        raise ValueError(f"dataset {str(dataset)!r} is a URL: download it, and give the file")
    if not path.exists():
        raise ValueError(
            f"dataset {str(dataset)!r} is neither {', '.join(NAMED)} nor an existing folder or "
            f"file, {HUB}owner/name, nor several with weights (a:0.7,b:0.3): check --dataset"
            f"{did_you_mean(str(dataset), NAMED)}"
        )
    check_local(path)


def needs_hub(dataset: str) -> bool:
    """Whether one of the texts comes from the hub, or from its cache here.

    Raises:
        ValueError: see ``weighted_sources``.
    """
    return any(name in _NAMED_OF_HUB or is_of_hub(name) for name, _ in weighted_sources(dataset))


def is_of_hub(dataset: str | Path) -> bool:
    """Whether it names a data set of the hub, and no file that is called so."""
    return str(dataset).startswith(HUB) and not Path(dataset).exists()
