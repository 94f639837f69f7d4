"""Everything of a run that can fail early: model, tokenizer, texts, windows, shapes, folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparse_expansion.config import CalibrationConfig, RunConfig, digest
from sparse_expansion.data.texts import TextRequest, Texts, shuffled
from sparse_expansion.data.tokenization import load_tokenizer
from sparse_expansion.data.windows import calibration_windows, whole_windows
from sparse_expansion.model.families import check_seqlen
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.planning.expansion import expansion_units
from sparse_expansion.planning.shapes import model_shape
from sparse_expansion.run_folder import open_run, write_windows
from sparse_expansion.store import Store
from sparse_expansion.units import Unit

WriteOwn = Callable[[str, int], str]
"""Gives documents that a model has written, as one text: from the digest of its weights, by which
it is known again, and their number."""


@dataclass
class Prepared:
    """A run that has passed all checks."""

    config: RunConfig
    """The settings, with the number of windows and shards; ``expand`` puts in the sparsities that
    it measured."""
    shell: ModelShell
    """The dense model."""
    units: list[Unit]
    """All units of the expansion, those that an earlier session finished too."""
    identity: dict[str, Any]
    """What the output folder is claimed for: settings, model, weights, tokens, and their digest."""
    texts: Texts
    """What the model is calibrated on, and what perplexity is measured on."""


def prepare(
    config: RunConfig,
    folder: Path,
    *,
    text: TextRequest,
    model_name: str,
    doing: Callable[[str], None],
    write_own: WriteOwn | None = None,
) -> tuple[Prepared, torch.Tensor]:
    """Read the model's structure, the tokenizer and the text, and plan the expansion.

    Args:
        config: the settings that were asked for.
        folder: the dense model's local folder.
        text: to be read.
        model_name: how the result names the dense model.
        doing: is told of the steps that may take long.
        write_own: gives text that the model has written itself, where the settings ask for some.

    Returns:
        The prepared run (its config knows how many windows there are) and the windows ``[N, L]``.

    Raises:
        ValueError: the model is expanded already, windows are longer than its positions, the text
            is too short, or the tokenizer belongs to another model.
    """
    doing("reading the model")
    shell = ModelShell(folder, dtype=config.dtype)
    if shell.expansion is not None:
        raise ValueError(f"{folder} is already an expanded model: expand the dense one")
    shape = model_shape(shell)
    config.check_layers(shape.num_layers)
    check_seqlen(config.calibration.seqlen, shell.config)
    doing("reading the text")
    texts = text.load(load_tokenizer(folder))
    doing("tokenizing the text")
    windows = _draw_windows(config.calibration, texts)
    vocabulary = int(shell.config.vocab_size)
    check_vocabulary(windows, vocabulary)
    doing("hashing the model's files")
    weights = shell.files.fingerprint()
    if config.calibration.own_text:
        assert write_own is not None
        own = _own_windows(config.calibration, texts, len(windows), partial(write_own, weights))
        check_vocabulary(own, vocabulary)
        windows = shuffled([windows, own], config.calibration.seed)
    calibration = replace(config.calibration, dataset_size=len(windows))
    calibration = replace(calibration, data_shards=calibration.num_shards)
    config = replace(config, calibration=calibration)
    identity = _identity(config, model_name, weights, tokens_digest(windows))
    doing("planning the units")
    units = expansion_units(config, shape)
    return Prepared(config, shell, units, identity, texts), windows


def _draw_windows(calibration: CalibrationConfig, texts: Texts) -> torch.Tensor:
    """The windows ``[N, L]`` of the texts that the settings ask for.

    Raises:
        ValueError: a text is too short, or none of the windows is left to the texts.
    """
    windows, share = calibration.dataset_size, calibration.own_text
    if share and not calibration.whole_text:
        windows -= max(1, math.ceil(windows * share - 0.5))
        if not windows:
            raise ValueError(
                f"--dataset-size {calibration.dataset_size} leaves no window to the text beside "
                f"--own-text {share:g}: give more windows, or a smaller share"
            )
    return texts.calibration(
        num_windows=None if calibration.whole_text else windows,
        seqlen=calibration.seqlen,
        seed=calibration.seed,
    )


def _own_windows(
    calibration: CalibrationConfig, texts: Texts, others: int, write: Callable[[int], str]
) -> torch.Tensor:
    """Windows ``[N, L]`` of text that the model writes itself.

    Args:
        calibration: says how large their share is.
        texts: in the model's tokens.
        others: windows that are there beside them.
        write: gives a number of documents.
    """
    seqlen = calibration.seqlen
    if not calibration.whole_text:
        count = calibration.dataset_size - others
        # One document may have fewer tokens than a window once its text is tokenised again.
        return calibration_windows(
            write(max(2, count)),
            texts.encode,
            num_windows=count,
            seqlen=seqlen,
            seed=calibration.seed,
        )
    count = max(1, int(others * calibration.own_text / (1 - calibration.own_text) + 1e-9))
    text = write(count + 2 + count // 16)
    return whole_windows(text, texts.encode, seqlen=seqlen, kind="calibration", most=count)[:count]


def _identity(config: RunConfig, model_name: str, weights: str, tokens: str) -> dict[str, Any]:
    """What an output folder is claimed for, with the digest by which a run is known again."""
    # The same run under other paths is the same run: weights and tokens are named by content.
    settings = config.to_dict()
    for name in ("dataset", "own_text"):
        del settings["calibration"][name]
    return {
        "config": config.to_dict(),
        "model": model_name,
        "weights": weights,
        "calibration_tokens": tokens,
        "digest": digest(settings, weights, tokens),
    }


def claim(store: Store, prepared: Prepared, windows: torch.Tensor, *, resume: bool) -> None:
    """Claim the output folder (see ``store.open_run``), and put the windows ``[N, L]`` there.

    From now on they are read shard by shard: the caller need not keep them.
    """
    open_run(store, json.loads(json.dumps(prepared.identity)), resume=resume)
    write_windows(store, windows, prepared.config.calibration.num_shards)


def check_vocabulary(tokens: torch.Tensor, vocabulary: int) -> None:
    """Answer a tokenizer that does not belong to the model before a lookup crashes.

    Raises:
        ValueError: a token id is outside the embedding.
    """
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives id {largest}, the model has {vocabulary} embeddings: the "
            "tokenizer in the model folder belongs to another model"
        )


def evaluation_tokens(
    texts: Texts, *, seqlen: int, max_windows: int | None, vocabulary: int
) -> torch.Tensor:
    """Windows ``[N, L]`` of the evaluation text, their ids checked against the vocabulary."""
    windows = texts.evaluation(seqlen=seqlen, max_windows=max_windows)
    check_vocabulary(windows, vocabulary)
    return windows


def tokens_digest(windows: torch.Tensor) -> str:
    """A name for windows ``[N, L]``: 16 hex digits of a SHA-256 over their shape and ids."""
    ids = windows.to(torch.int32).numpy().astype("<i4")
    return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()[:16]


def slow_dtype(dtype: torch.dtype) -> str | None:
    """A line of advice where this machine multiplies the dtype slowly, else None."""
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype == torch.float32 or torch.cuda.is_available() or capability.startswith("AVX512"):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name} is many times slower than float32 on a CPU without instructions for it "
        f"({capability} here): without a GPU, --dtype float32 is faster and stores larger values"
    )
