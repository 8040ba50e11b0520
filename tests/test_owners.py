"""Whose a file is, by name and by number, as root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asyncsup import owners

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


@pytest.mark.parametrize("user", ["nobody", "65534"])
def test_names_and_numbers(tmp_path: Path, user: str) -> None:
    owners.give(tmp_path, user=user, group="0")
    assert (tmp_path.stat().st_uid, tmp_path.stat().st_gid) == (65534, 0)
    owners.give(tmp_path)
    assert tmp_path.stat().st_uid == 65534


def test_whoever_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nobody-of-that-name"):
        owners.give(tmp_path, user="nobody-of-that-name")
