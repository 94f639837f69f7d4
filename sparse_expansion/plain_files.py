"""Files that may come from anywhere: read only where they are files, and of a bounded size.

A named pipe is waited for without end, and a device gives bytes without end. JSON that this
package writes for itself carries a seal, by which a changed digit is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

MOST_TEXT_BYTES = 1 << 30
"""More than any JSON file takes: manifests of very many experts have some hundred megabytes."""
SEAL = "sha256_of_the_rest"
"""The key of a seal."""
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
)


def check_plain(path: str | Path) -> os.stat_result:
    """What the system knows of a file, links followed.

    Raises:
        ValueError: it is there, and no file.
        FileNotFoundError: it is not there.
    """
    found = os.stat(path)
    for is_kind, kind in _KINDS:
        if is_kind(found.st_mode):
            raise ValueError(f"{path} is {kind} and not a file: put the file in its place")
    return found


def check_plain_folder(folder: Path) -> None:
    """Answer what lies in a folder and is neither file nor folder, before a library opens it.

    Raises:
        ValueError: there is such a thing.
    """
    for path in sorted(folder.iterdir()):
        # A link that leads nowhere is missed when it is needed.
        if path.exists() and not path.is_dir():
            check_plain(path)


def read_plain(path: str | Path, *, most: int = MOST_TEXT_BYTES) -> bytes:
    """A file's content.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        ValueError: it is no file, or larger.
        FileNotFoundError: it is not there.
    """
    size = check_plain(path).st_size
    if size > most:
        raise ValueError(f"{path} has {size} bytes, no such file has more than {most}: replace it")
    with open(path, "rb") as stream:
        return stream.read()


def check_no_links(base: str, name: str) -> None:
    """Answer a folder on the way to a file that is a link: it leads out of where the file belongs.

    Args:
        base: the folder that the file belongs to; it may be a link itself.
        name: the file's path inside.

    Raises:
        ValueError: a folder on the way is a link.
    """
    folder = base
    for part in name.split("/")[:-1]:
        folder = f"{folder}/{part}"
        if os.path.islink(folder):
            raise ValueError(
                f"{folder} is a link to {os.readlink(folder)}, and nothing is written or deleted "
                "through links: replace it by a folder"
            )


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The value, for a JSON file, with a digest of itself."""
    # As it will be read: keys that are numbers become text, and are sorted as such.
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return {**plain, SEAL: _digest(plain)}


def is_seal_whole(value: dict[str, Any]) -> bool:
    """Take the seal off a value out of JSON; whether it was that of the rest.

    What carries none, since an earlier version wrote it, counts as whole.
    """
    return SEAL not in value or value.pop(SEAL) == _digest(value)


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
