"""May this patch be applied to this target? Pure: facts in, a verdict for each gate out.

Every gate is always judged and named in the result, whatever the others said; a gate is never skipped because
something is unknown. What needs the files on disk (drift, base hashes, free space) the store finds out, and
judges again when the patch is staged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final

import msgspec

from asyncsup.patch.delta import INSTALL
from asyncsup.patch.manifest import Kind, Manifest
from asyncsup.patch.plan import FilePlan, what_would_do
from asyncsup.patch.space import Room


class TargetFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a target.

    Args:
        patch: id of the patch its current generation came from; None before the first.
        content_matches: the target's files are already what the patch would make them.
        allow: the kinds of patch its configuration takes.
        program: the files of its root that only a cold patch may change, as its processes run them.
        held: why this very patch is on hold, None when it is not.
        highest: the highest build a patch has brought the target to, whatever it has now; None before the
            first one.
        build_floor: the highest floor that a patch applied to the target has set; None when none did.
        reads_deltas: what deltas need is installed here.
    """

    name: str
    region: str
    build: int
    patch: str | None
    content_matches: bool
    allow: frozenset[Kind]
    held: str | None
    program: frozenset[str] = frozenset()
    highest: int | None = None
    build_floor: int | None = None
    reads_deltas: bool = True


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """One verdict; `code` is None when the gate is open."""

    name: str
    ok: bool
    detail: str
    code: str | None = None


class Assessment(msgspec.Struct, frozen=True, kw_only=True):
    """All verdicts for one target, in the order in which they count.

    `already`: no gate is closed, and the target is what the patch would make it. That is a success, and there
    is nothing to do.
    """

    target: str
    gates: tuple[Gate, ...]
    already: bool

    @property
    def refused(self) -> Gate | None:
        """The first closed gate, or None when the patch may be applied."""
        return next((gate for gate in self.gates if not gate.ok), None)


def assess(
    manifest: Manifest,
    patch_id: str,
    facts: TargetFacts,
    *,
    now: datetime,
    seen: datetime | None = None,
    signed: bool = False,
    retry_held: bool = False,
) -> Assessment:
    """Judge every gate.

    Args:
        patch_id: SHA-256 of the package.
        now: an aware datetime.
        seen: the latest time this host has seen, when its clock is behind that.
        signed: the package carries the signatures that the trust policy asks for; a downgrade needs them.
        retry_held: whoever asks wants it tried again although it is on hold.
    """
    same = manifest.build == facts.build and (facts.patch == patch_id or facts.content_matches)
    gates = (
        _target(manifest, facts),
        _region(manifest, facts),
        _build(manifest, facts, same=same, signed=signed),
        *(
            # What is already there needs no permission any more: repeating an applied patch stays a success.
            (_open(name, "already applied") for name in ("requires", "expired", "kind", "held"))
            if same
            else (
                _requires(manifest, facts),
                expiry_gate(manifest, now, seen),
                _kind(manifest, facts),
                _held(facts, retry_held),
                *_delta(manifest, facts),
            )
        ),
    )
    return Assessment(target=facts.name, gates=gates, already=same and all(gate.ok for gate in gates))


def _delta(manifest: Manifest, facts: TargetFacts) -> Iterator[Gate]:
    """Only where a file comes as a delta."""
    count = sum(change.delta is not None for change in manifest.files)
    if not count:
        return
    files = f"{count} file{'' if count == 1 else 's'} of the patch"
    if facts.reads_deltas:
        yield _open("delta", f"{files} as a difference to what is there")
    else:
        yield _closed(
            "delta",
            f"{files} came as a difference to the old content, which takes the package zstandard; install it "
            f"for the supervisor ({INSTALL}), or have the patch built without --delta",
            "gate.delta",
        )


_DECIDED: Final = {"keep": "kept", "overwrite": "overwritten", "refuse": "refused"}


def files_gate(plans: Sequence[FilePlan]) -> Gate:
    """Closed by the first file that cannot be changed as the patch wants."""
    broken = next((plan for plan in plans if plan.error is not None), None)
    if broken is not None:
        detail = f"{broken.path}: {broken.note}{what_would_do([broken])}"
        return Gate(name="files", ok=False, detail=detail, code=broken.code)
    decided = Counter(plan.decision for plan in plans if plan.decision is not None)
    if decided:
        done = ", ".join(f"{count} {_DECIDED[decision]}" for decision, count in decided.items())
        return _open("files", f"not all are as the patch expects them: {done}")
    return _open("files", "every file is as the patch expects it")


def space_gate(found: Sequence[Room]) -> Gate:
    """Closed by the first file system that is too small."""
    for room in found:
        if room.short is not None:
            return _closed("space", f"not enough room in {room.place}: {room.short}", "gate.space")
    return _open("space", "; ".join(f"{room.place}: {room.sizes}" for room in found))


