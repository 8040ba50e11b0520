"""SSH signatures and allowed signers for fuzzing; the real `ssh-keygen` judges what is accepted."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from random import Random
from typing import Final

import ssh_kit
from fuzz_kit import FindingError, Tally, foreseen
from fuzz_zip import mutate_anything, number, some_bytes

from asyncsup.errors import AllowedSignersError, PatchMalformedError
from asyncsup.patch.signers import parse_allowed_signers
from asyncsup.patch.sshsig import encode_string, parse_signature
from asyncsup.patch.trust import NAMESPACE, check_signatures

MESSAGE: Final = b"what was signed\n"
NOW: Final = datetime(2026, 7, 1, tzinfo=UTC)


def fields_of(blob: bytes) -> list[bytes]:
    """The strings that a blob of SSH's is made of, as far as it is."""
    found, position = [], 0
    while position + 4 <= len(blob):
        size = int.from_bytes(blob[position : position + 4])
        found.append(blob[position + 4 : position + 4 + size])
        position += 4 + size
    return found


def armor(blob: bytes, columns: int = 70) -> bytes:
    text = base64.b64encode(blob)
    lines = [text[at : at + columns] for at in range(0, len(text), columns)]
    return b"\n".join([b"-----BEGIN SSH SIGNATURE-----", *lines, b"-----END SSH SIGNATURE-----", b""])


def mutate_signature(random: Random, armored: bytes, others: Sequence[bytes]) -> bytes:
    """Change fields of a signature, the fields within them, or its armor."""
    if random.random() < 0.2:
        return mutate_anything(random, armored)
    blob = base64.b64decode(b"".join(armored.split(b"\n")[1:-2]))
    head, strings = blob[:10], fields_of(blob[10:])
    at = random.randrange(len(strings))
    what = random.randrange(7)
    if what == 0:
        inner = fields_of(strings[at]) or [b""]
        inner[random.randrange(len(inner))] = random.choice((b"", some_bytes(random), b"ssh-rsa", b"\0" * 33))
        strings[at] = b"".join(map(encode_string, inner))
    elif what == 1:
        other = base64.b64decode(b"".join(random.choice(others).split(b"\n")[1:-2]))
        strings[at] = fields_of(other[10:])[at]
    elif what == 2:
        strings[at] = random.choice(
            (b"", b"sha1", b"sha256", b"sha512", b"SHA512", b"file", NAMESPACE.encode() + b"\0")
        )
    elif what == 3 and strings[at]:
        value = bytearray(strings[at])
        value[random.randrange(len(value))] ^= 1 << random.randrange(8)
        strings[at] = bytes(value)
    elif what == 4:
        strings.insert(at, some_bytes(random))
    elif what == 5:
        del strings[at]
    else:
        strings[at] += some_bytes(random)
    if random.random() < 0.1:
        head = b"SSHSIG" + number(random, 32).to_bytes(4)
    made = head + b"".join(map(encode_string, strings))
    if random.random() < 0.1:
        # A length that lies.
        value = bytearray(made)
        struct.pack_into(">I", value, 10, number(random, 32))
        made = bytes(value)
    return armor(
        made + (some_bytes(random) if random.random() < 0.05 else b""), random.choice((70, 70, 64, 1))
    )


class SignatureJudge:
    """Refused, or a signature that `ssh-keygen` takes as well."""

    def __init__(self, lines: str, tally: Tally) -> None:
        self.lines = lines
        self.signers = parse_allowed_signers(lines.encode())
        self.tally = tally
        self._compared: set[bytes] = set()

    def __call__(self, data: bytes) -> str:
        try:
            check_signatures(MESSAGE, {"a": data}, self.signers, required=1, now=NOW)
        except PatchMalformedError as error:
            return foreseen(error, data)
        if data not in self._compared:
            self._compared.add(data)
            names = [
                signer.principals
                for signer in self.signers
                if signer.key.blob == parse_signature(data).key_blob
            ]
            if not ssh_kit.verifies(MESSAGE, data, self.lines, identity=names[0], at="20260701000000Z"):
                raise FindingError("accepted, and not by ssh-keygen", data)
            self.tally.compared["ssh-keygen"] += 1
        return "accepted"


LINE_PIECES: Final = (
    "alice", "bob@example.com", "*", "!alice", "*,!bob@example.com", '"alice"', "namespaces=",
    'namespaces="asyncsup-patch"', 'namespaces="*"', 'namespaces="git"', 'namespaces=""',
    'valid-after="20260101Z"', 'valid-before="20270101Z"', 'valid-before="20250101Z"', 'valid-after="2026"',
    'valid-after="20261301"', "cert-authority", "no-touch-required", ",", " ", "\t", '"', "\\", "#", "\x01",
    "\xe9", "\u2028", "ssh-ed25519", "ssh-rsa", "ssh-dss", "AAAA", "=", "\r",
)  # fmt: skip


def mutate_lines(random: Random, text: str) -> str:
    words = re.split(r'([ ,"])', text)
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(words))
        what = random.randrange(4)
        if what == 0:
            words[at] = random.choice(LINE_PIECES)
        elif what == 1:
            words.insert(at, random.choice(LINE_PIECES))
        elif what == 2:
            words.insert(at, random.choice(words))
        elif len(words) > 1:
            del words[at]
    return "".join(words)


class SignersJudge:
    """Refused, or the same to us and to `ssh-keygen`: whether alice's signature counts."""

    def __init__(self, signature: bytes, tally: Tally) -> None:
        self.signature = signature
        self.tally = tally
        self._compared: set[bytes] = set()

    def __call__(self, data: bytes) -> str:
        try:
            signers = parse_allowed_signers(data)
        except AllowedSignersError as error:
            if not error.details["problems"]:
                raise FindingError("refused without a problem", data) from None
            return error.error_code
        if data in self._compared:
            return "accepted"
        self._compared.add(data)
        blob = parse_signature(self.signature).key_blob
        ours = any(
            signer.key.blob == blob
            and signer.speaks_for("alice")
            and signer.may_sign(NAMESPACE)
            and not signer.is_too_early(NOW)
            and not signer.is_too_late(NOW)
            for signer in signers
        )
        theirs = ssh_kit.verifies(MESSAGE, self.signature, data, identity="alice", at="20260701000000Z")
        if ours != theirs:
            raise FindingError(f"counts here: {ours}, to ssh-keygen: {theirs}", data)
        self.tally.compared["ssh-keygen"] += 1
        return "accepted"
