"""Spelling of the flags, and the settings that are made of them."""

import dataclasses
import json
import shlex

import pytest

from sparse_expansion.cli.main import main
from sparse_expansion.cli.parser import parse_arguments
from sparse_expansion.cli.settings import (
    calibration_size,
    execution_options,
    experiment_config,
    planned_cluster,
    run_config,
)
from sparse_expansion.config import (
    PRESETS,
    PRUNERS,
    Cluster,
    CompressionConfig,
    ExecutionOptions,
    RoutingConfig,
    RunConfig,
)


def parse(*flags):
    return parse_arguments(flags)


PAPER_LINE = {
    "model": "pythia",
    "model_size": "12B",
    "sparsity": "0.5",
    "bits": None,
    "dataset": "wikitext2",
    "dataset_size": 128,
    "num_clusters": 16,
    "pca_reduction_factor": 32,
    "cache_dir": None,
    "verbose": False,
}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "run --model pythia --model_size 12B --sparsity 0.5 --dataset wikitext2 "
            "--dataset-size 128 --num_clusters 16 --PCA_reduction_factor 32",
            {},
        ),
        (
            "run --model llama --model_size 7B --sparsity (2,|4) --quantize --bits 4 "
            "--dataset wikitext2 --dataset-size 128 --num_clusters 16 --PCA_reduction_factor 32",
            {"model": "llama", "model_size": "7B", "sparsity": "2:4", "bits": 4},
        ),
        (
            "run --model pythia --model-size 12b --sparsity 2:4 --dataset c4 --dataset_size 128 "
            "--num-clusters 16 --no_PCA --cache_dir storage --verbose",
            {
                "model_size": "12b",
                "sparsity": "2:4",
                "dataset": "c4",
                "pca_reduction_factor": None,
                "cache_dir": "storage",
                "verbose": True,
            },
        ),
        (
            "run -m llama -ms 8B -cd storage -s 0.9 -q -b 3 -v -d c4 -ds 64 -npca -nc 4",
            {
                "model": "llama",
                "model_size": "8B",
                "sparsity": "0.9",
                "bits": 3,
                "dataset": "c4",
                "dataset_size": 64,
                "num_clusters": 4,
                "pca_reduction_factor": None,
                "cache_dir": "storage",
                "verbose": True,
            },
        ),
        (
            "expand --model a/b --sparsity=0.5 --pca-reduction-factor=8 --output x",
            {"model": "a/b", "model_size": None, "pca_reduction_factor": 8},
        ),
        (
            "run -m llama -ms 7B -pcrf 8 --Sparsity 2:4 --QUANTIZE",
            {
                "model": "llama",
                "model_size": "7B",
                "sparsity": "2:4",
                "bits": 4,
                "pca_reduction_factor": 8,
            },
        ),
    ],
)
def test_the_research_codes_spelling(line, expected):
    args = parse(*(word.replace("|", " ") for word in line.split()))
    config = run_config(args, 128)
    assert {
        "model": args.model,
        "model_size": args.model_size,
        "sparsity": str(config.compression.sparsity),
        "bits": config.compression.bits,
        "dataset": config.calibration.dataset,
        "dataset_size": config.calibration.dataset_size,
        "num_clusters": config.routing.num_clusters,
        "pca_reduction_factor": config.routing.pca_reduction_factor,
        "cache_dir": args.cache_dir,
        "verbose": args.verbose,
    } == PAPER_LINE | expected
    assert config.calibration.seqlen == 128


def test_flags_reach_the_settings():
    args = parse(
        *"run --model x --sparsity 0.7 --quantize --bits 3 --num_clusters 5 --no_PCA "
        "--dataset-size 9 --seed 4 --calibration-inputs dense --data-shards 3".split()
    )
    config = run_config(args, 64)
    assert config.compression.sparsity.fraction == 0.7 and config.compression.bits == 3
    assert config.routing.num_clusters == 5 and config.routing.pca_reduction_factor is None
    assert config.calibration.seed == 4 and config.calibration.calibration_inputs == "dense"
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    parsed = run_config(parse("run", "--model", "x", "--sparsity", "(2, 4)"), 64)
    assert (parsed.compression.sparsity.pruned, parsed.compression.sparsity.group) == (2, 4)


