"""Whether an expanded folder holds what its manifest says, all of it and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sparse_expansion.config.checks import has_form
from sparse_expansion.model.checkpoint import CheckpointFiles
from sparse_expansion.model.manifest import MANIFEST_NAME, read_manifest, tensor_record


def verify(folder: str | Path) -> int:
    """Check an expanded folder against its manifest; returns the number of its tensors.

    Checked are all tensors, the config, the index and the tokenizer's files. Manifests of earlier
    versions have tensors alone.

    Raises:
        ValueError: a file is missing, truncated, damaged or exchanged, or has tensors that the
            manifest lacks; the message names the file and, where it can be told, the tensor.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    tensors = manifest["tensors"]
    remedy = "copy it again, or run again with --resume"
    others = manifest.get("files", {})
    if not has_form(others, {...: str}):
        raise ValueError(f"{folder / MANIFEST_NAME} lists no files by digest: {remedy}")
    for name, digest in sorted(others.items()):
        path = folder / Path(name).name
        if not path.is_file():
            raise ValueError(f"{path} is missing: {remedy}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path} is damaged, or was changed by hand: {remedy}")
    by_file: dict[str, list[str]] = {}
    for name, record in tensors.items():
        by_file.setdefault(record["file"], []).append(name)
    for file, names in sorted(by_file.items()):
        if Path(file).name != file:
            raise ValueError(f"{folder / MANIFEST_NAME} names a file elsewhere, {file!r}: {remedy}")
        try:
            with safe_open(str(folder / file), framework="pt") as handle:
                for name in sorted(names):
                    wanted = {key: tensors[name][key] for key in ("dtype", "shape", "sha256")}
                    found = tensor_record(handle.get_tensor(name))
                    if any(found[key] != value for key, value in wanted.items()):
                        raise ValueError(f"{folder / file} is damaged in {name}: {remedy}")
        except FileNotFoundError:
            raise ValueError(f"{folder / file} is missing: {remedy}") from None
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is damaged ({error}): {remedy}") from None
    unlisted = sorted(set(CheckpointFiles(folder).names()) - set(tensors))
    if unlisted:
        raise ValueError(
            f"{folder / MANIFEST_NAME} lacks {len(unlisted)} tensors that are loaded, "
            f"{unlisted[0]} for one: {remedy}"
        )
    return len(tensors)
