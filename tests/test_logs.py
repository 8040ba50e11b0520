"""Output: through the FIFO into rotated files, nothing lost, readable across rotation."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncsup.errors import RequestError
from asyncsup.logfile import RotatingFile
from asyncsup.logreader import Cursor
from asyncsup.logs import Format, OutputStream

pytestmark = pytest.mark.anyio


def oldest_first(stream: OutputStream) -> list[Path]:
    return [*stream.file.newest_first()][::-1]


def tail(stream: OutputStream, lines: int) -> str:
    return stream.reader.read(stream.reader.tail(lines)).text


class Made:
    """A stream in a folder of its own, and whatever is written into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.streams: list[OutputStream] = []

    def stream(self, *, format_: Format = "raw", max_size: int = 1 << 20, max_files: int = 5) -> OutputStream:
        file = RotatingFile(self.folder / "out.log", max_size=max_size, max_files=max_files)
        stream = OutputStream(self.folder / "fifo", file, instance="web:0", stream="stdout", format_=format_)
        self.streams.append(stream)
        return stream

    async def run(self, stream: OutputStream, program: str) -> None:
        """Run a Python program with its output in the stream, the way an instance's is."""
        fd = stream.open_child_end()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=fd)
        os.close(fd)
        assert await asyncio.wait_for(process.wait(), 60) == 0
        stream.drain()

    def text(self) -> str:
        return (self.folder / "out.log").read_text()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    result = Made(tmp_path)
    yield result
    for stream in result.streams:
        stream.file.close()


@pytest.fixture(autouse=True)
async def closed(made: Made) -> object:
    yield
    for stream in made.streams:
        stream.close()
    return


async def test_everything_a_program_writes_arrives_though_it_has_ended(made: Made) -> None:
    await made.run(made.stream(), "print('hello'); print('last words', end='')")
    assert made.text() == "hello\nlast words"


@pytest.mark.parametrize("format_", ["raw", "prefix", "timestamp", "json"])
async def test_a_flood_is_rotated_between_lines_and_nothing_is_lost(made: Made, format_: Format) -> None:
    stream = made.stream(format_=format_, max_size=300_000, max_files=1000)
    await made.run(stream, "for i in range(60_000): print(f'line {i:06d}')")
    numbers: list[int] = []
    for path in oldest_first(stream):
        data = path.read_text()
        assert path.stat().st_size <= 300_000
        assert data.endswith("\n")
        numbers += [int(number) for number in re.findall(r"line (\d{6})", data)]
    assert numbers == list(range(60_000))
    assert len(oldest_first(stream)) > 2


async def test_only_so_many_files_are_kept(made: Made) -> None:
    stream = made.stream(max_size=1000, max_files=3)
    await made.run(stream, "for i in range(1000): print(f'line {i:06d}')")
    files = oldest_first(stream)
    assert [path.name for path in files] == ["out.log.2", "out.log.1", "out.log"]
    assert files[-1].read_text().endswith("line 000999\n")


async def test_a_line_longer_than_a_file_is_cut_and_kept(made: Made) -> None:
    stream = made.stream(max_size=1000, max_files=100)
    await made.run(stream, "print('x' * 5000)")
    assert b"".join(path.read_bytes() for path in oldest_first(stream)) == b"x" * 5000 + b"\n"


async def test_timestamps_stand_before_every_line(made: Made) -> None:
    await made.run(made.stream(format_="timestamp"), "print('a'); print('b', end='')")
    lines = made.text().splitlines()
    assert len(lines) == 2
    for line, word in zip(lines, "ab", strict=True):
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z {word}", line)


async def test_the_name_stands_before_every_line_and_is_taken_away_again(made: Made) -> None:
    stream = made.stream(format_="prefix")
    fd = stream.open_child_end()
    for piece in (b"one\n\ntw", b"o\nweb:0 | three\n\xff", b"last, without an end"):
        os.write(fd, piece)
        stream._take_all()
    os.close(fd)
    assert (
        made.folder / "out.log"
    ).read_bytes() == b"web:0 | one\nweb:0 | \nweb:0 | two\nweb:0 | web:0 | three\n"
    stream.drain()
    lines = (made.folder / "out.log").read_text(errors="replace").splitlines()
    assert lines[4:] == ["web:0 | \ufffdlast, without an end"]
    assert [stream.as_written(line) for line in lines[:4]] == ["one", "", "two", "web:0 | three"]


async def test_a_change_of_the_format_leaves_each_line_in_one_of_them(made: Made) -> None:
    stream = made.stream(format_="prefix")
    fd = stream.open_child_end()
    formats: list[Format] = ["timestamp", "prefix", "json", "prefix", "raw", "prefix"]
    for number, format_ in enumerate(formats):
        os.write(fd, b"%d\nhalf of" % number)
        stream.redirect(stream.file, format_)
        os.write(fd, b" %d\n" % number)
        stream._take_all()
    os.close(fd)
    # Half a line that is in the file already, as `raw` has it, has no name before it but in it.
    expected = [line for number in range(6) for line in (f"{number}", f"half of {number}")]
    shown = [
        str(json.loads(line)["line"])
        if line.startswith("{")
        else line.split("Z ")[-1].removeprefix("web:0 | ")
        for line in made.text().replace("half ofweb:0 | ", "half of").splitlines()
    ]
    assert shown == expected


