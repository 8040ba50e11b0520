"""The command line: arguments in; text and an exit status out. Speaks to a supervisor only through client.py.

A verb is a function that declares its arguments and one that carries it out; `VERBS` is the list of them.
Only the verb that was asked for builds its parser, and everything that is not needed by all of them is
imported by the one that needs it: `asyncsup status` runs in shell prompts and health checks.
"""

# ruff: noqa: PTH100, PTH113
# pathlib would be a good part of the run time of `asyncsup status`.

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, TextIO

from asyncsup import render
from asyncsup.errors import (
    AsyncsupError,
    PatchNotFoundError,
    ShuttingDownError,
    SupervisorUnreachableError,
    UsageError,
)
from asyncsup.terminal import Output

if TYPE_CHECKING:
    from asyncsup.client import ControlClient, Event, Gap
    from asyncsup.config import PatchLimits

QUERY_SECONDS: Final = 10.0
"""How long a supervisor that is there may take to answer a question."""

GRACE_SECONDS: Final = 5.0
"""How much longer than ``--timeout`` we wait: the supervisor, which keeps to it, has more to say about it."""

LOOK_SECONDS: Final = 0.02
"""How often it is looked whether another supervisor is there."""
FOLLOW_SECONDS: Final = 25.0
RETRY_SECONDS: Final = 0.5
"""How often a follower looks whether a supervisor that went away is back."""

CURRENT_GENERATION: Final = -1
"""What `--from-generation current` stands for."""

TAKE_A_VALUE: Final = frozenset({"-c", "--config", "--endpoint"})
"""Those of the options of every verb that another word belongs to."""

EXIT_NOT_READY: Final = 3
EXIT_INTERRUPTED: Final = 130
EXIT_CODES: Final = """\
exit status:
  0 ok, 1 failed, 2 usage, 3 not running or not ready, 4 no such target, 5 invalid configuration,
  6 not allowed, 7 supervisor not reachable, 8 busy, 124 time-out, 130 interrupted;
  patches: 20 refused by a gate, 21 malformed, checksum or signature wrong,
  22 target refused (nothing changed), 23 applied and rolled back, 24 rollback failed,
  25 failed and left as it is until somebody decides"""


# --- arguments ----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print, so that a usage error looks like every other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (try `{self.prog} --help`)")


class Verb(NamedTuple):
    """One command: its line in the overview, its arguments, and what it does (returns the exit status)."""

    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Session], int]


class Session:
    """One invocation: its arguments, where it writes to, and its connection, made when it is first used."""

    def __init__(self, args: argparse.Namespace, out: Output) -> None:
        self.args = args
        self.out = out
        self._client: ControlClient | None = None

    @property
    def client(self) -> ControlClient:
        """Raises ConfigError when no supervisor is named."""
        if self._client is None:
            from asyncsup.client import ControlClient

            self._client = ControlClient(self._find_endpoint())
        return self._client

    def _find_endpoint(self) -> str:
        from asyncsup.endpoint import find_endpoint

        return str(self.args.endpoint or find_endpoint(self.args.config))

    def ask(self, method: str, params: Mapping[str, Any] | None = None, /, **more: Any) -> Any:
        """A question that is answered at once or not at all."""
        if self._client is None:
            endpoint = self._find_endpoint()
            if endpoint.startswith("ipc://"):
                from asyncsup.quick import ask

                return ask(endpoint, method, {**(params or {}), **more}, timeout=QUERY_SECONDS)
        return self.client.call(method, params, timeout=QUERY_SECONDS, **more)

    def sibling(self, args: argparse.Namespace, out: Output) -> Session:
        """Another invocation on the same connection; only this one closes it."""
        other = Session(args, out)
        other._client = self.client
        return other

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def seconds(text: str) -> float:
    """``10``, ``1.5``, or what the configuration takes: ``500ms``, ``10s``, ``2m``, ``1h30m``."""
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        text += "s"
    if re.fullmatch(r"(?! )( ?[0-9]+(\.[0-9]+)? ?(ms|s|m|h|d))+", text):
        value = sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+) ?([a-z]+)", text))
        if value <= 365 * units["d"]:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 10s, 500ms or 2m, up to 365 days")


def _globals(parser: argparse.ArgumentParser) -> None:
    """The options every verb takes, before or after it."""
    add, keep = parser.add_argument, argparse.SUPPRESS
    add("-c", "--config", metavar="FILE", default=keep, help="the configuration file")
    add("--endpoint", metavar="URL", default=keep, help="the supervisor: ipc://PATH, or tcp://HOST:PORT")
    add("--json", action="store_true", default=keep, help="results and errors as JSON on stdout")
    add("--no-color", action="store_true", default=keep, help="no colour, as NO_COLOR=1")
    add("-q", "--quiet", action="store_true", default=keep, help="no text but errors")


def _formatter(prog: str) -> argparse.HelpFormatter:
    # argparse makes one for every argument, and without a width imports shutil, and so bz2 and lzma, for it.
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) > 40 else 100
    return argparse.RawDescriptionHelpFormatter(prog, width=width - 2)


def new_parser(prog: str, description: str = "", epilog: str | None = None) -> _Parser:
    """One with the options that every verb takes."""
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=_formatter,
    )
    _globals(parser)
    return parser


def parse(argv: Sequence[str]) -> tuple[Verb, argparse.Namespace]:
    """Read a command line.

    Raises:
        UsageError: it makes no sense.
        SystemExit: ``--help`` or ``--version`` was asked for, and printed.
    """
    args = argparse.Namespace(config=None, endpoint=None, json=False, no_color=False, quiet=False)
    at = _first_word(argv)
    top = new_parser(
        "asyncsup",
        "Keeps processes running, and patches them while they run.",
        f"{_overview(VERBS)}\n\n{EXIT_CODES}",
    )
    top.usage = "asyncsup [OPTIONS] VERB ..."
    top.add_argument("--version", action="store_true", help="print the version")
    top.parse_args(argv[:at], args)
    if args.version:
        return VERSION, args
    name, verb, rest = "asyncsup", None, list(argv[at:])
    table: Mapping[str, Verb | Mapping[str, Verb]] = VERBS
    while verb is None:
        if rest and rest[0] in {"-h", "--help"} and table is not VERBS:
            new_parser(name, f"The verbs of `{name}`.", _overview(table)).parse_args(rest)
        if not rest or rest[0].startswith("-"):
            raise UsageError(f"a verb is missing; there are {', '.join(table)} (try `{name} --help`)")
        word = rest.pop(0)
        found = table.get(word)
        if found is None:
            raise UsageError(f"{word!r} is not a verb of {name}{_nearest(word, table)} (try `{name} --help`)")
        name += f" {word}"
        if isinstance(found, Verb):
            verb = found
        else:
            table = found
    parser = new_parser(name, verb.summary[0].upper() + verb.summary[1:] + ".", EXIT_CODES)
    verb.configure(parser)
    return verb, parser.parse_args(rest, args)


