"""What a newcomer does first, with the package as it is installed here: a walk in a minute.

A tiny model and its tokenizer are made in the current folder; it is expanded by the command line,
by this process and by Ray's workers to the same bytes, evaluated, loaded by transformers, and made
to write. The last line names the versions that all this was done with.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

SETTINGS = "--seqlen 64 --threads 1".split()
SHAPE = "--num_clusters 4 --dataset-size 8 --eval-windows 4 --sparsity 2:4 --quantize".split()
PACKAGES = ("torch", "transformers", "ray", "datasets", "numpy", "scikit-learn", "numba", "pyarrow")


def command(*arguments: str) -> dict[str, Any]:
    """The JSON result of `sparse-expansion ARGUMENTS --json`."""
    program = str(Path(sys.executable).with_name("sparse-expansion"))
    done = subprocess.run([program, *arguments, "--json"], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def make_model(folder: str) -> None:
    """A tiny Llama with random weights, and a tokenizer of 512 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([topics["for"], topics["class"], topics["with"]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def digest(folder: str) -> str:
    """Of all weight files of a folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    assert files, folder
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    """Walk, and stop at the first step that does not hold."""
    make_model("my-model")
    asked = ["--model", "my-model", "--dataset", "pydoc", *SETTINGS, *SHAPE]
    metrics = command("run", *asked, "--output", "local")
    assert metrics["perplexity_expanded"] > 1
    command("run", *asked, "--executor", "ray", "--num-workers", "2", "--output", "ray")
    assert digest("local") == digest("ray"), "Ray's workers have made other bytes"
    where = ["--dataset", "pydoc", *SETTINGS, "--eval-windows", "4"]
    found = command("evaluate", "--model", "local", *where)["perplexity"]
    assert abs(found / metrics["perplexity_expanded"] - 1) < 1e-6, found

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sparse_expansion

    model = AutoModelForCausalLM.from_pretrained("local")
    tokens = AutoTokenizer.from_pretrained("local")("The for statement", return_tensors="pt")
    tokens.pop("token_type_ids", None)
    written = model.generate(**tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert written.shape[1] == tokens["input_ids"].shape[1] + 8
    made = sparse_expansion.expand(
        "my-model", "pydoc", num_clusters=2, dataset_size=4, seqlen=64, output="api"
    )
    assert sparse_expansion.evaluate(made, "pydoc", seqlen=64, eval_windows=2).metrics

    versions = " ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"python {platform.python_version()} {versions}: done")


if __name__ == "__main__":
    main()
