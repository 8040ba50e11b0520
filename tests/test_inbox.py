"""The folder that packages are dropped into: what is noticed of it."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from asyncsup.events import EventStream
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
