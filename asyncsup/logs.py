"""Output of the instances: captured, and put into files.

A stream is a named FIFO that the instance holds open read-write, so it never gets SIGPIPE, whatever becomes
of the supervisor. In format ``raw`` the bytes go from the FIFO to the file by `splice` and never enter
Python: they leave the FIFO only when they are in the page cache. Where a file is about to be full, it is
looked for the end of a line first, without taking anything out. The other formats go line by line, through a
spool. So a supervisor may be killed at any instant: nothing is lost, and nothing is written twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import orjson

from asyncsup.events import timestamp
from asyncsup.logfile import RotatingFile
from asyncsup.logreader import LogReader, time_of
from asyncsup.pipes import PIPE_BYTES, Peephole, enlarge
from asyncsup.spool import Spool

log = logging.getLogger("asyncsup.logs")

Format = Literal["raw", "prefix", "timestamp", "json"]

COALESCE_SECONDS: Final = 0.004
"""A chatty instance is read at most this often: each wake-up costs more than the bytes it moves."""
LINES_BYTES: Final = 512 << 10
"""So much is put into lines before others have their turn: it takes some milliseconds."""
LINE_MARGIN: Final = 64 << 10
"""Below this room in a file it is looked where a line ends before bytes are moved."""
LONGEST_LINE: Final = 256 << 10
"""A longer line is written in pieces, so that a program without newlines cannot fill the memory."""
LOST_ANEW_SECONDS: Final = 60.0
"""After so long without a loss the next one is said again."""

_TIME_CHARS: Final = len("2026-11-28T10:00:00.123Z ")

_arrivals = itertools.count(1)


class OutputStream:
    """One stream of one instance: its FIFO, its file, and whoever waits for more of it.

    Args:
        fifo: path of the FIFO; made here unless it is there, or held.
        held: a descriptor of the FIFO that outlived an earlier supervisor; ours from here on.
        instance: name before lines, or in them.
        stream: ``stdout`` or ``stderr``.
        file: shared when two streams go to one path.
        on_loss: called when output begins to be dropped.
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
        on_loss: Callable[[OutputStream, OSError], None] = lambda stream, error: None,
    ) -> None:
        self.file = file
        self.instance = instance
        self.stream = stream
        self.arrived = 0
        """When something came last: whoever has the smaller number was first."""
        self.lost_bytes = 0
        """Output dropped because the file could not be written (disk full)."""
        self._on_loss = on_loss
        self._lost_at = -math.inf
        self._format = format_
        self._fifo = fifo
        self._loop = asyncio.get_running_loop()
        self._followers: list[asyncio.Future[None]] = []
        self._pause: asyncio.TimerHandle | None = None
        is_new = held is None and _make_fifo(fifo)
        # Read-write: with a writer of our own the FIFO never comes to its end, which would be "readable" for
        # ever once the last instance has gone.
        self._reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) if held is None else held
        if held is None:
            enlarge(self._reader)
        try:
            self._spool = None if is_new and format_ == "raw" else self._open_spool()
        except OSError:
            os.close(self._reader)
            raise
        self._loop.add_reader(self._reader, self._readable)

    @property
    def reader(self) -> LogReader:
        """What has been written so far, to be read back."""
        return LogReader(self.file, instance=self.instance, stream=self.stream)

    def as_written(self, line: str) -> str:
        """A line of the file as the program wrote it, without what the format adds."""
        if self._format == "prefix":
            return line.removeprefix(self.prefix)
        if self._format == "timestamp":
            return line[_TIME_CHARS:] if time_of(line[:_TIME_CHARS].encode()) else line
        if self._format == "json":
            # Before a change of the format there may be other lines.
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
                return str(orjson.loads(line)["line"])
        return line

    @property
    def format(self) -> Format:
        """How lines are written from here on; what is in the files may be of another."""
        return self._format

    @property
    def prefix(self) -> str:
        """What every line begins with beside what the program wrote, whoever reads it; empty where that is
        not the same for all."""
        return f"{self.instance} | " if self._format == "prefix" else ""

    @property
    def is_stamped(self) -> bool:
        """Lines begin with their times."""
        return self._format in {"timestamp", "json"}

    def redirect(self, file: RotatingFile, format_: Format) -> None:
        """Go on in another file or another format; the instance notices nothing."""
        self._take_all()
        self.file, self._format = file, format_
        if format_ != "raw":
            self._spool = self._spool or Spool(self._spool_path)
        elif self._spool is not None:
            self._let_through(self._spool)
            self._spool = None
        self._wake()

    def fileno(self) -> int:
        """The supervisor's own descriptor of the FIFO: whoever holds it keeps what is in it."""
        return self._reader

    def open_child_end(self) -> int:
        """A descriptor for the instance's end; an open file description of its own, because O_NONBLOCK
        belongs to the description and the program must not see it. The caller closes it after the spawn.
        """
        # Not by its path, from which something that tidies up may have removed it.
        return os.open(f"/proc/self/fd/{self._reader}", os.O_RDWR | os.O_CLOEXEC)

    def drain(self) -> None:
        """Take what lies in the FIFO; called when the instance has ended. At most two pipe-fulls: a child it
        left behind may write faster than we read.
        """
        self._take_all()
        if self._spool is not None:
            self._write_out(self._spool, all_of_it=True)
        self._wake()

    def _take_all(self) -> None:
        taken = 0
        while taken < 2 * PIPE_BYTES and (moved := self._move()) > 0:
            taken += moved

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
        self.arrived = next(_arrivals)
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

    @property
    def _spool_path(self) -> Path:
        return Path(f"{self._fifo}.spool")

    def _open_spool(self) -> Spool | None:
        """The spool, where the format needs one; what an earlier supervisor has left in it is written."""
        path = self._spool_path
        if self._format == "raw" and not path.exists():
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
        self._let_through(spool)
        return None

    def _let_through(self, spool: Spool) -> None:
        """Write what waits as it is, and end the spool."""
        with contextlib.suppress(OSError):
            self.file.write(spool.waiting(spool.pending))
        spool.close(remove=True)

    def _move_raw(self) -> int:
        file = self.file
        if not file.spliceable:
            return self._copy_raw()
        room = file.room
        if room > LINE_MARGIN and not file.is_old:
            return file.splice_from(self._reader, min(room - LINE_MARGIN, PIPE_BYTES))
        ahead = _peephole().peek(self._reader, LINE_MARGIN)
        is_full = len(ahead) > room
        cut = ahead.rfind(b"\n", 0, max(room, 0)) + 1
        if file.is_old and cut > 0:
            cut, is_full = ahead.find(b"\n") + 1, True
        elif cut == 0 and len(ahead) + file.line_room <= room:
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
        if self.file.is_old:
            self.file.rotate()
        if self._format == "json":
            self._write_json(spool, data)
        else:
            self._write_prefixed(spool, data)

    def _write_prefixed(self, spool: Spool, data: bytes) -> None:
        # Not line by line: it is the same text before each.
        prefix = f"{timestamp()} ".encode() if self._format == "timestamp" else self.prefix.encode()
        lines = data.removesuffix(b"\n").replace(b"\n", b"\n" + prefix)
        text = b"".join((prefix, lines, b"\n"))
        at, left = 0, len(data)
        while at < len(text):
            room = self.file.room
            if at == 0 and len(text) <= room:
                self._write_batch(spool, text, left)
                return
            end = len(text) if len(text) - at <= room else text.rfind(b"\n", at, at + max(room, 0)) + 1
            if end == 0 and not self.file.empty:
                self.file.rotate()
                continue
            if end == 0:  # longer than a file may be
                end = text.index(b"\n", at) + 1
            # A line without an end has been given one.
            size = min(end - at - text.count(b"\n", at, end) * len(prefix), left)
            self._write_batch(spool, text[at:end], size)
            at, left = end, left - size

    def _write_json(self, spool: Spool, data: bytes) -> None:
        now = timestamp()
        left, room = len(data), self.file.room
        text = self._all_as_json(now, data)
        if text is not None and len(text) <= room:
            self._write_batch(spool, text, left)
            return
        batch: list[bytes] = []
        length = size = 0  # of the batch, and of what it stands for
        for line in data.removesuffix(b"\n").split(b"\n"):
            text = self._as_json(now, line.decode("utf-8", "replace"))
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

    def _as_json(self, now: str, line: str) -> bytes:
        record = {"at": now, "instance": self.instance, "stream": self.stream, "line": line}
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)

    def _all_as_json(self, now: str, data: bytes) -> bytes | None:
        """Many lines at once, as an array whose separators are replaced; None where that will not do."""
        if b'",\n' in data or data.endswith(b'",'):
            return None  # an escaped quote, a comma and the closing quote would look like a separator
        lines = data.removesuffix(b"\n").decode("utf-8", "replace").split("\n")
        head, tail = self._as_json(now, "")[:-3], b'"}\n'
        return b"".join((head, orjson.dumps(lines)[2:-2].replace(b'","', tail + head), tail))

    def _count_loss(self, error: OSError, size: int) -> None:
        """The file cannot be written (disk full, no permission): the program must go on, so its output is
        dropped, counted and said."""
        now = self._loop.time()
        if now - self._lost_at > LOST_ANEW_SECONDS:
            log.error("%s: output is lost: %s: %s", self.instance, self.file.path, error.strerror)
            self._on_loss(self, error)
        self._lost_at = now
        self.lost_bytes += size

    def _discard(self) -> int:
        with contextlib.suppress(BlockingIOError):
            return len(os.read(self._reader, PIPE_BYTES))
        return 0


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
