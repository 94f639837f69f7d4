"""The flags of the command line, and the settings that they make."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparse_expansion.config import (
    ALLOCATIONS,
    CALIBRATION_INPUTS,
    CLUSTERINGS,
    DTYPES,
    PRUNERS,
    RANKINGS,
    UNIFORM,
    CalibrationConfig,
    CompressionConfig,
    RefinementConfig,
    RoutingConfig,
    RunConfig,
    SparsityPattern,
)

EXIT_BAD_INPUT = 2

ALL_WINDOWS = "all"

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "pruner": "sparsegpt",
        "block_size": 128,
        "damping_fraction": 0.01,
        "shrink_hessians": False,
        "layer_sparsity": "uniform",
        "calibration_inputs": "compressed",
        "num_clusters": 16,
        "pca_reduction_factor": 32,
    },
    "best": {
        "pruner": "admm",
        "block_size": 128,
        "damping_fraction": 0.1,
        "shrink_hessians": True,
        "layer_sparsity": "measured",
        "calibration_inputs": "sequential",
        "num_clusters": 16,
        "pca_reduction_factor": 32,
    },
}
"""Flags' values under a name; what is given beside it counts for more."""
DEFAULT_PRESET = "best"

_RUN_EXAMPLES = """examples:
  # a local or hub model, 16 experts at 50 %, offline text
  sparse-expansion run --model ./SmolLM2-135M --dataset pydoc --sparsity 0.5 \\
      --num_clusters 16 --dataset-size 32 --seqlen 512 --output ./expanded
  # the paper's settings
  sparse-expansion run --preset paper --model pythia --model_size 12B --sparsity 0.5 \\
      --dataset wikitext2 --dataset-size 128 --num_clusters 16 --PCA_reduction_factor 32 \\
      --output ./pythia-12b-16
  # 2:4 sparse and 4 bits
  sparse-expansion run --model llama --model_size 7B --sparsity "(2, 4)" --quantize --bits 4 \\
      --dataset wikitext2 --dataset-size 128 --num_clusters 16 --PCA_reduction_factor 32
  # go on after a crash
  sparse-expansion run ... --output ./expanded --resume
"""
_EXPAND_EXAMPLES = """examples:
  sparse-expansion expand --model ./SmolLM2-135M --dataset ./wikitext2 --sparsity 2:4 \\
      --num_clusters 8 --dataset-size 64 --seqlen 512 --output ./expanded
"""
_EVALUATE_EXAMPLES = """examples:
  sparse-expansion evaluate --model ./expanded --dataset pydoc --seqlen 512 --eval-windows 32
  sparse-expansion evaluate --model pythia --model_size 70m --dataset wikitext2 --json
  # tasks of lm-evaluation-harness
  sparse-expansion evaluate --model ./expanded --tasks arc_easy,hellaswag --limit 200
"""
_PLAN_EXAMPLES = """examples:
  sparse-expansion plan --model ./llama-2-13b --calibration-inputs dense --data-shards 64 \\
      --num-workers 16 --gpu-memory 48GB --host-memory 128GB --price 1.9
  sparse-expansion plan --model ./SmolLM2-135M --sparsity 0.5 --num_clusters 16 \\
      --dataset-size 32 --seqlen 512
  sparse-expansion plan --model ./config-only-folder --json
"""
_ANALYZE_EXAMPLES = """examples:
  sparse-expansion analyze ./expanded
  sparse-expansion analyze ./expanded --table experts.parquet
  # every neuron: distance to a normal, mapping difficulty, error against one cluster's
  sparse-expansion analyze ./expanded --dataset ./wikitext2 --seqlen 512 --windows 16 \\
      --one-cluster ./sparse-gpt --table neurons.parquet
  sparse-expansion analyze ./SmolLM2-135M --dataset pydoc --seqlen 512 --windows 8 --plots plots
"""
_EXPORT_EXAMPLES = """examples:
  sparse-expansion export ./sparse-gpt --output ./plain
  sparse-expansion export ./sparse-gpt-4bit --format pack-quantized --output ./packed
"""
_SWEEP_EXAMPLES = """examples:
  # how the error of a linear's outputs on other text falls with K, and with random clusters
  sparse-expansion sweep-clusters --model ./SmolLM2-135M --dataset ./wikitext2 --layer 10 \\
      --dataset-size 32 --seqlen 512 --sparsity 0.8
  # one neuron's distribution, dense and for every K
  sparse-expansion sweep-clusters --model ./SmolLM2-135M --dataset ./wikitext2 --layer 10 \\
      --linear mlp.up_proj --neuron 17 --dataset-size 32 --seqlen 512 --sparsity 0.8 --plots plots
"""
_PRUNE_EXAMPLES = """examples:
  sparse-expansion prune-neurons --model ./SmolLM2-135M --dataset ./wikitext2 --sparsity 0.9 \\
      --shares 0.01,0.03,0.1 --rankings wasserstein,random --dataset-size 32 --seqlen 512 \\
      --eval-windows 16 --plots plots
"""
_ALLOCATE_EXAMPLES = """examples:
  sparse-expansion allocate --model ./SmolLM2-135M --dataset ./wikitext2 --sparsity 0.7 \\
      --dataset-size 16 --eval-windows 8 --seqlen 512 --output shares.json
  sparse-expansion run --model ./SmolLM2-135M --dataset ./wikitext2 --sparsity 0.7 \\
      --layer-sparsity shares.json --dataset-size 64 --seqlen 512 --output ./expanded
"""
_COMPARE_EXAMPLES = """examples:
  sparse-expansion compare ./k1 ./k4 ./k16 ./k16-random
  sparse-expansion compare ./k1 ./k16 --plots plots --table runs.parquet
"""
_REPORT_EXAMPLES = """examples:
  sparse-expansion report ./expanded
  sparse-expansion report ./expanded --html report.html --price 1.2 --plots plots
  sparse-expansion report ./expanded --json
"""


