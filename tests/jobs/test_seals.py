"""Damage of what a run keeps beside its weights is noticed, and mended where it can be."""

import json
import re
import shutil

import pytest
from transformers import AutoModelForCausalLM

from sparse_expansion.cli import main
from sparse_expansion.model.verification import verify
from sparse_expansion.plain_files import SEAL, is_seal_whole, sealed
from tests.jobs.processes import arguments
from tests.tiny import digests


@pytest.fixture
def output(measured_run, tmp_path):
    """A copy to be damaged."""
    folder = tmp_path / "out"
    shutil.copytree(measured_run, folder)
    return folder


def change_digit(path, pattern):
    """Change the digit behind what a pattern finds first."""
    text = path.read_text()
    place = re.search(pattern, text).end()
    assert text[place].isalnum()
    path.write_text(text[:place] + ("7" if text[place] != "7" else "8") + text[place + 1 :])


def test_a_digit_of_a_markers_digest_is_made_again(output, measured_run, small_run):
    for name in ("layer-001/mlp.dense_h_to_4h/router", "layer-002/mlp.dense_4h_to_h/experts-0"):
        marker = sorted((output / "run" / "units").glob(f"{name}*.json"))[0]
        change_digit(marker, r'"tensors": \{[^}]*"sha256": "')
    (output / "config.json").unlink()
    assert main([*small_run, "--output", str(output), "--resume"]) == 0
    assert verify(output) == verify(measured_run)
    assert digests(output) == digests(measured_run)
    assert (output / "manifest.json").read_text() == (measured_run / "manifest.json").read_text()


@pytest.mark.parametrize("pattern", [r'"layer_sparsity": \[\s*0\.', r'"sparsity": 0\.'])
def test_a_changed_share_does_not_reach_the_config(pattern, output, small_run, capsys):
    before = (output / "config.json").read_bytes()
    change_digit(output / "run" / "allocation.json", pattern)
    assert main([*small_run, "--output", str(output), "--resume"]) == 2
    assert (
        "allocation.json is damaged, or was changed by hand: delete it" in capsys.readouterr().err
    )
    assert (output / "config.json").read_bytes() == before
    AutoModelForCausalLM.from_pretrained(output)
    # The advice leads on.
    (output / "run" / "allocation.json").unlink()
    assert main([*small_run, "--output", str(output), "--resume"]) == 0
    assert (output / "config.json").read_bytes() == before


def test_shares_that_the_experts_were_not_made_with(output, small_run, capsys):
    """Without a seal, or with another's: what the experts' own sizes say counts."""
    path = output / "run" / "allocation.json"
    found = json.loads(path.read_text())
    del found[SEAL]
    found["layer_sparsity"][1] -= 0.01
    found["layer_sparsity"][2] += 0.01
    path.write_text(json.dumps(found))
    before = (output / "config.json").read_bytes()
    assert main([*small_run, "--output", str(output), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "zeros of block 1, and its finished experts have another share" in error
    assert (output / "config.json").read_bytes() == before
    assert verify(output)


@pytest.mark.parametrize(
    "pattern", [r'"perplexity_expanded": ', r'"checkpoint_bytes": ', r'"num_clusters": ']
)
def test_a_digit_of_the_metrics(pattern, output, measured_run, small_run, capsys):
    change_digit(output / "metrics.json", pattern)
    for line in (["compare", str(output), str(measured_run)], ["report", str(output)]):
        assert main(line) == 2
        assert "metrics.json is damaged, or was changed by hand" in capsys.readouterr().err
    assert main([*small_run, "--output", str(output), "--resume"]) == 0
    assert main(["compare", str(output), str(measured_run)]) == 0


def test_metrics_of_before_are_read(output, measured_run):
    found = json.loads((output / "metrics.json").read_text())
    del found[SEAL]
    (output / "metrics.json").write_text(json.dumps(found))
    assert main(["compare", str(output), str(measured_run)]) == 0


def test_a_seal_by_hand():
    value = {"b": 0.1, "a": {10: [1], 9: None}}
    found = json.loads(json.dumps(sealed(value)))
    assert is_seal_whole(found)
    assert found == {"b": 0.1, "a": {"10": [1], "9": None}}
    for changed in ({"b": 0.2}, {"c": 1}, {SEAL: "0" * 64}, {SEAL: None}):
        assert not is_seal_whole({**sealed(value), **changed})


def test_a_run_whose_file_was_changed_is_not_another(output, neox_folder, small_run, capsys):
    change_digit(output / "run" / "run.json", r'"seed": ')
    assert main([*small_run, "--output", str(output), "--resume"]) == 2
    assert "run.json is damaged" in capsys.readouterr().err


def test_a_marker_that_leads_elsewhere(tmp_path, neox_folder, text_folder, finished):
    """It names a file outside, and does not reach the index."""
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    marker = output / "run" / "units" / "layer-000" / "mlp.dense_h_to_4h" / "router.json"
    outside = tmp_path / "x.safetensors"
    shutil.copy(output / "router-000-mlp.dense_h_to_4h.safetensors", outside)
    found = json.loads(marker.read_text())
    (record,) = found.pop("files").values()
    for name in ("../x.safetensors", str(outside), "run/../../x.safetensors"):
        changed = {**found, "files": {name: record}}
        changed.pop(SEAL)
        marker.write_text(json.dumps(sealed(changed)))
        assert main([*arguments(neox_folder, text_folder, output), "--resume"]) == 0
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert all("/" not in file for file in index["weight_map"].values())
        assert digests(output) == digests(finished)
    assert outside.exists()
