"""Is there room? Found out before anything is written, on every file system, for bytes and inodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from store_kit import (
    Bench,
    apply,
    begin,
    benches,
    mounted,
    names_in,
    open_store,
    package,
    seen,
    write_tree,
)

from asyncsup.errors import PatchRefusedError
from asyncsup.patch import fs
from asyncsup.patch.facts import Layout, TargetRoot
from asyncsup.patch.gates import space_gate
from asyncsup.patch.package import Package
from asyncsup.patch.space import MARGIN_BYTES, MARGIN_INODES, Need, Room
from asyncsup.patch.store import Store

both_layouts = pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.value) for layout in Layout])
MIB = 1 << 20


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def room(**more: int | None) -> Room:
    facts = {"needed": 10, "free": 10, "needed_inodes": 5, "free_inodes": 5, **more}
    return Room(place=Path("/state"), **facts)  # type: ignore[arg-type]


def test_a_file_system_is_short_of_bytes_or_of_inodes_or_of_neither() -> None:
    assert room().short is None
    assert room(free=9).short == "10 B are needed, 9 B are free"
    assert room(free_inodes=4).short == "5 inodes are needed, 4 are free"
    assert room(free_inodes=None).short is None
    assert room(needed=8_400_000, free=1_234_567_890).sizes == "8.4 MB are needed, 1.2 GB are free"


def test_the_gate_names_what_is_needed_and_what_is_free() -> None:
    gate = space_gate([room(), room(free=9)])
    assert (gate.ok, gate.code) == (False, "gate.space")
    assert gate.detail == "not enough room in /state: 10 B are needed, 9 B are free"
    gate = space_gate([room()])
    assert (gate.ok, gate.detail) == (True, "/state: 10 B are needed, 10 B are free")


def test_what_is_needed_of_one_file_system_is_added_up(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    needs = [
        Need(place=tmp_path, size=1000, inodes=2),
        Need(place=tmp_path / "a", size=500, inodes=3),
    ]
    (found,) = fs.rooms(needs)
    volume = os.statvfs(tmp_path)
    assert (found.needed, found.needed_inodes) == (MARGIN_BYTES + 1500, MARGIN_INODES + 5)
    assert 0 < found.free <= volume.f_blocks * volume.f_frsize


def refused(store: Store, patch: Package) -> PatchRefusedError:
    """Refused before anything is written."""
    txn = begin(store, patch)
    with pytest.raises(PatchRefusedError) as caught:
        store.stage(txn, "web", patch)
    assert caught.value.error_code == "gate.space"
    assert store.history.transaction(txn)["state"] == "begun"
    store.abort(txn)
    return caught.value


@both_layouts
def test_too_few_inodes_are_noticed_before_staging(layout: Layout, tmp_path: Path, stack: ExitStack) -> None:
    state = stack.enter_context(mounted(tmp_path / "state", "size=64m,nr_inodes=300"))
    root = tmp_path / "root"
    write_tree(root, {"app.json": b"one"})
    store = open_store(tmp_path, TargetRoot(name="web", root=root, layout=layout))
    stack.callback(store.close)
    many = stack.enter_context(package(tmp_path, 300, new={f"n/{i}": b"" for i in range(400)}))
    error = refused(store, many)
    free = os.statvfs(state).f_favail
    assert error.details["needed_inodes"] > 400 > error.details["free_inodes"]
    assert error.message == (
        f"web: there is not enough room in {state}: {error.details['needed_inodes']} inodes are needed, "
        f"{error.details['free_inodes']} are free"
    )
    assert names_in(state / "staging") == []
    assert os.statvfs(state).f_favail == free
    apply(store, stack.enter_context(package(tmp_path, 301, new={f"n/{i}": b"" for i in range(20)})))


def test_the_file_system_of_an_overlay_root_needs_room_as_well(tmp_path: Path, stack: ExitStack) -> None:
    root = stack.enter_context(mounted(tmp_path / "root", "size=1m"))
    store = open_store(tmp_path, TargetRoot(name="web", root=root, layout=Layout.OVERLAY))
    stack.callback(store.close)
    error = refused(store, stack.enter_context(package(tmp_path, 300, new={"n": b"n"})))
    assert error.details["place"] == str(root)
    assert seen(root) == {}


def test_a_large_tree_from_another_file_system_is_weighed_before_it_is_copied(
    tmp_path: Path, stack: ExitStack
) -> None:
    state = stack.enter_context(mounted(tmp_path / "state", "size=8m"))
    root = tmp_path / "root"
    write_tree(root, {"app.json": b"one", "data/large": os.urandom(12 * MIB)})
    store = open_store(tmp_path, TargetRoot(name="web", root=root, layout=Layout.TREE))
    stack.callback(store.close)
    error = refused(store, stack.enter_context(package(tmp_path, 300, modified={"app.json": b"two"})))
    assert error.details["place"] == str(state)
    assert error.details["needed"] > 12 * MIB > error.details["free"]
    assert not root.is_symlink()


@both_layouts
def test_a_plan_says_what_room_is_needed(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    patch = b.patch(300, modified={"app.json": os.urandom(3 * MIB)})
    survey = b.store.preview.survey("web", patch.manifest)
    assert 3 * MIB < sum(need.size for need in survey.needs) < 4 * MIB
    assert [plan.path for plan in survey.files] == ["app.json"]
    # What one target of a patch takes is not there for the next: the needs of both are added up.
    (both,) = fs.rooms([*survey.needs, *survey.needs])
    assert both.needed > 6 * MIB
