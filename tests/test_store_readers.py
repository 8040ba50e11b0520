"""The store beside programs that read and write the same files meanwhile, and beside disks that forget."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_kit import (
    apply,
    begin,
    leftovers,
    memory_folder,
    names_in,
    open_store,
    package,
    roll_back,
    seen,
    staged,
    target,
    write_tree,
)
from told import Tell

from asyncsup import failpoints
from asyncsup.errors import PatchRefusedError
from asyncsup.patch import fs
from asyncsup.patch.facts import Layout
from asyncsup.patch.store import Store
from target_sdk.snapshot import Snapshot

LAYOUTS = [pytest.param(layout, id=layout.value) for layout in Layout]


@pytest.fixture
def base() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


# --- readers ------------------------------------------------------------------------------------------------

NAMES = [f"rules/{n}.json" for n in range(20)]


def read_unpinned(root: Path, current: Path) -> set[bytes]:
    return {(root / name).read_bytes() for name in NAMES}


def read_pinned(root: Path, current: Path) -> set[bytes]:
    with Snapshot(root=root, current=current) as files:
        return {files.read_bytes(name) for name in NAMES}


@contextmanager
def reading(read: Callable[[], set[bytes]]) -> Iterator[list[int]]:
    """A process that reads again and again; afterwards the list holds how often it did, and how often what it
    read was of more than one build."""
    counts_out, counts_in = os.pipe()
    stop_out, stop_in = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(stop_in)
            os.set_blocking(stop_out, False)
            passes = mixes = 0
            os.write(counts_in, b"ready\n")
            while True:
                try:
                    if os.read(stop_out, 1) == b"":
                        break
                except BlockingIOError:
                    pass
                mixes += len(read()) > 1
                passes += 1
            os.write(counts_in, f"{passes} {mixes}".encode())
            status = 0
        finally:
            os._exit(status)
    os.close(stop_out)
    os.close(counts_in)
    result: list[int] = []
    try:
        assert os.read(counts_out, 6) == b"ready\n"
        yield result
    finally:
        os.close(stop_in)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        result.extend(map(int, os.read(counts_out, 100).split()))
        os.close(counts_out)
    assert status == 0


PATCHES = 250
"""For each layout."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pinned_reader_never_sees_a_mix_and_an_unpinned_one_does(
    layout: Layout, base: Path, tell: Tell
) -> None:
    """One reader by the SDK's snapshot and one by plain paths, both at the same time."""
    where = target(base, layout)
    write_tree(where.root, dict.fromkeys(NAMES, b"build 0"))
    store = open_store(base, where)

    def patch_to(build: int) -> None:
        with package(base, build, modified=dict.fromkeys(NAMES, b"build %d" % build)) as patch:
            apply(store, patch)
        store.prune("web", 1)

    current = store.current_link("web")
    patch_to(1)
    with (
        reading(lambda: read_pinned(where.root, current)) as pinned,
        reading(lambda: read_unpinned(where.root, current)) as unpinned,
    ):
        for build in range(2, PATCHES + 2):
            patch_to(build)
    store.close()
    for how, (passes, mixes) in (("pinned", pinned), ("unpinned", unpinned)):
        tell(f"{PATCHES} patches: {how}, {mixes} mixes in {passes} passes")
    assert pinned[0] > PATCHES
    assert pinned[1] == 0
    assert unpinned[1] > 0, "the control: without mixes here, nothing above is proved"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_name_is_never_missing_while_it_is_adopted_and_patched(layout: Layout, base: Path) -> None:
    """Opening a path through the root succeeds at every instant of every patch."""
    where = target(base, layout)
    write_tree(where.root, dict.fromkeys(NAMES, b"0"))
    store = open_store(base, where)
    with reading(lambda: read_unpinned(where.root, Path())) as counts:
        for build in range(1, 15):
            with package(base, build, modified=dict.fromkeys(NAMES, b"%d" % build)) as patch:
                apply(store, patch)
        roll_back(store)
        store.prune("web", 1)
        store.release("web")
    store.close()
    assert counts[0] > 0


# --- writers ------------------------------------------------------------------------------------------------


