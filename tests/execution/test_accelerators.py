"""Machines of one type of accelerator, without a Ray: what counts, and what actors ask for."""

import pytest

from sparse_expansion.config import ExecutionOptions
from sparse_expansion.execution.ray.executor import resources_of, sized_pool
from sparse_expansion.work.spec import WorkerSpec

NODES = [
    {"Alive": True, "Resources": {"CPU": 4.0}},
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0}},
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0, "accelerator_type:mine": 1.0}},
    {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0}},
]


def pool(nodes, **options):
    options = ExecutionOptions(executor="ray", **options)
    spec = WorkerSpec(store="s", source=None)
    return sized_pool(spec, options, resources_of(nodes, options.accelerator_type))


def test_machines_of_one_type_are_counted_and_asked_for():
    found = pool(NODES, accelerator_type="H100")
    assert (found.num_workers, found.options["num_gpus"]) == (2, 1.0)
    assert found.options["accelerator_type"] == "H100"
    assert found.room == "1 GPU of type H100 and 4 CPU"
    # A name that only this cluster knows.
    assert pool(NODES, accelerator_type="mine").num_workers == 4
    every = pool(NODES)
    assert every.num_workers == 6 and "accelerator_type" not in every.options


def test_machines_that_are_still_to_come():
    found = pool(NODES, accelerator_type="A100", num_workers=3, cpus_per_worker=2)
    assert (found.num_workers, found.options["num_gpus"]) == (3, 1.0)
    with pytest.raises(ValueError, match="has no workers with A100 yet: say how many"):
        pool(NODES, accelerator_type="A100")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("h100", "did you mean H100"), ("A10", "did you mean A10G"), ("banana", "e.g. H100")],
)
def test_a_name_that_nobody_knows(name, hint):
    with pytest.raises(ValueError, match=f"--accelerator-type {name}: neither Ray.*{hint}"):
        pool(NODES, accelerator_type=name, num_workers=1)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="--accelerator-type needs --executor ray"):
        ExecutionOptions(accelerator_type="H100")
    with pytest.raises(ValueError, match="--accelerator-type H100 is a GPU"):
        ExecutionOptions(executor="ray", device="cpu", accelerator_type="H100")
