"""Names of models: what they mean, and what is said about those that mean nothing."""

import pytest

from sparse_expansion.model.sources import fetch_model, resolve_name


@pytest.mark.parametrize("size", ["12b", "12B"])
def test_pythia(size):
    found = resolve_name("pythia", size)
    assert (found.location, found.revision) == ("EleutherAI/pythia-12b-deduped", "step143000")


@pytest.mark.parametrize(
    ("size", "location"),
    [
        ("7B", "meta-llama/Llama-2-7b-hf"),
        ("13b", "meta-llama/Llama-2-13b-hf"),
        ("70B", "meta-llama/Llama-2-70b-hf"),
        ("8B", "meta-llama/Meta-Llama-3-8B"),
    ],
)
def test_llama(size, location):
    assert resolve_name("llama", size).location == location


def test_hub_id_and_folder(tmp_path):
    assert resolve_name("HuggingFaceTB/SmolLM2-135M").kind == "hub"
    assert resolve_name(str(tmp_path)).kind == "folder"


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("pythia", "3b", "one of 14m"),
        ("pythia", None, "needs --model_size"),
        ("llama", "12b", "7b, 13b, 70b"),
        ("gpt2", "7b", "goes with --model pythia"),
        ("./nowhere", None, "does not exist"),
        ("/nowhere/at/all", None, "does not exist"),
        ("model.gguf", None, "GGUF file model.gguf does not exist"),
    ],
)
def test_names_that_mean_nothing(model, size, message):
    with pytest.raises(ValueError, match=message):
        resolve_name(model, size)


def test_offline_and_not_cached_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="EleutherAI/pythia-14m-deduped.*local folder"):
        fetch_model(resolve_name("pythia", "14m"), cache_dir=str(tmp_path))


def test_not_a_hub_id(tmp_path):
    with pytest.raises(ValueError, match="check --model"):
        fetch_model(resolve_name("not a name!"), cache_dir=str(tmp_path))
