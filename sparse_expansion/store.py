"""The run folder: safetensors shards, and one marker per finished unit, written last.

A unit's files are written under a temporary name, flushed and renamed; then its marker, a small
JSON with every file's size and SHA-256, appears the same way. A file without a marker does not
exist for the reader, so nothing half-written is ever taken for whole. The root is a local or
shared path, or any fsspec URL (``s3://``, ``gs://``, ``memory://``); object stores publish an
object only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec.core
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open

from sparse_expansion.config.checks import parse_json
from sparse_expansion.data.transfers import HostCopies
from sparse_expansion.messages import first_line
from sparse_expansion.model.manifest import tensor_record
from sparse_expansion.plain_files import check_no_links, check_plain, read_plain, sealed
from sparse_expansion.run_files import UNITS
from sparse_expansion.tensor_files import file_pieces

_FILE_FORM = {"bytes": int, "sha256": str, "tensors": {...: dict}}
_MARKER_FORM = {"files": {...: _FILE_FORM}, "stats": dict}
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The package's extras that bring what a protocol needs."""
TEMPORARY = ".writing-"
"""How files begin that are being written."""


class Store:
    """Files below one root."""

    def __init__(self, root: str | Path) -> None:
        """Nothing is created yet.

        Raises:
            ValueError: a URL chains file systems, or needs a package that is not there.
        """
        self.root = str(root)
        if "://" not in self.root:
            # A path is taken as it is: fsspec would read ``::`` in it as a chain of file systems.
            self.fs, base = LocalFileSystem(), os.path.abspath(os.path.expanduser(self.root))
        elif "::" in self.root:
            raise ValueError(f"{self.root} chains file systems by '::': give the URL of one")
        else:
            self.fs, base = _file_system(self.root)
        self.base = str(base).rstrip("/")
        protocol = self.fs.protocol
        self.is_local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def path(self, name: str) -> str:
        """A file's full path in the file system."""
        return f"{self.base}/{name}"

    def local_path(self) -> Path:
        """The root as a local path.

        Raises:
            ValueError: the root is a URL.
        """
        if not self.is_local:
            raise ValueError(f"{self.root} is not a local folder: copy it here first")
        return Path(self.base)

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return bool(self.fs.exists(self.path(name)))

    def list(self, folder: str) -> list[str]:
        """Names of all files below a folder, sorted; folders that are links are not entered."""
        where = self.path(folder)
        if self.is_local:
            paths = (f"{here}/{file}" for here, _, files in os.walk(where) for file in files)
            return sorted(os.path.relpath(path, self.base) for path in paths)
        if not self.fs.exists(where):
            return []
        return sorted(str(found)[len(self.base) + 1 :] for found in self.fs.find(where))

    def read_bytes(self, name: str) -> bytes:
        """A file's content.

        Raises:
            ValueError: it is no file, or too large to be one that is read whole.
        """
        if self.is_local:
            return read_plain(self.path(name))
        data: bytes = self.fs.cat_file(self.path(name))
        return data

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file so that it appears whole or not at all.

        Raises:
            ValueError: a folder on the way is a link, which might lead anywhere.
        """
        self._write(name, [memoryview(data)])

    def _write(self, name: str, pieces: Sequence[memoryview]) -> None:
        path = self.path(name)
        if not self.is_local:
            self.fs.pipe_file(path, b"".join(pieces))
            return
        check_no_links(self.base, name)
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        scratch = f"{folder}/{TEMPORARY}{secrets.token_hex(8)}"
        # With the mode that the user's umask asks for, which mkstemp would not.
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                for piece in pieces:
                    stream.write(piece)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(scratch, path)
        except BaseException:
            if os.path.exists(scratch):
                os.unlink(scratch)
            raise
        _sync_folder(folder)

    def read_json(self, name: str, form: Any = object, *, remedy: str = "delete it") -> Any:
        """A JSON file's content.

        Args:
            name: of the file.
            form: what it has to be, see ``has_form``.
            remedy: for the error.

        Raises:
            ValueError: it is not JSON, of another form, or not what was sealed.
        """
        data = self.read_bytes(name)
        return parse_json(data, form, name=self.path(name), remedy=remedy)

    def read_intact_json(self, name: str, form: Any = object) -> Any | None:
        """A JSON file's content, None where it is not JSON, or of another form."""
        try:
            return self.read_json(name, form)
        except ValueError:
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_bytes(name, json_bytes(value))

    def write_sealed(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file with a digest of itself, which is checked when it is read."""
        self.write_json(name, sealed(value))

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Write a safetensors file; returns its record for the unit's marker."""
        tensors = HostCopies(tensors).wait()
        pieces = file_pieces(tensors)

        def digest() -> str:
            found = hashlib.sha256()
            for piece in pieces:
                found.update(piece)
            return found.hexdigest()

        # Writing waits for the disk, and hashing does not hold the interpreter's lock.
        with ThreadPoolExecutor(2) as pool:
            of_file = pool.submit(digest)
            of_tensors = pool.submit(
                lambda: {key: tensor_record(tensor) for key, tensor in tensors.items()}
            )
            self._write(name, pieces)
            return {
                "bytes": sum(piece.nbytes for piece in pieces),
                "sha256": of_file.result(),
                "tensors": of_tensors.result(),
            }

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of a file (mapped, not copied, when local).

        Raises:
            ValueError: the file is damaged.
        """
        try:
            if self.is_local:
                check_plain(self.path(name))
                with safe_open(self.path(name), framework="pt") as handle:
                    return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            # safetensors' own reader: a JSON header and raw numbers, nothing that is executed.
            return safetensors.torch.load(self.read_bytes(name))
        except SafetensorError as error:
            raise ValueError(
                f"{self.path(name)} is damaged ({error}): delete it and run again with --resume"
            ) from None

    def delete(self, name: str) -> None:
        """Remove a file if it is there.

        Raises:
            ValueError: a folder on the way is a link.
        """
        if self.is_local:
            check_no_links(self.base, name)
        if self.exists(name):
            self.fs.rm_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Remove a folder and all in it; what links lead to stays.

        Raises:
            ValueError: a folder on the way is a link.
        """
        if self.is_local:
            check_no_links(self.base, name)
            shutil.rmtree(self.path(name), ignore_errors=True)
        elif self.fs.exists(self.path(name)):
            self.fs.rm(self.path(name), recursive=True)

    def fetch_folder(self, scratch: str | None) -> Path:
        """The root as a local folder: itself, or a copy of its top-level files."""
        if self.is_local:
            return self.local_path()
        target = Path(tempfile.mkdtemp(prefix="sparse-expansion-", dir=scratch))
        for name in self.list(""):
            if "/" not in name:
                self.fs.get_file(self.path(name), str(target / name))
        return target

    def commit(self, key: str, record: dict[str, Any]) -> None:
        """Write a unit's marker: from now on the unit is finished."""
        self.write_sealed(f"{UNITS}/{key}.json", record)

    def record(self, key: str) -> dict[str, Any] | None:
        """A finished unit's marker, None when it is not finished.

        A unit whose marker is damaged is done again: nothing vouches for its files.
        """
        name = f"{UNITS}/{key}.json"
        if not self.exists(name):
            return None
        found: dict[str, Any] | None = self.read_intact_json(name, _MARKER_FORM)
        return found if found is not None and _names_inside(found["files"]) else None

    def records(self) -> dict[str, dict[str, Any]]:
        """The markers of all finished units by key."""
        prefix = f"{UNITS}/"
        keys = [
            name[len(prefix) : -len(".json")] for name in self.list(UNITS) if name.endswith(".json")
        ]
        found = {key: self.record(key) for key in keys}
        return {key: record for key, record in found.items() if record is not None}

    def is_intact(self, record: dict[str, Any]) -> bool:
        """Whether all files of a marker are there, with the size and digest it states."""
        for name, file in record["files"].items():
            if self.is_local and not os.path.isfile(self.path(name)):
                return False
            if not self.exists(name) or self.fs.size(self.path(name)) != file["bytes"]:
                return False
            digest = hashlib.sha256()
            with self.fs.open(self.path(name), "rb") as stream:
                while chunk := stream.read(1 << 24):
                    digest.update(chunk)
            if digest.hexdigest() != file["sha256"]:
                return False
        return True

    def sweep_temporaries(self) -> None:
        """Remove what a killed process left half-written."""
        if self.is_local and os.path.isdir(self.base):
            for path in Path(self.base).rglob(f"{TEMPORARY}*"):
                path.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    """A JSON file's content, as it is written."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _file_system(url: str) -> tuple[Any, str]:
    """The file system that a URL names, and the path in it.

    Raises:
        ValueError: the protocol is unknown, or needs a package that is not there.
    """
    protocol = url.partition("://")[0]
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'sparse-expansion[{extra}]'" if extra else first_line(error)
        raise ValueError(f"{url} needs a package for {protocol}:// URLs: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{url} cannot be used ({first_line(error)}): check the URL") from None
    return found


def _names_inside(files: dict[str, Any]) -> bool:
    """Whether all files that a marker names are in the run's folder."""
    return not any(name.startswith("/") or ".." in name.split("/") for name in files)


def _sync_folder(folder: str) -> None:
    """Flush a rename to disk, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: str | Path, data: bytes) -> None:
    """Write a file beside a run, a table or a figure, whole or not at all; makes its folder."""
    where = Path(path)
    Store(where.parent).write_bytes(where.name, data)
