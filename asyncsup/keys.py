"""The CURVE keys of those who connect over TCP: who may, and what they may do.

``STATE_DIR/keys/`` holds the supervisor's own pair, as the files ZeroMQ's tools know
(``supervisor.key_secret``, ``supervisor.key``; the format is that of https://rfc.zeromq.org/spec/4/), and
`allowed`: one line ``NAME ROLE PUBLIC_KEY`` for each client. Whoever may write there decides who may connect,
as with OpenSSH's ``authorized_keys``; a running supervisor takes up a change at the next request.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

from asyncsup.errors import KeysError

Role = Literal["view", "operate", "patch"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
"""Each may do what the ones before it may."""

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_PUBLIC_KEY: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
"""32 bytes in Z85 (https://rfc.zeromq.org/spec/32/)."""

MOST_BYTES: Final = 1 << 20
"""Of a file with keys; a longer one is none."""


class Pair(NamedTuple):
    """A CURVE key pair, in Z85."""

    public: bytes
    secret: bytes


class AllowedKey(NamedTuple):
    """A client that may connect."""

    name: str
    role: Role
    public: str


class Allowed(NamedTuple):
    """Who may connect, by public key, and what is wrong with the other lines of the file."""

    keys: Mapping[str, AllowedKey]
    problems: tuple[str, ...]


def covers(held: Role, needed: Role) -> bool:
    return ROLES.index(held) >= ROLES.index(needed)


# --- pairs --------------------------------------------------------------------------------------------------


def generate(folder: Path, name: str) -> Path:
    """Write a new pair, ``NAME.key_secret`` and ``NAME.key``; returns the path of the secret one.

    Raises:
        KeysError: there is one by that name; a key that is in use is not replaced by accident.
    """
    from zmq.auth import create_certificates  # noqa: PLC0415 - slow to import, and few have keys

    check_name(name)
    secret = folder / f"{name}.key_secret"
    if secret.exists():
        raise KeysError(
            f"{secret} is there already; remove it to make another key, which then has to be allowed anew",
            code="keys.exists",
            path=str(secret),
        )
    before = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        create_certificates(folder, name)
        while load_pair(secret).public.startswith(b"-"):  # a command line would take it for an option
            create_certificates(folder, name)
    except OSError as error:
        raise KeysError(f"{error.filename or folder}: {error.strerror}", code="keys.unwritable") from None
    finally:
        os.umask(before)
    return secret


def load_pair(path: Path) -> Pair:
    """Read ``NAME.key_secret``.

    Raises:
        KeysError: it cannot be read, others could read it too, or it holds no pair.
    """
    public, secret = _load(path)
    if secret is None:
        raise KeysError(f"{path} holds no secret key; name the file that ends in .key_secret", path=str(path))
    if path.stat().st_mode & 0o077:
        raise KeysError(f"others may read {path}: `chmod 600 {path}`", code="keys.exposed", path=str(path))
    return Pair(public, secret)


def public_key(text: str) -> str:
    """A public key in Z85, given as itself or as the path of a file that holds it.

    Raises:
        KeysError: it is neither.
    """
    if _PUBLIC_KEY.fullmatch(text):
        return text
    if not os.path.exists(text):  # noqa: PTH110 - which takes a name of any length
        raise KeysError(f"{text!r:.80} is neither a public key (40 characters in Z85) nor a file with one")
    return _load(Path(text))[0].decode()


def _load(path: Path) -> tuple[bytes, bytes | None]:
    from zmq.auth import load_certificate  # noqa: PLC0415 - as above

    no_key = KeysError(f"{path} holds no CURVE key, as ZeroMQ writes it", path=str(path))
    try:
        if path.stat().st_size > MOST_BYTES:
            raise no_key
        public, secret = load_certificate(path)
    except OSError as error:
        why = error.strerror or "no such file"
        raise KeysError(f"{path}: {why}", code="keys.unreadable", path=str(path)) from None
    except ValueError:
        raise no_key from None
    for key in (public, secret):
        if key is not None and not _PUBLIC_KEY.fullmatch(key.decode("latin-1")):
            raise no_key
    return public, secret


def check_name(name: str) -> None:
    """Raises KeysError."""
    if not NAME.fullmatch(name):
        raise KeysError(
            f"{name!r:.80} is no name for a key: letters, digits, '.', '_', '-' and '@', up to 64"
        )


# --- who is allowed -----------------------------------------------------------------------------------------


class KeyStore:
    """The keys of one supervisor.

    Args:
        folder: ``STATE_DIR/keys``; made when the first key is.
    """

    SUPERVISOR: Final = "supervisor"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "allowed"
        self._read: tuple[int, int, int] | None = None
        self._allowed = Allowed({}, ())

    @property
    def secret_file(self) -> Path:
        return self.folder / f"{self.SUPERVISOR}.key_secret"

    def own_pair(self) -> Pair:
        """Raises KeysError."""
        return load_pair(self.secret_file)

    def allowed(self) -> Allowed:
        """Who may connect at this moment. Reads the file only when it is another one than before.

        What cannot be read allows nobody.
        """
        try:
            status = self.file.stat()
        except FileNotFoundError:
            self._read, self._allowed = None, Allowed({}, ())
            return self._allowed
        except OSError as error:
            return Allowed({}, (f"{self.file}: {error.strerror}",))
        identity = (status.st_ino, status.st_mtime_ns, status.st_size)
        if identity != self._read:
            self._allowed = _read_allowed(self.file)
            self._read = identity
        return self._allowed

    def allow(self, name: str, role: Role, public: str) -> AllowedKey:
        """Let a client in, or give one that is in another role or key.

        Raises:
            KeysError: the key is that of somebody else, or the file cannot be written.
        """
        check_name(name)
        new = AllowedKey(name, role, public)
        with self._changing() as keys:
            other = next((key for key in keys.values() if key.public == public and key.name != name), None)
            if other is not None:
                raise KeysError(f"this is the key of {other.name}, role {other.role}", code="keys.exists")
            keys[name] = new
        return new

    def revoke(self, name: str) -> AllowedKey:
        """Raises KeysError."""
        with self._changing() as keys:
            if name not in keys:
                known = ", ".join(sorted(keys)) or "nobody"
                raise KeysError(f"no key of {name!r:.80} is allowed; there is {known}", code="keys.not_found")
            return keys.pop(name)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, AllowedKey]]:
        """The keys by name, to be changed; written back in one step, by one process at a time."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise KeysError(f"{self.folder}: {error.strerror}", code="keys.unwritable") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _read_allowed(self.file) if self.file.exists() else Allowed({}, ())
            if found.problems:
                raise KeysError(f"mend this first, or it would be lost: {found.problems[0]}")
            keys = {key.name: key for key in found.keys.values()}
            yield keys
            _write(self.file, "".join(f"{key.name} {key.role} {key.public}\n" for key in keys.values()), lock)
        finally:
            os.close(lock)


def _read_allowed(file: Path) -> Allowed:
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        return Allowed({}, (f"{file}: {getattr(error, 'strerror', None) or 'not UTF-8'}",))
    if len(text) > MOST_BYTES:
        return Allowed({}, (f"{file}: longer than {MOST_BYTES} bytes",))
    keys: dict[str, AllowedKey] = {}
    problems = []
    names: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        problem = _problem(words, names, keys)
        if problem is not None:
            problems.append(f"{file}:{number}: {problem}")
            continue
        role = next(role for role in ROLES if role == words[1])
        names.add(words[0])
        keys[words[2]] = AllowedKey(words[0], role, words[2])
    return Allowed(keys, tuple(problems))


def _problem(words: list[str], names: set[str], keys: Mapping[str, AllowedKey]) -> str | None:
    if len(words) != 3:
        return "expected NAME ROLE PUBLIC_KEY"
    if not NAME.fullmatch(words[0]):
        return f"{words[0]!r:.80} is no name for a key"
    if words[1] not in ROLES:
        return f"{words[1]!r:.80} is no role; there are {', '.join(ROLES)}"
    if not _PUBLIC_KEY.fullmatch(words[2]):
        return "the key is not 40 characters in Z85"
    if words[0] in names:
        return f"{words[0]} has a line already"
    if words[2] in keys:
        return f"this is the key of {keys[words[2]].name}"
    return None


def _write(file: Path, text: str, folder: int) -> None:
    temporary = file.with_name(f"{file.name}.new")
    try:
        with temporary.open("w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
        os.fsync(folder)
    except OSError as error:
        raise KeysError(f"{file}: {error.strerror}", code="keys.unwritable", path=str(file)) from None
