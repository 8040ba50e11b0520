"""A tree's program writes while it is patched: what it saves is in the tree it has afterwards, however close
to the switch it came."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from store_kit import Bench, apply, benches, open_store, roll_back, seen, staged

from asyncsup.errors import PatchRefusedError
from asyncsup.patch import tree, tree_files
from asyncsup.patch.facts import Layout


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


def switching_while(b: Bench, monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Have something happen at the last moment before the rename that switches."""
    pointer = b.store._state.pointer
    flip = pointer.flip

    def late(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        action()
        return flip(*arguments, **options)

    monkeypatch.setattr(pointer, "flip", late)


def save(path: Path, content: bytes) -> None:
    """As programs save: beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextmanager
def a_busy_program(root: Path) -> Iterator[list[str]]:
    """Saves one file after the other; the list names those of which it knows that they are saved."""
    done = threading.Event()
    saved: list[str] = []

    def run() -> None:
        number = 0
        while not done.is_set():
            number += 1
            temporary, name = root / f".tmp{number}", f"order-{number}"
            try:
                temporary.write_text("x")
                temporary.rename(root / name)
            except FileNotFoundError:
                continue  # the tree has moved on between the two: it is told, and would do it again
            saved.append(name)
            done.wait(0.0005)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield saved
    finally:
        done.set()
        thread.join()


def test_nothing_that_is_saved_during_patches_is_lost(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.TREE)
    apply(b.store, b.patch(2, modified={"app.json": b"2"}))
    with a_busy_program(b.root) as saved:
        for build in range(3, 13):
            wait_for(partial(lambda known: len(saved) > known, len(saved)), "the program to save")
            patch = b.patch(build, modified={"app.json": b"%d" % build})
            if build % 3:
                apply(b.store, patch)
                continue
            txn = staged(b.store, patch)
            b.store.switch(txn)
            b.store.switch_back(txn)
            b.store.abort(txn, "it was not meant to be")
            b.store.finish(txn, verdict="rolled_back")
    assert len(saved) > 10
    assert set(saved) - {path.name for path in b.root.iterdir()} == set()


def test_what_happens_between_the_carry_and_the_switch_comes_along(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(Layout.TREE)
    for path in ("changed", "gone", "folder/inside"):
        save(b.root / path, b"before")
    apply(b.store, b.patch(2, modified={"app.json": b"2"}))
    old = b.root.resolve()

    def write() -> None:
        save(old / "changed", b"after")
        save(old / "new/deep", b"new")
        (old / "gone").unlink()
        (old / "empty").mkdir()
        (old / "folder/inside").unlink()
        (old / "folder").rmdir()

    for action in ("switch", "switch_back"):
        before = seen(b.root)
        txn = staged(b.store, b.patch(300, modified={"app.json": b"3"}))
        if action == "switch_back":
            b.store.switch(txn)
        old = b.root.resolve()
        switching_while(b, monkeypatch, write)
        getattr(b.store, action)(txn)
        expected = {
            path: content for path, content in before.items() if path not in {"gone", "folder/inside"}
        }
        expected |= {"changed": b"after", "new/deep": b"new"}
        if action == "switch":
            expected["app.json"] = b"3"
        assert seen(b.root) == expected
        assert (b.root / "empty").is_dir()
        assert not (b.root / "folder").exists()
        b.store.abort(txn, "enough")
        b.store.finish(txn, verdict="rolled_back")
        assert seen(b.root)["app.json"] == b"2"
        assert seen(b.root)["changed"] == b"after"
        for path in ("changed", "gone", "folder/inside"):
            save(b.root / path, b"before")
        (b.root / "new/deep").unlink()
        (b.root / "empty").rmdir()


def test_of_two_saves_the_later_one_counts(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(Layout.TREE)
    save(b.root / "first", b"before")
    save(b.root / "second", b"before")
    apply(b.store, b.patch(2, modified={"app.json": b"2"}))
    old = b.root.resolve()
    txn = staged(b.store, b.patch(3, modified={"app.json": b"3"}))
    real = tree.follow_up

    def write_before() -> None:
        for number, name in enumerate(("first", "second")):
            save(old / name, b"in the old tree")
            os.utime(old / name, (number * 1000, number * 1000))

    def write_after(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        for name in ("first", "second"):
            save(b.root / name, b"in the new tree")
            os.utime(b.root / name, (500, 500))
        return real(*arguments, **options)

    def both() -> None:
        write_before()
        monkeypatch.setattr(tree_files, "follow_up", write_after)

    switching_while(b, monkeypatch, both)
    b.store.switch(txn)
    assert (b.root / "first").read_bytes() == b"in the new tree"
    assert (b.root / "second").read_bytes() == b"in the old tree"
    b.store.abort(txn, "enough")
    b.store.finish(txn, verdict="rolled_back")


@pytest.mark.parametrize("layout", Layout)
def test_a_save_of_a_patched_file_at_the_last_moment_is_not_replaced(
    layout: Layout, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(layout)
    apply(b.store, b.patch(2, modified={"app.json": b"2", "run.sh": b"2"}))
    txn = staged(b.store, b.patch(3, modified={"app.json": b"3", "run.sh": b"3"}))
    switching_while(b, monkeypatch, lambda: save(b.root / "app.json", b"the program's own"))
    with pytest.raises(PatchRefusedError) as caught:
        b.store.switch(txn)
    assert caught.value.error_code in {"gate.drift", "gate.detached"}
    b.store.abort(txn, "as the transaction does")
    b.store.finish(txn, verdict="refused")
    assert seen(b.root)["app.json"] == b"the program's own"
    assert seen(b.root)["run.sh"] == b"2"


def test_a_generation_is_kept_while_a_process_works_in_it(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.TREE)
    apply(b.store, b.patch(2, modified={"app.json": b"2"}))
    inside = b.root.resolve() / "rules"
    with subprocess.Popen(["cat"], cwd=inside, stdin=subprocess.PIPE) as program:
        for build in (3, 4, 5):
            apply(b.store, b.patch(build, modified={"app.json": b"%d" % build}))
        b.store.prune("web", 0)
        assert inside.is_dir()
        program.communicate()
    b.store.prune("web", 0)
    assert not inside.exists()


@pytest.mark.parametrize("crash", [False, True], ids=["at-once", "after-a-crash"])
def test_what_cannot_be_carried_back_is_kept(
    crash: bool, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(Layout.TREE)
    txn = staged(b.store, b.patch(2, modified={"app.json": b"2"}))
    b.store.switch(txn)
    save(b.root / "orders/1", b"precious")

    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(tree_files, "reconcile", full)
        b.store.switch_back(txn)
    if crash:
        b.store.close()
        b.store = open_store(b.base, *b.targets)
    else:
        b.store.abort(txn, "it failed")
        b.store.finish(txn, verdict="rolled_back")
    assert seen(b.root)["app.json"] == b"one"
    left = b.base / "state" / "saved" / "web" / f"{txn}-left"
    assert (left / "orders/1").read_bytes() == b"precious"
    steps = [step for step in b.store.history.transaction(txn)["steps"] if step["step"] == "carry back"]
    assert crash or (steps and str(left) in steps[0]["detail"])
    # And another one goes through.
    apply(b.store, b.patch(3, modified={"app.json": b"3"}))
    b.store.prune("web", 0)
    assert (left / "orders/1").read_bytes() == b"precious"


def test_a_release_leaves_the_program_the_file_it_has_open(bench: Callable[..., Bench]) -> None:
    """What no patch has brought is, after a rollback and a release, the very file that it was before."""
    b = bench(Layout.OVERLAY)
    with (b.root / "app.json").open("ab") as program:
        apply(b.store, b.patch(2, modified={"app.json": b"2"}))
        roll_back(b.store)
        b.store.release("web")
        program.write(b", two")
        program.flush()
        assert os.path.samestat(os.fstat(program.fileno()), (b.root / "app.json").stat())
    assert (b.root / "app.json").read_bytes() == b"one, two"
