"""`asyncsup.folder_watch`: what happens to files of a real folder."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from asyncsup.folder_watch import FolderWatch

WAIT_SECONDS = 20.0


async def next_names(watch: FolderWatch, count: int) -> list[bytes]:
    async with asyncio.timeout(WAIT_SECONDS):
        return [await watch.next() for _ in range(count)]


@pytest.mark.anyio
async def test_names_come_in_order(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "moved").touch()
    with FolderWatch(folder) as watch:
        (folder / "written").write_text("x")
        (elsewhere / "moved").rename(folder / "moved")
        (folder / "moved").rename(elsewhere / "gone")
        (folder / "written").unlink()
        assert await next_names(watch, 4) == [b"written", b"moved", b"moved", b"written"]


@pytest.mark.anyio
async def test_a_name_comes_to_who_waits_for_it(tmp_path: Path) -> None:
    with FolderWatch(tmp_path) as watch:
        waiting = asyncio.create_task(next_names(watch, 2))
        await asyncio.sleep(0)
        for name in (b"\xff.zip", b"n" * 255):
            os.close(os.open(os.path.join(os.fsencode(tmp_path), name), os.O_CREAT | os.O_WRONLY))  # noqa: PTH118
        assert await waiting == [b"\xff.zip", b"n" * 255]


@pytest.mark.anyio
async def test_more_than_one_read(tmp_path: Path) -> None:
    names = [f"{number:0200}" for number in range(1000)]
    with FolderWatch(tmp_path) as watch:
        for name in names:
            (tmp_path / name).touch()
        assert [name.decode() for name in await next_names(watch, 1000)] == names


@pytest.mark.anyio
async def test_a_folder_that_is_removed_has_no_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with FolderWatch(folder) as watch:
        folder.rmdir()
        assert await next_names(watch, 1) == [b""]


def test_what_is_no_folder_to_watch(tmp_path: Path) -> None:
    before = list(Path("/proc/self/fd").iterdir())
    with pytest.raises(FileNotFoundError, match="nothing"):
        FolderWatch(tmp_path / "nothing")
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)
