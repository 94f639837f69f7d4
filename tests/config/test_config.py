"""Settings: what follows from them, and what earlier runs recorded of them."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch

from sparse_expansion.config import (
    CalibrationConfig,
    Cluster,
    CompressionConfig,
    ExecutionOptions,
    RefinementConfig,
    RoutingConfig,
    RunConfig,
    SparsityPattern,
    digest,
    format_size,
    parse_size,
)
from sparse_expansion.config.fields import settings_of
from sparse_expansion.config.values import RUN_SECTIONS, completed, plain_values, run_config

SECTIONS = (*RUN_SECTIONS, ExecutionOptions, Cluster)


@pytest.mark.parametrize(
    ("windows", "seqlen", "asked", "shards"),
    [
        (128, 2048, None, 4),
        (3, 2048, None, 3),
        (8192, 512, None, 32),
        (1025, 512, None, 5),
        (9, 4, 2, 2),
    ],
)
def test_shards_of_the_windows(windows, seqlen, asked, shards):
    config = CalibrationConfig(dataset_size=windows, seqlen=seqlen, data_shards=asked)
    assert config.num_shards == shards
    counts = [config.windows_of(shard) for shard in range(shards)]
    dealt = torch.empty(windows, 0).tensor_split(shards)
    assert counts == [len(part) for part in dealt]


def test_sizes():
    assert parse_size("2GiB") == 2 << 30
    assert parse_size("1.5 MB") == 1_500_000
    assert parse_size("7") == 7


@pytest.mark.parametrize("size", [0, 1, 1000, 1023, 2 << 30, 64 << 20, 10**9, 48 * 10**9, 1536])
def test_a_size_is_read_as_it_is_written(size):
    assert parse_size(format_size(size)) == size


def test_sizes_are_written_in_the_largest_unit_that_is_exact():
    assert [format_size(size) for size in (2 << 30, 10**9, 1536, 7)] == ["2GiB", "1GB", "1536", "7"]


def test_digests_do_not_change_unnoticed():
    assert digest(RunConfig().to_dict()) == "02a1ee6e3d78eb2f"
    config = RunConfig(
        compression=CompressionConfig(
            sparsity=SparsityPattern.parse("2:4"),
            bits=4,
            pruner="admm",
            damping_fraction=0.1,
            shrink_hessians=True,
        ),
        routing=RoutingConfig(pca_reduction_factor=None),
        calibration=CalibrationConfig(seqlen=512, calibration_inputs="sequential"),
    )
    assert digest(config.to_dict()) == "8ef3157257f27fdc"
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_of_earlier_runs_are_read():
    data = RunConfig().to_dict()
    data["compression"] |= {"allocation": "measured", "layer_sparsity": []}
    data["refinement"] = {"epochs": 2, "learning_rate": 0.1}
    del data["tf32"], data["products"]
    config = RunConfig.from_dict(data)
    assert config.compression.layer_sparsity == "measured"
    assert config.refinement == RefinementConfig(finetune=2, finetune_rate=0.1)
    assert config.tf32 is False and config.products == "float32"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_is_documented_in_one_sentence(section):
    known = settings_of(section)
    assert list(known) == [field.name for field in dataclasses.fields(section)]
    for spec in known.values():
        assert spec.help[0].isupper() and spec.help.endswith(".") and ". " not in spec.help
        assert "%" not in spec.help


@pytest.mark.parametrize("section", SECTIONS)
def test_no_default_stands_in_a_help_text(section):
    for spec in settings_of(section).values():
        assert "default" not in spec.help.lower()
        is_number = isinstance(spec.default, int | float) and not isinstance(spec.default, bool)
        if is_number:
            words = re.findall(r"[\w.:]+\b", spec.help)
            assert spec.show(spec.default) not in words, spec.help


def test_the_settings_need_the_standard_library_alone():
    code = """
import sys, types
package = types.ModuleType("sparse_expansion")
package.__path__ = [sys.argv[1]]
sys.modules["sparse_expansion"] = package
before = set(sys.modules)
import sparse_expansion.config
names = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(names - set(sys.stdlib_module_names)))
"""
    import sparse_expansion

    folder = sparse_expansion.__path__[0]
    done = subprocess.run(
        [sys.executable, "-c", code, folder], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "['sparse_expansion']"


@pytest.mark.parametrize(
    ("changes", "level", "is_routed", "weighs"),
    [
        ({}, 0, False, True),
        ({"pruner": "sparsegpt", "bits": 4}, 0, False, True),
        ({}, 1, False, False),
        ({}, 0, True, False),
        ({"weigh_outputs": False}, 0, False, False),
        ({"sparsity": SparsityPattern.parse("2:4")}, 0, False, False),
        ({"sparsity": SparsityPattern.parse("0"), "bits": 4}, 0, False, False),
        ({"pruner": "wanda"}, 0, False, False),
        ({"pruner": "magnitude"}, 0, False, False),
    ],
)
def test_outputs_are_weighed_where_errors_compete(changes, level, is_routed, weighs):
    config = CompressionConfig(**{"pruner": "admm", "weigh_outputs": True, **changes})
    assert config.weighs(level, is_routed=is_routed) is weighs


@pytest.mark.parametrize(("clusters", "has_biases"), [(1, False), (2, True)])
def test_one_expert_alone_has_no_bias(clusters, has_biases):
    values = completed({"preset": "best", "num_clusters": clusters})
    assert values["expert_biases"]
    assert run_config(values, seqlen=32).compression.expert_biases is has_biases


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        ({"quantize": True}, 128),
        ({"bits": 3}, 128),
        ({}, None),
        ({"group_size": "auto"}, None),
        ({"group_size": "row", "bits": 4}, None),
        ({"group_size": None, "bits": 4}, None),
        ({"group_size": 32, "bits": 4}, 32),
        ({"group_size": "32", "bits": 4}, 32),
        ({"preset": "paper", "bits": 4}, None),
    ],
)
def test_columns_share_a_scale_by_the_preset_where_weights_are_quantized(given, columns):
    config = run_config(completed(given), seqlen=32)
    assert config.compression.group_size == columns
    again = {**plain_values(config), "quantize": config.compression.bits is not None}
    assert run_config(completed(again), seqlen=32) == config
