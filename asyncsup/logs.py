"""Output of the instances: captured, rotated, read back and followed.

A stream is a named FIFO that the instance holds open read-write, so it never gets SIGPIPE, whatever becomes
of the supervisor. In format ``raw`` the bytes go from the FIFO to the file by `splice` and never enter
Python: they leave the FIFO only when they are in the page cache. ``timestamp`` and ``json`` go line by line.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import orjson

from asyncsup.errors import RequestError
from asyncsup.events import timestamp

log = logging.getLogger("asyncsup.logs")

Format = Literal["raw", "timestamp", "json"]

PIPE_BYTES: Final = 1 << 20
COALESCE_SECONDS: Final = 0.004
"""A chatty instance is read at most this often: each wake-up costs more than the bytes it moves."""
LINE_MARGIN: Final = 64 << 10
"""Below this room in a file the end is cut at a line, by reading instead of splicing."""
LONGEST_LINE: Final = 256 << 10
"""A longer line is written in pieces, so that a program without newlines cannot fill the memory."""
READ_BYTES: Final = 256 << 10
"""Most that one answer to `logs` or `logs.follow` carries per stream."""


class RotatingFile:
    """A file that becomes ``NAME.1`` when full, ``NAME.1`` becoming ``NAME.2``, up to ``max_files`` in all.

    Args:
        max_size: bytes; a file is closed at the last line that fits.
    """

    def __init__(self, path: Path, *, max_size: int, max_files: int) -> None:
        self.path = path
        self._max_size = max_size
        self._max_files = max_files
        self._fd = -1
        self._size = 0
        self._regular = True

    @property
    def room(self) -> int:
        """Bytes until the file is full; a device or pipe (``/dev/stdout``) never is."""
        self._open()
        return self._max_size - self._size if self._regular else 1 << 62

    @property
    def spliceable(self) -> bool:
        self._open()
        return self._regular

    def splice_from(self, pipe: int, limit: int) -> int:
        """Move up to ``limit`` bytes from a pipe; raises BlockingIOError when it is empty."""
        self._open()
        moved = os.splice(pipe, self._fd, limit, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        self._size += moved
        return moved

    def write(self, data: bytes) -> None:
        self._open()
        view = memoryview(data)
        while view:
            written = os.write(self._fd, view)
            self._size += written
            view = view[written:]

    def write_lines(self, data: bytes) -> None:
        """Write, rotating where the file is full: between lines wherever a line ends in time."""
        while len(data) > self.room:
            cut = data.rfind(b"\n", 0, max(self.room, 0)) + 1
            if cut == 0 and self._size == 0:
                cut = self._max_size
            self.write(data[:cut])
            self.rotate()
            data = data[cut:]
        self.write(data)

    def rotate(self) -> None:
        self.close()
        for number in range(self._max_files - 1, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            newer = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)
        if self._max_files == 1:
            self.path.unlink(missing_ok=True)

    def reopen(self) -> None:
        """Open the path anew at the next write: somebody else has moved the file away."""
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def generations(self) -> Iterator[Path]:
        """The files there are, oldest first; none for a device, which cannot be read back."""
        if not self._regular:
            return
        for number in range(self._max_files - 1, 0, -1):
            path = self.path.with_name(f"{self.path.name}.{number}")
            if path.exists():
                yield path
        if self.path.exists():
            yield self.path

    def _open(self) -> None:
        if self._fd >= 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not O_APPEND: splice refuses such a file. O_NONBLOCK: a pipe that nobody reads must not stop us.
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        self._fd = os.open(self.path, flags, 0o640)
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._size = os.lseek(self._fd, 0, os.SEEK_END) if self._regular else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """A place in a stream that stays valid across rotation: the file's inode, and the bytes before it."""

    instance: str
    stream: str
    inode: int
    offset: int

    def to_json(self) -> dict[str, Any]:
        return {
            "instance": self.instance, "stream": self.stream, "inode": self.inode, "offset": self.offset
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: object) -> Cursor:
        if isinstance(value, dict):
            instance, stream = value.get("instance"), value.get("stream")
            inode, offset = value.get("inode"), value.get("offset")
            named = isinstance(instance, str) and stream in {"stdout", "stderr"}
            if named and isinstance(inode, int) and isinstance(offset, int) and offset >= 0:
                return cls(instance=str(instance), stream=str(stream), inode=inode, offset=offset)
        raise RequestError("cursors: each must be a cursor from an earlier answer")


