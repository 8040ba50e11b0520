"""The SSH signature format: armor, signature, public key, signature value; read and written. Pure.

The format is OpenSSH's (PROTOCOL.sshsig, PROTOCOL.u2f, RFC 4253, RFC 5656, RFC 8332, RFC 8709). It is read
more strictly than `ssh-keygen` reads it: fields are used up, numbers are in their shortest form, and what is
not signed is as it is always written. Whether a signature is genuine is for `asyncsup.patch.trust` to say.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple

import msgspec

MAGIC: Final = b"SSHSIG"
VERSION: Final = 1
HASHES: Final = ("sha256", "sha512")

USER_PRESENT: Final = 0x01
"""The flag of a FIDO signature that says that somebody touched the key."""

MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 16384

_HEADER: Final = b"-----BEGIN SSH SIGNATURE-----"
_FOOTER: Final = b"-----END SSH SIGNATURE-----"
_ARMOR: Final = re.compile(re.escape(_HEADER) + rb"\n([A-Za-z0-9+/=\n]+)\n" + re.escape(_FOOTER) + rb"\n*")
_ARMOR_COLUMNS: Final = 70


class SshFormatError(ValueError):
    """The bytes are not what the format says; the message completes "...: it ". Callers say which bytes."""


class UnsupportedKeyError(SshFormatError):
    """A key of a type that is not verified here: perhaps a good one."""


class KeyType(StrEnum):
    """The types of keys that sign, by the names that stand in front of them in files."""

    ED25519 = "ssh-ed25519"
    ECDSA_256 = "ecdsa-sha2-nistp256"
    ECDSA_384 = "ecdsa-sha2-nistp384"
    ECDSA_521 = "ecdsa-sha2-nistp521"
    RSA = "ssh-rsa"
    SK_ED25519 = "sk-ssh-ed25519@openssh.com"
    SK_ECDSA = "sk-ecdsa-sha2-nistp256@openssh.com"

    @property
    def is_fido(self) -> bool:
        """The key is in a FIDO authenticator, which signs flags and a counter as well."""
        return self in {KeyType.SK_ED25519, KeyType.SK_ECDSA}

    @property
    def curve(self) -> str | None:
        """The NIST curve of an ECDSA key, by its name in SSH."""
        return _CURVE_OF.get(self)

    @property
    def algorithms(self) -> tuple[str, ...]:
        """How such a key may have signed: never with SHA-1, which is what RSA's own name means here."""
        return ("rsa-sha2-512", "rsa-sha2-256") if self is KeyType.RSA else (self.value,)


_CURVE_OF: Final[Mapping[KeyType, str]] = {
    KeyType.ECDSA_256: "nistp256",
    KeyType.ECDSA_384: "nistp384",
    KeyType.ECDSA_521: "nistp521",
    KeyType.SK_ECDSA: "nistp256",
}


class _Curve(NamedTuple):
    """y² = x³ - 3x + b (mod p)."""

    p: int
    b: int


_CURVES: Final[Mapping[str, _Curve]] = {
    "nistp256": _Curve(
        2**256 - 2**224 + 2**192 + 2**96 - 1,
        0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B,
    ),
    "nistp384": _Curve(
        2**384 - 2**128 - 2**96 + 2**32 - 1,
        0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF,
    ),
    "nistp521": _Curve(
        2**521 - 1,
        0x0051953EB9618E1C9A1F929A21A0B68540EEA2DA725B99B315F3B8B489918EF109E156193951EC7E937B1652C0BD3BB1BF07
        << 128
        | 0x3573DF883D2C34F1EF451FD46B503F00,
    ),
}


class RsaNumbers(NamedTuple):
    e: int
    n: int


class EcdsaNumbers(NamedTuple):
    r: int
    s: int