def _target(manifest: Manifest, facts: TargetFacts) -> Gate:
    if not manifest.targets:
        return _open("target", f"the patch names no target, it was asked for {facts.name}")
    if facts.name in manifest.targets:
        return _open("target", f"patch is for {_list(manifest.targets)}")
    return _closed("target", f"patch is for {_list(manifest.targets)}, not for {facts.name}", "gate.target")


def _region(manifest: Manifest, facts: TargetFacts) -> Gate:
    if facts.region in manifest.regions:
        return _open("region", f"{facts.name} runs in {facts.region}")
    return _closed(
        "region",
        f"patch is for {_list(manifest.regions)}, {facts.name} runs in {facts.region}",
        "gate.region",
    )


def _build(manifest: Manifest, facts: TargetFacts, *, same: bool, signed: bool) -> Gate:
    if same:
        return _open("build", f"{facts.name} already is at build {facts.build} with this content")
    # After a rollback the target has a lower build than it once had, and what it once had may come again.
    top = max(facts.build, facts.highest if facts.highest is not None else facts.build)
    if manifest.build > facts.build and manifest.build >= top:
        return _open("build", f"{facts.build} to {manifest.build}")
    if manifest.build == facts.build:
        return _closed(
            "build",
            f"{facts.name} is at build {facts.build} with other content; give the patch a higher build",
            "gate.build_conflict",
        )
    been = f"is at build {facts.build}" if top == facts.build else f"was at build {top} before"
    lower = f"{facts.name} {been}, the patch is build {manifest.build}"
    if not manifest.downgrade:
        return _closed("build", f"{lower}; only a signed patch with `downgrade` may lower it", "gate.build")
    floor = max(
        (each for each in (manifest.build_floor, facts.build_floor) if each is not None), default=None
    )
    if floor is not None and manifest.build < floor:
        return _closed("build", f"{lower}, below the floor {floor} that no downgrade may pass", "gate.floor")
    if not signed:
        return _closed("build", f"{lower}; a downgrade is taken only when it is signed", "gate.build")
    return _open("build", f"downgrade from {top} to {manifest.build}")


def _requires(manifest: Manifest, facts: TargetFacts) -> Gate:
    low, high = manifest.requires.build_min, manifest.requires.build_max
    if low is None and high is None:
        return _open("requires", "any build")
    if low is None:
        wanted = f"at most {high}"
    elif high is None:
        wanted = f"at least {low}"
    else:
        wanted = f"{low} to {high}"
    if (low is None or low <= facts.build) and (high is None or facts.build <= high):
        return _open("requires", f"build {facts.build} is {wanted}")
    return _closed(
        "requires", f"patch needs build {wanted}, {facts.name} is at {facts.build}", "gate.requires"
    )


def expiry_gate(manifest: Manifest, now: datetime, seen: datetime | None) -> Gate:
    """Whether a patch has expired; `seen` as for `assess`."""
    if manifest.expires is None:
        return _open("expired", "does not expire")
    moment = _moment(manifest.expires)
    if seen is not None:
        return _closed(
            "expired",
            f"patch expires {moment}, and whether it has cannot be told: the clock says "
            f"{_moment(now.replace(microsecond=0))}, but it has been {_moment(seen.replace(microsecond=0))} "
            "already; set it right, or say that it is (--trust-clock)",
            "gate.clock",
        )
    if now < manifest.expires:
        return _open("expired", f"expires {moment}")
    return _closed("expired", f"patch expired {moment}; build it again", "gate.expired")


def _kind(manifest: Manifest, facts: TargetFacts) -> Gate:
    if manifest.kind in facts.allow:
        program = [change.path for change in manifest.files if change.path in facts.program]
        if manifest.kind is Kind.WARM and program:
            return _closed(
                "kind",
                f"{program[0]} is what the processes of {facts.name} run, and a warm patch leaves them as "
                "they are; build the patch as a cold one (a program that runs its file anew when it is told "
                "can have `warm_program = true`)",
                "gate.kind",
            )
        return _open("kind", f"{manifest.kind.value} patches are allowed")
    allowed = " and ".join(sorted(kind.value for kind in facts.allow))
    taken = f"only {allowed} patches" if allowed else "no patches"
    return _closed("kind", f"patch is {manifest.kind.value}, {facts.name} takes {taken}", "gate.kind")


def _held(facts: TargetFacts, retry_held: bool) -> Gate:
    if facts.held is None:
        return _open("held", "not on hold")
    if retry_held:
        return _open("held", f"tried again as asked for; on hold: {facts.held}")
    return _closed("held", f"patch is on hold: {facts.held}", "gate.held")


def _open(name: str, detail: str) -> Gate:
    return Gate(name=name, ok=True, detail=detail)


def _closed(name: str, detail: str, code: str) -> Gate:
    return Gate(name=name, ok=False, detail=detail, code=code)


def _moment(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def _list(names: tuple[str, ...]) -> str:
    """The first few: every gate of every target says it, to whoever asked, in the audit and in reports."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
