"""Putting something where a program may put something else at any moment, or taking it away from there,
without losing what the program puts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from asyncsup.failpoints import failpoint
from asyncsup.patch import fs


def put(name: str, temporary: str, folder: int, expected: Callable[[os.stat_result], bool]) -> bool:
    """Swap `temporary` and `name`, provided that what stands under `name` is what is `expected`.

    Swapping first and looking afterwards is the only order without a gap. What comes out unexpectedly was put
    there a moment ago and goes back at once; should something newer have taken its place by then, that comes
    out in its turn and goes back, and so on: in the end the newest stands under `name`.

    Returns whether ours stands there. What is left under `temporary` is not needed any more.
    """
    placed = os.stat(temporary, dir_fd=folder, follow_symlinks=False)
    ours = True
    while True:
        try:
            fs.exchange(temporary, name, first_dir=folder, second_dir=folder)
        except FileNotFoundError:
            return False  # The program has removed it: so be it.
        failpoint("store.adopt.swapped")
        out = os.stat(temporary, dir_fd=folder, follow_symlinks=False)
        if expected(out):
            return ours
        expected, placed, ours = same_as(placed), out, False


def same_as(status: os.stat_result) -> Callable[[os.stat_result], bool]:
    return lambda other: os.path.samestat(other, status)


def take_away(name: str, temporary: str, folder: int, expected: Callable[[str], bool]) -> bool:
    """Remove `name`, provided that it is `expected` (which is asked about a name in the folder).

    It is moved to `temporary` and looked at there, where nobody puts anything else. What comes away
    unexpectedly was put there a moment ago and goes back at once, unless something newer has the name by
    then. To be called again after a crash, with the same `temporary`.

    Returns whether it was removed.
    """
    if fs.lstat(temporary, folder) is not None:
        _judge(name, temporary, folder, expected)
    if not expected(name):
        return False
    try:
        os.rename(name, temporary, src_dir_fd=folder, dst_dir_fd=folder)
    except FileNotFoundError:
        return False
    failpoint("store.unlink.taken")
    return _judge(name, temporary, folder, expected)


def _judge(name: str, temporary: str, folder: int, expected: Callable[[str], bool]) -> bool:
    if expected(temporary):
        os.unlink(temporary, dir_fd=folder)
        return True
    try:
        fs.rename_new(temporary, name, folder)
    except FileExistsError:
        # A folder stays, for `asyncsup doctor` to point at.
        with contextlib.suppress(IsADirectoryError):
            os.unlink(temporary, dir_fd=folder)
    return False