class _Parser(argparse.ArgumentParser):
    """One line and exit code 2 for a wrong flag, as for every other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def normalise_flags(arguments: Sequence[str]) -> list[str]:
    """Write every long flag one way: hyphens for underscores, lower case.

    Values are left as they are; so is everything after a bare ``--``.
    """
    result: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return result + list(arguments[position:])
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            argument = flag.replace("_", "-").lower() + equals + value
        result.append(argument)
    return result


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parsed flags, those of a preset filled in.

    Raises:
        SystemExit: help was asked for, or a flag is wrong.
    """
    flags = normalise_flags(arguments)
    args = build_parser().parse_args(flags)
    preset = getattr(args, "preset", None)
    return args if preset is None else build_parser(PRESETS[preset]).parse_args(flags)


def build_parser(defaults: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    """The parser of all subcommands.

    Args:
        defaults: values of a preset.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("sparse-expansion")
    except PackageNotFoundError:
        release = "unknown"
    parser = _Parser(
        prog="sparse-expansion",
        description="Turn a language model's MLP linears into routed, pruned and quantized "
        "experts (arXiv 2405.15756), save the result, and measure its perplexity.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=release)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    run = command("run", "Expand a model and measure its perplexity.", _RUN_EXAMPLES)
    expand = command("expand", "Make an expanded model and save it.", _EXPAND_EXAMPLES)
    evaluate = command(
        "evaluate",
        "Measure the perplexity of a dense or expanded model, or its scores on tasks.",
        _EVALUATE_EXAMPLES,
    )
    plan = command(
        "plan", "Say what a run will do and need, from the model's config alone.", _PLAN_EXAMPLES
    )
    analyze = command(
        "analyze",
        "Per-expert facts of a run (tokens, error, damping), or with --dataset what every neuron "
        "of a dense or expanded model does on a text.",
        _ANALYZE_EXAMPLES,
    )
    export = command(
        "export", "Write a one-expert model as a folder for other tools.", _EXPORT_EXAMPLES
    )
    export.add_argument(
        "--format",
        choices=("dense", "pack-quantized"),
        default="dense",
        help="plain weights (default), or compressed-tensors' format for quantized experts",
    )
    export.add_argument("--output", metavar="DIR", required=True, help="new folder (or URL)")
    report = command("report", "Summarise a finished or unfinished run folder.", _REPORT_EXAMPLES)
    compare = command(
        "compare",
        "Perplexity and cost of finished runs beside each other.",
        _COMPARE_EXAMPLES,
    )
    compare.add_argument("folders", metavar="DIR", nargs="+", help="folders of finished runs")
    compare.add_argument("--table", metavar="FILE.parquet", help="also write the rows as Parquet")
    sweep = command(
        "sweep-clusters",
        "Try numbers of clusters on the linears of one block, with random clusters as a control.",
        _SWEEP_EXAMPLES,
    )
    prune = command(
        "prune-neurons",
        "Prune only the first neurons of several rankings, and measure the perplexity.",
        _PRUNE_EXAMPLES,
    )
    allocate = command(
        "allocate",
        "Measure what every block loses when it alone is pruned, and share out the zeros.",
        _ALLOCATE_EXAMPLES,
    )
    allocate.add_argument(
        "--output", metavar="FILE.json", help="also write the result, for run --layer-sparsity"
    )
    _add_experiments(sweep, prune, allocate)
    for sub in (run, expand, plan):
        _add_model(sub)
        _add_pruning(sub, by_block=True)
        _add_quantization(sub)
        _add_routing(sub)
        sub.add_argument(
            "--preset",
            choices=tuple(PRESETS),
            default=DEFAULT_PRESET,
            help="best (default): the settings that measured best; paper: the published ones, "
            "two to three times as fast; flags beside it count for more",
        )
    _add_model(evaluate)
    for sub in (run, expand, evaluate):
        _add_data(sub)
        _add_execution(sub)
    _add_calibration(run)
    _add_calibration(expand)
    _add_calibration(plan)
    for sub in (run, expand, plan):
        _add_refinement(sub)
    plan.add_argument("--seqlen", type=int, metavar="TOKENS", help="tokens per window")
    _add_cluster(plan)
    for sub in (run, evaluate):
        sub.add_argument(
            "--eval-windows",
            type=int,
            metavar="N",
            help="evaluation windows from the start of the text (default: all)",
        )
    evaluate.add_argument("--dtype", choices=DTYPES, default="auto", help="compute dtype")
    _add_tasks(evaluate)
    run.add_argument(
        "--output",
        metavar="DIR",
        help="folder (or URL) for the expanded model; "
        "without it the model is measured and thrown away",
    )
    expand.add_argument(
        "--output", metavar="DIR", required=True, help="folder (or URL) for the expanded model"
    )
    for sub in (run, expand):
        sub.add_argument("--resume", action="store_true", help="continue an interrupted run")
    for sub in (analyze, export, report):
        sub.add_argument("folder", metavar="DIR", help="a run's --output folder")
    analyze.add_argument("--table", metavar="FILE.parquet", help="also write the rows as Parquet")
    _add_neurons(analyze)
    _add_execution(analyze)
    for sub in (analyze, report, compare, sweep, prune, allocate):
        sub.add_argument("--plots", metavar="DIR", help="also write figures, as SVG and PNG")
    report.add_argument("--html", metavar="FILE.html", help="also write it as one HTML page")
    report.add_argument(
        "--price", type=float, metavar="PER_HOUR", help="price of a worker, to state a cost"
    )
    for sub in (run, expand, plan):
        sub.set_defaults(**(defaults or {}))
    every = (run, expand, evaluate, plan, analyze, export, report, compare, sweep, prune, allocate)
    for sub in every:
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("-v", "--verbose", action="store_true", help="more detail on stderr")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        required=True,
        metavar="MODEL",
        help="pythia or llama (with --model_size), a hub id, a local folder, or a .gguf file",
    )
    group.add_argument("-ms", "--model-size", metavar="SIZE", help="e.g. 12B with --model pythia")
    group.add_argument("--model-revision", metavar="REV", help="hub revision")
    group.add_argument("-cd", "--cache-dir", metavar="DIR", help="downloads and conversions")


def _add_pruning(parser: argparse.ArgumentParser, *, by_block: bool = False) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "-s",
        "--sparsity",
        default="0.5",
        metavar="S",
        help="share of zeros (0.5), or N:M = N of every M removed (2:4, '(2, 4)'); default 0.5",
    )
    if by_block:
        group.add_argument(
            "--layer-sparsity",
            default="uniform",
            metavar="HOW",
            help="measured: every block's share of zeros by what it loses when it alone is pruned, "
            "with --sparsity as their mean (the default; N:M is alike everywhere); uniform; or a "
            "file of shares: what `allocate` writes, or a list",
        )
    group.add_argument(
        "--pruner",
        choices=PRUNERS,
        default="sparsegpt",
        help="admm solves for mask and weights together (the default of run and expand); sparsegpt "
        "sweeps once: faster, and loses more; wanda and magnitude are cheap, and do not make up "
        "for what they remove",
    )
    group.add_argument(
        "--solver-iterations", type=int, default=12, metavar="N", help="of admm (default 12)"
    )
    group.add_argument("--block-size", type=int, default=128, help="columns per sweep block")
    group.add_argument(
        "--damping-fraction", type=float, default=0.01, help="0.1 in --preset best, else 0.01"
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="storage and compute dtype")
    group.add_argument(
        "--tf32",
        action="store_true",
        help="let GPUs round factors of float32 products: faster, other masks",
    )


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization")
    group.add_argument("-q", "--quantize", action="store_true", help="also quantize (GPTQ)")
    group.add_argument("-b", "--bits", type=int, default=None, help="bits, 2 to 8 (default 4)")
    group.add_argument("--group-size", type=int, help="input columns per scale (default: all)")
    group.add_argument("--symmetric", action="store_true", help="symmetric grid")
    group.add_argument("--act-order", action="store_true", help="sweep by falling activation")


def _add_routing(
    parser: argparse.ArgumentParser, *, several: bool = False, by_block: bool = False
) -> None:
    group = parser.add_argument_group("experts")
    group.add_argument(
        "--min-tokens-per-expert",
        type=int,
        help="experts with fewer tokens use the whole group's Hessian (default: width / 8; 1 with "
        "--shrink-hessians)",
    )
    group.add_argument(
        "--shrink-hessians",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="draw every expert's Hessian towards its group's, by a Ledoit-Wolf estimate of what "
        "its tokens leave uncertain (the default of run and expand)",
    )
    group.add_argument(
        "-pcrf",
        "--pca-reduction-factor",
        type=int,
        default=32,
        help="router features = width / factor (default 32)",
    )
    group.add_argument("-npca", "--no-pca", action="store_true", help="route on the full input")
    group.add_argument(
        "--balance",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="least tokens of a cluster, as a share of the mean cluster's: smaller ones are "
        "merged, and the largest split (default 0: as KMeans found them)",
    )
    group.add_argument("--kmeans-restarts", type=int, default=4, help="default 4")
    group.add_argument("--kmeans-tokens", type=int, default=65536, help="tokens KMeans is fit on")
    if by_block:
        group.add_argument(
            "-nc",
            "--num-clusters",
            metavar="K,K,...",
            help="also try these numbers of experts in every block, and share out experts by what "
            "they gain, e.g. 4,8,16,32",
        )
        group.add_argument(
            "--mean-clusters",
            type=int,
            default=16,
            metavar="K",
            help="experts of a block on average (default 16)",
        )
        return
    if several:
        group.add_argument(
            "-nc",
            "--num-clusters",
            default="1,2,4,8,16",
            metavar="K,K,...",
            help="numbers of clusters to try (default 1,2,4,8,16)",
        )
        return
    group.add_argument("-nc", "--num-clusters", type=int, default=16, help="experts (default 16)")
    group.add_argument(
        "--layer-clusters",
        metavar="FILE",
        help="numbers of experts by block, with --num-clusters as their mean at most: what "
        "`allocate --num-clusters` writes, or a list",
    )
    group.add_argument(
        "--clustering",
        choices=CLUSTERINGS,
        default="kmeans",
        help="random: a control, experts made on random tokens, as many as their clusters have",
    )
    group.add_argument("--experts-per-unit", type=int, default=4, help="experts per unit and file")


def _add_experiments(
    sweep: argparse.ArgumentParser,
    prune: argparse.ArgumentParser,
    allocate: argparse.ArgumentParser,
) -> None:
    for sub in (sweep, prune, allocate):
        _add_model(sub)
        _add_data(sub)
        _add_pruning(sub)
        group = sub.add_argument_group("windows")
        group.add_argument(
            "-ds", "--dataset-size", type=int, default=32, metavar="N", help="to calibrate on"
        )
        group.add_argument(
            "--eval-windows", type=int, default=16, metavar="N", help="to measure on (default 16)"
        )
        group.add_argument("--seed", type=int, default=0, help="default 0")
        sub.add_argument("--table", metavar="FILE.parquet", help="also write the rows as Parquet")
        _add_execution(sub)
    _add_routing(sweep, several=True)
    _add_routing(allocate, by_block=True)
    sweep.add_argument("--layer", type=int, required=True, help="block, from 0")
    sweep.add_argument("--linear", metavar="NAME", help="e.g. mlp.up_proj (default: all)")
    sweep.add_argument("--neuron", type=int, metavar="N", help="output of the linear to look at")
    prune.add_argument(
        "--rankings",
        default=",".join(RANKINGS),
        metavar="R,R,...",
        help=f"of {', '.join(RANKINGS)} (default: all)",
    )
    prune.add_argument(
        "--shares",
        default="0.01,0.03,0.1",
        metavar="P,P,...",
        help="shares of every linear's neurons (default 0.01,0.03,0.1)",
    )


def _windows(text: str) -> int | str:
    if text != ALL_WINDOWS and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {ALL_WINDOWS}")
    return text if text == ALL_WINDOWS else int(text)


def numbers(text: str, flag: str, kind: Callable[[str], Any]) -> list[Any]:
    """A comma-separated list of numbers, without repetitions.

    Raises:
        ValueError: it is empty, or one of them is no number.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not a list of numbers such as 1,2,4") from None
    return list(dict.fromkeys(found))


def _routing(
    args: argparse.Namespace,
    num_clusters: int,
    *,
    clustering: str = CLUSTERINGS[0],
    layer_clusters: tuple[int, ...] = (),
) -> RoutingConfig:
    return RoutingConfig(
        num_clusters=num_clusters,
        layer_clusters=layer_clusters,
        pca_reduction_factor=None if args.no_pca else args.pca_reduction_factor,
        restarts=args.kmeans_restarts,
        fit_tokens=max(args.kmeans_tokens, 1),
        clustering=clustering,
        balance=args.balance,
    )


def experiment_config(args: argparse.Namespace, num_windows: int, seqlen: int) -> RunConfig:
    """Settings of an experiment: all of its windows are one shard of dense inputs.

    Raises:
        ValueError: a value is out of bounds.
    """
    routing = RoutingConfig()
    compression = {
        "sparsity": SparsityPattern.parse(args.sparsity),
        "pruner": args.pruner,
        "solver_iterations": args.solver_iterations,
        "block_size": args.block_size,
        "damping_fraction": args.damping_fraction,
    }
    if getattr(args, "num_clusters", None):
        compression["min_tokens_per_expert"] = args.min_tokens_per_expert
        compression["shrink_hessians"] = args.shrink_hessians
        routing = _routing(args, max(numbers(args.num_clusters, "--num_clusters", int)))
    return RunConfig(
        compression=CompressionConfig(**compression),
        routing=routing,
        calibration=CalibrationConfig(
            dataset=args.dataset,
            dataset_size=num_windows,
            seqlen=seqlen,
            seed=args.seed,
            calibration_inputs="dense",
            data_shards=1,
        ),
        dtype=args.dtype,
        tf32=args.tf32,
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tasks (lm-evaluation-harness, in place of perplexity)")
    group.add_argument("--tasks", metavar="NAMES", help="comma-separated tasks of the harness")
    group.add_argument("--task-path", metavar="DIR", help="a folder of more task files (.yaml)")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="default: the task's own")
    group.add_argument("--limit", type=int, metavar="N", help="documents per task (default: all)")
    group.add_argument("--batch-size", type=int, default=1, help="sequences at a time (default 1)")


def check_tasks(args: argparse.Namespace) -> None:
    """Bounds of the flags of tasks.

    Raises:
        ValueError: a value is out of bounds, or flags contradict each other.
    """
    if args.tasks is None:
        for flag in ("task_path", "num_fewshot", "limit"):
            if getattr(args, flag) is not None:
                name = "--" + flag.replace("_", "-")
                raise ValueError(f"{name} needs --tasks: add it, or drop {name}")
        return
    if args.executor != "local":
        raise ValueError("--tasks runs in this process: drop --executor ray")
    if not [name for name in args.tasks.split(",") if name]:
        raise ValueError("--tasks names no task, e.g. --tasks arc_easy")
    for flag, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag.replace('_', '-')} {value} must be at least {least}")


