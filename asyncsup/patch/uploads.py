"""Packages that arrive piece by piece over the control socket."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from asyncsup.config.settings import PatchLimits
from asyncsup.errors import PatchError, PatchMalformedError, RequestError
from asyncsup.ipc import private_directory
from asyncsup.patch.archive import limit

CHUNK_BYTES: Final = 512 << 10
"""Most that one piece may carry: as base64 in JSON it still fits a message."""

MOST: Final = 16
"""Uploads at a time, which together may have as many bytes as `SHARES` of the largest."""

SHARES: Final = 4

IDLE_SECONDS: Final = 3600.0
"""Without a new piece for so long, nobody is going to apply it."""


class Uploads:
    """Files in a private folder, one for each upload; none outlives the supervisor that took it."""

    def __init__(self, folder: Path, limits: Callable[[], PatchLimits]) -> None:
        self.folder: Final = folder
        self._limits = limits
        private_directory(folder)
        for leftover in folder.iterdir():
            leftover.unlink()

    def take(self, upload: str | None, offset: int, data: bytes, *, last: bool) -> dict[str, Any]:
        """Take one piece. Pieces come in order; a repeated piece is harmless.

        Raises:
            RequestError: unknown upload, or a gap.
            PatchMalformedError: more than a package may have; what had come is dropped.
            PatchError: ``upload.quota``: too many, or too large together; nothing was taken.
                ``upload.failed``: it could not be written; what had come is dropped.
        """
        self._make_room(len(data), begins=upload is None)
        if upload is None:
            upload = secrets.token_hex(8)
            with self._reporting(self.folder / upload):
                (self.folder / upload).touch(mode=0o600)
        path = self.path(upload)
        size = path.stat().st_size
        if offset > size:
            raise RequestError(f"offset: {offset} leaves a gap, {size} bytes have arrived")
        if offset + len(data) > self._limits().package_size:
            path.unlink()
            raise PatchMalformedError(
                f"the package is too large: {limit(self._limits(), 'package_size')}", code="zip.package_size"
            )
        with self._reporting(path), path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        return {"upload": upload, "size": max(size, offset + len(data)), "complete": last}

    @contextlib.contextmanager
    def _reporting(self, path: Path) -> Iterator[None]:
        """Turn what the system says into an error with a code; half a package is of no use to anybody."""
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise PatchError(
                f"the upload cannot be written in {self.folder}: {error.strerror or error}; nothing of it is "
                "kept",
                code="upload.failed",
            ) from error

    def _make_room(self, size: int, *, begins: bool) -> None:
        """Forget what was given up, and make sure that `size` bytes more are not too many."""
        count = taken = 0
        for path in self.folder.iterdir():
            status = path.stat()
            if begins and time.time() - status.st_mtime > IDLE_SECONDS:
                path.unlink()
                continue
            count, taken = count + 1, taken + status.st_size
        if (begins and count >= MOST) or taken + size > SHARES * self._limits().package_size:
            raise PatchError(
                f"{count} uploads of {taken} bytes wait to be applied, and no more are taken; apply them, or "
                f"wait {IDLE_SECONDS:.0f} s for those that were given up to be forgotten",
                code="upload.quota",
            )

    def path(self, upload: str) -> Path:
        """Raises RequestError when there is no such upload."""
        path = self.folder / upload
        if len(upload) != 16 or not upload.isalnum() or not path.exists():
            raise RequestError(f"upload: {upload!r} is not an upload of this supervisor")
        return path

    def drop(self, path: Path) -> None:
        """Forget an upload that has been dealt with; any other file is left alone."""
        if self.has(path):
            path.unlink(missing_ok=True)

    def has(self, path: Path) -> bool:
        return path.parent == self.folder
