"""For the tests that cut the power: what is played on a store, and what each call has promised.

A play runs in a traced child and leaves its promises in the trace, between the system calls; so for every
moment at which the power may go it is known what programs may see, what recovery may make of it, and what the
store has said to its caller and cannot take back.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from unittest import mock

from power_model import State
from store_kit import Tree, info, open_store, package, seen, target, write_tree
from traced import mark

from asyncsup.errors import PatchRefusedError
from asyncsup.patch import fs
from asyncsup.patch.facts import Layout, TargetRoot
from asyncsup.patch.look import TEMPORARY_PREFIX
from asyncsup.patch.package import Package
from asyncsup.patch.plan import Policy
from asyncsup.patch.store import Store
from asyncsup.patch.tree_files import TreeFiles

PERSISTENT: Final = "data"
PERSISTENT_FILE: Final = "own.db"
OWN: Final[Tree] = {
    "own.txt": b"the program's own, and more than a page " * 120,
    f"{PERSISTENT}/own.log": b"persistent",
    PERSISTENT_FILE: b"persistent too",
}

NEXT: Final = 900
"""The build of a patch that goes through whatever has happened."""

FEWER: Final = 110
"""The build of a patch that only deletes."""

BUILDS: Final[Mapping[int, Tree]] = {
    100: {
        "app.json": b"one",
        "rules/eu.json": b"eu 1",
        "rules/us.json": b"us 1",
        "rules/old/gone.json": b"to be deleted",
    },
    FEWER: {
        "app.json": b"one",
        "rules/eu.json": b"eu 1",
        "rules/us.json": b"us 1",
    },
    200: {
        "app.json": b"two",
        "rules/eu.json": b"eu 1",
        "rules/us.json": b"us 1",
        "extra/deep/new.json": b"new in 2",
    },
    300: {
        "app.json": b"three",
        "rules/eu.json": b"eu 3",
        "rules/us.json": b"us 1",
        "rules/more.json": b"new in 3",
        "rules/old/gone.json": b"it is back",
    },
    400: {
        "app.json": b"four",
        "rules/eu.json": b"eu 3",
        "rules/us.json": b"us 4",
        "rules/more.json": b"four as well",
        "rules/old/gone.json": b"it is back",
    },
    NEXT: {
        "app.json": b"next",
        "rules/eu.json": b"next",
        "rules/us.json": b"next",
        "next/one.json": b"next",
    },
}
"""What patches make of a root, by build. Each of them touches some file for the first time."""

SAVED_NS: Final = 1_700_000_000 * 10**9

NEVER: Final = 10_000
"""More swaps than there are."""

BULK: Final = 34
"""More files than are synced one by one."""


# --- what was promised --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Promises:
    """What holds at a moment.

    Attributes:
        seen: the builds of which programs may find the files, before any recovery.
        kept: the builds that recovery may lead to.
        unsure: paths that the program has written to and has not synced itself.
        begun: numbers of transactions the caller was told.
        verdicts: of transactions, as reported, with the code of the error; None while it may change.
        pinned: whether readers may go through the pointer.
        released: names of targets whose files are ordinary ones again.
        held: whether a patch is on hold, as reported; None while that is about to change.
        wanted: whether a target is to be up, as asked for.
        scaled: how many instances of a target there are to be, as asked for.
        anchors: hashes of records of the audit that somebody has been told.
        noted: events that are in the audit.
        own: files that the program has written and synced itself, in every target; None where it removed one.
        altered: what a build has that differs from what was delivered, since the program has changed it; by
            the build's number and by path.
        treasures: what the program has saved, and a patch may take away: of each target it is in the root or
            among the saved copies.
        undecided: transactions that may wait for a decision.
    """

    seen: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()
    unsure: frozenset[str] = frozenset()
    begun: frozenset[int] = frozenset()
    verdicts: Mapping[str, Sequence[str | None] | None] = field(default_factory=dict)
    pinned: bool = False
    released: frozenset[str] = frozenset()
    held: Mapping[str, bool | None] = field(default_factory=dict)
    wanted: Mapping[str, bool] = field(default_factory=dict)
    scaled: Mapping[str, int] = field(default_factory=dict)
    anchors: frozenset[str] = frozenset()
    noted: frozenset[str] = frozenset()
    own: Mapping[str, str | None] = field(default_factory=dict)
    altered: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    treasures: frozenset[str] = frozenset()
    undecided: frozenset[int] = frozenset()

    def after(self, text: str) -> Promises:
        changes = json.loads(text)
        return Promises(
            seen=frozenset(changes.get("seen", self.seen)),
            kept=frozenset(changes.get("kept", self.kept)),
            unsure=frozenset(changes.get("unsure", self.unsure)),
            begun=self.begun | set(changes.get("begun", ())),
            verdicts={**self.verdicts, **changes.get("verdicts", {})},
            pinned=changes.get("pinned", self.pinned),
            released=self.released | set(changes.get("released", ())),
            held={**self.held, **changes.get("held", {})},
            wanted={**self.wanted, **changes.get("wanted", {})},
            scaled={**self.scaled, **changes.get("scaled", {})},
            anchors=self.anchors | set(changes.get("anchors", ())),
            noted=self.noted | set(changes.get("noted", ())),
            own={**self.own, **changes.get("own", {})},
            altered={**self.altered, **changes.get("altered", {})},
            treasures=self.treasures | set(changes.get("treasures", ())),
            undecided=frozenset(changes.get("undecided", self.undecided)),
        )

    def in_recovery(self) -> Promises:
        """Programs may see already what it is going to lead to."""
        return replace(self, seen=self.seen | self.kept)


def promise(**changes: Any) -> None:
    """From here on in the trace this holds."""
    mark(f"promise {json.dumps(changes)}")


# --- where it is played -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """What a program finds in its root, and below the generation that the pointer leads to, if it does.

    Attributes:
        mode: of that generation's folder.
    """

    root: Tree
    current: Tree | None
    mode: int | None


BOTH_LAYOUTS: Final[Mapping[str, Layout]] = {"over": Layout.OVERLAY, "tree": Layout.TREE}


class Scene:
    """A folder that loses its power, with a store and targets in it.

    Args:
        bulk: more files than are synced one by one.
        links: whether hard links are possible.
        layouts: the targets, by name.
    Attributes:
        disk: what the power can take. The packages and traces are beside it.
    """

    def __init__(
        self,
        base: Path,
        *,
        bulk: bool = False,
        links: bool = True,
        layouts: Mapping[str, Layout] = BOTH_LAYOUTS,
    ) -> None:
        self.base = base
        self.links = links
        self.disk = base / "disk"
        self.disk.mkdir(parents=True)
        # Three folders that nobody has made yet; the store is in the last of them.
        self.state = self.disk / "var" / "asyncsup"
        self.side = base / "side"
        self.side.mkdir()
        self.bulk = bulk
        persistent = {Layout.OVERLAY: {}, Layout.TREE: {"persist": (PERSISTENT, PERSISTENT_FILE)}}
        self.targets = tuple(
            target(self.disk, layout, name, build=100, **persistent[layout])
            for name, layout in layouts.items()
        )
        for each in self.targets:
            write_tree(each.root, {**self.build(100), **OWN})

    @classmethod
    def of(cls, play: Play, base: Path, layouts: Mapping[str, Layout] = BOTH_LAYOUTS) -> Scene:
        return cls(base, bulk=play.bulk, links=play.elsewhere == 0, layouts=layouts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.targets)

    def build(self, number: int) -> Tree:
        """The files of a build, without the program's own."""
        if not self.bulk:
            return BUILDS[number]
        if number == NEXT:
            return {**self.build(400), **BUILDS[NEXT]}
        return {**BUILDS[number], **{f"bulk/{n % 4}/{n}": b"%d of %d" % (n, number) for n in range(BULK)}}

    def altered(self, number: int, promises: Promises) -> dict[str, bytes | None]:
        """What the program has made of files of a build."""
        return _encoded(promises.altered.get(str(number), {}))

    def folders(self, build: int, promises: Promises) -> set[str]:
        """The folders there may be in an overlay's root: the program's own, and those of patches."""
        paths = [
            *OWN,
            *promises.own,
            *promises.unsure,
            *(path for number in BUILDS if number <= build for path in self.build(number)),
        ]
        return {str(folder) for path in paths for folder in Path(path).parents}

    def open(self) -> Store:
        return open_store(self.state, *self.targets)

    def package(self, number: int, *, after: int) -> Package:
        """A patch from build `after` to build `number`."""
        old, new = self.build(after), self.build(number)
        return package(
            self.side,
            number,
            new={path: new[path] for path in sorted(new.keys() - old.keys())},
            modified={path: new[path] for path in sorted(new.keys() & old.keys()) if new[path] != old[path]},
            deleted=sorted(old.keys() - new.keys()),
            targets=self.names,
        )

    def current(self, target: TargetRoot) -> Path:
        return self.state / "state" / "current" / target.name

    def sees(self, state: State) -> list[View]:
        """What the program of each target finds, in a state of the model."""
        views = []
        for each in self.targets:
            current = str(self.current(each))
            found = state.find(current)
            views.append(
                View(
                    state.seen(str(each.root), but_for=TEMPORARY_PREFIX),
                    None if found is None else state.seen(current, but_for=TEMPORARY_PREFIX),
                    None if found is None else state.mode(found[0]),
                )
            )
        return views

    def really_sees(self) -> list[View]:
        """The same, in the real folders."""
        views = []
        for each in self.targets:
            current = self.current(each)
            there = current.is_dir()
            mode = stat.S_IMODE(current.stat().st_mode) if there else None
            views.append(View(seen(each.root), seen(current) if there else None, mode))
        return views

    def build_of(self, files: Tree, promises: Promises) -> int | None:
        """The build of which these are the files, if they are all of one and the program's own."""
        own = {**OWN, **_encoded(promises.own)}
        ignored = promises.unsure
        for number in BUILDS:
            expected = {**self.build(number), **self.altered(number, promises), **own}
            if all(files.get(path) == expected.get(path) for path in (files.keys() | expected) - ignored):
                return number
        return None


