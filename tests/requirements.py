"""What tests need besides Python: where it is missing they are skipped, but not in CI.

`.ci/run` installs all of it, so in CI (where the variable ``CI`` is set) its absence is a failure: otherwise
nobody would notice that a test is not run any more.
"""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def not_here(reason: str) -> NoReturn:
    """Skip the test for want of something that `.ci/run` installs; in CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and .ci/run should have installed it")
    pytest.skip(reason)


def require_program(name: str, *, path: str | None = None) -> str:
    """Where a program is that `.ci/run` installs.

    Args:
        path: where to search for it; by default ``PATH``.
    """
    found = shutil.which(name, path=path)
    if found is None:
        not_here(f"there is no {name} here")
    return found
