"""The inbox: the folder patches are dropped into.

A zip is noticed when its writer closes it or renames it into place (inotify: no polling), and counts as
complete once it ends the way a zip ends: a copy that is still under way, or whose writer opens the file
several times, is listed as incomplete. What has been dealt with moves to ``applied/`` or ``rejected/`` with a
report beside it.

Who may write to the folder need not be who we are: nothing in it is opened without looking, no link is
followed out of it, and nothing that is there is written over.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import anyio.abc
import msgspec
import orjson

from asyncsup.errors import PatchNotFoundError
from asyncsup.events import EventStream
from asyncsup.patch import fs
from asyncsup.patch.checksum import has_checksum
from asyncsup.patch.standing_watch import StandingWatch
from target_sdk.protocol import to_json

log = logging.getLogger("asyncsup.inbox")

END_OF_CENTRAL_DIRECTORY: Final = b"PK\x05\x06"
TAIL_BYTES: Final = 22 + 0xFFFF
"""The end record and the longest comment behind it."""

_MAX_NAME_BYTES: Final = 255
_LONGEST_ENDING: Final = ".sha256"
"""Of the files that lie beside a package."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A zip that lies in the inbox; ``size`` in bytes."""

    path: Path
    size: int
    complete: bool


class Inbox:
    """Knows what lies in the folder and tells when something is new."""

    def __init__(self, folder: Path, events: EventStream) -> None:
        self.folder = folder
        self._events = events
        self._arrived = asyncio.Event()
        for each in (folder, folder / "applied", folder / "rejected"):
            each.mkdir(parents=True, exist_ok=True)

    def arrivals(self) -> list[Arrival]:
        """What lies there, by name. Hidden files, other endings and names that are no text are not ours.

        Raises:
            PatchNotFoundError: the folder is gone, or cannot be read.
        """
        found = []
        try:
            with os.scandir(self.folder) as entries:
                by_name = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            why = f"the inbox {self.folder} cannot be read: {error.strerror}"
            raise PatchNotFoundError(why, path=str(self.folder)) from None
        for entry in by_name:
            if not entry.name.endswith(".zip") or entry.name.startswith(".") or not _is_text(entry.name):
                continue
            try:
                if entry.is_file(follow_symlinks=False):
                    path, size = Path(entry.path), entry.stat(follow_symlinks=False).st_size
                    found.append(Arrival(path=path, size=size, complete=looks_complete(path)))
            except FileNotFoundError:
                continue  # moved away while we looked
            except OSError as error:
                log.warning("%s cannot be read: %s", entry.path, error.strerror)
        return found

    def find(self, name: str) -> Path:
        """The path of a zip by its name, with or without the ending.

        Raises:
            PatchNotFoundError: says what there is, or that the folder cannot be read.
        """
        for arrival in self.arrivals():
            if arrival.path.name in {name, f"{name}.zip"}:
                return arrival.path
        there = ", ".join(arrival.path.name for arrival in self.arrivals()) or "nothing"
        raise PatchNotFoundError(f"no patch {name!r} in the inbox {self.folder}; there is {there}", name=name)

    def settle(
        self, path: Path, report: Mapping[str, Any], *, outcome: Literal["applied", "rejected"]
    ) -> Path:
        """Move a zip (and its checksum file) away and write the report beside it; returns the new path.

        Raises:
            OSError: it could not be moved.
        """
        text = to_json(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        (self.folder / outcome).mkdir(exist_ok=True)
        with fs.opened(self.folder) as home, _opened_in(home, outcome) as folder:
            name, report_fd = _create_report(folder, path.name)
            with open(report_fd, "wb") as file:  # noqa: PTH123 - of a descriptor
                file.write(text)
            try:
                os.rename(path.name, name, src_dir_fd=home, dst_dir_fd=folder)
            except OSError:
                os.unlink(f"{name}.json", dir_fd=folder)
                raise
            if has_checksum(path):
                os.rename(f"{path.name}.sha256", f"{name}.sha256", src_dir_fd=home, dst_dir_fd=folder)
        self._events.emit("inbox.changed", file=path.name, state=outcome)
        return self.folder / outcome / name

    async def watch(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Notice changes until cancelled, also after the folder was replaced by another one."""
        self._arrived.set()
        watch = StandingWatch(self.folder, changed=self._changed, missed=self._missed, log=log)
        await watch.run(task_status=task_status)

    def _changed(self, name: str) -> None:
        # A name need not be text: whoever reads of it is given what can be shown.
        name = os.fsencode(name).decode("utf-8", "replace")
        if name.startswith(".") or not name.endswith((".zip", ".zip.sha256")):
            return
        # A checksum that comes after its package is what the package was waiting for.
        self._tell(name.removesuffix(".sha256"))

    def _missed(self) -> None:
        """What was not told of may have been a package."""
        with contextlib.suppress(PatchNotFoundError):  # then there will be another folder
            for arrival in self.arrivals():
                self._tell(arrival.path.name)
        self._arrived.set()

    def _tell(self, name: str) -> None:
        self._events.emit("inbox.changed", file=name, state=self._state_of(name))
        self._arrived.set()

    async def changed(self) -> None:
        """Wait until something has come since the last call."""
        await self._arrived.wait()
        self._arrived.clear()

    def look_again(self) -> None:
        """Something that came was not dealt with."""
        self._arrived.set()

    def _state_of(self, name: str) -> str:
        path = self.folder / name
        if not is_regular(path):
            return "gone" if not os.path.lexists(path) else "not a file"
        try:
            return "complete" if looks_complete(path) else "incomplete"
        except FileNotFoundError:
            return "gone"
        except OSError:
            return "unreadable"


def is_regular(path: Path) -> bool:
    """Whether there is an ordinary file; opening a pipe, for one, would wait for its writer."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def looks_complete(path: Path) -> bool:
    """Whether the file ends with the end record of a zip, and the record's offsets lie within the file.

    A cheap look, no judgement: the strict check is that of `asyncsup.patch.package`. What is no ordinary file
    (any more) is never complete.
    """
    try:
        with fs.opened_file(path, follow=False) as fd:
            tail = os.pread(fd, TAIL_BYTES, max(0, os.fstat(fd).st_size - TAIL_BYTES))
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.EISDIR, errno.ELOOP}:
            return False
        raise
    at = tail.rfind(END_OF_CENTRAL_DIRECTORY)
    if at < 0 or len(tail) - at < 22:
        return False
    comment = int.from_bytes(tail[at + 20 : at + 22], "little")
    return at + 22 + comment <= len(tail)


@contextlib.contextmanager
def _opened_in(home: int, name: str) -> Iterator[int]:
    """A descriptor of a folder below `home`, which must not be a link."""
    fd = os.open(name, fs.DIRECTORY_NOFOLLOW, dir_fd=home)
    try:
        yield fd
    finally:
        os.close(fd)


def _create_report(folder: int, name: str) -> tuple[str, int]:
    """A name that is free in `folder` for a package and what lies beside it, and its new, empty report."""
    stem, number = name.removesuffix(".zip"), 1
    while True:
        ending = ".zip" if number == 1 else f"-{number}.zip"
        room = _MAX_NAME_BYTES - len(ending) - len(_LONGEST_ENDING)
        free = stem.encode()[:room].decode(errors="ignore") + ending
        number += 1
        if fs.lstat(free, folder) is not None or fs.lstat(f"{free}.sha256", folder) is not None:
            continue
        with contextlib.suppress(FileExistsError):
            return free, os.open(f"{free}.json", fs.CREATE, 0o644, dir_fd=folder)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
