"""GGUF files: dequantized to a folder of safetensors once per file content."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_expansion.messages import first_line
from sparse_expansion.plain_files import check_plain

_READ_BYTES = 1 << 24


def convert_gguf(path: Path, cache_dir: Path) -> Path:
    """The dequantized model and its tokenizer as a folder below ``cache_dir``.

    A file that was converted before is not converted again.

    Raises:
        ValueError: the file is broken, or transformers does not know its architecture.
    """
    check_plain(path)
    target = cache_dir / "gguf" / f"{path.stem}-{_content_digest(path)}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        model, tokenizer = _load(path)
        _forget_quantization(model)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            # Another process may have finished the same conversion first.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _content_digest(path: Path) -> str:
    """16 hex digits of a SHA-256 over the whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _load(path: Path) -> tuple[Any, Any]:
    """The dequantized model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _name_version()
    try:
        # The progress bars of transformers would overwrite ours; its errors are exceptions.
        with _by_itself(path) as folder, contextlib.redirect_stderr(io.StringIO()):
            where: dict[str, Any] = {
                "pretrained_model_name_or_path": str(folder),
                "gguf_file": path.name,
                "trust_remote_code": False,
            }
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(**where)
    except (ValueError, KeyError, IndexError, OverflowError, OSError, struct.error) as error:
        # A file that ends early, or is of another format, is any of these.
        line = first_line(error)
        raise ValueError(
            f"GGUF file {path} cannot be converted: it is truncated, broken, or of an architecture "
            f"that transformers does not know ({line})"
        ) from None
    return model, tokenizer


@contextlib.contextmanager
def _by_itself(path: Path) -> Iterator[Path]:
    """A folder in which the file is alone: transformers prefers a tokenizer that lies beside it."""
    with tempfile.TemporaryDirectory(prefix="sparse-expansion-") as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def _name_version() -> None:
    """Have the module that reads GGUF files say its version.

    Before Python 3.12 older versions of transformers find it nowhere else, and fail without.
    """
    import gguf

    if not hasattr(gguf, "__version__"):
        gguf.__version__ = importlib.metadata.version("gguf")


def _forget_quantization(model: Any) -> None:
    """Remove the marks of GGUF, so that the model is saved as the dense one that it now is."""
    model.is_quantized = False
    for attribute in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
