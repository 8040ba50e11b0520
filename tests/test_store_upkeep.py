"""What the store keeps, lets go of and remembers; its configuration, and its state directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
from msgspec.structs import replace
from store_kit import (
    FILES,
    Bench,
    Meddling,
    apply,
    begin,
    benches,
    info,
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

from asyncsup import failpoints
from asyncsup.errors import (
    PatchError,
    PatchNotFoundError,
    PatchRefusedError,
    StateError,
    StateLockedError,
    TargetNotFoundError,
    UsageError,
)
from asyncsup.patch import fs
from asyncsup.patch.facts import Layout, TargetRoot
from asyncsup.patch.store import Store

both_layouts = pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.value) for layout in Layout])


@pytest.fixture
def base() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# --- keeping and letting go ---------------------------------------------------------------------------------


def generations(b: Bench) -> list[int]:
    return sorted(map(int, names_in(b.base / "state/generations/web")))


@both_layouts
def test_pruning_keeps_the_way_back_and_what_is_in_use(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    for build in range(301, 306):
        apply(b.store, b.patch(build, modified={"app.json": b"%d" % build}))
    roll_back(b.store)  # Generation 5 is not on the way back from 4 any more.
    assert b.store.prune("web", 2) == [0, 1, 5]
    assert generations(b) == [2, 3, 4]
    txn = staged(b.store, b.patch(306, modified={"app.json": b"306"}))
    b.store.switch(txn)
    assert b.store.prune("web", 0) == [2, 3]
    b.store.switch_back(txn)
    assert seen(b.root)["app.json"] == b"304"
    b.store.abort(txn)
    assert b.store.preview.rollback_target("web") is None
    assert b.store.prune("web", 0) == []


@both_layouts
def test_pruning_while_a_patch_may_yet_be_undone_keeps_the_way_back_from_before(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    apply(b.store, b.patch(301, modified={"app.json": b"301"}))
    txn = staged(b.store, b.patch(302, modified={"app.json": b"302"}))
    b.store.switch(txn)
    assert b.store.prune("web", 1) == []
    b.store.abort(txn)
    assert b.store.preview.rollback_target("web") == 0
    roll_back(b.store)
    assert seen(b.root) == FILES


@both_layouts
def test_a_generation_that_a_reader_holds_is_kept_until_it_lets_go(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    apply(b.store, b.patch(301, modified={"app.json": b"301"}))
    reader = os.open(b.store.current_link("web"), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(reader, fcntl.LOCK_SH)
        for build in (302, 303):
            apply(b.store, b.patch(build, modified={"app.json": b"%d" % build}))
        assert b.store.prune("web", 0) == [0, 2]
        with os.fdopen(os.open("app.json", os.O_RDONLY, dir_fd=reader), "rb") as file:
            assert file.read() == b"301"
    finally:
        os.close(reader)
    assert b.store.prune("web", 0) == [1]


@both_layouts
def test_what_is_left_of_a_removal_that_failed_goes_with_the_next_prune(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout, "web", "web-0")
    for build in (301, 302):
        apply(b.store, b.patch(build, modified={"app.json": b"%d" % build}, name=f"{build}"))
    with (
        mock.patch.object(os, "rmdir", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))),
        pytest.raises(PatchError) as caught,
    ):
        b.store.prune("web", 0)
    assert caught.value.error_code == "patch.io_failed"
    assert names_in(b.base / "state/staging") == ["web-0.gone"]
    b.store.prune("web-0", 0)
    assert names_in(b.base / "state/staging") == ["web-0.gone"]
    assert b.store.prune("web", 0) == [1]
    assert names_in(b.base / "state/staging") == []


@both_layouts
def test_an_undone_generation_that_a_reader_holds_goes_with_the_next_prune(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    txn = staged(b.store, b.patch(301, modified={"app.json": b"301"}))
    b.store.switch(txn)
    reader = os.open(b.store.current_link("web"), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(reader, fcntl.LOCK_SH)
        b.store.switch_back(txn)
        b.store.abort(txn)
        assert generations(b) == [0, 1]
        with os.fdopen(os.open("app.json", os.O_RDONLY, dir_fd=reader), "rb") as file:
            assert file.read() == b"301"
    finally:
        os.close(reader)
    assert b.store.prune("web", 3) == [1]
    assert seen(b.root) == FILES


@both_layouts
def test_release_makes_every_file_an_ordinary_one_again(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout, persist=("data",))
    write_tree(b.root, {"data/db": b"1"})
    (b.root / "app.json").chmod(0o640)
    apply(b.store, b.patch(300, modified={"app.json": b"two", "run.sh": b"#"}, new={"n/x": b"n"}))
    before = seen(b.root)
    assert b.store.release("web") == ["app.json", "n/x", "run.sh"]
    assert seen(b.root) == before
    assert not b.root.is_symlink()
    assert not any(path.is_symlink() for path in b.root.rglob("*"))
    assert stat.S_IMODE((b.root / "app.json").stat().st_mode) == 0o640
    assert stat.S_IMODE((b.root / "run.sh").stat().st_mode) == 0o755
    assert leftovers(b.root) == []
    state = b.store.state("web")
    assert (state.build, b.store.preview.rollback_target("web")) == (300, None)
    assert b.store.release("web") == []
    b.reopen()
    assert seen(b.root) == before
    apply(b.store, b.patch(301, modified={"app.json": b"three"}, deleted=["n/x"]))
    assert seen(b.root)["app.json"] == b"three"
    roll_back(b.store)
    assert seen(b.root) == before
    assert b.store.state("web").build == 300


def test_a_release_that_was_cut_off_puts_no_half_copy_in_place(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(Layout.OVERLAY)
    apply(b.store, b.patch(300, modified={"app.json": b"two", "rules/eu.json": b"eu 2"}))
    before = seen(b.root)
    monkeypatch.setenv(failpoints.VARIABLE, "store.release.copied:error")
    with pytest.raises(PatchError):
        b.store.release("web")
    monkeypatch.delenv(failpoints.VARIABLE)
    copies = leftovers(b.root)
    assert len(copies) == 2
    for copy in copies:
        (b.root / copy).write_bytes(b"")  # So may a power cut leave it.
    assert seen(b.root) == before
    b.reopen()
    b.store.recover()
    assert seen(b.root) == before
    assert leftovers(b.root) == []
    assert not any(path.is_symlink() for path in b.root.rglob("*"))


def test_a_file_that_a_release_gives_back_is_the_one_the_program_has_open(
    bench: Callable[..., Bench],
) -> None:
    b = bench(Layout.OVERLAY)
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    roll_back(b.store)
    with (b.root / "app.json").open("r+b") as opened:
        b.store.release("web")
        opened.write(b"saved meanwhile")
    assert (b.root / "app.json").read_bytes().startswith(b"saved meanwhile")


@both_layouts
def test_what_is_pruned_is_written_down_before_it_goes(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    for build in (300, 301, 302):
        apply(b.store, b.patch(build, modified={"app.json": str(build).encode()}))
    before = generations(b)
    with (
        mock.patch.object(fs, "remove_tree", side_effect=OSError(errno.EIO, "")),
        pytest.raises(PatchError),
    ):
        b.store.prune("web", 1)
    b.reopen()
    b.store.recover()
    assert b.store.prune("web", 9) == []
    assert len(generations(b)) < len(before)
    roll_back(b.store)
    assert seen(b.root)["app.json"] == b"301"
    assert b.store.history.examine().ok


@both_layouts
def test_one_that_was_undone_has_a_verdict_though_nobody_was_told(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    """The process is killed between the abort and its report."""
    b = bench(layout)
    txn = staged(b.store, b.patch(300, modified={"app.json": b"two"}))
    b.store.abort(txn, "it was not meant to be")
    b.reopen()
    assert b.store.recover() == []
    (entry,) = b.store.history.latest()
    assert (entry["verdict"], entry["error"]) == ("rolled_back", "it was not meant to be")
    assert entry["took"] is not None
    assert b.store.history.examine().ok


@both_layouts
def test_after_a_release_writing_in_place_changes_no_generation(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    b.store.release("web")
    b.put("app.json", b"edited")
    patch = b.patch(301, modified={"rules/eu.json": b"x"})
    apply(b.store, patch)
    assert seen(b.root)["app.json"] == b"edited"


@both_layouts
def test_bytecode_goes_with_its_generation(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    for build in (301, 302):
        apply(b.store, b.patch(build, modified={"app.json": b"%d" % build}))
    home = b.base / "state/pycache/web"
    for number in (0, 1, 2, 77):
        write_tree(home, {f"{number}/srv/app.cpython-311.pyc": b"code"})
    assert b.store.prune("web", 1) == [0]
    assert names_in(home) == ["1", "2", "77"]
    b.reopen()  # What came into being after its generation had gone is swept at the start.
    assert names_in(home) == ["1", "2"]
    roll_back(b.store)
    b.store.prune("web", 1)
    assert names_in(home) == ["1"]


# --- what is configured -------------------------------------------------------------------------------------


@both_layouts
def test_the_configured_build_counts_until_the_first_patch(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout, build=100)
    assert b.store.state("web").build == 100
    b.reopen(replace(b.targets[0], build=150))
    assert b.store.state("web").build == 150
    b.store.abort(staged(b.store, b.patch(300, modified={"app.json": b"two"})))
    b.reopen(replace(b.targets[0], build=160))
    assert b.store.state("web").build == 160
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    b.reopen(replace(b.targets[0], build=999))
    assert b.store.state("web").build == 300
    roll_back(b.store)
    assert b.store.state("web").build == 160


@both_layouts
def test_every_registered_target_has_a_current_folder(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout, "a", "b")
    for each in b.targets:
        assert b.store.current_link(each.name).is_dir()
    third = target(b.base, layout, "third")
    b.reopen(third)  # The others are not configured any more, and keep their files.
    assert b.store.current_link("third").is_dir()
    assert b.store.current_link("a").is_dir()
    with pytest.raises(TargetNotFoundError):
        b.store.state("fourth")


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "x" * 200, "-rf"])
def test_a_name_that_is_no_folder_name_is_refused(
    name: str, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    b = bench(Layout.OVERLAY)
    with pytest.raises(UsageError):
        b.store.register([TargetRoot(name=name, root=tmp_path, layout=Layout.OVERLAY)])


@both_layouts
def test_root_and_layout_change_only_while_nothing_is_managed(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    (other,) = set(Layout) - {layout}
    moved = b.base / "other-root"
    write_tree(moved, FILES)
    b.reopen(replace(b.targets[0], root=moved))
    b.reopen(replace(b.targets[0], layout=other))
    b.reopen()
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    for changed, code in (
        ({"root": moved}, "state.root_changed"),
        ({"layout": other}, "state.layout_changed"),
    ):
        with pytest.raises(StateError, match="target release web") as caught:
            b.store.register([replace(b.targets[0], **changed)])
        assert caught.value.error_code == code
    b.store.release("web")
    b.reopen(replace(b.targets[0], layout=other))
    apply(b.store, b.patch(301, modified={"app.json": b"three"}))
    assert seen(b.root)["app.json"] == b"three"
    roll_back(b.store)
    assert seen(b.root)["app.json"] == b"two"


@both_layouts
@pytest.mark.parametrize("changed", ["root", "layout"])
def test_root_and_layout_do_not_change_under_a_patch(
    layout: Layout, changed: str, bench: Callable[..., Bench]
) -> None:
    """Nothing is managed before the first patch, and what is staged must not be lost sight of."""
    b = bench(layout)
    (other,) = set(Layout) - {layout}
    moved = b.base / "other-root"
    write_tree(moved, FILES)
    after = replace(b.targets[0], **({"root": moved} if changed == "root" else {"layout": other}))
    txn = staged(b.store, b.patch(300, new={"sub/new.json": b"new"}))
    with pytest.raises(StateError, match="until it has ended") as caught:
        b.store.register([after])
    assert caught.value.error_code == "state.transaction_open"
    assert caught.value.details == {"target": "web", "txn": txn}
    b.store.abort(txn)
    assert seen(b.root) == seen(moved if changed == "root" else b.root) == FILES
    assert leftovers(b.root) == []
    b.store.finish(txn, verdict="rolled_back")
    b.store.release("web")  # a tree has moved into the store for it
    b.store.register([after])
    apply(b.store, b.patch(301, new={"sub/new.json": b"new"}))
    assert seen(after.root) == {**FILES, "sub/new.json": b"new"}


@both_layouts
def test_a_root_that_was_moved_with_all_its_links_is_taken_as_it_is(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    moved = replace(b.targets[0], root=b.base / "moved")
    b.root.rename(moved.root)
    b.targets = [moved]
    b.reopen()
    apply(b.store, b.patch(301, modified={"app.json": b"three"}))
    assert seen(b.root)["app.json"] == b"three"


def test_a_root_given_through_a_link_is_the_folder_behind_it(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.TREE)
    link = b.base / "link"
    link.symlink_to("web-root")
    b.reopen(replace(b.targets[0], root=link))
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    assert seen(link)["app.json"] == b"two"
    assert str((link).readlink()) == "web-root"
    b.reopen(replace(b.targets[0], root=link))
    apply(b.store, b.patch(301, modified={"app.json": b"three"}))
    assert seen(link)["app.json"] == b"three"


@both_layouts
def test_a_relative_state_directory_survives_a_chdir(
    layout: Layout, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(layout)
    b.store.close()
    monkeypatch.chdir(b.base)
    b.store = Store.open(Path("state"))
    monkeypatch.chdir("/")
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    assert seen(b.root)["app.json"] == b"two"


def test_roots_that_overlap_a_tree_are_refused(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    outer = TargetRoot(name="outer", root=b.base, layout=Layout.TREE)
    with pytest.raises(StateError) as caught:
        b.store.register([b.targets[0], outer])
    assert caught.value.error_code == "state.roots_overlap"
    b.store.register([b.targets[0], replace(outer, layout=Layout.OVERLAY)])


def test_a_tree_cannot_be_moved_into_a_state_directory_inside_it(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.TREE)
    (b.base / "app.json").write_bytes(b"one")
    whole = TargetRoot(name="whole", root=b.base, layout=Layout.TREE)
    b.store.register([whole])
    patch = b.patch(300, modified={"app.json": b"two"})
    txn = begin(b.store, patch, "whole")
    with pytest.raises(PatchRefusedError, match="lies inside the root") as caught:
        b.store.stage(txn, "whole", patch)
    assert caught.value.error_code == "gate.root"
    b.store.abort(txn)


# --- the state directory ------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_told_who_has_it(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    script = (
        "import sys; from pathlib import Path; from asyncsup.patch.store import Store\n"
        "from asyncsup.errors import StateLockedError\n"
        "try:\n    Store.open(Path(sys.argv[1]))\n"
        "except StateLockedError as error:\n    print(error.details['pid']); sys.exit(8)\n"
    )
    command = [sys.executable, "-c", script, str(b.base / "state")]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (second.returncode, second.stdout.strip()) == (8, str(os.getpid())), second.stderr
    with pytest.raises(StateLockedError):
        Store.open(b.base / "state")
    b.store.close()
    assert subprocess.run(command, check=False).returncode == 0
    b.store = open_store(b.base, *b.targets)


@both_layouts
@pytest.mark.parametrize("damage", ["missing", "dangling", "nonsense"])
def test_a_lost_pointer_is_set_to_what_was_last_confirmed(
    layout: Layout, damage: str, bench: Callable[..., Bench]
) -> None:
    b = bench(layout, "a", "b")
    apply(b.store, b.patch(300, modified={"app.json": b"two"}), "a")
    txn = staged(b.store, b.patch(301, modified={"app.json": b"never confirmed"}), "a")
    b.store.switch(txn)
    current = b.base / "state/current"
    current.unlink()
    if damage != "missing":
        current.symlink_to("sets/999" if damage == "dangling" else "/etc")
    b.reopen()
    assert [seen(each.root)["app.json"] for each in b.targets] == [b"two", b"one"]
    assert b.store.state("a").build == 300
    apply(b.store, b.patch(302, modified={"app.json": b"three"}), "a", "b")
    assert [seen(each.root)["app.json"] for each in b.targets] == [b"three", b"three"]


def test_a_lost_pointer_is_not_set_to_damaged_files(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    b.store.close()
    file = b.base / "state/generations/web/1/app.json"
    file.chmod(0o644)
    file.write_bytes(b"tw")
    (b.base / "state/current").unlink()
    with pytest.raises(StateError, match="is damaged") as caught:
        Store.open(b.base / "state")
    assert caught.value.error_code == "state.pointer"
    file.write_bytes(b"two")
    b.store = open_store(b.base, *b.targets)


def test_a_moved_state_directory_is_noticed(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    b.store.close()
    (b.base / "state").rename(b.base / "elsewhere")
    with pytest.raises(StateError, match="move it back") as caught:
        Store.open(b.base / "elsewhere")
    assert caught.value.error_code == "state.moved"
    (b.base / "state").symlink_to("elsewhere")
    b.store = open_store(b.base, *b.targets)
    assert seen(b.root)["app.json"] == b"two"
    apply(b.store, b.patch(301, modified={"app.json": b"three"}))
    assert seen(b.root)["app.json"] == b"three"


def test_a_state_directory_that_cannot_be_used_says_so(base: Path) -> None:
    (base / "state").write_bytes(b"a file")
    with pytest.raises(StateError) as caught:
        Store.open(base / "state")
    assert caught.value.error_code == "state.unusable"


def test_a_lost_or_broken_database_is_noticed(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    b.store.close()
    database = b.base / "state/state.db"
    content = database.read_bytes()
    database.unlink()
    with pytest.raises(StateError) as caught:
        Store.open(b.base / "state")
    assert caught.value.error_code == "state.database_missing"
    database.write_bytes(b"this is not a database, it is a text" * 100)
    with pytest.raises(StateError) as caught:
        Store.open(b.base / "state")
    assert caught.value.error_code == "state.database"
    database.write_bytes(content)
    b.store = open_store(b.base, *b.targets)
    assert b.store.state("web").build == 300


# --- memory -------------------------------------------------------------------------------------------------


def test_what_could_not_be_tidied_is_tidied_later_whatever_was_pruned(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(Layout.OVERLAY)
    apply(b.store, b.patch(2, new={"sub/c.txt": b"c"}))
    txn = staged(b.store, b.patch(3, deleted=["sub/c.txt"]))
    b.store.switch(txn)
    monkeypatch.setenv(failpoints.VARIABLE, "store.unlink.taken:error")
    b.store.commit(txn)
    monkeypatch.delenv(failpoints.VARIABLE)
    b.store.finish(txn, verdict="committed")
    assert leftovers(b.root)
    b.store.prune("web", 0)
    apply(b.store, b.patch(4, modified={"app.json": b"4"}))
    assert leftovers(b.root) == []


def test_transactions_are_remembered_with_steps_and_files(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY, build=200)
    patch = b.patch(300, modified={"app.json": b"two"}, new={"n.json": b""})
    txn = staged(b.store, patch)
    b.store.record(txn, "reload", target="web", instance="web:0", detail="by sdk", took=0.25)
    b.store.switch(txn)
    b.store.commit(txn)
    b.store.finish(txn, verdict="committed")
    undo = roll_back(b.store)
    b.reopen()
    described = b.store.history.transaction(txn)
    (step,) = described["steps"]
    assert step.pop("seq") > 0
    assert step.pop("at").endswith("Z")
    assert step == {
        "step": "reload", "target": "web", "instance": "web:0", "detail": "by sdk", "took": 0.25,
    }  # fmt: skip
    assert [(file["path"], file["op"]) for file in described["files"]] == [
        ("n.json", "new"),
        ("app.json", "modified"),
    ]
    facts = {
        "action": "apply",
        "patch": patch.id,
        "build": 300,
        "kind": "warm",
        "targets": ["web"],
        "verdict": "committed",
        "state": "committed",
    }
    assert described.items() >= facts.items()
    assert described["took"] >= 0
    assert [entry["txn"] for entry in b.store.history.latest()] == [undo, txn]
    assert [entry["txn"] for entry in b.store.history.latest("web", limit=1)] == [undo]
    assert b.store.history.latest("nobody") == []
    # A rollback is found under the patch it undoes.
    assert b.store.history.find(patch.id[:12])["txn"] == undo
    assert b.store.history.find(str(txn))["txn"] == txn
    for reference in ("999", "abc", "feedfeedfeed", "what"):
        with pytest.raises(PatchNotFoundError):
            b.store.history.find(reference)


def test_the_beginning_of_an_id_must_fit_one_patch(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    for ending in ("1", "2"):
        patch = replace(info(b.patch(300, new={"n": b""})), id=f"abcd{ending}" + "0" * 59)
        txn = b.store.begin(action="apply", patch=patch, targets=["web"], asked_by="test")
        b.store.finish(txn, verdict="refused")
    with pytest.raises(UsageError, match="fits 2 patches"):
        b.store.history.find("abcd")
    assert b.store.history.find("ABCD1")["patch"].startswith("abcd1")


def test_held_patches_and_wanted_targets_are_remembered(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    b.store.hold("a" * 64, "it crashed")
    assert b.store.wanted("web")
    b.store.set_wanted("web", False)
    b.reopen()
    assert b.store.held("a" * 64) == "it crashed"
    assert b.store.held("b" * 64) is None
    assert not b.store.wanted("web")
    b.store.unhold("a" * 64)
    assert b.store.held("a" * 64) is None


def test_what_a_version_before_single_instances_says_of_a_target_counts(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    b.store.set_wanted("web", True, {1, 2})
    assert b.store.stopped_alone("web") == {1, 2}
    with contextlib.closing(sqlite3.connect(b.base / "state" / "state.db")) as sql, sql:
        sql.execute("INSERT OR REPLACE INTO wanted VALUES ('web', 1)")
    b.reopen()
    assert b.store.stopped_alone("web") == frozenset()
    b.store.set_wanted("web", True, {0})
    assert b.store.stopped_alone("web") == {0}


def test_an_io_error_has_a_code_and_leaves_nothing(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    patch = b.patch(300, modified={"app.json": b"two"})

    def break_staging() -> None:
        (b.base / "state/generations/web").rename(b.base / "away")

    txn = begin(b.store, patch)
    with pytest.raises(PatchError) as caught:
        b.store.stage(txn, "web", Meddling(patch, break_staging))
    assert caught.value.error_code == "patch.io_failed"
    (b.base / "away").rename(b.base / "state/generations/web")
    b.store.abort(txn)
    assert seen(b.root) == FILES
    apply(b.store, patch)


def test_bringing_along_that_fails_leaves_no_descriptor_open(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.TREE)
    txn = staged(b.store, b.patch(300, modified={"app.json": b"two"}))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with (
        mock.patch.object(fs, "unlink_quietly", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))),
        pytest.raises(PatchError),
    ):
        b.store.switch(txn)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    b.store.abort(txn)
    assert seen(b.root) == FILES


def test_a_lock_file_that_cannot_be_written_keeps_nobody_out(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    full = mock.patch.object(os, "ftruncate", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with full:
        b.store.close()
        with pytest.raises(StateError) as caught:
            Store.open(b.base / "state")
    assert caught.value.error_code == "state.unusable"
    b.store = open_store(b.base, *b.targets)


def test_without_root_rights_everything_works_as_well(stack: ExitStack) -> None:
    """Another way through the code: no chown, and folders that not even their owner may write to."""
    if os.geteuid() != 0:
        pytest.skip("this is how all the other tests run then")
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    os.chown(scratch, 65534, 65534)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for layout in Layout:
                base = scratch / layout.value
                base.mkdir()
                where = target(base, layout)
                write_tree(where.root, FILES)
                (where.root / "rules").chmod(0o555 if layout is Layout.TREE else 0o755)
                store = open_store(base, where)
                (where.root / "app.json").chmod(0)
                with package(base, 299, modified={"app.json": b"2"}) as patch:
                    (plan,) = store.preview.plan("web", patch.manifest)
                    assert plan.code == "gate.unreadable", plan
                (where.root / "app.json").chmod(0o644)
                with package(base, 300, modified={"rules/eu.json": b"x"}, new={"n/m": b""}) as patch:
                    apply(store, patch)
                    assert seen(where.root) == {**FILES, "rules/eu.json": b"x", "n/m": b""}
                    roll_back(store)
                    store.prune("web", 0)
                    assert seen(where.root) == FILES
                    txn = staged(store, patch)
                    store.abort(txn)
                    apply(store, patch)
                store.release("web")
                store.close()
                assert seen(where.root) == {**FILES, "rules/eu.json": b"x", "n/m": b""}
            status = 0
        except BaseException:
            (scratch / "problem").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, (scratch / "problem").read_text()
