"""What was last confirmed, which a pointer that is lost is set to."""

from __future__ import annotations

import logging
import os

from asyncsup.errors import StateError
from asyncsup.patch import fs
from asyncsup.patch.database import TargetRow
from asyncsup.patch.look import identity
from asyncsup.patch.statedir import StateDirectory

log = logging.getLogger("asyncsup.patch.store")


def confirmed_entry(state: StateDirectory, row: TargetRow) -> str:
    """What the pointer's set should say about a target in which nothing is under way."""
    if state.database.generation(row.name, row.confirmed).place == "root":
        return str(row.root)
    return state.entry(row.name, row.confirmed)


def is_whole(state: StateDirectory, target: str, number: int) -> bool:
    """Whether every file that patches have delivered to a generation is there as it was delivered."""
    if not state.exists(target, number):
        return False
    with fs.opened(state.generation(target, number)) as folder:
        for path, row in state.database.files(target, number).items():
            if row.sha256 is None or row.origin is None:
                continue
            *folders, name = path.split("/")
            try:
                with fs.below(folder, folders) as inner:
                    status = os.stat(name, dir_fd=inner, follow_symlinks=False)
                    if identity(status) != row.identity and fs.sha256_of(name, inner) != row.sha256:
                        return False
            except (FileNotFoundError, fs.BlockedPathError):
                return False
    return True


def restore_pointer(state: StateDirectory) -> None:
    """A pointer that is lost is set again to what was last confirmed, if that is still whole.

    Raises:
        StateError: it is not.
    """
    try:
        never_set = state.pointer.number() is None and state.pointer.is_new()
        if never_set or state.pointer.number() is not None:
            return
        log.warning("the pointer %s is missing", state.path / "current")
    except StateError as error:
        log.warning("%s", error.message)
    rows = state.database.targets()
    for row in rows:
        place = state.database.generation(row.name, row.confirmed).place
        if place == "store" and not is_whole(state, row.name, row.confirmed):
            raise StateError(
                f"the pointer {state.path / 'current'} is lost, and generation {row.confirmed} of "
                f"{row.name}, the last that was confirmed, is damaged",
                code="state.pointer",
            )
    log.warning("the pointer is set to the generations that were last confirmed")
    state.pointer.replace({row.name: confirmed_entry(state, row) for row in rows}, point="store.repair")
