"""The configuration file: `init` writes one; `config` checks it, describes it, and has it taken up."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from asyncsup import render
from asyncsup.cli.arguments import wait_options
from asyncsup.cli.session import QUERY_SECONDS, Session
from asyncsup.cli.settings import read_config
from asyncsup.cli.verbs import Action
from asyncsup.config.schema import config_schema
from asyncsup.errors import TimeoutExpiredError
from asyncsup.scaffold import write_scaffold


def _init(session: Session) -> int:
    path = render.clean(write_scaffold(Path(session.args.folder), force=session.args.force))
    session.out.result(
        {"path": path},
        lambda: [f"wrote {path}", f"next: `asyncsup config check {path}`, then `asyncsup serve -c {path}`"],
    )
    return 0


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="where (default: here)")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")


def _check(session: Session) -> int:
    if session.args.file is not None:
        session.args.config = session.args.file
    config = read_config(session)
    names = list(config.targets)
    value = {"ok": True, "file": str(config.path), "targets": names, "warnings": list(config.warnings)}
    text = f"{render.clean(config.path)}: valid, {render.plural(len(names), 'target')}"
    listed = f" ({', '.join(render.clean(name) for name in names)})" if names else ""
    session.out.result(value, lambda: [text + listed])
    return 0


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="instead of -c FILE or the usual places")


def _plan(session: Session) -> int:
    value = session.client.call("config.plan", timeout=QUERY_SECONDS)
    session.out.result(value, lambda: render.config_lines(value, ink=session.out.ink))
    return 0


def _apply(session: Session) -> int:
    args = session.args
    try:
        value = session.client.call("config.apply", wait=args.wait, timeout=args.timeout)
    except TimeoutExpiredError:
        raise TimeoutExpiredError(
            f"the configuration is not all taken up within {args.timeout:g} s; the supervisor goes on with it"
        ) from None
    session.out.result(value, lambda: render.config_lines(value, ink=session.out.ink))
    return 1 if value["failed"] else 0


def _apply_arguments(parser: argparse.ArgumentParser) -> None:
    wait_options(parser, "new and restarted targets")


def _schema(session: Session) -> int:
    schema = config_schema()
    session.out.result(schema, json.dumps(schema, indent=2).splitlines)
    return 0


INIT = Action(_init, _init_arguments)
CHECK = Action(_check, _check_arguments)
PLAN = Action(_plan)
APPLY = Action(_apply, _apply_arguments)
SCHEMA = Action(_schema)
