"""Packages as they come in: where they are, opening them, and whether they are to be trusted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
import msgspec

from asyncsup.config import PatchConfig
from asyncsup.errors import PatchMalformedError, PatchNotFoundError, PatchRefusedError, RequestError
from asyncsup.patch.checksum import read_checksum
from asyncsup.patch.clock import SeenClock
from asyncsup.patch.gates import Gate, expiry_gate
from asyncsup.patch.inbox import Inbox
from asyncsup.patch.package import Package, open_package
from asyncsup.patch.uploads import Uploads

if TYPE_CHECKING:
    from asyncsup.patch.trust import Endorsement

log = logging.getLogger("asyncsup.patch")


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a package is, and what its checksum should be.

    Attributes:
        identity: of the file, to know it again: see `identity_of`.
        sidecar: ``sha256`` is what a file beside the package says, not whoever asks.
        in_inbox: it lies there, to be moved away once it has been dealt with.
    """

    path: Path
    sha256: str | None = None
    crc32: int | None = None
    sidecar: bool = False
    identity: tuple[int, ...] | None = None
    in_inbox: bool = False

    @property
    def checked_against(self) -> str | None:
        """What says that it is the package that is meant."""
        if self.sha256 is not None:
            return "sha256 beside it" if self.sidecar else "sha256"
        return None if self.crc32 is None else "crc32"


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Device, inode, size and time of the last change; None when there is nothing.

    The inode alone is not enough: its number is given out again as soon as the file is gone.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Intake:
    """Takes packages from wherever they may be.

    Args:
        settings: ``[patch]`` as configured at the moment.
    """

    def __init__(
        self, settings: Callable[[], PatchConfig], inbox: Inbox, uploads: Uploads, clock: SeenClock
    ) -> None:
        self._settings = settings
        self._inbox = inbox
        self._uploads = uploads
        self._clock = clock

    @property
    def trust(self) -> str:
        """What is asked of a package before it is believed."""
        return self._settings().trust

    def find(
        self, *, path: str | None, upload: str | None, name: str | None, sha256: str | None, crc32: int | None
    ) -> Source:
        """Find the package a request means.

        Raises:
            RequestError: none or several ways to name it were given, or the path is not absolute.
            PatchNotFoundError: nothing there.
            UsageError: the checksum file beside it is of no use.
        """
        if sum(value is not None for value in (path, upload, name)) != 1:
            raise RequestError("give exactly one of path, upload and name")
        if upload is not None:
            return Source(path=self._uploads.path(upload), sha256=sha256, crc32=crc32)
        if name is not None:
            found, in_inbox = self._inbox.find(name), True
        else:
            found = Path(path or "")
            if not found.is_absolute():
                raise RequestError("path: must be absolute, the supervisor has another working directory")
            try:
                is_file = found.is_file()
            except OSError as error:
                raise PatchNotFoundError(f"{found}: {error.strerror}", path=str(found)) from None
            if not is_file:
                raise PatchNotFoundError(f"{found}: no such file", path=str(found))
            in_inbox = found.parent == self._settings().inbox
        beside = read_checksum(found) if sha256 is None else None
        return Source(
            path=found,
            sha256=sha256 or beside,
            crc32=crc32,
            sidecar=beside is not None,
            in_inbox=in_inbox,
            identity=identity_of(found),
        )

    async def open(self, source: Source, *, must_be_trusted: bool = False) -> Package:
        """Open a package, which is the caller's to close.

        Raises:
            PatchMalformedError: it is not what it should be; or nothing is there to verify it by, and it must
                be trusted.
        """
        package = await anyio.to_thread.run_sync(
            partial(
                open_package,
                source.path,
                limits=self._settings().limits,
                sha256=source.sha256,
                crc32=source.crc32,
                follow=not source.in_inbox,
                private_copies=self._uploads.folder if must_be_trusted else None,
            )
        )
        # Afterwards: whatever else is wrong with it is not mended by a checksum.
        missing = self.judge_digest(source, package) if must_be_trusted else None
        if missing is not None:
            package.close()
            raise PatchMalformedError(missing.detail, code=missing.code)
        if must_be_trusted and source.sha256 is None and source.crc32 is None and self.trust == "none":
            log.warning('%s is applied without any verification: trust = "none"', source.path.name)
        return package

    def judge_digest(self, source: Source, package: Package) -> Gate | None:
        """A closed gate where the configuration wants a checksum and there is none. (One that there is has
        been compared when the package was opened.)"""
        weak = source.crc32 is not None and package.format == "prototype"
        if source.sha256 is not None or weak or self.trust != "digest":
            return None
        return Gate(
            name="trust",
            ok=False,
            detail=f'{source.path.name}: nothing to verify it by; trust = "digest" wants its SHA-256 '
            f"(or the CRC-32 of a prototype package), or a file {source.path.name}.sha256 beside it",
            code="trust.digest_missing",
        )

    def check_signatures(self, package: Package, *, trust_clock: bool = False) -> Endorsement | None:
        """Who signed a package; None where the configuration does not ask. In a worker thread.

        Args:
            trust_clock: the clock is right, whatever the time has been before.
        Raises:
            PatchMalformedError: it is not signed as the configuration asks for.
            AllowedSignersError, TrustUnavailableError: that cannot be told.
        """
        settings = self._settings()
        if settings.trust != "required":
            return None
        assert settings.allowed_signers is not None, "the configuration was checked"
        # Loaded with such a configuration already, by its check.
        from asyncsup.patch.trust import check_package, load_signers  # noqa: PLC0415

        # Read each time: a key that is taken out of the file counts no longer.
        signers = load_signers(settings.allowed_signers)
        now, seen = self._clock.now()
        # Were the clock set back, keys that are not valid any more would come back to life.
        moment = now if trust_clock or seen is None else seen
        return check_package(package, signers, required=settings.signatures_required, now=moment)

    async def judge_signatures(self, package: Package, *, trust_clock: bool = False) -> Gate | None:
        """As `check_signatures`, where a refusal is an answer as well."""
        check = partial(self.check_signatures, package, trust_clock=trust_clock)
        try:
            return trust_gate(await anyio.to_thread.run_sync(check))
        except PatchMalformedError as error:
            return Gate(name="trust", ok=False, detail=error.message, code=error.error_code)

    def refuse_expired(self, package: Package) -> None:
        """Raises PatchRefusedError when a package has expired by now."""
        now, seen = self._clock.now()
        gate = expiry_gate(package.manifest, now, seen)
        if not gate.ok:
            raise PatchRefusedError(gate.detail, code=gate.code)


def trust_gate(endorsement: Endorsement | None) -> Gate | None:
    """What was found out about signatures, as a gate; None where none are asked for."""
    return None if endorsement is None else Gate(name="trust", ok=True, detail=str(endorsement))
