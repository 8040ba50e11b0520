"""Putting something where a program may put something else at any moment, without losing what it puts."""

from __future__ import annotations

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
