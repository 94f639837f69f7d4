"""The transformers plug-in: it registers the checkpoint format and builds expanded models.

Once this module is imported, ``AutoModelForCausalLM.from_pretrained`` loads every folder whose
``config.json`` has ``quantization_config.quant_method = "sparse_expansion"``. No other module
registers anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_expansion.config import CompressionConfig, RoutingConfig
from sparse_expansion.config.checks import has_form
from sparse_expansion.config.nearest import did_you_mean
from sparse_expansion.config.values import known_settings
from sparse_expansion.model.block_linears import numbered_groups
from sparse_expansion.model.expansion import (
    FLOAT32_TENSORS,
    GUARD_HINT,
    ExpandedLinear,
    check_dtype,
    expand_block,
    guard_name,
    guard_tensors,
)
from sparse_expansion.model.expert_cache import DEFAULT_CACHE_BYTES, ExpertCache
from sparse_expansion.model.families import LinearGroup, family_of
from sparse_expansion.model.plain_blocks import MixtureExperts, plain_blocks
from sparse_expansion.model.verification import verify_loaded

Settings = TypeVar("Settings", CompressionConfig, RoutingConfig)
QUANT_METHOD = "sparse_expansion"
FORMAT_VERSION = 4
READABLE_VERSIONS = (2, 3, 4)
"""Experts of version 2 have no biases of their own, and up to 3 no columns in another order
and no shares of zeros."""


@register_quantization_config(QUANT_METHOD)
class SparseExpansionConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an expanded model.

    Args:
        groups: the names of the linears in each linear group of a block.
        compression: ``CompressionConfig`` as a dictionary.
        routing: ``RoutingConfig`` as a dictionary.
        format_version: the version of the stored tensors, see ``docs/format.md``.
        expert_residency: ``compressed`` keeps experts packed and unpacks those in use into a
            bounded cache; ``dense`` keeps every expert that was ever unpacked.
        cache_bytes: the bound of that cache, in bytes.
        verify: whether to check the files against the manifest's digests before they are loaded,
            where there is a manifest. It is a loader's choice, and is not saved with a model.

    Raises:
        ValueError: the format version or the residency is unknown, a setting is of another form,
            or there is one that this version does not know.
    """

    def __init__(
        self,
        groups: list[list[str]] | None = None,
        compression: dict[str, Any] | None = None,
        routing: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        expert_residency: str = "compressed",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        verify: bool = True,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        """Check the version, the residency, and the form of the rest."""
        self.quant_method = quant_method
        if format_version not in READABLE_VERSIONS:
            raise ValueError(
                f"checkpoint format_version {format_version} is none of "
                f"{' and '.join(map(str, READABLE_VERSIONS))}: load it "
                "with the release of sparse-expansion that wrote it"
            )
        if expert_residency not in ("compressed", "dense"):
            raise ValueError(
                f"expert_residency {expert_residency!r} is neither 'compressed' nor 'dense'"
            )
        given = {
            "groups": (groups or [], [[str]]),
            "compression": (compression or {}, dict),
            "routing": (routing or {}, dict),
            "cache_bytes": (cache_bytes, int),
            "verify": (verify, bool),
        }
        wrong = [name for name, (value, form) in given.items() if not has_form(value, form)]
        for name in (*wrong, *sorted(unknown)):
            what = (
                "is of another form than it should be"
                if name in wrong
                else _what_it_is(name, given)
            )
            raise ValueError(
                f"quantization_config: {name!r} {what}: load the model with the release of "
                "sparse-expansion that wrote it, or download it again"
            )
        self.groups = groups or []
        self.compression = compression or {}
        self.routing = routing or {}
        self.format_version = format_version
        self.expert_residency = expert_residency
        self.cache_bytes = cache_bytes
        self.verify = verify

    def to_dict(self) -> dict[str, Any]:
        """What a saved model's ``config.json`` has: all but what is a loader's own affair."""
        return {key: value for key, value in super().to_dict().items() if key != "verify"}

    def compression_config(self) -> CompressionConfig:
        """The checked settings of pruning and quantization."""
        return self._checked(CompressionConfig, self.compression)

    def routing_config(self) -> RoutingConfig:
        """The checked settings of the routers."""
        return self._checked(RoutingConfig, self.routing)

    def _checked(self, kind: type[Settings], data: dict[str, Any]) -> Settings:
        try:
            return kind.from_dict(data)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"quantization_config is not one that this version knows ({error}): load it with "
                "the release of sparse-expansion that wrote it"
            ) from None


