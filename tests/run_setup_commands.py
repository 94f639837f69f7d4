"""Run a cluster file's set-up commands for real, with a home of their own: `make cluster-setup`.

    python tests/run_setup_commands.py cluster.yaml

What is mounted on a machine (`file_mounts`) is linked into that home first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml


def main(name: str) -> None:
    """Stop at the first command that fails."""
    path = Path(name).resolve()
    config = yaml.safe_load(path.read_text())
    with tempfile.TemporaryDirectory(prefix="cluster-home-") as home:
        for target, source in config["file_mounts"].items():
            here = (path.parent / Path(source).expanduser()).resolve()
            if here.is_dir():
                (Path(home) / target.removeprefix("~/")).symlink_to(here)
        for command in config["setup_commands"]:
            print(f"$ {command}", flush=True)
            subprocess.run(
                ["bash", "-c", command], env={**os.environ, "HOME": home}, cwd=home, check=True
            )


if __name__ == "__main__":
    main(sys.argv[1])