def _encoded(texts: Mapping[str, str | None]) -> dict[str, bytes | None]:
    return {path: None if text is None else text.encode() for path, text in texts.items()}


# --- plays --------------------------------------------------------------------------------------------------


def begin(store: Store, patch: Package, *names: str, by_hand: bool = False) -> int:
    txn = store.begin(action="apply", patch=info(patch), targets=names, asked_by="test", by_hand=by_hand)
    promise(begun=[txn])
    return txn


def stage(store: Store, patch: Package, *names: str, policy: Policy = "refuse", by_hand: bool = False) -> int:
    txn = begin(store, patch, *names, by_hand=by_hand)
    for name in names:
        store.stage(txn, name, patch, policy=policy)
    return txn


def switch_and_confirm(store: Store, txn: int, old: int, new: int) -> None:
    promise(seen=[old, new])
    store.switch(txn)
    promise(seen=[new])
    promise(kept=[old, new])
    store.commit(txn)
    promise(kept=[new], verdicts={txn: ["committed", None]})


def switch_and_commit(store: Store, txn: int, old: int, new: int) -> None:
    switch_and_confirm(store, txn, old, new)
    store.finish(txn, verdict="committed")


def apply(scene: Scene, store: Store, number: int, *, after: int, policy: Policy = "refuse") -> None:
    with scene.package(number, after=after) as patch:
        txn = stage(store, patch, *scene.names, policy=policy)
        switch_and_commit(store, txn, after, number)