def _what_it_is(name: str, known: Iterable[str]) -> str:
    """What to say of an argument that the configuration does not have."""
    if name in known_settings():
        # This class describes a model that there is, and makes none.
        return f"is unknown, it is a setting of sparse_expansion.expand(..., {name}=...)"
    return f"is unknown{did_you_mean(name, [*known, 'format_version', 'expert_residency'])}"


def expand_model(
    model: nn.Module, config: SparseExpansionConfig, dtype: torch.dtype
) -> ExpertCache:
    """Replace the MLP linears of every block by empty expanded ones, in place.

    Returns:
        The cache that all experts of the model share.
    """
    family = family_of(model.config.model_type)  # type: ignore[union-attr, arg-type]
    cache = ExpertCache(None if config.expert_residency == "dense" else config.cache_bytes)
    compression, routing = config.compression_config(), config.routing_config()
    groups = tuple(LinearGroup(tuple(group)) for group in config.groups)
    for layer, block in enumerate(plain_blocks(model, family)):
        expand_block(
            block,
            tuple(group.linears for group in numbered_groups(block, family, groups)),
            compression.at(layer),
            routing.at(layer),
            cache=cache,
            dtype=dtype,
            shares=compression.shares_of_experts(layer),
        )
    return cache


@register_quantizer(QUANT_METHOD)
class SparseExpansionQuantizer(HfQuantizer):
    """Puts the expanded linears into a model before transformers loads its tensors."""

    requires_calibration = True
    quantization_config: SparseExpansionConfig
    _has_mixture = False
    _built_dtypes: dict[str, torch.dtype] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        dtype = kwargs.get("dtype") or model.config.dtype or torch.float32
        check_dtype(dtype)
        if self.quantization_config.verify:
            verify_loaded(kwargs.get("checkpoint_files"))
        # Routers and grids stay float32: a rounded centroid would send tokens to other experts
        # than those that were made for them.
        strict = getattr(model, "_keep_in_fp32_modules_strict", None) or set()
        model._keep_in_fp32_modules_strict = {*strict, *FLOAT32_TENSORS}
        linears = [name for group in self.quantization_config.groups for name in group]
        # A star is the number of an expert of a mixture.
        guards = [
            re.escape(guard_name("." + name)).replace(r"\*", r"\d+") + "$" for name in linears
        ]
        # None or a list in some versions of transformers, a set in others, and so when it is read.
        ignored = model._keys_to_ignore_on_load_unexpected
        ignored = [] if ignored is None else ignored
        model._keys_to_ignore_on_load_unexpected = type(ignored)(
            [*ignored, *guards, re.escape(GUARD_HINT)]
        )
        model.expert_cache = expand_model(model, self.quantization_config, dtype)
        for module in model.modules():
            self._has_mixture |= isinstance(module, MixtureExperts)
            if any(isinstance(child, ExpandedLinear) for child in module.children()):
                # All of it is in the files. Transformers would draw weights of GPT-2's MLP anew,
                # by names that are no longer there.
                module._is_hf_initialized = True
        self._built_dtypes = {name: each.dtype for name, each in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Give tensors that transformers has renamed the model's dtype.

        Before 5.21 it leaves them as they are in the files where a model is quantized, such as the
        head of a GPT-NeoX.
        """
        keep = {*(model._keep_in_fp32_modules or ()), *model._keep_in_fp32_modules_strict}
        for name, parameter in model.named_parameters():
            if not any(part in name for part in keep):
                parameter.data = parameter.data.to(self._built_dtypes.get(name, parameter.dtype))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """How names in the files become names in the model: experts of mixtures stay separate.

        Transformers gives the model too from 5.21 on.
        """
        if self._has_mixture:
            # All that is left of these is guards.
            weight_conversions = [
                one for one in weight_conversions if not isinstance(one, WeightConverter)
            ]
        found: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return found

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: the model's state and guards, see ``guard_tensors``."""
        linears = (name for name, part in model.named_modules() if isinstance(part, ExpandedLinear))
        state = model.state_dict()
        return {**state, **guard_tensors(linears, model.dtype)}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The state is the packed tensors themselves, so it can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top: gradients pass through the frozen experts."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model: experts are operators in one graph.

        A mixture's loop over those of its experts that have tokens is not.
        """
        return not self._has_mixture