def save(path: Path, content: bytes) -> None:
    """As editors and most programs save: never a moment without a whole file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("saves", [1, 2, 3, 7])
def test_a_save_in_the_very_moment_of_adoption_is_not_lost(
    first: int, saves: int, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program saves right before a swap is made: the first, the second or the third, once or in each of
    several in a row."""
    where = target(base, Layout.OVERLAY)
    file = where.root / "app.json"
    write_tree(where.root, {"app.json": b"original", "b.json": b"b"})
    store = open_store(base, where)
    real, swaps, latest = fs.exchange, 0, b"original"

    def swap(one: str, other: str, *, first_dir: int, second_dir: int) -> None:
        nonlocal swaps, latest
        swaps += 1
        if first <= swaps < first + saves:
            latest = b"save %d" % swaps
            save(file, latest)
        real(one, other, first_dir=first_dir, second_dir=second_dir)

    with package(base, 300, modified={"app.json": b"patched", "b.json": b"b2"}) as patch:
        txn = begin(store, patch)
        monkeypatch.setattr(fs, "exchange", swap)
        store.stage(txn, "web", patch)
        monkeypatch.setattr(fs, "exchange", real)
        assert file.read_bytes() == latest
        if file.is_symlink():
            store.switch(txn)
            assert file.read_bytes() == b"patched"
            store.switch_back(txn)
        else:
            # It has saved after its file was taken over: that stays, and the patch is off.
            with pytest.raises(PatchRefusedError):
                store.switch(txn)
        store.abort(txn)
    assert file.read_bytes() == latest
    assert leftovers(where.root) == []
    store.close()


