"""The Patch Overseer: a prompt for whoever applies patches. A client of the control socket like any other.

A command is one of the command line's verbs, said shorter (`COMMANDS` holds the translation), on a connection
that stays; only `initiate patch` is more: it asks for the checksum that was not given. From a terminal there
are history and completion; from a pipe, plain lines, and the exit status is that of the last command that
failed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from asyncsup import render
from asyncsup.cli.applying import in_inbox
from asyncsup.cli.command_line import parse
from asyncsup.cli.session import EXIT_INTERRUPTED, Session
from asyncsup.cli.verbs import Action
from asyncsup.errors import (
    AsyncsupError,
    NotAllowedError,
    SupervisorUnreachableError,
    UsageError,
)
from asyncsup.rpc import exit_status_of
from asyncsup.terminal import Output

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document

PROMPT: Final = "overseer> "
DIGEST_TRIES: Final = 3
COMPLETION_SECONDS: Final = 2.0
"""How old the names may be that completion offers."""

SHOWN_TARGETS: Final = 6
"""In the banner."""

HISTORY_FILE: Final = "console_history"

Ask = Callable[[str], str | None]
"""Asks whoever is there a question; None when nobody is (any more)."""


class Command(NamedTuple):
    """What it is called, what follows it, what it does, and the verb of the command line that does it."""

    words: str
    arguments: str
    summary: str
    verb: tuple[str, ...]
    completes: str = ""
    """What its arguments are: ``targets``, ``inbox`` or nothing to be guessed."""


COMMANDS: Final = (
    Command("initiate patch", "[FILE] [CHECKSUM]", "apply a package, or all of the inbox, oldest build first",
            ("patch", "apply"), "inbox"),
    Command("plan", "[FILE]", "say what applying it would do", ("patch", "plan"), "inbox"),
    Command("inbox", "", "list what lies in the inbox", ("patch", "list")),
    Command("status", "[NAME]", "show what runs", ("status",), "targets"),
    Command("rollback", "TARGET|ID", "go back to the build before, or take a whole patch back",
            ("patch", "rollback"), "targets"),
    Command("drift", "[TARGET]", "list files that are not as patches have left them", ("patch", "drift"),
            "targets"),
    Command("commit", "ID", "commit a patch that waits for it", ("patch", "commit")),
    Command("abort", "ID", "end a patch that is under way, and put everything back", ("patch", "abort")),
    Command("history", "[TARGET]", "list what was applied and rolled back", ("patch", "history"), "targets"),
    Command("show", "ID|NAME", "show a transaction or a patch step by step, or a target",
            ("patch", "show"), "targets"),
    Command("start", "NAME", "start targets", ("start",), "targets"),
    Command("stop", "NAME", "stop targets", ("stop",), "targets"),
    Command("restart", "NAME", "stop and start targets", ("restart",), "targets"),
    Command("reload", "NAME", "have targets read their resources again", ("reload",), "targets"),
    Command("logs", "NAME", "print what targets write (-f to follow)", ("logs",), "targets"),
    Command("help", "", "show this list", ()),
    Command("exit", "", "leave, as quit and Ctrl-D do; nothing is stopped", ()),
)  # fmt: skip
_BY_WORDS: Final = {command.words: command for command in COMMANDS}
_ALIASES: Final = {"quit": "exit", "?": "help"}


class LeaveConsole(Exception):  # noqa: N818 - not an error
    """The operator wants to go."""


def _console(session: Session) -> int:
    """Read commands until there are no more."""
    if session.out.json_wanted:
        raise UsageError("the console is for people; for --json call the verbs themselves")
    console = Console(session)
    if not sys.stdin.isatty():
        return console.run_lines()
    return console.run_prompt()


class Console:
    """The commands and what they share: the connection, and the exit status of the last that failed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._out = session.out
        self._away = False
        self.exit_status = 0

    # --- reading commands -----------------------------------------------------------------------------------

    def run_lines(self) -> int:
        """Commands from a pipe or a file, one a line; ``#`` begins a remark."""
        lines = iter(sys.stdin)
        self.greet()
        for line in lines:
            try:
                self.obey(line.split("#", 1)[0], lambda _: next(lines, None))
            except LeaveConsole:
                break
            except KeyboardInterrupt:
                self._out.note("interrupted")
                return EXIT_INTERRUPTED
            if self._out.closed:
                break
        return self.exit_status

    def run_prompt(self) -> int:
        """Commands from a person. Ctrl-C cancels the command, not the console."""
        self.greet()
        prompt = _prompt_session(self._session, _Completer(self._session))

        def ask(question: str) -> str | None:
            with contextlib.suppress(EOFError, KeyboardInterrupt):
                answer: str = _plain_prompt(question)
                return answer
            return None

        while True:
            try:
                line = prompt.prompt(PROMPT)
            except KeyboardInterrupt:
                continue
            except EOFError:
                return 0
            try:
                self.obey(line, ask)
            except LeaveConsole:
                return 0
            except KeyboardInterrupt:
                self._out.clear_bar()
                self._out.note("cancelled")

    def greet(self) -> None:
        """Say who is at the other end, loudly if it takes anything for a patch."""
        out, ink = self._out, self._out.ink
        out.lines([ink("bold", "Patch Overseer"), ""])
        try:
            info = self._session.ask("supervisor.info")
            status = self._session.ask("status")
            listing = self._session.ask("patch.list")
        except SupervisorUnreachableError as error:
            self._lost(error)
            return
        except AsyncsupError as error:
            out.error(error)
            return
        targets = status["targets"]
        names = ", ".join(_target_word(target) for target in targets[:SHOWN_TARGETS])
        if len(targets) > SHOWN_TARGETS:
            names += f" and {len(targets) - SHOWN_TARGETS} more"
        lines = [
            f"supervisor  asyncsup {render.clean(info['version'])}, pid {info['pid']}, "
            f"up {render.duration(info['uptime'])}",
            f"region      {render.clean(info['region'])}",
            f"targets     {names or 'none'}",
            f"inbox       {render.clean(info['inbox'])}",
        ]
        if info["trust"] == "none":
            lines += ["", ink("red", "  !!  TRUST IS NONE: patches are applied WITHOUT ANY VERIFICATION  !!")]
        out.lines([*lines, ""])
        if listing["inbox"]:
            out.lines([*render.inbox_lines(listing, width=out.width, ink=ink), ""])
        else:
            out.lines(["the inbox is empty", ""])
        if out.is_terminal:
            out.lines(["`initiate patch` applies what lies in the inbox; `help` lists the commands"])

    # --- obeying --------------------------------------------------------------------------------------------

    def obey(self, line: str, ask: Ask) -> None:
        """Carry out one line. Errors are printed and remembered, not raised.

        Raises:
            LeaveConsole: it was `exit`.
        """
        try:
            status = self._carry_out(line, ask)
            if status:
                self.exit_status = status
        except SupervisorUnreachableError as error:
            self._lost(error)
        except AsyncsupError as error:
            self.exit_status = self._out.error(self._session.explain(error))

    def _carry_out(self, line: str, ask: Ask) -> int:
        command, arguments = understand(line)
        if command is None:
            return 0
        if command.words == "exit":
            raise LeaveConsole
        if command.words == "help":
            self._out.lines(help_lines(self._out))
            return 0
        self._check_back()
        if command.words == "initiate patch":
            return self._initiate_patch(arguments, ask)
        if command.words == "show" and not re.fullmatch("[0-9a-f]+", " ".join(arguments)):
            return self._run(["show", *arguments])
        return self._run([*command.verb, *arguments])

    def _run(self, argv: Sequence[str]) -> int:
        # The console's own options hold for all of its commands.
        try:
            verb, args = parse(argv)
        except SystemExit:  # `plan --help`
            return 0
        return verb.run(self._session.sibling(args, self._out))

    def _initiate_patch(self, arguments: Sequence[str], ask: Ask) -> int:
        options = [word for word in arguments if word.startswith("-")]
        words = [word for word in arguments if not word.startswith("-")]
        if options:
            return self._run(["patch", "apply", *arguments])
        if len(words) > 2:
            raise UsageError("initiate patch [FILE] [CHECKSUM]: at most one package and its checksum")
        if words:
            return self._apply(words[0], words[1] if len(words) == 2 else None, ask)
        entries = self._session.ask("patch.list")["inbox"]
        if not entries:
            self._out.lines(["the inbox is empty"])
            return 0
        for file in in_inbox(self._session, entries):
            self._out.lines([f"package {self._out.ink('bold', render.clean(file))}"])
            status = self._apply(file, None, ask)
            if status:
                return status
        return 0

    def _apply(self, package: str, checksum: str | None, ask: Ask) -> int:
        argv = ["patch", "apply", package]
        if checksum is None:
            checksum = self._wanted_checksum(package, ask)
        if checksum is not None:
            argv += checksum_option(checksum)
        return self._run(argv)

    def _wanted_checksum(self, package: str, ask: Ask) -> str | None:
        """Ask for the checksum where one is needed and none lies beside the package.

        It is tried on the package first: a slip of the finger is no reason to reject a package for good.

        Raises:
            UsageError: nobody answered, or never with the right one.
        """
        listing = self._session.ask("patch.list")
        if listing["trust"] != "digest":
            return None
        found = next((e for e in listing["inbox"] if e["file"] in {package, f"{package}.zip"}), None)
        if found is not None:
            name, where = found["file"], {"name": found["file"]}
            if found["checksum"]:
                return None
        else:
            path = Path(package).absolute()
            name, where = path.name, {"path": str(path)}
            if not path.is_file() or path.with_name(f"{name}.sha256").is_file():
                return None
            if self._session.client.endpoint.startswith("tcp://"):
                # The supervisor has not got it yet, and looks at it when it has.
                return ask(f"checksum of {render.clean(name)}: ") or None
        verified = self._session.client.call("patch.verify", where)
        kind = "CRC-32" if verified["format"] == "prototype" else "SHA-256"
        for _ in range(DIGEST_TRIES):
            answer = ask(f"{kind} of {render.clean(name)}: ")
            if answer is None or not answer.strip():
                break
            try:
                option, value = checksum_option(answer)
                self._session.client.call("patch.verify", {**where, option.removeprefix("--"): value})
            except AsyncsupError as error:
                if isinstance(error, SupervisorUnreachableError):
                    raise
                self._out.note(error.message)
            else:
                return answer
        raise UsageError(f"{name} was not applied: it needs its {kind}", code="trust.digest_missing")

    def _lost(self, error: SupervisorUnreachableError) -> None:
        self.exit_status = exit_status_of(error)
        self._away = True
        self._out.note(f"{error.message}; commands work again as soon as it is back")

    def _check_back(self) -> None:
        if self._away:
            info = self._session.ask("supervisor.info")
            self._away = False
            self._out.note(f"the supervisor is back (pid {info['pid']})")


