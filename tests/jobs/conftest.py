"""One finished run for all tests of this folder."""

import pytest

from sparse_expansion.cli import main
from tests.jobs.processes import arguments


@pytest.fixture(scope="session")
def finished(made_once, neox_folder, text_folder):
    """The output folder of a run; tests that change something take a copy."""

    def make(output):
        assert main(arguments(neox_folder, text_folder, output)) == 0

    return made_once("finished", make)
