"""The windows of the studies' commands, and expanded models to study."""

import pytest

from sparse_expansion.cli import main
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.data.tokenization import encoder, load_tokenizer
from sparse_expansion.data.windows import calibration_windows, evaluation_windows
from tests.tiny import SMALL_RUN


@pytest.fixture(scope="session")
def windows(neox_folder, long_text_folder):
    """Those to calibrate on and those held out, as the commands draw them."""
    encode = encoder(load_tokenizer(neox_folder))
    corpus = load_corpus(str(long_text_folder))
    return (
        calibration_windows(corpus.calibration, encode, num_windows=40, seqlen=48, seed=0),
        evaluation_windows(corpus.evaluation, encode, seqlen=48, max_windows=6),
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory, neox_folder, text_folder):
    """The tiny trained model with one cluster and with four."""
    root = tmp_path_factory.mktemp("analysis")
    where = ["--model", str(neox_folder), "--dataset", str(text_folder), "--sparsity", "0.7"]
    for clusters in ("1", "4"):
        flags = [*SMALL_RUN, "--num_clusters", clusters, "--dataset-size", "48"]
        assert main(["expand", *where, "--output", str(root / clusters), *flags]) == 0
    return root
