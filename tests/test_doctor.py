"""`doctor` finds what is damaged in a state directory, mends what it is sure of, and touches nothing else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve
from store_kit import (
    FILES,
    Tree,
    apply,
    info,
    leftovers,
    memory_folder,
    open_store,
    package,
    roll_back,
    seen,
    staged,
    target,
    write_tree,
)

from asyncsup import cli, failpoints
from asyncsup.errors import AsyncsupError, NotAllowedError, StateError
from asyncsup.patch import doctor, fs
from asyncsup.patch.doctor import Diagnosis, diagnose
from asyncsup.patch.facts import Layout
from asyncsup.patch.package import Package
from asyncsup.patch.repair import Outcome, repair
from asyncsup.patch.store import Store

both_layouts = pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.value) for layout in Layout])


class Ward:
    """A state directory that is in order and closed, of two targets that were patched alike: `web`, which
    things happen to, and `db`.

    Generation 1 has app.json changed, x/new.json new and rules/us.json deleted; 2, the current one, has
    app.json changed again.
    """

    def __init__(self, base: Path, stack: ExitStack, layout: Layout, **options: Any) -> None:
        self.base = base
        self.stack = stack
        self.targets = [target(base, layout, name, **options) for name in ("web", "db")]
        for each in self.targets:
            write_tree(each.root, {**FILES, "data/kept": b"kept"})
        self.patches = [
            self.patch(301, new={"x/new.json": b"new"}, deleted=["rules/us.json"]),
            self.patch(302),
        ]
        store = self.open()
        for patch in self.patches:
            apply(store, patch, "web", "db")
        store.close()
        self.view = self.seen()
        assert self.codes() == []

    def patch(self, build: int, **more: Any) -> Package:
        made = package(self.base, build, modified={"app.json": str(build).encode()}, **more)
        return self.stack.enter_context(made)

    def open(self) -> Store:
        return open_store(self.base, *self.targets)

    @property
    def state(self) -> Path:
        return self.base / "state"

    @property
    def root(self) -> Path:
        return self.targets[0].root

    @property
    def generations(self) -> Path:
        return self.state / "generations/web"

    def seen(self) -> Tree:
        return seen(self.root)

    def codes(self) -> list[str]:
        return codes(diagnose(self.state))

    def sql(self, *statements: str) -> None:
        with closing(sqlite3.connect(self.state / "state.db")) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    def is_mended(self, *found: str, view: Tree | None = None, **options: Any) -> Outcome:
        """Exactly this is found, and mended, and a supervisor that starts afterwards finds all as it was."""
        assert self.codes() == sorted(found)
        outcome = repair(self.state, **options)
        assert codes(outcome.left) == [], outcome.left.findings
        assert {each.finding.code for each in outcome.mended} >= set(found)
        self.is_usable(self.view if view is None else view)
        return outcome

    def is_left(self, *found: str, **options: Any) -> Outcome:
        """Exactly this is found, and nothing is touched."""
        assert self.codes() == sorted(found)
        before = picture(self.base)
        outcome = repair(self.state, **options)
        assert codes(outcome.left) == sorted(found)
        assert outcome.mended == ()
        assert picture(self.base) == before
        return outcome

    def is_usable(self, view: Tree) -> None:
        assert self.seen() == view
        store = self.open()
        try:
            assert store.history.examine().ok
            assert self.seen() == view
            for each in self.targets:
                assert leftovers(each.root) == []
        finally:
            store.close()


def codes(diagnosis: Diagnosis) -> list[str]:
    # The tests run in memory, which is said.
    return sorted({finding.code for finding in diagnosis.findings} - {"filesystem.volatile"})


def picture(base: Path) -> dict[str, Any]:
    """Every name, with what it is, but for what SQLite does and the lock."""
    found = {}
    for path in sorted(base.rglob("*")):
        status = path.lstat()
        if path.name.startswith("state.db") or path.name == "lock":
            continue
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(base))] = (status.st_mode, status.st_ino, content)
    return found


def rot(file: Path) -> None:
    """Other bytes, and nobody has written them."""
    status = file.stat()
    file.chmod(0o600)
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    file.chmod(status.st_mode)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def ward() -> Iterator[Callable[..., Ward]]:
    with memory_folder() as base, ExitStack() as stack:
        yield lambda layout=Layout.OVERLAY, **options: Ward(base, stack, layout, **options)


# --- in order -----------------------------------------------------------------------------------------------


@both_layouts
def test_what_is_in_order_is_said_to_be_and_is_not_touched(layout: Layout, ward: Callable[..., Ward]) -> None:
    w = ward(layout)
    before = picture(w.base)
    diagnosis = diagnose(w.state)
    assert diagnosis.ok
    assert (diagnosis.targets, diagnosis.generations, diagnosis.running) == (2, 6, None)
    assert diagnosis.files >= 8
    outcome = repair(w.state)
    assert (outcome.mended, outcome.left.ok) == ((), True)
    assert picture(w.base) == before
    assert json.loads(json.dumps(outcome.to_json()))["ok"]
    # After whatever happens in a life.
    store = w.open()
    roll_back(store, "web")
    apply(store, w.patch(303, new={"rules/us.json": b"again"}), "web")
    store.prune("web", 0)
    store.release("db")
    store.close()
    assert w.codes() == []


def test_a_state_directory_that_is_not_there(tmp_path: Path) -> None:
    for look in (diagnose, repair):
        with pytest.raises(StateError) as caught:
            look(tmp_path / "nowhere")
        assert caught.value.error_code == "state.missing"
    assert not (tmp_path / "nowhere").exists()


# --- the pointer --------------------------------------------------------------------------------------------


def point_at(w: Ward, text: str) -> None:
    (w.state / "current").unlink()
    (w.state / "current").symlink_to(text)


def lose_everything(w: Ward) -> None:
    (w.state / "current").unlink()
    shutil.rmtree(w.state / "sets")


@both_layouts
@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda w: (w.state / "current").unlink(), "pointer.missing"),
        (lambda w: point_at(w, "sets/999"), "pointer.broken"),
        (lambda w: point_at(w, "elsewhere"), "pointer.broken"),
    ],
)
def test_a_lost_pointer_is_set_to_what_was_confirmed(
    damage: Callable[[Ward], None], code: str, layout: Layout, ward: Callable[..., Ward]
) -> None:
    w = ward(layout)
    damage(w)
    assert w.is_mended(code).mended[0].done == "set to what was last confirmed"


def test_all_sets_are_lost(ward: Callable[..., Ward]) -> None:
    w = ward()
    lose_everything(w)
    w.is_mended("pointer.missing")


def test_a_set_that_lacks_or_mistakes_a_target(ward: Callable[..., Ward]) -> None:
    w = ward()
    link = w.state / "current/web"
    link.unlink()
    w.is_mended("pointer.entry")
    link = w.state / "current/web"
    link.unlink()
    link.symlink_to("nonsense")
    w.is_mended("pointer.entry")


def test_a_pointer_that_shows_what_was_not_confirmed(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.state / "current/web").unlink()
    (w.state / "current/web").symlink_to("../../generations/web/1")
    w.is_mended("pointer.unconfirmed")


def test_a_lost_pointer_and_a_damaged_generation(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.state / "current").unlink()
    rot(w.generations / "2/app.json")
    w.is_mended("pointer.missing", "file.damaged")


def test_an_older_copy_of_state_db_is_left_to_people(ward: Callable[..., Ward]) -> None:
    w = ward()
    older = (w.state / "state.db").read_bytes()
    store = w.open()
    apply(store, w.patch(303), "web")
    store.close()
    (w.state / "state.db").write_bytes(older)
    assert "pointer.unknown" in w.codes()
    before = w.seen()
    outcome = repair(w.state)
    assert "pointer.unknown" in codes(outcome.left)
    assert (w.generations / "3").is_dir()
    assert w.seen() == before


# --- generations and files ----------------------------------------------------------------------------------


@both_layouts
def test_a_damaged_file_is_made_anew_from_a_copy_with_the_right_digest(
    layout: Layout, ward: Callable[..., Ward]
) -> None:
    w = ward(layout)
    before = (w.generations / "2/app.json").stat()
    rot(w.generations / "2/app.json")
    broken = (w.generations / "2/app.json").read_bytes()
    (mended,) = w.is_mended("file.damaged").mended
    assert mended.done.startswith("made anew from generation 2 of db; what was there is ")
    saved = Path(mended.done.partition("what was there is ")[2])
    assert saved.read_bytes() == broken
    after = (w.generations / "2/app.json").stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    # It is no drift for the next patch.
    store = w.open()
    apply(store, w.patch(303), "web")
    store.close()


def test_a_file_that_generations_share_is_damaged_in_all_of_them_and_shared_again(
    ward: Callable[..., Ward],
) -> None:
    w = ward()
    rot(w.generations / "1/x/new.json")
    outcome = w.is_mended("file.damaged")
    assert [each.finding.generation for each in outcome.mended] == [2, 1]
    first, second = (w.generations / number / "x/new.json" for number in ("1", "2"))
    assert first.samefile(second)


def test_a_missing_file_and_a_missing_original(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.generations / "2/app.json").unlink()
    (w.generations / "0/app.json").unlink()
    w.is_mended("file.missing")
    assert (w.generations / "0/app.json").read_bytes() == FILES["app.json"]
    assert (w.generations / "0/app.json").stat().st_mode == (w.base / "db-root/run.sh").stat().st_mode
    store = w.open()
    roll_back(store, "web")
    roll_back(store, "web")
    store.close()
    assert w.seen() == {**FILES, "data/kept": b"kept"}


def test_without_a_copy_it_takes_the_patch(ward: Callable[..., Ward]) -> None:
    w = ward()
    for name in ("web", "db"):
        rot(w.state / f"generations/{name}/2/app.json")
    outcome = w.is_left("file.damaged")
    assert all("there is no other copy" in reason for reason in outcome.because.values())
    w.view["app.json"] = b"302"
    outcome = w.is_mended("file.damaged", packages=[w.patches[1].path])
    assert outcome.mended[0].done.startswith("made anew from patch-302.zip; what was there is ")


def test_the_programs_own_copy_will_do(ward: Callable[..., Ward]) -> None:
    w = ward()
    for name in ("web", "db"):
        rot(w.state / f"generations/{name}/2/app.json")
        (w.base / f"{name}-root/app.json").unlink()
        (w.base / f"{name}-root/app.json").write_bytes(b"302")
    outcome = repair(w.state)
    assert [each.done.partition(";")[0] for each in outcome.mended] == [
        "made anew from the file of that name in the root", "made anew from generation 2 of db",
    ]  # fmt: skip
    assert codes(outcome.left) == ["leaf.detached"]


def test_what_somebody_has_written_is_left_unless_told_otherwise_and_saved_then(
    ward: Callable[..., Ward],
) -> None:
    w = ward()
    file = w.generations / "2/app.json"
    file.chmod(0o644)
    file.write_bytes(b"by hand")
    file.chmod(0o444)
    outcome = w.is_left("file.written")
    assert not outcome.left.ok
    assert "--drift overwrite" in next(iter(outcome.because.values()))
    (mended,) = w.is_mended("file.written", overwrite=True).mended
    assert Path(mended.done.partition("what was there is ")[2]).read_bytes() == b"by hand"


def test_a_shared_file_that_can_be_written_to(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.generations / "2/app.json").chmod(0o644)
    w.is_mended("file.writable")
    assert (w.generations / "2/app.json").stat().st_mode & 0o222 == 0


def test_a_file_that_has_become_something_else_is_left_to_people(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.generations / "2/app.json").unlink()
    (w.generations / "2/app.json").mkdir()
    w.is_left("file.kind")


def test_an_old_generation_that_is_gone_is_not_gone_back_to(ward: Callable[..., Ward]) -> None:
    w = ward()
    shutil.rmtree(w.generations / "0")
    w.is_mended("generation.missing")
    store = w.open()
    roll_back(store, "web")
    assert store.preview.rollback_target("web") is None
    store.close()


def test_a_current_generation_that_is_gone_is_made_anew_where_all_its_files_are_known(
    ward: Callable[..., Ward],
) -> None:
    w = ward()
    shutil.rmtree(w.generations / "2")
    outcome = w.is_mended("generation.missing")
    assert outcome.mended[0].done == "made anew, 2 files"
    for name in ("web", "db"):
        shutil.rmtree(w.state / f"generations/{name}/2")
    assert w.codes() == ["generation.missing"]
    outcome = repair(w.state)
    assert codes(outcome.left) == ["generation.missing"]
    assert not (w.generations / "2").exists()


def test_folders_that_are_of_no_use_go_and_those_that_are_unknown_stay(ward: Callable[..., Ward]) -> None:
    w = ward()
    write_tree(w.generations, {"99/x": b"x", "notes/todo": b"mine"})
    write_tree(w.state / "generations", {"nobody/0/x": b"x"})
    assert w.codes() == ["generation.orphan", "stray.folder"]
    outcome = repair(w.state)
    assert [each.finding.code for each in outcome.mended] == ["generation.orphan"]
    assert codes(outcome.left) == ["stray.folder"]
    assert outcome.left.ok
    assert not (w.generations / "99").exists()
    assert (w.generations / "notes/todo").read_bytes() == b"mine"
    assert (w.state / "generations/nobody/0/x").exists()


def test_names_that_were_left_behind(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.state / "next").symlink_to("sets/7")
    (w.state / "uploads").mkdir(mode=0o700)
    write_tree(w.state, {"sets/9.new/x": b"", "staging/4-web/x": b"", "uploads/0123456789abcdef": b""})
    outcome = w.is_mended("leftover.file")
    assert len(outcome.mended) == 4


# --- the root of an overlay ---------------------------------------------------------------------------------


def relink(link: Path, text: object) -> None:
    link.unlink()
    link.symlink_to(str(text))


@pytest.mark.parametrize(
    "text", ["{state}/curr", "{state}/current/web/app.jso", "/once/state/current/web/app.json"]
)
def test_a_torn_link_is_made_anew(text: str, ward: Callable[..., Ward]) -> None:
    w = ward()
    relink(w.root / "app.json", text.format(state=w.state))
    assert "it led to" in w.is_mended("leaf.torn").mended[0].done


def test_a_link_of_ours_that_leads_nowhere_goes(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.root / "rules/us.json").symlink_to(w.state / "current/web/rules/us.json")
    w.is_mended("leaf.stray")
    assert not os.path.lexists(w.root / "rules/us.json")


def test_what_the_program_has_put_in_place_of_a_link_stays(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.root / "app.json").unlink()
    (w.root / "app.json").write_bytes(b"my own")
    assert w.is_left("leaf.detached").left.ok
    for text in ("/nowhere/at/all", w.root / "run.sh", "rules/eu.json", "/"):
        relink(w.root / "app.json", text)
        w.is_left("leaf.detached")
    (w.root / "app.json").unlink()
    (w.root / "app.json").mkdir()
    w.is_left("leaf.detached")


def test_links_of_the_program_are_nobodys_business(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.root / "mine").symlink_to("/nowhere")
    (w.root / "rules/alias").symlink_to(w.state / "current/web/app.json")
    (w.root / "rules/gone").symlink_to(w.state / "current/web/gone")
    w.is_left()


def test_a_link_that_was_removed_comes_back_only_when_told(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.root / "app.json").unlink()
    assert w.is_left("leaf.missing").left.ok
    w.is_mended("leaf.missing", overwrite=True)


def test_a_temporary_name_goes_unless_it_may_be_all_there_is(ward: Callable[..., Ward]) -> None:
    w = ward()
    (w.root / "rules/.asyncsup~9-0").symlink_to(w.state / "current/web/x")
    os.link(w.root / "run.sh", w.root / ".asyncsup~9-1")
    w.is_mended("leftover.temporary")
    (w.root / ".asyncsup~9-2").write_bytes(b"the last save")
    outcome = w.is_left("leftover.temporary")
    assert "the only copy" in next(iter(outcome.because.values()))


def test_a_root_that_is_gone_is_left_to_people(ward: Callable[..., Ward]) -> None:
    w = ward()
    w.root.rename(w.base / "elsewhere")
    w.is_left("root.missing")


# --- the root of a tree -------------------------------------------------------------------------------------


def test_a_tree_whose_link_is_gone_or_torn(ward: Callable[..., Ward]) -> None:
    w = ward(Layout.TREE)
    w.root.unlink()
    w.is_mended("root.unlinked")
    relink(w.root, "/once/state/current/web")
    w.is_mended("root.torn")
    relink(w.root, w.state / "generations/web/2")
    w.is_mended("root.direct")


def test_a_tree_whose_root_is_somebody_elses_now(ward: Callable[..., Ward]) -> None:
    w = ward(Layout.TREE)
    w.root.unlink()
    write_tree(w.root, {"app.json": b"mine"})
    w.is_left("root.detached")
    shutil.rmtree(w.root)
    w.root.symlink_to(w.base / "db-root")
    w.is_left("root.detached")


def test_what_a_program_does_in_its_tree_is_left(ward: Callable[..., Ward]) -> None:
    w = ward(Layout.TREE)
    (w.root / "app.json").unlink()
    assert w.is_left("file.removed").left.ok
    (w.root / "app.json").write_bytes(b"my own")
    assert w.is_left("file.replaced").left.ok
    (w.root / "app.json").unlink()
    w.is_mended("file.removed", overwrite=True)


def test_persistent_data_without_its_link_and_a_link_without_its_data(ward: Callable[..., Ward]) -> None:
    w = ward(Layout.TREE, persist=("data",))
    (w.root / "data").unlink()
    w.is_mended("persist.unlinked")
    shutil.rmtree(w.state / "persist/web/data")
    w.is_left("persist.missing")


def test_a_temporary_name_in_a_tree(ward: Callable[..., Ward]) -> None:
    w = ward(Layout.TREE)
    os.link(w.root / "run.sh", w.root / "rules/.asyncsup~carried")
    w.is_mended("leftover.temporary")


# --- what was cut off ---------------------------------------------------------------------------------------


@both_layouts
def test_a_transaction_that_was_cut_off_is_taken_back(layout: Layout, ward: Callable[..., Ward]) -> None:
    w = ward(layout)
    store = w.open()
    store.switch(staged(store, w.patch(303, new={"y.json": b"y"}), "web", "db"))
    store.close()
    outcome = w.is_mended("transaction.unfinished")
    assert outcome.mended[0].done == "switched back"


def test_a_patch_that_somebody_has_to_decide_about_is_left_to_them(ward: Callable[..., Ward]) -> None:
    w = ward()
    patch = w.patch(303)
    store = w.open()
    txn = store.begin(action="apply", patch=info(patch), targets=["web"], asked_by="test", by_hand=True)
    store.stage(txn, "web", patch)
    store.switch(txn)
    store.close()
    outcome = repair(w.state)
    assert codes(outcome.left) == ["transaction.undecided"]
    assert (outcome.left.ok, outcome.mended) == (True, ())
    assert w.seen()["app.json"] == b"303"


def test_a_release_that_was_cut_off_is_finished(ward: Callable[..., Ward]) -> None:
    w = ward()
    pid = os.fork()
    if pid == 0:
        os.environ[failpoints.VARIABLE] = "store.release.file:kill"
        Store.open(w.state).release("web")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    w.is_mended("target.releasing")
    assert not (w.root / "app.json").is_symlink()


def test_a_repair_that_was_killed_is_repeated(ward: Callable[..., Ward]) -> None:
    w = ward()
    rot(w.generations / "2/app.json")
    (w.generations / "1/x/new.json").unlink()
    for point in ("doctor.file.written", "doctor.file.renamed"):
        pid = os.fork()
        if pid == 0:
            os.environ[failpoints.VARIABLE] = f"{point}:kill"
            with contextlib.suppress(BaseException):
                repair(w.state)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    w.is_mended("file.missing")
    assert not list(w.state.rglob(".asyncsup~*"))


# --- the database and the audit -----------------------------------------------------------------------------


def test_an_index_that_is_damaged_is_made_anew(ward: Callable[..., Ward]) -> None:
    w = ward()
    with closing(sqlite3.connect(w.state / "state.db")) as database:
        row = database.execute("SELECT * FROM sqlite_schema WHERE name = 'transactions_by_patch'").fetchone()
    w.sql("PRAGMA writable_schema = 1", "DELETE FROM sqlite_schema WHERE name = 'transactions_by_patch'")
    # While the database does not know of its index, what is indexed changes.
    w.sql("UPDATE transactions SET patch = 'x' WHERE txn = 1")
    with closing(sqlite3.connect(w.state / "state.db")) as database:
        database.execute("PRAGMA writable_schema = 1")
        database.execute("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", row)
        database.commit()
    assert w.codes() == ["audit.history", "database.integrity"]
    outcome = repair(w.state)
    assert {each.done for each in outcome.mended} == {"all indexes made anew"}
    # What was changed beside the audit stays found.
    assert codes(outcome.left) == ["audit.history"]


def test_a_database_that_is_none_any_more(ward: Callable[..., Ward]) -> None:
    w = ward()
    for suffix in ("-wal", "-shm"):
        (w.state / f"state.db{suffix}").unlink(missing_ok=True)
    content = (w.state / "state.db").read_bytes()
    (w.state / "state.db").write_bytes(b"garbage" * 1000)
    w.is_left("database.database")
    (w.state / "state.db").write_bytes(content[: len(content) // 2])
    found = w.codes()
    assert any(code.startswith("database.") for code in found)
    assert not repair(w.state).left.ok
    (w.state / "state.db").unlink()
    w.is_left("database.database_missing")
    assert not (w.state / "state.db").exists()


def test_an_audit_that_was_tampered_with_is_said_and_never_touched(ward: Callable[..., Ward]) -> None:
    w = ward()
    w.sql("UPDATE audit SET record = replace(record, 'test', 'TEST') WHERE seq = 4")
    (w.state / "current").unlink()
    assert w.codes() == ["audit.changed", "pointer.missing"]
    outcome = repair(w.state)
    assert codes(outcome.left) == ["audit.changed"]
    assert [each.finding.code for each in outcome.mended] == ["pointer.missing"]


def test_what_was_mended_is_in_the_audit(ward: Callable[..., Ward]) -> None:
    w = ward()
    w.state.chmod(0o777)
    rot(w.generations / "2/app.json")
    w.is_mended("permissions.mode", "file.damaged")
    store = w.open()
    found = [json.loads(row.line) for row in store.history.records(after=0, limit=1000)]
    store.close()
    repaired = [each for each in found if each["event"] == "doctor.repaired"]
    assert [each["code"] for each in repaired] == ["permissions.mode", "file.damaged"]
    assert repaired[1].items() >= {"target": "web", "generation": 2, "path": "app.json"}.items()
    assert (repaired[1]["by"]["via"], repaired[1]["by"]["pid"]) == ("doctor", os.getpid())


def test_a_state_directory_that_was_moved(ward: Callable[..., Ward]) -> None:
    w = ward()
    w.state.rename(w.base / "moved")
    before = picture(w.base)
    outcome = repair(w.base / "moved")
    assert codes(outcome.left) == ["state.moved"]
    assert picture(w.base) == before


# --- around it ----------------------------------------------------------------------------------------------


def test_doors_that_stand_open_are_shut(ward: Callable[..., Ward], tmp_path: Path) -> None:
    w = ward()
    runtime = tmp_path / "run"
    runtime.mkdir()
    for path, mode in (
        (w.state, 0o777), (w.state / "sets", 0o775), (w.state / "staging", 0o755),
        (w.state / "state.db", 0o644), (runtime, 0o777),
    ):  # fmt: skip
        path.chmod(mode)
    found = diagnose(w.state, runtime_dir=runtime)
    assert [finding.code for finding in found.problems] == ["permissions.mode"] * 5
    outcome = repair(w.state, runtime_dir=runtime)
    assert outcome.left.ok
    assert len(outcome.mended) >= 5
    assert [path.stat().st_mode & 0o777 for path in (w.state, w.state / "state.db", runtime)] == [
        0o755, 0o600, 0o711,
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_somebody_else(ward: Callable[..., Ward]) -> None:
    w = ward()
    os.chown(w.state / "sets", 65534, 65534)
    assert w.codes() == ["permissions.owner"]
    os.chown(w.state / "sets", 0, 0)
    os.chown(w.state, 65534, 65534)
    assert w.codes() == []
    with pytest.raises(NotAllowedError):
        repair(w.state)


def test_a_file_system_that_cannot_swap_names_or_link(
    ward: Callable[..., Ward], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = ward()

    def lacking(*_: object, **__: object) -> None:
        raise OSError(errno.EINVAL, "no")

    with monkeypatch.context() as patched:
        patched.setattr(fs, "_renameat2", lacking)
        assert w.codes() == ["filesystem.exchange"]
    with monkeypatch.context() as patched:
        patched.setattr(fs, "link", lambda *_: False)
        assert w.codes() == ["filesystem.links"]
    assert w.codes() == []
    assert list((w.state / "staging").iterdir()) == []


def test_little_room_is_worth_a_warning(ward: Callable[..., Ward], monkeypatch: pytest.MonkeyPatch) -> None:
    w = ward()
    monkeypatch.setattr(doctor, "LITTLE_SPACE_BYTES", 1 << 60)
    monkeypatch.setattr(doctor, "FEW_INODES", 1 << 60)
    found = diagnose(w.state)
    assert found.ok
    assert {finding.code for finding in found.findings} >= {"space.bytes", "space.inodes"}


# --- whatever it is -----------------------------------------------------------------------------------------


def damage(chance: random.Random, base: Path) -> str:
    """Something happens to something."""
    path = chance.choice([path for path in sorted(base.rglob("*")) if path.suffix != ".zip"])
    what = chance.choice(["gone", "folder", "link", "loop", "cut", "garbage", "mode", "renamed", "copied"])
    with contextlib.suppress(OSError):
        if what in {"gone", "folder", "link", "loop"}:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        if what == "folder":
            path.mkdir()
        elif what in {"link", "loop"}:
            path.symlink_to(path.name if what == "loop" else chance.choice(["/nowhere", str(base), "../x"]))
        elif what in {"cut", "garbage"} and path.is_file():
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:3] if what == "cut" else chance.randbytes(20))
        elif what == "mode" and not path.is_symlink():
            path.chmod(chance.choice([0o777, 0o600, 0o644]))
        elif what == "renamed":
            path.rename(path.with_name(f"{path.name}.x"))
        elif what == "copied" and path.is_file():
            shutil.copy(path, path.with_name(f"{path.name}.y"))
    return f"{what} {path.relative_to(base)}"


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_damaged_it_says_so_mends_once_and_is_right_about_the_rest(
    seed: int, ward: Callable[..., Ward]
) -> None:
    chance = random.Random(seed)
    w = ward(chance.choice(list(Layout)))
    happened = [damage(chance, w.base) for _ in range(chance.choice([1, 2, 4]))]
    try:
        diagnose(w.state)
        outcome = repair(w.state, overwrite=chance.random() < 0.3)
        again = repair(w.state)
    except AsyncsupError as error:
        assert error.error_code in {"state.missing", "state.unusable", "state.database"}, happened
        return
    assert again.mended == (), happened
    if outcome.left.ok:
        store = w.open()
        found = store.history.examine()
        store.close()
        assert found.ok, happened


# --- the command --------------------------------------------------------------------------------------------


def doctor_says(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(["doctor", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_command_says_what_it_found_what_it_did_and_what_is_left(
    ward: Callable[..., Ward], capsys: pytest.CaptureFixture[str]
) -> None:
    w = ward()
    here = ("--state-dir", w.state)
    status, text = doctor_says(capsys, *here)
    assert (status, text.splitlines()[-1]) == (0, "verdict: in order")
    rot(w.generations / "2/app.json")
    (w.generations / "1/app.json").chmod(0o644)
    (w.generations / "1/app.json").write_bytes(b"by hand")
    (w.generations / "1/app.json").chmod(0o444)
    status, text = doctor_says(capsys, *here)
    assert status == 1
    assert "problem  web app.json (generation 2) has another content" in text
    assert text.splitlines()[-1] == "verdict: 2 problems left"
    status, text = doctor_says(capsys, *here, "--repair")
    assert status == 1
    assert "mended   web app.json (generation 2)" in text
    assert "left, because somebody may want it so" in text
    status, text = doctor_says(capsys, *here, "--repair", "--drift", "overwrite", "--json")
    assert status == 0
    value = json.loads(text)
    assert (value["ok"], len(value["mended"]), value["problems"]) == (True, 1, [])
    assert doctor_says(capsys, *here, "--drift", "overwrite")[0] == 2
    assert doctor_says(capsys, "--state-dir", w.base / "nowhere")[0] == 1


def test_beside_a_running_supervisor_it_looks_and_does_not_mend(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    (serve.folder / "web").mkdir()
    client = serve.start('[target.web]\ncommand = "sleep 1000"\nautostart = false\nroot = "web"\n')
    try:
        status, text = doctor_says(capsys, "-c", serve.config)
        assert status == 0, text
        assert f"a supervisor is running, process {client.call('supervisor.info')['pid']}" in text
        status, text = doctor_says(capsys, "-c", serve.config, "--repair")
        assert status == 8
        assert "in use by a supervisor" in text
        (serve.folder / ".asyncsup/current").rename(serve.folder / ".asyncsup/elsewhere")
        try:
            status, text = doctor_says(capsys, "-c", serve.config)
            assert status == 1
            assert "pointer.missing" in text
        finally:
            (serve.folder / ".asyncsup/elsewhere").rename(serve.folder / ".asyncsup/current")
    finally:
        client.close()


def test_every_finding_is_documented_and_every_documented_one_exists() -> None:
    here = Path(__file__).parent.parent
    source = (here / "asyncsup/patch/doctor.py").read_text()
    families = (
        "permissions space filesystem database state pointer transaction target generation stray leftover "
        "file leaf root persist"
    )
    family = f"(?:{'|'.join(families.split())})"
    used = set(re.findall(rf'"({family}\.[a-z_]+)"', source)) - {
        "state.db",
        "state.missing",
        "state.unusable",
    }
    used |= {"filesystem.exchange", "filesystem.links", "filesystem.readonly"}
    text = (here / "docs/doctor.md").read_text()
    documented = set(re.findall(rf"`({family}\.[a-z_]+)`", text)) - {"state.db"}
    assert documented >= used, used - documented
    assert documented - used <= {"database.database", "database.database_missing", "database.version"}
