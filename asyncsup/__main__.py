"""``python -m asyncsup``."""

from __future__ import annotations

import sys

from asyncsup.cli import main

if __name__ == "__main__":
    sys.exit(main())
