"""Files that are not what a patch was made for: what each policy does, and that nothing is lost by it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from store_kit import (
    FILES,
    Bench,
    Tree,
    apply,
    begin,
    benches,
    leftovers,
    refused_at_staging,
    roll_back,
    seen,
    staged,
    write_tree,
)

from asyncsup import failpoints
from asyncsup.errors import PatchRefusedError
from asyncsup.patch.doctor import diagnose
from asyncsup.patch.facts import Layout
from asyncsup.patch.package import Package
from asyncsup.patch.plan import Policy
from target_sdk.snapshot import Snapshot

both_layouts = pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.value) for layout in Layout])
PATH = "app.json"
MINE = b"written by a person"
ELSE = hashlib.sha256(b"something else").hexdigest()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


# --- what there is to find ----------------------------------------------------------------------------------


def delivered(b: Bench) -> None:
    apply(b.store, b.patch(300, modified={PATH: b"two"}))


def written_through(b: Bench) -> None:
    delivered(b)
    (b.root / PATH).resolve().chmod(0o644)
    b.put(PATH, MINE)


def replaced(b: Bench) -> None:
    delivered(b)
    b.put("saved.tmp", MINE)
    (b.root / "saved.tmp").replace(b.root / PATH)


def removed(b: Bench) -> None:
    delivered(b)
    (b.root / PATH).unlink()


def written_before(b: Bench) -> None:
    b.put(PATH, MINE)


def never_there(b: Bench) -> None:
    (b.root / PATH).unlink()


def taken_by_a_link(b: Bench) -> None:
    delivered(b)
    (b.root / PATH).unlink()
    (b.root / PATH).symlink_to("run.sh")


@dataclass(frozen=True)
class Situation:
    """How a file got to be what it is, what patches find wrong with it, and whether content could be lost."""

    prepare: Callable[[Bench], None]
    op: str
    code: str
    mine: bool
    options: dict[str, Any]

    def patch(self, b: Bench, build: int = 400) -> Package:
        """One that names the file, and another one with which all is well."""
        changes: dict[str, Any] = {"modified": {"rules/eu.json": b"new"}}
        if self.op == "deleted":
            changes["deleted"] = [PATH]
        else:
            changes[self.op] = {**changes.get(self.op, {}), PATH: b"%d" % build}
        return b.patch(build, **changes, options={PATH: self.options})

    def after(self, before: Tree, build: int = 400) -> Tree:
        """The files once the patch has its way."""
        files = {path: content for path, content in before.items() if path != PATH}
        new = {} if self.op == "deleted" else {PATH: b"%d" % build}
        return {**files, "rules/eu.json": b"new", **new}


SITUATIONS = {
    "written-through": Situation(written_through, "modified", "gate.drift", True, {}),
    "written-through-deleted": Situation(written_through, "deleted", "gate.drift", True, {}),
    "replaced": Situation(replaced, "modified", "gate.detached", True, {}),
    "replaced-deleted": Situation(replaced, "deleted", "gate.detached", True, {}),
    "removed": Situation(removed, "modified", "gate.detached", False, {}),
    "removed-deleted": Situation(removed, "deleted", "gate.detached", False, {}),
    "other-base": Situation(written_before, "modified", "gate.base", True, {"base_sha256": ELSE}),
    "other-base-deleted": Situation(written_before, "deleted", "gate.base", True, {"base_sha256": ELSE}),
    "other-base-of-a-patch": Situation(delivered, "modified", "gate.base", False, {"base_sha256": ELSE}),
    "exists": Situation(written_before, "new", "gate.conflict", True, {}),
    "absent": Situation(never_there, "modified", "gate.conflict", False, {}),
    "absent-deleted": Situation(never_there, "deleted", "gate.conflict", False, {}),
}
every_situation = pytest.mark.parametrize(
    "case", [pytest.param(s, id=name) for name, s in SITUATIONS.items()]
)


def code_of(layout: Layout, case: Situation) -> str:
    """In a tree, a file that was replaced is one that was changed: there is no link to miss."""
    return "gate.drift" if layout is Layout.TREE and case.prepare is replaced else case.code


def stage(b: Bench, patch: Package, policy: Policy) -> int:
    txn = begin(b.store, patch)
    b.store.stage(txn, "web", patch, policy=policy)
    return txn


def carry_through(b: Bench, txn: int) -> None:
    b.store.switch(txn)
    b.store.commit(txn)
    b.store.finish(txn, verdict="committed")


def drifted(b: Bench) -> list[str]:
    return [plan.path for plan in b.store.preview.drifted("web")]


def snapshot(b: Bench) -> bytes | None:
    """What a program with the SDK reads."""
    with Snapshot(root=b.root, current=b.store.current_link("web")) as files:
        return files.read_bytes(PATH) if files.exists(PATH) else None


# --- the policies -------------------------------------------------------------------------------------------


@both_layouts
@every_situation
def test_refuse_names_the_file_and_what_would_do(
    layout: Layout, case: Situation, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    case.prepare(b)
    (plan,) = [plan for plan in b.store.preview.plan("web", case.patch(b).manifest) if plan.path == PATH]
    assert (plan.code, plan.decision) == (code_of(layout, case), "refuse")
    error = refused_at_staging(b, case.patch(b))
    assert error.error_code == code_of(layout, case)
    assert f"web: {PATH} " in error.message
    assert "`--drift keep` leaves such a file as it is, `--drift overwrite` replaces it" in error.message


@both_layouts
@every_situation
def test_keep_applies_the_patch_as_if_it_did_not_name_the_file(
    layout: Layout, case: Situation, bench: Callable[..., Bench]
) -> None:
    b = bench(layout, build=200)
    case.prepare(b)
    before, drift = seen(b.root), drifted(b)
    patch = case.patch(b)
    b.store.abort(stage(b, patch, "keep"))
    assert (seen(b.root), drifted(b), leftovers(b.root)) == (before, drift, [])
    txn = stage(b, patch, "keep")
    carry_through(b, txn)
    after = {**before, "rules/eu.json": b"new"}
    assert (b.store.state("web").build, seen(b.root)) == (400, after)
    assert snapshot(b) == before.get(PATH)
    # It is remembered, and said by everybody who is asked.
    assert drifted(b) == [PATH]
    (shown,) = [file for file in b.store.history.transaction(txn)["files"] if file["path"] == PATH]
    assert shown["op"] == "keep"
    b.reopen()
    assert (seen(b.root), drifted(b)) == (after, [PATH])
    # The next patch finds it as well, and by default refuses.
    later = Situation(case.prepare, "modified", "", case.mine, {"missing_ok": True})
    assert refused_at_staging(b, later.patch(b, 500)).error_code in {"gate.drift", "gate.detached"}
    # A rollback leads exactly to what was there before, and forgets nothing.
    roll_back(b.store)
    assert (seen(b.root), drifted(b)) == (before, drift)
    assert leftovers(b.root) == []


@both_layouts
@every_situation
def test_overwrite_takes_the_patch_and_saves_what_was_there(
    layout: Layout, case: Situation, bench: Callable[..., Bench]
) -> None:
    b = bench(layout, build=200)
    case.prepare(b)
    before = seen(b.root)
    patch = case.patch(b)
    txn = stage(b, patch, "overwrite")
    assert seen(b.root) == before  # Nobody sees what is staged.
    b.store.abort(txn)
    assert (seen(b.root), leftovers(b.root)) == (before, [])
    assert not list((b.base / "state/saved").rglob(PATH))
    # A failed attempt is no permission: by default it is refused as before.
    assert refused_at_staging(b, case.patch(b, 401)).error_code in {code_of(layout, case), "gate.drift"}

    txn = stage(b, patch, "overwrite")
    carry_through(b, txn)
    assert (b.store.state("web").build, seen(b.root)) == (400, case.after(before))
    assert snapshot(b) == case.after(before).get(PATH)
    assert (drifted(b), leftovers(b.root)) == ([], [])
    (shown,) = [file for file in b.store.history.transaction(txn)["files"] if file["path"] == PATH]
    saved = b.base / f"state/saved/web/{txn}" / PATH
    assert saved.exists() == case.mine
    if case.mine:
        assert saved.read_bytes() == before[PATH]
        assert str(saved) in shown["note"]
    b.reopen()
    assert seen(b.root) == case.after(before)
    # A rollback leads exactly to what was there before; the copy stays all the same.
    roll_back(b.store)
    assert (seen(b.root), leftovers(b.root)) == (before, [])
    assert saved.exists() == case.mine
    assert snapshot(b) == before.get(PATH)
    # And what was found there is found again: the next patch is no silent one.
    assert refused_at_staging(b, case.patch(b, 402)).error_code in {code_of(layout, case), "gate.drift"}
    b.reopen()
    assert seen(b.root) == before


@both_layouts
@pytest.mark.parametrize("policy", ["refuse", "keep", "overwrite"])
def test_what_is_no_file_is_kept_or_refused_and_never_overwritten(
    layout: Layout, policy: Policy, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    taken_by_a_link(b)
    patch = b.patch(400, modified={PATH: b"400", "rules/eu.json": b"new"})
    if policy == "keep":
        carry_through(b, stage(b, patch, policy))
        assert str((b.root / PATH).readlink()) == "run.sh"
        assert seen(b.root)["rules/eu.json"] == b"new"
        assert drifted(b) == [PATH]
        roll_back(b.store)
    else:
        txn = begin(b.store, patch)
        with pytest.raises(PatchRefusedError, match="is a symbolic link") as caught:
            b.store.stage(txn, "web", patch, policy=policy)
        assert caught.value.error_code == "gate.conflict"
        assert "--drift overwrite" not in caught.value.message
        b.store.abort(txn)
    assert str((b.root / PATH).readlink()) == "run.sh"
    assert seen(b.root)["rules/eu.json"] == b"eu"


# --- one after the other ------------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("how", [written_through, replaced], ids=["written-through", "replaced"])
def test_a_file_is_kept_through_patches_and_rollbacks_until_one_overwrites_it(
    layout: Layout, how: Callable[[Bench], None], bench: Callable[..., Bench]
) -> None:
    b = bench(layout, build=200)
    apply(b.store, b.patch(250, modified={PATH: b"one and a half"}))
    how(b)
    for build in (400, 401):
        patch = b.patch(build, modified={PATH: b"%d" % build, "rules/eu.json": b"%d" % build})
        carry_through(b, stage(b, patch, "keep"))
    apply(b.store, b.patch(402, modified={"rules/us.json": b"402"}))  # It does not name it.
    kept = {**FILES, PATH: MINE, "rules/eu.json": b"401", "rules/us.json": b"402"}
    assert (seen(b.root), drifted(b)) == (kept, [PATH])
    txn = stage(b, b.patch(403, modified={PATH: b"403"}), "overwrite")
    assert seen(b.root) == kept
    carry_through(b, txn)
    assert (seen(b.root), drifted(b)) == ({**kept, PATH: b"403"}, [])
    assert (b.base / f"state/saved/web/{txn}" / PATH).read_bytes() == MINE
    # All the way back through the patches that had left it alone it is there.
    eu = {402: b"401", 401: b"401", 400: b"400", 300: b"eu"}
    for build in (402, 401, 400, 300):
        roll_back(b.store)
        files = seen(b.root)
        assert (b.store.state("web").build, files[PATH], files["rules/eu.json"]) == (build, MINE, eu[build])
        assert drifted(b) == [PATH]
    # The patch that had delivered it is another matter.
    txn = b.store.begin(action="rollback", patch=None, targets=["web"], asked_by="test")
    with pytest.raises(PatchRefusedError) as caught:
        b.store.stage_rollback(txn, "web", 1)
    assert caught.value.error_code in {"gate.drift", "gate.detached"}
    b.store.abort(txn)
    assert seen(b.root)[PATH] == MINE


ROLLED_BACK = {
    "written-through": written_through,
    "replaced": replaced,
    "removed": removed,
}


@both_layouts
@pytest.mark.parametrize("how", ROLLED_BACK.values(), ids=list(ROLLED_BACK))
@pytest.mark.parametrize("policy", ["refuse", "keep", "overwrite"])
def test_a_rollback_asks_for_permission_as_well(
    layout: Layout, how: Callable[[Bench], None], policy: Policy, bench: Callable[..., Bench]
) -> None:
    b = bench(layout, build=200)
    apply(b.store, b.patch(250, modified={PATH: b"one and a half", "rules/us.json": b"250"}))
    how(b)
    before = seen(b.root)
    apply(b.store, b.patch(350, modified={"rules/us.json": b"350"}))
    roll_back(b.store)  # It does not concern this one.
    assert seen(b.root) == before

    def back(goal: int) -> int:
        txn = b.store.begin(action="rollback", patch=None, targets=["web"], asked_by="test")
        b.store.stage_rollback(txn, "web", goal, policy=policy)
        assert seen(b.root) == before
        return txn

    if policy == "refuse":
        with pytest.raises(PatchRefusedError, match=PATH):
            back(1)
        b.store.abort(b.store.history.latest(limit=1)[0]["txn"])
        assert (seen(b.root), drifted(b)) == (before, [PATH])
        return
    b.store.abort(back(1))
    assert (seen(b.root), leftovers(b.root)) == (before, [])
    assert b.store.state("web").build == 300
    txn = back(1)
    carry_through(b, txn)
    assert b.store.state("web").build == 250
    saved = b.base / f"state/saved/web/{txn}" / PATH
    if policy == "overwrite":
        assert seen(b.root) == {**before, PATH: b"one and a half"}
        assert saved.exists() == (how is not removed)
        assert drifted(b) == []
    else:
        assert seen(b.root) == before
        assert drifted(b) == [PATH]
        assert snapshot(b) == before.get(PATH)
    assert leftovers(b.root) == []
    b.reopen()
    b.store.prune("web", 1)
    # And once more, to before any patch.
    txn = b.store.begin(action="rollback", patch=None, targets=["web"], asked_by="test")
    goal = b.store.preview.rollback_target("web")
    assert goal == 0
    b.store.stage_rollback(txn, "web", goal, policy=policy)
    carry_through(b, txn)
    assert b.store.state("web").build == 200
    kept = before if policy == "keep" else {**before, PATH: FILES[PATH]}
    assert seen(b.root) == {**kept, "rules/us.json": b"us"}
    assert leftovers(b.root) == []


@both_layouts
def test_a_file_that_a_patch_had_deleted_and_somebody_made_again_is_in_the_way_of_a_rollback(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout, build=200)
    apply(b.store, b.patch(300, deleted=[PATH], modified={"rules/eu.json": b"300"}))
    b.put(PATH, MINE)
    for policy, content in (("overwrite", b"one"), ("keep", MINE)):
        txn = b.store.begin(action="rollback", patch=None, targets=["web"], asked_by="test")
        with pytest.raises(PatchRefusedError, match=r"exists already|was put there by somebody"):
            b.store.stage_rollback(txn, "web", 0)
        b.store.abort(txn)
        txn = b.store.begin(action="rollback", patch=None, targets=["web"], asked_by="test")
        b.store.stage_rollback(txn, "web", 0, policy=policy)  # type: ignore[arg-type]
        assert seen(b.root)[PATH] == MINE
        b.store.switch(txn)
        assert seen(b.root) == {**FILES, PATH: content}
        b.store.switch_back(txn)
        b.store.abort(txn)
        assert seen(b.root) == {**FILES, PATH: MINE, "rules/eu.json": b"300"}
        assert leftovers(b.root) == []


# --- what is no drift ---------------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("how", [written_through, replaced, written_before])
@pytest.mark.parametrize(
    ("content", "options"),
    [
        pytest.param(MINE, {}, id="the-same"),
        pytest.param(b"built upon it", {"base_sha256": hashlib.sha256(MINE).hexdigest()}, id="made-for-it"),
    ],
)
def test_what_a_patch_was_made_for_or_would_make_anyway_is_no_drift(
    layout: Layout,
    how: Callable[[Bench], None],
    content: bytes,
    options: dict[str, Any],
    bench: Callable[..., Bench],
) -> None:
    b = bench(layout)
    how(b)
    patch = b.patch(400, modified={PATH: content}, options={PATH: options})
    (plan,) = [plan for plan in b.store.preview.plan("web", patch.manifest) if plan.path == PATH]
    assert (plan.error, plan.drift, plan.decision) == (None, None, None)
    apply(b.store, patch)
    assert (seen(b.root)[PATH], drifted(b)) == (content, [])
    roll_back(b.store)
    assert seen(b.root)[PATH] == MINE


@both_layouts
@pytest.mark.parametrize("how", [written_through, replaced, removed])
@pytest.mark.parametrize("crashed", [False, True])
def test_what_was_overwritten_is_no_damage_of_the_generations_behind(
    layout: Layout,
    how: Callable[[Bench], None],
    crashed: bool,
    bench: Callable[..., Bench],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b = bench(layout)
    how(b)
    apply(b.store, b.patch(310, modified={"run.sh": b"#"}))  # Two generations have what somebody has done.
    before, generation = seen(b.root), b.store.state("web").generation
    txn = stage(b, b.patch(400, new={PATH: b"400"}, options={PATH: {"replace": True}}), "overwrite")
    if crashed:
        # What is left to be done after the confirmation is done by recovery.
        monkeypatch.setenv(failpoints.VARIABLE, "store.commit.recorded:error")
    carry_through(b, txn)
    monkeypatch.delenv(failpoints.VARIABLE, raising=False)
    b.reopen()
    assert [problem.code for problem in diagnose(b.base / "state").problems] == []
    roll_back(b.store)
    assert (b.store.state("web").generation, seen(b.root)) == (generation, before)
    assert drifted(b) == [PATH]
    code = refused_at_staging(b, b.patch(401, modified={PATH: b"401"})).error_code
    assert code in {"gate.drift", "gate.detached"}


# --- what is written meanwhile ------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("how", [written_through, replaced, written_before])
def test_what_is_written_after_the_copy_was_made_is_not_overwritten(
    layout: Layout, how: Callable[[Bench], None], bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    how(b)
    options = {PATH: {"replace": True}}
    txn = stage(b, b.patch(400, new={PATH: b"400"}, options=options), "overwrite")
    b.put(PATH, b"and once more")
    wanted = seen(b.root)
    with pytest.raises(PatchRefusedError) as caught:
        b.store.switch(txn)
    assert caught.value.error_code == "gate.drift"
    b.store.abort(txn)
    assert (seen(b.root), leftovers(b.root)) == (wanted, [])


@both_layouts
@pytest.mark.parametrize("ends", ["undone", "refused", "crashed"])
def test_writing_to_a_file_of_ones_own_while_a_patch_comes_to_nothing_is_no_drift(
    layout: Layout, ends: str, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    txn = staged(b.store, b.patch(300, modified={PATH: b"two"}))
    b.put(PATH, MINE)
    if ends == "refused":
        with pytest.raises(PatchRefusedError):
            b.store.switch(txn)
    if ends == "crashed":
        b.reopen()
    else:
        b.store.finish(txn, verdict="rolled_back")
    assert seen(b.root) == {**FILES, PATH: MINE}
    assert b.store.preview.drifted("web") == []
    apply(b.store, b.patch(301, modified={PATH: b"three"}))
    assert seen(b.root)[PATH] == b"three"


@both_layouts
def test_what_is_written_during_probation_is_rescued_when_the_patch_is_undone(
    layout: Layout, bench: Callable[..., Bench]
) -> None:
    b = bench(layout)
    patch = b.patch(300, modified={PATH: b"two", "run.sh": b"#"}, new={"n/new.json": b"n"})
    txn = stage(b, patch, "refuse")
    b.store.switch(txn)
    for path in (PATH, "n/new.json"):
        (b.root / path).resolve().chmod(0o644)
        b.put(path, MINE)
    os.utime((b.root / "run.sh").resolve(), (1, 1))  # Touched, not written.
    b.store.switch_back(txn)
    b.store.abort(txn)
    assert seen(b.root) == FILES
    rescued = b.base / f"state/saved/web/{txn}-undone"
    assert seen(rescued) == {PATH: MINE, "n/new.json": MINE}
    steps = [step["detail"] for step in b.store.history.transaction(txn)["steps"] if step["step"] == "rescue"]
    assert steps == [f"{path} was written to: {rescued / path}" for path in (PATH, "n/new.json")]
    assert stat.S_IMODE((b.base / "state/saved").stat().st_mode) == 0o700


@both_layouts
def test_a_release_gives_up_what_was_kept_as_well(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    replaced(b)
    carry_through(b, stage(b, b.patch(400, modified={PATH: b"400", "run.sh": b"#"}), "keep"))
    before = seen(b.root)
    b.store.release("web")
    assert (seen(b.root), drifted(b)) == (before, [])
    apply(b.store, b.patch(401, modified={PATH: b"401"}))
    assert seen(b.root) == {**before, PATH: b"401"}


def test_mode_and_owner_of_a_kept_file_stay_and_a_copy_has_them(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    b = bench(Layout.OVERLAY)
    replaced(b)
    (b.root / PATH).chmod(0o640)
    write_tree(tmp_path, {"x": b""})
    txn = stage(b, b.patch(400, modified={PATH: b"400"}), "overwrite")
    carry_through(b, txn)
    assert stat.S_IMODE((b.base / f"state/saved/web/{txn}" / PATH).stat().st_mode) == 0o640
    assert stat.S_IMODE((b.root / PATH).stat().st_mode) == 0o440
    roll_back(b.store)
    assert stat.S_IMODE((b.root / PATH).stat().st_mode) == 0o640
