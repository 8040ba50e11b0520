"""Snapshots against a store on a real file system, laid out by hand, flipped and pruned while they read."""

from __future__ import annotations

import errno
import fcntl
import gc
import itertools
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sdk_supervisor import open_descriptors

from target_sdk import Snapshot, Target, protocol
from target_sdk import snapshot as snapshot_module

NAME = "pricer"


class Store:
    """What the supervisor keeps on disk, and what it does to it, step by step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.root = folder / "work"
        self.current = self.state / "current" / NAME
        self._sets = itertools.count(1)
        (self.state / "generations" / NAME).mkdir(parents=True)
        (self.state / "sets").mkdir()

    def path_of(self, generation: int) -> Path:
        return self.state / "generations" / NAME / str(generation)

    def add(self, generation: int, files: Mapping[str, str]) -> None:
        self.path_of(generation).mkdir()
        for name, text in files.items():
            path = self.path_of(generation) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o444)

    def flip(self, generation: int | None) -> None:
        """Bring a generation into force (None: a set without this target)."""
        number = next(self._sets)
        links = self.state / "sets" / str(number)
        links.mkdir()
        if generation is not None:
            (links / NAME).symlink_to(f"../../generations/{NAME}/{generation}")
        (self.state / "next").symlink_to(f"sets/{number}")
        (self.state / "next").rename(self.state / "current")

    def prune(self, generation: int) -> bool:
        """Remove a generation if nobody reads it."""
        fd = os.open(self.path_of(generation), os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.path_of(generation))
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def link(self, path: str, *, relative: bool = False) -> None:
        """Make a path of the root a managed one."""
        leaf = self.root / path
        leaf.parent.mkdir(parents=True, exist_ok=True)
        target = f"{self.current}/{path}"
        if relative:
            target = os.path.relpath(self.state, leaf.parent) + f"/current/{NAME}/{path}"
        leaf.unlink(missing_ok=True)
        leaf.symlink_to(target)

    def snapshot(self) -> Snapshot:
        return Snapshot(root=self.root, current=self.current)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def overlay(store: Store) -> Store:
    """`prices.json` and `rules/tax.txt` are managed, `notes.txt` and `rules/own.txt` are the program's."""
    (store.root / "rules").mkdir(parents=True)
    (store.root / "notes.txt").write_text("notes")
    (store.root / "rules/own.txt").write_text("own")
    store.add(1, {"prices.json": '{"build": 1}', "rules/tax.txt": "tax 1"})
    store.add(2, {"prices.json": '{"build": 2}', "rules/tax.txt": "tax 2", "rules/new.txt": "new"})
    for path in ("prices.json", "rules/tax.txt", "rules/new.txt"):
        store.link(path)
    store.flip(1)
    return store


@pytest.fixture
def tree(store: Store) -> Store:
    """The root is a link to the generation."""
    store.add(1, {"app.py": "v1", "lib/code.py": "lib 1", "gone.txt": "x"})
    store.add(2, {"app.py": "v2", "lib/code.py": "lib 2", "added.txt": "y"})
    store.flip(1)
    store.root.symlink_to(store.current)
    return store


# --- one generation only ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["overlay", "tree"])
def test_a_snapshot_reads_one_generation_while_the_pointer_moves(
    layout: str, request: pytest.FixtureRequest
) -> None:
    store: Store = request.getfixturevalue(layout)
    first, second = ("prices.json", "rules/tax.txt") if layout == "overlay" else ("app.py", "lib/code.py")
    with store.snapshot() as files:
        before = files.read_text(first), files.read_text(second)
        store.flip(2)
        assert (files.read_text(first), files.read_text(second)) == before
        assert files.generation == "1"
        with store.snapshot() as later:
            assert later.generation == "2"
            assert later.read_text(first) != before[0]
    store.flip(1)
    with store.snapshot() as files:
        assert (files.read_text(first), files.read_text(second)) == before


