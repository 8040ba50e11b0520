"""No sync of the store can be left out: without any one of them there is a moment at which the power may go,
and a part of the unsynced that may be lost then, after which some promise is broken.

Nothing is played for that a second time: a sync is left out of the recording, and what it was for is lost
(`LeftOut`). A sync without which nothing is found needs a reason in `EXEMPT`, and one with a reason
must be as good as it says. ``ASYNCSUP_TESTS=all`` looks further before it believes a reason.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest
from chance import EVERYTHING, dice
from power_kit import LeftOut, Recording, Search, record
from power_model import LINK, Names, Sync
from power_plays import PLAYS, Scene
from store_kit import memory_folder
from sync_sites import recorded_syncs, sync_sites, syncs_of
from told import Tell
from traced import require_strace

from asyncsup.patch.look import TEMPORARY_PREFIX

pytestmark = pytest.mark.timeout(900)


SEARCHES: Final = (Search(15, 0), Search(15, 3), Search(60, 10), Search(None, 40))
"""One after the other, each in all recordings in which the sync is, the short ones first."""

SEARCHES_FOR_EXEMPT: Final = SEARCHES if EVERYTHING else SEARCHES[:2]

SITES: Final = sync_sites()

ADOPTION: Final = re.escape(TEMPORARY_PREFIX) + r"\d+-\d+"
"""The names used while files are adopted."""

SHOWN_BY: Final[Mapping[str, str]] = {
    "overlay.OverlayRoot.bring_home: durability.barrier()": "refused patch of many, of other file systems",
    "overlay.OverlayRoot.unlink: durability.directory(folder)": "refused patch",
    "overlay_files.OverlayFiles._make_ordinary: durability.barrier()": "release, in bulk",
    "overlay_files.OverlayFiles.remove_names: durability.barrier()": "undone patch",
    "overlay_files.OverlayFiles.tidy: durability.barrier()": "rollback",
    "store.Store._confirm: self._database.write()": "rollback",
    "store.Store._set_releasing: self._database.write()": "release",
    "store.Store.begin: self._database.write()": "keeping rollback",
    "store.Store.finish: self._database.write()": "left patch",
    "target_files.TargetFiles.stage: self.database.write()": "overwriting patch",
    "target_files.TargetFiles.place: durability.directory(folder)": "deleting patch",
    "target_files.TargetFiles.place: self.database.write()": "third patch",
    "target_files.TargetFiles._save: durability.barrier()": "overwriting patch",
    "target_files.TargetFiles._copy_out: durability.directory(there)": "overwriting patch",
    "target_files.TargetFiles._rescue: durability.barrier()": "undone patch",
    "target_files.TargetFiles.stage_rollback: self.database.write()": "rollback",
    "tree.TreeRoot.swap_for_link: os.fsync(parent) (2)": "first patch, of other file systems",
    "tree.TreeRoot.move_out: os.fsync(inner)": "release",
    "tree.TreeRoot.move_persistent_in: durability.directory(home)": "release",
    "tree_files.TreeFiles._copy_in: durability.barrier()": "first patch, of other file systems",
}
"""The plays in which some of them show soonest; they are looked at first."""

EXEMPT: Final[Mapping[str, str]] = {
    "statedir.StateDirectory.move_to_saved: os.fsync(there)": (
        "`forget_saved` syncs the same folder right after it; until then the patch is not undone."
    ),
    "statedir.StateDirectory.move_to_saved: os.fsync(home)": (
        "A move is one step in the model. Where it is not, the old name could come back beside the new one."
    ),
    "tree.TreeRoot.settle_persistent: os.fsync(home)": (
        "What is lost of it is settled again at the next start. That the file's new name is on disk before "
        "the old one goes matters where a move is not one step."
    ),
    "tree.TreeRoot.settle_persistent: os.fsync(folder)": (
        "What is lost of it is settled again at the next start."
    ),
    "tree.TreeRoot._take_newer: durability.directory(folder)": (
        "Without the link the program finds the same file by its other name, and the next carry makes the "
        "link anew. It is for a program that follows the link itself, and replaces the file it leads to."
    ),
    "tree.TreeRoot.move_persistent_in: durability.directory(folder)": (
        "The swap is of two folders, and is as durable as the removal of the name in the other that comes "
        "after it. A file system may keep the two apart."
    ),
}
"""Syncs without which no state is found in which something is wrong, and why they are there all the same."""


@pytest.fixture(autouse=True, scope="module")
def strace() -> None:
    require_strace()


# --- what is recorded ---------------------------------------------------------------------------------------


def all_recordings(base: Path) -> dict[str, Recording]:
    """Every play, and recoveries that have something to sync which a play has not; the short ones first."""
    found = {play.name: record(Scene.of(play, base / str(n)), play) for n, play in enumerate(PLAYS)}
    adopting, pruning, late = found["first patch"], found["third patch"], found["late patch"]
    (recorded,) = [site for site in SITES if site.function == "_record_pruned"]
    # An adopted file, or a persistent one, has been swapped, and what came out of it is still there.
    found["adoption, cut off"] = adopting.killed(removal(adopting, ADOPTION))
    found["carry, cut off"] = late.killed(removal(late, re.escape(TEMPORARY_PREFIX) + r"moved-.*"))
    # A kept file has been copied, and is not in its place yet.
    keeping = found["keeping rollback"]
    found["keeping, cut off"] = keeping.killed(swap(keeping, re.escape(TEMPORARY_PREFIX) + r"released-.*"))
    # What is to be overwritten has been copied, and is not overwritten.
    overwriting = found["overwriting patch"]
    found["overwriting, cut off"] = overwriting.killed(begins_to_switch(overwriting))
    # It is written that a generation is to go, but not synced.
    found["pruning, cut off"] = pruning.killed(
        syncs_of(recorded, recorded_syncs(pruning.history.operations))[0]
    )
    return dict(sorted(found.items(), key=lambda item: len(item[1].history.operations) - item[1].first))


def removal(recording: Recording, name: str) -> int:
    """The first operation that removes a file, not a link, of such a name."""
    for number, operation in enumerate(recording.history.operations):
        if isinstance(operation, Names) and len(operation.changes) == 1:
            ((_, removed, before, after),) = operation.changes
            was_file = before is not None and recording.history.start.nodes[before].type != LINK
            if after is None and was_file and re.fullmatch(name, removed):
                return number
    raise AssertionError(f"nothing is called {name}")


def swap(recording: Recording, name: str) -> int:
    """The first operation that swaps such a name with another."""
    return next(
        number
        for number, operation in enumerate(recording.history.operations)
        if isinstance(operation, Names)
        and len(operation.changes) == 2
        and any(re.fullmatch(name, changed) for _, changed, _, _ in operation.changes)
    )


def begins_to_switch(recording: Recording) -> int:
    return next(number for number, each in enumerate(recording.promises) if len(each.seen) > 1)


# --- what is left out ---------------------------------------------------------------------------------------


def syncs_by_site(recordings: Mapping[str, Recording]) -> dict[str, dict[str, list[int]]]:
    """The numbers of the syncs that would be missing without each site, by recording.

    Raises:
        AssertionError: the store has synced something on behalf of none of its sites.
    """
    found: dict[str, dict[str, list[int]]] = {str(site): {} for site in SITES}
    for name, recording in recordings.items():
        known: set[int] = set()
        syncs = recorded_syncs(recording.history.operations)
        for site in SITES:
            numbers = syncs_of(site, syncs)
            if numbers:
                found[str(site)][name] = numbers
                known.update(numbers)
        for number, operation in enumerate(recording.history.operations):
            if isinstance(operation, Sync) and number not in known:
                where = "everything" if operation.node is None else recording.history.path_of(operation.node)
                # Programs, and SQLite when it begins and ends, sync data alone.
                assert operation.data_only, f"{name}: nobody's sync of {where}"
    return found


def looked_for(
    what: str, syncs: Mapping[str, Sequence[int]], recordings: Mapping[str, Recording]
) -> str | None:
    """What goes wrong without these syncs; None if nothing that was looked at does."""
    random = dice(what)
    left_out = functools.cache(lambda name: LeftOut(recordings[name], syncs[name]))
    soonest = [name for name in syncs if name == SHOWN_BY.get(what)]
    for names in (soonest, list(syncs)):
        for search in SEARCHES_FOR_EXEMPT if what in EXEMPT else SEARCHES:
            for name in names:
                broken = left_out(name).what_goes_wrong(random, search)
                if broken is not None:
                    return str(broken)
    return None


def test_no_sync_can_be_left_out(tell: Tell) -> None:
    assert len(SITES) > 60
    assert {*EXEMPT, *SHOWN_BY} <= set(map(str, SITES)), "a word about what is not there"
    amiss: list[str] = []
    count = {"needed": 0, "exempt": 0}
    with memory_folder() as base:
        recordings = all_recordings(base)
        for what, syncs in syncs_by_site(recordings).items():
            wrong = looked_for(what, syncs, recordings)
            count["exempt" if wrong is None else "needed"] += 1
            if not syncs:
                amiss.append(f"{what}: no play comes to it")
            elif wrong is None and what not in EXEMPT:
                amiss.append(f"{what}: nothing is wrong without it")
            elif wrong is not None and what in EXEMPT:
                amiss.append(f"{what}: it is needed after all: {wrong}")
    tell(", ".join(f"{number} {what}" for what, number in count.items()))
    assert not amiss, "\n".join(amiss)


def test_what_is_removed_right_before_a_kill_is_gone_for_good() -> None:
    """Recovery does not find it any more, and has it synced all the same."""
    play = PLAYS[0]
    with memory_folder() as base:
        recording = record(Scene.of(play, base / "scene"), play)
        number = removal(recording, ADOPTION)
        *_, after_recovery = recording.killed(number + 1).history.crash_points()
        assert number not in after_recovery.pending
