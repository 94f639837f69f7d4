"""The results of the commands as text: a run, its experts, a profile, an evaluation, a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_expansion.report.comparison import gap_and_cost, size_of
from sparse_expansion.report.describe import (
    describe_asked,
    describe_calibration,
    describe_gap,
    describe_machine,
    describe_mixtures,
    describe_refinement,
    describe_settings,
    describe_starved,
)
from sparse_expansion.report.experts import ExpertCounts, LinearFacts, MixtureCounts
from sparse_expansion.report.facts import RunFacts
from sparse_expansion.report.formatting import format_bytes, format_duration, table


def report_text(facts: RunFacts) -> str:
    """What was asked of a run, what came out, and what is missing."""
    lines = [f"model     {facts.model}", f"asked     {describe_asked(facts.config)}"]
    if facts.command is not None:
        lines.append(f"command   {facts.command}")
    if facts.metrics is not None:
        lines += ["", run_table(facts.metrics, facts.root)]
    else:
        lines.append(
            f"state     unfinished, {facts.finished_units} units done: continue with --resume"
        )
    if facts.linears:
        lines += ["", expert_summary(facts.linears)]
    return "\n".join(lines)


def run_table(metrics: dict[str, Any], output: str | None) -> str:
    """The result of ``run`` and ``expand``.

    Args:
        metrics: the content of ``metrics.json``.
        output: where the model is; None where it was not kept.
    """
    rows = [("", "dense", "expanded")]
    if "perplexity_dense" in metrics:
        perplexities = (metrics["perplexity_dense"], metrics["perplexity_expanded"])
        rows.append(("perplexity (per token)", f"{perplexities[0]:.3f}", f"{perplexities[1]:.3f}"))
    sizes = (metrics["dense_checkpoint_bytes"], metrics["checkpoint_bytes"])
    rows.append(("checkpoint", format_bytes(sizes[0]), format_bytes(sizes[1])))
    lines = [table(rows, header=True), "", *_run_notes(metrics)]
    if output is not None:
        lines.append(f"saved in {output}")
    if "profile" in metrics:
        lines += ["", profile_table(metrics["profile"])]
    return "\n".join(lines)


def _run_notes(metrics: dict[str, Any]) -> list[str]:
    """What a run's numbers rest on, a line for each thing that there is to say."""
    config = metrics["config"]
    calibrated = describe_calibration(config["calibration"])
    lines = [f"{describe_settings(config)}; calibrated on {calibrated}"]
    if "num_eval_tokens" in metrics:
        lines.append(f"evaluated on {metrics['num_eval_tokens']} tokens")
        lines.append(describe_gap(gap_and_cost(metrics)))
    lines.append(f"weight files {size_of(metrics):.2f} times the dense model's")
    flops = metrics["mlp_flops_per_token"]
    lines.append(
        f"per token the MLPs take {flops['experts'] / flops['dense']:.1%} of the dense operations, "
        f"routers {flops['router'] / flops['dense']:.1%} more"
    )
    if "refinement" in metrics:
        lines.append(describe_refinement(metrics["refinement"]))
    counts = ExpertCounts.of_metrics(metrics)
    if counts.starved:
        lines.append(describe_starved(counts))
    mixtures = (
        describe_mixtures(MixtureCounts(**metrics["mixtures"])) if "mixtures" in metrics else ""
    )
    lines += [mixtures] if mixtures else []
    if counts.raised:
        lines.append(f"{counts.raised} experts needed more than the asked damping")
    seconds = "  ".join(f"{name} {value:.0f} s" for name, value in metrics["seconds"].items())
    lines.append(f"{seconds}  peak memory {format_bytes(metrics['peak_memory_bytes'])}")
    machine = describe_machine(metrics)
    return [*lines, machine] if machine else lines


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


def summary_rows(facts: Sequence[LinearFacts]) -> list[tuple[str, ...]]:
    """The facts of linears as cells, with a header."""
    header = (
        "layer, linear",
        "experts",
        "largest",
        "smallest",
        "zeros",
        "starved",
        "error",
        "damping",
    )
    return [
        header,
        *(
            (
                f"{one.layer:>3} {one.linear}",
                str(one.num_experts),
                f"{100 * one.largest_share:.1f} %",
                f"{100 * one.smallest_share:.2f} %",
                _zeros(one.zeros),
                str(one.starved),
                f"{one.error:.4f}",
                f"{one.damping_fraction:g}",
            )
            for one in facts
        ),
    ]


def _zeros(bounds: tuple[float, float] | None) -> str:
    """Shares of zeros as a cell."""
    if bounds is None:
        return ""
    least, most = (f"{100 * share:.0f}" for share in bounds)
    return f"{least} %" if least == most else f"{least} to {most} %"


def expert_summary(facts: Sequence[LinearFacts]) -> str:
    """For every linear: token shares of its clusters, and its token-weighted error."""
    return table(summary_rows(facts), header=True)


def evaluation_table(result: dict[str, Any]) -> str:
    """The result of ``evaluate``."""
    kind = "expanded" if result["is_expanded"] else "dense"
    routed = result.get("routed", {})
    rows = [
        ("model", f"{result['model']} ({kind})"),
        ("perplexity (per token)", f"{result['perplexity']:.3f}"),
        ("windows", f"{result['num_windows']} x {result['seqlen']} tokens"),
        ("scored tokens", str(result["num_eval_tokens"])),
        ("seconds", f"{result['seconds']:.1f}"),
    ]
    if "used_experts" in routed:
        rows.append(("experts in use", f"as if {routed['used_experts']:.1f} took equal shares"))
    if "kept_share" in routed:
        rows.append(("weights per token", f"{routed['kept_share']:.1%} of the dense MLPs'"))
    if "thin_share" in routed:
        rows.append(
            (
                "tokens of thin experts",
                f"{routed['thin_share']:.1%} (made on fewer tokens than inputs have features)",
            )
        )
    text = table(rows)
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
        ("dense checkpoint", format_bytes(result["dense_checkpoint_bytes"])),
        ("expanded checkpoint", format_bytes(result["checkpoint_bytes"])),
        ("disk for the run", format_bytes(result["disk_bytes"])),
    ]
    rows += [
        (f"memory: {name.replace('_', ' ')}", format_bytes(value))
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
            f"{format_duration(result['hours'])} on {result['num_workers']} worker(s), "
            f"{result['utilisation']:.0%} busy",
        )
    )
    if result["cost"] is not None:
        rows.append(("cost", f"{result['cost']:.2f}"))
    return f"{table(rows)}\n\n{result['verdict']['text']}"
