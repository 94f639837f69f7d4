"""Results as text: tables of a run, of its experts, of a plan."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from sparse_expansion.config import RefinementConfig
from sparse_expansion.run_files import COMMAND_FILE, METRICS_FILE, RUN_FILE
from sparse_expansion.store import Store, write_file

_EXPERT_STAGE = "experts-"


def table(rows: Sequence[tuple[str, ...]], *, header: bool = False) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        if header and number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def run_table(metrics: dict[str, Any], output: str | None) -> str:
    """The end of a run."""
    config = metrics["config"]
    rows = [("", "dense", "expanded")]
    if "perplexity_dense" in metrics:
        rows.append(
            (
                "perplexity (per token)",
                f"{metrics['perplexity_dense']:.3f}",
                f"{metrics['perplexity_expanded']:.3f}",
            )
        )
    rows.append(
        (
            "checkpoint",
            size(metrics["dense_checkpoint_bytes"]),
            size(metrics["checkpoint_bytes"]),
        )
    )
    lines = [table(rows, header=True), ""]
    sparsity = describe_weights(config)
    calibration = config["calibration"]
    lines.append(
        f"{describe_clusters(config['routing'])}, {sparsity}; calibrated on "
        f"{calibration['dataset_size']} x {calibration['seqlen']} tokens, "
        f"{calibration['calibration_inputs']} inputs"
    )
    if "num_eval_tokens" in metrics:
        lines.append(f"evaluated on {metrics['num_eval_tokens']} tokens")
    flops = metrics["mlp_flops_per_token"]
    lines.append(
        f"per token the MLPs take {flops['experts'] / flops['dense']:.1%} of the dense operations, "
        f"routers {flops['router'] / flops['dense']:.1%} more"
    )
    if "refinement" in metrics:
        lines.append(describe_refinement(metrics["refinement"]))
    starved = metrics["starved_experts"]
    if starved:
        lines.append(
            f"{starved} of {metrics['num_experts']} experts had too few tokens and use their "
            "whole group's Hessian"
        )
    if metrics["raised_damping"]:
        lines.append(f"{metrics['raised_damping']} experts needed more than the asked damping")
    seconds = "  ".join(f"{name} {value:.0f} s" for name, value in metrics["seconds"].items())
    lines.append(f"{seconds}  peak memory {size(metrics['peak_memory_bytes'])}")
    if output is not None:
        lines.append(f"saved in {output}")
    if "profile" in metrics:
        lines += ["", profile_table(metrics["profile"])]
    return "\n".join(lines)


def profile_table(profile: dict[str, Any]) -> str:
    """Every stage's work, as shares of what the worker's device can do."""
    ceilings = profile["ceilings"]
    rows: list[tuple[str, ...]] = [
        ("stage", "units", "seconds", "TFLOP", "GB", "of matmul", "of copy")
    ]
    rows += [
        (
            name,
            str(work["units"]),
            f"{work['seconds']:.1f}",
            f"{work['flops'] / 1e12:.3f}",
            f"{work['traffic_bytes'] / 1e9:.2f}",
            f"{work['matmul_share']:.0%}",
            f"{work['copy_share']:.0%}",
        )
        for name, work in profile["stages"].items()
    ]
    return (
        f"{table(rows, header=True)}\n\nOperations and bytes are estimates; the ceilings were "
        f"measured on a worker: {ceilings['matmul_flops_per_second'] / 1e12:.3f} TFLOP/s, copies "
        f"{ceilings['copy_bytes_per_second'] / 1e9:.1f} GB/s"
    )


def model_card(metrics: dict[str, Any], source: str, *, is_hub_id: bool) -> str:
    """``README.md`` of a checkpoint folder, in the hub's form: metadata, then what it is.

    Args:
        metrics: of a finished run or expansion.
        source: hub id or path of the dense model.
        is_hub_id: whether it is the former, and may be linked.
    """
    config = metrics["config"]
    quantized = config["compression"]["bits"] is not None
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if is_hub_id:
        head += [f"base_model: {source}", "base_model_relation: quantized"]
    head += ["tags:", "- sparse-expansion", "- pruned", *(["- quantized"] if quantized else [])]
    name = source.rstrip("/").rpartition("/")[2]
    calibration = config["calibration"]
    rows = [
        ("experts", describe_clusters(config["routing"])),
        ("weights", describe_weights(config)),
        (
            "calibrated on",
            f"{calibration['dataset_size']} x {calibration['seqlen']} tokens of "
            f"{Path(calibration['dataset']).name}, {calibration['calibration_inputs']} inputs",
        ),
        (
            "weight files",
            f"{size(metrics['checkpoint_bytes'])} (dense "
            f"{size(metrics['dense_checkpoint_bytes'])})",
        ),
    ]
    if "perplexity_dense" in metrics:
        rows.append(
            (
                "perplexity per token",
                f"{metrics['perplexity_expanded']:.3f} (dense {metrics['perplexity_dense']:.3f}), "
                f"on {metrics['num_eval_tokens']} tokens",
            )
        )
    rows.append(
        (
            "experts with too few tokens of their own",
            f"{metrics['starved_experts']} of {metrics['num_experts']} (made for their whole "
            "group's inputs)",
        )
    )
    facts = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return (
        "\n".join([*head, "---"])
        + f"""

