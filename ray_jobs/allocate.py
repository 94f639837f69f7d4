"""`sparse-expansion allocate` as a Ray job: `ray job submit ... python ray_jobs/allocate.py`."""

from __future__ import annotations

import sys
from pathlib import Path

# The uploaded working directory need not be installed on the cluster.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ray_jobs._entry import job  # noqa: E402

if __name__ == "__main__":
    sys.exit(job("allocate"))
