"""Looking without touching: what has become of a target's files, what a patch or a way back would do."""

from __future__ import annotations

from asyncsup.patch.access import Access
from asyncsup.patch.database import GenerationRow
from asyncsup.patch.facts import RollbackPlan, Survey
from asyncsup.patch.manifest import Manifest
from asyncsup.patch.plan import FilePlan, Policy
from asyncsup.patch.statedir import StateDirectory
from asyncsup.patch.target_files import PatchSource, Progress
from asyncsup.patch.way_back import Layer


class Preview:
    """What can be asked about the targets of one store before anything is done to them."""

    def __init__(self, state: StateDirectory, access: Access) -> None:
        self._state = state
        self._database = state.database
        self._access = access

    def content_matches(self, target: str, manifest: Manifest) -> bool:
        """Whether the target's files already are what the patch would make them."""
        with self._access.reporting(target):
            return self._access.files(target).matches(manifest.files)

    def plan(self, target: str, manifest: Manifest, policy: Policy = "refuse") -> list[FilePlan]:
        """What the patch would do to each file, in the manifest's order; what stands in the way is in
        `FilePlan.error`. Files it does not name follow where there is something to say about them.

        Raises:
            PatchRefusedError: the target has no root folder.
        """
        return list(self.survey(target, manifest, policy).files)

    def survey(self, target: str, manifest: Manifest, policy: Policy = "refuse") -> Survey:
        """What `plan` says, and what staging the patch takes.

        Raises:
            PatchRefusedError: the target has no root folder.
        """
        files = self._access.files(target)
        with self._access.reporting(target):
            planned = files.plan(manifest.files, policy)
            named = {change.path for change in manifest.files}
            odd = [plan for plan in files.drifted() if plan.path not in named]
            return Survey(
                files=(*(item.plan for item in planned), *odd),
                needs=tuple(files.needs([item for item in planned if item.plan.error is None])),
            )

    def refuse_guarded(self, target: str, manifest: Manifest) -> None:
        """Raises PatchRefusedError if the patch would change what no patch may, by now."""
        with self._access.reporting(target):
            self._access.files(target).refuse_guarded(manifest.files)

    def rehearse(
        self, target: str, package: PatchSource, policy: Policy, done: set[str], progress: Progress
    ) -> None:
        """Make what staging the patch would, and throw it away.

        Args:
            done: files whose content has been made already, for another target; added to.
            progress: called with the number of bytes made since the last call.
        Raises:
            PatchMalformedError, PatchRefusedError: as `Store.stage`, about the content of files.
        """
        files = self._access.files(target)
        with self._access.reporting(target):
            files.rehearse(package, files.plan(package.manifest.files, policy), done, progress)

    def drifted(self, target: str) -> list[FilePlan]:
        """Files of a target that are not as patches have left them, and why.

        Raises:
            PatchRefusedError: the target has no root folder.
        """
        with self._access.reporting(target):
            return self._access.files(target).drifted()

    def stack(self, target: str) -> tuple[Layer, ...]:
        """The target's current generation, the one that was made from, and so on."""
        number: int | None = self._state.number(target)
        rows = {row.number: row for row in self._database.generations(target)}
        layers = []
        while number is not None and number in rows:
            row = rows[number]
            layers.append(
                Layer(
                    generation=number,
                    build=row.build,
                    patch=row.patch,
                    title=self._title(row),
                    kept=row.state == "live" and (row.place == "root" or self._state.exists(target, number)),
                    bottom=row.parent is None,
                )
            )
            number = row.parent
        return tuple(layers)

    def _title(self, row: GenerationRow) -> str:
        applied = None if row.patch is None else self._database.apply_of_patch(row.patch)
        if applied is None:
            return f"build {row.build}"
        return f"{applied.name} {applied.version} (build {applied.build})"

    def rollback_target(self, target: str) -> int | None:
        """The generation a rollback leads to: the one the current one was made from, while it is kept."""
        generation = self._database.generation(target, self._state.number(target))
        if generation.parent is None or not self._state.exists(target, generation.parent):
            return None
        return generation.parent

    def describe_rollback(self, target: str, generation: int, policy: Policy = "refuse") -> RollbackPlan:
        """What `Store.stage_rollback` to `generation` would do.

        Raises:
            StateError: there is no such generation.
        """
        now = self._state.number(target)
        rows = {row.number: row for row in self._database.generations(target)}
        goal = self._database.generation(target, generation)
        kinds, number = set(), now
        while number != generation:
            row = rows[number]
            applied = None if row.patch is None else self._database.apply_of_patch(row.patch)
            kinds.add(None if applied is None else applied.kind)
            if row.parent is None:
                break
            number = row.parent
        return RollbackPlan(
            generation=generation,
            build=goal.build,
            kind="warm" if kinds == {"warm"} else "cold",
            files=tuple(item.plan for item in self._access.files(target).plan_back(now, generation, policy)),
        )