class OutputStream:
    """One stream of one instance: its FIFO, its file, and whoever waits for more of it.

    Args:
        fifo: path of the FIFO; made here, removed by `close`.
        instance: name in JSON lines.
        stream: ``stdout`` or ``stderr``.
        file: shared when two streams go to one path.
    """

    def __init__(
        self, fifo: Path, file: RotatingFile, *, instance: str, stream: str, format_: Format
    ) -> None:
        self.file = file
        self.instance = instance
        self.stream = stream
        self.lost_bytes = 0
        """Output dropped because the file could not be written (disk full)."""
        self._format = format_
        self._fifo = fifo
        self._loop = asyncio.get_running_loop()
        self._partial = b""
        self._followers: list[asyncio.Future[None]] = []
        self._pause: asyncio.TimerHandle | None = None
        fifo.parent.mkdir(parents=True, exist_ok=True)
        _make_fifo(fifo)
        # Read-write: with a writer of our own the FIFO never comes to its end, which would be "readable" for
        # ever once the last instance has gone.
        self._reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._loop.add_reader(self._reader, self._readable)

    def open_child_end(self) -> int:
        """A descriptor for the instance's end; an open file description of its own, because O_NONBLOCK
        belongs to the description and the program must not see it. The caller closes it after the spawn.
        """
        fd = os.open(self._fifo, os.O_RDWR | os.O_CLOEXEC)
        # Past the user's pipe quota the kernel says EPERM: the default size does as well.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return fd

    def drain(self) -> None:
        """Take what lies in the FIFO; called when the instance has ended. At most two pipe-fulls: a child it
        left behind may write faster than we read.
        """
        taken = 0
        while taken < 2 * PIPE_BYTES and (moved := self._move()) > 0:
            taken += moved
        if self._partial:
            self._write_lines([self._partial])
            self._partial = b""
        self._wake()

    def close(self) -> None:
        self.drain()
        if self._pause is not None:
            self._pause.cancel()
        else:
            self._loop.remove_reader(self._reader)
        os.close(self._reader)
        self._fifo.unlink(missing_ok=True)

    def growth(self) -> asyncio.Future[None]:
        """A future that is done when there is more to read. Ask for it before reading: what comes between
        is not missed then. Cancel it when it is not wanted any more.
        """
        future = self._loop.create_future()
        self._followers.append(future)
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: asyncio.Future[None]) -> None:
        if future in self._followers:
            self._followers.remove(future)

    def _readable(self) -> None:
        moved = self._move()
        self._wake()
        if moved < PIPE_BYTES // 2:
            # Few bytes per wake-up: let some gather. A flooding instance is not slowed down.
            self._loop.remove_reader(self._reader)
            self._pause = self._loop.call_later(COALESCE_SECONDS, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._reader, self._readable)

    def _wake(self) -> None:
        followers, self._followers = self._followers, []
        for future in followers:
            if not future.done():
                future.set_result(None)

    def _move(self) -> int:
        """Take what is there, up to one pipe-full; 0 when there was nothing."""
        try:
            return self._move_raw() if self._format == "raw" else self._move_lines()
        except BlockingIOError:
            return 0
        except OSError as error:
            dropped = self._discard()
            self._count_loss(error, dropped)
            return dropped

    def _move_raw(self) -> int:
        room = self.file.room
        if room > LINE_MARGIN and self.file.spliceable:
            return self.file.splice_from(self._reader, min(room - LINE_MARGIN, PIPE_BYTES))
        data = os.read(self._reader, LINE_MARGIN)
        self._write(data)
        return len(data)

    def _move_lines(self) -> int:
        data = os.read(self._reader, PIPE_BYTES)
        if not data:
            return 0
        lines = (self._partial + data).split(b"\n")
        self._partial = lines.pop()
        if len(self._partial) > LONGEST_LINE:
            lines.append(self._partial)
            self._partial = b""
        self._write_lines(lines)
        return len(data)

    def _write_lines(self, lines: list[bytes]) -> None:
        now = timestamp()
        if self._format == "json":
            records = (
                orjson.dumps(
                    {
                        "at": now,
                        "instance": self.instance,
                        "stream": self.stream,
                        "line": line.decode("utf-8", "replace"),
                    }
                )
                for line in lines
            )
            text = b"\n".join([*records, b""])
        elif self._format == "timestamp":
            prefix = now.encode() + b" "
            text = b"".join(prefix + line + b"\n" for line in lines)
        else:
            text = b"".join(lines)
        self._write(text)

    def _write(self, text: bytes) -> None:
        try:
            self.file.write_lines(text)
        except OSError as error:
            self._count_loss(error, len(text))

    def _count_loss(self, error: OSError, size: int) -> None:
        """The file cannot be written (disk full, no permission): the program must go on, so its output is
        dropped, counted and said."""
        if self.lost_bytes == 0:
            log.error("%s: output is lost: %s: %s", self.instance, self.file.path, error.strerror)
        self.lost_bytes += size

    def _discard(self) -> int:
        dropped = len(self._partial)
        self._partial = b""
        with contextlib.suppress(BlockingIOError):
            dropped += len(os.read(self._reader, PIPE_BYTES))
        return dropped

    # --- reading back ---------------------------------------------------------------------------------------

    def tail(self, lines: int) -> tuple[str, Cursor]:
        """The last ``lines`` lines, across rotated files, and the cursor after them."""
        wanted: list[bytes] = []
        cursor = self.end()
        for path in reversed(list(self.file.generations())):
            end = cursor.offset if path == self.file.path else path.stat().st_size
            wanted = [_last_lines(path, end, lines - sum(part.count(b"\n") for part in wanted)), *wanted]
            if sum(part.count(b"\n") for part in wanted) >= lines:
                break
        return b"".join(wanted)[-READ_BYTES:].decode("utf-8", "replace"), cursor

    def read(self, cursor: Cursor) -> tuple[str, Cursor]:
        """What came after ``cursor``, at most `READ_BYTES`, and the cursor after that.

        When the file of the cursor has been rotated away altogether, reading goes on at the oldest there is.
        """
        files = [(path, path.stat()) for path in self.file.generations()]
        position = next((i for i, (_, status) in enumerate(files) if status.st_ino == cursor.inode), 0)
        offset = cursor.offset if files and files[position][1].st_ino == cursor.inode else 0
        parts: list[bytes] = []
        room = READ_BYTES
        for path, status in files[position:]:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(room)
            parts.append(data)
            room -= len(data)
            cursor = Cursor(
                instance=self.instance, stream=self.stream, inode=status.st_ino, offset=offset + len(data)
            )
            offset = 0
            if room <= 0:
                break
        return b"".join(parts).decode("utf-8", "replace"), cursor

    def end(self) -> Cursor:
        """The place after everything there is."""
        try:
            status = self.file.path.stat()
        except FileNotFoundError:
            return Cursor(instance=self.instance, stream=self.stream, inode=0, offset=0)
        return Cursor(instance=self.instance, stream=self.stream, inode=status.st_ino, offset=status.st_size)


def _make_fifo(path: Path) -> None:
    try:
        if stat.S_ISFIFO(path.lstat().st_mode):
            return
        path.unlink()
    except FileNotFoundError:
        pass
    os.mkfifo(path, 0o600)


def _last_lines(path: Path, end: int, lines: int) -> bytes:
    """The last ``lines`` lines before byte ``end``, read backwards in blocks."""
    data = b""
    with path.open("rb") as file:
        position = end
        while position > 0 and data.count(b"\n") <= lines and len(data) < READ_BYTES:
            step = min(64 << 10, position)
            position -= step
            file.seek(position)
            data = file.read(step) + data
    return b"".join(data.splitlines(keepends=True)[-lines:]) if lines > 0 else b""