def _add_neurons(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("neurons")
    group.add_argument("-d", "--dataset", metavar="DATA", help="text to run on, as for `run`")
    group.add_argument("--windows", type=int, default=8, metavar="N", help="default 8")
    group.add_argument("--seqlen", type=int, metavar="TOKENS", help="tokens per window")
    group.add_argument("--one-cluster", metavar="DIR", help="a plain sparse model to compare with")
    group.add_argument(
        "--dense", metavar="MODEL", help="the dense model (default: what the run was made of)"
    )
    group.add_argument("--model-revision", metavar="REV", help="hub revision")
    group.add_argument("-cd", "--cache-dir", metavar="DIR", help="downloads and conversions")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="compute dtype")
    group.add_argument("--seed", type=int, default=0, help="of random pairs; default 0")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "-ds",
        "--dataset-size",
        type=_windows,
        default=128,
        metavar="N",
        help="calibration windows at random places of the text (default 128), or all: the whole "
        "text, end to end",
    )
    group.add_argument("--seed", type=int, default=0, help="default 0")
    group.add_argument(
        "--calibration-inputs",
        choices=CALIBRATION_INPUTS,
        default="compressed",
        help="what a block is calibrated on: the compressed blocks' output (the paper's), this "
        "and inside a block the compressed linears' before (sequential, the default), or the "
        "dense model's activations",
    )
    group.add_argument(
        "--data-shards",
        type=int,
        help="shards of the windows, held one at a time (default: 4, and more where one would have "
        "over 131,072 tokens); part of the result, unlike the worker count",
    )


