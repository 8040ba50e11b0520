"""``FILE.sha256`` beside a package, as `sha256sum FILE > FILE.sha256` writes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from asyncsup.errors import UsageError

_LINE: Final = re.compile(r"\\?([0-9a-fA-F]{64})(?:[ \t]+\*?(.*))?")


def checksum_file(package: Path) -> Path:
    return package.with_name(f"{package.name}.sha256")


def read_checksum(package: Path) -> str | None:
    """The SHA-256 for `package` in the file beside it, in lower case; None without such a file.

    Of several lines, the one that names the package counts, whatever folder it names it in.

    Raises:
        UsageError: there is one, and it cannot be read, or has no checksum for this package.
    """
    listed = checksum_file(package)
    if listed.exists() and not listed.is_file():
        raise UsageError(f"{listed} is not a file", code="usage.sha256")
    try:
        lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{listed} cannot be read: {error.strerror}", code="usage.sha256") from None
    for line in lines:
        match = _LINE.fullmatch(line.strip())
        if match and (match[2] is None or Path(match[2]).name == package.name):
            return match[1].lower()
    raise UsageError(f"{listed} has no SHA-256 for {package.name}", code="usage.sha256")
