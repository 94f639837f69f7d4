"""An expanded model that several tests only read."""

import pytest

from tests.model.running import expand


@pytest.fixture(scope="session")
def expanded(tmp_path_factory, neox_folder, text_folder):
    return expand(neox_folder, text_folder, tmp_path_factory.mktemp("expanded") / "m")
