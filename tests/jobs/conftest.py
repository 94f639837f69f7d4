"""One finished run for all tests of this folder."""

import pytest

from sparse_expansion.cli import main
from tests.jobs.processes import arguments


@pytest.fixture(scope="session")
def finished(tmp_path_factory, neox_folder, text_folder):
    """The output folder of a run; tests that change something take a copy."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert main(arguments(neox_folder, text_folder, output)) == 0
    return output
