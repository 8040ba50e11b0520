"""What a patch would do to each file, and why it must not. Pure: facts in, verdicts out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Final, Literal, get_args

import msgspec

from asyncsup.errors import PatchRefusedError
from asyncsup.patch.manifest import FileChange, Op

SHOWN_PROBLEMS: Final = 5

Policy = Literal["refuse", "keep", "overwrite"]
"""What becomes of a file that is not what the patch was made for; see docs/patching.md."""

POLICIES: Final[tuple[Policy, ...]] = get_args(Policy)

_WHAT_WOULD_DO: Final[Mapping[Policy, str]] = {
    "keep": "`--drift keep` leaves such a file as it is",
    "overwrite": "`--drift overwrite` replaces it and saves a copy",
}


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

    # A member is only ever itself; Enum's own hash is slow enough to be seen in patches of many files.
    __hash__ = object.__hash__


class PlanError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a file cannot be changed as the patch wants.

    Attributes:
        code: a stable ``gate.*`` code.
        message: a clause about the file, without its name.
    """

    code: str
    message: str


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What was found at a path.

    Attributes:
        problem: the path cannot even be looked at (a parent is a link, say).
        sha256: of the content, where it was asked for; hex.
        delivered: it came with a patch; otherwise it is the program's, or a person's.
        drifted: it came with a patch, and its content is not what asyncsup has put there.
        kept: why it stands here in place of what a patch has delivered; None when it does not.
        mode: permission bits as the program should see them (with write bits).
        identity: inode, size and mtime, to notice a later change; empty when absent.
        owner: uid and gid.
    """

    presence: Presence
    problem: PlanError | None = None
    sha256: str | None = None
    size: int = 0
    mode: int | None = None
    delivered: bool = False
    drifted: bool = False
    kept: str | None = None
    identity: str = ""
    owner: tuple[int, int] | None = None

    @property
    def exists(self) -> bool:
        return self.presence in {Presence.ORDINARY, Presence.MANAGED, Presence.DETACHED}

    @property
    def is_somebodys(self) -> bool:
        """Whether there is content that no patch has brought."""
        return self.exists and (not self.delivered or self.drifted or self.kept is not None)


class FilePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What would happen to one file.

    Attributes:
        op: ``new``, ``modified``, ``deleted``; or ``keep`` for a file that stays as it is though the patch
            names it, or that it does not name but about which there is something to say.
        note: for people; of a file that cannot be changed, why.
        drift: how it is not what the patch was made for, whatever is done about that.
        decision: what is done about that; None where nothing has to be.
        choices: of a file that cannot be changed, the policies under which it could.
        saves: the version that is there is copied to a safe place before it is overwritten.
        saved: where that copy is, once there is one.
    """

    path: str
    op: Literal["new", "modified", "deleted", "keep"]
    note: str = ""
    error: PlanError | None = None
    drift: PlanError | None = None
    decision: Policy | None = None
    choices: tuple[Policy, ...] = ()
    saves: bool = False
    saved: str | None = None

    @property
    def code(self) -> str | None:
        """The error's code; None when the file can be changed."""
        return None if self.error is None else self.error.code


def judge(change: FileChange, found: Found, *, policy: Policy = "refuse", adopts: bool = False) -> FilePlan:
    """What `change` would do where `found` is; `adopts`: an ordinary file becomes a managed link."""
    if found.problem is not None:
        return _refused(change, found.problem)
    drift = _drift(change, found)
    if drift is None:
        return FilePlan(path=change.path, op=change.op.value, note=_note(change, found, adopts))
    if policy == "keep":
        note = f"{drift.message}; kept as it is, without what the patch has for it"
        return FilePlan(path=change.path, op="keep", note=note, drift=drift, decision="keep")
    if policy == "overwrite" and _lacks_base(change, found):
        needed = PlanError(
            code=drift.code,
            message=f"{drift.message}, and cannot be overwritten: the patch only has its difference to what "
            "it was",
        )
        return _refused(change, needed, needed, ("keep",))
    if policy == "refuse" or found.presence in _NO_FILES:
        choices: tuple[Policy, ...] = ("keep",) if found.presence in _NO_FILES else ("keep", "overwrite")
        return _refused(change, drift, drift, choices)
    saves = found.is_somebodys
    return FilePlan(
        path=change.path,
        op=change.op.value,
        note=f"{drift.message}; {_done(change, found, saves)}",
        drift=drift,
        decision="overwrite",
        saves=saves,
    )


