"""How values are written in `asyncsup.toml`: durations, sizes, commands, signals, paths and the rest. Pure.

A `ValueType` reads a TOML value into a typed one, or raises `BadValueError`, and shows a typed value as it
would be written. `asyncsup.config.settings` says which key takes which.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, get_args

from asyncsup.config.address import Address

if TYPE_CHECKING:
    from asyncsup.patch.manifest import Kind

T = TypeVar("T")
N = TypeVar("N", int, float)

MAX_DURATION: Final = 365 * 86_400.0
"""Seconds. Event loops overflow on very large timeouts; nobody means a longer one."""

UNLIMITED: Final = -1
"""RLIM_INFINITY, as a value of `LIMITS`."""

INSTANCE: Final = "${instance}"
"""Stays in commands, environment and log paths, and is replaced by the instance's index at each start."""

_NO_FILE: Final = re.compile(r"/dev/(stdout|stderr|null|console|fd/[0-9]+)|/proc/self/fd/[0-9]+")

COMMAND_HINT: Final = 'write an array: ["program", "argument"]'


def is_no_file(path: Path) -> bool:
    """Output may go there from any number of instances: it is no file of ours, whatever is behind it."""
    return _NO_FILE.fullmatch(str(path)) is not None


def is_one_file(path: Path) -> bool:
    """All instances of a target would write into the same file there."""
    return INSTANCE not in str(path) and not is_no_file(path)


class BadValueError(ValueError):
    """A value is not what its key takes. The reader adds the file, the line and the key."""

    def __init__(self, problem: str, hint: str | None = None) -> None:
        super().__init__(problem if hint is None else f"{problem}; {hint}")
        self.problem = problem
        self.hint = hint


_DURATION_UNITS: Final = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION: Final = re.compile(r"(?! )(?: ?[0-9]+(?:\.[0-9]+)? ?(?:ms|s|m|h|d))+")
_DURATION_PART: Final = re.compile(r"([0-9.]+) ?([a-z]+)")
_DURATION_HINT: Final = 'write a number of seconds, or a text such as "500ms", "10s", "1.5m", "1h30m"'


def parse_duration(value: object) -> float:
    """Read ``"10s"``, ``"500ms"``, ``"1h30m"`` or a number of seconds as seconds, exact to a microsecond.

    Raises:
        ValueError: it is none of these, negative, or more than 365 days.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value <= MAX_DURATION:  # also false for nan
            raise BadValueError("not a duration from 0 to 365 days")
        return round(float(value), 6)
    if not isinstance(value, str):
        raise BadValueError(f"must be a duration, got {type_name(value)}", _DURATION_HINT)
    if not _DURATION.fullmatch(value):
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
            raise BadValueError("a duration without a unit", f'write "{value}s" for seconds')
        raise BadValueError("not a duration", _DURATION_HINT)
    seconds = sum(float(part[1]) * _DURATION_UNITS[part[2]] for part in _DURATION_PART.finditer(value))
    if seconds > MAX_DURATION:
        raise BadValueError("not a duration from 0 to 365 days")
    return round(seconds, 6)


def format_duration(seconds: float) -> str:
    """Write a duration as `parse_duration` reads it."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:.3f}".rstrip("0").rstrip(".") + "ms"
    for unit in ("d", "h", "m"):
        if seconds and seconds % _DURATION_UNITS[unit] == 0:
            return f"{seconds / _DURATION_UNITS[unit]:.0f}{unit}"
    return f"{seconds:.6f}".rstrip("0").rstrip(".") + "s"


_SIZE_UNITS: Final = {
    "TB": 10**12, "TiB": 2**40, "GB": 10**9, "GiB": 2**30,
    "MB": 10**6, "MiB": 2**20, "KB": 10**3, "KiB": 2**10, "B": 1,
}  # fmt: skip
_SIZE_BY_FOLDED: Final = {name.lower(): factor for name, factor in _SIZE_UNITS.items()}
_SIZE: Final = re.compile(r"([0-9]{1,19})(?:\.([0-9]{1,19}))? ?([kmgt]?i?b)", re.IGNORECASE)
_SIZE_HINT: Final = 'write a number of bytes, or a text such as "64KiB", "50MB" (10^6), "1GiB" (2^30)'
_MAX_SIZE: Final = 2**63 - 1


