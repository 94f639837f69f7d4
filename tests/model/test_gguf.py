"""GGUF files become folders of safetensors, once."""

import importlib.metadata

import pytest

from sparse_expansion.model.gguf import convert_gguf
from sparse_expansion.model.sources import fetch_model, resolve_name
from tests import tiny
from tests.model.test_sources import write_gguf


def test_gguf_is_converted_once(tmp_path, llama_folder):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    file = tmp_path / "tiny.gguf"
    write_gguf(gguf, np, file, llama_folder)
    folder = fetch_model(resolve_name(str(file)), cache_dir=str(tmp_path / "cache"))
    # Older versions of transformers ask the module alone.
    assert gguf.__version__ == importlib.metadata.version("gguf")
    assert (folder / "config.json").is_file() and list(folder.glob("*.safetensors"))
    before = (folder / "config.json").stat().st_mtime_ns
    again = fetch_model(resolve_name(str(file)), cache_dir=str(tmp_path / "cache"))
    assert again == folder and (folder / "config.json").stat().st_mtime_ns == before
    from safetensors.torch import load_file

    ours = load_file(folder / "model.safetensors")
    theirs = load_file(llama_folder / "model.safetensors")
    assert set(ours) == set(theirs)
    for name in theirs:
        np.testing.assert_array_equal(ours[name].numpy(), theirs[name].numpy(), err_msg=name)
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5])
def test_a_truncated_file_is_named(share, tmp_path, llama_folder):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    file = tmp_path / "broken.gguf"
    write_gguf(gguf, np, file, llama_folder)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="broken.gguf cannot be converted"):
        convert_gguf(file, tmp_path / "cache")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_the_files_own_tokenizer_whatever_lies_beside_it(tmp_path, llama_folder):
    gguf = pytest.importorskip("gguf")
    import numpy as np
    from transformers import AutoTokenizer

    text = "The for statement"
    wanted = AutoTokenizer.from_pretrained(llama_folder)(text)["input_ids"]
    write_gguf(gguf, np, tmp_path / "tiny.gguf", llama_folder)
    tiny.train_tokenizer("zzz yyy xxx " * 500, 300).save_pretrained(tmp_path)
    folder = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == wanted
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] != wanted


@pytest.mark.parametrize("kept", [0, 3, 30, 500, 0.3, 0.7, 0.999])
def test_a_file_that_ends_early_is_one_line(kept, tmp_path, llama_folder):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    file = tmp_path / "tiny.gguf"
    write_gguf(gguf, np, file, llama_folder)
    data = file.read_bytes()
    file.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ValueError, match="tiny.gguf cannot be converted: it is truncated, broken"):
        convert_gguf(file, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "gguf").iterdir())
