"""Going back, up to the transaction: where it leads on which targets, and each target's part in it.

All of it blocks, and is for worker threads.
"""

from __future__ import annotations

from asyncsup.errors import PatchNotFoundError, UsageError
from asyncsup.patch.gates import Assessment
from asyncsup.patch.history import may_be_called
from asyncsup.patch.manifest import Kind
from asyncsup.patch.patchable import Patchable
from asyncsup.patch.plan import Policy
from asyncsup.patch.report import Part
from asyncsup.patch.store import Store
from asyncsup.patch.transaction import Participant, Progress
from asyncsup.patch.way_back import Extent, Stacks, goals_of_patch, goals_of_target
from asyncsup.patch.wish import WayBack
from asyncsup.target import Target


class Rollback:
    """Asks the store of one supervisor what going back would be."""

    def __init__(self, store: Store, patchable: Patchable) -> None:
        self._store = store
        self._patchable = patchable

    def goals(self, way: WayBack) -> dict[str, int]:
        """Which targets go back to which generation.

        Raises:
            AsyncsupError: as `goals_of_target` and `goals_of_patch` do.
            UsageError: a patch is named together with what can be said of a target only; or it is no patch.
        """
        named = [target for target in self._patchable.all() if target.name == way.reference]
        stacks = {target.name: self._store.preview.stack(target.name) for target in self._patchable.all()}
        if not named and may_be_called(way.reference):
            if way.only or way.together or way.extent != Extent():
                raise UsageError(
                    f"{way.reference} is a patch, and is taken back as a whole; how far to go, and on which "
                    "targets, is said of a target",
                    reference=way.reference,
                )
            return self._goals_of_patch(way.reference, stacks)
        target = self._patchable.named(way.reference)
        return goals_of_target(stacks, target.name, way.extent, only=way.only, together=way.together)

    def _goals_of_patch(self, reference: str, stacks: Stacks) -> dict[str, int]:
        found = self._store.history.find(reference)
        by_number = reference.isdecimal() and found["txn"] == int(reference)
        if by_number and found["action"] != "apply":
            raise UsageError(
                f"transaction {reference} is a rollback itself; apply the patch again", txn=found["txn"]
            )
        if found["patch"] is None:
            raise PatchNotFoundError(f"transaction {reference} applied no patch", reference=reference)
        among = [name for name in stacks if not by_number or name in found["targets"]]
        title = " ".join(str(found[key]) for key in ("name", "version") if found[key])
        return goals_of_patch(stacks, found["patch"], f"{title} (build {found['build']})", among)

    def part(self, target: Target, generation: int, policy: Policy) -> Part:
        """What one target is to take part with."""
        before = self._store.state(target.name)
        ahead = self._store.preview.describe_rollback(target.name, generation, policy)
        part = Part(
            target=target,
            package=None,
            assessment=Assessment(target=target.name, gates=(), already=False),
            files=ahead.files,
            build_before=before.build,
            kind=Kind(ahead.kind),
        )

        def stage(txn: int, _: Progress) -> None:
            part.take_in(self._store.stage_rollback(txn, target.name, generation, policy=policy))

        part.participant = Participant(
            target=target,
            build_before=before.build,
            build_after=ahead.build,
            changed=part.changed,
            stage=stage,
        )
        return part
