"""What a job gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_expansion.run_files import METRICS_FILE, SETTINGS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Result:
    """Figures of a finished job, and the folder of its model."""

    metrics: dict[str, Any]
    """What ``metrics.json`` and ``--json`` have."""
    folder: str | None
    """Folder or URL of the model; None where it was in memory and no folder was made."""
    _kept: Any = field(default=None, repr=False, compare=False)
    """A folder that is deleted once nobody has the result any more."""

    @property
    def paths(self) -> dict[str, str]:
        """Where things are: the model's folder, and those of metrics, settings and card there."""
        if self.folder is None:
            return {}
        names = {"metrics": METRICS_FILE, "settings": SETTINGS_FILE, "card": "README.md"}
        found = {"model": self.folder}
        for key, name in names.items():
            path = f"{self.folder}/{name}"
            if "://" in path or Path(path).exists():
                found[key] = path
        return found

    def load(self, **options: Any) -> PreTrainedModel:
        """The model, loaded by transformers.

        Args:
            options: of ``AutoModelForCausalLM.from_pretrained``.

        Raises:
            ValueError: it lies in no local folder.
        """
        if self.folder is None or "://" in self.folder:
            where = "was in memory" if self.folder is None else f"lies at {self.folder}"
            raise ValueError(f"the model {where}: only what is in a local folder can be loaded")
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, **options)