def untouched(scene: Scene) -> None:
    """Nothing was ever patched, the store does not exist."""


def fresh(scene: Scene) -> None:
    """The same; and the program is about to save a file."""
    for each in scene.targets:
        (each.root / "app.json").write_bytes(b"as it was before")


def patched(scene: Scene) -> None:
    with closing(scene.open()) as store:
        apply(scene, store, 200, after=100)


def patched_twice(scene: Scene) -> None:
    patched(scene)
    with closing(scene.open()) as store:
        apply(scene, store, 300, after=200)


def play_first_patch(scene: Scene) -> None:
    """Adoption and conversion, of files that the program has saved a moment ago and not synced."""
    promise(unsure=["app.json"])
    for each in scene.targets:
        (each.root / "app.json").write_bytes(scene.build(100)["app.json"])
        with (each.root / "app.json").open("rb") as file:
            # That of the writing itself is not in a recording.
            os.utime(file.fileno(), ns=(0, SAVED_NS))
    with closing(scene.open()) as store, scene.package(200, after=100) as patch:
        promise(pinned=True)
        txn = stage(store, patch, *scene.names)
        # What the patch replaces is on disk by now, whoever has written it.
        promise(unsure=[])
        switch_and_commit(store, txn, 100, 200)


def play_first_patch_elsewhere(scene: Scene) -> None:
    """The same where a root is on another file system than the store; and the program of a tree writes while
    what it has is copied."""
    with closing(scene.open()) as store, scene.package(200, after=100) as patch:
        promise(pinned=True)
        txn = stage(store, patch, *scene.names)
        save(scene, "late/night.log", "written in the very last moment")
        save(scene, f"{PERSISTENT}/late.log", "persistent as well")
        save(scene, PERSISTENT_FILE, "persistent, and changed")
        switch_and_commit(store, txn, 100, 200)


