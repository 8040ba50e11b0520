"""Watches a folder by its path: whichever folder has the path, also when it is replaced.

The kernel's watch is one of an inode: it stays with a folder that is moved away, and ends with one that is
removed or unmounted. So whatever may mean that the path leads elsewhere (the end of the watch, a change of
the name in the parent folder, a mount, a queue that has overflowed) leads to another look. While there is a
folder, no timer runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
from asyncinotify import Inotify, Mask, Watch

from asyncsup.patch import fs

PATIENCE_SECONDS: Final = 3.0
"""For whoever replaces the folder to put the new one there: one of ours would be in the way of ``mkdir``, and
``mv`` would move the new one into it.
"""
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 10.0

MOUNTS: Final = "/proc/self/mountinfo"

_END: Final = Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.UNMOUNT | Mask.IGNORED
_INSIDE: Final = Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.DELETE | Mask.MOVED_FROM
_FOLDER: Final = _INSIDE | Mask.ATTRIB | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR
_NAMES: Final = Mask.CREATE | Mask.MOVED_TO | Mask.DELETE | Mask.MOVED_FROM
_PARENT: Final = _NAMES | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR


class StandingWatch:
    """Tells what is written, moved and deleted in a folder.

    Args:
        changed: called with the name of what has changed.
        missed: called when changes may have been missed: too many at once, or the folder is another one.
        log: is told when the folder is gone, and when it is another one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        changed: Callable[[str], None],
        missed: Callable[[], None],
        log: logging.Logger,
    ) -> None:
        self._path = folder
        self._changed = changed
        self._missed = missed
        self._log = log
        self._inotify: Inotify
        self._folder: Watch | None = None
        self._parent: Watch | None = None
        self._like: os.stat_result
        self._in_doubt = asyncio.Event()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Watch until cancelled.

        Raises:
            OSError: before it has started: the folder cannot be watched.
        """
        with Inotify() as self._inotify, _told_of_mounts(self._in_doubt.set):
            self._look()
            task_status.started()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._stay)
                async for event in self._inotify:
                    if Mask.Q_OVERFLOW in event.mask:
                        self._missed()
                        self._in_doubt.set()
                    elif Mask.ATTRIB in event.mask:
                        if event.name is None:  # the mode or the owner of the folder itself
                            self._in_doubt.set()
                    elif event.mask & _END:
                        self._in_doubt.set()
                    elif event.watch is self._folder is not None:
                        self._changed(str(event.name or ""))
                    elif str(event.name or "") == self._path.name:
                        self._in_doubt.set()

    async def _stay(self) -> None:
        while True:
            await self._in_doubt.wait()
            self._in_doubt.clear()
            try:
                if not self._look():
                    continue
            except OSError as error:
                self._log.warning("%s is gone: %s", self._path, error.strerror)
                await self._found_again()
            self._log.warning("%s is another folder than before; it is watched from here on", self._path)
            self._missed()

    def _look(self) -> bool:
        """Watch the folder that has the path; whether it is another one than before.

        The kernel gives the same watch for the same folder; numbers of inodes are used again at once.

        Raises:
            OSError: there is none, or it cannot be watched.
        """
        self._parent, before = self._parent_watch(), self._parent
        if before is not self._parent:
            self._let_go(before)
        before, self._folder = self._folder, None
        try:
            self._folder = self._inotify.add_watch(self._path, _FOLDER)
            self._like = self._path.stat()
        finally:
            if before is not self._folder:
                self._let_go(before)
        return before is not self._folder

    def _parent_watch(self) -> Watch | None:
        # Who may not read it is still told of what becomes of the folder itself.
        with contextlib.suppress(OSError):
            return self._inotify.add_watch(self._path.parent, _PARENT)
        return None

    def _let_go(self, watch: Watch | None) -> None:
        if watch is not None:
            with contextlib.suppress(OSError):  # it ended with its folder
                self._inotify.rm_watch(watch)

    async def _found_again(self) -> None:
        """Wait until there is a folder, and if nobody makes one, make it."""
        patient_until = anyio.current_time() + PATIENCE_SECONDS
        pause, said = FIRST_PAUSE_SECONDS, ""
        while True:
            with anyio.move_on_after(pause) as waited:
                await self._in_doubt.wait()
            self._in_doubt.clear()
            # Not while somebody is at work there.
            ours = waited.cancelled_caught and anyio.current_time() >= patient_until
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS) if ours else FIRST_PAUSE_SECONDS
            try:
                if ours:
                    self._make()
                self._look()
            except OSError as error:
                if ours and (why := error.strerror or str(error)) != said:
                    said = why
                    self._log.error("%s cannot be made anew, and is tried again: %s", self._path, why)
            else:
                return

    def _make(self) -> None:
        """With the mode and the owner of the one that was there."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._path.mkdir(0o700)
        except FileExistsError:
            return
        fd = os.open(self._path, fs.DIRECTORY_NOFOLLOW)
        try:
            # Who may write to the parent may have put another one there, which is not ours to give away.
            with os.scandir(fd) as entries:
                empty = next(entries, None) is None
            if empty:
                with contextlib.suppress(PermissionError):
                    os.fchown(fd, self._like.st_uid, self._like.st_gid)
                os.fchmod(fd, stat.S_IMODE(self._like.st_mode))
        finally:
            os.close(fd)


@contextlib.contextmanager
def _told_of_mounts(changed: Callable[[], None]) -> Iterator[None]:
    """Call `changed` at every mount and unmount: inotify is silent about what is mounted over a folder."""
    loop = asyncio.get_running_loop()
    try:
        fd = os.open(MOUNTS, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        # It is readable at all times; a change is an error condition, which is reported to whoever asks for
        # anything, and never writable.
        loop.add_writer(fd, changed)
        yield
    finally:
        loop.remove_writer(fd)
        os.close(fd)
