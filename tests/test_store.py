"""The store on real files, in both layouts: apply, go back, and what files look like then."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from store_kit import (
    FILES,
    Bench,
    Meddling,
    apply,
    begin,
    benches,
    leftovers,
    mounted,
    names_in,
    open_store,
    package,
    refused_at_staging,
    roll_back,
    seen,
    staged,
    target,
    write_tree,
)

from asyncsup.errors import (
    PatchRefusedError,
    StateError,
    TargetBusyError,
)
from asyncsup.patch.facts import Layout, TargetRoot

both_layouts = pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.value) for layout in Layout])


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# --- there and back -----------------------------------------------------------------------------------------


@both_layouts
def test_a_patch_changes_exactly_what_it_names(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout, build=200)
    patch = b.patch(300, new={"a/b/c.json": b"new"}, modified={"app.json": b"two"}, deleted=["rules/us.json"])
    txn = staged(b.store, patch)
    assert seen(b.root) == FILES  # Nobody sees what is staged.
    b.store.switch(txn)
    after = {"app.json": b"two", "rules/eu.json": b"eu", "run.sh": b"#!/bin/sh\n", "a/b/c.json": b"new"}
    assert seen(b.root) == after
    b.store.commit(txn)
    b.store.finish(txn, verdict="committed")
    assert seen(b.root) == after
    assert leftovers(b.root) == []
    state = b.store.state("web")
    assert (state.build, state.generation, state.patch) == (300, 1, patch.id)
    assert b.store.current_link("web") == b.base / "state/current/web"
    assert (b.store.current_link("web") / "app.json").read_bytes() == b"two"


@both_layouts
def test_rollbacks_unstack_patches_in_the_order_they_were_applied(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout, build=100)
    states = {100: seen(b.root)}
    apply(b.store, b.patch(101, modified={"app.json": b"101"}, new={"n/101.json": b"1"}))
    states[101] = seen(b.root)
    apply(b.store, b.patch(102, modified={"app.json": b"102"}, deleted=["n/101.json"]))
    states[102] = seen(b.root)
    assert states[102] == {**FILES, "app.json": b"102"}
    roll_back(b.store)
    assert (b.store.state("web").build, seen(b.root)) == (101, states[101])
    apply(b.store, b.patch(103, modified={"rules/eu.json": b"103"}, deleted=["rules/us.json"]))
    states[103] = seen(b.root)
    for build in (101, 100):
        roll_back(b.store)
        assert (b.store.state("web").build, seen(b.root)) == (build, states[build])
        assert leftovers(b.root) == []
    assert b.store.preview.rollback_target("web") is None
    assert sorted(names_in(b.root)) == ["app.json", "rules", "run.sh"]


@both_layouts
def test_a_rollback_is_described_before_it_is_done(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout, build=100)
    apply(b.store, b.patch(101, modified={"app.json": b"x"}, new={"n.json": b"1"}, deleted=["rules/us.json"]))
    plan = b.store.preview.describe_rollback("web", 0)
    assert (plan.generation, plan.build, plan.kind) == (0, 100, "warm")
    assert {(file.path, file.op) for file in plan.files} == {
        ("app.json", "modified"),
        ("n.json", "deleted"),
        ("rules/us.json", "new"),
    }


@both_layouts
def test_all_targets_of_a_patch_switch_in_one_rename(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout, "a", "b", "c")
    flips = []
    patch = b.patch(300, modified={"app.json": b"two"}, targets=("a", "b", "c"))
    txn = staged(b.store, patch, "a", "b", "c")
    before = str((b.base / "state/current").readlink())
    b.store.switch(txn)
    flips.append((before, str((b.base / "state/current").readlink())))
    assert int(flips[0][1].removeprefix("sets/")) == int(flips[0][0].removeprefix("sets/")) + 1
    assert [seen(each.root)["app.json"] for each in b.targets] == [b"two"] * 3


@both_layouts
def test_switching_one_transaction_back_leaves_another_alone(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout, "a", "b")
    first = staged(b.store, b.patch(300, modified={"app.json": b"a 300"}), "a")
    second = staged(b.store, b.patch(400, modified={"app.json": b"b 400"}), "b")
    b.store.switch(first)
    b.store.switch(second)
    b.store.switch_back(first)
    b.store.switch_back(first)  # Harmless when it has been done.
    b.store.abort(first, "no")
    assert [seen(each.root)["app.json"] for each in b.targets] == [b"one", b"b 400"]
    b.store.commit(second)
    b.store.finish(second, verdict="committed")
    b.store.finish(first, verdict="rolled_back")
    assert (b.store.state("a").generation, b.store.state("b").generation) == (0, 1)
    assert leftovers(b.base / "a-root") == []


@both_layouts
def test_an_abort_leaves_no_trace_in_the_root(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    patch = b.patch(300, new={"x/y/z.json": b"1"}, modified={"app.json": b"2"}, deleted=["rules/us.json"])
    txn = staged(b.store, patch)
    b.store.abort(txn, "changed my mind")
    b.store.abort(txn)  # Harmless when it has been done.
    assert seen(b.root) == FILES
    assert leftovers(b.root) == []
    assert not (b.root / "x").exists()
    assert b.store.history.transaction(txn)["state"] == "aborted"
    assert b.store.history.transaction(txn)["error"] == "changed my mind"
    assert names_in(b.base / "state/generations/web") == ["0"]
    apply(b.store, patch)
    assert seen(b.root)["x/y/z.json"] == b"1"


@both_layouts
def test_undoing_what_never_began_is_harmless(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    txn = begin(b.store, b.patch(300, modified={"app.json": b"2"}))
    b.store.switch_back(txn)
    b.store.abort(txn)
    b.store.finish(txn, verdict="refused", state="refused", error="no", code="gate.region")
    described = b.store.history.transaction(txn)
    assert (described["verdict"], described["state"], described["code"]) == (
        "refused",
        "refused",
        "gate.region",
    )
    assert seen(b.root) == FILES


def test_steps_out_of_order_are_refused(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    patch = b.patch(300, modified={"app.json": b"2"})
    txn = begin(b.store, patch)
    with pytest.raises(StateError, match="not staged: web"):
        b.store.switch(txn)
    with pytest.raises(StateError, match="cannot be confirmed"):
        b.store.commit(txn)
    b.store.stage(txn, "web", patch)
    with pytest.raises(StateError, match="again"):
        b.store.stage(txn, "web", patch)
    b.store.switch(txn)
    b.store.commit(txn)
    with pytest.raises(StateError, match="is confirmed"):
        b.store.switch_back(txn)
    with pytest.raises(StateError, match="is confirmed"):
        b.store.abort(txn)


def test_a_target_is_in_one_transaction_at_a_time(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY, "a", "b")
    patch = b.patch(300, modified={"app.json": b"2"})
    txn = begin(b.store, patch, "a")
    with pytest.raises(TargetBusyError, match=f"transaction {txn}") as caught:
        begin(b.store, patch, "b", "a")
    assert caught.value.details == {"target": "a", "txn": txn}
    begin(b.store, patch, "b")  # The failed attempt holds nothing.
    with pytest.raises(TargetBusyError):
        b.store.release("a")
    b.store.abort(txn)
    begin(b.store, patch, "a")


def test_a_long_staging_holds_up_neither_states_nor_other_targets(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY, "slow", "quick")
    reached, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        assert go_on.wait(30)

    slow = Meddling(b.patch(300, modified={"app.json": b"slow"}, targets=("slow",)), wait)
    txn = begin(b.store, slow.package, "slow")
    failures: list[BaseException] = []

    def stage() -> None:
        try:
            b.store.stage(txn, "slow", slow)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=stage)
    thread.start()
    try:
        assert reached.wait(30)
        assert b.store.state("slow").generation == 0
        apply(b.store, b.patch(400, modified={"app.json": b"quick"}), "quick")
        assert seen(b.base / "quick-root")["app.json"] == b"quick"
    finally:
        go_on.set()
        thread.join()
    assert failures == []
    b.store.switch(txn)
    b.store.commit(txn)
    assert [seen(each.root)["app.json"] for each in b.targets] == [b"slow", b"quick"]


# --- modes, owners, times -----------------------------------------------------------------------------------


@both_layouts
def test_files_keep_mode_and_owner_but_for_write_bits(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    (b.root / "app.json").chmod(0o640)
    if os.geteuid() == 0:
        os.chown(b.root / "app.json", 1234, 2345)
        os.chown(b.root, 3456, 4567)
    apply(
        b.store,
        b.patch(
            300,
            modified={"app.json": b"two", "run.sh": b"#!/bin/false\n"},
            new={"tool": b"t", "plain": b"p"},
            options={"tool": {"mode": 0o750}},
        ),
    )

    def mode(name: str) -> int:
        return stat.S_IMODE((b.root / name).stat().st_mode)

    assert [mode(name) for name in ("app.json", "run.sh", "tool", "plain")] == [0o440, 0o555, 0o550, 0o444]
    if os.geteuid() == 0:
        kept, new = (b.root / "app.json").stat(), (b.root / "plain").stat()
        assert (kept.st_uid, kept.st_gid) == (1234, 2345)
        assert (new.st_uid, new.st_gid) == (3456, 4567)


@both_layouts
def test_a_private_folder_is_as_private_in_the_store(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    b.root.chmod(0o750)
    (b.root / "rules").chmod(0o700)
    apply(b.store, b.patch(300, modified={"rules/eu.json": b"secret"}))
    generation = b.store.current_link("web").resolve()
    assert stat.S_IMODE(generation.stat().st_mode) == 0o750
    assert stat.S_IMODE((generation / "rules").stat().st_mode) == 0o700


@both_layouts
def test_every_delivered_file_gets_an_mtime_second_of_its_generation(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    seconds = {int((b.root / "app.json").stat().st_mtime)}
    for build in (300, 301, 302):
        apply(
            b.store,
            b.patch(
                build,
                modified={"app.json": b"%d" % build, "rules/eu.json": b"%d" % build},
            ),
        )
        times = [(b.root / name).stat().st_mtime_ns for name in ("app.json", "rules/eu.json")]
        assert times[0] < times[1]
        assert times[0] // 10**9 not in seconds
        seconds.add(times[0] // 10**9)
    # Also the same patch once more, after it was taken back.
    roll_back(b.store)
    assert int((b.root / "app.json").stat().st_mtime) in seconds
    apply(b.store, b.patch(302, modified={"app.json": b"302", "rules/eu.json": b"302"}))
    assert int((b.root / "app.json").stat().st_mtime) not in seconds


def test_python_runs_the_new_source_though_size_and_second_are_the_same(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.TREE)
    write_tree(b.root, {"main.py": b"import lib\nprint(lib.X)\n", "lib.py": b"X = 1\n"})

    def run() -> str:
        return subprocess.run(
            [sys.executable, str(b.root / "main.py")], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert run() == "1"
    apply(b.store, b.patch(300, modified={"lib.py": b"X = 2\n"}))
    assert run() == "2"
    apply(b.store, b.patch(301, modified={"lib.py": b"X = 3\n"}))
    assert run() == "3"
    roll_back(b.store)
    assert run() == "2"
    apply(b.store, b.patch(302, modified={"lib.py": b"X = 4\n"}))
    assert run() == "4"


# --- the program's own files in a tree ----------------------------------------------------------------------


def test_the_working_directory_of_a_running_program_survives_the_conversion(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(Layout.TREE)
    monkeypatch.chdir(b.root)
    txn = staged(b.store, b.patch(300, modified={"app.json": b"two"}))
    assert Path("app.json").read_bytes() == b"one"
    Path("written.log").write_bytes(b"by the program")
    b.store.switch(txn)
    b.store.commit(txn)
    assert seen(b.root)["written.log"] == b"by the program"


def test_what_the_program_wrote_is_carried_forth_and_back(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.TREE)
    write_tree(b.root, {"queue/1": b"1", "state.db": b"old state"})
    patch = b.patch(300, modified={"app.json": b"two"}, new={"lib/new.py": b"n"}, deleted=["rules/us.json"])
    txn = staged(b.store, patch)
    (b.root / "queue/1").unlink()
    write_tree(b.root, {"queue/2": b"2", "state.db.tmp": b"new state"})
    (b.root / "state.db.tmp").replace(b.root / "state.db")
    (b.root / "pipe").symlink_to("queue/2")
    assert sorted(b.store.carry(txn, "web")) == ["pipe", "queue/1", "queue/2", "state.db"]
    b.store.switch(txn)
    own = {"queue/2": b"2", "state.db": b"new state", "pipe": b"2"}
    assert seen(b.root) == {
        "app.json": b"two", "rules/eu.json": b"eu", "run.sh": b"#!/bin/sh\n", "lib/new.py": b"n", **own
    }  # fmt: skip
    # During probation it goes on writing; going back must not lose that either.
    b.put("later.tmp", b"later")
    (b.root / "later.tmp").replace(b.root / "state.db")
    b.put("crash.txt", b"why")
    b.store.switch_back(txn)
    b.store.abort(txn)
    own["state.db"], own["crash.txt"] = b"later", b"why"
    assert seen(b.root) == {**FILES, **own}
    # And the same for a rollback of a confirmed patch.
    apply(b.store, patch)
    b.put("queue/3", b"3")
    (b.root / "crash.txt").unlink()
    roll_back(b.store)
    own["queue/3"] = b"3"
    del own["crash.txt"]
    assert seen(b.root) == {**FILES, **own}


def test_persistent_paths_live_outside_of_generations(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.TREE, persist=("data", "logs/app.log", "later"))
    write_tree(b.root, {"data/db": b"1", "logs/app.log": b"line\n", "logs/other.log": b""})
    before = seen(b.root)
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    assert seen(b.root) == {**before, "app.json": b"two"}
    home = b.base / "state/persist/web"
    assert (home / "data/db").read_bytes() == b"1"
    assert str((b.root / "data").readlink()) == str(home / "data")
    with (b.root / "logs/app.log").open("ab") as log:
        log.write(b"more\n")
    (b.root / "data/db").unlink()
    b.put("data/db2", b"2")
    (b.root / "later").mkdir()  # It comes into being while build 300 runs, and moves out with the next patch.
    b.put("later/x", b"x")
    apply(b.store, b.patch(301, modified={"app.json": b"three"}))
    assert str((b.root / "later").readlink()) == str(home / "later")
    roll_back(b.store)
    roll_back(b.store)
    assert seen(b.root) == {
        **FILES, "data/db2": b"2", "logs/app.log": b"line\nmore\n", "logs/other.log": b"", "later/x": b"x"
    }  # fmt: skip
    patch = b.patch(302, new={"data/x": b""})
    assert refused_at_staging(b, patch).error_code == "gate.conflict"


def test_a_patch_that_touches_one_file_of_a_tree_shares_all_others(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.TREE)
    inode = (b.root / "rules/eu.json").stat().st_ino
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    assert (b.root / "rules/eu.json").stat().st_ino == inode


# --- other file systems -------------------------------------------------------------------------------------


@contextmanager
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than `tmp_path`."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    import tempfile

    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@both_layouts
def test_a_root_on_another_file_system_is_copied(layout: Layout, tmp_path: Path, stack: ExitStack) -> None:
    root = stack.enter_context(elsewhere(tmp_path)) / "root"
    write_tree(root, {**FILES, "data/db": b"db", "log": b"1"})
    (root / "link").symlink_to("log")
    os.mkfifo(root / "fifo")
    where = TargetRoot(name="web", root=root, layout=layout, persist=("data",))
    store = open_store(tmp_path, where)
    stack.callback(store.close)

    before = seen(root)
    patch = stack.enter_context(
        package(tmp_path, 300, modified={"app.json": b"two"}, new={"n/x": b"n"}, deleted=["rules/us.json"])
    )
    store.abort(staged(store, patch))
    assert seen(root) == before
    txn = staged(store, patch)
    (root / "log").write_bytes(b"1\n2")
    (root / "data/db").write_bytes(b"db 2")
    (root / "own").write_bytes(b"own")
    store.carry(txn, "web")
    store.switch(txn)
    store.commit(txn)
    own = {"log": b"1\n2", "link": b"1\n2", "data/db": b"db 2", "own": b"own"}
    after = {"app.json": b"two", "rules/eu.json": b"eu", "run.sh": b"#!/bin/sh\n", "n/x": b"n", **own}
    assert seen(root) == after
    assert leftovers(root) == []
    roll_back(store)
    assert seen(root) == {**FILES, **own}
    apply(store, patch)
    store.release("web")
    assert seen(root) == after
    assert not root.is_symlink()
    assert not any(path.is_symlink() for path in root.rglob("*") if path.name != "link")


@both_layouts
def test_a_disk_too_small_for_the_patch_is_noticed_before_and_while_staging(
    layout: Layout, tmp_path: Path, stack: ExitStack
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    stack.enter_context(mounted(state, "size=4m"))
    where = target(tmp_path, layout)
    write_tree(where.root, FILES)
    store = open_store(tmp_path, where)
    stack.callback(store.close)
    large = stack.enter_context(package(tmp_path, 300, modified={"app.json": os.urandom(8 << 20)}))
    txn = begin(store, large)
    with pytest.raises(PatchRefusedError) as caught:
        store.stage(txn, "web", large)
    assert caught.value.error_code == "gate.space"
    assert caught.value.details["needed"] > 8 << 20 > caught.value.details["free"]
    store.abort(txn)

    def fill() -> None:
        with (state / "filler").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    return

    second = stack.enter_context(
        package(
            tmp_path, 301, modified={"app.json": os.urandom(1 << 20)}, new={"n/o.json": os.urandom(1 << 20)}
        )
    )
    txn = begin(store, second)
    with pytest.raises(PatchRefusedError) as caught:
        store.stage(txn, "web", Meddling(second, fill))
    assert caught.value.error_code == "gate.space"
    assert caught.value.details["free"] < 1 << 20
    assert seen(where.root) == FILES
    (state / "filler").unlink()
    store.abort(txn)
    assert leftovers(where.root) == []
    assert names_in(state / "staging") == []
    assert [name for name in names_in(state / "generations/web") if name != "0"] == []
    apply(store, second)
