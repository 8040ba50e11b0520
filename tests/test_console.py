"""The Patch Overseer: from a pipe, from a person at a terminal, and when the supervisor comes and goes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Serve
from control_values import HISTORY, INBOX, PLAN, report, status, target
from fake_supervisor import PENDING, WAIT_SECONDS, Call, FakeSupervisor, RefusalError

from asyncsup import cli
from asyncsup.cli.command_line import parse
from asyncsup.cli.console import COMMANDS, _Completer, history_path, understand
from asyncsup.cli.session import Session
from asyncsup.errors import UsageError
from asyncsup.patch.build import build_prototype_patch
from asyncsup.terminal import Output

ASYNCSUP = [sys.executable, "-m", "asyncsup"]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Type = Callable[..., Outcome]


@pytest.fixture
def supervisor(short_tmp: Path) -> Iterator[FakeSupervisor]:
    inbox = short_tmp / "inbox"
    inbox.mkdir()
    handlers: dict[str, Callable[[Call], Any]] = {
        "status": lambda call: status(*map(target, call.params.get("names") or ("pricer", "web"))),
        "patch.list": lambda _: {"inbox": [], "folder": str(inbox), "trust": "digest"},
        "patch.verify": lambda _: {"format": "prototype"},
        "patch.apply": lambda _: report(),
        "patch.plan": lambda _: PLAN,
        "patch.history": lambda _: HISTORY,
        "patch.show": lambda _: HISTORY["transactions"][0],
        "patch.rollback": lambda _: report(action="rollback", build=200),
        "show": lambda call: target(call.params["name"]),
        "start": lambda _: {"results": []},
        "logs": lambda _: {"chunks": []},
    }
    with FakeSupervisor(short_tmp, handlers) as fake:
        yield fake


@pytest.fixture
def console(
    supervisor: FakeSupervisor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Type:
    """Give the console these lines through a pipe."""

    def type_lines(*lines: str, options: tuple[str, ...] = ()) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = cli.main(["--endpoint", supervisor.endpoint, *options, "console"])
        return Outcome(status, *capsys.readouterr())

    return type_lines


def inbox_of(supervisor: FakeSupervisor, *files: str, **listing: Any) -> Path:
    """Put packages into the inbox of the pretended supervisor."""
    folder = supervisor.folder / "inbox"
    entries: list[dict[str, Any]] = []
    for build, file in enumerate(files, 300):
        (folder / file).write_bytes(file.encode())
        entries.append({"file": file, "size": 5, "state": "complete", "format": "prototype", "build": build})

    def listed(_: Call) -> Any:
        for entry in entries:
            entry["checksum"] = (folder / f"{entry['file']}.sha256").exists()
        return {"inbox": entries, "folder": str(folder), "trust": "digest", **listing}

    supervisor.handlers["patch.list"] = listed
    return folder


# --- understanding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words", "arguments"),
    [
        ("initiate patch", "initiate patch", []),
        ("  Initiate  PATCH  my.zip 851398428 ", "initiate patch", ["my.zip", "851398428"]),
        ("plan 'a file.zip'", "plan", ["a file.zip"]),
        ("quit", "exit", []),
        ("?", "help", []),
        ("restart web --no-wait", "restart", ["web", "--no-wait"]),
    ],
)
def test_a_line_is_a_command_and_its_arguments(line: str, words: str, arguments: list[str]) -> None:
    command, found = understand(line)
    assert command is not None
    assert (command.words, found) == (words, arguments)


def test_an_empty_line_is_no_command() -> None:
    assert understand("   ") == (None, [])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("initiate pacth", "did you mean `initiate patch`?"),
        ("initiate", "did you mean `initiate patch`?"),
        ("rolback pricer", "did you mean `rollback`?"),
        ("xyzzy", "`help` lists the commands"),
        ("plan 'half", "No closing quotation"),
    ],
)
def test_an_unknown_command_names_the_nearest_one(line: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        understand(line)


# --- from a pipe --------------------------------------------------------------------------------------------


def test_the_banner_says_who_is_there_and_what_lies_in_the_inbox(
    console: Type, supervisor: FakeSupervisor
) -> None:
    supervisor.handlers["patch.list"] = lambda _: INBOX
    out = console().out
    assert "Patch Overseer" in out
    assert "supervisor  asyncsup 0.1.0, pid 4711, up 12 s" in out
    assert "region      us-east-1" in out
    assert "targets     pricer (build 200, running), web (build 200, running)" in out
    assert "no end record" in out
    assert "TRUST" not in out


def test_the_banner_stays_short_however_many_targets_there_are(
    console: Type, supervisor: FakeSupervisor
) -> None:
    supervisor.handlers["status"] = lambda _: status(*(target(f"t{n}") for n in range(1000)))
    assert "t5 (build 200, running) and 994 more\n" in console().out


def test_trust_none_is_loud(console: Type, supervisor: FakeSupervisor) -> None:
    supervisor.info["trust"] = "none"
    assert "!!  TRUST IS NONE: patches are applied WITHOUT ANY VERIFICATION  !!" in console().out


def test_every_command_reaches_the_supervisor(console: Type, supervisor: FakeSupervisor) -> None:
    outcome = console(
        "plan p.zip", "inbox", "status pricer", "rollback pricer", "history web", "show 12", "show 3f9a",
        "show pricer", "show", "start web", "logs pricer -n 5", "help", "# a remark", "", "exit",
        "status never",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert supervisor.called("patch.plan") == [{"name": "p.zip"}]
    assert supervisor.called("status")[1:] == [{"names": ["pricer"]}] * 2  # `show` as well
    assert supervisor.called("patch.rollback") == [{"target": "pricer", "wait_busy": True}]
    assert supervisor.called("patch.history") == [{"target": "web", "limit": 50}]
    assert supervisor.called("patch.show") == [{"id": "12"}, {"id": "3f9a"}]
    assert supervisor.called("show") == [{"name": "pricer"}]
    assert supervisor.called("start") == [{"names": ["web"], "wait": True}]
    assert supervisor.called("logs") == [{"name": "pricer", "stream": "stdout", "lines": 5}]
    assert all(command.words in outcome.out for command in COMMANDS)
    assert "rollback to build 200" in outcome.out


def test_all_commands_share_one_connection(console: Type, supervisor: FakeSupervisor) -> None:
    console("plan a", "rollback pricer", "plan b")
    peers = {call.envelope[0] for call in supervisor.calls if call.method in {"patch.plan", "patch.rollback"}}
    assert len(peers) == 1


def test_the_exit_status_is_that_of_the_last_command_that_failed(
    console: Type, supervisor: FakeSupervisor
) -> None:
    def refuse(_: Call) -> Any:
        raise RefusalError("for India", code="gate.region", exit_status=20)

    supervisor.handlers["patch.rollback"] = refuse
    outcome = console("nonsense", "rollback pricer", "history")
    assert outcome.status == 20
    assert "asyncsup: for India" in outcome.err
    assert console("rollback pricer", "nonsense", "history").status == 2
    assert console("rollback", "exit").status == 2


def test_initiate_patch_applies_the_inbox_oldest_build_first_with_checksums_beside(
    console: Type, supervisor: FakeSupervisor
) -> None:
    folder = inbox_of(supervisor, "b.zip", "a.zip")
    for file in ("a.zip", "b.zip"):
        (folder / f"{file}.sha256").write_text(f"{'0' * 64}  {file}\n")
    outcome = console("initiate patch")
    assert outcome.status == 0, outcome.err
    assert [call["name"] for call in supervisor.called("patch.apply")] == ["b.zip", "a.zip"]
    assert outcome.out.count("verdict: COMMITTED") == 2
    assert "target state\n    pricer:0 GO_AHEAD (0)" in outcome.out


def test_initiate_patch_asks_for_the_checksum_as_the_prototype_did(
    console: Type, supervisor: FakeSupervisor
) -> None:
    inbox_of(supervisor, "a.zip")
    assert console("initiate patch", "851398428").status == 0
    assert console("initiate patch a.zip", "AB" * 32).status == 0
    assert console("initiate patch a.zip 0x32bf3b1c").status == 0
    assert supervisor.called("patch.apply") == [
        {"name": "a.zip", "crc32": "851398428", "wait_busy": True},
        {"name": "a.zip", "sha256": "AB" * 32, "wait_busy": True},
        {"name": "a.zip", "crc32": "0x32bf3b1c", "wait_busy": True},
    ]


def test_a_wrong_checksum_may_be_corrected_before_the_package_is_rejected(
    console: Type, supervisor: FakeSupervisor
) -> None:
    def verify(call: Call) -> Any:
        if call.params.get("crc32") not in {None, "851398428"}:
            raise RefusalError("has another CRC-32", code="digest.crc32", exit_status=21)
        return {"format": "prototype"}

    inbox_of(supervisor, "a.zip")
    supervisor.handlers["patch.verify"] = verify
    outcome = console("initiate patch", "1", "851398428")
    assert outcome.status == 0
    assert outcome.err == "asyncsup: has another CRC-32\n"
    assert [call["crc32"] for call in supervisor.called("patch.apply")] == ["851398428"]
    outcome = console("initiate patch", "1", "2", "3", "851398428")
    assert "a.zip was not applied: it needs its CRC-32" in outcome.err
    assert len(supervisor.called("patch.apply")) == 1
    assert console("initiate patch").status == 2  # nobody there to answer


def test_without_verification_nobody_is_asked(console: Type, supervisor: FakeSupervisor) -> None:
    inbox_of(supervisor, "a.zip", trust="none")
    assert console("initiate patch").status == 0
    assert supervisor.called("patch.apply") == [{"name": "a.zip", "wait_busy": True}]


def test_initiate_patch_with_an_empty_inbox_says_so(console: Type) -> None:
    outcome = console("initiate patch")
    assert outcome.status == 0
    assert outcome.out.count("the inbox is empty") == 2


def test_initiate_patch_passes_options_on(console: Type, supervisor: FakeSupervisor) -> None:
    assert console("initiate patch a.zip --no-wait --crc32 5 --target web").status == 0
    assert supervisor.called("patch.apply") == [
        {"name": "a.zip", "crc32": "5", "target": "web", "wait_busy": False}
    ]


def test_the_console_is_for_people(console: Type) -> None:
    assert console(options=("--json",)).status == 2


def test_the_console_outlives_the_supervisor(
    short_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = {
        "status": lambda _: status(),
        "patch.list": lambda _: {"inbox": [], "folder": "/", "trust": "digest"},
        "patch.history": lambda _: HISTORY,
    }
    first, second = FakeSupervisor(short_tmp, handlers), FakeSupervisor(short_tmp, handlers)

    def lines() -> Iterator[str]:
        yield "history\n"
        first.stop()
        yield "history\n"
        yield "inbox\n"
        with second:
            yield "history\n"
            yield "exit\n"

    monkeypatch.setattr(sys, "stdin", _Lines(lines()))
    with first:
        status_ = cli.main(["--endpoint", first.endpoint, "console"])
    out, err = capsys.readouterr()
    assert status_ == 7
    assert out.count("pricing-rules") == 2
    where = f"asyncsup: no supervisor at {first.endpoint}"
    assert [line.partition(";")[0] for line in err.splitlines()] == [
        where, where, "asyncsup: the supervisor is back (pid 4711)",
    ]  # fmt: skip


class _Lines:
    """A stdin that makes things happen between two lines."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def isatty(self) -> bool:
        return False


