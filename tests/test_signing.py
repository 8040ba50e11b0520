"""Signing: what `patch sign` makes OpenSSH verifies, and the other way round; keys, agents, names."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ssh_kit
import zip_forge
from conftest import wait_for
from ssh_kit import Key, key, make_key
from test_cli import Outcome, offline, process
from test_patching import Field
from zip_forge import FILES, Part, forge, manifest_part, native

from asyncsup.errors import AsyncsupError, PatchSignError
from asyncsup.patch.manifest import Requires
from asyncsup.patch.package import open_package
from asyncsup.patch.signing import sign_package

MANIFEST = manifest_part(*FILES).data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "p.zip"
    path.write_bytes(native(*FILES))
    return path


def allowed(*names: str, options: str = 'namespaces="asyncsup-patch" ', kind: str = "ed25519") -> str:
    return "".join(f"{name}@example.com {options}{key(name, kind).line}\n" for name in names)


def fails(code: str, work: Callable[[], object]) -> AsyncsupError:
    with pytest.raises(AsyncsupError) as caught:
        work()
    assert caught.value.error_code == code, caught.value.message
    return caught.value


def untouched(path: Path, code: str, work: Callable[[], object]) -> AsyncsupError:
    """It fails with this code, and the package and its folder are as they were."""
    before = {each.name: each.read_bytes() for each in path.parent.iterdir() if each.is_file()}
    error = fails(code, work)
    assert {each.name: each.read_bytes() for each in path.parent.iterdir() if each.is_file()} == before
    return error


# --- both directions ----------------------------------------------------------------------------------------


def extracted(path: Path, name: str) -> bytes:
    """An entry, taken out as docs/trust.md tells people to do it."""
    return subprocess.run(["unzip", "-p", str(path), name], capture_output=True, check=True).stdout


@pytest.mark.parametrize("kind", sorted(ssh_kit.KINDS))
def test_ssh_keygen_verifies_what_patch_sign_signs(path: Path, kind: str) -> None:
    signed = sign_package(path, key=key("alice", kind).private)
    assert signed.name == "alice@example.com"
    assert signed.id == hashlib.sha256(path.read_bytes()).hexdigest()
    assert signed.key == key("alice", kind).public
    manifest, signature = extracted(path, "manifest.json"), extracted(path, f"signatures/{signed.name}.sig")
    assert manifest == MANIFEST
    lines = allowed("alice", kind=kind)
    assert ssh_kit.verifies(manifest, signature, lines, identity="alice@example.com")
    assert not ssh_kit.verifies(manifest + b" ", signature, lines, identity="alice@example.com")
    assert not ssh_kit.verifies(manifest, signature, lines, identity="alice@example.com", namespace="file")


@pytest.mark.parametrize("kind", sorted(ssh_kit.KINDS))
def test_patch_verify_accepts_what_ssh_keygen_signs(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made by hand, with nothing but `ssh-keygen` and an archiver."""
    path, signers = tmp_path / "p.zip", tmp_path / "signers"
    signature = Part(name="signatures/by-hand.sig", data=key("alice", kind).sign(MANIFEST))
    path.write_bytes(forge(manifest_part(*FILES), signature, *FILES))
    signers.write_text(allowed("alice", kind=kind))
    outcome = offline(capsys, "patch", "verify", path, "--allowed-signers", signers, "--json")
    assert outcome.status == 0
    (signer,) = outcome.json["signed"]["signers"]
    assert signer["fingerprint"] == key("alice", kind).public.fingerprint
    signers.write_text(allowed("bob", kind=kind))
    assert offline(capsys, "patch", "verify", path, "--allowed-signers", signers).status == 21


def test_signing_changes_nothing_but_one_entry(path: Path) -> None:
    before = path.read_bytes()
    sign_package(path, key=key("alice").private)
    sign_package(path, key=key("bob").private)
    with open_package(path) as package:
        assert sorted(package.signatures) == ["alice@example.com", "bob@example.com"]
        assert package.manifest_bytes == MANIFEST
        package.verify()
    directory = before.index(b"PK\1\2")
    assert path.read_bytes()[:directory] == before[:directory]
    assert [each.name for each in path.parent.iterdir()] == ["p.zip"]


