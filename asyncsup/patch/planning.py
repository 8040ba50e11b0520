"""What `apply` would answer at this moment, without doing anything: the answer of `patch.plan`.

Everything that can close the way is looked at in the order in which an apply comes by it: trust, whoever has
a target, the gates, transactions that nobody has decided about, the content of every file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from asyncsup.errors import AsyncsupError, PatchMalformedError, PatchRefusedError
from asyncsup.patch import forecast
from asyncsup.patch.decisions import Decisions
from asyncsup.patch.examination import Examination
from asyncsup.patch.gates import Gate
from asyncsup.patch.intake import Intake, Source
from asyncsup.patch.jobs import Jobs
from asyncsup.patch.manifest import Kind
from asyncsup.patch.package import Package
from asyncsup.patch.patchable import Patchable
from asyncsup.patch.report import Part, describe_package, file_json, gate_json
from asyncsup.patch.store import waits_for_a_decision
from asyncsup.patch.wish import Wish
from asyncsup.target import Target

_CONTENTS: Final = "contents"


class Planning:
    """Plans patches for the targets of one supervisor."""

    def __init__(
        self,
        intake: Intake,
        patchable: Patchable,
        examination: Examination,
        decisions: Decisions,
        jobs: Jobs,
    ) -> None:
        self._intake = intake
        self._patchable = patchable
        self._examination = examination
        self._decisions = decisions
        self._jobs = jobs

    async def plan(self, source: Source, wish: Wish) -> dict[str, Any]:
        """What `apply` would do.

        Raises:
            AsyncsupError: as `apply` does when the package cannot be read, or is for no target that is here.
        """
        with await self._intake.open(source) as package:
            signed = await self._intake.judge_signatures(package, trust_clock=wish.trust_clock)
            trust = self._intake.judge_digest(source, package) or signed
            distrusted = None if trust is None or trust.ok else _as_error(trust, PatchMalformedError)
            try:
                targets = self._patchable.of(package.manifest, wish.target)
            except AsyncsupError as error:
                raise distrusted or error from None
            parts = await self._examination.examine(package, targets, wish, trust)
            contents: Gate | None = None
            refusal = distrusted or self._busy(parts, wish) or _closed(parts) or self._undecided(parts)
            patched = [part for part in parts if not part.assessment.already]
            if refusal is None and patched:
                contents, refusal = await self._contents(package, patched, wish)
            terms = forecast.terms_of(package.manifest, [part.target for part in patched or parts])
            verdict = "refused" if refusal is not None else "apply" if patched else "already"
            return {
                **describe_package(package),
                "signed": None if signed is None else gate_json(signed),
                "contents": None if contents is None else gate_json(contents),
                "verdict": verdict,
                "code": None if refusal is None else refusal.error_code,
                "reason": None if refusal is None else refusal.message,
                "exit_status": 0 if refusal is None else refusal.exit_status,
                **terms.to_json(),
                "targets": [self._target(part, package.manifest.kind) for part in parts],
                "steps": forecast.steps(package.manifest, patched, terms) if verdict == "apply" else [],
            }

    def _busy(self, parts: Sequence[Part], wish: Wish) -> AsyncsupError | None:
        """Closed only to whoever does not want to wait."""
        for part in parts:
            try:
                part.target.refuse_while_ending()
                if not wish.wait_busy:
                    part.target.refuse_if_busy()
            except AsyncsupError as error:
                _close(part, Gate(name="busy", ok=False, detail=error.message, code=error.error_code))
                return error
        return None

    def _undecided(self, parts: Sequence[Part]) -> AsyncsupError | None:
        for part in parts:
            txn = None if part.assessment.already else self._undecided_on(part.target)
            if txn is not None:
                error = waits_for_a_decision(part.target.name, txn)
                _close(part, Gate(name="undecided", ok=False, detail=error.message, code=error.error_code))
                return error
        return None

    def _undecided_on(self, target: Target) -> int | None:
        """The number of the patch of a target that somebody has to decide about, and nobody does just now."""
        txn = self._decisions.on(target.name)
        return None if any(job.report.txn == txn for job in self._jobs) else txn

    async def _contents(
        self, package: Package, parts: Sequence[Part], wish: Wish
    ) -> tuple[Gate, AsyncsupError | None]:
        """Whether every file can be made that the targets would get."""
        error = await self._examination.rehearse(parts, wish)
        if error is None:
            count = sum(change.sha256 is not None for change in package.manifest.files)
            detail = f"{count} file{'' if count == 1 else 's'} with the content that the manifest says"
            return Gate(name=_CONTENTS, ok=True, detail=detail), None
        gate = Gate(name=_CONTENTS, ok=False, detail=error.message, code=error.error_code)
        for part in parts:
            _close(part, gate)
        return gate, error

    def _target(self, part: Part, kind: Kind) -> dict[str, Any]:
        target, refused = part.target, part.assessment.refused
        return {
            "target": target.name,
            "state": target.state,
            "build": part.build_before,
            "already": part.assessment.already,
            "refused": gate_json(refused) if refused else None,
            "waits_for": target.under_way,
            "uncommitted": self._jobs.uncommitted(target.name),
            "undecided": self._decisions.on(target.name),
            "gates": [gate_json(gate) for gate in part.assessment.gates],
            "files": [file_json(plan) for plan in part.files],
            "instances": [
                {
                    "name": instance.name,
                    "pid": instance.pid,
                    "told_by": "restart" if kind is Kind.COLD else instance.told_by,
                    "replaced": forecast.replaced(instance, kind),
                }
                for instance in target.instances
                if instance.pid is not None
            ],
        }


def _close(part: Part, gate: Gate) -> None:
    """Add what stands in the way, before everything else that may: an apply comes by it first."""
    part.assessment = msgspec.structs.replace(
        part.assessment, gates=(gate, *part.assessment.gates), already=False
    )


def _closed(parts: Sequence[Part]) -> AsyncsupError | None:
    gates = (part.assessment.refused for part in parts)
    return next((_as_error(gate, PatchRefusedError) for gate in gates if gate is not None), None)


def _as_error(gate: Gate, kind: type[AsyncsupError]) -> AsyncsupError:
    return kind(gate.detail, code=gate.code)
