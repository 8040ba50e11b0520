"""Output of the instances: captured, rotated, read back and followed.

A stream is a named FIFO that the instance holds open read-write, so it never gets SIGPIPE, whatever becomes
of the supervisor. In format ``raw`` the bytes go from the FIFO to the file by `splice` and never enter
Python: they leave the FIFO only when they are in the page cache. Where a file is about to be full, it is
looked for the end of a line first, without taking anything out. ``timestamp`` and ``json`` go line by line,
through a spool. So a supervisor may be killed at any instant: nothing is lost, and nothing is written twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
from asyncsup.pipes import PIPE_BYTES, Peephole, enlarge
from asyncsup.spool import Spool

log = logging.getLogger("asyncsup.logs")

Format = Literal["raw", "timestamp", "json"]

COALESCE_SECONDS: Final = 0.004
"""A chatty instance is read at most this often: each wake-up costs more than the bytes it moves."""
LINES_BYTES: Final = 128 << 10
"""So much is put into lines before others have their turn: it takes some milliseconds."""
LINE_MARGIN: Final = 64 << 10
"""Below this room in a file it is looked where a line ends before bytes are moved."""
MOST_LINE_ROOM: Final = 4 << 10
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

    def limit(self, *, max_size: int, max_files: int) -> None:
        """Other limits from here on; files that are too many then are removed."""
        surplus = range(max_files, self._max_files)
        self._max_size, self._max_files = max_size, max_files
        for number in surplus:
            self.path.with_name(f"{self.path.name}.{number}").unlink(missing_ok=True)

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
        if self._max_files == 1:
            self.path.unlink(missing_ok=True)
            return
        path = str(self.path)
        free = 1
        while free < self._max_files - 1 and os.path.lexists(f"{path}.{free}"):
            free += 1
        # What is older than a gap stays where it is; `max_files` may be large, and says nothing of how many
        # there are.
        for number in range(free, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{path}.{number - 1}" if number > 1 else path, f"{path}.{number}")  # noqa: PTH105

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
        fifo: path of the FIFO; made here unless it is there.
        held: a descriptor of the FIFO that outlived an earlier supervisor; ours from here on.
        instance: name in JSON lines.
        stream: ``stdout`` or ``stderr``.
        file: shared when two streams go to one path.
    """

    def __init__(
        self,
        fifo: Path,
        file: RotatingFile,
        *,
        instance: str,
        stream: str,
        format_: Format,
        held: int | None = None,
    ) -> None:
        self.file = file
        self.instance = instance
        self.stream = stream
        self.lost_bytes = 0
        """Output dropped because the file could not be written (disk full)."""
        self._format = format_
        self._fifo = fifo
        self._loop = asyncio.get_running_loop()
        self._followers: list[asyncio.Future[None]] = []
        self._pause: asyncio.TimerHandle | None = None
        is_new = _make_fifo(fifo)
        # Read-write: with a writer of our own the FIFO never comes to its end, which would be "readable" for
        # ever once the last instance has gone.
        self._reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) if held is None else held
        try:
            self._spool = self._open_spool(Path(f"{fifo}.spool"), is_new=is_new)
        except OSError:
            os.close(self._reader)
            raise
        self._loop.add_reader(self._reader, self._readable)

    def fileno(self) -> int:
        """The supervisor's own descriptor of the FIFO: whoever holds it keeps what is in it."""
        return self._reader

    def open_child_end(self) -> int:
        """A descriptor for the instance's end; an open file description of its own, because O_NONBLOCK
        belongs to the description and the program must not see it. The caller closes it after the spawn.
        """
        # Not by its path, from which something that tidies up may have removed it.
        fd = os.open(f"/proc/self/fd/{self._reader}", os.O_RDWR | os.O_CLOEXEC)
        enlarge(fd)
        return fd

    def drain(self) -> None:
        """Take what lies in the FIFO; called when the instance has ended. At most two pipe-fulls: a child it
        left behind may write faster than we read.
        """
        taken = 0
        while taken < 2 * PIPE_BYTES and (moved := self._move()) > 0:
            taken += moved
        if self._spool is not None:
            self._write_out(self._spool, all_of_it=True)
        self._wake()

    def close(self, *, keep: bool = False) -> None:
        """Let go of the FIFO.

        Args:
            keep: an instance goes on writing to it; it stays where it is for the next supervisor.
        """
        if keep:
            self._wake()
        else:
            self.drain()
        if self._pause is not None:
            self._pause.cancel()
        else:
            self._loop.remove_reader(self._reader)
        os.close(self._reader)
        if self._spool is not None:
            self._spool.close(remove=not keep)
        if not keep:
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
        if moved < (PIPE_BYTES if self._spool is None else LINES_BYTES) // 2:
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
        """Take what is there, up to one pipe-full (of lines, to `LINES_BYTES`); 0 when there was nothing."""
        try:
            return self._move_raw() if self._spool is None else self._move_lines(self._spool)
        except BlockingIOError:
            return 0
        except OSError as error:
            dropped = self._discard()
            self._count_loss(error, dropped)
            return dropped

    def _open_spool(self, path: Path, *, is_new: bool) -> Spool | None:
        """The spool, where the format needs one; what an earlier supervisor has left in it is written."""
        if self._format == "raw" and (is_new or not path.exists()):
            return None
        spool = Spool(path)
        try:
            if spool.begun is not None:
                self.file.undo(*spool.begun)
        except OSError as error:
            log.warning("%s: %s: %s", self.instance, self.file.path, error.strerror)
        if self._format != "raw":
            self._write_out(spool)
            return spool
        with contextlib.suppress(OSError):
            self.file.write(spool.waiting(spool.pending))
        spool.close(remove=True)
        return None

    def _move_raw(self) -> int:
        file = self.file
        if not file.spliceable:
            return self._copy_raw()
        room = file.room
        if room > LINE_MARGIN:
            return file.splice_from(self._reader, min(room - LINE_MARGIN, PIPE_BYTES))
        ahead = _peephole().peek(self._reader, LINE_MARGIN)
        is_full = len(ahead) > room
        cut = ahead.rfind(b"\n", 0, max(room, 0)) + 1
        if cut == 0 and len(ahead) + file.line_room <= room:
            cut = len(ahead)  # a line that is not complete, and has room to become so
        elif cut == 0:
            cut = min(len(ahead), room) if file.empty else 0
            is_full = cut in {0, room}
        moved = 0
        while moved < cut:
            moved += file.splice_from(self._reader, cut - moved)
        if is_full:
            file.rotate()
        return moved or self._move_raw()

    def _copy_raw(self) -> int:
        """To a terminal or a pipe: written first, and taken out of the FIFO afterwards."""
        ahead = _peephole().peek(self._reader, LINE_MARGIN)
        try:
            written = self.file.write_some(ahead)
        except OSError as error:
            written = len(ahead)
            self._count_loss(error, written)
        return len(os.read(self._reader, written))

    def _move_lines(self, spool: Spool) -> int:
        moved = spool.take(self._reader, LINES_BYTES)
        self._write_out(spool)
        return moved

    def _write_out(self, spool: Spool, *, all_of_it: bool = False) -> None:
        """Write the lines that are complete; with ``all_of_it`` also what is not."""
        while waiting := spool.waiting(PIPE_BYTES):
            end = waiting.rfind(b"\n") + 1
            if end == 0 and (all_of_it or len(waiting) > LONGEST_LINE):
                end = min(len(waiting), LONGEST_LINE)
            if end == 0:
                return
            after = spool.pending - end
            try:
                self._write_lines(spool, waiting[:end])
            except OSError as error:
                self._count_loss(error, spool.pending - after)
                spool.done(spool.pending - after)

    def _write_lines(self, spool: Spool, data: bytes) -> None:
        """Format and write lines, rotating between two of them; they are the next bytes of the spool."""
        lines = data.removesuffix(b"\n").split(b"\n")
        formatted = self._formatted(lines)
        left, room = len(data), self.file.room
        batch: list[bytes] = []
        length = size = 0  # of the batch, and of what it stands for
        for line, text in zip(lines, formatted, strict=True):
            if length + len(text) > room and (batch or not self.file.empty):
                if batch:
                    self._write_batch(spool, b"".join(batch), size)
                self.file.rotate()
                room = self.file.room
                batch, length, size = [], 0, 0
            taken = min(len(line) + 1, left)
            left -= taken
            batch.append(text)
            length, size = length + len(text), size + taken
        self._write_batch(spool, b"".join(batch), size)

    def _write_batch(self, spool: Spool, text: bytes, size: int) -> None:
        """Write what stands for the next ``size`` bytes of the spool."""
        spool.begin(*self.file.place)
        self.file.write(text)
        spool.done(size)

    def _formatted(self, lines: list[bytes]) -> list[bytes]:
        now = timestamp()
        if self._format == "timestamp":
            prefix = now.encode() + b" "
            return [prefix + line + b"\n" for line in lines]
        return [
            orjson.dumps(
                {
                    "at": now,
                    "instance": self.instance,
                    "stream": self.stream,
                    "line": line.decode("utf-8", "replace"),
                },
                option=orjson.OPT_APPEND_NEWLINE,
            )
            for line in lines
        ]

    def _count_loss(self, error: OSError, size: int) -> None:
        """The file cannot be written (disk full, no permission): the program must go on, so its output is
        dropped, counted and said."""
        if self.lost_bytes == 0:
            log.error("%s: output is lost: %s: %s", self.instance, self.file.path, error.strerror)
        self.lost_bytes += size

    def _discard(self) -> int:
        with contextlib.suppress(BlockingIOError):
            return len(os.read(self._reader, PIPE_BYTES))
        return 0

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


@functools.cache
def _peephole() -> Peephole:
    """One for all streams: it is empty between two looks."""
    return Peephole()


def _make_fifo(path: Path) -> bool:
    """Make a FIFO unless there is one; whether it was made."""
    try:
        os.mkfifo(path, 0o600)
    except FileExistsError:
        if stat.S_ISFIFO(path.lstat().st_mode):
            return False
        path.unlink()
        os.mkfifo(path, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path, 0o600)
    return True


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