def parse_size(value: object) -> int:
    """Read ``"50MB"`` (10^6), ``"64KiB"`` (2^10) or a number of bytes as bytes.

    Raises:
        ValueError: it is none of these, negative, no whole number of bytes, or 2^63 and more.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str):
        match = _SIZE.fullmatch(value)
        factor = _SIZE_BY_FOLDED.get(match[3].lower()) if match else None
        if match is None or factor is None:
            raise BadValueError("not a size", _SIZE_HINT)
        fraction = match[2] or ""
        size, rest = divmod(int(match[1] + fraction) * factor, 10 ** len(fraction))
        if rest:
            raise BadValueError("not a whole number of bytes")
    else:
        raise BadValueError(f"must be a size, got {type_name(value)}", _SIZE_HINT)
    if not 0 <= size <= _MAX_SIZE:
        raise BadValueError("not a size from 0 to 2^63-1 bytes")
    return size


def format_size(size: int) -> str:
    """Write a size as `parse_size` reads it."""
    unit = next(name for name, factor in _SIZE_UNITS.items() if size % factor == 0) if size else "B"
    return f"{size // _SIZE_UNITS[unit]}{unit}"


_VARIABLE: Final = re.compile(r"\$(?:\$|\{([^}]*)(\}?))")


class Scope:
    """What ``${...}`` and a relative path mean at the place where a value stands.

    Args:
        here: the folder of the file the value stands in.
        name: the target's name, None outside of targets.
    """

    __slots__ = ("environ", "here", "name")

    def __init__(self, *, here: Path, environ: Mapping[str, str], name: str | None = None) -> None:
        self.here = here
        self.environ = environ
        self.name = name

    def text(self, value: object, *, per_instance: bool = False) -> str:
        """Read a string and put its variables in; ``${instance}`` stays where ``per_instance`` allows it."""
        if not isinstance(value, str):
            quotes = "write it in quotes" if isinstance(value, bool | int | float) else None
            raise BadValueError(f"must be a string, got {type_name(value)}", quotes)
        text = self._expand(value, per_instance=per_instance) if "$" in value else value
        if "\0" in text:
            raise BadValueError("has a NUL character in it")
        try:
            text.encode()
        except UnicodeEncodeError:  # an environment variable that is not UTF-8
            raise BadValueError("is not valid UTF-8") from None
        return text

    def path(self, value: object, *, per_instance: bool = False) -> Path:
        """Read a path. ``..`` is resolved in the text, before any symbolic link is."""
        text = self.text(value, per_instance=per_instance)
        if not text:
            raise BadValueError("an empty path", 'write "." for the folder of this file')
        if text.startswith("~"):
            raise BadValueError(
                '"~" has no meaning here', 'write "${HOME}" for a home folder, "./~" for a file'
            )
        # normpath keeps two leading slashes, which mean nothing on Linux and would not compare equal.
        return Path("/" + os.path.normpath(self.here / text).lstrip("/"))

    def _expand(self, text: str, *, per_instance: bool) -> str:
        kept = 0

        def replace(match: re.Match[str]) -> str:
            nonlocal kept
            name: str | None = match[1]
            if name is None:
                return "$"
            if not match[2]:
                raise BadValueError('"${" without "}"', 'write "$${" for the characters themselves')
            if name == "here":
                return str(self.here)
            if name == "name":
                if self.name is None:
                    raise BadValueError("${name} has a meaning only in [defaults] and [target.NAME]")
                return self.name
            if name == "instance":
                if not per_instance:
                    raise BadValueError("${instance} has a meaning only in commands, env and log paths")
                kept += 1
                return match[0]
            if (value := self.environ.get(name)) is None:
                raise _unknown_variable(name, self.environ)
            return value

        expanded = _VARIABLE.sub(replace, text)
        if expanded.count(INSTANCE) != kept:
            # What is left in the text is replaced at every start; it cannot be told from one meant literally.
            raise BadValueError("a literal ${instance} cannot be written", "write $instance without braces")
        return expanded


def _unknown_variable(name: str, environ: Mapping[str, str]) -> BadValueError:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        return BadValueError(f"${{{name}}} is not a variable", f"write $${{{name}}} to leave it to a shell")
    near = nearest(name, ["here", "name", "instance", *environ])
    hint = f"did you mean ${{{near}}}?" if near else f"set {name} for the supervisor, or write $${{{name}}}"
    return BadValueError(f"unknown variable ${{{name}}}", hint)


def type_name(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    for kinds, name in (
        (int | float, "a number"),
        (str, "a string"),
        (Mapping, "a table"),
        (list | tuple, "an array"),
    ):
        if isinstance(value, kinds):
            return name
    return "a date or time"


def quoted(text: str) -> str:
    """A TOML string of one line that is safe to print on a terminal."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else escape(c)) for c in text) + '"'


def escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"


def toml_text(value: object) -> str:
    """A value as TOML would have it, for people. What a table holds is not shown: it may be a secret."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, signal.Signals):
        return quoted(value.name.removeprefix("SIG"))
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of more than 38 digits"
    if isinstance(value, str | Path):
        return quoted(str(value))
    if isinstance(value, Mapping):
        return "{...}" if value else "{}"
    if isinstance(value, list | tuple | frozenset):
        items = sorted(value, reverse=True) if isinstance(value, frozenset) else value
        return "[" + ", ".join("[...]" if isinstance(i, list) else toml_text(i) for i in items) + "]"
    return str(value)


def nearest(word: str, known: Iterable[str]) -> str | None:
    import difflib  # noqa: PLC0415 - only where there is something to report

    if len(word) > 80:
        return None
    by_folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1)
    return by_folded[found[0]] if found else None


Condition = Literal["started", "ready", "exited-ok"]
"""What has become of a target before one that depends on it may start."""

Schema = Mapping[str, Any]
"""A JSON Schema; what it cannot say (a signal's name, a program that exists) is left to `ValueType.read`."""

_STRING: Final[Schema] = MappingProxyType({"type": "string", "minLength": 1})
_STRING_ARRAY: Final[Schema] = MappingProxyType({"type": "array", "items": _STRING, "uniqueItems": True})


class ValueType(Generic[T]):
    """How values of one type are written in TOML: their name in the reference, read from it, shown in it.

    Args:
        read: takes the TOML value and where it stands; raises `BadValueError`.
        schema: for editors; it must accept whatever ``read`` does.
    """

    __slots__ = ("name", "read", "schema", "show")

    def __init__(
        self,
        name: str,
        read: Callable[[Any, Scope], T],
        show: Callable[[Any], str] = toml_text,
        *,
        schema: Schema = _STRING,
    ) -> None:
        self.name = name
        self.read = read
        self.show = show
        self.schema = schema


def integer(low: int, high: int | None = None) -> ValueType[int]:
    """Whole numbers from ``low`` to ``high``, by default as far as every JSON program keeps them exact."""
    top = 2**53 if high is None else high

    def read(value: Any, scope: Scope) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            digits = isinstance(value, str) and value.isdecimal()
            raise BadValueError(
                f"must be a whole number, got {type_name(value)}",
                "write it without quotes" if digits else None,
            )
        if not low <= value <= top:
            raise BadValueError(f"must be from {low} to {top}")
        return value

    name = f"integer from {low}" if high is None else f"integer {low} to {high}"
    return ValueType(name, read, schema={"type": "integer", "minimum": low, "maximum": top})


def choice(alternatives: Any) -> ValueType[Any]:
    """One of the strings of a `Literal`."""
    names: tuple[str, ...] = get_args(alternatives)

    def read(value: Any, scope: Scope) -> str:
        text = scope.text(value)
        if text not in names:
            near = nearest(text, names)
            raise BadValueError(
                f"not one of {', '.join(names)}", f"did you mean {quoted(near)}?" if near else None
            )
        return text

    *others, last = map(quoted, names)
    # A string with a variable in it may become any of them.
    schema = {"anyOf": [{"enum": list(names)}, {"type": "string", "pattern": r"\$\{"}]}
    return ValueType(f"{', '.join(others)} or {last}", read, schema=schema)


def _read_boolean(value: Any, scope: Scope) -> bool:
    if not isinstance(value, bool):
        unquoted = isinstance(value, str) and value in {"true", "false"}
        raise BadValueError(
            f"must be true or false, got {type_name(value)}", "write it without quotes" if unquoted else None
        )
    return value


def _read_text(value: Any, scope: Scope) -> str:
    text = scope.text(value)
    if not text.strip() or not text.isprintable():
        raise BadValueError("must be a text of one line that is not empty")
    return text


def _read_timeout(value: Any, scope: Scope) -> float:
    seconds = _read_duration(value, scope)
    if seconds == 0:
        raise BadValueError("must be more than 0")
    return seconds


def _read_duration(value: Any, scope: Scope) -> float:
    return parse_duration(scope.text(value) if isinstance(value, str) else value)


def _read_size(value: Any, scope: Scope) -> int:
    size = parse_size(scope.text(value) if isinstance(value, str) else value)
    if size == 0:
        raise BadValueError("must be more than 0")
    return size


def _array(value: Any, of: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadValueError(
            f"must be an array of {of}, got {type_name(value)}",
            f"write [{toml_text(value)}]"
            if isinstance(value, str | int) and not isinstance(value, bool)
            else None,
        )
    return value


def _read_strings(value: Any, scope: Scope) -> tuple[str, ...]:
    items = [scope.text(item) for item in _array(value, "strings")]
    for index, item in enumerate(items):
        if not item:
            raise BadValueError("has an empty string in it")
        if item in items[:index]:
            raise BadValueError(f"names {quoted(item)} twice")
    return tuple(items)


def _read_exit_codes(value: Any, scope: Scope) -> tuple[int, ...]:
    code = integer(0, 255)
    return tuple(code.read(item, scope) for item in _array(value, "whole numbers 0 to 255"))


def _read_command(value: Any, scope: Scope) -> tuple[str, ...]:
    if isinstance(value, str):
        import shlex  # noqa: PLC0415 - commands given as an array do not need it

        try:
            words: list[Any] = shlex.split(value)
        except ValueError as error:
            reason = str(error)[:1].lower() + str(error)[1:]
            raise BadValueError(f"cannot be split into words: {reason}", COMMAND_HINT) from None
    elif isinstance(value, list):
        words = value
    else:
        raise BadValueError(f"must be a command, got {type_name(value)}", COMMAND_HINT)
    # Split first: a value with a space in it stays one argument.
    command = tuple(scope.text(word, per_instance=True) for word in words)
    if not command or not command[0]:
        raise BadValueError("names no program", COMMAND_HINT)
    return command


def _read_signal(value: Any, scope: Scope) -> signal.Signals:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadValueError(f"must be a signal, got {type_name(value)}", 'write a name such as "TERM"')
    text = scope.text(value) if isinstance(value, str) else value
    if isinstance(text, int) or text.isdecimal():
        try:
            return signal.Signals(int(text))
        except ValueError:  # also from int(), for thousands of digits
            raise BadValueError("no signal has this number") from None
    name = "SIG" + text.upper().removeprefix("SIG")
    if name not in signal.Signals.__members__:
        near = nearest(name, signal.Signals.__members__)
        raise BadValueError(
            "no such signal", f"did you mean {quoted(near.removeprefix('SIG'))}?" if near else None
        )
    return signal.Signals[name]


def _signal_except(purpose: str, *refused: signal.Signals) -> ValueType[signal.Signals]:
    def read(value: Any, scope: Scope) -> signal.Signals:
        found = _read_signal(value, scope)
        if found in refused:
            raise BadValueError(f"{found.name} cannot {purpose} a process")
        return found

    return ValueType("signal", read, schema={"type": ["string", "integer"]})


def _read_umask(value: Any, scope: Scope) -> int:
    if not isinstance(value, str):
        raise BadValueError(f"must be an octal string, got {type_name(value)}", 'write it as "022"')
    if not re.fullmatch(r"0?[0-7]{1,3}", text := scope.text(value)):
        raise BadValueError("not an octal umask from 000 to 777", 'write it as "022"')
    return int(text, 8)


def _read_persist(value: Any, scope: Scope) -> tuple[str, ...]:
    paths = [path.rstrip("/") or path for path in _read_strings(value, scope)]
    for index, path in enumerate(paths):
        parts = path.split("/")
        if path.startswith("/") or not {"", ".", ".."}.isdisjoint(parts):
            raise BadValueError(
                f"{quoted(path)} is not a clean path below root", 'write it as "data" or "var/cache"'
            )
        for other in paths[:index]:
            if f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/"):
                raise BadValueError(f"{quoted(path)} and {quoted(other)} are the same or within one another")
    return tuple(paths)


def _read_depends(value: Any, scope: Scope) -> Mapping[str, Condition]:
    if not isinstance(value, Mapping):
        return MappingProxyType(dict.fromkeys(_read_strings(value, scope), "ready"))
    conditions: dict[str, Condition] = {}
    for name, condition in value.items():
        try:
            conditions[name] = CONDITION.read(condition, scope)
        except BadValueError as bad:
            raise BadValueError(f"{quoted(name)} is {bad.problem}", bad.hint) from None
    return MappingProxyType(conditions)


def _read_url(value: Any, scope: Scope) -> str:
    from urllib.parse import urlsplit  # noqa: PLC0415 - only where a probe is configured

    text = scope.text(value, per_instance=True)
    hint = 'write it as "http://127.0.0.1:8080/health"'
    try:
        parts = urlsplit(text.replace(INSTANCE, "0"))
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not text.isascii() or not text.isprintable() or " " in text:
        raise BadValueError("not a URL of http or https", hint)
    return text


def _read_address(value: Any, scope: Scope) -> str:
    text = scope.text(value, per_instance=True)
    host, _, port = text.replace(INSTANCE, "0").rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port[:9]) < 65_536:
        raise BadValueError("not HOST:PORT", 'write it as "127.0.0.1:8080", or "[::1]:8080"')
    return text


def _read_schedule(value: Any, scope: Scope) -> str:
    text = _read_text(value, scope)
    try:
        from cronsim import CronSim, CronSimError  # noqa: PLC0415 - only where something has a schedule
    except ImportError:
        raise BadValueError("needs the package cronsim", 'pip install "asyncsup[schedule]"') from None
    from datetime import datetime  # noqa: PLC0415

    try:
        next(CronSim(text, datetime.now().astimezone()), None)
    except CronSimError as error:
        hint = 'write minute, hour, day, month, weekday: "30 3 * * *" is half past three every night'
        raise BadValueError(
            f"not a cron expression: {str(error)[:1].lower()}{str(error)[1:]}", hint
        ) from None
    return text


def _read_pattern(value: Any, scope: Scope) -> str:
    # No variables: `$` has a meaning of its own in patterns.
    if not isinstance(value, str) or not value:
        raise BadValueError(f"must be a regular expression, got {type_name(value)}")
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadValueError(f"not a regular expression: {error}") from None
    return value


def _read_allow(value: Any, scope: Scope) -> frozenset[Kind]:
    from asyncsup.patch.manifest import Kind  # noqa: PLC0415 - slow to import, and most never need it

    kinds = {kind.value: kind for kind in Kind}
    names = _read_strings(value, scope)
    for name in names:
        if name not in kinds:
            near = nearest(name, kinds)
            raise BadValueError(
                f"{quoted(name)} is not one of {', '.join(kinds)}",
                f"did you mean {quoted(near)}?" if near else None,
            )
    return frozenset(kinds[name] for name in names)


def _read_inherit(value: Any, scope: Scope) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, list):
        raise BadValueError(
            f"must be true, false or an array of variable names, got {type_name(value)}",
            f"write [{quoted(value)}]" if isinstance(value, str) else None,
        )
    return _read_strings(value, scope)