def _add_refinement(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("refinement")
    group.add_argument(
        "--finetune",
        nargs="?",
        type=int,
        const=1,
        default=0,
        metavar="EPOCHS",
        help="train every block's kept weights against the dense block, so many passes over the "
        "windows (1 without a number); masks and grids stay. An eighth of the windows is held "
        "out, and the best pass on them is kept",
    )
    group.add_argument(
        "--finetune-rate",
        type=float,
        default=2e-4,
        metavar="RATE",
        help="Adam's learning rate (default 0.0002)",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "-d",
        "--dataset",
        default="wikitext2",
        metavar="DATA",
        help="wikitext2, c4, pydoc (offline), a folder with train or valid and test "
        "(.txt, .jsonl, .parquet), or one such file; default wikitext2",
    )
    group.add_argument(
        "--seqlen",
        type=int,
        metavar="TOKENS",
        help="tokens per window (default: 2048, 4096 for Llama, or the model's maximum if less)",
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    group.add_argument("--num-workers", type=int, default=1, help="equal workers (default 1)")
    group.add_argument("--gpu-memory", metavar="SIZE", help="of a worker's GPU, e.g. 48GB")
    group.add_argument("--host-memory", metavar="SIZE", help="of a worker's machine, e.g. 128GB")
    group.add_argument(
        "--tflops",
        type=float,
        default=15.0,
        help="float32 TFLOP/s of one worker in matrix products (default 15)",
    )
    group.add_argument(
        "--bandwidth",
        default="1GB",
        metavar="SIZE",
        help="bytes per second between workers and to storage (default 1GB)",
    )
    group.add_argument("--price", type=float, help="of one worker for an hour")
    group.add_argument(
        "--activation-memory", default="2GiB", metavar="SIZE", help="as for expand (default 2GiB)"
    )


def cluster_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``forecast.Cluster`` from parsed flags.

    Raises:
        ValueError: a value is out of bounds.
    """
    if args.num_workers < 1:
        raise ValueError(f"--num-workers {args.num_workers} must be at least 1")
    if not args.tflops > 0:
        raise ValueError(f"--tflops {args.tflops:g} must be more than 0, e.g. 15")
    if args.price is not None and not args.price >= 0:
        raise ValueError(f"--price {args.price:g} must not be negative")
    bandwidth = parse_size(args.bandwidth)
    if bandwidth < 1:
        raise ValueError(f"--bandwidth {args.bandwidth} must be more than 0, e.g. 1GB")
    return {
        "num_workers": args.num_workers,
        "gpu_bytes": None if args.gpu_memory is None else parse_size(args.gpu_memory),
        "host_bytes": None if args.host_memory is None else parse_size(args.host_memory),
        "flops_per_second": args.tflops * 1e12,
        "bytes_per_second": float(bandwidth),
        "price_per_hour": args.price,
    }


def _add_execution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    group.add_argument("--executor", choices=("local", "ray"), default="local")
    group.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    group.add_argument("--threads", type=int, help="CPU threads per worker (default: all cores)")
    group.add_argument(
        "--activation-memory",
        default="2GiB",
        metavar="SIZE",
        help="activations beyond this go to scratch files (default 2GiB)",
    )
    group.add_argument("--scratch", metavar="DIR", help="folder for scratch files")
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="auto, host:port or ray://host:port; without it Ray is started here",
    )
    group.add_argument("--num-workers", type=int, help="Ray actors (default: what fits)")
    group.add_argument(
        "--gpus-per-worker", type=float, help="GPUs per actor, a share of one allowed"
    )
    group.add_argument("--cpus-per-worker", type=float, help="CPUs per actor (default: threads)")
    group.add_argument("--max-attempts", type=int, default=3, help="tries per unit (default 3)")
    group.add_argument(
        "--worker-timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="give up after so long without any worker (default 1800)",
    )
    group.add_argument(
        "--object-store-memory", metavar="SIZE", help="object store of a Ray started here"
    )
    group.add_argument(
        "--profile",
        action="store_true",
        help="also measure what a worker's device can do, and give every stage's share of it",
    )
    group.add_argument(
        "--eval-pipeline",
        type=int,
        default=1,
        metavar="P",
        help="evaluate in P ranges of blocks, each on its own worker (default 1: every worker "
        "streams all blocks over its share of the windows)",
    )


def run_config(args: argparse.Namespace, seqlen: int) -> RunConfig:
    """Settings from parsed flags.

    Raises:
        ValueError: a value is out of bounds, or flags contradict each other.
    """
    pattern = SparsityPattern.parse(args.sparsity)
    if args.bits is not None and not args.quantize:
        raise ValueError(f"--bits {args.bits} needs --quantize: add it, or drop --bits")
    for flag in ("group_size", "symmetric", "act_order"):
        if getattr(args, flag) and not args.quantize and flag != "act_order":
            name = "--" + flag.replace("_", "-")
            raise ValueError(f"{name} needs --quantize: add it, or drop {name}")
    return RunConfig(
        compression=CompressionConfig(
            sparsity=pattern,
            layer_sparsity=read_layer_sparsity(args.layer_sparsity, pattern),
            pruner=args.pruner,
            solver_iterations=args.solver_iterations,
            bits=(4 if args.bits is None else args.bits) if args.quantize else None,
            symmetric=args.symmetric,
            group_size=args.group_size,
            act_order=args.act_order,
            block_size=args.block_size,
            damping_fraction=args.damping_fraction,
            min_tokens_per_expert=args.min_tokens_per_expert,
            shrink_hessians=args.shrink_hessians,
        ),
        routing=_routing(
            args,
            args.num_clusters,
            clustering=args.clustering,
            layer_clusters=read_layer_clusters(args.layer_clusters),
        ),
        calibration=CalibrationConfig(
            dataset=getattr(args, "dataset", "wikitext2"),
            dataset_size=1 if args.dataset_size == ALL_WINDOWS else args.dataset_size,
            whole_text=args.dataset_size == ALL_WINDOWS,
            seqlen=seqlen,
            seed=args.seed,
            calibration_inputs=args.calibration_inputs,
            data_shards=args.data_shards,
        ),
        refinement=RefinementConfig(finetune=args.finetune, finetune_rate=args.finetune_rate),
        dtype=args.dtype,
        tf32=args.tf32,
        experts_per_unit=args.experts_per_unit,
    )


def read_layer_sparsity(path: str, pattern: SparsityPattern) -> str | tuple[float, ...]:
    """How zeros are shared out: a way's name, or from a JSON file the share of every block.

    The file holds a list, or an object that has it as ``layer_sparsity``. N:M leaves no choice, so
    that nothing is measured then.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    if path in ALLOCATIONS:
        return path if pattern.group is None else UNIFORM
    return tuple(map(float, _by_block(path, "layer_sparsity", int | float, "[0.6, 0.8]")))


def read_layer_clusters(path: str | None) -> tuple[int, ...]:
    """Numbers of clusters by block: a JSON list, or an object with ``layer_clusters``.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    return () if path is None else tuple(_by_block(path, "layer_clusters", int, "[8, 24]"))


def _by_block(path: str, name: str, kind: Any, example: str) -> list[Any]:
    flag = "--" + name.replace("_", "-")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path}: {error}") from None
    if isinstance(found, dict):
        found = found.get(name)
    numbers_alone = isinstance(found, list) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in found
    )
    if not found or not numbers_alone:
        raise ValueError(f"{flag} {path} holds no list of numbers, such as {example}")
    values: list[Any] = found
    return values


def parse_size(text: str) -> int:
    """``2GiB``, ``512MB``, ``1000000`` -> bytes.

    Raises:
        ValueError: not a size.
    """
    units = {
        "": 1,
        "k": 10**3,
        "m": 10**6,
        "g": 10**9,
        "t": 10**12,
        "ki": 2**10,
        "mi": 2**20,
        "gi": 2**30,
        "ti": 2**40,
    }
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in units:
        raise ValueError(f"size {text!r} is not a number of bytes such as 2GiB or 500MB")
    return int(float(match[1]) * units[match[2]])


def check_execution(args: argparse.Namespace) -> None:
    """Bounds of the execution flags."""
    parse_size(args.activation_memory)
    if args.object_store_memory is not None:
        parse_size(args.object_store_memory)
    for flag in ("threads", "num_workers", "max_attempts", "eval_pipeline", "eval_windows"):
        value = getattr(args, flag, None)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value} must be at least 1")
    for flag in ("gpus_per_worker", "cpus_per_worker", "worker_timeout"):
        value = getattr(args, flag)
        if value is not None and not value >= 0:
            raise ValueError(f"--{flag.replace('_', '-')} {value} must not be negative")
    ray_only = (
        "ray_address",
        "num_workers",
        "gpus_per_worker",
        "cpus_per_worker",
        "object_store_memory",
    )
    for flag in ray_only:
        if args.executor != "ray" and getattr(args, flag) is not None:
            name = "--" + flag.replace("_", "-")
            raise ValueError(f"{name} needs --executor ray: add it, or drop {name}")
