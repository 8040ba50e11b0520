"""What applying a package would come to: under which terms, and in which order. Pure: nothing is touched.

The steps are named as those that a transaction notes, so that a plan can be held against a report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from asyncsup.instance import Instance
from asyncsup.lifecycle import State
from asyncsup.patch.manifest import Kind, Manifest
from asyncsup.patch.report import Part
from asyncsup.patch.transaction import Participant, files_said
from asyncsup.target import Target

Step = dict[str, Any]
"""``step target instance detail``, as in a report."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What is true for all targets of a patch alike: the strictest of what each is configured with.

    Attributes:
        probation: in seconds.
        manual_commit, manual_rollback: see `Change`.
    """

    probation: float
    manual_commit: bool
    manual_rollback: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "probation": self.probation,
            "commit": "manual" if self.manual_commit else "auto",
            "rollback": "manual" if self.manual_rollback else "auto",
        }


def terms_of(manifest: Manifest, targets: Sequence[Target]) -> Terms:
    settings = [target.config.patch for target in targets]
    longest = max(setting.probation for setting in settings)
    return Terms(
        probation=longest if manifest.probation is None else manifest.probation,
        manual_commit=any(setting.commit == "manual" for setting in settings),
        manual_rollback=any(setting.rollback == "manual" for setting in settings),
    )


def steps(manifest: Manifest, parts: Sequence[Part], terms: Terms) -> list[Step]:
    """What would be done to these targets, one after the other; what has the same name is done at once."""
    concerned = [(part, _concerned(part, manifest)) for part in parts]
    cold = manifest.kind is Kind.COLD
    done = [
        _step("stage", part.target, f"{files_said(part.changed)} for build {manifest.build}")
        for part in parts
    ]
    done += _hooks("pre_patch", parts, "if it fails, nothing is changed")
    for part, instances in concerned:
        done += _asked(part.target, instances)
    if cold:
        done += [
            _step(
                "stop",
                part.target,
                f"{_names(instances)}; started again after the switch" if instances else "nothing runs",
            )
            for part, instances in concerned
            if not part.target.config.rolls
        ]
    done.append(_step("switch", None, f"one rename for {', '.join(part.target.name for part in parts)}"))
    for part, instances in concerned:
        done += _restarted(part.target, instances, terms) if cold else _told(part.target, instances)
    done += _hooks("post_patch", parts, "if it fails, so has the patch")
    done.append(_step("probation", None, f"{terms.probation:g} s"))
    if terms.manual_commit:
        done.append(_step("await commit", None, "until `asyncsup patch commit`, or `abort`"))
    done.append(_step("commit", None, ""))
    return done


def replaced(instance: Instance, kind: Kind) -> Literal["beside", "in_turn", "stopped_first"] | None:
    """How a patch replaces the process of an instance: with another one beside it before it goes, by a
    restart after the switch, or stopped before that and started after it; None if it keeps its process.
    """
    if kind is Kind.WARM:
        return None
    if not instance.config.rolls:
        return "stopped_first"
    return "beside" if instance.config.overlaps and instance.ready else "in_turn"


def _concerned(part: Part, manifest: Manifest) -> list[Instance]:
    """Whoever a transaction that began at this moment would count."""
    participant = Participant(
        target=part.target,
        build_before=part.build_before,
        build_after=manifest.build,
        changed=part.changed,
        stage=lambda txn, progress: None,
    )
    participant.enlist()
    return participant.instances


def _hooks(name: Literal["pre_patch", "post_patch"], parts: Sequence[Part], otherwise: str) -> Iterator[Step]:
    for part in parts:
        hooks = part.target.config.hooks
        command: tuple[str, ...] | None = getattr(hooks, name)
        if command is not None:
            yield _step(name, part.target, f"{' '.join(command)}, within {hooks.timeout:g} s; {otherwise}")


def _asked(target: Target, instances: Sequence[Instance]) -> Iterator[Step]:
    settings = target.config.patch
    for instance in instances:
        if instance.told_by == "sdk" and (instance.ready or instance.state is State.STARTING):
            patience = f"{settings.ack_timeout:g} s to answer, {settings.wait_max:g} s if it asks to wait"
            yield _step("prepare", target, patience, instance)


def _told(target: Target, instances: Sequence[Instance]) -> Iterator[Step]:
    for instance in instances:
        if instance.ready or instance.state is State.STARTING:
            nobody = instance.told_by == "nobody"
            detail = "not told: it has no way to be" if nobody else f"by {instance.told_by}"
            yield _step("reload", target, detail, instance)


def _restarted(target: Target, instances: Sequence[Instance], terms: Terms) -> Iterator[Step]:
    patch, canary = target.config.patch, target.config.patch.canary
    details = [_names(instances) or "nothing is to run"]
    if target.config.rolls and instances:
        if 0 < canary < len(instances):
            first = f"{_names(instances[:canary])} for {terms.probation:g} s, before the others follow"
            yield _step("canary", target, first)
        beside = [i for i in instances if target.config.overlaps and i.ready]
        if beside:
            # They go only when all is decided: until then a successor that falls has taken nothing away.
            whom = "each" if len(beside) == len(instances) else _names(beside)
            details.append(f"{whom} beside the process it replaces, which stays until the commit")
        else:
            details.append("each stopped and started again")
        if patch.max_parallel is not None:
            details.append(f"{patch.max_parallel} at a time")
        if not target.config.overlaps and patch.min_available:
            details.append(f"with {patch.min_available} ready at any time")
    yield _step("start", target, ", ".join(details))


def _step(name: str, target: Target | None, detail: str, instance: Instance | None = None) -> Step:
    return {
        "step": name,
        "target": None if target is None else target.name,
        "instance": None if instance is None else instance.name,
        "detail": detail,
    }


def _names(instances: Sequence[Instance]) -> str:
    return ", ".join(instance.name for instance in instances)