def understand(line: str) -> tuple[Command | None, list[str]]:
    """The command of a line and its arguments; None for an empty line.

    Raises:
        UsageError: there is no such command; names the nearest one.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{error} in {line.strip()!r}") from None
    if not words:
        return None, []
    for count in (2, 1):
        name = " ".join(words[:count]).lower()
        command = _BY_WORDS.get(_ALIASES.get(name, name))
        if command is not None:
            return command, words[count:]
    import difflib  # noqa: PLC0415 - only on the way to an error

    known = [*_BY_WORDS, *_ALIASES]
    near = difflib.get_close_matches(" ".join(words[:2]).lower(), known, n=1) or difflib.get_close_matches(
        words[0].lower(), [*known, "initiate"], n=1
    )
    guess = {"initiate": "initiate patch"}.get(near[0], near[0]) if near else None
    hint = f"did you mean `{guess}`?" if guess else "`help` lists the commands"
    raise UsageError(f"there is no command {words[0]!r}; {hint}")


def checksum_option(text: str) -> list[str]:
    """The option for a checksum as it was typed: one of 64 characters is a SHA-256, any other a CRC-32."""
    text = text.strip()
    return ["--sha256" if len(text) == 64 else "--crc32", text]


def help_lines(out: Output) -> list[str]:
    rows = [(f"{command.words} {command.arguments}".rstrip(), command.summary) for command in COMMANDS]
    column = max(len(name) for name, _ in rows)
    return [f"  {out.ink('bold', f'{name:<{column}}')}  {summary}" for name, summary in rows]


def _target_word(target: Mapping[str, Any]) -> str:
    return f"{render.clean(target['name'])} (build {target['build']}, {render.clean(target['state'])})"


# --- the prompt of a terminal -------------------------------------------------------------------------------


class _Completer:
    """Offers commands, then the names they take; asks the supervisor for those at most every few seconds."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._names: dict[str, list[str]] = {}
        self._asked_at = -COMPLETION_SECONDS

    def candidates(self, line: str) -> tuple[list[str], str]:
        """What may follow in ``line``, and the beginning of it that is there already."""
        typed = line.lstrip()
        for command in COMMANDS:
            if typed.lower().startswith(f"{command.words} "):
                word = typed.rpartition(" ")[2]
                return [n for n in self._known(command.completes) if n.startswith(word)], word
        names = [*_BY_WORDS, *_ALIASES]
        return [name for name in names if name.startswith(typed.lower())], typed

    def _known(self, kind: str) -> list[str]:
        if time.monotonic() - self._asked_at > COMPLETION_SECONDS:
            self._asked_at = time.monotonic()
            try:
                status, listing = self._session.ask("status"), self._session.ask("patch.list")
                groups = self._session.ask("supervisor.info").get("groups", ())
            except AsyncsupError:
                self._names = {}  # no supervisor, no names; the command itself will say so
            else:
                self._names = {
                    "targets": [*(str(target["name"]) for target in status["targets"]), *groups],
                    "inbox": [str(entry["file"]) for entry in listing["inbox"]],
                }
        return self._names.get(kind, [])


