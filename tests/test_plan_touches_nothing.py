"""`patch plan` says exactly what `patch apply` then does, and leaves no trace."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, wait_for
from store_kit import write_tree
from test_cli import process

from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

WAS = {"a.txt": b"one", "sub/b.txt": b"two", "gone.txt": b"three", "same.txt": b"four"}
WILL_BE = {"a.txt": b"ONE", "sub/b.txt": b"TWO", "fresh/deep/c.txt": b"new", "same.txt": b"four"}
TEXT = """
[patch]
trust = "none"
probation = 0
[target.web]
command = "sleep 1000"
min_uptime = 0
root = "web"
layout = "{layout}"
[target.api]
command = "sleep 1000"
min_uptime = 0
instances = 2
root = "api"
layout = "{layout}"
"""


def picture(folder: Path) -> dict[str, Any]:
    """Everything below a folder but times of access: whatever was written, renamed or changed shows in the
    change time of something."""
    found: dict[str, Any] = {}
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(parent, name)
            status = path.lstat()
            # Locks in shared memory, and pipes that the targets write to.
            if name.endswith("-shm") or stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode):
                continue
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            link = str(path.readlink()) if path.is_symlink() else None
            found[str(path)] = (
                status.st_ino, status.st_mode, status.st_nlink, status.st_uid, status.st_size,
                status.st_mtime_ns, status.st_ctime_ns, content, link,
            )  # fmt: skip
    return found


def at_rest(folder: Path) -> dict[str, Any]:
    """A picture, once nothing is written any more of what came before."""

    def unchanged() -> dict[str, Any] | None:
        found = picture(folder)
        return found if all(picture(folder) == found for _ in range(5)) else None

    found: dict[str, Any] = wait_for(unchanged, "nothing to be written any more")
    return found


def package(folder: Path, build: int, was: dict[str, bytes], will_be: dict[str, bytes], kind: Kind) -> Path:
    for name, files in (("was", was), ("is", will_be)):
        write_tree(folder / f"{name}-{build}", files)
    output = folder / f"{build}.zip"
    build_patch(
        old=folder / f"was-{build}", new=folder / f"is-{build}", output=output, name="n", version="1",
        build=build, kind=kind, targets=["web", "api"], regions=["local"],
    )  # fmt: skip
    return output


@pytest.mark.parametrize("layout", ["overlay", "tree"])
def test_a_plan_is_what_apply_does_and_touches_nothing(serve: Serve, tmp_path: Path, layout: str) -> None:
    for name in ("web", "api"):
        write_tree(serve.folder / name, WAS)
    first = package(tmp_path, 100, WAS, WILL_BE, Kind.WARM)
    second = package(tmp_path, 200, WILL_BE, WAS, Kind.COLD)
    with serve.start(TEXT.format(layout=layout)) as client:

        def all_up() -> bool:
            return all(target["state"] == "running" for target in client.call("status")["targets"])

        wait_for(all_up, "the targets")
        for path in (first, second):
            before = at_rest(serve.folder)
            plan = client.call("patch.plan", path=str(path))
            shown = process("--endpoint", serve.endpoint, "patch", "plan", path).stdout
            assert picture(serve.folder) == before
            assert (plan["verdict"], plan["code"], plan["exit_status"]) == ("apply", None, 0)
            report = client.call("patch.apply", path=str(path))
            assert report["verdict"] == "committed"
            for planned, done in zip(plan["targets"], report["targets"], strict=True):
                assert (planned["target"], planned["build"]) == (done["target"], done["build_before"])
                assert planned["files"] == done["files"]
                assert [gate["name"] for gate in planned["gates"]] == [gate["name"] for gate in done["gates"]]
                told = {each["name"]: (each["pid"], each["told_by"]) for each in planned["instances"]}
                assert told == {
                    each["name"]: (each["pid_before"], each["told_by"]) for each in done["instances"]
                }
                for file in planned["files"]:
                    assert file["path"] in shown
                for name in told:
                    assert name in shown
            wait_for(all_up, "the targets")
        # One that is refused leaves as little.
        (serve.folder / "web/a.txt").unlink()
        before = at_rest(serve.folder)
        third = package(tmp_path, 300, WAS, WILL_BE, Kind.WARM)
        assert client.call("patch.plan", path=str(third))["verdict"] == "refused"
        assert picture(serve.folder) == before
