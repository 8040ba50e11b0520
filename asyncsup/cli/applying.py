"""What a supervisor does with packages: `patch plan`, `apply`, `rollback`, `commit`, `abort`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from asyncsup import render
from asyncsup.cli.arguments import digest_options, serial, timeout_option
from asyncsup.cli.session import QUERY_SECONDS, Session, file_error
from asyncsup.cli.verbs import Action
from asyncsup.errors import AsyncsupError, PatchNotFoundError, PatchRefusedError, UsageError

# --- which packages -----------------------------------------------------------------------------------------


def _packages(session: Session) -> list[dict[str, Any]]:
    """The parameters for each package: the one that is named, or all of the inbox."""
    args = session.args
    if args.package is not None:
        return [_package(session, args.package)]
    if args.sha256 or args.crc32:
        raise UsageError("a checksum is that of one package: name it")
    names = in_inbox(session, session.ask("patch.list")["inbox"])
    return [{"name": name, "target": args.target, "drift": args.drift} for name in names]


def _package(session: Session, argument: str) -> dict[str, Any]:
    """The parameters that name a package: a file by its path or sent over, anything else as in the inbox."""
    args, out = session.args, session.out
    params: dict[str, Any] = {
        "sha256": args.sha256,
        "crc32": args.crc32,
        "target": args.target,
        "drift": args.drift,
    }
    if not os.path.isfile(argument):  # noqa: PTH113 - Path.is_file raises where a folder is not readable
        if os.path.isdir(argument):  # noqa: PTH112 - as above
            raise PatchNotFoundError(f"{argument} is a folder; a package is a zip file", path=argument)
        if "/" in argument:
            raise PatchNotFoundError(f"there is no file {argument}", path=argument)
        return {**params, "name": argument}
    path = os.path.abspath(argument)  # noqa: PTH100 - without ".."
    if args.sha256 is None and args.crc32 is None:
        from asyncsup.patch.checksum import read_checksum  # noqa: PLC0415 - as below

        params["sha256"] = read_checksum(Path(path))
    if session.client.endpoint.startswith("ipc://") and not args.upload:
        return {**params, "path": path}
    try:
        upload = session.client.upload(path, timeout=QUERY_SECONDS, on_progress=out.bar)
    except OSError as error:
        raise file_error(error) from None
    out.clear_bar()
    return {**params, "upload": upload}


@contextmanager
def _said_whence(session: Session, package: Mapping[str, Any]) -> Iterator[None]:
    """Add to some errors what whoever typed the command has not: where its parameters have come from.

    Args:
        package: what `_package` made of the argument.
    """
    args, out = session.args, session.out
    try:
        yield
    except AsyncsupError as error:
        sha256 = package.get("sha256")
        if error.error_code == "digest.sha256" and sha256 and not args.sha256 and sha256 in error.message:
            out.note(f"the SHA-256 that is asked for is the one in {render.clean(args.package)}.sha256")
        elif error.error_code == "patch.not_found" and args.package is not None and "name" in package:
            out.note(f"there is no file {render.clean(args.package)} in this folder")
        raise


def in_inbox(session: Session, entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The packages of the inbox to apply, oldest build first; those that are still being written are not."""
    ready = []
    for entry in entries:
        if entry["state"] == "incomplete":
            session.out.note(f"{entry['file']} is not complete yet; left alone")
        else:
            ready.append((int(entry.get("build") or 0), str(entry["file"])))
    return [file for _, file in sorted(ready)]


def _packages_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "package",
        nargs="?",
        metavar="FILE|NAME",
        help="a file, or a name in the inbox; none: all of the inbox",
    )
    digest_options(parser)
    parser.add_argument(
        "--target", metavar="NAME", help="only this target, or the one a prototype package is for"
    )
    parser.add_argument(
        "--upload", action="store_true", help="send the file, do not have the supervisor open it"
    )
    _drift_option(parser)


# --- applying and taking back -------------------------------------------------------------------------------


def _plan(session: Session) -> int:
    out = session.out
    plans = []
    for package in _packages(session):
        with _said_whence(session, package):
            plans.append(session.client.call("patch.plan", {**package, **_insistence(session)}))
    for plan in plans:
        out.lines(render.plan_lines(plan, ink=out.ink))
    _print_each(session, "plans", plans)
    refused = [plan for plan in plans if plan["verdict"] == "refused"]
    # Of the first, at which `apply` would end. A supervisor of an older version does not say it.
    return int(refused[0].get("exit_status", PatchRefusedError.exit_status)) if refused else 0


