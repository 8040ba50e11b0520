"""A log file and the ones it has been before: rotated by size and by age, compressed or not.

``NAME`` becomes ``NAME.1``, that ``NAME.2``; compressed they are ``NAME.1.gz`` and so on, each number in one
of the two forms.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypedDict

from asyncsup import logarchive
from asyncsup.failpoints import failpoint
from asyncsup.filefacts import FileFacts, look
from asyncsup.safe_open import safe_open

log = logging.getLogger("asyncsup.logs")

MOST_LINE_ROOM: Final = 4 << 10
PACKED: Final = ".gz"
PART: Final = f"{PACKED}.part"


class LogLimits(TypedDict):
    """What `RotatingFile` and `RotatingFile.limit` take."""

    max_size: int
    max_files: int
    max_age: float | None
    compress: Callable[[RotatingFile], None] | None


class RotatingFile:
    """A file that becomes ``NAME.1`` when it is full or old, up to ``max_files`` in all.

    Args:
        max_size: bytes; a file is closed at the last line that fits.
        max_age: seconds after its birth a file is closed, at the end of a line. It is the file system that
            knows the birth, so it holds whatever becomes of the supervisor; where it does not know, the last
            write before `take_up` counts.
        compress: is called when there is something to compress; None to leave files as they are.
        now: the time, in seconds since the epoch.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_size: int,
        max_files: int,
        max_age: float | None = None,
        compress: Callable[[RotatingFile], None] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.is_old = False
        """It is to be closed when the line is complete that it ends with."""
        self._max_size = max_size
        self._max_files = max_files
        self._max_age = max_age
        self._compress = compress
        self._now = now
        self._fd = -1
        self._size = 0
        self._regular = True
        self._begun: float | None = None
        """When the file was last written to as we came upon it: stands for a birth that is not known."""
        self._timer: asyncio.TimerHandle | None = None

    def take_up(self) -> None:
        """Go on with what an earlier supervisor has left: an age, files to compress, one half compressed."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path}{PART}")  # noqa: PTH108 - as often as there are instances
        self._watch_age()
        self._offer()

    def limit(
        self,
        *,
        max_size: int,
        max_files: int,
        max_age: float | None = None,
        compress: Callable[[RotatingFile], None] | None = None,
    ) -> None:
        """Other limits from here on; files that are too many then are removed."""
        surplus = range(max_files, self._max_files)
        self._max_size, self._max_files = max_size, max_files
        self._max_age, self._compress = max_age, compress
        for number in surplus:
            self._remove(number)
        self.is_old = False
        self._watch_age()
        self._offer()

    @property
    def room(self) -> int:
        """Bytes until the file is full; a device or pipe (``/dev/stdout``) never is."""
        self._open()
        return self._max_size - self._size if self._regular else 1 << 62

    @property
    def spliceable(self) -> bool:
        self._open()
        return self._regular

    @property
    def line_room(self) -> int:
        """How much room there should be at least for what is still to come of a line."""
        return min(MOST_LINE_ROOM, self._max_size // 16)

    @property
    def empty(self) -> bool:
        self._open()
        return self._size == 0

    @property
    def place(self) -> tuple[int, int, int]:
        """Where the next write goes: device, inode and size; zeros for a device or pipe."""
        self._open()
        status = os.fstat(self._fd)
        return (status.st_dev, status.st_ino, self._size) if self._regular else (0, 0, 0)

    def splice_from(self, pipe: int, limit: int) -> int:
        """Move up to ``limit`` bytes from a pipe; raises BlockingIOError when it is empty."""
        self._open()
        moved = os.splice(pipe, self._fd, limit, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        self._size += moved
        return moved

    def write_some(self, data: bytes | memoryview) -> int:
        """Write what can be written at once; returns how many bytes that were."""
        self._open()
        written = os.write(self._fd, data)
        self._size += written
        return written

    def write(self, data: bytes) -> None:
        """Write all of it. When that fails, nothing of it is left in a regular file."""
        self._open()
        before, view = self._size, memoryview(data)
        try:
            while view:
                view = view[self.write_some(view) :]
        except OSError:
            if self._regular:
                self._cut(before)
            raise

    def undo(self, device: int, inode: int, size: int) -> None:
        """Cut off what a write that began at ``size`` has left in a file, if this is that file."""
        self._open()
        status = os.fstat(self._fd)
        if self._regular and (status.st_dev, status.st_ino) == (device, inode) and self._size > size:
            self._cut(size)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        os.lseek(self._fd, size, os.SEEK_SET)
        self._size = size

    def rotate(self) -> None:
        self.close()
        self._begun = None
        if self._max_files == 1:
            self.path.unlink(missing_ok=True)
            return
        taken: list[list[str]] = []
        while len(taken) < self._max_files - 2 and (forms := self._forms(len(taken) + 1)):
            taken.append(forms)
        # What is older than a gap stays where it is; `max_files` may be large, and says nothing of how many
        # there are.
        if len(taken) == self._max_files - 2:
            self._remove(self._max_files - 1)
        for number in range(len(taken), 0, -1):
            for path in taken[number - 1]:
                suffix = PACKED if path.endswith(PACKED) else ""
                os.replace(path, f"{self.path}.{number + 1}{suffix}")  # noqa: PTH105
        failpoint("logs.rotate.shifted")
        with contextlib.suppress(FileNotFoundError):
            self.path.replace(self._numbered(1))
        self._offer()

    def reopen(self) -> None:
        """Open the path anew at the next write: somebody else has moved the file away."""
        self.close()
        self._begun = None
        self._watch_age()

    def close(self) -> None:
        """Let go of the file, and of the watch over its age."""
        self._cancel_timer()
        self.is_old = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def newest_first(self) -> Iterator[Path]:
        """The files there are; none for a device, which cannot be read back."""
        if not self._regular:
            return
        if self.path.exists():
            yield self.path
        for number in range(1, self._max_files):
            yield from map(Path, self._forms(number))

    # --- compression ----------------------------------------------------------------------------------------

    @property
    def part(self) -> Path:
        """What is being compressed; whole files have other names."""
        return Path(f"{self.path}{PART}")

    def to_compress(self) -> Path | None:
        """The newest file that is complete and not compressed."""
        if self._compress is None:
            return None
        for number in range(1, self._max_files):
            forms = self._forms(number)
            if not forms:
                return None
            if not forms[0].endswith(PACKED):
                return Path(forms[0])
        return None

    def put_compressed(self, identity: tuple[int, int]) -> None:
        """Put `part`, which is complete, in the place of the file it was made of, wherever that is called by
        now; remove it when there is no such file any more.
        """
        for number in range(1, self._max_files):
            plain = self._numbered(number)
            facts = look(plain)
            if facts is not None and facts.identity == identity:
                failpoint("logs.compress.done")
                self.part.replace(self._numbered(number, PACKED))
                failpoint("logs.compress.renamed")
                plain.unlink()
                return
        self.part.unlink(missing_ok=True)

    def _offer(self) -> None:
        if self._compress is not None:
            self._compress(self)

    def _numbered(self, number: int, suffix: str = "") -> Path:
        return Path(f"{self.path}.{number}{suffix}")

    def _forms(self, number: int) -> list[str]:
        """The files with this number: one, unless somebody else has put one there.

        What was killed between the rename of the compressed file and the end of the other has left both; the
        other goes here.
        """
        name = f"{self.path}.{number}"
        found = [path for path in (name, name + PACKED) if os.path.lexists(path)]
        if len(found) == 2:
            plain, packed = look(name), examine(Path(name + PACKED))
            if plain is not None and packed is not None and plain.identity == packed.identity:
                os.unlink(found.pop(0))  # noqa: PTH108
        return found

    def _remove(self, number: int) -> None:
        for suffix in ("", PACKED):
            self._numbered(number, suffix).unlink(missing_ok=True)

    # --- age ------------------------------------------------------------------------------------------------

    def _watch_age(self) -> None:
        """Wake up when the file is as old as it may be, and not before."""
        self._cancel_timer()
        if self._max_age is None or (left := self._time_left()) is None:
            return
        self._timer = asyncio.get_running_loop().call_later(max(left, 0.0), self._reached_age)

    def _time_left(self) -> float | None:
        """Seconds until it is too old; None when there is no such file."""
        facts = facts_of(self.path)
        if facts is None or self._max_age is None:
            return None
        if self._begun is None:
            self._begun = facts.modified
        return (self._begun if facts.born is None else facts.born) + self._max_age - self._now()

    def _reached_age(self) -> None:
        self._timer = None
        left = self._time_left()
        if left is None:
            return
        if left > 0:  # the clock was set back
            self._watch_age()
            return
        last = self._last_byte()
        self.is_old = last not in {b"", b"\n"}
        if last == b"":
            self.close()  # nothing to keep; it is looked at again when there is
        elif not self.is_old:
            try:
                self.rotate()
            except OSError as error:
                log.warning("%s: not rotated: %s", self.path, error.strerror)

    def _last_byte(self) -> bytes:
        try:
            with to_read(self.path) as fd:
                size = os.fstat(fd).st_size
                return os.pread(fd, 1, size - 1) if size else b""
        except OSError:  # ours to write and not to read
            return b"\n"

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _open(self) -> None:
        if self._fd >= 0:
            return
        self._fd, is_descriptor = safe_open(self.path, os.O_WRONLY | os.O_CREAT)
        self._regular = not is_descriptor and stat.S_ISREG(os.fstat(self._fd).st_mode)
        if is_descriptor:
            # Not in other cases: splice refuses such a file.
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_APPEND)
        self._size = os.lseek(self._fd, 0, os.SEEK_END) if self._regular else 0
        self._watch_age()


@contextlib.contextmanager
def to_read(path: Path) -> Iterator[int]:
    """A descriptor of one of our files, or of what has been put in its place.

    Raises:
        OSError: as `safe_open`; EINVAL for what is no file of ours, but a device or somebody's descriptor.
    """
    fd, is_descriptor = safe_open(path, os.O_RDONLY)
    try:
        if is_descriptor or not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield fd
    finally:
        os.close(fd)


def facts_of(path: Path) -> FileFacts | None:
    """The facts about one of our files; None when there is none, or something else."""
    try:
        fd, is_descriptor = safe_open(path, os.O_PATH)
    except OSError:
        return None
    try:
        facts = look(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return None if facts is None or is_descriptor or not facts.is_regular else facts


def examine(path: Path) -> logarchive.Archive | None:
    try:
        with to_read(path) as fd:
            return logarchive.examine(fd)
    except OSError:
        return None
