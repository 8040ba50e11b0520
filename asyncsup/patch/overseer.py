"""The Patch Overseer: from "here is a zip" to a report of what became of it.

Verifies, finds the targets, takes hold of them, asks the gates, runs the transaction, and says what happened.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeGuard

import anyio
import anyio.abc
import anyio.to_thread

from asyncsup.errors import (
    AsyncsupError,
    PatchError,
    PatchMalformedError,
    PatchNotFoundError,
    PatchRefusedError,
    PatchRolledBackError,
    PatchTargetRefusedError,
    RequestError,
    RollbackFailedError,
    ShuttingDownError,
    TargetNotFoundError,
)
from asyncsup.events import timestamp
from asyncsup.patch.gates import Assessment, Gate, TargetFacts, assess
from asyncsup.patch.manifest import FileChange, Kind, Manifest, Op
from asyncsup.patch.package import Limits, Package, open_package
from asyncsup.patch.prototype import with_root_name
from asyncsup.patch.store import PatchInfo
from asyncsup.patch.transaction import Change, Participant, Progress, Transaction
from asyncsup.target import Target

if TYPE_CHECKING:
    from asyncsup.supervisor import Supervisor

log = logging.getLogger("asyncsup.patch")

UPLOAD_CHUNK_BYTES: Final = 512 << 10

Verdict = Literal["committed", "already", "refused", "target_refused", "rolled_back", "rollback_failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a package is, and what its sender says its checksum is."""

    path: Path
    sha256: str | None = None
    crc32: int | None = None
    in_inbox: bool = False


@dataclass(slots=True, kw_only=True)
class _Part:
    """One target's part in a request, as far as it has been looked at.

    Attributes:
        package: the package as this target reads it; None for a rollback, which needs none.
    """

    target: Target
    package: _WithManifest | None
    assessment: Assessment
    files: list[dict[str, Any]]
    build_before: int
    participant: Participant | None = None


@dataclass(slots=True, kw_only=True)
class _Report:
    """Everything that is known about one request; JSON in the end."""

    action: Literal["apply", "rollback"]
    asked_by: str
    patch: str | None = None
    manifest: Manifest | None = None
    build: int | None = None
    kind: str | None = None
    txn: int | None = None
    parts: list[_Part] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def to_json(
        self, verdict: Verdict, supervisor: Supervisor, error: AsyncsupError | None = None
    ) -> dict[str, Any]:
        manifest = self.manifest
        return {
            "txn": self.txn,
            "patch": self.patch,
            "name": manifest.name if manifest else None,
            "version": manifest.version if manifest else None,
            "build": manifest.build if manifest else self.build,
            "kind": manifest.kind.value if manifest else self.kind,
            "action": self.action,
            "verdict": verdict,
            "code": error.error_code if error else None,
            "reason": error.message if error else None,
            "asked_by": self.asked_by,
            "at": timestamp(),
            "took": time.monotonic() - self.began,
            "trust": supervisor.config.patch.trust,
            "targets": [self._target(part, supervisor) for part in self.parts],
            "steps": self.steps,
        }

    def _target(self, part: _Part, supervisor: Supervisor) -> dict[str, Any]:
        facts = supervisor.root_facts(part.target.name)
        records = [r.to_json() for r in part.participant.records.values()] if part.participant else []
        return {
            "target": part.target.name,
            "state": part.target.state,
            "layout": part.target.config.layout,
            "build_before": part.build_before,
            "build_after": facts.build,
            "generation": facts.generation,
            "already": part.assessment.already,
            "gates": [_gate(gate) for gate in part.assessment.gates],
            "files": part.files,
            "pids_before": [record["pid_before"] for record in records],
            "pids_after": [record["pid_after"] for record in records],
            "instances": records,
        }


