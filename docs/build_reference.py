"""Build the reference of all modules as HTML: python docs/build_reference.py DIR."""

import pkgutil
import sys
from pathlib import Path

import pdoc

import sparse_expansion


def main() -> None:
    """Build it."""
    # The package exports a few names; a reader of the reference looks for its rooms.
    rooms = [
        found.name for found in pkgutil.iter_modules(sparse_expansion.__path__, "sparse_expansion.")
    ]
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("sparse_expansion", *rooms, output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
