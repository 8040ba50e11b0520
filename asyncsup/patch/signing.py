"""Sign packages: `ssh-keygen` makes the signature, and the package gets one entry more.

What is signed is the manifest, exactly as it stands in the package; it names every file by its SHA-256. Keys
stay where they are: `ssh-keygen` asks for passphrases, PINs and touches, and given a ``.pub`` file it has the
agent sign.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import secrets
import stat
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from asyncsup.config.settings import PatchLimits
from asyncsup.errors import PatchMalformedError, PatchSignError
from asyncsup.patch import archive, fs
from asyncsup.patch.archive import CHUNK, MAX16, MAX32, STORED
from asyncsup.patch.checksum import checksum_file, read_checksum
from asyncsup.patch.package import DEFAULT_LIMITS, MANIFEST, SIGNATURES, Package, open_package
from asyncsup.patch.sshsig import (
    USER_PRESENT,
    PublicKey,
    SshFormatError,
    SshSignature,
    parse_public_key,
    parse_signature,
    parse_value,
)
from asyncsup.patch.trust import NAMESPACE

Notice = Callable[[str], None]
"""Called with what `ssh-keygen` asks of the person in front of it: to touch a key."""

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
"""What a signature may be called in a package."""

_VERSION: Final = 20
_DATE_1980: Final = 1 << 5 | 1


class SignedPackage(msgspec.Struct, frozen=True, kw_only=True):
    """A package as it is after signing.

    Args:
        id: of the whole zip, which is another one than before.
        name: what the signature is called.
    """

    path: Path
    id: str
    name: str
    key: PublicKey


def sign_package(
    path: Path,
    *,
    key: Path,
    name: str | None = None,
    output: Path | None = None,
    limits: PatchLimits = DEFAULT_LIMITS,
    notice: Notice | None = None,
) -> SignedPackage:
    """Add a signature to a package.

    A checksum in ``FILE.sha256`` beside `path` has to be right, and is brought up to date with it.

    Args:
        key: a private key, or the public one of a key that the agent has.
        name: what the signature is called; by default as the key's comment.
        output: where the signed package goes; by default it takes the place of `path`.

    Raises:
        PatchSignError: it was not signed; everything is as it was.
        PatchMalformedError: it is no valid package, or not the one of its checksum.
        UsageError: the file for its checksum has none.
        OSError: reading or writing failed.
    """
    output = output or path
    if name is not None and not NAME.fullmatch(name):
        raise PatchSignError(
            f"a signature cannot be called {name[:200]!r}; a name is up to 128 letters, digits and . _ @ + -",
            code="sign.name",
        )
    checksum = read_checksum(path) if output == path else None
    with open_package(path, limits=limits, sha256=checksum) as package:
        if package.format == "prototype":
            raise PatchSignError(
                f"{path.name}: packages of the prototype cannot carry signatures; make a package of its "
                "files that can, with `asyncsup patch build OLD NEW --sign KEY`",
                code="sign.prototype",
            )
        armored, public = sign_manifest(package.manifest_bytes, key, notice=notice)
        name = _free_name(package, public, key, name)
        sidecar = None if checksum is None else checksum_file(path)
        new_id = _write(package, name, armored, output, sidecar)
    return SignedPackage(path=output, id=new_id, name=name, key=public)


# --- the signature ------------------------------------------------------------------------------------------


def sign_manifest(manifest: bytes, key: Path, *, notice: Notice | None = None) -> tuple[bytes, PublicKey]:
    """Have `ssh-keygen` sign; returns the armored signature, which is right, and the key.

    Raises:
        PatchSignError: ``sign.tool``, ``sign.key``, ``sign.failed``.
    """
    with tempfile.TemporaryDirectory(prefix="asyncsup-sign-") as folder:
        # Not on standard input: `ssh-keygen` reads passphrases and PINs there when it is no terminal.
        file = Path(folder, MANIFEST)
        file.write_bytes(manifest)
        _run("sign", "-f", str(key), str(file), key=key, notice=notice)
        try:
            armored = file.with_name(f"{MANIFEST}.sig").read_bytes()
        except FileNotFoundError:
            raise PatchSignError(f"`ssh-keygen` wrote no signature with {key}") from None
        try:
            signature = parse_signature(armored)
            public = _check_key(signature)
        except SshFormatError as error:
            raise PatchSignError(
                f"{key}: asyncsup would not accept what it signs; it {error}", code="sign.key"
            ) from None
        # An agent may answer anything. This asks whether the signature is right, not whose it is.
        _run("check-novalidate", "-s", f"{file}.sig", key=key, content=file)
    return armored, public


def _check_key(signature: SshSignature) -> PublicKey:
    """The key, if it is one that is verified here and has signed as it should."""
    public = parse_public_key(signature.key_blob)
    value = parse_value(signature.value_blob, public)
    if public.type.is_fido and not value.flags & USER_PRESENT:
        raise SshFormatError("signs without being touched")
    return public


def _run(
    what: str, *arguments: str, key: Path, notice: Notice | None = None, content: Path | None = None
) -> None:
    """Run `ssh-keygen -Y`; passphrases are asked for on the terminal.

    Args:
        content: what it reads on standard input; None leaves ours to it.
    """
    command = ["ssh-keygen", "-Y", what, "-q", "-n", NAMESPACE, *arguments]
    said: list[str] = []
    standard_input = None if content is None else content.open("rb")
    try:
        with subprocess.Popen(
            command,
            stdin=standard_input,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line.strip())
                if notice is not None and line.startswith("Confirm user presence"):
                    notice(line.strip())
    except FileNotFoundError:
        raise PatchSignError(
            "there is no `ssh-keygen`; install OpenSSH, version 8.2 or newer", code="sign.tool"
        ) from None
    finally:
        if standard_input is not None:
            standard_input.close()
    if process.returncode != 0:
        reason = "; ".join(filter(None, said)) or f"`ssh-keygen` ended with {process.returncode}"
        raise PatchSignError(f"{key} did not sign: {reason[:1000]}")


def _free_name(package: Package, public: PublicKey, key: Path, name: str | None) -> str:
    """What the signature is called, if the key has not signed yet and the name is not taken."""
    for other, armored in package.signatures.items():
        try:
            same = parse_signature(armored).key_blob == public.blob
        except SshFormatError:
            same = False
        if same:
            raise PatchSignError(
                f"{package.path.name} is signed with {key} already: {SIGNATURES}{other}.sig",
                code="sign.already",
            )
    chosen = name or _default_name(public, key)
    if chosen.casefold() in {other.casefold() for other in package.signatures}:
        raise PatchSignError(
            f"{package.path.name} has a signature called {chosen} already, by another key; choose another "
            "name (--name)",
            code="sign.name",
        )
    return chosen


def _default_name(public: PublicKey, key: Path) -> str:
    """The comment of the key, mostly ``USER@HOST``; a piece of its digest where that is no name."""
    file = key if key.suffix == ".pub" else key.with_name(f"{key.name}.pub")
    try:
        words = file.read_text(encoding="utf-8", errors="replace").split(maxsplit=2)
    except OSError:
        words = []
    if len(words) == 3 and words[1] == base64.b64encode(public.blob).decode():
        name = re.sub(r"[^A-Za-z0-9._@+-]+", "-", words[2]).strip("-._@+")[:128]
        if NAME.fullmatch(name):
            return name
    return f"key-{hashlib.sha256(public.blob).hexdigest()[:16]}"


# --- the package --------------------------------------------------------------------------------------------


def _write(package: Package, name: str, armored: bytes, output: Path, sidecar: Path | None) -> str:
    """Write the package with one entry more, checksum and all; returns its id."""
    temporaries: list[Path] = []
    try:
        with _temporary(output, temporaries) as file:
            os.fchmod(file.fileno(), package.path.stat().st_mode & 0o777)
            _copy(package, file)
            _append(file, f"{SIGNATURES}{name}.sig", armored)
        (signed,) = temporaries
        new_id = _check(signed, package, name, armored)
        if sidecar is not None:
            with _temporary(sidecar, temporaries) as file:
                file.write(f"{new_id}  {output.name}\n".encode())
            # In between there is no checksum, rather than a wrong one.
            sidecar.unlink()
        signed.rename(output)
        if sidecar is not None:
            temporaries[1].rename(sidecar)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    fs.sync_directory(output.parent)
    return new_id


@contextlib.contextmanager
def _temporary(path: Path, made: list[Path]) -> Iterator[BinaryIO]:
    """A new file beside `path`, on disk when the block ends."""
    # Not called .zip: an inbox must not take it for a package.
    made.append(path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.part"))
    with made[-1].open("x+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _copy(package: Package, file: BinaryIO) -> None:
    digest = hashlib.sha256()
    with package.path.open("rb") as original:
        while piece := original.read(CHUNK):
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != package.id:
        raise PatchSignError(
            f"{package.path.name} was changed while it was being signed", code="sign.changed"
        )


def _check(signed: Path, package: Package, name: str, armored: bytes) -> str:
    """What is published opens, and says what it said before."""
    try:
        with open_package(signed, limits=package.limits) as result:
            same = result.manifest_bytes == package.manifest_bytes
            expected = {**package.signatures, name: armored}
            if not same or result.signatures != expected:
                raise PatchSignError(f"{package.path.name}: the signature does not fit into the package")
            return result.id
    except PatchMalformedError as error:
        raise PatchSignError(
            f"{package.path.name} has no room for the signature: {error.message}", code="sign.room"
        ) from error


def _append(file: BinaryIO, name: str, content: bytes) -> None:
    """Put one entry between the entries and the directory of an archive that `archive.scan` has accepted."""
    file.flush()
    fd, size = file.fileno(), file.tell()
    end = archive.END.unpack(archive.read_exactly(fd, archive.END.size, size - archive.END.size))
    count, directory_size, offset = end[4:7]
    if count == MAX16 or MAX32 in {directory_size, offset}:
        place = size - archive.END.size - archive.LOCATOR64.size - archive.END64.size
        end64 = archive.END64.unpack(archive.read_exactly(fd, archive.END64.size, place))
        if end64[0] == archive.END64_SIGNATURE:
            count, directory_size, offset = end64[7:10]
    directory = archive.read_exactly(fd, directory_size, offset)
    file.seek(offset)
    file.truncate()
    for piece in _tail(directory, count, offset, name.encode("ascii"), content):
        file.write(piece)


def _tail(directory: bytes, count: int, offset: int, name: bytes, content: bytes) -> Iterator[bytes]:
    """The end of an archive whose entries end at `offset`: one more entry, the directory, the end record."""
    crc, size = zlib.crc32(content), len(content)
    yield archive.LOCAL.pack(
        archive.LOCAL_SIGNATURE, _VERSION, 0, STORED, 0, _DATE_1980, crc, size, size, len(name), 0
    )
    yield name
    yield content
    extra, version = b"", _VERSION
    if offset >= MAX32:
        extra, version = struct.pack("<2HQ", archive.EXTRA_ZIP64, 8, offset), archive.VERSION_ZIP64
    record = archive.CENTRAL.pack(
        archive.CENTRAL_SIGNATURE, 3 << 8 | version, version, 0, STORED, 0, _DATE_1980, crc, size, size,
        len(name), len(extra), 0, 0, 0, (stat.S_IFREG | 0o644) << 16, min(offset, MAX32),
    )  # fmt: skip
    yield directory
    yield record
    yield name
    yield extra
    count += 1
    start = offset + archive.LOCAL.size + len(name) + size
    length = len(directory) + len(record) + len(name) + len(extra)
    if count >= MAX16 or max(start, length) >= MAX32:
        yield archive.END64.pack(
            archive.END64_SIGNATURE, archive.END64.size - 12, archive.VERSION_ZIP64, archive.VERSION_ZIP64,
            0, 0, count, count, length, start,
        )  # fmt: skip
        yield archive.LOCATOR64.pack(archive.LOCATOR64_SIGNATURE, 0, start + length, 1)
    count = min(count, MAX16)
    yield archive.END.pack(
        archive.END_SIGNATURE, 0, 0, count, count, min(length, MAX32), min(start, MAX32), 0
    )
