"""Train the small GPT-NeoX of the quality table: a quarter of an hour on two cores.

    python -m benchmarks.quality.neox TEXT FOLDER

Three blocks of 128 features and 4,096 entries, on the calibration text of TEXT, Python's reference
and the docstrings of its standard library. A model with more weights than its text asks for loses
nothing when half of them go, and a table of it says nothing: hence so small a model, and more text.
It has seen its calibration text and not the test text: so have all rows of a table.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparse_expansion.data.corpora import load_corpus
from tests.tiny import save_trained_neox, train_tokenizer

VOCABULARY, SEQLEN, WIDTH = 4096, 512, 128
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def docstrings(folder: Path) -> Iterator[str]:
    """The docstrings in a folder's Python files but its tests; they are read, not imported."""
    for file in sorted(folder.rglob("*.py")):
        if NOT_PROSE.isdisjoint(file.relative_to(folder).parts):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, DOCUMENTED):
                    yield ast.get_docstring(node) or ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, say where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    args = parser.parse_args(arguments)
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [load_corpus(args.dataset).calibration, load_corpus("pydoc").calibration]
    text = "\n\n".join([*texts, *filter(None, docstrings(library))])
    tokenizer = train_tokenizer(text, VOCABULARY)
    save_trained_neox(
        args.folder,
        tokenizer,
        text,
        steps=args.steps,
        batch_shape=(8, SEQLEN),
        rate=4e-3,
        one_cycle=True,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        max_position_embeddings=SEQLEN,
    )
    print(args.folder)


if __name__ == "__main__":
    main()
