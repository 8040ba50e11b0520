"""What speaks for and against a patch on each of its targets: every gate is judged, nothing is touched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import anyio.from_thread
import anyio.to_thread
from msgspec.structs import replace

from asyncsup.errors import PatchMalformedError, PatchRefusedError
from asyncsup.lifecycle import State
from asyncsup.patch import delta, fs
from asyncsup.patch.clock import SeenClock
from asyncsup.patch.entry import program_files
from asyncsup.patch.gates import Assessment, Gate, TargetFacts, assess, files_gate, space_gate
from asyncsup.patch.package import Package
from asyncsup.patch.plan import FilePlan
from asyncsup.patch.prototype import with_root_name
from asyncsup.patch.report import PackageView, Part
from asyncsup.patch.space import Need
from asyncsup.patch.store import Store
from asyncsup.patch.wish import Wish
from asyncsup.target import Target


class Examination:
    """Collects what the gates go by, from the store and from what instances say of themselves."""

    def __init__(self, store: Store, clock: SeenClock) -> None:
        self._store = store
        self._clock = clock

    async def examine(
        self, package: Package, targets: Sequence[Target], wish: Wish, trust: Gate | None
    ) -> list[Part]:
        """Judge every gate for every target. The room that one needs is not there for the next."""
        needs: list[Need] = []
        return [await self._assess(package, target, wish, trust, needs) for target in targets]

    async def rehearse(
        self, parts: Sequence[Part], wish: Wish
    ) -> PatchMalformedError | PatchRefusedError | None:
        """Make every file that these targets would get, and throw it away; why that fails, or None."""
        done: set[str] = set()
        for part in parts:
            assert part.package is not None
            make = partial(
                self._store.preview.rehearse,
                part.target.name,
                part.package,
                wish.policy_for(part.target),
                done,
                lambda _: anyio.from_thread.check_cancelled(),
            )
            try:
                await anyio.to_thread.run_sync(make)
            except (PatchMalformedError, PatchRefusedError) as error:
                return error
        return None

    async def _assess(
        self, package: Package, target: Target, wish: Wish, trust: Gate | None, needs: list[Need]
    ) -> Part:
        assert target.config.root is not None
        manifest = package.manifest
        if package.format == "prototype":
            manifest = with_root_name(manifest, target.config.root.name)
        state = self._store.state(target.name)
        known = [instance.hello for instance in target.instances if instance.hello is not None]
        matches = await anyio.to_thread.run_sync(self._store.preview.content_matches, target.name, manifest)
        marks = self._store.marks(target.name)
        facts = TargetFacts(
            name=target.name,
            region=target.config.region,
            build=max([state.build, *(hello.build for hello in known if hello.build is not None)]),
            patch=state.patch,
            content_matches=matches,
            allow=target.config.patch.allow,
            held=self._store.held(package.id),
            program=_program(target),
            highest=marks.highest if marks is not None else None,
            build_floor=marks.floor if marks is not None else None,
            reads_deltas=delta.available(),
        )
        signed = trust is not None and trust.ok
        now, seen = self._clock.now()
        if wish.trust_clock:
            seen = None
        assessment = assess(
            manifest, package.id, facts, now=now, seen=seen, signed=signed, retry_held=wish.retry_held
        )
        if trust is not None:
            assessment = replace(
                assessment, gates=(trust, *assessment.gates), already=assessment.already and trust.ok
            )
        elsewhere = {hello.region for hello in known if hello.region is not None}
        elsewhere -= {target.config.region, *manifest.regions}
        if elsewhere:
            regions = ", ".join(manifest.regions)
            detail = f"patch is for {regions}, {target.name} says it runs in {elsewhere.pop()}"
            gate = Gate(name="region", ok=False, detail=detail, code="gate.region")
            assessment = Assessment(target=target.name, gates=(*assessment.gates, gate), already=False)
        files = tuple(FilePlan(path=change.path, op=change.op.value) for change in manifest.files)
        if assessment.refused is None and not assessment.already:
            look = partial(self._store.preview.survey, target.name, manifest, wish.policy_for(target))
            survey = await anyio.to_thread.run_sync(look)
            files = survey.files
            needs += survey.needs
            gates = (*assessment.gates, files_gate(survey.files), space_gate(fs.rooms(needs)))
            assessment = Assessment(target=target.name, gates=gates, already=False)
        return Part(
            target=target,
            package=PackageView(package, manifest),
            assessment=assessment,
            files=files,
            build_before=state.build,
        )


def _program(target: Target) -> frozenset[str]:
    """The files of a target that are not to change while its processes run on."""
    config = target.config
    # Whoever waits, or is to be tried again, may come up at any moment, and find the old file.
    is_down = all(i.state in {State.STOPPED, State.EXITED, State.FAILED} for i in target.everybody)
    # Of a oneshot the next run is what counts, and one that runs is not to be broken off for it.
    return frozenset() if is_down or config.patch.warm_program or config.oneshot else program_files(config)
