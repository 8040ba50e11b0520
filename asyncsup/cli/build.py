"""`asyncsup patch build`: a package out of the files as they were and as they are to be."""

from __future__ import annotations

import argparse
import binascii
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from asyncsup import render
from asyncsup.cli.arguments import matching, seconds
from asyncsup.cli.session import Session, file_error
from asyncsup.cli.settings import config_path, read_limits
from asyncsup.cli.verbs import Action
from asyncsup.config import PatchLimits, load_supervisor
from asyncsup.errors import PatchBuildError, UsageError
from asyncsup.patch.build import Source, build_patch, build_prototype_patch, list_folder
from asyncsup.patch.installed import installed
from asyncsup.patch.manifest import Kind, Requires, encode_manifest
from asyncsup.patch.package import open_package
from asyncsup.patch.signing import sign_package
from asyncsup.terminal import Output

CURRENT_GENERATION: Final = -1
"""What `--from-generation current` stands for."""

Old = Path | Mapping[str, Source] | None
"""The files as they were: in a folder, as they are installed, or none at all."""


def _build(session: Session) -> int:
    args, out = session.args, session.out
    if len(args.folders) > 2:
        raise UsageError("give the folder as it is to be, or the one as it was and the one as it is to be")
    *was, new = map(Path, args.folders)
    output, limits = Path(args.output), read_limits(session)
    if not output.parent.is_dir():
        raise PatchBuildError(f"{output}: there is no folder {output.parent}", code="build.output")
    try:
        if args.from_generation is not None:
            with _installed_files(session, new) as files:
                _write(args, files, new, output, out=out, limits=limits)
        elif args.prototype:
            _write_prototype(args, was[0] if was else None, new, output)
        else:
            _write(args, was[0] if was else None, new, output, out=out, limits=limits)
        value = _describe(output, limits, prototype=args.prototype)
        if args.checksum:
            checksum = output.with_name(f"{output.name}.sha256")
            checksum.write_text(f"{value['id']}  {output.name}\n", encoding="utf-8")
    except OSError as error:
        raise file_error(error) from None
    out.clear_bar()
    out.result(value, lambda: render.built_lines(value, ink=out.ink))
    return 0


def _describe(package_file: Path, limits: PatchLimits, *, prototype: bool) -> dict[str, Any]:
    """What was built, read back by what will read it."""
    with open_package(package_file, limits=limits) as package:
        return {
            "path": str(package_file),
            "id": package.id,
            "size": package.size,
            "crc32": str(binascii.crc32(package_file.read_bytes())) if prototype else None,
            "manifest": json.loads(encode_manifest(package.manifest)),
            "signatures": sorted(package.signatures),
        }


# --- --from-generation --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _installed_files(session: Session, new: Path) -> Iterator[Mapping[str, Source]]:
    """The files of a target as they are installed, which stay while the block lasts."""
    args, out = session.args, session.out
    if len(args.folders) != 1 or len(args.targets) != 1 or args.prototype:
        raise UsageError(
            "--from-generation takes the place of OLD: give NEW, and one -t TARGET whose files they are"
        )
    state_dir = load_supervisor(config_path(session)).state_dir
    number = None if args.from_generation == CURRENT_GENERATION else args.from_generation
    with installed(state_dir, args.targets[0], number) as there:
        if args.delete_foreign:
            yield there.files
            return
        files, foreign = there.without_foreign(list_folder(new, args.include, args.exclude))
        if foreign:
            some = ", ".join(map(render.clean, foreign[:5])) + (", ..." if len(foreign) > 5 else "")
            out.note(
                f"left alone, because no patch has brought them: {render.plural(len(foreign), 'file')} that "
                f"{new} has not ({some}); --delete-foreign deletes them"
            )
        yield files


# --- a package ----------------------------------------------------------------------------------------------


def _write(
    args: argparse.Namespace, old: Old, new: Path, output: Path, *, out: Output, limits: PatchLimits
) -> None:
    """Nothing is at `output` before it is signed: an inbox might take it for what it is not yet."""
    if not args.sign:
        _write_unsigned(args, old, new, output, out=out, limits=limits)
        return
    with tempfile.TemporaryDirectory(prefix=".asyncsup-", dir=output.parent) as folder:
        unsigned = Path(folder, output.name)
        _write_unsigned(args, old, new, unsigned, out=out, limits=limits)
        out.clear_bar()
        *others, last = map(Path, args.sign)
        for key in others:
            sign_package(unsigned, key=key, limits=limits, notice=out.note)
        sign_package(unsigned, key=last, output=output, limits=limits, notice=out.note)


def _write_unsigned(
    args: argparse.Namespace, old: Old, new: Path, output: Path, *, out: Output, limits: PatchLimits
) -> None:
    required = {"--name": args.name, "-t/--target": args.targets, "-r/--region": args.regions}
    missing = [option for option, given in required.items() if not given]
    if missing:
        raise UsageError(f"a patch needs {', '.join(missing)}")
    build_patch(
        old=old,
        new=new,
        output=output,
        name=args.name,
        version=args.version or str(args.build),
        build=args.build,
        kind=Kind(args.kind),
        targets=args.targets,
        regions=args.regions,
        expires=_expiry(args.expires),
        requires=Requires(build_min=args.build_min, build_max=args.build_max),
        build_floor=args.build_floor,
        downgrade=args.downgrade,
        probation=args.probation,
        notes=args.notes,
        include=args.include,
        exclude=args.exclude,
        normal_modes=args.normal_modes,
        store=args.store,
        delta=args.delta,
        limits=limits,
        progress=out.counter(_bytes(old) + _bytes(new)),
    )


