"""What the store refuses to do, and that nothing is left of the attempt."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from store_kit import (
    FILES,
    Bench,
    Meddling,
    apply,
    begin,
    benches,
    change,
    leftovers,
    names_in,
    refused_at_staging,
    roll_back,
    seen,
    staged,
    write_tree,
)

from asyncsup.errors import (
    PatchMalformedError,
    PatchRefusedError,
)
from asyncsup.patch import fs
from asyncsup.patch.facts import Layout, TargetRoot
from asyncsup.patch.guarded import Guarded
from asyncsup.patch.look import aside
from asyncsup.patch.manifest import FileChange, Op
from asyncsup.patch.package import Package
from asyncsup.patch.plan import FilePlan
from asyncsup.patch.store import Store

both_layouts = pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.value) for layout in Layout])


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


def one_plan(b: Bench, patch: Package) -> FilePlan:
    (plan,) = [plan for plan in b.store.preview.plan("web", patch.manifest) if plan.op != "keep"]
    return plan


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way of which changes, and what is said about it."""

    name: str
    changes: dict[str, Any]
    code: str
    words: str
    prepare: Callable[[Path], object] = lambda root: None


OBSTACLES = [
    Obstacle("new-exists", {"new": {"app.json": b"2"}}, "gate.conflict", "exists already"),
    Obstacle("modified-absent", {"modified": {"no.json": b"2"}}, "gate.conflict", "does not exist"),
    Obstacle("deleted-absent", {"deleted": ["no.json"]}, "gate.conflict", "does not exist"),
    Obstacle("folder", {"modified": {"rules": b"2"}}, "gate.conflict", "a folder"),
    Obstacle("file-as-folder", {"new": {"app.json/x": b"2"}}, "gate.path", "app.json is not a folder"),
    Obstacle(
        "link",
        {"modified": {"link.json": b"2"}},
        "gate.conflict",
        "a symbolic link",
        lambda root: (root / "link.json").symlink_to("app.json"),
    ),
    Obstacle(
        "linked-parent",
        {"modified": {"dir/eu.json": b"2"}},
        "gate.path",
        "dir is a symbolic link",
        lambda root: (root / "dir").symlink_to("rules"),
    ),
    Obstacle(
        "escape",
        {"new": {"up/cron.d/x": b"2"}},
        "gate.path",
        "up is a symbolic link",
        lambda root: (root / "up").symlink_to("/etc"),
    ),
    Obstacle(
        "base",
        {"modified": {"app.json": b"2"}, "options": {"app.json": {"base_sha256": "0" * 64}}},
        "gate.base",
        "not the file the patch was made for",
    ),
    Obstacle(
        "fifo",
        {"deleted": ["fifo"]},
        "gate.conflict",
        "not a regular file",
        lambda root: os.mkfifo(root / "fifo"),
    ),
]