class PublicKey(msgspec.Struct, frozen=True, kw_only=True):
    """A public key.

    Args:
        blob: the key as SSH encodes it: what a key file has in base64, and what two equal keys share.
        material: for Ed25519 its 32 bytes, for ECDSA the uncompressed point (SEC 1).
        application: of a FIDO key, such as ``ssh:``.
    """

    type: KeyType
    blob: bytes
    material: bytes | RsaNumbers
    application: str = ""

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it."""
        return fingerprint(self.blob)

    @property
    def secret(self) -> tuple[str, bytes | int]:
        """Equal for keys with the same private key behind them, however they are written down."""
        if isinstance(self.material, RsaNumbers):
            return ("rsa", self.material.n)
        return (self.type.curve or "ed25519", self.material)


class SshSignature(msgspec.Struct, frozen=True, kw_only=True):
    """What a ``.sig`` file says; nothing in it has been verified.

    Args:
        key_blob: the key that it claims to be by.
        value_blob: see `parse_value`.
    """

    key_blob: bytes
    namespace: str
    hash_algorithm: str
    value_blob: bytes

    def signed_data(self, message: bytes) -> bytes:
        """The bytes that were signed, if this is a signature over `message`."""
        digest = hashlib.new(self.hash_algorithm, message).digest()
        fields = (self.namespace.encode(), b"", self.hash_algorithm.encode(), digest)
        return MAGIC + b"".join(map(encode_string, fields))


class SignatureValue(msgspec.Struct, frozen=True, kw_only=True):
    """The signature itself.

    Args:
        algorithm: one of the key type's `KeyType.algorithms`.
        numbers: for ECDSA; all others have `data`.
        flags, counter: of a FIDO key.
    """

    algorithm: str
    data: bytes = b""
    numbers: EcdsaNumbers | None = None
    flags: int = 0
    counter: int = 0

    def authenticated(self, key: PublicKey, signed_data: bytes) -> bytes:
        """What the key has put its name to: the signed data, or what a FIDO authenticator makes of it."""
        if not key.type.is_fido:
            return signed_data
        application = hashlib.sha256(key.application.encode()).digest()
        return (
            application + struct.pack(">BI", self.flags, self.counter) + hashlib.sha256(signed_data).digest()
        )


def fingerprint(blob: bytes) -> str:
    """``SHA256:...`` of an encoded key, as `ssh-keygen -l` shows it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


# --- reading ------------------------------------------------------------------------------------------------


def parse_signature(armored: bytes) -> SshSignature:
    """Read a ``.sig`` file.

    Raises:
        SshFormatError
    """
    match = _ARMOR.fullmatch(armored)
    if match is None:
        whole = armored.startswith(_HEADER) and armored.rstrip().endswith(_FOOTER)
        raise SshFormatError(
            "has something else than lines of base64 in it"
            if whole
            else "is not an armored SSH signature, or not all of one (`ssh-keygen -Y sign` writes them)"
        )
    reader = _Reader(decode_base64(match[1].replace(b"\n", b"")))
    if reader.take(len(MAGIC)) != MAGIC:
        raise SshFormatError("is not an SSH signature inside its armor")
    version = reader.uint32()
    if version != VERSION:
        raise SshFormatError(f"has version {version} of the format, only {VERSION} is known")
    key_blob, namespace, reserved = reader.string(), reader.text(), reader.string()
    hash_algorithm, value_blob = reader.text(), reader.string()
    reader.end()
    if not namespace:
        raise SshFormatError("has no namespace")
    if reserved:
        raise SshFormatError("has something in the reserved field, which nobody signed")
    if hash_algorithm not in HASHES:
        raise SshFormatError(f"uses the hash {hash_algorithm[:40]!r}; {' and '.join(HASHES)} are known")
    return SshSignature(
        key_blob=key_blob, namespace=namespace, hash_algorithm=hash_algorithm, value_blob=value_blob
    )


def parse_public_key(blob: bytes) -> PublicKey:
    """Read an encoded key.

    Raises:
        UnsupportedKeyError: a type that is not known here, or a certificate.
        SshFormatError: it is no good key of its type.
    """
    reader = _Reader(blob)
    name = reader.text()
    try:
        kind = KeyType(name)
    except ValueError:
        raise UnsupportedKeyError(f"is of type {name[:80]!r}, which is not supported") from None
    if kind is KeyType.RSA:
        rsa = RsaNumbers(e=reader.number(), n=reader.number())
        _check_rsa(rsa)
        reader.end()
        return PublicKey(type=kind, blob=blob, material=rsa)
    if kind.curve is None:
        material = reader.string()
        if len(material) != 32:
            raise SshFormatError(f"has {len(material)} bytes of key instead of 32")
    else:
        curve = reader.text()
        if curve != kind.curve:
            raise SshFormatError(f"is of type {name}, yet on the curve {curve[:40]!r}")
        material = reader.string()
        _check_point(material, _CURVES[curve])
    application = reader.text() if kind.is_fido else ""
    reader.end()
    return PublicKey(type=kind, blob=blob, material=material, application=application)


def parse_value(blob: bytes, key: PublicKey) -> SignatureValue:
    """Read the signature itself, as made by a key of this type.

    Raises:
        SshFormatError: among others, made with another algorithm than the key may sign with.
    """
    reader = _Reader(blob)
    algorithm = reader.text()
    if algorithm not in key.type.algorithms:
        weak = " (RSA with SHA-1 is not accepted)" if algorithm == KeyType.RSA else ""
        raise SshFormatError(
            f"is made with {algorithm[:80]!r}{weak}; a key of type {key.type} signs with "
            f"{' or '.join(key.type.algorithms)}"
        )
    data, numbers, flags, counter = reader.string(), None, 0, 0
    if key.type.is_fido:
        flags, counter = reader.take(1)[0], reader.uint32()
    reader.end()
    if key.type.curve is not None:
        inner = _Reader(data)
        numbers, data = EcdsaNumbers(r=inner.number(), s=inner.number()), b""
        inner.end()
    elif isinstance(key.material, RsaNumbers):
        size = (key.material.n.bit_length() + 7) // 8
        if not 0 < len(data) <= size:
            raise SshFormatError(f"has {len(data)} bytes, a key of this size makes {size}")
        data = data.rjust(size, b"\0")  # some agents leave out leading zeros
    elif len(data) != 64:
        raise SshFormatError(f"has {len(data)} bytes, an Ed25519 key makes 64")
    return SignatureValue(algorithm=algorithm, data=data, numbers=numbers, flags=flags, counter=counter)


