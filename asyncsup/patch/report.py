"""What is known about one request to patch, and its JSON: the report that the control socket answers with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from asyncsup.errors import (
    AsyncsupError,
    PatchRolledBackError,
    PatchTargetRefusedError,
    PatchUndecidedError,
    RollbackFailedError,
)
from asyncsup.events import timestamp
from asyncsup.patch.facts import StagedTarget
from asyncsup.patch.gates import Assessment, Gate
from asyncsup.patch.manifest import FileChange, Kind, Manifest, Op
from asyncsup.patch.package import Package
from asyncsup.patch.plan import FilePlan
from asyncsup.patch.transaction import Participant, Progress
from asyncsup.runtime import RootFacts
from asyncsup.target import Target

Verdict = Literal[
    "committed",
    "uncommitted",
    "undecided",
    "already",
    "refused",
    "target_refused",
    "rolled_back",
    "rollback_failed",
]


class PackageView:
    """A package seen through the manifest of one target (a prototype's paths depend on the root's name)."""

    def __init__(self, package: Package, manifest: Manifest) -> None:
        self._package = package
        self._originals = {
            change.path: original
            for change, original in zip(manifest.files, package.manifest.files, strict=True)
        }
        self.id = package.id
        self.manifest = manifest

    def extract(self, change: FileChange, fd: int, progress: Progress | None = None) -> None:
        self._package.extract(self._originals[change.path], fd, progress)

    def rebuild(self, change: FileChange, base: int, fd: int, progress: Progress | None = None) -> None:
        self._package.rebuild(self._originals[change.path], base, fd, progress)


class Part(msgspec.Struct, kw_only=True):
    """One target's part in a request, as far as it has been looked at.

    Attributes:
        package: the package as this target reads it; None for a rollback, which needs none.
        kind: of what is taken back; None for a patch, whose manifest says it.
    """

    target: Target
    package: PackageView | None
    assessment: Assessment
    files: tuple[FilePlan, ...]
    build_before: int
    kind: Kind | None = None
    participant: Participant | None = None

    @property
    def changed(self) -> list[str]:
        """What an instance is told has changed."""
        return [plan.path for plan in self.files if plan.op != "keep"]

    def take_in(self, staged: StagedTarget) -> None:
        """What it has come to: files may have changed since they were looked at."""
        named = {plan.path for plan in staged.files}
        self.files = (*staged.files, *(plan for plan in self.files if plan.path not in named))
        if self.participant is not None:
            self.participant.changed = self.changed


def staged_part(
    target: Target,
    files: Sequence[Mapping[str, Any]],
    *,
    build_before: int,
    build_after: int,
    kind: Kind | None = None,
    changed: Sequence[str] | None = None,
) -> Part:
    """One target's part in a patch that was staged some time ago.

    Args:
        files: those of all its targets, as the history has them.
        changed: as somebody has written it down; otherwise as the files say.
    """
    part = Part(
        target=target,
        package=None,
        assessment=Assessment(target=target.name, gates=(), already=False),
        files=tuple(
            FilePlan(path=file["path"], op=file["op"], note=file["note"])
            for file in files
            if file["target"] == target.name
        ),
        build_before=build_before,
        kind=kind,
    )
    part.participant = Participant(
        target=target,
        build_before=build_before,
        build_after=build_after,
        changed=part.changed if changed is None else changed,
        stage=lambda txn, progress: None,
    )
    return part


class Report(msgspec.Struct, kw_only=True):
    """Everything that is known about one request; JSON in the end."""

    action: Literal["apply", "rollback"]
    asked_by: str
    trust: str
    facts: Callable[[str], RootFacts]
    file: str | None = None
    """The package's name, where it has one: one that was sent over has none."""
    patch: str | None = None
    manifest: Manifest | None = None
    name: str | None = None
    version: str | None = None
    build: int | None = None
    kind: str | None = None
    txn: int | None = None
    parts: list[Part] = msgspec.field(default_factory=list)
    steps: list[dict[str, Any]] = msgspec.field(default_factory=list)
    signers: list[dict[str, Any]] = msgspec.field(default_factory=list)
    """Whose signatures counted, where the configuration asks for some."""
    audit: dict[str, Any] | None = None
    """The audit's last record about it: whoever keeps its hash can tell later that nothing was taken away."""
    began: float = msgspec.field(default_factory=time.monotonic)

    def to_json(self, verdict: Verdict, error: AsyncsupError | None = None) -> dict[str, Any]:
        manifest = self.manifest
        return {
            "txn": self.txn,
            "file": self.file,
            "patch": self.patch,
            "name": manifest.name if manifest else self.name,
            "version": manifest.version if manifest else self.version,
            "build": manifest.build if manifest else self.build,
            "kind": manifest.kind.value if manifest else self.kind,
            "action": self.action,
            "verdict": verdict,
            "code": error.error_code if error else None,
            "reason": error.message if error else None,
            "asked_by": self.asked_by,
            "at": timestamp(),
            "took": time.monotonic() - self.began,
            "trust": self.trust,
            "signers": self.signers,
            "audit": self.audit,
            "targets": [self._target(part) for part in self.parts],
            "steps": self.steps,
        }

    def _target(self, part: Part) -> dict[str, Any]:
        facts = self.facts(part.target.name)
        records = [r.to_json() for r in part.participant.records.values()] if part.participant else []
        return {
            "target": part.target.name,
            "state": part.target.state,
            "layout": part.target.config.layout,
            "build_before": part.build_before,
            "build_after": facts.build,
            "generation": facts.generation,
            "already": part.assessment.already,
            "gates": [gate_json(gate) for gate in part.assessment.gates],
            "files": [file_json(plan) for plan in part.files],
            "pids_before": [record["pid_before"] for record in records],
            "pids_after": [record["pid_after"] for record in records],
            "instances": records,
        }


def describe_package(package: Package) -> dict[str, Any]:
    """A package as JSON: what `patch verify` shows."""
    manifest = package.manifest
    return {
        **summary(package),
        "size": package.size,
        "created": manifest.created.isoformat() if manifest.created else None,
        "expires": manifest.expires.isoformat() if manifest.expires else None,
        "notes": manifest.notes,
        "signatures": sorted(package.signatures),
        "files": [
            {"path": change.path, "op": change.op.value, "size": change.size, "sha256": change.sha256}
            for change in manifest.files
        ],
        "total_bytes": sum(change.size or 0 for change in manifest.files if change.op is not Op.DELETED),
    }


def summary(package: Package) -> dict[str, Any]:
    manifest = package.manifest
    return {
        "id": package.id,
        "format": package.format,
        "name": manifest.name,
        "version": manifest.version,
        "build": manifest.build,
        "kind": manifest.kind.value,
        "targets": list(manifest.targets),
        "regions": list(manifest.regions),
    }


def file_json(plan: FilePlan) -> dict[str, Any]:
    return {
        "path": plan.path,
        "op": plan.op,
        "note": plan.note,
        "drift": None if plan.drift is None else plan.drift.code,
        "decision": plan.decision,
        "saved": plan.saved,
    }


def gate_json(gate: Gate) -> dict[str, Any]:
    return {"name": gate.name, "ok": gate.ok, "detail": gate.detail, "code": gate.code}


def verdict_of(error: AsyncsupError) -> Verdict:
    by_type: Mapping[type[AsyncsupError], Verdict] = {
        PatchRolledBackError: "rolled_back",
        PatchUndecidedError: "undecided",
        RollbackFailedError: "rollback_failed",
        PatchTargetRefusedError: "target_refused",
    }
    return next((verdict for kind, verdict in by_type.items() if isinstance(error, kind)), "refused")
