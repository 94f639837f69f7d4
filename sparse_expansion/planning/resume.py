"""Which units of a graph are still to be done, and which of them make the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sparse_expansion.units import Unit
from sparse_expansion.work.registry import stage_of


def final_stages(units: Iterable[Unit]) -> set[str]:
    """Stages whose files are the result: experts that are trained afterwards are drafts."""
    stages = [stage_of(name) for name in {unit.stage for unit in units}]
    return {one.name for one in stages if one.is_final} - {one.replaces for one in stages}


def needed_units(units: Iterable[Unit], is_committed: Callable[[Unit], bool]) -> list[Unit]:
    """The units still to be done, in the given order.

    A finished unit with files is left out unless a value it hands on (which is not on disk) is
    needed; hidden states between finished blocks are not made again.

    Args:
        units: a whole graph.
        is_committed: whether a unit's files are there and intact; asked once per persistent unit.
    """
    by_key = {unit.key: unit for unit in units}
    committed: dict[str, bool] = {}

    def is_done(unit: Unit) -> bool:
        if unit.key not in committed:
            committed[unit.key] = unit.is_persistent and is_committed(unit)
        return committed[unit.key]

    consumed = {key for unit in by_key.values() for key, _ in unit.inputs}
    consumed |= {key for unit in by_key.values() for key in unit.after}
    final = final_stages(by_key.values())
    goals = [unit for unit in by_key.values() if unit.stage in final or unit.key not in consumed]
    needed: set[str] = set()
    stack = [unit.key for unit in goals if not is_done(unit)]
    while stack:
        key = stack.pop()
        if key in needed:
            continue
        needed.add(key)
        unit = by_key[key]
        stack += [source for source, _ in unit.inputs]
        stack += [source for source in unit.after if not is_done(by_key[source])]
    return [unit for unit in by_key.values() if unit.key in needed]
