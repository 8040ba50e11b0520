"""OpenSSH's `allowed_signers`: whose keys may sign, for what, and when. Pure but for the local time zone.

A line is ``PRINCIPALS [OPTIONS] TYPE BASE64 [COMMENT]``: see ALLOWED SIGNERS in ssh-keygen(1). An accepted
line means what it means to `ssh-keygen -Y verify`. One that is not understood makes the whole file an error:
a key whose limits were misread must not count.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec

from asyncsup.errors import AllowedSignersError
from asyncsup.patch.sshsig import (
    KeyType,
    PublicKey,
    SshFormatError,
    decode_base64,
    parse_public_key,
)

LocalTime = Callable[[tuple[int, int, int, int, int, int, int, int, int]], float]
"""`time.mktime`, or what stands in its place."""

_SPACE: Final = " \t\r\n"
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_WORD: Final = re.compile(r"[ \t]+")
_OPTION: Final = re.compile(r'([A-Za-z-]+)(?:="((?:\\"|[^"\\]|\\(?!"))*)")?')
_TIME: Final = re.compile(r"([0-9]{8}|[0-9]{12}|[0-9]{14})(Z|UTC)?", re.IGNORECASE)
_FIELDS: Final = re.compile(r"^[0-9]{4}|[0-9]{2}")
_TIME_HINT: Final = "a time is YYYYMMDD, YYYYMMDDHHMM or YYYYMMDDHHMMSS, with a Z behind it for UTC"
_MAX_PATTERN: Final = 1022
"""Bytes. To `ssh-keygen` a list with a longer pattern matches nobody, whatever else is in it."""


class Signer(msgspec.Struct, frozen=True, kw_only=True):
    """One line: a key, and what it is allowed.

    Args:
        principals: patterns of the identities the key speaks for, as they stand in the file.
        namespaces: patterns of what it may sign; None: anything.
        valid_after, valid_before: the first and the last second in which it counts, since 1970.
        line: where it stands, from 1.
    """

    principals: str
    key: PublicKey
    namespaces: str | None = None
    valid_after: int | None = None
    valid_before: int | None = None
    comment: str = ""
    line: int = 0

    def speaks_for(self, identity: str) -> bool:
        return matches(identity, self.principals)

    def may_sign(self, namespace: str) -> bool:
        return self.namespaces is None or matches(namespace, self.namespaces)

    # Both to the second, and the last one included, as `ssh-keygen` has it.

    def is_too_early(self, now: datetime) -> bool:
        return self.valid_after is not None and int(now.timestamp()) < self.valid_after

    def is_too_late(self, now: datetime) -> bool:
        return self.valid_before is not None and int(now.timestamp()) > self.valid_before


def parse_allowed_signers(
    content: bytes, *, source: str = "allowed_signers", local_time: LocalTime = time.mktime
) -> tuple[Signer, ...]:
    """Read a whole file.

    Args:
        source: what messages call it.
        local_time: seconds since 1970 of a time without ``Z``, which is one of this machine's time zone.

    Raises:
        AllowedSignersError: with every problem in ``details["problems"]``.
    """
    found: list[Signer] = []
    problems: list[dict[str, Any]] = []
    for number, raw in enumerate(content.split(b"\n"), 1):
        line = raw.strip(_SPACE.encode())
        if not line or line.startswith(b"#"):
            continue
        try:
            found.append(_parse_line(line.decode("utf-8"), number, local_time))
        except UnicodeDecodeError:
            problems.append({"line": number, "problem": "is not UTF-8"})
        except (_LineError, SshFormatError) as error:
            problems.append({"line": number, "problem": str(error)})
    if problems:
        text = "\n".join(f"{source}:{problem['line']}: {problem['problem']}" for problem in problems)
        raise AllowedSignersError(text, file=source, problems=problems)
    return tuple(found)


def matches(name: str, patterns: str) -> bool:
    """Whether a name is among comma-separated patterns: see PATTERNS in ssh_config(5).

    ``*`` is any number of bytes, ``?`` is one, a match with a negated pattern (``!``) outweighs all others.
    """
    positive = False
    for pattern in patterns.split(","):
        negated = pattern.startswith("!")
        if _matches_pattern(name.encode(), pattern[negated:].encode()):
            if negated:
                return False
            positive = True
    return positive


def _matches_pattern(name: bytes, pattern: bytes) -> bool:
    # Without recursion and without going back further than the last star: time is bounded by the product.
    at = place = 0
    star = resume = -1
    while at < len(name):
        if place < len(pattern) and pattern[place] == ord("*"):
            star, resume = place, at
            place += 1
        elif place < len(pattern) and pattern[place] in {name[at], ord("?")}:
            at, place = at + 1, place + 1
        elif star >= 0:
            resume += 1
            at, place = resume, star + 1
        else:
            return False
    return not pattern[place:].strip(b"*")


# --- a line -------------------------------------------------------------------------------------------------


class _LineError(ValueError):
    """What is wrong with a line."""


class _Options(NamedTuple):
    namespaces: str | None = None
    valid_after: int | None = None
    valid_before: int | None = None


def _parse_line(line: str, number: int, local_time: LocalTime) -> Signer:
    if line.startswith("\ufeff") or _CONTROL.search(line):
        raise _LineError("has an invisible character in it; write the file as plain UTF-8 without a mark")
    principals, rest = _split_principals(line)
    _check_principals(principals)
    options = _Options()
    if rest and not _begins_with_key(rest):
        options, rest = _parse_options(rest, local_time)
    kind, encoded, comment, *_ = (*_WORD.split(rest, 2), "", "")
    if not encoded:
        raise _LineError("ends before the key; a line is PRINCIPALS [OPTIONS] TYPE BASE64 [COMMENT]")
    try:
        blob = decode_base64(encoded.encode())
        key = parse_public_key(blob)
    except SshFormatError as error:
        raise _LineError(f"the key {error}") from None
    if key.type != kind:
        raise _LineError(f"the key is said to be of type {kind[:80]!r} and is of type {key.type}")
    return Signer(
        principals=principals,
        key=key,
        namespaces=options.namespaces,
        valid_after=options.valid_after,
        valid_before=options.valid_before,
        comment=comment,
        line=number,
    )


def _split_principals(line: str) -> tuple[str, str]:
    """The first word, in which one stretch may be quoted, and what comes after it."""
    end = next((at for at, character in enumerate(line) if character in ' \t"'), len(line))
    word, rest = line[:end], line[end:]
    if rest.startswith('"'):
        inside, quote, rest = rest[1:].partition('"')
        if not quote:
            raise _LineError("has a quote that is not closed")
        word += inside
    return word, rest.lstrip(" \t")


def _check_principals(principals: str) -> None:
    if principals in set(KeyType):
        raise _LineError(
            f"begins with the key; who it belongs to comes first: alice@example.com {principals} ..."
        )
    _check_patterns(principals)
    # A key that speaks for nobody can never be right for `ssh-keygen`; a name that should match tells.
    examples = (
        pattern.replace("*", filler).replace("?", "x")
        for pattern in principals.split(",")
        if not pattern.startswith("!")
        for filler in ("", "x", "somebody")
    )
    if not any(example and matches(example, principals) for example in examples):
        raise _LineError(f"speaks for nobody: no name is meant by the principals {principals[:80]!r}")


def _check_patterns(patterns: str) -> None:
    if any(len(pattern.encode()) > _MAX_PATTERN for pattern in patterns.split(",")):
        raise _LineError(f"has a pattern of more than {_MAX_PATTERN} bytes")


def _begins_with_key(rest: str) -> bool:
    word, following, *_ = (*_WORD.split(rest, 2), "")
    # A key begins with the length of its type's name and so with AAAA: also one of a type not known here.
    looks_like_one = following.startswith("AAAA") and "=" not in word and word.lower() != "cert-authority"
    return word in set(KeyType) or looks_like_one


def _parse_options(text: str, local_time: LocalTime) -> tuple[_Options, str]:
    """The options in front of the key, and the rest of the line."""
    namespaces: str | None = None
    times: dict[str, int] = {}
    position = 0
    while True:
        match = _OPTION.match(text, position)
        if match is None:
            raise _LineError(f"has neither a key nor an option in {text[position:][:80]!r}")
        name, quoted = match[1].lower(), match[2]
        if name == "cert-authority":
            raise _LineError(
                "cert-authority is not supported; list the keys themselves, not what certifies them"
            )
        if name not in {"namespaces", "valid-after", "valid-before"}:
            raise _LineError(f"has the unknown option {match[1][:80]!r}")
        if quoted is None:
            raise _LineError(f'{name} needs a value in quotes: {name}="..."')
        if name in times or (name == "namespaces" and namespaces is not None):
            raise _LineError(f"has {name} twice")
        value = quoted.replace('\\"', '"')
        if name == "namespaces":
            _check_patterns(value)
            namespaces = value
        else:
            times[name] = _parse_time(value, name, local_time)
        position = match.end() + 1
        separator = text[match.end() : position]
        if separator in {"", " ", "\t"}:
            break
        if separator != ",":
            raise _LineError(f"has no comma and no space after {name}")
    after, before = times.get("valid-after"), times.get("valid-before")
    if after is not None and before is not None and before <= after:
        raise _LineError("valid-before is not after valid-after")
    options = _Options(namespaces=namespaces, valid_after=after, valid_before=before)
    return options, text[position:].lstrip(" \t")


def _parse_time(text: str, name: str, local_time: LocalTime) -> int:
    """Seconds since 1970."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise _LineError(f"{name}: {text[:80]!r} is no time; {_TIME_HINT}")
    digits = match[1].ljust(14, "0")
    try:
        # Not strptime, which takes "13" for January and goes on with the "3".
        year, month, day, hour, minute, second = map(int, _FIELDS.findall(digits))
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
        # The last field: standard time also in summer, as `ssh-keygen` reads it.
        local = (year, month, day, hour, minute, second, 0, 1, 0)
        seconds = int(moment.timestamp() if match[2] else local_time(local))
    except (ValueError, OverflowError):
        seconds = 0
    if seconds <= 0:
        raise _LineError(f"{name}: there is no time {text} since 1970")
    return seconds