def _read_endpoint(value: Any, scope: Scope) -> str:
    text = scope.text(value)
    if text.startswith("tcp://"):
        raise BadValueError("is for local clients", f"write listen = {quoted(text)} beside it")
    if not text.startswith("ipc://"):
        raise BadValueError("not an endpoint", 'write it as "ipc://PATH"')
    if (path := text.removeprefix("ipc://")).startswith("@"):
        raise BadValueError(
            "a socket in the abstract namespace has no permissions: every local user could connect",
            'write it as "ipc://PATH"',
        )
    return f"ipc://{scope.path(path)}"


def _read_listen(value: Any, scope: Scope) -> str:
    found = re.fullmatch(r"tcp://(\*|[0-9.]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})", scope.text(value))
    if found is None or not 1 <= int(found[2]) <= 65534:
        raise BadValueError(
            "not an address to listen at, with a port from 1 to 65534 (events are at the next one)",
            'write it as "tcp://192.0.2.1:7600", "tcp://[::1]:7600" or "tcp://*:7600"',
        )
    return found[0]


def _read_bind(value: Any, scope: Scope) -> Address:
    text = scope.text(value)
    scheme, _, path = text.partition("://")
    if scheme in {"unix", "unixgram"} and path and not path.startswith("@"):
        text = f"{scheme}://{scope.path(path)}"
    try:
        return Address.parse(text)
    except ValueError as error:
        raise BadValueError(
            str(error),
            'write it as "tcp://127.0.0.1:8080", "tcp://[::1]:8080", "udp://*:53" or "unix:///run/web.sock"',
        ) from None


