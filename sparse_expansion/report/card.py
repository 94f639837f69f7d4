"""``README.md`` of a checkpoint folder: the model card that model hubs show."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from sparse_expansion.messages import shown
from sparse_expansion.report.describe import (
    describe_calibration,
    describe_clusters,
    describe_weights,
)
from sparse_expansion.report.facts import model_name
from sparse_expansion.report.formatting import format_bytes


def model_card(metrics: dict[str, Any], source: str, *, is_hub_id: bool) -> str:
    """The card's metadata block, and what the model is.

    Args:
        metrics: the metrics of a finished run or expansion.
        source: hub id or path of the dense model.
        is_hub_id: whether it is the former, and may be linked.
    """
    environment = Environment(  # noqa: S701 - Markdown, not HTML
        autoescape=False, undefined=StrictUndefined, finalize=shown, keep_trailing_newline=True
    )
    template = files("sparse_expansion.report").joinpath("templates/card.md").read_text("utf-8")
    return environment.from_string(template).render(
        metadata=_metadata(metrics["config"], source, is_hub_id=is_hub_id).to_yaml(),
        name=model_name(source),
        facts=_facts(metrics),
        command=metrics["command"],
    )


def _metadata(config: dict[str, Any], source: str, *, is_hub_id: bool) -> ModelCardData:
    quantized = ["quantized"] if config["compression"]["bits"] is not None else []
    link = {"base_model": source, "base_model_relation": "quantized"} if is_hub_id else {}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse-expansion", "pruned", *quantized],
        **link,
    )


def _facts(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the card's table."""
    config = metrics["config"]
    calibration = config["calibration"]
    rows = [
        ("experts", describe_clusters(config["routing"])),
        ("weights", describe_weights(config)),
        (
            "calibrated on",
            describe_calibration(calibration, text=Path(calibration["dataset"]).name),
        ),
        (
            "weight files",
            f"{format_bytes(metrics['checkpoint_bytes'])} (dense "
            f"{format_bytes(metrics['dense_checkpoint_bytes'])})",
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
    if "mixtures" in metrics:
        mixtures = metrics["mixtures"]
        rows.append(
            (
                "experts of the mixture with too few tokens",
                f"{mixtures['starved']} of {mixtures['experts']}, "
                f"{mixtures['without_tokens']} without any",
            )
        )
    return rows
