"""The format of SSH signatures: what `ssh-keygen` writes, bent in every way it can be."""

from __future__ import annotations

import base64
import contextlib
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import ssh_kit
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncsup.patch.sshsig import (
    MAGIC,
    EcdsaNumbers,
    KeyType,
    PublicKey,
    RsaNumbers,
    SignatureValue,
    SshFormatError,
    SshSignature,
    UnsupportedKeyError,
    decode_base64,
    encode_number,
    encode_public_key,
    encode_signature,
    encode_string,
    encode_value,
    parse_public_key,
    parse_signature,
    parse_value,
)

MESSAGE = b'{"schema": "asyncsup.patch/1"}\n'
KINDS = sorted(ssh_kit.KINDS)


def signature_of(kind: str = "ed25519") -> bytes:
    return ssh_kit.key(kind=kind).sign(MESSAGE)


def blob_of(armored: bytes) -> bytes:
    return base64.b64decode(b"".join(armored.splitlines()[1:-1]))


def armor(blob: bytes) -> bytes:
    return b"-----BEGIN SSH SIGNATURE-----\n" + base64.b64encode(blob) + b"\n-----END SSH SIGNATURE-----\n"


def fault(read: Callable[[], Any]) -> str:
    with pytest.raises(SshFormatError) as caught:
        read()
    return str(caught.value)


# --- what ssh-keygen writes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_signatures_of_ssh_keygen_are_read_and_written_back_byte_for_byte(kind: str) -> None:
    key = ssh_kit.key(kind=kind)
    public = key.public
    assert encode_public_key(public.type, public.material) == public.blob
    assert key.line.startswith(f"{public.type} ")
    for name in ("sha256", "sha512"):
        armored = key.sign(MESSAGE, options=(f"hashalg={name}",))
        signature = parse_signature(armored)
        assert (signature.namespace, signature.hash_algorithm) == ("asyncsup-patch", name)
        assert signature.key_blob == public.blob
        assert encode_signature(signature) == armored
        value = parse_value(signature.value_blob, public)
        assert encode_value(value, public.type) == signature.value_blob


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_are_those_ssh_keygen_shows(kind: str) -> None:
    key = ssh_kit.key(kind=kind)
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(key.public_file)], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[1] == key.public.fingerprint


@given(
    namespace=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    key=st.binary(),
    value=st.binary(),
    hash_algorithm=st.sampled_from(["sha256", "sha512"]),
)
def test_every_signature_that_can_be_said_reads_back(
    namespace: str, key: bytes, value: bytes, hash_algorithm: str
) -> None:
    signature = SshSignature(
        key_blob=key, namespace=namespace, hash_algorithm=hash_algorithm, value_blob=value
    )
    assert parse_signature(encode_signature(signature)) == signature


@given(st.integers(0, 2**600))
@example(0)
@example(127)
@example(128)
def test_numbers_are_written_in_the_one_form_that_is_read(number: int) -> None:
    key = PublicKey(type=KeyType.ECDSA_256, blob=b"", material=b"")
    value = SignatureValue(algorithm="ecdsa-sha2-nistp256", numbers=EcdsaNumbers(r=number, s=1))
    assert parse_value(encode_value(value, key.type), key) == value


# --- armor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bend",
    [
        lambda armored: armored.rstrip(),
        lambda armored: armored + b"\n\n",
        lambda armored: armor(blob_of(armored)),
    ],
    ids=["no newline at the end", "newlines at the end", "one long line"],
)
def test_armor_that_is_accepted_is_accepted_by_ssh_keygen(bend: Callable[[bytes], bytes]) -> None:
    armored = signature_of()
    bent = bend(armored)
    assert bent != armored
    assert parse_signature(bent) == parse_signature(armored)
    assert ssh_kit.reads_signature(MESSAGE, bent)


