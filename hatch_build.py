"""What a built package says of the project: its description and its addresses.

The README links to files beside it, which the package index does not have. Where the environment
names the repository's address (SPARSE_EXPANSION_REPOSITORY, which the workflow in .github sets),
those links lead there, to the tag of the version that is built. Without it they stay as they are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

REPOSITORY = "SPARSE_EXPANSION_REPOSITORY"
PAPER = "https://arxiv.org/abs/2405.15756"
_LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!\w+:|#)([^)\s]+)\)")


class ProjectMetadata(MetadataHookInterface):
    """Fills in the fields that pyproject.toml calls dynamic, but for the version."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add description and addresses to what pyproject.toml says."""
        repository = os.environ.get(REPOSITORY, "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute_links(text, repository, metadata["version"]) if repository else text,
        }
        metadata["urls"] = urls(repository, metadata["version"])


def absolute_links(text: str, repository: str, version: str) -> str:
    """The text, whose links to files lead to the version's tag in the repository."""

    def absolute(link: re.Match[str]) -> str:
        is_image, label, target = link.groups()
        view = "raw" if is_image else "blob"
        return f"{is_image}{label}({repository}/{view}/v{version}/{target})"

    return _LINK.sub(absolute, text)


def urls(repository: str, version: str) -> dict[str, str]:
    """The project's addresses; the paper's alone where no repository is named."""
    if not repository:
        return {"Paper": PAPER}
    return {
        "Repository": repository,
        "Documentation": f"{repository}/tree/v{version}/docs",
        "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
        "Paper": PAPER,
    }