def test_pinned_readers_never_see_a_mix_during_many_flips_and_prunings_but_others_do(
    store: Store,
) -> None:
    names = [f"file{i}.txt" for i in range(20)]
    store.root.mkdir()
    store.add(0, dict.fromkeys(names, "0"))
    for name in names:
        store.link(name)
    store.flip(0)
    stop = threading.Event()
    generations_seen: set[str] = set()
    problems: list[str] = []
    mixes_unpinned = 0

    def read_pinned() -> None:
        try:
            while not stop.is_set():
                with store.snapshot() as files:
                    contents = {files.read_text(name) for name in names}
                    if contents != {files.generation}:
                        problems.append(f"{files.generation}: {contents}")
                    generations_seen.update(contents)
        except BaseException as error:
            problems.append(repr(error))
            raise

    readers = [threading.Thread(target=read_pinned) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for generation in range(1, 301):
            store.add(generation, {name: str(generation) for name in names})
            half = [(store.root / name).read_text() for name in names[:10]]
            store.flip(generation)
            # The control: what a reader sees that opens the same files one after the other, by their paths.
            if len({*half, *((store.root / name).read_text() for name in names[10:])}) > 1:
                mixes_unpinned += 1
            for old in range(max(0, generation - 6), generation - 1):
                if store.path_of(old).exists():
                    store.prune(old)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not problems
    assert len(generations_seen) > 5
    assert mixes_unpinned == 300


def test_a_snapshot_that_lost_the_race_against_the_pruner_takes_the_next_generation(
    overlay: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real_flock = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if not calls:  # between the opening of generation 1 and its lock
            calls.append(fd)
            overlay.flip(2)
            monkeypatch.setattr(fcntl, "flock", real_flock)
            assert overlay.prune(1)
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with overlay.snapshot() as files:
        assert calls
        assert files.generation == "2"
        assert files.read_text("rules/tax.txt") == "tax 2"


def test_a_set_that_goes_away_while_it_is_resolved_is_no_reason_to_read_the_plain_folder(
    overlay: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open
    calls: list[Any] = []

    def open_late(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if path == overlay.current and not calls:
            calls.append(path)
            overlay.flip(2)
            raise FileNotFoundError(errno.ENOENT, "the old set was swept", str(path))
        return real_open(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", open_late)
    with overlay.snapshot() as files:
        assert calls
        assert files.generation == "2"


# --- the lock -----------------------------------------------------------------------------------------------


def test_a_generation_is_kept_while_it_is_read_and_let_go_afterwards(overlay: Store) -> None:
    with overlay.snapshot() as files:
        with overlay.snapshot():
            overlay.flip(2)
            assert not overlay.prune(1)
        assert not overlay.prune(1), "another reader still holds it"
        assert files.read_text("rules/tax.txt") == "tax 1"
    assert overlay.prune(1)


def test_a_generation_is_let_go_although_a_child_was_forked_meanwhile(overlay: Store) -> None:
    with overlay.snapshot():
        reader, writer = os.pipe()
        with warnings.catch_warnings(action="ignore"):  # later Pythons warn of forks beside threads
            child = os.fork()
        if child == 0:  # it holds copies of all descriptors for as long as it lives
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
        overlay.flip(2)
    try:
        assert overlay.prune(1)
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def test_a_snapshot_leaves_no_descriptor_open(overlay: Store) -> None:
    gc.collect()
    before = open_descriptors()
    with overlay.snapshot() as files:
        for _ in range(20):
            files.read_text("rules/tax.txt")
            files.read_text("rules/own.txt")
            files.walk()
            files.exists("rules/none")
            with pytest.raises(IsADirectoryError):
                files.open("rules")
            with pytest.raises(FileNotFoundError):
                files.open("rules/none")
    assert open_descriptors() <= before


def test_a_file_that_was_opened_outlives_the_snapshot_and_the_generation(overlay: Store) -> None:
    with overlay.snapshot() as files:
        file = files.open("rules/tax.txt")
    overlay.flip(2)
    assert overlay.prune(1)
    with file:
        assert file.read() == "tax 1"


# --- overlay: managed and unmanaged -------------------------------------------------------------------------


def test_overlay_reads_managed_files_from_the_generation_and_others_from_the_root(overlay: Store) -> None:
    with overlay.snapshot() as files:
        assert files.json("prices.json") == {"build": 1}
        assert files.read_text("notes.txt") == "notes"
        assert files.read_bytes(Path("rules/own.txt")) == b"own"
        with files.open("rules/tax.txt", "rb") as file:
            assert file.read() == b"tax 1"


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("by_link", [False, True], ids=["direct", "state folder reached by a link"])
def test_a_managed_file_that_this_generation_lacks_is_absent_although_a_later_one_has_it(
    overlay: Store, relative: bool, by_link: bool
) -> None:
    if by_link:
        (overlay.folder / "alias").symlink_to(overlay.state)
        current = overlay.folder / "alias" / "current" / NAME
    else:
        current = overlay.current
    overlay.link("rules/new.txt", relative=relative)
    with Snapshot(root=overlay.root, current=current) as files:
        overlay.flip(2)
        assert (overlay.root / "rules/new.txt").read_text() == "new"
        assert not files.exists("rules/new.txt")
        with pytest.raises(FileNotFoundError, match=r"rules/new\.txt"):
            files.open("rules/new.txt")
        assert "rules/new.txt" not in files.walk()
    with Snapshot(root=overlay.root, current=current) as files:
        assert files.read_text("rules/new.txt") == "new"


def adopt(store: Store, path: str, generations: list[int]) -> None:
    """Turn an ordinary file into a managed one, as the supervisor does it."""
    for generation in generations:
        leaf = store.path_of(generation) / path
        leaf.parent.mkdir(parents=True, exist_ok=True)
        leaf.hardlink_to(store.root / path)
    store.link(path)


@pytest.fixture
def between_the_looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Do something after a file was not found in the generation and before it is looked for in the root."""

    def arrange(action: Callable[[], None]) -> None:
        real = Snapshot._open_in_root

        def late(self: Snapshot, root: int, parts: tuple[str, ...]) -> int:
            monkeypatch.setattr(Snapshot, "_open_in_root", real)
            action()
            return real(self, root, parts)

        monkeypatch.setattr(Snapshot, "_open_in_root", late)

    return arrange


def test_a_file_that_is_adopted_and_patched_between_two_looks_is_read_as_it_was(
    overlay: Store, between_the_looks: Callable[[Callable[[], None]], None]
) -> None:
    def patch() -> None:
        adopt(overlay, "notes.txt", [1])
        (overlay.path_of(2) / "notes.txt").write_text("notes 2")
        overlay.flip(2)

    between_the_looks(patch)
    with overlay.snapshot() as files:
        assert files.read_text("notes.txt") == "notes"
    assert (overlay.root / "notes.txt").read_text() == "notes 2"


def test_a_file_that_is_adopted_and_deleted_between_two_looks_is_read_as_it_was(
    overlay: Store, between_the_looks: Callable[[Callable[[], None]], None]
) -> None:
    def patch() -> None:
        adopt(overlay, "notes.txt", [1])
        overlay.flip(2)
        (overlay.root / "notes.txt").unlink()

    between_the_looks(patch)
    with overlay.snapshot() as files:
        assert files.read_text("notes.txt") == "notes"


def test_a_file_that_is_adopted_patched_and_released_between_two_looks_is_read_as_it_was(
    overlay: Store, between_the_looks: Callable[[Callable[[], None]], None]
) -> None:
    def patch() -> None:
        adopt(overlay, "notes.txt", [1])
        (overlay.root / "notes.txt").unlink()
        (overlay.root / "notes.txt").write_text("notes 2")

    between_the_looks(patch)
    with overlay.snapshot() as files:
        assert files.read_text("notes.txt") == "notes"


def test_files_adopted_while_a_snapshot_is_open_stay_visible_in_it(overlay: Store) -> None:
    with overlay.snapshot() as files:
        adopt(overlay, "notes.txt", [1])
        (overlay.path_of(2) / "notes.txt").write_text("notes 2")
        overlay.flip(2)
        assert files.read_text("notes.txt") == "notes"
        assert files.walk() == ["notes.txt", "prices.json", "rules/own.txt", "rules/tax.txt"]


def test_walk_lists_what_can_be_opened_and_nothing_of_the_supervisors_own(overlay: Store) -> None:
    (overlay.root / ".asyncsup-17-0").write_text("on its way")
    (overlay.root / "own link").symlink_to("notes.txt")
    with overlay.snapshot() as files:
        assert files.walk() == ["notes.txt", "prices.json", "rules/own.txt", "rules/tax.txt"]
        assert files.walk("rules") == ["rules/own.txt", "rules/tax.txt"]
        assert files.walk("./rules/") == ["rules/own.txt", "rules/tax.txt"]
        assert files.walk("none") == []
        for path in files.walk():
            files.open(path).close()
    overlay.flip(2)
    with overlay.snapshot() as files:
        assert "rules/new.txt" in files.walk("rules")


def test_the_generation_alone_is_read_where_the_root_is_missing(overlay: Store) -> None:
    shutil.rmtree(overlay.root)
    with overlay.snapshot() as files:
        assert files.read_text("rules/tax.txt") == "tax 1"
        assert files.walk() == ["prices.json", "rules/tax.txt"]
        with pytest.raises(FileNotFoundError):
            files.open("notes.txt")


# --- tree ---------------------------------------------------------------------------------------------------


def test_tree_reads_nothing_that_is_not_in_the_generation(tree: Store) -> None:
    with tree.snapshot() as files:
        tree.flip(2)
        assert files.walk() == ["app.py", "gone.txt", "lib/code.py"]
        assert not files.exists("added.txt"), "a later generation has it, and the root leads there by now"
        assert files.read_text("gone.txt") == "x"
    with tree.snapshot() as files:
        assert files.walk() == ["added.txt", "app.py", "lib/code.py"]


def test_tree_is_recognised_although_the_root_moved_on_before_it_was_looked_at(
    tree: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = snapshot_module._pin_generation

    def pin_then_flip(current: Path) -> Any:
        pinned = real(current)
        tree.flip(2)
        return pinned

    monkeypatch.setattr(snapshot_module, "_pin_generation", pin_then_flip)
    with tree.snapshot() as files:
        assert files.generation == "1"
        assert not files.exists("added.txt")


def test_a_tree_before_its_first_patch_is_read_where_it_lies_and_stays_pinned_during_the_patch(
    store: Store,
) -> None:
    store.root.mkdir()
    (store.root / "app.py").write_text("v0")
    (store.state / "sets/first").mkdir()
    (store.state / "sets/first" / NAME).symlink_to(store.root)
    (store.state / "current").symlink_to("sets/first")
    with store.snapshot() as files:
        assert files.generation is None
        assert files.walk() == ["app.py"]
        store.root.rename(store.path_of(0))
        store.root.symlink_to(store.current)
        store.add(1, {"app.py": "v1", "added.txt": "y"})
        store.flip(1)
        assert files.read_text("app.py") == "v0"
        assert not files.exists("added.txt")
        assert not store.prune(0)
    assert store.prune(0)
    with store.snapshot() as files:
        assert (files.generation, files.read_text("app.py")) == ("1", "v1")


# --- no generation, no asyncsup -----------------------------------------------------------------------------


@pytest.mark.parametrize("patched_targets", ["none", "others"])
def test_a_target_that_was_never_patched_is_read_as_it_lies_there(store: Store, patched_targets: str) -> None:
    store.root.mkdir()
    (store.root / "job.json").write_text('{"job": "x"}')
    if patched_targets == "others":
        store.flip(None)
    with store.snapshot() as files:
        assert files.generation is None
        assert files.json("job.json") == {"job": "x"}
        assert files.walk() == ["job.json"]
        with pytest.raises(FileNotFoundError):
            files.open("none")


def test_the_first_patch_during_a_snapshot_never_makes_a_mix(store: Store) -> None:
    store.root.mkdir()
    for name in ("a", "b"):
        (store.root / name).write_text("old")

    def first_patch() -> None:
        store.add(0, {})
        store.flip(0)
        for name in ("a", "b"):
            adopt(store, name, [0])
        store.add(1, {"a": "new", "b": "new"})
        store.flip(1)

    with store.snapshot() as files, store.snapshot() as unread:
        assert files.read_text("a") == "old"
        first_patch()
        with pytest.raises(OSError, match="take a new snapshot") as caught:
            files.read_text("b")
        assert caught.value.errno == errno.ESTALE
        assert [unread.read_text(name) for name in ("a", "b")] == ["new", "new"]
        assert unread.generation == "1"


def test_without_asyncsup_the_plain_folder_is_read_also_one_that_was_patched(overlay: Store) -> None:
    (overlay.root / "own link").symlink_to("notes.txt")
    with Snapshot(root=overlay.root, current=None) as files:
        assert files.generation is None
        assert files.json("prices.json") == {"build": 1}
        assert files.read_text("own link") == "notes"
        assert files.walk("rules") == ["rules/own.txt", "rules/tax.txt"]
        with pytest.raises(ValueError, match="relative"):
            files.open("../state/current")


def test_a_missing_root_is_told_when_the_snapshot_is_taken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), Snapshot(root=tmp_path / "nowhere", current=None):
        pass


def test_target_takes_root_and_generation_from_the_environment(
    overlay: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(protocol.ENV_ROOT, str(overlay.root))
    monkeypatch.setenv(protocol.ENV_CURRENT, str(overlay.current))
    with Target(root=tmp_path).snapshot() as files:
        assert files.json("prices.json") == {"build": 1}
    monkeypatch.delenv(protocol.ENV_ROOT)
    monkeypatch.delenv(protocol.ENV_CURRENT)
    monkeypatch.chdir(overlay.root)
    for target in (Target(), Target(root="."), Target(root=overlay.root)):
        with target.snapshot() as files:
            assert files.read_text("notes.txt") == "notes"


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../state/lock", "rules/../../x", "rules/..", "..", "", ".", "a\0b"]
)
@pytest.mark.parametrize("reading", ["open", "read_text", "read_bytes", "json", "exists"])
def test_a_path_that_could_leave_the_root_is_refused(overlay: Store, path: str, reading: str) -> None:
    with overlay.snapshot() as files, pytest.raises(ValueError, match="path"):
        getattr(files, reading)(path)


@pytest.fixture
def outside(overlay: Store) -> Path:
    folder = overlay.folder / "outside"
    folder.mkdir()
    (folder / "secret").write_text("secret")
    return folder


@pytest.mark.parametrize("where", ["root", "generation"])
@pytest.mark.parametrize("leaf", [False, True], ids=["folder link", "file link"])
def test_a_link_is_never_followed_out_of_what_was_pinned(
    overlay: Store, outside: Path, where: str, leaf: bool
) -> None:
    base = overlay.root if where == "root" else overlay.path_of(1)
    if leaf:
        (base / "escape").symlink_to(outside / "secret")
    else:
        (base / "escape").symlink_to(outside)
    path = "escape" if leaf else "escape/secret"
    with overlay.snapshot() as files:
        with pytest.raises(OSError, match="symbolic link") as caught:
            files.open(path)
        assert caught.value.errno == errno.ELOOP
        assert caught.value.filename == path
        assert path not in files.walk()


def test_only_ordinary_files_are_opened(overlay: Store) -> None:
    os.mkfifo(overlay.root / "pipe")
    with overlay.snapshot() as files:
        with pytest.raises(OSError, match="not an ordinary file"):
            files.open("pipe")
        for folder in ("rules", "rules/"):
            with pytest.raises(IsADirectoryError):
                files.open(folder)
        assert not files.exists("rules")
        assert "pipe" not in files.walk()
        with pytest.raises(NotADirectoryError):
            files.open("notes.txt/x")
        assert not files.exists("notes.txt/x")


@pytest.mark.parametrize("mode", ["w", "a", "r+", "wb", "x", "rt"])
def test_a_snapshot_is_for_reading_only(overlay: Store, mode: Any) -> None:
    with overlay.snapshot() as files, pytest.raises(ValueError, match="mode"):
        files.open("notes.txt", mode)


def test_a_snapshot_is_used_with_with_and_once(overlay: Store) -> None:
    files = overlay.snapshot()
    with pytest.raises(ValueError, match=r"with target\.snapshot"):
        files.open("notes.txt")
    with files:
        pass
    for use in (lambda: files.read_text("notes.txt"), files.walk):
        with pytest.raises(ValueError, match="not open"):
            use()
    with pytest.raises(RuntimeError, match="entered once"):
        files.__enter__()


def test_text_is_utf_8_whatever_the_locale_and_broken_json_is_told_with_its_path(overlay: Store) -> None:
    (overlay.root / "notes.txt").write_bytes("grüße".encode())
    (overlay.root / "latin.txt").write_bytes("grüße".encode("latin-1"))
    (overlay.root / "broken.json").write_text('{"a": ')
    with overlay.snapshot() as files:
        assert files.read_text("notes.txt") == "grüße"
        assert files.read_text("latin.txt", encoding="latin-1") == "grüße"
        with pytest.raises(UnicodeDecodeError):
            files.read_text("latin.txt")
        with pytest.raises(ValueError, match=r"broken\.json"):
            files.json("broken.json")
