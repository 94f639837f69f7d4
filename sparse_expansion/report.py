"""Results as text: tables of a run, of its experts, of a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_expansion.store import COMMAND_FILE, METRICS_FILE, RUN_FILE, Store

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
    sparsity = describe_compression(config["compression"])
    calibration = config["calibration"]
    lines.append(
        f"{config['routing']['num_clusters']} experts per linear, {sparsity}; calibrated on "
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
        ("experts per linear", str(config["routing"]["num_clusters"])),
        ("weights", describe_compression(config["compression"])),
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


def describe_compression(compression: dict[str, Any]) -> str:
    """``50 % sparse, 4 bits``."""
    sparsity = compression["sparsity"]
    if sparsity["group"] is not None:
        text = f"{sparsity['pruned']}:{sparsity['group']} sparse"
    else:
        text = f"{100 * sparsity['fraction']:g} % sparse"
    if compression["bits"] is not None:
        text += f", {compression['bits']} bits"
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
        f"rank correlation of wasserstein with {name}: {value:+.3f}"
        for name, value in correlations.items()
    ]
    return "\n".join(lines)


def write_table(columns: dict[str, list[Any]], path: str) -> None:
    """The columns as a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


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
        f"asked     {config['routing']['num_clusters']} experts, "
        f"{describe_compression(config['compression'])}, "
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
