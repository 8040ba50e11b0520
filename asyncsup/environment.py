"""What an instance finds in its environment: inherited, from files, configured, and asyncsup's own."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from asyncsup.errors import SpawnError

NEVER_INHERITED: Final = frozenset(
    {"NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"}
)
"""Addressed to the supervisor itself by whoever started it; an instance would answer in its name."""


def read_env_file(path: Path) -> dict[str, str]:
    """Read ``NAME=VALUE`` lines; blank lines and ``#`` comments are skipped, shell quotes are honoured.

    Raises:
        SpawnError: the file cannot be read, or a line is no assignment; names the line, not its value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpawnError(f"env file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SpawnError(f"env file {path} cannot be read: {error}") from None
    variables: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip().removeprefix("export ")
        if not stripped or stripped.startswith("#"):
            continue
        name, equals, value = stripped.partition("=")
        if not equals or not name.strip().replace("_", "a").isalnum():
            raise SpawnError(f"env file {path}:{number}: not NAME=VALUE")
        try:
            variables[name.strip()] = (
                "".join(shlex.split(value, comments=False)) if value[:1] in "'\"" else value
            )
        except ValueError as error:
            raise SpawnError(f"env file {path}:{number}: {error}") from None
    return variables


def _login_variables(user: str) -> dict[str, str]:
    """As systemd sets them for ``User=``. Raises SpawnError."""
    import pwd  # noqa: PLC0415 - only where a user is configured

    try:
        record = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        raise SpawnError(f"there is no user {user} on this machine any more") from None
    return {
        "HOME": record.pw_dir,
        "USER": record.pw_name,
        "LOGNAME": record.pw_name,
        "SHELL": record.pw_shell or "/bin/sh",
    }


def may_be_inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """What of the supervisor's own environment an instance has that is to inherit all of it."""
    return {
        name: value
        for name, value in environ.items()
        if name not in NEVER_INHERITED and not name.startswith("ASYNCSUP_")
    }


def build_environment(
    *,
    environ: Mapping[str, str],
    inheritable: Mapping[str, str],
    inherit: bool | Iterable[str],
    user: str | None = None,
    env_files: Iterable[Path],
    env: Mapping[str, str],
    own: Mapping[str, str],
) -> dict[str, str]:
    """Put an environment together; later sources win, asyncsup's own variables win over all.

    Args:
        environ: the supervisor's own.
        inheritable: as much of that as `may_be_inherited` has left.
        inherit: ``inheritable``, nothing, or these names. PATH is always there: without one no
            program by name would be found.
        user: a name or a number; HOME, USER, LOGNAME and SHELL are theirs and not the supervisor's.
    """
    result: dict[str, str] = {}
    if inherit is True:
        result.update(inheritable)
    elif inherit is not False:
        result = {name: environ[name] for name in inherit if name in environ}
    if user is not None:
        result.update(_login_variables(user))
    result.setdefault("PATH", environ.get("PATH", "/usr/local/bin:/usr/bin:/bin"))
    for path in env_files:
        result.update(read_env_file(path))
    result.update(env)
    result.update(own)
    return result