def test_a_file_that_is_rewritten_all_the_time_is_refused_in_the_end(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = target(base, Layout.OVERLAY)
    file = where.root / "app.json"
    write_tree(where.root, {"app.json": b"original"})
    store = open_store(base, where)
    real, latest = fs.exchange, b""

    def swap(one: str, other: str, *, first_dir: int, second_dir: int) -> None:
        nonlocal latest
        if not file.is_symlink():
            latest = os.urandom(8)
            save(file, latest)
        real(one, other, first_dir=first_dir, second_dir=second_dir)

    monkeypatch.setattr(fs, "exchange", swap)
    with package(base, 300, modified={"app.json": b"patched"}) as patch:
        txn = begin(store, patch)
        with pytest.raises(PatchRefusedError, match="faster than it can be taken over"):
            store.stage(txn, "web", patch)
        monkeypatch.setattr(fs, "exchange", real)
        store.abort(txn)
    assert file.read_bytes() == latest
    assert leftovers(where.root) == []
    store.close()


@pytest.mark.parametrize("fatal_swap", [1, 2])
def test_a_save_is_not_lost_though_the_supervisor_dies_in_that_moment(
    fatal_swap: int, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = target(base, Layout.OVERLAY)
    file = where.root / "app.json"
    write_tree(where.root, {"app.json": b"original"})
    pid = os.fork()
    if pid == 0:
        real, saved = fs.exchange, False

        def swap(one: str, other: str, *, first_dir: int, second_dir: int) -> None:
            nonlocal saved
            if not saved:
                saved = True
                save(file, b"saved in that moment")
            real(one, other, first_dir=first_dir, second_dir=second_dir)

        try:
            monkeypatch.setattr(fs, "exchange", swap)
            os.environ[failpoints.VARIABLE] = f"store.adopt.swapped:kill:{fatal_swap}"
            with package(base, 300, modified={"app.json": b"patched"}) as patch:
                staged(open_store(base, where), patch)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    store = open_store(base, where)
    assert file.read_bytes() == b"saved in that moment"
    assert leftovers(where.root) == []
    store.close()


def test_no_save_is_lost_whenever_it_comes(base: Path) -> None:
    """The same without choosing the moment: one save per patch, at a random time while it is staged."""
    where = target(base, Layout.OVERLAY)
    file = where.root / "app.json"
    write_tree(where.root, {"app.json": b"original"})
    store = open_store(base, where)
    dice = random.Random(7)
    staged_first = 0
    longest = 0.006
    with package(base, 300, modified={"app.json": b"patched"}) as patch:
        for turn in range(60):
            content = b"save %d" % turn
            delay = dice.uniform(0, longest)

            def save_later(content: bytes = content, delay: float = delay) -> None:
                time.sleep(delay)
                save(file, content)

            writer = threading.Thread(target=save_later)
            txn = begin(store, patch)
            writer.start()
            try:
                store.stage(txn, "web", patch)
                staged_first += 1
                longest /= 1.2
            except PatchRefusedError as error:
                longest *= 1.2  # however slowly it is staged: some saves come during that, some after it
                assert error.error_code in {"gate.drift", "gate.detached"}
            writer.join()
            store.abort(txn)
            assert file.read_bytes() == content
            assert leftovers(where.root) == []
            store.release("web")
            assert file.read_bytes() == content
    store.close()
    assert staged_first > 0


# --- what is on disk, and when ------------------------------------------------------------------------------


class Disk:
    """Watches which names and contents have been changed and not been synced since."""

    def __init__(self, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = state
        self.dirty: dict[tuple[int, int], str] = {}
        self.flips: list[dict[tuple[int, int], str]] = []
        self.adoptions: list[list[str]] = []
        self.bulk_syncs = 0
        patch = monkeypatch.setattr
        real = {
            name: getattr(os, name)
            for name in ("open", "mkdir", "symlink", "link", "rename", "unlink", "fsync")
        }
        real_exchange, real_syncfs = fs.exchange, fs._libc.syncfs

        def opener(path: object, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            fd = int(real["open"](path, flags, mode, dir_fd=dir_fd))
            if flags & os.O_CREAT and dir_fd is not None:
                self.mark(fd)
                self.mark(dir_fd)
            return fd

        def one_name(name: str) -> Callable[..., None]:
            def call(*args: object, dir_fd: int | None = None, **more: object) -> None:
                real[name](*args, dir_fd=dir_fd, **more)
                if dir_fd is not None:
                    self.mark(dir_fd)

            return call

        def link(*args: object, src_dir_fd: int, dst_dir_fd: int, **more: object) -> None:
            real["link"](*args, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **more)
            self.mark(dst_dir_fd)

        def rename(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
            if new == "current":
                self.flips.append(dict(self.dirty))
            real["rename"](old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            self.mark(src_dir_fd)
            self.mark(dst_dir_fd)

        def exchange(one: str, other: str, *, first_dir: int, second_dir: int) -> None:
            self.adoptions.append([path for path in self.dirty.values() if "/generations/" in path])
            real_exchange(one, other, first_dir=first_dir, second_dir=second_dir)
            self.mark(first_dir)
            self.mark(second_dir)

        def fsync(fd: int) -> None:
            real["fsync"](fd)
            status = os.fstat(fd)
            self.dirty.pop((status.st_dev, status.st_ino), None)

        def syncfs(fd: int) -> int:
            self.bulk_syncs += 1
            device = os.fstat(fd).st_dev
            self.dirty = {key: path for key, path in self.dirty.items() if key[0] != device}
            return int(real_syncfs(fd))

        patch(os, "open", opener)
        for name in ("mkdir", "symlink", "unlink"):
            patch(os, name, one_name(name))
        patch(os, "link", link)
        patch(os, "rename", rename)
        patch(os, "fsync", fsync)
        patch(fs, "exchange", exchange)
        patch(fs._libc, "syncfs", syncfs)

    def mark(self, fd: int) -> None:
        """The folder or file `fd` has changed. What is below the staging area counts, the area itself not."""
        status = os.fstat(fd)
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if path != f"{self.state}/staging":
            self.dirty[status.st_dev, status.st_ino] = path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("folders", [0, 1, 3])
@pytest.mark.parametrize("count", [3, 60], ids=["each-synced", "bulk"])
def test_nothing_is_pointed_at_before_it_is_on_disk(
    layout: Layout,
    folders: int,
    count: int,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = target(base, layout, persist=("data",))
    names = [f"d{n % folders}/{n}.json" if folders else f"{n}.json" for n in range(count)]
    write_tree(where.root, {**dict.fromkeys(names, b"old"), "gone.json": b"x", "data/db": b"y"})
    with monkeypatch.context() as context:
        disk = Disk(base / "state", context)
        store = open_store(base, where)
        if layout is Layout.OVERLAY:
            # What the program has saved without a sync is about to be found through the store alone.
            for name in (*names, "gone.json"):
                with (where.root / name).open("rb") as file:
                    disk.mark(file.fileno())
        with package(
            base,
            300,
            modified=dict.fromkeys(names, b"new"),
            new={"fresh/deep/n.json": b"n", **({} if folders else {"top.json": b"t"})},
            deleted=["gone.json"],
        ) as patch:
            txn = staged(store, patch)
            write_tree(where.root, {"own/log": b"the program goes on"})
            store.carry(txn, "web")
            store.switch(txn)
            state = (base / "state").stat()
            assert (state.st_dev, state.st_ino) not in disk.dirty
            store.commit(txn)
            roll_back(store)
            apply(store, patch)
            assert (disk.bulk_syncs > 0) == (count > 32)
            store.release("web")
        assert len(disk.flips) >= 5
        assert [flip for flip in disk.flips if flip] == []
        # From the first swap on, only the generation has what is swapped out of the root.
        assert disk.adoptions[0] == []
    assert seen(where.root)["fresh/deep/n.json"] == b"n"
    store.close()


def test_a_failed_sync_is_final_and_nothing_is_switched(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After EIO the kernel may take the lost pages for clean: a second fsync would succeed, and lie."""
    where = target(base, Layout.OVERLAY)
    write_tree(where.root, {"app.json": b"one"})
    store: Store = open_store(base, where)
    monkeypatch.setenv(failpoints.VARIABLE, "store.stage.synced:error")
    with package(base, 300, modified={"app.json": b"two"}) as patch:
        txn = begin(store, patch)
        with pytest.raises(Exception, match=r"failpoint store\.stage\.synced") as caught:
            store.stage(txn, "web", patch)
        assert caught.value.error_code == "patch.io_failed"  # type: ignore[attr-defined]
        monkeypatch.delenv(failpoints.VARIABLE)
        store.abort(txn)
        assert seen(where.root) == {"app.json": b"one"}
        assert names_in(base / "state/generations/web") == ["0"]
    store.close()
