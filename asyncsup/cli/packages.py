"""Packages that are there, without a supervisor: `patch verify` and `patch sign`."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from asyncsup import render
from asyncsup.cli.arguments import digest_options, matching
from asyncsup.cli.session import Session, file_error
from asyncsup.cli.settings import read_limits
from asyncsup.cli.verbs import Action
from asyncsup.errors import UsageError
from asyncsup.patch.checksum import read_checksum
from asyncsup.patch.manifest import encode_manifest
from asyncsup.patch.package import Package, open_package
from asyncsup.patch.prototype import parse_crc32
from asyncsup.patch.signing import sign_package
from asyncsup.patch.trust import check_package, load_signers


def _verify(session: Session) -> int:
    args, out = session.args, session.out
    path = Path(args.file)
    sha256 = args.sha256 if args.sha256 or args.crc32 else read_checksum(path)
    crc32 = None if args.crc32 is None else parse_crc32(args.crc32)
    limits = read_limits(session)
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # what is wrong with it the package says
    opened = open_package(path, limits=limits, sha256=sha256, crc32=crc32, progress=out.counter(size))
    with opened as package:
        signed = _check_signatures(package, args.allowed_signers, args.required)
        package.verify(out.counter(package.content_size))
        checked_against = "sha256" if sha256 else "crc32" if crc32 is not None else None
        value: dict[str, Any] = {
            "id": package.id,
            "size": package.size,
            "format": package.format,
            "checked_against": checked_against,
            "manifest": json.loads(encode_manifest(package.manifest)),
            "signatures": sorted(package.signatures),
            "signed": signed,
            "warnings": [],
        }
    if checked_against is None and signed is None:
        value["warnings"].append(
            "checked only against itself: give --sha256, or --crc32 for a prototype package, or put the "
            "checksum into FILE.sha256, or say with --allowed-signers whose signatures count"
        )
    out.clear_bar()
    out.result(value, lambda: render.verified_lines(value, ink=out.ink))
    return 0


def _check_signatures(
    package: Package, allowed_signers: str | None, required: int | None
) -> dict[str, Any] | None:
    """Who signed the package, as JSON; None when nobody asks."""
    if allowed_signers is None:
        if required is not None:
            raise UsageError("--required needs --allowed-signers FILE, which says whose signatures count")
        return None
    signers = load_signers(Path(allowed_signers))
    endorsement = check_package(package, signers, required=required or 1, now=datetime.now(UTC))
    return {"ok": True, "detail": str(endorsement), **endorsement.to_json()}


_number_of_keys: Final = matching(r"[1-9][0-9]{0,3}", "no number of keys, from 1", int)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the package")
    digest_options(parser)
    parser.add_argument(
        "--allowed-signers", metavar="FILE", help="whose signatures count, in OpenSSH's format"
    )
    parser.add_argument(
        "--required", type=_number_of_keys, metavar="N", help="how many different keys must have signed (1)"
    )


def _sign(session: Session) -> int:
    args, out = session.args, session.out
    try:
        signed = sign_package(
            Path(args.file), key=Path(args.key), name=args.name, limits=read_limits(session), notice=out.note
        )
    except OSError as error:
        raise file_error(error) from None
    value = {
        "path": str(signed.path),
        "id": signed.id,
        "signature": signed.name,
        "key_type": signed.key.type.value,
        "fingerprint": signed.key.fingerprint,
    }
    out.result(value, lambda: render.signed_lines(value, ink=out.ink))
    return 0


def _sign_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the package")
    parser.add_argument(
        "--key", required=True, metavar="KEY", help="a private key, or the .pub of one that the agent has"
    )
    parser.add_argument("--name", metavar="NAME", help="of the signature (default: the key's comment)")


VERIFY = Action(_verify, _verify_arguments)
SIGN = Action(_sign, _sign_arguments)
