"""Whether an expanded folder holds what its manifest says, all of it and nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparse_expansion.config.checks import has_form
from sparse_expansion.model.checkpoint import CheckpointFiles
from sparse_expansion.model.manifest import MANIFEST_NAME, read_manifest, tensor_record
from sparse_expansion.plain_files import check_plain, read_plain

REMEDY = "copy it again, or run again with --resume"
_MOST_THREADS = 8
"""Digests of different files are taken at a time: more threads wait for memory."""


def verify(folder: str | Path) -> int:
    """Check an expanded folder against its manifest; returns the number of its tensors.

    Checked are all tensors, the config, the index and the tokenizer's files. Manifests of earlier
    versions have tensors alone.

    Raises:
        ValueError: a file is missing, truncated, damaged or exchanged, or has tensors that the
            manifest lacks; the message names the file and, where it can be told, the tensor.
    """
    return _verify(Path(folder), remedy=REMEDY, is_whole=True)


def verify_loaded(files: Iterable[str | Path] | None) -> None:
    """Check the files that transformers is about to load, where a manifest lies beside them.

    Of other files only those are checked that are there: from the hub transformers takes what it
    needs itself.

    Args:
        files: of the weights; none where a state is given in place of files.

    Raises:
        ValueError: as of ``verify``.
    """
    folders = {Path(file).parent for file in files or ()}
    for folder in sorted(folders):
        if (folder / MANIFEST_NAME).exists():
            remedy = f"{REMEDY}; with quantization_config['verify'] = False it is not checked"
            _verify(folder, remedy=remedy, is_whole=False)


def check_finite(files: CheckpointFiles) -> None:
    """Answer weights, routers and grids that are not numbers.

    A router's NaN sends tokens anywhere, and a loss need not show it.

    Raises:
        ValueError: a tensor has NaN or infinite entries.
    """
    for name in files.names():
        tensor = files.read(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            value = float(tensor[~torch.isfinite(tensor)].flatten()[0])
            raise ValueError(
                f"{files.folder} has {value} in {name}, which is no weight: copy the folder again, "
                "or make it again from the dense model"
            )


def _verify(folder: Path, *, remedy: str, is_whole: bool) -> int:
    manifest = read_manifest(folder)
    tensors = manifest["tensors"]
    others = manifest.get("files", {})
    if not has_form(others, {...: str}):
        raise ValueError(f"{folder / MANIFEST_NAME} lists no files by digest: {remedy}")
    for name, digest in sorted(others.items()):
        path = folder / Path(name).name
        if not path.is_file():
            if is_whole:
                raise ValueError(f"{path} is missing: {remedy}")
        elif hashlib.sha256(read_plain(path)).hexdigest() != digest:
            raise ValueError(f"{path} is damaged, or was changed by hand: {remedy}")
    by_file: dict[str, list[str]] = {}
    for name, record in tensors.items():
        by_file.setdefault(record["file"], []).append(name)
    for file in sorted(by_file):
        if Path(file).name != file:
            raise ValueError(f"{folder / MANIFEST_NAME} names a file elsewhere, {file!r}: {remedy}")

    def check(file: str) -> None:
        _verify_file(folder / file, {name: tensors[name] for name in by_file[file]}, remedy)

    # A digest does not hold the interpreter's lock.
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(check, sorted(by_file)):
            pass
    unlisted = sorted(set(CheckpointFiles(folder).names()) - set(tensors))
    if unlisted:
        raise ValueError(
            f"{folder / MANIFEST_NAME} lacks {len(unlisted)} tensors that are loaded, "
            f"{unlisted[0]} for one: {remedy}"
        )
    return len(tensors)


def _verify_file(path: Path, records: dict[str, dict[str, Any]], remedy: str) -> None:
    """Check one weight file's tensors, whose records are given by name."""
    try:
        check_plain(path)
        with safe_open(str(path), framework="pt") as handle:
            for name, record in sorted(records.items()):
                wanted = {key: record[key] for key in ("dtype", "shape", "sha256")}
                found = tensor_record(handle.get_tensor(name))
                if any(found[key] != value for key, value in wanted.items()):
                    raise ValueError(f"{path} is damaged in {name}: {remedy}")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {remedy}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None
