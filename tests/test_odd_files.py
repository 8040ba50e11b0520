"""Roots as they are found: links, sockets, devices, holes, mounts, odd names, any depth."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from store_kit import (
    FILES,
    MEMORY,
    Bench,
    apply,
    begin,
    benches,
    leftovers,
    mounted,
    open_store,
    package,
    roll_back,
    seen,
    staged,
    write_tree,
)

from asyncsup.errors import PatchRefusedError
from asyncsup.patch import fs
from asyncsup.patch.facts import Layout, TargetRoot
from asyncsup.patch.package import Package
from asyncsup.patch.store import Store

MIB = 1 << 20


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# --- what a program keeps in a tree -------------------------------------------------------------------------

ODD_NAMES = (
    b"\xff\xfe",
    b"two\nlines",
    b"-rf",
    b" ",
    b"\x01",
    b"x" * 255,
    "\u00e9".encode(),
    b".asyncsup~mine",
)


def furnish(root: Path, stack: ExitStack) -> None:
    """Everything a program may have in its folder besides files and folders."""
    for odd in ODD_NAMES:
        (root / os.fsdecode(odd)).write_bytes(odd)
    os.mkfifo(root / "fifo", 0o600)
    server = stack.enter_context(socket.socket(socket.AF_UNIX))
    server.bind(str(root / "socket"))
    for name, text in (("dangling", "nowhere"), ("loop", "loop"), ("far", "/etc"), ("near", "rules/eu.json")):
        (root / name).symlink_to(text)
    os.link(root / "run.sh", root / "also-run.sh")
    (root / "empty").mkdir(0o700)
    if os.geteuid() == 0:
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))


def inventory(root: Path, *, inodes: bool) -> dict[bytes, tuple[object, ...]]:
    """Every name below a root with what it is; with inodes, whether it still is the very same."""
    found: dict[bytes, tuple[object, ...]] = {}
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            status = path.lstat()
            link = path.readlink() if path.is_symlink() else None
            same = status.st_ino if inodes and not stat.S_ISDIR(status.st_mode) else None
            shown = os.fsencode(path).removeprefix(os.fsencode(root))
            found[shown] = (status.st_mode, status.st_rdev, link, same)
    return found


def test_whatever_a_program_has_in_its_tree_is_carried_along(
    bench: Callable[..., Bench], stack: ExitStack
) -> None:
    b = bench(Layout.TREE)
    furnish(b.root, stack)
    before = inventory(b.root, inodes=True)
    del before[b"/app.json"]

    def now() -> dict[bytes, tuple[object, ...]]:
        found = inventory(b.root, inodes=True)
        del found[b"/app.json"]
        return found

    for build in (300, 301):
        txn = staged(b.store, b.patch(build, modified={"app.json": b"%d" % build}))
        assert b.store.carry(txn, "web") == []
        b.store.switch(txn)
        b.store.commit(txn)
        b.store.finish(txn, verdict="committed")
        assert now() == before
    for _ in range(2):
        roll_back(b.store)
        assert now() == before
    apply(b.store, b.patch(302, modified={"app.json": b"302"}))
    b.store.prune("web", 0)
    b.store.release("web")
    assert now() == before


@contextmanager
def elsewhere(base: Path) -> Iterator[Path]:
    """A folder on another file system than `base`."""
    if not os.access(MEMORY, os.W_OK) or MEMORY.stat().st_dev == base.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def test_a_tree_on_another_file_system_is_copied_with_all_that_can_be(
    tmp_path: Path, stack: ExitStack
) -> None:
    root = stack.enter_context(elsewhere(tmp_path)) / "root"
    write_tree(root, FILES)
    furnish(root, stack)
    with (root / "holes").open("wb") as file:
        file.seek(300 * MIB)
        file.write(b"in between")
        file.truncate(600 * MIB)
    before = inventory(root, inodes=False)
    store = open_store(tmp_path, TargetRoot(name="web", root=root, layout=Layout.TREE))
    stack.callback(store.close)
    apply(store, stack.enter_context(package(tmp_path, 300, modified={"app.json": b"two"})))
    del before[b"/socket"]  # It belongs to whoever has bound it, and that is the one in the old place.
    assert inventory(root, inodes=False).keys() == before.keys()
    changed = {name for name, what in inventory(root, inodes=False).items() if what != before[name]}
    assert changed == {b"/app.json"}  # Its write bits.
    holes = (root / "holes").stat()
    assert (holes.st_size, holes.st_blocks * 512 < 4 * MIB) == (600 * MIB, True)
    with (root / "holes").open("rb") as file:
        file.seek(300 * MIB - 3)
        assert file.read(16) == b"\0\0\0in between\0\0\0"
    roll_back(store)
    assert seen(root)["app.json"] == b"one"


@pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.value) for layout in Layout])
def test_another_name_of_a_patched_file_keeps_what_was_there(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    os.link(b.root / "app.json", b.base / "outside")
    os.link(b.root / "app.json", b.root / "inside")
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    assert seen(b.root)["app.json"] == b"two"
    assert seen(b.root)["inside"] == (b.base / "outside").read_bytes() == b"one"
    roll_back(b.store)
    assert seen(b.root) == {**FILES, "inside": b"one"}


# --- depth --------------------------------------------------------------------------------------------------


def test_folders_of_any_depth_are_removed(tmp_path: Path) -> None:
    fd = os.open(tmp_path, fs.DIRECTORY)
    for depth in range(1200):
        os.mkdir("d", dir_fd=fd)
        os.mkdir("beside", dir_fd=fd)
        deeper = os.open("d", fs.DIRECTORY, dir_fd=fd)
        os.close(os.open(f"file {depth}", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=deeper))
        os.close(fd)
        fd = deeper
    os.close(fd)
    (tmp_path / "link").symlink_to("/")
    with fs.opened(tmp_path) as top:
        for name in ("d", "beside", "link", "not there"):
            fs.remove_tree(name, top)
    assert list(tmp_path.iterdir()) == []


# --- persistent paths ---------------------------------------------------------------------------------------


def test_persistent_paths_may_come_into_being_at_any_time_and_be_anything(
    bench: Callable[..., Bench],
) -> None:
    b = bench(Layout.TREE, persist=("var/lib/db", "cache", "own", "never"))
    write_tree(b.base, {"elsewhere/x": b"x"})
    (b.root / "own").symlink_to(b.base / "elsewhere")  # The program's own way to keep it outside.
    apply(b.store, b.patch(300, modified={"app.json": b"300"}))
    write_tree(b.root, {"var/lib/db/1": b"1", "cache": b"a file this time"})
    apply(b.store, b.patch(301, modified={"app.json": b"301"}))
    home = b.base / "state/persist/web"
    assert seen(home) == {"var/lib/db/1": b"1", "cache": b"a file this time"}
    write_tree(b.root, {"var/lib/db/2": b"2"})
    roll_back(b.store)
    own = {"var/lib/db/1": b"1", "var/lib/db/2": b"2", "cache": b"a file this time", "own/x": b"x"}
    assert seen(b.root) == {**FILES, "app.json": b"300", **own}
    # A program that saves a file by replacing it replaces the link as well. What it saved is what counts.
    b.put("saved.tmp", b"saved")
    (b.root / "saved.tmp").replace(b.root / "cache")
    txn = staged(b.store, b.patch(302, modified={"app.json": b"302"}))
    assert (home / "cache").read_bytes() == b"saved"
    b.put("saved.tmp", b"saved again, after the staging")
    (b.root / "saved.tmp").replace(b.root / "cache")
    b.store.switch(txn)
    b.store.commit(txn)
    assert seen(b.root)["cache"] == (home / "cache").read_bytes() == b"saved again, after the staging"
    assert leftovers(b.root / "var") == []
    # One that it replaces by something of another kind is found when it is to be moved, and neither is lost.
    (b.root / "cache").unlink()
    write_tree(b.root, {"cache/new": b"a folder now"})
    patch = b.patch(303, modified={"app.json": b"303"})
    txn = begin(b.store, patch)
    with pytest.raises(PatchRefusedError, match="cache is persistent and stored at") as caught:
        b.store.stage(txn, "web", patch)
    assert caught.value.error_code == "gate.conflict"
    b.store.abort(txn)
    assert seen(b.root)["cache/new"] == b"a folder now"
    assert (home / "cache").read_bytes() == b"saved again, after the staging"
    for path in ("var/lib/db", "var/lib/db/3", "var", "never/x"):
        (plan,) = b.store.preview.plan("web", b.patch(304, new={path: b""}).manifest)
        assert plan.code == "gate.conflict", path


def test_paths_may_become_persistent_later_and_cease_to_be(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.TREE)
    write_tree(b.root, {"data/db": b"1"})
    apply(b.store, b.patch(300, modified={"app.json": b"300"}))
    b.reopen(TargetRoot(name="web", root=b.root, layout=Layout.TREE, persist=("data",)))
    apply(b.store, b.patch(301, modified={"app.json": b"301"}))
    assert (b.root / "data").is_symlink()
    b.put("data/db", b"2")
    roll_back(b.store)  # To a generation that had a folder of its own there.
    assert seen(b.root)["data/db"] == b"2"
    assert (b.root / "data").is_symlink()
    b.reopen(TargetRoot(name="web", root=b.root, layout=Layout.TREE))
    apply(b.store, b.patch(302, modified={"app.json": b"302"}))
    assert seen(b.root)["data/db"] == b"2"
    assert leftovers(b.root) == []


# --- mounts -------------------------------------------------------------------------------------------------


@contextmanager
def bound(source: Path, place: Path) -> Iterator[None]:
    """One file system in two places: nothing but the table of mounts tells."""
    command = ["mount", "--bind", str(source), str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def refused(store: Store, patch: Package) -> str:
    """By the plan already, long before the target would be stopped."""
    with pytest.raises(PatchRefusedError) as caught:
        store.preview.survey("web", patch.manifest)
    txn = begin(store, patch)
    with pytest.raises(PatchRefusedError) as again:
        store.stage(txn, "web", patch)
    store.abort(txn)
    assert caught.value.error_code == again.value.error_code == "gate.filesystem"
    return caught.value.message


@pytest.mark.parametrize("where", ["root", "folder", "persist", "file"])
def test_a_tree_with_a_mount_in_it_is_refused_before_anything_is_done(
    where: str, bench: Callable[..., Bench], stack: ExitStack
) -> None:
    b = bench(Layout.TREE, persist=("persist",))
    write_tree(b.base, {"folder with space/x": b"x", "file": b"f"})
    place = {"root": b.root, "file": b.root / "run.sh"}.get(where, b.root / where)
    if where in {"folder", "persist"}:
        place.mkdir()
    stack.enter_context(bound(b.base / ("file" if where == "file" else "folder with space"), place))
    if where == "root":
        write_tree(b.root, FILES)
    patch = b.patch(300, modified={"app.json": b"two"})
    message = refused(b.store, patch)
    assert ("is a mount point" in message) == (where == "root")
    assert not b.root.is_symlink()
    stack.close()
    if where != "root":
        apply(b.store, b.patch(301, modified={"app.json": b"two"}))


def test_an_overlay_works_on_a_mounted_root_and_around_mounted_files(
    bench: Callable[..., Bench], stack: ExitStack
) -> None:
    b = bench(Layout.OVERLAY)
    stack.enter_context(mounted(b.root, "size=4m"))
    write_tree(b.root, FILES)
    write_tree(b.base, {"a file": b"mounted"})
    stack.enter_context(bound(b.base / "a file", b.root / "app.json"))
    patch = b.patch(300, modified={"app.json": b"two", "rules/eu.json": b"eu 2"})
    plans = {plan.path: plan.code for plan in b.store.preview.plan("web", patch.manifest)}
    assert plans == {"app.json": "gate.filesystem", "rules/eu.json": None}
    apply(b.store, b.patch(301, modified={"rules/eu.json": b"eu 2"}))
    assert seen(b.root) == {**FILES, "app.json": b"mounted", "rules/eu.json": b"eu 2"}
    roll_back(b.store)
    assert seen(b.root) == {**FILES, "app.json": b"mounted"}
    b.store.release("web")
    assert leftovers(b.root) == []