class PatchOverseer:
    """What the control socket can ask about patches."""

    def __init__(self, supervisor: Supervisor, tasks: anyio.abc.TaskGroup) -> None:
        self._supervisor = supervisor
        self._store = supervisor.store
        self._tasks = tasks
        self._running: set[anyio.CancelScope] = set()
        self._refusing = False
        self._limits = Limits(package_bytes=supervisor.config.patch.max_package)
        self._uploads = supervisor.config.supervisor.state_dir / "uploads"
        self._uploads.mkdir(mode=0o700, exist_ok=True)
        for leftover in self._uploads.iterdir():
            leftover.unlink()

    def refuse_new(self) -> None:
        """The supervisor ends: take no new patch. Those under way are ended by the stop of their targets."""
        self._refusing = True

    # --- what comes in --------------------------------------------------------------------------------------

    def upload(self, upload: str | None, offset: int, data: bytes, *, last: bool) -> dict[str, Any]:
        """Take one piece of a package. Pieces come in order; a repeated piece is harmless.

        Raises:
            RequestError: unknown upload, a gap, or too much.
        """
        if upload is None:
            upload = secrets.token_hex(8)
            (self._uploads / upload).touch(mode=0o600)
        path = self._upload_path(upload)
        size = path.stat().st_size
        if offset > size:
            raise RequestError(f"offset: {offset} leaves a gap, {size} bytes have arrived")
        if offset + len(data) > self._limits.package_bytes:
            path.unlink()
            raise PatchMalformedError(
                f"the package is larger than max_package ({self._limits.package_bytes} bytes)",
                code="zip.too_large",
            )
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        return {"upload": upload, "size": max(size, offset + len(data)), "complete": last}

    def _upload_path(self, upload: str) -> Path:
        path = self._uploads / upload
        if len(upload) != 16 or not upload.isalnum() or not path.exists():
            raise RequestError(f"upload: {upload!r} is not an upload of this supervisor")
        return path

    def source(
        self, *, path: str | None, upload: str | None, name: str | None, sha256: str | None, crc32: int | None
    ) -> Source:
        """Find the package a request means.

        Raises:
            RequestError: none or several ways to name it were given, or the path is not absolute.
            PatchNotFoundError: nothing there.
        """
        if sum(value is not None for value in (path, upload, name)) != 1:
            raise RequestError("give exactly one of path, upload and name")
        if upload is not None:
            return Source(path=self._upload_path(upload), sha256=sha256, crc32=crc32)
        if name is not None:
            found = self._supervisor.inbox.find(name)
            return Source(path=found, sha256=sha256 or sidecar(found), crc32=crc32, in_inbox=True)
        found = Path(path or "")
        if not found.is_absolute():
            raise RequestError("path: must be absolute, the supervisor has another working directory")
        if not found.is_file():
            raise PatchNotFoundError(f"{found}: no such file", path=str(found))
        in_inbox = found.parent == self._supervisor.config.patch.inbox
        return Source(path=found, sha256=sha256 or sidecar(found), crc32=crc32, in_inbox=in_inbox)

    # --- questions ------------------------------------------------------------------------------------------

    async def verify(self, source: Source) -> dict[str, Any]:
        """Everything about a package that can be said without a target."""
        with await self._open(source) as package:
            return describe_package(package)

    async def plan(self, source: Source, target: str | None) -> dict[str, Any]:
        """What `apply` would do, without doing it. Nothing is touched and nobody is asked."""
        with await self._open(source) as package:
            report = _Report(action="apply", asked_by="plan", patch=package.id, manifest=package.manifest)
            for each in self._targets_of(package.manifest, target):
                report.parts.append(await self._assess(package, each))
            refused = any(part.assessment.refused for part in report.parts)
            already = all(part.assessment.already for part in report.parts)
            return {
                **describe_package(package),
                "verdict": "refused" if refused else "already" if already else "apply",
                "targets": [
                    {
                        "target": part.target.name,
                        "state": part.target.state,
                        "build": part.build_before,
                        "already": part.assessment.already,
                        "refused": _gate(part.assessment.refused) if part.assessment.refused else None,
                        "gates": [_gate(gate) for gate in part.assessment.gates],
                        "files": part.files,
                        "instances": [
                            {
                                "name": instance.name,
                                "pid": instance.pid,
                                "told_by": "restart"
                                if package.manifest.kind is Kind.COLD
                                else instance.told_by,
                            }
                            for instance in part.target.instances
                            if instance.pid is not None
                        ],
                    }
                    for part in report.parts
                ],
            }

    async def inbox(self) -> dict[str, Any]:
        """What lies in the inbox, and what can be read of it."""
        found = []
        for arrival in self._supervisor.inbox.arrivals():
            entry: dict[str, Any] = {"file": arrival.path.name, "size": arrival.size, "state": "incomplete"}
            if arrival.complete:
                try:
                    with await self._open(Source(path=arrival.path)) as package:
                        entry |= {"state": "complete", **_summary(package)}
                except AsyncsupError as error:
                    entry |= {"state": "malformed", "detail": error.message, "code": error.error_code}
            found.append(entry)
        return {"inbox": found, "folder": str(self._supervisor.inbox.folder), "trust": self._trust}

    async def history(self, target: str | None, limit: int) -> list[dict[str, Any]]:
        return await anyio.to_thread.run_sync(partial(self._store.history, target, limit=limit))

    async def show(self, reference: str) -> dict[str, Any]:
        """A transaction by its number, or the latest of a patch by (a prefix of) its id.

        Raises:
            PatchNotFoundError
        """
        return await anyio.to_thread.run_sync(self._store.find_transaction, reference)

    # --- doing ----------------------------------------------------------------------------------------------

    async def apply(
        self, source: Source, *, target: str | None, asked_by: str, wait_busy: bool
    ) -> dict[str, Any]:
        """Verify, check and apply a package; returns the report.

        Raises:
            AsyncsupError: it was not applied; ``details["report"]`` is the report.
        """
        if self._refusing:
            raise ShuttingDownError("the supervisor is stopping and takes no new patch")
        report = _Report(action="apply", asked_by=asked_by)
        try:
            with await self._open(source, must_be_trusted=True) as package:
                report.patch, report.manifest = package.id, package.manifest
                targets = self._targets_of(package.manifest, target)
                result = await self._carry_out(report, targets, partial(self._apply_to, package), wait_busy)
        except AsyncsupError as error:
            self._reject(source, report, error)
            raise
        finally:
            if source.path.parent == self._uploads:
                source.path.unlink(missing_ok=True)
        if source.in_inbox:
            self._supervisor.inbox.settle(source.path, result, outcome="applied")
        return result

    async def rollback(self, name: str, *, asked_by: str, wait_busy: bool) -> dict[str, Any]:
        """Bring a target back to the generation before its current one; returns the report.

        Raises:
            AsyncsupError: as `apply` does; PatchNotFoundError when there is nothing to go back to.
        """
        self._supervisor.refuse_while_stopping()
        target = self._known(name)
        report = _Report(action="rollback", asked_by=asked_by)
        return await self._carry_out(report, [target], self._roll_back, wait_busy)

    async def apply_arrivals(self) -> None:
        """Apply what comes into the inbox, in order of build, until cancelled (``[patch] auto``)."""
        tried: set[tuple[str, int]] = set()
        while True:
            await self._supervisor.inbox.changed()
            listing = await self.inbox()
            ready = [entry for entry in listing["inbox"] if entry["state"] == "complete"]
            for entry in sorted(ready, key=lambda entry: int(entry["build"])):
                source = self.source(path=None, upload=None, name=entry["file"], sha256=None, crc32=None)
                if self._trust == "digest" and source.sha256 is None:
                    key = (entry["file"], entry["size"])
                    if key not in tried:
                        tried.add(key)
                        log.warning("%s waits in the inbox for %s.sha256", entry["file"], entry["file"])
                    continue
                try:
                    await self.apply(source, target=None, asked_by="inbox (auto)", wait_busy=True)
                except AsyncsupError as error:
                    log.warning("%s: %s", entry["file"], error.message)

    async def _carry_out(
        self, report: _Report, targets: Sequence[Target], work: Any, wait_busy: bool
    ) -> dict[str, Any]:
        """Hold the targets, do the work, and turn its end into a report."""
        supervisor = self._supervisor
        scope = anyio.CancelScope()
        transaction: list[Transaction] = []

        def pre_empted(because: str) -> None:
            if transaction:
                transaction[0].cancel_reason = because
            scope.cancel()

        label = "rollback" if report.action == "rollback" else "patch"
        try:
            async with AsyncExitStack() as holds:
                # In one order everywhere: two patches that share targets cannot wait for each other.
                for target in sorted(targets, key=lambda target: target.name):
                    await holds.enter_async_context(
                        target.hold(label, report.asked_by, on_preempt=pre_empted, wait_busy=wait_busy)
                    )
                with scope:
                    verdict: Verdict = await work(report, targets, transaction)
                if scope.cancelled_caught:
                    raise PatchTargetRefusedError(
                        "stopped before anything was changed", code="request.cancelled"
                    )
        except AsyncsupError as error:
            result = report.to_json(_verdict_of(error), supervisor, error)
            error.details["report"] = result
            raise
        finally:
            if transaction:
                await anyio.to_thread.run_sync(partial(self._write_down, report, transaction[0]))
        return report.to_json(verdict, supervisor)

    async def _apply_to(
        self, package: Package, report: _Report, targets: Sequence[Target], started: list[Transaction]
    ) -> Verdict:
        for target in targets:
            report.parts.append(await self._assess(package, target))
        for part in report.parts:
            if part.assessment.refused is not None:
                gate = part.assessment.refused
                raise PatchRefusedError(gate.detail, code=gate.code, target=part.target.name)
        parts = [part for part in report.parts if not part.assessment.already]
        if not parts:
            return "already"
        manifest = package.manifest
        for part in parts:
            assert part.package is not None
            part.participant = Participant(
                target=part.target,
                build_before=part.build_before,
                build_after=manifest.build,
                changed=[change.path for change in part.package.manifest.files],
                stage=partial(self._stage, part.target.name, part.package),
            )
        probations = [part.target.config.patch.probation for part in parts]
        change = Change(
            action="apply",
            kind=manifest.kind,
            patch=package.id,
            probation=max(probations) if manifest.probation is None else manifest.probation,
            total_bytes=sum(change.size or 0 for change in manifest.files) * len(parts),
            participants=[part.participant for part in parts if part.participant is not None],
        )
        info = PatchInfo(
            id=package.id,
            name=manifest.name,
            version=manifest.version,
            build=manifest.build,
            kind=manifest.kind.value,
        )
        await self._run(report, change, info, started)
        return "committed"

    def _stage(self, target: str, package: _WithManifest, txn: int, progress: Progress) -> None:
        self._store.stage(txn, target, package, progress)

    async def _roll_back(
        self, report: _Report, targets: Sequence[Target], started: list[Transaction]
    ) -> Verdict:
        (target,) = targets
        before = self._store.state(target.name)
        generation = await anyio.to_thread.run_sync(self._store.rollback_target, target.name)
        if generation is None:
            raise PatchNotFoundError(
                f"{target.name} has no earlier generation to go back to", target=target.name
            )
        ahead = await anyio.to_thread.run_sync(self._store.describe_rollback, target.name, generation)
        participant = Participant(
            target=target,
            build_before=before.build,
            build_after=ahead.build,
            changed=[entry["path"] for entry in ahead.files],
            stage=lambda txn, _: self._store.stage_rollback(txn, target.name, generation),
        )
        assessment = Assessment(target=target.name, gates=(), already=False)
        report.patch, report.build, report.kind = before.patch, ahead.build, ahead.kind
        report.parts.append(
            _Part(
                target=target,
                package=None,
                assessment=assessment,
                files=ahead.files,
                build_before=before.build,
                participant=participant,
            )
        )
        change = Change(
            action="rollback",
            kind=Kind(ahead.kind),
            patch=before.patch or "",
            probation=target.config.patch.probation,
            total_bytes=0,
            participants=[participant],
        )
        await self._run(report, change, None, started)
        return "committed"

    async def _run(
        self, report: _Report, change: Change, info: PatchInfo | None, started: list[Transaction]
    ) -> None:
        for participant in change.participants:
            participant.enlist()
        names = [participant.target.name for participant in change.participants]
        txn = await anyio.to_thread.run_sync(
            partial(
                self._store.begin, action=change.action, patch=info, targets=names, asked_by=report.asked_by
            )
        )
        report.txn = txn
        transaction = Transaction(txn, change, self._store, self._supervisor.events)
        started.append(transaction)
        report.steps = transaction.steps
        verdict: Verdict = "committed"
        error: AsyncsupError | None = None
        try:
            await transaction.run()
        except AsyncsupError as failure:
            error, verdict = failure, _verdict_of(failure)
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(
                    partial(
                        self._store.finish,
                        txn,
                        verdict=verdict,
                        error=error.message if error else None,
                        code=error.error_code if error else None,
                    )
                )
                if _is_the_patchs_fault(error) and info is not None:
                    await anyio.to_thread.run_sync(self._store.hold, info.id, error.message)
                if verdict == "committed":
                    keep = self._supervisor.config.patch.keep
                    for name in names:
                        await anyio.to_thread.run_sync(self._store.prune, name, keep)
            self._supervisor.events.emit("patch.ended", txn=txn, verdict=verdict)

    def _write_down(self, report: _Report, transaction: Transaction) -> None:
        for step in transaction.steps:
            self._store.record(
                transaction.txn,
                step["step"],
                target=step["target"],
                instance=step["instance"],
                detail=step["detail"],
                took=step["took"],
                at=step["at"],
            )

    def _reject(self, source: Source, report: _Report, error: AsyncsupError) -> None:
        result = error.details.setdefault(
            "report", report.to_json(_verdict_of(error), self._supervisor, error)
        )
        nothing_tried = error.exit_status == 8  # busy or shutting down: it may be tried again as it lies
        if source.in_inbox and not nothing_tried and source.path.exists():
            self._supervisor.inbox.settle(source.path, result, outcome="rejected")

    # --- looking at a package -------------------------------------------------------------------------------

    @property
    def _trust(self) -> str:
        return self._supervisor.config.patch.trust

    async def _open(self, source: Source, *, must_be_trusted: bool = False) -> Package:
        unchecked = source.sha256 is None and source.crc32 is None
        if must_be_trusted and unchecked and self._trust == "digest":
            raise PatchMalformedError(
                f'{source.path.name}: nothing to verify it by; trust = "digest" wants its SHA-256 '
                f"(or the CRC-32 of a prototype package), or a file {source.path.name}.sha256 beside it",
                code="trust.digest_missing",
            )
        if must_be_trusted and unchecked:
            log.warning('%s is applied without any verification: trust = "none"', source.path.name)
        return await anyio.to_thread.run_sync(
            partial(open_package, source.path, limits=self._limits, sha256=source.sha256, crc32=source.crc32)
        )

    def _targets_of(self, manifest: Manifest, named: str | None) -> list[Target]:
        """Which targets a patch concerns.

        Raises:
            PatchRefusedError: it names none that is here.
        """
        targets = self._supervisor.targets
        with_root = [target for target in targets.values() if target.config.root is not None]
        if not manifest.targets:
            if named is not None:
                return [self._known(named)]
            if len(with_root) == 1:
                return with_root
            raise PatchRefusedError(
                "the patch does not say which target it is for; name one of "
                f"{', '.join(target.name for target in with_root) or 'none here with a root'} (--target)",
                code="gate.target",
            )
        missing = [name for name in manifest.targets if name not in targets]
        if named is not None:
            target = self._known(named)
            if target.name not in manifest.targets:
                raise PatchRefusedError(
                    f"the patch is for {', '.join(manifest.targets)}, not for {named}", code="gate.target"
                )
            return [target]
        if missing:
            raise PatchRefusedError(
                f"the patch is for {', '.join(manifest.targets)}; here there is no {', '.join(missing)}",
                code="gate.target",
            )
        return [targets[name] for name in manifest.targets]

    def _known(self, name: str) -> Target:
        selection = self._supervisor.select([name])
        if len(selection) != 1:
            raise TargetNotFoundError(f"{name!r} means {len(selection)} targets; name one", name=name)
        target = selection[0].target
        if target.config.root is None:
            raise PatchRefusedError(
                f"{target.name} has no root, so there is nothing a patch could change; set `root`",
                code="gate.target",
            )
        return target

    async def _assess(self, package: Package, target: Target) -> _Part:
        if target.config.root is None:
            self._known(target.name)
        assert target.config.root is not None
        manifest = package.manifest
        if package.format == "prototype":
            manifest = with_root_name(manifest, target.config.root.name)
        state = self._store.state(target.name)
        reported = [
            i.hello.build for i in target.instances if i.hello is not None and i.hello.build is not None
        ]
        matches = await anyio.to_thread.run_sync(self._store.content_matches, target.name, manifest)
        facts = TargetFacts(
            name=target.name,
            region=target.config.region,
            build=max([state.build, *reported]),
            patch=state.patch,
            content_matches=matches,
            allow=target.config.patch.allow,
            held=self._store.held(package.id),
        )
        assessment = assess(manifest, package.id, facts, now=datetime.now(UTC))
        strangers = {
            i.hello.region for i in target.instances if i.hello is not None and i.hello.region is not None
        } - {target.config.region, *manifest.regions}
        if strangers:
            detail = (
                f"patch is for {', '.join(manifest.regions)}, {target.name} says it runs in {strangers.pop()}"
            )
            gate = Gate(name="region", ok=False, detail=detail, code="gate.region")
            assessment = Assessment(target=target.name, gates=(*assessment.gates, gate), already=False)
        files = []
        if assessment.refused is None and not assessment.already:
            plans = await anyio.to_thread.run_sync(self._store.plan, target.name, manifest)
            files = [{"path": plan.path, "op": plan.op, "note": plan.note} for plan in plans]
            broken = next((plan for plan in plans if plan.code is not None), None)
            if broken is not None:
                gate = Gate(name="files", ok=False, detail=f"{broken.path}: {broken.note}", code=broken.code)
                assessment = Assessment(target=target.name, gates=(*assessment.gates, gate), already=False)
        else:
            files = [{"path": change.path, "op": change.op.value, "note": ""} for change in manifest.files]
        return _Part(
            target=target,
            package=_WithManifest(package, manifest),
            assessment=assessment,
            files=files,
            build_before=state.build,
        )


