"""The pointer: ``current -> sets/43``, and the sets it can point at.

One rename of ``current`` moves any number of targets from one generation to another. What it says is the
truth about which files a target has; the database only confirms it. The order of syncs makes sure that
whatever survives a power cut is one set or the other, and that the set is complete::

    sets/44.new/*       the links of the next set          fsync(sets/44.new)
    sets/44.new -> 44   under its name                     fsync(sets)
    next                a link to it                       fsync(.)
    next -> current     THE commit                         fsync(.)
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from asyncsup.errors import StateError
from asyncsup.failpoints import failpoint
from asyncsup.patch import fs

CURRENT: Final = "current"
NEXT: Final = "next"
SETS: Final = "sets"

_SET: Final = re.compile(rf"{SETS}/[0-9]+")

KEPT_SETS: Final = 8
"""A lookup that has read `current` just before a flip still has to find the set it read."""


class Pointer:
    """Reads and moves the pointer of one state directory.

    Args:
        fd: a descriptor of the state directory; stays the caller's.
    """

    def __init__(self, state: Path, fd: int) -> None:
        self._lock = threading.Lock()
        """One move at a time. Reading needs none, so that a disk that hangs holds up nobody who asks."""
        self._state = state
        self._fd = fd

    def number(self) -> int | None:
        """The number of the current set; None when there has never been one.

        Raises:
            StateError: the pointer is no link to a set that exists.
        """
        if fs.lstat(CURRENT, self._fd) is None:
            return None
        text = fs.link_text(CURRENT, self._fd) or ""
        folder, _, number = text.partition("/")
        if folder != SETS or not number.isdecimal() or not (self._state / text).is_dir():
            raise StateError(
                f"{self._state / CURRENT} does not point at a set of generations (it says {text!r})",
                code="state.pointer",
            )
        return int(number)

    def is_new(self) -> bool:
        """Whether it has never been set: not a single set was ever made."""
        with fs.opened(self._state / SETS) as fd:
            return not any(name.isdecimal() for name in fs.names(fd))

    def entries(self) -> dict[str, str]:
        """Every target's link in the current set, as its text; empty when there is no set yet.

        Raises:
            StateError: the pointer, or something in the set, is not what it should be.
        """
        while (number := self.number()) is not None:
            try:
                found = self._links(number)
            except (FileNotFoundError, StateError):
                if self.number() == number:
                    raise
                continue
            # A set that has fallen that far behind while it was read is being swept away.
            if (self.number() or 0) - number < KEPT_SETS:
                return found
        return {}

    def entry(self, target: str) -> str | None:
        """One target's link in the current set, as its text; None when there is none. It takes as long with
        a thousand targets as with one.

        Raises:
            StateError: as `entries` does.
        """
        current = fs.link_text(CURRENT, self._fd)
        if current is not None and _SET.fullmatch(current):
            text = fs.link_text(f"{current}/{target}", self._fd)
            if text is not None:
                return text
        return self.entries().get(target)

    def _links(self, number: int) -> dict[str, str]:
        found = {}
        with fs.opened(self._state / SETS / str(number)) as fd:
            for name in fs.names(fd):
                text = fs.link_text(name, fd)
                if text is None:
                    raise StateError(
                        f"{self._state / SETS / str(number) / name} is no link to a generation",
                        code="state.pointer",
                    )
                found[name] = text
        return found

    def flip(self, changes: Mapping[str, str], *, point: str) -> None:
        """Move the targets in `changes` to other links, and no other target, in one step.

        Args:
            point: first part of the failpoints' names.
        Raises:
            OSError: the pointer is where it was, or (when the last sync failed) already moved.
        """
        with self._lock:
            self._replace({**self.entries(), **changes}, point=point)

    def replace(self, entries: Mapping[str, str], *, point: str) -> None:
        """Make a set of exactly `entries` the current one, to repair a lost pointer."""
        with self._lock:
            self._replace(entries, point=point)

    def _replace(self, entries: Mapping[str, str], *, point: str) -> None:
        sets = self._state / SETS
        with fs.opened(sets) as sets_fd:
            number = max((int(name) for name in fs.names(sets_fd) if name.isdecimal()), default=0) + 1
            fresh = f"{number}.new"
            fs.remove_tree(fresh, sets_fd)
            os.mkdir(fresh, dir_fd=sets_fd)
            with fs.below(sets_fd, [fresh]) as fd:
                os.fchmod(fd, 0o755)  # Whatever the umask: programs of other users read through it.
                for target, text in entries.items():
                    os.symlink(text, target, dir_fd=fd)
                os.fsync(fd)
            failpoint(f"{point}.composed")
            os.rename(fresh, str(number), src_dir_fd=sets_fd, dst_dir_fd=sets_fd)
            os.fsync(sets_fd)
        fs.unlink_quietly(NEXT, self._fd)
        try:
            os.symlink(f"{SETS}/{number}", NEXT, dir_fd=self._fd)
            os.fsync(self._fd)
            failpoint(f"{point}.prepared")
            os.rename(NEXT, CURRENT, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            fs.unlink_quietly(NEXT, self._fd)
            raise
        failpoint(f"{point}.renamed")
        os.fsync(self._fd)
        failpoint(f"{point}.synced")
        self._sweep_sets(number)

    def sweep(self) -> None:
        """Remove what a flip that was cut off has left behind."""
        fs.unlink_quietly(NEXT, self._fd)
        with fs.opened(self._state / SETS) as fd:
            for name in fs.names(fd):
                if not name.isdecimal():
                    fs.remove_tree(name, fd)

    def _sweep_sets(self, newest: int) -> None:
        # A set that could not be removed costs a few links, and the next flip tries again.
        with contextlib.suppress(OSError), fs.opened(self._state / SETS) as fd:
            for name in fs.names(fd):
                if name.isdecimal() and int(name) <= newest - KEPT_SETS:
                    fs.remove_tree(name, fd)