# --- at a terminal ------------------------------------------------------------------------------------------


class Person:
    """Somebody at a terminal that runs the console."""

    def __init__(self, endpoint: str, **environ: str) -> None:
        self._screen, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*ASYNCSUP, "--endpoint", endpoint, "console"],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1", **environ},
        )  # fmt: skip
        os.close(theirs)
        self._read = b""

    def types(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def sees(self, pattern: str) -> str:
        """Wait for something on the screen after what was seen last; returns everything up to it."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            found = re.search(pattern.encode(), self._read)
            if found:
                seen, self._read = self._read[: found.end()], self._read[found.end() :]
                return seen.decode()
            if not select.select([self._screen], [], [], deadline - time.monotonic())[0]:
                break
            try:
                self._read += os.read(self._screen, 65536)
            except OSError:  # EIO: the console has ended
                break
        raise AssertionError(f"waited in vain for {pattern!r}; the screen has {self._read!r}")

    def leaves(self) -> int:
        self.sees("overseer>")
        self.types("\x04")
        try:
            return self.process.wait(WAIT_SECONDS)
        finally:
            self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._screen >= 0:
            os.close(self._screen)
            self._screen = -1


@pytest.fixture
def person(supervisor: FakeSupervisor) -> Iterator[Person]:
    person = Person(supervisor.endpoint)
    yield person
    person.close()


def test_a_person_is_asked_completes_and_leaves(person: Person, supervisor: FakeSupervisor) -> None:
    inbox_of(supervisor, "a.zip")
    person.sees("help` lists the commands")
    person.sees("overseer>")
    person.types("init\t")
    person.sees("iate patch")
    person.types("\r")
    person.sees(r"CRC-32 of a\.zip:")
    person.types("851398428\r")
    person.sees("verdict: COMMITTED")
    person.sees("overseer>")
    person.types("rollback pri\t")
    person.sees("cer")
    person.types("\r")
    person.sees("rollback to build 200")
    person.sees("overseer>")
    person.types("sttus\r")
    person.sees("did you mean `status`")
    assert person.leaves() == 0
    assert supervisor.called("patch.apply") == [{"name": "a.zip", "crc32": "851398428", "wait_busy": True}]
    history = supervisor.folder / "console_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    text = history.read_text()
    assert "initiate patch" in text
    assert "851398428" not in text


def test_ctrl_c_cancels_the_command_not_the_console(person: Person, supervisor: FakeSupervisor) -> None:
    def apply(_: Call) -> Any:
        supervisor.emit("patch.step", txn=3, step="stage", target="pricer", detail="done")
        return PENDING

    def cancel(_: Call) -> Any:
        supervisor.emit("patch.ended", txn=3, verdict="rolled_back")
        return {}

    supervisor.handlers |= {"patch.apply": apply, "cancel": cancel}
    person.sees("overseer>")
    person.types("half a line\x03")
    person.sees("overseer>")
    person.types("initiate patch a.zip 5\r")
    person.sees("stage")
    person.process.send_signal(signal.SIGINT)
    person.sees("transaction 3: rolled_back")
    person.sees("cancelled")
    person.sees("overseer>")
    person.types("history\r")
    person.sees("pricing-rules")
    assert person.leaves() == 0
    supervisor.wait_for("cancel")


def test_completion_knows_commands_targets_and_the_inbox(
    supervisor: FakeSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncsup.cli.console.COMPLETION_SECONDS", 3600.0)
    inbox_of(supervisor, "alpha.zip", "beta.zip")
    session = _session(supervisor.endpoint)
    completer = _Completer(session)
    assert completer.candidates("in") == (["initiate patch", "inbox"], "in")
    assert completer.candidates("initiate patch ") == (["alpha.zip", "beta.zip"], "")
    assert completer.candidates("plan be") == (["beta.zip"], "be")
    assert completer.candidates("restart p") == (["pricer"], "p")
    assert completer.candidates("restart pricer w") == (["web"], "w")
    assert completer.candidates("help x") == ([], "x")
    assert len(supervisor.called("status")) == 1  # and not at every key
    supervisor.stop()
    assert _Completer(session).candidates("restart p") == ([], "p")
    session.close()


def _session(endpoint: str) -> Session:
    _, args = parse(["--endpoint", endpoint, "console"])
    return Session(args, Output())


def test_the_history_is_private_and_no_link_is_followed(
    supervisor: FakeSupervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    (supervisor.folder / "console_history").symlink_to(elsewhere)
    path = history_path(_session(supervisor.endpoint))
    assert path == tmp_path / "state/asyncsup/console_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert elsewhere.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_no_history_is_left_in_the_folder_of_another_user(
    supervisor: FakeSupervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    supervisor.info["state_dir"] = str(theirs)
    assert history_path(_session(supervisor.endpoint)) == tmp_path / "state/asyncsup/console_history"
    assert not list(theirs.iterdir())


# --- the real supervisor ------------------------------------------------------------------------------------


def test_the_prototypes_session_with_the_real_supervisor(
    serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = serve.folder / "work"
    work.mkdir()
    (work / "job.json").write_text("old")
    serve.start(
        '[supervisor]\nregion = "us-east-1"\n[patch]\nprobation = "0s"\n[target.demo]\nbuild = 200\n'
        'command = ["sleep", "1000"]\nroot = "work"\nreload_command = ["true"]\nmin_uptime = "0s"\n'
    ).close()
    package = serve.inbox / "patch.zip"
    crc = build_prototype_patch(
        output=package, region="us-east-1", build=300, warm=True, modified={"/work/job.json": b"new"}
    )
    assert crc == zlib.crc32(package.read_bytes())
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    lines = ["initiate patch", str(crc ^ 1), str(crc), "history", "rollback demo", "status", "exit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    status_ = cli.main(["-c", str(serve.config), "console"])
    out, err = capsys.readouterr()
    assert "modified  job.json" in out, err
    assert "verdict: COMMITTED: every instance has it" in out
    assert digest[:12] in out
    assert "verdict: COMMITTED: back at the build before" in out
    assert "CRC-32" in err
    assert status_ == 0
    assert (work / "job.json").read_text() == "old"


def test_the_console_ends_when_its_reader_goes(supervisor: FakeSupervisor) -> None:
    child = subprocess.Popen(
        [*ASYNCSUP, "--endpoint", supervisor.endpoint, "console"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stderr is not None
    assert child.stdout.readline() == "Patch Overseer\n"
    child.stdout.close()
    stop = threading.Event()

    def talk() -> None:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            while not stop.wait(0.01):
                child.stdin.write("history\n")
                child.stdin.flush()

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        assert child.wait(WAIT_SECONDS) == 0
    finally:
        child.kill()
        stop.set()
        thread.join()
    with child.stderr:
        assert child.stderr.read() == ""
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
