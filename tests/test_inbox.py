"""The folder that packages are dropped into: what is noticed of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from conftest import wait_for
from store_kit import mounted
from test_patching import Field

from asyncsup.errors import PatchNotFoundError, RemoteError
from asyncsup.events import EventStream
from asyncsup.patch import standing_watch
from asyncsup.patch.inbox import Inbox

QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")


@pytest.mark.anyio
async def test_a_package_is_found_though_the_kernel_has_dropped_what_it_had_to_say(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "inbox", EventStream(lambda topic, frame: None))
    async with anyio.create_task_group() as tasks:
        await tasks.start(inbox.watch)
        await inbox.changed()  # what was there before
        # In one turn of the loop, so nobody takes any of it. Equal ones in a row would count as one.
        for number in range(int(QUEUE.read_text()) + 1):
            (inbox.folder / f"{number % 2}.part").write_bytes(b"")
        (inbox.folder / "late.zip").touch()
        with anyio.fail_after(60):
            await inbox.changed()
        assert [arrival.path.name for arrival in inbox.arrivals()] == ["late.zip"]
        tasks.cancel_scope.cancel()


class Noticed:
    """An inbox that is watched, and what it tells of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._events = EventStream(lambda topic, frame: None)
        self.inbox = Inbox(folder, self._events)

    def names(self) -> list[str]:
        return [event["file"] for event in self._events.since(0)[0]]

    async def until(self, met: Callable[[], bool]) -> None:
        with anyio.fail_after(60):
            while not met():
                await anyio.sleep(0.01)

    async def notices(self, name: str) -> None:
        (self.folder / name).touch()
        await self.tells_of(name)

    async def tells_of(self, name: str) -> None:
        await self.until(lambda: name in self.names())