def _apply(session: Session) -> int:
    args, out = session.args, session.out
    packages = _packages(session)
    reports = []
    for index, package in enumerate(packages):
        params = {
            **package,
            "wait_busy": args.wait,
            **_insistence(session),
        }
        try:
            with _said_whence(session, package):
                reports.append(_transact(session, "patch.apply", params))
        except AsyncsupError:
            left = [str(each["name"]) for each in packages[index + 1 :]]
            if left:
                out.note(f"not tried, because the one before failed: {', '.join(left)}")
            raise
    _print_each(session, "reports", reports)
    return 0


def _print_each(session: Session, what: str, values: list[Any]) -> None:
    """The JSON of what was said of each package as text already: of the one that was named, or of all."""
    if session.args.package is not None:
        session.out.result(values[0], list)
    else:
        session.out.result({what: values}, lambda: [] if values else ["the inbox is empty"])


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _packages_arguments(parser)
    _insistence_options(parser)


def _apply_arguments(parser: argparse.ArgumentParser) -> None:
    _packages_arguments(parser)
    _busy_options(parser)
    _insistence_options(parser)


def _insistence(session: Session) -> dict[str, Any]:
    """What is asked for although something speaks against it."""
    args = session.args
    return {"retry_held": args.retry_held or None, "trust_clock": args.trust_clock or None}


def _insistence_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retry-held", action="store_true", help="apply it although it was rolled back before"
    )
    parser.add_argument(
        "--trust-clock", action="store_true", help="the clock is right, although it has been set back"
    )


def _rollback(session: Session) -> int:
    args = session.args
    params = {
        "target": args.target,
        "only": args.only or None,
        "together": args.together or None,
        "to_build": args.build,
        "to_generation": args.generation,
        "drift": args.drift,
        "wait_busy": args.wait,
    }
    report = _transact(session, "patch.rollback", params)
    session.out.result(report, list)
    return 0


def _rollback_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET|ID",
        help="a target, back to before its current patch; or a patch, by a transaction's number or the "
        "beginning of its id, back on all its targets",
    )
    far = parser.add_mutually_exclusive_group()
    far.add_argument(
        "--to", dest="build", type=serial, metavar="BUILD", help="of a target: back to that build"
    )
    far.add_argument(
        "--to-generation", dest="generation", type=serial, metavar="N", help="of a target: to a generation"
    )
    whom = parser.add_mutually_exclusive_group()
    whom.add_argument("--only", action="store_true", help="no other target, though the patch covers others")
    whom.add_argument("--together", action="store_true", help="every other target it covers as well")
    _drift_option(parser)
    _busy_options(parser)


def _drift_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drift",
        choices=("refuse", "keep", "overwrite"),
        help="what becomes of files that are not what patches have left (default: as configured)",
    )


def _busy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-wait",
        dest="wait",
        action="store_false",
        help="fail (8) if a target is busy, do not wait for it",
    )
    timeout_option(parser, "cancel and undo after this long")


def _transact(session: Session, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Have a patch applied or rolled back, live on the screen, with the whole transcript afterwards.

    Raises:
        RemoteError: it was not; the transcript has been printed all the same.
    """
    # Tab in `patch apply` need not wait for libzmq.
    from asyncsup.live import call_live  # noqa: PLC0415

    out = session.out
    try:
        report: dict[str, Any] = call_live(session.client, out, method, params, timeout=session.args.timeout)
    except AsyncsupError as error:
        failed = error.details.get("report")
        if isinstance(failed, dict):
            # On a terminal the error itself follows right below.
            out.lines(render.report_lines(failed, ink=out.ink, reason=not out.is_terminal))
        raise
    out.lines(render.report_lines(report, ink=out.ink))
    return report


def _settle(verb: str, session: Session) -> int:
    """`commit` and `abort`: end what waits or is under way."""
    report, out = session.client.call(f"patch.{verb}", id=session.args.id), session.out
    out.result(report, lambda: render.report_lines(report, ink=out.ink))
    return 0


def _settle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "id",
        metavar="ID",
        help="a transaction's number, the beginning of a patch's id, or the file name of one under way",
    )


PLAN = Action(_plan, _plan_arguments)
APPLY = Action(_apply, _apply_arguments)
ROLLBACK = Action(_rollback, _rollback_arguments)
COMMIT = Action(partial(_settle, "commit"), _settle_arguments)
ABORT = Action(partial(_settle, "abort"), _settle_arguments)
