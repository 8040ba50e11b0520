"""Reading output back: the last lines, those since a time, and whatever comes after a place.

The files are the ones of a `RotatingFile`, compressed or not. Nobody is waited for and nothing is kept: a
reader that takes its time costs nothing, and each answer is bounded.
"""

from __future__ import annotations

import codecs
import logging
import os
import re
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from asyncsup import logarchive
from asyncsup.errors import RequestError
from asyncsup.logfile import PACKED, RotatingFile, examine, facts_of, to_read

log = logging.getLogger("asyncsup.logs")

READ_BYTES: Final = 256 << 10
"""Most that one answer to `logs` or `logs.follow` carries per stream."""
SCAN_BYTES: Final = 16 << 20
"""So far back the beginning of the last lines is looked for."""
_BLOCK_BYTES: Final = logarchive.BLOCK_BYTES
_STEP_BYTES: Final = 64 << 10
_TIME: Final = re.compile(rb'(?:\{"at":")?(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z)["\x20]')


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """A place in a stream that stays valid across rotation and compression.

    Attributes:
        inode, born: the file; see `asyncsup.filefacts`. Inode 0: before all files; born 0: not known.
        offset: the bytes before it.
    """

    instance: str
    stream: str
    inode: int
    born: int
    offset: int

    def to_json(self) -> dict[str, Any]:
        return {
            "instance": self.instance, "stream": self.stream,
            "inode": self.inode, "born": self.born, "offset": self.offset,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: object) -> Cursor:
        if isinstance(value, dict):
            instance, stream = value.get("instance"), value.get("stream")
            numbers = [value.get("inode"), value.get("born", 0), value.get("offset")]
            named = isinstance(instance, str) and stream in {"stdout", "stderr"}
            if named and all(type(number) is int and number >= 0 for number in numbers):
                inode, born, offset = map(int, numbers)
                return cls(instance=str(instance), stream=str(stream), inode=inode, born=born, offset=offset)
        raise RequestError("cursors: each must be a cursor from an earlier answer")


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What was read.

    Attributes:
        cursor: the place after it.
        size: bytes it had in the files.
        left: bytes there are after it.
        gap: what came right after the cursor is not there any more; this is the oldest there is.
    """

    text: str
    cursor: Cursor
    size: int
    left: int
    gap: bool


class _Segment(msgspec.Struct, frozen=True, kw_only=True):
    """One of the files."""

    path: Path
    identity: tuple[int, int]
    size: int
    modified: float
    packed: bool

    def read(self, offset: int, limit: int) -> bytes:
        """Nothing where it cannot be read: the others can."""
        try:
            with to_read(self.path) as fd:
                if self.packed:
                    return logarchive.read(fd, offset, limit)
                return os.pread(fd, limit, offset)
        except (OSError, zlib.error) as error:
            log.warning("%s: %s", self.path, error)
            return b""


class LogReader:
    """Reads what one stream has written."""

    def __init__(self, file: RotatingFile, *, instance: str, stream: str) -> None:
        self._file = file
        self._instance = instance
        self._stream = stream

    def end(self) -> Cursor:
        """The place after everything there is."""
        newest = next(self._newest_first(), None)
        return self._start if newest is None else self._at(newest, newest.size)

    def tail(self, lines: int) -> Cursor:
        """The place before the last ``lines`` lines, not farther back than `SCAN_BYTES`."""
        if lines == 0:
            return self.end()
        place, scanned, ends = self._start, 0, lines
        for segment in self._newest_first():
            end = segment.size
            while end > 0:
                step = end % _BLOCK_BYTES or _BLOCK_BYTES
                data = segment.read(end - step, step)
                if scanned == 0 and data.endswith(b"\n"):
                    ends += 1  # this one ends the last line, and does not begin it
                if (count := data.count(b"\n")) >= ends:
                    before = data.rsplit(b"\n", ends)[0]
                    return self._at(segment, end - step + len(before) + 1)
                ends -= count
                end -= step
                scanned += step
                if scanned >= SCAN_BYTES:
                    return self._at(segment, end)
            place = self._at(segment, 0)
        return place

    def since(self, time: float, *, stamped: bool) -> tuple[Cursor, bool]:
        """The place before the first line that is not older; and whether it is exactly that.

        Args:
            time: seconds since the epoch.
            stamped: lines begin with their times. Otherwise only the files have any: it is the beginning of
                the file that was being written then.
        """
        found: _Segment | None = None
        for segment in self._newest_first():
            if segment.modified < time:
                break
            found = segment
        if found is None:
            return self.end(), True
        if not stamped:
            return self._at(found, 0), found.identity[1] / 1e6 >= time
        moment = datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds")
        return self._at(found, _first_since(found, moment.removesuffix("+00:00").encode() + b"Z")), True

    def later(self, one: Cursor, other: Cursor) -> Cursor:
        """Which of two places comes after the other."""
        for segment in self._newest_first():
            here = [cursor for cursor in (one, other) if _is_in(segment, cursor)]
            if here:
                return max(here, key=lambda cursor: cursor.offset)
        return one

    def read(self, cursor: Cursor, limit: int = READ_BYTES) -> Piece:
        """What came after ``cursor``, at most ``limit`` bytes.

        When the file of the cursor has been rotated away altogether, reading goes on at the oldest there is.
        """
        chain: list[_Segment] = []
        for segment in self._newest_first():
            chain.append(segment)
            if _is_in(segment, cursor):
                break
        found = bool(chain) and _is_in(chain[-1], cursor)
        gap = not found and cursor.inode != 0 and bool(chain)
        offset = cursor.offset if found else 0
        if found and offset > chain[-1].size:
            offset, gap = 0, True  # somebody else has cut it off
        left = sum(segment.size for segment in chain) - offset
        parts: list[bytes] = []
        room = limit
        for segment in reversed(chain):
            data = segment.read(offset, room)
            parts.append(data)
            room -= len(data)
            cursor = self._at(segment, offset + len(data))
            if room <= 0:
                break
            offset = 0
        data = b"".join(parts)
        cut = _incomplete(data)
        if 0 < cut < len(data) and cut <= len(parts[-1]):
            # The rest of a character is still to come.
            data = data[:-cut]
            cursor = Cursor(**{**cursor.to_json(), "offset": cursor.offset - cut})
        text = data.decode("utf-8", "replace")
        return Piece(text=text, cursor=cursor, size=len(data), left=max(0, left - len(data)), gap=gap)

    @property
    def _start(self) -> Cursor:
        return Cursor(instance=self._instance, stream=self._stream, inode=0, born=0, offset=0)

    def _at(self, segment: _Segment, offset: int) -> Cursor:
        inode, born = segment.identity
        return Cursor(instance=self._instance, stream=self._stream, inode=inode, born=born, offset=offset)

    def _newest_first(self) -> Iterator[_Segment]:
        for path in self._file.newest_first():
            facts = facts_of(path)
            if facts is None:
                continue
            packed = path.suffix == PACKED and path != self._file.path
            archive = examine(path) if packed else None
            if packed and archive is None:
                continue  # somebody else's
            yield _Segment(
                path=path,
                identity=facts.identity if archive is None else archive.identity,
                size=facts.size if archive is None else archive.size,
                modified=facts.modified,
                packed=packed,
            )


def time_of(line: bytes) -> bytes | None:
    """The time a line begins with, as RFC 3339 in UTC, which sorts as time does; None if it has none."""
    found = _TIME.match(line)
    return found[1] if found else None


def _is_in(segment: _Segment, cursor: Cursor) -> bool:
    return segment.identity[0] == cursor.inode and cursor.born in {0, segment.identity[1]}


def _incomplete(data: bytes) -> int:
    """How many bytes at the end begin a character that is not complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-4:])
    return len(decoder.getstate()[0])


def _lines_with_times(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Offset and time of each line that has one, of those that begin in ``data`` from ``start`` on."""
    while 0 <= start < len(data):
        if (time := time_of(data[start : start + 64])) is not None:
            yield start, time
        start = data.find(b"\n", start) + 1 or -1


def _first_since(segment: _Segment, moment: bytes) -> int:
    """Offset of the first line that is not older than ``moment``; the size if there is none."""
    low, high = 0, segment.size  # what begins before `low` is older
    while high - low > _STEP_BYTES:
        middle = (low + high) // 2
        data = segment.read(middle, _STEP_BYTES)
        start = data.find(b"\n") + 1 or -1
        line = next(_lines_with_times(data, start), None)
        if line is not None and middle + line[0] < high and line[1] < moment:
            low = middle + line[0]
        else:
            high = middle
    while low < segment.size:
        data = segment.read(low, _STEP_BYTES)
        if not data:
            break
        for offset, time in _lines_with_times(data, 0):
            if time >= moment:
                return low + offset
        # The last line may be cut off: it is looked at again, unless it is all there is.
        low += data.rfind(b"\n", 0, len(data) - 1) + 1 or len(data)
    return segment.size
