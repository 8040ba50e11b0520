"""What a patch would do to each file, and why it must not. Pure: facts in, verdicts out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from asyncsup.errors import PatchRefusedError
from asyncsup.patch.manifest import FileChange, Op

SHOWN_PROBLEMS: Final = 5


class Presence(Enum):
    """What stands at a path in a target's root."""

    ABSENT = "absent"
    ORDINARY = "ordinary"
    """A regular file that no patch has touched."""
    MANAGED = "managed"
    """A file of the current generation, where it should be."""
    DETACHED = "detached"
    """Managed, but the program has put a file of its own in place of the link."""
    REMOVED = "removed"
    """Managed, but the program has removed the link."""
    LINK = "link"
    FOLDER = "folder"
    SPECIAL = "special"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanError:
    """Why a file cannot be changed as the patch wants.

    Attributes:
        code: a stable ``gate.*`` code.
        message: a clause about the file, without its name.
    """

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found at a path.

    Attributes:
        problem: the path cannot even be looked at (a parent is a link, say).
        sha256: of the content, where it was asked for; hex.
        drifted: the content is not what asyncsup has put there.
        mode: permission bits as the program should see them (with write bits).
        identity: inode, size and mtime, to notice a later change; empty when absent.
        owner: uid and gid.
    """

    presence: Presence
    problem: PlanError | None = None
    sha256: str | None = None
    size: int = 0
    mode: int | None = None
    drifted: bool = False
    identity: str = ""
    owner: tuple[int, int] | None = None

    @property
    def exists(self) -> bool:
        return self.presence in {Presence.ORDINARY, Presence.MANAGED}


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """What would happen to one file.

    Attributes:
        op: ``new``, ``modified``, ``deleted``, or ``keep`` for a file that the patch does not name but
            about which there is something to say.
        note: for people; of a file that cannot be changed, why.
    """

    path: str
    op: Literal["new", "modified", "deleted", "keep"]
    note: str = ""
    error: PlanError | None = None

    @property
    def code(self) -> str | None:
        """The error's code; None when the file can be changed."""
        return None if self.error is None else self.error.code


def judge(change: FileChange, found: Found, *, adopts: bool = False) -> FilePlan:
    """What `change` would do where `found` is; `adopts`: an ordinary file becomes a managed link."""

    def refused(code: str, message: str) -> FilePlan:
        error = PlanError(code=code, message=message)
        return FilePlan(path=change.path, op=change.op.value, note=message, error=error)

    def planned(note: str = "") -> FilePlan:
        return FilePlan(path=change.path, op=change.op.value, note=note)

    if found.problem is not None:
        return refused(found.problem.code, found.problem.message)
    match found.presence:
        case Presence.DETACHED:
            return refused(
                "gate.detached",
                "was delivered by a patch and has since been replaced by the program; `asyncsup target "
                "release` makes the target's files ordinary ones again",
            )
        case Presence.REMOVED:
            return refused("gate.detached", "was delivered by a patch and has since been removed")
        case Presence.LINK | Presence.FOLDER | Presence.SPECIAL:
            what = {Presence.LINK: "a symbolic link", Presence.FOLDER: "a folder"}
            return refused(
                "gate.conflict",
                f"is {what.get(found.presence, 'not a regular file')}; a patch replaces only regular files",
            )
        case Presence.MANAGED if found.drifted:
            return refused("gate.drift", "was delivered by a patch and has since been changed in place")
    if not found.exists:
        if change.op is Op.NEW:
            return planned()
        if not change.missing_ok:
            return refused("gate.conflict", f"does not exist, so it cannot be {change.op.value}")
        return planned("not there, nothing to delete" if change.op is Op.DELETED else "not there, created")
    if change.op is Op.NEW and not change.replace:
        return refused("gate.conflict", "exists already, and the patch says it is new")
    if change.base_sha256 is not None and found.sha256 != change.base_sha256:
        return refused(
            "gate.base",
            f"is not the file the patch was made for (SHA-256 {str(found.sha256)[:12]}…, expected "
            f"{change.base_sha256[:12]}…)",
        )
    notes = []
    if change.op is Op.NEW:
        notes.append("replaces the file that is there")
    if adopts and found.presence is Presence.ORDINARY:
        notes.append("managed from now on")
    return planned(", ".join(notes))


def refuse_if_any(target: str, plans: Iterable[FilePlan]) -> None:
    """Raise what stands in the way, naming the first few files.

    Raises:
        PatchRefusedError: with the first problem's code; ``details["files"]`` lists all of them.
    """
    problems = [(plan.path, plan.error) for plan in plans if plan.error is not None]
    if not problems:
        return
    shown = "; ".join(f"{path} {error.message}" for path, error in problems[:SHOWN_PROBLEMS])
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    raise PatchRefusedError(
        f"{target}: {shown}{more}",
        code=problems[0][1].code,
        target=target,
        files=[{"path": path, "code": error.code, "message": error.message} for path, error in problems],
    )
