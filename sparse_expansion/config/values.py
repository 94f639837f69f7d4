"""Settings made from plain values by name, wherever these come from: flags, keywords, or a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sparse_expansion.config.calibration import ALL_WINDOWS, CalibrationConfig
from sparse_expansion.config.checks import require
from sparse_expansion.config.compression import (
    AUTO,
    QUANTIZED_BITS,
    UNIFORM,
    CompressionConfig,
)
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.fields import Setting, settings_of
from sparse_expansion.config.kinds import checked_choice, checked_value, of_kind
from sparse_expansion.config.nearest import did_you_mean
from sparse_expansion.config.presets import DEFAULT_PRESET, PRESETS, not_given
from sparse_expansion.config.routing import RoutingConfig
from sparse_expansion.config.run import RefinementConfig, RunConfig
from sparse_expansion.config.text import TextOptions

RUN_SECTIONS = (CompressionConfig, RoutingConfig, CalibrationConfig, RefinementConfig, RunConfig)
"""The classes of the settings that decide what a run computes."""
SWITCHES = ("preset", "quantize", "no_pca")
"""Names that stand for values of other settings."""


def field_values(section: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a settings class's fields that are among ``values``, by name.

    Raises:
        ValueError: a text does not parse.
    """
    found = {}
    for name, spec in settings_of(section).items():
        if spec.flag and name in values:
            value = values[name]
            is_text = spec.parse is not None and isinstance(value, str)
            found[name] = spec.parse(value) if spec.parse and is_text else value
    return found


def run_config(values: Mapping[str, Any], seqlen: int) -> RunConfig:
    """Settings of a run.

    Args:
        values: of all fields, and of the switches.
        seqlen: tokens in a window, where the default depends on the model.

    Raises:
        ValueError: a value is out of bounds, or values contradict each other.
    """
    compression = field_values(CompressionConfig, values)
    bits = values["bits"]
    if bits is not None and not values["quantize"]:
        raise ValueError(f"--bits {bits} needs --quantize: add it, or drop --bits")
    for name in ("group_size", "symmetric"):
        if compression[name] and compression[name] != AUTO and not values["quantize"]:
            flag = settings_of(CompressionConfig)[name].flag
            raise ValueError(f"{flag} needs --quantize: add it, or drop {flag}")
    if values["quantize"] and bits is None:
        compression["bits"] = QUANTIZED_BITS
    if compression["sparsity"].group is not None and isinstance(compression["layer_sparsity"], str):
        # N:M leaves no choice, so that nothing is measured.
        compression["layer_sparsity"] = UNIFORM
    routing = routing_config(values)
    if compression["sparsity"].group is not None or routing.clustering == "random":
        # Random clusters are alike.
        compression["expert_sparsity"] = UNIFORM
    if routing.most_clusters == 1:
        # A plain sparse model stays one: without biases of its own, N:M to whom it is exported to.
        compression |= {"expert_biases": False, "permute_channels": False}
        compression["expert_sparsity"] = UNIFORM
    calibration = field_values(CalibrationConfig, values)
    calibration["seqlen"] = seqlen
    return RunConfig(
        compression=CompressionConfig(**compression),
        routing=routing,
        calibration=CalibrationConfig(**calibration),
        refinement=RefinementConfig(**field_values(RefinementConfig, values)),
        **field_values(RunConfig, values),
    )


def routing_config(values: Mapping[str, Any], **changes: Any) -> RoutingConfig:
    """Settings of the routers.

    Args:
        values: of all fields, and of the switches.
        changes: to them.

    Raises:
        ValueError: a value is out of bounds.
    """
    found = field_values(RoutingConfig, values) | changes
    found["fit_tokens"] = max(found["fit_tokens"], 1)
    if values["no_pca"]:
        found["pca_reduction_factor"] = None
    return RoutingConfig(**found)


def plain_values(config: RunConfig) -> dict[str, Any]:
    """The values, by name, of which ``run_config`` makes these settings again.

    Values are those of plain files: texts, numbers, truth values, lists of numbers, and None.
    """
    found: dict[str, Any] = {}
    sections: tuple[Any, ...] = (
        config.compression,
        config.routing,
        config.calibration,
        config.refinement,
        config,
    )
    for kind, section in zip(RUN_SECTIONS, sections, strict=True):
        for name, spec in settings_of(kind).items():
            if spec.flag:
                found[name] = _plain(getattr(section, name))
    if config.calibration.whole_text:
        found["dataset_size"] = ALL_WINDOWS
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    # A pattern of sparsity: all digits of its share, which its text rounds.
    group, fraction = getattr(value, "group", None), getattr(value, "fraction", None)
    if fraction is None:
        return value
    return str(value) if group is not None else fraction


def known_settings() -> dict[str, Setting]:
    """The settings of a run, and of where it runs, by name."""
    return {
        name: spec
        for section in (*RUN_SECTIONS, TextOptions, ExecutionOptions)
        for name, spec in settings_of(section).items()
        if spec.flag
    }


def check_names(given: Iterable[str], known: Collection[str], others: Iterable[str] = ()) -> None:
    """Answer a name that was mistyped.

    Args:
        given: names of settings.
        known: names that are allowed.
        others: names that the caller has taken already, for the hint.

    Raises:
        ValueError: one is not known.
    """
    for name in given:
        hint = did_you_mean(name, [*known, *others])
        require(name in known, f"setting {name!r} is unknown{hint}")


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all settings of a run, and of where it runs, from those that were given.

    Explicit values override the preset, which overrides the pruner's defaults, which override the
    fields' own. The number of tokens in a window is None where it was not given.

    Args:
        given: by name of the field, all known; ``preset``, ``quantize`` and ``no_pca`` count too.

    Raises:
        ValueError: a value is of another kind.
    """
    known = known_settings()
    preset = checked_choice("preset", given.get("preset", DEFAULT_PRESET), PRESETS)
    found = {
        name: checked_value(spec, name, given[name])
        for name, spec in known.items()
        if name in given
    }
    pruner = found.get("pruner", PRESETS[preset].get("pruner", CompressionConfig.pruner))
    for name, spec in known.items():
        if name not in found:
            default = None if name == "seqlen" else spec.default
            found[name] = not_given(name, default, PRESETS[preset], pruner)
    # Bits that are named are asked for.
    switches = {"quantize": found["bits"] is not None, "no_pca": False}
    for name, default in switches.items():
        found[name] = of_kind(bool, name, given.get(name, default))
    return found