@pytest.mark.parametrize(
    "bend",
    [
        lambda armored: b"",
        lambda armored: b"\n" + armored,
        lambda armored: b"\xef\xbb\xbf" + armored,
        lambda armored: b"about this:\n" + armored,
        lambda armored: armored + b"and more\n",
        lambda armored: armored + armored,
        lambda armored: armored[:-2],
        lambda armored: armored[:200],
        lambda armored: armored.split(b"\n", 1)[1],
        lambda armored: armored.replace(b"SSH SIGNATURE", b"PGP SIGNATURE"),
        lambda armored: armored.replace(b"\n", b"", 1),
        lambda armored: armored.replace(b"\n", b"\n\n>", 1),
        lambda armored: armored.replace(b"\n", b"\n ", 1),
        lambda armored: armored.replace(b"U1NI", b"U1N\0"),
        blob_of,
        lambda armored: armored.replace(b"\n", b"\r\n"),
        lambda armored: armor(blob_of(armored)).replace(b"\n-----END", b"=\n-----END"),
    ],
)
def test_anything_else_around_or_in_the_armor_is_refused(bend: Callable[[bytes], bytes]) -> None:
    fault(lambda: parse_signature(bend(signature_of())))


def test_base64_has_one_form() -> None:
    assert decode_base64(b"QUI=") == b"AB"
    # The last two bits mean nothing, so there are three other ways to write the same bytes.
    for text in (b"QUJ=", b"QUK=", b"QUL=", b"QUI", b"QUI==", b"Q UI=", b"QUI=\n", b"Q-I=", b"", b"===="):
        assert "base64" in fault(lambda text=text: decode_base64(text))  # type: ignore[misc]


# --- the signature ------------------------------------------------------------------------------------------


def parts(**changed: Any) -> bytes:
    """The blob of a real signature, with some fields changed."""
    real = parse_signature(signature_of())
    fields: dict[str, bytes] = {
        "magic": MAGIC, "version": (1).to_bytes(4), "key": encode_string(real.key_blob),
        "namespace": encode_string(b"asyncsup-patch"), "reserved": encode_string(b""),
        "hash": encode_string(b"sha512"), "value": encode_string(real.value_blob), "rest": b"",
    }  # fmt: skip
    assert not changed.keys() - fields.keys()
    return b"".join((fields | changed).values())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"magic": b"SSHSIF"}, "not an SSH signature"),
        ({"version": (0).to_bytes(4)}, "version 0"),
        ({"version": (2).to_bytes(4)}, "version 2"),
        ({"namespace": encode_string(b"")}, "no namespace"),
        ({"namespace": encode_string(b"asyncsup-patch\0git")}, "zero byte"),
        ({"namespace": encode_string(b"\xff")}, "not text"),
        ({"reserved": encode_string(b"x")}, "reserved"),
        ({"hash": encode_string(b"sha1")}, "the hash 'sha1'"),
        ({"hash": encode_string(b"SHA512")}, "the hash 'SHA512'"),
        ({"rest": b"\0"}, "1 bytes after its end"),
        ({"value": (2**32 - 1).to_bytes(4) + b"x"}, "ends in the middle"),
    ],
)
def test_a_field_that_is_not_as_it_should_be_is_refused(changed: dict[str, bytes], says: str) -> None:
    assert parse_signature(armor(parts())) == parse_signature(signature_of())
    assert says in fault(lambda: parse_signature(armor(parts(**changed))))


def test_a_signature_cut_off_anywhere_is_refused() -> None:
    blob = parts()
    for size in range(len(blob)):
        fault(lambda size=size: parse_signature(armor(blob[:size])))  # type: ignore[misc]


@given(st.binary(max_size=400))
@example(b"")
@example(MAGIC)
def test_garbage_in_good_armor_is_only_ever_a_format_error(blob: bytes) -> None:
    fault(lambda: parse_signature(armor(blob)))


