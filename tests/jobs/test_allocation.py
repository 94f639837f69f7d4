"""Sparsities by block: measured, shared out, and used."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sparse_expansion.cli import main
from sparse_expansion.config import CalibrationConfig, CompressionConfig, SparsityPattern
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.data.tokenization import encoder, load_tokenizer
from sparse_expansion.data.windows import calibration_windows
from sparse_expansion.jobs.allocation import split_windows
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.run_folder import write_windows
from sparse_expansion.store import Store
from tests.studies.helpers import block_inputs
from tests.tiny import SMALL_RUN, digests

ON = "--sparsity 0.7 --dataset-size 20 --eval-windows 6 --seqlen 48 --block-size 16".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory, neox_folder, long_text_folder):
    """The file that `allocate` wrote."""
    file = tmp_path_factory.mktemp("allocation") / "shares.json"
    where = ["--model", str(neox_folder), "--dataset", str(long_text_folder)]
    assert main(["allocate", *where, *ON, "--threads", "1", "--output", str(file)]) == 0
    return file


def test_gaps_are_those_of_one_pruned_block(made, neox_folder, long_text_folder):
    from transformers import AutoModelForCausalLM

    from sparse_expansion.algorithms.compress import compress_experts
    from sparse_expansion.algorithms.hessian import hessian_sum

    found = json.loads(made.read_text())
    model = AutoModelForCausalLM.from_pretrained(neox_folder).eval()
    encode = encoder(load_tokenizer(neox_folder))
    text = load_corpus(str(long_text_folder)).calibration
    tokens = calibration_windows(text, encode, num_windows=26, seqlen=48, seed=0)
    scored = tokens[20:]
    config = CompressionConfig(sparsity=SparsityPattern.parse("0.7"), block_size=16)

    def loss():
        with torch.no_grad():
            scores = model(scored).logits[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(scores, scored[:, 1:].flatten()))

    dense = loss()
    assert found["num_eval_tokens"] == 6 * 47
    for layer, row in enumerate(found["rows"]):
        kept = {}
        for group in ModelShell(neox_folder).family.groups:
            _, X = block_inputs(neox_folder, tokens[:20], layer, group.name)
            (linear,) = group.linears
            module = model.gpt_neox.layers[layer].get_submodule(linear)
            weight = module.weight.detach()
            result = compress_experts(weight, hessian_sum(X).sum_DD[None], config, None)
            kept[module] = weight.clone()
            with torch.no_grad():
                module.weight.copy_(result.weight_KOD[0])
        assert row["gap"] == pytest.approx(loss() - dense, rel=0.02, abs=1e-4)
        with torch.no_grad():
            for module, weight in kept.items():
                module.weight.copy_(weight)


def test_a_run_with_shares_by_block(made, neox_folder, long_text_folder, tmp_path, capsys):
    shares = json.loads(made.read_text())["layer_sparsity"]
    assert len(set(shares)) == 3
    where = ["--model", str(neox_folder), "--dataset", str(long_text_folder), "--sparsity", "0.7"]
    flags = [*where, "--layer-sparsity", str(made), "--expert-sparsity", "uniform", *SMALL_RUN]
    output = str(tmp_path / "o")
    run = ["run", *flags, "--eval-windows", "3", "--output", output]
    assert main(run) == 0
    assert "% sparse (blocks" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    kept = metrics["mlp_flops_per_token"]
    assert kept["experts"] / kept["dense"] == pytest.approx(0.3, abs=2e-3)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(output).eval()
    for layer, share in enumerate(shares):
        stored = {}
        for file in (tmp_path / "o").glob(f"experts-{layer:03d}-*.safetensors"):
            stored |= load_file(file)
        values = sum(part.numel() for name, part in stored.items() if name.endswith(".values"))
        block = model.gpt_neox.layers[layer]
        dense = 4 * sum(
            block.get_submodule(name).in_features * block.get_submodule(name).out_features
            for name in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        )
        assert values / dense == pytest.approx(1 - share, abs=2e-3)
    # Saved and loaded it is the model that was scored.
    evaluate = ["evaluate", "--model", output, "--dataset", str(long_text_folder), "--seqlen", "48"]
    capsys.readouterr()
    assert main([*evaluate, "--eval-windows", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"] == metrics["perplexity_expanded"]
    assert main(["plan", *flags[:2], *flags[4:-2], "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    index = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())
    assert plan["checkpoint_bytes"] == index["metadata"]["total_size"]
    # Without the file it is another run.
    assert main([word for word in run if word not in ("--layer-sparsity", str(made))]) == 2


def test_a_run_measures_by_itself(neox_folder, long_text_folder, tmp_path, capsys):
    where = ["--model", str(neox_folder), "--dataset", str(long_text_folder), "--sparsity", "0.7"]
    flags = ["--layer-sparsity", "measured", *SMALL_RUN, "--dataset-size", "9", "--json"]
    run = ["expand", *where, *flags, "--output", str(tmp_path)]
    assert main(run) == 0
    found = capsys.readouterr()
    # Each a phase of its own: its share of the work does not fall from all to nothing.
    begun = [line.partition(" · ")[0] for line in found.err.splitlines() if "elapsed" in line]
    assert begun.index("measure blocks") < begun.index("expand")
    assert "measure blocks" not in begun[begun.index("expand") :]
    metrics = json.loads(found.out)
    written = json.loads((tmp_path / "run" / "allocation.json").read_text())
    shares = written["layer_sparsity"]
    assert metrics["config"]["compression"]["layer_sparsity"] == shares
    assert metrics["unit_seconds"]["block_gaps"] > 0
    timeline = json.loads((tmp_path / "run" / "timeline.json").read_text())
    assert [row["stage"] for row in timeline].count("block_gaps") == 1
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["compression"]["layer_sparsity"] == shares
    assert sum(shares) / 3 == pytest.approx(0.7, abs=1e-5) and len(set(shares)) == 3
    # They are those of `allocate` on the first 6 of the 9 windows, scored on the other 3.
    text = load_corpus(str(long_text_folder)).calibration
    encode = encoder(load_tokenizer(neox_folder))
    tokens = calibration_windows(text, encode, num_windows=9, seqlen=48, seed=0)
    pruned, scored = split_windows(Store(tmp_path), CalibrationConfig(dataset_size=9, seqlen=48))
    assert torch.equal(pruned, tokens[:6]) and torch.equal(scored, tokens[6:])
    flags = "--dataset-size 6 --eval-windows 3 --seqlen 48 --block-size 16 --threads 1".split()
    assert main(["allocate", *where, *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer_sparsity"] == shares
    # What was measured is not measured again, and the folder is whole without more work.
    before = digests(tmp_path)
    assert main([*run, "--resume"]) == 0
    assert digests(tmp_path) == before
    # N:M is alike in all blocks.
    capsys.readouterr()
    where[-1] = "2:4"
    assert main(["expand", *where, *run[7:-1], str(tmp_path / "n-m")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["config"]["compression"]["layer_sparsity"] == "uniform"


def test_windows_to_prune_on_and_to_score(tmp_path):
    store, windows = Store(tmp_path), torch.arange(600 * 512).view(600, 512)
    for shards in (1, 300):
        write_windows(store, windows, shards)
        pruned, scored = split_windows(store, CalibrationConfig(dataset_size=600, seqlen=512))
        assert torch.equal(pruned, windows[:16]) and torch.equal(scored, windows[16:24])
    write_windows(store, windows[:1], 1)
    pruned, scored = split_windows(store, CalibrationConfig(dataset_size=1, seqlen=512))
    assert torch.equal(pruned, scored)


@pytest.mark.ray
def test_ray_gives_the_same_shares(made, neox_folder, long_text_folder, tmp_path, ray_flags):
    file = tmp_path / "shares.json"
    where = [
        "--model",
        str(neox_folder),
        "--dataset",
        str(long_text_folder),
        "--plots",
        str(tmp_path),
    ]
    assert main(["allocate", *where, *ON, *ray_flags, "--output", str(file)]) == 0
    shares = json.loads(file.read_text())["layer_sparsity"]
    assert shares == pytest.approx(json.loads(made.read_text())["layer_sparsity"], abs=1e-4)
    assert (tmp_path / "allocation.png").stat().st_size > 5000


def test_a_run_with_experts_by_block(neox_folder, long_text_folder, tmp_path, capsys):
    file, output = tmp_path / "experts.json", tmp_path / "o"
    where = ["--model", str(neox_folder), "--dataset", str(long_text_folder)]
    asked = ["--num-clusters", "1,2,4,8", "--mean-clusters", "4", "--pca-reduction-factor", "4"]
    flags = [*ON, *asked, "--shrink-hessians", "--output", str(file), "--plots", str(tmp_path)]
    assert main(["allocate", *where, *flags, "--threads", "1"]) == 0
    assert "error 8" in capsys.readouterr().out
    assert (tmp_path / "allocation.png").stat().st_size > 5000
    found = json.loads(file.read_text())
    counts = found["layer_clusters"]
    assert counts == [row["num_clusters"] for row in found["rows"]] and sum(counts) <= 12
    assert all(row["error_1"] == pytest.approx(1) for row in found["rows"])
    # Whatever was found, blocks that differ: saved, loaded, scored, planned.
    file.write_text(json.dumps({"layer_clusters": [1, 8, 3]}))
    run = [*where, *SMALL_RUN, "--layer-clusters", str(file)]
    run += ["--num-clusters", "4", "--layer-sparsity", "uniform", "--expert-sparsity", "uniform"]
    more = ["--eval-windows", "3", "--finetune", "--json", "--output", str(output)]
    assert main(["run", *run, *more]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["num_experts"] == 2 * (1 + 8 + 3)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(output)
    blocks = [block.mlp.dense_h_to_4h for block in model.gpt_neox.layers]
    assert [len(linear.experts) for linear in blocks] == [1, 8, 3]
    evaluate = ["evaluate", "--model", str(output), "--dataset", str(long_text_folder)]
    assert main([*evaluate, "--seqlen", "48", "--eval-windows", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == metrics["perplexity_expanded"]
    assert main(["report", str(output)]) == 0
    assert "4 experts per linear on average (blocks 1 to 8)" in capsys.readouterr().out
    planned = [word for word in run if word not in ("--dataset", str(long_text_folder))]
    planned = planned[: planned.index("--threads")] + planned[planned.index("--threads") + 2 :]
    assert main(["plan", *planned, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert plan["checkpoint_bytes"] == index["metadata"]["total_size"]
    assert plan["units"]["experts"] == 2 * (1 + 4 + 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[4, 4]", "layer_clusters is of 2 blocks, the model has 3"),
        ("[4, 4, 16]", "have mean 8, num_clusters is 4: use --num_clusters 8"),
        ("[4, 0, 4]", "not all within 1 to 4096"),
        ("[4, 2.5, 4]", "holds no list of numbers, such as [8, 24]"),
        ("{", "--layer-clusters"),
        ("[" * 100_000, "is not valid JSON: give a list of numbers, such as [8, 24]"),
    ],
)
def test_experts_that_do_not_fit(content, message, tmp_path, neox_folder, long_text_folder, capsys):
    file = tmp_path / "experts.json"
    file.write_text(content)
    where = ["--model", str(neox_folder), "--dataset", str(long_text_folder), *SMALL_RUN]
    assert main(["run", *where, "--num-clusters", "4", "--layer-clusters", str(file)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line


@pytest.mark.parametrize(
    ("content", "sparsity", "message"),
    [
        ("[0.6, 0.8]", "0.7", "layer_sparsity is of 2 blocks, the model has 3"),
        ("[0.6, 0.8, 0.9]", "0.7", "has mean 0.7667, sparsity is 0.7"),
        ("[0.6, 0.7, 1.1]", "0.8", "layer_sparsity 1.1 is outside 0 to 1"),
        ("[0.5, 0.5, 0.5]", "2:4", "2:4 is N:M: drop one of the two"),
        ("{}", "0.7", "holds no list of numbers"),
        ('["much"]', "0.7", "holds no list of numbers"),
        ("[0.6,", "0.7", "--layer-sparsity"),
    ],
)
def test_shares_that_do_not_fit(
    content, sparsity, message, tmp_path, neox_folder, long_text_folder, capsys
):
    file = tmp_path / "shares.json"
    file.write_text(content)
    where = ["--model", str(neox_folder), "--dataset", str(long_text_folder), *SMALL_RUN]
    assert main(["run", *where, "--sparsity", sparsity, "--layer-sparsity", str(file)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "2:4"], "only a share of zeros can differ by block"),
        (["--eval-windows", "0"], "--eval-windows 0 must be at least 1"),
        (["--num-clusters", "8,16", "--mean-clusters", "4"], "--mean-clusters 4 is below all of"),
        (["--num-clusters", "0,4"], "--num_clusters 0 must be at least 1"),
        (["--output", "/nowhere/shares.json"], "/nowhere is no folder"),
    ],
)
def test_allocate_answers_bad_input(flags, message, neox_folder, long_text_folder, capsys):
    where = ["--model", str(neox_folder), "--dataset", str(long_text_folder)]
    assert main(["allocate", *where, *ON, *flags]) == 2
    assert message in capsys.readouterr().err