def _expiry(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        expires = datetime.fromisoformat(text)
        expires.astimezone(UTC)  # what is not a time there is none anywhere
    except (ValueError, OverflowError):
        raise UsageError(f"--expires: {text!r} is not a time such as 2027-02-22T00:00:00Z") from None
    return expires if expires.tzinfo is not None else expires.replace(tzinfo=UTC)


def _bytes(files: Old) -> int:
    """How much there is to read, for the progress bar; what is wrong with it the build itself says."""
    if files is None:
        return 0
    if not isinstance(files, Path):
        return sum(file.size for file in files.values())
    total = 0
    for parent, _, names in os.walk(files):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(f"{parent}/{name}").st_size
    return total


# --- a prototype package ------------------------------------------------------------------------------------


def _write_prototype(args: argparse.Namespace, old: Path | None, new: Path, output: Path) -> None:
    if len(args.regions) != 1:
        raise UsageError("a prototype package is for exactly one region: -r REGION")
    if args.sign or args.downgrade or args.build_floor is not None:
        raise UsageError("a prototype package cannot be signed, nor lower a build or set a floor for it")
    unused = {
        "--version": args.version, "--build-min": args.build_min, "--build-max": args.build_max,
        "--expires": args.expires, "--probation": args.probation, "--notes": args.notes,
        "--include": args.include, "--exclude": args.exclude, "--normal-modes": args.normal_modes,
        "--store": args.store, "--delta": args.delta,
    }  # fmt: skip
    given = [option for option, value in unused.items() if value is not False and value not in (None, "", [])]
    if given:
        raise UsageError(f"a prototype package has none of {', '.join(given)}")
    before = {} if old is None else _contents(old)
    after = _contents(new)
    build_prototype_patch(
        output=output,
        region=args.regions[0],
        build=args.build,
        warm=args.kind == "warm",
        new={path: data for path, data in after.items() if path not in before},
        modified={path: data for path, data in after.items() if before.get(path, data) != data},
        deleted=[path for path in before if path not in after],
    )


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by the path a prototype's manifest has for it, from the target's root on."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {f"/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}


# --- arguments ----------------------------------------------------------------------------------------------


_numbered: Final = matching(r"[0-9]{1,9}", "neither the number of a generation nor `current`", int)


def _generation(text: str) -> int:
    return CURRENT_GENERATION if text == "current" else _numbered(text)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.usage = (
        "asyncsup patch build [OLD | --from-generation N] NEW "
        "-o OUT.zip --build N (--warm | --cold) [OPTIONS]"
    )
    add(
        "folders",
        nargs="+",
        metavar="OLD NEW",
        help="the files as they were (if at all) and as they are to be",
    )
    add("-o", "--output", required=True, metavar="OUT.zip", help="the package to write")
    add("--name", metavar="NAME", help="of the patch")
    add("--version", metavar="VERSION", help="of the patch, for people (default: the build)")
    add("--build", type=int, required=True, metavar="N", help="the release counter it brings targets to")
    add("-t", "--target", dest="targets", action="append", default=[], metavar="NAME", help="may be repeated")
    add("-r", "--region", dest="regions", action="append", default=[], metavar="NAME", help="may be repeated")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--warm", dest="kind", action="store_const", const="warm", help="resources: no restart")
    kind.add_argument(
        "--cold", dest="kind", action="store_const", const="cold", help="the program: restarted"
    )
    add("--build-min", type=int, metavar="N", help="only for targets at this build or above")
    add("--build-max", type=int, metavar="N", help="only for targets at this build or below")
    add(
        "--downgrade",
        action="store_true",
        help="may lower a target's build; taken only when signed; needs --build-max or --expires",
    )
    add("--build-floor", type=int, metavar="N", help="no downgrade may go below this build")
    add("--expires", metavar="TIME", help="RFC 3339; refused after it")
    add("--probation", type=seconds, metavar="TIME", help="how long it may still undo itself")
    add("--notes", default="", metavar="TEXT", help="for people")
    add("--include", action="append", default=[], metavar="GLOB", help="only these files; may be repeated")
    add("--exclude", action="append", default=[], metavar="GLOB", help="not these files; may be repeated")
    add(
        "--from-generation",
        type=_generation,
        default=None,
        metavar="N|current",
        help="OLD is what target -t has installed, in this generation of it",
    )
    add("--delete-foreign", action="store_true", help="with it: delete also what no patch has brought")
    add("--normal-modes", action="store_true", help="0755 for what may be executed, 0644 for all else")
    add("--store", action="store_true", help="compress nothing: the same bytes with every zlib")
    add("--delta", action="store_true", help="differences to the old files, where that is smaller")
    add("--sign", action="append", default=[], metavar="KEY", help="as `patch sign --key`; may be repeated")
    add("--checksum", action="store_true", help="also write OUT.zip.sha256, as sha256sum would")
    add("--prototype", action="store_true", help="in the layout of the original prototype")


BUILD = Action(_build, _arguments)