@both_layouts
@pytest.mark.parametrize("obstacle", [pytest.param(each, id=each.name) for each in OBSTACLES])
def test_what_stands_in_the_way_is_planned_and_refused(
    layout: Layout, obstacle: Obstacle, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    obstacle.prepare(b.root)
    patch = b.patch(300, **obstacle.changes)
    plan = one_plan(b, patch)
    assert plan.code == obstacle.code
    assert obstacle.words in plan.note
    assert plan.error is not None
    assert plan.error.message == plan.note
    error = refused_at_staging(b, patch)
    assert error.error_code == obstacle.code
    assert obstacle.words in error.message
    assert error.details["files"] == [{"path": plan.path, "code": obstacle.code, "message": plan.note}]


@both_layouts
def test_paths_that_lead_out_are_refused_whatever_the_manifest_reader_let_through(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    for path in ("../out", "/etc/passwd", "a//b", "a/../b", ".", "", "x\0y", ".asyncsup~1-1"):
        manifest = replace(
            b.patch(300, modified={"app.json": b"2"}).manifest, files=(change(path, Op.NEW, b"x"),)
        )
        (plan,) = b.store.preview.plan("web", manifest)
        assert plan.code == "gate.path", path


def guarded_store(b: Bench, **more: Any) -> None:
    """The same store, with the configuration, who may sign and the inbox in the root."""
    b.store.close()
    places = {b.root / "asyncsup.toml": "the configuration", b.root / "inbox": "the inbox"}
    b.store = Store.open(b.base / "state")
    b.store.guard(Guarded(places=places, **more))
    b.store.register(b.targets)
    b.store.recover()


@pytest.mark.parametrize("path", ["asyncsup.toml", "inbox", "inbox/next.zip", "inbox/a/b", "asyncsup.toml/x"])
def test_what_decides_about_patches_is_changed_by_none_whether_it_is_there_or_not(
    path: str, bench: Callable[..., Bench]
) -> None:
    b = bench(Layout.OVERLAY)
    guarded_store(b)
    patch = b.patch(300, new={path: b"evil"}, options={path: {"replace": True}})
    assert one_plan(b, patch).code == "gate.path"
    if "/" not in path:
        b.put("asyncsup.toml", b"ours")
        (b.root / "inbox").mkdir()
    assert refused_at_staging(b, patch).error_code == "gate.path"
    assert one_plan(b, b.patch(300, modified={"app.json": b"2"})).error is None


def test_no_other_name_leads_to_what_decides_about_patches(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    guarded_store(b)
    (b.base / "elsewhere").mkdir()
    (b.base / "elsewhere/real.toml").write_text("ours")
    (b.root / "asyncsup.toml").symlink_to(b.base / "elsewhere/real.toml")
    (b.root / "other.toml").hardlink_to(b.base / "elsewhere/real.toml")
    assert one_plan(b, b.patch(300, modified={"other.toml": b"evil"})).code == "gate.path"
    assert one_plan(b, b.patch(300, modified={"asyncsup.toml": b"evil"})).code == "gate.path"


def test_no_patch_reaches_into_the_state_directory(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    b.reopen(TargetRoot(name="all", root=b.base, layout=Layout.OVERLAY))
    for path in ("state/state.db", "state/generations/web/7/x", "state/new"):
        manifest = replace(b.patch(300, modified={"x": b"2"}).manifest, files=(change(path, Op.NEW, b"x"),))
        (plan,) = b.store.preview.plan("all", manifest)
        assert plan.code == "gate.path", path
        assert plan.error is not None
        assert "the state directory" in plan.error.message


def test_no_file_appears_that_the_configuration_would_include(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    guarded_store(b, patterns=(f"{b.root}/conf.d/**/*.toml", f"{b.root}/more/../[ab].toml"))
    for path in ("conf.d/x.toml", "conf.d/deep/er/x.toml", "a.toml"):
        assert one_plan(b, b.patch(300, new={path: b"evil"})).code == "gate.path", path
    for path in ("conf.d/x.json", "c.toml", "more/a.toml", "toml"):
        assert one_plan(b, b.patch(300, new={path: b"good"})).error is None, path


@both_layouts
def test_leniency_that_the_manifest_asks_for_is_given(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    patch = b.patch(
        300,
        new={"app.json": b"over"},
        modified={"made.json": b"made"},
        deleted=["gone.json"],
        options={
            "app.json": {"replace": True},
            "made.json": {"missing_ok": True},
            "gone.json": {"missing_ok": True},
        },
    )
    notes = {plan.path: plan.note for plan in b.store.preview.plan("web", patch.manifest)}
    assert "replaces the file that is there" in notes["app.json"]
    assert notes["made.json"] == "not there, created"
    assert notes["gone.json"] == "not there, nothing to delete"
    apply(b.store, patch)
    assert seen(b.root) == {**FILES, "app.json": b"over", "made.json": b"made"}
    assert b.store.preview.content_matches("web", patch.manifest)
    roll_back(b.store)
    assert seen(b.root) == FILES


@both_layouts
def test_a_delivered_file_changed_in_place_is_drift(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    apply(b.store, b.patch(300, modified={"app.json": b"two", "rules/eu.json": b"x"}))
    (b.root / "app.json").resolve().chmod(0o644)
    b.put("app.json", b"changed behind our back")
    patch = b.patch(301, modified={"app.json": b"three"})
    assert refused_at_staging(b, patch).error_code == "gate.drift"
    other = b.patch(302, modified={"rules/eu.json": b"y"})
    (kept,) = [plan for plan in b.store.preview.plan("web", other.manifest) if plan.op == "keep"]
    assert kept.path == "app.json"
    assert kept.error is None
    apply(b.store, other)  # Somebody else's file is no reason not to deliver this one.
    assert seen(b.root)["app.json"] == b"changed behind our back"


def test_a_touched_file_with_the_same_content_is_not_drift(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    os.utime(b.root / "app.json", (1, 1))
    apply(b.store, b.patch(301, modified={"app.json": b"three"}))
    assert seen(b.root)["app.json"] == b"three"


def test_a_leaf_the_program_has_replaced_is_detached(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    b.put("app.json.tmp", b"saved by the program")
    (b.root / "app.json.tmp").replace(b.root / "app.json")
    patch = b.patch(301, modified={"app.json": b"three"})
    assert refused_at_staging(b, patch).error_code == "gate.detached"
    b.store.release("web")
    assert seen(b.root)["app.json"] == b"saved by the program"
    apply(b.store, patch)
    assert seen(b.root)["app.json"] == b"three"


def save(path: Path, content: bytes) -> None:
    """As programs save: another file takes the name in one step."""
    path.with_name(".saving").write_bytes(content)
    path.with_name(".saving").replace(path)


@pytest.mark.parametrize("newer", [False, True], ids=["once", "twice"])
def test_what_the_program_saves_where_a_link_is_about_to_be_removed_stays(
    newer: bool, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(Layout.OVERLAY)
    txn = staged(b.store, b.patch(300, deleted=["app.json"]))
    b.store.switch(txn)
    name, rename = b.root / "app.json", os.rename
    saved: list[bytes] = []

    def meddling(source: str, destination: str, **folders: Any) -> None:
        meddles = source == "app.json" and not saved
        if meddles:
            saved.append(b"first")
            save(name, b"first")
        rename(source, destination, **folders)
        if meddles and newer:
            saved.append(b"second")
            save(name, b"second")

    monkeypatch.setattr(os, "rename", meddling)
    b.store.commit(txn)
    assert name.read_bytes() == saved[-1]
    assert leftovers(b.root) == []


def test_what_was_taken_away_when_a_crash_came_is_looked_at_again(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    txn = staged(b.store, b.patch(300, deleted=["app.json", "run.sh"]))
    b.store.switch(txn)
    for name in ("app.json", "run.sh"):
        (b.root / name).rename(b.root / aside("gone", name))
    (b.root / aside("gone", "app.json")).unlink()
    (b.root / aside("gone", "app.json")).write_bytes(b"saved by the program")
    b.store.commit(txn)
    assert seen(b.root)["app.json"] == b"saved by the program"
    assert not (b.root / "run.sh").is_symlink()
    assert leftovers(b.root) == []


@pytest.mark.parametrize("linkable", [True, False], ids=["linked", "copied"])
@pytest.mark.parametrize("saves", [False, True], ids=["quiet", "saves"])
def test_a_file_brought_home_takes_the_place_of_its_link_and_of_nothing_newer(
    saves: bool, linkable: bool, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(Layout.OVERLAY)
    txn = staged(b.store, b.patch(300, deleted=["app.json"]))
    b.store.switch(txn)
    (b.root / "app.json").write_bytes(b"made through the link")
    exchange, link = fs.exchange, fs.link

    def meddling(first: str, second: str, **folders: Any) -> None:
        if saves and second == "app.json":
            monkeypatch.setattr(fs, "exchange", exchange)
            save(b.root / "app.json", b"saved since")
        exchange(first, second, **folders)

    monkeypatch.setattr(fs, "exchange", meddling)
    monkeypatch.setattr(fs, "link", lambda *names: linkable and link(*names))
    b.store.commit(txn)
    assert (b.root / "app.json").read_bytes() == (b"saved since" if saves else b"made through the link")
    assert leftovers(b.root) == []


@both_layouts
def test_a_delivered_file_the_program_has_removed_is_detached(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    apply(b.store, b.patch(300, modified={"app.json": b"two"}))
    (b.root / "app.json").unlink()
    patch = b.patch(301, modified={"app.json": b"three"})
    assert refused_at_staging(b, patch).error_code == "gate.detached"


@both_layouts
def test_an_adopted_file_is_still_the_programs_to_write(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    b.store.abort(staged(b.store, b.patch(300, modified={"app.json": b"two"})))
    b.put("app.json", b"written in place, patch or no patch")
    apply(b.store, b.patch(301, modified={"app.json": b"three"}))
    roll_back(b.store)
    assert seen(b.root)["app.json"] == b"written in place, patch or no patch"


@both_layouts
@pytest.mark.parametrize(
    ("meddle", "code"),
    [
        (lambda root: (root / "app.json").write_bytes(b"changed!"), "gate.drift"),
        (lambda root: (root / "n.json").write_bytes(b"appeared"), "gate.conflict"),
    ],
    ids=["changed", "appeared"],
)
def test_what_the_program_does_between_staging_and_switch_is_noticed(
    layout: Layout, meddle: Callable[[Path], object], code: str, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    txn = staged(b.store, b.patch(300, new={"n.json": b"n"}, modified={"app.json": b"two"}))
    meddle(b.root)
    wanted = seen(b.root)
    with pytest.raises(PatchRefusedError) as caught:
        b.store.switch(txn)
    assert caught.value.error_code == code
    b.store.abort(txn)
    assert seen(b.root) == wanted
    assert leftovers(b.root) == []


def test_a_leaf_replaced_between_staging_and_switch_is_noticed(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    txn = staged(b.store, b.patch(300, modified={"app.json": b"two"}))
    b.put("new", b"saved meanwhile")
    (b.root / "new").replace(b.root / "app.json")
    with pytest.raises(PatchRefusedError) as caught:
        b.store.switch(txn)
    assert caught.value.error_code == "gate.detached"
    b.store.abort(txn)
    assert seen(b.root) == {**FILES, "app.json": b"saved meanwhile"}


def test_a_file_created_through_a_dangling_link_ends_up_where_it_was_meant(
    bench: Callable[..., Bench],
) -> None:
    b = bench(Layout.OVERLAY)
    txn = staged(b.store, b.patch(300, modified={"rules/eu.json": b"x"}, deleted=["rules/us.json"]))
    b.store.switch(txn)
    b.put("rules/us.json", b"made again by the program")
    b.store.commit(txn)
    assert seen(b.root)["rules/us.json"] == b"made again by the program"
    assert not (b.root / "rules/us.json").is_symlink()


@both_layouts
@pytest.mark.parametrize("folder", ["rules", "fresh"])
def test_a_folder_swapped_for_a_link_during_staging_leads_nowhere(
    layout: Layout, folder: str, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    outside = b.base / "outside"
    write_tree(outside, {"eu.json": b"precious", "sub/x": b"precious"})
    (b.root / "fresh").mkdir()
    plain = b.patch(300, modified={"rules/eu.json": b"2"}, new={"fresh/sub/n.json": b"n"})

    def swap() -> None:
        (b.root / folder).rename(b.base / "moved-away")
        (b.root / folder).symlink_to(outside)

    before = seen(outside)
    txn = begin(b.store, plain)
    with pytest.raises(PatchRefusedError) as caught:
        b.store.stage(txn, "web", Meddling(plain, swap))
        b.store.switch(txn)
    assert caught.value.error_code in {"gate.path", "gate.drift", "gate.conflict"}
    b.store.abort(txn)
    assert seen(outside) == before
    assert not any(path.is_symlink() for path in outside.rglob("*"))
    assert str((b.root / folder).readlink()) == str(outside)


@both_layouts
def test_content_that_is_not_what_the_manifest_says_leaves_nothing(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    patch = b.patch(300, modified={"app.json": b"two"}, new={"n.json": b"n"})

    class Lying(Meddling):
        def extract(self, change: FileChange, fd: int, progress: Callable[[int], None] | None = None) -> None:
            os.write(fd, b"half of ")
            raise PatchMalformedError("wrong digest", code="digest.file")

    txn = begin(b.store, patch)
    with pytest.raises(PatchMalformedError):
        b.store.stage(txn, "web", Lying(patch, lambda: None))
    b.store.finish(txn, verdict="refused")
    assert seen(b.root) == FILES
    assert leftovers(b.root) == []
    assert names_in(b.base / "state/staging") == []


@both_layouts
def test_a_file_system_that_cannot_swap_names_is_a_refusal_and_nothing_is_left(
    layout: Layout, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b, rename = bench(layout), fs._renameat2
    patch = b.patch(300, modified={"app.json": b"two"}, new={"n.json": b"n"})

    def lacking(first: str, second: str, first_dir: int, second_dir: int, flags: int) -> None:
        if flags == fs._RENAME_EXCHANGE:
            raise OSError(errno.EINVAL, "Invalid argument", first, None, second)
        rename(first, second, first_dir, second_dir, flags)

    with monkeypatch.context() as patched:
        patched.setattr(fs, "_renameat2", lacking)
        error = refused_at_staging(b, patch)
        assert (error.error_code, error.exit_status) == ("gate.filesystem", 20)
        assert str(b.root) in error.message
        assert names_in(b.base / "state/staging") == []
        if layout is Layout.OVERLAY:
            # A file that is new takes nobody's place.
            apply(b.store, b.patch(301, new={"n.json": b"n"}))
            assert seen(b.root) == {**FILES, "n.json": b"n"}
    apply(b.store, b.patch(302, modified={"app.json": b"two"}))
    assert seen(b.root)["app.json"] == b"two"


@both_layouts
def test_a_missing_root_is_a_refusal(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    b.root.rename(b.base / "away")
    patch = b.patch(300, modified={"app.json": b"two"})
    with pytest.raises(PatchRefusedError) as caught:
        b.store.preview.plan("web", patch.manifest)
    assert caught.value.error_code == "gate.root"
    b.reopen()  # And no reason not to start.


@both_layouts
def test_content_matches_only_what_the_patch_would_make(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)

    def matches(**changes: Any) -> bool:
        return b.store.preview.content_matches("web", b.patch(300, **changes).manifest)

    assert matches(modified={"app.json": b"one"}, new={"rules/eu.json": b"eu"}, deleted=["nope"])
    assert not matches(modified={"app.json": b"two"})
    assert not matches(deleted=["app.json"])
    assert not matches(new={"nope": b""})
    assert matches(new={"run.sh": b"#!/bin/sh\n"}, options={"run.sh": {"mode": 0o755}})
    assert not matches(new={"run.sh": b"#!/bin/sh\n"}, options={"run.sh": {"mode": 0o644}})
    apply(b.store, b.patch(300, modified={"app.json": b"two"}, deleted=["run.sh"]))
    assert matches(modified={"app.json": b"two"}, deleted=["run.sh"])
