"""``python -m sparse_expansion.cli``."""

import sys

from sparse_expansion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