def decode_base64(text: bytes) -> bytes:
    """Base64 in the one form that encoding gives.

    Raises:
        SshFormatError
    """
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        data = b""
    if not data or base64.b64encode(data) != text:
        raise SshFormatError("is not valid base64, or cut off")
    return data


class _Reader:
    """Takes fields off the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, size: int) -> bytes:
        end = self._position + size
        if end > len(self._data):
            raise SshFormatError("ends in the middle of a field")
        data = self._data[self._position : end]
        self._position = end
        return data

    def uint32(self) -> int:
        return int.from_bytes(self.take(4))

    def string(self) -> bytes:
        return self.take(self.uint32())

    def text(self) -> str:
        raw = self.string()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise SshFormatError("has a name in it that is not text") from None
        if "\0" in text:
            raise SshFormatError("has a name in it with a zero byte")
        return text

    def number(self) -> int:
        raw = self.string()
        if raw[:1] >= b"\x80":
            raise SshFormatError("has a negative number in it")
        if raw[:1] == b"\0" and raw[1:2] < b"\x80":
            raise SshFormatError("has a number in it with needless zeros in front")
        return int.from_bytes(raw)

    def end(self) -> None:
        left = len(self._data) - self._position
        if left:
            raise SshFormatError(f"has {left} bytes after its end")


def _check_rsa(numbers: RsaNumbers) -> None:
    bits = numbers.n.bit_length()
    if bits < MIN_RSA_BITS:
        raise SshFormatError(f"is an RSA key of {bits} bits; less than {MIN_RSA_BITS} can be broken")
    # A large exponent makes verifying slow, and no tool makes one.
    if bits > MAX_RSA_BITS or numbers.n % 2 == 0 or numbers.e % 2 == 0 or not 3 <= numbers.e < 1 << 64:
        raise SshFormatError(f"is no RSA key that anybody should have made ({bits} bits)")


def _check_point(point: bytes, curve: _Curve) -> None:
    size = (curve.p.bit_length() + 7) // 8
    if len(point) != 1 + 2 * size or point[0] != 4:
        raise SshFormatError("has no uncompressed point of its curve")
    x, y = int.from_bytes(point[1 : 1 + size]), int.from_bytes(point[1 + size :])
    if max(x, y) >= curve.p or (y * y - x * x * x + 3 * x - curve.b) % curve.p:
        raise SshFormatError("has a point that is not on its curve")


# --- writing ------------------------------------------------------------------------------------------------


def encode_string(data: bytes) -> bytes:
    return len(data).to_bytes(4) + data


def encode_number(number: int) -> bytes:
    # One bit more than the number has: the sign.
    return encode_string(number.to_bytes((number.bit_length() + 8) // 8) if number else b"")


def encode_public_key(kind: KeyType, material: bytes | RsaNumbers, application: str = "") -> bytes:
    """What `parse_public_key` reads."""
    blob = encode_string(kind.encode())
    if isinstance(material, RsaNumbers):
        return blob + encode_number(material.e) + encode_number(material.n)
    if kind.curve is not None:
        blob += encode_string(kind.curve.encode())
    blob += encode_string(material)
    return blob + encode_string(application.encode()) if kind.is_fido else blob


def encode_value(value: SignatureValue, kind: KeyType) -> bytes:
    """What `parse_value` reads."""
    data = value.data
    if value.numbers is not None:
        data = encode_number(value.numbers.r) + encode_number(value.numbers.s)
    blob = encode_string(value.algorithm.encode()) + encode_string(data)
    return blob + struct.pack(">BI", value.flags, value.counter) if kind.is_fido else blob


def encode_signature(signature: SshSignature) -> bytes:
    """What `parse_signature` reads, armor included."""
    fields = (
        signature.key_blob,
        signature.namespace.encode(),
        b"",
        signature.hash_algorithm.encode(),
        signature.value_blob,
    )
    blob = MAGIC + VERSION.to_bytes(4) + b"".join(map(encode_string, fields))
    text = base64.b64encode(blob)
    lines = [text[at : at + _ARMOR_COLUMNS] for at in range(0, len(text), _ARMOR_COLUMNS)]
    return b"\n".join([_HEADER, *lines, _FOOTER, b""])
