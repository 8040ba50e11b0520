"""Finding and loading the configuration: the only part that reads files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from asyncsup.config.machine import Machine
from asyncsup.config.reader import Reader, absolute
from asyncsup.config.settings import Config, PatchLimits, SupervisorConfig
from asyncsup.config.values import quoted
from asyncsup.errors import ConfigError


def find_config(explicit: Path | None, environ: Mapping[str, str]) -> Path:
    """Find the configuration: ``-c FILE``, ``$ASYNCSUP_CONFIG``, then the usual places.

    Raises:
        ConfigError: ``config.not_found``; says where it looked.
    """
    if explicit is not None:
        named, how = explicit, "-c"
    elif environ.get("ASYNCSUP_CONFIG"):
        named, how = Path(environ["ASYNCSUP_CONFIG"]), "$ASYNCSUP_CONFIG"
    else:
        looked = list(_usual_places(environ))
        for path in looked:
            if os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a folder is not readable
                return path
        raise ConfigError(
            f"no configuration found; looked for {', '.join(map(str, looked))}. "
            "`asyncsup init` writes one here; `-c FILE` and $ASYNCSUP_CONFIG name one that is elsewhere.",
            code="config.not_found",
            looked=[str(path) for path in looked],
        )
    try:
        named.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise _not_found(named, f", named by {how}") from None
    except OSError:
        pass  # it is there; `load_config` says why it cannot be read
    return named


def _usual_places(environ: Mapping[str, str]) -> Iterator[Path]:
    yield Path("asyncsup.toml")
    base = environ.get("XDG_CONFIG_HOME", "")
    if base.startswith("/"):  # the XDG specification: a relative one is ignored
        yield Path(base, "asyncsup/asyncsup.toml")
    elif home := environ.get("HOME"):
        yield Path(home, ".config/asyncsup/asyncsup.toml")
    yield Path("/etc/asyncsup/asyncsup.toml")


def _not_found(path: Path, how: str = "") -> ConfigError:
    return ConfigError(
        f"{path}: there is no such file{how}. `asyncsup init` writes a configuration to start from.",
        code="config.not_found",
        looked=[str(path)],
    )


def load_config(path: Path, *, environ: Mapping[str, str] | None = None) -> Config:
    """Read a configuration and the files it includes, and check them against this machine.

    Args:
        environ: the environment of the supervisor, by default of this process.

    Raises:
        ConfigError: with every problem in ``details["problems"]`` (see `Problem`), one to a line;
            with the code ``config.not_found`` or ``config.unreadable`` when there is nothing to read.
    """
    reader = _open(path, environ)
    place, patterns = reader.include_patterns()
    seen = {os.path.realpath(path)}  # a pattern may match the including file, and a file two patterns
    for pattern in patterns:
        files = _matches(path, pattern)
        if not files:
            reader.report.warn(place, f"no file matches {quoted(pattern)}")
        for file, shown in files:
            if (real := os.path.realpath(file)) in seen:
                continue
            seen.add(real)
            try:
                content: bytes | OSError = file.read_bytes()
            except OSError as error:
                content = error
            reader.add(file, content, shown=shown)
    return reader.config()


def load_supervisor(path: Path, *, environ: Mapping[str, str] | None = None) -> SupervisorConfig:
    """Read `[supervisor]` alone, for clients: a mistake elsewhere must not keep them from the supervisor.

    Raises:
        ConfigError: as `load_config`, for what is wrong in `[supervisor]` or with the file as a whole.
    """
    return _open(path, environ).supervisor()


def load_patch_limits(path: Path, *, environ: Mapping[str, str] | None = None) -> PatchLimits:
    """Read `[patch.limits]` alone, for whoever makes or checks packages without a supervisor.

    Raises:
        ConfigError: as `load_config`, for what is wrong in `[patch.limits]` or with the file as a whole.
    """
    return _open(path, environ).patch_limits()


def _open(path: Path, environ: Mapping[str, str] | None) -> Reader:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise _not_found(path) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", code="config.unreadable") from None
    reader = Reader(environ=os.environ if environ is None else environ, machine=Machine())
    reader.add(path, content, shown=str(path))
    reader.report.raise_problems()
    return reader


def _matches(main: Path, pattern: str) -> list[tuple[Path, str]]:
    """The files of an include pattern, ordered by name: where each is, and what the user would call it."""
    import glob  # noqa: PLC0415 - most configurations include nothing

    here = absolute(main).parent
    # Not Path.glob: it takes no absolute pattern.
    names = sorted(glob.glob(pattern, root_dir=here, recursive=True))  # noqa: PTH207
    files = [(here / name, str(main.parent / name)) for name in names]
    return [(file, shown) for file, shown in files if not os.path.isdir(file)]  # noqa: PTH112 - never raises