def _first_word(argv: Sequence[str]) -> int:
    """The position of the verb: the first argument that is no option, nor the value of one."""
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "-":
        at += 2 if argv[at] in TAKE_A_VALUE else 1
    return min(at, len(argv))


def _overview(table: Mapping[str, Verb | Mapping[str, Verb]]) -> str:
    rows = []
    for name, verb in table.items():
        if isinstance(verb, Verb):
            rows.append((name, verb.summary))
        else:
            rows += [(f"{name} {sub}", each.summary) for sub, each in verb.items()]
    column = max(len(name) for name, _ in rows)
    return "\n".join(["verbs:", *(f"  {name:<{column}}  {summary}" for name, summary in rows)])


def _nearest(word: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        _never_fail(stream)
    argv = sys.argv[1:] if argv is None else list(argv)
    out = Output(json_wanted="--json" in argv)
    try:
        verb, args = parse(argv)
        out = output_for(args)
        session = Session(args, out)
        try:
            return verb.run(session)
        finally:
            session.close()
    except AsyncsupError as error:
        return out.error(error)
    except KeyboardInterrupt:
        out.clear_bar()
        return EXIT_INTERRUPTED
    except SystemExit as stop:  # argparse, after --help
        out.flush()
        return stop.code if isinstance(stop.code, int) else 0


def output_for(args: argparse.Namespace) -> Output:
    return Output(json_wanted=args.json, color=False if args.no_color else None, quiet=args.quiet)


def _never_fail(stream: TextIO) -> None:
    """A name that the terminal's encoding has no letters for is no reason to fail."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _none(parser: argparse.ArgumentParser) -> None:
    """A verb without arguments of its own."""


# --- supervisor ---------------------------------------------------------------------------------------------


def _serve(session: Session) -> int:
    args, out = session.args, session.out
    if args.check:
        from asyncsup.successor import describe

        value = describe(_load_config(session))
        out.result(value, lambda: [f"asyncsup {value['version']} would start with this configuration"])
        return 0
    import gc

    # Nothing of what is imported becomes garbage: looking for some would be a good part of the start.
    gc.disable()
    from asyncsup.serve import serve

    return serve(lambda: _load_config(session), channel=args.channel, keeper_wanted=args.keeper_wanted)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-keeper",
        dest="keeper_wanted",
        action="store_false",
        help="without the process that starts it again after a crash",
    )
    parser.add_argument("--check", action="store_true", help="only say whether it would start")
    # Between the two of them.
    parser.add_argument("--keeper", dest="channel", type=int, help=argparse.SUPPRESS)


def _load_config(session: Session) -> Any:
    from pathlib import Path

    from asyncsup.config import find_config, load_config

    named = session.args.config
    config = load_config(find_config(None if named is None else Path(named), os.environ))
    for warning in config.warnings:
        session.out.note(f"warning: {warning}")
    return config


def _config_check(session: Session) -> int:
    if session.args.file is not None:
        session.args.config = session.args.file
    config = _load_config(session)
    names = list(config.targets)
    value = {"ok": True, "file": str(config.path), "targets": names, "warnings": list(config.warnings)}
    text = f"{render.clean(config.path)}: valid, {render.plural(len(names), 'target')}"
    listed = f" ({', '.join(render.clean(name) for name in names)})" if names else ""
    session.out.result(value, lambda: [text + listed])
    return 0


def _config_plan(session: Session) -> int:
    value = session.client.call("config.plan", timeout=QUERY_SECONDS)
    session.out.result(value, lambda: render.config_lines(value, ink=session.out.ink))
    return 0


def _config_apply(session: Session) -> int:
    args = session.args
    value = session.client.call("config.apply", wait=args.wait, timeout=args.timeout)
    session.out.result(value, lambda: render.config_lines(value, ink=session.out.ink))
    return 1 if value["failed"] else 0


def _config_apply_arguments(parser: argparse.ArgumentParser) -> None:
    _wait_options(parser, "new and restarted targets")


def _config_schema(session: Session) -> int:
    import json

    from asyncsup.config.schema import config_schema

    schema = config_schema()
    session.out.result(schema, json.dumps(schema, indent=2).splitlines)
    return 0


def _completion(session: Session) -> int:
    from asyncsup.completion import SCRIPTS

    session.out.verbatim(SCRIPTS[session.args.shell])
    return 0


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which one")


def _complete(session: Session) -> int:
    from asyncsup.completion import run_complete

    return run_complete(session)


def _complete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="WORD", help="what was typed behind `asyncsup`, after --")


def _openrpc(session: Session) -> int:
    import json

    from asyncsup.openrpc import openrpc

    document = openrpc()
    session.out.result(document, json.dumps(document, indent=2).splitlines)
    return 0


def _config_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="instead of -c FILE or the usual places")


def _shutdown(session: Session) -> int:
    out, args = session.out, session.args
    info = session.client.call("supervisor.info", timeout=QUERY_SECONDS)
    try:
        process = os.pidfd_open(int(info.get("keeper") or info["pid"]))
    except OSError:
        process = -1  # of another pid namespace, say
    try:
        stopping = session.ask("shutdown")["stopping"]
        word = "stopping" if stopping else "nothing to stop"
        out.lines([f"{word} {render.plural(stopping, 'instance')}" if stopping else word])
        if args.wait and not _wait_gone(session, process, args.timeout):
            raise _late(f"the supervisor has not ended within {args.timeout:g} s; it goes on stopping")
    finally:
        if process >= 0:
            os.close(process)
    out.result({"stopping": stopping, "ended": args.wait}, lambda: ["the supervisor has ended"] * args.wait)
    return 0


def _reexec(session: Session) -> int:
    out, args = session.out, session.args
    before = session.client.call("supervisor.info", timeout=QUERY_SECONDS)
    params = {"program": None if args.program is None else os.path.abspath(args.program)}
    session.client.call("supervisor.reexec", params)
    info = _wait_replaced(session, before, args.timeout)
    if info is None:
        raise _late(f"no other supervisor has come within {args.timeout:g} s; see the log of `serve`")
    value = {name: info[name] for name in ("version", "pid", "keeper", "adopted")}
    adopted = render.plural(info["adopted"], "instance")
    out.result(value, lambda: [f"asyncsup {info['version']} (pid {info['pid']}) has taken over {adopted}"])
    return 0


def _wait_replaced(session: Session, before: Mapping[str, Any], timeout: float) -> Mapping[str, Any] | None:
    """The description of the supervisor that comes after another one; None if none does in time."""
    import time

    from asyncsup.client import ControlClient

    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            with ControlClient(session.client.endpoint) as client:
                info: Mapping[str, Any] = client.call("supervisor.info", timeout=QUERY_SECONDS)
        except SupervisorUnreachableError:
            info = before
        if info["started"] != before["started"]:
            return info
        time.sleep(LOOK_SECONDS)
    return None


def _reexec_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--program", metavar="PATH", help="this asyncsup instead of the one that runs, as it is installed now"
    )
    add("--timeout", type=seconds, default=30.0, metavar="TIME", help="how long to wait for it (30s)")


def _wait_gone(session: Session, process: int, timeout: float | None) -> bool:
    """The connection goes first, and right after it the process: what is held by it is free only then."""
    import select

    if not session.client.wait_closed(timeout):
        return False
    if process >= 0:
        poller = select.poll()
        poller.register(process, select.POLLIN)
        poller.poll(GRACE_SECONDS * 1000)
    return True


def _late(message: str) -> AsyncsupError:
    from asyncsup.errors import TimeoutExpiredError

    return TimeoutExpiredError(message)


def _shutdown_arguments(parser: argparse.ArgumentParser) -> None:
    _wait_options(parser, "the end of the supervisor")


def _version(session: Session) -> int:
    from asyncsup import __version__

    session.out.result({"version": __version__}, lambda: [f"asyncsup {__version__}"])
    return 0


def _init(session: Session) -> int:
    from pathlib import Path

    from asyncsup.scaffold import write_scaffold

    path = render.clean(write_scaffold(Path(session.args.folder), force=session.args.force))
    session.out.result(
        {"path": path},
        lambda: [f"wrote {path}", f"next: `asyncsup config check {path}`, then `asyncsup serve -c {path}`"],
    )
    return 0


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="where (default: here)")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")


def _demo(session: Session) -> int:
    from pathlib import Path

    from asyncsup.demo import run_demo

    out, keep = session.out, session.args.keep
    return run_demo(
        as_json=out.json_wanted, colour=out.ink.enabled, keep=None if keep is None else Path(keep)
    )


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", metavar="DIR", help="play in this folder and leave it there")


def _console(session: Session) -> int:
    from asyncsup.console import run_console

    return run_console(session)


# --- targets ------------------------------------------------------------------------------------------------


def _names(parser: argparse.ArgumentParser, nargs: str, text: str) -> None:
    parser.add_argument("names", nargs=nargs, metavar="NAME", help=text)


_SEVERAL: Final = "targets, instances (web:0) or patterns (web*); all means every target"


def _wait_options(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--no-wait", dest="wait", action="store_false", help=f"do not wait for {what}")
    parser.add_argument("--timeout", type=seconds, metavar="TIME", help="give up after this long (10s, 2m)")


def _status(session: Session) -> int:
    out, verbose = session.out, session.args.verbose
    value = session.ask("status", names=session.args.names, **({"usage": True} if verbose else {}))
    if verbose:
        value["isolation"] = session.ask("supervisor.info").get("isolation")
    out.result(value, lambda: render.status_lines(value, width=out.width, ink=out.ink))
    return EXIT_NOT_READY if any(render.is_down(target) for target in value["targets"]) else 0


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    _names(parser, "*", f"{_SEVERAL}, as does none at all")
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="also what each instance takes, and how it is isolated",
    )


def _show(session: Session) -> int:
    out, name = session.out, session.args.name
    if name is None:
        info = session.ask("supervisor.info")
        out.result(info, lambda: render.info_lines(info, ink=out.ink))
    else:
        value = session.ask("show", name=name)
        out.result(value, lambda: render.show_lines(value, width=out.width, ink=out.ink))
    return 0


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a target; without it, the supervisor itself")


def _operation(verb: str) -> Callable[[Session], int]:
    def run(session: Session) -> int:
        args, out = session.args, session.out
        limit = None if args.timeout is None else args.timeout + GRACE_SECONDS
        params = {"names": args.names, "wait": args.wait, "timeout": args.timeout}
        if verb == "restart" and args.rolling:
            params["rolling"] = True
        value = session.client.call(verb, params, timeout=limit)
        out.result(value, lambda: render.results_lines(value, verb, ink=out.ink))
        return 0 if all(result.get("ok") for result in value["results"]) else 1

    return run


def _operation_arguments(what: str) -> Callable[[argparse.ArgumentParser], None]:
    def configure(parser: argparse.ArgumentParser) -> None:
        _names(parser, "+", _SEVERAL)
        _wait_options(parser, what)

    return configure


def _restart_arguments(parser: argparse.ArgumentParser) -> None:
    _operation_arguments("ready")(parser)
    parser.add_argument(
        "--rolling",
        action="store_true",
        help="some at a time, and each new one before the old one, as for a cold patch",
    )


def _scale(session: Session) -> int:
    args = session.args
    text: str = args.number
    key, value = ("by", int(text)) if text[0] in "+-" else ("instances", int(text))
    params = {"name": args.name, key: value, "wait": args.wait}
    answer = session.client.call("scale", params, timeout=args.timeout)
    told = f"{render.clean(answer['target'])} has {render.plural(answer['instances'], 'instance')}"
    session.out.result(answer, lambda: [told])
    return 0


def _count(text: str) -> str:
    if not re.fullmatch(r"[+-]?[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of instances, such as 3, +2 or -1")
    return text


def _scale_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a target")
    parser.add_argument("number", metavar="N|+N|-N", type=_count, help="how many, or how many more or fewer")
    _wait_options(parser, "ready")


def _signal(session: Session) -> int:
    value = session.ask("signal", names=session.args.names, signal=session.args.signal)
    text = render.clean(session.args.signal)
    session.out.result(
        value,
        lambda: [
            f"sent {text} to {render.clean(sent['instance'])} (pid {sent['pid']})" for sent in value["sent"]
        ],
    )
    return 0


def _signal_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("signal", metavar="SIGNAL", help="HUP, SIGUSR1, 15 ...")
    _names(parser, "+", _SEVERAL)


def _wait(session: Session) -> int:
    args = session.args
    limit = None if args.timeout is None else args.timeout + GRACE_SECONDS
    params = {"names": args.names, "for": args.condition, "timeout": args.timeout}
    value = session.client.call("wait", params, timeout=limit)
    session.out.result(value, lambda: [f"{args.condition} after {render.duration(value['took'])}"])
    return 0


def _wait_arguments(parser: argparse.ArgumentParser) -> None:
    _names(parser, "+", _SEVERAL)
    parser.add_argument(
        "--for",
        dest="condition",
        choices=("ready", "running", "stopped"),
        default="ready",
        help="what to wait for (default: ready)",
    )
    parser.add_argument("--timeout", type=seconds, metavar="TIME", help="give up after this long (10s, 2m)")


# --- logs and events ----------------------------------------------------------------------------------------


def follow(session: Session, step: Callable[[], bool]) -> None:
    """Take steps until one says no, the reader goes or the supervisor ends. A crashed one is waited for."""
    import time

    from asyncsup.endpoint import check_reachable

    out, away = session.out, False
    while not out.closed:
        try:
            if away:
                check_reachable(session.client.endpoint)
                out.note("the supervisor is back")
                away = False
            if not step():
                return
        except SupervisorUnreachableError:
            if not away:
                out.note("the supervisor went away; waiting for it to come back (Ctrl-C ends this)")
                away = True
            time.sleep(RETRY_SECONDS)
        except AsyncsupError as error:
            if error.error_code != ShuttingDownError.code:
                raise
            out.note("the supervisor is ending")
            return


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    from asyncsup import cli_logs

    _names(parser, "*", _SEVERAL)
    cli_logs.add_arguments(parser)


def _logs(session: Session) -> int:
    from asyncsup import cli_logs

    return cli_logs.run(session)


def _events(session: Session) -> int:
    args, out = session.args, session.out

    def on_gap(gap: Gap) -> None:
        _report_gap(out, gap)

    def show(event: Event) -> None:
        out.row(event.data, lambda: [render.event_line(event.data, ink=out.ink)])

    if not args.follow:
        # Without --since nothing in particular is expected, so nothing can be missing.
        heard = None if args.since is None else on_gap
        with session.client.subscribe(since=args.since or 0, on_gap=heard) as events:
            for event in events.catch_up():
                show(event)
        return 0
    since = args.since
    if since is None:
        snapshot = session.ask("status")
        since = snapshot["seq"]
        lines = render.status_lines(snapshot, width=out.width, ink=out.ink)
        out.row({"type": "snapshot", **snapshot}, lambda: lines)
    ending = False
    with session.client.subscribe(since=since, on_gap=on_gap) as events:

        def step() -> bool:
            nonlocal ending
            try:
                event = next(events)
            except SupervisorUnreachableError:
                if ending and not args.keep_going:
                    out.note("the supervisor has ended")
                    return False
                raise
            show(event)
            ending = event.type == "supervisor.stopping" or (ending and event.type != "supervisor.started")
            return True

        follow(session, step)
    return 0


def _report_gap(out: Output, gap: Gap) -> None:
    if out.json_wanted:
        out.row({"type": "gap", **gap._asdict()}, list)
    if gap.restarted:
        out.note("the supervisor was started again: events are numbered from 1")
    if gap.lost:
        out.note(f"{render.plural(gap.lost, 'event')} from number {gap.first} on lost: no longer kept")
    if not (gap.restarted or gap.lost):
        out.note(f"events {gap.first} to {gap.last} did not arrive by themselves and were fetched")


def _events_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", type=int, metavar="SEQ", help="first what happened after event number SEQ")
    parser.add_argument("--no-follow", dest="follow", action="store_false", help="what is kept, and end")
    parser.add_argument(
        "--keep-going", action="store_true", help="also when the supervisor is shut down, until Ctrl-C"
    )


# --- patches: with a supervisor -----------------------------------------------------------------------------


def _digest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sha256", metavar="HEX", help="what the package's SHA-256 must be")
    parser.add_argument("--crc32", metavar="NUMBER", help="what a prototype package's CRC-32 must be")


def _package_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "package",
        nargs="?",
        metavar="FILE|NAME",
        help="a file, or a name in the inbox; none: all of the inbox",
    )
    _digest_options(parser)
    parser.add_argument(
        "--target", metavar="NAME", help="only this target, or the one a prototype package is for"
    )
    parser.add_argument(
        "--upload", action="store_true", help="send the file, do not have the supervisor open it"
    )
    _drift_option(parser)


def _drift_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drift",
        choices=("refuse", "keep", "overwrite"),
        help="what becomes of files that are not what patches have left (default: as configured)",
    )


def _package(session: Session, argument: str) -> dict[str, Any]:
    """The parameters that name a package: a file by its path or sent over, anything else as in the inbox."""
    from pathlib import Path

    from asyncsup.patch.checksum import read_checksum

    args, out = session.args, session.out
    params: dict[str, Any] = {
        "sha256": args.sha256,
        "crc32": args.crc32,
        "target": args.target,
        "drift": args.drift,
    }
    if not os.path.isfile(argument):
        if "/" in argument:
            raise PatchNotFoundError(f"there is no file {argument}", path=argument)
        return {**params, "name": argument}
    path = os.path.abspath(argument)
    if args.sha256 is None and args.crc32 is None:
        params["sha256"] = read_checksum(Path(path))
    if session.client.endpoint.startswith("ipc://") and not args.upload:
        return {**params, "path": path}
    try:
        upload = session.client.upload(path, timeout=QUERY_SECONDS, on_progress=out.bar)
    except OSError as error:
        raise _file_error(error) from None
    out.clear_bar()
    return {**params, "upload": upload}


def in_inbox(session: Session, entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The packages of the inbox to apply, oldest build first; those that are still being written are not."""
    ready = []
    for entry in entries:
        if entry["state"] == "incomplete":
            session.out.note(f"{entry['file']} is not complete yet; left alone")
        else:
            ready.append((int(entry.get("build") or 0), str(entry["file"])))
    return [file for _, file in sorted(ready)]


def _packages(session: Session) -> list[dict[str, Any]]:
    if session.args.package is not None:
        return [_package(session, session.args.package)]
    if session.args.sha256 or session.args.crc32:
        raise UsageError("a checksum is that of one package: name it")
    names = in_inbox(session, session.ask("patch.list")["inbox"])
    return [{"name": name, "target": session.args.target, "drift": session.args.drift} for name in names]


def _patch_apply(session: Session) -> int:
    args, out = session.args, session.out
    packages = _packages(session)
    reports = []
    for index, package in enumerate(packages):
        try:
            params = {
                **package,
                "wait_busy": args.wait,
                "retry_held": args.retry_held or None,
                "trust_clock": args.trust_clock or None,
            }
            report = transact(session, "patch.apply", params)
        except AsyncsupError:
            left = [str(each["name"]) for each in packages[index + 1 :]]
            if left:
                out.note(f"not tried, because the one before failed: {', '.join(left)}")
            raise
        reports.append(report)
    if args.package is not None:
        out.result(reports[0], list)
    else:
        out.result({"reports": reports}, lambda: [] if reports else ["the inbox is empty"])
    return 0


def transact(session: Session, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Have a patch applied or rolled back, live on the screen, with the whole transcript afterwards.

    Raises:
        RemoteError: it was not; the transcript has been printed all the same.
    """
    from asyncsup.live import call_live

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


def _patch_apply_arguments(parser: argparse.ArgumentParser) -> None:
    _package_arguments(parser)
    _busy_options(parser)
    parser.add_argument(
        "--retry-held", action="store_true", help="apply it although it was rolled back before"
    )
    parser.add_argument(
        "--trust-clock", action="store_true", help="the clock is right, although it has been set back"
    )


def _busy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-wait",
        dest="wait",
        action="store_false",
        help="fail (8) if a target is busy, do not wait for it",
    )
    parser.add_argument("--timeout", type=seconds, metavar="TIME", help="cancel and undo after this long")


def _patch_rollback(session: Session) -> int:
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
    report = transact(session, "patch.rollback", params)
    session.out.result(report, list)
    return 0


def _patch_rollback_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET|ID",
        help="a target, back to before its current patch; or a patch, by a transaction's number or the "
        "beginning of its id, back on all its targets",
    )
    far = parser.add_mutually_exclusive_group()
    far.add_argument(
        "--to", dest="build", type=_number, metavar="BUILD", help="of a target: back to that build"
    )
    far.add_argument(
        "--to-generation", dest="generation", type=_number, metavar="N", help="of a target: to a generation"
    )
    whom = parser.add_mutually_exclusive_group()
    whom.add_argument("--only", action="store_true", help="no other target, though the patch covers others")
    whom.add_argument("--together", action="store_true", help="every other target it covers as well")
    _drift_option(parser)
    _busy_options(parser)


def _patch_drift(session: Session) -> int:
    value, out = session.ask("patch.drift", target=session.args.target), session.out
    out.result(value, lambda: render.drift_lines(value, ink=out.ink))
    return 1 if any(target["files"] for target in value["targets"]) else 0


def _patch_drift_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", metavar="TARGET", help="only of this target")


def _patch_settle(verb: str) -> Callable[[Session], int]:
    """`patch commit` and `patch abort`: end what waits or is under way."""

    def run(session: Session) -> int:
        report, out = session.client.call(f"patch.{verb}", id=session.args.id), session.out
        out.result(report, lambda: render.report_lines(report, ink=out.ink))
        return 0

    return run


def _patch_settle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="a transaction's number, or the beginning of a patch's id")


def _patch_prune(session: Session) -> int:
    value = session.ask("patch.prune", target=session.args.target, keep=session.args.keep)
    session.out.result(value, lambda: render.pruned_lines(value))
    return 0


def _patch_prune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", metavar="TARGET", help="only of this target")
    parser.add_argument("--keep", type=_natural, metavar="N", help="how many stay (default: as configured)")


def _natural(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 9999")
    return int(text)


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return int(text)


def _target_release(session: Session) -> int:
    value = session.ask("target.release", target=session.args.target)
    session.out.result(value, lambda: render.released_lines(value))
    return 0


def _target_release_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="its managed files become ordinary ones again")


def _patch_plan(session: Session) -> int:
    out = session.out
    plans = [session.client.call("patch.plan", package) for package in _packages(session)]
    for plan in plans:
        out.lines(render.plan_lines(plan, ink=out.ink))
    if session.args.package is not None:
        out.result(plans[0], list)
    else:
        out.result({"plans": plans}, lambda: [] if plans else ["the inbox is empty"])
    return 20 if any(plan["verdict"] == "refused" for plan in plans) else 0


def _patch_list(session: Session) -> int:
    value, out = session.ask("patch.list"), session.out
    out.result(value, lambda: render.inbox_lines(value, width=out.width, ink=out.ink))
    return 0


def _patch_history(session: Session) -> int:
    value, out = (
        session.ask("patch.history", target=session.args.target, limit=session.args.limit),
        session.out,
    )
    out.result(value, lambda: render.history_lines(value, width=out.width, ink=out.ink))
    return 0


def _patch_history_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", metavar="TARGET", help="only transactions of this target")
    parser.add_argument("-n", "--limit", type=int, default=50, metavar="N", help="at most N (50)")


def _patch_show(session: Session) -> int:
    value, out = session.ask("patch.show", id=session.args.id), session.out
    out.result(value, lambda: render.transaction_lines(value, ink=out.ink))
    return 0


def _patch_show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="number of a transaction, or the beginning of a patch's id")


# --- the state directory ------------------------------------------------------------------------------------


def _doctor(session: Session) -> int:
    import logging
    from pathlib import Path

    from asyncsup.patch.doctor import diagnose
    from asyncsup.patch.repair import repair
    from asyncsup.render_audit import doctor_lines

    args, out = session.args, session.out
    if args.state_dir is not None:
        state_dir, runtime_dir = Path(args.state_dir), None
    else:
        settings = _load_config(session).supervisor
        state_dir, runtime_dir = settings.state_dir, settings.runtime_dir
    # What the store would say to a supervisor's log is in the findings.
    logging.getLogger("asyncsup").addHandler(logging.NullHandler())
    if args.repair:
        value = repair(
            state_dir,
            runtime_dir=runtime_dir,
            packages=[Path(package) for package in args.packages],
            overwrite=args.drift == "overwrite",
            progress=out.bar,
        ).to_json()
    elif args.packages or args.drift == "overwrite":
        raise UsageError("--package and --drift say how to mend: they need --repair")
    else:
        value = diagnose(state_dir, runtime_dir=runtime_dir, progress=out.bar).to_json()
    out.clear_bar()
    out.result(value, lambda: doctor_lines(value, ink=out.ink))
    return 0 if value["ok"] else 1


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--state-dir", metavar="DIR", help="this state directory, not the one of the configuration")
    add("--repair", action="store_true", help="mend what can be mended; not while a supervisor runs")
    add(
        "--package",
        dest="packages",
        action="append",
        default=[],
        metavar="FILE",
        help="take files from this patch to mend with; may be repeated",
    )
    add(
        "--drift",
        choices=("keep", "overwrite"),
        default="keep",
        help="what becomes of files that somebody has written to or removed (default: keep)",
    )


# --- keys ---------------------------------------------------------------------------------------------------


def _keys(session: Session) -> int:
    from asyncsup.cli_keys import run_keys

    return run_keys(session, lambda: _load_config(session).supervisor)


def _keys_arguments(verb: str) -> Callable[[argparse.ArgumentParser], None]:
    def configure(parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(keys_verb=verb)
        if verb == "generate":
            parser.add_argument("name", nargs="?", metavar="NAME", help="a key of your own by this name")
            parser.add_argument("--folder", metavar="DIR", help="where (default: ~/.config/asyncsup/keys)")
        elif verb == "allow":
            parser.add_argument("name", metavar="NAME", help="whose key it is")
            parser.add_argument("key", metavar="PUBLIC_KEY", help="40 characters, or a file with them")
            parser.add_argument(
                "--role",
                choices=("view", "operate", "patch"),
                default="view",
                help="what they may do: look (default), also start and stop, or also patch",
            )
        elif verb == "revoke":
            parser.add_argument("name", metavar="NAME", help="whose key it was")

    return configure


# --- the audit ----------------------------------------------------------------------------------------------


def _audit_verify(session: Session) -> int:
    from pathlib import Path

    args, out = session.args, session.out
    if args.file is not None:
        from asyncsup.patch.ledger import examine_export

        try:
            with Path(args.file).open("rb") as file:
                value = examine_export(file, args.heads).to_json()
        except OSError as error:
            raise _file_error(error) from None
    elif args.state_dir is not None:
        from asyncsup.patch.ledger import examine_state

        value = examine_state(Path(args.state_dir), args.heads).to_json()
    else:
        value = session.client.call("audit.verify", heads=args.heads)
    from asyncsup.render_audit import judgement_lines

    out.result(value, lambda: judgement_lines(value, ink=out.ink))
    return 0 if value["ok"] else 1


def _audit_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head",
        dest="heads",
        action="append",
        default=[],
        type=_hash,
        metavar="HASH",
        help="of a record, kept elsewhere: it must be among them; may be repeated",
    )
    where = parser.add_mutually_exclusive_group()
    _state_dir_option(where)
    where.add_argument("--file", metavar="FILE", help="what `audit export` wrote, instead")


def _audit_list(session: Session) -> int:
    from functools import partial

    from asyncsup.render_audit import record_lines

    args, out = session.args, session.out
    for record in _audit_pages(session, after=args.after, txn=args.txn, limit=args.limit):
        value = _record(record)
        out.row(value, partial(record_lines, value, ink=out.ink))
    return 0


def _record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a value; one that was tampered with need not be JSON any more."""
    import json

    try:
        value = json.loads(record["line"])
    except ValueError:
        value = None
    known = value if isinstance(value, dict) else {"event": "unreadable", "line": record["line"]}
    return {**known, "seq": record["seq"], "hash": record["hash"]}


def _audit_list_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-n", "--limit", type=_natural, default=50, metavar="N", help="the last N (50)")
    add("--after", type=int, metavar="SEQ", help="N from the one behind record number SEQ on, instead")
    add("--txn", type=int, metavar="N", help="only of this transaction")
    _state_dir_option(parser)


def _audit_export(session: Session) -> int:
    for record in _audit_pages(session, after=0, txn=None, limit=None):
        session.out.verbatim(record["line"] + "\n")
        if session.out.closed:
            break
    return 0


def _audit_pages(
    session: Session, *, after: int | None, txn: int | None, limit: int | None
) -> Iterable[Mapping[str, Any]]:
    """Records of a supervisor, or of a state directory, page by page; without a limit all there are."""
    if session.args.state_dir is not None:
        yield from _audit_of(session.args.state_dir, after=after, txn=txn, limit=limit)
        return
    left = limit
    while left is None or left > 0:
        size = 1000 if left is None else min(left, 1000)
        page = session.client.call(
            "audit.list", {"after": after, "txn": txn, "limit": size}, timeout=QUERY_SECONDS
        )["records"]
        if not page:
            return
        yield from page
        after = int(page[-1]["seq"])
        left = None if left is None else left - len(page)


def _audit_of(
    state_dir: str, *, after: int | None, txn: int | None, limit: int | None
) -> Iterable[Mapping[str, Any]]:
    from pathlib import Path

    from asyncsup.patch.database import Database
    from asyncsup.patch.ledger import read_records

    database = Database.open_to_read(Path(state_dir, "state.db"))
    try:
        left = limit
        while left is None or left > 0:
            rows = read_records(database, after=after, txn=txn, limit=1000 if left is None else left)
            yield from (row.to_json() for row in rows)
            if not rows:
                return
            after = rows[-1].seq
            left = None if left is None else left - len(rows)
    finally:
        database.close()


def _audit_export_arguments(parser: argparse.ArgumentParser) -> None:
    _state_dir_option(parser)


def _state_dir_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--state-dir", metavar="DIR", help="read a state directory, without a supervisor")


def _hash(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no SHA-256 of 64 hexadecimal digits")
    return text.lower()


# --- patches: without a supervisor --------------------------------------------------------------------------


def _patch_verify(session: Session) -> int:
    import json
    from pathlib import Path

    from asyncsup.patch.checksum import read_checksum
    from asyncsup.patch.manifest import encode_manifest
    from asyncsup.patch.package import open_package
    from asyncsup.patch.prototype import parse_crc32

    args, out = session.args, session.out
    sha256 = args.sha256 if args.sha256 or args.crc32 else read_checksum(Path(args.file))
    crc32 = None if args.crc32 is None else parse_crc32(args.crc32)
    limits = _limits(session)
    try:
        total = Path(args.file).stat().st_size
    except OSError:
        total = 0  # what is wrong with it the package says
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        out.bar(done, total)

    opened = open_package(Path(args.file), limits=limits, sha256=sha256, crc32=crc32, progress=progress)
    with opened as package:
        signed = _check_signatures(package, args.allowed_signers, args.required)
        done, total = 0, package.content_size
        package.verify(progress)
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


def _limits(session: Session) -> PatchLimits:
    """`[patch.limits]` of the configuration that is named or found; the defaults where there is none."""
    from pathlib import Path

    from asyncsup.config import PatchLimits, find_config, load_patch_limits
    from asyncsup.errors import ConfigError

    named = session.args.config
    try:
        path = find_config(None if named is None else Path(named), os.environ)
    except ConfigError:
        if named is not None or os.environ.get("ASYNCSUP_CONFIG"):
            raise
        return PatchLimits()
    return load_patch_limits(path)


def _check_signatures(package: Any, allowed_signers: str | None, required: int | None) -> Any:
    """Who signed the package, as JSON; None when nobody asks."""
    from datetime import UTC, datetime
    from pathlib import Path

    if allowed_signers is None:
        if required is not None:
            raise UsageError("--required needs --allowed-signers FILE, which says whose signatures count")
        return None
    from asyncsup.patch.trust import check_package, load_signers

    signers = load_signers(Path(allowed_signers))
    endorsement = check_package(package, signers, required=required or 1, now=datetime.now(UTC))
    return {"ok": True, "detail": str(endorsement), **endorsement.to_json()}


def _number_of_keys(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of keys, from 1")
    return int(text)


def _patch_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the package")
    _digest_options(parser)
    parser.add_argument(
        "--allowed-signers", metavar="FILE", help="whose signatures count, in OpenSSH's format"
    )
    parser.add_argument(
        "--required", type=_number_of_keys, metavar="N", help="how many different keys must have signed (1)"
    )


def _patch_sign(session: Session) -> int:
    from pathlib import Path

    from asyncsup.patch.signing import sign_package

    args, out = session.args, session.out
    try:
        signed = sign_package(
            Path(args.file), key=Path(args.key), name=args.name, limits=_limits(session), notice=out.note
        )
    except OSError as error:
        raise _file_error(error) from None
    value = {
        "path": str(signed.path),
        "id": signed.id,
        "signature": signed.name,
        "key_type": signed.key.type.value,
        "fingerprint": signed.key.fingerprint,
    }
    out.result(value, lambda: render.signed_lines(value, ink=out.ink))
    return 0


def _patch_sign_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the package")
    parser.add_argument(
        "--key", required=True, metavar="KEY", help="a private key, or the .pub of one that the agent has"
    )
    parser.add_argument("--name", metavar="NAME", help="of the signature (default: the key's comment)")


def _patch_build(session: Session) -> int:
    import binascii
    import json
    from pathlib import Path

    from asyncsup.patch.manifest import encode_manifest
    from asyncsup.patch.package import open_package

    args, out = session.args, session.out
    if len(args.folders) > 2:
        raise UsageError("give the folder as it is to be, or the one as it was and the one as it is to be")
    old, new = (None, *map(Path, args.folders))[-2:]
    assert new is not None
    output, limits = Path(args.output), _limits(session)
    stack = contextlib.ExitStack()
    try:
        if args.from_generation is not None:
            old = stack.enter_context(_installed_files(session, new))
        if args.prototype:
            _build_prototype(args, old, new, output)
        elif args.sign:
            _build_signed(args, old, new, output, out=out, limits=limits)
        else:
            _build_native(args, old, new, output, out=out, limits=limits)
        with open_package(output, limits=limits) as package:
            value = {
                "path": str(output),
                "id": package.id,
                "size": package.size,
                "crc32": str(binascii.crc32(output.read_bytes())) if args.prototype else None,
                "manifest": json.loads(encode_manifest(package.manifest)),
                "signatures": sorted(package.signatures),
            }
        if args.checksum:
            checksum = output.with_name(f"{output.name}.sha256")
            checksum.write_text(f"{value['id']}  {output.name}\n", encoding="utf-8")
    except OSError as error:
        raise _file_error(error) from None
    finally:
        stack.close()
    out.clear_bar()
    out.result(value, lambda: render.built_lines(value, ink=out.ink))
    return 0


@contextlib.contextmanager
def _installed_files(session: Session, new: Any) -> Iterator[Any]:
    """The old side for ``--from-generation``: the files of a target as they are installed."""
    from pathlib import Path

    from asyncsup.config import find_config, load_supervisor
    from asyncsup.patch.build import list_folder
    from asyncsup.patch.installed import installed

    args, out = session.args, session.out
    if len(args.folders) != 1 or len(args.targets) != 1 or args.prototype:
        raise UsageError(
            "--from-generation takes the place of OLD: give NEW, and one -t TARGET whose files they are"
        )
    named = session.args.config
    config = load_supervisor(find_config(None if named is None else Path(named), os.environ))
    number = None if args.from_generation == CURRENT_GENERATION else args.from_generation
    with installed(config.state_dir, args.targets[0], number) as there:
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


def _build_native(
    args: argparse.Namespace, old: Any, new: Any, output: Any, *, out: Output, limits: PatchLimits
) -> None:
    from datetime import UTC, datetime

    from asyncsup.patch.build import build_patch
    from asyncsup.patch.manifest import Kind, Requires

    missing = [
        option
        for option, given in (
            ("--name", args.name), ("-t/--target", args.targets), ("-r/--region", args.regions),
        )
        if not given
    ]  # fmt: skip
    if missing:
        raise UsageError(f"a patch needs {', '.join(missing)}")
    expires = None
    if args.expires is not None:
        try:
            expires = datetime.fromisoformat(args.expires)
        except ValueError:
            raise UsageError(
                f"--expires: {args.expires!r} is not a time such as 2027-02-22T00:00:00Z"
            ) from None
        expires = expires if expires.tzinfo is not None else expires.replace(tzinfo=UTC)
    done = 0
    was = sum(file.size for file in old.values()) if isinstance(old, dict) else _tree_bytes(old)
    total = was + _tree_bytes(new)

    def progress(count: int) -> None:
        nonlocal done
        done += count
        out.bar(min(done, total), total)

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
        expires=expires,
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
        progress=progress,
    )


def _build_signed(
    args: argparse.Namespace, old: Any, new: Any, output: Any, *, out: Output, limits: PatchLimits
) -> None:
    """Nothing is at `output` before it is signed: an inbox might take it for what it is not yet."""
    import tempfile
    from pathlib import Path

    from asyncsup.patch.signing import sign_package

    with tempfile.TemporaryDirectory(prefix=".asyncsup-", dir=output.parent) as folder:
        unsigned = Path(folder, output.name)
        _build_native(args, old, new, unsigned, out=out, limits=limits)
        out.clear_bar()
        *others, last = map(Path, args.sign)
        for key in others:
            sign_package(unsigned, key=key, limits=limits, notice=out.note)
        sign_package(unsigned, key=last, output=output, limits=limits, notice=out.note)


def _tree_bytes(folder: Any) -> int:
    if folder is None:
        return 0
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(f"{parent}/{name}").st_size
            except OSError:
                continue  # only for the progress bar; what is wrong with it the build itself says
    return total


def _build_prototype(args: argparse.Namespace, old: Any, new: Any, output: Any) -> None:
    from asyncsup.patch.build import build_prototype_patch

    if len(args.regions) != 1:
        raise UsageError("a prototype package is for exactly one region: -r REGION")
    if args.sign or args.downgrade or args.build_floor is not None:
        raise UsageError("a prototype package cannot be signed, nor lower a build or set a floor for it")
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


def _contents(folder: Any) -> dict[str, bytes]:
    """Every file below a folder by the path a prototype's manifest has for it, from the target's root on."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {f"/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}


def _file_error(error: OSError) -> AsyncsupError:
    name = f"{error.filename}: " if error.filename else ""
    return AsyncsupError(f"{name}{error.strerror or error}", code="file.failed")


def _generation(text: str) -> int:
    if text == "current":
        return CURRENT_GENERATION
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a generation nor `current`")
    return int(text)


def _patch_build_arguments(parser: argparse.ArgumentParser) -> None:
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


VERSION: Final = Verb("print the version", _none, _version)
VERBS: Final[Mapping[str, Verb | Mapping[str, Verb]]] = {
    "serve": Verb("run the supervisor in the foreground", _serve_arguments, _serve),
    "status": Verb("show what runs", _status_arguments, _status),
    "show": Verb("show everything about a target, or about the supervisor", _show_arguments, _show),
    "start": Verb("start targets", _operation_arguments("ready"), _operation("start")),
    "stop": Verb(
        "stop targets and everything they started", _operation_arguments("the end"), _operation("stop")
    ),
    "restart": Verb("stop and start targets", _restart_arguments, _operation("restart")),
    "reload": Verb(
        "have targets read their resources again", _operation_arguments("the answer"), _operation("reload")
    ),
    "scale": Verb("have more or fewer instances of a target", _scale_arguments, _scale),
    "signal": Verb("send a signal to targets", _signal_arguments, _signal),
    "logs": Verb("print what targets write", _logs_arguments, _logs),
    "events": Verb("follow what happens", _events_arguments, _events),
    "wait": Verb("wait until targets are ready, running or stopped", _wait_arguments, _wait),
    "shutdown": Verb("stop all targets and the supervisor", _shutdown_arguments, _shutdown),
    "reexec": Verb("replace the supervisor's program and keep what runs", _reexec_arguments, _reexec),
    "config": {
        "check": Verb("check the configuration", _config_check_arguments, _config_check),
        "plan": Verb("say what `config apply` would change", _none, _config_plan),
        "apply": Verb(
            "take up the configuration file; only what changed is touched",
            _config_apply_arguments,
            _config_apply,
        ),
        "schema": Verb("print the JSON Schema of asyncsup.toml, for editors", _none, _config_schema),
    },
    "patch": {
        "build": Verb("make a package out of two folders", _patch_build_arguments, _patch_build),
        "sign": Verb("sign a package with an SSH key", _patch_sign_arguments, _patch_sign),
        "verify": Verb("check a package, without a supervisor", _patch_verify_arguments, _patch_verify),
        "plan": Verb("say what applying a package would do", _package_arguments, _patch_plan),
        "apply": Verb("apply a package, or all of the inbox", _patch_apply_arguments, _patch_apply),
        "list": Verb("list what lies in the inbox", _none, _patch_list),
        "history": Verb("list what was applied and rolled back", _patch_history_arguments, _patch_history),
        "show": Verb("show one transaction, step by step", _patch_show_arguments, _patch_show),
        "drift": Verb(
            "list files that are not as patches have left them", _patch_drift_arguments, _patch_drift
        ),
        "commit": Verb("commit a patch that waits for it", _patch_settle_arguments, _patch_settle("commit")),
        "abort": Verb("end a patch that is under way", _patch_settle_arguments, _patch_settle("abort")),
        "rollback": Verb("go back to the build before", _patch_rollback_arguments, _patch_rollback),
        "prune": Verb("remove old generations nobody reads", _patch_prune_arguments, _patch_prune),
    },
    "target": {
        "release": Verb("give up patching a target", _target_release_arguments, _target_release),
    },
    "doctor": Verb("check a state directory, and mend it", _doctor_arguments, _doctor),
    "audit": {
        "verify": Verb("check that the audit is as it was written", _audit_verify_arguments, _audit_verify),
        "list": Verb("list what was written down", _audit_list_arguments, _audit_list),
        "export": Verb("print every record, as it is hashed", _audit_export_arguments, _audit_export),
    },
    "keys": {
        "generate": Verb(
            "make a key for the supervisor, or one of your own", _keys_arguments("generate"), _keys
        ),
        "list": Verb("list who may connect over TCP", _keys_arguments("list"), _keys),
        "allow": Verb("let somebody connect over TCP", _keys_arguments("allow"), _keys),
        "revoke": Verb("let somebody connect no more", _keys_arguments("revoke"), _keys),
    },
    "console": Verb("open the Patch Overseer prompt", _none, _console),
    "init": Verb("write a commented asyncsup.toml", _init_arguments, _init),
    "demo": Verb("play the four patch cases on a real target", _demo_arguments, _demo),
    "completion": Verb("print the script for completion in a shell", _completion_arguments, _completion),
    "complete": Verb("say what can come next, for that script", _complete_arguments, _complete),
    "openrpc": Verb("print the OpenRPC description of the control API", _none, _openrpc),
    "version": VERSION,
}