async def test_json_lines_name_the_instance_and_survive_invalid_utf8(made: Made) -> None:
    stream = made.stream(format_="json")
    await made.run(stream, "import os; os.write(1, b'caf\\xc3\\xa9 \\xff\\n')")
    record = json.loads(made.text())
    assert record["line"] == "café \ufffd"
    assert (record["instance"], record["stream"]) == ("web:0", "stdout")


_PIECES = [
    b'"',
    b",",
    b'","',
    b'",',
    b"\\",
    b"\n",
    b"\n\n",
    b"a",
    b"\xc3",
    b"\xa9",
    b"}",
    b"[",
    b"\x00",
    b"\x1f",
]


@pytest.mark.parametrize("seed", range(20))
async def test_json_lines_are_the_lines_whatever_is_in_them(made: Made, seed: int) -> None:
    dice = random.Random(seed)
    stream = made.stream(format_="json", max_size=dice.choice([2_000, 1 << 20]), max_files=1000)
    written = b""
    fd = stream.open_child_end()
    for _ in range(40):
        data = b"".join(dice.choices(_PIECES, k=dice.randrange(1, 40))) + b"\n"
        os.write(fd, data)
        stream.drain()
        written += data
    os.close(fd)
    records = [json.loads(line) for path in oldest_first(stream) for line in path.read_text().splitlines()]
    expected = [line.decode("utf-8", "replace") for line in written.removesuffix(b"\n").split(b"\n")]
    assert [record["line"] for record in records] == expected
    assert {(record["instance"], record["stream"]) for record in records} == {("web:0", "stdout")}


async def test_the_program_never_sees_a_non_blocking_or_closed_output(made: Made) -> None:
    stream = made.stream()
    fd = stream.open_child_end()
    assert os.get_blocking(fd)
    process = subprocess.Popen(
        [sys.executable, "-c", "import os\nos.write(1, b'one'); os.read(0, 1); os.write(1, b'two')"],
        stdin=subprocess.PIPE, stdout=fd,
    )  # fmt: skip
    os.close(fd)
    # Nobody reads any more: to a plain pipe the next write would be SIGPIPE.
    stream.close()
    made.streams.clear()
    process.communicate(b"x", timeout=20)
    assert process.returncode == 0


async def test_reading_goes_on_where_it_was_across_a_rotation(made: Made) -> None:
    stream = made.stream(max_size=100, max_files=10)
    await made.run(stream, "print('first')")
    piece = stream.reader.read(stream.reader.tail(10))
    assert piece.text == "first\n"
    await made.run(stream, "for i in range(30): print(f'line {i:02d}')")
    assert len(oldest_first(stream)) > 2
    after = stream.reader.read(piece.cursor)
    assert after.text == "".join(f"line {i:02d}\n" for i in range(30))
    last = stream.reader.read(after.cursor)
    assert (last.text, last.cursor, last.gap) == ("", after.cursor, False)


async def test_tail_counts_lines_back_over_files(made: Made) -> None:
    stream = made.stream(max_size=50, max_files=10)
    await made.run(stream, "for i in range(30): print(f'line {i:02d}')")
    assert tail(stream, 12) == "".join(f"line {i:02d}\n" for i in range(18, 30))
    assert tail(stream, 0) == ""


async def test_a_follower_is_woken_by_output_and_only_then(made: Made) -> None:
    stream = made.stream()
    growth = stream.growth()
    await asyncio.sleep(0)
    assert not growth.done()
    fd = stream.open_child_end()
    os.write(fd, b"news\n")
    await asyncio.wait_for(growth, 20)
    os.close(fd)
    assert tail(stream, 1) == "news\n"
    forgotten = stream.growth()
    forgotten.cancel()


async def test_output_is_dropped_and_counted_when_the_disk_is_full(made: Made) -> None:
    stream = made.stream()
    # /dev/full is the kernel's own full disk.
    stream.file.path = Path("/dev/full")
    stream.file.close()
    fd = stream.open_child_end()
    os.write(fd, b"lost\n" * 100)
    stream.drain()
    os.close(fd)
    assert stream.lost_bytes == 500


async def test_a_file_that_cannot_be_opened_costs_output_not_the_supervisor(made: Made) -> None:
    stream = made.stream()
    (made.folder / "plain").touch()
    stream.file.path = made.folder / "plain" / "out.log"
    await made.run(stream, "print('lost')")
    assert stream.lost_bytes == 5


async def test_a_device_is_written_but_never_rotated(made: Made) -> None:
    stream = made.stream(max_size=10)
    stream.file.path = Path("/dev/null")
    await made.run(stream, "print('x' * 1000)")
    assert stream.lost_bytes == 0
    assert tail(stream, 5) == ""


async def test_a_file_that_was_moved_away_is_reopened_on_request(made: Made) -> None:
    stream = made.stream()
    await made.run(stream, "print('old')")
    (made.folder / "out.log").rename(made.folder / "moved.log")
    stream.file.reopen()
    await made.run(stream, "print('new')")
    assert (made.folder / "moved.log").read_text() == "old\n"
    assert made.text() == "new\n"


@pytest.mark.parametrize(
    "value", [None, [], "x", {}, {"instance": "a", "stream": "stdin", "inode": 1, "offset": 0},
              {"instance": "a", "stream": "stdout", "inode": "1", "offset": 0},
              {"instance": "a", "stream": "stdout", "inode": 1, "offset": -1}],
)  # fmt: skip
async def test_a_cursor_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(RequestError):
        Cursor.from_json(value)