_NO_FILES: Final = {
    Presence.LINK: "a symbolic link",
    Presence.FOLDER: "a folder",
    Presence.SPECIAL: "not a regular file",
}


def _lacks_base(change: FileChange, found: Found) -> bool:
    """Whether a file comes as a delta, and what it is a delta to is not there."""
    return change.delta is not None and found.sha256 not in {change.delta.base_sha256, change.sha256}


def _refused(
    change: FileChange, error: PlanError, drift: PlanError | None = None, choices: tuple[Policy, ...] = ()
) -> FilePlan:
    return FilePlan(
        path=change.path,
        op=change.op.value,
        note=error.message,
        error=error,
        drift=drift,
        decision=None if drift is None else "refuse",
        choices=choices,
    )


def _drift(change: FileChange, found: Found) -> PlanError | None:
    """How what is there differs from what the patch was made for.

    It does not where the outcome is there already, or where the patch says that it was made for this very
    content: nothing is lost then.
    """

    def differs(code: str, message: str) -> PlanError:
        return PlanError(code=code, message=message)

    if found.presence in _NO_FILES:
        what = _NO_FILES[found.presence]
        return differs("gate.conflict", f"is {what}; a patch replaces only regular files")
    if _is_there_already(change, found):
        return None
    if found.exists and change.base_sha256 is not None and found.sha256 == change.base_sha256:
        return None
    match found.presence:
        case Presence.DETACHED:
            return differs("gate.detached", "was delivered by a patch and has since been replaced")
        case Presence.REMOVED:
            return differs("gate.detached", "was delivered by a patch and has since been removed")
        case Presence.MANAGED if found.drifted:
            return differs("gate.drift", "was delivered by a patch and has since been changed in place")
    if found.kept is not None:
        return differs("gate.drift", found.kept)
    if not found.exists:
        if change.op is Op.NEW or change.missing_ok:
            return None
        return differs("gate.conflict", f"does not exist, so it cannot be {change.op.value}")
    if change.op is Op.NEW and not change.replace:
        return differs("gate.conflict", "exists already, and the patch says it is new")
    if change.base_sha256 is not None:
        return differs(
            "gate.base",
            f"is not the file the patch was made for (SHA-256 {str(found.sha256)[:12]}…, expected "
            f"{change.base_sha256[:12]}…)",
        )
    return None


def _done(change: FileChange, found: Found, saves: bool) -> str:
    """What is done all the same."""
    if found.exists:
        verb = "deleted" if change.op is Op.DELETED else "overwritten"
        return f"{verb}, and a copy saved" if saves else verb
    return "nothing to delete" if change.op is Op.DELETED else "created"


def _is_there_already(change: FileChange, found: Found) -> bool:
    if change.op is Op.DELETED:
        return not found.exists and change.missing_ok
    return found.exists and change.sha256 is not None and found.sha256 == change.sha256


def _note(change: FileChange, found: Found, adopts: bool) -> str:
    if not found.exists:
        if change.op is Op.NEW:
            return ""
        return "not there, nothing to delete" if change.op is Op.DELETED else "not there, created"
    notes = []
    if change.op is Op.NEW:
        notes.append("replaces the file that is there")
    if adopts and found.presence is not Presence.MANAGED:
        notes.append("managed from now on")
    return ", ".join(notes)


def refuse_if_any(target: str, plans: Iterable[FilePlan]) -> None:
    """Raise what stands in the way, naming the first few files.

    Raises:
        PatchRefusedError: with the first problem's code; ``details["files"]`` lists all of them.
    """
    refused = [plan for plan in plans if plan.error is not None]
    problems = [(plan.path, plan.error) for plan in refused if plan.error is not None]
    if not problems:
        return
    shown = "; ".join(f"{path} {error.message}" for path, error in problems[:SHOWN_PROBLEMS])
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    raise PatchRefusedError(
        f"{target}: {shown}{more}{what_would_do(refused)}",
        code=problems[0][1].code,
        target=target,
        files=[{"path": path, "code": error.code, "message": error.message} for path, error in problems],
    )


def what_would_do(refused: Iterable[FilePlan]) -> str:
    """What can be done about files that were refused, as the end of a message; empty when nothing can."""
    choices = {choice: None for plan in refused for choice in plan.choices}
    return f" ({', '.join(_WHAT_WOULD_DO[choice] for choice in choices)})" if choices else ""
