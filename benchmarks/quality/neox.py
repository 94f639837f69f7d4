"""Train the small GPT-NeoX of the quality table: a few minutes on two cores.

    python -m benchmarks.quality.neox TEXT FOLDER

Four blocks of 256 features and 4,096 entries, on the calibration text of TEXT and on Python's own
reference. It knows its calibration text better than the test text: so do all rows of a table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_expansion.data.corpora import load_corpus
from tests.tiny import save_trained_neox, train_tokenizer

VOCABULARY, SEQLEN = 4096, 512


def main() -> None:
    """Train, save, say where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    text = load_corpus(args.dataset).calibration + load_corpus("pydoc").calibration
    tokenizer = train_tokenizer(text, VOCABULARY)
    save_trained_neox(
        args.folder,
        tokenizer,
        text,
        steps=args.steps,
        batch_shape=(8, SEQLEN),
        rate=1e-3,
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        max_position_embeddings=SEQLEN,
    )
    print(args.folder)


if __name__ == "__main__":
    main()
