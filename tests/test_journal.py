"""The journal: what is written down before this process dies, and read by the next one."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncsup.errors import StateError
from asyncsup.journal import SMALLEST_COMPACTION, Journal
from asyncsup.lifecycle import State
from asyncsup.record import InstanceRecord, ProcessRecord


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def left_in(path: Path) -> dict[str, object]:
    journal = Journal(path)
    journal.close(empty=False)
    return dict(journal.left_behind)


def test_the_last_word_on_each_fact_is_left_behind(path: Path) -> None:
    journal = Journal(path)
    journal.put("a", {"n": 1})
    journal.put("b", {"n": 2})
    journal.put("a", {"n": 3})
    journal.put("c", True)
    journal.drop("b")
    journal.drop("unknown")
    journal.close(empty=False)
    assert left_in(path) == {"a": {"n": 3}, "c": True}
    assert left_in(path) == {"a": {"n": 3}, "c": True}  # also of one who did nothing with it


def test_an_end_in_good_order_leaves_nothing(path: Path) -> None:
    journal = Journal(path)
    journal.put("a", 1)
    journal.close(empty=True)
    assert left_in(path) == {}


def test_a_fact_is_safe_as_soon_as_put_returns(path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom asyncsup.journal import Journal\n"
        f"journal = Journal(Path({str(path)!r}))\n"
        "for n in range(1000): journal.put('n', n)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert left_in(path) == {"n": 999}


def test_a_line_that_was_cut_off_does_not_count(path: Path) -> None:
    journal = Journal(path)
    journal.put("a", 1)
    journal.put("b", 2)
    journal.close(empty=False)
    whole = path.read_bytes()
    for size in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        path.write_bytes(whole[:size])
        found = left_in(path)
        assert found in ({}, {"a": 1}, {"a": 1, "b": 2})
        path.write_bytes(whole[:size] + b'\n["c",3]\n')
        assert left_in(path) in ({"c": 3}, {"a": 1, "c": 3}, {"a": 1, "b": 2, "c": 3})


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[]\n", b'{"journal":1,"boot":"another"}\n["a",1]\n'])
def test_of_another_boot_or_of_nobody_nothing_is_believed(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert left_in(path) == {}


def test_a_journal_of_another_version_is_not_ignored(path: Path) -> None:
    Journal(path).close(empty=False)
    header = json.loads(path.read_bytes())
    path.write_text(json.dumps({**header, "journal": 2}) + "\n")
    with pytest.raises(StateError, match="version 2"):
        Journal(path)


def test_it_does_not_grow_for_ever(path: Path) -> None:
    journal = Journal(path)
    for number in range(40_000):
        journal.put(f"fact {number % 10}", {"text": "x" * 200, "n": number})
    assert path.stat().st_size <= SMALLEST_COMPACTION
    journal.close(empty=False)
    assert sorted(value["n"] for value in left_in(path).values()) == list(range(39_990, 40_000))  # type: ignore[index]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """A limit that no file may grow beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_said_once_and_made_good_for_when_there_is_room(
    path: Path, full_disk: None, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(path)
    journal.put("a", "x" * 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    for number in range(5):
        journal.put("b", f"{number}" * 100)
    assert caplog.text.count("cannot be written") == 1
    assert json.loads(path.read_bytes().splitlines()[1]) == ["a", "x" * 100]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.put("c", 1)
    journal.close(empty=False)
    assert left_in(path) == {"a": "x" * 100, "b": "4" * 100, "c": 1}


def test_a_record_is_read_back_as_it_was_also_by_another_version(path: Path) -> None:
    record = InstanceRecord(
        state=State.STARTING,
        since=12.5,
        wanted=True,
        due=13.0,
        recent_restarts=(1.0, 2.0),
        last_exit={"status": 3, "at": "", "reason": "exit status 3"},
        process=ProcessRecord(token="t", pid=7, start_ticks=8, inode=9, hello={"token": "t"}),
    )
    journal = Journal(path)
    journal.put("instance web:0", record)
    journal.close(empty=False)
    value = left_in(path)["instance web:0"]
    assert isinstance(value, dict)
    assert InstanceRecord.from_json(value) == record
    newer = {**value, "mood": "fine", "process": {**value["process"], "colour": "red"}}
    assert InstanceRecord.from_json(newer) == record
    older = {"state": "running", "since": 1.0, "wanted": False}
    assert InstanceRecord.from_json(older) == InstanceRecord(state=State.RUNNING, since=1.0, wanted=False)
    for broken in ({}, {"state": "dancing", "since": 1.0, "wanted": True}, {**older, "process": 3}):
        with pytest.raises((ValueError, TypeError, KeyError)):
            InstanceRecord.from_json(broken)