# --- agents -------------------------------------------------------------------------------------------------


@pytest.fixture
def agent(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Key], None]]:
    """A real `ssh-agent`; call it with a key to have it take that."""
    socket = short_tmp / "agent"
    process = subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    try:
        wait_for(socket.exists, "the agent")
        yield lambda key: subprocess.run(
            ["ssh-add", "-q", str(key.private)], check=True, stdin=subprocess.DEVNULL, capture_output=True
        ).check_returncode()
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa256", "rsa3072"])
def test_a_key_in_the_agent_signs_by_its_public_file(
    tmp_path: Path, path: Path, agent: Callable[[Key], None], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_key(tmp_path / "key", kind, comment="agent@host")
    agent(pair)
    pair.private.unlink()
    assert offline(capsys, "patch", "sign", path, "--key", pair.public_file).status == 0
    with open_package(path) as package:
        (signature,) = package.signatures.values()
    assert ssh_kit.verifies(MANIFEST, signature, f"me {pair.line}\n", identity="me")


def test_a_key_that_the_agent_has_not_signs_nothing(
    tmp_path: Path, path: Path, agent: Callable[[Key], None]
) -> None:
    agent(key("bob"))
    pair = make_key(tmp_path / "key", comment="agent@host")
    pair.private.unlink()
    untouched(path, "sign.failed", lambda: sign_package(path, key=pair.public_file))


# --- passphrases --------------------------------------------------------------------------------------------


def test_a_passphrase_is_asked_for_by_ssh_keygen(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_key(tmp_path / "key", comment="c", passphrase="correct horse")
    asking = tmp_path / "ask"
    asking.write_text("#!/bin/sh\necho correct horse\n")
    asking.chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(asking))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    assert sign_package(path, key=pair.private).name == "c"


def test_a_passphrase_that_nobody_can_give_is_a_failure(tmp_path: Path, path: Path) -> None:
    pair = make_key(tmp_path / "key", passphrase="correct horse")
    before = path.read_bytes()
    done = process("patch", "sign", path, "--key", pair.private, SSH_ASKPASS_REQUIRE="never", DISPLAY="")
    assert done.returncode == 1
    assert "did not sign" in done.stderr
    assert path.read_bytes() == before


# --- which keys ---------------------------------------------------------------------------------------------


def certified(tmp_path: Path) -> tuple[Key, Key]:
    """A key with a certificate beside it, and who certified it."""
    authority, pair = make_key(tmp_path / "ca", comment="ca"), make_key(tmp_path / "key", comment="c")
    subprocess.run(
        ["ssh-keygen", "-q", "-s", str(authority.private), "-I", "me", "-n", "me", str(pair.public_file)],
        check=True,
        capture_output=True,
    )
    return authority, pair


def test_a_certificate_does_not_sign(tmp_path: Path, path: Path) -> None:
    """What is certified is not verified here, so nothing is made that would be refused later."""
    _, pair = certified(tmp_path)
    error = untouched(path, "sign.key", lambda: sign_package(path, key=tmp_path / "key-cert.pub"))
    assert "not supported" in error.message
    assert sign_package(path, key=pair.private).key == pair.public


def test_a_signature_by_a_certificate_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ssh-keygen` itself accepts it where the authority is listed; such a list is refused, with a reason."""
    authority, _ = certified(tmp_path)
    signature = Key(private=tmp_path / "key-cert.pub").sign(MANIFEST)
    lines = f'me cert-authority,namespaces="asyncsup-patch" {authority.line}\n'
    assert ssh_kit.verifies(MANIFEST, signature, lines, identity="me")
    path, signers = tmp_path / "p.zip", tmp_path / "signers"
    path.write_bytes(forge(manifest_part(*FILES), Part(name="signatures/c.sig", data=signature), *FILES))
    signers.write_text(lines)
    outcome = offline(capsys, "patch", "verify", path, "--allowed-signers", signers)
    assert outcome.status == 5
    assert "cert-authority is not supported" in outcome.err
    signers.write_text(f"me {authority.line}\n")
    outcome = offline(capsys, "patch", "verify", path, "--allowed-signers", signers)
    assert outcome.status == 21
    assert "not among the allowed signers" in outcome.err


def test_a_key_that_would_not_be_accepted_does_not_sign(tmp_path: Path, path: Path) -> None:
    short = tmp_path / "short"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "rsa", "-b", "1024", "-N", "", "-f", str(short)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    with pytest.raises(PatchSignError):
        sign_package(path, key=short)
    assert path.read_bytes() == native(*FILES)


@pytest.mark.parametrize("content", [None, b"", b"not a key", b"\0" * 100])
def test_what_is_no_key_does_not_sign(tmp_path: Path, path: Path, content: bytes | None) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
        file.chmod(0o600)
    untouched(path, "sign.failed", lambda: sign_package(path, key=file))


def test_a_key_called_like_an_option_is_a_file(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_key(tmp_path / "-y", comment="dash")
    monkeypatch.chdir(tmp_path)
    assert sign_package(path, key=Path("-y")).name == "dash"


# --- names --------------------------------------------------------------------------------------------------


def test_a_key_signs_once_whatever_it_is_called(path: Path) -> None:
    sign_package(path, key=key().private)
    for name in (None, "other"):
        untouched(path, "sign.already", lambda name=name: sign_package(path, key=key().private, name=name))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("comment", "name"),
    [
        ("alice@example.com", "alice@example.com"),
        ("Alice in the office", "Alice-in-the-office"),
        ("../../etc/passwd", "etc-passwd"),
        ("\u00e9\u202e", None),
        ("", None),
        ("x" * 400, "x" * 128),
    ],
)
def test_a_signature_is_called_after_its_key(
    tmp_path: Path, path: Path, comment: str, name: str | None
) -> None:
    pair = make_key(tmp_path / "key", comment=comment)
    made = sign_package(path, key=pair.private).name
    assert made == name if name is not None else made.startswith("key-")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-x", "a b", "a\n", "x" * 129, "é", "a\0b"])
def test_a_name_that_cannot_be_one_is_refused(path: Path, name: str) -> None:
    untouched(path, "sign.name", lambda: sign_package(path, key=key().private, name=name))


def test_a_name_is_taken_also_in_other_case(path: Path) -> None:
    sign_package(path, key=key().private, name="Release")
    untouched(path, "sign.name", lambda: sign_package(path, key=key("bob").private, name="release"))


def test_there_is_room_for_so_many_signatures(path: Path) -> None:
    others = [Part(name=f"signatures/{number}.sig", data=b"junk") for number in range(32)]
    path.write_bytes(forge(manifest_part(*FILES), *others, *FILES))
    untouched(path, "sign.room", lambda: sign_package(path, key=key().private))


# --- what is signed -----------------------------------------------------------------------------------------


def test_a_damaged_package_is_not_signed(path: Path) -> None:
    path.write_bytes(native(*FILES)[:-1])
    untouched(path, "zip.truncated", lambda: sign_package(path, key=key().private))


def test_a_prototype_package_cannot_be_signed(path: Path) -> None:
    path.write_bytes(zip_forge.prototype())
    untouched(path, "sign.prototype", lambda: sign_package(path, key=key().private))


def test_a_package_that_is_not_the_one_of_its_checksum_is_not_signed(path: Path) -> None:
    path.with_name("p.zip.sha256").write_text(f"{'0' * 64}  p.zip\n")
    untouched(path, "digest.sha256", lambda: sign_package(path, key=key().private))


def test_the_checksum_beside_a_package_stays_right(path: Path) -> None:
    listed = path.with_name("p.zip.sha256")
    listed.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  p.zip\n")
    sign_package(path, key=key().private)
    subprocess.run(["sha256sum", "--check", "--status", listed.name], cwd=path.parent, check=True)


# --- the command line: build, sign, verify ------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, text in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / "job.json").write_text(text)
    return old, new


def build(
    capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path], output: Path, *more: str | Path
) -> Outcome:
    words = ("--name", "p", "--build", "300", "--warm", "--target", "pricer", "--region", "us-east-1")
    return offline(capsys, "patch", "build", *folders, "-o", output, *words, *more)


def test_build_signs_with_every_key_it_is_given(
    tmp_path: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output, signers = tmp_path / "out" / "p.zip", tmp_path / "signers"
    output.parent.mkdir()
    keys = [word for name in ("alice", "bob") for word in ("--sign", key(name).private)]
    built = build(capsys, folders, output, *keys, "--checksum", "--json")
    assert built.status == 0
    assert built.json["signatures"] == ["alice@example.com", "bob@example.com"]
    assert sorted(each.name for each in output.parent.iterdir()) == ["p.zip", "p.zip.sha256"]
    signers.write_text(allowed("alice", "bob", "carol"))

    def verify(required: int) -> Outcome:
        words = ("--allowed-signers", signers, "--required", str(required))
        return offline(capsys, "patch", "verify", output, *words)

    assert verify(2).status == 0
    assert verify(3).status == 21
    # Taken out of the list, a key counts no longer: that is how one is revoked.
    signers.write_text(allowed("alice", "carol"))
    assert verify(2).status == 21
    assert verify(1).status == 0
    manifest = extracted(output, "manifest.json")
    for name in ("alice@example.com", "bob@example.com"):
        signature = extracted(output, f"signatures/{name}.sig")
        assert ssh_kit.verifies(manifest, signature, allowed("alice", "bob"), identity=name)


def test_build_leaves_nothing_when_a_key_does_not_sign(
    tmp_path: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "p.zip"
    output.parent.mkdir()
    words = ("--sign", key().private, "--sign", tmp_path / "missing")
    assert build(capsys, folders, output, *words).status == 1
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ('valid-before="20200101Z" ', 21),
        ('valid-after="20900101Z" ', 21),
        ('valid-after="20200101Z",valid-before="20900101Z" ', 0),
        ('namespaces="git" ', 21),
        ('namespaces="git,asyncsup-*" ', 0),
        ("", 0),
        ("no-such-option ", 5),
    ],
)
def test_verify_heeds_what_a_key_is_allowed(
    path: Path, options: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sign_package(path, key=key().private)
    signers = path.with_name("signers")
    signers.write_text(allowed("alice", options=options))
    assert offline(capsys, "patch", "verify", path, "--allowed-signers", signers).status == status
    if status in {0, 21}:
        signature = extracted(path, "signatures/alice@example.com.sig")
        agrees = ssh_kit.verifies(MANIFEST, signature, signers.read_text(), identity="alice@example.com")
        assert agrees == (status == 0)


# --- a supervisor that wants signatures ---------------------------------------------------------------------


def test_a_supervisor_takes_what_is_signed_and_nothing_else(field: Field) -> None:
    signers = field.folder / "signers"
    signers.write_text(allowed("alice", "bob"))
    field.start("web", patch='allowed_signers = "signers"\nsignatures_required = 2\n')
    field.client.close()
    field.serve.stop()
    field.serve.write(field.serve.config.read_text().replace('trust = "none"', 'trust = "required"'))
    field.client = field.serve.start()
    field.said("web", "old-a")

    package = field.package("web")
    # Whoever knows the digest has not signed it.
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    assert field.refused(package, sha256=digest).error_code == "trust.unsigned"
    sign_package(package, key=key("alice").private)
    assert field.refused(package).error_code == "trust.threshold"
    sign_package(package, key=key("bob").private)
    signers.write_text(allowed("alice"))
    assert field.refused(package).error_code == "trust.threshold"
    signers.write_text("this is no list\n")
    assert field.refused(package).error_code == "trust.allowed_signers"
    signers.unlink()
    assert field.refused(package).error_code == "trust.allowed_signers"
    signers.write_text(allowed("alice", "bob"))
    report = field.apply(package)
    assert report["verdict"] == "committed"
    field.said("web", "build=300 a.txt=new-a")

    # A lower build only with a signature that says so, and never below the floor.
    lower = field.package(
        "web",
        build=250,
        before={"a.txt": "new-a"},
        files={"a.txt": "lower"},
        downgrade=True,
        requires=Requires(build_max=300),
    )
    assert field.refused(lower).error_code == "trust.unsigned"
    for name in ("alice", "bob"):
        sign_package(lower, key=key(name).private)
    assert field.apply(lower)["verdict"] == "committed"
    field.said("web", "build=250 a.txt=lower")
