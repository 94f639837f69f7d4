"""What makes a folder a model's, looked at without PyTorch: a wrong folder is answered at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sparse_expansion.config.checks import parse_json
from sparse_expansion.model.families import family_of
from sparse_expansion.plain_files import check_plain, check_plain_folder, read_plain

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
_TOKENIZER_WORDS = ("token", "vocab", "merges", "spiece", "sentencepiece", "tekken")
"""One of them is in the name of a file of every tokenizer."""


def check_model_folder(folder: Path) -> None:
    """Answer a folder that has no configuration, or one that is broken or of another kind of model.

    Raises:
        ValueError: the folder is not there, has no ``config.json``, one that is no JSON object or
            one of an architecture that is not supported, or something in it is neither file nor
            folder.
    """
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist: check --model")
    path = folder / CONFIG_NAME
    # Tokenizers and weights too, which libraries open.
    check_plain_folder(folder)
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_NAME}: it is not a model folder"
            + (" (an unfinished run: finish it with --resume)" if (folder / "run").is_dir() else "")
        )
    config = parse_json(read_plain(path), dict, name=str(path), remedy="download the model again")
    if "model_type" in config:
        family_of(config["model_type"])


def check_contents(folder: Path) -> None:
    """Answer a model's folder from which no model can be run.

    Raises:
        ValueError: it has no weight files or broken ones, see ``weight_files`` and
            ``open_weights``, or nothing that could be a tokenizer.
    """
    for file in weight_files(folder):
        with open_weights(file, framework="numpy"):
            pass
    names = [path.name for path in folder.iterdir()]
    if not any(word in name for name in names for word in _TOKENIZER_WORDS):
        raise ValueError(
            f"{folder} has no tokenizer: save it there too (tokenizer.save_pretrained())"
        )


@contextmanager
def open_weights(file: Path, *, framework: str) -> Iterator[Any]:
    """A weight file, its header read.

    Args:
        file: of safetensors.
        framework: of the tensors that are read from it, a name of safetensors'.

    Raises:
        ValueError: it is missing, truncated or of another format.
    """
    try:
        check_plain(file)
        handle = safe_open(str(file), framework=framework)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: download the model again") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({error}): download it again"
        ) from None
    with handle:
        yield handle


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: a single one, else those that the index names.

    Others are not the model: another variant, an older one, or an adapter.

    Raises:
        ValueError: there are none, or the index cannot be read or leads out of the folder.
    """
    index = folder / INDEX_NAME
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if index.is_file():
        found = parse_json(
            read_plain(index),
            {"weight_map": {...: str}},
            name=f"{index} is not a safetensors index: it",
            remedy="download it again",
        )
        names = sorted(set(found["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} names files outside its folder: refusing to read them")
        if names:
            return [folder / name for name in names]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    what = "no *.safetensors files"
    if others:
        what = f"no {WEIGHTS_NAME} and no index, but {', '.join(others[:3])}, which are not loaded"
    raise ValueError(
        f"{folder} has {what}: convert the model with save_pretrained(), or give a folder or hub "
        "id that has them"
    )
