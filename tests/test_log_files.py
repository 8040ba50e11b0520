"""Log files: rotated by age as well, compressed behind everybody's back, and read back all the same."""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import children_of, wait_for

from asyncsup.compressor import Compressor
from asyncsup.filefacts import look
from asyncsup.logfile import RotatingFile, examine
from asyncsup.logreader import LogReader
from asyncsup.logs import Format, OutputStream

pytestmark = pytest.mark.anyio

HOUR = 3600.0


class Stage:
    """A file in a folder of its own, written to through a stream."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "out.log"
        self.compressor = Compressor()
        self.clock = time.time
        self.files: list[RotatingFile] = []
        self.streams: list[OutputStream] = []

    def file(
        self,
        *,
        max_size: int = 1 << 20,
        max_files: int = 1000,
        max_age: float | None = None,
        compress: bool = False,
    ) -> RotatingFile:
        file = RotatingFile(
            self.path, max_size=max_size, max_files=max_files, max_age=max_age,
            compress=self.compressor.submit if compress else None, now=self._now,
        )  # fmt: skip
        self.files.append(file)
        file.take_up()
        return file

    def _now(self) -> float:
        return self.clock()

    def stream(self, file: RotatingFile, format_: Format = "raw") -> OutputStream:
        stream = OutputStream(self.folder / "fifo", file, instance="web:0", stream="stdout", format_=format_)
        self.streams.append(stream)
        return stream

    def put(self, stream: OutputStream, data: bytes) -> None:
        """Have it written, and taken from the FIFO."""
        fd = stream.open_child_end()
        for start in range(0, len(data), 256 << 10):
            os.write(fd, data[start : start + (256 << 10)])
            stream.drain()
        os.close(fd)

    def names(self) -> set[str]:
        return {path.name for path in self.folder.glob("out.log*")}

    def contents(self) -> bytes:
        """Of all files, oldest first, as `zcat -f` would."""
        numbered = {
            int(path.name.removesuffix(".gz").split(".")[2]): path for path in self.folder.glob("out.log.*")
        }
        paths = [numbered[number] for number in sorted(numbered, reverse=True)]
        contents = [gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in paths]
        return b"".join(contents) + (self.path.read_bytes() if self.path.exists() else b"")

    async def all_compressed(self) -> None:
        await until(lambda: all(name == "out.log" or name.endswith(".gz") for name in self.names()))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    result = Stage(tmp_path)
    yield result
    result.compressor.close()
    for stream in result.streams:
        stream.close()
    for file in result.files:
        file.close()


def reader_of(file: RotatingFile) -> LogReader:
    return LogReader(file, instance="web:0", stream="stdout")


def text_from(reader: LogReader, cursor: object, limit: int = 1 << 30) -> str:
    return reader.read(cursor, limit).text  # type: ignore[arg-type]


# --- age ----------------------------------------------------------------------------------------------------


async def test_a_file_is_rotated_when_it_is_old_though_nobody_writes(stage: Stage) -> None:
    stage.put(stage.stream(stage.file(max_age=0.2)), b"one\n")
    await until(lambda: stage.names() == {"out.log.1"})
    assert (stage.folder / "out.log.1").read_bytes() == b"one\n"


async def test_the_age_is_the_files_own_and_holds_for_the_next_supervisor(stage: Stage) -> None:
    stage.put(stage.stream(stage.file(max_age=2 * HOUR)), b"one\n")
    stage.files.pop().close()
    stage.clock = lambda: time.time() + HOUR
    stage.file(max_age=2 * HOUR)
    await asyncio.sleep(0.01)
    assert stage.names() == {"out.log"}
    stage.file(max_age=HOUR / 2)
    await until(lambda: stage.names() == {"out.log.1"})


async def test_an_age_that_is_configured_later_counts_from_the_files_birth(stage: Stage) -> None:
    file = stage.file()
    stage.put(stage.stream(file), b"one\n")
    stage.clock = lambda: time.time() + HOUR
    file.limit(max_size=1 << 20, max_files=10, max_age=HOUR / 2)
    await until(lambda: stage.names() == {"out.log.1"})


async def test_there_is_one_timer_for_a_file_and_none_without_one(stage: Stage) -> None:
    timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    before = len([timer for timer in timers if not timer.cancelled()])

    def more() -> int:
        return len([timer for timer in timers if not timer.cancelled()]) - before

    file = stage.file(max_age=HOUR)
    stream = stage.stream(file)
    assert more() == 0
    for _ in range(3):
        stage.put(stream, b"one\n")
    assert more() == 1
    file.rotate()
    assert more() == 0
    stage.put(stream, b"two\n")
    assert more() == 1
    file.limit(max_size=100, max_files=2)
    assert more() == 0


async def test_an_old_file_waits_for_the_end_of_its_last_line(stage: Stage) -> None:
    file = stage.file(max_age=HOUR)
    stream = stage.stream(file)
    stage.put(stream, b"one\ntw")
    stage.clock = lambda: time.time() + 2 * HOUR
    file.limit(max_size=1 << 20, max_files=10, max_age=HOUR)
    await until(lambda: file.is_old)
    assert stage.names() == {"out.log"}
    stage.put(stream, b"o\nthree\n")
    assert (stage.folder / "out.log.1").read_bytes() == b"one\ntwo\n"
    assert stage.path.read_bytes() == b"three\n"


async def test_a_clock_that_was_set_back_makes_no_file_old(stage: Stage) -> None:
    now = time.time()
    stage.clock = lambda: now + HOUR - 0.05
    file = stage.file(max_age=HOUR)
    stage.put(stage.stream(file), b"one\n")
    stage.clock = lambda: now - HOUR
    file._reached_age()
    assert stage.names() == {"out.log"}
    assert not file.is_old


async def test_without_a_birth_the_last_write_counts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncsup import filefacts, logfile

    monkeypatch.setattr(logfile, "look", filefacts._look_without_birth)
    stage.put(stage.stream(stage.file()), b"one\n")
    os.utime(stage.path, (0, time.time() - HOUR))
    stage.file(max_age=HOUR / 2)
    await until(lambda: stage.names() == {"out.log.1"})


async def test_without_a_birth_a_busy_file_gets_old_all_the_same(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncsup import filefacts, logfile

    monkeypatch.setattr(logfile, "look", filefacts._look_without_birth)
    stream = stage.stream(stage.file(max_age=0.3))

    def written_to() -> bool:
        stage.put(stream, b"line\n")
        return "out.log.2" in stage.names()

    await until(written_to)
    assert set(stage.contents().splitlines()) == {b"line"}


def test_the_facts_of_a_file_are_those_of_stat(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    os.utime(path, (1, 1_700_000_000.25))
    facts, status = look(path), path.stat()
    assert facts is not None
    assert (facts.identity[0], facts.size, facts.modified) == (status.st_ino, 3, 1_700_000_000.25)
    assert facts.is_regular
    assert look(tmp_path / "missing") is None
    device = look("/dev/null")
    assert device is not None
    assert not device.is_regular


# --- compression --------------------------------------------------------------------------------------------


def lines(first: int, last: int) -> bytes:
    return b"".join(b"line %06d of what is written\n" % number for number in range(first, last))


async def test_what_was_rotated_is_compressed_and_every_tool_reads_it(stage: Stage) -> None:
    stream = stage.stream(stage.file(max_size=300_000, compress=True))
    stage.put(stream, lines(0, 60_000))
    await stage.all_compressed()
    assert len(stage.names()) > 5
    assert stage.contents() == lines(0, 60_000)
    assert subprocess.run(["gzip", "-t", *stage.folder.glob("*.gz")], check=False).returncode == 0
    for path in stage.folder.glob("*.gz"):
        assert path.stat().st_mode & 0o777 == stage.path.stat().st_mode & 0o777
        assert path.stat().st_size < 100_000


async def test_compressing_is_another_process_of_the_lowest_priority_and_one_at_a_time(stage: Stage) -> None:
    before = set(children_of(os.getpid()))
    stream = stage.stream(stage.file(max_size=30_000_000, compress=True))
    stage.put(stream, random.Random(1).randbytes(16 << 20).replace(b"\n", b"x") + b"\n")
    stream.file.rotate()
    stage.put(stream, b"more\n")
    stream.file.rotate()
    (child,) = set(children_of(os.getpid())) - before
    # Not through the loop, which would reap it, should it end meanwhile, and begin with the next.
    wait_for(lambda: os.getpriority(os.PRIO_PROCESS, child) == 19, "the lowest priority")
    os.kill(child, signal.SIGSTOP)
    assert set(children_of(os.getpid())) - before == {child}
    # Killed, it leaves the file as it was; it has another turn after the next rotation.
    os.kill(child, signal.SIGKILL)
    await until(lambda: child not in children_of(os.getpid()))
    stage.put(stream, b"and more\n")
    stream.file.rotate()
    await stage.all_compressed()
    assert stage.contents().endswith(b"\nmore\nand more\n")


async def test_what_a_killed_supervisor_has_left_half_done_is_begun_anew(stage: Stage) -> None:
    file = stage.file()
    stream = stage.stream(file)
    stage.put(stream, lines(0, 100))
    file.rotate()
    file.part.write_bytes(b"half of it")
    stage.file(compress=True)
    await stage.all_compressed()
    assert stage.names() == {"out.log.1.gz"}
    assert stage.contents() == lines(0, 100)


async def test_killed_before_the_original_went_it_is_there_once(stage: Stage) -> None:
    file = stage.file(compress=True)
    stream = stage.stream(file)
    stage.put(stream, lines(0, 100))
    file.rotate()
    os.link(stage.folder / "out.log.1", stage.folder / "kept")
    await stage.all_compressed()
    (stage.folder / "kept").rename(stage.folder / "out.log.1")
    assert text_from(reader_of(file), reader_of(file).tail(1000)).encode() == lines(0, 100)
    stage.put(stream, lines(100, 200))
    file.rotate()
    await stage.all_compressed()
    assert stage.contents() == lines(0, 200)


async def test_somebody_elses_file_beside_ours_is_left_alone(stage: Stage) -> None:
    file = stage.file(compress=True)
    stream = stage.stream(file)
    with gzip.open(stage.folder / "out.log.1.gz", "wb") as foreign:
        foreign.write(b"not ours\n")
    stage.put(stream, lines(0, 10))
    file.rotate()
    await stage.all_compressed()
    assert text_from(reader_of(file), reader_of(file).tail(1000)).encode() == lines(0, 10)
    assert stage.contents() == b"not ours\n" + lines(0, 10)


async def test_files_that_are_too_many_go_in_either_form(stage: Stage) -> None:
    file = stage.file(max_files=4, compress=True)
    stream = stage.stream(file)
    for number in range(8):
        stage.put(stream, lines(number, number + 1))
        file.rotate()
        await stage.all_compressed()
    assert stage.names() == {"out.log.1.gz", "out.log.2.gz", "out.log.3.gz"}
    assert stage.contents() == lines(5, 8)
    file.limit(max_size=1 << 20, max_files=2)
    assert stage.names() == {"out.log.1.gz"}


async def test_a_file_that_is_dropped_while_it_is_compressed_does_not_come_back(stage: Stage) -> None:
    file = stage.file(max_files=3, compress=True)
    stream = stage.stream(file)
    stage.put(stream, random.Random(1).randbytes(4 << 20) + b"\n")
    for _ in range(4):
        stage.put(stream, b"x\n")
        file.rotate()
    await stage.all_compressed()
    assert stage.contents() == b"x\nx\n"
    assert not file.part.exists()


# --- reading back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
async def test_a_reader_misses_nothing_whatever_happens_to_the_files(stage: Stage, seed: int) -> None:
    dice = random.Random(seed)
    file = stage.file(max_size=dice.choice([70_000, 400_000]), compress=True)
    stream, reader = stage.stream(file), reader_of(file)
    written = read = ""
    cursor = reader.end()
    for number in range(60):
        text = "".join(f"{number:03d} é世界 {'x' * dice.randrange(60)}\n" for _ in range(dice.randrange(700)))
        stage.put(stream, text.encode())
        written += text
        if dice.random() < 0.3:
            await stage.all_compressed()
        if dice.random() < 0.7:
            piece = reader.read(cursor, dice.randrange(20, 60_000))
            read, cursor = read + piece.text, piece.cursor
            assert not piece.gap
    while (piece := reader.read(cursor, 50_001)).text:
        read, cursor = read + piece.text, piece.cursor
    assert piece.left == 0
    assert read == written


async def test_the_last_lines_are_found_in_compressed_files(stage: Stage) -> None:
    file = stage.file(max_size=600_000, compress=True)
    stage.put(stage.stream(file), lines(0, 60_000))
    await stage.all_compressed()
    reader = reader_of(file)
    for count in (1, 2, 999, 25_000, 59_999, 60_000, 70_000):
        assert text_from(reader, reader.tail(count)).encode() == lines(max(0, 60_000 - count), 60_000)


async def test_a_reader_that_is_too_late_is_told(stage: Stage) -> None:
    file = stage.file(max_size=100, max_files=3)
    stream, reader = stage.stream(file), reader_of(file)
    stage.put(stream, b"early\n")
    cursor = reader.end()
    stage.put(stream, lines(0, 100))
    piece = reader.read(cursor)
    assert piece.gap
    assert piece.text.encode() == stage.contents()
    assert not reader.read(piece.cursor).gap


async def test_a_reader_at_the_end_stays_there_when_the_file_is_rotated(stage: Stage) -> None:
    file = stage.file()
    stream, reader = stage.stream(file), reader_of(file)
    stage.put(stream, b"one\n")
    file.rotate()
    cursor = reader.end()
    assert text_from(reader, cursor) == ""
    stage.put(stream, b"two\n")
    assert text_from(reader, cursor) == "two\n"


async def test_a_damaged_file_costs_its_own_lines(stage: Stage) -> None:
    file = stage.file(compress=True)
    stream, reader = stage.stream(file), reader_of(file)
    for number in range(3):
        stage.put(stream, lines(number, number + 1))
        file.rotate()
        await stage.all_compressed()
    packed = bytearray((stage.folder / "out.log.2.gz").read_bytes())
    packed[60:70] = b"\xff" * 10
    (stage.folder / "out.log.2.gz").write_bytes(packed)
    assert reader.read(reader.tail(0)).text == ""
    (stage.folder / "out.log.1.gz").write_bytes(b"")
    oldest = examine(stage.folder / "out.log.3.gz")
    assert oldest is not None
    start = reader.tail(1000)
    assert lines(0, 1).decode() in reader.read(start).text


# --- since --------------------------------------------------------------------------------------------------


def stamp(number: int) -> float:
    return 1_700_000_000.0 + number


def stamped(format_: Format, first: int, last: int) -> bytes:
    moments = [
        datetime.fromtimestamp(stamp(number), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        for number in range(first, last)
    ]
    if format_ == "json":
        return b"".join(
            b'{"at":"%s","line":"%d"}\n' % (at.encode(), n) for n, at in enumerate(moments, first)
        )
    return b"".join(b"%s %d\n" % (at.encode(), n) for n, at in enumerate(moments, first))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("format_", ["timestamp", "json"])
async def test_since_is_exact_where_lines_have_times(stage: Stage, format_: Format, compress: bool) -> None:
    file = stage.file(compress=compress)
    for first in range(0, 30_000, 10_000):
        stage.path.write_bytes(stamped(format_, first, first + 10_000))
        os.utime(stage.path, (0, stamp(first + 9_999)))
        if first < 20_000:
            file.rotate()
    if compress:
        await stage.all_compressed()
    reader = reader_of(file)
    for number in (0, 1, 4_999, 9_999, 10_000, 17_123, 20_000, 29_998, 29_999):
        for moment, first in ((stamp(number), number), (stamp(number) - 0.5, number)):
            cursor, exact = reader.since(moment, stamped=True)
            assert exact
            assert text_from(reader, cursor).encode() == stamped(format_, first, 30_000)
    assert text_from(reader, reader.since(stamp(30_000), stamped=True)[0]) == ""
    cursor, _ = reader.since(stamp(17_000), stamped=True)
    assert reader.later(cursor, reader.tail(5)) == reader.tail(5)
    assert reader.later(reader.tail(29_000), cursor) == cursor


async def test_since_finds_its_way_past_lines_without_a_time(stage: Stage) -> None:
    file = stage.file()
    raw = b"a line from before the format was changed\n" * 5_000
    stage.path.write_bytes(raw + stamped("timestamp", 0, 5_000))
    reader = reader_of(file)
    cursor, _ = reader.since(stamp(4_000), stamped=True)
    assert text_from(reader, cursor).encode() == stamped("timestamp", 4_000, 5_000)


async def test_since_is_as_exact_as_the_files_where_lines_have_none(stage: Stage) -> None:
    file = stage.file()
    began = time.time()
    stage.path.write_bytes(b"one\n")
    os.utime(stage.path, (0, began - 2 * HOUR))
    file.rotate()
    stage.path.write_bytes(b"two\n")
    os.utime(stage.path, (0, began - HOUR))
    file.rotate()
    stage.path.write_bytes(b"three\n")
    reader = reader_of(file)
    for ago, text, exact in (
        (HOUR / 2, "three\n", True), (HOUR, "two\nthree\n", True), (2.5 * HOUR, "one\ntwo\nthree\n", True),
    ):  # fmt: skip
        cursor, is_exact = reader.since(began - ago, stamped=False)
        assert text_from(reader, cursor) == text
        assert is_exact is exact
