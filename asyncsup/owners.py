"""Whose a file is: users and groups by name or by number."""

from __future__ import annotations

import errno
import os
import shutil

Owner = str | int


def give(path: str | os.PathLike[str], *, user: str | None = None, group: str | None = None) -> None:
    """Change the owner of a file, its group, or both.

    Raises:
        OSError: that is not allowed, or there is no such user or group (ENOENT; the message says so).
    """
    try:
        if user is not None:
            shutil.chown(path, user=_number(user))
        if group is not None:
            shutil.chown(path, group=_number(group))
    except LookupError as error:
        raise OSError(errno.ENOENT, str(error)) from None


def _number(name: str) -> Owner:
    return int(name) if name.isdecimal() else name
