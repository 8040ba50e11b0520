"""What the checks ask of the machine: folders, users, programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncsup.patch.signers import Signer


class Machine:
    """Answers about this machine as it is now. Follows links; changes nothing; never raises `OSError`."""

    def __init__(self) -> None:
        self._programs: dict[tuple[str, Path | None, str | None], bool] = {}

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def is_directory(self, path: Path) -> bool:
        return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises where a folder above is not readable

    def is_cgroup2(self, path: Path) -> bool:
        """Whether a folder, or what it would be in, is of the cgroup v2 file system."""
        from asyncsup.cgroups import is_cgroup2  # noqa: PLC0415 - only where one is configured

        return is_cgroup2(path)

    def real_path(self, path: Path) -> Path:
        return Path(os.path.realpath(path))

    def effective_user(self) -> int:
        return os.geteuid()

    def effective_group(self) -> int:
        return os.getegid()

    def user_id(self, name: str) -> int | None:
        """The id of a user, given by name or number; None when there is no such user."""
        import pwd  # noqa: PLC0415 - only where a user is configured

        try:
            return (pwd.getpwuid(int(name)) if _is_id(name) else pwd.getpwnam(name)).pw_uid
        except (KeyError, OverflowError):
            return None

    def group_id(self, name: str) -> int | None:
        """The id of a group, given by name or number; None when there is no such group."""
        import grp  # noqa: PLC0415 - only where a group is configured

        try:
            return (grp.getgrgid(int(name)) if _is_id(name) else grp.getgrnam(name)).gr_gid
        except (KeyError, OverflowError):
            return None

    def writable_by_all(self, path: Path) -> bool:
        try:
            return bool(path.stat().st_mode & 0o002)
        except OSError:
            return False

    def allowed_signers(self, path: Path) -> tuple[Signer, ...]:
        """Raises AllowedSignersError."""
        from asyncsup.patch.trust import load_signers  # noqa: PLC0415 - only where signatures are required

        return load_signers(path)

    def require_cryptography(self) -> None:
        """Raises TrustUnavailableError."""
        from asyncsup.patch.trust import require_cryptography  # noqa: PLC0415 - as above

        require_cryptography()

    def has_program(self, program: str, directory: Path, search_path: str | None) -> bool:
        """Whether something by this name can be executed, in the folder or along the search path."""
        import shutil  # noqa: PLC0415 - slow to import, and clients never get here

        key = (program, directory if "/" in program else None, search_path)
        if key not in self._programs:
            name = str(directory / program) if "/" in program else program
            self._programs[key] = shutil.which(name, path=search_path or os.defpath) is not None
        return self._programs[key]


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10