def _read_autostart(value: Any, scope: Scope) -> bool | Literal["on-demand"]:
    if value == "on-demand":
        return "on-demand"
    return _read_boolean(value, scope)


def _read_socket_mode(value: Any, scope: Scope) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"0?6[06][06]", text := scope.text(value)):
        raise BadValueError(
            "not one of the modes of a socket: who cannot write to it cannot connect",
            'write it as "0600", "0660" or "0666"',
        )
    return int(text, 8)


def _read_stderr(value: Any, scope: Scope) -> Path | Literal["stdout"] | None:
    if value == "separate":
        return None
    return "stdout" if value == "stdout" else scope.path(value, per_instance=True)


def _show_stderr(value: Any) -> str:
    return '"separate"' if value is None else toml_text(value)


def _read_limit(read: Callable[[Any, Scope], N]) -> Callable[[Any, Scope], N | int]:
    def read_limit(value: Any, scope: Scope) -> N | int:
        return UNLIMITED if value == "unlimited" else read(value, scope)

    return read_limit


def _show_limit(show: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: '"unlimited"' if value == UNLIMITED else show(value)


def _read_limit_size(value: Any, scope: Scope) -> int:
    return parse_size(scope.text(value) if isinstance(value, str) else value)


def _read_cpu_seconds(value: Any, scope: Scope) -> int:
    seconds = _read_timeout(value, scope)
    if seconds != int(seconds):
        raise BadValueError("must be whole seconds")
    return int(seconds)


def _show_duration(value: Any) -> str:
    return quoted(format_duration(value))


def _show_size(value: Any) -> str:
    return quoted(format_size(value))


_NUMBER_OR_TEXT: Final[Schema] = MappingProxyType({
    "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^ ?[0-9]|\$\{"}]
})  # fmt: skip
_LIMIT: Final[Schema] = MappingProxyType({"anyOf": [_NUMBER_OR_TEXT, {"const": "unlimited"}]})

