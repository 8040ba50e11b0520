"""OpenSSH for tests: real keys, real signatures, and the real `ssh-keygen -Y verify` as the judge."""

from __future__ import annotations

import base64
import os
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from asyncsup.patch.sshsig import PublicKey, parse_public_key

KINDS: Final = {
    "ed25519": ("-t", "ed25519"),
    "ecdsa256": ("-t", "ecdsa", "-b", "256"),
    "ecdsa384": ("-t", "ecdsa", "-b", "384"),
    "ecdsa521": ("-t", "ecdsa", "-b", "521"),
    "rsa3072": ("-t", "rsa", "-b", "3072"),
}
NAMESPACE: Final = "asyncsup-patch"


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key pair in files, as `ssh-keygen` made it."""

    private: Path

    @property
    def public_file(self) -> Path:
        return self.private.with_name(f"{self.private.name}.pub")

    @property
    def line(self) -> str:
        """``TYPE BASE64``, as it stands in a file of allowed signers."""
        return " ".join(self.public_file.read_text().split()[:2])

    @property
    def comment(self) -> str:
        return self.public_file.read_text().split(maxsplit=2)[2].strip()

    @property
    def public(self) -> PublicKey:
        return parse_public_key(base64.b64decode(self.line.split()[1]))

    def sign(self, message: bytes, *, namespace: str = NAMESPACE, options: tuple[str, ...] = ()) -> bytes:
        command = ["ssh-keygen", "-q", "-Y", "sign", "-n", namespace, "-f", str(self.private)]
        for option in options:
            command += ["-O", option]
        return subprocess.run(command, input=message, capture_output=True, check=True).stdout


def make_key(path: Path, kind: str = "ed25519", *, comment: str = "", passphrase: str = "") -> Key:
    subprocess.run(
        ["ssh-keygen", "-q", *KINDS[kind], "-N", passphrase, "-C", comment, "-f", str(path)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return Key(private=path)


_folder = tempfile.TemporaryDirectory(prefix="as-keys-")


def key(name: str = "alice", kind: str = "ed25519") -> Key:
    """The key of somebody, the same one for all tests of a run."""
    return _key(name, kind)


@cache
def _key(name: str, kind: str) -> Key:
    return make_key(Path(_folder.name, f"{name}-{kind}"), kind, comment=f"{name}@example.com")


def verifies(
    message: bytes,
    signature: bytes,
    allowed_signers: str | bytes,
    *,
    identity: str,
    namespace: str = NAMESPACE,
    at: str | None = None,
    zone: str = "UTC",
) -> bool:
    """Whether `ssh-keygen -Y verify` accepts the signature.

    Args:
        at: the time for which to decide, as ``YYYYMMDDHHMMSSZ``; None means now.
        zone: the time zone of the machine (TZ).
    """
    content = allowed_signers.encode() if isinstance(allowed_signers, str) else allowed_signers
    with tempfile.TemporaryDirectory(prefix="as-verify-") as folder:
        Path(folder, "allowed").write_bytes(content)
        Path(folder, "sig").write_bytes(signature)
        command = [
            "ssh-keygen", "-Y", "verify", "-n", namespace, "-I", identity,
            "-f", f"{folder}/allowed", "-s", f"{folder}/sig",
        ]  # fmt: skip
        if at is not None:
            command += ["-O", f"verify-time={at}"]
        done = subprocess.run(
            command, input=message, capture_output=True, check=False, env={**os.environ, "TZ": zone}
        )
    # 255 is a refusal; anything else would be a test that asked wrongly.
    assert done.returncode in {0, 255}, done.stderr
    assert b"usage" not in done.stderr.lower(), done.stderr
    return done.returncode == 0


def reads_signature(message: bytes, signature: bytes) -> bool:
    """Whether `ssh-keygen` takes the signature for one over this message, whoever it is by."""
    with tempfile.NamedTemporaryFile(prefix="as-sig-") as file:
        file.write(signature)
        file.flush()
        command = ["ssh-keygen", "-Y", "check-novalidate", "-n", NAMESPACE, "-s", file.name]
        return subprocess.run(command, input=message, capture_output=True, check=False).returncode == 0