def _prompt_session(session: Session, completer: _Completer) -> PromptSession[str]:
    from prompt_toolkit import PromptSession  # noqa: PLC0415 - a tenth of a second, and only on a terminal
    from prompt_toolkit.completion import Completer, Completion  # noqa: PLC0415
    from prompt_toolkit.history import FileHistory, InMemoryHistory  # noqa: PLC0415

    class Adapter(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            found, word = completer.candidates(document.text_before_cursor)
            for name in found:
                yield Completion(name, start_position=-len(word))

    path = history_path(session)
    return PromptSession(
        history=InMemoryHistory() if path is None else FileHistory(str(path)),
        completer=Adapter(),
        complete_while_typing=False,
        enable_history_search=True,
    )


def _plain_prompt(question: str) -> str:
    """A question whose answer belongs into no history."""
    from prompt_toolkit import prompt  # noqa: PLC0415

    answer: str = prompt(question)
    return answer


def history_path(session: Session) -> Path | None:
    """Where the history is kept: the supervisor's state folder, else the user's; a file only they can read.

    None when neither can be written to: then it lasts as long as the console.
    """
    for folder in _history_folders(session):
        path = folder / HISTORY_FILE
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            continue
        try:
            os.fchmod(descriptor, 0o600)
        except PermissionError:
            continue  # somebody else's
        finally:
            os.close(descriptor)
        return path
    return None


def _history_folders(session: Session) -> Iterator[Path]:
    with contextlib.suppress(SupervisorUnreachableError, NotAllowedError):
        state = Path(str(session.ask("supervisor.info")["state_dir"]))
        # Not that of a supervisor elsewhere, nor of another user, who could put a link in its place.
        with contextlib.suppress(OSError):
            if state.stat().st_uid == os.geteuid():
                yield state
    base = os.environ.get("XDG_STATE_HOME", "")
    yield Path(base if base.startswith("/") else Path.home() / ".local/state", "asyncsup")


CONSOLE = Action(_console)
