"""Which units are still to be done."""

from sparse_expansion.config import CalibrationConfig, RoutingConfig, RunConfig
from sparse_expansion.planning.expansion import expansion_units
from sparse_expansion.planning.resume import needed_units
from sparse_expansion.planning.shapes import GroupShape, ModelShape


def test_needed_units_skip_what_is_finished():
    shape = ModelShape(3, 8, (GroupShape("a", 8, 16), GroupShape("b", 16, 8, level=1)))
    config = RunConfig(routing=RoutingConfig(num_clusters=4))
    units = expansion_units(config, shape)
    assert len({unit.key for unit in units}) == len(units)
    keys = {unit.key for unit in units}
    for unit in units:
        assert {source for source, _ in unit.inputs} | set(unit.after) <= keys
    assert needed_units(units, lambda unit: False) == units
    assert needed_units(units, lambda unit: unit.is_persistent) == []
    # Blocks 0 and 1 done, with the hidden states before block 2 on disk.
    left = needed_units(units, lambda unit: unit.is_persistent and unit.layer < 2)
    assert {unit.layer for unit in left} == {2}
    # One range of experts of the last block missing: its block's capture, but no other block.
    missing = next(unit for unit in units if unit.layer == 2 and unit.stage == "experts")
    left = needed_units(units, lambda unit: unit.is_persistent and unit is not missing)
    stages = {unit.stage for unit in left}
    assert stages == {"capture", "router", "gather", "experts"}
    assert {unit.layer for unit in left} == {2}
    # The same with a second group that waits for the first: its inputs are captured once more.
    calibration = CalibrationConfig(calibration_inputs="sequential")
    config = RunConfig(routing=RoutingConfig(num_clusters=4), calibration=calibration)
    units = expansion_units(config, shape)
    assert needed_units(units, lambda unit: False) == units
    experts = [unit for unit in units if unit.layer == 2 and unit.stage == "experts"]
    for missing, wanted in ((experts[0], stages), (experts[-1], stages | {"recapture"})):
        left = needed_units(units, lambda unit, out=missing: unit.is_persistent and unit is not out)
        assert {unit.stage for unit in left} == wanted
        assert {unit.layer for unit in left} == {2}