def save(scene: Scene, path: str, text: str) -> None:
    """The programs save a file of their own, and sync it."""
    promise(unsure=[path])
    _write(scene, path, text)
    promise(unsure=[], own={path: text})


def save_over(scene: Scene, build: int, path: str, text: str) -> None:
    """The programs write into a file that a patch has brought, which is of `build`."""
    promise(unsure=[path])
    _write(scene, path, text)
    promise(unsure=[], altered={build: {path: text}}, treasures=[text])


def replace_file(scene: Scene, path: str, text: str) -> None:
    """The programs save a file of their own as a whole: another one takes its name."""
    save(scene, f"{path}.new", text)
    promise(unsure=[path, f"{path}.new"])
    for each in scene.targets:
        file = each.root / path
        file.with_name(f"{file.name}.new").rename(file)
        _sync_names(file)
    promise(unsure=[], own={path: text, f"{path}.new": None})


def remove(scene: Scene, path: str) -> None:
    """The programs remove a name, and sync that. What is promised is the caller's business."""
    for each in scene.targets:
        (each.root / path).unlink()
        _sync_names(each.root / path)


def _write(scene: Scene, path: str, text: str) -> None:
    for each in scene.targets:
        file = each.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as opened:
            opened.write(text)
            opened.flush()
            os.fdatasync(opened.fileno())
        _sync_names(file)


def _sync_names(file: Path) -> None:
    for folder in (file.resolve().parent, file.resolve().parent.parent):
        with fs.opened(folder) as fd:
            os.fdatasync(fd)


def play_third_patch(scene: Scene) -> None:
    """With three generations that an adopted file belongs into, of which two then go; and with what the
    program of a tree has written after it was staged."""
    with closing(scene.open()) as store, scene.package(400, after=300) as patch:
        txn = stage(store, patch, *scene.names)
        save(scene, "late/night.log", "written in the very last moment")
        switch_and_commit(store, txn, 300, 400)
        for name in scene.names:
            store.prune(name, 1)


def play_refused_patch(scene: Scene) -> None:
    """A program creates the very file that the patch is about to bring."""
    with closing(scene.open()) as store, scene.package(300, after=200) as patch:
        txn = stage(store, patch, *scene.names)
        save(scene, "rules/more.json", "mine")
        try:
            store.switch(txn)
        except PatchRefusedError:
            store.abort(txn)
        else:
            raise AssertionError("it was not refused")