def test_a_preset_gives_flags_that_others_override():
    def settings(line):
        return run_config(parse_arguments(shlex.split(line)), 512)

    paper = settings("run --model m --preset paper")
    assert paper.compression.pruner == "sparsegpt"
    assert paper.calibration.calibration_inputs == "compressed"
    best = settings("expand --model m --output o --preset best")
    assert best.compression.pruner == "admm"
    assert best.calibration.calibration_inputs == "sequential"
    pattern = settings("expand --model m --output o --sparsity 2:4 --dataset-size all")
    assert pattern.calibration.calibration_inputs == "cumulative"
    assert pattern.calibration.whole_text
    one_way = settings("run --model m --sparsity 2:4 --calibration-inputs sequential")
    assert one_way.calibration.calibration_inputs == "sequential"
    assert best.tf32 is False and settings("run --model m --tf32").tf32 is True
    mixed = settings("plan --model m --preset best --num_clusters 4 --damping-fraction 0.2")
    assert mixed.compression.pruner == "admm"
    assert mixed.routing.num_clusters == 4
    assert mixed.compression.damping_fraction == 0.2
    with pytest.raises(SystemExit) as stop:
        settings("run --model m --preset good")
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "command", ["run", "expand", "evaluate", "plan", "analyze", "export", "report"]
)
def test_help_has_examples(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"sparse-expansion {command}" in out.split("examples:")[1]
    assert "--json" in out


@pytest.mark.parametrize(
    ("flags", "damping"),
    [
        ("", 0.2),
        ("--preset paper", 0.01),
        ("--preset best --damping-fraction 0.01", 0.01),
        ("--damping-fraction 0.01 --preset best", 0.01),
    ],
)
def test_explicit_flags_override_the_preset_even_with_the_fields_default(flags, damping):
    config = run_config(parse("run", "--model", "m", *flags.split()), 512)
    assert config.compression.damping_fraction == damping
    assert CompressionConfig.damping_fraction == 0.01


@pytest.mark.parametrize(
    ("line", "block_size", "iterations"),
    [
        ("run --pruner admm --preset paper --block-size 16", 16, 7),
        ("run --pruner admm --preset paper", 64, 7),
        ("run", 32, 7),
        ("run --pruner sparsegpt", 32, 10),
        ("run --preset paper", 128, 10),
        ("run --preset paper --solver-iterations 3 --pruner admm", 64, 3),
        ("prune-neurons --pruner admm", 64, 7),
        ("prune-neurons", 128, 10),
    ],
)
def test_explicit_flags_presets_pruners_fields(line, block_size, iterations, monkeypatch):
    """Explicit flag over preset over pruner's default over field's default."""
    admm = dataclasses.replace(PRUNERS["admm"], defaults={"solver_iterations": 7, "block_size": 64})
    monkeypatch.setitem(PRUNERS, "admm", admm)
    monkeypatch.setitem(PRESETS["best"], "block_size", 32)
    command, *flags = line.split()
    args = parse(command, "--model", "m", *flags)
    make = experiment_config if command == "prune-neurons" else run_config
    config = make(args, 1, 64) if command == "prune-neurons" else make(args, 64)
    assert config.compression.block_size == block_size
    assert config.compression.solver_iterations == iterations


def test_experiments_have_the_papers_settings_and_their_own_windows():
    args = parse(*"sweep-clusters --model m --layer 1".split())
    config = experiment_config(args, 48, 64)
    assert config.compression == CompressionConfig()
    assert config.routing == RoutingConfig(num_clusters=16)
    assert (calibration_size(args), args.eval_windows) == (32, 16)
    assert calibration_size(parse("run", "--model", "m")) == 128
    with pytest.raises(ValueError, match="give the number of windows"):
        calibration_size(parse(*"prune-neurons --model m --dataset-size all".split()))


def test_finetune_without_a_number_is_one_pass():
    for flags, passes in (([], 0), (["--finetune"], 1), (["--finetune", "3"], 3)):
        args = parse("run", "--model", "m", *flags)
        assert run_config(args, 64).refinement.finetune == passes


def test_execution_options_are_those_of_the_flags():
    assert execution_options(parse("run", "--model", "m")) == ExecutionOptions()
    args = parse(
        *"evaluate --model m --executor ray --ray_address auto --num-workers 2 "
        "--activation-memory 64MiB --object-store-memory 1GB --cpus-per-worker 0.5".split()
    )
    assert execution_options(args) == ExecutionOptions(
        executor="ray",
        ray_address="auto",
        num_workers=2,
        activation_bytes=64 << 20,
        object_store_bytes=10**9,
        cpus_per_worker=0.5,
    )
    with pytest.raises(ValueError, match="--object-store-memory needs --executor ray"):
        execution_options(parse(*"run --model m --object-store-memory 1GB".split()))


def test_the_cluster_of_a_plan_is_that_of_the_flags():
    assert planned_cluster(parse("plan", "--model", "m")) == Cluster()
    args = parse(
        *"plan --model m --num-workers 4 --gpu-memory 48GB --host-memory 1GiB --tflops 3 "
        "--bandwidth 2MB --price 1.5".split()
    )
    assert planned_cluster(args) == Cluster(
        num_workers=4,
        gpu_bytes=48 * 10**9,
        host_bytes=2**30,
        flops_per_second=3e12,
        bytes_per_second=2e6,
        price_per_hour=1.5,
    )
