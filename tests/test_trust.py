"""Who signed a patch, and whether that is enough: as a decision, and by a real supervisor."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import ssh_kit
import zip_forge
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from zip_forge import FILES, Part, forge, manifest_part

from asyncsup.errors import AllowedSignersError, PatchMalformedError, TrustUnavailableError
from asyncsup.patch.package import open_package
from asyncsup.patch.signers import Signer, parse_allowed_signers
from asyncsup.patch.sshsig import (
    EcdsaNumbers,
    KeyType,
    PublicKey,
    RsaNumbers,
    SignatureValue,
    SshSignature,
    encode_public_key,
    encode_signature,
    encode_value,
    parse_public_key,
    parse_signature,
)
from asyncsup.patch.trust import (
    MAX_SIGNERS_BYTES,
    NAMESPACE,
    Endorsement,
    check_package,
    check_signatures,
    count_keys,
    load_signers,
)

MANIFEST = manifest_part(*FILES).data
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def allowed(*names: str, kind: str = "ed25519", options: str = "") -> str:
    """Lines that allow the keys of these people."""
    return "".join(f"{name} {options} {ssh_kit.key(name, kind).line}\n" for name in names)


def sign(name: str = "alice", message: bytes = MANIFEST, *, kind: str = "ed25519", **more: Any) -> bytes:
    return ssh_kit.key(name, kind).sign(message, **more)


def check(
    signatures: Mapping[str, bytes],
    lines: str,
    *,
    required: int = 1,
    manifest: bytes = MANIFEST,
    now: datetime = NOW,
) -> Endorsement:
    signers = parse_allowed_signers(lines.encode())
    return check_signatures(manifest, signatures, signers, required=required, now=now)


def refusal(signatures: Mapping[str, bytes], lines: str, **more: Any) -> PatchMalformedError:
    with pytest.raises(PatchMalformedError) as caught:
        check(signatures, lines, **more)
    assert caught.value.exit_status == 21
    json.dumps(caught.value.details)
    return caught.value


def code(signatures: Mapping[str, bytes], lines: str, **more: Any) -> str:
    return refusal(signatures, lines, **more).error_code


# --- both directions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hash_algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("kind", sorted(ssh_kit.KINDS))
def test_what_ssh_keygen_signs_is_accepted_here_and_by_ssh_keygen(kind: str, hash_algorithm: str) -> None:
    signature = sign(kind=kind, options=(f"hashalg={hash_algorithm}",))
    lines = allowed("alice", kind=kind)
    endorsement = check({"release": signature}, lines)
    assert endorsement.to_json() == {
        "required": 1,
        "signers": [
            {
                "name": "release",
                "principals": "alice",
                "key_type": ssh_kit.key(kind=kind).line.split()[0],
                "fingerprint": ssh_kit.key(kind=kind).public.fingerprint,
            }
        ],
        "uncounted": [],
    }
    assert str(endorsement) == f"signed by alice ({ssh_kit.key(kind=kind).public.fingerprint}); 1 required"
    assert ssh_kit.verifies(MANIFEST, signature, lines, identity="alice")
    assert not ssh_kit.verifies(MANIFEST + b" ", signature, lines, identity="alice")
    assert code({"release": signature}, lines, manifest=MANIFEST + b" ") == "trust.signature"


@pytest.mark.parametrize("kind", sorted(ssh_kit.KINDS))
def test_a_signature_with_any_bit_turned_is_never_accepted(kind: str) -> None:
    key = ssh_kit.key(kind=kind)
    genuine = parse_signature(sign(kind=kind))
    lines = allowed("alice", kind=kind)
    signers = parse_allowed_signers(lines.encode())

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 8 * len(genuine.value_blob) - 1))
    def bent_is_refused(bit: int) -> None:
        value = bytearray(genuine.value_blob)
        value[bit // 8] ^= 1 << bit % 8
        bent = encode_signature(replace(genuine, value_blob=bytes(value)))
        with pytest.raises(PatchMalformedError) as caught:
            check_signatures(MANIFEST, {"a": bent}, signers, required=1, now=NOW)
        assert caught.value.error_code == "trust.signature"

    bent_is_refused()
    assert check({"a": encode_signature(genuine)}, lines).signatures[0].signer.key == key.public


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_armor_that_is_cut_or_garbled_is_refused_or_says_the_same(data: st.DataObject) -> None:
    armored = bytearray(_SIGNATURE.setdefault("alice", sign()))
    if data.draw(st.booleans()):
        del armored[data.draw(st.integers(0, len(armored) - 2)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, max(0, len(armored) - 1)))
        armored[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        check({"a": bytes(armored)}, allowed("alice"))
    except PatchMalformedError as error:
        assert error.error_code in {
            "trust.malformed", "trust.namespace", "trust.signature", "trust.unknown_key",
        }  # fmt: skip
    else:
        # Lines may be longer or shorter; what they say is the same.
        assert parse_signature(bytes(armored)) == parse_signature(_SIGNATURE["alice"])


_SIGNATURE: dict[str, bytes] = {}


# --- the decision -------------------------------------------------------------------------------------------


def test_a_patch_without_a_signature_is_refused() -> None:
    error = refusal({}, allowed("alice"))
    assert error.error_code == "trust.unsigned"
    assert "`asyncsup patch sign`" in error.message


def test_one_key_counts_once_whatever_the_signatures_are_called() -> None:
    lines = allowed("alice", "bob")
    first, again = sign(), sign(options=("hashalg=sha256",))
    for signatures in ({"a": first, "b": first}, {"alice": first, "bob": again}):
        error = refusal(signatures, lines, required=2)
        assert error.error_code == "trust.threshold"
        assert "by the same key as signatures/a" in error.message
        (second,) = error.details["uncounted"]
        assert second["code"] == "trust.threshold"
    # Nor does it count twice when the file has it under two names.
    twice = f"{allowed('alice')}bob {ssh_kit.key('alice').line}\n"
    assert code({"a": first, "b": again}, twice, required=2) == "trust.threshold"
    assert len(check({"a": first, "b": again}, lines).signatures) == 1


def test_one_private_key_written_down_as_two_public_ones_counts_once() -> None:
    software = ed25519.Ed25519PrivateKey.generate()
    plain, fido = (_fido_signature(software, fido=fido) for fido in (False, True))
    lines = f"alice {plain.line}\nbob {fido.line}\n"
    assert len(check({"a": plain.armored}, lines).signatures) == 1
    assert len(check({"b": fido.armored}, lines).signatures) == 1
    assert code({"a": plain.armored, "b": fido.armored}, lines, required=2) == "trust.threshold"


@pytest.mark.parametrize("namespace", ["file", "git", "asyncsup-patch2", "asyncsup", "ASYNCSUP-PATCH"])
def test_a_signature_made_for_something_else_is_refused(namespace: str) -> None:
    signature = sign(namespace=namespace)
    error = refusal({"a": signature}, allowed("alice"))
    assert error.error_code == "trust.namespace"
    assert f"is made for {namespace!r}" in error.message
    assert not ssh_kit.verifies(MANIFEST, signature, allowed("alice"), identity="alice")
    # Saying that it was made for patches does not help: the namespace is signed.
    renamed = encode_signature(replace(parse_signature(signature), namespace=NAMESPACE))
    assert code({"a": renamed}, allowed("alice")) == "trust.signature"
    # And it is never just left out.
    assert code({"a": signature, "b": sign("bob")}, allowed("alice", "bob")) == "trust.namespace"


def test_a_signature_over_the_same_json_written_otherwise_is_refused() -> None:
    value = json.loads(MANIFEST)
    for written in (
        json.dumps(value, indent=2).encode(),
        json.dumps(value, separators=(",", ":")).encode(),
        json.dumps(value, sort_keys=True).encode(),
        MANIFEST + b"\n",
        b" " + MANIFEST,
    ):
        assert written != MANIFEST
        assert json.loads(written) == value
        signature = sign(message=written)
        assert code({"a": signature}, allowed("alice")) == "trust.signature"
        assert check({"a": signature}, allowed("alice"), manifest=written).required == 1


def test_two_different_keys_reach_a_threshold_of_two() -> None:
    signatures = {"a": sign("alice"), "b": sign("bob", kind="ecdsa256")}
    lines = allowed("alice") + allowed("bob", kind="ecdsa256")
    endorsement = check(signatures, lines, required=2)
    assert [each.signer.principals for each in endorsement.signatures] == ["alice", "bob"]
    assert code(signatures, lines, required=3) == "trust.threshold"
    del signatures["b"]
    error = refusal(signatures, lines, required=2)
    assert error.error_code == "trust.threshold"
    assert [signer["principals"] for signer in error.details["signers"]] == ["alice"]


def test_keys_that_are_not_listed_are_left_out_of_the_count() -> None:
    signatures = {"mallory": sign("mallory"), "alice": sign("alice")}
    endorsement = check(signatures, allowed("alice"))
    assert [each.name for each in endorsement.signatures] == ["alice"]
    assert [(each.name, each.code) for each in endorsement.uncounted] == [("mallory", "trust.unknown_key")]
    error = refusal({"mallory": signatures["mallory"]}, allowed("alice"))
    assert error.error_code == "trust.unknown_key"
    assert ssh_kit.key("mallory").public.fingerprint in error.message
    assert code(signatures, allowed("alice"), required=2) == "trust.threshold"
    assert code({"a": sign()}, "") == "trust.unknown_key"


def test_the_name_of_a_signature_proves_nothing() -> None:
    assert code({"alice": sign("mallory")}, allowed("alice")) == "trust.unknown_key"
    forged = replace(parse_signature(sign("mallory")), key_blob=ssh_kit.key("alice").public.blob)
    assert code({"alice": encode_signature(forged)}, allowed("alice")) == "trust.signature"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ('valid-before="20261122115959Z"', "trust.expired_key"),
        ('valid-before="20261122120000Z"', None),
        ('valid-after="20261122120001Z"', "trust.early_key"),
        ('valid-after="20261122120000Z"', None),
        ('namespaces="git,file"', "trust.namespace"),
        ('namespaces="asyncsup-*"', None),
        ('namespaces="*,!asyncsup-patch"', "trust.namespace"),
        ('namespaces="git",valid-before="20200101Z"', "trust.namespace"),
    ],
)
def test_a_key_counts_for_what_and_when_its_line_says(options: str, expected: str | None) -> None:
    lines, signature = allowed("alice", options=options), sign()
    theirs = ssh_kit.verifies(MANIFEST, signature, lines, identity="alice", at=f"{NOW:%Y%m%d%H%M%SZ}")
    assert theirs == (expected is None)
    if expected is None:
        check({"a": signature}, lines)
        return
    error = refusal({"a": signature}, lines)
    assert error.error_code == expected
    assert "line 1 of the allowed signers" in error.message
    # Another line may allow it, another signature may suffice.
    check({"a": signature}, lines + allowed("alice"))
    endorsement = check({"a": signature, "b": sign("bob")}, lines + allowed("bob"))
    assert [each.code for each in endorsement.uncounted] == [expected]
    # What is known of a key says more than that another one is not known.
    assert code({"0": sign("mallory"), "a": signature}, lines) == expected


def test_a_damaged_signature_is_never_just_left_out() -> None:
    error = refusal({"a": sign(), "b": b"-----BEGIN SSH SIGNATURE-----\n"}, allowed("alice"))
    assert error.error_code == "trust.malformed"
    assert error.message.startswith("signatures/b.sig ")
    assert code({"a": sign(), "b": sign("bob", b"another")}, allowed("alice", "bob")) == "trust.signature"


def test_no_signature_at_all_can_never_be_enough() -> None:
    with pytest.raises(ValueError, match="0 signatures"):
        check({}, allowed("alice"), required=0)


def test_keys_that_may_sign_patches_are_counted_once() -> None:
    lines = allowed("alice", "bob") + allowed("alice") + allowed("carol", options='namespaces="git"')
    assert count_keys(parse_allowed_signers(lines.encode())) == 2


# --- RSA ----------------------------------------------------------------------------------------------------


class Rsa:
    """An RSA key that signs as it is told to."""

    def __init__(self) -> None:
        self.private = rsa.generate_private_key(65537, 2048)
        numbers = self.private.public_key().public_numbers()
        self.public = parse_public_key(encode_public_key(KeyType.RSA, RsaNumbers(e=numbers.e, n=numbers.n)))

    def sign(
        self, algorithm: str, digest: hashes.HashAlgorithm, manifest: bytes = MANIFEST
    ) -> SignatureValue:
        data = _unsigned(self.public).signed_data(manifest)
        return SignatureValue(algorithm=algorithm, data=self.private.sign(data, padding.PKCS1v15(), digest))


@pytest.fixture(scope="module")
def rsa_key() -> Rsa:
    return Rsa()


def _unsigned(key: PublicKey) -> SshSignature:
    return SshSignature(key_blob=key.blob, namespace=NAMESPACE, hash_algorithm="sha512", value_blob=b"")


def _armored(key: PublicKey, value: SignatureValue) -> bytes:
    return encode_signature(replace(_unsigned(key), value_blob=encode_value(value, key.type)))


def _line(key: PublicKey) -> str:
    return f"{key.type} {base64.b64encode(key.blob).decode()}"


def test_rsa_with_sha1_is_refused(rsa_key: Rsa) -> None:
    armored = _armored(rsa_key.public, rsa_key.sign("ssh-rsa", hashes.SHA1()))
    error = refusal({"a": armored}, f"alice {_line(rsa_key.public)}\n")
    assert error.error_code == "trust.signature"
    assert "SHA-1 is not accepted" in error.message
    assert not ssh_kit.verifies(MANIFEST, armored, f"alice {_line(rsa_key.public)}\n", identity="alice")


@pytest.mark.parametrize(
    ("algorithm", "digest", "good"),
    [
        ("rsa-sha2-256", hashes.SHA256(), True),
        ("rsa-sha2-512", hashes.SHA512(), True),
        ("rsa-sha2-256", hashes.SHA512(), False),
        ("rsa-sha2-512", hashes.SHA1(), False),
    ],
)
def test_rsa_signs_with_the_hash_it_says(
    rsa_key: Rsa, algorithm: str, digest: hashes.HashAlgorithm, good: bool
) -> None:
    armored = _armored(rsa_key.public, rsa_key.sign(algorithm, digest))
    lines = f"alice {_line(rsa_key.public)}\n"
    assert ssh_kit.verifies(MANIFEST, armored, lines, identity="alice") == good
    if good:
        check({"a": armored}, lines)
    else:
        assert code({"a": armored}, lines) == "trust.signature"


def test_an_rsa_signature_without_its_leading_zeros_is_accepted(rsa_key: Rsa) -> None:
    lines = f"alice {_line(rsa_key.public)}\n"
    for count in range(5000):
        manifest = MANIFEST + b" " * count
        value = rsa_key.sign("rsa-sha2-512", hashes.SHA512(), manifest)
        if value.data.startswith(b"\0"):
            break
    else:
        pytest.fail("no signature begins with a zero")
    for data in (value.data, value.data.lstrip(b"\0")):
        armored = _armored(rsa_key.public, replace(value, data=data))
        check({"a": armored}, lines, manifest=manifest)
        assert ssh_kit.verifies(manifest, armored, lines, identity="alice")


def test_an_rsa_key_that_is_too_short_is_no_signer() -> None:
    numbers = rsa.generate_private_key(65537, 1024).public_key().public_numbers()
    blob = encode_public_key(KeyType.RSA, RsaNumbers(e=numbers.e, n=numbers.n))
    weak = PublicKey(type=KeyType.RSA, blob=blob, material=RsaNumbers(e=numbers.e, n=numbers.n))
    with pytest.raises(AllowedSignersError, match="RSA key of 1024 bits"):
        parse_allowed_signers(f"alice {_line(weak)}\n".encode())


# --- FIDO ---------------------------------------------------------------------------------------------------


class _Signed:
    def __init__(self, key: PublicKey, value: SignatureValue) -> None:
        self.key, self.value = key, value

    @property
    def line(self) -> str:
        return _line(self.key)

    @property
    def armored(self) -> bytes:
        return _armored(self.key, self.value)


def _fido_signature(
    private: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | None = None,
    *,
    fido: bool = True,
    flags: int = 1,
    counter: int = 7,
    application: str = "ssh:",
) -> _Signed:
    """A signature as an authenticator makes it, by a key in software."""
    private = private or ed25519.Ed25519PrivateKey.generate()
    if isinstance(private, ed25519.Ed25519PrivateKey):
        kind = KeyType.SK_ED25519 if fido else KeyType.ED25519
        material = private.public_key().public_bytes_raw()
    else:
        kind = KeyType.SK_ECDSA
        material = private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    key = parse_public_key(encode_public_key(kind, material, application))
    value = SignatureValue(algorithm=kind.value, flags=flags, counter=counter)
    data = value.authenticated(key, _unsigned(key).signed_data(MANIFEST))
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return _Signed(key, replace(value, data=private.sign(data)))
    numbers = EcdsaNumbers(*utils.decode_dss_signature(private.sign(data, ec.ECDSA(hashes.SHA256()))))
    return _Signed(key, replace(value, numbers=numbers))


SOFTWARE: list[Callable[[], Any]] = [
    ed25519.Ed25519PrivateKey.generate,
    lambda: ec.generate_private_key(ec.SECP256R1()),
]


@pytest.mark.parametrize("generate", SOFTWARE, ids=["sk-ssh-ed25519", "sk-ecdsa-sha2-nistp256"])
def test_a_fido_signature_is_accepted_here_and_by_ssh_keygen(generate: Callable[[], Any]) -> None:
    signed = _fido_signature(generate(), flags=5, counter=2**31)
    lines = f"alice {signed.line}\n"
    endorsement = check({"token": signed.armored}, lines)
    assert endorsement.signatures[0].signer.key.type.is_fido
    assert ssh_kit.verifies(MANIFEST, signed.armored, lines, identity="alice")


@pytest.mark.parametrize("generate", SOFTWARE, ids=["sk-ssh-ed25519", "sk-ecdsa-sha2-nistp256"])
def test_a_fido_signature_covers_flags_counter_and_application(generate: Callable[[], Any]) -> None:
    private = generate()
    signed = _fido_signature(private)
    lines = f"alice {signed.line}\n"
    for bent in (
        replace(signed.value, counter=8),
        replace(signed.value, flags=5),
    ):
        assert code({"a": _armored(signed.key, bent)}, lines) == "trust.signature"
        assert not ssh_kit.verifies(MANIFEST, _armored(signed.key, bent), lines, identity="alice")
    elsewhere = _fido_signature(private, application="ssh:elsewhere")
    assert code({"a": elsewhere.armored}, lines) == "trust.unknown_key"
    assert code({"a": _armored(signed.key, elsewhere.value)}, lines) == "trust.signature"


def test_a_fido_key_has_to_be_touched() -> None:
    untouched = _fido_signature(flags=0)
    error = refusal({"a": untouched.armored}, f"alice {untouched.line}\n")
    assert error.error_code == "trust.signature"
    assert "without anybody touching the key" in error.message


# --- packages, files, machines ------------------------------------------------------------------------------


def _package(path: Path, **signatures: bytes) -> Path:
    parts = [Part(name=f"signatures/{name}.sig", data=data) for name, data in signatures.items()]
    path.write_bytes(forge(manifest_part(*FILES), *FILES, *parts))
    return path


def test_a_package_is_judged_by_the_manifest_in_it(tmp_path: Path) -> None:
    signers = parse_allowed_signers(allowed("alice").encode())
    with open_package(_package(tmp_path / "good.zip", alice=sign())) as package:
        assert check_package(package, signers, required=1, now=NOW).signatures[0].name == "alice"
    with (
        open_package(_package(tmp_path / "bad.zip")) as package,
        pytest.raises(PatchMalformedError, match=r"^bad\.zip: is not signed") as caught,
    ):
        check_package(package, signers, required=1, now=NOW)
    assert caught.value.details["file"] == "bad.zip"


def test_a_prototype_package_is_refused_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "patch1.zip"
    path.write_bytes(zip_forge.prototype())
    signers = parse_allowed_signers(allowed("alice").encode())
    with open_package(path) as package, pytest.raises(PatchMalformedError) as caught:
        check_package(package, signers, required=1, now=NOW)
    assert caught.value.error_code == "trust.unsigned"
    assert "asyncsup patch build" in caught.value.message


def test_a_file_of_signers_is_loaded_or_said_to_be_unusable(tmp_path: Path) -> None:
    file = tmp_path / "allowed_signers"
    file.write_text(allowed("alice"))
    assert [signer.principals for signer in load_signers(file)] == ["alice"]
    file.write_text("alice\n")
    with pytest.raises(AllowedSignersError, match=r"allowed_signers:1: "):
        load_signers(file)
    file.write_bytes(b"#" * (MAX_SIGNERS_BYTES + 1))
    with pytest.raises(AllowedSignersError, match="more than"):
        load_signers(file)
    os.mkfifo(tmp_path / "fifo")
    for name, says in (("fifo", "not a regular file"), ("none", "No such file"), (".", "directory")):
        with pytest.raises(AllowedSignersError, match=says):
            load_signers(tmp_path / name)


def test_without_cryptography_nothing_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ec", None)
    with pytest.raises(TrustUnavailableError, match="cryptography") as caught:
        check({"a": sign()}, allowed("alice"))
    assert (caught.value.error_code, caught.value.exit_status) == ("trust.unavailable", 5)


def test_a_key_that_parses_and_cannot_be_used_is_no_signer() -> None:
    """What the library refuses beyond what is checked here must not surface as anything else."""
    public = PublicKey(type=KeyType.ECDSA_256, blob=b"key", material=b"\x04" + bytes(64))
    value = SignatureValue(algorithm="ecdsa-sha2-nistp256", numbers=EcdsaNumbers(r=1, s=1))
    armored = encode_signature(
        SshSignature(
            key_blob=b"key", namespace=NAMESPACE, hash_algorithm="sha512",
            value_blob=encode_value(value, public.type),
        )
    )  # fmt: skip
    with pytest.raises(PatchMalformedError) as caught:
        check_signatures(
            MANIFEST, {"a": armored}, [Signer(principals="alice", key=public)], required=1, now=NOW
        )
    assert caught.value.error_code == "trust.signature"