def play_refused_patch_of_many(scene: Scene) -> None:
    """A program creates all that the patch is about to bring, in so many files that not each is synced."""
    paths = [f"extra/deep/{number}.json" for number in range(BULK // 2 + 2)]
    with (
        closing(scene.open()) as store,
        package(scene.side, 300, new=dict.fromkeys(paths, b"new"), targets=scene.names) as patch,
    ):
        txn = stage(store, patch, *scene.names)
        promise(unsure=paths)
        for path in paths:
            _write(scene, path, "mine")
        promise(unsure=[], own=dict.fromkeys(paths, "mine"))
        try:
            store.switch(txn)
        except PatchRefusedError:
            store.abort(txn)
        else:
            raise AssertionError("it was not refused")


def play_deleting_patch(scene: Scene) -> None:
    """The generation it makes of an overlay is an empty folder."""
    with closing(scene.open()) as store, scene.package(FEWER, after=100) as patch:
        promise(pinned=True)
        txn = stage(store, patch, *scene.names)
        switch_and_commit(store, txn, 100, FEWER)


def play_undone_patch(scene: Scene) -> None:
    """Taken back while it is on probation, with what the program has written meanwhile."""
    with closing(scene.open()) as store, scene.package(300, after=200) as patch:
        txn = stage(store, patch, *scene.names)
        promise(seen=[200, 300])
        store.switch(txn)
        promise(seen=[300])
        save(scene, "late/night.log", "written on probation")
        save_over(scene, 300, "rules/more.json", "written into what the patch has brought")
        promise(seen=[200, 300])
        store.switch_back(txn)
        promise(seen=[200])
        store.abort(txn, "it was not meant to be")
        store.finish(txn, verdict="rolled_back", code="patch.probation_failed")
        promise(verdicts={txn: ["rolled_back", "patch.probation_failed"]})
        store.hold(patch.id, "it was not meant to be")
        promise(held={patch.id: True})
        promise(held={patch.id: None})
        store.unhold(patch.id)
        promise(held={patch.id: False})


def play_left_patch(scene: Scene) -> None:
    """Taken back while what the program has written meanwhile cannot be carried back."""
    with closing(scene.open()) as store, scene.package(300, after=200) as patch:
        txn = stage(store, patch, *scene.names)
        promise(seen=[200, 300])
        store.switch(txn)
        promise(seen=[300])
        text = "written on probation"
        save(scene, "late/night.log", text)
        promise(seen=[200, 300], unsure=["late/night.log"], treasures=[text])
        with mock.patch.object(TreeFiles, "carry_back", side_effect=OSError(errno.EIO, "it cannot be read")):
            store.switch_back(txn)
        promise(seen=[200])
        store.abort(txn, "it was not meant to be")
        store.finish(txn, verdict="rolled_back", code="patch.probation_failed")
        promise(verdicts={txn: ["rolled_back", "patch.probation_failed"]})


def play_late_patch(scene: Scene) -> None:
    """The program of a tree saves and removes files between the carry and the switch; and before that it has
    replaced a persistent one."""
    gone, night = "gone/gone.log", "late/night.log"
    with closing(scene.open()) as store, scene.package(300, after=200) as patch:
        save(scene, gone, "to be removed in the very last moment")
        txn = stage(store, patch, *scene.names)
        replace_file(scene, PERSISTENT_FILE, "persistent, and another file")
        for name in scene.names:
            store.carry(txn, name)
        save(scene, night, "written in the very last moment")
        promise(unsure=[gone, night])
        remove(scene, gone)
        promise(seen=[200, 300])
        store.switch(txn)
        promise(seen=[300], kept=[200, 300], unsure=[], own={gone: None})
        store.commit(txn)
        promise(kept=[300], verdicts={txn: ["committed", None]})
        store.finish(txn, verdict="committed")


def play_overwriting_patch(scene: Scene) -> None:
    """The program has removed one file that a patch has brought, and written into another; the next patch
    replaces the first, and deletes the second all the same."""
    taken, written = "app.json", "extra/deep/new.json"
    promise(unsure=[taken])
    remove(scene, taken)
    promise(unsure=[], altered={200: {taken: None}})
    promise(unsure=[written])
    text = "written into what the patch has brought"
    _write(scene, written, text)
    promise(unsure=[], altered={200: {taken: None, written: text}}, treasures=[text])
    with closing(scene.open()) as store, scene.package(300, after=200) as patch:
        txn = stage(store, patch, *scene.names, policy="overwrite")
        switch_and_commit(store, txn, 200, 300)


def play_undecided_patch(scene: Scene) -> None:
    """From the switch on it waits for somebody's decision, which is to keep it."""
    with closing(scene.open()) as store, scene.package(300, after=200) as patch:
        txn = stage(store, patch, *scene.names, by_hand=True)
        promise(seen=[200, 300], kept=[200, 300], undecided=[txn])
        store.switch(txn)
        promise(seen=[300], kept=[300])
        store.leave_undecided(txn, error="one did not answer", code="patch.undecided")
        promise(verdicts={txn: ["undecided", "patch.undecided"]})
        promise(verdicts={txn: None})
        store.commit(txn)
        promise(undecided=[])
        store.finish(txn, verdict="committed")
        # Why somebody had to decide stays in the history.
        promise(verdicts={txn: ["committed", "patch.undecided"]})


def play_rollback(scene: Scene) -> None:
    with closing(scene.open()) as store:
        for old, new in ((300, 200), (200, 100)):
            txn = store.begin(action="rollback", patch=None, targets=scene.names, asked_by="test")
            promise(begun=[txn])
            for name in scene.names:
                generation = store.preview.rollback_target(name)
                assert generation is not None
                store.stage_rollback(txn, name, generation)
            switch_and_commit(store, txn, old, new)


def play_keeping_rollback(scene: Scene) -> None:
    """The program has written into a file that the patch has brought, and it is to stay as it is."""
    path, text = "rules/eu.json", "written into what the patch has brought"
    with closing(scene.open()) as store:
        save_over(scene, 300, path, text)
        txn = store.begin(action="rollback", patch=None, targets=scene.names, asked_by="test")
        promise(begun=[txn])
        for name in scene.names:
            generation = store.preview.rollback_target(name)
            assert generation is not None
            store.stage_rollback(txn, name, generation, policy="keep")
        promise(altered={200: {path: text}})
        switch_and_commit(store, txn, 300, 200)


def play_release(scene: Scene) -> None:
    with closing(scene.open()) as store:
        for name in scene.names:
            store.release(name)
            promise(released=[name])


def play_words(scene: Scene) -> None:
    """What is asked for and told, and changes no file."""
    with closing(scene.open()) as store:
        store.set_scaled("over", configured=1, instances=3)
        promise(scaled={"over": 3})
        store.set_wanted("over", False)
        promise(wanted={"over": False})
        txn = store.write_down_attempt(
            action="apply",
            patch={"name": "not for here"},
            targets=scene.names,
            asked_by="test",
            verdict="refused",
            error="it is for another region",
            code="gate.region",
            request={},
        )
        promise(begun=[txn], verdicts={txn: ["refused", "gate.region"]})
        store.trust_clock(by={"name": "test"})
        promise(noted=["clock.trusted"])
        for ask in (
            lambda: store.history.head().hash,
            lambda: store.history.records(limit=1)[-1].hash,
            lambda: store.history.examine().to_json()["head"]["hash"],
            lambda: store.history.transaction(txn)["audit"]["hash"],
        ):
            store.note("test.asked", txn=txn)
            promise(anchors=[ask()])


def play_recovery(scene: Scene) -> None:
    with closing(scene.open()):
        mark("recovered")


@dataclass(frozen=True)
class Play:
    """Something that is done to a store, whose files are of build `at` before.

    Attributes:
        bulk: with more files than are synced one by one.
        elsewhere: as if the roots were on another file system than the store. No hard link is possible, and
            the how-manieth swap it is that is not, since it would move the root of the tree.
    """

    name: str
    before: Callable[[Scene], None]
    act: Callable[[Scene], None]
    at: int
    bulk: bool = False
    elsewhere: int = 0

    def __str__(self) -> str:
        return self.name


PLAYS: Final = (
    Play("first patch", fresh, play_first_patch, 100),
    Play("third patch", patched_twice, play_third_patch, 300),
    Play("undone patch", patched, play_undone_patch, 200),
    Play("refused patch", patched, play_refused_patch, 200),
    Play("left patch", patched, play_left_patch, 200),
    Play("late patch", patched, play_late_patch, 200),
    Play("overwriting patch", patched, play_overwriting_patch, 200),
    Play("undecided patch", patched, play_undecided_patch, 200),
    Play("refused patch, of other file systems", patched, play_refused_patch, 200, elsewhere=NEVER),
    Play("keeping rollback", patched_twice, play_keeping_rollback, 300),
    Play("rollback", patched_twice, play_rollback, 300),
    Play("release", patched, play_release, 200),
    Play("words", patched, play_words, 200),
    Play("first patch, in bulk", fresh, play_first_patch, 100, bulk=True),
    Play("release, in bulk", patched, play_release, 200, bulk=True),
    Play("first patch, of other file systems", untouched, play_first_patch_elsewhere, 100, elsewhere=3),
    Play(
        "first patch, of other file systems, in bulk",
        untouched,
        play_first_patch_elsewhere,
        100,
        bulk=True,
        elsewhere=3 + BULK,
    ),
    Play("release, to other file systems", patched, play_release, 200, elsewhere=5),
    Play(
        "refused patch of many, of other file systems",
        patched,
        play_refused_patch_of_many,
        200,
        elsewhere=NEVER,
    ),
    Play("deleting patch", untouched, play_deleting_patch, 100),
)