BOOLEAN: Final = ValueType("boolean", _read_boolean, schema={"type": "boolean"})
TEXT: Final = ValueType("string", _read_text)
DURATION: Final = ValueType("duration", _read_duration, _show_duration, schema=_NUMBER_OR_TEXT)
TIMEOUT: Final = ValueType("duration above 0", _read_timeout, _show_duration, schema=_NUMBER_OR_TEXT)
SIZE: Final = ValueType("size above 0", _read_size, _show_size, schema=_NUMBER_OR_TEXT)
PATH: Final = ValueType("path", lambda value, scope: scope.path(value))
PATHS: Final = ValueType(
    "array of paths",
    lambda value, scope: tuple(scope.path(item) for item in _array(value, "paths")),
    schema={"type": "array", "items": _STRING},
)
LOG_PATH: Final = ValueType("path", lambda value, scope: scope.path(value, per_instance=True))
LOG_STDERR: Final = ValueType('path, "stdout" or "separate"', _read_stderr, _show_stderr)
STRINGS: Final = ValueType("array of strings", _read_strings, schema=_STRING_ARRAY)
COMMAND: Final = ValueType(
    "command",
    _read_command,
    schema={"anyOf": [_STRING, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
)
STOP_SIGNAL: Final = _signal_except("end", signal.SIGSTOP, signal.SIGTSTP, signal.SIGCONT)
RELOAD_SIGNAL: Final = _signal_except("reload", signal.SIGKILL, signal.SIGSTOP)
UMASK: Final = ValueType(
    "octal string",
    _read_umask,
    lambda value: f'"{value:03o}"',
    schema={"type": "string", "pattern": r"^0?[0-7]{1,3}$|\$\{"},
)
EXIT_CODES: Final = ValueType(
    "array of integers 0 to 255",
    _read_exit_codes,
    schema={"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
)
PERSIST: Final = ValueType("array of paths below root", _read_persist, schema=_STRING_ARRAY)
CONDITION: Final = choice(Condition)
DEPENDS: Final = ValueType(
    "array of strings, or table of conditions",
    _read_depends,
    schema={
        "anyOf": [_STRING_ARRAY, {"type": "object", "additionalProperties": CONDITION.schema}],
    },
)
SCHEDULE: Final = ValueType("cron expression", _read_schedule)
URL: Final = ValueType("URL", _read_url)
ADDRESS: Final = ValueType('"HOST:PORT"', _read_address)
PATTERN: Final = ValueType("regular expression", _read_pattern)
ALLOW: Final = ValueType('array of "warm", "cold"', _read_allow, schema=_STRING_ARRAY)
INHERIT: Final = ValueType(
    "boolean or array of variable names",
    _read_inherit,
    schema={"anyOf": [{"type": "boolean"}, _STRING_ARRAY]},
)
ENDPOINT: Final = ValueType('"ipc://PATH"', _read_endpoint)
LISTEN: Final = ValueType('"tcp://HOST:PORT"', _read_listen)
BIND: Final = ValueType(
    '"tcp://HOST:PORT", "udp://HOST:PORT" or "unix://PATH"', _read_bind, lambda value: quoted(str(value))
)
AUTOSTART: Final = ValueType(
    'boolean or "on-demand"',
    _read_autostart,
    schema={"anyOf": [{"type": "boolean"}, {"const": "on-demand"}]},
)
SOCKET_MODE: Final = ValueType(
    "octal string",
    _read_socket_mode,
    lambda value: f'"{value:04o}"',
    schema={"type": "string", "pattern": r"^0?6[06][06]$|\$\{"},
)
ENV_VALUE: Final = ValueType(
    "string", lambda value, scope: scope.text(value, per_instance=True), schema={"type": "string"}
)

LIMIT_COUNT: Final = ValueType(
    'integer from 0 or "unlimited"',
    _read_limit(integer(0).read),
    schema={"anyOf": [{"type": "integer", "minimum": 0}, {"const": "unlimited"}]},
)
_LIMIT_SIZE: Final = ValueType(
    'size or "unlimited"', _read_limit(_read_limit_size), _show_limit(format_size), schema=_LIMIT
)
_LIMIT_CPU: Final = ValueType(
    'duration in whole seconds or "unlimited"',
    _read_limit(_read_cpu_seconds),
    _show_limit(_show_duration),
    schema=_LIMIT,
)


def _read_cpus(value: Any, scope: Scope) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadValueError(
            f"must be a number of CPUs, got {type_name(value)}", "1.5 is one and a half of them"
        )
    if not 0.01 <= value <= 100_000:
        raise BadValueError("must be from 0.01 to 100000")
    return float(value)


_CGROUP_SIZE: Final = ValueType(
    'size above 0 or "unlimited"', _read_limit(_read_size), _show_limit(format_size), schema=_LIMIT
)
RLIMITS: Final[Mapping[str, ValueType[int]]] = MappingProxyType({
    "nofile": LIMIT_COUNT, "nproc": LIMIT_COUNT, "cpu": _LIMIT_CPU,
    "core": _LIMIT_SIZE, "as": _LIMIT_SIZE, "fsize": _LIMIT_SIZE, "memlock": _LIMIT_SIZE,
    "stack": _LIMIT_SIZE, "data": _LIMIT_SIZE,
})  # fmt: skip
"""Limits of each process: setrlimit(2)'s names in lower case, values in its units (bytes, seconds, count)."""
CGROUP_LIMITS: Final[Mapping[str, ValueType[Any]]] = MappingProxyType({
    "memory": _CGROUP_SIZE,
    "memory_high": _CGROUP_SIZE,
    "cpus": ValueType(
        'number of CPUs or "unlimited"',
        _read_limit(_read_cpus),
        _show_limit(toml_text),
        schema={"anyOf": [{"type": "number", "minimum": 0.01, "maximum": 100_000}, {"const": "unlimited"}]},
    ),
    "cpu_weight": integer(1, 10_000),
    "pids": ValueType(
        'integer from 1 or "unlimited"',
        _read_limit(integer(1).read),
        schema={"anyOf": [{"type": "integer", "minimum": 1}, {"const": "unlimited"}]},
    ),
})  # fmt: skip
"""Limits of an instance, for all of its processes together: bytes, CPUs, a share, a count."""
LIMITS: Final[Mapping[str, ValueType[Any]]] = MappingProxyType({**RLIMITS, **CGROUP_LIMITS})
"""The keys of `.limits`."""
