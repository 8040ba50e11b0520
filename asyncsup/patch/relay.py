"""From one supervisor to the next: what it must know of a transaction, and what is left to be done."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec.structs import replace

from asyncsup.patch.jobs import Job
from asyncsup.patch.manifest import Kind
from asyncsup.patch.transaction import Change, Participant, Standing
from asyncsup.record import PartRecord, PatchRecord


def record_of(job: Job, txn: int, change: Change) -> PatchRecord:
    """What the next supervisor must know of a transaction that has begun."""
    return PatchRecord(
        txn=txn,
        action=change.action,
        kind=change.kind.value,
        patch=change.patch,
        by=job.request["by"],
        file=job.inbox_name,
        inbox_file=job.inbox_file,
        manual_commit=change.manual_commit,
        manual_rollback=change.manual_rollback,
        parts=tuple(
            PartRecord(
                target=participant.target.name,
                build_before=participant.build_before,
                build_after=participant.build_after,
                changed=tuple(participant.changed),
                instances=tuple(instance.name for instance in participant.instances),
            )
            for participant in change.participants
        ),
    )


def on_standing(record: PatchRecord, change: Change, standing: Standing | None) -> PatchRecord:
    """The files are about to be switched, or somebody is on probation from now on, or nobody any more."""
    names = None
    if standing is not None:
        names = tuple((instance.name, pid) for instance, pid in standing if pid is not None)
    until = time.monotonic() + change.probation
    return replace(record, switched=True, standing=names, probation_until=until)


def change_of(record: PatchRecord, participants: Sequence[Participant]) -> Change:
    """What is left of a transaction that an earlier supervisor had brought as far as its probation."""
    return Change(
        action="rollback" if record.action == "rollback" else "apply",
        kind=Kind(record.kind),
        patch=record.patch,
        probation=max(0.0, record.probation_until - time.monotonic()),
        manual_commit=record.manual_commit,
        manual_rollback=record.manual_rollback,
        total_bytes=0,
        participants=participants,
    )
