"""Settings and findings of a run in words."""

from __future__ import annotations

from typing import Any

from sparse_expansion.config import RefinementConfig
from sparse_expansion.report.experts import ExpertCounts, MixtureCounts
from sparse_expansion.report.formatting import format_bytes


def describe_settings(config: dict[str, Any]) -> str:
    """What was asked of experts and weights: ``16 experts per linear, 50 % sparse``."""
    return f"{describe_clusters(config['routing'])}, {describe_weights(config)}"


def describe_asked(config: dict[str, Any]) -> str:
    """Experts, weights, and the inputs that they were calibrated on."""
    return f"{describe_settings(config)}, {config['calibration']['calibration_inputs']} inputs"


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
    text = _describe_sparsity(compression)
    # Runs made before there was a choice have no such setting.
    if compression.get("pruner", "sparsegpt") != "sparsegpt":
        text += f" ({compression['pruner']})"
    if compression["bits"] is not None:
        text += f", {compression['bits']} bits"
    epochs = RefinementConfig.from_dict(config.get("refinement", {})).finetune
    if epochs:
        text += f", trained {epochs} {'pass' if epochs == 1 else 'passes'}"
    return text


def _describe_sparsity(compression: dict[str, Any]) -> str:
    sparsity = compression["sparsity"]
    if sparsity["group"] is not None:
        return f"{sparsity['pruned']}:{sparsity['group']} sparse"
    text = f"{100 * sparsity['fraction']:g} % sparse"
    by_block = compression.get("layer_sparsity")
    # A name says that all blocks are alike, or are still to be measured.
    if by_block and not isinstance(by_block, str):
        least, most = f"{100 * min(by_block):.0f}", f"{100 * max(by_block):.0f}"
        text += f" (blocks {least} to {most} %)" if least != most else ""
    return text


def describe_calibration(calibration: dict[str, Any], *, text: str | None = None) -> str:
    """``128 x 2048 tokens of wikitext2, compressed inputs``.

    Args:
        calibration: the settings.
        text: what to call the text; None leaves it out.
    """
    of_text = "" if text is None else f" of {text}"
    # Runs made before there was a choice have no such setting.
    own = calibration.get("own_text", 0)
    if own:
        of_text += f" ({100 * own:g} % written by the model)"
    return (
        f"{calibration['dataset_size']} x {calibration['seqlen']} tokens{of_text}, "
        f"{calibration['calibration_inputs']} inputs"
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


def describe_starved(counts: ExpertCounts) -> str:
    """How many experts had too few tokens, and what was done about it."""
    return (
        f"{counts.starved} of {counts.experts} experts had too few tokens and use their whole "
        "group's Hessian"
    )


def describe_mixtures(counts: MixtureCounts) -> str:
    """How many experts of a mixture had too few tokens or none; empty where all had enough."""
    if not counts.starved:
        return ""
    text = f"{counts.starved} of the mixture's {counts.experts} experts had too few tokens in all"
    if counts.without_tokens:
        text += (
            f", {counts.without_tokens} of them none: their smallest weights were pruned; more "
            "windows (--dataset-size) may reach them"
        )
    return text


def describe_machine(metrics: dict[str, Any]) -> str:
    """What the run was done on, with which versions, and when; empty of runs that kept it not."""
    if "versions" not in metrics:
        return ""
    devices = ", ".join(metrics["devices"]) or "no work was left to do"
    peak = metrics["device_peak_memory_bytes"]
    if peak:
        devices += f" (peak {format_bytes(peak)} of its memory)"
    threads = metrics.get("unit_threads", ())
    if len(threads) > 1:
        devices += f" (with {' and '.join(map(str, threads))} threads: not one run's bytes)"
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    return f"{metrics['date']} on {devices}; {versions}"


def describe_gap(judged: dict[str, float]) -> str:
    """What the expanded model loses against the dense one.

    Args:
        judged: see ``comparison.gap_and_cost``.
    """
    relative = judged["perplexity"] / judged["perplexity_dense"] - 1
    return f"gap to the dense model {judged['gap']:.4f} nats per token ({relative:+.1%} perplexity)"