# {name}, expanded

Every linear layer of the MLPs is a router and a set of sparse experts, of which a token takes one
([Sparse Expansion](https://arxiv.org/abs/2405.15756)).

| | |
|---|---|
{facts}

```python
import sparse_expansion  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

Made by

```
{metrics["command"]}
```
"""
    )


def describe_refinement(refinement: dict[str, Any]) -> str:
    """What training did to the blocks' errors on held-out windows."""
    text = f"training changed {refinement['trained_blocks']} blocks"
    if refinement["loss_before"] is None:
        return f"{text}; no window was held out to judge it by"
    return (
        f"{text}: error of their outputs on held-out windows {refinement['loss_before']:.3e} -> "
        f"{refinement['loss_after']:.3e}"
    )


def describe_clusters(routing: dict[str, Any]) -> str:
    """``16 experts per linear``; says so where they were made on random tokens."""
    text = f"{routing['num_clusters']} experts per linear"
    by_block = routing.get("layer_clusters")
    if by_block:
        text += f" on average (blocks {min(by_block)} to {max(by_block)})"
    # Runs made before there was a control have no such setting.
    if routing.get("clustering", "kmeans") == "random":
        text += " (control: made on random tokens)"
    return text


def describe_weights(config: dict[str, Any]) -> str:
    """``50 % sparse, 4 bits``."""
    compression = config["compression"]
    sparsity = compression["sparsity"]
    if sparsity["group"] is not None:
        text = f"{sparsity['pruned']}:{sparsity['group']} sparse"
    else:
        text = f"{100 * sparsity['fraction']:g} % sparse"
        by_block = compression.get("layer_sparsity")
        # A name says that all blocks are alike, or are still to be measured.
        if by_block and not isinstance(by_block, str):
            text += f" (blocks {100 * min(by_block):.0f} to {100 * max(by_block):.0f} %)"
    # Runs made before there was a choice have no such setting.
    if compression.get("pruner", "sparsegpt") != "sparsegpt":
        text += f" ({compression['pruner']})"
    if compression["bits"] is not None:
        text += f", {compression['bits']} bits"
    epochs = RefinementConfig.from_dict(config.get("refinement", {})).finetune
    if epochs:
        text += f", trained {epochs} {'pass' if epochs == 1 else 'passes'}"
    return text


def evaluation_table(result: dict[str, Any]) -> str:
    """The result of ``evaluate``."""
    kind = "expanded" if result["is_expanded"] else "dense"
    text = table(
        [
            ("model", f"{result['model']} ({kind})"),
            ("perplexity (per token)", f"{result['perplexity']:.3f}"),
            ("windows", f"{result['num_windows']} x {result['seqlen']} tokens"),
            ("scored tokens", str(result["num_eval_tokens"])),
            ("seconds", f"{result['seconds']:.1f}"),
        ]
    )
    return f"{text}\n\n{profile_table(result['profile'])}" if "profile" in result else text


def tasks_table(results: dict[str, dict[str, Any]]) -> str:
    """Every task's metrics, with their standard errors where there are any."""
    rows: list[tuple[str, ...]] = [("task", "metric", "value", "standard error")]
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, key = name.partition(",")
            if metric.endswith("_stderr") or not key:
                continue
            error = metrics.get(f"{metric}_stderr,{key}")
            spread = "" if error is None else f"{error:.4f}"
            rows.append((task, metric, f"{value:.4f}", spread))
    return table(rows, header=True)


def plan_table(result: dict[str, Any]) -> str:
    """The result of ``plan``."""
    rows = [
        (
            "model",
            f"{result['model_type']}, {result['num_layers']} blocks, "
            f"{result['parameters'] / 1e9:.2f} billion parameters",
        ),
        ("calibration", f"{result['calibration_tokens']} tokens"),
        ("units of work", str(sum(result["units"].values()))),
        ("dense checkpoint", size(result["dense_checkpoint_bytes"])),
        ("expanded checkpoint", size(result["checkpoint_bytes"])),
    ]
    rows += [
        (f"memory: {name.replace('_', ' ')}", size(value))
        for name, value in result["memory_bytes"].items()
    ]
    rows += [
        (f"work: {name}", f"{value / 1e12:.2f} TFLOP")
        for name, value in result["flops"].items()
        if value > 1e9
    ]
    rows.append(
        (
            "time",
            f"{duration(result['hours'])} on {result['num_workers']} worker(s), "
            f"{result['utilisation']:.0%} busy",
        )
    )
    if result["cost"] is not None:
        rows.append(("cost", f"{result['cost']:.2f}"))
    return f"{table(rows)}\n\n{result['verdict']['text']}"


def duration(hours: float) -> str:
    """``2.5 h``, or minutes or seconds where it is less."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def expert_rows(store: Store) -> list[dict[str, Any]]:
    """One row per linear and expert of a run, from the markers of finished units.

    Raises:
        ValueError: the folder holds no finished experts.
    """
    rows = []
    for key, record in store.records().items():
        layer, _, rest = key.partition("/")
        group, _, name = rest.partition("/")
        if not name.startswith(_EXPERT_STAGE):
            continue
        first = int(name.split("-")[1])
        stats = record["stats"]
        for linear, errors in stats["relative_error"].items():
            for offset, error in enumerate(errors):
                rows.append(
                    {
                        "layer": int(layer.removeprefix("layer-")),
                        "group": group,
                        "linear": linear,
                        "expert": first + offset,
                        "tokens": stats["tokens"][offset],
                        "relative_error": error,
                        "is_starved": stats["starved"][offset],
                        "damping_fraction": stats["damping_fraction"][offset],
                        "damping_attempts": stats["damping_attempts"][offset],
                        "dead_features": stats["dead_features"][offset],
                    }
                )
    if not rows:
        raise ValueError(f"{store.root} has no finished experts: give a run's --output folder")
    rows.sort(key=lambda row: (row["layer"], row["group"], row["linear"], row["expert"]))
    return rows


@dataclass(frozen=True)
class LinearFacts:
    """What a linear's experts come to."""

    layer: int
    linear: str
    num_experts: int
    largest: float
    """Share of the calibration tokens in the largest cluster."""
    smallest: float
    """Share in the smallest."""
    starved: int
    error: float
    """Lost output energy, weighted by tokens."""
    damping_fraction: float
    """The largest."""


def linear_facts(rows: list[dict[str, Any]]) -> list[LinearFacts]:
    """One for every linear of every block, from ``expert_rows``."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["layer"], row["linear"]].append(row)
    facts = []
    for (layer, linear), found in groups.items():
        tokens = [row["tokens"] for row in found]
        total = max(1, sum(tokens))
        facts.append(
            LinearFacts(
                layer,
                linear,
                len(found),
                max(tokens) / total,
                min(tokens) / total,
                sum(row["is_starved"] for row in found),
                sum(row["relative_error"] * row["tokens"] for row in found) / total,
                max(row["damping_fraction"] for row in found),
            )
        )
    return facts


def summary_rows(facts: list[LinearFacts]) -> list[tuple[str, ...]]:
    """The facts as cells, with a header."""
    header = ("layer, linear", "experts", "largest", "smallest", "starved", "error", "damping")
    return [
        header,
        *(
            (
                f"{one.layer:>3} {one.linear}",
                str(one.num_experts),
                f"{100 * one.largest:.1f} %",
                f"{100 * one.smallest:.2f} %",
                str(one.starved),
                f"{one.error:.4f}",
                f"{one.damping_fraction:g}",
            )
            for one in facts
        ),
    ]


def expert_summary(rows: list[dict[str, Any]]) -> str:
    """Per linear: token shares of the clusters, and the token-weighted error."""
    return table(summary_rows(linear_facts(rows)), header=True)


def neurons_table(
    summary: list[dict[str, Any]], correlations: dict[str, float], num_tokens: int
) -> str:
    """Medians by linear, and what the distance to the normal goes with."""
    names = [name for name in summary[0] if name not in ("layer", "linear", "neurons")]
    rows: list[tuple[str, ...]] = [("layer, linear", "neurons", *names)]
    rows += [
        (
            f"{row['layer']:>3} {row['linear']}",
            str(row["neurons"]),
            *(f"{row[name]:.4g}" for name in names),
        )
        for row in summary
    ]
    lines = [table(rows, header=True), "", f"medians over neurons, on {num_tokens} tokens"]
    lines += [
        f"rank correlation of wasserstein with {name} inside a linear, median: {value:+.3f}"
        for name, value in correlations.items()
    ]
    return "\n".join(lines)


def sweep_table(rows: list[dict[str, Any]], neuron: int | None) -> str:
    """The rows of ``sweep-clusters``."""
    of = "median neuron" if neuron is None else f"neuron {neuron}"
    cells: list[tuple[str, ...]] = [
        ("linear", "clusters", "made on", "error", f"error, {of}", "to a normal, inside clusters")
    ]
    cells += [
        (
            f"{row['layer']} {row['linear']}",
            str(row["num_clusters"]),
            row["clustering"],
            f"{row['error']:.5f}",
            f"{row['neuron_error']:.5f}",
            f"{row['wasserstein_clusters']:.4f}",
        )
        for row in rows
    ]
    return f"{table(cells, header=True)}\n\nshares of the outputs' energy, on held-out text"


def pruned_table(rows: list[dict[str, Any]], dense: float, num_tokens: int) -> str:
    """The rows of ``prune-neurons``: a line per ranking, a column per share."""
    shares = list(dict.fromkeys(row["share"] for row in rows))
    found = {(row["ranking"], row["share"]): row["perplexity"] for row in rows}
    cells: list[tuple[str, ...]] = [("ranking", *(f"{100 * share:g} %" for share in shares))]
    cells += [
        (ranking, *(f"{found[ranking, share]:.3f}" for share in shares))
        for ranking in dict.fromkeys(row["ranking"] for row in rows)
    ]
    return (
        f"{table(cells, header=True)}\n\nperplexity per token with so many of every linear's "
        f"neurons pruned; dense {dense:.3f}, on {num_tokens} tokens"
    )


def allocation_table(rows: list[dict[str, Any]]) -> str:
    """The rows of ``allocate``: a line per block."""
    tried = [name for name in rows[0] if name.startswith("error_")]
    more = [f"error {name.removeprefix('error_')}" for name in tried]
    cells = [("block", "gap", "sparsity", *more, *(["experts"] if tried else []))]
    for row in rows:
        line = [str(row["layer"]), f"{row['gap']:.5f}", f"{row['sparsity']:.3f}"]
        if tried:
            line += [*(f"{row[name]:.3f}" for name in tried), str(row["num_clusters"])]
        cells.append(tuple(line))
    return table(cells, header=True)


def gap_and_cost(metrics: dict[str, Any]) -> dict[str, float]:
    """What a finished run is judged by: see ``comparison``."""
    flops = metrics["mlp_flops_per_token"]
    dense, expanded = metrics["perplexity_dense"], metrics["perplexity_expanded"]
    return {
        "perplexity_dense": dense,
        "perplexity": expanded,
        "gap": math.log(expanded / dense),
        "cost": (flops["experts"] + flops["router"]) / flops["dense"],
    }


def comparison(stores: Sequence[Store]) -> list[dict[str, Any]]:
    """Finished runs beside each other: perplexity, and what a token and the files cost.

    ``gap`` is the difference to the dense model in log-perplexity (nats per token); ``cost`` the
    MLPs' and routers' operations per token, and ``bytes`` the weight files, as shares of the dense
    model's.

    Raises:
        ValueError: a folder has no finished `run` (with its evaluation).
    """
    rows = []
    for store in stores:
        if not store.exists(METRICS_FILE):
            raise ValueError(f"{store.root} holds no finished run: finish it with --resume")
        metrics = store.read_json(METRICS_FILE)
        if "perplexity_dense" not in metrics:
            raise ValueError(f"{store.root} was not evaluated: compare the folders of `run`")
        rows.append(
            {
                "name": store.root.rstrip("/").rpartition("/")[2],
                "setting": f"{describe_clusters(metrics['config']['routing'])}, "
                f"{describe_weights(metrics['config'])}",
                **gap_and_cost(metrics),
                "bytes": metrics["checkpoint_bytes"] / metrics["dense_checkpoint_bytes"],
            }
        )
    return rows


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """The rows of ``comparison`` for people."""
    cells: list[tuple[str, ...]] = [("run", "dense", "expanded", "gap", "operations", "bytes", "")]
    cells += [
        (
            row["name"],
            f"{row['perplexity_dense']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['gap']:.4f}",
            f"{row['cost']:.1%}",
            f"{row['bytes']:.1%}",
            row["setting"],
        )
        for row in rows
    ]
    return (
        f"{table(cells, header=True)}\n\nperplexities per token; gap in log-perplexity; operations "
        "of MLPs and routers per token and bytes of weight files as shares of the dense model's"
    )


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows with equal keys, turned into columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def write_table(columns: dict[str, list[Any]], path: str) -> None:
    """The columns as a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    stream = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    write_file(path, stream.getvalue())


def run_report(store: Store) -> tuple[dict[str, Any], str]:
    """What was asked, what came out, and what is missing, of a run folder.

    Raises:
        ValueError: the folder holds no run.
    """
    if not store.exists(RUN_FILE):
        raise ValueError(f"{store.root} holds no run: give the --output folder of one")
    identity = store.read_json(RUN_FILE)
    records = store.records()
    result: dict[str, Any] = {
        "model": identity["model"],
        "config": identity["config"],
        "is_finished": store.exists(METRICS_FILE),
        "finished_units": len(records),
    }
    if store.exists(COMMAND_FILE):
        result["command"] = store.read_json(COMMAND_FILE)["command"]
    config = identity["config"]
    lines = [
        f"model     {identity['model']}",
        f"asked     {describe_clusters(config['routing'])}, "
        f"{describe_weights(config)}, "
        f"{config['calibration']['calibration_inputs']} inputs",
    ]
    if "command" in result:
        lines.append(f"command   {result['command']}")
    if result["is_finished"]:
        result["metrics"] = store.read_json(METRICS_FILE)
        lines += ["", run_table(result["metrics"], store.root)]
    else:
        lines.append(f"state     unfinished, {len(records)} units done: continue with --resume")
    try:
        rows = expert_rows(store)
    except ValueError:
        rows = []
    if rows:
        result["experts"] = rows
        lines += ["", expert_summary(rows)]
    return result, "\n".join(lines)
