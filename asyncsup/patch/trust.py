"""Who signed a patch, and whether that is enough: what ``trust = "required"`` asks.

A signature counts when it is over the manifest's exact bytes, was made for patches (`NAMESPACE`), and its key
is among the allowed signers, may sign patches, and is valid now. Keys are counted, not names or signatures.

Signatures by keys that are not listed, or not valid now, are left out of the count: other hosts may know
them. One that is damaged, made for something else, or not over this manifest refuses the patch, whoever else
has signed it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from asyncsup.errors import AllowedSignersError, PatchMalformedError, TrustUnavailableError
from asyncsup.patch import fs
from asyncsup.patch.signers import Signer, parse_allowed_signers
from asyncsup.patch.sshsig import (
    USER_PRESENT,
    PublicKey,
    RsaNumbers,
    SignatureValue,
    SshFormatError,
    fingerprint,
    parse_signature,
    parse_value,
)

if TYPE_CHECKING:
    from asyncsup.patch.package import Package

NAMESPACE: Final = "asyncsup-patch"
"""What a signature must have been made for: ``ssh-keygen -Y sign -n asyncsup-patch``."""

MAX_SIGNERS_BYTES: Final = 1 << 20


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """A signature that counts: what it is called in the package, and the line that allows its key."""

    name: str
    signer: Signer

    def __str__(self) -> str:
        principals = self.signer.principals
        shown = principals if len(principals) <= 100 else f"{principals[:100]}…"
        return f"{shown} ({self.signer.key.fingerprint})"

    def to_json(self) -> dict[str, Any]:
        key = self.signer.key
        return {
            "name": self.name,
            "principals": self.signer.principals,
            "key_type": key.type.value,
            "fingerprint": key.fingerprint,
        }


class Uncounted(msgspec.Struct, frozen=True, kw_only=True):
    """A signature that is left out of the count, and why."""

    name: str
    code: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "code": self.code, "reason": self.reason}


class Endorsement(msgspec.Struct, frozen=True, kw_only=True):
    """A patch is signed as it has to be."""

    required: int
    signatures: tuple[Signature, ...]
    uncounted: tuple[Uncounted, ...]

    def __str__(self) -> str:
        return f"signed by {', '.join(map(str, self.signatures))}; {self.required} required"

    def to_json(self) -> dict[str, Any]:
        return {
            "required": self.required,
            "signers": [signature.to_json() for signature in self.signatures],
            "uncounted": [each.to_json() for each in self.uncounted],
        }


def check_package(
    package: Package, signers: Sequence[Signer], *, required: int, now: datetime
) -> Endorsement:
    """`check_signatures`, for a package; a prototype package cannot pass.

    Raises:
        PatchMalformedError: as `check_signatures`, with the package's name in front.
        TrustUnavailableError
    """
    if package.format == "prototype":
        raise PatchMalformedError(
            f"{package.path.name}: packages of the prototype cannot carry signatures; make a package of its "
            "files that can, with `asyncsup patch build OLD NEW --sign KEY`",
            code="trust.unsigned",
            file=package.path.name,
        )
    try:
        return check_signatures(
            package.manifest_bytes, package.signatures, signers, required=required, now=now
        )
    except PatchMalformedError as error:
        details = {"file": package.path.name, **error.details}
        raise PatchMalformedError(
            f"{package.path.name}: {error.message}", code=error.error_code, **details
        ) from error.__cause__


def check_signatures(
    manifest: bytes,
    signatures: Mapping[str, bytes],
    signers: Sequence[Signer],
    *,
    required: int,
    now: datetime,
) -> Endorsement:
    """Find out who signed the manifest.

    Args:
        manifest: its exact bytes.
        signatures: armored, by name.
        required: how many different keys have to have signed; at least 1.
        now: an aware datetime; what keys are allowed counts as of now, not as of the signing.

    Raises:
        PatchMalformedError: it is not signed as it has to be: ``trust.unsigned``, ``trust.malformed``,
            ``trust.namespace``, ``trust.signature``, ``trust.unknown_key``, ``trust.expired_key``,
            ``trust.early_key``, ``trust.threshold``.
        TrustUnavailableError: the `cryptography` package is not there, or cannot do what the key needs.
    """
    if required < 1:
        raise ValueError(f"{required} signatures required")
    if not signatures:
        raise PatchMalformedError(
            f"is not signed, and {_count(required)} required; `asyncsup patch sign` adds one",
            code="trust.unsigned",
        )
    counted: dict[object, Signature] = {}
    uncounted: list[Uncounted] = []
    for name, armored in sorted(signatures.items()):
        result = _judge(name, armored, manifest, signers, now)
        if isinstance(result, Uncounted):
            uncounted.append(result)
            continue
        first = counted.setdefault(result.signer.key.secret, result)
        if first is not result:
            reason = f"is by the same key as {_file(first.name)}"
            uncounted.append(Uncounted(name=name, code="trust.threshold", reason=reason))
    if len(counted) < required:
        raise _not_enough(counted.values(), uncounted, required)
    return Endorsement(required=required, signatures=tuple(counted.values()), uncounted=tuple(uncounted))


def count_keys(signers: Sequence[Signer]) -> int:
    """How many different keys there are that may sign patches, valid now or not."""
    return len({signer.key.secret for signer in signers if signer.may_sign(NAMESPACE)})


def _judge(
    name: str, armored: bytes, manifest: bytes, signers: Sequence[Signer], now: datetime
) -> Signature | Uncounted:
    try:
        signature = parse_signature(armored)
    except SshFormatError as error:
        raise PatchMalformedError(f"{_file(name)} {error}", code="trust.malformed", signature=name) from None
    if signature.namespace != NAMESPACE:
        raise PatchMalformedError(
            f"{_file(name)} is made for {signature.namespace[:80]!r}, not for patches; sign with "
            f"`asyncsup patch sign`, or `ssh-keygen -Y sign -n {NAMESPACE}`",
            code="trust.namespace",
            signature=name,
        )
    lines = [signer for signer in signers if signer.key.blob == signature.key_blob]
    if not lines:
        return Uncounted(
            name=name,
            code="trust.unknown_key",
            reason=f"is by {fingerprint(signature.key_blob)}, which is not among the allowed signers",
        )
    key = lines[0].key
    try:
        value = parse_value(signature.value_blob, key)
    except SshFormatError as error:
        raise _wrong(name, str(error)) from None
    if key.type.is_fido and not value.flags & USER_PRESENT:
        raise _wrong(name, "was made without anybody touching the key")
    if not _is_genuine(key, value, signature.signed_data(manifest)):
        raise _wrong(
            name,
            f"is not what {key.fingerprint} makes of this manifest: the manifest is another one than was "
            "signed, if only by a space, or the signature is forged",
        )
    return _allowed(name, lines, now)


def _allowed(name: str, lines: Sequence[Signer], now: datetime) -> Signature | Uncounted:
    """The first line that lets the key of a genuine signature count, or why none does."""
    refusal: Uncounted | None = None
    for signer in lines:
        who = f"is by {signer.key.fingerprint}, which line {signer.line} of the allowed signers"
        if not signer.may_sign(NAMESPACE):
            code, reason = "trust.namespace", f"{who} does not allow to sign patches ({NAMESPACE})"
        elif signer.is_too_early(now):
            code, reason = "trust.early_key", f"{who} allows only from {_time(signer.valid_after)} on"
        elif signer.is_too_late(now):
            code, reason = "trust.expired_key", f"{who} allowed until {_time(signer.valid_before)}"
        else:
            return Signature(name=name, signer=signer)
        refusal = refusal or Uncounted(name=name, code=code, reason=reason)
    assert refusal is not None
    return refusal


def _not_enough(
    counted: Collection[Signature], uncounted: Sequence[Uncounted], required: int
) -> PatchMalformedError:
    reasons = "; ".join(f"{_file(each.name)} {each.reason}" for each in uncounted)
    details = {
        "required": required,
        "signers": [signature.to_json() for signature in counted],
        "uncounted": [each.to_json() for each in uncounted],
    }
    if counted:
        return PatchMalformedError(
            f"is signed by {', '.join(map(str, counted))}, but {_count(required)} required"
            + (f": {reasons}" if reasons else ""),
            code="trust.threshold",
            **details,
        )
    # A key that is known and does not count says more than one that may be anybody's.
    telling = min(uncounted, key=lambda each: each.code == "trust.unknown_key")
    return PatchMalformedError(f"has no signature that counts: {reasons}", code=telling.code, **details)


def _wrong(name: str, message: str) -> PatchMalformedError:
    return PatchMalformedError(f"{_file(name)} {message}", code="trust.signature", signature=name)


def _file(name: str) -> str:
    return f"signatures/{name}.sig"


def _count(required: int) -> str:
    return "1 signature is" if required == 1 else f"signatures by {required} different keys are"


def _time(second: int | None) -> str:
    assert second is not None
    try:
        return f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (ValueError, OverflowError):
        return f"second {second}"


# --- the mathematics ----------------------------------------------------------------------------------------


def require_cryptography() -> None:
    """Make sure that signatures can be verified.

    Raises:
        TrustUnavailableError
    """
    try:
        import cryptography.hazmat.primitives.asymmetric.ec  # noqa: F401, PLC0415 - only where trust needs it
    except ImportError as error:
        raise TrustUnavailableError(
            "signatures are verified by the package `cryptography`, which cannot be imported here "
            f'({error}); `pip install "asyncsup[trust]"`'
        ) from error


def _is_genuine(key: PublicKey, value: SignatureValue, signed_data: bytes) -> bool:
    """Whether the private key belonging to `key` has signed this data.

    Raises:
        TrustUnavailableError
    """
    require_cryptography()
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils  # noqa: PLC0415

    curves: dict[str, tuple[ec.EllipticCurve, hashes.HashAlgorithm]] = {
        "nistp256": (ec.SECP256R1(), hashes.SHA256()),
        "nistp384": (ec.SECP384R1(), hashes.SHA384()),
        "nistp521": (ec.SECP521R1(), hashes.SHA512()),
    }
    data = value.authenticated(key, signed_data)
    try:
        if isinstance(key.material, RsaNumbers):
            digest = hashes.SHA256() if value.algorithm == "rsa-sha2-256" else hashes.SHA512()
            public = rsa.RSAPublicNumbers(key.material.e, key.material.n).public_key()
            public.verify(value.data, data, padding.PKCS1v15(), digest)
        elif value.numbers is not None:
            assert key.type.curve is not None
            curve, algorithm = curves[key.type.curve]
            point = ec.EllipticCurvePublicKey.from_encoded_point(curve, key.material)
            point.verify(utils.encode_dss_signature(*value.numbers), data, ec.ECDSA(algorithm))
        else:
            ed25519.Ed25519PublicKey.from_public_bytes(key.material).verify(value.data, data)
    except (InvalidSignature, ValueError):  # ValueError: a key or number that no signature can belong to
        return False
    except UnsupportedAlgorithm as error:
        raise TrustUnavailableError(f"this machine cannot verify {key.type} signatures: {error}") from error
    return True


# --- the file -----------------------------------------------------------------------------------------------


def load_signers(path: Path) -> tuple[Signer, ...]:
    """Read a file of allowed signers.

    Raises:
        AllowedSignersError: it cannot be read, or has lines that are wrong.
    """
    try:
        with fs.opened_file(path) as fd:
            content = fs.read_all(fd, MAX_SIGNERS_BYTES + 1)
    except OSError as error:
        raise AllowedSignersError(f"{path}: cannot be read: {error.strerror}", file=str(path)) from None
    if len(content) > MAX_SIGNERS_BYTES:
        raise AllowedSignersError(f"{path}: has more than {MAX_SIGNERS_BYTES} bytes", file=str(path))
    return parse_allowed_signers(content, source=str(path))