class _WithManifest:
    """A package seen through the manifest of one target (a prototype's paths depend on the root's name)."""

    def __init__(self, package: Package, manifest: Manifest) -> None:
        self._package = package
        self.id = package.id
        self.manifest = manifest

    def extract(self, change: FileChange, fd: int, progress: Progress | None = None) -> None:
        position = self.manifest.files.index(change)
        self._package.extract(self._package.manifest.files[position], fd, progress)


def sidecar(path: Path) -> str | None:
    """The SHA-256 in ``FILE.sha256`` beside a package, in the format `sha256sum` writes."""
    try:
        words = path.with_name(f"{path.name}.sha256").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return None
    return words[0] if words else None


def describe_package(package: Package) -> dict[str, Any]:
    """A package as JSON: what `patch verify` shows."""
    manifest = package.manifest
    return {
        **_summary(package),
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


def _summary(package: Package) -> dict[str, Any]:
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


def _gate(gate: Gate) -> dict[str, Any]:
    return {"name": gate.name, "ok": gate.ok, "detail": gate.detail, "code": gate.code}


def _is_the_patchs_fault(error: AsyncsupError | None) -> TypeGuard[PatchError]:
    """Whether an undone patch must not be tried again as it is; not when somebody merely stopped it."""
    undone = isinstance(error, PatchRolledBackError | RollbackFailedError)
    return undone and error is not None and error.details.get("cause") != "request.cancelled"


def _verdict_of(error: AsyncsupError) -> Verdict:
    by_type: Mapping[type[AsyncsupError], Verdict] = {
        PatchRolledBackError: "rolled_back",
        RollbackFailedError: "rollback_failed",
        PatchTargetRefusedError: "target_refused",
    }
    return next((verdict for kind, verdict in by_type.items() if isinstance(error, kind)), "refused")