@asynccontextmanager
async def watched(folder: Path) -> AsyncIterator[Noticed]:
    noticed = Noticed(folder)
    async with anyio.create_task_group() as tasks:
        await tasks.start(noticed.inbox.watch)
        await noticed.notices("before.zip")
        yield noticed
        tasks.cancel_scope.cancel()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else makes the folder, so that there is nothing to wait for."""
    monkeypatch.setattr(standing_watch, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(standing_watch, "FIRST_PAUSE_SECONDS", 0.1)


def remove(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)


def move_away(folder: Path) -> None:
    folder.rename(folder.with_name("old"))
    folder.mkdir(exist_ok=True)


def swap(folder: Path) -> None:
    """As whoever prepares the next one does."""
    new = folder.with_name("new")
    new.mkdir()
    folder.rename(folder.with_name("old"))
    new.rename(folder)


@pytest.mark.anyio
@pytest.mark.parametrize("replace", [remove, move_away, swap])
async def test_what_comes_into_a_folder_that_replaces_the_inbox_is_noticed(
    tmp_path: Path, replace: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(tmp_path / "inbox") as noticed:
        for number in range(3):
            # With no turn of the loop in between, as with a script that is quicker than we are.
            replace(noticed.folder)
            (noticed.folder / f"at-once-{number}.zip").touch()
            await noticed.tells_of(f"at-once-{number}.zip")
            await noticed.notices(f"later-{number}.zip")
            shutil.rmtree(tmp_path / "old", ignore_errors=True)
    assert "another folder than before" in caplog.text


@pytest.mark.anyio
async def test_what_goes_on_in_the_folder_that_was_moved_away_is_not_told(tmp_path: Path) -> None:
    async with watched(tmp_path / "inbox") as noticed:
        move_away(noticed.folder)
        await noticed.notices("new.zip")
        (tmp_path / "old/stale.zip").touch()
        await noticed.notices("newer.zip")
        assert "stale.zip" not in noticed.names()


@pytest.mark.anyio
async def test_a_folder_that_somebody_still_has_open_is_missed_as_well(tmp_path: Path) -> None:
    """The kernel says of such a folder that it is gone when nobody has it open any more."""
    async with watched(tmp_path / "inbox") as noticed:
        fd = os.open(noticed.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            remove(noticed.folder)
            await noticed.notices("new.zip")
        finally:
            os.close(fd)


@pytest.mark.anyio
async def test_a_link_to_the_inbox_may_be_changed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "inbox").symlink_to("one")
    async with watched(tmp_path / "inbox") as noticed:
        (tmp_path / "next").symlink_to("two")
        (tmp_path / "next").rename(noticed.folder)
        await noticed.notices("new.zip")
    assert (tmp_path / "two/new.zip").exists()


@pytest.mark.anyio
@pytest.mark.usefixtures("impatient")
async def test_an_inbox_that_nobody_makes_anew_is_made_as_it_was(tmp_path: Path) -> None:
    async with watched(tmp_path / "inbox") as noticed:
        if os.geteuid() == 0:
            os.chown(noticed.folder, 1234, 4321)
        noticed.folder.chmod(0o1773)
        before = noticed.folder.stat()
        # What has been told of these has been told of the mode before, and was acted upon.
        await noticed.notices("one.zip")
        await noticed.notices("two.zip")
        shutil.rmtree(noticed.folder)
        await noticed.until(
            lambda: noticed.folder.exists() and noticed.folder.stat().st_mode == before.st_mode
        )
        made = noticed.folder.stat()
        assert (made.st_uid, made.st_gid) == (before.st_uid, before.st_gid)
        await noticed.notices("new.zip")


@pytest.mark.anyio
async def test_an_inbox_may_be_mounted_and_unmounted(tmp_path: Path) -> None:
    async with watched(tmp_path / "inbox") as noticed:
        with mounted(noticed.folder, "size=1m"):
            await noticed.notices("mounted.zip")
            with mounted(noticed.folder, "size=1m"):
                await noticed.notices("over-it.zip")
        await noticed.notices("unmounted.zip")
        assert sorted(path.name for path in noticed.folder.glob("*.zip")) == ["before.zip", "unmounted.zip"]


@pytest.mark.anyio
@pytest.mark.usefixtures("impatient")
async def test_an_inbox_that_cannot_be_made_anew_is_tried_again_in_pauses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []
    make = standing_watch.StandingWatch._make

    def counted(self: standing_watch.StandingWatch) -> None:
        tries.append(anyio.current_time())
        make(self)

    monkeypatch.setattr(standing_watch.StandingWatch, "_make", counted)
    (tmp_path / "parent").mkdir()
    async with watched(tmp_path / "parent/inbox") as noticed:
        shutil.rmtree(tmp_path / "parent")
        (tmp_path / "parent").touch()  # no folder can be made in a file, not even by root
        await noticed.until(lambda: len(tries) >= 3)
        assert len(tries) < 20
        with pytest.raises(PatchNotFoundError, match="cannot be read: Not a directory"):
            noticed.inbox.arrivals()
        assert caplog.text.count("cannot be made anew") == 1
        (tmp_path / "parent").unlink()
        await noticed.until(noticed.folder.exists)
        await noticed.notices("new.zip")


def test_auto_applies_what_comes_into_an_inbox_that_was_replaced(field: Field) -> None:
    field.start("web", patch="auto = true\n")
    inbox = field.serve.inbox
    for replace, build, text in ((remove, 300, "once"), (move_away, 400, "twice")):
        before = {"a.txt": "old-a" if build == 300 else "once"}
        package = field.package("web", build=build, before=before, files={"a.txt": text})
        replace(inbox)
        shutil.copy(package, field.folder / "p.tmp")
        (field.folder / "p.tmp").rename(inbox / "p.zip")
        field.said("web", f"build={build}")
        wait_for((inbox / "applied/p.zip").exists, "the package to be moved")
    assert "another folder than before" in field.serve.errors()


def test_the_name_of_a_file_that_is_no_text_ends_nobody(field: Field) -> None:
    """It stands in the message, the events and the report, which are JSON."""
    field.start("web", layout="tree")
    before = field.client.call("supervisor.info")
    package = field.package("web")
    with mounted(field.folder / "web" / os.fsdecode(b"\xff"), "size=1m"):
        package.rename(field.folder / "inbox/p.zip")
        with pytest.raises(RemoteError) as caught:
            field.client.call("patch.apply", name="p.zip")
    assert caught.value.error_code == "gate.filesystem"
    assert r"\udcff" in caught.value.message
    assert field.client.call("supervisor.info")["pid"] == before["pid"]
    report = json.loads((field.folder / "inbox/rejected/p.zip.json").read_text())
    assert report["code"] == "gate.filesystem"
    assert field.client.call("events.since", seq=0)["events"]
