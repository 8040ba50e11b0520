"""Which targets can be patched, and which of them are meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncsup.errors import PatchRefusedError, TargetNotFoundError
from asyncsup.patch.manifest import Manifest
from asyncsup.target import Target

if TYPE_CHECKING:
    from asyncsup.supervisor import Supervisor


class Patchable:
    """Those targets of a supervisor that have a root."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def all(self) -> list[Target]:
        """Every one, in the order of the configuration."""
        return [target for target in self._supervisor.targets.values() if target.config.root is not None]

    def named(self, name: str) -> Target:
        """The one of that name.

        Raises:
            TargetNotFoundError: the name means none, or several.
            PatchRefusedError: ``gate.target``, it has no root.
        """
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

    def of(self, manifest: Manifest, named: str | None) -> list[Target]:
        """Those that a patch concerns.

        Args:
            named: the one that whoever sent the patch wants it for.

        Raises:
            PatchRefusedError: it names none that is here.
        """
        targets = self._supervisor.targets
        with_root = self.all()
        if not manifest.targets:
            if named is not None:
                return [self.named(named)]
            if len(with_root) == 1:
                return with_root
            raise PatchRefusedError(
                "the patch does not say which target it is for; name one of "
                f"{', '.join(target.name for target in with_root) or 'none here with a root'} (--target)",
                code="gate.target",
            )
        missing = [name for name in manifest.targets if name not in targets]
        if named is not None:
            target = self.named(named)
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
        return [self.named(name) for name in manifest.targets]
