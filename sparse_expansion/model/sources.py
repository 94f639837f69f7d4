"""Where a model comes from: a hub id, a named family and size, a local folder, or a GGUF file.

Whatever the source, ``fetch_model`` answers with a local folder of safetensors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparse_expansion.config.checks import require_text
from sparse_expansion.messages import first_line
from sparse_expansion.model.gguf import convert_gguf

PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
PYTHIA_REVISION = "step143000"
LLAMA_IDS = {
    "7b": "meta-llama/Llama-2-7b-hf",
    "13b": "meta-llama/Llama-2-13b-hf",
    "70b": "meta-llama/Llama-2-70b-hf",
    "8b": "meta-llama/Meta-Llama-3-8B",
}
_MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """The meaning of a model's name, before anything is downloaded."""

    location: str
    """A local path or a hub id."""
    revision: str | None = None
    """The hub revision to download; ``None`` for the default branch."""
    kind: Literal["hub", "folder", "gguf"] = "hub"
    """What the location leads to."""


def resolve_name(model: str, size: str | None = None) -> ModelSource:
    """The source that ``--model`` and ``--model_size`` name; nothing is read or downloaded.

    Raises:
        ValueError: an empty name, an unknown size, a size without a family, or a missing path.
    """
    require_text("--model", model)
    family = model.lower()
    if family == "pythia":
        if size is None or size.lower() not in PYTHIA_SIZES:
            raise ValueError(
                f"--model pythia needs --model_size, one of {', '.join(PYTHIA_SIZES)}; "
                f"got {size or 'none'}"
            )
        return ModelSource(f"EleutherAI/pythia-{size.lower()}-deduped", PYTHIA_REVISION)
    if family == "llama":
        if size is None or size.lower() not in LLAMA_IDS:
            raise ValueError(
                "--model llama needs --model_size, one of 7b, 13b, 70b (Llama 2) or 8b (Llama 3); "
                f"got {size or 'none'}"
            )
        return ModelSource(LLAMA_IDS[size.lower()])
    if size is not None:
        raise ValueError(
            f"--model_size {size} goes with --model pythia or --model llama, not {model!r}"
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelSource(str(path.resolve()), kind="folder")
    if model.lower().endswith(".gguf"):
        if not path.is_file():
            raise ValueError(f"GGUF file {model} does not exist: check --model")
        return ModelSource(str(path.resolve()), kind="gguf")
    if path.is_file():
        raise ValueError(f"{model} is a file: give its folder, or a .gguf file")
    if "://" in model:
        raise ValueError(
            f"--model {model} is a URL: give the hub id alone (owner/name), or a local folder"
        )
    if os.sep in model and (model.startswith((".", os.sep, "~")) or model.count("/") != 1):
        raise ValueError(f"model folder {model} does not exist: check --model")
    return ModelSource(model)


def default_cache_dir() -> Path:
    """``$SPARSE_EXPANSION_CACHE`` where it is set, else ``~/.cache/sparse-expansion``."""
    given = os.environ.get("SPARSE_EXPANSION_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "sparse-expansion"


def fetch_model(
    source: ModelSource, *, cache_dir: str | None = None, revision: str | None = None
) -> Path:
    """The source as a local folder of safetensors, downloaded or converted where needed.

    Raises:
        ValueError: the model is not found, is offline and not cached, or has no safetensors.
    """
    if source.kind == "folder":
        return Path(source.location)
    if source.kind == "gguf":
        return convert_gguf(Path(source.location), Path(cache_dir or default_cache_dir()))
    wanted = revision or source.revision
    folder = _download(source.location, wanted, cache_dir)
    if not any(folder.glob("*.safetensors")) and revision is None and wanted == PYTHIA_REVISION:
        # EleutherAI's main branch is the same step, and it alone has safetensors.
        folder = _download(source.location, None, cache_dir)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"hub repository {source.location} (revision {wanted or 'main'}) has no safetensors "
            "files, and pickled weights are not loaded: convert it once with save_pretrained() "
            "and give that folder"
        )
    return folder


def fetch_config(
    source: ModelSource, *, cache_dir: str | None = None, revision: str | None = None
) -> Any:
    """The source's transformers config; no weights are downloaded from the hub for it.

    Raises:
        ValueError: the config is not found, or it cannot be read.
    """
    from sparse_expansion.model.checkpoint import load_config

    if source.kind == "hub":
        folder = _download(source.location, revision or source.revision, cache_dir, ["config.json"])
    else:
        folder = fetch_model(source, cache_dir=cache_dir)
    return load_config(folder)


def _download(
    repository: str,
    revision: str | None,
    cache_dir: str | None,
    patterns: list[str] | None = None,
) -> Path:
    """The local folder of a hub repository's files that match ``patterns``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=patterns or _MODEL_FILES,
            )
        )
    except HFValidationError:
        raise ValueError(
            f"{repository!r} is neither a folder here nor a hub id (owner/name): check --model"
        ) from None
    except HfHubHTTPError as error:
        line = first_line(error)
        raise ValueError(
            f"hub model {repository} cannot be had ({line}): check the name and your access "
            "(`hf auth login`)"
        ) from None
    except Exception as error:
        # A broken network shows as one of many exceptions, which all mean the same to the user.
        if not _is_network_error(error):
            raise
        raise ValueError(
            f"hub model {repository} is not in the cache and the hub cannot be reached: download "
            f"it where there is a network (`hf download {repository}`), or give a local folder"
        ) from None


def _is_network_error(error: BaseException | None) -> bool:
    """Whether an exception of the hub client, or one behind it, comes from the connection."""
    while error is not None:
        root = type(error).__module__.split(".")[0]
        if isinstance(error, OSError) or root in ("httpx", "httpx2", "httpcore", "requests"):
            return True
        error = error.__cause__ or error.__context__
    return False
