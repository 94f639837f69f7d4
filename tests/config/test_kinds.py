"""Settings that are made by hand mean what flags mean, and answer values of other kinds."""

import dataclasses

import numpy as np
import pytest

from sparse_expansion.config import (
    CalibrationConfig,
    Cluster,
    CompressionConfig,
    ExecutionOptions,
    RoutingConfig,
    SparsityPattern,
    TextOptions,
)
from sparse_expansion.config.fields import settings_of
from sparse_expansion.config.values import RUN_SECTIONS

SECTIONS = (*RUN_SECTIONS, TextOptions, ExecutionOptions, Cluster)
FIELDS = [
    pytest.param(section, name, id=f"{section.__name__}.{name}")
    for section in SECTIONS
    for name in settings_of(section)
]


@pytest.mark.parametrize(("section", "name"), FIELDS)
@pytest.mark.parametrize("value", [object(), {}, b"1"])
def test_value_of_another_kind_is_named(section, name, value):
    with pytest.raises(ValueError, match=rf"\b{name} .+"):
        section(**{name: value})


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_none_is_taken_where_a_setting_may_be_left_open(section, name):
    if settings_of(section)[name].optional:
        assert getattr(section(**{name: None}), name) is None
    else:
        with pytest.raises(ValueError, match=rf"\b{name} None"):
            section(**{name: None})


@pytest.mark.parametrize("section", SECTIONS)
def test_defaults_are_of_their_kinds(section):
    made = section()
    for name, spec in settings_of(section).items():
        assert getattr(made, name) == spec.default
    assert dataclasses.replace(made) == made


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        ("2:4", SparsityPattern(fraction=0.5, pruned=2, group=4)),
        ((2, 4), SparsityPattern(fraction=0.5, pruned=2, group=4)),
        ("0.7", SparsityPattern(fraction=0.7)),
        (0.7, SparsityPattern(fraction=0.7)),
        (0, SparsityPattern(fraction=0.0)),
        (np.float64(0.25), SparsityPattern(fraction=0.25)),
        (np.float32(0.25), SparsityPattern(fraction=0.25)),
    ],
)
def test_sparsity_by_hand(value, pattern):
    assert CompressionConfig(sparsity=value).sparsity == pattern


@pytest.mark.parametrize(("bits", "size"), [(None, None), (4, 128)])
def test_group_size_that_is_left_to_the_program(bits, size):
    assert CompressionConfig(group_size="auto", bits=bits).group_size == size


def test_group_size_by_its_text():
    assert CompressionConfig(group_size="64").group_size == 64
    assert CompressionConfig(group_size="row", bits=4).group_size is None


def test_the_whole_text_by_hand():
    assert CalibrationConfig(dataset_size="all").whole_text
    assert CalibrationConfig(dataset_size="12") == CalibrationConfig(dataset_size=12)


def test_numbers_of_numpy_become_plain_ones():
    config = CompressionConfig(bits=np.int64(4), damping_fraction=np.float32(0.5))
    assert type(config.bits) is int
    assert type(config.damping_fraction) is float


def test_numbers_that_are_made_already_are_not_read_as_texts():
    # --tflops 15 is 15e12; a number in the field is in operations per second already.
    assert Cluster(flops_per_second=10**12).flops_per_second == 1e12
    assert Cluster(flops_per_second="1").flops_per_second == 1e12


def test_paths_and_lists(tmp_path):
    assert ExecutionOptions(scratch=tmp_path).scratch == str(tmp_path)
    assert RoutingConfig(layer_clusters=[4, 16]).layer_clusters == (4, 16)
