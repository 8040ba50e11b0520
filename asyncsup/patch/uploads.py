"""Packages that arrive piece by piece over the control socket."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Final

from asyncsup.errors import PatchMalformedError, RequestError

CHUNK_BYTES: Final = 512 << 10
"""Most that one piece may carry: as base64 in JSON it still fits a message."""


class Uploads:
    """Files in a private folder, one for each upload; none outlives the supervisor that took it.

    Args:
        max_bytes: of one package.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        folder.mkdir(mode=0o700, exist_ok=True)
        for leftover in folder.iterdir():
            leftover.unlink()

    def take(self, upload: str | None, offset: int, data: bytes, *, last: bool) -> dict[str, Any]:
        """Take one piece. Pieces come in order; a repeated piece is harmless.

        Raises:
            RequestError: unknown upload, or a gap.
            PatchMalformedError: more than a package may have; what had come is dropped.
        """
        if upload is None:
            upload = secrets.token_hex(8)
            (self._folder / upload).touch(mode=0o600)
        path = self.path(upload)
        size = path.stat().st_size
        if offset > size:
            raise RequestError(f"offset: {offset} leaves a gap, {size} bytes have arrived")
        if offset + len(data) > self._max_bytes:
            path.unlink()
            raise PatchMalformedError(
                f"the package is larger than max_package ({self._max_bytes} bytes)", code="zip.too_large"
            )
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        return {"upload": upload, "size": max(size, offset + len(data)), "complete": last}

    def path(self, upload: str) -> Path:
        """Raises RequestError when there is no such upload."""
        path = self._folder / upload
        if len(upload) != 16 or not upload.isalnum() or not path.exists():
            raise RequestError(f"upload: {upload!r} is not an upload of this supervisor")
        return path

    def drop(self, path: Path) -> None:
        """Forget an upload that has been dealt with; any other file is left alone."""
        if self.has(path):
            path.unlink(missing_ok=True)

    def has(self, path: Path) -> bool:
        return path.parent == self._folder
