"""What the store is told about targets and patches, and what it says about them. Pure."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from asyncsup.patch.plan import FilePlan
from asyncsup.patch.space import Need

Action = Literal["apply", "rollback"]

UNDECIDED: Final = "undecided"
"""State and verdict of a transaction that only an operator may end."""

INTERRUPTED: Final = "patch.interrupted"
"""The code of a transaction that a crash has cut off."""


class Layout(StrEnum):
    """How a target's root and its generations belong together."""

    OVERLAY = "overlay"
    TREE = "tree"


class TargetRoot(msgspec.Struct, frozen=True, kw_only=True):
    """A target as configured.

    Attributes:
        persist: paths below the root that stay outside of generations (tree layout).
        build: counts until the first patch; afterwards the store knows better.
    """

    name: str
    root: Path
    layout: Layout
    persist: tuple[str, ...] = ()
    build: int = 0


class TargetState(msgspec.Struct, frozen=True, kw_only=True):
    """What a target has now; `patch` is the id of the patch its generation came from."""

    name: str
    build: int
    generation: int
    patch: str | None
    root: Path
    layout: Layout


class PatchInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The patch of a transaction, for the history, and for what is remembered of it for good."""

    id: str
    name: str
    version: str
    build: int
    kind: str
    build_floor: int | None = None
    downgrade: bool = False

    def to_facts(self) -> dict[str, Any]:
        """As the database and the audit have it."""
        return {
            "patch": self.id,
            "name": self.name,
            "version": self.version,
            "build": self.build,
            "kind": self.kind,
            "floor": self.build_floor,
            "downgrade": self.downgrade,
        }


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What a patch would do to the files of one target, and what room it needs for that."""

    files: tuple[FilePlan, ...]
    needs: tuple[Need, ...]


class StagedTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A generation that is ready to be switched to."""

    target: str
    source: int
    destination: int
    build_before: int
    build_after: int
    files: tuple[FilePlan, ...]


class Undecided(msgspec.Struct, frozen=True, kw_only=True):
    """A transaction that waits for somebody to decide about it; `error` says why."""

    txn: int
    patch: str
    name: str | None
    version: str | None
    build: int | None
    kind: str
    error: str
    code: str
    parts: tuple[StagedTarget, ...]

    @property
    def targets(self) -> list[str]:
        return [part.target for part in self.parts]


class RollbackPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What going back would do; `kind` is cold as soon as one of the patches undone was."""

    generation: int
    build: int
    kind: str
    files: tuple[FilePlan, ...]


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """What recovery did about one transaction.

    Attributes:
        action: ``dropped`` (it had not switched), ``switched_back``, ``undecided`` (it had switched, and only
            an operator may decide about it), ``kept`` (nothing: it is on probation, and somebody goes on with
            it), ``completed`` (it was confirmed; only tidying was left), ``lost`` (confirmed, yet the
            pointer says otherwise: the disk lied; the files are wholly those of the generation before),
            ``released`` (a release, finished).
    """

    txn: int | None
    action: Literal["dropped", "switched_back", "undecided", "completed", "lost", "released", "kept"]
    targets: tuple[str, ...]
    patch: str | None