@given(st.binary(max_size=200))
def test_garbage_is_only_ever_a_format_error(data: bytes) -> None:
    fault(lambda: parse_signature(data))
    fault(lambda: parse_public_key(data))
    fault(lambda: parse_value(data, ssh_kit.key().public))


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_bent_keys_and_values_are_read_as_what_they_are_or_refused(kind: str, data: st.DataObject) -> None:
    key = ssh_kit.key(kind=kind).public
    value = parse_signature(_signed(kind)).value_blob

    def rewritten_key(blob: bytes) -> bytes:
        read = parse_public_key(blob)
        return encode_public_key(read.type, read.material)

    def rewritten_value(blob: bytes) -> bytes:
        return encode_value(parse_value(blob, key), key.type)

    for blob, rewritten in ((key.blob, rewritten_key), (value, rewritten_value)):
        bent = bytearray(blob)
        for _ in range(data.draw(st.integers(1, 3))):
            bent[data.draw(st.integers(0, len(bent) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(SshFormatError):
            assert rewritten(bytes(bent)) == bytes(bent)


_SIGNED: dict[str, bytes] = {}


def _signed(kind: str) -> bytes:
    """One signature of each kind: a new one for each example would be slow."""
    if kind not in _SIGNED:
        _SIGNED[kind] = signature_of(kind)
    return _SIGNED[kind]


# --- keys ---------------------------------------------------------------------------------------------------


def point(kind: str) -> bytes:
    material = ssh_kit.key(kind=kind).public.material
    assert isinstance(material, bytes)
    return material


def rsa(**changed: int) -> bytes:
    material = ssh_kit.key(kind="rsa3072").public.material
    assert isinstance(material, RsaNumbers)
    return encode_public_key(KeyType.RSA, material._replace(**changed))


def ecdsa(material: bytes, *, name: str = "ecdsa-sha2-nistp256", curve: bytes = b"nistp256") -> bytes:
    return encode_string(name.encode()) + encode_string(curve) + encode_string(material)


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (lambda: rsa() + b"\0", "1 bytes after its end"),
        (lambda: rsa(n=2**2046 + 1), "RSA key of 2047 bits"),
        (lambda: rsa(n=2**3071), "no RSA key"),
        (lambda: rsa(n=2**16384 + 1), "no RSA key"),
        (lambda: rsa(e=65536), "no RSA key"),
        (lambda: rsa(e=1), "no RSA key"),
        (lambda: rsa(e=2**64 + 1), "no RSA key"),
        (lambda: rsa(e=0), "no RSA key"),
        (
            lambda: encode_string(b"ssh-rsa") + encode_string(b"\0\x01\0\x01") + encode_number(1),
            "needless zeros",
        ),
        (lambda: encode_string(b"ssh-rsa") + encode_string(b"\x80") + encode_number(1), "negative"),
        (lambda: encode_public_key(KeyType.ED25519, bytes(31)), "31 bytes"),
        (lambda: encode_public_key(KeyType.ED25519, bytes(33)), "33 bytes"),
        (lambda: ecdsa(point("ecdsa256"), curve=b"nistp384"), "on the curve 'nistp384'"),
        (lambda: ecdsa(point("ecdsa384")), "no uncompressed point"),
        (lambda: ecdsa(b"\x02" + point("ecdsa256")[1:33]), "no uncompressed point"),
        (lambda: ecdsa(b"\x04" + bytes(64)), "not on its curve"),
        (lambda: ecdsa(b"\x04" + b"\xff" * 64), "not on its curve"),
        (lambda: ecdsa(b"\0"), "no uncompressed point"),
        (lambda: ecdsa(b""), "no uncompressed point"),
    ],
)
def test_a_key_that_is_no_good_is_refused(blob: Callable[[], bytes], says: str) -> None:
    assert says in fault(lambda: parse_public_key(blob()))


@pytest.mark.parametrize("kind", ["ecdsa256", "ecdsa384", "ecdsa521"])
def test_only_points_on_the_curve_are_keys(kind: str) -> None:
    key = ssh_kit.key(kind=kind).public
    assert isinstance(key.material, bytes)
    assert parse_public_key(key.blob) == key
    bent = bytearray(key.material)
    bent[-1] ^= 1
    assert "not on its curve" in fault(lambda: parse_public_key(encode_public_key(key.type, bytes(bent))))


@pytest.mark.parametrize(
    "name", ["ssh-dss", "ssh-ed25519-cert-v01@openssh.com", "ssh-rsa-cert-v01@openssh.com", "ssh-ed448", ""]
)
def test_types_that_are_not_known_are_told_apart_from_bad_keys(name: str) -> None:
    with pytest.raises(UnsupportedKeyError, match="not supported"):
        parse_public_key(encode_string(name.encode()) + encode_string(bytes(32)))


def test_one_private_key_is_one_however_it_is_written_down() -> None:
    alice, bob = ssh_kit.key("alice").public, ssh_kit.key("bob").public
    assert isinstance(alice.material, bytes)
    assert alice.secret != bob.secret
    in_fido = [
        parse_public_key(encode_public_key(KeyType.SK_ED25519, alice.material, application))
        for application in ("ssh:", "ssh:other")
    ]
    assert len({key.blob for key in (alice, *in_fido)}) == 3
    assert {key.secret for key in (alice, *in_fido)} == {alice.secret}
    elliptic = ssh_kit.key(kind="ecdsa256").public
    assert isinstance(elliptic.material, bytes)
    other = parse_public_key(encode_public_key(KeyType.SK_ECDSA, elliptic.material, "ssh:"))
    assert other.secret == elliptic.secret
    assert parse_public_key(rsa(e=3)).secret == parse_public_key(rsa()).secret


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "blob", "says"),
    [
        ("ed25519", encode_string(b"ssh-ed25519") + encode_string(bytes(63)), "63 bytes"),
        ("ed25519", encode_string(b"ssh-ed25519") + encode_string(bytes(64)) + b"x", "1 bytes after"),
        ("ed25519", encode_string(b"ssh-ed448") + encode_string(bytes(64)), "made with 'ssh-ed448'"),
        ("rsa3072", encode_string(b"ssh-rsa") + encode_string(bytes(384)), "RSA with SHA-1"),
        ("rsa3072", encode_string(b"rsa-sha2-512") + encode_string(bytes(385)), "385 bytes"),
        ("rsa3072", encode_string(b"rsa-sha2-512") + encode_string(b""), "0 bytes"),
        ("rsa3072", encode_string(b"ssh-ed25519") + encode_string(bytes(64)), "made with 'ssh-ed25519'"),
        ("ecdsa256", encode_string(b"ecdsa-sha2-nistp384") + encode_string(b""), "made with"),
        ("ecdsa256", encode_string(b"ecdsa-sha2-nistp256") + encode_string(b""), "ends in the middle"),
        (
            "ecdsa256",
            encode_string(b"ecdsa-sha2-nistp256")
            + encode_string(encode_number(1) + encode_number(1) + encode_number(1)),
            "5 bytes after",
        ),
        (
            "ecdsa256",
            encode_string(b"ecdsa-sha2-nistp256") + encode_string(encode_string(b"\0\1") + encode_number(1)),
            "needless zeros",
        ),
    ],
)
def test_a_value_that_the_key_cannot_have_made_is_refused(kind: str, blob: bytes, says: str) -> None:
    assert says in fault(lambda: parse_value(blob, ssh_kit.key(kind=kind).public))


def test_a_fido_value_has_flags_and_a_counter() -> None:
    alice = ssh_kit.key().public
    assert isinstance(alice.material, bytes)
    blob = encode_public_key(KeyType.SK_ED25519, alice.material, "ssh:")
    key = parse_public_key(blob)
    assert (key.type, key.application, key.blob) == (KeyType.SK_ED25519, "ssh:", blob)
    value = SignatureValue(algorithm=key.type.value, data=bytes(64), flags=5, counter=2**32 - 1)
    encoded = encode_value(value, key.type)
    assert parse_value(encoded, key) == value
    for size in range(len(encoded)):
        fault(lambda size=size: parse_value(encoded[:size], key))  # type: ignore[misc]
    assert value.authenticated(key, b"data") != replace(value, counter=1).authenticated(key, b"data")
    assert value.authenticated(alice, b"data") == b"data"
