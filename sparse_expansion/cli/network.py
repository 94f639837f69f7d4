"""The hub's client where there is no network."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

_HUB_ADDRESS = "https://huggingface.co"


def spare_retries(dataset: str | None) -> None:
    """Have the client read its cache alone where the hub's name cannot be looked up.

    It would try again for half a minute, time after time, before it says so. It reads the setting
    when it is imported: this comes before.

    Args:
        dataset: of a command; None where it has none.

    Raises:
        ValueError: see ``weighted_sources``.
    """
    if dataset is None:
        return
    from sparse_expansion.data.names import needs_hub

    # A proxy looks names up itself.
    if not needs_hub(dataset) or {"http", "https", "all"} & set(getproxies()):
        return
    try:
        socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT") or _HUB_ADDRESS).hostname, 443)
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
