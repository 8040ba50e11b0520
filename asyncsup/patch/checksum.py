"""``FILE.sha256`` beside a package, as `sha256sum FILE > FILE.sha256` writes it."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Final

from asyncsup.errors import UsageError
from asyncsup.patch import fs

MAX_BYTES: Final = 1 << 20
"""Of a checksum file, which may list many packages. In an inbox it may be anybody's, and of any size."""

_LINE: Final = re.compile(r"\\?([0-9a-fA-F]{64})(?:[ \t]+\*?(.*))?", re.DOTALL)


def checksum_file(package: Path) -> Path:
    return package.parent / f"{package.name}.sha256"


def has_checksum(package: Path) -> bool:
    """Whether a checksum file lies beside a package, whatever it says."""
    try:
        return checksum_file(package).exists()
    except OSError:  # the package's name has no room for the ending
        return False


def read_checksum(package: Path) -> str | None:
    """The SHA-256 for `package` in the file beside it, in lower case; None without such a file.

    Of several lines, the one that names the package counts, whatever folder it names it in.

    Raises:
        UsageError: there is one, and it cannot be read, or has no checksum for this package, or several.
    """
    listed = checksum_file(package)
    content = _read(listed)
    if content is None:
        return None
    found: set[str] = set()
    # Lines as `sha256sum --check` has them: what else Python takes for the end of one may stand in a name.
    for line in content.decode("utf-8", "replace").split("\n"):
        match = _LINE.fullmatch(line.strip(" \t\r"))
        if match and (match[2] is None or Path(match[2]).name == package.name):
            found.add(match[1].lower())
    if len(found) == 1:
        return found.pop()
    what = "several different ones" if found else "no SHA-256"
    raise UsageError(f"{listed} has {what} for {package.name}", code="usage.sha256")


def _read(path: Path) -> bytes | None:
    """The content of a checksum file; None when there is none."""
    try:
        with fs.opened_file(path) as fd:
            content = fs.read_all(fd, MAX_BYTES + 1)
    except OSError as error:
        # A name that has no room for the ending has no such file beside it.
        if error.errno in {errno.ENOENT, errno.ENAMETOOLONG}:
            return None
        raise UsageError(f"{path} cannot be read: {error.strerror}", code="usage.sha256") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path} has more than {MAX_BYTES} bytes: no checksum file", code="usage.sha256")
    return content
